# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Attention of answer tokens against a dense float64 oracle, and the tool end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.packing import pack
from data.sequence import ImageSegment, LatentSegment, TextSegment, given_completion
from modeling import load_bagel
from modeling.bagel.attention import AttentionLayout, Block
from modeling.bagel.decoder import apply_rotary, join_rows
from scripts.visual_opsd.analysis import attention as module
from scripts.visual_opsd.analysis.attention import (
    PARTS,
    attention_shares,
    main,
    measure,
    reading,
    summarise_shares,
    watch,
)
from tests.conftest import TINY_BAGEL, needs_gpu

FLAGS = [f"--{name}={value}" for name, value in
         {"vit_max_size": 56, "vit_min_size": 14, "vae_max_size": 64, "vae_min_size": 32,
          "limit": 3, "device": "cpu", "progress": False}.items()]  # fmt: skip


@pytest.fixture(scope="module")
def bundle() -> Any:
    return load_bagel(TINY_BAGEL, visual_gen=True)


def image(n: int, seed: int) -> ImageSegment:
    patches = torch.randn(n, 588, generator=torch.Generator().manual_seed(seed))
    return ImageSegment(patches, torch.arange(n))


def latent(n: int, seed: int) -> LatentSegment:
    values = torch.randn(n, 64, generator=torch.Generator().manual_seed(seed))
    return LatentSegment(values, torch.arange(n))


def contexts(with_latents: bool) -> list[Any]:
    """Two samples of different make-up; the second shows its problem first."""
    first = (TextSegment((5, 6, 7)), image(4, 0), TextSegment((8, 9)))
    second = (image(6, 1), TextSegment((11,)))
    vts = ((latent(4, 2),) if with_latents else ()) + (image(9, 3),)
    return [
        reading(first, (TextSegment((12, 13)), *vts), given_completion([14, 15, 16]).segment()),
        reading(second, (), given_completion([17, 18]).segment()),
    ]


def visible(segments: Any) -> Tensor:
    """Dense mask of one sample from its segments: causal, and full inside an image."""
    lens = [len(s.ids if isinstance(s, TextSegment) else s.position_ids) + 2 for s in segments]
    mask = torch.ones(sum(lens), sum(lens)).tril().bool()
    start = 0
    for segment, n in zip(segments, lens, strict=True):
        if not isinstance(segment, TextSegment):
            mask[start : start + n, start : start + n] = True
        start += n
    return mask


@pytest.mark.parametrize("with_latents", [False, True])
def test_shares_equal_a_dense_oracle(bundle: Any, with_latents: bool) -> None:
    readings = contexts(with_latents)
    batch = pack([r.context for r in readings], bundle.special_tokens)
    shares, uniform = measure(bundle.model, batch, readings)
    layers = bundle.config.llm.num_hidden_layers
    heads = bundle.config.llm.num_attention_heads
    assert shares.shape == (2, layers, heads, len(PARTS)) and uniform.shape == (2, len(PARTS))
    np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(uniform.sum(-1), 1, atol=1e-6)
    # Each sample alone, its parts written out by hand, everything in float64.
    names = ["text"] * 5 + ["problem_image"] * 6 + ["text"] * 4 + ["text"] * 4
    names += ["vt"] * (11 + 6 * with_latents) + ["answer"] * 5
    labels = [names, ["problem_image"] * 8 + ["text"] * 3 + ["answer"] * 4]
    answers = [[14, 15, 16], [17, 18]]
    double = bundle.model.double()
    try:
        for sample, (r, own, answer) in enumerate(zip(readings, labels, answers, strict=True)):
            own[0] = "first_token"
            alone = pack([r.context], bundle.special_tokens)
            assert alone.total == len(own)
            rows = list(range(alone.total - len(answer) - 2, alone.total - 1))
            mask = visible(r.context)
            for layer, weights in enumerate(oracle_weights(double, alone, mask)):
                for number, part in enumerate(PARTS):
                    keys = torch.tensor([name == part for name in own])
                    wanted = weights[:, rows][:, :, keys].sum(-1).mean(-1)  # (heads,)
                    got = shares[sample, layer, :, number]
                    np.testing.assert_allclose(got, wanted.numpy(), atol=2e-5)
            seen = mask[rows].double()
            for number, part in enumerate(PARTS):
                keys = torch.tensor([name == part for name in own])
                wanted = (seen[:, keys].sum(-1) / seen.sum(-1)).mean()
                assert uniform[sample, number] == pytest.approx(float(wanted), abs=1e-6)
    finally:
        bundle.model.float()


