# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""How processes find each other: the launchers on clusters, and a program joining its group."""

from __future__ import annotations

import shlex
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from scripts.visual_opsd import processes
from tests.shell import (
    DRY,
    ROOT,
    RUN_OPSD,
    dry_run,
    flag,
    run,
    torchrun_options,
    words_of,
    write_program,
)

TWO_ARNOLD_NODES = {
    "ARNOLD_WORKER_0_HOST": "10.0.0.7",
    "ARNOLD_WORKER_0_PORT": "9000,9001,9002",
    "ARNOLD_WORKER_GPU": "8",
    "ARNOLD_WORKER_NUM": "2",
    "ARNOLD_ID": "1",
}
TWO_SLURM_NODES = {
    "SLURM_JOB_ID": "31234",
    "SLURM_STEP_ID": "0",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_GPUS_ON_NODE": "8",
}


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,2,5"}, 3),
        ({"CUDA_VISIBLE_DEVICES": ""}, 1),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "0,1,-1,2"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "NPROC_PER_NODE": "4"}, 4),
        ({"HIP_VISIBLE_DEVICES": "0,1,3"}, 3),
        ({"ROCR_VISIBLE_DEVICES": "GPU-a,GPU-b,GPU-c,GPU-d", "HIP_VISIBLE_DEVICES": "1"}, 1),
        # SLURM without knowledge of the vendor sets both.
        ({"ROCR_VISIBLE_DEVICES": "0,1,2,3", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 4),
        ({}, 2),
    ],
)
def test_one_process_per_visible_gpu(
    programs: Path, environment: dict[str, str], count: int
) -> None:
    listing = "GPU 0: H100 (UUID: a)\\n  MIG 1g.10gb Device 0: (UUID: b)\\nGPU 1: H100 (UUID: c)\\n"
    write_program(programs / "nvidia-smi", f"#!/bin/sh\nprintf '{listing}'\n")
    words = dry_run(programs, RUN_OPSD, env=environment)
    assert torchrun_options(words) == ["--standalone", f"--nproc_per_node={count}"]


def test_hip_devices_are_counted(programs: Path) -> None:
    lines = "".join(
        f"GPU[{i}]\\t\\t: Device Name: MI300X\\nGPU[{i}]\\t\\t: Device ID: 0x74a1\\n"
        for i in range(12)
    )
    write_program(programs / "rocm-smi", f"#!/bin/sh\nprintf '==== ID ====\\n{lines}===='\n")
    assert torchrun_options(dry_run(programs, RUN_OPSD))[1] == "--nproc_per_node=12"
    write_program(programs / "rocm-smi", "#!/bin/sh\nexit 1\n")
    assert torchrun_options(dry_run(programs, RUN_OPSD))[1] == "--nproc_per_node=1"


POD = {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "3", "RANK": "2"}
PET = {
    "PET_NNODES": "3", "PET_NODE_RANK": "2", "PET_NPROC_PER_NODE": "8",
    "PET_MASTER_ADDR": "job-master-0", "PET_MASTER_PORT": "23456",
}  # fmt: skip
MEETING = {"PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": "job:29400", "PET_RDZV_ID": "job-1"}
FIRST = {"RANK": "0", "PET_NODE_RANK": "0"}


def static(processes: object, rank: int = 2, address: str = "job-master-0") -> str:
    return (
        f"--nnodes=3 --node_rank={rank} --nproc_per_node={processes} "
        f"--master_addr={address} --master_port=23456"
    )


