# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The shell side: launchers on one machine, how .venv is made, the Makefile's targets."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from scripts.visual_opsd.analysis.trace_rows import CollectSettings
from scripts.visual_opsd.cli import flat, parse_config
from scripts.visual_opsd.config import SFT_DEFAULTS, TrainConfig
from scripts.visual_opsd.training.offline import OFFLINE_DEFAULTS, OfflineConfig
from tests.shell import (
    DRY,
    LAUNCHERS,
    LEADING,
    ROOT,
    RUN_OPSD,
    dry_run,
    flag,
    program_arguments,
    run,
    torchrun_options,
    words_of,
    write_program,
)

MODULES = {
    "run_visual_opsd.sh": "scripts.visual_opsd.train_visual_opsd",
    "run_visual_opsd_noise.sh": "scripts.visual_opsd.train_visual_opsd",
    "run_visual_opsd_control.sh": "scripts.visual_opsd.train_visual_opsd",
    "run_sft_baseline.sh": "scripts.visual_opsd.train_sft",
    "run_kl_diagnostic.sh": "scripts.visual_opsd.kl_diagnostic",
    "run_collect_traces.sh": "scripts.visual_opsd.collect_traces",
    "run_visual_opsd_offline.sh": "scripts.visual_opsd.train_visual_opsd_offline",
}
# They read OPSD_VARIABLES.
OPSD_SCRIPTS = ("run_visual_opsd.sh", "run_visual_opsd_noise.sh", "run_visual_opsd_control.sh")
OPSD_VARIABLES = {
    "EMA_DECAY": ("--ema_decay", "0.9"),
    "JSD_TOP_K": ("--jsd_top_k", "32"),
    "JSD_TOKEN_CLIP": ("--jsd_token_clip", "0.1"),
    "CE_WEIGHT": ("--ce_weight", "0.5"),
    "SAMPLE_MAX_NEW": ("--sample_max_new_tokens", "64"),
    "SAMPLE_TEMP": ("--sample_temperature", "0.7"),
    "MAX_FORWARD_TOKENS": ("--max_forward_tokens", "4096"),
    "SAMPLE_MAX_IMAGE_SKIPS": ("--sample_max_image_skips", "2"),
}


def test_defaults_of_the_opsd_launcher(programs: Path) -> None:
    words = dry_run(programs, RUN_OPSD)
    assert words[:4] == ["cd", str(ROOT), "&&", "env"]
    assert "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True" in words
    assert "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=1800" in words
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600" in words
    assert torchrun_options(words) == ["--standalone", "--nproc_per_node=1"]
    output = "results/visual-opsd-ema-beta0.5"
    # Nothing else: the other defaults are the trainer's.
    assert program_arguments(words) == words_of(
        f"--results_dir {output} --checkpoint_dir {output}/checkpoints"
    )


def test_positional_arguments_in_order(programs: Path) -> None:
    words = dry_run(programs, RUN_OPSD, "m", "fixed", "0.25", "2.0", "0.5", "300", "mine")
    for name, value in {
        "--model_path": "m",
        "--teacher_mode": "fixed",
        "--jsd_beta": "0.25",
        "--jsd_temperature": "2.0",
        "--jsd_weight": "0.5",
        "--total_steps": "300",
        "--results_dir": "results/mine",
        "--checkpoint_dir": "results/mine/checkpoints",
    }.items():
        assert flag(words, name) == value


def test_an_empty_positional_argument_means_its_default(programs: Path) -> None:
    words = dry_run(programs, RUN_OPSD, "", "", "0.1")
    assert "--model_path" not in words
    assert flag(words, "--results_dir") == "results/visual-opsd-ema-beta0.1"


def test_the_noise_control_differs_in_the_noise_and_the_name_only(programs: Path) -> None:
    real = program_arguments(dry_run(programs, RUN_OPSD, "m", "fixed"))
    noise = program_arguments(
        dry_run(programs, LAUNCHERS / "run_visual_opsd_noise.sh", "m", "fixed")
    )
    assert flag(noise, "--noise_vt") == "True"
    assert flag(noise, "--results_dir") == "results/visual-opsd-noise-fixed-beta0.5"
    place = noise.index("--noise_vt")
    without = [word.replace("opsd-noise", "opsd") for word in noise[:place] + noise[place + 2 :]]
    assert without == real


