# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Every option of every command refuses what has no meaning; one without bounds fails here."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

from data.worlds import __main__ as worlds
from scripts.miniworld import demo as miniworld_demo
from scripts.miniworld import pretrain
from scripts.visual_opsd.analysis.attention import AnalysisConfig
from scripts.visual_opsd.analysis.kl_measurement import DiagnosticConfig
from scripts.visual_opsd.analysis.vt_intervention import InterventionConfig
from scripts.visual_opsd.cli import Settings, _base_type, flat, parse_config
from scripts.visual_opsd.config import SFTConfig, TrainConfig
from scripts.visual_opsd.evaluation.benchmark_table import TableConfig, parse_runs
from scripts.visual_opsd.evaluation.questions import EvaluateConfig
from scripts.visual_opsd.opsd_loss import generalized_jsd_loss

DemoConfig = importlib.import_module("examples.inference_demo").DemoConfig
CONFIGS = (
    TrainConfig, SFTConfig, EvaluateConfig, DiagnosticConfig, InterventionConfig, AnalysisConfig,
    TableConfig, DemoConfig,
)  # fmt: skip
SEEDS = {"seed", "data_seed", "global_seed", "noise_seed"}
# Options that are text and no paths; `runs` holds paths among labels, see below.
TEXTS = {
    "lora_targets", "token_weight", "controls", "eval_split", "instruction_suffix", "split", "arms",
    "benchmark", "question", "max_memory", "runs", "wandb_project", "wandb_name", "leak_words",
}  # fmt: skip


def options() -> Iterator[tuple[type, Field[Any], Any]]:
    """(group, field, type without None) of every option, each group once."""
    groups = {hint for config in CONFIGS for hint in get_type_hints(config).values()}
    for group in sorted(groups, key=lambda g: f"{g.__module__}.{g.__name__}"):
        for spec in fields(group):
            yield group, spec, _base_type(get_type_hints(group)[spec.name])[0]


def cases(*kinds: type) -> list[Any]:
    return [
        pytest.param(group, spec, id=f"{group.__name__}-{spec.name}")
        for group, spec, base in options()
        if base in kinds
    ]


