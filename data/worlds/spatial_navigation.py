# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Spatial navigation: FrozenLake mazes, their canonical shortest path, texts and exact scorer.

A maze is an N x N board of ice and holes with one start and one goal. A plan is a list of moves
L, R, U, D; a move off the board or into a hole fails. The visual thought (VT) of a maze is the
same picture with a shortest path drawn in. Cells are named like chess squares: letter = column,
digit = row, counted from the top.

A maze's text form, its `world_state`, is its rows from the top joined by "/", in FrozenLake's
letters (S start, F ice, H hole, G goal): "SFF/FHF/FFG". It is stored with every row, so scoring
needs nothing but the row.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.worlds.tiles import DELTAS, GOAL, HOLE, MOVES, START, compose

DATASET = "Spatial_Navigation"
WORLD = "spatial_navigation"
HOLE_PROBABILITY = 0.3
MIN_SIZE, MAX_SIZE = 3, 8
_LETTERED = 26  # columns that a letter names
_ENUMERATED_UP_TO = 3  # boards small enough to list every maze
_LETTERS = "FHSG"  # in the order of tiles.KINDS

LITE_QUESTION = "Which moves reach the goal?"
FULL_QUESTION = (
    "The picture shows a frozen lake from above. The elf wants to walk to the goal without "
    "stepping into a hole or off the board. Give a list of moves that brings it there, separated "
    "by commas, using L for left, R for right, U for up and D for down."
)
STYLES = ("lite", "full")


@dataclass(frozen=True)
class Maze:
    """A board; cells are numbered row by row from the top left."""

    size: int
    start: int
    goal: int
    holes: frozenset[int]

    @property
    def state(self) -> str:
        """The board as text, the `world_state` of a row."""
        letters = ["H" if c in self.holes else "F" for c in range(self.size**2)]
        letters[self.start], letters[self.goal] = "S", "G"
        rows = ("".join(letters[r : r + self.size]) for r in range(0, self.size**2, self.size))
        return "/".join(rows)

    @classmethod
    def parse(cls, state: str) -> Maze:
        """Inverse of `state`.

        Raises:
            ValueError: not a square board of S, F, H, G with one start and one goal.
        """
        rows = state.split("/")
        text = "".join(rows)
        square = all(len(row) == len(rows) for row in rows)
        if not square or set(text) - set(_LETTERS) or text.count("S") != 1 or text.count("G") != 1:
            raise ValueError(
                f"{state[:60]!r} is not a maze: expected N rows of N letters out of {_LETTERS}, "
                "joined by '/', with one S and one G; was the row written by another world?"
            )
        holes = frozenset(i for i, letter in enumerate(text) if letter == "H")
        return cls(len(rows), text.index("S"), text.index("G"), holes)

    def step(self, cell: int, move: str) -> int | None:
        """The cell a move leads to, or None if it fails."""
        rows, columns = DELTAS[MOVES.index(move)]
        row, column = cell // self.size + rows, cell % self.size + columns
        if not (0 <= row < self.size and 0 <= column < self.size):
            return None
        target = row * self.size + column
        return None if target in self.holes else target

    def square(self, cell: int) -> str:
        """Chess-like name of a cell: "a1" is the top left one."""
        return f"{chr(ord('a') + cell % self.size)}{cell // self.size + 1}"


@functools.cache
def _neighbours(size: int) -> tuple[tuple[tuple[str, int], ...], ...]:
    free = Maze(size, 0, 1, frozenset())
    return tuple(
        tuple((m, t) for m in MOVES if (t := free.step(cell, m)) is not None)
        for cell in range(size**2)
    )


def distances(maze: Maze) -> dict[int, int]:
    """Moves to the goal from every cell that can reach it."""
    around = _neighbours(maze.size)
    result = {maze.goal: 0}
    frontier = [maze.goal]
    while frontier:
        reached = []
        for cell in frontier:
            for _, other in around[cell]:
                if other not in result and other not in maze.holes:
                    result[other] = result[cell] + 1
                    reached.append(other)
        frontier = reached
    return result


def best_move(maze: Maze, cell: int, to_goal: Mapping[int, int]) -> str:
    """The first of L, R, U, D that brings `cell` one move closer to the goal."""
    here = to_goal[cell]
    return next(m for m, t in _neighbours(maze.size)[cell] if to_goal.get(t) == here - 1)


