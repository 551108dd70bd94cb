"""What the documents say about options, commands and files is what the code has."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from datetime import timedelta
from pathlib import Path

import pytest
from lightning.pytorch.strategies import DDPStrategy

import lightning_async_localsgd as package
from lightning_async_localsgd import (
    AsyncLocalSGDCallback,
    AsyncLocalSGDStrategy,
    DelayedNesterov,
    ExchangeOptions,
    MergeOptions,
)
from tests.package.conftest import PROJECT

README = (PROJECT / "README.md").read_text()
OPTIONS = (PROJECT / "docs" / "options.md").read_text()
LIGHTNINGS_OWN = [*inspect.signature(DDPStrategy).parameters]
PAGES = [PROJECT / "README.md", *sorted(PROJECT.glob("docs/*.md"))]
MODULES = [module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]


def documented(text: str) -> dict[str, str]:
    """Option and default of every table row that begins with exactly one name."""
    return dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", text, re.MULTILINE))


def defaults(of: type) -> dict[str, str]:
    return {name: written(parameter.default) for name, parameter in inspect.signature(of).parameters.items()}


def written(value: object) -> str:
    """As one would write it, which is not how a timedelta shows itself."""
    if isinstance(value, timedelta):
        return f"timedelta(minutes={value // timedelta(minutes=1)})"
    return repr(value)


def test_readme_names_every_option_with_its_default() -> None:
    own = {name: default for name, default in defaults(AsyncLocalSGDStrategy).items() if name not in LIGHTNINGS_OWN}
    assert documented(README) == own
    for name in inspect.signature(AsyncLocalSGDStrategy).parameters:
        assert f"`{name}`" in README


def test_options_page_names_every_option_with_its_default() -> None:
    own = {name: default for name, default in defaults(AsyncLocalSGDStrategy).items() if name not in LIGHTNINGS_OWN}
    wanted = {**own, "start_method": "'popen'", **defaults(DelayedNesterov), **defaults(ExchangeOptions)}
    wanted.update({**defaults(AsyncLocalSGDCallback), **defaults(MergeOptions)})
    assert documented(OPTIONS) == wanted


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", text):
        assert (path.parent / target).exists(), f"{path}: {target}"


def test_readme_commands_use_what_is_there() -> None:
    for name in re.findall(r"(?:examples|docs)/[\w/]+\.(?:py|yaml)", README):
        assert (PROJECT / name).exists(), name
    assert README.count("pip install -c constraints.txt -e") == 2


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0
