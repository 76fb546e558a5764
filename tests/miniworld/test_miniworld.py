# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The miniature: its tokenizer, its vectorised mazes and batches, and its pre-training command."""

from __future__ import annotations

import json
import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from data.packing import context_length, pack
from data.sequence import ContextBuilder, Prompts, given_completion
from data.thinkmorph import Row, parse_row
from data.transforms import ImageTransform
from data.worlds import spatial_navigation as nav
from data.worlds.tiles import MOVES
from data.worlds.writer import write_spatial_navigation
from modeling import load_bagel
from modeling.release.tokenizer import load_tokenizer
from scripts.miniworld import demo, pretrain
from scripts.miniworld.base import SIDE, write_skeleton
from scripts.miniworld.batches import (
    STUDENT,
    TEACHER,
    Group,
    Template,
    Vocabulary,
    completion_length,
    maze_pictures,
)
from scripts.miniworld.mazes import Bank, MazeTable, maze_of, walk
from scripts.miniworld.tokenizer import DEMO_PROMPTS, TAGS, build_merges, demo_strings

PROMPTS = Prompts.from_yaml(DEMO_PROMPTS)


@pytest.fixture(scope="module")
def skeleton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("skeleton")
    write_skeleton(folder, demo_strings(PROMPTS), seed=0)
    return folder


@pytest.fixture(scope="module")
def words(skeleton: Path) -> Vocabulary:
    tokenizer, special = load_tokenizer(skeleton)
    return Vocabulary(tokenizer, special, PROMPTS, "cpu")


@pytest.fixture(scope="module")
def table() -> MazeTable:
    return MazeTable.build(sizes=(3, 4, 5), per_size=60, heldout_rows=30, cell=14, seed=1)


def demo_builder(tokenizer: Any) -> ContextBuilder:
    spec = yaml.safe_load((DEMO_PROMPTS.parent / "images.yaml").read_text())
    sizes = (spec[f"vit_{name}"] for name in ("max_size", "min_size", "stride"))
    return ContextBuilder(tokenizer, ImageTransform(*sizes), PROMPTS, side=SIDE)


# ------------------------------------------------------------------------------ tokenizer


def test_words_are_single_tokens_and_lengths_are_as_wanted(words: Vocabulary) -> None:
    lengths = {
        "Solve the maze.": 4,
        "Hint:": 2,
        "Answer now.": 3,
        nav.LITE_QUESTION: 6,
        "<think>start b3 goal c1</think><answer>L,R,U</answer>": 10 + 3,
        "<answer>D</answer>": 3,
        "b3 b2 c2": 6,
    }
    for text, length in lengths.items():
        assert len(words.encode(text)) == length, text
    for tag in TAGS:
        assert len(words.encode(tag)) == 1
    assert len(words.tokenizer) <= 384


def test_round_trip_and_tags_survive_decoding(words: Vocabulary) -> None:
    rng = random.Random(0)
    texts = ["naïve 漢字 \U0001f9dd\n\t x  y", nav.LITE_QUESTION, "<think>a</think> <answer>"]
    texts += ["".join(chr(rng.randrange(32, 0x250)) for _ in range(40)) for _ in range(20)]
    for text in texts:
        ids = words.encode(text)
        nfc = words.tokenizer.backend_tokenizer.normalizer.normalize_str(text)
        assert words.tokenizer.decode(ids) == nfc
    marked = words.encode("<think>a</think><|im_end|>")
    decoded = words.tokenizer.decode(marked, skip_special_tokens=True)
    assert decoded == "<think>a</think>"  # tags are text, markers are not


