# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The maze world: solver, pictures, scorer, split, determinism and its parquet files."""

from __future__ import annotations

import io
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.worlds import get_scorer, tiles
from data.worlds import spatial_navigation as nav
from data.worlds.__main__ import main
from data.worlds.writer import SCHEMA, write_spatial_navigation


def read_rows(folder: Path, split: str) -> list[dict]:
    files = sorted(folder.glob(f"{split}-*.parquet"))
    return [row for f in files for row in pq.read_table(f).to_pylist()]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world")
    return write_spatial_navigation(out, rows=900, heldout_rows=200, seed=7, sizes=(3, 4, 5))


def shortest_by_enumeration(maze: nav.Maze, limit: int) -> int | None:
    """Length of the shortest plan, found by trying every plan: independent of the solver."""
    for length in range(1, limit + 1):
        for plan in itertools.product("LRUD", repeat=length):
            cells = nav.walk(maze, "".join(plan))
            if cells is not None and cells[-1] == maze.goal:
                return length
    return None


def test_solver_finds_shortest_plans() -> None:
    rng = random.Random(0)
    checked = unreachable = 0
    while checked < 25:
        maze = nav._sample(3, rng)
        plan = nav.solve(maze)
        expected = shortest_by_enumeration(maze, 6)
        if expected is None:
            unreachable += 1
            assert plan is None or len(plan) > 6
            continue
        assert plan is not None and len(plan) == expected
        cells = nav.walk(maze, plan)
        assert cells is not None and cells[-1] == maze.goal
        checked += 1
    assert unreachable > 0  # the draw did contain the other case


def test_state_round_trip_and_bad_states() -> None:
    maze = nav.Maze.parse("SFF/FHF/FFG")
    assert maze == nav.Maze(3, 0, 8, frozenset({4}))
    assert maze.state == "SFF/FHF/FFG"
    assert maze.square(0) == "a1" and maze.square(5) == "c2"
    for bad in ("", "SF/FF", "SFG/FFF", "SSG/FFF/FFF", "SFG/FXF/FFF"):
        with pytest.raises(ValueError, match="is not a maze"):
            nav.Maze.parse(bad)


def test_moves_off_the_board_and_into_holes_fail() -> None:
    maze = nav.Maze.parse("SFF/FHF/FFG")
    assert maze.step(0, "L") is None and maze.step(0, "U") is None
    assert maze.step(0, "R") == 1 and maze.step(1, "D") is None and maze.step(2, "D") == 5
    assert maze.step(2, "R") is None  # no wrapping into the next row


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>x</think><answer>R,R,D,D</answer>", True),
        ("<answer>D,D,R,R</answer>", True),  # another shortest path
        ("<answer> d , d, r ,r </answer>", True),
        ("<answer>R,L,R,R,D,D</answer>", True),  # longer, still valid
        ("<answer>R,R,D</answer>", False),  # stops short
        ("<answer>R,D,D,R</answer>", False),  # through the hole
        ("<answer>R,R,D,D,U</answer>", False),  # leaves the goal again
        ("<answer>L,R,R,R,D,D</answer>", False),  # first move leaves the board
        ("<answer>RRDD</answer>", False),  # not comma-separated
        ("<answer></answer>", False),
        ("<answer>R,R,X,D,D</answer>", False),
        ("R,R,D,D", False),  # no tags
        ("<answer>R,R,D,D", False),  # never closed
        ("<answer>U</answer> no: <answer>R,R,D,D</answer>", True),  # the last answer counts
        ("<answer>R,R,D,D</answer> no: <answer>U</answer>", False),
        ("<answer>oh <answer>\nR,R,D,D\n</answer>", True),
    ],
)
def test_scorer(text: str, expected: bool) -> None:
    assert get_scorer("spatial_navigation")({"world_state": "SFF/FHF/FFG"}, text) is expected


def test_scorer_needs_a_maze_and_a_known_world() -> None:
    with pytest.raises(ValueError, match="no world_state"):
        nav.score({"question": "?"}, "<answer>R</answer>")
    with pytest.raises(ValueError, match="spatial_navigation"):
        get_scorer("chess")


