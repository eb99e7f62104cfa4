"""The max-pooling of packed_spikes, on every backend, equals torch's, and accelerate(packed=True) uses it."""

import copy
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sdit_kernels import backend, lif, packed_spikes
from sdit_kernels.compat.spikingjelly import accelerate, restore
from sdit_kernels.nn import LIF, OverTime
from sdit_kernels.ops.pool import max_pool
from sdit_kernels.reference import pool as reference

KERNELS = ["cpu", "triton"]


def draw(shape, dtype, seed):
    """Return values with many ties, and some NaN and infinities."""
    x = (2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).round()
    some = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1))
    x[some < 0.05] = math.nan
    x[(some > 0.05) & (some < 0.2)] = -math.inf
    return x.to(dtype)


@pytest.mark.parametrize("name", KERNELS)
@given(
    planes=st.integers(1, 5), size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    window=st.sampled_from([(2, 2), (2, 3), (5, 4)]), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)  # fmt: skip
def test_equals_torch(name, planes, size, window, dtype, seed):
    if window[0] > size[0] or window[1] > size[1]:
        return
    x = draw((planes, *size), dtype, seed).requires_grad_()
    wanted = F.max_pool2d(x.unsqueeze(1), window).squeeze(1)
    g = torch.randn(wanted.shape, dtype=dtype)
    (gradient,) = torch.autograd.grad(wanted, x, g)
    with backend(name):
        y = max_pool(x, window)
        (found,) = torch.autograd.grad(y, x, g)
    assert torch.equal(y.nan_to_num(7), wanted.nan_to_num(7)) and torch.equal(found, gradient)
    y, codes = reference.max_pool(x.detach(), window)
    assert torch.equal(y.nan_to_num(7), wanted.nan_to_num(7))
    assert torch.equal(reference.max_pool_backward(g, codes, window, size), gradient)


@pytest.mark.parametrize("name", KERNELS)
def test_groups_of_rows(name):
    for size, window in (((301, 203), (2, 2)), ((7, 9001), (1, 3)), ((4, 9), (4, 9)), ((33, 32), (16, 16))):
        x = draw((3, *size), torch.float32, 0).requires_grad_()
        wanted = F.max_pool2d(x.unsqueeze(1), window).squeeze(1)
        with backend(name):
            y = max_pool(x, window)
            g = torch.randn(y.shape)
            found = torch.autograd.grad(y, x, g)[0]
        assert torch.equal(y.nan_to_num(7), wanted.nan_to_num(7))
        assert torch.equal(found, torch.autograd.grad(wanted, x, g)[0])
        with backend("reference"):
            assert max_pool(x, window) is None


def test_operators():
    x = draw((2, 6, 7), torch.float64, 0).nan_to_num(0.5).requires_grad_()
    operator = torch.ops.sdit_kernels.max_pool.default
    torch.library.opcheck(operator, (x, 2, 2, "cpu"))
    y, codes = operator(x.detach(), 2, 2, "cpu")
    torch.library.opcheck(torch.ops.sdit_kernels.max_pool_backward.default, (torch.randn_like(y), codes, 2, 2, 6, 7, "cpu"))
    assert torch.autograd.gradcheck(lambda x: max_pool(x, (2, 2)), x + torch.rand_like(x))


def test_other_data_are_left_to_torch():
    assert max_pool(torch.zeros(2, 3, 4, dtype=torch.int32), (2, 2)) is None
    assert max_pool(torch.zeros(0, 4, 4), (2, 2)) is None and max_pool(torch.zeros(2, 4, 4), (5, 2)) is None
    assert max_pool(torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last), (2, 2)) is None
    assert max_pool(torch.zeros(1, 40, 40), (17, 17)) is None and max_pool(torch.zeros(4, 4), (2, 2)) is None


def small_net(pool):
    return nn.Sequential(
        OverTime(nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8))), LIF(), OverTime(nn.Sequential(pool, nn.Conv2d(8, 4, 3)))
    )


def run(net, x):
    net[1].reset()
    y = net(x)
    return [y, *torch.autograd.grad(y.square().sum(), list(net.parameters()))]


@pytest.mark.parametrize(
    "settings, kept",
    [
        (dict(kernel_size=2), True), (dict(kernel_size=(2, 3)), True), (dict(kernel_size=2, stride=1), False),
        (dict(kernel_size=2, padding=1), False), (dict(kernel_size=2, dilation=2), False),
        (dict(kernel_size=2, ceil_mode=True), False),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("fuse", [False, True])
def test_accelerate_packed(settings, kept, fuse):
    net = small_net(nn.MaxPool2d(**settings))
    x = torch.randn(4, 3, 1, 31, 30)
    other = copy.deepcopy(net)
    report = accelerate(other, fuse=fuse, packed=True)
    assert ("2.0.0", "MaxPool2d") in report.replaced and ("(the model)", "Sequential") in report.replaced
    wanted, found = run(net, x), run(other, x)
    if fuse:  # float32 rounds norms differently
        assert (wanted[0] != found[0]).float().mean() < 0.5
    else:
        assert all(torch.equal(a, b) for a, b in zip(wanted, found))
    assert list(other.state_dict()) == list(net.state_dict())
    assert len(restore(other).replaced) == 2 + fuse and type(other) is nn.Sequential
    other.load_state_dict(net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(run(net, x), run(other, x)))


def test_what_the_pooling_keeps():
    x = torch.randn(4, 3, 8, 16, 16, requires_grad=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        max_pool(x, (2, 2))
    assert sizes == [x.numel() // 4 // 4]


def test_pooled_spikes_are_spikes():
    weight = torch.randn(4, 8, 3, 3, requires_grad=True)
    with packed_spikes():
        s = max_pool(lif(torch.randn(4, 3, 8, 32, 32, requires_grad=True)), (2, 2)).flatten(0, 1)
        y = F.conv2d(s, weight)
    copied, storage = s.detach().clone(), weakref.ref(s.untyped_storage())
    del s
    assert storage() is None  # the convolution keeps bits
    assert torch.equal(y.grad_fn._saved_input, copied)
