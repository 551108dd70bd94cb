"""Worker processes of data loaders that die: their error is raised only where nothing can be half done.

As soon as a data loader's process dies, torch raises an error in the main thread, whatever the thread is doing. A
signal to a whole process group kills these processes first, so the error would come while a checkpoint is being saved
because of the signal.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch.utils.data.dataloader
from lightning.pytorch.utilities.exceptions import SIGTERMException

if TYPE_CHECKING:
    import lightning.pytorch as pl


class LoaderDeaths:
    """Hold back the error of a data loader's process that has died, during a fit.

    The error is raised at once if the main thread is waiting for data, and at the end of the batch otherwise. It is
    not raised if the job was asked to end by SIGTERM: Lightning ends training at the end of the batch.
    """

    def __init__(self) -> None:
        self._trainer: pl.Trainer | None = None
        self._error: Exception | None = None

    def watch(self, trainer: pl.Trainer) -> None:
        """Hold errors back from now on. Call this repeatedly: torch reports deaths only after its first process."""
        self._trainer = trainer
        current = signal.getsignal(signal.SIGCHLD)
        if not callable(current) or isinstance(current, _Handler):
            return
        # Only the main thread may set signal handlers, and signal handlers run only there.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, _Handler(current, self))

    def raise_held(self) -> None:
        """Raise the error that was held back, if any. The batch is complete."""
        error, self._error = self._error, None
        if error is not None and not self._is_asked_to_end:
            raise error

    def end(self) -> None:
        """End with the fit. Lightning then restores the signal handlers of the time before."""
        self._trainer = self._error = None

    def hold(self, error: Exception, frame: FrameType | None) -> None:
        """Hold an error back, unless the main thread waits for data, which may never come.

        Args:
            error: error of torch's signal handler.
            frame: frame of the main thread that the signal has interrupted.

        """
        if not _waits_for_data(frame):
            if self._trainer is not None:
                self._error = self._error or error
        elif self._is_asked_to_end:
            raise SIGTERMException from None
        else:
            raise error

    @property
    def _is_asked_to_end(self) -> bool:
        return self._trainer is not None and self._trainer.received_sigterm


class _Handler:
    """A signal handler that passes errors of another one on.

    Args:
        reports: the handler that this one replaces.
        deaths: gets the errors of ``reports``.

    """

    def __init__(self, reports: Any, deaths: LoaderDeaths) -> None:
        self.reports = reports
        self.deaths = deaths

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        try:
            self.reports(signum, frame)
        except Exception as error:
            self.deaths.hold(error, frame)


def _waits_for_data(frame: FrameType | None) -> bool:
    """Return whether a frame, or one of its callers, is the next batch of one of torch's data loaders."""
    while frame is not None:
        module = frame.f_globals.get("__name__")
        if module == torch.utils.data.dataloader.__name__ and frame.f_code.co_name == "__next__":
            return True
        frame = frame.f_back
    return False
