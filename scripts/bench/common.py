# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: sizes, random weights and contexts, ceilings, timing, the report.

A report is one JSON object: hardware, versions, ceilings measured in the same run and, for each
figure, {median, spread, floor, ratio, target, reference, settings}. `floor` is what the ceilings
allow, `ratio` the median over it; `reference` is what the authors' code took on REFERENCE_HARDWARE.
Tiny runs (`--tiny`, any machine) show that a script works; their figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from data.sequence import ImageSegment, Segment, TextSegment
from data.transforms import extrapolated_position_ids
from modeling import fast
from modeling.bagel.bagel import Bagel
from modeling.bagel.config import BagelConfig, LLMConfig, SpecialTokens, VisionConfig
from modeling.bagel.projections import adjoin_projections
from modeling.host.programs import check_new, path_argument

TRUE_SIZE = BagelConfig(
    llm=LLMConfig(3584, 28, 28, 4, 18944, 152064), vision=VisionConfig(1152, 26, 16, 4304)
)
TINY = BagelConfig(llm=LLMConfig(128, 2, 4, 2, 256, 1408), vision=VisionConfig(32, 2, 2, 64))
REFERENCE_HARDWARE = "one NVIDIA H100 80GB HBM3, torch 2.11.0+cu130"
SPECIAL = SpecialTokens(bos=1, eos=2, start_of_image=3, end_of_image=4)


