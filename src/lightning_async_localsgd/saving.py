"""What the strategy has to do with checkpoints: the global model and the server's state go in, and come out again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_async_localsgd.checkpoints import CHECKPOINT_KEY, SavedModel, frozen_in_time, without_theta
from lightning_async_localsgd.companions import keep_beside, remove_beside
from lightning_async_localsgd.inner_state import resume
from lightning_async_localsgd.launcher import AsyncProcessLauncher
from lightning_async_localsgd.meeting import MeetingStrategy
from lightning_async_localsgd.periodic import is_periodic, load_periodic
from lightning_async_localsgd.plan import Position
from lightning_async_localsgd.run_folder import folder_of

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.fabric.utilities.types import _PATH

    from lightning_async_localsgd.phase_base import Phase
    from lightning_async_localsgd.training import AsyncTraining


class SavingStrategy(MeetingStrategy):
    """The strategy as far as it saves and loads.

    Args:
        arguments: of :class:`.MeetingStrategy`.
        lightning: likewise.

    Attributes:
        run_name: name of the run's folder.
        inner_file: where this rank's inner optimizer states have been loaded from.

    """

    def __init__(self, *arguments: Any, **lightning: Any) -> None:
        super().__init__(*arguments, **lightning)
        self.run_name = ""
        self.inner_file: Path | None = None
        self._training: AsyncTraining | None = None
        # Of a checkpoint that is resumed, and of the training that was the last.
        self._restored: dict[str, Any] | None = None
        self._position: Position | None = None
        self._last_state: dict[str, Any] | None = None
        self._saved = SavedModel()

    @property
    def phase(self) -> Phase | None:
        """The asynchronous phase while it lasts."""
        return None if self._training is None else self._training.phase

    @property
    def training(self) -> AsyncTraining | None:
        """What is done and held while ranks run at their own speed."""
        return self._training

    @property
    def _trainer(self) -> pl.Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = super().lightning_module_state_dict()
        if self._training is None or not self.is_global_zero:
            return state
        self._training.settle()
        tensors, version = self._training.phase.global_tensors()
        shown, restoring = self._training.phase.in_place_of(state, tensors)
        self._saved = SavedModel(version, restoring)
        return shown

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        if isinstance(self.launcher, AsyncProcessLauncher) and self.launcher.apart:
            # Callbacks that save when there was an exception do so in the process that has launched the ranks, too.
            rank_zero_warn(f"not saved to {filepath}: the ranks have failed, and this process has no trained model")
            return
        server = self.add_server_state(checkpoint) if self.is_global_zero and "optimizer_states" in checkpoint else None
        super().save_checkpoint(frozen_in_time(checkpoint, self.checkpoint_io), filepath, storage_options)
        if server is not None:
            keep_beside(filepath, server, folder_of(self._trainer))
            if self._training is not None:
                self._training.ask_for_inner_states(filepath, server)

    def add_server_state(self, checkpoint: dict[str, Any]) -> dict[str, Any] | None:
        """Rank 0: adds the server's state to a checkpoint that the trainer has made, and returns it if there is one."""
        state = self._last_state
        if self._training is not None:
            state = self._training.state_dict()
            if self._saved.is_in(checkpoint, state["model"]["version"]):
                state = without_theta(state)
        if state is not None:
            checkpoint[CHECKPOINT_KEY] = state = {**state, "folder": self.run_name}
        return state

    @override
    def remove_checkpoint(self, filepath: _PATH) -> None:
        super().remove_checkpoint(filepath)
        if self.is_global_zero:
            if self._training is not None:
                self._training.forget_checkpoint(filepath)
            remove_beside(filepath)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        server = checkpoint.get(CHECKPOINT_KEY)
        if self.is_global_zero or server is None:
            super().load_optimizer_state_dict(checkpoint)
        else:
            # In it is rank 0's own state; that of another worker is beside it.
            self.inner_file = resume(self._trainer, checkpoint, server)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, *args: Any, **kwargs: Any) -> dict[str, Any]:
        load = load_periodic if is_periodic(checkpoint_path) else super().load_checkpoint
        checkpoint: dict[str, Any] = load(checkpoint_path, *args, **kwargs)
        module = self.lightning_module
        # After a fit in spawned processes, the process that has started them has a module without a trainer.
        attached = module is not None and module._trainer is not None
        if attached and self._trainer.state.fn == TrainerFn.FITTING:
            state = checkpoint.get(CHECKPOINT_KEY)
            self._position = Position.in_state(state or {})
            if self.is_global_zero:
                self._restored = state
        if self.joins:
            checkpoint.pop("loops", None)  # The run has gone on since; where it is now, the server tells.
        return checkpoint
