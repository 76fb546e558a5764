# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What is seen of the settings of a program that reads a model over rows (`tests.arrivals`)."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data.row_groups import ParquetDataset
from data.sequence import ContextBuilder, ImageSegment
from modeling import load_bagel
from modeling.bagel.generate import generate
from scripts.visual_opsd.evaluation.runner import check_bad_rate, run_rows
from scripts.visual_opsd.on_policy_sampler import sample_completions
from scripts.visual_opsd.processes import init_distributed
from tests.arrivals import Arrival, Run, Stop, noise_of, spy, spy_all, spy_method, stop, words

FUNCTIONS = (load_bagel, sample_completions, generate, run_rows, check_bad_rate)
METHODS = ((ContextBuilder, "__init__"), (ParquetDataset, "__init__"))


@dataclass
class RowsRun(Run):
    """One run over rows and what it left."""

    stderr: str = ""

    @property
    def out(self) -> Path:
        return Path(self.given["output_dir"])

    @property
    def builder(self) -> ContextBuilder:
        return self.calls["ContextBuilder.__init__"][0]["self"]

    @property
    def contexts(self) -> dict[int, Any]:
        """What the model was asked, by the row's index."""
        return {
            index: context
            for call in self.calls["sample_completions"]
            for index, context in zip(call["row_ids"], call["contexts"], strict=True)
        }

    @property
    def files(self) -> list[Path]:
        return [Path(f) for call in self.calls["ParquetDataset.__init__"] for f in call["files"]]

    def cells(self, index: int) -> dict[str, Any]:
        found: dict[str, Any] = pq.read_table(self.files).slice(index, 1).to_pylist()[0]
        return found

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / name).read_text().splitlines()]


def record(
    main: Callable[[list[str]], int],
    name: str,
    given: Mapping[str, Any],
    functions: Sequence[Callable[..., Any]] = (),
    kind: type[RowsRun] = RowsRun,
) -> Any:
    """Run a command to its end; functions: further ones to watch."""
    stderr = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        calls = spy_all(patch, (*FUNCTIONS, *functions), METHODS)
        calls["group"] = spy_method(patch, dist, "init_process_group")  # type: ignore[arg-type]
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
            assert main(words(given)) == 0
    return kind(name, given, calls, stderr.getvalue())


def images(context: Any) -> list[Tensor]:
    return [s.patches for s in context if isinstance(s, ImageSegment)]


def shows_noise(contexts: Mapping[int, Any], seed: int) -> bool:
    """Whether all visual thoughts are the Gaussian noise of this seed and their rows."""
    for index, context in contexts.items():
        shown = images(context)[1:]
        noise = noise_of(seed, index, [image.shape for image in shown])
        if not all(torch.equal(a, b) for a, b in zip(shown, noise, strict=True)):
            return False
    return True


def decoded_together(run: Run) -> int:
    return max(len(prompt.layout.query_lens) for prompt in run.all("generate", "prompt"))


def sampling_rows(runs: str) -> dict[str, Arrival]:
    """Of `SampleSettings`, but for what packs; `runs`: those that draw completions."""
    return {
        "sample_max_new_tokens": Arrival([6, 8], lambda run: run.one("generate", "max_new_tokens"),
                                         runs=runs),
        "sample_temperature": Arrival([0.8, 1.2], lambda run: run.one("generate", "temperature"),
                                      runs=runs),
        "sample_do_sample": Arrival(
            [True, False], lambda run: run.all("generate", "uniforms")[0] is not None,
            runs=runs,
        ),
        "sample_max_image_skips": Arrival(
            [0, 2], lambda run: run.one("generate", "max_image_skips"), runs=runs
        ),
        "sample_batch_size": Arrival([1, 2], decoded_together, runs=runs),
        "max_forward_tokens": Arrival(
            [4000, 5000], lambda run: run.one("score_completion", "max_forward_tokens")
        ),
    }  # fmt: skip


def compute_rows() -> dict[str, Arrival]:
    """Of `ComputeSettings`, and what all such programs have."""
    return {
        "timeout_s": Arrival([600.0, 700.0],
                             lambda run: run.one("group", "timeout").total_seconds()),
        "progress": Arrival(
            [True, False], lambda run: bool(re.search(r"\d+/\d+ \[.*row", run.stderr))
        ),
        "max_bad_rate": Arrival(
            [0.1, 0.2],
            lambda run: (run.one("run_rows", "limits").max_bad_rate,
                         run.one("check_bad_rate", "max_rate")),
            lambda run: (run.given["max_bad_rate"],) * 2,
        ),
    }  # fmt: skip


def check_device(main: Callable[[list[str]], int], patch: pytest.MonkeyPatch, device: str) -> None:
    calls = spy(patch, init_distributed, stop)
    with pytest.raises(Stop):
        main(["--device", device])
    assert calls[0]["device"] == device


def dtype_on_gpu(
    main: Callable[[list[str]], int], patch: pytest.MonkeyPatch, given: Mapping[str, Any]
) -> torch.dtype:
    """The dtype that weights are loaded in on a GPU, which need not be there."""

    def on_gpu(*_: Any, **__: Any) -> Any:
        return replace(init_distributed("cpu", 60), device=torch.device("cuda"))

    spy(patch, init_distributed, on_gpu)
    calls = spy(patch, load_bagel, stop)
    with pytest.raises(Stop):
        main(words(given))
    assert str(calls[0]["device"]) == "cuda"
    return calls[0]["dtype"]
