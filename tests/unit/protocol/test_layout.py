"""The layout of a module in a flat vector, and the copies between them."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_async_localsgd.protocol.layout import Binding, Layout


class Mixed(nn.Module):
    """Tied, frozen and scalar parameters, tensors of four dtypes, buffers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.embedding = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.randn(2, 2), requires_grad=False)
        self.fp16 = nn.Parameter(torch.randn(7).half())
        self.bf16 = nn.Parameter(torch.randn(3, 2).bfloat16())
        self.fp64 = nn.Parameter(torch.randn(4).double())
        self.register_buffer("scratch", torch.ones(3), persistent=False)
        self.register_buffer("count", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("table", torch.randn(2, 2))
        self.register_buffer("nothing", None)


@pytest.mark.parametrize("frozen", [True, False])
def test_parameters_come_before_persistent_floating_buffers(frozen: bool) -> None:
    module = Mixed()
    layout = Layout.of(module, frozen)

    parameters = [name for name, _ in module.named_parameters() if frozen or name != "frozen"]
    assert [entry.name for entry in layout.entries if entry.kind == "parameter"] == parameters
    assert [entry.name for entry in layout.entries if entry.kind == "buffer"] == [
        "table",
        "norm.running_mean",
        "norm.running_var",
    ]
    assert layout.parameter_numel == sum(dict(module.named_parameters())[name].numel() for name in parameters)
    assert layout.numel == layout.parameter_numel + 4 + 3 + 3
    assert [entry.offset for entry in layout.entries] == [
        sum(entry.numel for entry in layout.entries[:index]) for index in range(len(layout.entries))
    ]
    assert layout.entries[0].shape == ()


def test_views_share_memory_and_check_the_length() -> None:
    layout = Layout.of(nn.BatchNorm1d(2))
    flat = torch.arange(8.0)
    views = layout.views(flat)
    assert [view.tolist() for view in views.values()] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    views["bias"].zero_()
    assert flat[2:4].tolist() == [0, 0]
    assert list(layout.views(flat, "buffer")) == ["running_mean", "running_var"]
    assert list(layout.views(flat[:4], "parameter")) == ["weight", "bias"]
    with pytest.raises(ValueError, match="4 elements, the layout needs 8"):
        layout.views(flat[:4])


def test_fingerprint_depends_on_name_shape_and_kind_but_not_on_dtype() -> None:
    layout = Layout.of(nn.Linear(2, 3))
    assert layout.fingerprint == Layout.of(nn.Linear(2, 3)).fingerprint
    others = [nn.Linear(3, 2), nn.Linear(2, 3, bias=False), nn.Sequential(nn.Linear(2, 3))]
    assert len({layout.fingerprint, *(Layout.of(other).fingerprint for other in others)}) == 4
    half = Layout.of(nn.Linear(2, 3).half())
    assert half.fingerprint == layout.fingerprint
    assert half.difference(layout) == ""
    assert (layout.dtypes, half.dtypes, Layout.of(Mixed()).dtypes) == (
        "float32", "float16", "bfloat16,float16,float32,float64",
    )  # fmt: skip


def test_description_can_be_sent_as_json() -> None:
    layout = Layout.of(Mixed())
    copied = Layout.from_description(json.loads(json.dumps(layout.describe())))
    assert copied.entries == layout.entries
    assert copied.fingerprint == layout.fingerprint
    assert layout.difference(copied) == ""


GOOD = ["w", [2], "torch.float32", "parameter"]


@pytest.mark.parametrize(
    "description",
    [
        None,
        {"w": [2]},
        [[1]],
        ["wtfp"],
        [["w", [-1], "torch.float32", "parameter"]],
        [["w", [2.0], "torch.float32", "parameter"]],
        [["w", [True], "torch.float32", "parameter"]],
        [["w", 2, "torch.float32", "parameter"]],
        [[1, [2], "torch.float32", "parameter"]],
        [["w", [2], "torch.int8", "parameter"]],
        [["w", [2], ["torch.float32"], "parameter"]],
        [["w", [2], "torch.float32", "gradient"]],
        [["w", [2], "torch.float32", ["parameter"]]],
        [["w", [2**40, 2**40], "torch.float32", "parameter"]],
        [GOOD, GOOD],
        [["b", [1], "torch.float32", "buffer"], GOOD],
        [["m", [1], "torch.float32", "moment"], GOOD],
        [["m", [1], "torch.float32", "moment"], ["b", [1], "torch.float32", "buffer"]],
    ],
)
def test_invalid_description_is_refused(description: object) -> None:
    with pytest.raises(ValueError, match=r"layout|the order is parameter, buffer, moment"):
        Layout.from_description(description)


def test_difference_shows_the_first_five_lines() -> None:
    here = Layout.of(nn.Sequential(*(nn.Linear(2, 2) for _ in range(4))))
    there = Layout.of(nn.Sequential(*(nn.Linear(3, 3, dtype=torch.float64) for _ in range(3)), nn.BatchNorm1d(2)))
    lines = here.difference(there).splitlines()
    assert lines[0] == "parameter 0: '0.weight' float32 [2, 2] here, '0.weight' float64 [3, 3] there"
    assert len(lines) == 6
    assert lines[-1] == "and 4 more"
    missing = Layout.of(nn.Linear(2, 2)).difference(Layout.of(nn.Linear(2, 2, bias=False)))
    assert missing == "parameter 1: 'bias' float32 [2] here, nothing there"


def with_parameter(tensor: torch.Tensor) -> nn.Module:
    module = nn.Linear(1, 1)
    module.odd = nn.Parameter(tensor, requires_grad=tensor.is_floating_point() or tensor.is_complex())
    return module


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear(2, 2).requires_grad_(False), "Linear has no trainable parameter"),
        (nn.Identity(), "no trainable parameter"),
        (with_parameter(torch.ones(3).expand(2, 3)), r"'odd'.*is expanded.*\.contiguous\(\)"),
        (with_parameter(torch.ones(2, dtype=torch.complex64)), "'odd' is complex"),
        (with_parameter(torch.ones(2, 2).to_sparse()), "'odd' is sparse"),
        (with_parameter(torch.ones(2).to(torch.float8_e5m2)), "'odd' has dtype torch.float8_e5m2"),
        (nn.Linear(2, 2, device="meta"), "'weight' is on the meta device"),
        (nn.LazyLinear(2), "'weight' is not initialized"),
    ],
)
def test_tensor_that_cannot_be_exchanged_is_named(module: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout.of(module)


def test_sharded_parameters_are_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        module = nn.Linear(2, 2)
        module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), init_device_mesh("cpu", (1,))))
        with pytest.raises(ValueError, match=r"'weight' is sharded.*FSDP"):
            Layout.of(module)
    finally:
        dist.destroy_process_group()


