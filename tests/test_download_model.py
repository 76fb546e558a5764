# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""download_model.py, with the hub's client replaced and once against a small hub of our own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

import download_model
from data.dataset_info import DATASETS
from download_model import RELEASE_FILES, main

ROOT = Path(__file__).resolve().parent.parent
SHA = "0123456789abcdef0123456789abcdef01234567"
CONTENT = {
    "model.safetensors": b"w" * 100,
    "ae.safetensors": b"a" * 50,
    **dict.fromkeys(("llm_config.json", "vit_config.json", "tokenizer_config.json"), b"{}"),
    "vocab.json": b"{}",
    "merges.txt": b"#",
    "README.md": b"card",
    "pytorch_model.bin": b"not wanted",
}
WANTED = {name: data for name, data in CONTENT.items() if not name.endswith(".bin")}


class FakeHub:
    """Stands in for HfApi and snapshot_download; repositories are dicts of file contents."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.repos: dict[str, dict[str, bytes]] = {download_model.DEFAULT_REPO: dict(CONTENT)}
        self.calls: list[dict[str, Any]] = []
        self.listing_error: BaseException | None = None
        self.download_error: Exception | None = None
        self.lost: set[str] = set()  # files that the download leaves half written
        api = SimpleNamespace(model_info=self.info, dataset_info=self.info)
        monkeypatch.setattr(download_model, "HfApi", lambda: api)
        monkeypatch.setattr(download_model, "snapshot_download", self.download)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def info(self, repo_id: str, revision: str | None = None, files_metadata: bool = False) -> Any:
        assert files_metadata
        if self.listing_error:
            raise self.listing_error
        files = self.repos[repo_id].items()
        return SimpleNamespace(
            sha=SHA, siblings=[SimpleNamespace(rfilename=n, size=len(d)) for n, d in files]
        )

    def download(
        self, repo_id: str, local_dir: Path, allow_patterns: list[str], **rest: Any
    ) -> None:
        self.calls.append({"repo_id": repo_id, "local_dir": local_dir, **rest})
        if self.download_error:
            raise self.download_error
        for name, data in self.repos[repo_id].items():
            if any(Path(name).match(pattern) for pattern in allow_patterns):
                (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
                (local_dir / name).write_bytes(data[:-1] if name in self.lost else data)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    monkeypatch.chdir(tmp_path)
    return FakeHub(monkeypatch)


def fails(*argv: str) -> str:
    """Run the command and expect a user's mistake, which `run_main` prints as one line."""
    with pytest.raises(ValueError) as caught:
        main(argv)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def test_defaults(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    (call,) = hub.calls
    assert call["repo_id"] == "ThinkMorph/ThinkMorph-7B"
    assert call["local_dir"] == Path("models/ThinkMorph-7B")
    assert call["revision"] == SHA and call["repo_type"] == "model"
    assert call["force_download"] is False
    got = {file.name: file.read_bytes() for file in Path("models/ThinkMorph-7B").iterdir()}
    assert got == WANTED
    assert f"complete: {len(WANTED)} files" in capsys.readouterr().out


def test_flags(hub: FakeHub, tmp_path: Path) -> None:
    hub.repos["ByteDance-Seed/BAGEL-7B-MoT"] = {
        name.replace("model.safetensors", "ema.safetensors"): data for name, data in CONTENT.items()
    }
    argv = ["--repo-id", "ByteDance-Seed/BAGEL-7B-MoT", "--save-dir", str(tmp_path / "here")]
    assert main([*argv, "--no-resume"]) == 0
    assert main([*argv, "--resume"]) == 0
    assert [call["force_download"] for call in hub.calls] == [True, False]
    assert (tmp_path / "here" / "ema.safetensors").is_file()


def test_the_list_is_what_a_release_holds(tiny_bagel_path: Path) -> None:
    names = {file.name for file in tiny_bagel_path.iterdir()}
    download_model.check_list("tiny", "model", names)
    for group in RELEASE_FILES:
        with pytest.raises(ValueError, match="lacks " + " or ".join(group)):
            download_model.check_list("tiny", "model", names - set(group))


def test_incomplete_repository(hub: FakeHub) -> None:
    del hub.repos[download_model.DEFAULT_REPO]["ae.safetensors"]
    assert "lacks ae.safetensors" in fails()
    assert hub.calls == [], "nothing is downloaded before the list is checked"


def test_sizes_are_compared(hub: FakeHub) -> None:
    hub.lost = {"model.safetensors", "vocab.json"}
    hub.repos[download_model.DEFAULT_REPO]["vocab.json"] = b"{"
    message = fails()
    assert "model.safetensors has 99 bytes, the hub's 100" in message and "--no-resume" in message
    assert "vocab.json has no bytes" in message and "merges.txt" not in message


def test_disk_too_small(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")._replace(free=60)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "make room" in fails()
    folder = Path("models/ThinkMorph-7B")
    (folder / "model.safetensors").write_bytes(b"w" * 100)  # only the rest is still to come
    hub.repos[download_model.DEFAULT_REPO]["ae.safetensors"] = b"a"
    assert main([]) == 0


def test_what_a_killed_download_left_is_removed(
    hub: FakeHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's client begins a partial file anew under another name."""
    left = Path("models/ThinkMorph-7B/.cache/huggingface/download/sub/a=.b.c0ffee.incomplete")
    left.parent.mkdir(parents=True)
    left.write_bytes(b"w" * 90)
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage._replace(free=100 + 90 * (not left.exists()))
    )
    assert main([]) == 0
    assert "earlier download left incomplete" in capsys.readouterr().out and not left.exists()
    assert hub.calls[0]["force_download"] is False


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--save-dir", "file"], "--save-dir file: cannot write there (File exists)"),
        (["--save-dir", "file/below/it"], "cannot write there (Not a directory)"),
        (["--save-dir", "broken"], "--save-dir broken: cannot write there"),  # a link to nowhere
        (["--datasets", "--data-root", "file"], "--data-root file/Visual_Search: cannot write"),
        (["--repo-id", "ThinkMorph/ThinkMorph-7B", "--datasets", "Chess"], "unknown data sets"),
    ],
)
def test_places_are_judged_before_the_network(
    hub: FakeHub, flags: list[str], expected: str
) -> None:
    hub.listing_error = AssertionError("asked")
    Path("file").write_text("")
    Path("broken").symlink_to("nowhere")
    assert expected in fails(*flags)


