# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Training states that were damaged after they were written, and disks that refuse: every kind."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from scripts.visual_opsd.processes import DistEnv, init_distributed, shutdown
from scripts.visual_opsd.training import checkpoint_folders as folders
from scripts.visual_opsd.training import checkpoints as T
from scripts.visual_opsd.training import state_files
from scripts.visual_opsd.training.state_files import MARKER, DamagedState
from tests.visual_opsd.training.toy_distributed_model import ToyRun, state_hash

CONFIG: dict[str, Any] = {"lr": 1e-5}
SHARD = "state/__0_0.distcp"


@pytest.fixture(scope="module")
def env() -> Iterator[DistEnv]:
    yield init_distributed("cpu")
    shutdown()


@pytest.fixture(scope="module")
def run(env: DistEnv) -> ToyRun:
    run = ToyRun(env, (1, 1))
    run.train_step(0)
    return run


@pytest.fixture(scope="module")
def written(run: ToyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("states")
    for step in (1, 2, 3):
        save(run, folder, step)
    return folder


@pytest.fixture
def states(written: Path, tmp_path: Path) -> Path:
    """A folder with the states 1, 2 and 3, to be damaged."""
    return Path(shutil.copytree(written, tmp_path / "states"))


def save(run: ToyRun, folder: Path, step: int, **options: Any) -> Path:
    settings: dict[str, Any] = {"config": CONFIG, "contents": {}, "extra": {}, **options}
    return T.save_checkpoint(folder, step, run.state, env=run.env, **settings)


def load(run: ToyRun, path: Path, contents: Any = MappingProxyType({})) -> T.Resumed:
    return T.load_checkpoint(path, run.state, env=run.env, config=CONFIG, contents=contents)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ------------------------------------------------------------------------------------- damage


def flip(name: str, share: float) -> Callable[[Path], None]:
    def damage(state: Path) -> None:
        data = bytearray((state / name).read_bytes())
        data[int(share * (len(data) - 1))] ^= 0x10
        (state / name).write_bytes(data)

    return damage


def zeros(name: str) -> Callable[[Path], None]:
    def damage(state: Path) -> None:
        data = bytearray((state / name).read_bytes())
        middle = len(data) // 2
        data[middle : middle + 512] = bytes(len(data[middle : middle + 512]))
        (state / name).write_bytes(data)

    return damage


def cut(name: str) -> Callable[[Path], Any]:
    return lambda state: (state / name).write_bytes((state / name).read_bytes()[:-1])


def longer(name: str) -> Callable[[Path], Any]:
    return lambda state: (state / name).write_bytes((state / name).read_bytes() + b"\0")


def gone(name: str) -> Callable[[Path], None]:
    return lambda state: (state / name).unlink()


def half_copied(state: Path) -> None:
    """Names of everything, and only the first bytes: what an interrupted copy may leave."""
    for path in state.rglob("*"):
        if path.is_file() and path.name != MARKER:
            path.write_bytes(path.read_bytes()[:100])


def swapped(state: Path) -> None:
    """Two files of one size under each other's name: here another step's."""
    older = state.with_name("step_0000002") / "rng_00000.pt"
    data = bytearray(older.read_bytes())
    data[len(data) // 2] ^= 1
    (state / "rng_00000.pt").write_bytes(data)


def renamed_folder(state: Path) -> None:
    shutil.rmtree(state)
    shutil.copytree(state.with_name("step_0000001"), state)


def marker_without(key: str) -> Callable[[Path], None]:
    def damage(state: Path) -> None:
        marker = json.loads((state / MARKER).read_text())
        del marker[key]
        (state / MARKER).write_text(json.dumps(marker))

    return damage


def marker_text(text: str) -> Callable[[Path], Any]:
    return lambda state: (state / MARKER).write_text(text)


FILES = (SHARD, "state/.metadata", "trainer.pt", "rng_00000.pt")
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    **{
        f"flipped at {share} {name}": (flip(name, share), rf"{name} was changed")
        for name in FILES
        for share in (0, 0.2, 0.5, 0.8, 1)
    },
    **{f"zeros {name}": (zeros(name), rf"{name} was changed") for name in FILES[:2]},
    **{f"cut {name}": (cut(name), rf"{name} has \d+ bytes, \d+ were written") for name in FILES},
    **{f"longer {name}": (longer(name), rf"{name} has \d+ bytes") for name in FILES},
    **{f"gone {name}": (gone(name), rf"{name}: No such file") for name in FILES},
    "half-copied": (half_copied, r"has 100 bytes, \d+ were written"),
    "swapped files": (swapped, r"rng_00000\.pt was changed"),
    "renamed folder": (renamed_folder, r"was renamed: it holds the state of step 1"),
    "marker gone": (gone(MARKER), r"complete\.json does not exist"),
    "marker cut": (cut(MARKER), r"complete\.json is not valid JSON"),
    "marker binary": (lambda p: (p / MARKER).write_bytes(b"\xff\x00"), "is not UTF-8"),
    "marker no object": (marker_text("[1]"), r"must hold a JSON object"),
    "marker empty": (marker_text("{}"), r"names no format_version"),
    "marker null": (marker_text('{"format_version": null}'), r"names no format_version"),
    "marker of little": (marker_text('{"format_version": 1}'), r"lacks step, world_size"),
    "marker odd": (
        marker_text(
            '{"format_version": 1, "step": 3, "world_size": 1, "has_ema": 1, "has_optimizer": 1, '
            '"config_hash": "", "config": {}, "files": []}'
        ),
        "lacks files or settings",
    ),
    "marker edited": (
        lambda p: (p / MARKER).write_text((p / MARKER).read_text().replace("1e-05", "2e-05")),
        r"complete\.json was changed",
    ),
    **{
        f"marker without {key}": (marker_without(key), r"complete\.json")
        for key in ("format_version", "digests", "digest", "step", "files")
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_state_is_named_and_the_next_older_one_used(
    run: ToyRun, states: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    damage, message = DAMAGES[kind]
    damage(states / "step_0000003")
    before = everything(states)
    with caplog.at_level(logging.WARNING):
        found = folders.choose_checkpoint(states, ("latest",), run.env)
    assert found == states / "step_0000002"
    assert re.search(f"DAMAGED: the state of step 3: .*step_0000003.*{message}", caplog.text)
    assert f"resuming the next older whole state: {found}" in caplog.text
    for spec in ("3", str(states / "step_0000003")):
        with pytest.raises(ValueError) as error:
            folders.choose_checkpoint(states, (spec,), run.env)
        assert re.search(message, str(error.value)) and "\n" not in str(error.value)
        assert f"the next older whole state is {found}: --resume {found}" in str(error.value)
    with pytest.raises(ValueError, match=message):
        state_files.check_digests(states / "step_0000003", run.env)
    assert everything(states) == before


def test_all_damaged_is_an_error(run: ToyRun, states: Path) -> None:
    """Each is named, nothing is moved; a start without --resume is refused as well."""
    flip(SHARD, 0.5)(states / "step_0000003")
    cut("trainer.pt")(states / "step_0000002")
    (states / "step_0000001" / MARKER).unlink()
    before = everything(states)
    with pytest.raises(ValueError) as error:
        folders.choose_checkpoint(states, ("latest", "elsewhere"), run.env)
    text = str(error.value)
    assert f"no training state in {states} is whole" in text
    for part in ("_0.distcp was changed", "trainer.pt has", "step_0000001/complete.json does not"):
        assert part in text
    with pytest.raises(ValueError, match="there is no older whole state in"):
        folders.choose_checkpoint(states, ("3",), run.env)
    with pytest.raises(ValueError, match=r"already holds checkpoints \(steps 1, 2, 3\)"):
        folders.claim_checkpoint_dir(states, None, run.env)
    assert everything(states) == before


def test_two_damaged_then_a_good_one(
    run: ToyRun, states: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flip(SHARD, 0.5)(states / "step_0000003")
    zeros("state/.metadata")(states / "step_0000002")
    with caplog.at_level(logging.WARNING):
        found = folders.choose_checkpoint(states, ("latest",), run.env)
    assert found == states / "step_0000001"
    assert caplog.text.count("DAMAGED: the state of step") == 2
    with pytest.raises(ValueError, match=rf"the next older whole state is {found}:"):
        folders.choose_checkpoint(states, ("3",), run.env)
    folders.claim_checkpoint_dir(states, found, run.env)
    assert sorted(p.name for p in (states / "superseded").iterdir()) == [
        "step_0000002",
        "step_0000003",
    ]


def test_a_copy_under_another_name_of_the_step(states: Path) -> None:
    """Half of step 3 as "step_3", or a damaged one: the folder that we named is looked at."""
    copy = Path(shutil.copytree(states / "step_0000003", states / "step_3"))
    (copy / MARKER).unlink()
    for step in (1, 2):
        shutil.rmtree(states / f"step_000000{step}")
    assert folders.find_checkpoint(states, "latest") == states / "step_0000003"
    assert folders.find_checkpoint(states, 3) == states / "step_0000003"


def test_an_unknown_format_is_not_passed_over(run: ToyRun, states: Path) -> None:
    marker = states / "step_0000003" / MARKER
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"format_version": 4}))
    for spec in ("latest", "3"):
        with pytest.raises(ValueError, match="checkpoint format 4, this version reads 1 to 3"):
            folders.choose_checkpoint(states, (spec,), run.env)
    assert folders.choose_checkpoint(states, ("2",), run.env) == states / "step_0000002"


@pytest.mark.parametrize("text", ["²", "٣", "9" * 5000, "x" * 5000, "a\0b"])
def test_what_is_no_step(states: Path, text: str) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        folders.find_checkpoint(states, text)


def test_no_byte_of_the_marker_can_change_unnoticed(states: Path) -> None:
    path = states / "step_0000003"
    good = (path / MARKER).read_bytes()
    marker = state_files.read_marker(path)
    for place in range(len(good)):
        data = bytearray(good)
        data[place] ^= 1 << place % 8
        (path / MARKER).write_bytes(data)
        try:
            assert state_files.read_marker(path) == marker, place  # white space
        except ValueError as error:
            assert isinstance(error, DamagedState) or "checkpoint format" in str(error), place


# --------------------------------------------------------------------------- digests, formats


def test_digests_cover_every_file(states: Path) -> None:
    marker = json.loads((states / "step_0000001" / MARKER).read_text())
    assert marker["files"].keys() == marker["digests"].keys() == {*FILES}


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 24])
def test_the_digest_of_a_file_sees_every_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """Of blocks that several threads hash; the order of blocks counts."""
    monkeypatch.setattr(state_files, "_BLOCK_BYTES", block)
    path, found = tmp_path / "file", set()
    data = bytes(range(64)) * 2
    contents = [data[:n] + b"\xff" + data[n + 1 :] for n in range(128)]
    contents += [data, data[:-1], data[64:] + data[1:64] + data[:1], b""]
    for content in contents:
        path.write_bytes(content)
        found.add(state_files.file_digest(path, 1))
        assert state_files.file_digest(path, 3) in found
    assert len(found) == len(contents)


