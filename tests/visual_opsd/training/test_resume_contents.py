# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""A resume compares contents, not names: what the flags name may move, but not change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from scripts.visual_opsd.training.trainer import Trainer
from tests.visual_opsd.training.trainers import build, metrics, one_process, train, weights
from tests.visual_opsd.training_runs import TINY_BAGEL, make_world

PROMPTS = "system: Look closely.\nintro: Here is a sketch.\n"
DATASETS = "datasets:\n  - {name: Spatial_Navigation, weight: 2}\n"


@dataclass(frozen=True)
class Files:
    """Everything that a run reads, in one folder."""

    folder: Path

    def flags(self) -> dict[str, Any]:
        return {
            "model_path": self.folder / "base",
            "prompts": self.folder / "prompts.yaml",
            "dataset_config_file": self.folder / "datasets.yaml",
            "data_root": self.folder,
            "replay_samples": self.folder / "recorded.jsonl",
            "use_system_prompt": True,
            "total_steps": 2,
            "save_every": 1,
        }

    @property
    def rows(self) -> Path:
        return next((self.folder / "Spatial_Navigation" / "data").glob("train*.parquet"))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Files, Path]:
    """The files of a run, and the results of its two steps on recorded completions."""
    folder = tmp_path_factory.mktemp("files")
    make_world(folder, rows=16)
    (folder / "datasets.yaml").write_text(DATASETS)
    (folder / "prompts.yaml").write_text(PROMPTS)
    shutil.copytree(TINY_BAGEL, folder / "base")
    files, results = Files(folder), tmp_path_factory.mktemp("results")
    train(folder, results / "recording", **{**files.flags(), "replay_samples": "none"})
    shutil.copy(results / "recording" / "samples.jsonl", folder / "recorded.jsonl")
    train(folder, results / "run", **files.flags())
    return files, results / "run"


@pytest.fixture
def files(recorded: tuple[Files, Path], tmp_path: Path) -> Files:
    """A copy elsewhere."""
    return Files(Path(shutil.copytree(recorded[0].folder, tmp_path / "moved")))


class AcceptedError(Exception):
    """The models were about to be built: everything was compared by then."""


@pytest.fixture
def resume(
    recorded: tuple[Files, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Trainer]]:
    def stop(_: Trainer) -> None:
        raise AcceptedError

    monkeypatch.setattr(Trainer, "_build_models", stop)
    with one_process() as env:

        def start(files: Files, **changes: Any) -> Trainer:
            options = {**files.flags(), "resume": state_of(recorded), **changes}
            return build(files.folder, tmp_path / "r", env, **options)

        yield start


def state_of(recorded: tuple[Files, Path]) -> Path:
    return recorded[1] / "checkpoints" / "step_0000001"


def test_the_same_contents_elsewhere_go_on_as_before(
    recorded: tuple[Files, Path], files: Files, tmp_path: Path
) -> None:
    whole = train(files.folder, tmp_path / "whole", **files.flags())
    moved = train(files.folder, tmp_path / "moved", resume=state_of(recorded), **files.flags())
    ours, theirs = weights(moved.student), weights(whole.student)
    assert all((ours[key] == theirs[key]).all() for key in theirs)
    for name in ("loss", "grad_norm"):
        assert metrics(tmp_path / "moved")[0][name] == metrics(recorded[1])[1][name]


def test_other_words_for_the_same_are_accepted(files: Files, resume: Any) -> None:
    """Comments in YAML, prompts of another file, a data set that no row is drawn from."""
    (files.folder / "other.yaml").write_text("# ours\nintro: Here is a sketch.\n" + PROMPTS[:22])
    (files.folder / "datasets.yaml").write_text(
        DATASETS + "  - {name: Jigsaw_Assembly, weight: 0}\n# nothing else\n"
    )
    with pytest.raises(AcceptedError):
        resume(files, prompts=files.folder / "other.yaml")


def edit(name: str, old: str, new: str) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        text = (files.folder / name).read_text()
        assert old in text
        (files.folder / name).write_text(text.replace(old, new))

    return change


