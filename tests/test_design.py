"""The design as tests: the direction of imports, and how long files and functions may be."""

import ast
from pathlib import Path

import pytest
from conftest import REPO

OUTSIDE = {"tests", "benchmarks", "docs", ".venv"}
FILES = [path.relative_to(REPO) for path in sorted(REPO.rglob("*.py"))]
FILES = [path for path in FILES if path.parts[0] not in OUTSIDE]
CODE = [path for path in FILES if path.parts[0] != "experiments"]
TREES = {path: ast.parse((REPO / path).read_text(encoding="utf-8")) for path in FILES}
# What each part may import of this project. A part is the longest of these with which a file's path begins.
MAY_IMPORT = {
    "main.py": ["mnist_cnn"],
    "sweep.py": ["mnist_cnn.run", "mnist_cnn.sweeps"],
    "mnist_cnn/run": ["mnist_cnn.run"],
    "mnist_cnn/sweeps": ["mnist_cnn.run", "mnist_cnn.sweeps"],
    "mnist_cnn": ["mnist_cnn"],  # but not what follows
    "experiments": ["mnist_cnn", "experiments"],
}
NEVER = {"mnist_cnn": ["mnist_cnn.sweeps"], "main.py": ["mnist_cnn.sweeps"], "experiments": ["mnist_cnn.sweeps"]}
PROJECT = {"mnist_cnn", "main", "sweep", "experiments", "slurm", "report"}


def is_within(module: str, packages: list[str]) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def imports_of(tree: ast.Module) -> set[str]:
    """The modules of this project that a file imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.partition(".")[0] in PROJECT}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_one_way(path):
    part = max((part for part in MAY_IMPORT if path.is_relative_to(part)), key=len, default="")
    allowed, never = MAY_IMPORT.get(part, []), NEVER.get(part, [])
    wrong = [name for name in imports_of(TREES[path]) if not is_within(name, allowed) or is_within(name, never)]
    assert wrong == [], f"{path} imports upward"


def test_files_are_short():
    limits = {Path("main.py"): 25, Path("sweep.py"): 200}
    lengths = {path: len((REPO / path).read_text(encoding="utf-8").splitlines()) for path in FILES}
    most = {path: limits.get(path, 260 if path in CODE else 200) for path in FILES}
    assert len(FILES) > 10 and {path: n for path, n in lengths.items() if n > most[path]} == {}


def test_functions_are_short():
    lengths = {}
    for path in CODE:
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.FunctionDef):
                docstring = node.body[0] if ast.get_docstring(node) else None
                of_docstring = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
                lengths[f"{path}:{node.name}"] = node.end_lineno - node.lineno + 1 - of_docstring
    assert {name: length for name, length in lengths.items() if length > 50} == {}


def test_few_private_names_of_other_libraries_are_used():
    private = []
    for path in CODE:
        for node in ast.walk(TREES[path]):
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Attribute) and not ast.unparse(node).startswith(("self._", "cls._", "os._exit")):
                names = [node.attr]
            if any(name == "mock" or (name.startswith("_") and not name.startswith("__")) for name in names):
                private.append((path, node.lineno))
    assert len(private) <= 5, private
    assert [use for use in private if not use[0].is_relative_to("mnist_cnn/run")] == []
