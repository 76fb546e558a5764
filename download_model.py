# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Fetch a checkpoint or the ThinkMorph data sets from the Hugging Face hub, and check them.

    python download_model.py                                        # ThinkMorph-7B
    python download_model.py --repo-id ByteDance-Seed/BAGEL-7B-MoT
    python download_model.py --datasets                             # the four data sets

An interrupted download continues where it stopped when the command is repeated. Afterwards the
file list and every size are compared with the hub's. Exit code 1 and one message on any problem.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from data.dataset_info import DATA_ROOT_VARIABLE, DATASETS, DEFAULT_DATA_ROOT, data_root

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
MODEL_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.md", "*.jinja", "LICENSE*", "NOTICE*")
DATASET_PATTERNS = ("*.parquet", "*.md")

# The hub client's HTTP library changed between its versions; the base classes of its own error
# name the right one (and OSError, which its offline and cache errors are). hf_xet, which carries
# the large files, raises RuntimeError.
_HUB_ERRORS: tuple[type[Exception], ...] = (
    *(k for k in HfHubHTTPError.__mro__ if issubclass(k, Exception) and k is not Exception),
    RuntimeError,
)


def check_release_list(repo_id: str, names: Sequence[str]) -> None:
    """Raise ValueError if a repository lacks files that a checkpoint folder needs."""
    lacking = [" or ".join(group) for group in RELEASE_FILES if not set(group) & set(names)]
    if lacking:
        raise ValueError(
            f"{repo_id} is not a complete BAGEL-type release: it lacks {', '.join(lacking)}. "
            f"Choose one that is, such as {' or '.join(KNOWN_REPOS)}"
        )


def check_parquet_list(repo_id: str, names: Sequence[str]) -> None:
    """Raise ValueError if a repository holds no parquet file."""
    if not any(name.endswith(".parquet") for name in names):
        raise ValueError(
            f"the data set {repo_id} holds no parquet file (found {', '.join(names) or 'nothing'})"
            "; give the right repository with --dataset-repo NAME=OWNER/REPOSITORY"
        )


def check_sizes(folder: Path, sizes: Mapping[str, int | None]) -> None:
    """Raise ValueError naming the files that are absent or differ in size from the hub's."""
    wrong = []
    for name, expected in sorted(sizes.items()):
        file = folder / name
        if not file.is_file():
            wrong.append(f"{name} is absent")
        elif expected is not None and file.stat().st_size != expected:
            wrong.append(f"{name} has {file.stat().st_size} bytes, the hub's {expected}")
    if wrong:
        raise ValueError(
            f"{folder} is incomplete or was changed: {'; '.join(wrong)}. Run the same command "
            "again; if it repeats, add --no-resume to fetch everything afresh"
        )


def fetch(
    repo_id: str,
    folder: Path,
    *,
    repo_type: str = "model",
    revision: str | None = None,
    resume: bool = True,
) -> dict[str, int | None]:
    """Download one repository into `folder` and check it; returns file -> size on the hub.

    Raises:
        ValueError: no network, no such repository or no access, files missing on the hub, the
            disk too full, or a file whose size differs afterwards.
    """
    is_model = repo_type == "model"
    patterns = MODEL_PATTERNS if is_model else DATASET_PATTERNS
    check_list: Callable[[str, Sequence[str]], None]
    check_list = check_release_list if is_model else check_parquet_list
    try:
        api = HfApi()
        describe = api.model_info if is_model else api.dataset_info
        info = describe(repo_id, revision=revision, files_metadata=True)
        sizes = {
            file.rfilename: file.size
            for file in info.siblings or ()
            if any(fnmatch(file.rfilename, pattern) for pattern in patterns)
        }
        check_list(repo_id, list(sizes))
        _check_space(folder, sizes)
        snapshot_download(
            repo_id,
            repo_type=repo_type,
            revision=info.sha,  # the very files whose sizes were listed
            local_dir=folder,
            allow_patterns=list(patterns),
            force_download=not resume,
        )
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ValueError(
            f"the hub has no {repo_type} {repo_id}" + (f" at {revision}" if revision else "")
            + " that you may read: check the name; for a private or gated one accept its terms on "
            "its page and run `hf auth login`"
        ) from error  # fmt: skip
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no repository name (OWNER/NAME): {error}") from error
    except _HUB_ERRORS as error:
        raise ValueError(_explain(repo_id, folder, error)) from error
    check_sizes(folder, sizes)
    return sizes


