"""Fresh environments that hold this package as a user would have installed it, made without downloading anything."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

PROJECT = Path(__file__).parents[2]
OURS = "lightning_async_localsgd"


def clean_environment(**extra: str) -> dict[str, str]:
    """The environment variables of a user who has set nothing that concerns Python, torch or Lightning."""
    ours = ("PYTHON", "PL_", "TORCH", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_", "GROUP_RANK", "SLURM_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**kept, "OMP_NUM_THREADS": "1", **extra}


def run_bounded(command: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs ``command`` in a session of its own, so that none of the ranks that it starts outlives it."""
    words = [str(part) for part in command]
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, **pipes, text=True, start_new_session=True, **options) as process:
        try:
            out, err = process.communicate(timeout=120)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def check_output(command: Sequence[str | Path], **options: Any) -> str:
    """What ``command`` prints; if it fails, everything that it said is in the failure."""
    done = run_bounded(command, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


class FreshEnvironment:
    """A virtual environment with the running one's packages, except ours and the one called ``without``.

    They are linked one by one: a search path onto the running environment would also offer its copy of this package,
    and so hide a file that the wheel has forgotten.
    """

    def __init__(self, path: Path, without: str | None = None) -> None:
        self.path = path
        check_output([sys.executable, "-m", "venv", "--without-pip", path])
        self.python = path / "bin" / "python"
        self.site_packages = path / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        paths = sysconfig.get_paths()
        for folder in {paths["purelib"], paths["platlib"], str(Path(torch.__file__).parents[1])}:
            for entry in Path(folder).iterdir():
                link = self.site_packages / entry.name
                unwanted = entry.suffix == ".pth" or entry.name.lstrip("_").startswith(OURS)
                unwanted |= entry.name == without or entry.name.startswith(f"{without}-")
                if not unwanted and not link.exists():
                    link.symlink_to(entry)

    def install(self, *arguments: str | Path) -> None:
        """``pip install``, from local files and with the build backend that is there."""
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "--quiet"]
        check_output([*pip, "--no-index", "--no-deps", "--no-build-isolation", *arguments], env=clean_environment())

    def run(self, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs this environment's Python, away from the checkout."""
        return run_bounded([self.python, *arguments], cwd=self.path, env=clean_environment(**variables))

    def output(self, *arguments: str | Path, **variables: str) -> str:
        """What this environment's Python prints; it must succeed."""
        return check_output([self.python, *arguments], cwd=self.path, env=clean_environment(**variables))


def copy_of_project(folder: Path) -> Path:
    """The part of the checkout that a wheel is made from."""
    folder.mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, folder)
    shutil.copytree(PROJECT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A freshly built wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    checkout = copy_of_project(folder / "checkout")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    check_output([*pip, "--wheel-dir", folder, checkout], env=clean_environment())
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> FreshEnvironment:
    """An environment without this package."""
    return FreshEnvironment(tmp_path_factory.mktemp("bare") / "env")


@pytest.fixture(scope="session")
def with_wheel(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> FreshEnvironment:
    """An environment with the wheel installed. Not to be changed."""
    environment = FreshEnvironment(tmp_path_factory.mktemp("with_wheel") / "env")
    environment.install(wheel)
    return environment


@pytest.fixture(scope="session")
def without_lightning(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> FreshEnvironment:
    """An environment with the wheel and ``pytorch_lightning``, but no ``lightning``. Not to be changed."""
    environment = FreshEnvironment(tmp_path_factory.mktemp("without_lightning") / "env", without="lightning")
    environment.install(wheel)
    return environment


@pytest.fixture(scope="session")
def editable(tmp_path_factory: pytest.TempPathFactory) -> FreshEnvironment:
    """An environment with an editable install of a checkout. Not to be changed."""
    folder = tmp_path_factory.mktemp("editable")
    environment = FreshEnvironment(folder / "env")
    environment.install("--editable", copy_of_project(folder / "checkout"))
    return environment


@pytest.fixture(params=["with_wheel", "editable"])
def installed(request: pytest.FixtureRequest) -> FreshEnvironment:
    """The package, installed in each of the two ways."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def make_environment(wheel: Path, tmp_path: Path) -> Callable[[], FreshEnvironment]:
    """Makes an environment with the wheel that a test may break."""

    def make() -> FreshEnvironment:
        environment = FreshEnvironment(tmp_path / "env")
        environment.install(wheel)
        return environment

    return make
