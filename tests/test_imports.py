"""The rooms of the design: who may import whom, read from the import statements themselves."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import octad

PACKAGE = Path(octad.__file__).parent

# room -> rooms it may import (besides itself); `cli` may import any, nothing imports `cli`
BASE = {
    "errors",
    "dist",
    "figures",
    "fingerprint",
    "guard",
    "kernels",
    "machine",
    "portable",
    "staging",
    "telling",
}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "figures": set(),
    "dist": {"errors"},
    "guard": {"errors"},
    "portable": set(),
    "telling": set(),
    "fingerprint": {"errors", "portable"},
    "machine": {"errors", "dist", "portable"},
    "staging": {"errors", "portable"},
    "kernels": {"errors", "staging"},  # inside functions: setup.py reads compile.py by itself
    "model": BASE,
    "text": BASE,
    "checkpoint": BASE | {"model", "text"},
    "plan": {
        "errors",
        "figures",
        "guard",
        "model",
        "checkpoint",
    },  # of the last two what imports no torch: see below
    "combine": BASE | {"model", "text", "checkpoint"},
    "fast": BASE | {"model", "text", "checkpoint"},
    "engine": BASE | {"model", "text", "checkpoint", "fast"},
    "export": BASE | {"model", "text", "checkpoint"},
    "sandbox": {"errors"},
    "report": {"errors", "figures", "guard", "staging"},
    "bench": BASE | {"model", "text", "checkpoint", "fast", "engine", "report"},
    "chat": BASE | {"model", "text", "checkpoint", "engine", "report"},
    "serve": BASE | {"model", "text", "checkpoint", "fast", "engine", "report"},
    "evaluate": BASE | {"model", "text", "checkpoint", "fast", "engine", "sandbox", "report"},
    "train": BASE | {"model", "text", "checkpoint", "fast", "engine", "evaluate", "report"},
}
# rooms that only show or start others, and may import any but `cli` (which `demo` drives as a user would)
FREE = {"api", "cli", "demo", "project", "__init__", "__main__"}
NO_TORCH = [
    "errors.py",
    "figures.py",
    "model/config.py",
    "model/keys.py",
    "model/families.py",
    "model/cost.py",
    "checkpoint/gguf/header.py",
    "checkpoint/gguf/metadata.py",
    "combine/recipe.py",
    "fast/beginning.py",
    "fast/record_plan.py",
    "kernels/filling.py",
    "cli/main.py",
    *(f"plan/{path.name}" for path in sorted((PACKAGE / "plan").glob("*.py"))),
]
PLAN_MAY_READ = {
    "octad.model.config",
    "octad.model.families",
    "octad.model.cost",
    "octad.checkpoint.config_file",
}


def imported_modules(path: Path) -> set[str]:
    """Every module that the file imports anywhere, late imports included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"octad.{alias.name}" for alias in node.names]  # `from octad import machine`
            found |= set(names) if node.module == "octad" else {node.module or ""}
    return found


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py" or p.parent != PACKAGE)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_import_directions(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    rooms = {room_of(m) for m in imported_modules(path) if m == "octad" or m.startswith("octad.")}
    if room in FREE:
        return
    assert rooms <= ALLOWED[room] | {room}, f"{room} imports {rooms - ALLOWED[room] - {room}}"


@pytest.mark.parametrize("name", NO_TORCH)
def test_light_files_import_no_torch(name: str) -> None:
    tree = ast.parse((PACKAGE / name).read_text())
    top = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    names = {a.name for n in top if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or "" for n in top if isinstance(n, ast.ImportFrom)}
    assert not any(m.split(".")[0] == "torch" for m in names)


@pytest.mark.parametrize("name", [n for n in NO_TORCH if n.startswith(("model/", "plan/"))])
def test_light_files_leave_torch_alone(name: str) -> None:
    """In a fresh interpreter, whatever they import themselves."""
    module = "octad." + name.removesuffix(".py").replace("/", ".")
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("path", sorted((PACKAGE / "plan").glob("*.py")), ids=lambda p: p.name)
def test_the_planner_reads_configs_and_costs_alone(path: Path) -> None:
    inside = {m for m in imported_modules(path) if m.startswith(("octad.model.", "octad.checkpoint."))}
    assert inside <= PLAN_MAY_READ


def test_files_of_tests_have_names_of_their_own() -> None:
    """pytest imports test files by their bare names, and of several conftests the last one is `conftest`."""
    here = Path(__file__).parent
    names = [path.name for path in here.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
    others = [
        path
        for path in here.rglob("*.py")
        if not (path.parent / "conftest.py").exists() or path.parent == here
    ]
    assert [p.name for p in others if "conftest" in imported_modules(p)] == []


def test_no_two_modules_have_one_name() -> None:
    """So that a file's name alone says which is meant."""
    names = [path.name for path in FILES if not path.name.startswith("__")]
    assert sorted(names) == sorted(set(names))


def test_no_file_is_longer_than_one_holds_in_the_head() -> None:
    longest = {path.name: len(path.read_text().splitlines()) for path in FILES}
    assert {name: lines for name, lines in longest.items() if lines > 400} == {}