def oracle_weights(model: Any, batch: Any, mask: Tensor) -> list[Tensor]:
    """(heads, rows, rows) attention of every layer: projections, norms and rotation spelt out."""
    inputs: list[Any] = []
    handles = [
        layer.self_attn.register_forward_pre_hook(lambda m, args: inputs.append((m, args)))
        for layer in model.language_model.model.layers
    ]
    with torch.no_grad():
        model(batch)
    for handle in handles:
        handle.remove()
    found = []
    for attention, arguments in inputs:
        xs, shared, *_ = arguments
        routing = shared.routing
        x, cos, sin = (join_rows(part, routing) for part in (xs, shared.cos, shared.sin))
        rows = torch.zeros(len(x), dtype=torch.bool)
        if routing is not None:
            rows[routing.gen_rows] = True
        made = []
        for name in ("q", "k"):
            each = []
            for row in range(len(x)):
                suffix = "_moe_gen" if rows[row] else ""
                linear = getattr(attention, f"{name}_proj{suffix}")
                norm = getattr(attention, f"{name}_norm{suffix}")
                y = (x[row] @ linear.weight.T + linear.bias).unflatten(-1, (-1, len(norm.weight)))
                y = y / (y.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
                each.append(y)
            made.append(apply_rotary(torch.stack(each), cos.double(), sin.double()))
        q, k = made
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
        found.append(scores.masked_fill(~mask, -math.inf).softmax(-1).detach())
    return found


def test_no_attention_across_samples_and_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pack gives what its samples give alone, however few rows are scored at a time."""
    generator = torch.Generator().manual_seed(0)
    q = 3 * torch.randn(12, 4, 8, generator=generator)
    k = 3 * torch.randn(12, 2, 8, generator=generator)
    layout = AttentionLayout((5, 7), (0, 0), ((), (Block(0, 3),)))
    parts = [torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 1, 1, 1, 2, 2, 2])]
    rows = torch.tensor([3, 4, 8, 9, 10])
    together = attention_shares(q, k, layout, rows, parts, 3)
    for sample, (start, stop, own) in enumerate([(0, 5, [3, 4]), (5, 12, [3, 4, 5])]):
        single = AttentionLayout((stop - start,), (0,), (layout.blocks[sample],))
        alone = attention_shares(
            q[start:stop], k[start:stop], single, torch.tensor(own), parts[sample : sample + 1], 3
        )
        torch.testing.assert_close(together[sample], alone[0])
    monkeypatch.setattr(module, "_MAX_SCORES", 1)
    torch.testing.assert_close(attention_shares(q, k, layout, rows, parts, 3), together)


def test_watching_changes_nothing(bundle: Any) -> None:
    seen: list[int] = []
    batch = pack([r.context for r in contexts(False)], bundle.special_tokens)
    with torch.no_grad():
        before = bundle.model(batch)
        with watch(bundle.model, lambda layer, q, k: seen.append(layer)):
            during = bundle.model(batch)
        bundle.model(batch)  # nobody looks any more
    assert torch.equal(before, during)
    assert seen == list(range(bundle.config.llm.num_hidden_layers))


def test_figures_of_a_phase() -> None:
    shares = np.zeros((2, 1, 2, len(PARTS)))
    shares[0, 0, :, 2], shares[1, 0, 0, 2], shares[1, 0, 1, 3] = 1.0, 1.0, 1.0
    found = summarise_shares(shares, shares[:, 0, 0])
    assert found["shares"]["vt"] == [0.75] and found["heads"]["vt"] == [[1.0, 0.5]]
    assert found["standard_error"]["vt"] == pytest.approx([0.25])
    assert found["mean_over_layers"]["text"] == 0.25 and found["uniform"]["vt"] == 1.0
    assert summarise_shares(shares[:1], shares[:1, 0, 0])["standard_error"] is None


def analyse(world: Path, out: Path, *flags: str) -> dict[str, Any]:
    code = main(
        ["--model_path", str(TINY_BAGEL), "--data", "Spatial_Navigation", "--data_root",
         str(world), "--output_dir", str(out), *FLAGS, *flags]
    )  # fmt: skip
    assert code == 0
    return json.loads((out / "attention.json").read_text())


@needs_gpu
@pytest.mark.parametrize(("precision", "atol"), [("fp32", 1e-5), ("auto", 1e-3)])
def test_a_gpu_looks_at_the_same(world: Path, tmp_path: Path, precision: str, atol: float) -> None:
    cpu = analyse(world, tmp_path / "cpu")
    gpu = analyse(world, tmp_path / "gpu", "--device", "cuda", "--precision", precision)
    for part in PARTS:
        ours, theirs = (found["after"]["shares"][part] for found in (gpu, cpu))
        np.testing.assert_allclose(ours, theirs, atol=atol)


@pytest.mark.parametrize("context", ["vit", "vae+vit", "noise"])
def test_end_to_end(
    context: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    summary = analyse(world, out, "--context", context)
    assert summary["n"] == 3 and summary["parts"] == list(PARTS)
    for phase in ("before", "after"):
        total = np.sum([summary[phase]["shares"][part] for part in PARTS], axis=0)
        np.testing.assert_allclose(total, np.ones(summary["layers"]), atol=1e-5)
    assert not any(summary["before"]["shares"]["vt"])
    assert all(share > 0 for share in summary["after"]["shares"]["vt"])
    assert (out / "attention.png").stat().st_size > 5000
    if context == "vit":  # whether the two readings are packed together does not matter
        repacked = ("--context", context, "--max_forward_tokens=1")
        for other in (("--context", "noise"), ("--limit=2",)):
            with pytest.raises(ValueError, match=r"holds results of other settings .*--overwrite"):
                analyse(world, out, *other)
        monkeypatch.setattr(module, "measure", None)  # nothing is left to read
        analyse(world, out, *repacked)
        monkeypatch.undo()
        alone = analyse(world, out, *repacked, "--overwrite")
        for part in PARTS:
            np.testing.assert_allclose(
                alone["after"]["shares"][part], summary["after"]["shares"][part], atol=1e-5
            )
