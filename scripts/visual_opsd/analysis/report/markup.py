# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Text of unknown origin as HTML, and numbers as a reader wants them."""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Iterable

# Left alone among the characters of the categories below.
_KEPT = "\n\t\u200d"  # the joiner holds emoji together
# Control, format (they turn the direction of writing, or hide), surrogates, unassigned.
_SHOWN_AS_CODE = ("Cc", "Cf", "Cs", "Cn", "Co")


def text(value: object, most: int = 2000) -> str:
    """A value as HTML text that is also safe within a quoted attribute.

    Characters that nobody sees, or that turn the text around them, become their code points;
    beyond `most` characters the middle is left out.
    """
    plain = str(value)
    if len(plain) > most:
        half = most // 2
        plain = f"{plain[:half]} [... {len(plain) - 2 * half} characters ...] {plain[-half:]}"
    if not plain.isascii() or not plain.isprintable():
        plain = "".join(map(_visible, plain))
    return html.escape(plain, quote=True)


def _visible(character: str) -> str:
    if character in _KEPT or unicodedata.category(character) not in _SHOWN_AS_CODE:
        return character
    return f"[U+{ord(character):04X}]"


def short(value: float, *, is_share: bool = False, digits: int = 4) -> str:
    """A number with at most so many digits that count; a share as per cent."""
    if not math.isfinite(value):
        return str(value)
    if is_share:
        return f"{100 * value:.{digits}g} %"
    if abs(value) >= 1e4 and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}".replace("e-0", "e-").replace("e+0", "e+").replace("e+", "e")


def table(
    header: Iterable[str], rows: Iterable[Iterable[str]], caption: str = "", *, kind: str = ""
) -> str:
    """A table of cells that are HTML already; the first cell of each row is its head.

    kind: "values" for cells that hold more than numbers.
    """
    lines = [f'<div class=wide><table class="{kind}">']
    if caption:
        lines.append(f"<caption>{caption}</caption>")
    lines.append(
        "<thead><tr>" + "".join(f"<th scope=col>{c}</th>" for c in header) + "</tr></thead>"
    )
    lines.append("<tbody>")
    for first, *others in rows:
        cells = "".join(f"<td>{cell}</td>" for cell in others)
        lines.append(f"<tr><th scope=row>{first}</th>{cells}</tr>")
    lines.append("</tbody></table></div>")
    return "\n".join(lines)
