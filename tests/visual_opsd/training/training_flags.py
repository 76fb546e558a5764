# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What is seen of a trainer's settings while it trains (`tests.arrivals`); for all its objectives.

Both commands are run as a user would, but in this process, on the tiny model and a few mazes.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import re
import shutil
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from data.parquet import StepLoader, StepOrder, make_loader
from data.randomness import off_policy_uniform, position_uniforms, row_generator
from data.rejects import RejectLedger
from data.sequence import ContextBuilder, ImageSegment, LatentSegment
from data.transforms import decode_image
from modeling.bagel.bagel import Bagel
from modeling.bagel.decoder import DecoderLayer
from modeling.bagel.generate import generate
from modeling.release.checkpoint import save_bagel
from scripts.visual_opsd.loss.chunked import chunked_opsd_loss
from scripts.visual_opsd.on_policy_sampler import sample_completions
from scripts.visual_opsd.rows import encode_pictures
from scripts.visual_opsd.scored_rows import score_completion, score_targets
from scripts.visual_opsd.training.checkpoints import save_checkpoint
from scripts.visual_opsd.training.eight_bit_adamw import EightBitAdamW
from scripts.visual_opsd.training.host_adamw import HostAdamW
from scripts.visual_opsd.training.leaks import LeakProbe
from scripts.visual_opsd.training.metrics import read_metrics
from scripts.visual_opsd.training.sharding import (
    check_precision,
    ema_update,
    full_tensor,
    mesh_shape,
)
from scripts.visual_opsd.training.step import plan_packs, run_pack
from tests.arrivals import (
    ABSENT,
    PROMPTS,
    Arrival,
    Run,
    noise_of,
    spy,
    spy_all,
    spy_method,
    words,
)
from tests.visual_opsd.training_runs import TINY_BAGEL, logged_steps, make_world

HEAD = "language_model.lm_head.weight"
FUNCTIONS: tuple[Callable[..., Any], ...] = (
    make_loader, sample_completions, score_completion, score_targets, run_pack, plan_packs,
    chunked_opsd_loss, ema_update, generate, save_checkpoint, save_bagel, row_generator,
    encode_pictures, fully_shard, checkpoint,
)  # fmt: skip
METHODS: tuple[tuple[type, str], ...] = (
    (DataLoader, "__init__"), (StepLoader, "__init__"), (StepOrder, "__init__"),
    (RejectLedger, "__init__"), (ContextBuilder, "__init__"), (LeakProbe, "__init__"),
)  # fmt: skip

OPTIMIZERS = {torch.optim.AdamW: "gpu", HostAdamW: "host", EightBitAdamW: "8bit"}


