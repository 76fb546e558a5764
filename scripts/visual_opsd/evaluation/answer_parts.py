# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Where a text says its answer, once markup and spelling are out of the way: for lenient readings.

Characters and tags are looked for in the whole text, the rest in `LONGEST` characters of it, so
that a text of any length is read at once.
"""

from __future__ import annotations

import html
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from scripts.visual_opsd.evaluation.scoring import plain_characters

Read = TypeVar("Read")

# ------------------------------------------------------------------------- characters and markup

_SUPERSCRIPTS = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207a\u207b]+")
_UNSEEN = re.compile("[\ufe00-\ufe0f\u20e3]")  # variation selectors, the frame of a keycap
_PUNCTUATION = str.maketrans(
    "\u3002\u3001\u2010\u2011\u2012\u2013\u2014\u2019\u2018\u201c\u201d\u300c\u300d\u3010\u3011"
    "\u300a\u300b\u00ab\u00bb\u2022\u00b7\u22c5",
    '.,-----\'\'""()()()""   ',
)
_TEX = [
    (re.compile(rule), by)
    for rule, by in (
        (r"\\([%$&#_])", r"\1"),
        (r"\{,\}|\\!", ","),
        (r"\\[,;: ]", " "),
        (r"\\(?:left|right)\s?(?=[()\[\]|.\\])", ""),
        (r"\\(?:[lL]ong)?[rR]ightarrow|\\to(?![a-z])", "\u2192"),
        (r"\\(?:[lL]ong)?[lL]eftarrow", "\u2190"),
        (r"\\[uU]parrow", "\u2191"),
        (r"\\[dD]ownarrow", "\u2193"),
        (r"\\(?:times|cdot)(?![a-z])", "\u00d7"),
        (r"\\[dt]?frac\s?\{([^{}]{0,40})\}\s?\{([^{}]{0,40})\}", r"\1/\2"),
        (r"\^\s?\{([^{}]{0,40})\}", r"^\1"),
        (r"\\f?box(?:ed)?\s?\{", "\\\\boxed{"),
        (r"\\(?!boxed)[a-zA-Z]{1,20}\*?\s?\{([^{}]{0,400})\}", r" \1 "),
        (r"\\(?!boxed)[a-zA-Z]{1,20}\*?\s?\{([^{}]{0,400})\}", r" \1 "),  # one in another
        # Boxes with no word of their own between them are one statement ("\boxed{A} or \boxed{B}").
        (r"\}([\s,;/&$]{0,6}(?:(?:or|and)[\s$]{1,6})?)\\boxed\{", r" \1 "),
        (r"\\boxed\{([^{}]{0,4000})\}", r"\nanswer: \1\n"),
        (r"\\boxed\{", r"\nanswer: "),
        (r"\\(?:displaystyle|textstyle|qquad|quad|bf|rm|it|approx|sim)(?![a-z])", " "),
        (r"[\\{}]", " "),
    )
]
_MARKDOWN = [
    (re.compile(rule, re.MULTILINE), by)
    for rule, by in (
        (r"~~[^~\n]{0,400}~~|<(del|strike)>[^<\n]{0,400}</\1>", " "),  # struck out
        (r"</?(?:[a-z]|[A-Za-z][^<>\n]{1,60})>", " "),
        (r"^ {0,3}(?:#{1,6}|>) (?=[\w*(\\$])", ""),
        (r"\*{2,}|(?<![A-Za-z0-9])\*|\*(?![A-Za-z0-9])|`", " "),
        (r"(?<![A-Za-z0-9])_+|_+(?![A-Za-z0-9])", " "),
    )
]


def visible(text: str) -> str:
    text = _SUPERSCRIPTS.sub(lambda m: "^" + unicodedata.normalize("NFKC", m[0]), text)
    text = re.sub("[\u2460-\u2473]", lambda m: f"{ord(m[0]) - 0x245F}.", text)  # circled numbers
    text = re.sub("\u2212\\s?(?=\\d)", "-", text)
    text = re.sub("[\u00b7\u22c5](?=\\s?10)", "\u00d7", text)
    return _UNSEEN.sub("", plain_characters(text)).translate(_PUNCTUATION)


def readable(text: str) -> str:
    """Without TeX and Markdown; the content of a \\boxed{} becomes a line "answer: ..."."""
    for pattern, by in [*_TEX, *_MARKDOWN] if "\\" in text or "{" in text else _MARKDOWN:
        text = pattern.sub(by, text)
    # The blanks that this left; between digits they may separate numbers.
    return re.sub(r"(?<!\d) {2,8}| {2,8}(?!\d)", " ", text)


# ------------------------------------------------------------------------- where the answer stands

LONGEST = 4000  # characters that an answer is looked for in: the first in tags, else the last
_CUES = 16  # places of a text that are tried, the last ones

_TAG = re.compile(
    r"[<\[]\s{0,3}([/\\]?)\s{0,3}(?:final[ _-]?)?(?:answer|ans)\s{0,3}[/|]?\s{0,3}[>\]]", re.I
)


@dataclass(frozen=True)
class Part:
    """A part of a text that may hold the answer. `stated`: all of it is given as the answer
    (it stands in tags); otherwise only what is said to be."""

    text: str
    stated: bool

    def whole(self, text: str, words: int = 4) -> str:
        """`text` (this part's, maybe rewritten) if all of it is an answer: stated or short; else
        its last line if that is short, else ""."""
        if self.stated or is_short(text, words):
            return text
        last = text.strip().rpartition("\n")[2]
        return last if is_short(last, words) else ""


def answer_parts(text: str) -> Iterator[Part]:
    """Where the answer is looked for, in this order, in readable form.

    The last closed pair of tags, in any spelling, and nothing else; or the last tag left open (its
    first line, then all of it); or what stands before a closing tag; or the text, without a
    finished <think>.
    """
    text = visible(html.unescape(text))
    tags = list(_TAG.finditer(text))
    opened = [
        (text[tag.end() : after.start() if after else None].strip(), after is not None and after[1])
        for tag, after in itertools.zip_longest(tags, tags[1:])
        if not tag[1]
    ]
    closed = [content for content, end in opened if end]
    begun = [content for content, _ in opened if content]
    if closed:
        yield Part(readable(closed[-1][:LONGEST]), True)
    elif begun:
        content = readable(begun[-1][:LONGEST]).strip()
        first = content.partition("\n")[0]
        if first != content:
            yield Part(first, True)
        yield Part(content, True)
    else:
        if tags:
            text = text[: tags[0].start()]
        after = text.rpartition("</think>")[2]
        yield Part(readable((after if after.strip() else text).strip()[-LONGEST:]), False)


def read_parts(text: str, read: Callable[[Part], set[Read]]) -> set[Read]:
    """What the first part that says anything says."""
    return next(filter(None, map(read, answer_parts(text))), set())


# "the answer is", "Answer:", "my choice would be", a \boxed{}: what follows is given as the answer.
CUE = re.compile(
    r"\b(?:answer|choice|solution|result)\b(?:\s[^.\n:=?!]{0,60}?)?(?:\s(?:is|be|was)\b|\s?[:=])"
    r"[\s:=]{0,8}"
    r"|\b(?:answer|choice)\s{1,3}(?=[(\[\"']{0,3}(?:[A-Z]\b|[-+]?\d))"
    r"|\b(?:correct|right|best|final|my)\s(?:option|letter|one|pick|selection)\s?(?:is\b|:|=)\s?"
    r"|\b(?:choose|chose|select|pick|go(?:ing)?\swith|opt\sfor|vote\sfor)\s"
    r"|\u7b54\u6848\s?(?:\u5e94\u8be5\u662f|\u662f|\u4e3a|:)?\s?|\u9009(?:\u62e9|\u9879)?\s?:?",
    re.I,
)
_SENTENCE_END = re.compile(r"[.!?;](?=\s|$)|\n")
# What begins a sentence that asks or supposes instead of stating.
_ASKS = re.compile(
    r"(?:^|[.!?;:,]\s|\n)\W{0,4}(?:(?:(?:but|and|so)\s)?(?P<if>if|suppose|assuming|unless|whether)"
    r"|(?:is|was|are|can|could|would|should|might|does))\s[^.!?;\n]{0,60}$",
    re.I,
)


def said(text: str, cue: re.Pattern[str] = CUE) -> Iterator[tuple[int, int]]:
    """Where what is given as the answer begins and its sentence ends, the last one first."""
    for found in reversed(list(cue.finditer(text))[-_CUES:]):
        end = _SENTENCE_END.search(text, found.end())
        asks = _ASKS.search(text[max(0, found.start() - 80) : found.start()])
        if asks and (asks["if"] or (end and end[0] == "?")):
            continue
        yield found.end(), end.start() if end else len(text)


def is_short(text: str, words: int = 4) -> bool:
    return len(text) <= 80 and len(text.split()) <= words


NOT = re.compile(
    r"(?:\bnot|n't|\bcannot|\bneither|\bnor|\bnever|\bexcept|\bexclud(?:e|ed|es|ing)|\brather than|"
    r"\binstead of|\bother than|\bunlike(?:ly)?|\b(?:anything|everything|all) but|\bno|\bnon-|"
    r"\b(?:rul(?:e|ed|es|ing) out|(?:eliminat|discard)(?:e|ed|es|ing)|reject(?:ed|s|ing)?|doubt|"
    r"hardly|opposite of|wrong:|incorrect:|nicht|kein|pas)|[\u00ac\u2260]|!=|(?:^|\s)!|"
    r"\u4e0d\u662f|\u5e76\u975e|\u4e0d\u9009|\u6392\u9664|\u975e)"
    r"(?:\s(?:think|believe|say|choose|select|pick|it|it's|that|is|be|the|answer|option|choice|"
    r"letter|correct|right|a|an|to|go|with|necessarily|likely|for)){0,6}[\s(\[\"':]{0,3}$",
    re.I,
)
BECAUSE = re.compile(r"\b(?:because|since|due to|given that)\b|\u56e0\u4e3a", re.I)