def test_integer_parameters_are_not_exchanged() -> None:
    assert "odd" not in Layout.of(with_parameter(torch.ones(2, dtype=torch.int8))).views(torch.zeros(2))


def test_read_returns_the_loaded_values_after_rounding() -> None:
    module = Mixed()
    layout = Layout.of(module)
    binding = Binding(layout, module)
    flat = torch.randn(layout.numel)
    loaded = flat.clone()
    binding.load(flat)

    read = torch.empty_like(flat)
    binding.read(read)
    assert torch.equal(read, flat)
    rounded = layout.views(flat)
    for name, view in layout.views(loaded).items():
        # fp64 holds any fp32 value.
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(name, torch.float32)
        assert torch.equal(rounded[name], view.to(dtype).float()), name
    assert torch.equal(module.head.weight, rounded["embedding.weight"])


def test_push_of_an_unchanged_module_is_exactly_zero() -> None:
    module = Mixed()
    layout = Layout.of(module)
    binding = Binding(layout, module)
    base = torch.randn(layout.numel)
    binding.load(base)
    out = torch.full_like(base, torch.nan)
    binding.subtract_from(base, out)
    assert not out[: layout.parameter_numel].any()
    assert torch.equal(out[layout.parameter_numel :], base[layout.parameter_numel :])


def test_push_holds_differences_of_parameters_and_values_of_buffers() -> None:
    module = Mixed()
    layout = Layout.of(module)
    binding = Binding(layout, module)
    base = torch.randn(layout.numel)
    binding.load(base)
    with torch.no_grad():
        for tensor in [*module.parameters(), module.norm.running_mean]:
            tensor.add_(torch.randn_like(tensor))
    local, out = torch.empty_like(base), torch.empty_like(base)
    binding.read(local)
    binding.subtract_from(base, out)
    split = layout.parameter_numel
    assert torch.equal(out[:split], (base - local)[:split])
    assert torch.equal(out[split:], local[split:])