def old_format(state: Path) -> None:
    """As version 1 wrote it: sizes, no digests, the order of the rows among the settings."""
    marker = json.loads((state / MARKER).read_text())
    del marker["digests"], marker["digest"], marker["contents"]
    marker["format_version"] = 1
    marker["config"]["rows"] = "f52b4d"
    (state / MARKER).write_text(json.dumps(marker))


def test_states_without_digests_still_load(env: DistEnv, run: ToyRun, states: Path) -> None:
    old = states / "step_0000003"
    old_format(old)
    assert folders.choose_checkpoint(states, ("latest",), env) == old
    other = ToyRun(env, (1, 1), seed=9)
    now = {"row order": "f52b4d", "prompts": {"system": ""}}
    assert load(other, old, contents=now).step == 3
    assert state_hash(other.state) == state_hash(run.state)
    with pytest.raises(ValueError, match="row order: saved 'f52b4d', now 'other'"):
        load(other, old, contents={"row order": "other"})
    for name in ("model_path", "prompts"):  # nothing but their paths is known
        with pytest.raises(ValueError, match=rf"{name}: saved '\(absent\)', now 'elsewhere'"):
            T.check_resumable(old, config={**CONFIG, name: "elsewhere"}, contents=now)
        moved = {**CONFIG, "data_root": "elsewhere"}
        T.check_resumable(states / "step_0000002", config=moved, contents={})
    cut(SHARD)(old)
    assert folders.choose_checkpoint(states, ("latest",), env) == states / "step_0000002"