@dataclass
class TrainRun(Run):
    """One training run and what it left."""

    stderr: str = ""
    steps: list[dict[str, Any]] = field(default_factory=list)  # at each optimiser step

    @property
    def results(self) -> Path:
        return Path(self.given["results_dir"])

    @property
    def checkpoints(self) -> Path:
        given = self.given["checkpoint_dir"]
        return self.results / "checkpoints" if given is ABSENT else Path(given)

    @property
    def builder(self) -> ContextBuilder:
        return self.calls["ContextBuilder.__init__"][0]["self"]

    @cached_property
    def scored(self) -> list[Any]:
        """What was trained on, in order: a row for each completion."""
        return [row for rows in self.all("run_pack", "rows") for row in rows]

    @property
    def rows(self) -> list[Any]:
        """Of each row the first completion; run d, which has several, is given none."""
        return self.scored[:: self.given.get("completions_per_row", 1)]

    @property
    def context(self) -> Any:
        """The longest context of the first row."""
        return self.rows[0].teacher or self.rows[0].student

    @property
    def shows_thoughts(self) -> bool:
        return self.rows[0].teacher is not None

    @property
    def row_values(self) -> dict[str, Any]:
        """Cells of the first row that was trained on."""
        return next(self.trained_on())

    def trained_on(self) -> Any:
        """Cells of the rows that must be trained on, by seed, batch size, and the files named."""
        given = self.given
        folder = Path(given["data_root"]) / "Spatial_Navigation" / "data"
        split = "heldout" if "heldout" in str(given["dataset_config_file"]) else "train"
        files = sorted(folder.glob(f"{split}-*"))
        cells = [row for file in files for row in pq.read_table(file).to_pylist()]
        sources = self.calls["StepOrder.__init__"][0]["sources"]
        order = StepOrder(sources, given["data_seed"], given["global_batch_size"])
        for step in range(given["total_steps"]):
            for slot in range(given["global_batch_size"]):
                yield cells[next(order.candidates(step, slot))[1]]

    def groups(self, name: str) -> list[Any]:
        return [step["group"][name] for step in self.steps]

    @property
    def models(self) -> list[dict[str, Any]]:
        """How the whole models were sharded: the student, then the teacher."""
        return [c for c in self.calls["fully_shard"] if isinstance(c["module"], Bagel)]

    @property
    def recomputed(self) -> set[int]:
        bound = [call["function"].__self__ for call in self.calls["checkpoint"]]
        return {layer.layer for layer in bound if isinstance(layer, DecoderLayer)}


def record(main: Callable[[list[str]], int], name: str, given: Mapping[str, Any]) -> TrainRun:
    """Run a trainer's command to its end."""
    calls: dict[str, Any] = {}
    steps: list[dict[str, Any]] = []
    stderr = io.StringIO()

    def watch_steps(kind: type[torch.optim.Optimizer]) -> None:
        update = kind.step

        def stepped(self: Any, closure: Any = None) -> Any:
            norms = [p.grad.to_local().norm() for p in self.param_groups[0]["params"]]
            group = {k: v for k, v in self.param_groups[0].items() if k != "params"}
            norm = float(torch.stack(norms).norm())
            steps.append({"group": group, "norm": norm, "kind": kind})
            return update(self, closure)

        patch.setattr(kind, "step", stepped)

    def checked(model: Any, *args: Any, **kwargs: Any) -> Any:
        calls["trains"] = {n for n, p in model.named_parameters() if p.requires_grad}
        calls["head"] = float(full_tensor(dict(model.named_parameters())[HEAD])[0, 0])
        return check_precision(model, *args, **kwargs)

    wandb = types.ModuleType("wandb")
    with pytest.MonkeyPatch.context() as patch:
        run = types.SimpleNamespace(log=lambda *a, **k: None, finish=lambda: None)
        wandb.init = lambda **options: calls.update(wandb=options) or run  # type: ignore[attr-defined]
        wandb.login = lambda **options: None  # type: ignore[attr-defined]
        patch.setitem(sys.modules, "wandb", wandb)
        calls |= spy_all(patch, FUNCTIONS, METHODS)
        # One process shards over nobody, whatever mesh it is asked for; compiling takes minutes.
        calls["mesh_shape"] = spy(patch, mesh_shape, lambda *_, **__: (1, 1))
        calls["compile"] = spy_method(patch, nn.Module, "compile", lambda *_, **__: None)
        calls["group"] = spy_method(patch, dist, "init_process_group")  # type: ignore[arg-type]
        spy(patch, check_precision, checked)
        for kind in OPTIMIZERS:
            watch_steps(kind)
        with contextlib.redirect_stderr(stderr):
            assert main(words(given)) == 0
    return TrainRun(name, given, calls, stderr.getvalue(), steps)


# ------------------------------------------------------------------------------------ places


