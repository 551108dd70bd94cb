"""How a run's ranks meet before and after the asynchronous phase of a fit: who is who, and Lightning's collectives.

There these are real: through the rendezvous store in ``fit``, in a process group in ``validate``, ``test`` and
``predict``. Within the phase they are local and never wait.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies.ddp import DDPStrategy
from lightning_utilities.core.rank_zero import rank_zero_only
from typing_extensions import override

from lightning_async_localsgd.children import ended_ranks, raise_if_process_ended
from lightning_async_localsgd.hyperparameters import seconds
from lightning_async_localsgd.joining import Entry, Invitation, begin_run, enter, invitation, takes_part, token_of
from lightning_async_localsgd.options import ExchangeOptions
from lightning_async_localsgd.rendezvous import Rendezvous, open_group_of_one

if TYPE_CHECKING:
    from lightning.pytorch.strategies.strategy import TBroadcast


class MeetingStrategy(DDPStrategy):
    """The strategy as far as it is an ordinary synchronous one.

    Args:
        exchange: how ranks reach the server.
        start_timeout: seconds that rank 0 waits for the other ranks, and they for rank 0.
        token: secret of the run, see :func:`.token_of`.
        lightning: arguments of :class:`~lightning.pytorch.strategies.DDPStrategy`.

    Raises:
        TypeError: ``exchange`` is none.
        ValueError: a time that is none, or a token that is too short.

    """

    def __init__(self, exchange: ExchangeOptions | None, start_timeout: float, token: str | None, **lightning: Any):
        super().__init__(**lightning)
        if exchange is not None and not isinstance(exchange, ExchangeOptions):
            raise TypeError(f"exchange={exchange!r} must be an ExchangeOptions, or None for its defaults")
        token_of(token)
        self.exchange = exchange if exchange is not None else ExchangeOptions()
        self.start_timeout = seconds("start_timeout", start_timeout)
        self._token = token
        self._rendezvous: Rendezvous | None = None
        self._entry: Entry | None = None
        self._run = 0
        self._fit = 0
        self._alone_in_group = False

    @property
    @abstractmethod
    def _apart(self) -> bool:
        """Whether ranks run at their own speed at the moment."""

    @property
    def _invitation(self) -> Invitation | None:
        return invitation(self._token, self.exchange.encrypt)

    @property
    def joins(self) -> bool:
        """Whether this process takes part in a training that ran before it was there."""
        return self._entry is not None

    def takes_part(self, fitting: bool) -> bool:
        """Whether this process has a part in the run that the script has come to: one that joins need not."""
        invited = self._invitation
        return invited is None or takes_part(enter(invited, self.start_timeout), fitting)

    @override
    def set_world_ranks(self) -> None:
        invited = self._invitation
        if invited is None or not invited.stranger:
            super().set_world_ranks()
            return
        if type(self.cluster_environment) is not LightningEnvironment:
            # A stranger may be a task of SLURM's or a process of torchrun's, which know only their own ranks.
            self.cluster_environment = LightningEnvironment()
        super().set_world_ranks()
        # Above 0 from the beginning; which one it is becomes known when it joins.
        facts = None if self._entry is None else self._entry.facts
        assert self.cluster_environment is not None
        self.cluster_environment.set_global_rank(1 if facts is None else facts.worker)
        self.cluster_environment.set_world_size(2 if facts is None else facts.workers)
        rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined] # a function with a rank

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        shares = super().distributed_sampler_kwargs
        # A worker beyond the first ones has no share of its own in data that is split in advance.
        return {**shares, "rank": shares["rank"] % shares["num_replicas"]}

    def _meet(self, fitting: bool) -> None:
        """A run begins: finds out who this rank is, and where it meets the others."""
        self._run, self._fit = begin_run(fitting)
        invited = self._invitation
        self._entry = None
        if invited is not None:
            entry = enter(invited, self.start_timeout)
            self._entry = entry if fitting and entry.facts.fit == self._fit else None
        self.set_world_ranks()
        if self.world_size > 1 and not (self._entry is not None and self._entry.stranger):
            reset_seed()  # So that all ranks build the same model and agree on permutations.
            environment = self.cluster_environment
            assert environment is not None
            self._rendezvous = Rendezvous(
                environment.main_address,
                environment.main_port,
                self.global_rank,
                self.world_size,
                self.start_timeout,
                raise_if_process_ended,
                ended_ranks,
                run=self._run,
                late=self.joins,
            )

    def _part(self, waiting: bool) -> None:
        """The run is over on this rank.

        Args:
            waiting: rank 0 waits until it is so on the others.

        """
        if self._alone_in_group:
            torch.distributed.destroy_process_group()
            self._alone_in_group = False
        if self._rendezvous is not None:
            self._rendezvous.close_group()
            if waiting:
                self._rendezvous.conclude()
            self._rendezvous = None

    def _open_group(self) -> None:
        """``validate``, ``test`` and ``predict`` have a process group, as with DDP."""
        self._process_group_backend = self._get_process_group_backend()
        device = self.root_device
        options: dict[str, Any] = {"device_id": None if device.type == "cpu" else device}
        if self._rendezvous is None:
            self._alone_in_group = open_group_of_one(self._process_group_backend, self._timeout, **options)
        else:
            self._rendezvous.barrier("process group")
            self._rendezvous.open_group(self._process_group_backend, self._timeout, **options)

    # -------------------------------------------------------------- collectives

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if self._apart:
            return
        if torch.distributed.is_initialized():
            super().barrier(*args, **kwargs)
        elif self._rendezvous is not None:
            self._rendezvous.barrier(str(args[0]) if args else kwargs.get("name"))

    @override
    def broadcast(self, obj: TBroadcast, src: int = 0) -> TBroadcast:
        if self._apart:
            return obj
        if torch.distributed.is_initialized():
            return super().broadcast(obj, src)
        if self._rendezvous is not None:
            return self._rendezvous.broadcast(obj, src)  # type: ignore[no-any-return]
        return obj

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        # Without a group the inherited one would sum over one rank and compare with the world size.
        if torch.distributed.is_initialized():
            return super().reduce_boolean_decision(decision, all)
        return decision