@pytest.mark.parametrize("flag", ["--save-dir", "--data-root"])
@pytest.mark.parametrize("text", ["", " ", "~nobody-of-this-name/x"])
def test_no_places(hub: FakeHub, capsys: pytest.CaptureFixture[str], flag: str, text: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main([flag, text])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and f"argument {flag}: must " in said
    assert not text.strip() or text in said


def test_a_folder_without_permission(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    hub.listing_error = AssertionError("asked")
    monkeypatch.setattr(os, "mkdir", refuse)  # root may write everywhere
    assert "models/ThinkMorph-7B: cannot write there (Permission denied)" in fails()


def test_home_is_expanded(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert main(["--save-dir", "~/model"]) == 0
    assert hub.calls[0]["local_dir"] == tmp_path / "home" / "model"


def test_advice_for_mirrors(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    for error in (
        RuntimeError("CAS service error : HTTP status client error (401 Unauthorized)"),
        HfHubHTTPError("403 Forbidden", response=_response(403)),
        KeyError("location"),  # whatever a client of another version raises
    ):
        hub.download_error = error
        message = fails()
        assert "HF_HUB_DISABLE_XET=1" in message and "https://mirror.example" in message


def _response(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (LocalEntryNotFoundError("Got: ConnectError"), "Check the network"),
        (OfflineModeIsEnabled("offline mode"), "Check the network"),
        (HfHubHTTPError.__mro__[1]("Name or service not known"), "Check the network"),
        (ConnectionRefusedError(111, "refused"), "Check the network"),
        (TimeoutError(110, "timed out"), "Check the network"),
        (RuntimeError("hf_xet: connection closed"), "Check the network"),
        (OSError(28, "No space left on device"), "cannot write models"),
        (HfHubHTTPError("503 unavailable", response=_response(503)), "Try again later"),
        (RepositoryNotFoundError("404", response=_response(404)), "check the name"),
        (GatedRepoError("403", response=_response(403)), "hf auth login"),
    ],
)
@pytest.mark.parametrize("where", ["listing_error", "download_error"])
def test_hub_errors(error: Exception, expected: str, where: str, hub: FakeHub) -> None:
    setattr(hub, where, error)
    message = fails()
    assert expected in message and "ThinkMorph" in message


def test_offline_variable_and_bad_name(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.listing_error = HFValidationError("Repo id must be in the form 'namespace/name'")
    assert "no repository name (OWNER/NAME)" in fails("--repo-id", "a b/c/d")
    hub.listing_error = OfflineModeIsEnabled("offline mode")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "unset it" in fails()


# -- data sets --------------------------------------------------------------------------------


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Records the data.check calls; one on a folder named Chart_Refocus fails."""
    recorded: list[list[str]] = []

    def run(command: list[str], **kwargs: Any) -> Any:
        recorded.append(command)
        assert kwargs["cwd"] == ROOT
        return SimpleNamespace(returncode=int(command[-1].endswith("Chart_Refocus")))

    monkeypatch.setattr(subprocess, "run", run)
    return recorded


def _add_datasets(hub: FakeHub) -> None:
    for info in DATASETS.values():
        hub.repos[info.repo_id] = {"data/train-00000-of-00001.parquet": b"p" * 9, "README.md": b"r"}


def test_datasets(
    hub: FakeHub,
    checks: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    _add_datasets(hub)
    monkeypatch.setenv("VISUAL_OPSD_DATA_ROOT", str(tmp_path / "root"))
    assert "data.check found errors in Chart_Refocus" in fails("--datasets")
    assert [(call["repo_id"], call["repo_type"]) for call in hub.calls] == [
        ("ThinkMorph/Visual_Search", "dataset"),
        ("ThinkMorph/Spatial_Navigation", "dataset"),
        ("ThinkMorph/Jigsaw_Assembly", "dataset"),
        ("ThinkMorph/Chart_Refocus", "dataset"),
    ]
    folders = [tmp_path / "root" / name for name in DATASETS]
    assert checks == [[sys.executable, "-m", "data.check", str(folder)] for folder in folders]
    for folder in folders:
        assert (folder / "data" / "train-00000-of-00001.parquet").is_file()


def test_dataset_flags(
    hub: FakeHub,
    checks: list[list[str]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    hub.repos["me/mine"] = {"train.parquet": b"p"}
    argv = ["--datasets", "Visual_Search", "--data-root", str(tmp_path / "other")]
    assert main([*argv, "--dataset-repo", "Visual_Search=me/mine"]) == 0
    assert [call["repo_id"] for call in hub.calls] == ["me/mine"]
    assert f"export VISUAL_OPSD_DATA_ROOT={tmp_path / 'other'}" in capsys.readouterr().out
    assert (tmp_path / "other" / "Visual_Search" / "train.parquet").is_file()
    hub.repos["me/mine"] = {"README.md": b"nothing here"}
    both = ["--repo-id", download_model.DEFAULT_REPO, "--dataset-repo", "Visual_Search=me/mine"]
    assert "holds no parquet file (found README.md)" in fails(*argv, *both)
    assert hub.calls[-1]["repo_id"] == download_model.DEFAULT_REPO
    assert "unknown data sets Chess; known: Visual_Search" in fails("--datasets", "Chess")
    assert "is not NAME=" in fails(*argv, "--dataset-repo", "Visual_Search")


# -- the real client against a hub on this machine ----------------------------------------------


class _Hub(BaseHTTPRequestHandler):
    """The four requests that listing and fetching a repository make."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        if path.startswith("/api/models/me/") and "/tree/" in path:
            self._json([{"type": "file", "path": n, **self._file(n)} for n in CONTENT])
        elif path.startswith(("/api/models/me/model", "/api/models/me/slow")):
            siblings = [{"rfilename": name, **self._file(name)} for name in CONTENT]
            self._json({"id": "me/model", "sha": SHA, "siblings": siblings})
        elif path.startswith("/me/slow/resolve/") and self.command == "GET":
            time.sleep(60)
        elif path.startswith(("/me/model/resolve/", "/me/slow/resolve/")):
            self._reply(200, CONTENT[path.rsplit("/", 1)[1]])
        else:
            self._reply(404, b"{}", **{"X-Error-Code": "RepoNotFound"})

    @staticmethod
    def _file(name: str) -> dict[str, Any]:
        return {
            "size": len(CONTENT[name]),
            "oid": hashlib.sha1(CONTENT[name]).hexdigest(),
            "blobId": hashlib.sha1(CONTENT[name]).hexdigest(),
        }

    def _json(self, value: Any) -> None:
        self._reply(200, json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def _reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        tag = hashlib.sha1(body).hexdigest()
        for key, value in {"X-Repo-Commit": SHA, "ETag": f'"{tag}"', **headers}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_with_the_real_client(endpoint: str, tmp_path: Path) -> None:
    def start(url: str, repo_id: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(ROOT / "download_model.py"), "--repo-id", repo_id]
        environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home")}
        for name in ("HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            environment.pop(name, None)
        return subprocess.Popen(
            [*command, "--save-dir", str(tmp_path / "model")],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(url: str, repo_id: str) -> subprocess.CompletedProcess[str]:
        process = start(url, repo_id)
        output, errors = process.communicate(timeout=60)
        return subprocess.CompletedProcess([], process.returncode, output, errors)

    slow = start(endpoint, "me/slow")
    while slow.poll() is None and not list((tmp_path / "model").rglob("*.incomplete")):
        time.sleep(0.05)
    slow.send_signal(signal.SIGINT)  # its threads wait for files
    _, said = slow.communicate(timeout=10)
    assert slow.returncode == 130 and "the same command continues" in said
    assert "Traceback" not in said

    done = run(endpoint, "me/model")
    assert done.returncode == 0, done.stderr
    got = {f.name: f.read_bytes() for f in (tmp_path / "model").iterdir() if f.is_file()}
    assert got == WANTED
    assert not list((tmp_path / "model").rglob("*.incomplete"))
    absent = run(endpoint, "me/other")
    assert absent.returncode == 1 and "check the name" in absent.stderr
    assert absent.stderr.startswith("error: ") and absent.stderr.count("\n") == 1
    down = run("http://127.0.0.1:9", "me/model")
    assert down.returncode == 1 and "Check the network" in down.stderr
    assert "Traceback" not in absent.stderr + down.stderr
    shutil.rmtree(tmp_path / "home", ignore_errors=True)
    (tmp_path / "home").write_text("")
    shutil.rmtree(tmp_path / "model")
    odd = run(endpoint, "me/model")  # HF_HOME is a file: told in a line, or not needed
    assert odd.returncode == 0 or odd.stderr.count("\n") == 1, odd.stderr