def test_rows_are_valid(world: Path) -> None:
    """Schema, answer, texts and both pictures of every row; pictures equal the table look-up."""
    table = tiles.cell_patches(14)
    for path in world.glob("*.parquet"):
        assert pq.read_schema(path).equals(SCHEMA)
    for row in read_rows(world, "train")[:150] + read_rows(world, "heldout")[:50]:
        maze = nav.Maze.parse(row["world_state"])
        plan = row["answer"].replace(",", "")
        assert row["world"] == "spatial_navigation" and maze.state == row["world_state"]
        assert nav.score(row, f"<answer>{row['answer']}</answer>")
        assert 2 <= len(plan) <= 2 * maze.size
        trace = f"start {maze.square(maze.start)} goal {maze.square(maze.goal)}"
        assert row["resoning_thought_0"] == row["full_text_only_thought"] == trace
        cells = nav.walk(maze, plan)
        assert cells is not None
        assert row["resoning_thought_1"].split() == [maze.square(c) for c in cells]
        joined = dict.fromkeys(range(maze.size**2), 0)  # neighbours joined by the line
        for here, there in itertools.pairwise(cells):
            joined[here] |= {-1: 1, 1: 2, -maze.size: 4, maze.size: 8}[there - here]
            joined[there] |= {1: 1, -1: 2, maze.size: 4, -maze.size: 8}[there - here]
        for column, masked in (("problem_image_0", False), ("reasoning_image_0", True)):
            image = Image.open(io.BytesIO(row[column]["bytes"]))
            assert image.mode == "RGB" and image.size == (14 * maze.size,) * 2
            pixels = np.asarray(image)
            for c in range(maze.size**2):
                y, x = divmod(c, maze.size)
                kind = {"F": 0, "H": 1, "S": 2, "G": 3}[row["world_state"].replace("/", "")[c]]
                expected = table[kind, joined[c] if masked else 0]
                assert np.array_equal(pixels[14 * y : 14 * y + 14, 14 * x : 14 * x + 14], expected)


def test_table_cells_are_distinct_and_the_line_is_bright() -> None:
    table = tiles.cell_patches(14)
    assert table.shape == (4, 16, 14, 14, 3) and table.dtype == np.uint8
    flat = {table[k, m].tobytes() for k in range(4) for m in range(16)}
    assert len(flat) == 64
    line = np.array(tiles._LINE_COLOUR[:3])
    plain, right = table[tiles.ICE, 0].astype(int), table[tiles.ICE, 0b0010].astype(int)
    assert np.abs(right[7, 13] - line).max() < 60  # the line leaves on the right edge ...
    assert np.array_equal(right[:, 0], plain[:, 0])  # ... and nowhere on the left one


def test_missing_tiles_are_named(tmp_path: Path) -> None:
    (tmp_path / "ice.png").write_bytes(b"")
    for name in ("ice.png", "hole.png", "elf_down.png"):  # all of one generation but the goal
        Image.new("RGBA", (32, 32)).save(tmp_path / name)
    with pytest.raises(ValueError, match=r"no goal tile.*goal_flag\.png or goal\.png.*hole\.png"):
        tiles.cell_patches(14, str(tmp_path))
    Image.new("RGBA", (32, 32)).save(tmp_path / "goal.png")
    assert tiles.cell_patches(14, str(tmp_path)).shape[0] == 4


def test_split_is_disjoint_and_distinct(world: Path) -> None:
    train = [row["world_state"] for row in read_rows(world, "train")]
    heldout = [row["world_state"] for row in read_rows(world, "heldout")]
    assert (len(train), len(heldout)) == (900, 200)
    assert len(set(train)) == 900 and len(set(heldout)) == 200
    assert not set(train) & set(heldout)
    assert not any(map(nav.is_heldout, train)) and all(map(nav.is_heldout, heldout))
    other = write_spatial_navigation(world.parent.parent / "b", rows=900, heldout_rows=9, seed=8)
    assert not {row["world_state"] for row in read_rows(other, "train")} & set(heldout)


