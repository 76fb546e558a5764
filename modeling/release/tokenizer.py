# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""The Qwen2 tokenizer of a release and the ids of its four sequence markers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modeling.bagel.config import SpecialTokens
from modeling.host.text_files import read_json_object, read_text

_OBJECTS = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "added_tokens.json",
    "special_tokens_map.json", "chat_template.json",
)  # fmt: skip
_TEXTS = ("merges.txt", "chat_template.jinja")
_FIX = "fetch the tokenizer files of the release again"
MARKERS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")


def load_tokenizer(folder: str | Path) -> tuple[Any, SpecialTokens]:
    """The tokenizer of a checkpoint folder, with the four markers as special tokens; their ids.

    Raises:
        ValueError: neither tokenizer.json nor vocab.json and merges.txt are there, or a file is
            damaged; names the file.
    """
    from transformers import AddedToken, Qwen2Tokenizer  # a second that --help need not take

    folder = Path(folder)
    has_pair = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if not has_pair and not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"{folder} holds no tokenizer: vocab.json and merges.txt (or tokenizer.json) are "
            "missing; copy them from the base release"
        )
    try:
        tokenizer = Qwen2Tokenizer.from_pretrained(str(folder))
    except Exception as error:  # of json, tokenizers or transformers; none names its file
        raise _explain(folder, error) from error
    if not (folder / "tokenizer.json").is_file():
        _check_merges(folder)
    missing = [marker for marker in MARKERS if marker not in tokenizer.get_vocab()]
    added = [AddedToken(marker, special=True, normalized=False) for marker in missing]
    tokenizer.add_tokens(added, special_tokens=True)
    return tokenizer, SpecialTokens(*(tokenizer.convert_tokens_to_ids(m) for m in MARKERS))


def _explain(folder: Path, error: Exception) -> ValueError:
    """The error about the first file that is damaged, or about all of them together."""
    try:
        for name in _OBJECTS:
            if (folder / name).is_file():
                read_json_object(folder / name, "tokenizer file", fix=_FIX)
        for name in _TEXTS:
            if (folder / name).is_file():
                read_text(folder / name, "tokenizer file", fix=_FIX)
    except ValueError as found:
        return found
    cause = (" ".join(str(error).split()) or type(error).__name__)[:200]
    present = [name for name in (*_OBJECTS, *_TEXTS) if (folder / name).is_file()]
    return ValueError(f"{folder}: no tokenizer comes of {', '.join(present)} ({cause}); {_FIX}")


def _check_merges(folder: Path) -> None:
    """Every token of vocab.json but single bytes and special ones is made by a merge.

    A merges.txt that was cut at the end of a line still loads: it cuts all text into other tokens.
    """
    vocabulary = read_json_object(folder / "vocab.json", "tokenizer file", fix=_FIX)
    lines = read_text(folder / "merges.txt", "tokenizer file", fix=_FIX).split("\n")
    made = {line.rstrip("\r").replace(" ", "", 1) for line in lines}
    lost = [
        token
        for token in vocabulary
        if len(token) > 1 and token not in made and not (token[0] == "<" and token[-1] == ">")
    ]
    if lost:
        raise ValueError(
            f"tokenizer file {folder / 'merges.txt'} lacks the merges of {len(lost)} tokens of "
            f"vocab.json, such as {lost[0]!r}: it was cut short, or is another model's; {_FIX}"
        )
