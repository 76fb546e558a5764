# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The miniature's tokenizer: Qwen2's byte-level BPE over a few dozen words.

The vocabulary is constructed, not counted: 256 bytes, then for each word of the demo's strings the
merges that make it one token. Tags are single tokens (but not special, so they stay in decoded
text, as in the releases' plain-text tags); the sequence markers are special tokens.

    python -m scripts.miniworld.tokenizer --out DIR
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import AddedToken, Qwen2Tokenizer

from data.sequence import Prompts
from data.worlds.spatial_navigation import lite_strings
from modeling.host.programs import make_folder, path_argument
from modeling.release.tokenizer import MARKERS
from scripts.visual_opsd.cli import run_main

DEMO_PROMPTS = Path(__file__).parents[2] / "examples" / "demo" / "prompts.yaml"
END_OF_TEXT = "<|endoftext|>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<image_start>", "<image_end>")


def byte_alphabet() -> list[str]:
    """The printable stand-ins of the 256 byte values, in byte order, as GPT-2's BPE has them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def _segment(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """The pieces BPE leaves of a word: the earliest merge first, until none applies."""
    pieces = list(word)
    while len(pieces) > 1:
        pairs = list(itertools.pairwise(pieces))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        merged: list[str] = []
        while pieces:
            if tuple(pieces[:2]) == best:
                merged.append("".join(best))
                del pieces[:2]
            else:
                merged.append(pieces.pop(0))
        pieces = merged
    return pieces


def build_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Merges under which every word becomes one token.

    Each word, as the merges so far leave it, gets the merges that join its pieces from the left.
    Later merges rank below, so they cannot take apart a word that is whole already.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = _segment(word, ranks)
        while len(pieces) > 1:
            ranks[(pieces[0], pieces[1])] = len(ranks)
            pieces = _segment(word, ranks)
    return sorted(ranks, key=lambda pair: ranks[pair])


def demo_strings(prompts: Prompts) -> list[str]:
    """Every string of the demo whose words must be single tokens."""
    fixed = (prompts.system, prompts.intro, prompts.transition)
    return [*(text for text in fixed if text), *lite_strings()]


def _words(strings: Iterable[str]) -> list[str]:
    """Distinct words as Qwen2's pre-tokenizer splits them, in order of appearance."""
    splitter = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    return list(dict.fromkeys(w for s in strings for w, _ in splitter.pre_tokenize_str(s)))


def _added(tokens: Sequence[str], first_id: int) -> dict[int, AddedToken]:
    return {
        first_id + i: AddedToken(token, special=token not in TAGS, normalized=False)
        for i, token in enumerate(tokens)
    }


def write_tokenizer(out: str | Path, strings: Iterable[str]) -> int:
    """Write vocab.json, merges.txt, tokenizer.json and tokenizer_config.json.

    Args:
        out: existing folder.
        strings: texts whose words become single tokens.

    Returns:
        The number of tokens, added ones included.
    """
    out = Path(out)
    merges = build_merges(_words(strings))
    tokens = list(dict.fromkeys([*byte_alphabet(), *(a + b for a, b in merges)]))
    vocab = {token: i for i, token in enumerate(tokens)}
    added = _added((END_OF_TEXT, *MARKERS, *TAGS), len(vocab))
    qwen2: Any = Qwen2Tokenizer  # its stub knows merges as strings only
    tokenizer = qwen2(vocab=vocab, merges=merges)  # adds END_OF_TEXT first
    for token in added.values():  # one by one: the order fixes the ids
        tokenizer.add_tokens([token], special_tokens=token.special)
    assert {i: t.content for i, t in tokenizer.added_tokens_decoder.items()} == {
        i: t.content for i, t in added.items()
    }
    (out / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (out / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(i): {
                "content": t.content,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": t.special,
            }
            for i, t in added.items()
        },
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": MARKERS[1],
        "errors": "replace",
        "model_max_length": 4096,
        "pad_token": END_OF_TEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return len(vocab) + len(added)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.miniworld.tokenizer", description="Write the tiny tokenizer."
    )
    parser.add_argument("--out", type=path_argument, required=True, help="folder to write to")
    parser.add_argument(
        "--prompts",
        type=path_argument,
        default=str(DEMO_PROMPTS),
        help="YAML of the demo's prompts",
    )
    args = parser.parse_args(argv)
    prompts = Prompts.from_yaml(args.prompts)
    make_folder(args.out, "--out")
    count = write_tokenizer(args.out, demo_strings(prompts))
    print(f"wrote {count} tokens to {args.out}")
    return 0


if __name__ == "__main__":
    run_main(main)