def solve(maze: Maze) -> str | None:
    """The canonical shortest plan ("RRD"), or None if the goal is out of reach."""
    to_goal = distances(maze)
    if maze.start not in to_goal:
        return None
    cell, plan = maze.start, ""
    while cell != maze.goal:
        plan += best_move(maze, cell, to_goal)
        following = maze.step(cell, plan[-1])
        assert following is not None
        cell = following
    return plan


def walk(maze: Maze, plan: str) -> list[int] | None:
    """Cells visited by a plan, start included; None as soon as a move fails."""
    cells = [maze.start]
    for move in plan:
        cell = maze.step(cells[-1], move)
        if cell is None:
            return None
        cells.append(cell)
    return cells


# ---------------------------------------------------------------------------------- scoring

_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)


def extract_plan(text: str) -> str | None:
    """Moves of the last complete <answer>...</answer>, or None if it holds anything else."""
    answers = _ANSWER.findall(text)
    if not answers:
        return None
    moves = [part.strip().upper() for part in answers[-1].split(",")]
    if not all(len(move) == 1 and move in MOVES for move in moves):
        return None
    return "".join(moves)


def score(row: Mapping[str, Any], text: str) -> bool:
    """Does the plan in a generated text lead from the start to the goal?

    Any valid path counts, shortest or not: no move may fail and the last one must end on the goal.

    Args:
        row: columns of a parquet row.
        text: the generated text, with its answer in <answer> tags.

    Raises:
        ValueError: the row carries no maze.
    """
    state = row.get("world_state")
    if not isinstance(state, str):
        raise ValueError(
            "the row has no world_state, so its plan cannot be simulated; only rows written by "
            "`python -m data.worlds spatial_navigation` can be scored by this world"
        )
    plan = extract_plan(text)
    if plan is None:
        return False
    maze = Maze.parse(state)
    cells = walk(maze, plan)
    return cells is not None and cells[-1] == maze.goal


def check_state(state: str | None) -> None:
    """Raise ValueError unless `score` can judge by this world_state and some plan is right."""
    if not state:
        raise ValueError("world_state is empty, so no plan can be simulated")
    maze = Maze.parse(state)
    if maze.size > _LETTERED:
        raise ValueError(f"a board of {maze.size} rows; cells have names up to {_LETTERED}")
    if maze.start not in distances(maze):
        raise ValueError(f"{state[:60]!r}: no path leads from the start to the goal")


# ---------------------------------------------------------------------------------- drawing


def board(maze: Maze) -> np.ndarray:
    """Kinds of the cells, uint8 (N, N)."""
    kinds = np.zeros(maze.size**2, dtype=np.uint8)
    kinds[list(maze.holes)] = HOLE
    kinds[maze.start], kinds[maze.goal] = START, GOAL
    return kinds.reshape(maze.size, maze.size)


def path_masks(maze: Maze, plan: str) -> np.ndarray:
    """Which neighbours the drawn path joins, uint8 bit masks (N, N), bits in the order LRUD."""
    masks = np.zeros(maze.size**2, dtype=np.uint8)
    cells = walk(maze, plan)
    assert cells is not None
    for here, there, move in zip(cells, cells[1:], plan, strict=False):
        bit = MOVES.index(move)
        masks[here] |= 1 << bit
        masks[there] |= 1 << (bit ^ 1)  # L and R, U and D are neighbours in MOVES
    return masks.reshape(maze.size, maze.size)


def render(maze: Maze, plan: str, cell: int) -> np.ndarray:
    """Picture of a maze, uint8 (N*cell, N*cell, 3); a non-empty plan is drawn as a line."""
    return compose(board(maze), path_masks(maze, plan), cell)


# ---------------------------------------------------------------------------------- texts


def lite_trace(maze: Maze) -> str:
    """The few-token text trace: "start b3 goal c1"."""
    return f"start {maze.square(maze.start)} goal {maze.square(maze.goal)}"


