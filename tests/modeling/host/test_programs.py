# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""How every command ends, whatever happens to its files, its terminal or its pipes."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modeling.host.programs import check_new, make_folder, run_main

ROOT = Path(__file__).resolve().parents[3]


def ends(monkeypatch: pytest.MonkeyPatch, main: Callable[[], Any]) -> Any:
    """The code with which `run_main` ends; an error it lets through is raised."""
    monkeypatch.setattr("os._exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        run_main(main)
    return ended.value.code


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("too tall"), 1, "error: too tall\n"),
        (FileNotFoundError(2, "No such file", "a.json"), 1, "error: a.json: No such file\n"),
        (PermissionError(13, "Permission denied", "a"), 1, "error: a: Permission denied\n"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "aaa"), 1, "error: aaa: File name t"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: No space left .*make room"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (SystemExit(2), 2, ""),
        (SystemExit("words"), 1, "words\n"),
    ],
)
def test_mistakes_are_one_line(
    error: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ends(monkeypatch, raising(error)) == code
    err = capsys.readouterr().err
    assert re.match(said, err) and err.count("\n") <= 1


@pytest.mark.parametrize(
    "error",
    [
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        json.JSONDecodeError("Expecting value", "", 0),
        OSError(errno.EBADF, "Bad file descriptor"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        RuntimeError("ours"),
        KeyError("ours"),
    ],
)
def test_faults_of_ours_keep_their_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of a library that names no file is one: who reads the file has to say which."""
    with pytest.raises(type(error)):
        run_main(raising(error))


def test_streams(tmp_path: Path) -> None:
    """Closed pipes, full disks, closed streams and ASCII terminals: no traceback, no noise."""
    script = tmp_path / "p.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from modeling.host.programs import run_main\n"
        "flush = 'flush' in sys.argv\n"
        "def main():\n"
        "    for _ in range(3000):\n"
        "        print('\u2192 \u00b1 caf\u00e9 \\udce9 ' * 9, flush=flush)\n"
        "    print('\u2192 \u00b1', file=sys.stderr)\n"
        "    open('made', 'w').write('x')\n"
        "    return 0\n"
        "run_main(main)\n",
        encoding="utf-8",
    )
    run = f"{sys.executable} {script}"
    commands = {  # the shell's line, and the codes it may end with
        f"{run} | head -c 1 >out; exit ${{PIPESTATUS[0]}}": (141, ""),
        f"{run} flush | head -c 1 >out; exit ${{PIPESTATUS[0]}}": (141, ""),
        f"{run} >/dev/full": (1, r"error: No space left on device: .*\n"),
        f"{run} flush >/dev/full": (1, r"error: No space left on device: .*\n"),
        f"{run} >&-": (1, r"(\? \?\n|.*\u2192.*\n)?error: standard output is closed\n"),
        f"{run} >out 2>&-": (0, ""),
        f"LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {run} >out": (0, r".*\n"),
        f"PYTHONIOENCODING=ascii {run} flush >out": (0, r".*\n"),
    }
    running = {}
    for number, command in enumerate(commands):
        here = tmp_path / str(number)
        here.mkdir()
        running[command] = subprocess.Popen(
            ["bash", "-c", command], cwd=here, stderr=subprocess.PIPE, text=True,
            env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
        )  # fmt: skip
    for command, process in running.items():
        code, said = commands[command]
        err = process.communicate(timeout=120)[1]
        assert process.returncode == code, (command, err)
        assert re.fullmatch(said, err), (command, err)


def test_places(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"^--out .*file/a: cannot write there \(Not a directory"):
        make_folder(tmp_path / "file" / "a", "--out")
    with pytest.raises(ValueError, match="File name too long"):
        make_folder(tmp_path / ("a" * 400), "--out")
    make_folder(tmp_path / "new" / "folder", "--out")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    with pytest.raises(ValueError, match=r"^--json .*file exists; .*--overwrite"):
        check_new(tmp_path / "file", "--json")
    check_new(tmp_path / "file", "--json", overwrite=True)
    check_new(tmp_path / "other", "--json")
    for path, message in (("new", "is a folder"), ("none/x", "its folder does not exist")):
        with pytest.raises(ValueError, match=message):
            check_new(tmp_path / path, "--json")
    with pytest.raises(ValueError, match="File name too long"):
        check_new(tmp_path / ("a" * 400), "--json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "new"]


@pytest.mark.parametrize("folder", ["data", "scripts", "examples", "."])
def test_every_command_ends_there(folder: str) -> None:
    """What runs as a program hands its `main` to `run_main`."""
    pattern = "*.py" if folder == "." else "**/*.py"
    for path in (ROOT / folder).glob(pattern):
        text = path.read_text(encoding="utf-8")
        if '\nif __name__ == "__main__":' in text:
            assert text.rstrip().endswith("run_main(main)"), path
