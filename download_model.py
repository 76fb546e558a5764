# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Fetch a checkpoint or the ThinkMorph data sets from the Hugging Face hub, and check them.

    python download_model.py                                        # ThinkMorph-7B
    python download_model.py --repo-id ByteDance-Seed/BAGEL-7B-MoT
    python download_model.py --datasets                             # the four data sets

When the command is repeated, complete files are kept; one that was interrupted starts anew (the
hub's client does not continue it, and what is left of it is removed). Afterwards the file list and
every size are compared with the hub's. Exit code 1 and one message on any problem. With a mirror
(HF_ENDPOINT) that stalls or refuses large files set HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import NoReturn

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from data.dataset_info import DATA_ROOT_VARIABLE, DATASETS, DEFAULT_DATA_ROOT, data_root
from modeling.host.disk import check_room
from modeling.host.programs import make_folder, path_argument, run_main

DEFAULT_REPO = "ThinkMorph/ThinkMorph-7B"
KNOWN_REPOS = (DEFAULT_REPO, "ByteDance-Seed/BAGEL-7B-MoT")

# What a release folder needs, each with the alternatives that will do.
RELEASE_FILES = (
    ("model.safetensors", "ema.safetensors", "model.safetensors.index.json"),
    ("ae.safetensors",),
    ("llm_config.json",),
    ("vit_config.json",),
    ("tokenizer_config.json",),
    ("vocab.json",),
    ("merges.txt",),
)
PATTERNS = {
    "model": ("*.safetensors", "*.json", "*.txt", "*.md", "*.jinja", "LICENSE*", "NOTICE*"),
    "dataset": ("*.parquet", "*.md"),
}


def list_files(
    repo_id: str, repo_type: str, revision: str | None
) -> tuple[str | None, dict[str, int | None]]:
    """The commit of a repository, and the sizes of its files that are wanted."""
    is_model = repo_type == "model"
    describe = HfApi().model_info if is_model else HfApi().dataset_info
    info = describe(repo_id, revision=revision, files_metadata=True)
    sizes = {
        file.rfilename: file.size
        for file in info.siblings or ()
        if any(fnmatch(file.rfilename, pattern) for pattern in PATTERNS[repo_type])
    }
    return info.sha, sizes


def check_list(repo_id: str, repo_type: str, names: Collection[str]) -> None:
    """Raise ValueError if a repository lacks files that a checkpoint or a data set needs."""
    if repo_type == "model":
        lacking = [" or ".join(group) for group in RELEASE_FILES if not set(group) & set(names)]
        if lacking:
            raise ValueError(
                f"{repo_id} is not a complete BAGEL-type release: it lacks {', '.join(lacking)}. "
                f"Choose one that is, such as {' or '.join(KNOWN_REPOS)}"
            )
    elif not any(name.endswith(".parquet") for name in names):
        raise ValueError(
            f"the data set {repo_id} holds no parquet file (found {', '.join(names) or 'nothing'})"
            "; give the right repository with --dataset-repo NAME=OWNER/REPOSITORY"
        )


def fetch(
    repo_id: str,
    folder: Path,
    flag: str,
    *,
    repo_type: str = "model",
    revision: str | None = None,
    resume: bool = True,
) -> None:
    """Download one repository into the folder that `flag` names.

    Raises:
        ValueError: a folder or disk that cannot take it, no network, no such repository or no
            access, files missing on the hub, or a file whose size differs afterwards.
    """
    make_folder(folder, flag)
    print(f"fetching {repo_id} into {folder}", flush=True)
    with _explained(repo_id, folder, revision):
        commit, sizes = list_files(repo_id, repo_type, revision)
        _remove_partial_files(folder)
    check_list(repo_id, repo_type, sizes)
    total = sum(size or 0 for size in sizes.values())
    present = sum(_size(folder / name) or 0 for name in sizes)
    check_room(folder, total - present, f"what {folder} still lacks")
    with _explained(repo_id, folder, revision):
        snapshot_download(
            repo_id,
            repo_type=repo_type,
            revision=commit,  # the very files that were listed
            local_dir=folder,
            allow_patterns=list(PATTERNS[repo_type]),
            force_download=not resume,
        )
    wrong = [
        f"{name} has {_size(folder / name) or 'no'} bytes, the hub's {size}"
        for name, size in sizes.items()
        if size is not None and _size(folder / name) != size
    ]
    if wrong:
        raise ValueError(
            f"{folder} is incomplete or was changed: {'; '.join(wrong)}. Run the same command "
            "again; if it repeats, add --no-resume to fetch everything afresh"
        )
    print(f"complete: {len(sizes)} files, {total / 1e9:.2f} GB, sizes as on the hub", flush=True)


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def _remove_partial_files(folder: Path) -> None:
    # Each attempt of the hub's client writes under a name of its own; a killed one leaves it.
    partial = list((folder / ".cache" / "huggingface" / "download").rglob("*.incomplete"))
    if partial:
        size = sum(file.stat().st_size for file in partial)
        print(f"removing {size / 1e9:.1f} GB of files that an earlier download left incomplete")
        for file in partial:
            file.unlink()


@contextmanager
def _explained(repo_id: str, folder: Path, revision: str | None) -> Iterator[None]:
    # The client's HTTP library and hf_xet, which carries the large files, have errors of their own.
    try:
        yield
    except Exception as error:
        at = f" at {revision}" if revision else ""
        raise ValueError(_explain(repo_id + at, folder, error)) from error


def _explain(name: str, folder: Path, error: Exception) -> str:
    """Cause and fix of an error that the hub's client or the file system raised, in one line."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if isinstance(error, HFValidationError):
        return f"{name!r} is no repository name (OWNER/NAME): {reason}"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return f"cannot fetch {name}: HF_HUB_OFFLINE forbids the hub's client the network; unset it"
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
        return (
            f"{endpoint} has no {name} that you may read: check the name; for a private or gated "
            "one accept its terms on its page and run `hf auth login`"
        )
    local = isinstance(error, OSError) and (error.errno or 0) > 0  # no address for a name: < 0
    if local and not isinstance(error, ConnectionError | TimeoutError):
        return f"cannot write {folder} or the hub's cache (HF_HOME): {error}"
    advice = (
        "Try again later; with status 401, 403 or 429 log in first (`hf auth login`)"
        if getattr(error, "response", None) is not None
        else "Check the network; behind a proxy set HTTPS_PROXY, for a mirror HF_ENDPOINT; or run "
        f"this command on another machine and copy its folder to {folder}"
    )
    return (
        f"fetching {name} from {endpoint} failed ({type(error).__name__}: {reason}). {advice}. If "
        "only large files stall or fail, as with some mirrors, set HF_HUB_DISABLE_XET=1"
    )


def chosen_datasets(args: argparse.Namespace) -> dict[str, str]:
    """Name -> repository of the data sets that the flags name; ValueError for unknown ones."""
    repos = {name: info.repo_id for name, info in DATASETS.items()}
    for pair in args.dataset_repo:
        name, _, repo_id = pair.partition("=")
        if name not in repos or not repo_id:
            raise ValueError(
                f"--dataset-repo {pair!r} is not NAME=OWNER/REPOSITORY with a NAME among "
                f"{', '.join(repos)}"
            )
        repos[name] = repo_id
    unknown = [name for name in args.datasets if name not in repos]
    if unknown:
        raise ValueError(f"unknown data sets {', '.join(unknown)}; known: {', '.join(repos)}")
    return {name: repos[name] for name in args.datasets or repos}


def fetch_datasets(args: argparse.Namespace, repos: Mapping[str, str], root: Path) -> None:
    """Download data sets and run data.check on each; ValueError if it rejects one."""
    rejected = []
    for name, repo_id in repos.items():
        folder = root / name
        fetch(repo_id, folder, "--data-root", repo_type="dataset", resume=args.resume)
        command = [sys.executable, "-m", "data.check", str(folder.resolve())]
        if subprocess.run(command, cwd=Path(__file__).resolve().parent, check=False).returncode:
            rejected.append(name)
    if rejected:
        raise ValueError(
            f"data.check found errors in {', '.join(rejected)} (see its tables above); the release "
            "may have changed its columns, which data/thinkmorph.py lists"
        )
    if os.environ.get(DATA_ROOT_VARIABLE) != str(root):
        print(f"now: export {DATA_ROOT_VARIABLE}={root.resolve()}")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repo-id", help=f"checkpoint to fetch: {' (default) or '.join(KNOWN_REPOS)}"
    )
    parser.add_argument(
        "--save-dir", type=path_argument, help="folder of the checkpoint (default: models/NAME)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the checkpoint")
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep complete files (the default); --no-resume fetches every file afresh",
    )
    parser.add_argument(
        "--datasets",
        nargs="*",
        metavar="NAME",
        help=f"fetch data sets (all, or those named: {', '.join(DATASETS)}) and run data.check "
        "on each; the checkpoint is then fetched only if --repo-id is given too",
    )
    parser.add_argument(
        "--data-root",
        type=path_argument,
        help=f"folder of the data sets (default: {DATA_ROOT_VARIABLE}, else {DEFAULT_DATA_ROOT})",
    )
    parser.add_argument(
        "--dataset-repo",
        action="append",
        default=[],
        metavar="NAME=OWNER/REPOSITORY",
        help="fetch a data set from another repository (may be repeated)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    # Every mistake in the flags is found before gigabytes are fetched.
    root = data_root(args.data_root)
    repos = {} if args.datasets is None else chosen_datasets(args)
    if args.datasets is None or args.repo_id is not None:
        repo_id = DEFAULT_REPO if args.repo_id is None else args.repo_id
        folder = Path(args.save_dir or Path("models") / repo_id.split("/")[-1])
        fetch(repo_id, folder, "--save-dir", revision=args.revision, resume=args.resume)
        print(folder)
    if repos:
        fetch_datasets(args, repos, root)
    return 0


def _leave(*_: object) -> NoReturn:
    # At once: the client would first finish the files that its threads are fetching.
    os.write(2, b"\ninterrupted; the same command continues with what is not complete\n")
    os._exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, _leave)
    run_main(main)
