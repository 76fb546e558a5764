# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What the results of the programs that read depend on: each of it is part of a run's identity."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.dataset_info import load_dataset_config
from data.parquet import StepOrder, open_sources
from data.rejects import Reject
from data.row_groups import ParquetDataset
from data.thinkmorph import Row
from scripts.visual_opsd.analysis.attention import AnalysisConfig, AnalysisSettings
from scripts.visual_opsd.analysis.attention import result_settings as attention_settings
from scripts.visual_opsd.analysis.diagnosis import identity
from scripts.visual_opsd.analysis.kl_measurement import DiagnosticConfig, DiagnosticSettings
from scripts.visual_opsd.analysis.vt_arms import InterventionSettings
from scripts.visual_opsd.analysis.vt_intervention import InterventionConfig
from scripts.visual_opsd.analysis.vt_intervention import result_settings as intervention_settings
from scripts.visual_opsd.config import ComputeSettings, PromptSettings
from scripts.visual_opsd.evaluation.answers import result_settings
from scripts.visual_opsd.evaluation.questions import EvaluateConfig, EvaluateSettings
from scripts.visual_opsd.evaluation.rows import THOUGHT_IDENTITY_COLUMNS, RowPool, row_name
from scripts.visual_opsd.evaluation.runner import check_bad_rate
from scripts.visual_opsd.evaluation.summary import summarise_run
from scripts.visual_opsd.runs.identity import stable_hash
from scripts.visual_opsd.training.run_contents import ROW_ORDER, run_contents
from tests.conftest import TINY_BAGEL
from tests.data.synthetic import write_dataset
from tests.visual_opsd.training.trainers import make_config

# Of each group: another value of each setting that the results depend on, and the settings they
# do not depend on. The base path stands for the contents of its files.
EVALUATE: tuple[dict[str, Any], str] = (
    {"context": "vt", "limit": 3, "max_new_tokens": 9, "image_skips": 0},
    # The files themselves count, by `data.signature`.
    "model_path data split data_root output_dir overwrite batch_size prefill_tokens noise_seed "
    "max_bad_rate compare",
)
DIAGNOSTIC: tuple[dict[str, Any], str] = (
    {
        "num_samples": 3,
        "completions": "trace",
        "teacher_vt": "vae+vit",
        "controls": "other",
        "seed": 3,
    },
    "model_path base_path baseline dataset_config_file data split data_root go_threshold "
    "output_dir overwrite figures heatmap_samples max_bad_rate",
)
SAMPLE: tuple[dict[str, Any], str] = (
    {"sample_max_new_tokens": 9, "sample_temperature": 0.5, "sample_do_sample": False,
     "sample_max_image_skips": 0, "max_forward_tokens": 99},
    "sample_batch_size pack_tokens",
)  # fmt: skip
INTERVENTION: tuple[dict[str, Any], str] = (
    {"arms": "noise", "limit": 3, "max_new_tokens": 9, "image_skips": 0, "seed": 3},
    "model_path data split data_root output_dir overwrite batch_size max_bad_rate",
)
DRAWING: tuple[dict[str, Any], str] = (
    {"num_timesteps": 9, "timestep_shift": 2.5, "cfg_text_scale": 2.0, "cfg_img_scale": 3.0,
     "cfg_from": 0.3, "cfg_to": 0.9, "cfg_renorm_type": "channel", "cfg_renorm_min": 0.5,
     "image_size": 64},
    "",
)  # fmt: skip
ATTENTION: tuple[dict[str, Any], str] = (
    {"context": "noise", "limit": 3},
    "model_path data split data_root output_dir overwrite max_forward_tokens seed max_bad_rate",
)
PROMPT: tuple[dict[str, Any], str] = (
    {"prompt_style": "inferencer", "image_path": "inferencer", "use_system_prompt": False,
     "use_reference_intro": False, "use_transition_prompt": False, "instruction_suffix": "x",
     "vit_max_size": 560, "vit_min_size": 14, "vit_stride": 28, "vit_max_pixels": 9999},
    "prompts vae_max_size vae_min_size",  # the strings of the file; only where the VAE resizes
)  # fmt: skip

