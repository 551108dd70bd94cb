"""The documents agree with the code: options, defaults, commands, files, links and examples."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
import unicodedata
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
LIGHTNING_OPTIONS = [*inspect.signature(DDPStrategy).parameters]
AT_HOST = [
    "https://github.com/lightning-async-localsgd/lightning-async-localsgd/blob/main/",
    "https://raw.githubusercontent.com/lightning-async-localsgd/lightning-async-localsgd/main/",
]
"""Where files of this project are for readers of a package index."""

PAGES = [
    *(PROJECT / name for name in ("README.md", "CHANGELOG.md")),
    *sorted(PROJECT.glob("docs/*.md")),
    *sorted(PROJECT.glob("examples/*/README.md")),
]
MODULES = [module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]


def documented_defaults(text: str) -> dict[str, str]:
    """Return the option and the default of every table row that begins with exactly one name."""
    return dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", text, re.MULTILINE))


def defaults(of: type) -> dict[str, str]:
    """Return the defaults of a constructor's arguments as the documents write them."""
    return {name: as_written(parameter.default) for name, parameter in inspect.signature(of).parameters.items()}


def as_written(value: object) -> str:
    """Return a value as a user would write it. The ``repr`` of a timedelta is different."""
    if isinstance(value, timedelta):
        return f"timedelta(minutes={value // timedelta(minutes=1)})"
    return repr(value)


def strategy_defaults() -> dict[str, str]:
    """Return the defaults of the strategy's options that DDPStrategy does not have."""
    return {name: value for name, value in defaults(AsyncLocalSGDStrategy).items() if name not in LIGHTNING_OPTIONS}


def without_code_blocks(text: str) -> str:
    """Return a page without its fenced code blocks, whose comments look like headings."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[tuple[Path, str]]:
    """Return the file and the anchor of every link in a page to a file of this project. The anchor may be empty."""
    text = without_code_blocks(page.read_text())
    relative = re.findall(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]+))?\)", text)
    absolute = re.findall(rf"(?:{'|'.join(map(re.escape, AT_HOST))})([^)#\s]+)(?:#([^)\s]+))?", text)
    return [
        *((page.parent / path if path else page, anchor) for path, anchor in relative),
        *((PROJECT / path, anchor) for path, anchor in absolute),
    ]


def headings(page: Path) -> list[str]:
    """Return the text of a page's headings, without marks for code and with the text of links only."""
    found = re.findall(r"^#+ +(.+?) *$", without_code_blocks(page.read_text()), re.MULTILINE)
    return [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).replace("`", "") for heading in found]


def github_anchor(heading: str) -> str:
    """Return the anchor that GitHub makes of a heading: punctuation is dropped, each space becomes a hyphen."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def mkdocs_anchor(heading: str) -> str:
    """Return the anchor that MkDocs makes of a heading: ASCII only, and a run of spaces becomes one hyphen."""
    ascii_text = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_text).strip().lower())


def test_readme_lists_all_options_with_their_defaults() -> None:
    assert documented_defaults(README) == strategy_defaults()
    for name in inspect.signature(AsyncLocalSGDStrategy).parameters:
        assert f"`{name}`" in README


def test_options_page_lists_all_options_with_their_defaults() -> None:
    expected = {**strategy_defaults(), "start_method": "'popen'"}
    for options in (DelayedNesterov, ExchangeOptions, AsyncLocalSGDCallback, MergeOptions):
        expected.update(defaults(options))
    assert documented_defaults(OPTIONS) == expected


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_linked_files_exist(page: Path) -> None:
    for target, _ in links(page):
        assert target.exists(), f"{page}: {target}"


def test_links_of_the_readme_work_on_a_package_index() -> None:
    text = without_code_blocks(README)
    assert re.findall(r"\]\((?!https://)(.*?)\)", text) == [], "relative links"
    defined = re.findall(r"^\[(\S+)\]: https://\S+$", text, re.MULTILINE)
    assert sorted(set(re.findall(r"\]\[(.*?)\]", text))) == sorted(defined)
    assert sum(target.suffix == ".png" for target, _ in links(PROJECT / "README.md")) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_linked_headings_exist(page: Path) -> None:
    for target, anchor in links(page):
        if anchor:
            for slug in (github_anchor, mkdocs_anchor):
                assert anchor in map(slug, headings(target)), f"{page}: {target}#{anchor} ({slug.__name__})"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_files_named_in_documents_exist(page: Path) -> None:
    for name in re.findall(r"\b(?:examples|docs|tests|benchmarks)/[\w/]+\.(?:py|yaml|md)\b", page.read_text()):
        assert (PROJECT / name).exists() or (page.parent / name).exists(), f"{page}: {name}"


def test_modules_and_folders_named_on_the_architecture_page_exist() -> None:
    """Names in table rows are relative to the row's folder, other names to any folder of src/ and tests/."""
    source = PROJECT / "src" / package.__name__
    files = [*(PROJECT / "src").rglob("*"), *(PROJECT / "tests").rglob("*")]
    anywhere = [f"{path.relative_to(PROJECT)}{'/' if path.is_dir() else ''}" for path in files]
    page = (PROJECT / "docs" / "architecture.md").read_text()
    for line in page.splitlines():
        names = re.findall(r"`([\w/]+(?:\.py|/))`", line)
        row = re.match(r"\| `(\w+)/` \| `", line)
        for name in names[1:] if row else []:
            assert (source / row[1] / name).exists(), f"{row[1]}/ has no {name}"
        for name in names:
            assert any(f"/{path}".endswith(f"/{name}") for path in anywhere), name


def test_readme_commands_install_with_constraints() -> None:
    assert README.count("pip install -c constraints.txt -e") == 2


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0
