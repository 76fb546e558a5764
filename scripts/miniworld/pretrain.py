# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Trains the miniature base from nothing, on the demo's own prompts: minutes on one GPU,
half an hour on one CPU core that others use too.

    python -m scripts.miniworld.pretrain --out examples/tiny-base

Where gymnasium is missing (it is needed for the tiles only), take the mazes and pictures along:

    python -m scripts.miniworld.pretrain --export-table mazes.npz      # where gymnasium is
    python -m scripts.miniworld.pretrain --table mazes.npz --out DIR   # where the GPU is

The mixture of rows decides what the base can do: most rows
are answered under the teacher's context with the true VT, few under the student's context
(`--text-share`), few under the teacher's with a Gaussian VT (`--noise-share`), so that a useless
VT is nothing new; walks make detours (`--detour`) that are shown but not taught, so that the base
also knows how to go on from a wrong prefix.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW

from data.json_lines import append_records
from data.sequence import Prompts
from data.worlds import spatial_navigation as nav
from data.worlds.tiles import fingerprint
from modeling import load_bagel
from modeling.bagel.bagel import Bagel
from modeling.bagel.generate import generate
from modeling.host.programs import SEED, check_new, make_folder, number, path_argument
from scripts.miniworld.base import SIDE, save_base, write_skeleton
from scripts.miniworld.batches import (
    STUDENT,
    TEACHER,
    Group,
    Template,
    Vocabulary,
    completion_length,
    maze_pictures,
)
from scripts.miniworld.mazes import Bank, MazeTable, maze_of, walk
from scripts.miniworld.tokenizer import DEMO_PROMPTS, demo_strings
from scripts.visual_opsd.cli import run_main

_SLACK = 4  # moves a walk with detours may take beyond the longest shortest path
_EVAL_CHUNK = 1024
# What the card of the base says of its run, of the flags.
RECORDED = (
    "steps", "batch_size", "lr", "min_lr_ratio", "warmup_steps", "weight_decay", "text_share",
    "noise_share", "detour", "seed", "stop_text_accuracy",
)  # fmt: skip


@dataclass(frozen=True)
class Mixture:
    """Shares of rows: text-only, with a Gaussian VT (the rest has the true one), and detours."""

    text: float
    noise: float
    detour: float


class BatchMaker:
    """Makes training batches on the device, of the same composition at every step."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        banks: Mapping[int, Bank],
        patches: Tensor,
        mixture: Mixture,
        *,
        batch_size: int,
        seed: int,
    ) -> None:
        self.banks, self.patches, self.mixture, self.words = banks, patches, mixture, vocabulary
        self.device = patches.device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.steps = {size: nav.longest_path(size) + _SLACK for size in banks}
        per_size = max(2, batch_size // len(banks))
        # At least one text-only row per size; its weight in the loss is the share, not its count.
        text = min(per_size - 1, max(1, math.ceil(mixture.text * per_size)))
        groups = []
        for size in banks:
            groups += [Group(size, STUDENT, text), Group(size, TEACHER, per_size - text)]
        self.template = Template(
            vocabulary, groups, side=SIDE, steps=self.steps, device=self.device
        )

    def make(self) -> tuple[Any, Tensor, Tensor]:
        """A packed batch and two weights of its scored rows: they sum to the mean cross-entropy
        of the text-only rows and of the others."""
        pictures, completions, text_rows = [], [], []
        noise_among_teacher = self.mixture.noise / (1 - self.mixture.text)
        for group in self.template.groups:
            bank, count, generator = self.banks[group.size], group.count, self.generator

            def uniform(*shape: int) -> Tensor:
                return torch.rand(*shape, device=self.device, generator=self.generator)

            index = (uniform(count) * len(bank)).long().clamp_max(len(bank) - 1)
            tile_set = (uniform(count) * len(self.patches)).long()
            walked = walk(bank, index, self.steps[group.size], self.mixture.detour, generator)
            ids, weight = self.words.completions(bank, index, walked)
            problem, thought = maze_pictures(bank, index, self.patches, tile_set)
            if group.kind == TEACHER:
                noise = torch.randn(thought.shape, device=self.device, generator=generator)
                useless = uniform(count) < noise_among_teacher
                thought = torch.where(useless[:, None, None], noise, thought)
            pictures.append((problem, thought if group.kind == TEACHER else None))
            completions.append((ids, weight))
            text_rows.append(torch.full_like(weight, float(group.kind == STUDENT)).flatten())
        batch, weights = self.template.fill(pictures, completions)
        assert weights is not None
        is_text = torch.cat(text_rows)
        text, vt = weights * is_text, weights * (1 - is_text)
        return batch, text / text.sum(), vt / vt.sum()


def train_step(
    model: Bagel, maker: BatchMaker, dtype: torch.dtype, text_share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward and backward of one batch; returns loss, text-only CE and VT CE.

    The weights are cast to `dtype` for the forward, as a sharded trainer does, and the gradients
    arrive in the fp32 parameters.
    """
    batch, text_weight, vt_weight = maker.make()

    def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(hidden, weight).float()
        ce = F.cross_entropy(logits, batch.score_labels, reduction="none")
        return (ce * text_weight).sum(), (ce * vt_weight).sum()

    weights = {name: p.to(dtype) for name, p in model.named_parameters()}
    text, vt = torch.func.functional_call(model, weights, (batch,), {"head": head})
    loss = text_share * text + (1 - text_share) * vt
    loss.backward()
    return loss.detach(), text.detach(), vt.detach()