def refused(group: type, spec: Field[Any], value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^--{spec.name} must .*got ") as error:
        group(**{spec.name: value})
    assert "\n" not in str(error.value)


def test_every_group_is_checked() -> None:
    assert all(issubclass(group, Settings) for group, _, _ in options())


@pytest.mark.parametrize(("group", "spec"), cases(float))
def test_numbers_with_a_point(group: type, spec: Field[Any]) -> None:
    for value in (math.nan, math.inf, -math.inf, -1.0, -1e-300, 1e10, True, "1"):
        refused(group, spec, value)
    assert getattr(group(), spec.name) == spec.default


@pytest.mark.parametrize(("group", "spec"), cases(int))
def test_whole_numbers(group: type, spec: Field[Any]) -> None:
    absurd = 10**20 if spec.name in SEEDS else 10**10
    for value in (-1, absurd, 10**400, 1.0, math.nan, True, "1"):
        refused(group, spec, value)


@pytest.mark.parametrize(("group", "spec"), cases(str))
def test_texts(group: type, spec: Field[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a choice, a path with its home folder expanded, or listed as text."""
    refused(group, spec, 5)
    if "choices" in spec.metadata:
        refused(group, spec, "nonsense")
        return
    with pytest.raises(ValueError, match=rf"^--{spec.name} must be .*UTF-8"):
        group(**{spec.name: "caf\udce9"})  # a Latin-1 byte of a command line
    if spec.name in TEXTS:
        assert "path" not in spec.metadata
        return
    monkeypatch.setenv("HOME", "/abode")
    for value in ("~nobody-of-this-name/x", "a\0b"):
        refused(group, spec, value)
    if spec.metadata["path"] != "list":
        with pytest.raises(ValueError, match=f"--{spec.name} must not be empty"):
            group(**{spec.name: " "})
    needed: dict[str, dict[str, Any]] = {
        "out": {"interleave": True},
        "eval_data": {"eval_every": 1},
    }
    extra = needed.get(spec.name, {})
    made = group(**{spec.name: "~/x", **extra})
    assert getattr(made, spec.name) == "/abode/x"
    assert getattr(group(**{spec.name: Path("a/b"), **extra}), spec.name) == "a/b"


BAD: list[tuple[type, list[str], str]] = [
    (TrainConfig, ["--sample_temperature", "1e-45"], "use --sample_do_sample False"),
    (TrainConfig, ["--sample_temperature", "1e39"], "--sample_temperature must be at least"),
    (TrainConfig, ["--lr", "nan"], "--lr must be above 0 and at most 1e+09, got nan"),
    (TrainConfig, ["--eps", "0"], "--eps must be at least 1e-30 and at most 1, got 0.0"),
    (TrainConfig, ["--beta2", "1"], "--beta2 must be at least 0 and below 1, got 1.0"),
    (TrainConfig, ["--max_grad_norm", "nan"], "--max_grad_norm must be"),
    (TrainConfig, ["--weight_decay", "inf"], "--weight_decay must be"),
    (TrainConfig, ["--timeout_s", "0"], "--timeout_s must be at least 1"),
    (TrainConfig, ["--timeout_s", "1e20"], "at most 1e+09, got 1e+20"),
    (TrainConfig, ["--jsd_top_k", "-5"], "--jsd_top_k must be at least 0"),
    (TrainConfig, ["--jsd_top_k", "1"], "loss and gradient are 0"),
    (TrainConfig, ["--jsd_token_clip", "nan"], "use --jsd_token_clip none"),
    (TrainConfig, ["--sample_max_new_tokens", "1000000000000"], "at most 131072"),
    (TrainConfig, ["--vit_max_size", "1000000"], "at most 8192"),
    (TrainConfig, ["--vae_min_size", "2000"], r"at most --vae_max_size \(1024\), got 2000"),
    (TrainConfig, ["--min_lr", "1"], r"--min_lr must be at most --lr \(1e-05\), got 1.0"),
    (TrainConfig, ["--resume", "\u00b2"], "--resume must be latest, a step number in plain"),
    (TrainConfig, ["--results_dir", ""], "--results_dir must not be empty"),
    (EvaluateConfig, ["--max_new_tokens", "1000000000"], "at most 131072"),
    (EvaluateConfig, ["--batch_size", "1000000000000"], "at most 65536"),
    (InterventionConfig, ["--cfg_from", "0.9", "--cfg_to", "0.5"], r"at most --cfg_to \(0.5\)"),
    (DemoConfig, ["--interleave", "--out", "x", "--cfg_text_scale", "nan"], "--cfg_text_scale"),
]


@pytest.mark.parametrize(("config", "words", "message"), BAD, ids=lambda v: str(v)[:40])
def test_mistakes(config: type, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        parse_config(config, words, "")


def test_a_configuration_file_is_named_with_the_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("optim: {lr: .nan}\n")
    with pytest.raises(ValueError, match=r"/c\.yaml: --lr must be above 0 and at most"):
        parse_config(TrainConfig, ["--config", "~/c.yaml"], "")
    (tmp_path / "c.yaml").write_text("model_path: ~/m\nlr: 1" + "0" * 400 + "\n")
    with pytest.raises(ValueError, match="lr must be"):
        parse_config(TrainConfig, ["--config", "~/c.yaml"], "")
    (tmp_path / "c.yaml").write_text("model_path: ~/m\ndata: ~/a.tsv, b,~/c\n")
    config = parse_config(EvaluateConfig, ["--config", "~/c.yaml"], "")
    assert flat(config)["model_path"] == f"{tmp_path}/m"
    assert flat(config)["data"] == f"{tmp_path}/a.tsv,b,{tmp_path}/c"
    assert parse_runs("A=~/a+b") == {"A": [f"{tmp_path}/a", "b"]}


def test_text_of_an_ascii_locale_is_read_as_it_was_typed() -> None:
    typed = "caf\u00e9 \u2192".encode().decode("ascii", "surrogateescape")
    config = parse_config(TrainConfig, ["--instruction_suffix", typed], "")
    assert config.prompt.instruction_suffix == "caf\u00e9 \u2192"


def test_one_entry_teaches_nothing_but_with_a_tail() -> None:
    """Why --jsd_top_k 1 is refused, and where it is not."""
    teacher = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    for tail in (False, True):
        student = torch.zeros(4, 9, requires_grad=True)
        generalized_jsd_loss(student, teacher, top_k=1, tail_bucket=tail).backward()
        assert student.grad is not None and bool(student.grad.any()) is tail
    words = ["--jsd_top_k", "1"]
    parse_config(TrainConfig, [*words, "--jsd_tail_bucket"], "")
    parse_config(TrainConfig, [*words, "--jsd_loss_kind", "tinker"], "")


@pytest.mark.parametrize("program", [miniworld_demo, pretrain, worlds])
def test_the_other_parsers(program: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Their numbers have bounds and their paths expand `~` too."""
    parser = program.build_parser()
    for action in parser._actions:
        if action.choices and isinstance(action.choices, dict):  # the worlds
            (parser,) = action.choices.values()
    checked = 0
    for action in parser._actions:
        if not action.option_strings or action.nargs == 0 or action.choices:
            continue
        assert action.type is not None or action.dest == "device", action.dest
        if getattr(action.type, "__name__", "") not in ("int", "float"):
            continue
        for bad in ("nan", "-1", "1" + "0" * 30):
            with pytest.raises(SystemExit):
                parser.parse_args([f"{action.option_strings[0]}={bad}"])
            assert "Traceback" not in capsys.readouterr().err
            checked += 1
    assert checked >= 9


def test_words_for_yes_and_no() -> None:
    for words, value in ((["True", "true", "1", "yes", "on", " ON "], True),
                         (["False", "false", "0", "no", "off"], False)):  # fmt: skip
        for word in words:
            config = parse_config(EvaluateConfig, ["--overwrite", word], "")
            assert config.evaluate.overwrite is value
    assert parse_config(EvaluateConfig, ["--overwrite"], "").evaluate.overwrite is True
    with pytest.raises(SystemExit):
        parse_config(EvaluateConfig, ["--overwrite", "maybe"], "")
