"""What rounding leaves over of a worker's pushes, in the worker's file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_async_localsgd.lightning.checkpoints.optimizer_states import OptimizerStateSaver
from lightning_async_localsgd.protocol.layout import Layout
from lightning_async_localsgd.runtime.uplink import Uplink


@pytest.mark.parametrize("joins", [False, True])
def test_residual_is_restored_when_a_run_is_resumed_and_not_when_a_process_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, joins: bool
) -> None:
    layout = Layout([("weight", (300,), "torch.float32", "parameter")])
    file, saved = tmp_path / "worker-1-000001.pt", torch.arange(300.0)
    torch.save({"residual": saved}, file)
    uplink = Uplink(layout, "int8")
    worker = SimpleNamespace(number=1, uplink=uplink, reply=None, optimizer_file=str)
    trainer = SimpleNamespace(callbacks=[])
    module = "lightning_async_localsgd.lightning.checkpoints.optimizer_states"
    monkeypatch.setattr(f"{module}.folder_of", lambda _: tmp_path)
    monkeypatch.setattr(OptimizerStateSaver, "_load_newest", lambda self, folder: file)

    OptimizerStateSaver(trainer, SimpleNamespace(worker=worker), None, joins, None if joins else file)  # type: ignore[arg-type]

    assert torch.equal(uplink.residual, torch.zeros(300) if joins else saved)


def test_residual_of_another_model_is_not_restored() -> None:
    layout = Layout([("weight", (300,), "torch.float32", "parameter")])
    uplink = Uplink(layout, "int8")
    uplink.residual.fill_(1.0)
    assert not uplink.restore(torch.ones(299))
    assert torch.equal(uplink.residual, torch.zeros(300))
    assert not uplink.restore(None)