def change_weights(files: Files) -> None:
    data = bytearray((files.folder / "base" / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (files.folder / "base" / "model.safetensors").write_bytes(data)


def change_autoencoder(files: Files) -> None:
    """Not used by this run, but copied into its release folders."""
    data = bytearray((files.folder / "base" / "ae.safetensors").read_bytes())
    data[-3] ^= 1
    (files.folder / "base" / "ae.safetensors").write_bytes(data)


def other_rows(files: Files) -> None:
    """As many rows of the same kind, from another seed."""
    from data.worlds.__main__ import main

    shutil.rmtree(files.folder / "Spatial_Navigation")
    arguments = ["spatial_navigation", "--rows", "16", "--heldout-rows", "8", "--seed", "4"]
    assert main([*arguments, "--out", str(files.folder)]) == 0


def change_table(change: Callable[[Any], Any]) -> Callable[[Files], None]:
    def act(files: Files) -> None:
        pq.write_table(change(pq.read_table(files.rows)), files.rows)

    return act


def one_answer(table: Any) -> Any:
    answers = table["answer"].to_pylist()
    place = table.schema.get_field_index("answer")
    return table.set_column(place, "answer", [[answers[0], *answers[:-1]]])


def longer_recording(files: Files) -> None:
    path = files.folder / "recorded.jsonl"
    line = json.loads(path.read_text().splitlines()[0])
    path.write_text(path.read_text() + json.dumps({**line, "step": 9}) + "\n")


# name: (change, what the message says)
CHANGES: dict[str, tuple[Callable[[Files], Any], str]] = {
    "weights": (change_weights, r"model_path\.weights: saved '\w+', now '\w+'"),
    "autoencoder": (change_autoencoder, r"model_path\.weights: saved"),
    "sizes": (
        edit("base/llm_config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'),
        r"model_path\.llm_config\.json: saved",
    ),
    "tokenizer": (
        edit("base/merges.txt", "#version: 0.2", "#version: 0.3"),
        r"model_path\.merges\.txt: saved",
    ),
    "prompt": (
        edit("prompts.yaml", "closely", "well"),
        r"prompts\.system: saved 'Look closely\.', now 'Look well\.'",
    ),
    "prompt left out": (edit("prompts.yaml", "intro: Here is a sketch.\n", ""), r"prompts\.intro"),
    "dataset weight": (
        edit("datasets.yaml", "weight: 2", "weight: 3"),
        r"dataset_config_file\.Spatial_Navigation \(train\)\.weight: saved 2, now 3",
    ),
    "dataset budget": (
        edit("datasets.yaml", "weight: 2", "weight: 2, num_used_rows: 8"),
        r".*\.num_used_rows: saved None, now 8",
    ),
    "other rows": (
        other_rows,
        r"data_root\.Spatial_Navigation \(train\)\.train\S+: saved '16 rows, \d+ bytes, digest "
        r"\w+', now '16 rows",
    ),
    "one answer": (change_table(one_answer), r"data_root\.Spatial_Navigation.*'16 rows, \d+ bytes"),
    "fewer rows": (
        change_table(lambda table: table.slice(0, 15)),
        r"data_root\.Spatial_Navigation \(train\)\.rows: saved 16, now 15; .*saved '16 rows.*now "
        r"'15 rows",
    ),
    "recording": (longer_recording, r"replay_samples: saved '\w+', now '\w+'"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_changed_contents_are_named_before_anything_is_built(
    files: Files, resume: Any, name: str
) -> None:
    change, message = CHANGES[name]
    change(files)
    with pytest.raises(ValueError, match=r"made with other contents \(" + message) as error:
        resume(files)
    assert "\n" not in str(error.value) and "row order" not in str(error.value)


def test_a_recording_instead_of_sampling(files: Files, resume: Any) -> None:
    with pytest.raises(ValueError, match=r"replay_samples: saved '\w+', now None"):
        resume(files, replay_samples="none")


def test_a_state_of_other_random_numbers_is_refused(
    files: Files, resume: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are named rather than the row order, which is another one too."""
    for user in ("data.parquet", "scripts.visual_opsd.training.run_contents"):
        monkeypatch.setattr(f"{user}.RANDOMNESS_VERSION", "another")
    message = r"contents \(random numbers: saved 'visual-opsd-random-2', now 'another'\)"
    with pytest.raises(ValueError, match=message):
        resume(files)


def test_settings_and_contents_are_named_together(files: Files, resume: Any) -> None:
    change_weights(files)
    message = r"with other settings \(optim\.total_steps: saved 2, now 3\); .*contents \(model_path"
    with pytest.raises(ValueError, match=message):
        resume(files, total_steps=3)


def test_a_damaged_state_is_passed_over_and_nothing_is_moved_too_early(
    recorded: tuple[Files, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flipped byte in the newest state; a log that cannot be cut; then all of it well."""
    files, results = recorded[0], tmp_path / "r"
    shutil.copytree(recorded[1], results)
    shard = results / "checkpoints" / "step_0000002" / "state" / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    (results / "samples.jsonl").unlink()
    (results / "samples.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"samples\.jsonl is no file"):
        train(files.folder, results, resume="latest", **files.flags())
    assert shard.is_file() and len(metrics(results)) == 2
    (results / "samples.jsonl").rmdir()
    train(files.folder, results, resume="latest", **files.flags())
    assert metrics(results)[1]["loss"] == metrics(recorded[1])[1]["loss"]
    assert not list((results / "checkpoints").glob("*.tmp"))
    assert (results / "checkpoints" / "superseded" / "step_0000002").is_dir()


def test_all_states_damaged_changes_nothing(recorded: tuple[Files, Path], tmp_path: Path) -> None:
    files, results = recorded[0], tmp_path / "r"
    shutil.copytree(recorded[1], results)
    for state in (results / "checkpoints").glob("step_*"):
        (state / "trainer.pt").write_bytes(b"")
    before = {p: p.read_bytes() for p in results.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=r"no training state in .* is whole: .*step_0000001/train"):
        train(files.folder, results, resume="latest", **files.flags())
    assert {p: p.read_bytes() for p in results.rglob("*") if p.is_file()} == before


def test_a_full_disk_ends_the_release_in_one_line(
    recorded: tuple[Files, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state of the step is on disk by then, and a resume writes the release it owes."""
    files, results = recorded[0], tmp_path / "r"
    options = {**files.flags(), "save_release": True}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("modeling.release.checkpoint.shutil.copyfile", full)
        with pytest.raises(ValueError, match=r"writing .*0000001 failed: No space left on .* free"):
            train(files.folder, results, **options)
    assert [p.name for p in (results / "checkpoints").iterdir()] == ["step_0000001"]
    train(files.folder, results, resume="latest", **options)
    assert (results / "checkpoints" / "0000001").is_dir()
    assert metrics(results)[1]["loss"] == metrics(recorded[1])[1]["loss"]
