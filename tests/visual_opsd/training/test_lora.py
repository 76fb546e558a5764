# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Training adapters (--lora_rank): what moves, what the teacher is, what is saved.

The layer itself is tested in tests/modeling/bagel/test_adapters.py, the files in
tests/modeling/release/test_adapters.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from data.packing import pack
from modeling import load_bagel
from modeling.bagel.adapters import adapter_shapes, find_targets, is_adapter_key
from modeling.release.adapters import merge_adapter, read_adapter
from scripts.visual_opsd.cli import parse_config
from scripts.visual_opsd.config import SFTConfig, TrainConfig
from scripts.visual_opsd.training.sharding import summon_full_params
from scripts.visual_opsd.training.text_sft import TextSFT
from scripts.visual_opsd.training.trainer import Trainer
from tests.visual_opsd.training.trainers import (
    base_weights,
    build,
    first_rows,
    metrics,
    moved,
    one_process,
    rollout,
    train,
    weights,
)

LORA: dict[str, Any] = {"lora_rank": 4, "lora_alpha": 12, "lr": 0.05, "min_lr": 0.01}


def adapters(model: Any) -> dict[str, Tensor]:
    return {name: t for name, t in weights(model).items() if is_adapter_key(name)}


def merged(values: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Tensor]:
    """W + alpha / rank B A, in double precision."""
    found = {name: tensor.double() for name, tensor in base.items()}
    for name in values:
        if ".lora_A." in name:
            path = name.partition(".lora_A.")[0]
            b, a = values[f"{path}.lora_B.weight"].double(), values[name].double()
            found[f"{path}.weight"] += 12 / 4 * b @ a
    return found


@pytest.mark.parametrize("mode", ["fixed", "ema", "self"])
def test_first_step_is_that_of_full_training(world: Path, tmp_path: Path, mode: str) -> None:
    """B begins as 0: student, teacher, completions and loss are those of the whole model."""
    full = train(world, tmp_path / "full", teacher_mode=mode)
    lora = train(world, tmp_path / "lora", teacher_mode=mode, **LORA)
    (ours,), (theirs,) = metrics(tmp_path / "lora"), metrics(tmp_path / "full")
    assert rollout(tmp_path / "lora") == rollout(tmp_path / "full")
    assert ours["loss"] == theirs["loss"] > 0 and ours["grad_norm"] != theirs["grad_norm"]
    assert full.teacher is not None and lora.teacher is not None
    assert lora.teacher.model is None and (lora.ema is None) == (mode != "ema")
    base, after = base_weights(), weights(lora.student)
    assert not moved(base, {name: after[name] for name in base})
    assert set(after) - set(base) == set(adapter_shapes(lora.student))
    # The first step moves every B, and no A, whose gradient is s B^T G.
    changed = {name for name in adapters(lora.student) if bool(after[name].any())}
    assert changed == set(adapter_shapes(lora.student))
    assert len(lora.trainable) == 2 * len(find_targets(lora.student, ["llm"]))


def scored(trainer: Trainer, weights_: dict[str, Tensor], row: Any) -> Tensor:
    """Hidden states of a teacher's context by a plain model of these weights."""
    plain = load_bagel(trainer.config.model.model_path, dtype=torch.float64).model
    plain.load_state_dict(weights_)
    batch = pack([row.teacher], trainer.base.special)
    with torch.no_grad():
        return plain(batch)


@pytest.mark.parametrize("mode", ["fixed", "ema", "self"])
def test_teacher_is_the_base_with_its_own_adapters(world: Path, tmp_path: Path, mode: str) -> None:
    """After some steps: none (fixed), the averages (ema), the live ones (self)."""
    decay, base = 0.7, base_weights()
    with one_process() as env:
        trainer = build(
            world, tmp_path, env, total_steps=3, teacher_mode=mode, ema_decay=decay, **LORA
        )
        assert trainer.teacher is not None
        average = adapters(trainer.student)
        update, seen = trainer.teacher.update, []

        def follow() -> None:
            update()
            live = adapters(trainer.student)
            seen.append(live)
            for name in average:
                average[name] = decay * average[name] + (1 - decay) * live[name]

        trainer.teacher.update = follow  # type: ignore[method-assign]
        assert trainer.train() == 0
        assert len(seen) == 3
        live = adapters(trainer.student)
        expected = {"fixed": {}, "ema": average, "self": live}[mode]
        row = first_rows(trainer)[0]
        assert row.teacher is not None
        batch = pack([row.teacher], trainer.base.special)
        found = trainer.teacher.hidden(replace(batch, score_rows=torch.arange(batch.total)))
        reference = scored(trainer, merged(expected, base), row)
        torch.testing.assert_close(found.double(), reference, atol=2e-4, rtol=2e-3)
        if mode != "self":
            other = scored(trainer, merged(live, base), row)
            assert float((other - reference).abs().max()) > 1e-2
        # The student is what it was: the exchange was undone, and nothing is left switched off.
        after = adapters(trainer.student)
        assert all(torch.equal(after[name], live[name]) for name in live)
        with torch.no_grad():
            student = trainer.student(batch)
        reference = scored(trainer, merged(live, base), row)
        torch.testing.assert_close(student.double(), reference, atol=2e-4, rtol=2e-3)
        with summon_full_params(trainer.student) as plain:
            whole = merged(live, base)
            for name, tensor in plain.state_dict().items():
                torch.testing.assert_close(tensor.double(), whole[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["fixed", "ema"])
def test_resume_is_exact_and_the_state_is_small(world: Path, tmp_path: Path, mode: str) -> None:
    """The base is in no state: it is read again from the release."""
    size = {**LORA, "teacher_mode": mode, "total_steps": 4, "save_every": 2, "keep_last": 3}
    whole = train(world, tmp_path, **size)
    lines = metrics(tmp_path)
    resumed = train(world, tmp_path, **size, resume="2")
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in metrics(tmp_path)] == [line[key] for line in lines]
    assert not moved(weights(whole.student), weights(resumed.student))
    if whole.ema is not None and resumed.ema is not None:
        assert not moved(weights(whole.ema), weights(resumed.ema))
    state = tmp_path / "checkpoints" / "step_0000004" / "state"
    held = FileSystemReader(state).read_metadata().state_dict_metadata
    kept = {key.partition(".")[2] for key in held if key.startswith(("model.", "ema."))}
    assert kept == set(adapter_shapes(whole.student))


