"""Rank 0 acts on the evaluator's results. The server and the runtime are those of the test."""

from __future__ import annotations

import json
import queue
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_async_localsgd.lightning.loop.delegated_validations import DelegatedValidations
from lightning_async_localsgd.protocol.buffers import BufferPool
from lightning_async_localsgd.server.evaluations import ValidationRequest, ValidationResult
from tests.lightning_models import Regression, loader, quiet_trainer

STEPS = 4


class Server:
    """A server whose evaluator answers when rank 0 waits for it at the end of training.

    Args:
        text: the answer; None if the evaluator is lost instead.

    """

    def __init__(self, text: str | None) -> None:
        self.text = text
        self.evaluations = SimpleNamespace(present=True, results=self)

    def request_validation(self, position: dict[str, int]) -> ValidationRequest:
        buffer = BufferPool(1).try_acquire()
        assert buffer is not None
        return ValidationRequest(1, 1, buffer)

    def get_nowait(self) -> ValidationResult:
        raise queue.Empty

    def get(self, timeout: float) -> ValidationResult:
        return ValidationResult(1, self.text)

    def end_evaluations(self) -> None:
        """End the evaluator."""


class Runtime:
    """The part of rank 0, which records what is done to the module and the global model."""

    in_step = False

    def __init__(self, trainer: L.Trainer, server: Server) -> None:
        self.trainer = trainer
        self.server = server
        self.calls: list[str] = []

    @property
    def stopped(self) -> bool:
        return self.trainer.global_step >= STEPS

    def flush_round(self) -> bool:
        self.calls.append("flush")
        return False

    def show_global_model(self, *_: Any) -> None:
        self.calls.append("show")

    def hide_global_model(self) -> None:
        self.calls.append("hide")


class Delegating(L.Callback):
    """Delegates the validations of a fit, as the strategy does.

    Args:
        server: the server.

    """

    def __init__(self, server: Server) -> None:
        self.server = server

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.runtime = Runtime(trainer, self.server)
        runtime: Any = self.runtime
        self.delegated = DelegatedValidations(trainer, runtime, lambda: None, lambda _: None, lambda _: None)

    def on_train_batch_end(self, *_: Any) -> None:
        self.delegated.poll()

    def on_train_epoch_end(self, *_: Any) -> None:
        self.delegated.end()
        self.delegated.restore()


def run(folder: Path, text: str | None, module: L.LightningModule | None = None) -> Delegating:
    """Train with validations at the steps 2 and 4. The first one is out until training has ended."""
    delegating = Delegating(Server(text))
    saved = ModelCheckpoint(folder, monitor="val_loss", save_top_k=-1)
    trainer = quiet_trainer(
        "auto", max_steps=STEPS, val_check_interval=2, num_sanity_val_steps=0, callbacks=[delegating, saved],
        default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module or Regression(), loader(64), loader(32, shuffle=False))
    return delegating


RESULT = json.dumps({"number": 1, "metrics": {"val_loss": 0.5}, "bar": {}, "logged": [], "stop": False})


@pytest.mark.parametrize("text", [RESULT, None], ids=["result", "lost"])
def test_model_that_was_out_and_the_final_one_are_both_saved(text: str | None, tmp_path: Path) -> None:
    run(tmp_path, text)
    assert len(list(tmp_path.glob("*.ckpt"))) == 2


def test_global_model_is_up_to_date_before_a_validated_one_is_shown(tmp_path: Path) -> None:
    assert run(tmp_path / "result", RESULT).runtime.calls == ["flush", "show", "hide"]
    assert run(tmp_path / "lost", None).runtime.calls == ["flush"]


@pytest.mark.parametrize("text", [RESULT, None], ids=["result", "lost"])
def test_scheduler_whose_metric_the_validation_lacks_is_an_error_as_without_an_evaluator(
    text: str | None, tmp_path: Path
) -> None:
    class Misspelled(Regression):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            follows = {"scheduler": plateau, "monitor": "val_los", "interval": "step", "frequency": 3}
            return {"optimizer": optimizer, "lr_scheduler": follows}

    with pytest.raises(MisconfigurationException, match="metric val_los which is not available"):
        run(tmp_path, text, Misspelled())
