# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""Rules about the repository itself: sizes, imports, requirements, what the documents promise."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("data", "inference", "modeling", "scripts")
OWN_MODULES = {*ROOMS, "tests", "examples", "inferencer", "download_model"}
# What a package is imported as, where that differs from its name on the index.
IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml"}
# Used when present, never required.
OPTIONAL = {"flash_attn", "torchao", "triton", "vlmeval"}
# Held to no version: torch's CUDA builds bring their own, which constraints.txt must not fight.
UNPINNED = {"triton"}
MEGABYTE = 1 << 20


def all_files() -> list[Path]:
    """Files of the repository: what git tracks or would track; without git, everything."""
    try:
        listing = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout.decode()
        paths = [ROOT / name for name in listing.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        ignored = {".git", ".venv", "results", "models", "datasets", "wandb"}
        paths = [p for p in ROOT.rglob("*") if not ignored & set(p.relative_to(ROOT).parts)]
        paths = [p for p in paths if "cache" not in str(p.relative_to(ROOT))]
    return sorted(path for path in paths if path.is_file())


FILES = all_files()
PYTHON_FILES = [path for path in FILES if path.suffix == ".py"]
DOCUMENTS = [path for path in FILES if path.suffix == ".md"]
SHELL_FILES = [path for path in FILES if path.suffix == ".sh" or path == ROOT / ".ci" / "run"]
SHELL_FILES.append(ROOT / "examples" / "slurm.sbatch")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def texts() -> Iterator[tuple[Path, str]]:
    """Every file that is text."""
    for path in FILES:
        if path.suffix in {".safetensors", ".png", ".parquet", ".pdf"}:
            continue
        content = path.read_bytes()
        if b"\0" not in content[:4096]:
            yield path, content.decode("utf-8")


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in PYTHON_FILES:
        yield path, ast.parse(path.read_text())


def imports(tree: ast.Module) -> Iterator[str]:
    """Absolute dotted names a module imports, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_file_list_is_that_of_this_repository() -> None:
    assert Path(__file__) in FILES
    assert len(PYTHON_FILES) > 10
    assert ROOT / "README.md" in FILES or ROOT / "INSTALL.md" in FILES


def test_no_file_is_too_large() -> None:
    sizes = {name(path): path.stat().st_size for path in FILES}
    assert {k: v for k, v in sizes.items() if v > 16 * MEGABYTE} == {}
    assert sum(v for k, v in sizes.items() if k.startswith("tests/")) <= 28 * MEGABYTE
    assert sum(v for k, v in sizes.items() if k.startswith("examples/")) <= 13 * MEGABYTE


def test_python_files_are_short_and_carry_the_copyright_line() -> None:
    line = "# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0"
    contents = {name(path): path.read_text().splitlines() for path in PYTHON_FILES}
    assert {k: len(v) for k, v in contents.items() if len(v) > 600} == {}
    assert [k for k, v in contents.items() if v and v[0] != line] == []


def test_no_path_of_a_machine_and_no_package_host() -> None:
    places = re.compile(
        r"(?<![\w.~${}/-])/(?:home|root|Users|work|workspace|tmp|mnt|opt|data)/\w"
        r"|pypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.npmjs"
    )
    found = [
        f"{name(path)}:{number}: {line.strip()[:80]}"
        for path, text in texts()
        if path.suffix not in {".json", ".txt"} or "golden" not in name(path)
        for number, line in enumerate(text.splitlines(), 1)
        if places.search(line)
    ]
    assert found == []


def test_nothing_is_left_undone() -> None:
    marks = re.compile("TO[D]O|FIX[M]E|XX[X]|NotImplemented[E]rror")
    found = [
        f"{name(path)}:{number}"
        for path in PYTHON_FILES + SHELL_FILES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if marks.search(line)
    ]
    assert found == []


# ------------------------------------------------------------------------------ the rooms

# Room -> the rooms it may import; a file belongs to the longest of these that its path begins with.
EXPERIMENT = "scripts/visual_opsd"
LIBRARIES = {"modeling/host", "modeling", "data", "inference"}
# What all parts of the experiment share: settings, processes, rows and the rollout.
SHARED = {*LIBRARIES, EXPERIMENT, f"{EXPERIMENT}/runs", f"{EXPERIMENT}/opsd_loss.py"}
ARROWS: dict[str, set[str]] = {
    "modeling/host": set(),
    "modeling": {"modeling/host"},
    "data": {"modeling/host", "modeling"},
    "inference": {"modeling/host", "modeling", "data"},
    "inferencer.py": LIBRARIES,
    EXPERIMENT: SHARED,
    f"{EXPERIMENT}/runs": LIBRARIES,
    f"{EXPERIMENT}/opsd_loss.py": LIBRARIES,
    f"{EXPERIMENT}/loss": {*LIBRARIES, f"{EXPERIMENT}/opsd_loss.py"},
    f"{EXPERIMENT}/training": {*SHARED, f"{EXPERIMENT}/loss"},
    f"{EXPERIMENT}/evaluation": SHARED,
    f"{EXPERIMENT}/analysis": {*SHARED, f"{EXPERIMENT}/loss", f"{EXPERIMENT}/evaluation"},
}
# Commands may import every room; no room imports a command.
COMMANDS = {
    f"{EXPERIMENT}/{command}.py"
    for command in (
        "train_visual_opsd", "train_visual_opsd_offline", "train_sft", "evaluate",
        "kl_diagnostic", "plan", "merge", "serving_config", "collect_traces", "report",
    )
}  # fmt: skip
SHARED_FILES = {
    f"{EXPERIMENT}/{file}.py"
    for file in (
        "__init__", "opsd_loss", "on_policy_sampler", "rows", "scored_rows", "config", "cli",
        "processes", "run_config", "validation_config",
    )
}  # fmt: skip


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_files() -> dict[str, set[str]]:
    """File -> the files of this repository that it imports, at its top or inside a function."""
    modules = {module_name(path): name(path) for path in PYTHON_FILES}
    found: dict[str, set[str]] = {}
    for path, tree in trees():
        names: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                # `from package import module` means the module, not the package.
                dotted = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= {one if one in modules else node.module for one in dotted}
        found[name(path)] = {modules[dotted] for dotted in names if dotted in modules}
    return found


def room_of(file: str) -> str:
    """The room of a file, "" for what stands above all rooms."""
    if file in COMMANDS:
        return ""
    rooms = [room for room in ARROWS if file == room or file.startswith(room + "/")]
    return max(rooms, key=len, default="")


def test_imports_point_one_way() -> None:
    found = []
    for file, imported in imported_files().items():
        room = room_of(file)
        allowed = {room, *ARROWS.get(room, set())}
        for other in sorted(imported):
            if room and (other in COMMANDS or room_of(other) not in allowed):
                found.append(f"{file} imports {other}, which {room} must not know")
            if other.startswith("tests/") and not file.startswith("tests/"):
                found.append(f"{file} imports {other}, a test's helper")
    assert not found, "\n".join(found)


def test_no_file_imports_itself_through_others() -> None:
    graph = imported_files()
    done: set[str] = set()

    def circle(file: str, path: tuple[str, ...]) -> tuple[str, ...]:
        if file in path:
            return (*path[path.index(file) :], file)
        if file in done:
            return ()
        for other in sorted(graph[file]):
            if found := circle(other, (*path, file)):
                return found
        done.add(file)
        return ()

    found = next((circle(file, ()) for file in graph if circle(file, ())), ())
    assert not found, " imports ".join(found)


def test_the_top_of_the_experiment_holds_commands_and_what_all_share() -> None:
    top = {path for path in FILES if path.parent == ROOT / EXPERIMENT}
    launchers = {path for path in top if re.fullmatch(r"run_\w+\.sh|launch\.sh", path.name)}
    others = {name(path) for path in top - launchers} - {f"{EXPERIMENT}/README.md"}
    assert others - COMMANDS - SHARED_FILES == set(), "these belong to a room"
    assert others >= SHARED_FILES
    below = [path.relative_to(ROOT / EXPERIMENT).parts for path in PYTHON_FILES
             if path.is_relative_to(ROOT / EXPERIMENT)]  # fmt: skip
    rooms = {parts[0] for parts in below if len(parts) > 1}
    assert rooms == {"loss", "training", "evaluation", "analysis", "runs"}


def test_no_private_interface_of_torch() -> None:
    def private(dotted: str) -> bool:
        parts = dotted.split(".")
        return parts[0] == "torch" and any(
            part.startswith("_") and not part.endswith("__") for part in parts
        )

    def dotted(node: ast.AST) -> str:
        if isinstance(node, ast.Attribute):
            return f"{dotted(node.value)}.{node.attr}"
        return node.id if isinstance(node, ast.Name) else ""

    found = set()
    for path, tree in trees():
        used = [dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        found |= {f"{name(path)}: {use}" for use in [*used, *imports(tree)] if private(use)}
    assert found == set()


def test_tests_are_packages() -> None:
    """So that tests/data does not hide data/, and helpers have one name: tests.conftest."""
    folders = {path.parent for path in PYTHON_FILES if path.is_relative_to(ROOT / "tests")}
    assert [name(folder) for folder in folders if folder / "__init__.py" not in FILES] == []


def requirements(file: str) -> dict[str, Requirement]:
    """Package name to requirement; every line must carry its reason in a comment."""
    found: dict[str, Requirement] = {}
    for line in (ROOT / file).read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        entry, hash_sign, reason = line.partition("#")
        assert hash_sign and len(reason.split()) >= 2, f"{file}: no reason given for {entry}"
        requirement = Requirement(entry.strip())
        assert requirement.specifier, f"{file}: {entry} has no range"
        found[canonicalize_name(requirement.name)] = requirement
    return found


def test_requirements_are_ranges_and_constraints_lie_within() -> None:
    pins: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            package, equals, version = line.partition("==")
            assert equals and "+" not in version, f"not an exact public version: {line}"
            pins[canonicalize_name(package)] = version
    runtime = requirements("requirements.txt")
    assert str(runtime["torch"].specifier) == "<2.15,>=2.11"
    assert str(runtime["transformers"].specifier) == "<6,>=5"
    assert pins["torch"] == "2.13.0"
    for package, requirement in (runtime | requirements("requirements-dev.txt")).items():
        if package in UNPINNED:
            assert package not in pins
            continue
        assert package in pins, f"{package} is not in constraints.txt"
        assert pins[package] in requirement.specifier, f"{requirement}: {pins[package]} is pinned"


def test_imports_are_required_packages() -> None:
    runtime, tools = requirements("requirements.txt"), requirements("requirements-dev.txt")

    def modules(packages: dict[str, Requirement]) -> set[str]:
        return {IMPORT_NAMES.get(package, package.replace("-", "_")) for package in packages}

    allowed = modules(runtime) | set(sys.stdlib_module_names) | OWN_MODULES | OPTIONAL
    # packaging comes with pytest; tests may use the tools.
    for_tests = allowed | modules(tools) | {"packaging"}
    found = set()
    for path, tree in trees():
        is_test = path.is_relative_to(ROOT / "tests")
        used = {module.split(".")[0] for module in imports(tree)}
        found |= {f"{name(path)}: {m}" for m in used - (for_tests if is_test else allowed)}
    assert found == set()


@pytest.mark.parametrize("path", SHELL_FILES, ids=name)
def test_shell_files_parse_and_stop_at_errors(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=20)
    text = path.read_text()
    if path.name == "launch.sh":  # sourced
        assert not os.access(path, os.X_OK)
        return
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    assert path.suffix == ".sbatch" or os.access(path, os.X_OK)


def test_licence_citation_and_changelog() -> None:
    licence = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["license"] == "Apache-2.0"
    (paper,) = citation["references"]
    assert "2606.18974" in paper["url"]
    # The same authors and title as in the README's bibtex.
    people = " and ".join(f"{p['family-names']}, {p['given-names']}" for p in paper["authors"])
    readme = (ROOT / "README.md").read_text()
    assert f"author  = {{{people}}}" in readme and f"title   = {{{paper['title']}}}" in readme
    assert f"year    = {{{paper['year']}}}" in readme
    assert "\n## [Unreleased]\n" in (ROOT / "CHANGELOG.md").read_text()


def code_blocks(text: str) -> Iterator[str]:
    """The bash blocks of a document."""
    yield from re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def make_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text()
    return set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_documents_name_what_exists(path: Path) -> None:
    text = path.read_text()
    missing = []
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", text):
        if not re.match(r"[a-z]+:", target) and not (path.parent / target).exists():
            missing.append(f"link {target}")
    for module in re.findall(r"python3? -m ((?:scripts|data|modeling)[\w.]*\w)", text):
        place = ROOT / module.replace(".", "/")
        # NAME in capitals stands for any of them.
        if not (place.with_suffix(".py").exists() or place.is_dir() or module.endswith("NAME")):
            missing.append(f"module {module}")
    for script in re.findall(
        r"(?<![\w/.])((?:scripts|examples|data|tests|docs)/[\w./-]+\.\w+)", text
    ):
        if not (ROOT / script).exists():
            missing.append(f"file {script}")
    for words in re.findall(r"(?:^ {4}|^|`)make((?: [a-z][\w-]*(?![\w=-]))+)", text, re.MULTILINE):
        missing += [f"make {word}" for word in words.split() if word not in make_targets()]
    for block in code_blocks(text):
        parsed = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True)
        if parsed.returncode:
            missing.append(f"command that does not parse: {parsed.stderr.strip()}")
    assert missing == []


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    shown = set(re.findall(r'echo "make ([a-z-]+)', makefile))
    assert make_targets() - {"help"} == shown


def test_ctrl_c_while_a_program_imports_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")  # found before the real one
    done = subprocess.run(
        [sys.executable, "-m", "scripts.visual_opsd.train_visual_opsd"],
        cwd=ROOT, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "interrupted\n")
