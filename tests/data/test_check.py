# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""`python -m data.check`: the table and the exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from data.check import main
from modeling.host.programs import run_main
from tests.conftest import TINY_BAGEL
from tests.data.synthetic import (
    SCHEMA,
    good_row,
    image_cell,
    png,
    truncated_png,
    write_dataset,
    write_parquet,
)

ROOT = Path(__file__).parents[2]


def _table(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, str]]:
    """Exit code and the label -> value lines of the last table printed."""
    code = main([str(argument) for argument in arguments])
    lines: dict[str, str] = {}
    for line in capsys.readouterr().out.splitlines():
        if not line.startswith("  "):
            lines = {"title": line}
        else:
            label, _, value = line.strip().partition("  ")
            lines[label] = value.strip()
    return code, lines


@pytest.mark.parametrize("num_workers", [1, 3])
def test_table_of_a_dataset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], num_workers: int
) -> None:
    changes: dict[int, dict[str, Any]] = {
        2: {"problem_image_0": image_cell(truncated_png())},
        3: {"question": ""},
        5: {"reasoning_image_0": image_cell(None)},
        8: {"reasoning_image_0": image_cell(b"junk")},
        9: {"full_text_only_thought": ""},
        10: {"problem_image_0": image_cell(png(size=(100, 20)))},
    }
    folder = write_dataset(tmp_path, rows=12, files=2, change=lambda i: changes.get(i, {}))
    code, table = _table(capsys, folder, "--num_workers", num_workers)
    assert code == 0
    assert table["title"] == "Jigsaw_Assembly (split train)"
    assert table["files"] == "2" and table["rows"] == "12"
    assert table["row groups"].startswith("4, the largest of 4 rows")
    assert table["columns found"].startswith("pid, question, answer, problem_image_0")
    assert table["columns missing"] == table["columns ignored"] == "none"
    assert table["images"] == "23" and table["images undecodable"] == "2"
    assert table["bad rows"] == "3 (2 broken_image, 1 missing_question)"
    assert table["usable for opsd"] == "8 rows"  # not 2, 3, 5, 8
    assert table["usable for sft"] == "9 rows"  # not 2, 3, 9
    assert table["usable for evaluation"] == "10 rows"  # not 2, 3
    assert table["visual thoughts"] == "1 rows with 0, 8 rows with 1"
    assert table["problem image"].startswith("min 8 x 6, median 8 x 6, max 100 x 20")
    assert table["visual thought"].startswith("min 8 x 6, median 8 x 6, max 8 x 6")
    assert table["question (characters)"] == "min 11, median 11, max 12"
    assert "cannot be used for opsd" in table["WARNING"] and "4 of 12" in table["WARNING"]
    assert "bad row" in table


def test_token_lengths_and_world_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = SCHEMA.append(pa.field("world_state", pa.string())).append(
        pa.field("difficulty", pa.int64())
    )
    rows = [good_row(i, world_state="SG", difficulty=i) for i in range(3)]
    path = write_parquet(tmp_path / "maze.parquet", rows, schema=schema)
    code, table = _table(capsys, path, "--tokenizer", TINY_BAGEL)
    assert code == 0 and table["title"] == "maze (split train)"
    assert table["question (tokens)"] == "min 5, median 5, max 5"
    assert table["columns ignored"] == "difficulty"
    assert table["columns found"].endswith("world_state")
    assert "WARNING" not in table


def test_questions_without_positions_and_control_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = SCHEMA.append(pa.field("world", pa.string())).append(
        pa.field("world_state", pa.string())
    )
    changes: dict[int, dict[str, Any]] = {
        1: {"question": "why " * 50_000},
        2: {"world": "spatial_navigation", "world_state": "{{{"},
        3: {"world": "chess", "world_state": "x"},
        4: {"question": "What is <|im_end|>?"},
        5: {"full_text_only_thought": "<|vision_start|>"},
        6: {"question": "a <|b|> <im_end> |im_end|"},
    }
    rows = [good_row(i, **changes.get(i, {})) for i in range(7)]
    path = write_parquet(tmp_path / "a.parquet", rows, schema=schema)
    code, table = _table(capsys, path)
    assert code == 0 and table["bad rows"] == "2 (2 bad_world)"
    assert table["usable for evaluation"] == "5 rows"
    assert table["note"].startswith("2 rows hold control tokens")
    _, table = _table(capsys, path, "--tokenizer", TINY_BAGEL)
    assert table["bad rows"] == "3 (2 bad_world, 1 too_long)"
    assert table["usable for sft"] == table["usable for evaluation"] == "4 rows"
    assert table["note"].startswith("2 rows hold control tokens")
    write_parquet(tmp_path / "b.parquet", rows[:2], schema=schema)
    code, table = _table(capsys, tmp_path / "b.parquet")
    assert table["WARNING"].startswith("1 rows have questions of more than 131072 characters")


def test_schema_error_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    no_answer = pa.schema([field for field in SCHEMA if field.name != "answer"])
    path = write_parquet(tmp_path / "a.parquet", [{"pid": "1"}], schema=no_answer)
    code, table = _table(capsys, path)
    assert code == 1 and "SCHEMA ERROR" in table
    assert table["columns missing"] == "missing: answer (a.parquet)"
    assert table["columns found"].startswith("pid, question, problem_image_0")

    no_image = pa.schema([field for field in SCHEMA if field.name != "reasoning_image_0"])
    row = {key: value for key, value in good_row(0).items() if key in no_image.names}
    path = write_parquet(tmp_path / "b.parquet", [row], schema=no_image)
    assert _table(capsys, path)[0] == 1
    assert _table(capsys, path, "--use", "sft")[0] == 0
    assert _table(capsys, path, "--use", "evaluation")[0] == 0


def test_unusable_paths_are_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def command(*arguments: object) -> str:
        with pytest.raises(SystemExit, match="1"):
            run_main(lambda: main([str(argument) for argument in arguments]))
        return capsys.readouterr().err

    assert command(tmp_path / "absent").endswith("absent does not exist\n")
    assert "holds no parquet files" in command(tmp_path)
    empty = write_parquet(tmp_path / "empty.parquet", [])
    code, table = _table(capsys, empty)
    assert code == 1 and "has no rows" in table["ERROR"]
    foreign = tmp_path / "foreign.parquet"
    foreign.write_text("not parquet")
    code, table = _table(capsys, foreign)
    assert code == 1 and "not a readable parquet file" in table["columns missing"]
    assert "holds no tokenizer" in command(empty, "--tokenizer", tmp_path)


def test_root_of_several_datasets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path, "A", rows=2)
    write_dataset(tmp_path, "A", rows=1, split="heldout")
    write_dataset(tmp_path, "B", rows=3)
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.index("A (split train)") < out.index("B (split train)")
    code, table = _table(capsys, tmp_path, "--split", "heldout")
    assert code == 1 and "no file of split 'heldout'" in table["ERROR"]
    assert _table(capsys, tmp_path / "A", "--split", "heldout")[1]["rows"] == "1"


def test_as_a_program(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, rows=2)
    command = [sys.executable, "-m", "data.check", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Jigsaw_Assembly (split train)\n") and result.stderr == ""