# Program -> its identity, its configuration, and the groups it is made of.
PROGRAMS: dict[str, tuple[Callable[..., dict[str, Any]], Any, dict[str, Any]]] = {
    "evaluate": (
        result_settings,
        EvaluateConfig(EvaluateSettings(model_path=str(TINY_BAGEL))),
        {"evaluate": EVALUATE, "prompt": PROMPT},
    ),
    "diagnostic": (
        identity,
        DiagnosticConfig(DiagnosticSettings(model_path=str(TINY_BAGEL))),
        {"diagnostic": DIAGNOSTIC, "sample": SAMPLE, "prompt": PROMPT},
    ),
    "intervention": (
        intervention_settings,
        InterventionConfig(
            InterventionSettings(model_path=str(TINY_BAGEL)), prompt=PromptSettings()
        ),
        {"intervention": INTERVENTION, "drawing": DRAWING, "prompt": PROMPT},
    ),
    "attention": (
        attention_settings,
        AnalysisConfig(AnalysisSettings(model_path=str(TINY_BAGEL))),
        {"analysis": ATTENTION, "prompt": PROMPT},
    ),
}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> RowPool:
    folder = write_dataset(tmp_path_factory.mktemp("rows"), rows=3)
    return RowPool([ParquetDataset("Jigsaw_Assembly", sorted((folder / "data").iterdir()))])


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_setting_is_part_of_it_or_free(program: str, pool: RowPool) -> None:
    """A new setting without its line fails here."""
    make, config, groups = PROGRAMS[program]

    def key(config: Any) -> str:
        return stable_hash(make(config, pool, torch.float32))

    base = key(config)
    for name, (changes, free) in groups.items():
        group = getattr(config, name)
        assert {*changes, *free.split()} == {field.name for field in fields(group)}, name
        for flag, value in changes.items():
            assert getattr(group, flag) != value
            other = replace(config, **{name: replace(group, **{flag: value})})
            assert key(other) != base, flag
    assert stable_hash(make(config, pool, torch.bfloat16)) != base
    assert key(replace(config, compute=ComputeSettings(device="cpu", timeout_s=9))) == base


def test_the_seed_counts_where_random_numbers_are_drawn(pool: RowPool) -> None:
    def key(**changes: Any) -> str:
        settings = EvaluateSettings(model_path=str(TINY_BAGEL), **changes)
        return stable_hash(result_settings(EvaluateConfig(settings), pool, torch.float32))

    def attention_key(context: str, seed: int) -> str:
        settings = AnalysisSettings(model_path=str(TINY_BAGEL), context=context, seed=seed)
        return stable_hash(attention_settings(AnalysisConfig(settings), pool, torch.float32))

    assert key(context="noise", noise_seed=1) != key(context="noise", noise_seed=2)
    assert key(context="vt", noise_seed=1) == key(context="vt", noise_seed=2)
    for context in ("noise", "vae+vit"):
        assert attention_key(context, 1) != attention_key(context, 2)
    assert attention_key("vit", 1) == attention_key("vit", 2)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_model_is_part_of_it_wherever_it_lies(
    program: str, pool: RowPool, tmp_path: Path
) -> None:
    make, config, _ = PROGRAMS[program]
    name = fields(config)[0].name
    group = getattr(config, name)
    copy = tmp_path / "copy"
    shutil.copytree(TINY_BAGEL, copy)
    moved = replace(config, **{name: replace(group, model_path=str(copy))})

    def key(config: Any) -> str:
        return stable_hash(make(config, pool, torch.float32))

    assert key(moved) == key(config)
    files = ["model.safetensors"] + ["ae.safetensors"] * (program == "intervention")
    for file in files:  # the drawing branch counts where the model draws
        whole = (copy / file).read_bytes()
        (copy / file).write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
        assert key(moved) != key(config), file
        (copy / file).write_bytes(whole)


def test_the_files_are_part_of_it(tmp_path: Path) -> None:
    def signature(rows: int, **change: Any) -> Any:
        folder = write_dataset(tmp_path / str(len(list(tmp_path.iterdir()))), rows=rows, **change)
        return RowPool(
            [ParquetDataset("Jigsaw_Assembly", sorted((folder / "data").iterdir()))]
        ).signature()

    assert signature(3) == signature(3)
    assert signature(3) != signature(4)
    assert signature(3) != signature(3, change=lambda i: {"answer": "quite another one" * 9})


def test_the_order_of_keys_is_no_setting() -> None:
    assert stable_hash({"a": 1, "b": [2]}) == stable_hash({"b": [2], "a": 1})
    assert stable_hash({"a": 1}) != stable_hash({"a": 2})


