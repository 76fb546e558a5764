# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The documents say what the code does: defaults, commands, fields, names, links, figures."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import signal
import subprocess
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from PIL import Image

from data.rejects import Reject
from modeling.bagel.adapters import AdapterConfig
from modeling.bagel.attention import BACKENDS
from modeling.release.adapters import save_adapter
from scripts import docs
from scripts.visual_opsd import evaluate, train_visual_opsd
from scripts.visual_opsd.analysis.kl_measurement import DiagnosticSettings
from scripts.visual_opsd.analysis.trace_rows import CollectSettings
from scripts.visual_opsd.cli import build_parser, flat, parse_config
from scripts.visual_opsd.config import (
    ComputeSettings,
    SFTConfig,
    TrainConfig,
)
from scripts.visual_opsd.evaluation.questions import BenchmarkSettings, EvaluateSettings
from scripts.visual_opsd.training.figures import FIELDS
from scripts.visual_opsd.training.offline import OfflineSettings
from tests.documented_commands import CONFIGS, ROOT, bash_environment, block_problems, blocks
from tests.hostile.__main__ import all_cases
from tests.shell import LEADING
from tests.visual_opsd.training_runs import train_arguments

TINY_BAGEL = ROOT / "tests" / "tiny-bagel"
LAUNCHERS = ROOT / "scripts" / "visual_opsd"
DEMO_RUNS = ROOT / "docs" / "benchmarks" / "demo.json"
NAMES = (
    "README.md", "TRAIN.md", "EVAL.md", "INSTALL.md", "CONTRIBUTING.md", "CHANGELOG.md",
    "scripts/visual_opsd/README.md", "docs/paper_map.md", "docs/log.md",
    "docs/benchmarks/README.md", "docs/scaling.md", "docs/reliability.md",
)  # fmt: skip
DOCUMENTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}


# ---------------------------------------------------------------------------- reading documents


