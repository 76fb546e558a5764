# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
r"""JSON lines: one JSON object a line, read and written by one rule.

Only "\n" ends a line; U+2028, U+0085, form feeds and their like are text of a record. A LOG is a
file we wrote ourselves: the line that a killed process left unfinished, or that a disk spoilt, is
left out, named in a warning, and blocks nothing. In a file that somebody GIVES it is an error.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from io import FileIO
from pathlib import Path
from typing import Any

from modeling.host.disk import disk_errors

logger = logging.getLogger(__name__)

Record = dict[str, Any]
# Whether a record is wanted; KeyError, TypeError or ValueError: it is none of this file's.
Keep = Callable[[Record], bool]

_SHOWN = 3


def encode(record: Mapping[str, Any]) -> bytes:
    """The line of a record. A lone surrogate, which UTF-8 lacks, becomes JSON's escape of it."""
    text = json.dumps(record, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def append_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add records in one write: once this returns, a kill of the process does not lose them.

    A last line without its end, left by a killed process, is ended if it is whole, else dropped.

    Raises:
        ValueError: the file cannot be written (no space, no permission, the folder is gone).
    """
    lines = b"".join(map(encode, records))
    with _writing(path), path.open("ab+", buffering=0) as stream:
        if stream.seek(0, os.SEEK_END):
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                lines = _mended(stream) + lines
        rest = memoryview(lines)
        while rest:
            rest = rest[stream.write(rest) :]


def _mended(stream: FileIO) -> bytes:
    """What ends the last line of a file; nothing after that line was cut off."""
    stream.seek(0)
    text = stream.readall()
    start = text.rfind(b"\n") + 1
    try:
        _parse(text[start:])
    except ValueError:
        stream.truncate(start)
        return b""
    return b"\n"


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of records, whole or not at all."""
    _replace(path, map(encode, records))


def read_given(path: str | Path, what: str) -> Iterator[tuple[int, Record]]:
    """Records of somebody's file with the numbers of their lines (from 1); blank lines are none.

    Args:
        what: a record of this file, as in "completion".

    Raises:
        ValueError: the file cannot be read, or a line is no JSON object; names it.
    """
    for number, line in _lines(Path(path)):
        try:
            record = _parse(line)
        except ValueError as error:
            cut = "" if line.endswith(b"\n") else "; the file ends in the middle of it"
            raise ValueError(f"{path} line {number} holds no {what}: it is {error}{cut}") from error
        yield number, record


def read_log(path: Path, keep: Keep = lambda record: True) -> list[Record]:
    """Records of a file of our own, those that `keep` wants.

    Raises:
        ValueError: the file cannot be read at all (absent, a folder, no permission).
    """
    return [record for _, record in _kept(path, keep)]


def filter_log(path: Path, keep: Keep) -> int:
    """Rewrite a file of our own with the lines that `keep` wants; returns how many it dropped.

    A file that is not there stays so. Lines are kept byte by byte, the file replaced in one rename.

    Raises:
        ValueError: the file cannot be read or written.
    """
    if not os.path.lexists(path):
        return 0
    total = sum(1 for _ in _lines(path))
    return total - _replace(path, (line for line, _ in _kept(path, keep)))


def _kept(path: Path, keep: Keep) -> Iterator[tuple[bytes, Record]]:
    """(line, record) of the wanted lines of a log; then a warning if others were damaged."""
    damaged = []
    for number, line in _lines(path):
        try:
            record = _parse(line)
        except ValueError as error:
            if line.endswith(b"\n"):  # else the one a killed process was writing
                damaged.append(f"line {number} is {error}")
            continue
        try:
            wanted = keep(record)
        except (KeyError, TypeError, ValueError) as error:
            damaged.append(f"line {number} is no record of this file: {error!r}")
            continue
        if wanted:
            yield line if line.endswith(b"\n") else line + b"\n", record
    if damaged:
        more = f"; and {len(damaged) - _SHOWN} more" if len(damaged) > _SHOWN else ""
        logger.warning("%s: left out: %s%s", path, "; ".join(damaged[:_SHOWN]), more)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank. Raises ValueError: the file cannot be read."""
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):  # bytes are split at b"\n" only
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, line
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def _parse(line: bytes) -> Record:
    """Raises ValueError: what the line is instead of a JSON object."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start})") from error
    except RecursionError:
        raise ValueError("not JSON (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object but a {type(value).__name__}")
    return value


def _replace(path: Path, lines: Iterable[bytes]) -> int:
    """Write a file, whole or not at all; returns the number of lines."""
    temporary = path.with_name(path.name + ".tmp")
    count = 0
    with _writing(path):
        try:
            with temporary.open("wb") as stream:
                for line in lines:
                    count += 1
                    stream.write(line)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    return count


def _writing(path: Path) -> AbstractContextManager[None]:
    return disk_errors(f"writing {path}", path.parent)