@pytest.mark.parametrize("name", ["state/.metadata", "trainer.pt", "rng_00000.pt"])
def test_damage_without_digests_is_one_line(run: ToyRun, states: Path, name: str) -> None:
    old_format(states / "step_0000003")
    path = states / "step_0000003" / name
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ValueError, match=r"step_0000003/.* cannot be read .*resume an older") as e:
        load(run, states / "step_0000003", {"row order": "f52b4d"})
    assert "\n" not in str(e.value)


def test_contents_are_compared(run: ToyRun, tmp_path: Path) -> None:
    text = "x" * 200
    saved = {"prompts": {"system": text + "old end"}, "data_root": {"A": {"rows": 3}}}
    path = save(run, tmp_path, 1, contents={**saved, "row order": "1"})
    load(run, path, contents={**saved, "row order": "1"})
    now = {"prompts": {"system": text + "new end"}, "data_root": {"A": {"rows": 4}}}
    with pytest.raises(ValueError) as error:
        load(run, path, contents={**now, "row order": "2"})
    message = str(error.value)
    assert "other contents (data_root.A.rows: saved 3, now 4; prompts.system: saved ..." in message
    assert "old end'" in message and "new end'" in message
    assert "row order" not in message and len(message) < 600
    many = {"data_root": {str(n): n for n in range(20)}}
    with pytest.raises(ValueError, match=r"and 1[0-9] more"):
        load(run, path, contents=many)