def test_plain_vocabulary_and_merges_give_the_same_ids(skeleton: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((skeleton / name).read_bytes())
    (first, special), (second, again) = load_tokenizer(skeleton), load_tokenizer(tmp_path)
    assert special == again and first.get_vocab() == second.get_vocab()
    for text in (*demo_strings(PROMPTS), "<think>x</think><|im_end|>", "Zürich"):
        assert first.encode(text) == second.encode(text)
    assert [first.convert_ids_to_tokens(i) for i in vars(special).values()] == [
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
    ]


def test_merges_make_whole_words_whatever_their_order() -> None:
    word_lists = [["abc", "bcd", "cda", "bc"], ["bc", "cda", "abc", "bcd"]]
    for listed in word_lists:
        merges = build_merges(listed)
        assert len(merges) == len(set(merges))
        assert set(listed) <= {a + b for a, b in merges}
        assert build_merges(listed + listed) == merges  # nothing left to join


# ------------------------------------------------------------------------------ mazes as tensors


def test_bank_agrees_with_the_world(table: MazeTable) -> None:
    for size in table.sizes:
        bank = Bank(table.train[size], "cpu")
        for i, board in enumerate(table.train[size][:25]):
            maze = maze_of(board.tolist())
            plan = nav.solve(maze)
            assert plan is not None
            assert (nav.board(maze).ravel() == board).all()
            assert (bank.masks[i].numpy() == nav.path_masks(maze, plan).ravel()).all()
            to_goal = nav.distances(maze)
            for cell in range(size**2):
                for bit, move in enumerate(MOVES):
                    after = maze.step(cell, move)
                    assert int(bank.target[i, cell, bit]) == (-1 if after is None else after)
                if cell in to_goal:
                    assert int(bank.distance[i, cell]) == to_goal[cell]
                if to_goal.get(cell):
                    assert MOVES[bank.best[i, cell]] == nav.best_move(maze, cell, to_goal)


@pytest.mark.parametrize("detour", [0.0, 0.4])
def test_walks_reach_the_goal_and_teach_best_moves_only(table: MazeTable, detour: float) -> None:
    bank = Bank(table.train[4], "cpu")
    index, steps = torch.arange(len(bank)), nav.longest_path(4) + 4
    walked = walk(bank, index, steps, detour, torch.Generator().manual_seed(0))
    wrong = 0
    for i, board in enumerate(table.train[4]):
        maze = maze_of(board.tolist())
        to_goal = nav.distances(maze)
        length = int(walked.lengths[i])
        plan = "".join(MOVES[m] for m in walked.moves[i, :length].tolist())
        cells = nav.walk(maze, plan)
        assert cells is not None and cells[-1] == maze.goal and maze.goal not in cells[:-1]
        for move, cell, scored in zip(plan, cells, walked.scored[i].tolist(), strict=False):
            assert scored == (move == nav.best_move(maze, cell, to_goal))
            wrong += not scored
        assert not walked.scored[i, length:].any()
        if not detour:
            assert plan == nav.solve(maze)
    expected = detour * int(walked.lengths.sum())
    assert wrong == 0 if not detour else 0.6 * expected < wrong < 1.2 * expected


def test_table_round_trip(table: MazeTable, tmp_path: Path) -> None:
    table.save(tmp_path / "mazes.npz")
    again = MazeTable.load(tmp_path / "mazes.npz")
    assert again.sizes == table.sizes and np.array_equal(again.cells, table.cells)
    for size in table.sizes:
        assert np.array_equal(again.train[size], table.train[size])
        assert np.array_equal(again.heldout[size], table.heldout[size])
        held = {maze_of(b).state for b in table.heldout[size].tolist()}
        assert held and all(map(nav.is_heldout, held))
    with pytest.raises(ValueError, match="--export-table"):
        MazeTable.load(tmp_path / "absent.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="not a maze table"):
        MazeTable.load(tmp_path / "other.npz")


# ------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("kind", [STUDENT, TEACHER])
def test_fast_batches_equal_contexts_built_from_parquet(
    kind: str, words: Vocabulary, tmp_path: Path
) -> None:
    """Ids, patches, positions, layout and labels of each row are those the trainer would pack."""
    folder = write_spatial_navigation(tmp_path, rows=8, heldout_rows=0, seed=3)
    path = folder / "train-00000-of-00001.parquet"
    builder = demo_builder(words.tokenizer)
    cells = MazeTable.build(sizes=(3,), per_size=1, heldout_rows=1, cell=14, seed=0)
    patches = cells.patches("cpu")
    for number, values in enumerate(pq.read_table(path).to_pylist()):
        sample = parse_row(Row("Spatial_Navigation", str(path), number, values))
        context = builder.student(sample)
        if kind == TEACHER:
            context = builder.teacher(sample, context)
        text = f"<think>{sample.text_trace}</think><answer>{sample.answer}</answer>"
        completion = given_completion(builder.encode(text))
        expected = pack([(*context, completion.segment())], words.special)

        maze = nav.Maze.parse(values["world_state"])
        bank = Bank(nav.board(maze).ravel()[None], "cpu")
        index = torch.zeros(1, dtype=torch.long)
        steps = {maze.size: len(sample.answer.split(","))}  # so that nothing is padded
        walked = walk(bank, index, steps[maze.size], 0.0, torch.Generator())
        group = Group(maze.size, kind, 1)
        template = Template(words, [group], side=SIDE, steps=steps, device="cpu")
        problem, thought = maze_pictures(bank, index, patches, index)
        batch, weights = template.fill(
            [(problem, thought if kind == TEACHER else None)],
            [words.completions(bank, index, walked)],
        )
        assert weights is not None and weights.tolist() == [1.0] * completion.count
        for field in fields(expected):
            ours, theirs = getattr(batch, field.name), getattr(expected, field.name)
            same = torch.equal(ours, theirs) if torch.is_tensor(theirs) else ours == theirs
            assert same, field.name
        assert builder.sft_targets(sample)[0].ids == completion.ids


def test_sequence_lengths_fit_the_demo(words: Vocabulary, tmp_path: Path) -> None:
    """With the longest completion that the base was trained on."""
    folder = write_spatial_navigation(tmp_path, rows=20, heldout_rows=0, sizes=(4,))
    values = pq.read_table(folder / "train-00000-of-00001.parquet").to_pylist()[0]
    sample = parse_row(Row("Spatial_Navigation", "train", 0, values))
    builder = demo_builder(words.tokenizer)
    student = builder.student(sample)
    completion = completion_length(nav.longest_path(4) + pretrain._SLACK) + 2
    assert context_length(student) == 32
    assert context_length(student) + completion <= 64
    assert context_length(builder.teacher(sample, student)) + completion <= 90


def test_padding_and_detours_carry_no_weight(words: Vocabulary, table: MazeTable) -> None:
    bank, steps = Bank(table.train[4], "cpu"), 12
    index = torch.arange(len(bank))
    walked = walk(bank, index, steps, 0.3, torch.Generator().manual_seed(1))
    ids, weight = words.completions(bank, index, walked)
    for i, board in enumerate(table.train[4]):
        maze = maze_of(board.tolist())
        length = int(walked.lengths[i])
        plan = [MOVES[m] for m in walked.moves[i, :length].tolist()]
        text = f"<think>{nav.lite_trace(maze)}</think><answer>{','.join(plan)}</answer>"
        assert words.tokenizer.decode(ids[i]).split("<|im_end|>")[0] == text
        assert ids[i, 10 + length :].eq(words.special.eos).all()
        # 9 tokens before the moves, </answer> and the end are taught, wrong moves are not.
        wanted = [1.0] * 9 + walked.scored[i, :length].float().tolist() + [1.0, 1.0]
        assert weight[i].tolist() == wanted + [0.0] * (steps - length)
    assert (~walked.scored).any()  # the draw did hold detours


def test_padded_batch_scores_like_exact_packs(
    skeleton: Path, words: Vocabulary, table: MazeTable
) -> None:
    """What follows a completion's end changes nothing before it."""
    model = load_bagel(skeleton).model
    patches = table.patches("cpu")
    banks = {size: Bank(table.train[size], "cpu") for size in (3, 4)}

    def mean_loss(size: int, steps: int, row: int) -> torch.Tensor:
        index = torch.tensor([row])
        walked = walk(banks[size], index, steps, 0.0, torch.Generator())
        template = Template(
            words, [Group(size, TEACHER, 1)], side=SIDE, steps={size: steps}, device="cpu"
        )
        pictures = maze_pictures(banks[size], index, patches, torch.zeros_like(index))
        batch, weights = template.fill([pictures], [words.completions(banks[size], index, walked)])
        assert weights is not None
        logits = model.language_model.lm_head(model(batch)[batch.score_rows])
        ce = torch.nn.functional.cross_entropy(logits, batch.score_labels, reduction="none")
        return (ce * weights).sum() / weights.sum()

    with torch.no_grad():
        for size in (3, 4):
            bank = banks[size]
            exact = int(bank.distance[0, bank.start[0]])
            torch.testing.assert_close(
                mean_loss(size, exact, 0), mean_loss(size, exact + 5, 0), atol=1e-5, rtol=1e-5
            )


def test_batch_maker_keeps_the_mixture(words: Vocabulary, table: MazeTable) -> None:
    """Noise only in teachers' VTs and at its rate; weights are means over each kind of row."""
    banks = {size: Bank(table.train[size], "cpu") for size in (3, 4)}
    patches = table.patches("cpu")
    mixture = pretrain.Mixture(text=0.1, noise=0.45, detour=0.1)
    maker = pretrain.BatchMaker(words, banks, patches, mixture, batch_size=200, seed=0)
    batch, text, vt = maker.make()
    assert text.sum() == pytest.approx(1.0) and vt.sum() == pytest.approx(1.0)
    assert not ((text > 0) & (vt > 0)).any()
    groups = maker.template.groups
    assert [(g.size, g.kind, g.count) for g in groups] == [
        (3, STUDENT, 10), (3, TEACHER, 90), (4, STUDENT, 10), (4, TEACHER, 90),
    ]  # fmt: skip
    known = {p.numpy().tobytes() for p in patches.flatten(0, 2)}
    images = iter(batch.vit_patches.split(batch.vit_lens))
    noisy = 0
    for group in groups:
        for _ in range(group.count):
            assert all(p.numpy().tobytes() in known for p in next(images))
            if group.kind == TEACHER:
                drawn = [p.numpy().tobytes() in known for p in next(images)]
                assert all(drawn) or not any(drawn)
                noisy += not any(drawn)
    assert 60 < noisy < 120  # 90 expected of 180
    assert not torch.equal(batch.text_ids, maker.make()[0].text_ids)


# ------------------------------------------------------------------------------ the command


def test_accuracy_counts_valid_paths(
    monkeypatch: pytest.MonkeyPatch, skeleton: Path, words: Vocabulary, table: MazeTable
) -> None:
    bank = Bank(table.heldout[4], "cpu")
    plans = [nav.solve(maze_of(board)) for board in table.heldout[4].tolist()]

    class Made:
        def __init__(self, ids: tuple[int, ...]) -> None:
            self.ids = ids

    def every_other(model: Any, prompt: Any, *args: Any, **kwargs: Any) -> list[Made]:
        answers = [",".join(p or "") if i % 2 else "L" for i, p in enumerate(plans)]
        return [Made(words.encode(f"<answer>{a}</answer><|im_end|>")) for a in answers]

    monkeypatch.setattr(pretrain, "generate", every_other)
    model = load_bagel(skeleton).model
    result = pretrain.accuracy(model, words, {4: bank}, table.patches("cpu")[0], STUDENT)
    right = len(plans) // 2 / len(plans)
    assert result == {"all": right, "4x4": right}


def test_command_trains_and_writes_a_release_folder(tmp_path: Path) -> None:
    npz, out = str(tmp_path / "mazes.npz"), tmp_path / "base"
    flags = ["--mazes-per-size", "40", "--heldout-rows", "6", "--sizes", "3,4"]
    assert pretrain.main(["--export-table", npz, *flags]) == 0
    train = ["--table", npz, "--out", str(out), "--device", "cpu", "--batch-size", "8"]
    train += ["--steps", "4", "--log-every", "1", "--eval-every", "2", "--warmup-steps", "1"]
    assert pretrain.main(train) == 0
    lines = [json.loads(line) for line in (tmp_path / "base.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert [line["step"] for line in lines if "accuracy" in line] == [2]
    assert set(lines[-1]["final"]) and lines[-1]["step"] == 4
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "config.json", "llm_config.json", "merges.txt", "model.safetensors",
        "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "vit_config.json",
        "vocab.json",
    ]  # fmt: skip
    assert sum(p.stat().st_size for p in out.iterdir()) < 12e6
    bundle = load_bagel(out)
    assert bundle.config.vit_max_patches_per_side == SIDE
    assert bundle.config.vision.num_hidden_layers == 2 and not bundle.config.visual_gen
    new = ["--out", str(tmp_path / "x")]
    for words, message in (
        (train, "exists; choose another --out or pass --overwrite"),
        (["--table", npz, *new, "--text-share", "0"], "--text-share 0.0 and --noise-share"),
        (["--out", npz, "--export-table", npz], "give either --out DIR .* or --export-table FILE"),
        # Neither replaces what is there.
        (["--export-table", npz], "exists; choose another, or pass --overwrite"),
        ([*new, "--log", npz], "exists; choose another, or pass --overwrite"),
    ):
        with pytest.raises(ValueError, match=message):
            pretrain.main(words)
    assert not (tmp_path / "x").exists()


def test_the_demo_replaces_only_what_a_demo_made(tmp_path: Path) -> None:
    results = tmp_path / "eval" / "base" / "summary.json"  # of an ordinary evaluation
    results.parent.mkdir(parents=True)
    results.write_text("{}")
    with pytest.raises(ValueError, match=r"--out .* holds eval, which no demo seems to have made"):
        demo.clear(tmp_path)
    assert results.exists()
    demo.clear(tmp_path / "out")
    (tmp_path / "out" / "eval").mkdir()
    demo.clear(tmp_path / "out")
    assert not (tmp_path / "out" / "eval").exists()
    with pytest.raises(ValueError, match="cannot write there"):
        demo.clear(results / "x")