@pytest.mark.parametrize(
    ("environment", "options"),
    [
        (POD, static(1)),  # PyTorchJob: the variables count nodes
        (POD | {"NPROC_PER_NODE": "4"}, static(4)),
        (POD | {"CUDA_VISIBLE_DEVICES": "0,1"}, static(2)),
        (PET, static(8)),
        (PET | {"PET_NNODES": "3:3", "PET_NPROC_PER_NODE": "gpu"}, static("gpu")),
        (PET | {"PET_NPROC_PER_NODE": "auto"}, static(1)),
        (PET | POD | {"WORLD_SIZE": "24"}, static(8)),  # WORLD_SIZE counts processes
        (PET | POD | FIRST | {"MASTER_ADDR": "localhost"}, static(8, rank=0)),
        (POD | FIRST | {"MASTER_ADDR": "localhost"}, static(1, rank=0, address="localhost")),
        (PET | MEETING, "--nnodes=3 --nproc_per_node=8"
         " --rdzv_backend=c10d --rdzv_endpoint=job:29400 --rdzv_id=job-1"),
        (MEETING | {"PET_NNODES": "1:4", "WORLD_SIZE": "9"}, "--nnodes=1:4 --nproc_per_node=1"
         " --rdzv_backend=c10d --rdzv_endpoint=job:29400 --rdzv_id=job-1"),
        ({"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_RDZV_ENDPOINT": "a:1"},
         "--nnodes=2 --node_rank=1 --nproc_per_node=1 --rdzv_backend=static --rdzv_endpoint=a:1"),
        ({"MASTER_ADDR": "h", "MASTER_PORT": "1234", "WORLD_SIZE": "1", "RANK": "0"}, None),
        (MEETING | {"PET_NNODES": "1:1"}, None),
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}, None),
        (TWO_ARNOLD_NODES | {"WORLD_SIZE": "16", "MASTER_ADDR": "10.0.0.7", "RANK": "1"},
         "--nnodes=2 --node_rank=1 --nproc_per_node=8 --master_addr=10.0.0.7 --master_port=9000"),
        # As scripts of SLURM users export them.
        (TWO_SLURM_NODES | {"MASTER_ADDR": "gpu07-ib", "MASTER_PORT": "29500", "WORLD_SIZE": "16"},
         "--nnodes=2 --node_rank=1 --nproc_per_node=8 --master_addr=gpu07-ib --master_port=29500"),
    ],
)  # fmt: skip
def test_nodes_join_by_the_variables_of_their_cluster(
    programs: Path, environment: dict[str, str], options: str | None
) -> None:
    words = torchrun_options(dry_run(programs, RUN_OPSD, env=environment))
    assert words == words_of(options or "--standalone --nproc_per_node=1")


