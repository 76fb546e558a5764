# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Faults of training states: writing, finding, restoring."""

from __future__ import annotations

from tests.mutants import faults

FAULTS = [
    *faults("scripts/visual_opsd/training/checkpoints.py", "visual_opsd/training/test_checkpoints.py", [
        ("shards are not on the disk before the name", '        flush_to_disk(tmp / "state")\n', "",
         "visual_opsd/training/test_state_damage.py::test_everything_is_on_disk_before_the_name"),
        ("the folder is not on the disk after its name", "        flush_to_disk(checkpoint_dir)\n", "",
         "visual_opsd/training/test_state_damage.py::test_everything_is_on_disk_before_the_name"),
        ("a file is closed before it is on the disk", "        os.fsync(handle.fileno())\n", "",
         "visual_opsd/training/test_state_damage.py::test_everything_is_on_disk_before_the_name"),
        ("the marker comes after the name",
         '        write_marker(tmp, marker, files)\n        flush_to_disk(tmp / "state")\n        '
         "flush_to_disk(tmp)\n        os.replace(tmp, final)\n",
         '        flush_to_disk(tmp / "state")\n        flush_to_disk(tmp)\n        os.replace(tmp, final)\n '
         "       write_marker(final, marker, files)\n"),
        ("a checkpoint is written over", "        if final.exists():\n", "        if False:\n"),
        ("a failed save leaves its folder", "            remove(tmp)  # or the disk stays full\n",
         "            pass\n"),
        ("the EMA is the student", 'tensors["ema"] = get_model_state_dict(state.ema)',
         'tensors["ema"] = get_model_state_dict(state.model)'),
        ("the schedule is not restored",
         '    state.scheduler.load_state_dict(trainer["scheduler"])\n', ""),
        ("random states are not restored", "        _set_rng_state(rng)\n", "        pass\n"),
        ("numpy's random state is not restored",
         "    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))\n", ""),
        ("Python's random state is not restored", '    random.setstate(states["python"])\n', ""),
        ("an EMA on one side passes", 'if marker["has_ema"] != (state.ema is not None):',
         "if False:"),
        ("the learning rate may change", '    "results_dir", "checkpoint_dir",', '    "lr", "results_dir", "checkpoint_dir",'),
        ("contents are not compared",
         "files = differences(_flatten(held), now)",
         "files: list[str] = []", "visual_opsd/training/test_state_damage.py::test_contents_are_compared"),
        ("new ranks share their random numbers",
         'f"{marker[\'config_hash\']}:{marker[\'step\']}:{env.rank}"',
         'f"{marker[\'config_hash\']}:{marker[\'step\']}"', "visual_opsd/training/test_sharding.py"),
    ]),
    *faults("scripts/visual_opsd/training/state_files.py",
            "visual_opsd/training/test_state_damage.py::"
            "test_a_damaged_state_is_named_and_the_next_older_one_used", [
        ("a file's size may differ", "        if found != size:\n", "        if found < size:\n",
         "visual_opsd/training/test_checkpoints.py visual_opsd/training/test_state_damage.py::"
         "test_a_damaged_state_is_named_and_the_next_older_one_used"),
        ("the marker may be changed", 'if sealed and marker.get("digest") != _seal(marker):',
         'if sealed and "digest" not in marker:',
         "visual_opsd/training/test_state_damage.py::test_no_byte_of_the_marker_can_change_unnoticed"),
        ("a file's bytes may be changed", "        if found != digest:\n", "        if False:\n"),
        ("only the first block is hashed",
         "starts = range(0, os.fstat(descriptor).st_size, _BLOCK_BYTES)",
         "starts = range(0, 1, _BLOCK_BYTES)",
         "visual_opsd/training/test_state_damage.py::test_the_digest_of_a_file_sees_every_byte"),
        ("a folder may be renamed", 'if named and int(named[1]) != marker["step"]:', "if False:"),
        ("the marker is not on the disk", "        os.fsync(handle.fileno())\n", "",
         "visual_opsd/training/test_state_damage.py::test_everything_is_on_disk_before_the_name"),
        ("each rank believes the others' files",
         "for name, digest in digests.items() if _is_mine(name, env)",
         "for name, digest in digests.items() if env.rank == 0 and _is_mine(name, env)", "visual_opsd/training/test_sharding.py"),
        ("a state of a later version is damaged",
         '        raise ValueError(\n            f"{path} has checkpoint format',
         '        raise DamagedState(\n            f"{path} has checkpoint format',
         "visual_opsd/training/test_checkpoints.py visual_opsd/training/test_state_damage.py::"
         "test_an_unknown_format_is_not_passed_over"),
    ]),
    *faults("scripts/visual_opsd/training/checkpoint_folders.py", "visual_opsd/training/test_checkpoints.py", [
        ("the resumed step is superseded too", "if step > resumed_step:",
         "if step >= resumed_step:"),
        ("the log loses the resumed step", 'bool(record.get("step", step) <= step)',
         'bool(record.get("step", step) < step)'),
        ("an older step is the latest", "return whole[max(good)] if good else None",
         "return whole[min(good)] if good else None"),
        ("a state that is not good is the latest", "if not (path / NOT_GOOD).exists()]", "]",
         "visual_opsd/training/test_state_keeper.py"),
        ("a state is removed under its name",
         "            os.replace(old, old.with_name(old.name + _DELETED))\n",
         "            remove(old)\n",
         "visual_opsd/training/test_state_damage.py::test_an_old_state_is_renamed_before_it_is_removed"),
        ("a superseded folder is written over", "    while target.exists():\n",
         "    while False:\n"),
        ("a stale folder stays", "if _STALE_NAME.fullmatch(stale.name):", "if False:",
         "visual_opsd/training/test_checkpoints.py visual_opsd/training/test_state_damage.py::"
         "test_leftovers_that_are_files"),
        ("another run's folder is taken", "    if states:\n", "    if False:\n"),
        ("a damaged state is resumed", "            rejected[path] = error\n            continue\n",
         "            return path\n",
         "visual_opsd/training/test_state_damage.py::"
         "test_a_damaged_state_is_named_and_the_next_older_one_used"),
        ("the oldest states are kept", "complete_steps(checkpoint_dir).values())[:-keep_last]",
         "complete_steps(checkpoint_dir).values())[keep_last:]"),
        ("samples.jsonl is not cut back", 'for name in ("metrics.jsonl", "samples.jsonl"):',
         'for name in ("metrics.jsonl",):', "visual_opsd/training/test_resume.py"),
    ]),
]  # fmt: skip
