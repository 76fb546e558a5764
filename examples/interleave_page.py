# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""A folder that shows how an answer came about: pictures, the answer, and one HTML page.

The page needs nothing from outside its folder. It is written anew after every part, so that it
can be read while the model works, and what exists is kept when the run is interrupted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from pathlib import Path

from PIL import Image

from modeling.host.programs import make_folder

PAGE, ANSWER, PROBLEM = "index.html", "answer.txt", "problem.png"
NOT_YET = "not there yet: the model is at work, or was interrupted"
_EARLIER = re.compile(rf"round_\d+\.png|{PAGE}|{ANSWER}|{PROBLEM}")

_STYLE = """
:root { color-scheme: light dark; }
body { max-width: 46rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.6 sans-serif; }
h2 { margin: 2rem 0 .5rem; font-size: 1.1rem; border-bottom: 1px solid #8888; }
p { white-space: pre-wrap; overflow-wrap: anywhere; }
figure { margin: 1rem 0; }
img { display: block; max-width: 100%; height: auto; border: 1px solid #8888; }
figcaption, footer { font-size: .85rem; opacity: .75; }
.answer p { font-size: 1.2rem; font-weight: bold; }
"""


def check_folder(folder: Path, overwrite: bool) -> None:
    """Make the page's folder; raises ValueError if it cannot be, or holds a page already."""
    make_folder(folder, "--out")
    held = sorted(file.name for file in folder.iterdir() if _EARLIER.fullmatch(file.name))
    if held and not overwrite:
        raise ValueError(
            f"--out {folder} holds {', '.join(held)}; choose another, or pass --overwrite to "
            "replace the page"
        )


def picture_name(number: int) -> str:
    return f"round_{number}.png"


def _figure(file: str, size: tuple[int, int], caption: str) -> str:
    width, height = size
    return (
        f'<figure><img src="{file}" width="{width}" height="{height}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}, {width} x {height}</figcaption></figure>"
    )


class InterleavePage:
    """Writes round_1.png ..., answer.txt and index.html, part by part.

    What an earlier page left in the folder is removed first; other files stay.

    Args:
        folder: is there (`check_folder`).
        problem: saved as problem.png.
        question: as the user put it.
        facts: what the page's last line says about the run.
    """

    def __init__(
        self, folder: Path, problem: Image.Image, question: str, facts: Mapping[str, object]
    ) -> None:
        self.folder, self.question, self.facts = folder, question, dict(facts)
        self.parts: list[str | tuple[int, int]] = []
        self.problem_size = problem.size
        for file in folder.iterdir():
            if _EARLIER.fullmatch(file.name) and file.is_file():
                file.unlink()
        problem.save(folder / PROBLEM)
        self._write(NOT_YET)

    @property
    def texts(self) -> list[str]:
        return [part for part in self.parts if isinstance(part, str)]

    @property
    def drawn(self) -> int:
        return len(self.parts) - len(self.texts)

    def add(self, part: str | Image.Image) -> Path | None:
        """Append what the model wrote or drew; the file of a picture."""
        path = None
        if isinstance(part, str):
            self.parts.append(part)
        else:
            path = self.folder / picture_name(self.drawn + 1)
            part.save(path)
            self.parts.append(part.size)
        self._write(NOT_YET)
        return path

    def finish(self, answer: str | None) -> Path:
        """Write the answer (None: an empty answer.txt), and the page for the last time."""
        text = "" if answer is None else answer + "\n"
        (self.folder / ANSWER).write_text(text, encoding="utf-8", errors="replace")
        return self._write("none: the text holds no answer" if answer is None else answer)

    def _write(self, answer: str) -> Path:
        page = self.folder / PAGE
        page.write_text(self._html(answer), encoding="utf-8", errors="replace")
        return page

    def _html(self, answer: str) -> str:
        lines = [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Interleaved reasoning</title><style>{_STYLE}</style></head><body>",
            "<h1>Interleaved reasoning</h1>",
            "<section><h2>Problem</h2>",
            _figure(PROBLEM, self.problem_size, "problem image"),
            f"<p>{escape(self.question)}</p>",
        ]
        drawn, title = 0, "Round 1"
        for part in self.parts:
            if title:
                lines.append(f"</section><section><h2>{title}</h2>")
                title = ""
            if isinstance(part, str):
                lines.append(f"<p>{escape(part)}</p>")
            else:
                drawn += 1
                lines.append(_figure(picture_name(drawn), part, f"drawn in round {drawn}"))
                title = f"Round {drawn + 1}"
        noted = "; ".join(f"{name} {value}" for name, value in self.facts.items())
        lines += [
            f'</section><section class="answer"><h2>Answer</h2><p>{escape(answer)}</p></section>',
            f"<footer><p>{escape(noted)}</p></footer></body></html>",
        ]
        return "\n".join(lines) + "\n"
