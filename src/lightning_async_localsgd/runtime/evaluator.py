"""The evaluator's end of the exchange: it gets models to validate, and sends the results. Knows no Lightning."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning_async_localsgd.protocol.codecs import codec_of
from lightning_async_localsgd.protocol.frozen import FrozenParameters
from lightning_async_localsgd.protocol.layout import Binding, Layout
from lightning_async_localsgd.protocol.messages import EVALUATOR, MAX_TEXT, PROTOCOL_VERSION, Hello, Push
from lightning_async_localsgd.runtime.shared_parameters import SharedParameters
from lightning_async_localsgd.runtime.sync_state import (
    frozen_digest,
    same_frozen,
    tensor_digests,
    unexchanged_tensors,
)

if TYPE_CHECKING:
    from torch import nn

    from lightning_async_localsgd.launch.joining import JoinGrant
    from lightning_async_localsgd.protocol.messages import Reply
    from lightning_async_localsgd.protocol.moments import SecondMoments
    from lightning_async_localsgd.protocol.options import ExchangeOptions
    from lightning_async_localsgd.runtime.optimizer_weights import OptimizerWeights


class EvaluatorClient:
    """Gets models from the server and loads them into the module, until training ends.

    Args:
        grant: the server's permission.
        module: the module.
        options: transport and timeouts.
        exchange_frozen: whether frozen parameters are exchanged like trainable ones.
        moments: second moments that workers exchange with the model.
        weights: what the inner optimizers remember of weights.
        check_wait: called while this process waits for a model. Raises an error if waiting has become pointless.

    Raises:
        ValueError: The module's frozen parameters differ from those of the run.

    """

    def __init__(
        self,
        grant: JoinGrant,
        module: nn.Module,
        options: ExchangeOptions,
        exchange_frozen: bool,
        moments: SecondMoments | None,
        weights: OptimizerWeights,
        check_wait: Callable[[], None] = lambda: None,
    ) -> None:
        from lightning_async_localsgd.wire import WireExchange

        layout = Layout.of(module, exchange_frozen, moments)
        tensors = unexchanged_tensors(module, layout)
        digest = frozen_digest(module, tensors, tensor_digests(tensors))
        if not same_frozen(digest, grant.info.frozen_digest):
            raise ValueError(
                "the evaluator cannot join: its frozen parameters differ from those of the run, and frozen parameters "
                "are not exchanged; load the same weights, or call seed_everything() before the module is created"
            )
        self._binding = Binding(layout, module, moments)
        self._weights = weights
        self._model = self._binding.new_flat()
        self._exchange = WireExchange(
            grant.endpoints,
            layout,
            silence_timeout=options.silence_timeout,
            connect_timeout=options.start_timeout,
            download=codec_of(layout, options.download),
            check_wait=check_wait,
        )
        frozen = FrozenParameters(module, layout)
        self._shared = SharedParameters(frozen, self._exchange.share) if frozen.names else None
        self._session = uuid.uuid4().hex
        self._sequence = 0
        self._hello = Hello(
            PROTOCOL_VERSION,
            EVALUATOR,
            self._session,
            layout.fingerprint,
            upload=options.upload,
            download=options.download,
        )
        self._reply: Reply | None = None

    def join(self, failure: str | None) -> dict[str, Any] | None:
        """Join the run, and wait for the first model.

        Args:
            failure: why this process cannot validate; None if it can. Rank 0 logs this text. If training has not begun
                yet, the run ends with it everywhere.

        Returns:
            See :meth:`answer`.

        Raises:
            ExchangeError: The server refuses this process, or cannot be reached any more.

        """
        self._reply = self._exchange.join(self._hello, self._model)
        return self._push(failure or "", stop=failure is not None)

    def answer(self, result: dict[str, Any]) -> dict[str, Any] | None:
        """Send the result of the last validation, and load the next model to validate.

        Returns:
            Where the run is; None if training has ended.

        Raises:
            ValueError: The result is too long for a message.
            ExchangeError: The server cannot be reached any more.

        """
        text = json.dumps(result, separators=(",", ":"), allow_nan=False)
        if len(text) > MAX_TEXT:
            raise ValueError(
                f"the metrics of a validation take {len(text)} characters, and a message of the evaluator holds "
                f"{MAX_TEXT}; log fewer names, or leave the evaluator out, so that rank 0 validates"
            )
        return self._push(text)

    def close(self, reason: str = "") -> None:
        """Leave the run.

        Args:
            reason: why, for rank 0's log.

        """
        self._exchange.close(reason)

    def _push(self, text: str, stop: bool = False) -> dict[str, Any] | None:
        assert self._reply is not None
        self._sequence += 1
        push = Push(
            EVALUATOR, self._session, self._sequence, self._reply.incarnation, self._reply.version, steps=0, samples=0,
            timed_steps=0, compute_seconds=0.0, exchange_seconds=0.0, final=False, stop=stop, metrics=text,
        )  # fmt: skip
        reply = self._reply = self._exchange.push(push, self._model, self._model)
        if reply.stop:
            return None
        self._load(reply)
        position: dict[str, Any] = json.loads(reply.broadcast)
        return position

    def _load(self, reply: Reply) -> None:
        training = self._weights.leave()
        self._binding.load(self._model)
        if self._shared is not None:
            self._shared.adopt(EVALUATOR, self._session, reply)
        self._weights.arrive(training)
