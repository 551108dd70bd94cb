"""The process group of ``validate``, ``test`` and ``predict``. Ranks may differ in device and precision."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from lightning_async_localsgd.launch.rendezvous import HostsDifferError, open_group_of_one

if TYPE_CHECKING:
    from datetime import timedelta

    from torch import Tensor, nn

    from lightning_async_localsgd.launch.rendezvous import Rendezvous


@dataclass(frozen=True)
class GroupMember:
    """What a rank says before the group is opened.

    Args:
        host: name of its host.
        device: type of its device.
        chosen: backend that its Trainer was given; None without one.
        usual: backend that is usual for its device.
        precision: precision of its Trainer.
        software: its version of torch.

    """

    host: str
    device: str
    chosen: str | None
    usual: str
    precision: str
    software: str = str(torch.__version__)

    @property
    def kind(self) -> tuple[str, str, str]:
        """What decides in which dtypes a rank computes. Autocast has another list of operations for each device."""
        return self.device, self.precision, self.software


def common_backend(members: Sequence[GroupMember]) -> str:
    """Return the backend with which all ranks can open a group. All ranks get the same, or raise the same error.

    Ranks on CUDA devices use NCCL. If one is on a CPU, all use gloo.

    Args:
        members: all ranks, in order.

    Raises:
        HostsDifferError: The backends that ranks were given contradict each other, or the device of a rank.

    Example::

        >>> cuda = GroupMember("a", "cuda", None, "nccl", "bf16-mixed")
        >>> cpu = GroupMember("b", "cpu", None, "gloo", "32-true")
        >>> common_backend([cuda, cuda]), common_backend([cuda, cpu])
        ('nccl', 'gloo')

    """
    chosen = {member.chosen: f"rank {rank} on host {member.host}" for rank, member in enumerate(members)}
    chosen.pop(None, None)
    if len(chosen) > 1:
        given = " and ".join(f"process_group_backend={backend!r} ({rank})" for backend, rank in chosen.items())
        raise HostsDifferError(f"ranks have different backends: {given}; use the same value on every host, or none")
    usual = {member.usual for member in members}
    backend = next(iter(chosen), None) or (usual.pop() if len(usual) == 1 else "gloo")
    for rank, member in enumerate(members):
        if backend == "nccl" and member.device != "cuda":
            raise HostsDifferError(
                f"process_group_backend='nccl' ({chosen[backend]}) needs a CUDA device for each rank, but rank {rank} "
                f"on host {member.host} is on {member.device!r}; leave the option out, so that all ranks use gloo"
            )
    return backend


class StageGroup:
    """The default process group of one call of the Trainer.

    Args:
        chosen: backend that the Trainer was given; None without one.

    Attributes:
        chosen: see above.
        mixed: whether ranks are of unequal kinds, so that tensors of one name may have unequal dtypes.

    """

    def __init__(self, chosen: str | None = None) -> None:
        self.chosen = chosen
        self.mixed = False
        self._is_own = False

    def open(
        self,
        rendezvous: Rendezvous | None,
        device: torch.device,
        usual: str,
        precision: str,
        timeout: timedelta | None,
    ) -> str:
        """Open the group, and return its backend. All ranks call this.

        Args:
            rendezvous: meeting point of the ranks; None for a single rank.
            device: device of this rank.
            usual: backend that is usual for this device.
            precision: precision of this rank.
            timeout: limit for each operation of the group.

        Raises:
            HostsDifferError: see :func:`common_backend`.

        """
        bound = None if device.type == "cpu" else device
        if rendezvous is None:
            self._is_own = open_group_of_one(self.chosen or usual, timeout, device_id=bound)
            return self.chosen or usual
        rendezvous.barrier("process group")
        members = rendezvous.gather(GroupMember(socket.gethostname(), device.type, self.chosen, usual, precision))
        backend = common_backend(members)
        self.mixed = len({member.kind for member in members}) > 1
        rendezvous.open_group(backend, timeout, device_id=bound)
        return backend

    def close(self) -> None:
        """Destroy the group of a single rank, if :meth:`open` opened one."""
        if self._is_own:
            dist.destroy_process_group()
        self._is_own = self.mixed = False

    def sync_weights(self, module: nn.Module) -> None:
        """Give all ranks the parameters and buffers of rank 0, each in its own dtype."""
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                wide = _widened(tensor.detach()).contiguous()
                dist.broadcast(wide, src=0)
                tensor.copy_(wide)

    def run(self, operation: Callable[[Tensor], Tensor], tensor: Any) -> Any:
        """Return the result of a collective operation, for which the tensors of all ranks need the same dtype."""
        if not self.mixed or not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            return operation(tensor)
        return operation(_widened(tensor)).to(tensor.dtype)


def _widened(tensor: Tensor) -> Tensor:
    """Return a tensor in the dtype that holds the values of all precisions exactly."""
    return tensor.double() if tensor.is_floating_point() else tensor