def without(environment: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key != name}


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        # A part is set: each of these nodes would otherwise train by itself into one folder.
        (without(POD, "WORLD_SIZE"), "RANK=2 is set, but nothing says how many nodes"),
        (without(POD, "RANK"), "WORLD_SIZE=3, but this node's number"),
        (without(POD, "MASTER_ADDR"), "WORLD_SIZE=3, but the first node's address"),
        ({"MASTER_ADDR": "job-master-0"}, "MASTER_ADDR=job-master-0 is set"),
        ({"RANK": "0"}, "RANK=0 is set"),
        (without(PET, "PET_NNODES"), "PET_NODE_RANK=2 is set"),
        (without(PET, "PET_NODE_RANK"), "PET_NNODES=3, but this node's number"),
        (without(PET, "PET_MASTER_ADDR"), "PET_NNODES=3, but the first node's address"),
        ({"PET_RDZV_ENDPOINT": "job:29400"}, "PET_RDZV_ENDPOINT=job:29400 is set"),
        (PET | {"PET_RDZV_BACKEND": "c10d"}, "but PET_RDZV_ENDPOINT"),
        (PET | {"PET_NNODES": "1:4"}, "needs a meeting point: PET_RDZV_BACKEND"),
        # They contradict each other.
        (POD | TWO_SLURM_NODES, "WORLD_SIZE=3 contradicts SLURM_NNODES=2"),
        (POD | TWO_ARNOLD_NODES, "WORLD_SIZE=3 contradicts ARNOLD_WORKER_NUM=2"),
        (PET | POD | {"WORLD_SIZE": "16"}, "WORLD_SIZE=16 contradicts PET_NNODES=3"),
        (PET | {"SLURM_NNODES": "2"}, "PET_NNODES=3 contradicts SLURM_NNODES=2"),
        (PET | POD | {"RANK": "1"}, "PET_NODE_RANK=2 contradicts RANK=1"),
        (
            PET | POD | {"MASTER_ADDR": "other"},
            "PET_MASTER_ADDR=job-master-0 contradicts MASTER_ADDR",
        ),
        (TWO_SLURM_NODES | {"RANK": "0", "MASTER_ADDR": "g"}, "RANK=0 contradicts SLURM_NODEID=1"),
        (TWO_SLURM_NODES | TWO_ARNOLD_NODES | {"ARNOLD_ID": "0"}, "ARNOLD_ID=0 contradicts SLURM"),
        (POD | {"MASTER_ADDR": "job-0:23456"}, "MASTER_ADDR=job-0:23456 is no host name"),
        (POD | {"MASTER_ADDR": "tcp://job-0"}, "MASTER_ADDR=tcp://job-0 is no host name"),
        (PET | {"PET_MASTER_ADDR": "job-0 job-1"}, "PET_MASTER_ADDR=job-0 job-1 is no host name"),
        (PET | POD | {"MASTER_PORT": "1"}, "PET_MASTER_PORT=23456 contradicts MASTER_PORT=1"),
        (PET | {"PET_STANDALONE": "1"}, "PET_STANDALONE=1 contradicts PET_NNODES=3"),
        (POD | {"RANK": "3"}, "RANK=3 is not a whole number from 0 to 2"),
        ({"WORLD_SIZE": "1", "RANK": "1"}, "RANK=1, but WORLD_SIZE=1"),
        (POD | {"MASTER_ADDR": "127.0.0.1"}, "MASTER_ADDR=127.0.0.1 on node 2"),
        (PET | MEETING | {"PET_RDZV_ENDPOINT": "localhost:1"}, "PET_RDZV_ENDPOINT=localhost:1"),
        # No numbers; the last would be a command if bash computed with it.
        (POD | {"WORLD_SIZE": "three"}, "WORLD_SIZE=three is not a whole number"),
        (POD | {"RANK": "08"}, "RANK=08 is not a whole number"),
        (POD | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is not a whole number"),
        (PET | {"PET_NNODES": "4:2"}, "PET_NNODES=4:2 is neither"),
        ({"NPROC_PER_NODE": "a[$(touch here)]"}, "NPROC_PER_NODE=a[$(touch here)] is not"),
        # Started by something that starts one for each process.
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "1"}, "LOCAL_RANK=0 is set"),
    ],
)
def test_partial_and_contradictory_clusters_start_nothing(
    programs: Path, environment: dict[str, str], named: str
) -> None:
    done = run(programs, RUN_OPSD, env=DRY | environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert named in done.stderr


def test_arnold_variables(programs: Path) -> None:
    words = dry_run(programs, RUN_OPSD, env=TWO_ARNOLD_NODES | TWO_SLURM_NODES)
    assert torchrun_options(words) == [
        "--nnodes=2",
        "--node_rank=1",
        "--nproc_per_node=8",
        "--master_addr=10.0.0.7",
        "--master_port=9000",
    ]
    words = dry_run(programs, RUN_OPSD, env={"ARNOLD_WORKER_NUM": "1", "ARNOLD_WORKER_GPU": "4"})
    assert torchrun_options(words) == ["--standalone", "--nproc_per_node=4"]


@pytest.mark.parametrize("missing", ["ARNOLD_WORKER_0_HOST", "ARNOLD_ID"])
def test_an_incomplete_arnold_environment_is_an_error(programs: Path, missing: str) -> None:
    environment = {k: v for k, v in TWO_ARNOLD_NODES.items() if k != missing}
    done = run(programs, RUN_OPSD, env=DRY | environment)
    assert done.returncode == 2
    assert missing in done.stderr


def fake_scontrol(programs: Path, hosts: str = "gpu07\\ngpu08\\n") -> None:
    write_program(
        programs / "scontrol",
        f'#!/bin/sh\ntest "$1 $2 $3" = "show hostnames gpu[07-08]" || exit 3\nprintf "{hosts}"\n',
    )


def test_slurm_variables(programs: Path) -> None:
    fake_scontrol(programs)
    words = dry_run(programs, RUN_OPSD, env=TWO_SLURM_NODES)
    assert torchrun_options(words) == [
        "--nnodes=2",
        "--node_rank=1",
        "--nproc_per_node=8",
        "--master_addr=gpu07",
        "--master_port=21234",
    ]
    words = dry_run(programs, RUN_OPSD, env=TWO_SLURM_NODES | {"MASTER_PORT": "29999"})
    assert "--master_port=29999" in words
    # A step on one node of that job stands alone.
    words = dry_run(programs, RUN_OPSD, env=TWO_SLURM_NODES | {"SLURM_STEP_NUM_NODES": "1"})
    assert torchrun_options(words) == ["--standalone", "--nproc_per_node=8"]


def test_slurm_mistakes_are_named(programs: Path) -> None:
    done = run(programs, RUN_OPSD, env=DRY | TWO_SLURM_NODES)
    assert done.returncode == 2
    assert "scontrol" in done.stderr
    fake_scontrol(programs, hosts="")
    done = run(programs, RUN_OPSD, env=DRY | TWO_SLURM_NODES)
    assert done.returncode == 2
    assert "gpu[07-08]" in done.stderr
    fake_scontrol(programs)
    done = run(programs, RUN_OPSD, env=DRY | TWO_SLURM_NODES | {"SLURM_LOCALID": "3"})
    assert done.returncode == 2
    assert "--ntasks-per-node=1" in done.stderr
    outside = {k: v for k, v in TWO_SLURM_NODES.items() if k != "SLURM_STEP_ID"}
    done = run(programs, RUN_OPSD, env=DRY | outside)
    assert done.returncode == 0
    assert "not inside srun" in done.stderr


def test_the_slurm_example_starts_one_launcher_per_node(programs: Path, tmp_path: Path) -> None:
    fake_scontrol(programs)
    write_program(
        programs / "srun",
        "#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\n"
        'for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" || exit; done\n',
    )
    spooled = tmp_path / "slurm_script"
    shutil.copy(ROOT / "examples" / "slurm.sbatch", spooled)
    environment = DRY | TWO_SLURM_NODES | {"SLURM_SUBMIT_DIR": str(ROOT)}
    arguments = ("m", "fixed", "--resume", "latest")
    done = run(programs, spooled, *arguments, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    first, second = (shlex.split(line) for line in done.stdout.splitlines())
    assert "--node_rank=0" in first
    assert [word.replace("node_rank=0", "node_rank=1") for word in first] == second
    assert first[-2:] == ["--resume", "latest"]
    assert flag(first, "--teacher_mode") == "fixed"
    text = spooled.read_text()
    assert "#SBATCH --signal=TERM@300" in text
    # torchrun must give up before SLURM does.
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=290" in first


# -- a program that is started, by whatever -----------------------------------------------------

MEMBER = {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1", "MASTER_PORT": "29500"}
MEMBER |= {"MASTER_ADDR": "job-0"}


def set_only(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name in [*MEMBER, "LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"]:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not"),
        ({"RANK": "1"}, "RANK=1, but WORLD_SIZE"),  # would write into rank 0's files
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2, but WORLD_SIZE"),
        (POD, "MASTER_ADDR=job-master-0, MASTER_PORT=23456, but LOCAL_RANK not set"),
        (without(MEMBER, "MASTER_PORT"), "but MASTER_PORT not set"),
        (MEMBER | {"MASTER_ADDR": ""}, "but MASTER_ADDR not set"),
        (MEMBER | {"RANK": "3"}, "RANK=3 and LOCAL_RANK=1 must be less than WORLD_SIZE=3"),
        (MEMBER | {"WORLD_SIZE": "0"}, "must be less than WORLD_SIZE=0"),
        (MEMBER | {"WORLD_SIZE": "-3"}, "WORLD_SIZE='-3' in the environment"),
        (MEMBER | {"RANK": "one"}, "RANK='one' in the environment"),
        (MEMBER | {"MASTER_PORT": "65536"}, "MASTER_PORT=65536 is no port"),
    ],
)
def test_left_over_variables_are_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], named: str
) -> None:
    set_only(monkeypatch, environment)
    start = time.perf_counter()
    with pytest.raises(ValueError) as error:
        processes.init_distributed("cpu", 7200)
    assert named in f"{error.value}" and "\n" not in f"{error.value}"
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"MASTER_ADDR": "elsewhere", "MASTER_PORT": "1", "LOCAL_WORLD_SIZE": "8"},
        {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "23456"},
    ],
)
def test_a_single_process_needs_nobody(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    set_only(monkeypatch, environment)
    env = processes.init_distributed("cpu", 60)
    processes.shutdown()
    assert (env.rank, env.world_size, env.local_rank, env.local_world_size) == (0, 1, 0, 1)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_who_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "JOIN_TIMEOUT_S", 1.0)
    local = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    set_only(monkeypatch, MEMBER | local)
    hours = timedelta(hours=2)  # --timeout_s is for the collectives of a running group
    with pytest.raises(
        ValueError, match=r"rank 0 of 4 .* 127.0.0.1:\d+: rank 1, 2, 3 did not come"
    ):
        processes._meet(0, 4, hours)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(ValueError, match="address already in use"):
            processes._meet(0, 2, hours)
    monkeypatch.setenv("MASTER_PORT", free_port())
    with pytest.raises(ValueError, match=r"cannot meet the others at 127\.0") as error:
        processes._meet(1, 2, hours)
    assert "\n" not in f"{error.value}"


def test_all_who_come_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    set_only(monkeypatch, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()})

    def meet(rank: int) -> dist.Store:
        return processes._meet(rank, 3, timedelta(seconds=30))

    with ThreadPoolExecutor(3) as pool:
        first, second, _ = pool.map(meet, range(3))
    first.set("key", "value")
    assert second.get("key") == b"value"
