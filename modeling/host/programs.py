# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""What every command shares: bounds of numbers, paths with `~`, output places, and how it ends."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import math
import os
import select
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

MAX_SEED = 2**63 - 1


# ------------------------------------------------------------------------------------ values


def bounds_problem(
    value: float,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> str | None:
    """ "must be at least 1 and ..., got 0" if a number is not finite or beyond a bound."""
    within = (
        (isinstance(value, int) or math.isfinite(value))  # an int may be too large for a float
        and (above is None or value > above)
        and (at_least is None or value >= at_least)
        and (below is None or value < below)
        and (at_most is None or value <= at_most)
    )
    if within:
        return None
    named = {"above": above, "at least": at_least, "below": below, "at most": at_most}
    wanted = " and ".join(f"{name} {_short(b)}" for name, b in named.items() if b is not None)
    return f"must be {wanted or 'a finite number'}, got {value}"


def _short(bound: float) -> str:
    return f"{bound:g}" if isinstance(bound, float) else str(bound)


def number(kind: type[int] | type[float], **bounds: float) -> Callable[[str], Any]:
    """An argparse type: a number within `bounds` (those of `bounds_problem`)."""

    def parse(text: str) -> int | float:
        value = kind(text)
        problem = bounds_problem(value, **bounds)
        if problem:
            raise argparse.ArgumentTypeError(problem)
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


SEED = number(int, at_least=0, at_most=MAX_SEED)


def valid_text(text: str) -> str:
    """The text as UTF-8 says it, where an ASCII locale handed it over as single bytes.

    Raises:
        ValueError: its bytes are no UTF-8; the message begins with "must be".
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise ValueError(f"must be text in UTF-8, got {text!r}") from None


def expand_path(text: str) -> str:
    """A path with its `~` expanded.

    Raises:
        ValueError: it is empty, no text, or of an unknown user's home; begins with "must".
    """
    if not text.strip():
        raise ValueError("must not be empty: name a file or folder ('.' is the working directory)")
    if "\0" in text or text != valid_text(text):
        raise ValueError(f"must be a path in UTF-8 without NUL, got {text!r}; in an ASCII locale "
                         "set PYTHONUTF8=1")  # fmt: skip
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise ValueError(f"must name a home folder that exists, got {text!r}; a file called so "
                         f"is ./{text}")  # fmt: skip
    return expanded


def path_argument(text: str) -> str:
    """An argparse type: `expand_path`."""
    try:
        return expand_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


# ------------------------------------------------------------------------------------ places


def make_folder(folder: str | Path, flag: str) -> None:
    """Make an output folder and see that files can be written there.

    Raises:
        ValueError: it cannot be; names `flag` and the reason.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable-"):
            pass
    except OSError as error:
        raise ValueError(
            f"{flag} {folder}: cannot write there ({error.strerror}); choose another folder"
        ) from error


def check_new(file: str | Path, flag: str, *, overwrite: bool = False) -> None:
    """See that a file can be written without spoiling an earlier one.

    Raises:
        ValueError: it exists and `overwrite` is False, or it cannot be written; names `flag`.
    """
    file = Path(file)
    try:
        if file.is_dir():
            raise ValueError(f"{flag} {file} is a folder; name a file")
        if file.exists() and not overwrite:
            raise ValueError(f"{flag} {file} exists; choose another, or pass --overwrite")
        if not file.absolute().parent.is_dir():
            raise ValueError(f"{flag} {file}: its folder does not exist; make it first")
    except OSError as error:
        raise ValueError(f"{flag} {file}: {error.strerror}; choose another place") from error
    make_folder(file.absolute().parent, flag)


# ------------------------------------------------------------------------------------ the end


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run a command and leave: every entry point's last line.

    A user's mistake (ValueError, or an OSError that names a file) becomes one line on stderr and
    exit code 1; Ctrl-C 130; a reader of stdout that went away 141, without a word. What a terminal
    cannot show is replaced. Other errors are faults of ours and keep their traceback.
    """
    _prepare_streams()
    try:
        code = main()
    except BaseException as error:
        ended = _exit_code(error)
        if ended is None:
            raise
        sys.exit(_written(ended))
    leave(code or 0)


def leave(code: int) -> NoReturn:
    """End this process at once, with everything it printed written out.

    After collectives the ordinary end of the interpreter is not safe: a gloo thread that is late
    to release a tensor then asks for the interpreter, is refused, and aborts the process
    ("terminate called without an active exception", in some per cent of the runs on a busy CPU).
    What must be closed (files, wandb, data workers) is closed by its owner before.
    """
    os._exit(_written(code))


def _exit_code(error: BaseException) -> int | None:
    """What the process ends with, after its line on stderr; None: a fault of ours."""
    if isinstance(error, SystemExit):
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
            return 1
        return error.code or 0
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    if isinstance(error, BrokenPipeError) and (_is_gone(sys.stdout) or _is_gone(sys.stderr)):
        return 141
    line = _line(error)
    if line is None:
        return None
    print("; ".join([f"error: {line}", *getattr(error, "__notes__", [])]), file=sys.stderr)
    return 1


def _line(error: BaseException) -> str | None:
    """What to say of a user's mistake or a full disk."""
    if isinstance(error, OSError):
        if error.filename is not None:
            return f"{error.filename}: {error.strerror}"
        if error.errno == errno.EBADF and isinstance(getattr(sys.stdout, "name", None), int):
            return "standard output is closed"
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return f"{error.strerror}: make room on the disk that is written to" if full else None
    # Errors of the libraries name no file: whoever reads one has to say which.
    if isinstance(error, ValueError) and not isinstance(error, UnicodeError | json.JSONDecodeError):
        return str(error)
    return None


def _is_gone(stream: TextIO) -> bool:
    """Whether the reader of a pipe has closed it."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):  # no file behind it
        return False


def _written(code: int) -> int:
    """Write out what was printed; the exit code, which is not 0 if that cannot be done."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                code = 141  # as if SIGPIPE had ended it
            elif code == 0:
                code = 1
                with contextlib.suppress(OSError):
                    print(f"error: {_line(error) or error}", file=sys.stderr, flush=True)
            with contextlib.suppress(OSError):  # the interpreter's own flush must not fail too
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


def _prepare_streams() -> None:
    """Closed streams get a place, so that no file takes their number; no character is an error."""
    for name, mode in (("stdin", os.O_RDONLY), ("stdout", os.O_RDONLY), ("stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:  # to print into a closed stdout is to lose it: an error
            place = os.open(os.devnull, mode)
            setattr(sys, name, os.fdopen(place, "r" if name == "stdin" else "w", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        # surrogateescape is the C locale's
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")
