# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""`make docs`: the tables that mirror the code, written anew between their markers; a drawing.

A region begins with `<!-- NAME -->` and ends with `<!-- end -->`. What REGIONS does not name is
written by hand. The meanings of options are the help texts of the settings.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from modeling.fast import FAST_PATHS
from modeling.host.programs import run_main
from scripts import method_figure
from scripts.bench.all import table as benchmark_table
from scripts.bench.common import TRUE_SIZE
from scripts.visual_opsd.analysis.kl_measurement import DiagnosticSettings
from scripts.visual_opsd.analysis.trace_rows import CollectSettings
from scripts.visual_opsd.cli import flat
from scripts.visual_opsd.config import (
    INTERLEAVED_DEFAULTS,
    SFT_DEFAULTS,
    ComputeSettings,
    FlowSettings,
    TrainConfig,
)
from scripts.visual_opsd.evaluation.questions import BenchmarkSettings, EvaluateSettings
from scripts.visual_opsd.training.checkpoints import FREE_FIELDS
from scripts.visual_opsd.training.memory_plan import Plan, largest_plan
from scripts.visual_opsd.training.memory_sizes import ReleaseSizes, World, make_footprint
from scripts.visual_opsd.training.offline import OFFLINE_DEFAULTS, OfflineSettings
from scripts.visual_opsd.training.visual_opsd import VisualOPSD

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "docs" / "benchmarks"
HEADINGS = {
    "model": "Model", "prompt": "Contexts", "data": "Data", "teacher": "Teacher",
    "sample": "Sampling and sequence lengths", "loss": "Loss", "optim": "Optimiser", "run": "Run",
    "lora": "Adapters", "validation": "Validation", "memory": "Memory plan",
    "rollout": "Completions of a row",
}  # fmt: skip


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head, *body = ("| " + " | ".join(line) + " |" for line in (header, *rows))
    return "\n".join((head, "|---" * (head.count("|") - 1) + "|", *body))


def flag_text(name: str) -> str:
    return f"`--{name}`"


def value_text(value: Any) -> str:
    """A default as somebody would type it."""
    if value is None:
        return "`none`"
    text = '""' if value == "" else str(value)
    return f"`{re.sub(r'e-0(?=[0-9])', 'e-', text)}`"


def option_table(group: type) -> str:
    """Flag, default and meaning of every field of a settings class."""
    rows = [
        (flag_text(spec.name), value_text(spec.default), spec.metadata["help"])
        for spec in fields(group)
    ]
    return markdown_table(("flag", "default", "meaning"), rows)


def training_options() -> str:
    config = TrainConfig()
    parts = [
        f"### {HEADINGS[group.name]}\n\n{option_table(type(getattr(config, group.name)))}"
        for group in fields(config)
    ]
    return "\n\n".join(parts)


def sft_defaults() -> str:
    """What the two kinds of SFT set differently, beside Visual-OPSD's defaults."""
    paper = flat(TrainConfig())
    columns = (paper, paper | SFT_DEFAULTS, paper | INTERLEAVED_DEFAULTS)
    rows = [
        (flag_text(name), *(value_text(column[name]) for column in columns))
        for name in INTERLEAVED_DEFAULTS
    ]
    return markdown_table(("flag", "Visual-OPSD", "SFT on text", "interleaved SFT"), rows)


def offline_defaults() -> str:
    """What the offline form sets differently, beside Visual-OPSD's defaults."""
    paper = flat(TrainConfig())
    rows = [
        (flag_text(name), value_text(paper[name]), value_text(value))
        for name, value in OFFLINE_DEFAULTS.items()
    ]
    return markdown_table(("flag", "Visual-OPSD", "offline"), rows)


def free_settings() -> str:
    names = [flag_text(name) for name in flat(TrainConfig()) if name in FREE_FIELDS]
    return textwrap.fill(", ".join(names) + ".", 98, break_on_hyphens=False)


def fast_paths() -> str:
    rows = [(f"`{name}`", meaning) for name, meaning in FAST_PATHS.items()]
    return markdown_table(("name", "what it does"), rows)