@torch.no_grad()
def accuracy(
    model: Bagel,
    vocabulary: Vocabulary,
    banks: Mapping[int, Bank],
    patches: Tensor,
    kind: str,
    *,
    noise: bool = False,
    rows: int | None = None,
) -> dict[str, float]:
    """Greedy accuracy over the mazes of `banks` (any valid path counts), over all and by size.

    Args:
        patches: one tile set, (4, 16, 588). kind: which context. noise: Gaussian VTs.
        rows: use the first `rows` mazes only, shared evenly among the sizes.
    """
    device = patches.device
    generator = torch.Generator(device).manual_seed(0)
    solved: dict[int, list[bool]] = {}
    for size, bank in banks.items():
        count = len(bank) if rows is None else min(len(bank), rows // len(banks))
        solved[size] = []
        for first in range(0, count, _EVAL_CHUNK):
            index = torch.arange(first, min(first + _EVAL_CHUNK, count), device=device)
            group = Group(size, kind, len(index))
            template = Template(vocabulary, [group], side=SIDE, steps=None, device=device)
            problem, thought = maze_pictures(bank, index, patches[None], torch.zeros_like(index))
            if noise:
                thought = torch.randn(thought.shape, device=device, generator=generator)
            prompt, _ = template.fill([(problem, thought if kind == TEACHER else None)])
            budget = completion_length(nav.longest_path(size) + _SLACK) + 2
            made = generate(model, prompt, vocabulary.special, max_new_tokens=budget)
            for board, row in zip(bank.kinds[index].tolist(), made, strict=True):
                text = vocabulary.tokenizer.decode(row.ids)
                state = maze_of(board).state
                solved[size].append(nav.score({"world_state": state}, text))
    every = [hit for hits in solved.values() for hit in hits]
    result = {"all": sum(every) / len(every)}
    result.update({f"{s}x{s}": sum(hits) / len(hits) for s, hits in solved.items() if hits})
    return result


def evaluate(
    model: Bagel,
    vocabulary: Vocabulary,
    banks: Mapping[int, Bank],
    patches: Tensor,
    dtype: torch.dtype,
    rows: int | None = None,
) -> dict[str, dict[str, float]]:
    """Accuracy text-only, with the VT and with a noise VT, computed in `dtype`."""
    model = model if model.dtype == dtype else copy.deepcopy(model).to(dtype)
    cases = {"text": (STUDENT, False), "vt": (TEACHER, False), "noise": (TEACHER, True)}
    return {
        name: accuracy(model, vocabulary, banks, patches, kind, noise=noise, rows=rows)
        for name, (kind, noise) in cases.items()
    }


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine to `--min-lr-ratio` of the peak."""
    peak: float = args.lr
    floor: float = args.min_lr_ratio
    warmup: int = args.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    progress: float = (step - warmup) / max(1, args.steps - warmup)
    height: float = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (floor + (1 - floor) * height)


def make_optimiser(model: Bagel, args: argparse.Namespace, device: torch.device) -> AdamW:
    """AdamW that decays matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=device.type == "cuda")


