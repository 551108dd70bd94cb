"""What is in the wheel, and what it costs a Python that uses neither torch nor Lightning: nothing."""

from __future__ import annotations

import re
import statistics
import tarfile
import time
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder

from tests.package.conftest import OURS, PROJECT, FreshEnvironment


def test_wheel_has_the_package_the_entry_point_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
        (info,) = {name.split("/")[0] for name in files if ".dist-info/" in name}
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        metadata = message_from_bytes(archive.read(f"{info}/METADATA"))
    source = wheel.parent / "checkout" / "src"
    modules = {str(path.relative_to(source)) for path in source.rglob("*.py*") if path.suffix in (".py", ".pyi")}
    own = {name for name in files if not name.startswith(f"{info}/")}
    assert own == {*modules, f"{OURS}/py.typed"}
    script = ["[console_scripts]", "lightning-async-localsgd", "=", f"{OURS}.commands.main:main"]
    assert entry_points.split() == [*script, "[torch.backends]", "async_localsgd", "=", f"{OURS}_autoload:install"]
    assert f"{info}/licenses/LICENSE" in files
    assert metadata["License-Expression"] == "Apache-2.0"
    version = re.search(r'__version__ = "(.+)"', (source / OURS / "__init__.py").read_text())
    assert version is not None
    assert metadata["Version"] == version[1]
    urls = dict(url.split(", ") for url in metadata.get_all("Project-URL"))
    assert urls.keys() == {"Repository", "Documentation", "Changelog", "Issues"}
    assert all(url.startswith("https://github.com/") for url in urls.values())


def test_sdist_has_the_tests_but_not_the_results_of_the_study(tmp_path: Path) -> None:
    (built,) = SdistBuilder(str(PROJECT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(built) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    needed = {
        "pyproject.toml",
        "README.md",
        "CHANGELOG.md",
        "docs/study.md",
        "tests/conftest.py",
        "src/lightning_async_localsgd/py.typed",
    }
    assert needed <= files
    assert not any(name.startswith("docs/results") for name in files)
    assert Path(built).stat().st_size < 1.75 * 2**20


def test_no_code_runs_when_python_starts(
    bare: FreshEnvironment, installed: FreshEnvironment, capsys: pytest.CaptureFixture[str]
) -> None:
    # Only the editable install has a .pth file, and only a folder is in it: lines with `import` would be run.
    for file in installed.site_packages.glob("*.pth"):
        assert all(Path(line).is_dir() for line in file.read_text().splitlines()), file
    loaded = "import sys; print(sorted(sys.modules))"
    assert installed.output("-c", loaded) == bare.output("-c", loaded)

    seconds: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(11):
        for name, environment in (("without", bare), ("with", installed)):
            start = time.perf_counter()
            environment.output("-c", "pass")
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) * 1000 for name, values in seconds.items()}
    with capsys.disabled():
        print(f"\n  start of Python: {medians['without']:.1f} ms without, {medians['with']:.1f} ms with the package")


def test_module_loaded_by_torch_imports_nothing(
    with_wheel: FreshEnvironment, capsys: pytest.CaptureFixture[str]
) -> None:
    code = f"""
import sys, time
before = set(sys.modules)
start = time.perf_counter()
import {OURS}_autoload
{OURS}_autoload.install()
milliseconds = (time.perf_counter() - start) * 1000
print(sorted(set(sys.modules) - before), milliseconds)
"""
    runs = [with_wheel.output("-c", code).rsplit(maxsplit=1) for _ in range(5)]
    assert {imported for imported, _ in runs} == {f"['__future__', '{OURS}_autoload']"}
    milliseconds = statistics.median(float(value) for _, value in runs)
    with capsys.disabled():
        print(f"\n  added to `import torch`: {milliseconds:.2f} ms")
