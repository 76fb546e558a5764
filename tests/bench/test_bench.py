# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The benchmarks run on any machine, and their report and table hold what they promise."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.bench import all as bench
from scripts.bench import decode, gather, lab, load, optimizer, paper_shape, saving
from scripts.visual_opsd.cli import run_main
from scripts.visual_opsd.processes import process_group
from tests.shell import write_program

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = json.loads((ROOT / "docs/benchmarks/h100.json").read_text())
MEASURED = {key: entry for key, entry in COMMITTED.items() if key != "run"}
FIELDS = {"median", "spread", "floor", "ratio", "target", "reference", "settings"}


def test_tiny_versions_of_all_make_one_report_and_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One part is a program, as all are outside this test; the others run here, which is faster."""
    start = bench.run_part

    def run_part(name: str, arguments: list[str]) -> dict[str, Any]:
        if name == "load":
            return start(name, arguments)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            assert not import_module(f"scripts.bench.{name}").main(arguments)
        found: dict[str, Any] = json.loads(said.getvalue().splitlines()[-1])
        return found

    monkeypatch.setattr(bench, "run_part", run_part)
    file = tmp_path / "report.json"
    assert bench.main(["--tiny", "--device", "cpu", "--repeats", "1", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report.keys() == {*bench.NAMES, "run"}
    run = report.pop("run")
    for key, entry in report.items():
        assert entry.keys() == FIELDS, key
        assert entry["median"] > 0 or key.endswith("_gb"), key  # no GPU, no GPU memory
        assert entry["target"] is None and entry["reference"] is None
    assert run["tiny"] and run["hardware"] == "cpu"
    assert set(run["ceilings"]) == set(bench.PARTS)
    notes = run["notes"]
    assert notes["greedy_agreement"]["rows_that_part"] == 0  # one path on a CPU
    assert notes["vt512"]["from_the_eager_path"]["worst"] == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("| ")]) == len(bench.NAMES) + 1


def test_the_table_says_what_was_missed() -> None:
    entry = dict.fromkeys(FIELDS, 1.0) | {"median": 3.0, "target": 2.5, "reference": None}
    table = bench.table({"vt512_s": entry, "load_s": entry | {"median": 2.0}})
    assert "| visual thought of 512 x 512, s | 3 (missed) | 1 | 1 | 1 | 2.5 | - |" in table
    assert "| loading 16.1 GB of weights, s | **2** |" in table


def test_mistakes_are_said_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the true size needs a GPU"):
        decode.main(["--device", "cpu"])
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        load.main(["--tiny", "--device", "cpu", "--repeats", "0"])
    with pytest.raises(ValueError, match="the true size needs a GPU"):
        bench.main(["--only", "decode", "--device", "cpu"])
    for device in ("gpu", "meta"):
        with pytest.raises(ValueError, match=f"--device {device}: choose cuda"):
            decode.main(["--tiny", "--device", device])
    nowhere = tmp_path / "nothing" / "x.json"
    for main in (bench.main, decode.main, gather.main):
        with pytest.raises(ValueError, match="its folder does not exist"):
            main(["--tiny", "--device", "cpu", "--json", str(nowhere)])
        with pytest.raises(ValueError, match="is a folder; name a file"):
            main(["--tiny", "--device", "cpu", "--json", str(tmp_path)])
    with pytest.raises(ValueError, match="its parent does not exist"):
        load.main(["--tiny", "--device", "cpu", "--folder", str(nowhere)])
    with pytest.raises(ValueError, match="must be at least 1"):
        gather.main(["--tiny", "--device", "cpu", "--repeats", "0"])


def test_a_part_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = dict.fromkeys(FIELDS, 1.0)
    shared = ("hardware", "versions", "dtype", "tiny", "reference_hardware", "ceilings", "notes")

    def run_part(name: str, arguments: list[str]) -> dict[str, Any]:
        if name == "load":
            raise ValueError("scripts.bench.load ended with code 1")
        return {"vt512_s": entry, "run": {key: {} for key in shared}}

    monkeypatch.setattr(bench, "run_part", run_part)
    file = tmp_path / "x.json"
    words = ["--tiny", "--device", "cpu", "--only", "load", "vt_image", "--json", str(file)]
    with pytest.raises(ValueError, match=r"load ended with code 1$"):
        bench.main(words)
    report = json.loads(file.read_text())
    assert report.keys() == {"vt512_s", "run"}
    assert report["run"]["command"] == " ".join(["python -m scripts.bench.all", *words])
    assert "| visual thought of 512 x 512, s |" in capsys.readouterr().out


def test_an_unknown_fast_path_ends_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISUAL_OPSD_EAGER", "typo")
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: 0)
    assert ended.value.code == 1


def test_gathering_is_timed_in_its_three_ways(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.bench.gather", "--tiny", "--device", "cpu"]
    file = tmp_path / "gather.json"
    done = subprocess.run(
        [*command, "--repeats", "2", "--json", str(file)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert report == json.loads(done.stdout) and report["tiny"]
    for way in ("bound", "copied", "refreshed"):
        assert report[way]["median_s"] > 0


def test_saving_is_measured_and_survives_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is killed is a process; the other parts are run here."""

    def here(part: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
        with process_group("cpu", 60) as env:
            return saving.run_part(part, folder, saving.TINY, env)

    monkeypatch.setattr(saving, "part_in_fresh_process", here)
    file, folder = tmp_path / "saving.json", tmp_path / "states"
    words = ["--tiny", "--device", "cpu", "--folder", str(folder), "--json", str(file)]
    assert saving.main(words) == 0
    report = json.loads(file.read_text())
    assert report["digests_equal"] and report["run"]["tiny"] and not list(folder.iterdir())
    assert 0 < report["kill"]["killed_at_gb"] < report["state_gb"] < 0.1
    for part in ("save", "load", "load_after_kill"):
        assert report[part]["seconds"] > 0 and report[part]["pinned_gb"] == 0
    # A kill that comes too late, and another state than was saved, are errors.
    with pytest.raises(ValueError, match="not killed in the middle"):
        monkeypatch.setattr(saving, "command", lambda *_: [sys.executable, "-c", ""])
        saving.main([*words, "--overwrite"])
    monkeypatch.setattr(saving, "kill_in_a_save", lambda *_: {})
    numbers = iter(range(9))
    monkeypatch.setattr(saving, "digest", lambda _: next(numbers))
    with pytest.raises(ValueError, match="other values than were saved"):
        saving.main([*words, "--overwrite"])
    (folder / "x").touch()
    with pytest.raises(ValueError, match="is not empty"):
        saving.main([*words, "--overwrite"])


def test_a_digest_counts_every_bit_and_its_place() -> None:
    with process_group("cpu", 60) as env:
        state = saving.random_state(saving.TINY, env, seed=1)
        found = {saving.digest(state)}
        for part in (saving.shards(state)[3], saving.shards(state)[-1]):
            values = part.view(-1)
            with torch.no_grad():
                values[:2] = values[:2].flip(0)
                found.add(saving.digest(state))
                values[5] = torch.nextafter(values[5], values[5] + 1)
                found.add(saving.digest(state))
    assert len(found) == 5


def test_optimizer_steps_are_timed_beside_transfers(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.bench.optimizer", "--tiny", "--device", "cpu"]
    file = tmp_path / "optimizer.json"
    more = ["--repeats", "1", "--only", "gpu", "host", "--json", str(file)]
    done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert report == json.loads(done.stdout) and report["tiny"]
    least = 8 * report["parameters"] / 1e9 / report["gb_s"]["both"]
    assert report["transfer_s"] == pytest.approx(least, abs=1e-3)
    for kind in ("gpu", "host"):
        assert report[kind]["median_s"] > 0
    assert "8bit" not in report
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        optimizer.main(["--tiny", "--device", "cpu", "--repeats", "0"])


def test_the_paper_shape_times_a_run_of_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process through the launcher, ended as soon as it has shown two steps."""
    monkeypatch.setattr(paper_shape, "WARM_UP", 1)
    out = tmp_path / "out"
    words = ["1", "--tiny", "--device", "cpu", "--only", "speed", "--steps", "1", "--out", str(out)]
    assert paper_shape.main(words) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["run"]["how"]["command"] == " ".join(["scripts/bench/paper_shape.sh", *words])
    found = report["speed"]["1x1"]
    assert found["mesh"] == [1, 1] and 0 < found["completion_length"]["median"] <= 24
    assert found["step_s"]["median"] > found["seconds/train"]["median"] > 0
    assert found["rank0/host_gb"] > found["rank0/host_own_gb"] > 0
    assert (found["layers"], found["rows"]) == (paper_shape.TINY.llm.num_hidden_layers, 16)
    assert found["planned/peak_gb"] > found["planned/resident_gb"] > 0
    assert 0 < report["speed"]["1x1-12"]["completion_length"]["median"] <= 12
    lines = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    assert [line["part"] for line in lines] == ["run", "bases", "speed", "speed"]
    assert "run_visual_opsd.sh" in (out / "log.txt").read_text()
    with pytest.raises(ValueError, match="holds an earlier run"):
        paper_shape.main(words)
    for wrong, message in (
        (["2", "--device", "cpu"], "the true size needs GPUs"),
        (["2", "--only", "speed,all"], "--only all: choose among speed"),
    ):
        with pytest.raises(ValueError, match=message):
            paper_shape.main([*wrong, "--out", str(tmp_path / "other")])
    for wrong in (["3"], ["2", "--layers", "0"]):
        with pytest.raises(SystemExit):
            paper_shape.main(wrong)


def test_only_visible_gpus_are_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_program(tmp_path / "nvidia-smi", '#!/bin/sh\nfor x in "$@"; do echo "$x"; done\n')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for visible, given in (("2,3", True), ("", False)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert ("--id=2,3" in lab.ask_gpus("name")) is given


def test_waiting_is_what_no_phase_holds() -> None:
    shared = {"completion_length": 5, "scored_tokens": 9, "loss": 1.0, "grad_norm": 1.0}
    shared |= {"peak_memory_gb": 2.0, "tokens_per_s/sample": 7.0}
    lines = [{**shared, "seconds/sample": s, "seconds/train": 1.0} for s in (9.0, 2.0, 3.0)]
    run = lab.Run(lines, [10.0, 14.0, 18.5], [], "", None, 20.0)
    found = run.figures(skip=1)
    assert found["step_s"] == {"median": 4.25, "spread": 0.5}
    assert found["waiting_s"] == {"median": 0.75, "spread": 0.5}
    config = load.BagelConfig(paper_shape.TINY.llm, paper_shape.TINY.vision)
    one, shards, both = (paper_shape.traffic_gb(config, *m) for m in ((1, 1), (1, 2), (2, 1)))
    assert one["gathered_pack_gb"] == one["reduced_pack_gb"] == both["gathered_pack_gb"] == 0
    assert shards["gathered_pack_gb"] == pytest.approx(3 * shards["gathered_rollout_gb"], abs=2e-3)
    assert both["reduced_pack_gb"] == pytest.approx(2 * shards["reduced_pack_gb"], abs=2e-3)


# ---------------------------------------------------------------------------- what is committed


def test_the_committed_report_is_complete() -> None:
    assert MEASURED.keys() == bench.NAMES.keys()
    assert not COMMITTED["run"]["tiny"] and "H100" in COMMITTED["run"]["hardware"]
    for key, entry in MEASURED.items():
        assert entry.keys() == FIELDS, key
        assert entry["median"] > 0 and entry["target"] > 0 and entry["settings"], key
        if entry["floor"]:
            assert entry["ratio"] == pytest.approx(entry["median"] / entry["floor"], rel=2e-3), key


def test_the_page_shows_the_committed_report() -> None:
    page = (ROOT / "docs/benchmarks/README.md").read_text()
    assert COMMITTED["run"]["command"] in page
    shown = page.split("<!-- h100 -->\n")[1].split("<!-- end -->")[0].strip()
    table = bench.table(COMMITTED)
    assert shown == table, f"docs/benchmarks/README.md should hold\n{table}"


def test_other_pages_quote_the_committed_report() -> None:
    median = {key: entry["median"] for key, entry in MEASURED.items()}
    authors = {key: entry["reference"] for key, entry in MEASURED.items()}
    rows = []
    for found in (authors, median):
        decode = [f"{found[key]:.1f}" for key in ("decode_b1_ms", "decode_b8_ms")]
        drawing = [f"{found[key]:.1f}" for key in ("vt512_s", "vt1024_s")]
        others = [f"{found[key]:.0f}" for key in ("prefill_ms", "step_ckpt_ms")]
        rows.append((" / ".join(decode), " / ".join(drawing), "; ".join(others)))
    readme = (ROOT / "README.md").read_text()
    for (theirs, ours), unit in zip(zip(*rows, strict=True), ("ms", "s", "ms"), strict=True):
        assert f"| {theirs} {unit} | {ours} {unit} |" in readme
    drawn = f"{median['vt512_s']:.1f} s at 512 x 512, {median['vt1024_s']:.1f} s at\n1024 x 1024"
    assert drawn in (ROOT / "EVAL.md").read_text()
    log = (ROOT / "CHANGELOG.md").read_text()
    for key in ("decode_b1_ms", "prefill_ms", "step_ckpt_ms", "vt512_s"):
        assert f"{authors[key] / median[key]:.1f} x" in log, key