# --------------------------------------------------------------------------------- the order


def test_everything_is_on_disk_before_the_name(
    run: ToyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file is flushed, the marker after the others, and the folders before the rename."""
    flushed: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        name = os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path)
        flushed.append(name.replace(".metadata.tmp", ".metadata"))  # as torch first calls it
        fsync(descriptor)

    def note_replace(source: Any, target: Any) -> None:
        flushed.append("renamed")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    save(run, tmp_path, 1)
    tmp = "step_0000001.tmp"
    marker = flushed.index(f"{tmp}/{MARKER}")
    assert {f"{tmp}/{name}" for name in FILES} <= set(flushed[:marker])
    renamed = flushed.index("renamed")
    assert {tmp, f"{tmp}/state"} <= set(flushed[marker:renamed])
    assert "." in flushed[renamed:]


def test_an_old_state_is_renamed_before_it_is_removed(
    run: ToyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A network disk refuses to remove it: a warning, and the next save tries again."""
    save(run, tmp_path, 1)
    tries: list[str] = []

    def busy(path: Any, *_: Any, **__: Any) -> None:
        tries.append(Path(path).name)
        raise OSError(errno.ENOTEMPTY, "busy", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        save(run, tmp_path, 2)
        folders.delete_old_states(tmp_path, 1)
    assert tries == ["step_0000001.deleted.tmp"] and "busy" in caplog.text
    assert list(folders.complete_steps(tmp_path)) == [2]
    save(run, tmp_path, 3)
    folders.delete_old_states(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_0000003"]


def test_a_state_that_cannot_be_renamed_stays(
    run: ToyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(run, tmp_path, 1)
    real = os.replace

    def refuse(source: Any, target: Any) -> None:
        if str(target).endswith(".deleted.tmp"):
            raise PermissionError(errno.EACCES, "Permission denied", str(source))
        real(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    save(run, tmp_path, 2)
    folders.delete_old_states(tmp_path, 1)
    assert list(folders.complete_steps(tmp_path)) == [1, 2] and "cannot delete" in caplog.text


def test_leftovers_that_are_files(run: ToyRun, tmp_path: Path) -> None:
    """step_0000004.tmp as a file or a link: gone at the start and before a save."""
    for make in (lambda p: p.write_text("x"), lambda p: p.symlink_to(tmp_path / "nowhere")):
        make(tmp_path / "step_0000004.tmp")
        folders.claim_checkpoint_dir(tmp_path, None, run.env)
        assert not list(tmp_path.iterdir())
        make(tmp_path / "step_0000004.tmp")
        save(run, tmp_path, 4)
        assert [p.name for p in tmp_path.iterdir()] == ["step_0000004"]
        shutil.rmtree(tmp_path / "step_0000004")


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "bad_rows.jsonl"])
def test_logs_are_looked_at_before_anything_is_moved(states: Path, name: str) -> None:
    (states / name).mkdir()
    with pytest.raises(ValueError, match=rf"{name} is no file that can be read and written"):
        folders.check_folders(states, states, states / "step_0000001", resumes=True)


def test_a_claim_that_fails_has_removed_nothing(run: ToyRun, states: Path) -> None:
    (states / "step_0000009.tmp").mkdir()
    with pytest.raises(ValueError, match="already holds checkpoints"):
        folders.claim_checkpoint_dir(states, None, run.env)
    assert (states / "step_0000009.tmp").is_dir()


# --------------------------------------------------------------------------------- full disks


def test_too_little_room_is_said_before_writing(
    run: ToyRun, states: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(states)
    usage = shutil.disk_usage(states)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = r"the state of step 4 needs \d+\.\d kB but .*states has 10\.0 kB free; make room"
    with pytest.raises(ValueError, match=message):
        save(run, states, 4)
    assert everything(states) == before and not list(states.glob("*.tmp"))


def test_the_room_a_state_needs_is_estimated_from_above(run: ToyRun, states: Path) -> None:
    tensors = T._sharded_state(run.state, True)
    needed = T._state_bytes(tensors, run.env)
    written = sum(p.stat().st_size for p in (states / "step_0000001" / "state").iterdir())
    assert written < needed < 3 * written  # 2 kB a tensor: nothing beside those of a real model


REFUSALS = [
    (T, "_save_synced", errno.ENOSPC),
    (T, "_save_synced", errno.EDQUOT),
    (T, "write_marker", errno.EROFS),
    (T, "describe_files", errno.EIO),
    (torch, "save", errno.ENOSPC),  # inside the sharded writer too
    (torch, "save", errno.ENOENT),
    (torch, "save", errno.ENOTCONN),  # a mount whose server has gone
    (T, "_save_synced", errno.ESTALE),
]


@pytest.mark.parametrize(("module", "name", "code"), REFUSALS)
def test_a_disk_that_refuses_is_one_line_and_leaves_nothing(
    run: ToyRun,
    states: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    code: int,
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    before = everything(states)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, refuse)
        with pytest.raises(ValueError) as error:
            save(run, states, 4)
    text = str(error.value)
    assert re.match(r"saving the state of step 4 \(\d+\.\d kB\) failed: ", text)
    assert os.strerror(code) in text and "\n" not in text
    assert re.search(r"states has [\d.]+ \w+ free; earlier states are as they were", text)
    assert everything(states) == before and not list(states.glob("*.tmp"))
    save(run, states, 4)  # once there is room


def test_torchs_own_words_for_a_full_disk(run: ToyRun, tmp_path: Path) -> None:
    """What torch's zip writer raises when a write came back short."""
    failure = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    with pytest.raises(OSError, match="a write came back short"), T._ordinary_errors("writing"):
        raise T.CheckpointException("write", {0: (failure, None)})  # type: ignore[dict-item]
    with pytest.raises(RuntimeError, match="rank 1: a bug"), T._ordinary_errors("writing"):
        raise T.CheckpointException("write", {1: (ValueError("a bug"), None)})  # type: ignore[dict-item]


@pytest.mark.parametrize("limit", [1, 700, 5000, 20000])
def test_a_write_that_comes_back_short(run: ToyRun, states: Path, limit: int) -> None:
    """For real: no file may grow beyond the limit, so torch's writers fail half-way."""
    before = everything(states)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(ValueError, match=r"saving the state of step 4 .* failed: ") as error:
            save(run, states, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert everything(states) == before and not list(states.glob("*.tmp"))


def test_a_file_in_the_way_of_the_folder(run: ToyRun, tmp_path: Path) -> None:
    (tmp_path / "states").write_text("not a folder")
    with pytest.raises(ValueError, match=r"saving the state of step 1 .*states"):
        save(run, tmp_path / "states", 1)
