# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Values on the command line: numbers without meaning, paths that lead nowhere, bytes that are no
text."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.data.synthetic import png, write_dataset
from tests.hostile.programs import ROOT
from tests.hostile.runner import Case

BASE = str(ROOT / "tests" / "tiny-bagel")
NO_NUMBERS = ("nan", "inf", "-inf", "1e400", "", "x", "1,5", "٣²", "0x10", "None.", "--")
FLOATS = {
    "train": ("lr", "min_lr", "beta1", "eps", "weight_decay", "max_grad_norm", "ema_decay",
              "sample_temperature", "jsd_beta", "jsd_temperature", "jsd_weight", "timeout_s",
              "max_bad_rate"),
    "evaluate": ("max_bad_rate", "timeout_s"),
    "demo": ("temperature",),
}  # fmt: skip
INTEGERS = {
    "train": ("total_steps", "global_batch_size", "sample_max_new_tokens", "num_workers",
              "save_every", "vit_max_size", "pack_tokens", "warmup_steps", "keep_last"),
    "evaluate": ("batch_size", "max_new_tokens", "limit", "prefill_tokens", "vit_max_size"),
    "demo": ("max_new_tokens", "vit_max_size"),
}  # fmt: skip
PATHS = {
    "train": ("model_path", "dataset_config_file", "data_root", "results_dir", "prompts", "config",
              "replay_samples", "resume_from"),
    "evaluate": ("model_path", "data", "output_dir", "compare", "prompts", "config"),
    "demo": ("model_path", "image", "prompts", "config"),
}  # fmt: skip
COUNTS = ("total_steps", "save_every", "pack_tokens", "prefill_tokens", "keep_last",
          "batch_size", "global_batch_size")  # fmt: skip
OPTIONAL = ("prompts", "replay_samples", "resume_from", "compare")
NO_PATHS = ("", "x" * 5000, "a\0b", "/dev/null/x", "no/such/place", "caf\udce9/x")


def _arguments(folder: Path, program: str, flag: str, value: str) -> list[str]:
    data = write_dataset(folder, "D", 6)
    (folder / "datasets.yaml").write_text("datasets:\n  - {name: D}\n")
    (folder / "a.png").write_bytes(png())
    values = {
        "train": {"model_path": BASE, "dataset_config_file": folder / "datasets.yaml",
                  "data_root": folder, "results_dir": folder / "out"},
        "evaluate": {"model_path": BASE, "data": data, "split": "train",
                     "output_dir": folder / "out"},
        "demo": {"model_path": BASE, "image": folder / "a.png", "question": "Which?",
                 "vit_max_size": "56", "vit_min_size": "14"},
    }[program]  # fmt: skip
    made = {**{k: str(v) for k, v in values.items()}, flag: value}
    return [f"--{name}={text}" for name, text in made.items()]


def _case(program: str, flag: str, value: str, expect: str) -> Case:
    make = partial(_arguments, program=program, flag=flag, value=value)
    return Case("flag", f"{program} --{flag} {value[:20]!r}", make, program, expect)


def cases() -> Iterator[Case]:
    for program, flags in FLOATS.items():
        for flag in flags:
            for value in NO_NUMBERS:
                yield _case(program, flag, value, "refuse")
    for program, flags in INTEGERS.items():
        for flag in flags:
            for value in (*NO_NUMBERS[:6], "-1", "1.5", "1" + "0" * 12, "1" + "0" * 30):
                if flag == "limit" and (value.startswith("10") or not value):
                    continue  # all of them
                if flag in COUNTS and value == "1" + "0" * 12:
                    continue  # large, but a number of something that exists
                yield _case(program, flag, value, "refuse")
    for program, flags in PATHS.items():
        for flag in flags:
            for value in NO_PATHS:
                if not value and flag in OPTIONAL:
                    continue  # none is given
                if flag in ("results_dir", "output_dir") and value in NO_PATHS[4:]:
                    continue  # a name like any other: made where the command stands
                yield _case(program, flag, value, "refuse")
    latin1 = "größe".encode("latin-1").decode("utf-8", "surrogateescape")
    texts = (latin1, "", " ", "\0", "x" * 300_000, "<|im_end|><|vision_start|>", "\u202e", "%s")
    for text in texts:
        yield _case("demo", "question", text, "any")
    for flag in ("no_such_flag", "learning_rate", "Config", ""):
        yield _case("train", flag, "1", "refuse")