@dataclass(frozen=True)
class Machine:
    """Where a benchmark runs, and how large it is."""

    device: torch.device
    tiny: bool

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.on_gpu else torch.float32

    @property
    def hardware(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.on_gpu else "cpu"

    @property
    def config(self) -> BagelConfig:
        return TINY if self.tiny else TRUE_SIZE

    def size(self, true: int, tiny: int) -> int:
        return tiny if self.tiny else true

    def now(self) -> float:
        """Seconds, after everything queued has been done."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def timed(self, call: Callable[[], Any], repeats: int, warm_up: int = 2) -> list[float]:
        """Seconds of each of `repeats` calls; on a GPU those that the GPU takes, not the wait."""
        for _ in range(warm_up):
            call()
        return [self._seconds(call) for _ in range(repeats)]

    def _seconds(self, call: Callable[[], Any]) -> float:
        start = self.now()
        if not self.on_gpu:
            call()
            return self.now() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def reset_peak(self) -> float:
        """Bytes allocated now; `peak` counts from here."""
        if not self.on_gpu:
            return 0.0
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return float(torch.cuda.memory_allocated(self.device))

    def peak(self) -> float:
        return float(torch.cuda.max_memory_allocated(self.device)) if self.on_gpu else 0.0


@dataclass(frozen=True)
class Ceilings:
    """What the device does at best: bytes read and written, and bf16 operations, a second."""

    bytes_per_s: float
    flop_per_s: float

    def seconds(self, nbytes: float = 0.0, flop: float = 0.0) -> float:
        """The least time: the larger of moving the bytes and doing the arithmetic."""
        return max(nbytes / self.bytes_per_s, flop / self.flop_per_s)


def measure_ceilings(machine: Machine) -> Ceilings:
    """A large device copy, and an 8192^3 product of random matrices."""
    side = 8192 if machine.on_gpu else 512
    a, b = (torch.randn(side, side, device=machine.device, dtype=machine.dtype) for _ in range(2))
    product = min(machine.timed(lambda: a @ b, 10))
    source = torch.randn((1 << 29 if machine.on_gpu else 1 << 22), device=machine.device)
    target = torch.empty_like(source)
    copy = min(machine.timed(lambda: target.copy_(source), 10))
    return Ceilings(2 * source.numel() * 4 / copy, 2 * side**3 / product)


@dataclass
class Report:
    """Collects figures and writes them."""

    machine: Machine
    ceilings: Ceilings
    repeats: int
    brief: bool
    results: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def add(
        self,
        key: str,
        values: Sequence[float],
        *,
        floor: float | None,
        target: float,
        reference: float | None,
        settings: str,
    ) -> None:
        """values, floor, target, reference: in the unit that the key ends in.

        Target and reference are the true size's: a tiny run has neither.
        """
        tiny = self.machine.tiny
        median = statistics.median(values)
        self.results[key] = {
            "median": _rounded(median),
            "spread": _rounded(max(values) - min(values)),
            "floor": None if floor is None else _rounded(floor),
            "ratio": None if not floor else round(median / floor, 3),
            "target": None if tiny else target,
            "reference": None if tiny else reference,
            "settings": f"{settings}; {len(values)} measurement{'s' * (len(values) > 1)}",
        }

    def as_dict(self) -> dict[str, Any]:
        run = {
            "hardware": self.machine.hardware,
            "versions": versions(),
            "dtype": str(self.machine.dtype).removeprefix("torch."),
            "tiny": self.machine.tiny,
            "ceilings": {
                "copy_tb_s": round(self.ceilings.bytes_per_s / 1e12, 3),
                "matmul_tflop_s": round(self.ceilings.flop_per_s / 1e12, 1),
            },
            "reference_hardware": REFERENCE_HARDWARE,
            "notes": self.notes,
        }
        return {**self.results, "run": run}


def eagerly(paths: str = "all") -> AbstractContextManager[Any]:
    """Every fast path off while a `with` block runs, or those of `paths`."""
    return mock.patch.dict(os.environ, VISUAL_OPSD_EAGER=paths)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def versions() -> dict[str, str]:
    found = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    if fast.has_triton():
        import triton

        found["triton"] = triton.__version__
    return found


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--tiny", action="store_true", help="a tiny model, on any machine")
    made.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda or cpu (%(default)s here)",
    )
    add_report(made)
    made.add_argument(
        "--repeats", type=int, default=5, help="measurements a figure, after a warm-up"
    )
    made.add_argument(
        "--brief", action="store_true", help="the figures alone, without comparisons in the notes"
    )
    return made


def add_report(made: argparse.ArgumentParser) -> None:
    """Where the report goes."""
    made.add_argument("--json", type=path_argument, help="also write the report here")
    made.add_argument("--overwrite", action="store_true", help="replace the report of --json")


def check(args: argparse.Namespace) -> torch.device:
    """What would make a run fail, found before anything is measured; its device.

    Raises:
        ValueError: no such device, no GPU for the true size, no place for the report.
    """
    try:
        device = torch.device(args.device)
    except RuntimeError:
        raise ValueError(f"--device {args.device}: choose cuda, cuda:N or cpu") from None
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"--device {args.device}: choose cuda, cuda:N or cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no GPU; use --tiny --device cpu")
    if device.type != "cuda" and not args.tiny:
        raise ValueError("the true size needs a GPU of 80 GB; --tiny runs anywhere")
    check_report(args)
    return device


def check_report(args: argparse.Namespace) -> None:
    """Raises ValueError unless there is something to measure, and a place to write it to."""
    if args.repeats is not None and args.repeats < 1:
        raise ValueError("--repeats must be at least 1")
    if args.json:
        check_new(args.json, "--json", overwrite=args.overwrite)


def start(args: argparse.Namespace) -> Report:
    """The report of a run, with its ceilings.

    Raises:
        ValueError: see `check`.
    """
    device = check(args)
    torch.manual_seed(0)
    machine = Machine(device, args.tiny)
    return Report(machine, measure_ceilings(machine), args.repeats, args.brief)


def finish(report: Report, path: str | None) -> int:
    """Print the report as one line of JSON and write it to `path`."""
    return write(report.as_dict(), path)


def write(made: dict[str, Any], path: str | None) -> int:
    print(json.dumps(made), flush=True)
    if path:
        Path(path).write_text(json.dumps(made, indent=1) + "\n")
    return 0


def layers_parser(description: str | None) -> argparse.ArgumentParser:
    """What a benchmark is told that takes a model of --layers layers through FSDP2."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("--layers", type=int, default=TRUE_SIZE.llm.num_hidden_layers)
    add("--tiny", action="store_true", help="a tiny model, whatever --layers says")
    add("--repeats", type=int, default=5)
    add("--device", default="auto", help="auto, cuda or cpu")
    add_report(options)
    return options


def parse_layers(
    options: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Raises ValueError: no layers, or as `check_report`."""
    args = options.parse_args(argv)
    if args.layers < 1:
        raise ValueError("--layers must be at least 1")
    check_report(args)
    return args


# ------------------------------------------------------------------------- models and contexts


def sized(layers: int) -> BagelConfig:
    """The true widths with fewer decoder and ViT layers."""
    llm, vision = TRUE_SIZE.llm, TRUE_SIZE.vision
    return replace(
        TRUE_SIZE,
        llm=replace(llm, num_hidden_layers=layers),
        vision=replace(vision, num_hidden_layers=min(layers, vision.num_hidden_layers)),
    )


def random_model(config: BagelConfig, machine: Machine, *, adjoin: bool = True) -> Bagel:
    """Random weights made on the device, parameter by parameter.

    adjoin: projections side by side, as loading to a GPU leaves them.
    """
    with torch.device("meta"):
        model = Bagel(config)
    model.to(machine.dtype).to_empty(device=machine.device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0, 0.02)
    if adjoin and machine.on_gpu:
        adjoin_projections(model)
    return model.requires_grad_(False)


def text(machine: Machine, tokens: int) -> TextSegment:
    """A text of `tokens` random ids (a twentieth of them in a tiny run)."""
    count = machine.size(tokens, max(tokens // 20, 1))
    return TextSegment(tuple(torch.randint(5, machine.config.llm.vocab_size, (count,)).tolist()))


def image(machine: Machine) -> ImageSegment:
    """A random picture of 518 x 518."""
    config = machine.config
    side = machine.size(518 // config.vision.patch_size, 3)
    patches = torch.rand(side * side, config.vision.patch_dim) * 2 - 1
    positions = extrapolated_position_ids(side, side, config.vit_max_patches_per_side)
    return ImageSegment(patches, positions)


def prompt(machine: Machine) -> tuple[Segment, ...]:
    """System 90, image 518 x 518, question 100: 1,565 rows with their markers."""
    return text(machine, 90), image(machine), text(machine, 100)


def layer_parameters(model: Bagel) -> int:
    """Parameters of the understanding expert's layers."""
    named = model.language_model.model.layers.named_parameters()
    return sum(p.numel() for name, p in named if "_moe_gen" not in name)


def vision_parameters(model: Bagel) -> int:
    return sum(p.numel() for m in (model.vit_model, model.connector) for p in m.parameters())
