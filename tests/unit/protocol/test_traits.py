"""What workers say about what they compute with."""

from __future__ import annotations

import dataclasses
import platform

import torch

from lightning_async_localsgd.protocol.messages import PROTOCOL_VERSION, Hello
from lightning_async_localsgd.protocol.traits import TRAITS, WorkerTraits, differing_traits, shuffle_digest


def test_traits_of_this_process_go_through_a_hello_to_the_server() -> None:
    traits = WorkerTraits.of_this_process(torch.device("cpu"), "bf16-mixed")
    assert (traits.device, traits.precision) == ("cpu", "bf16-mixed")
    assert traits.software == f"torch {torch.__version__}"
    assert platform.machine() in traits.system
    hello = Hello(PROTOCOL_VERSION, 1, "s", "f", **dataclasses.asdict(traits))
    assert WorkerTraits.of(Hello.decode(hello.encode())) == traits


def test_text_that_would_break_a_table_is_left_out() -> None:
    hello = Hello(PROTOCOL_VERSION, 1, "s", "f", device="a\n\x1b[31mb" + "c" * 100, precision="\t")
    assert WorkerTraits.of(hello) == WorkerTraits("a[31mb" + "c" * 34)


def test_only_known_traits_can_differ() -> None:
    cpu, gpu = WorkerTraits("cpu", "32-true"), WorkerTraits("NVIDIA H200", "32-true")
    assert differing_traits([cpu, gpu]) == ["device"]
    assert differing_traits([cpu, WorkerTraits(), cpu]) == []
    assert TRAITS == ("device", "precision", "software", "system")


def test_order_does_not_depend_on_the_default_device() -> None:
    expected = shuffle_digest()
    shuffle_digest.cache_clear()
    with torch.device("meta"):  # As after torch.set_default_device().
        assert shuffle_digest() == expected
