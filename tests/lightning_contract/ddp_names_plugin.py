"""A pytest plugin that runs Lightning's own tests, unchanged, with this strategy in DDP's place.

Every registered name that begins with ``ddp`` is answered by the name of this project that starts its processes the
same way, ``ddp_spawn`` by ``async_localsgd_spawn`` and so on. In a checkout of https://github.com/Lightning-AI/lightning
at the tag of the installed version, with ``PLUGIN`` standing for the folder of this file, and with ``psutil cloudpickle
scikit-learn tensorboard pytest-timeout pytest-rerunfailures`` installed besides this project:

    export PYTHONPATH=PLUGIN:tests OMP_NUM_THREADS=1
    python -m pytest -p ddp_names_plugin -W ignore::FutureWarning --timeout 120 tests/tests_pytorch/trainer

``--ddp-names=ddp`` leaves the names alone, to see what passes with DDP. ``--ddp-tests=FILE`` writes the node ids of the
tests that have made a strategy by such a name to FILE; ``@FILE`` in the place of the folder runs just these. With
``PL_RUN_STANDALONE_TESTS=1`` in the environment Lightning's tests that need a process of their own are run, and no
others.

A test that starts its ranks by running the script again (``ddp``) runs the whole pytest command again in each of them:
give such a test, and each of those that need a process of their own, a command of its own.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.strategies import StrategyRegistry

OURS = "async_localsgd"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ddp names")
    group.addoption("--ddp-names", choices=[OURS, "ddp"], default=OURS, help="who answers names that begin with 'ddp'")
    group.addoption("--ddp-tests", type=Path, help="file for the node ids of the tests that made one by its name")


def pytest_configure(config: pytest.Config) -> None:
    names = [name for name in StrategyRegistry if name.startswith("ddp")]
    if config.getoption("--ddp-names") == OURS:
        for name in names:
            ours = StrategyRegistry[our_name(name)]
            StrategyRegistry.register(name, ours["strategy"], override=True, **ours["init_params"])
    listing = config.getoption("--ddp-tests")
    # A rank that was started by running pytest again has the same tests.
    if listing is not None and "LOCAL_RANK" not in os.environ:
        config.pluginmanager.register(_Listing(listing, names))


def our_name(name: str) -> str:
    """The name that starts its processes as DDP's does; what else DDP's name asks for is DDP's own."""
    return next((OURS + start for start in ("_spawn", "_fork", "_notebook") if name.startswith("ddp" + start)), OURS)


class _Listing:
    """Writes down which tests make a strategy by one of the names."""

    def __init__(self, path: Path, names: list[str]) -> None:
        self._path = path
        self._made = False
        for name in names:
            entry = StrategyRegistry[name]
            StrategyRegistry.register(name, self._noting(entry["strategy"]), override=True, **entry["init_params"])

    def _noting(self, make: Any) -> Any:
        def noting(**init_params: Any) -> Any:
            self._made = True
            return make(**init_params)

        return noting

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self._made = False
        result = yield
        if self._made:
            with self._path.open("a") as file:
                file.write(f"{item.nodeid}\n")
        return result