@pytest.mark.parametrize(
    "module", [nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last), with_parameter(torch.ones(2, 3).t())]
)
def test_module_keeps_its_strides(module: nn.Module) -> None:
    strides = [parameter.stride() for parameter in module.parameters()]
    layout = Layout.of(module)
    binding = Binding(layout, module)
    base = torch.randn(layout.numel)
    binding.load(base)
    assert binding.changed_from(base) == []
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, layout.views(base)[name])
    assert [parameter.stride() for parameter in module.parameters()] == strides
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.sub_(1.0)
    out = torch.empty_like(base)
    binding.subtract_from(base, out)
    assert torch.allclose(out, torch.ones_like(out))
    assert binding.changed_from(base) == [entry.name for entry in layout.entries]


def test_unfrozen_parameter_outside_the_layout_is_named() -> None:
    module = Mixed()
    layout = Layout.of(module)
    binding = Binding(layout, module)
    base = torch.zeros(layout.numel)
    binding.subtract_from(base, torch.empty_like(base))
    module.frozen.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"'frozen' was frozen.*ExchangeOptions\(frozen=True\)"):
        binding.subtract_from(base, torch.empty_like(base))


def test_parameters_in_a_layout_with_frozen_ones_may_be_unfrozen() -> None:
    module = Mixed()
    layout = Layout.of(module, frozen=True)
    binding = Binding(layout, module)
    module.frozen.requires_grad_(True)
    module.fp16.requires_grad_(False)
    base = torch.zeros(layout.numel)
    binding.subtract_from(base, torch.empty_like(base))
    assert binding.named()["frozen"] is module.frozen


def test_autograd_detects_loaded_weights() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    layout = Layout.of(module)
    loss = module(torch.ones(1, 2)).sum()
    Binding(layout, module).load(torch.zeros(layout.numel))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_replaced_buffer_is_read() -> None:
    module = nn.BatchNorm1d(2)
    layout = Layout.of(module)
    binding = Binding(layout, module)
    module.running_mean = torch.tensor([3.0, 4.0])
    flat = torch.empty(layout.numel)
    binding.read(flat)
    assert layout.views(flat)["running_mean"].tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    ("now", "text"),
    [
        (torch.zeros(3), "buffer 'running_mean' float32 [2] is float32 [3] in training"),
        (torch.zeros(2, dtype=torch.int64), "buffer 'running_mean' float32 [2] is int64 [2] in training"),
        (None, "buffer 'running_mean' float32 [2] was removed in training"),
    ],
)
def test_buffer_that_takes_another_shape_stays_the_workers_own(now: torch.Tensor | None, text: str) -> None:
    module = nn.BatchNorm1d(2)
    layout = Layout.of(module)
    binding = Binding(layout, module)
    base = torch.arange(1.0, 1.0 + layout.numel)
    texts: list[str] = []
    binding.on_own = texts.append
    module.running_mean = now
    out = torch.zeros(layout.numel)
    binding.subtract_from(base, out)
    binding.load(base)
    assert layout.views(out)["running_mean"].tolist() == layout.views(base)["running_mean"].tolist(), "does not move"
    assert module.running_mean is now
    assert "running_mean" not in binding.named()
    assert binding.changed_from(base) == []
    # It stays the worker's own, whatever shape it has later.
    module.running_mean = torch.zeros(2)
    binding.load(base)
    assert module.running_mean.tolist() == [0.0, 0.0]
    assert binding.own == {"running_mean"}
    assert texts == [text]


def test_parameter_that_takes_another_shape_is_an_error() -> None:
    module = nn.Linear(2, 1)
    binding = Binding(Layout.of(module), module)
    module.bias = nn.Parameter(torch.zeros(3))
    with pytest.raises(RuntimeError, match=r"parameter 'bias' had shape \[1\] when .* and has \[3\] now"):
        binding.tensors()


def test_binding_refuses_a_module_with_another_layout() -> None:
    with pytest.raises(ValueError, match="parameter 0: 'weight'"):
        Binding(Layout.of(nn.Linear(2, 2)), nn.Linear(3, 2))


def test_copied_module_has_the_same_layout() -> None:
    module = Mixed()
    assert Layout.of(module).difference(Layout.of(copy.deepcopy(module))) == ""