def test_a_control_differs_in_what_is_shown_and_the_name_only(programs: Path) -> None:
    real = program_arguments(dry_run(programs, RUN_OPSD, "m", "fixed", "--lr", "1"))
    script = LAUNCHERS / "run_visual_opsd_control.sh"
    for kind in ("other", "none"):
        control = program_arguments(dry_run(programs, script, kind, "m", "fixed", "--lr", "1"))
        assert flag(control, "--results_dir") == f"results/visual-opsd-{kind}-fixed-beta0.5"
        place = control.index("--vt")
        assert control[place + 1] == kind
        rest = control[:place] + control[place + 2 :]
        assert [word.replace(f"opsd-{kind}", "opsd") for word in rest] == real
    for arguments in ((), ("--lr", "1"), ("-x",)):
        done = run(programs, script, *arguments, env=DRY)
        assert (done.returncode, "must be the KIND of control" in done.stderr) == (2, True)


def test_arguments_of_the_others(programs: Path) -> None:
    sft = LAUNCHERS / "run_sft_baseline.sh"
    words = dry_run(programs, sft)
    assert program_arguments(words) == words_of(
        "--results_dir results/sft-baseline --checkpoint_dir results/sft-baseline/checkpoints"
    )
    words = dry_run(programs, sft, "m", "8000", "long", "--sft_format", "reference")
    assert flag(words, "--total_steps") == "8000"
    assert flag(words, "--checkpoint_dir") == "results/long/checkpoints"
    assert flag(words, "--sft_format") == "reference"

    diagnostic = LAUNCHERS / "run_kl_diagnostic.sh"
    assert program_arguments(dry_run(programs, diagnostic)) == []
    words = dry_run(programs, diagnostic, "m", "50", "results/kl", "--seed", "3")
    assert program_arguments(words) == words_of(
        "--model_path m --num_samples 50 --output_dir results/kl --seed 3"
    )

    collecting = LAUNCHERS / "run_collect_traces.sh"
    assert program_arguments(dry_run(programs, collecting)) == []
    words = dry_run(programs, collecting, "m", "results/cache", "--completions", "base")
    assert program_arguments(words) == words_of(
        "--model_path m --output_dir results/cache --completions base"
    )
    offline = LAUNCHERS / "run_visual_opsd_offline.sh"
    output = "results/visual-opsd-offline"
    assert program_arguments(dry_run(programs, offline)) == words_of(
        f"--results_dir {output} --checkpoint_dir {output}/checkpoints"
    )
    words = dry_run(programs, offline, "m", "results/cache", "0.25", "3.0", "400", "mine")
    assert program_arguments(words) == words_of(
        "--model_path m --teacher_cache results/cache --jsd_weight 0.25 --jsd_temperature 3.0 "
        "--total_steps 400 --results_dir results/mine --checkpoint_dir results/mine/checkpoints"
    )


@pytest.mark.parametrize("script", OPSD_SCRIPTS)
def test_environment_variables_become_flags_only_when_set(programs: Path, script: str) -> None:
    leading = LEADING.get(script, ())
    plain = dry_run(programs, LAUNCHERS / script, *leading, env={"EMA_DECAY": ""})
    for name, (option, value) in OPSD_VARIABLES.items():
        assert option not in plain
        words = dry_run(programs, LAUNCHERS / script, *leading, env={name: value})
        assert flag(words, option) == value
        assert len(words) == len(plain) + 2


def test_further_flags_pass_through_last_and_untouched(programs: Path) -> None:
    extra = ["--lr", "5e-6", "--instruction_suffix", "two words; $HOME 'quoted'", "--jsd_beta", "1"]
    words = dry_run(programs, RUN_OPSD, "m", *extra, env={"JSD_TOP_K": "8"})
    assert words[-len(extra) :] == extra
    assert flag(words, "--jsd_beta") == "1"  # a flag beats the positional argument
    assert "--teacher_mode" not in words