def region(text: str, marker: str) -> str:
    """What stands between `<!-- marker -->` and the next `<!-- end -->`."""
    found = re.search(rf"<!-- {re.escape(marker)} -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert found, f"no region {marker}"
    return found[1]


def table_rows(text: str) -> list[list[str]]:
    """Cells of every table row, without headers."""
    lines = [line.strip() for line in text.splitlines()]
    rows = []
    for number, line in enumerate(lines):
        below = lines[number + 1] if number + 1 < len(lines) else ""
        is_rule = re.fullmatch(r"[|\s:-]+", line) is not None
        if line.startswith("|") and not is_rule and not re.fullmatch(r"\|[|\s:-]+", below):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    assert rows, "no table"
    return rows


def spans(cell: str) -> list[str]:
    """Contents of the code spans."""
    return re.findall(r"`([^`]+)`", cell)


# ---------------------------------------------------------------------------- options


def default_of(spec: Field[Any]) -> Any:
    assert spec.default is not MISSING, spec.name
    return spec.default


def train_fields() -> dict[str, Field[Any]]:
    groups = [type(getattr(TrainConfig(), group.name)) for group in fields(TrainConfig)]
    return {spec.name: spec for group in groups for spec in fields(group)}


def read_value(config_class: type, flag: str, text: str) -> Any:
    """What the command line makes of `--flag text`; a string that says why not."""
    words = [f"--{flag}", "" if text == '""' else text]
    try:
        return vars(build_parser(config_class, "").parse_args(words))[flag]
    except SystemExit:
        return f"(not a value: {text})"


def test_make_docs_changes_nothing() -> None:
    assert [str(path.relative_to(ROOT)) for path in docs.renewed_documents()] == []


def test_make_docs_sees_what_differs() -> None:
    regions = {"a": lambda: "new", "b": lambda: "x\ny"}
    text = "1\n<!-- a -->\nold\n<!-- end -->\n2\n  <!-- b -->\n  <!-- end -->\n"
    assert docs.renew(text, regions) == (
        "1\n<!-- a -->\nnew\n<!-- end -->\n2\n  <!-- b -->\n  x\n  y\n  <!-- end -->\n"
    )
    with pytest.raises(ValueError, match="no region <!-- b -->"):
        docs.renew("<!-- a -->\n<!-- end -->\n<!-- b -->\n", regions)


def test_defaults_in_tables_are_what_a_user_may_type() -> None:
    for flag, value in flat(SFTConfig()).items():
        typed = docs.value_text(value).strip("`")
        assert read_value(SFTConfig, flag, typed) == value, flag
        assert read_value(SFTConfig, flag, "nonsense value") != value, flag


@pytest.mark.parametrize(
    "group",
    [*(type(group) for group in vars(SFTConfig()).values()),
     EvaluateSettings, BenchmarkSettings, ComputeSettings, DiagnosticSettings, CollectSettings,
     OfflineSettings],
)  # fmt: skip
def test_every_choice_is_explained(group: type) -> None:
    for spec in fields(group):
        for choice in spec.metadata.get("choices", ()):
            word = rf"(?<![\w+]){re.escape(choice)}(?![\w+])"
            assert re.search(word, spec.metadata["help"]), f"--{spec.name}: {choice}"


def test_attention_backends_are_explained() -> None:
    after = DOCUMENTS["INSTALL.md"].split("<!-- fast paths -->")[1].split("<!-- end -->")[1]
    text = after.split("##")[0]
    assert all(f"`{name}`" in text for name in BACKENDS)


def protocol_problems(text: str) -> list[str]:
    specs = train_fields()
    problems = []
    for _, here in table_rows(text):
        assert spans(here)
        for words in spans(here):
            flag, value = words.removeprefix("--").split(" ", 1)
            if read_value(TrainConfig, flag, value) != default_of(specs[flag]):
                problems.append(f"--{flag} {value}: the default is {default_of(specs[flag])}")
    return problems


def test_the_papers_settings_are_the_defaults() -> None:
    text = region(DOCUMENTS["TRAIN.md"], "check: defaults")
    assert protocol_problems(text) == []
    assert protocol_problems(text.replace("--jsd_beta 0.5", "--jsd_beta 0.4")) != []


# ---------------------------------------------------------------------------- commands


@pytest.mark.parametrize("name", [n for n in NAMES if "```bash" in DOCUMENTS[n]])
def test_commands_are_understood(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert block_problems(DOCUMENTS[name], tmp_path, monkeypatch) == []


@pytest.mark.parametrize(
    "command",
    [
        "python -m scripts.visual_opsd.train_sft --learning_rate 1",
        "python -m scripts.visual_opsd.train_visual_opsd --total_steps 10",  # less than the warm-up
        "python -m scripts.visual_opsd.nothing",
        "python -m torch.distributed.run --standalone -m scripts.visual_opsd.evaluate --dta x",
        "python -m data.worlds spatial_navigation --rows 3 --out x --colour red",
        "python -m scripts.miniworld.demo --learning_rate 1",
        "python download_model.py --everything",
        "python -m pip install -r requirements-nothing.txt",
        "bash scripts/visual_opsd/run_visual_opsd.sh m ema 0.5 --jsd_gamma 1",
        "for beta in 0.5 1.5x; do bash scripts/visual_opsd/run_visual_opsd.sh m ema $beta; done",
        "make dmeo",
        "make demo SED=1",
        "curl somewhere",
    ],
)
def test_wrong_commands_are_noticed(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert block_problems(f"```bash\n{command}\n```\n", tmp_path, monkeypatch) != []


# ---------------------------------------------------------------------------- launchers


def dry_run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(LAUNCHERS / script), *arguments],
        capture_output=True,
        text=True,
        timeout=20,
        env=bash_environment(DRY_RUN="1", **environment),
    )


def flag_value(words: list[str], flag: str) -> str | None:
    return words[words.index(flag) + 1] if flag in words else None


WALK = DOCUMENTS["scripts/visual_opsd/README.md"]
POSITIONAL = {
    script: marker
    for marker in re.findall(r"<!-- (positional: .*?) -->", WALK)
    for script in marker.split()[1:]
}


@pytest.mark.parametrize("script", sorted(p.name for p in LAUNCHERS.glob("run_*.sh")))
def test_positional_arguments(script: str) -> None:
    rows = table_rows(region(WALK, POSITIONAL[script]))
    given = [f"value{number}" for number in range(len(rows))]
    leading = LEADING.get(script, ())
    words = shlex.split(dry_run(script, *leading, *given).stdout)
    config_class, defaults = CONFIGS[words[len(words) - 1 - words[::-1].index("-m") + 1]]
    defaults = {**flat(config_class()), **defaults}
    plain = shlex.split(dry_run(script, *leading).stdout)
    for value, (name, default, target) in zip(given, rows, strict=True):
        if spans(name) == ["OUTPUT_NAME"]:
            assert flag_value(words, "--results_dir") == f"results/{value}"
            default = spans(default)[0].replace("TEACHER_MODE", "ema").replace("JSD_BETA", "0.5")
            for kind in ("noise",) * ("noise" in script) + leading:
                default = default.replace("opsd", f"opsd-{kind}")
            assert flag_value(plain, "--results_dir") == f"results/{default}"
            continue
        (flag,) = spans(target)
        assert flag_value(words, flag) == value, name
        assert read_value(config_class, flag[2:], spans(default)[0]) == defaults[flag[2:]], name
    assert dry_run(script, *leading, *given, "one-more").returncode == 2


def test_environment_of_the_launchers() -> None:
    rows = table_rows(region(WALK, "environment: run_visual_opsd.sh"))
    given = {spans(name)[0]: f"value{number}" for number, (name, *_) in enumerate(rows)}
    words = shlex.split(dry_run("run_visual_opsd.sh", **given).stdout)
    specs = train_fields()
    for name, default, target in rows:
        (flag,) = spans(target)
        assert flag_value(words, flag) == given[spans(name)[0]], name
        value = read_value(TrainConfig, flag[2:], spans(default)[0])
        assert value == default_of(specs[flag[2:]]), name
    source = (LAUNCHERS / "launch.sh").read_text()
    known = re.findall(r"\b([A-Z_]+)=[a-z_]+\b", source.split("add_environment EMA_DECAY")[-1])
    assert {"EMA_DECAY", *known} - {"ARGUMENTS"} == set(given)

    common = region(WALK, "environment: launch.sh")
    documented = {name for row in table_rows(common) for name in spans(row[0])}
    own = {"BASH_SOURCE", "CALLER_DIRECTORY", "POSITIONAL", "FLAGS", "ARGUMENTS", "RENDEZVOUS"}
    own |= {"FOUND", "FOUND_NAME", "NAME"}
    lists = re.findall(r"(?:find_setting|for name in)((?:[ \\\n]+[A-Z][A-Z0-9_]+)+)", source)
    used = {name for names in lists for name in names.replace("\\", "").split()}
    used |= set(re.findall(r"\$\{#?([A-Z][A-Z0-9_]+)", source))
    assert {name for name in used - own if not name.startswith("SLURM")} == documented


# ---------------------------------------------------------------------------- what runs write


def documented_fields(document: str, file: str) -> set[str]:
    rows = table_rows(region(DOCUMENTS[document], f"fields: {file}"))
    return {name for row in rows for name in spans(row[0])}


def metrics_of_validation(world: Path, results: Path) -> str:
    """The first line of a run's metrics.jsonl, which is of the base."""
    arguments = train_arguments(
        world, results, total_steps=1, warmup_steps=0, eval_every=1, eval_limit=1,
        eval_data="Spatial_Navigation", teacher_guard="warn",
    )  # fmt: skip
    assert train_visual_opsd.main(arguments) == 0
    return (results / "metrics.jsonl").read_text().splitlines()[0]


def test_what_a_training_run_writes(world: Path, tmp_path: Path) -> None:
    results = tmp_path / "run"
    handler = signal.getsignal(signal.SIGTERM)
    try:
        arguments = train_arguments(
            world, results, total_steps=2, warmup_steps=1, save_release=True
        )
        assert train_visual_opsd.main(arguments) == 0
    finally:
        signal.signal(signal.SIGTERM, handler)
    measured: set[str] = set()
    for file in ("metrics.jsonl", "samples.jsonl"):
        lines = (results / file).read_text().splitlines()
        written = {name for line in lines for name in json.loads(line)}
        assert documented_fields("TRAIN.md", file) == written - set(FIELDS), file
        measured |= written & set(FIELDS)
    assert documented_fields("TRAIN.md", "measured steps") == set(FIELDS) >= measured
    assert len(measured) > 20
    assert documented_fields("TRAIN.md", "bad_rows.jsonl") == {f.name for f in fields(Reject)}
    line = json.loads(metrics_of_validation(world, tmp_path / "validated"))
    assert documented_fields("TRAIN.md", "validation") == line.keys() - {"step"}
    # Names as TRAIN.md shows them, with this run's step; the saved settings are a --config file.
    assert {p.name for p in (results / "checkpoints").iterdir()} == {"step_0000002", "0000002"}
    for name in ("step_0000500", "0000500", "config.yaml", "metrics.jsonl", "samples.jsonl"):
        assert f"  {name}" in DOCUMENTS["TRAIN.md"]
    again = parse_config(TrainConfig, ["--config", str(results / "config.yaml")], "")
    assert again == parse_config(TrainConfig, arguments, "")


def test_what_an_evaluation_writes(world: Path, tmp_path: Path) -> None:
    arguments = ["--model_path", str(TINY_BAGEL), "--data_root", str(world), "--limit", "2"]
    arguments += ["--max_new_tokens", "3", "--device", "cpu", "--progress", "False"]
    arguments += ["--vit_max_size", "112", "--vit_min_size", "14"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert evaluate.main([*arguments, "--output_dir", str(first)]) == 0
    assert evaluate.main([*arguments, "--output_dir", str(second), "--compare", str(first)]) == 0
    line = json.loads((second / "predictions.jsonl").read_text().splitlines()[0])
    assert documented_fields("EVAL.md", "predictions.jsonl") == set(line)
    summary = json.loads((second / "summary.json").read_text())
    assert documented_fields("EVAL.md", "summary.json") == set(summary)


def test_python_blocks_run(tmp_path: Path) -> None:
    Image.new("RGB", (60, 40), "teal").save(tmp_path / "problem.png")
    config = AdapterConfig(1, 2, ("connector.fc2",))
    pair = {"A": torch.ones(1, 64), "B": torch.ones(64, 1)}
    tensors = {f"connector.fc2.lora_{which}.weight": tensor for which, tensor in pair.items()}
    save_adapter(tensors, tmp_path / "adapter", base=TINY_BAGEL, config=config)
    found = [block for text in DOCUMENTS.values() for block in blocks(text, "python")]
    assert len(found) >= 2
    for block in found:
        block = block.replace("models/ThinkMorph-7B", str(TINY_BAGEL))
        block = block.replace(
            "results/my-lora/checkpoints/adapter_0001000", str(tmp_path / "adapter")
        )
        block = block.replace("problem.png", str(tmp_path / "problem.png"))
        exec(compile(block, "a document's block", "exec"), {})


# ---------------------------------------------------------------------------- names and links


def name_problems(text: str) -> list[str]:
    """Entries `file.py:name` that cannot be imported."""
    problems = []
    for file, dotted in re.findall(r"`([\w/]+\.py):([\w.]+)`", text):
        try:
            found: Any = importlib.import_module(file.removesuffix(".py").replace("/", "."))
            for part in dotted.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            problems.append(f"{file}:{dotted}: {error}")
            continue
        here = getattr(found, "__module__", None)
        if here is not None and (ROOT / (here.replace(".", "/") + ".py")) != ROOT / file:
            problems.append(f"{file}:{dotted} is defined in {here}")
    return problems


def test_paper_map_names_exist() -> None:
    text = DOCUMENTS["docs/paper_map.md"]
    entries = [cell for row in table_rows(text) for cell in row[1:]]
    assert len(entries) > 20
    assert [entry for entry in entries if not re.search(r"`[\w/]+\.py:[\w.]+`", entry)] == []
    assert name_problems(text) == []
    wrong = "`data/packing.py:unpack` `data/pack.py:pack` `data/parquet.py:Reject`"
    assert len(name_problems(wrong)) == 3


def anchors(text: str) -> set[str]:
    """Link targets that GitHub makes of headings."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def link_problems(text: str, folder: Path) -> list[str]:
    problems = []
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path = folder / target
        if not path.exists():
            problems.append(f"no file {target}")
        elif anchor:
            linked = path.read_text(encoding="utf-8") if target else text
            if anchor not in anchors(linked):
                problems.append(f"no heading {target}#{anchor}")
    return problems


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    assert link_problems(DOCUMENTS[name], (ROOT / name).parent) == []


def test_dead_links_are_noticed() -> None:
    text = "[a](TRAIN.md#contexts) [b](TRAIN.md#no-such-heading) [c](NOTHING.md) [d](https://x.y)"
    assert link_problems(text, ROOT) == [
        "no heading TRAIN.md#no-such-heading",
        "no file NOTHING.md",
    ]


def message_problems(text: str) -> list[str]:
    """Quoted messages that no program prints; `...` stands for what is filled in."""
    files = [p for room in ("data", "modeling", "scripts") for p in (ROOT / room).rglob("*.py")]
    source = " ".join(path.read_text(encoding="utf-8") for path in files)
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # literals that go on in the next line
    source = re.sub(r"\{[^{}]*\}", "...", source)
    quoted = [row[0][1:-1] for row in table_rows(text) if re.fullmatch(r"`[^`]+`", row[0])]
    return [message for message in quoted if message not in source]


def test_messages_in_the_trouble_table_exist() -> None:
    text = region(DOCUMENTS["TRAIN.md"], "messages")
    assert message_problems(text) == []
    assert message_problems("| a | b |\n|---|---|\n| `the moon is full` | c |") != []


# ---------------------------------------------------------------------------- the README's figures


def test_the_log_shows_the_means_of_the_demo() -> None:
    recorded = json.loads(DEMO_RUNS.read_text(encoding="utf-8"))
    for arm in ("base", "real", "noise"):
        mean = fmean(run["accuracy"][arm] for run in recorded["seeds"])
        assert f"%, mean {100 * mean:.1f} |" in DOCUMENTS["docs/log.md"]


def test_readme_is_short_and_names_both_commands() -> None:
    text = DOCUMENTS["README.md"]
    assert len(text.splitlines()) <= 150
    assert {"make demo", "make test"} <= set(blocks(text, "bash")[0].splitlines())


# ---------------------------------------------------------------------------- reliability


def fault_rows() -> list[list[str]]:
    """Rows of all tables of faults: what happens, what is printed, code, what is kept, test."""
    text = DOCUMENTS["docs/reliability.md"]
    parts = re.findall(r"<!-- faults -->\n(.*?)<!-- end -->", text, re.DOTALL)
    return [row for part in parts for row in table_rows(part)]


def fault_problems(cells: Iterable[str]) -> list[str]:
    """Tests named as `file::function` that do not exist."""
    problems = []
    for file, name in (span.split("::") for cell in cells for span in spans(cell)):
        path = ROOT / file
        found = path.is_file() and re.search(rf"^def {name}\(", path.read_text(), re.MULTILINE)
        if not found:
            problems.append(f"{file}::{name}")
    return problems


def test_every_fault_names_a_test_that_exists() -> None:
    rows = fault_rows()
    assert len(rows) > 40 and all(len(row) == 5 and "::" in row[4] for row in rows)
    assert fault_problems(row[4] for row in rows) == []
    wrong = ["`tests/test_docs.py::test_nothing`", "`tests/test_nothing.py::test_docs`"]
    assert len(fault_problems(wrong)) == 2


def test_what_faults_print_is_what_the_code_says() -> None:
    printed = [span for row in fault_rows() for span in spans(row[1])]
    assert len(printed) > 40
    table = "\n".join(f"| `{span}` | |" for span in printed if not span.startswith("--"))
    assert message_problems(f"| a | b |\n|---|---|\n{table}") == []


def test_totals_of_hostile_inputs() -> None:
    """No fault among them; `python -m tests.hostile --write docs/reliability.md` renews them."""
    rows = table_rows(region(DOCUMENTS["docs/reliability.md"], "hostile totals"))
    counts = {row[0].strip("*"): [int(cell.strip("*")) for cell in row[1:5]] for row in rows}
    assert set(counts) == {case.kind for case in all_cases()} | {"all"}
    assert counts["all"][0] >= 600
    for tried, right, refused, faults in counts.values():
        assert tried == right + refused and not faults