def demo_results() -> str:
    """The README's table, from docs/benchmarks/demo.json: the seeds, their mean, larger runs."""
    recorded = json.loads((BENCHMARKS / "demo.json").read_text(encoding="utf-8"))

    def shares(accuracy: Mapping[str, float]) -> list[str]:
        return [f"{100 * accuracy[arm]:.1f} %" for arm in ("base", "real", "noise")]

    def pair(run: Mapping[str, Any], name: str) -> str:
        figures = run["paired_points"][name]
        low, high = figures["interval"]
        return f"{figures['difference']:+.1f} ({low:+.1f} to {high:+.1f})"

    def gaps(run: Mapping[str, Any]) -> dict[str, float]:
        return {arm: run["gap_closed"][arm]["jsd"]["value"] for arm in ("real", "noise")}

    def closed(shares: Mapping[str, float]) -> str:
        return " / ".join(f"{100 * shares[arm]:.0f} %" for arm in ("real", "noise"))

    def row(label: str, run: Mapping[str, Any]) -> list[str]:
        pairs = [pair(run, name) for name in ("real - noise", "noise - base")]
        return [label, *shares(run["accuracy"]), *pairs, closed(gaps(run)), f"{run['seconds']} s"]

    seeds = recorded["seeds"]
    rows = [row(str(run["seed"]), run) for run in seeds]
    accuracy = {arm: fmean(run["accuracy"][arm] for run in seeds) for arm in seeds[0]["accuracy"]}
    mean_gaps = {arm: fmean(gaps(run)[arm] for run in seeds) for arm in ("real", "noise")}
    points = (100 * (accuracy[a] - accuracy[b]) for a, b in (("real", "noise"), ("noise", "base")))
    mean = ["mean", *shares(accuracy), *(f"{value:+.1f}" for value in points), closed(mean_gaps)]
    rows.append([*(f"**{cell}**" for cell in mean), ""])
    for name, run in recorded.get("larger_setting", {}).items():
        if isinstance(run, dict):
            rows.append(row(f"{run['seed']}, larger, {name.replace('_', ' ')}", run))
    header = ("seed", "before", "after, real VTs", "after, noise", "real - noise", "noise - before")
    return markdown_table((*header, "gap closed, real / noise", "time"), rows)


# GPUs of one machine and settings, as the tables of memory show them.
PLANNED: tuple[tuple[int, dict[str, Any]], ...] = (
    (8, {}), (4, {}), (2, {}), (2, {"optimizer_state": "host"}), (1, {}),
    (1, {"optimizer_state": "host"}), (1, {"lora_rank": 64}),
)  # fmt: skip
CARDS = (48, 80, 141)  # GB


def memory_plan(gpus: int, changes: Mapping[str, Any]) -> Plan:
    """Of Visual-OPSD on a 7B release with rows as long as the settings allow."""
    config = TrainConfig()
    release, world = ReleaseSizes.of_model(TRUE_SIZE), World(gpus, gpus, torch.device("cuda"))
    of = make_footprint(config, release, VisualOPSD(config), world)
    return largest_plan(replace(of, **changes))


def changed_text(changes: Mapping[str, Any]) -> str:
    return " ".join(f"`--{name} {value}`" for name, value in changes.items()) or "defaults"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f}"


def memory_totals() -> str:
    """GB of each GPU, of the host and of the disk, and the smallest card that has them."""
    rows = []
    for gpus, changes in PLANNED:
        plan = memory_plan(gpus, changes)
        card = next((f"{gb} GB" for gb in CARDS if gb * 1e9 >= plan.gpu), "none")
        host, disk = (sum(part.size for part in parts) for parts in (plan.host, plan.disk))
        sizes = (plan.gpu, host, disk)
        rows.append((str(gpus), changed_text(changes), *map(gigabytes, sizes), card))
    header = ("GPUs", "settings", "each GPU", "host memory", "disk", "fits a card of")
    return markdown_table(header, rows)


def memory_parts() -> str:
    """GB of each GPU: what is always there, and what each phase adds at its fullest."""
    plans = [memory_plan(gpus, changes) for gpus, changes in PLANNED]
    names = {
        "sample": "drawing completions", "train": "forward and backward passes",
        "optimise": "optimiser", "save": "saving",
    }  # fmt: skip
    rows: dict[str, list[str]] = {}

    def add(name: str, sizes: Iterable[float]) -> None:
        rows[name] = [gigabytes(size) if size else "" for size in sizes]

    for name in ("frozen base", "weights", "adapters", "moments", "teacher"):
        add(name, (sum(part.size for part in p.resident if part.name == name) for p in plans))
    for phase, name in names.items():
        add(f"+ {name}", (sum(m.size for m in p.moments if m.phase == phase) for p in plans))
    add("+ CUDA, NCCL, gaps", (sum(part.size for part in p.beside) for p in plans))
    add("**in all**", (plan.gpu for plan in plans))
    header = [f"{gpus} GPU{'s' * (gpus > 1)}, {changed_text(c)}" for gpus, c in PLANNED]
    return markdown_table(("GB of each GPU", *header), ([name, *row] for name, row in rows.items()))


def memory_measured() -> str:
    """docs/benchmarks/memory.json: what runs took of the GPU and the host, planned and measured."""
    recorded = json.loads((BENCHMARKS / "memory.json").read_text(encoding="utf-8"))
    rows = []
    for run in recorded["runs"].values():
        peak, planned = run["peak_memory_gb"]["median"], run["planned/peak_gb"]
        host = (run["rank0/host_gb"], run["planned/host_gb"])
        phases = [run[f"seconds/{phase}"]["median"] for phase in ("sample", "train", "optimise")]
        rows.append((
            run["what"], f"{planned:.1f}", f"{peak:.1f}", f"{planned / peak:.3f}",
            f"{run['gpu0/used_gb']:.1f}", f"{host[0]:.1f} ({host[1]:.1f})",
            " / ".join(f"{seconds:.2f}" for seconds in phases), f"{run['step_s']['median']:.1f}",
        ))  # fmt: skip
    header = (
        "run", "planned peak, GB", "measured", "ratio", "in use by nvidia-smi",
        "host (planned)", "sample / train / optimise, s", "a step, s",
    )  # fmt: skip
    return markdown_table(header, rows)


