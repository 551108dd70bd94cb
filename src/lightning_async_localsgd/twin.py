"""The modules that need Lightning, executed once more for ``pytorch_lightning``.

Lightning is published twice, from one source: as ``lightning`` (``lightning.pytorch``, ``lightning.fabric``) and as
``pytorch_lightning`` (with ``lightning_fabric``). Their classes have nothing in common: a Trainer of the one refuses a
strategy of the other. Our modules are written for the first. Those of them that need Lightning exist a second time, as
``lightning_async_localsgd.pytorch_lightning.<module>``: executed from the very same files, with their import statements
leading to the other package and, among themselves, to each other.

A copy of the sources would have to be kept equal by hand. Mixins with two sets of classes around them would settle the
base classes and nothing else: what is asked with ``isinstance``, enumerations, launchers, helper functions, all would
have to be passed in, and every new module would have to be written that way. Exchanging ``sys.modules`` during an
import would be seen by other threads and by Lightning's own late imports. Here only import statements are changed, in
the syntax tree: a traceback, a breakpoint and ``inspect.getsource`` show the real file and line, and a class is found
by the name that it is pickled under.

Which modules need Lightning is read from their import statements; those for type checkers alone don't count. A
statement that could not be led elsewhere without changing what follows it is refused, with the way to write it.
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning_async_localsgd as package

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import CodeType, ModuleType

PACKAGE = package.__name__
TWIN = f"{PACKAGE}.pytorch_lightning"

_FOLDER = Path(package.__file__).parent
_RENAMED = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}


def install() -> None:
    """Makes the modules of the second tree importable. May be called any number of times."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def counterpart(module: str) -> str:
    """The name of one of our modules in the second tree; its own if it does not need Lightning."""
    return TWIN + module.removeprefix(PACKAGE) if module in twins() else module


@cache
def twins() -> frozenset[str]:
    """Our modules that need Lightning when they run, themselves or through another of ours."""
    imports = {module: _imports(ast.parse(path.read_bytes())) for module, path in sources().items()}
    found = {module for module, names in imports.items() if any(name.split(".")[0] == "lightning" for name in names)}
    before: set[str] = set()
    while found != before:
        before = set(found)
        found |= {module for module, names in imports.items() if names & found}
    # A module is imported after the packages that it lies in.
    folders = {str(parent) for module in found for parent in _folders(module)}
    return frozenset(found | folders)


@cache
def sources() -> dict[str, Path]:
    """The files of our modules by name, without the package itself and the one of the second tree."""
    found = {}
    for path in _FOLDER.rglob("*.py"):
        parts = path.relative_to(_FOLDER).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if parts and parts[0] != "pytorch_lightning":
            found[".".join((PACKAGE, *parts))] = path
    return found


def _folders(module: str) -> Iterator[str]:
    folder = module.rpartition(".")[0]
    while folder != PACKAGE:
        yield folder
        folder = folder.rpartition(".")[0]


def _imports(tree: ast.Module) -> set[str]:
    """Every name that ``tree`` imports when it runs and that could be a module."""
    found: set[str] = set()
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
            found.add(str(node.module))
        elif isinstance(node, ast.If) and ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING":
            waiting.extend(node.orelse)
        else:
            waiting.extend(child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr))
    return found


class _Finder(MetaPathFinder):
    """Finds the modules of the second tree."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(f"{TWIN}."):
            return None
        original = PACKAGE + fullname.removeprefix(TWIN)
        if original not in twins():
            return None
        source = sources()[original]
        folders: list[str] | None = [] if source.name == "__init__.py" else None
        loader = _Loader(fullname, str(source))
        spec = spec_from_file_location(fullname, source, loader=loader, submodule_search_locations=folders)
        if spec is not None and folders is not None:
            # It has been given the folder of the first tree, where Python would find the modules as they are.
            spec.submodule_search_locations = []
        return spec


class _Loader(SourceFileLoader):
    """Compiles a module with its imports led to the other package."""

    def path_stats(self, path: Any) -> Any:
        # Python's cache has the file's code without the change, and must not get the changed one.
        raise OSError("no bytecode cache for the second tree")

    def source_to_code(self, data: Any, path: Any = "<string>", **options: Any) -> CodeType:  # type: ignore[override]
        tree = ast.parse(data, path)
        changed = ast.fix_missing_locations(_Redirect(str(path)).visit(tree))
        return compile(changed, path, "exec", dont_inherit=True)


class _Redirect(ast.NodeTransformer):
    """Leads import statements to the other package and the other tree."""

    def __init__(self, path: str) -> None:
        self._path = path

    def visit_Import(self, node: ast.Import) -> ast.Import:
        for alias in node.names:
            name = _redirected(alias.name)
            if name != alias.name and alias.asname is None:
                raise self._refusal(node, f"import {alias.name} as ...")
            alias.name = name
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> list[ast.ImportFrom]:
        if node.module is None or node.level:
            raise self._refusal(node, f"from {PACKAGE}.... import ...")
        homes: dict[str, list[ast.alias]] = {}
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            if whole in _RENAMED:
                raise self._refusal(node, f"import {whole} as ...")
            homes.setdefault(_home(node.module, whole), []).append(alias)
        return [ast.copy_location(ast.ImportFrom(home, names, 0), node) for home, names in homes.items()]

    def _refusal(self, node: ast.stmt, instead: str) -> ImportError:
        return ImportError(
            f"{self._path}:{node.lineno}: `{ast.unparse(node)}` cannot be led to pytorch_lightning; write `{instead}`"
        )


def _redirected(module: str) -> str:
    for old, new in _RENAMED.items():
        if module == old or module.startswith(f"{old}."):
            return new + module.removeprefix(old)
    if module == "lightning":
        return "pytorch_lightning"
    return counterpart(module)


def _home(module: str, whole: str) -> str:
    """Where ``from module import name`` finds the name, ``whole`` being both together."""
    if whole in sources():
        return counterpart(whole).rpartition(".")[0]
    if module == PACKAGE:  # A public name, which is in both trees.
        home = package.HOMES.get(whole.rpartition(".")[2])
        return TWIN if f"{PACKAGE}.{home}" in twins() else PACKAGE
    return _redirected(module)