def make_places(folder: Path) -> dict[str, Path]:
    """Two worlds, two dataset configs, two models, a file of prompts."""
    for name in ("one", "two"):
        make_world(folder / name, rows=12)
        (folder / name / "heldout.yaml").write_text(
            "datasets:\n  - {name: Spatial_Navigation, split: heldout}\n"
        )
    other = shutil.copytree(TINY_BAGEL, folder / "other-model")
    tensors = load_file(other / "model.safetensors")
    tensors[HEAD] = tensors[HEAD] * 1.5
    save_file(tensors, other / "model.safetensors")
    prompts = folder / "prompts.yaml"
    prompts.write_text('intro: "Look here."\ntransition: "Now you."\n')
    return {
        "one": folder / "one", "two": folder / "two", "model": TINY_BAGEL, "other": other,
        "train": folder / "one" / "datasets.yaml", "heldout": folder / "one" / "heldout.yaml",
        "prompts": prompts, "results": folder / "results",
    }  # fmt: skip


# ---------------------------------------------------------------------------- what is expected


def schedule(run: TrainRun) -> list[float]:
    """Learning rate of each step, by hand."""
    g, found = run.given, []
    for step in range(g["total_steps"]):
        if step < g["warmup_steps"]:
            found.append(g["lr"] * (step + 1) / g["warmup_steps"])
        elif g["lr_scheduler"] == "constant":
            found.append(g["lr"])
        else:
            share = (step - g["warmup_steps"]) / (g["total_steps"] - 1 - g["warmup_steps"])
            half = (g["lr"] - g["min_lr"]) / 2
            found.append(g["min_lr"] + half * (1 + math.cos(math.pi * share)))
    return [float(f"{rate:.9g}") for rate in found]


def rates(run: TrainRun) -> list[float]:
    return [float(f"{rate:.9g}") for rate in run.groups("lr")]


def uniforms(run: TrainRun) -> list[list[float]] | None:
    """The first random numbers of each row's rollout."""
    drawn = run.all("generate", "uniforms")
    if drawn[0] is None:
        assert all(numbers is None for numbers in drawn)
        return None
    return [row[:3].tolist() for numbers in drawn for row in numbers]


def expected_uniforms(run: TrainRun) -> list[list[float]] | None:
    g = run.given
    if not g["sample_do_sample"]:
        return None
    places = itertools.product(
        range(g["total_steps"]), range(g["global_batch_size"]), (3,),
        range(g["completions_per_row"]),
    )  # fmt: skip
    return [position_uniforms(g["global_seed"], *place).tolist() for place in places]


def expected_given(run: TrainRun) -> list[bool]:
    """Of each row, whether it takes its text."""
    g = run.given
    places = itertools.product(range(g["total_steps"]), range(g["global_batch_size"]))
    drawn = [off_policy_uniform(g["global_seed"], *place) for place in places]
    return [number < g["off_policy_share"] for number in drawn]


def thought_images(row: Any) -> list[Tensor]:
    """Patches of what only the teacher sees."""
    shared = sum(isinstance(s, ImageSegment) for s in row.student)
    return [s.patches for s in row.teacher if isinstance(s, ImageSegment)][shared:]


def is_noise_of(run: TrainRun, seed: int) -> bool:
    """Whether every row's visual thoughts are the Gaussian noise of this seed and its place."""
    for position, row in enumerate(run.rows):
        images = thought_images(row)
        noise = noise_of(seed, position, [image.shape for image in images])
        if not all(torch.equal(a, b) for a, b in zip(images, noise, strict=True)):
            return False
    return True


def kind_shown(run: TrainRun) -> str:
    """What stands in the place of the first row's visual thoughts, by their patches."""
    (image,) = thought_images(run.rows[0])
    own = decode_image(run.row_values["reasoning_image_0"]["bytes"])
    problem = decode_image(run.row_values["problem_image_0"]["bytes"])
    alike = run.builder.image(problem.resize(own.size, Image.Resampling.BICUBIC)).patches
    if torch.equal(image, alike):
        return "problem"
    if is_noise_of(run, run.given["global_seed"]):
        return "noise"
    return "real" if image.any() else "blank"


def saved_steps(run: TrainRun) -> list[int]:
    g = run.given
    last = g["total_steps"]
    return [n for n in range(1, last + 1) if n % g["save_every"] == 0 or n == last]


def folders(run: TrainRun, prefix: str) -> list[int]:
    """Steps of the folders in the checkpoint folder: states ("step_") or releases ("")."""
    found = [re.fullmatch(rf"{prefix}(\d{{7}})", p.name) for p in run.checkpoints.iterdir()]
    return sorted(int(match[1]) for match in found if match)


def part_trains(prefix: str) -> Callable[[TrainRun], bool]:
    return lambda run: any(name.startswith(prefix) for name in run.calls["trains"])


def loss(name: str) -> Callable[[TrainRun], Any]:
    return lambda run: getattr(run.one("chunked_opsd_loss", "config"), name)


def limits(run: TrainRun) -> Any:
    return run.one("make_loader", "prepare").limits


def none_or(kind: type) -> Callable[[Any], Any]:
    return lambda value: None if value in (ABSENT, "none") else kind(value)


# ------------------------------------------------------------------------------------ the rows


def training_rows(places: Mapping[str, Path], tag: str) -> dict[str, Arrival]:
    """Settings that act in every kind of training; values for four runs, or repeated."""
    results = [places["results"] / f"{tag}-{name}" for name in "abcd"]
    return {
        "model_path": Arrival(
            [places["model"], places["other"]],
            lambda run: (run.calls["head"], [c["base"] for c in run.calls["save_bagel"]][:1]),
            lambda run: (
                float(load_file(run.given["model_path"] / "model.safetensors")[HEAD][0, 0]),
                [str(run.given["model_path"])] if run.given["save_release"] else [],
            ),
        ),
        "freeze_llm": Arrival([True, False, False, False], part_trains("language_model."),
                              lambda run: not run.given["freeze_llm"]),
        "freeze_vit": Arrival([False, True, False, False], part_trains("vit_model."),
                              lambda run: not run.given["freeze_vit"]),
        "freeze_und": Arrival([False, False, True, False], part_trains("connector."),
                              lambda run: not run.given["freeze_und"]),
        "activation_checkpointing": Arrival(
            [True, True, False, True], lambda run: bool(run.calls["checkpoint"])
        ),
        "checkpointed_layers": Arrival(
            ["none", 1, ABSENT, 2],
            lambda run: run.recomputed,
            lambda run: {"none": {0, 1, 2}, 1: {0}, ABSENT: set(), 2: {0, 1}}[
                run.given["checkpointed_layers"]
            ],
        ),
        "compile_blocks": Arrival(
            [False, True],
            lambda run: sum(isinstance(c["self"], DecoderLayer) for c in run.calls["compile"]) > 0,
        ),
        "dataset_config_file": Arrival(
            [places["train"], places["heldout"], places["train"], places["train"]],
            lambda run: {row.name.split("/")[1].split("-")[0] for row in run.rows},
            lambda run: {"heldout" if "heldout" in str(run.given["dataset_config_file"])
                         else "train"},
        ),
        "data_root": Arrival(
            [places["one"], places["two"], places["one"], places["one"]],
            lambda run: {Path(file).parents[2]
                         for source in run.calls["StepOrder.__init__"][0]["sources"]
                         for file in source.dataset.files},
            lambda run: {run.given["data_root"]},
        ),
        "num_workers": Arrival([0, 1], lambda run: run.one("DataLoader.__init__", "num_workers")),
        "prefetch_factor": Arrival(
            [2, 3, 2, 1],
            lambda run: run.one("DataLoader.__init__", "prefetch_factor"),
            lambda run: run.given["prefetch_factor"] if run.given["num_workers"] else None,
        ),
        "data_seed": Arrival(
            [7, 8, 7, 7],
            lambda run: [row.name for row in run.rows],
            lambda run: [f"Spatial_Navigation/{cells['pid']}" for cells in run.trained_on()],
        ),
        "global_batch_size": Arrival(
            [2, 3, 2, 2], lambda run: len(run.rows) / run.given["total_steps"]
        ),
        "max_bad_rate": Arrival([0.1, 0.2], lambda run: run.one("RejectLedger.__init__",
                                                                "max_rate")),
        "pack_tokens": Arrival([5000, 6000], lambda run: run.one("plan_packs", "pack_tokens")),
        "ce_weight": Arrival([0.25, 0.75], loss("ce_weight")),
        "token_weight": Arrival(["early:3", "entropy", "none", "early:4"],
                                loss("token_weight")),
        "skip_first_tokens": Arrival([1, 2, 0, 0], loss("skip_first_tokens")),
        "loss_chunk_size": Arrival([3, 5], lambda run: run.one("chunked_opsd_loss", "chunk_size")),
        "lr": Arrival([1e-3, 2e-3], rates, schedule),
        "min_lr": Arrival([1e-4, 2e-4, 3e-4, 4e-4], rates, schedule),
        "warmup_steps": Arrival([1, 2], rates, schedule),
        "lr_scheduler": Arrival(["cosine", "constant", "cosine", "cosine"], rates, schedule),
        "beta1": Arrival([0.8, 0.85], lambda run: {b[0] for b in run.groups("betas")},
                         lambda run: {run.given["beta1"]}),
        "beta2": Arrival([0.9, 0.92], lambda run: {b[1] for b in run.groups("betas")},
                         lambda run: {run.given["beta2"]}),
        "eps": Arrival([1e-3, 1e-4], lambda run: set(run.groups("eps")),
                       lambda run: {run.given["eps"]}),
        "weight_decay": Arrival([0.01, 0.02], lambda run: set(run.groups("weight_decay")),
                                lambda run: {run.given["weight_decay"]}),
        "optimizer_state": Arrival(["gpu", "host", "8bit", "gpu"],
                                   lambda run: {OPTIMIZERS[step["kind"]] for step in run.steps},
                                   lambda run: {run.given["optimizer_state"]}),
        "max_grad_norm": Arrival(  # as it is when the optimiser takes the gradient
            [1e-3, 2e-3],
            lambda run: [round(step["norm"] / run.given["max_grad_norm"], 2)
                         * run.given["max_grad_norm"] for step in run.steps],
            lambda run: [run.given["max_grad_norm"]] * run.given["total_steps"],
        ),
        "total_steps": Arrival([3, 4], lambda run: len(run.steps)),
        "gradient_accumulation_steps": Arrival(
            [2, 3, 2, 1], lambda run: len(run.calls["run_pack"]) / run.given["total_steps"]
        ),
        "results_dir": Arrival(
            results,
            lambda run: {name: (run.results / name).exists()
                         for name in ("metrics.jsonl", "config.yaml")} | {"at": run.results},
            lambda run: {"metrics.jsonl": True, "config.yaml": True,
                         "at": run.given["results_dir"]},
        ),
        "checkpoint_dir": Arrival(
            [ABSENT, *(places["results"] / f"{tag}-states-{name}" for name in "bcd")],
            lambda run: (folders(run, "step_") != [], (run.results / "checkpoints").exists()),
            lambda run: (True, run.given["checkpoint_dir"] is ABSENT),
        ),
        "save_every": Arrival([1, 2], lambda run: run.all("save_checkpoint", "step"), saved_steps),
        "save_release": Arrival(
            [True, False],
            lambda run: folders(run, ""),
            lambda run: saved_steps(run) if run.given["save_release"] else [],
        ),
        "keep_last": Arrival(
            [2, 1],
            lambda run: folders(run, "step_"),
            lambda run: saved_steps(run)[-run.given["keep_last"]:],
        ),
        "log_every": Arrival(
            [1, 2],
            lambda run: logged_steps(run.results),
            lambda run: [n for n in range(1, run.given["total_steps"] + 1)
                         if n % run.given["log_every"] == 0 or n == run.given["total_steps"]],
        ),
        "figures_every": Arrival(
            [0, 1, 2, 3],
            lambda run: [line["step"] for line in read_metrics(run.results / "metrics.jsonl")
                         if "model_tflop" in line],
            lambda run: [n for n in logged_steps(run.results)
                         if run.given["figures_every"] and n % run.given["figures_every"] == 0],
        ),
        "leak_words": Arrival(["the elf", "I drew, my map"],
                              lambda run: run.one("LeakProbe.__init__", "phrases")),
        "sharding_strategy": Arrival(["HYBRID_SHARD", "FULL_SHARD"],
                                     lambda run: run.one("mesh_shape", "sharding_strategy")),
        "num_shard": Arrival([2, 4], lambda run: run.one("mesh_shape", "num_shard")),
        "num_replicate": Arrival([3, 5], lambda run: run.one("mesh_shape", "num_replicate")),
        "cpu_offload": Arrival(
            [True, False, False, True],
            lambda run: isinstance(run.models[0]["offload_policy"], CPUOffloadPolicy),
        ),
        "timeout_s": Arrival(
            [600.0, 700.0],
            lambda run: (run.one("group", "timeout").total_seconds(),
                         run.one("StepLoader.__init__", "stuck_after_s")),
            lambda run: (run.given["timeout_s"], run.given["timeout_s"]),
        ),
        "progress": Arrival(
            [True, False], lambda run: bool(re.search(r"\d+/\d+ \[.*step", run.stderr))
        ),
        "wandb_project": Arrival(["p", "q"], lambda run: run.calls["wandb"]["project"]),
        "wandb_name": Arrival(["m", "n"], lambda run: run.calls["wandb"]["name"]),
        "wandb_offline": Arrival([True, False],
                                 lambda run: run.calls["wandb"]["mode"] == "offline"),
        "tensorboard": Arrival([True, False, False, True],
                               lambda run: (run.results / "tensorboard").is_dir()),
        **PROMPTS(places["prompts"]),
    }  # fmt: skip