def train(
    model: Bagel,
    maker: BatchMaker,
    args: argparse.Namespace,
    dtype: torch.dtype,
    check: Callable[[], dict[str, dict[str, float]]],
    log: Callable[[Mapping[str, Any]], None],
) -> int:
    """Train in place; returns the number of steps made.

    Raises:
        ValueError: the loss is no longer finite.
    """
    optimiser = make_optimiser(model, args, maker.device)
    trained = [p for group in optimiser.param_groups for p in group["params"]]
    started = time.perf_counter()
    steps: int = args.steps
    for step in range(1, steps + 1):
        rate = learning_rate(step - 1, args)
        for group in optimiser.param_groups:
            group["lr"] = rate
        losses = train_step(model, maker, dtype, args.text_share)
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if step % args.log_every == 0 or step == steps:
            loss, text, vt = (round(x.item(), 5) for x in losses)
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss is {loss} at step {step}; lower --lr or use --dtype float32"
                )
            line = {"step": step, "loss": loss, "ce_text": text, "ce_vt": vt}
            seconds = round(time.perf_counter() - started, 1)
            log({**line, "grad_norm": round(norm.item(), 4), "lr": rate, "seconds": seconds})
        if step % args.eval_every == 0 and step < steps:
            results = check()
            log({"step": step, "accuracy": results})
            if is_good_enough(results, args.stop_text_accuracy):
                return step
    return steps


def is_good_enough(results: Mapping[str, Mapping[str, float]], text: float | None) -> bool:
    """Whether the text-only accuracy is the wanted one, and that with the VT .97."""
    return bool(text and results["text"]["all"] >= text and results["vt"]["all"] >= 0.97)


