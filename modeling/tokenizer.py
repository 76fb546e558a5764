# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The Qwen2 tokenizer of a release and the ids of its four sequence markers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AddedToken, Qwen2Tokenizer

from modeling.bagel.config import SpecialTokens

MARKERS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")


def add_special_tokens(tokenizer: Any) -> tuple[SpecialTokens, int]:
    """Make sure the four markers are special tokens; returns their ids and how many were added."""
    known = tokenizer.get_vocab()
    missing = [marker for marker in MARKERS if marker not in known]
    if missing:
        tokenizer.add_tokens(
            [AddedToken(m, special=True, normalized=False) for m in missing], special_tokens=True
        )
    return SpecialTokens(*(tokenizer.convert_tokens_to_ids(m) for m in MARKERS)), len(missing)


def load_tokenizer(folder: str | Path) -> tuple[Any, SpecialTokens]:
    """Load the tokenizer files of a checkpoint folder.

    Raises:
        ValueError: neither tokenizer.json nor vocab.json and merges.txt are there.
    """
    folder = Path(folder)
    has_pair = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if not has_pair and not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"{folder} holds no tokenizer: vocab.json and merges.txt (or tokenizer.json) are "
            "missing; copy them from the base release"
        )
    tokenizer = Qwen2Tokenizer.from_pretrained(str(folder))
    special, _ = add_special_tokens(tokenizer)
    return tokenizer, special
