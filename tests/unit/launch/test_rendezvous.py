"""Ranks that meet, and hosts that contradict each other about the run."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from torch.distributed import TCPStore

from lightning_async_localsgd.launch import rendezvous
from lightning_async_localsgd.launch.rendezvous import HostsDifferError, Rendezvous, end_all_ranks
from tests.lightning_contract.launching import free_port

HOST = "127.0.0.1"


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """A free port, at which the store is open. Each rank is a thread with the name of a host."""
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(rendezvous.socket, "gethostname", lambda: threading.current_thread().name)
    number = free_port()
    store = TCPStore(HOST, number, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(rendezvous, "_stores", {(HOST, number): store})
    return number


def run_together(ranks: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Run each rank in a thread with the name of its host. Return results or exceptions by host."""
    results: dict[str, Any] = {}

    def run(name: str, rank: Callable[[], Any]) -> None:
        try:
            results[name] = rank()
        except RuntimeError as error:
            results[name] = error

    threads = [threading.Thread(target=run, args=item, name=item[0]) for item in ranks.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
        assert not thread.is_alive()
    return results


def meet(port: int, rank: int, ranks: int, **options: Any) -> Callable[[], Any]:
    def call() -> Any:
        met = Rendezvous(HOST, port, rank, ranks, 20.0, **options)
        met.barrier("start")
        return met.broadcast(f"from {rank}")

    return call


def test_ranks_meet(port: int) -> None:
    met = run_together({"a": meet(port, 0, 3), "b": meet(port, 1, 3), "c": meet(port, 2, 3, expected_workers=None)})
    assert set(met.values()) == {"from 0"}


@pytest.mark.parametrize(
    ("places", "words"),
    [
        # devices=1 on host a and devices=2 on host b, with num_nodes=2 on both
        (
            {"a": (0, 2), "b": (2, 4), "b too": (3, 4)},
            ["host b", "a run of 4 ranks, but rank 0 on host a to a run of 2 ranks", "ASYNC_LOCALSGD_JOIN"],
        ),
        # Two hosts with the same NODE_RANK
        ({"a": (0, 3), "b": (1, 3), "c": (1, 3)}, ["rank 1 was started twice", "host b", "host c", "NODE_RANK"]),
    ],
)
def test_hosts_with_other_ranks_end_all_with_the_same_text(
    port: int, places: dict[str, tuple[int, int]], words: list[str]
) -> None:
    ended = run_together({host: meet(port, *place) for host, place in places.items()})
    assert ended.keys() == places.keys()
    assert all(isinstance(error, HostsDifferError) for error in ended.values())
    [text] = {str(error) for error in ended.values()}
    assert all(word in text for word in words), text


def test_hosts_that_expect_other_numbers_of_workers_end_with_the_same_text(port: int) -> None:
    ended = run_together({"a": meet(port, 0, 2, expected_workers=5), "b": meet(port, 1, 2, expected_workers=4)})
    [text] = {str(error) for error in ended.values()}
    assert "host b has expected_workers=4, but rank 0 on host a has expected_workers=5" in text


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_that_cannot_take_part_ends_the_others(port: int, rank: int) -> None:
    def refuse() -> None:
        end_all_ranks(HOST, port, rank, 2, 20.0, 1, "host a has too many devices")

    ended = run_together({"a": refuse, "b": meet(port, 1 - rank, 2)})
    assert ended["a"] is None
    assert str(ended["b"]) == "host a has too many devices"


def test_restarted_rank_compares_nothing(port: int) -> None:
    first = Rendezvous(HOST, port, 0, 2, 20.0)
    again = Rendezvous(HOST, port, 1, 2, 20.0, rejoins=True, expected_workers=7)
    assert again.broadcast("own") == "own"
    assert json.loads(first._store.get("place/0"))["ranks"] == 2


def test_hosts_without_proc_are_told_apart_by_their_network_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_proc(*_: Any) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(rendezvous.Path, "read_text", no_proc)
    monkeypatch.setattr(rendezvous.socket, "gethostname", lambda: "MacBook.local")
    found = []
    for node in (0x3C22FB000001, 0x3C22FB000002, 0x3D22FB000003, 0x3D22FB000004):
        monkeypatch.setattr(rendezvous.uuid, "getnode", lambda node=node: node)
        found.append(rendezvous._host_identity())
    assert found[0] != found[1]
    assert found[2] == found[3] == "MacBook.local", "a random number would differ between processes of one host"