@pytest.mark.parametrize("script", sorted(MODULES))
def test_every_launcher_works_from_another_directory(
    programs: Path, tmp_path: Path, script: str
) -> None:
    words = dry_run(programs, LAUNCHERS / script, *LEADING.get(script, ()), cwd=tmp_path)
    assert words[1] == str(ROOT)
    assert words[words.index("-m", words.index("torch.distributed.run")) + 1] == MODULES[script]


def test_cdpath_does_not_lead_astray(programs: Path, tmp_path: Path) -> None:
    relative = RUN_OPSD.relative_to(ROOT)
    (tmp_path / relative.parent).mkdir(parents=True)
    assert dry_run(programs, relative, env={"CDPATH": str(tmp_path)})[1] == str(ROOT)


def test_a_relative_model_path_is_the_callers_if_it_exists_there(
    programs: Path, tmp_path: Path
) -> None:
    (tmp_path / "my model").mkdir()
    words = dry_run(programs, RUN_OPSD, "my model", cwd=tmp_path)
    assert flag(words, "--model_path") == str(tmp_path / "my model")
    words = dry_run(programs, RUN_OPSD, "models/other", cwd=tmp_path)
    assert flag(words, "--model_path") == "models/other"


@pytest.mark.parametrize("script", sorted(MODULES))
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_usage(programs: Path, script: str, option: str) -> None:
    done = run(programs, LAUNCHERS / script, option)
    assert done.returncode == 0
    leading = "KIND " * (script in LEADING)
    assert f"usage: {script} {leading}[MODEL_PATH]" in done.stdout
    for name in ("DRY_RUN", "PYTHON", "NPROC_PER_NODE", "SHUTDOWN_TIMEOUT", "ARNOLD_ID"):
        assert name in done.stdout
    if script in OPSD_SCRIPTS:
        assert all(name in done.stdout for name in OPSD_VARIABLES)
    assert max(len(line) for line in done.stdout.splitlines()) <= 100


def test_mistakes_are_named(programs: Path) -> None:
    done = run(programs, RUN_OPSD, "m", "-x", env=DRY)
    assert (done.returncode, "unknown option -x" in done.stderr) == (2, True)
    done = run(programs, LAUNCHERS / "run_sft_baseline.sh", *"abcd", env=DRY)
    assert (done.returncode, "at most 3" in done.stderr) == (2, True)