def distillation_rows(places: Mapping[str, Path]) -> dict[str, Arrival]:
    """Settings of teacher, rollout and divergence; run c replays what run a sampled."""
    replay = places["results"] / "opsd-a" / "samples.jsonl"
    sampling = "abd"
    return {
        "teacher_mode": Arrival(
            ["ema", "ema", "fixed", "self"],
            lambda run: (len(run.models), len(run.calls["ema_update"])),
            lambda run: {"ema": (2, run.given["total_steps"]), "fixed": (2, 0), "self": (1, 0)}[
                run.given["teacher_mode"]
            ],
        ),
        "ema_decay": Arrival([0.75, 0.5], lambda run: run.one("ema_update", "decay"), runs="ab"),
        "teacher_vt": Arrival(
            ["vit", "vae+vit", "vit", "vit"],
            lambda run: {sum(isinstance(s, LatentSegment) for s in row.teacher)
                         == len(thought_images(row)) for row in run.rows},
            lambda run: {run.given["teacher_vt"] == "vae+vit"},
        ),
        "vt": Arrival(
            ["real", "problem", "blank", "noise"], kind_shown,
            lambda run: "noise" if run.given["noise_vt"] else run.given["vt"],
        ),
        "noise_vt": Arrival([True, False, False, True],
                            lambda run: is_noise_of(run, run.given["global_seed"])),
        "contrast": Arrival(
            [0.0, 0.5, 0.25, 0.0],
            lambda run: {step.contrast for step in run.all("run_pack", "step")},
            lambda run: {run.given["contrast"]},
        ),
        "contrast_with": Arrival(
            ["noise", "noise", "none", "noise"],
            lambda run: [len(thought_images(replace(row, teacher=row.control)))
                         for row in run.rows],
            lambda run: [{"noise": 1, "none": 0}[run.given["contrast_with"]]] * len(run.rows),
            runs="bc",
        ),
        "teacher_cpu_offload": Arrival(
            [False, True, True, False],
            lambda run: isinstance(run.models[1]["offload_policy"], CPUOffloadPolicy),
            runs="abc",
        ),
        "sample_max_new_tokens": Arrival(
            [6, 8, 7, 9],
            lambda run: (run.one("generate", "max_new_tokens"), limits(run).new_positions),
            lambda run: (run.given["sample_max_new_tokens"],) * 2, runs=sampling,
        ),
        "sample_temperature": Arrival([0.8, 1.2], lambda run: run.one("generate", "temperature"),
                                      runs=sampling),
        "sample_do_sample": Arrival([True, False, True, True], uniforms, expected_uniforms,
                                    runs=sampling),
        "sample_max_image_skips": Arrival(
            [0, 2], lambda run: run.one("generate", "max_image_skips"), runs=sampling
        ),
        "sample_batch_size": Arrival(
            [1, 2],
            lambda run: max(len(prompt.layout.query_lens) for prompt in run.all("generate",
                                                                                "prompt")),
            runs=sampling,
        ),
        "max_forward_tokens": Arrival(
            [4000, 5000],
            lambda run: (run.one("score_completion", "max_forward_tokens"), limits(run).tokens),
            lambda run: (run.given["max_forward_tokens"],) * 2,
        ),
        "completions_per_row": Arrival(
            [1, 1, 1, 2], lambda run: len(run.scored) / len(run.rows)
        ),
        "off_policy_share": Arrival(
            [0.0, 0.5, 0.0, 0.0],
            lambda run: [row.completion.given for row in run.rows], expected_given,
        ),
        "token_weight": Arrival(["early:3", "entropy", "none", "teacher_ahead"],
                                loss("token_weight")),
        "jsd_weight": Arrival([0.5, 1.5], loss("jsd_weight")),
        "jsd_beta": Arrival([0.3, 0.7], loss("beta")),
        "jsd_temperature": Arrival([1.5, 2.5], loss("temperature")),
        "jsd_top_k": Arrival([8, "none", 16, 32], loss("top_k"),
                             lambda run: none_or(int)(run.given["jsd_top_k"])),
        "jsd_token_clip": Arrival([0.05, "none", 0.1, 0.2], loss("token_clip"),
                                  lambda run: none_or(float)(run.given["jsd_token_clip"])),
        "jsd_clip_scope": Arrival(["entry", "token"], loss("clip_scope")),
        "jsd_tail_bucket": Arrival([True, False], loss("tail_bucket")),
        "jsd_loss_kind": Arrival(["jsd", "jsd", "jsd", "tinker"], loss("loss_kind")),
        "samples_per_step": Arrival(
            [2, 1],
            lambda run: len((run.results / "samples.jsonl").read_text().splitlines()),
            lambda run: run.given["samples_per_step"] * run.given["total_steps"]),
        "replay_samples": Arrival(
            [ABSENT, ABSENT, replay, ABSENT],
            lambda run: len(run.calls["sample_completions"]),
            lambda run: run.given["total_steps"] if run.given["replay_samples"] is ABSENT else 0),
        "global_seed": Arrival(
            [11, 12, 13, 14],
            lambda run: (
                set() if run.name == "c" else set(run.all("sample_completions", "seed")),
                {c["seed"] for c in run.calls["row_generator"] if c["purpose"] == "teacher"},
                is_noise_of(run, run.given["global_seed"]),
                is_noise_of(run, run.given["data_seed"]),
            ),
            lambda run: (
                set() if run.name == "c" else {run.given["global_seed"]},
                {run.given["global_seed"]} if run.given["teacher_vt"] == "vae+vit" else set(),
                run.given["noise_vt"],
                False,
            ),
        ),
    }  # fmt: skip
