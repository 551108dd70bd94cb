"""The option table of docs/simulation.md matches the strategy, and the examples of that page run."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from lightning_async_localsgd import AsyncLocalSGDStrategy, SimulatedAsyncLocalSGDStrategy

PAGE = (Path(__file__).parents[4] / "docs" / "simulation.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_option_table_lists_every_option_with_its_default() -> None:
    live, simulated = (
        {name: parameter.default for name, parameter in inspect.signature(strategy).parameters.items()}
        for strategy in (AsyncLocalSGDStrategy, SimulatedAsyncLocalSGDStrategy)
    )
    table = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", PAGE, re.MULTILINE))
    assert table == {name: repr(default) for name, default in simulated.items() if name not in live}
    for name in simulated.keys() & live.keys():
        assert simulated[name] == live[name], name
        assert f"`{name}`" in PAGE or name in ("accelerator", "checkpoint_io", "precision_plugin"), name
    # All options that decide how pushes are merged can be tried in a simulation.
    policies = {"quorum", "sync_warmup_steps", "staleness", "merge", "grace", "outer_optimizer"}
    assert policies <= simulated.keys()


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_run(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    code = EXAMPLES[number]
    if "replay=" in code:
        compile(code, "simulation.md", "exec")
        return
    exec(compile(code, "simulation.md", "exec"), {"__name__": "example"})
    if number == 0:
        pattern = r"^(\w+): loss ([\d.]+) after ([\d.]+) s of the cluster$"
        printed = {
            name: (float(loss), float(seconds))
            for name, loss, seconds in re.findall(pattern, capsys.readouterr().out, re.MULTILINE)
        }
        assert printed.keys() == {"synchronous", "asynchronous"}
        assert all(0 < loss < 1 for loss, _ in printed.values())
        assert printed["asynchronous"][1] < printed["synchronous"][1]
