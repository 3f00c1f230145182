"""What the layout promises: dependencies that point one way, documented names, no local paths."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import holdfast

PACKAGE = Path(holdfast.__file__).parent
ROOT = PACKAGE.parent
# What generated the data of shipped recipes is a script of its own, that nothing imports.
FILES = sorted(set(PACKAGE.rglob("*.py")) - set(PACKAGE.glob("recipes/data/*.py")))

# Part of the package -> the other parts that it may import.
MAY_IMPORT: dict[str, set[str]] = {"errors": set(), "__init__": set(), "recipes": set()}
MAY_IMPORT["joint"] = {"errors"}
for domain in ("language", "control", "bellman", "report"):
    MAY_IMPORT[domain] = {"joint", "errors"}
# From here on each may import all that stand before it.
for part in (
    "schema",
    "recipe",
    "assemble_bellman",
    "assemble_control_rl",
    "assemble_control",
    "assemble_on_policy_guards",
    "assemble_on_policy",
    "assemble",
    "run",
    "cli",
    "__main__",
):
    MAY_IMPORT[part] = set(MAY_IMPORT) - {"__init__", "recipes"}
# A report is read on machines that could not train: it reads JSON and draws.
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "trl"}


def part_of(path: Path) -> str:
    """The part a file belongs to: a folder or a module right under ``holdfast``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(source: str, package: tuple[str, ...]) -> set[str]:
    """Full dotted names that ``source``, a module in ``package``, imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def imports_of(path: Path) -> set[str]:
    package = ("holdfast", *path.relative_to(PACKAGE).parent.parts)
    return imported(path.read_text(encoding="utf-8"), package)


def parts_imported(names: set[str]) -> set[str]:
    """The parts of ``holdfast`` among dotted names; ``__version__`` and the like are none."""
    parts = {name.split(".")[1] for name in names if name.startswith("holdfast.")}
    return parts & ({part_of(path) for path in FILES} | set(MAY_IMPORT))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import holdfast.language.data", {"language"}),
        ("from holdfast import report, __version__", {"report"}),
        ("from holdfast.control.losses import cloning", {"control"}),
        ("from ..language import head", {"language"}),
        ("from .objective import LossTerms", {"joint"}),
        ("from .. import bellman", {"bellman"}),
        ("def late():\n    from holdfast import cli", {"cli"}),
        ("import json, torch", set()),
    ],
)
def test_every_form_of_import_is_seen(source, expected):
    assert parts_imported(imported(source, ("holdfast", "joint"))) == expected


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_dependencies_point_one_way(path):
    part = part_of(path)
    assert part in MAY_IMPORT, f"{part} is new: give it a place in MAY_IMPORT"
    forbidden = parts_imported(imports_of(path)) - MAY_IMPORT[part] - {part}
    assert not forbidden, f"{part} must not import {', '.join(sorted(forbidden))}"


def test_a_report_needs_no_training_library():
    for path in (PACKAGE / "report").rglob("*.py"):
        heavy = {name.split(".")[0] for name in imports_of(path)} & HEAVY
        assert not heavy, f"{path.name} imports {', '.join(sorted(heavy))}"


@pytest.mark.parametrize("part", ["joint", "language"])
def test_public_functions_and_classes_have_docstrings(part):
    bare = [
        f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}"
        for path in sorted((PACKAGE / part).rglob("*.py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not bare, "without a docstring: " + ", ".join(bare)


MACHINE_PATH = re.compile(r"(?:^|[^A-Za-z0-9_.~}-])/(?:work|farm|root|home)/")


@pytest.mark.parametrize("part", ["work", "farm", "root", "home"])
def test_a_machine_path_would_be_found(part):
    assert MACHINE_PATH.search(f'open("/{part}/data.jsonl")')
    assert not MACHINE_PATH.search(f"https://example.org/{part}/data.jsonl or src/{part}/x")


def test_no_committed_text_names_a_path_of_one_machine():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    found = []
    for name in filter(None, listed):
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue  # A picture, or a file removed but not yet committed.
        found += [
            f"{name}:{number}"
            for number, line in enumerate(text.splitlines(), start=1)
            if MACHINE_PATH.search(line)
        ]
    assert not found, "absolute paths: " + ", ".join(found)