def test_the_launcher_becomes_the_interpreter(programs: Path, tmp_path: Path) -> None:
    """No shell stays between the scheduler's SIGTERM and torchrun."""
    python = write_program(
        tmp_path / "bin" / "python", '#!/bin/sh\necho "$$" "$@"\nexec sleep 30\n'
    )
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "PYTHON": "bin/python"}
    with subprocess.Popen(
        ["bash", str(RUN_OPSD)], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == -signal.SIGTERM
    assert words[0] == str(process.pid)
    assert words[1:3] == ["-m", "torch.distributed.run"]
    assert python.exists()


def parsed(programs: Path, script: str, *arguments: str, **environment: str) -> dict[str, object]:
    """The settings that the trainer reads from a launcher's arguments."""
    words = dry_run(programs, LAUNCHERS / script, *arguments, env=environment)
    defaults = {"run_sft_baseline.sh": SFT_DEFAULTS, "run_visual_opsd_offline.sh": OFFLINE_DEFAULTS}
    config = OfflineConfig if "offline" in script else TrainConfig
    return flat(parse_config(config, program_arguments(words), "", defaults.get(script)))


def test_what_the_trainers_get_by_default_is_the_paper(programs: Path) -> None:
    output = {"results_dir": "results/visual-opsd-ema-beta0.5"}
    output["checkpoint_dir"] = output["results_dir"] + "/checkpoints"
    opsd = parsed(programs, "run_visual_opsd.sh")
    assert opsd == flat(TrainConfig()) | output
    # What the usage and the name of the results say.
    said = {
        "model_path": "models/ThinkMorph-7B",
        "teacher_mode": "ema",
        "jsd_beta": 0.5,
        "jsd_temperature": 1.0,
        "jsd_weight": 1.0,
        "total_steps": 1000,
        "ema_decay": 0.995,
        "jsd_top_k": 256,
        "jsd_token_clip": 0.05,
        "ce_weight": 0.0,
        "sample_max_new_tokens": 1024,
        "sample_temperature": 1.0,
        "max_forward_tokens": 10240,
        "sample_max_image_skips": 1,
        "noise_vt": False,
        "save_every": 500,
    }
    assert {name: opsd[name] for name in said} == said
    assert parsed(programs, "run_visual_opsd_noise.sh")["noise_vt"] is True
    sft = parsed(programs, "run_sft_baseline.sh")
    assert (sft["model_path"], sft["total_steps"]) == ("models/BAGEL-7B-MoT", 2000)
    offline = parsed(programs, "run_visual_opsd_offline.sh")
    said = {
        "model_path": "models/ThinkMorph-7B",
        "teacher_cache": "results/teacher-cache",
        "kd_loss": "kl",
        "kd_use_vt_weights": True,
        "jsd_weight": 0.5,
        "jsd_temperature": 2.0,
        "ce_weight": 1.0,
        "total_steps": 8000,
    }
    assert {name: offline[name] for name in said} == said
    assert OFFLINE_DEFAULTS["results_dir"] == offline["results_dir"]
    assert CollectSettings().output_dir == offline["teacher_cache"]


def test_the_trainer_understands_every_argument(programs: Path) -> None:
    environment = {name: value for name, (_, value) in OPSD_VARIABLES.items()}
    arguments = ("m", "fixed", "0.25", "2.0", "0.5", "300", "mine", "--num_shard", "4")
    settings = parsed(programs, "run_visual_opsd_noise.sh", *arguments, **environment)
    for option, value in OPSD_VARIABLES.values():
        assert settings[option.removeprefix("--")] == pytest.approx(float(value))
    assert settings["teacher_mode"] == "fixed"
    assert settings["total_steps"] == 300
    assert settings["num_shard"] == 4


@pytest.mark.parametrize("script", sorted(MODULES))
def test_the_programs_exist_and_know_the_flags_of_their_launcher(
    programs: Path, script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = {"run_collect_traces.sh": "1", "run_visual_opsd_offline.sh": "12345"}
    given = ("m", *numbers.get(script, "123456" if script in OPSD_SCRIPTS else "12"))
    words = program_arguments(
        dry_run(programs, LAUNCHERS / script, *LEADING.get(script, ()), *given)
    )
    with pytest.raises(SystemExit) as exit_code:
        importlib.import_module(MODULES[script]).main(["--help"])
    assert exit_code.value.code == 0
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    assert {word for word in words if word.startswith("--")} <= known


# A stand-in for Python: it says it is supported, makes "environments" that are copies of itself
# and notes what it was asked to run and whether it saw the Makefile's own variables.
FAKE_PYTHON = """#!/bin/bash
case "$1 $2" in
    "-c import ensurepip, venv") exit {venv_status} ;;
    -c*) exit 0 ;;
    "--version "*) echo "Python 3.12.9" ;;
    "-m venv") mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
    "-m pip") [[ $3 == --version ]] || echo "pip ${{*:3}}" >>{log} ;;
    *) echo "run $* PYTHON=${{PYTHON-unset}} TORCH_INDEX=${{TORCH_INDEX-unset}}" >>{log} ;;
esac
"""


def fake_python(path: Path, log: Path, venv_status: int = 0) -> Path:
    return write_program(path, FAKE_PYTHON.format(log=log, venv_status=venv_status))


@pytest.fixture
def broken_pythons(programs: Path) -> Path:
    """PATH on which every Python is a version manager's stand-in that only prints an error."""
    for name in ("python3.13", "python3.12", "python3.11", "python3", "python"):
        write_program(programs / name, "#!/bin/sh\necho 'command not found' >&2\nexit 127\n")
    return programs


MAKE_VENV = ROOT / "scripts" / "make_venv.sh"


def test_make_venv_skips_interpreters_that_do_not_run(broken_pythons: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    fake_python(broken_pythons / "python3.12", log, venv_status=1)
    fake_python(broken_pythons / "python3.11", log)
    done = run(broken_pythons, MAKE_VENV, str(tmp_path / "venv"), "requirements.txt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "with python3.11 (Python 3.12.9)" in done.stdout
    (line,) = log.read_text().splitlines()
    assert line.endswith("install -c constraints.txt -r requirements.txt")
    # What is there and works is kept.
    done = run(broken_pythons, MAKE_VENV, str(tmp_path / "venv"), "requirements.txt")
    assert "making" not in done.stdout


def test_make_venv_names_what_is_missing(broken_pythons: Path, tmp_path: Path) -> None:
    venv = str(tmp_path / "venv")
    done = run(broken_pythons, MAKE_VENV, venv, "requirements.txt")
    assert done.returncode == 1
    assert "no working Python 3.11, 3.12 or 3.13" in done.stderr
    done = run(broken_pythons, MAKE_VENV, venv, "requirements.txt", env={"PYTHON": "python3.12"})
    assert done.returncode == 1
    assert "PYTHON=python3.12 is not a working" in done.stderr
    fake_python(broken_pythons / "python3", tmp_path / "log", venv_status=1)
    done = run(broken_pythons, MAKE_VENV, venv, "requirements.txt")
    assert done.returncode == 1
    assert "python3-venv" in done.stderr
    assert not Path(venv).exists()
    assert run(broken_pythons, MAKE_VENV, venv).returncode == 2


@pytest.mark.skipif(shutil.which("uv") is None, reason="needs uv")
def test_uv_resolves_the_requirements(tmp_path: Path) -> None:
    def uv(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"VIRTUAL_ENV": str(tmp_path / "venv")}
        return subprocess.run(
            ["uv", *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    assert uv("venv", str(tmp_path / "venv")).returncode == 0
    files = ("-c", "constraints.txt", "-r", "requirements.txt")
    done = uv("pip", "install", "--dry-run", *files)
    if any(word in done.stderr for word in ("dns error", "error sending request")):
        pytest.skip("no network")
    assert done.returncode == 0, done.stderr
    pinned = re.findall(r"^\w[\w.-]+==\S+", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    wanted = {line.lower().replace("_", "-") for line in pinned}
    named = re.findall(r"^(\w[\w-]*)>=", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    chosen = set(re.findall(r"^ \+ (\S+)", done.stderr, re.MULTILINE))
    assert {n.lower().replace("_", "-") for n in named} <= {line.split("==")[0] for line in chosen}
    assert {line for line in chosen if not line.startswith(("nvidia", "triton", "cuda"))} <= wanted


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_sets_up_once_and_passes_the_seed(programs: Path, tmp_path: Path) -> None:
    copy = tmp_path / "clone"
    (copy / "scripts").mkdir(parents=True)
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt", "constraints.txt"):
        shutil.copy(ROOT / name, copy / name)
    shutil.copy(MAKE_VENV, copy / "scripts")
    log = tmp_path / "log"
    python = fake_python(tmp_path / "python", log)

    def make(*arguments: str) -> list[str]:
        log.write_text("")
        subprocess.run(
            ["make", *arguments],
            cwd=copy,
            env={"PATH": f"{programs}:/usr/bin:/bin"},
            capture_output=True,
            check=True,
            timeout=60,
        )
        return log.read_text().splitlines()

    demo = "run -m scripts.miniworld.demo --seed 3 --fast PYTHON=unset TORCH_INDEX=unset"
    first = make("demo", "SEED=3", f"PYTHON={python}", "ARGS=--fast")
    assert len(first) == 2
    assert first[0].endswith("install -c constraints.txt -r requirements.txt")
    assert first[1] == demo
    assert make("demo", "SEED=3", f"PYTHON={python}", "ARGS=--fast") == [demo]

    tested = make("test", "WORKERS=1", "ARGS=-x")
    assert tested[0].endswith("install -c constraints.txt -r requirements-dev.txt")
    assert tested[1].startswith("run -m pytest -n 1 --dist loadfile -x ")

    index = make("demo", "TORCH_INDEX=https://torch.example/cpu")
    assert "--index-url https://torch.example/cpu -c constraints.txt torch" in index[0]
    assert "--no-deps" in index[0]
    assert index[1].endswith("-r requirements.txt")
    assert len(make("demo", "TORCH_INDEX=https://torch.example/cpu")) == 1
    assert len(make("demo")) == 1  # the choice stays