def _full_texts(maze: Maze, plan: str) -> tuple[str, str, str]:
    names = {"L": "left", "R": "right", "U": "up", "D": "down"}
    holes = [maze.square(h) for h in sorted(maze.holes)]
    pits = f"The holes are at {', '.join(holes)}." if holes else "There are no holes."
    look = (
        f"The board has {maze.size} rows and {maze.size} columns; I name cells by column letter "
        f"and row number from the top. The elf stands at {maze.square(maze.start)} and the goal is "
        f"at {maze.square(maze.goal)}. {pits}"
    )
    cells = walk(maze, plan)
    assert cells is not None
    steps = ", ".join(
        f"{names[move]} to {maze.square(cell)}" for move, cell in zip(plan, cells[1:], strict=True)
    )
    thought_0 = f"{look} I will draw a safe path from the elf to the goal on the picture."
    thought_1 = f"The drawn line stays on the ice. Following it, the elf goes {steps}."
    text_only = f"{look} Walking only over ice, the elf can go {steps}, which is the goal."
    return thought_0, thought_1, text_only


def texts(maze: Maze, plan: str, style: str) -> dict[str, str]:
    """Text columns of a row: question, answer, the two thoughts and the text-only trace."""
    if style == "lite":
        cells = walk(maze, plan)
        assert cells is not None
        question, first = LITE_QUESTION, lite_trace(maze)
        second, text_only = " ".join(maze.square(c) for c in cells), first
    else:
        question = FULL_QUESTION
        first, second, text_only = _full_texts(maze, plan)
    return {
        "question": question,
        "answer": ",".join(plan),
        "resoning_thought_0": first,
        "resoning_thought_1": second,
        "full_text_only_thought": text_only,
    }


def lite_strings(max_size: int = MAX_SIZE) -> list[str]:
    """Strings that hold every word of the lite style, for the miniature's tokenizer."""
    squares = [f"{chr(ord('a') + c)}{r + 1}" for c in range(max_size) for r in range(max_size)]
    plans = [",".join(pair) for pair in itertools.product(MOVES, repeat=2)]
    traces = [f"start {s} goal {s}" for s in squares] + [f"{s} {s}" for s in squares]
    return [LITE_QUESTION, *traces, *plans]


# ---------------------------------------------------------------------------------- sampling


def longest_path(size: int) -> int:
    """Mazes whose shortest path is longer than this are not used (the shortest used is 2)."""
    return 2 * size


def usable(maze: Maze) -> bool:
    """Is the goal between 2 and `longest_path` moves away?"""
    length = distances(maze).get(maze.start)
    return length is not None and 2 <= length <= longest_path(maze.size)


def is_heldout(state: str) -> bool:
    """Split by a stable hash of the maze: one in ten is held out, whatever the seed."""
    return int.from_bytes(hashlib.sha256(state.encode()).digest()[:8], "big") % 10 == 0


@functools.cache
def _enumerate(size: int, heldout: bool) -> tuple[Maze, ...]:
    found = []
    cells = range(size**2)
    for start, goal in itertools.permutations(cells, 2):
        others = [c for c in cells if c not in (start, goal)]
        for count in range(len(others) + 1):
            for holes in itertools.combinations(others, count):
                maze = Maze(size, start, goal, frozenset(holes))
                if is_heldout(maze.state) == heldout and usable(maze):
                    found.append(maze)
    return tuple(found)


def available(size: int, heldout: bool) -> int | None:
    """Number of distinct mazes of a split where it is known exactly (small boards), else None."""
    return len(_enumerate(size, heldout)) if size <= _ENUMERATED_UP_TO else None


def _sample(size: int, rng: random.Random) -> Maze:
    cells = size**2
    start = int(rng.random() * cells)
    goal = int(rng.random() * (cells - 1))
    goal += goal >= start
    holes = frozenset(
        c for c in range(cells) if rng.random() < HOLE_PROBABILITY and c not in (start, goal)
    )
    return Maze(size, start, goal, holes)


def _draw_by_rejection(size: int, count: int, rng: random.Random, heldout: bool) -> list[Maze]:
    seen: set[str] = set()
    mazes: list[Maze] = []
    attempts = last_new = 0
    # A new maze is found every few draws (every few dozen for the held-out tenth). When one takes
    # thousands, those left are too improbable to go on.
    patience = 20_000
    while len(mazes) < count:
        if attempts - last_new > patience:
            raise ValueError(
                f"asked for {count} distinct {'held-out' if heldout else 'training'} mazes of size "
                f"{size}, but only {len(mazes)} are available: they turned up in {attempts} draws, "
                f"the last {patience} of which brought nothing new; ask for at most {len(mazes)} "
                "or add a larger size"
            )
        attempts += 1
        maze = _sample(size, rng)
        state = maze.state
        if state in seen or is_heldout(state) != heldout or not usable(maze):
            continue
        seen.add(state)
        mazes.append(maze)
        last_new = attempts
    return mazes