def optimizer_measured() -> str:
    """docs/benchmarks/memory.json: seconds of an update of 8.05 billion parameters."""
    found = json.loads((BENCHMARKS / "memory.json").read_text(encoding="utf-8"))["optimizer"]
    rows = [
        (f"`{kind}`", *(f"{found[kind][name]:.2f}" for name in ("median_s", "ratio", "first_s")))
        for kind in ("host", "8bit")
    ]
    header = ("`--optimizer_state`", "an update, s", "of the transfer's time", "the first, s")
    return markdown_table(header, rows)


def scaling_measured(name: str) -> str:
    """docs/benchmarks/N_gpus.json: seconds a step and memory of the runs whose steps were timed."""
    recorded = json.loads((BENCHMARKS / name).read_text(encoding="utf-8"))
    rows = []
    for key, run in (*recorded["speed"].items(), *recorded["scaling"].items()):
        if key == "efficiency":
            continue
        mesh = f"mesh ({run['mesh'][0]}, {run['mesh'][1]})"
        layout = "one GPU" if run["gpus"] == 1 else "FULL_SHARD" if "full" in key else mesh
        flags = f", `{run['flags']}`" if "flags" in run else ""
        medians = {k: v["median"] for k, v in run.items() if isinstance(v, dict)}
        phases = (medians[f"seconds/{phase}"] for phase in ("sample", "train", "optimise"))
        rows.append((
            f"{run['layers']} layers, {run['rows']} rows, {layout}{flags}",
            f"{medians['completion_length']:,.0f}{', by chance' * ('unequal' in key)}",
            f"{medians['step_s']:.2f}", *(f"{seconds:.2f}" for seconds in phases),
            f"{medians['tokens_per_s/sample']:,.0f}", f"{medians['peak_memory_gb']:.1f}",
        ))  # fmt: skip
    header = (
        "run", "tokens a completion", "step, s", "sampling", "train", "optimiser",
        "sampled tokens/s", "allocated, GB a GPU",
    )  # fmt: skip
    return markdown_table(header, rows)


def benchmark_figures(name: str) -> str:
    return benchmark_table(json.loads((BENCHMARKS / name).read_text(encoding="utf-8")))


DRAWINGS = {ROOT / "docs" / "figures" / "method.svg": method_figure.draw}
# Document -> region -> what stands in it.
REGIONS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"demo results": demo_results},
    "INSTALL.md": {"fast paths": fast_paths, "memory: totals": memory_totals},
    "TRAIN.md": {
        "memory: parts": memory_parts,
        "options: TrainConfig": training_options,
        "options: SFT": sft_defaults,
        "options: FlowSettings": lambda: option_table(FlowSettings),
        "options: CollectSettings": lambda: option_table(CollectSettings),
        "options: OfflineSettings": lambda: option_table(OfflineSettings),
        "options: offline": offline_defaults,
        "free": free_settings,
    },
    "docs/memory.md": {
        "memory: measured": memory_measured,
        "memory: optimiser": optimizer_measured,
    },
    "EVAL.md": {
        f"options: {group.__name__}": lambda group=group: option_table(group)  # type: ignore[misc]
        for group in (EvaluateSettings, BenchmarkSettings, ComputeSettings, DiagnosticSettings)
    },
    "docs/scaling.md": {
        f"{n} GPUs": lambda n=n: scaling_measured(f"{n}_gpus.json")  # type: ignore[misc]
        for n in (2, 4)
    },
    "docs/benchmarks/README.md": {
        "h100": lambda: benchmark_figures("h100.json"),
        "h200": lambda: benchmark_figures("h200.json"),
    },
}


def renew(text: str, regions: Mapping[str, Callable[[], str]]) -> str:
    """A document with its regions written anew, each indented as its marker is."""
    for name, write in regions.items():
        pattern = rf"(?ms)^( *)<!-- {re.escape(name)} -->$.*?^ *<!-- end -->$"
        found = re.search(pattern, text)
        if found is None:
            raise ValueError(f"no region <!-- {name} --> that an <!-- end --> closes")
        lines = textwrap.indent(write(), found[1])
        region = f"{found[1]}<!-- {name} -->\n{lines}\n{found[1]}<!-- end -->"
        text = text[: found.start()] + region + text[found.end() :]
    return text


def renewed_documents() -> dict[Path, str]:
    """The documents and drawings that differ from the code, as they should be."""
    found = {}
    for name, regions in REGIONS.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        try:
            renewed = renew(text, regions)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if renewed != text:
            found[ROOT / name] = renewed
    for path, draw in DRAWINGS.items():
        drawn = draw()
        if not path.is_file() or path.read_text(encoding="utf-8") != drawn:
            found[path] = drawn
    return found


def main() -> int:
    for path, text in renewed_documents().items():
        path.write_text(text, encoding="utf-8")
        print(f"{path.relative_to(ROOT)} changed")
    return 0


if __name__ == "__main__":
    run_main(main)