def build_parser() -> argparse.ArgumentParser:
    """All flags of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.miniworld.pretrain", description=(__doc__ or "").split("\n\n")[0]
    )
    add = parser.add_argument
    count = number(int, at_least=1, at_most=10**8)
    share = number(float, at_least=0, at_most=1)
    add("--out", type=path_argument, help="folder to write the base to")
    add("--overwrite", action="store_true", help="replace what is written if it exists")
    add(
        "--log",
        type=path_argument,
        help="JSON lines of losses and accuracies (default: OUT.jsonl)",
    )
    add(
        "--export-table",
        type=path_argument,
        help="write mazes and tile pictures to this .npz and stop",
    )
    add("--table", type=path_argument, help="read mazes and tile pictures from this .npz")
    add(
        "--tiles",
        type=path_argument,
        action="append",
        default=[],
        help="folder of a further tile set (repeatable)",
    )
    add("--sizes", type=lambda t: tuple(map(int, t.split(","))), default=(3, 4))
    add("--mazes-per-size", type=count, default=100_000, help="training mazes of each size")
    add("--heldout-rows", type=count, default=2400, help="held-out mazes for the accuracies")
    add(
        "--prompts",
        type=path_argument,
        default=str(DEMO_PROMPTS),
        help="YAML with system, intro, transition",
    )
    add("--seed", type=SEED, default=1)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU")
    add("--steps", type=count, default=1400)
    add("--batch-size", type=number(int, at_least=1, at_most=2**20), default=256)
    add("--lr", type=number(float, above=0, at_most=1e9), default=1e-3)
    add("--min-lr-ratio", type=share, default=0.05)
    add("--warmup-steps", type=number(int, at_least=0, at_most=10**8), default=50)
    add("--weight-decay", type=number(float, at_least=0, at_most=1000), default=0.01)
    add("--text-share", type=share, default=0.01, help="weight of the text-only rows")
    add("--noise-share", type=share, default=0.01, help="share of rows with a Gaussian VT")
    add("--detour", type=share, default=0.1, help="probability of a detour before each move")
    add("--log-every", type=count, default=20)
    add("--eval-every", type=count, default=250)
    add("--eval-rows", type=count, help="mazes of the evaluations on the way (default: all)")
    add(
        "--stop-text-accuracy",
        type=share,
        help="stop at the first evaluation with this text-only accuracy (and VT accuracy .97)",
    )
    return parser


def _log_path(args: argparse.Namespace) -> Path:
    return Path(args.log or f"{args.out.rstrip('/')}.jsonl")


def _check(args: argparse.Namespace) -> None:
    if bool(args.out) == bool(args.export_table):
        raise ValueError("give either --out DIR (train) or --export-table FILE (write the mazes)")
    if args.out and Path(args.out).exists() and not args.overwrite:
        raise ValueError(f"{args.out} exists; choose another --out or pass --overwrite")
    if args.export_table:
        check_new(args.export_table, "--export-table", overwrite=args.overwrite)
    else:
        log = _log_path(args)
        make_folder(log.absolute().parent, "--log" if args.log else "--out")
        check_new(log, "--log", overwrite=args.overwrite)
    if not 0 < args.text_share < 1 or not 0 <= args.noise_share < 1 - args.text_share:
        raise ValueError(
            f"--text-share {args.text_share} and --noise-share {args.noise_share}: shares of "
            "rows, the first above 0, together below 1"
        )
    if args.batch_size < 2 * len(args.sizes):
        raise ValueError("--batch-size must be at least two per size")


def make_base(args: argparse.Namespace, table: MazeTable) -> None:
    """Train a base on the mazes of `table` and write it. Raises ValueError: the run diverged."""
    device = torch.device(args.device)
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = getattr(torch, args.dtype) if args.dtype else default
    prompts = Prompts.from_yaml(args.prompts)
    patches = table.patches(device)
    banks = {s: Bank(b, device) for s, b in table.train.items()}
    heldout = {s: Bank(b, device) for s, b in table.heldout.items()}
    mixture = Mixture(args.text_share, args.noise_share, args.detour)
    log_path = _log_path(args)
    log_path.write_bytes(b"")
    with tempfile.TemporaryDirectory() as skeleton:

        def log(entry: Mapping[str, Any]) -> None:
            append_records(log_path, [entry])
            print(json.dumps(entry), flush=True)

        write_skeleton(skeleton, demo_strings(prompts), args.seed)
        bundle = load_bagel(skeleton, device=device, dtype=torch.float32)
        model = bundle.model
        words = Vocabulary(bundle.tokenizer, bundle.special_tokens, prompts, device)
        maker = BatchMaker(
            words, banks, patches, mixture, batch_size=args.batch_size, seed=args.seed
        )
        started = time.perf_counter()

        def check() -> dict[str, dict[str, float]]:
            return evaluate(model, words, heldout, patches[0], dtype, args.eval_rows)

        steps = train(model, maker, args, dtype, check, log)
        seconds = time.perf_counter() - started
        # What is reported is what the file holds: the weights as rounded to its bf16.
        rounded = copy.deepcopy(model).to(torch.bfloat16).to(dtype)
        by_tiles = {
            fingerprint(cells): evaluate(rounded, words, heldout, patches[i], dtype)
            for i, cells in enumerate(table.cells)
        }
        log({"step": steps, "final": by_tiles})
        results = {
            "accuracy": {
                name: {case: values["all"] for case, values in cases.items()}
                for name, cases in by_tiles.items()
            },
            "mazes": sum(len(bank) for bank in heldout.values()),
            "parameters": sum(p.numel() for p in model.parameters()),
            "steps": steps,
            "seconds": seconds,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        }
        settings = {
            "sizes": list(table.sizes),
            "training_mazes": {s: len(b) for s, b in banks.items()},
            **{name: getattr(args, name) for name in RECORDED},
            "dtype": str(dtype).removeprefix("torch."),
        }
        save_base(
            model,
            args.out,
            skeleton=skeleton,
            results=results,
            settings=settings,
            overwrite=args.overwrite,
        )
    print(f"wrote {args.out} after {steps} steps in {seconds:.0f} s")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    _check(args)
    if args.table:
        table = MazeTable.load(args.table)
    else:
        table = MazeTable.build(
            sizes=args.sizes,
            per_size=args.mazes_per_size,
            heldout_rows=args.heldout_rows,
            cell=14,
            seed=args.seed,
            tile_folders=args.tiles,
        )
    if args.export_table:
        table.save(args.export_table)
        megabytes = Path(args.export_table).stat().st_size / 1e6
        print(f"wrote {args.export_table} ({megabytes:.1f} MB), sizes {table.sizes}")
    else:
        make_base(args, table)
    return 0


if __name__ == "__main__":
    run_main(main)