def test_saved_adapters_and_the_merged_release(world: Path, tmp_path: Path) -> None:
    """Adapters at each save; at the end also the release, which is what `merge` makes of them."""
    trainer = train(
        world, tmp_path, total_steps=2, save_every=1, save_release=True, keep_last=1,
        lora_targets="llm,vit,connector", **LORA,
    )  # fmt: skip
    folder = trainer.config.run.checkpoints
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    assert names == ["0000002", "adapter_0000001", "adapter_0000002", "step_0000002"]
    config, tensors = read_adapter(folder / "adapter_0000002")
    assert (config.rank, config.alpha) == (4, 12)
    assert config.modules == find_targets(trainer.student, ["llm", "vit", "connector"])
    live = adapters(trainer.student)
    assert tensors.keys() == live.keys()
    assert all(torch.equal(tensors[name], live[name]) for name in live)
    released = load_bagel(folder / "0000002", visual_gen=True).model.state_dict()
    base = load_bagel(trainer.config.model.model_path, visual_gen=True).model.state_dict()
    for name, tensor in merged(live, dict(base)).items():
        bound = 0.01 * float(tensor.abs().max())  # the release is bf16
        torch.testing.assert_close(released[name].double(), tensor, atol=bound, rtol=0.01)
    by_hand = merge_adapter(
        folder / "adapter_0000002", trainer.config.model.model_path, tmp_path / "merged"
    )
    assert by_hand is not None
    ours = (tmp_path / "merged" / "model.safetensors").read_bytes()
    assert ours == (folder / "0000002" / "model.safetensors").read_bytes()


def test_a_killed_run_owes_its_adapter_folder(world: Path, tmp_path: Path) -> None:
    """A state is there, its adapters are not: written when the run goes on; later ones move."""
    size = {**LORA, "total_steps": 3, "save_every": 1, "keep_last": 3, "save_release": True}
    folder = train(world, tmp_path, **size).config.run.checkpoints
    saved = read_adapter(folder / "adapter_0000002")[1]
    for path in sorted((folder / "adapter_0000002").iterdir()):
        path.unlink()
    (folder / "adapter_0000002").rmdir()
    train(world, tmp_path, **size, resume="2")
    again = read_adapter(folder / "adapter_0000002")[1]
    assert all(torch.equal(again[name], saved[name]) for name in saved)
    moved_away = sorted(path.name for path in (folder / "superseded").iterdir())
    assert moved_away == ["0000003", "adapter_0000003", "step_0000003"]


def test_sft_trains_adapters_too(world: Path, tmp_path: Path) -> None:
    trainer = train(world, tmp_path, TextSFT, total_steps=2, **LORA, lora_targets="q_proj, v_proj")
    first, second = metrics(tmp_path)
    assert second["loss"] != first["loss"] and trainer.teacher is None
    assert trainer.adapters is not None
    assert trainer.adapters.modules == find_targets(trainer.student, ["q_proj", "v_proj"])
    base, after = base_weights(), weights(trainer.student)
    assert not moved(base, {name: after[name] for name in base})


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--lora_rank 0", "--lora_rank must be at least 1 .*got 0"),
        ("--lora_rank 4 --lora_targets lm_head", "name some of llm, vit, connector, q_proj"),
        ("--lora_rank 4 --lora_targets ,", "--lora_targets ',': name some of llm"),
        ("--lora_rank 4 --freeze_llm True", "--lora_targets llm contradicts the flag that freezes"),
        (
            "--lora_rank 4 --lora_targets llm,vit --freeze_vit True",
            "--lora_targets vit contradicts the flag that freezes",
        ),
        ("--lora_rank 4 --lora_alpha 0", "--lora_alpha must be above 0"),
        ("--lora_alpha 8", "--lora_alpha is of adapters, and there are none: add --lora_rank"),
        ("--lora_targets llm,vit", "--lora_targets is of adapters, and there are none"),
    ],
)
def test_refused(flags: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_config(TrainConfig, flags.split(), "")


def test_refused_where_the_drawing_branch_trains() -> None:
    with pytest.raises(ValueError, match="adapters are of the understanding branch"):
        parse_config(SFTConfig, ["--mode", "interleaved", "--lora_rank", "4"], "")