def test_same_seed_same_bytes(world: Path, tmp_path: Path) -> None:
    again = write_spatial_navigation(tmp_path, rows=900, heldout_rows=200, seed=7, sizes=(3, 4, 5))
    names = sorted(p.name for p in world.iterdir())
    assert names == sorted(p.name for p in again.iterdir())
    assert all((world / n).read_bytes() == (again / n).read_bytes() for n in names)
    other = nav.draw_rows(900, (3, 4, 5), seed=8, heldout=False)[0]
    assert [m.state for m in other] != [r["world_state"] for r in read_rows(again, "train")]


def test_sizes_share_rows_while_they_last() -> None:
    exact = nav.available(3, True)
    assert exact == 391  # every held-out 3x3 maze there is
    assert nav.share_rows(300, (3, 4), heldout=True) == {3: 150, 4: 150}
    assert nav.share_rows(2400, (4, 3), heldout=True) == {3: 391, 4: 2009}
    assert nav.share_rows(2400, (3, 4, 5), heldout=True) == {3: 391, 4: 1004, 5: 1005}
    assert len({m.state for m in nav.draw(3, 391, seed=0, heldout=True)}) == 391


def test_asking_for_too_many_names_the_count(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only 391 are available"):
        nav.draw(3, 392, seed=0, heldout=True)
    argv = ["spatial_navigation", "--rows", "5000", "--sizes", "3", "--out", str(tmp_path)]
    with pytest.raises(ValueError, match="only 3329 are available"):
        main(argv)
    assert not list(tmp_path.rglob("*"))  # nothing is left behind


def test_rejection_gives_up_when_mazes_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nav, "available", lambda size, heldout: None)
    with pytest.raises(ValueError, match=r"only \d+ are available") as caught:
        nav.draw(3, 1000, seed=0, heldout=True)
    found = int(str(caught.value).split("only ")[1].split()[0])
    assert 380 <= found <= 391  # 391 exist; boards of many holes rarely turn up


def test_enumeration_and_rejection_agree_in_distribution() -> None:
    """Few draws from the 3x3 list must look like independent boards with 30 % holes."""
    mazes = [m for s in range(8) for m in nav.draw(3, 100, seed=s, heldout=False)]
    rng = random.Random(1)
    free = [m for m in (nav._sample(3, rng) for _ in range(6000)) if nav.usable(m)]
    listed = sum(len(m.holes) for m in mazes) / len(mazes)
    drawn = sum(len(m.holes) for m in free) / len(free)
    assert abs(listed - drawn) < 0.25  # three standard errors are 0.14, repeats add the rest


def test_command_line(tmp_path: Path) -> None:
    base = ["spatial_navigation", "--rows", "30", "--out", str(tmp_path), "--seed", "1"]
    assert main([*base, "--sizes", "4", "--style", "full", "--cell", "20"]) == 0
    folder = tmp_path / "Spatial_Navigation" / "data"
    row = read_rows(folder, "train")[0]
    assert Image.open(io.BytesIO(row["problem_image_0"]["bytes"])).size == (80, 80)
    maze = nav.Maze.parse(row["world_state"])
    assert maze.square(maze.start) in row["full_text_only_thought"]
    assert len(read_rows(folder, "heldout")) == 6
    with pytest.raises(ValueError, match="--overwrite"):
        main(base)
    assert main([*base, "--overwrite"]) == 0
    assert json.loads((folder / "world.json").read_text())["style"] == "lite"
    assert [p.name for p in folder.parent.iterdir()] == ["data"]
    for bad in (["--sizes", "2"], ["--sizes", "4,4"], ["--cell", "3"], ["--rows", "0"]):
        with pytest.raises(ValueError, match=r"sizes|a cell of 3 pixels|need at least 1"):
            main([*base, *bad, "--overwrite"])


def test_overwrite_spares_data_of_other_origin(tmp_path: Path) -> None:
    folder = tmp_path / "Spatial_Navigation" / "data"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"pid": ["downloaded"]}), folder / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"was not written by data\.worlds"):
        write_spatial_navigation(tmp_path, rows=5, heldout_rows=1, overwrite=True)
    assert pq.read_table(folder / "train-00000-of-00001.parquet")["pid"].to_pylist()
