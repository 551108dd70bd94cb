from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_async_localsgd.protocol import codecs
from lightning_async_localsgd.protocol.codecs import BLOCK, Codec, Encoding, codec_of
from lightning_async_localsgd.protocol.layout import Layout

ENCODINGS: list[Encoding] = ["bf16", "int8", "int4"]
TOP = {"int8": 127, "int4": 7}

sizes = st.one_of(st.integers(1, 3 * BLOCK), st.sampled_from([BLOCK, 257 * BLOCK, 256 * BLOCK + 1, 300 * BLOCK + 7]))
magnitudes = st.floats(-40.0, 30.0).map(lambda power: 10.0**power)


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Iterator[None]:
    """Let a chunk have 100 blocks, so that small vectors have several chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codecs, "_CHUNK_BLOCKS", 100)
        yield


def layout_of(parameters: int, buffers: int = 0, moments: int = 0) -> Layout:
    kinds = (("parameter", parameters), ("buffer", buffers), ("moment", moments))
    return Layout([(kind, (count,), "torch.float32", kind) for kind, count in kinds if count])  # type: ignore[misc]


def values(numel: int, magnitude: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(numel, generator=generator).mul_(2.0).exp_()
    return torch.randn(numel, generator=generator) * spread * magnitude


def packed_push(codec: Codec, push: Tensor, residual: Tensor | None = None, number: int = 1) -> tuple[Tensor, Tensor]:
    """Return the packed bytes of a push, and what they are unpacked to."""
    packed, out = codec.new_packed(), torch.full_like(push, 5.0)
    residual = torch.zeros(codec._parameters) if residual is None else residual
    codec.pack_push(push, packed, residual, number)
    codec.unpack(packed, out)
    return packed, out


@pytest.mark.parametrize("encoding", ENCODINGS)
@given(numel=sizes, magnitude=magnitudes, seed=st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_a_value_differs_from_the_packed_one_by_half_a_scale_at_most(
    encoding: Encoding, numel: int, magnitude: float, seed: int
) -> None:
    push = values(numel, magnitude, seed)
    wanted = push.double()

    _, out = packed_push(Codec(layout_of(numel), encoding), push)

    error = (out.double() - wanted).abs()
    if encoding == "bf16":
        assert bool((error <= wanted.abs() * 2**-8 + 1e-40).all())
        return
    for begin in range(0, numel, BLOCK):
        block = wanted[begin : begin + BLOCK].abs()
        scale = max(float(block.max()), 1e-30) / TOP[encoding]
        assert float(error[begin : begin + BLOCK].max()) <= 0.5001 * scale


@pytest.mark.parametrize("encoding", ENCODINGS)
@given(numel=sizes, magnitude=magnitudes, seeds=st.lists(st.integers(0, 100), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_what_was_sent_plus_the_residual_is_what_was_to_be_sent(
    encoding: Encoding, numel: int, magnitude: float, seeds: list[int]
) -> None:
    codec, residual = Codec(layout_of(numel), encoding), torch.zeros(numel)
    for number, seed in enumerate(seeds, 1):
        push = values(numel, magnitude, seed)
        to_be_sent = residual + push  # The only sum that is rounded, to fp32.

        _, out = packed_push(codec, push, residual, number)

        assert torch.equal(out, push), "the sender's vector is what the receiver unpacks"
        if encoding != "bf16" or bool((to_be_sent.abs() > 1e-30).all()):
            assert torch.equal(out.double() + residual.double(), to_be_sent.double())


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_chunks_do_not_change_what_is_packed(encoding: Encoding, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, push = (
        layout_of(257 * BLOCK + 3, 5, 200_000),
        values(457 * BLOCK + 200_000, 1.0, 1)[: 257 * BLOCK + 200_008],
    )
    packed = []
    for blocks in (1000, 100, 1):
        monkeypatch.setattr(codecs, "_CHUNK_BLOCKS", blocks)
        packed.append(packed_push(Codec(layout, encoding), push.clone())[0])
    assert torch.equal(packed[0], packed[1])
    assert torch.equal(packed[0], packed[2])


def test_a_byte_has_two_signed_values() -> None:
    codec, push = Codec(layout_of(BLOCK), "int4"), torch.zeros(BLOCK)
    push[0], push[BLOCK // 2], push[1], push[BLOCK - 1] = -7.0, 3.0, 7.0, -7.0
    packed, out = packed_push(codec, push.clone())
    bytes_ = packed[-BLOCK // 2 :].view(torch.int8)
    assert bytes_[[0, 1, BLOCK // 2 - 1]].tolist() == [-7 + 16 * 3, 7, 16 * -7]
    assert torch.equal(out, push)


@given(numel=sizes, seed=st.integers(0, 100), rounds=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_sender_and_receiver_hold_the_same_model_after_each_difference(numel: int, seed: int, rounds: int) -> None:
    codec, packed = Codec(layout_of(numel, 3, 2), "int8"), torch.empty(0)
    model = values(numel + 5, 1.0, seed).abs_()
    held, received = model.clone(), model.clone()
    for version in range(rounds):
        model += 0.01 * values(numel + 5, 1.0, seed + version).abs_()
        packed = codec.new_packed()
        before = (model - held)[:numel].abs()

        codec.pack_difference(model, packed, held, version)
        codec.unpack(packed, received, difference=True)

        assert torch.equal(held, received)
        assert float((model - received)[:numel].abs().max()) <= 0.502 * float(before.max()) / 127 + 1e-6
        assert torch.equal(received[numel : numel + 3], model[numel : numel + 3])


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@given(numel=st.integers(2, 2 * BLOCK), where=st.integers(0, 10_000), seed=st.integers(0, 50))
@settings(max_examples=20, deadline=None)
def test_a_value_that_is_not_finite_arrives_as_such_and_is_not_left_over(
    encoding: Encoding, bad: float, numel: int, where: int, seed: int
) -> None:
    push, residual = values(numel, 1.0, seed), torch.zeros(numel)
    push[where % numel] = bad

    _, out = packed_push(Codec(layout_of(numel), encoding), push, residual)

    assert not math.isfinite(float(out[where % numel]))
    assert torch.equal(residual, torch.zeros(numel))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_sum_that_overflows_is_not_finite(encoding: Encoding) -> None:
    push, residual = torch.full((4,), 3e38), torch.full((4,), 3e38)

    _, out = packed_push(Codec(layout_of(4), encoding), push, residual)

    assert not bool(torch.isfinite(out).any())


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_buffers_arrive_exactly_and_moments_as_bf16(encoding: Encoding) -> None:
    push = values(10 + 5 + 4, 1.0, 1).abs_()
    push[-1] = math.nan  # unknown
    wanted = push.clone()

    _, out = packed_push(Codec(layout_of(10, 5, 4), encoding), push)

    assert torch.equal(out[10:15], wanted[10:15])
    assert bool(((out[15:18] - wanted[15:18]).abs() <= wanted[15:18] * 2**-7).all())
    assert math.isnan(float(out[18]))
    assert math.isnan(float(push[18]))


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC00000, -0x400000])
def test_every_nan_stays_an_unknown_moment(bits: int) -> None:
    push = torch.zeros(BLOCK + 1)
    push[-1:].view(torch.int32).fill_(bits)
    for number in range(1, 20):
        _, out = packed_push(Codec(layout_of(BLOCK, 0, 1), "int8"), push.clone(), number=number)
        assert math.isnan(float(out[-1]))


def test_moments_are_right_on_average_and_do_not_stay_where_they_are() -> None:
    codec = Codec(layout_of(1, 0, 1), "int8")
    wanted = 1.0 + 2**-10  # An eighth of the distance between 1 and the next number of bf16.
    out = [float(packed_push(codec, torch.tensor([0.0, wanted]), number=number)[1][1]) for number in range(1, 513)]

    assert set(out) == {1.0, 1.0 + 2**-7}
    assert sum(out) / len(out) == pytest.approx(wanted, abs=2**-7 / 64)


@pytest.mark.parametrize(
    ("encoding", "share", "nbytes"), [("bf16", 0.5, 204_800), ("int8", 0.26, 104_000), ("int4", 0.14, 52_800)]
)
def test_bytes_of_a_push(encoding: Encoding, share: float, nbytes: int) -> None:
    codec = Codec(layout_of(400 * BLOCK, 100, 50), encoding)

    assert codec.parameter_nbytes == nbytes
    assert codec.parameter_nbytes <= share * 4 * 400 * BLOCK
    assert codec.nbytes == nbytes + 4 * 100 + 2 * 50
    assert codec.new_packed().numel() == codec.nbytes


@pytest.mark.parametrize("change", [{"dtype": torch.int8}, {"numel": 3}])
def test_memory_of_another_size_or_dtype_is_refused(change: dict[str, Any]) -> None:
    codec = Codec(layout_of(8), "int8")
    packed = torch.empty(change.get("numel", codec.nbytes), dtype=change.get("dtype", torch.uint8))
    with pytest.raises(ValueError, match=f"{codec.nbytes} are needed"):
        codec.unpack(packed, torch.empty(8))


def test_fp32_needs_no_codec() -> None:
    assert codec_of(layout_of(3), "fp32") is None
