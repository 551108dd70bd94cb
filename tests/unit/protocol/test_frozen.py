"""Frozen parameters that a module moves itself are noticed, and no others."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_async_localsgd.protocol.frozen import FrozenParameters, pack_numbers, split, unpack_numbers
from lightning_async_localsgd.protocol.layout import Layout
from lightning_async_localsgd.protocol.messages import MessageError


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(40, 3)
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.codes = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
        self.coarse = nn.Parameter(torch.ones(3, dtype=torch.bfloat16), requires_grad=False)


def watched() -> tuple[Student, FrozenParameters]:
    module = Student()
    frozen = FrozenParameters(module, Layout.of(module))
    frozen.watch()
    return module, frozen


def replaced(module: Student) -> None:
    module.teacher = copy.deepcopy(module.net).requires_grad_(False)
    with torch.no_grad():
        module.teacher.weight.add_(1.0)


def set_data(module: Student) -> None:
    module.teacher.weight.data = module.teacher.weight.data * 0.9


def one_element(module: Student) -> None:
    with torch.no_grad():
        module.teacher.weight[1, 1] = 7.0


MOVES: list[Callable[[Student], object]] = [
    lambda module: module.teacher.weight.data.mul_(0.9),
    lambda module: module.teacher.load_state_dict({"weight": torch.ones(3, 40), "bias": module.teacher.bias}),
    replaced,
    set_data,
    one_element,
]


@pytest.mark.parametrize("move", MOVES)
def test_changed_parameter_is_noticed_however_it_is_changed(move: Callable[[Student], object]) -> None:
    module, frozen = watched()
    assert frozen.names == ["coarse", "teacher.weight", "teacher.bias"]
    assert frozen.changed() == []
    move(module)
    assert [frozen.names[number] for number in frozen.changed()] == ["teacher.weight"]
    # It stays noticed, and the others are still watched.
    module.coarse.data.mul_(2.0)
    assert [frozen.names[number] for number in frozen.changed()] == ["coarse", "teacher.weight"]


def test_parameter_that_is_swapped_and_swapped_back_has_not_changed() -> None:
    module, frozen = watched()
    with torch.no_grad():
        kept = module.teacher.weight.clone()
        module.teacher.weight.zero_()
        module.teacher.weight.copy_(kept)
    assert frozen.changed() == []


def test_values_are_watched_in_the_order_in_memory() -> None:
    module = nn.Sequential(nn.Linear(1, 1), nn.Conv2d(8, 8, 3).requires_grad_(False)).to(
        memory_format=torch.channels_last
    )
    frozen = FrozenParameters(module, Layout.of(module))
    frozen.watch()
    assert frozen.changed() == []
    module[1].weight.data.mul_(0.9)
    assert [frozen.names[number] for number in frozen.changed()] == ["1.weight"]


def test_few_elements_changed_through_data_are_found_by_a_thorough_search() -> None:
    module, frozen = watched()
    module.teacher.weight.data[1, 1] = 7.0
    assert frozen.changed() == []
    assert [frozen.names[number] for number in frozen.changed(thorough=True)] == ["teacher.weight"]


def test_values_are_read_and_loaded_as_one_vector() -> None:
    module, frozen = watched()
    values = frozen.read([0, 2])
    parts = {number: part.tolist() for number, part in split(frozen.sizes, [0, 2], values)}
    assert parts == {0: [1.0] * 3, 2: module.teacher.bias.tolist()}
    assert torch.equal(values, torch.cat([torch.ones(3), module.teacher.bias]))
    frozen.load([0, 2], torch.arange(6.0))
    assert torch.equal(module.coarse, torch.tensor([0.0, 1.0, 2.0], dtype=torch.bfloat16))
    assert torch.equal(module.teacher.bias, torch.tensor([3.0, 4.0, 5.0]))
    assert frozen.differing([0, 2], torch.arange(6.0)) == []
    assert frozen.differing([0, 2], torch.arange(1.0, 7.0)) == ["coarse", "teacher.bias"]


def test_parameter_with_another_shape_stays_as_it_is() -> None:
    module, frozen = watched()
    module.teacher.bias = nn.Parameter(torch.zeros(7), requires_grad=False)
    frozen.load([0, 2], torch.arange(6.0))
    assert torch.equal(module.teacher.bias, torch.zeros(7))


def test_numbers_are_packed_as_ranges() -> None:
    assert pack_numbers([0, 1, 2, 7, 9, 10]) == "0-2,7,9-10"
    assert unpack_numbers("0-2,7,9-10", 11) == [0, 1, 2, 7, 9, 10]
    assert unpack_numbers("", 3) == []


@pytest.mark.parametrize("text", ["3", "-1", "1,0", "0-", "0-5", "a", "0,,1", "1-0", "0,0", "99999999999999999999"])
def test_invalid_numbers_are_rejected(text: str) -> None:
    with pytest.raises(MessageError, match="does not list frozen parameters"):
        unpack_numbers(text, 3)
