"""The layout: layers that import one way, no circles, Lightning in one folder, no file that is too long."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_async_localsgd

PACKAGE = "lightning_async_localsgd"
SOURCE = Path(lightning_async_localsgd.__file__).parent
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

LAYERS = [
    {"protocol"},
    {"policies", "wire"},
    {"outer", "launch"},
    {"staleness"},
    {"server"},
    {"runtime"},
    {"simulation", "faults"},
    {"lightning", "commands"},
    {"pytorch_lightning"},
]
"""A folder or public module imports from itself and from lower layers."""

FACADES = {"faults", "emulation"}
"""Public modules that hand on a name which depends on Lightning. They take it from the package itself, lazily."""

ROOT = {"__init__.py", "__main__.py", "py.typed", "emulation.py", "faults.py", "staleness.py"}
LONGEST = 500


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module or name that ``tree`` imports, those for type checkers and those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules(folder: Path, prefix: str) -> dict[str, set[str]]:
    """For each module below ``folder``: what it imports."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        name = ".".join((prefix, *(parts[:-1] if parts[-1] == "__init__" else parts)))
        found[name] = set(imports(ast.parse(path.read_bytes())))
    return found


OURS = modules(SOURCE, PACKAGE)


def room_of(name: str) -> str:
    """The folder or public module in the package's root that a module lies in; "" for the package itself."""
    return name.removeprefix(PACKAGE).lstrip(".").split(".")[0]


def layer_of(room: str) -> int:
    return next(number for number, rooms in enumerate(LAYERS) if room in rooms)


def edges(found: dict[str, set[str]]) -> dict[str, set[str]]:
    """For each module: the modules of the same tree that it imports."""

    def home(name: str) -> str | None:
        while name and name not in found:
            name = name.rpartition(".")[0]
        return name or None

    return {
        module: {at for name in names if (at := home(name)) not in (None, module)} for module, names in found.items()
    }


@pytest.mark.parametrize("module", sorted(OURS))
def test_imports_run_one_way_between_layers(module: str) -> None:
    room = room_of(module)
    if room in ("", "__main__"):
        return  # Hands on what is public.
    for other in edges(OURS)[module]:
        target = room_of(other)
        if target == "":
            assert room in FACADES | {"pytorch_lightning"}, f"{module} imports the package itself"
        elif room not in ("emulation", target):
            assert layer_of(target) < layer_of(room), f"{module} imports {other}"


@pytest.mark.parametrize(("folder", "prefix"), [(SOURCE, PACKAGE), (BENCHMARKS, "benchmarks")])
def test_no_modules_import_each_other(folder: Path, prefix: str) -> None:
    graph = edges(modules(folder, prefix))
    graph = {module: others - {prefix} for module, others in graph.items()}
    while graph:
        free = [module for module, others in graph.items() if not others & graph.keys()]
        assert free, f"circles among {sorted(graph)}"
        graph = {module: others for module, others in graph.items() if module not in free}


@pytest.mark.parametrize("module", sorted(OURS))
def test_only_one_folder_knows_lightning(module: str) -> None:
    roots = {name.split(".")[0] for name in OURS[module]}
    if room_of(module) != "lightning":
        assert not roots & {"lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"}


def test_root_has_folders_and_public_modules_only() -> None:
    entries = {path.name for path in SOURCE.iterdir() if path.name != "__pycache__"}
    rooms = set().union(*LAYERS) - {"staleness", "faults"}
    assert entries == ROOT | rooms
    assert len(rooms) == 11


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_file_is_too_long_to_hold_in_mind(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST
