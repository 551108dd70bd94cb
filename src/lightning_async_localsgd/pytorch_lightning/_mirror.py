"""The modules below ``lightning/``, executed once more for ``pytorch_lightning``.

Lightning is published twice from one source: as ``lightning`` (``lightning.pytorch``, ``lightning.fabric``) and as
``pytorch_lightning`` (with ``lightning_fabric``). The two have no class in common: a Trainer of one package refuses a
strategy of the other. The modules in the folder ``lightning/`` are written for the first package. Each of them exists a
second time, as ``lightning_async_localsgd.pytorch_lightning.<module>``: executed from the same file, with its import
statements redirected to the other package and to the other modules of the mirror.

Modules outside that folder do not import Lightning, so both sides share them.

Only the names in import statements change, each within its own line. A traceback, a breakpoint and
``inspect.getsource`` therefore show the real file and line, and a class is found by the name that it is pickled under.
A copy of the sources would have to be kept equal by hand. Mixins would cover the base classes, but not ``isinstance``
checks, enumerations, launchers and helper functions.
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning_async_localsgd as package

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import CodeType, ModuleType

PACKAGE = package.__name__
ORIGINAL = f"{PACKAGE}.lightning"
MIRROR = f"{PACKAGE}.pytorch_lightning"

SHARED = ("faults", "outer", "staleness")
"""Public modules outside ``lightning/`` that can also be imported below the mirror."""

FOLDER = Path(package.__file__).parent / "lightning"

_STATEMENT = re.compile(rf"^([ \t]*(?:from|import)[ ]+)({PACKAGE}|lightning)((?:\.\w+)*)(?=[ \n]|$)(.*)$", re.MULTILINE)


def install() -> None:
    """Make the modules of the mirror importable. May be called any number of times."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def counterpart(module: str) -> str:
    """Return the name of a module's mirror, or its own name if both sides share the module.

    Example::

        >>> counterpart("lightning_async_localsgd.lightning.callback")
        'lightning_async_localsgd.pytorch_lightning.callback'
        >>> counterpart("lightning_async_localsgd.outer")
        'lightning_async_localsgd.outer'

    """
    return MIRROR + module.removeprefix(ORIGINAL) if f"{module}.".startswith(f"{ORIGINAL}.") else module


def redirect(source: str, path: str = "<string>") -> str:
    """Redirect the import statements in ``source``, line by line.

    Raises:
        ImportError: A statement binds a name that would have to change, too. The text shows how to write it.

    """

    def change(match: re.Match[str]) -> str:
        keyword, root, rest, names = match.groups()
        module = root + rest
        redirected = _redirected(module)
        binds_root = keyword.strip() == "import" and redirected != module and not names.lstrip().startswith("as ")
        submodule = re.match(r"\s+import\s+(pytorch|fabric)\b", names) if module == "lightning" else None
        if binds_root or submodule:
            line = source.count("\n", 0, match.start()) + 1
            wanted = f"{module}.{submodule[1]}" if submodule else module
            raise ImportError(
                f"{path}:{line}: {match[0].strip()!r} cannot be redirected to pytorch_lightning; write "
                f"'import {wanted} as ...'"
            )
        return f"{keyword}{redirected}{names}"

    return _STATEMENT.sub(change, source)


def _redirected(module: str) -> str:
    if module == PACKAGE:  # Both sides have its public names.
        return MIRROR
    if module.startswith(f"{PACKAGE}."):
        return counterpart(module)
    for old, new in (("lightning.pytorch", "pytorch_lightning"), ("lightning.fabric", "lightning_fabric")):
        if f"{module}.".startswith(f"{old}."):
            return new + module.removeprefix(old)
    return "pytorch_lightning"


class _Finder(MetaPathFinder):
    """Finder of the mirror's modules."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(f"{MIRROR}."):
            return None
        name = fullname.removeprefix(f"{MIRROR}.")
        if name in SHARED:
            return ModuleSpec(fullname, _SharedLoader(name))
        place = FOLDER.joinpath(*name.split("."))
        is_package = (place / "__init__.py").exists()
        source = place / "__init__.py" if is_package else place.with_suffix(".py")
        if not source.exists():
            return None
        spec = spec_from_file_location(fullname, source, loader=_MirrorLoader(fullname, str(source)))
        if spec is not None and is_package:
            # In the real folder Python would find the modules without redirected imports.
            spec.submodule_search_locations = []
        return spec


class _MirrorLoader(SourceFileLoader):
    """Loader that redirects a module's imports."""

    def path_stats(self, path: Any) -> Any:
        # Python's bytecode cache belongs to the unchanged file.
        raise OSError("no bytecode cache for the mirror")

    def source_to_code(self, data: Any, path: Any = "<string>", **options: Any) -> CodeType:  # type: ignore[override]
        return compile(redirect(data.decode(), str(path)), path, "exec", dont_inherit=True)


class _SharedLoader(Loader):
    """Loader that gives a public module a second name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def exec_module(self, module: ModuleType) -> None:
        original = import_module(f"{PACKAGE}.{self._name}")
        module.__doc__ = original.__doc__
        # FaultInjection is the only name in these modules that depends on Lightning.
        own = {"FaultInjection": f"{MIRROR}.fault_injection"}

        def get(name: str) -> Any:
            return getattr(import_module(own[name]) if name in own else original, name)

        module.__getattr__ = get  # type: ignore[method-assign]
        module.__dir__ = lambda: dir(original)  # type: ignore[method-assign]