def draw(size: int, count: int, *, seed: int, heldout: bool) -> list[Maze]:
    """`count` distinct mazes of one size and split, as sampling without replacement gives them.

    Small boards are drawn from the list of all mazes, larger ones by rejection; in both the
    probability of a board follows from holes with probability 0.3.

    Raises:
        ValueError: there are fewer distinct mazes; the message names how many.
    """
    rng = random.Random(f"{WORLD} {seed} {size} {heldout}")
    exact = available(size, heldout)
    if exact is None:
        return _draw_by_rejection(size, count, rng, heldout)
    if count > exact:
        raise ValueError(
            f"asked for {count} distinct {'held-out' if heldout else 'training'} mazes of size "
            f"{size}, but only {exact} are available; ask for fewer rows or add a larger size"
        )
    odds = HOLE_PROBABILITY / (1 - HOLE_PROBABILITY)

    # Exponential races: the order of arrival equals successive draws without replacement.
    def arrival(maze: Maze) -> float:
        return -math.log(1.0 - rng.random()) / odds ** len(maze.holes)

    keyed = [(arrival(maze), i) for i, maze in enumerate(_enumerate(size, heldout))]
    chosen = sorted(keyed)[:count]
    return [_enumerate(size, heldout)[i] for _, i in chosen]


def share_rows(rows: int, sizes: Sequence[int], *, heldout: bool) -> dict[int, int]:
    """How many rows each size gets: equal shares while the small sizes last.

    A size with fewer distinct mazes than its share gives all it has and the others take the rest
    evenly; what does not divide goes to the larger sizes.

    Raises:
        ValueError: all sizes together have fewer distinct mazes than `rows`.
    """
    limits = {size: available(size, heldout) for size in sizes}
    if all(limit is not None for limit in limits.values()):
        total = sum(limit or 0 for limit in limits.values())
        if rows > total:
            raise ValueError(
                f"asked for {rows} distinct {'held-out' if heldout else 'training'} mazes of sizes "
                f"{', '.join(map(str, sizes))}, but only {total} are available; ask for at most "
                f"{total} or add a larger size"
            )
    shares: dict[int, int] = {}
    left = rows
    # Smallest supply first, so that what it cannot give is spread over those that follow.
    order = sorted(limits, key=lambda s: (math.inf if limits[s] is None else limits[s], s))
    for position, size in enumerate(order):
        limit = limits[size]
        share = left // (len(order) - position)
        shares[size] = share if limit is None else min(share, limit)
        left -= shares[size]
    return {size: shares[size] for size in sorted(shares)}


def draw_rows(
    rows: int, sizes: Sequence[int], *, seed: int, heldout: bool
) -> tuple[list[Maze], dict[int, int]]:
    """All mazes of a split in their final (shuffled, deterministic) order, and rows per size.

    Raises:
        ValueError: a size outside 3..8, or more rows than distinct mazes.
    """
    wrong = [s for s in sizes if not MIN_SIZE <= s <= MAX_SIZE]
    if wrong or not sizes or len(set(sizes)) != len(sizes):
        raise ValueError(
            f"sizes {', '.join(map(str, sizes)) or '(none)'}: give different board sizes between "
            f"{MIN_SIZE} and {MAX_SIZE}, such as --sizes 3,4"
        )
    shares = share_rows(rows, sizes, heldout=heldout)
    mazes = [
        maze
        for size, count in shares.items()
        for maze in draw(size, count, seed=seed, heldout=heldout)
    ]
    random.Random(f"{WORLD} order {seed} {heldout}").shuffle(mazes)
    return mazes, shares


def iterate_rows(mazes: Sequence[Maze], style: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Plan and text columns of every maze, in order."""
    for maze in mazes:
        plan = solve(maze)
        assert plan is not None
        yield plan, texts(maze, plan, style)