def test_a_row_is_known_by_its_content() -> None:
    def digest(**changes: Any) -> str:
        values = {
            "question": "q", "answer": "a", "problem_image_0": {"bytes": b"1", "path": None},
            "reasoning_image_0": {"bytes": b"2", "path": None}, **changes,
        }  # fmt: skip
        return row_name(Row("d", "f.parquet", 0, values), "p", THOUGHT_IDENTITY_COLUMNS).digest

    base = digest()
    assert digest(reasoning_image_0={"bytes": b"2", "path": "elsewhere"}) == base
    others = [digest(question="qa", answer=""), digest(problem_image_0={"bytes": b"3"}),
              digest(reasoning_image_0={"bytes": b"3"}), digest(world_state="s")]  # fmt: skip
    assert len({base, *others}) == 5


def test_a_rate_of_bad_rows_may_be_reached() -> None:
    rejects = [Reject("d", "f", 0, "r", "")]
    check_bad_rate(rejects, 100, 0.01)
    with pytest.raises(ValueError, match="1 of 99 rows"):
        check_bad_rate(rejects, 99, 0.01)


def test_figures_of_each_data_set() -> None:
    def line(dataset: str, correct: bool, tokens: int) -> dict[str, Any]:
        names = ("lenient", "capped", "empty", "answered")
        return {"dataset": dataset, "correct": correct, "output_tokens": tokens,
                **dict.fromkeys(names, correct)}  # fmt: skip

    lines = [line("one", True, 4), line("two", False, 8), line("two", True, 12)]
    summary = summarise_run(lines, [])
    for figures, expected in (
        (summary, (3, 2, 2 / 3, 8.0)),
        (summary["tasks"]["one"], (1, 1, 1.0, 4.0)),
        (summary["tasks"]["two"], (2, 1, 0.5, 10.0)),
    ):
        found = [figures[name] for name in ("n", "correct", "accuracy", "mean_tokens")]
        assert found == pytest.approx(list(expected))


def flip(file: Path) -> None:
    """Change the last byte but two: no size, no header."""
    data = file.read_bytes()
    file.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])


# What changes -> the flag under which a training state keeps it, "" for one it does not depend on.
CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a weight": (lambda at: flip(at / "base" / "model.safetensors"), "model_path"),
    "the autoencoder": (lambda at: flip(at / "base" / "ae.safetensors"), "model_path"),
    "the tokenizer": (lambda at: flip(at / "base" / "merges.txt"), "model_path"),
    "the README": (lambda at: (at / "base" / "README.md").write_text("x"), ""),
    "a prompt": (lambda at: (at / "prompts.yaml").write_text("intro: other"), "prompts"),
    "words of the prompts file": (lambda at: (at / "prompts.yaml").write_text("{intro: in}"), ""),
    "a row": (
        lambda at: write_dataset(at, rows=3, change=lambda i: {"answer": f"ANSWER {i}"}),
        "data_root",
    ),
    "a completion": (lambda at: (at / "samples.jsonl").write_text("{ }"), "replay_samples"),
    "a weight of a data set": (
        lambda at: (at / "datasets.yaml").write_text(DATASETS.replace("}", ", weight: 2}")),
        "dataset_config_file",
    ),
}  # fmt: skip
DATASETS = "datasets:\n  - {name: Jigsaw_Assembly}\n"


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_training_run_is_made_of(change: str, tmp_path: Path) -> None:
    shutil.copytree(TINY_BAGEL, tmp_path / "base")
    write_dataset(tmp_path, rows=3)
    (tmp_path / "datasets.yaml").write_text(DATASETS)
    (tmp_path / "prompts.yaml").write_text("intro: in")
    (tmp_path / "samples.jsonl").write_text("{}")
    config = make_config(
        tmp_path, tmp_path / "out", model_path=tmp_path / "base",
        prompts=tmp_path / "prompts.yaml", replay_samples=tmp_path / "samples.jsonl",
    )  # fmt: skip
    sources = open_sources(load_dataset_config(config.data.dataset_config_file), root=tmp_path)

    def contents() -> dict[str, Any]:
        chosen = open_sources(load_dataset_config(config.data.dataset_config_file), root=tmp_path)
        # The order's own key is tested below: it follows the others.
        return run_contents(config, StepOrder(chosen, 1, 2))

    before = contents()
    assert before[ROW_ORDER] == StepOrder(sources, 1, 2).signature()
    assert before == contents()
    spoil, flag = CHANGES[change]
    spoil(tmp_path)
    after = contents()
    differing = {key for key in before if before[key] != after[key]}
    assert differing - {ROW_ORDER} == ({flag} if flag else set())