def _check_space(folder: Path, sizes: Mapping[str, int | None]) -> None:
    present = [folder / name for name in sizes if (folder / name).is_file()]
    needed = sum(size or 0 for size in sizes.values()) - sum(f.stat().st_size for f in present)
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ValueError(
            f"{folder} needs {needed / 1e9:.1f} GB more but its disk has {free / 1e9:.1f} GB free; "
            "make room or choose another place (--save-dir, --data-root)"
        )


def _explain(repo_id: str, folder: Path, error: Exception) -> str:
    """Cause and fix of an error that the hub's client or the file system raised."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return (
            f"cannot fetch {repo_id}: HF_HUB_OFFLINE is set, so the hub's client does not use the "
            "network; unset it"
        )
    response = getattr(error, "response", None)
    if response is not None:
        return (
            f"the hub refused {repo_id}: {reason}. Try again later; with status 401, 403 or 429 "
            "log in first (`hf auth login`)"
        )
    local = isinstance(error, OSError) and error.errno is not None
    if local and not isinstance(error, ConnectionError | TimeoutError):
        return f"cannot write {folder}: {error}"
    return (
        f"fetching {repo_id} from {endpoint} failed ({type(error).__name__}: {reason}). Check the "
        "network; behind a proxy set HTTPS_PROXY, for a mirror set HF_ENDPOINT. Without network, "
        f"run this command on another machine and copy its folder to {folder}"
    )


def fetch_model(args: argparse.Namespace) -> None:
    """Download and check the checkpoint that the flags name."""
    repo_id = args.repo_id or DEFAULT_REPO
    folder = args.save_dir or Path("models") / repo_id.split("/")[-1]
    print(f"fetching {repo_id} into {folder}", flush=True)
    sizes = fetch(repo_id, folder, revision=args.revision, resume=args.resume)
    print(f"complete: {len(sizes)} files, {_gigabytes(sizes)}, sizes as on the hub\n{folder}")


def fetch_datasets(args: argparse.Namespace) -> None:
    """Download the data sets that the flags name and run data.check on each.

    Raises:
        ValueError: as `fetch`, an unknown name, or a data set that data.check rejects.
    """
    repos = {name: info.repo_id for name, info in DATASETS.items()}
    for pair in args.dataset_repo:
        name, separator, repo_id = pair.partition("=")
        if not separator or name not in repos or not repo_id:
            raise ValueError(
                f"--dataset-repo {pair!r} is not NAME=OWNER/REPOSITORY with a NAME among "
                f"{', '.join(repos)}"
            )
        repos[name] = repo_id
    unknown = [name for name in args.datasets if name not in repos]
    if unknown:
        raise ValueError(f"unknown data sets {', '.join(unknown)}; known: {', '.join(repos)}")
    root = data_root(args.data_root)
    rejected = []
    for name in args.datasets or repos:
        folder = root / name
        print(f"fetching {repos[name]} into {folder}", flush=True)
        sizes = fetch(repos[name], folder, repo_type="dataset", resume=args.resume)
        print(f"complete: {len(sizes)} files, {_gigabytes(sizes)}, sizes as on the hub", flush=True)
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


def _gigabytes(sizes: Mapping[str, int | None]) -> str:
    return f"{sum(size or 0 for size in sizes.values()) / 1e9:.2f} GB"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repo-id", help=f"checkpoint to fetch: {' (default) or '.join(KNOWN_REPOS)}"
    )
    parser.add_argument(
        "--save-dir", type=Path, help="folder of the checkpoint (default: models/NAME)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the checkpoint")
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep finished files and continue partial ones; the hub's client does this by "
        "itself. --no-resume fetches every file afresh",
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
        type=Path,
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
    try:
        if args.datasets is None or args.repo_id:
            fetch_model(args)
        if args.datasets is not None:
            fetch_datasets(args)
    except ValueError as error:
        print(f"download_model: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("download_model: interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
