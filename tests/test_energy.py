"""sdit_kernels.energy against counts by hand, by loops over all taps, and by SpikingJelly's counters."""

import copy
import doctest
import gc
import itertools
import json
import pickle
import subprocess
import sys
import textwrap
import threading
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import sdit_kernels
import sdit_kernels.energy
from sdit_kernels import energy
from sdit_kernels.nn import LIF, reset


class Call(nn.Module):
    """A model that is a function of itself and its inputs, with a parameter w."""

    def __init__(self, function, *shape):
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.randn(*shape or (4, 3)))

    def forward(self, *inputs):
        return self.function(self, *inputs)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def spikes(*shape, rate=0.4):
    x = (torch.rand(shape) < rate).float()
    x.view(-1)[:2] = torch.tensor([0.0, 1.0])
    return x


def only(report):
    (row,) = report.rows
    return row


def kinds(report):
    return [tuple(map(str, row.inputs)) for row in report.rows]


# ---- counted by hand -------------------------------------------------------------------------------------------------


def test_linear_counts_events_times_outputs():
    net = nn.Linear(4, 3)
    x = torch.tensor([[1.0, 0, 0, 1], [0, 0, 1, 0]])
    report = energy.count(net, x)
    row = only(report)
    assert (row.macs, row.synaptic_operations, row.calls, row.op) == (2 * 4 * 3, 3 * 3, 1, "addmm")
    assert row.inputs[0].rate == 3 / 8 and row.inputs[0].silent == 1 and row.inputs[0].neurons == 4
    assert kinds(report) == [("binary", "weights")]
    assert report.energy_pj["arithmetic"] == pytest.approx(9 * 0.9)


CONVOLUTIONS = {
    "padding": (nn.Conv2d(2, 3, 3, padding=1), (2, 2, 4, 5)),
    "all": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2), (2, 4, 6, 5)),
    "depthwise": (nn.Conv2d(3, 3, 3, groups=3, stride=3), (1, 3, 7, 7)),
    "1d": (nn.Conv1d(2, 3, 4, stride=2, padding=3), (2, 2, 7)),
    "3d": (nn.Conv3d(1, 2, 2, padding=1), (1, 1, 2, 3, 2)),
    "unbatched": (nn.Conv2d(2, 3, 3), (2, 4, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, dilation=2, groups=2), (2, 4, 3, 4)),
    "transposed 1d": (nn.ConvTranspose1d(2, 3, 4, stride=3, padding=2), (1, 2, 5)),
}


def count_taps(net, x):
    """Count the multiply-adds on nonzero inputs, one by one."""
    x = x if x.dim() == net.weight.dim() else x[None]
    out = net(x)
    groups, axes, transposed = net.groups, x.dim() - 2, isinstance(net, (nn.ConvTranspose1d, nn.ConvTranspose2d))
    here, there = (x, out) if transposed else (out, x)  # the kernel's taps reach from a position of here to one of there
    channels = out.shape[1] // groups
    total = 0
    for position in itertools.product(*map(range, here.shape[2:])):
        for tap in itertools.product(*map(range, net.kernel_size)):
            at = [p * s - pad + k * d for p, s, pad, k, d in zip(position, net.stride, net.padding, tap, net.dilation)]
            if all(0 <= a < n for a, n in zip(at, there.shape[2:])):
                source = position if transposed else tuple(at)
                total += int((x[(slice(None), slice(None), *source)] != 0).sum()) * channels
    assert axes == len(net.kernel_size)
    return total


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_count_the_taps_that_events_meet(name):
    net, shape = CONVOLUTIONS[name]
    x = spikes(*shape)
    row = only(energy.count(net, x))
    assert row.synaptic_operations == count_taps(net, x) and row.inputs[0].kind == "binary"
    batched = x if x.dim() == net.weight.dim() else x[None]
    positions = batched if isinstance(net, (nn.ConvTranspose1d, nn.ConvTranspose2d)) else net(batched)
    assert row.macs == positions[:, 0].numel() * net.weight.numel()
    # all taps of all inputs: the dense count without the zeros of the padding
    assert count_taps(net, torch.ones(shape)) <= row.macs
    assert row.inputs[0].neurons == x[0].numel() if x is batched else x.numel()


def test_a_convolution_whose_weights_are_spikes():
    """Both operands are data: events of each, and pairs."""
    net = Call(lambda self, x, w: F.conv1d(x, w, padding=1))
    x, w = torch.tensor([[[1.0, 0, 1, 0]]]), torch.tensor([[[0.0, 1, 1]], [[0, 0, 1]]])
    row = only(energy.count(net, x, w))
    # x: position 0 meets 2 taps, position 2 meets 3 taps, in 2 channels. w: tap 1 meets 4 positions, tap 2 meets 3, twice
    assert [i.synaptic_operations for i in row.inputs] == [10, 10]
    assert row.pairs == round(F.conv1d(x, w, padding=1).sum().item()) == 4


def test_both_products_of_attention_count_events_and_pairs():
    def attend(self, q, k, v):
        return (q @ k.transpose(1, 2)) @ v

    q, k, v = torch.tensor([[[1.0, 0], [1, 1]]]), torch.tensor([[[1.0, 1], [0, 0]]]), torch.tensor([[[0.0, 1], [1, 1]]])
    scores, mixed = energy.count(Call(attend), q, k, v).rows
    assert scores.macs == mixed.macs == 8
    assert [i.synaptic_operations for i in scores.inputs] == [3 * 2, 2 * 2] and scores.synaptic_operations == 4
    assert scores.pairs == 3 == (q @ k.transpose(1, 2)).sum()
    assert mixed.inputs[0].kind == "levels" and mixed.inputs[0].level == 2  # scores [[1, 0], [2, 0]]
    assert [i.synaptic_operations for i in mixed.inputs] == [3 * 2, 3 * 2] and mixed.pairs == 3


@pytest.mark.parametrize("heads", [3, 1])
def test_fused_attention_is_two_products(heads):
    q, k, v = spikes(2, 3, 5, 4), spikes(2, heads, 5, 4), spikes(2, heads, 5, 4)
    net = Call(lambda self, *a: F.scaled_dot_product_attention(*a, enable_gqa=heads == 1))
    report = energy.count(net, q, k, v)
    assert report.macs == 2 * (2 * 3 * 5 * 5 * 4)
    first, second = report.rows
    repeats = 3 // heads
    assert sorted(i.nonzero_operations for i in first.inputs) == sorted([int(q.sum()) * 5, int(k.sum()) * 5 * repeats])
    assert second.inputs[0].kind == "floats" and second.synaptic_operations == int(v.sum()) * 5 * repeats


def test_a_residual_of_spikes_is_integer_levels():
    net = nn.Linear(6, 2)
    a, b = spikes(8, 6), spikes(8, 6)
    row = only(energy.count(net, a + b))
    assert str(row.inputs[0]) == "levels to 2 x 1"
    assert row.synaptic_operations == int((a + b).sum()) * 2  # a level of 2 is two events
    assert row.inputs[0].nonzero_operations == int(((a + b) > 0).sum()) * 2


@pytest.mark.parametrize("kernel", [2, 3])
def test_average_pooled_spikes_are_levels_up_to_a_factor(kernel):
    net = nn.Sequential(nn.AvgPool2d(kernel), nn.Conv2d(2, 3, 1))
    x = spikes(3, 2, 2 * kernel, 3 * kernel)
    row = only(energy.count(net, x))
    assert row.inputs[0].kind == "levels" and row.inputs[0].factor == pytest.approx(1 / kernel**2)
    assert row.synaptic_operations == int(x.sum()) * 3  # each spike is one level of the pooled value


def test_each_call_has_a_factor_of_its_own():
    net = nn.Sequential(nn.Identity(), Call(lambda self, x: (x / 4) @ self.w))
    with energy.count(net) as report:
        for x in ([0.0, 2, 0, 2], [1.0, 3, 0, 0], [0.0, 2, 0, 0]):
            net(torch.tensor([x]))
    row = only(report)
    assert str(row.inputs[0]) == "levels to 3 x a factor per call" and row.inputs[0].factor is None
    assert row.synaptic_operations == (2 + 4 + 1) * 3


def test_signed_spikes():
    x = torch.tensor([[1.0, 0, -1, 0]])
    row = only(energy.count(nn.Linear(4, 3), x))
    assert row.inputs[0].kind == "signed" and row.synaptic_operations == 6


def test_a_trained_model_over_three_batches():
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), LIF(tau=1.5), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 4 * 4, 8),
                        LIF(tau=1.5), nn.Linear(8, 2))  # fmt: skip
    with torch.no_grad():
        net[0].weight.mul_(3)
        net[4].weight.mul_(4)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    with sdit_kernels.backend("reference"):
        for _ in range(3):
            reset(net)
            loss = net(torch.randn(6, 1, 8, 8)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        batches, seen = torch.randn(3, 6, 1, 8, 8), {}
        handles = [
            net[i].register_forward_pre_hook(lambda m, args, i=i: seen.setdefault(i, []).append(args[0].detach()))
            for i in (0, 4, 6)
        ]
        with energy.count(net) as report:
            for x in batches:
                reset(net)
                net(x)
    for handle in handles:
        handle.remove()
    rows = {row.layer: row for row in report.rows}
    assert list(rows) == ["0", "4", "6"] and report.batches == 3 and all(row.calls == 3 for row in rows.values())
    assert kinds(report) == [("floats", "weights"), ("binary", "weights"), ("binary", "weights")]
    for layer, outputs in (("4", 8), ("6", 2)):
        x = torch.cat(seen[int(layer)])
        row = rows[layer]
        assert row.synaptic_operations == int(x.sum()) * outputs > 0
        assert row.inputs[0].rate == pytest.approx(x.mean().item())
        assert row.inputs[0].silent == int((x.amax(0) == 0).sum())
    assert report.macs == 18 * 64 * 9 * 4 + 18 * 64 * 8 + 18 * 8 * 2
    floats, sops = 18 * 64 * 9 * 4, report.synaptic_operations
    assert report.macs_on_floats == floats
    assert report.energy_pj["arithmetic"] == pytest.approx(floats * 4.6 + sops * 0.9)


# ---- what is called spikes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, function",
    [
        ("zeros", lambda self, x: torch.zeros_like(x) @ self.w),
        ("zeros", lambda self, x: (x - 100).relu() @ self.w),
        ("one value", lambda self, x: (x > -100).float() @ self.w),
        ("constant", lambda self, x: torch.eye(4) @ self.w + x[:, :3]),
        ("constant", lambda self, x: (self.w > 0).float().t() @ self.w + x[:3, :3]),
        ("floats", lambda self, x: x.relu() @ self.w),
        ("floats", lambda self, x: (2 + 3 * (x > 0).float()) @ self.w),  # never near 0
        ("floats", lambda self, x: torch.rand(4, 4) @ self.w),
        ("binary", lambda self, x: (x > 0).float() @ self.w),
        ("binary", lambda self, x: (x > 0).float().to(torch.bfloat16) @ self.w.to(torch.bfloat16)),
        ("binary", lambda self, x: (2 * (x > 0).float()) @ self.w),
        ("binary", lambda self, x: F.dropout((x > 0).float(), 0.5) @ self.w),
        ("levels", lambda self, x: ((x > 0).float() + (x > 1).float()) @ self.w),
        ("fixed", lambda self, x: ((0 * x + torch.eye(4)) > 0).float() @ self.w),
    ],
)  # fmt: skip
def test_kinds_of_operands(kind, function):
    net = Call(function)
    with energy.count(net) as report:
        for _ in range(2):
            net(torch.randn(4, 4))
    assert kind in [i.kind for i in report.rows[0].inputs]
    assert report.products_on_spikes == (kind in ("binary", "levels"))


def test_one_hot_tokens_are_not_spikes_but_spikes_of_embedded_tokens_are():
    ids = torch.randint(4, (5, 6))
    assert kinds(energy.count(Call(lambda self, i: F.one_hot(i, 4).float() @ self.w), ids)) == [("indices", "weights")]
    net = Call(lambda self, i: (F.embedding(i, self.w) > 0).float() @ self.w.t())
    assert kinds(energy.count(net, ids)) == [("binary", "weights")]


def test_given_pixels_are_floats_and_given_counts_are_levels():
    net = nn.Linear(5, 2)
    counts = torch.randint(0, 17, (20, 5)).float()
    assert kinds(energy.count(net, counts / 16)) == [("floats", "weights")]
    assert only(energy.count(net, counts)).inputs[0].level == counts.max()


def test_events_given_as_integers_are_spikes():
    for dtype in (torch.bool, torch.uint8, torch.int64):
        net = Call(lambda self, x: x.float() @ self.w)
        assert kinds(energy.count(net, spikes(3, 4).to(dtype))) == [("binary", "weights")]


def test_few_floats_that_fit_a_factor_of_their_own_are_floats():
    net = Call(lambda self, x: (x + 0) @ self.w, 3, 2)
    with energy.count(net) as report:
        for factor in (0.3, 0.777, 1.234):
            net(factor * torch.tensor([[0.0, 1, 3]]))
    assert kinds(report) == [("floats", "weights")]


def test_everything_in_the_block_is_counted():
    net = nn.Linear(4, 3)
    with energy.count(net) as report:
        out = net(torch.randn(2, 5) @ torch.randn(5, 4))
        nn.Linear(3, 2)(out)
    assert [(row.layer, row.macs) for row in report.rows] == [("(no module)", 40), ("", 24), ("(Linear 0)", 12)]
    assert report.batches == 1 and "(no module): mm" in report.table()


def test_equal_batches_do_not_make_spikes_fixed():
    net, x = Call(lambda self, x: (x > 0).float() @ self.w), torch.randn(4, 4)
    with energy.count(net) as report:
        for _ in range(3):
            net(x)
    assert kinds(report) == [("binary", "weights")]


def test_spikes_written_into_a_buffer_are_data():
    def run(self, x):
        out = torch.zeros(3, 4)
        for t in range(3):
            out[t] = (x[t] > 0).float()
        return out @ self.w

    assert kinds(energy.count(Call(run), torch.randn(3, 4))) == [("binary", "weights")]


def test_levels_of_other_dtypes():
    x = spikes(6, 9, 5, rate=0.2)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        row = only(energy.count(Call(lambda self, x: x.mean(1) @ self.w.to(x.dtype), 5, 2), x.to(dtype)))
        assert row.inputs[0].kind == "levels" and row.synaptic_operations == int(x.sum()) * 2


# ---- what operands are, call by call ---------------------------------------------------------------------------------


def count_each(net, *inputs):
    with energy.count(net) as report:
        for x in inputs:
            net(x)
    return report


@pytest.mark.parametrize("given", [True, False])
def test_calls_on_spikes_and_calls_on_floats_have_a_row_each(given):
    net = Call(lambda self, *steps: [(x if given else x + 0) @ self.w for x in steps])
    x, floats = spikes(6, 4), torch.rand(5, 4)
    report = energy.count(net, x, floats, x, torch.zeros(2, 4))
    assert kinds(report) == [("binary", "weights"), ("floats", "weights")] and report.products_on_spikes == 1
    first, second = report.rows
    assert (first.calls, second.calls) == (3, 1)  # a call on zeros is one without spikes
    assert (first.shape, second.shape) == ("6x4 @ 4x3", "5x4 @ 4x3")
    assert first.macs == 14 * 4 * 3 and second.macs == report.macs_on_floats == 5 * 4 * 3
    assert report.synaptic_operations == 2 * int(x.sum()) * 3 and report.macs == 19 * 4 * 3
    assert first.inputs[0].rate == pytest.approx(2 * x.mean().item() * 24 / 56)
    assert report.energy_pj["arithmetic"] == pytest.approx(second.macs * 4.6 + report.synaptic_operations * 0.9)


def test_weights_and_indices_at_the_place_of_spikes_have_rows_of_their_own():
    def run(self, x, ids):
        return [a @ self.w for a in ((x > 0).float(), self.w @ self.w.t(), F.one_hot(ids, 4).float())]

    report = energy.count(Call(run), torch.randn(5, 4), torch.randint(4, (6,)))
    assert kinds(report)[1:] == [("binary", "weights"), ("constant", "constant"), ("indices", "weights")]


def test_a_state_that_starts_with_zeros_does_not_split_a_product():
    def run(self, x):
        state = torch.zeros(2, 4)
        for step in x:
            state = (step + state @ self.w > 0).float()

    row = only(energy.count(Call(run, 4, 4), torch.randn(5, 2, 4)))
    assert (row.calls, row.inputs[0].kind, row.inputs[0].values) == (5, "binary", 40)


def relu_of(*values):
    """Return a tensor whose ReLU has these values and zeros."""
    x = -torch.ones(2, 4)
    x.view(-1)[: len(values)] = torch.tensor(values)
    return x


@pytest.mark.parametrize("rest", [[], [torch.randn(2, 4)], [-torch.ones(2, 4)], [relu_of(0.71)]])
def test_a_single_value_of_a_relu_is_not_a_level(rest):
    net = Call(lambda self, x: x.relu() @ self.w)
    report = count_each(net, relu_of(0.37), *rest)
    assert kinds(report) == [("floats", "weights")] and report.macs_on_floats == report.macs


def test_numbers_near_zero_are_no_problem():
    for dtype, value in ((torch.float64, 5e-324), (torch.float64, 1e-50), (torch.float32, 1e-45)):
        x = torch.zeros(2, 4, dtype=dtype)
        x[0, 0] = value
        assert kinds(energy.count(Call(lambda self, x: (x * 1) @ self.w.to(x.dtype)), x)) == [("floats", "weights")]


def test_single_spikes_are_spikes():
    net = Call(lambda self, x: x.relu() @ self.w)
    for factor in (1.0, 0.25, 1 / 9, 3.0):
        assert only(energy.count(net, relu_of(factor))).inputs[0].kind == "binary"
    assert only(energy.count(net, relu_of(0.73, 0.73))).inputs[0].kind == "binary"  # of a learned threshold, for example


def test_one_nonzero_level_is_one_event_whatever_its_factor():
    net = Call(lambda self, x: (x + 0) @ self.w)
    x = spikes(8, 4)
    for values, label, events in (
        (2 * x, "binary x 2", int(x.sum())),
        (-0.5 * x + x * (x.cumsum(0) > 1), "signed x 0.5", int(x.sum())),
        (2 * x + 2 * spikes(8, 4), "levels to 2 x 2", None),
    ):
        row = only(energy.count(net, values))
        level = (values.abs() / row.inputs[0].factor).sum().item()
        assert str(row.inputs[0]) == label and row.synaptic_operations == round(level) * 3
        assert events is None or round(level) == events


def test_levels_below_zero_have_a_bit_for_the_sign():
    x = torch.tensor([[2.0, -1, 0, 1]])
    operand = only(energy.count(Call(lambda self, x: (x + 0) @ self.w), x)).inputs[0]
    assert (operand.kind, operand.negative, operand.bits(), operand.bits(2)) == ("levels", True, 3, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_levels_keep_their_rounding_when_they_are_cast_up(dtype):
    x = spikes(7, 30, 4).sum(0)
    assert x.max() > 3
    for cast in (lambda y: y.float(), lambda y: y.double().reshape(5, 6, 4).float(), lambda y: torch.zeros(30, 4).copy_(y)):
        net = Call(lambda self, x, cast=cast: cast((x / 7).to(dtype)) @ self.w)
        row = only(energy.count(net, x))
        assert row.inputs[0].kind == "levels" and row.synaptic_operations == int(x.sum()) * 3


def test_operators_on_lists_keep_the_origin_of_each_tensor():
    def run(self, x):
        state, copy = torch.zeros(5, 4), torch.empty(4, 4)
        other = torch.zeros(4, 4)
        torch._foreach_add_([state, other], [(x > 0).float(), self.w @ self.w.t()])
        torch._foreach_copy_([copy], [x[:4]])
        (scaled,) = torch._foreach_mul([state], 2.0)
        return state @ self.w, other @ self.w, copy @ self.w, scaled @ self.w

    report = energy.count(Call(run), torch.randint(0, 9, (5, 4)).float() / 8 - 0.5)
    assert kinds(report)[1:] == [
        ("binary", "weights"),
        ("constant", "constant"),
        ("floats", "weights"),
        ("binary x 2", "weights"),
    ]
    assert not report.unknown


class Sampler(nn.Module):
    """The same computation as forward, as a method, and with submodules called by hand."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.w = nn.Conv2d(1, 4, 3), nn.Linear(16, 4), nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        s = F.avg_pool2d((self.conv(x) > 0.5).float(), 2)
        return self.fc(s.flatten(1)) @ self.w

    def sample(self, x):
        return Sampler.forward(self, x)


@pytest.mark.parametrize("form", ["forward", "method", "by hand"])
@pytest.mark.parametrize("inside", [True, False])
def test_methods_and_submodules_called_by_hand_count_as_the_forward_pass(form, inside):
    torch.manual_seed(0)
    net = Sampler()
    x = torch.randn(2, 1, 6, 6)
    with energy.count(net) as report:
        if inside:
            x = x + torch.zeros(2, 1, 6, 6)
        net(x) if form == "forward" else net.sample(x) if form == "method" else Sampler.forward(net, x)
    assert (report.macs, report.synaptic_operations, report.macs_on_floats) == (1312, 108, 1184)
    assert kinds(report) == [("floats", "weights"), ("levels to 4 x 0.25", "weights"), ("floats", "weights")]
    assert [row.layer for row in report.rows] == ["conv", "fc", "" if form == "forward" else "(no module)"]
    assert report.batches == (form == "forward") and ("batch" in report.table()) == (form == "forward")


def test_levels_computed_in_a_method_without_any_module_are_levels():
    net, x = Call(lambda self, x: F.avg_pool2d((x > 0).float(), 2).flatten(1) @ self.w), torch.randn(5, 1, 4, 4)
    with energy.count(net) as report:
        net.function(net, x)
    assert kinds(report) == [("levels to 4 x 0.25", "weights")]


def test_what_the_model_is_called_with_counts_as_given_wherever_it_was_made():
    net = nn.Linear(4, 3)
    pixels, ids = torch.randint(0, 17, (5, 4)), torch.tensor([[0, 1], [2, 3]])
    with energy.count(net) as report:
        net(pixels / 16)
        net(F.one_hot(ids, 4).float())
        net(torch.tensor([[0.0, 1, 0, 1]]))
    assert [i[0] for i in kinds(report)] == ["floats", "binary"]
    assert [row.calls for row in report.rows] == [1, 2] and report.rows[1].synaptic_operations == (4 + 2) * 3
    net = Call(lambda self, i: F.one_hot(i, 4).float() @ self.w)
    with energy.count(net) as report:
        net(torch.randint(4, (5, 6)))
    assert kinds(report) == [("indices", "weights")]


def test_parameters_stay_weights_after_a_step_of_the_optimizer():
    net, target = two_layers(), torch.randn(5, 3)
    for make in (torch.optim.SGD, torch.optim.Adam):
        optimizer = make(net.parameters(), 1e-2)
        with energy.count(net) as report:
            for _ in range(3):
                optimizer.zero_grad()
                F.mse_loss(net(torch.randn(5, 4)), target).backward()
                optimizer.step()
        assert kinds(report) == [("floats", "weights")] * 2 and report.macs == 3 * 210 and not report.unknown


# ---- places ----------------------------------------------------------------------------------------------------------


class Plain(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("multiply", ["einsum", "tensordot", "linear", "einops", "subclass", "operator"])
def test_two_calls_of_a_library_function_are_two_products(multiply):
    def forward(self, x):
        if multiply == "einsum":
            return torch.einsum("tnd,de->tne", x, self.w), torch.einsum("nd,de->ne", x.mean(0), self.v)
        if multiply == "tensordot":
            return torch.tensordot(x, self.w, 1), torch.tensordot(x.mean(0), self.v, 1)
        if multiply == "linear":
            return F.linear(x, self.w.t()), F.linear(x.mean(0), self.v.t())
        if multiply == "einops":
            einops = pytest.importorskip("einops", reason="einops is not installed")
            return einops.einsum(x, self.w, "t n d, d e -> t n e"), einops.einsum(x.mean(0), self.v, "n d, d e -> n e")
        if multiply == "subclass":
            return x.as_subclass(Plain) @ self.w, x.mean(0).as_subclass(Plain) @ self.v
        return x @ self.w, x.mean(0) @ self.v

    net = Call(forward, 8, 8)
    net.v = nn.Parameter(torch.randn(8, 8))
    torch.manual_seed(0)
    x = (torch.rand(10, 5, 8) < 0.3).float()
    report = energy.count(net, x)
    assert (report.products, report.synaptic_operations) == (2, 2048)


def test_chained_calls_on_one_line_are_products_of_their_own_and_a_loop_or_a_shared_layer_is_one():
    net = Call(lambda self, x: torch.einsum("ij,jk->ik", torch.einsum("ij,jk->ik", x, self.w), self.w), 4, 4)
    assert energy.count(net, spikes(5, 4)).products == 2
    net = Call(lambda self, x: [torch.einsum("ij,jk->ik", x, self.w) for _ in range(3)], 4, 4)
    assert only(energy.count(net, spikes(5, 4))).calls == 3
    net = Call(lambda self, x: (self.fc(x), self.fc(x)))
    net.fc = nn.Linear(4, 3)
    assert only(energy.count(net, spikes(5, 4))).calls == 2
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    x = torch.randn(2, 5, 4)
    assert energy.count(attention, x, x, x).products == 4  # in, q k, weights v, out
    net = Call(lambda self, x: (F.scaled_dot_product_attention(x, x, x), F.scaled_dot_product_attention(x, x, x)))
    assert energy.count(net, spikes(2, 5, 4)).products == 4


# ---- fixed operands --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keywords", [False, True])
def test_one_batch_repeated_over_time_is_spikes(keywords):
    """As in a loop of snnTorch, with a state that the model returns, or a time that changes."""

    def step(self, x, mem=None, t=0):
        mem = 0.9 * (0 if mem is None else mem) + x @ self.w
        return (mem > 1).float(), mem

    net, x, mem = Call(step), spikes(5, 4), None
    net.forward = lambda *args, **kwargs: step(net, *args, **kwargs)
    with energy.count(net) as report:
        for t in range(4):
            if keywords:
                _, mem = net(x=x, mem=mem, t=torch.tensor(t))
            else:
                _, mem = net(x, mem, torch.tensor(t))
    assert kinds(report) == [("binary", "weights")] and report.synaptic_operations == 4 * int(x.sum()) * 3

    net.forward = lambda mem, x: step(net, x, mem)
    mem = torch.zeros(5, 3)
    with energy.count(net) as report:
        for _ in range(4):
            _, mem = net(mem=mem, x=x) if keywords else net(mem, x)
    assert kinds(report) == [("binary", "weights")]


@pytest.mark.parametrize("keywords", [False, True])
@pytest.mark.parametrize("form", ["model", "by hand"])
def test_a_constant_mask_next_to_data_is_fixed(keywords, form):
    net, mask = Call(lambda self, x, mask: (x @ self.w, mask @ self.w)), spikes(5, 4)
    net.forward = lambda x, mask: net.function(net, x, mask)
    outer = nn.Sequential(net)
    with energy.count(net if form == "model" else outer) as report:
        for _ in range(3):
            net(x=spikes(5, 4), mask=mask) if keywords and form == "model" else net(spikes(5, 4), mask)
    assert [kind for kind, _ in kinds(report)] == ["binary", "fixed"] and report.products_on_spikes == 1


# ---- factors and levels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factors", [(1, 0.3), (0.3, 0.7), (1, 0.1, 0.6), (1, 0.5)])
def test_a_shared_layer_counts_the_events_of_each_call_whatever_its_factor(factors):
    net, x = nn.Linear(4, 3), [spikes(9, 4) for _ in factors]
    row = only(energy.count(Call(lambda self, *xs: [net(f * x) for f, x in zip(factors, xs)]), *x))
    assert str(row.inputs[0]) == "binary x a factor per call" and row.inputs[0].factor is None
    assert row.synaptic_operations == 3 * sum(int(each.sum()) for each in x)
    assert json.loads(json.dumps(row.inputs[0].factor)) is None


def test_sums_of_spikes_above_level_64_are_floats():
    net = Call(lambda self, x: (x > 0).float().sum(0) @ self.w)
    for steps, kind in ((64, "levels"), (65, "floats")):
        x = torch.randn(steps, 5, 4)
        x[:, 0, 0], x[:, 1] = 1, -1
        assert only(energy.count(net, x)).inputs[0].kind == kind


def test_a_silent_layer_is_on_zeros():
    net = Call(lambda self, x: ((x > 100).float() @ self.w, x @ self.w))
    report = energy.count(net, torch.randn(5, 4))
    assert (report.macs, report.macs_on_zeros, report.macs_on_floats) == (120, 60, 60)
    assert [row.on_zeros for row in report.rows] == [True, False]
    assert "on floats 60, on zeros 60" in report.table()
    assert report.energy_pj["arithmetic"] == pytest.approx(120 * 4.6)


# ---- broadcasting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: x @ w,  # PyTorch copies w for each element of the batch
        lambda x, w: torch.bmm(x.flatten(0, 1), w.expand(5, 3, 4, 2).flatten(0, 1)),
        lambda x, w: torch.einsum("bhmk,hkn->bhmn", x, w),
    ],
)
def test_a_broadcast_operand_is_one_value_and_its_events_count_in_every_product(product):
    net, x = Call(lambda self, x: product(x, self.w), 3, 4, 2), spikes(5, 3, 6, 4)
    row = only(energy.count(net, x))
    weights = next(i for i in row.inputs if i.kind == "weights")
    assert row.macs == 5 * 3 * 6 * 4 * 2 and weights.values == 3 * 4 * 2 and row.synaptic_operations == int(x.sum()) * 2

    shared = spikes(6, 4)
    net = Call(lambda self, x: x.expand(3, 6, 4) @ self.w, 3, 4, 2)
    row = only(energy.count(net, shared))
    spiking = row.inputs[0]
    assert (spiking.values, row.synaptic_operations, spiking.rate) == (24, 3 * 2 * int(shared.sum()), shared.mean().item())
    assert (spiking.neurons, row.macs) == (4, 3 * 6 * 4 * 2)


def test_grouped_keys_are_read_once_and_keep_their_origin():
    keys = nn.Parameter((torch.rand(1, 1, 5, 4) < 0.5).float())
    net = Call(lambda self, q, v: F.scaled_dot_product_attention(q, self.keys.expand(2, 1, 5, 4), v, enable_gqa=True))
    net.keys = keys
    q, v = spikes(2, 3, 5, 4), spikes(2, 1, 5, 4)
    first, second = energy.count(net, q, v).rows
    assert [(i.kind, i.values) for i in first.inputs] == [("binary", 120), ("weights", 20)]
    assert second.inputs[1].values == 40 and second.synaptic_operations == int(v.sum()) * 5 * 3


@pytest.mark.parametrize("multi_step", [True, False])
def test_the_quantised_network_reads_its_weights_once_for_all_time_steps(multi_step):
    net, x = nn.Linear(4, 3, bias=False), spikes(8, 2, 4)
    if multi_step:
        report, costs = energy.count(net, x), energy.Costs(time_steps=8)
    else:
        report, costs = count_each(net, *x), energy.Costs(time_steps=8, step_by_step=True)
    report = report.with_costs(costs)
    # 12 weights of a byte; 8 integers up to 8 in 4 bits; 6 results of 4 bytes
    assert report.energy_parts_pj["quantised"] == pytest.approx({"arithmetic": 24 * 0.3, "memory": (12 + 4 + 24) * 12.5})
    # the spiking network reads them once a call, 4 bytes each; 64 spikes of a bit, 48 results
    calls = 1 if multi_step else 8
    assert report.energy_parts_pj["spiking"]["memory"] == pytest.approx((48 * calls + 8 + 192) * 12.5)
    assert ("instead of one a call" in report.table()) != multi_step


# ---- operators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, function",
    [
        ("_fft_r2c", lambda self, x: torch.fft.fft(x)),
        ("_cdist_forward", lambda self, x: torch.cdist(x, x)),
        ("_linalg_det", lambda self, x: torch.linalg.det(x)),
        ("_embedding_bag", lambda self, x: F.embedding_bag(torch.tensor([[0, 1]]), self.w)),
        ("index_add", lambda self, x: x.index_add(0, torch.tensor([0]), x[:1])),
        ("_trilinear", lambda self, x: F.bilinear(x, x, self.w.new_ones(2, 4, 4))),
        ("_linalg_solve_ex", lambda self, x: torch.linalg.solve(x, x)),
        ("outer", lambda self, x: torch.outer(x[0], x[1])),
        ("outer", lambda self, x: x[0].outer(x[1])),
        ("kron", lambda self, x: torch.kron(x, x)),
        ("_sparse_addmm", lambda self, x: torch.sparse.mm(x.to_sparse(), self.w)),
    ],
)
def test_operators_that_are_not_counted_are_named(name, function):
    report = energy.count(Call(function), torch.randn(4, 4))
    assert report.unknown[f"aten::{name}"] == {"": 1} and f"aten::{name} in (model): 1 call" in report.table()
    assert "NOT COUNTED" in report.table()


def test_a_custom_operator_is_named():
    @torch.library.custom_op("energy_test::times", mutates_args=())
    def times(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x @ y

    report = energy.count(Call(lambda self, x: times(x, self.w)), torch.randn(4, 4))
    assert report.unknown == {"energy_test::times": {"": 1}}


def test_functions_that_sum_products_and_products_of_integers_are_named():
    def run(self, x):
        i = x.int()
        return i @ i, F.conv1d(x.long()[None], x.long()[:, :, None]), torch.linalg.vecdot(x, x), nn.CosineSimilarity()(x, x)

    def packed(self, x):
        return torch._int_mm(*2 * [torch.ones(32, 32, dtype=torch.int8)])

    names = {"aten::mm", "aten::convolution", "aten::linalg_vecdot", "aten::cosine_similarity"}
    report = energy.count(Call(run), torch.randn(4, 4))
    assert set(report.unknown) == names and not report.rows
    assert set(energy.count(Call(packed), torch.randn(4, 4)).unknown) == {"aten::_int_mm"}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch._weight_norm_interface(x, x[:, :1].contiguous()),
        lambda x: torch.complex(x, x),
        lambda x: torch.polar(x, x),
        lambda x: torch.aminmax(x),
        lambda x: torch.ops.prims.add(x, x),
        lambda x: torch._foreach_mul([x], [x]),
        lambda x: torch._foreach_norm([x]),
        lambda x: torch.linalg.vector_norm(x),
        lambda x: torch.linalg.cross(x[:, :3], x[:, :3]),
        lambda x: torch.gather(x, 0, x.argsort(0)).scatter(0, x.argsort(0), x),
        lambda x: torch.where(x > 0, x, 2 * x).clamp(min=x).sort().values.cumsum(0),
        lambda x: F.interpolate(x[None, None], scale_factor=2, mode="bilinear"),
        lambda x: F.binary_cross_entropy_with_logits(x, x.sigmoid()),
        lambda x: torch.lgamma(x) + torch.special.zeta(x.exp() + 1, x.exp()),
        lambda x: F.fractional_max_pool2d(x[None], 2, output_size=2),
        lambda x: nn.LSTMCell(4, 4)._parameters and F.rrelu(x, training=True),
    ],
)
def test_operators_that_contract_nothing_are_not_named(function):
    assert not energy.count(Call(lambda self, x: function(x)), torch.randn(4, 4)).unknown


def test_every_operator_of_torchs_flop_counter_is_known_or_named():
    from torch.utils.flop_counter import flop_registry

    from sdit_kernels.energy.recorder import facts_of

    forward = [op for op in flop_registry if "backward" not in str(op)]
    overloads = [getattr(op, name) for op in forward if hasattr(op, "overloads") for name in op.overloads()]
    missing = [str(op) for op in overloads if not facts_of(op).may_contract]
    assert len(forward) > 10 and not missing


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_counted_or_named(layout):
    x = torch.nested.nested_tensor([spikes(3, 4), spikes(5, 4)], layout=layout)
    net = nn.Sequential(nn.Linear(4, 6), Call(lambda self, x: (x > 0).to(torch.float32) if layout == torch.jagged else x))
    for context in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with context:
            report = energy.count(net, x)
        if layout == torch.jagged:
            assert report.macs == 8 * 4 * 6 and kinds(report) == [("binary", "weights")] and not report.unknown
        else:
            assert report.macs == 0 and report.unknown["aten::linear"] == {"0": 1}


def test_parameters_that_are_tensor_subclasses_are_weights():
    from torch.testing._internal.two_tensor import TwoTensor

    net = Call(lambda self, x: x @ self.w)
    net.w = nn.Parameter(TwoTensor(torch.randn(4, 3), torch.randn(4, 3)))
    report = energy.count(net, spikes(5, 4))
    assert report.macs == 2 * 5 * 4 * 3 and kinds(report) == [("binary", "weights")] * 2  # it computes twice


@pytest.mark.process
def test_flex_attention_and_a_first_compilation_inside_a_count():
    """In new processes, because the compiler is imported and used for the first time inside the count."""
    program = """
        import sys, torch
        from sdit_kernels import energy
        class Net(torch.nn.Module):
            def forward(self, q): return {body}
        {before}
        assert "torch._dynamo" not in sys.modules
        q = (torch.rand(2, 3, 5, 4) < 0.5).float()
        report = energy.count(Net(), q)
        assert not report.unknown and report.macs == {macs} and report.synaptic_operations == {sops}, report.table()
        again = torch.compile({function}, backend="eager", fullgraph=True)
        assert torch.allclose(again(q), Net()(q), atol=1e-6)
    """
    flex = dict(
        before="from torch.nn.attention.flex_attention import flex_attention", body="flex_attention(q, q, q)",
        function="lambda q: flex_attention(q, q, q)", macs=2 * 6 * 5 * 5 * 4, sops="2 * int(q.sum()) * 5",
    )  # fmt: skip
    first = dict(
        before="f = lambda q: q @ q.mT", body='torch.compile(f, backend="eager")(q)', function="f", macs=6 * 5 * 5 * 4,
        sops="int(q.sum()) * 5",
    )  # fmt: skip
    codes = [textwrap.dedent(program).format(**case) for case in (flex, first)]
    processes = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for code in codes]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_grouped_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    q, k = spikes(2, 4, 5, 8), spikes(2, 2, 5, 8)
    net = Call(lambda self, q, k: flex_attention(q, k, k, enable_gqa=True))
    report = energy.count(net, q, k)
    assert report.macs == 2 * 2 * 4 * 5 * 5 * 8 and not report.unknown
    assert report.rows[1].synaptic_operations == int(k.sum()) * 5 * 2
    assert flex_attention(q, k, k, enable_gqa=True).shape == q.shape


def test_usual_layers_have_nothing_unknown():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.PReLU(), nn.MaxPool2d(2), nn.GroupNorm(2, 4), nn.Dropout(0.1),
                        nn.Flatten(), nn.Linear(36, 8), nn.LayerNorm(8), nn.GELU(), nn.Unflatten(1, (2, 4)),
                        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))  # fmt: skip
    x = torch.randn(2, 1, 8, 8)
    report = energy.count(net, x)
    net.eval()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            again = energy.count(net, x)
        assert not again.unknown and again.macs == report.macs
    attention = 2 * (3 * 16 * 2 + 16 * 2 + 2 * 2 * 2 * 4 + 2 * 2 * 32)
    assert not report.unknown and report.macs == 2 * 4 * 36 * 9 + 2 * 36 * 8 + attention


def test_small_products():
    net = Call(lambda self, x: (x @ self.w[:, 0], torch.dot(x[0], self.w[:, 0]), torch.einsum("bi,ij->bj", x, self.w)))
    report = energy.count(net, spikes(5, 4))
    assert report.macs == 5 * 4 + 4 + 5 * 4 * 3 and report.products == 3 and not report.unknown


def test_products_of_one_call_have_a_line_each():
    net = Call(lambda self, x: torch.einsum("bi,ij,jk->bk", x, self.w, self.w.t()))
    assert energy.count(net, spikes(4, 4)).products == 2


def test_fused_operators_are_on_a_line_of_their_own():
    net = nn.Sequential(nn.Linear(4, 3), LIF())
    with sdit_kernels.backend("reference"):  # plain PyTorch: nothing fused
        assert not energy.count(net, torch.randn(2, 4)).fused
    with sdit_kernels.backend("cpu"):
        report = energy.count(Call(lambda self, x: sdit_kernels.lif(x)), torch.randn(4, 5))
    assert report.fused == {"lif": {"": 20}} and not report.unknown and report.macs == 0
    assert report.fused_work()["lif"]["macs"] == 40 and "lif: 20 elements" in report.table()


def test_integer_and_ternary_neurons_give_spikes():
    """A level of n is n events, whatever the size of a spike."""
    x, weight = 3 * torch.randn(4, 50, 6, generator=torch.Generator().manual_seed(0)), nn.Linear(6, 5, bias=False)
    for levels, kind, level, factor in (
        ((0, 4), "levels", 4, 1.0),
        (sdit_kernels.Levels(0, 4, scale=0.25), "levels", 4, 0.25),
        ("ternary", "signed", 1, 1.0),
    ):
        for backend in ("reference", "cpu"):
            with sdit_kernels.backend(backend):
                s = sdit_kernels.lif(x, v_reset=None, levels=levels)
                net = nn.Sequential(LIF(v_reset=None, levels=levels), weight)
                (row,) = energy.count(net, x).rows
            found = next(i for i in row.inputs if i.kind != "weights")
            assert (found.kind, found.level, found.factor) == (kind, level, factor)
            assert row.synaptic_operations == (s / factor).abs().sum().item() * 5


# ---- ways to run a model ---------------------------------------------------------------------------------------------


def two_layers():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def test_gradients_and_checkpointing_count_the_forward_pass_once():
    net, x = two_layers(), torch.randn(5, 4, requires_grad=True)
    want = energy.count(net, x).macs
    for reentrant in (False, True):
        wrapped = Call(lambda self, x, r=reentrant: checkpoint(net, x, use_reentrant=r))
        with energy.count(wrapped) as report:
            wrapped(x).sum().backward()
        assert report.macs == want == 5 * (4 * 6 + 6 * 3) and report.products == 2
        assert {i.kind for row in report.rows for i in row.inputs} == {"floats", "weights"}


def test_autocast_keeps_weights_weights_in_every_batch():
    net = two_layers()
    with torch.autocast("cpu", torch.bfloat16), energy.count(net) as report:
        for _ in range(3):
            net(torch.randn(5, 4))
    assert kinds(report) == [("floats", "weights")] * 2


def test_a_compiled_model_runs_its_own_code():
    net = two_layers()
    compiled = torch.compile(net, backend="eager")
    x = torch.randn(5, 4)
    compiled(x)
    for model in (compiled, nn.Sequential(compiled)):
        report = energy.count(model, x)
        assert report.macs == 210 and [row.layer[-1] for row in report.rows] == ["0", "2"]
    assert [row.layer for row in energy.count(compiled, x).rows] == ["0", "2"]


def test_a_loop_over_time_steps_is_one_product():
    net = Call(lambda self, x: [(step > 0).float() @ self.w for step in x])
    row = only(energy.count(net, torch.randn(7, 2, 4)))
    assert row.calls == 7 and row.macs == 7 * 2 * 4 * 3


def test_an_error_in_the_model_leaves_nothing_behind():
    def fail(self, x):
        raise RuntimeError("no")

    net = nn.Sequential(nn.Linear(4, 3), Call(fail))
    before = [len(hooks) for hooks in global_hooks()]
    with pytest.raises(RuntimeError, match="no"):
        energy.count(net, torch.randn(2, 4))
    assert [len(hooks) for hooks in global_hooks()] == before
    with energy.count(net) as report:
        with pytest.raises(RuntimeError, match="no"):
            net(torch.randn(2, 4))
        net[0](torch.randn(2, 4))
    assert {row.layer for row in report.rows} == {"0"} and [len(hooks) for hooks in global_hooks()] == before
    assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).shape == (1, 2)


def global_hooks():
    module = torch.nn.modules.module
    return module._global_forward_hooks, module._global_forward_pre_hooks


def test_without_values_all_operands_are_floats():
    report = energy.count(two_layers().to("meta"), torch.ones(5, 4, device="meta"))
    assert report.macs == 210 and kinds(report) == [("floats", "floats")] * 2
    assert report.energy_pj["arithmetic"] == pytest.approx(210 * 4.6)
    text = report.table()
    assert "neither synaptic operations nor energies" in text and "pJ" not in text and "nJ" not in text


def test_written_arguments_without_schemas(monkeypatch):
    monkeypatch.setattr(sdit_kernels._torch, "_HAS_SCHEMA", False)
    test_spikes_written_into_a_buffer_are_data()
    x, out = torch.ones(2), torch.ones(2)
    written = sdit_kernels._torch.written_arguments
    assert written(torch.ops.aten.add_.Tensor, (x, out), {})[0] is x and not written(torch.ops.aten.add.Tensor, (x, out), {})
    assert written(torch.ops.aten.add.out, (x, x), {"out": out})[0] is out


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_a_scripted_model_is_counted():
    net = torch.jit.trace(nn.Linear(4, 3), torch.ones(2, 4))
    report = count_each(net, spikes(5, 4), spikes(5, 4))
    assert report.macs == 120 and report.batches == 2


def test_a_copy_of_the_model_inside_the_block_is_another_model():
    net = two_layers()
    with energy.count(net) as report:
        copied = copy.deepcopy(net)
        copied(net(torch.randn(5, 4))[:, :1].expand(5, 4))
    assert report.batches == 1 and report.macs == 420
    assert [row.layer for row in report.rows] == ["0", "2", "(Sequential 0).(Linear 1)", "(Sequential 0).(Linear 3)"]


def test_the_count_changes_no_result():
    net, x = two_layers(), torch.randn(5, 4)
    want = net(x)
    with energy.count(net):
        assert torch.equal(net(x), want)


# ---- the report ------------------------------------------------------------------------------------------------------


def test_the_report_as_text_dict_and_json(capsys):
    net = nn.Sequential(nn.Linear(4, 3), Call(lambda self, x: (x > 0).float() @ self.w, 3, 5))
    with energy.count(net) as report:
        for _ in range(3):
            net(torch.randn(8, 4))
    found = report.to_dict()
    assert json.loads(report.to_json()) == json.loads(json.dumps(found))
    assert {"macs", "synaptic_operations", "energy_pj", "products", "products_on_spikes"} <= found.keys()
    assert found["macs"] == 3 * 8 * (12 + 15) and found["products"] == 2 and found["products_on_spikes"] == 1
    assert list(found["energy_pj"]) == ["arithmetic", "with_memory", "quantised"]
    print(report)
    text = capsys.readouterr().out
    assert text.rstrip("\n") == report.table()
    for part in ("1 of 2 products see spikes (3 batches)", "0: addmm (floats, weights)", "4.6 pJ", "0.9 pJ", "1 MB SRAM"):
        assert part in text


def test_the_three_energies_by_hand():
    net, x = nn.Linear(4, 3, bias=False), torch.tensor([[1.0, 0, 0, 1], [0, 0, 1, 0]])
    report = energy.count(net, x)
    assert report.energy_pj["arithmetic"] == pytest.approx(9 * 0.9)
    # 12 weights and 6 results of 4 bytes, 8 spikes of a bit
    assert report.energy_pj["with_memory"] == pytest.approx(9 * 0.9 + (18 * 4 + 1) * 12.5)
    # 12 weights of a byte
    assert report.energy_pj["quantised"] == pytest.approx(24 * 0.3 + (12 + 6 * 4 + 1) * 12.5)
    other = report.with_costs(energy.Costs(add=2, byte=0, time_steps=2))
    assert other.energy_pj == pytest.approx({"arithmetic": 18, "with_memory": 18, "quantised": 12 * 0.3})
    assert report.costs.add == 0.9


def test_silent_neurons_over_batches():
    net = nn.Linear(3, 2)
    with energy.count(net) as report:
        net(torch.tensor([[1.0, 0, 0], [0, 0, 0]]))
        net(torch.tensor([[0.0, 1, 0]]))
    assert (only(report).inputs[0].silent, only(report).inputs[0].neurons) == (1, 3)
    assert "1 of 3" in report.table()


def test_bad_arguments():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got function"):
        energy.count(lambda x: x, torch.ones(1))
    with pytest.raises(TypeError, match="costs must be a sdit_kernels.energy.Costs, got float"):
        energy.count(nn.Linear(1, 1), torch.ones(1), costs=4.6)
    with pytest.raises(ValueError, match="weight is lazy"):
        energy.count(nn.LazyLinear(1), torch.ones(1))


@pytest.mark.parametrize("module", [energy, sdit_kernels.energy.report], ids=lambda m: m.__name__)
def test_docstring_examples_run(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


def test_compiled_functions_run_their_own_code():
    function = torch.compile(lambda x: (x > 0).float() @ x, backend="eager", fullgraph=True)
    net, x = Call(lambda self, x: function(x) @ self.w), torch.randn(4, 4)
    want = net(x)
    report = energy.count(net, x)
    assert report.macs == 4 * 4 * 4 + 4 * 4 * 3 and report.rows[0].inputs[0].kind == "binary"
    assert torch.equal(net(x), want)


def test_a_count_inside_a_count_does_not_count_the_work_of_counting():
    inner, x = nn.Conv2d(1, 2, 3, padding=1), spikes(2, 1, 5, 5)
    reports = []
    net = Call(lambda self, x: reports.append(energy.count(inner, x)))
    net.inner = inner
    report = energy.count(net, x)
    assert report.macs == reports[0].macs == energy.count(inner, x).macs and report.products == 1


def test_modules_in_other_threads_are_named():
    net, x = two_layers(), torch.randn(5, 4)

    def in_thread(function):
        thread = threading.Thread(target=function)
        thread.start()
        thread.join()

    with energy.count(net) as report:
        in_thread(lambda: net(x))
        in_thread(lambda: nn.Linear(4, 3)(x))  # not a part of net
        net(x)
    assert report.macs == 210 and [row.layer for row in report.rows] == ["0", "2"]
    assert report.unknown == {"modules called in another thread": {"": 4}} and "NOT COUNTED" in report.table()

    class Parallel(nn.Module):  # nn.DataParallel on two devices: copies of the module, in threads
        def __init__(self):
            super().__init__()
            self.module = two_layers()

        def forward(self, x):
            copy = self.module[1]._replicate_for_data_parallel()
            in_thread(lambda: copy(x))
            return x + 1

    assert energy.count(Parallel(), x).unknown == {"modules called in another thread": {"": 1}}


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x=None, model=None, costs=None):
        return self.linear(sum(v for v in (x, model, costs) if v is not None) if x is not None else torch.ones(1, 4))


def test_models_with_arguments_named_model_and_costs_or_without_arguments():
    net, x = Named(), torch.ones(2, 4)
    assert energy.count(net, x, model=x).macs == 24
    with pytest.raises(TypeError, match="got Tensor; if the model takes an argument costs, call it inside `with energy.count"):
        energy.count(net, x, costs=x)
    with energy.count(net, costs=energy.Costs(mac=1)) as report:
        net(x, costs=x)
        net()
    assert report.macs == 36 and report.costs.mac == 1


def test_a_count_without_inputs_says_how_it_is_used():
    net, x = two_layers(), torch.ones(5, 4)
    counting = energy.count(net)
    with pytest.raises(AttributeError, match="is not a report and has no attribute 'macs'.*with energy.count"):
        _ = counting.macs
    for _ in range(2):  # a new report each time
        with counting as report:
            net(x)
        assert report.macs == 210
    with counting:
        net(x)
        with pytest.raises(RuntimeError, match="this count is running"):
            counting.__enter__()
    net(x)
    assert report.batches == 1


def test_an_empty_block_is_named():
    with pytest.warns(UserWarning, match="saw no operator"), energy.count(two_layers()) as report:
        pass
    assert report.macs == report.batches == 0 and "NOTHING RAN" in report.table() and "batch" not in report.table()
    assert repr(report) == "<Report: 0 products, 0 on spikes; 0 multiply-adds, 0 synaptic operations>"


def test_one_is_singular():
    text = energy.count(Call(lambda self, x: (x @ self.w, torch.linalg.det(x))), spikes(4, 4)).table()
    assert "1 of 1 product sees spikes (1 batch)" in text and "aten::_linalg_det in (model): 1 call\n" in text + "\n"


def test_with_costs_names_what_it_wants():
    with pytest.raises(TypeError, match="costs must be a sdit_kernels.energy.Costs, got dict$"):
        energy.count(nn.Linear(1, 1), torch.ones(1)).with_costs({})


def test_neurons_without_leak_have_no_multiplications_of_a_leak():
    def run(self, x):
        sdit_kernels.lif(x, tau=2.0)
        sdit_kernels.lif(x, tau=float("inf"), decay_input=False)
        sdit_kernels.leaky(x, beta=0.5)
        sdit_kernels.leaky(x, beta=1.0)

    with sdit_kernels.backend("cpu"):
        work = energy.count(Call(run), torch.randn(4, 5)).fused_work()
    assert {name: (w["macs"], w["additions"]) for name, w in work.items()} == {
        "lif": (40, 40), "lif without leak": (20, 40), "leaky": (40, 20), "leaky without leak": (20, 40),
    }  # fmt: skip


def test_neurons_with_two_states_and_neurons_of_the_user_are_counted():
    def step(x, s, p, o):
        h = s.v * p.k + (x - s.v) * 0.5  # two products, one sum that no product takes part in
        fired = o.fire(h - 1.0)  # two additions
        return fired, o.where(fired, 0.0, h)  # one

    op = sdit_kernels.neuron.define(step, parameters=("k",))

    def run(self, x):
        sdit_kernels.cuba(x, beta_i=0.5, beta=0.5)
        op(x, k=0.5)

    with sdit_kernels.backend("cpu"):
        work = energy.count(Call(run), torch.randn(4, 5)).fused_work()
    assert [(name.partition("_")[0], w["macs"], w["additions"]) for name, w in sorted(work.items())] == [
        ("cuba", 60, 20), ("step", 40, 80),
    ]  # fmt: skip


def test_the_costs_are_checked():
    nan, inf = float("nan"), float("inf")
    numbers = ("mac", "add", "int_multiply", "int_add", "byte", "value_bytes", "quantised_weight_bytes")
    for name in numbers:
        for value in (True, "1", None, 1j, torch.ones(())):
            with pytest.raises(TypeError, match=f"{name} must be a number, got"):
                energy.Costs(**{name: value})
        for value in (-1, -0.5, nan, inf):
            with pytest.raises(ValueError, match=f"{name} must be 0 or more and finite, got {value}"):
                energy.Costs(**{name: value})
        for value in (0, 2, 2.5, np.float32(2.5), np.int64(2)):
            assert type(getattr(energy.Costs(**{name: value}), name)) is float
    for value in (True, 1.5, 4.0, nan, "4", None):
        with pytest.raises(TypeError, match="time_steps must be an int, got"):
            energy.Costs(time_steps=value)
    for value in (0, -4):
        with pytest.raises(ValueError, match=f"time_steps must be 1 or more and finite, got {value}"):
            energy.Costs(time_steps=value)
    assert energy.Costs(time_steps=np.int64(4)) == energy.Costs(time_steps=4)
    with pytest.raises(TypeError, match="memory must be a str, got 1"):
        energy.Costs(memory=1)
    with pytest.raises(TypeError, match="step_by_step must be a bool, got 1"):
        energy.Costs(step_by_step=1)


def everything():
    """Return a report with spikes, floats, levels, operators that are not known, and fused ones."""

    def run(self, x):
        with sdit_kernels.backend("cpu"):
            out = sdit_kernels.lif(3 * x.abs())
        return (out + out.roll(1, 0)) @ self.w, out @ out.t(), x @ self.w, torch.linalg.det(x[:4])

    return count_each(Call(run), torch.randn(6, 4), torch.randn(6, 4))


def test_the_dict_is_what_json_gives_back():
    report = everything()
    found = report.to_dict()
    assert json.loads(report.to_json()) == found
    assert found["unknown"] == report.unknown == {"aten::_linalg_det": {"": 2}}
    assert found["fused"] == report.fused == {"lif": {"": 48}} and found["fused_work"] == report.fused_work()
    for name in set(found) - {"rows", "costs", "fused_work"}:
        assert found[name] == getattr(report, name), name
    for row, plain in zip(report.rows, found["rows"]):
        for name in plain.keys() - {"inputs"}:
            assert plain[name] == getattr(row, name), name
        for operand, figures in zip(row.inputs, plain["inputs"]):
            assert {name: getattr(operand, name) for name in figures} == figures


def test_reports_can_be_pickled_and_copied_and_do_not_keep_the_model():
    net = Call(lambda self, x: (x > 0).float() @ self.w)
    with energy.count(net) as report:
        net(torch.randn(5, 4))
        early = pickle.loads(pickle.dumps(report))
        net(torch.randn(5, 4))
    assert early.batches == 1 and report.batches == 2 and report.macs == 2 * early.macs == 120
    for found in (report, everything()):
        for other in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found), copy.copy(found)):
            assert other.to_dict() == found.to_dict() and str(other) == str(found)
            assert other == found and repr(other) == repr(found) and other != report.with_costs(energy.Costs(mac=9))
            costs = energy.Costs(mac=1)
            assert other.with_costs(costs).energy_pj == found.with_costs(costs).energy_pj
    alive = weakref.ref(net)
    del net
    gc.collect()
    assert alive() is None and report.macs == 120


# ---- other libraries -------------------------------------------------------------------------------------------------


def jelly(step_mode):
    pytest.importorskip("spikingjelly.activation_based", reason="spikingjelly is not installed (make peers)")
    from spikingjelly.activation_based import functional, layer, neuron

    torch.manual_seed(0)
    net = nn.Sequential(layer.Conv2d(1, 4, 3, padding=1), neuron.LIFNode(tau=1.5), layer.Conv2d(4, 4, 3, stride=2),
                        neuron.IFNode(), layer.Flatten(), layer.Linear(4 * 3 * 3, 5))  # fmt: skip
    with torch.no_grad():
        net[0].weight.mul_(4)
        net[2].weight.mul_(4)
    functional.set_step_mode(net, step_mode)
    return net, functional.reset_net


def count_jelly(net, reset_net, step_mode, batches):
    with torch.no_grad(), energy.count(net) as report:
        for x in batches:
            reset_net(net)
            net(x) if step_mode == "m" else [net(step) for step in x]
    return report


@pytest.mark.peers
@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_spikingjelly_counts_the_same_on_its_own_modules(step_mode):
    """On binary inputs with constant weights. The page docs/energy.md explains the differences elsewhere."""
    net, reset_net = jelly(step_mode)
    from spikingjelly.activation_based.op_counter import DispatchCounterMode, MACCounter, SynOpCounter

    batches = 2 * torch.rand(2, 4, 3, 1, 8, 8)
    report = count_jelly(net, reset_net, step_mode, batches)
    synops, macs = SynOpCounter(), MACCounter()
    with torch.no_grad(), DispatchCounterMode([synops, macs]):
        for x in batches:
            reset_net(net)
            net(x) if step_mode == "m" else [net(step) for step in x]
    assert report.synaptic_operations == synops.get_total() > 0
    products = ("convolution", "addmm", "mm")
    counted = {str(op): n for op, n in macs.get_counts()["Global"].items()}
    assert report.macs_on_floats == sum(n for op, n in counted.items() if any(f".{p}" in op or f"{p}." in op for p in products))
    assert kinds(report) == [("floats", "weights"), ("binary", "weights"), ("binary", "weights")]


@pytest.mark.peers
def test_where_spikingjelly_counts_something_else():
    jelly("m")
    from spikingjelly.activation_based.op_counter import DispatchCounterMode, SynOpCounter

    def both(function, *inputs):
        net, counter = Call(function, 4, 4), SynOpCounter()
        report = energy.count(net, *inputs)
        with torch.no_grad(), DispatchCounterMode([counter]):
            net(*inputs)
        return only(report), counter.get_total()

    x, y = spikes(5, 4), spikes(4, 4)
    row, theirs = both(lambda self, x, y: x @ y, x, y)
    assert theirs == row.pairs < row.synaptic_operations
    row, theirs = both(lambda self, x: (x + x[[1, 2, 3, 4, 0]]) @ self.w, x)
    assert theirs == 0 and row.synaptic_operations == 2 * int(x.sum()) * 4
    row, theirs = both(lambda self, x: x.cos() @ (self.w > 0).float(), x)
    assert theirs > 0 and row.synaptic_operations == 0


@pytest.mark.peers
def test_an_accelerated_model_counts_the_same():
    net, reset_net = jelly("m")
    from sdit_kernels.compat import spikingjelly

    batches = 2 * torch.rand(2, 4, 3, 1, 8, 8)
    want = count_jelly(net, reset_net, "m", batches)
    spikingjelly.accelerate(net)
    got = count_jelly(net, reset_net, "m", batches)
    assert got.synaptic_operations == want.synaptic_operations and kinds(got) == kinds(want)
    assert set(got.fused) == {"lif", "lif without leak"} and not got.unknown


@pytest.mark.peers
def test_snntorch_modules_and_recurrent_spikes():
    snn = pytest.importorskip("snntorch", reason="snntorch is not installed (make peers)")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), snn.RLeaky(beta=0.5, linear_features=8)

        def forward(self, x):
            out, mem = self.second.init_rleaky()
            for _ in range(4):
                out, mem = self.second(self.first(x), out, mem)
            return out

    net = Net()
    with torch.no_grad(), energy.count(net) as report:
        for _ in range(3):
            net(4 * torch.randn(5, 6))
    assert [(row.layer, row.inputs[0].kind, row.calls) for row in report.rows] == [
        ("first", "floats", 12), ("second.recurrent", "binary", 12),
    ]  # fmt: skip


def test_no_value_is_read_during_the_run_if_the_tensors_are_on_a_gpu(monkeypatch):
    """The CPU stands for a GPU: reading a value raises."""
    first = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    last = Call(lambda self, x: (F.avg_pool2d(x.gt(0).float(), 2).flatten(2) @ self.w).gt(0).float() @ self.w.t(), 9, 2)
    attention = Call(lambda self, x: x.gt(0).float() @ x.gt(0).float().transpose(1, 2))
    net, x = nn.Sequential(first, last, attention), torch.randn(3, 2, 1, 8, 8)

    def run():
        with torch.no_grad(), energy.count(net) as report:
            for batch in x:
                net(batch)
        return report

    want = run().to_dict()
    with monkeypatch.context() as patch:
        patch.setattr(sdit_kernels.energy.products, "is_readable", lambda t: False)
        for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy", "cpu"):
            patch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a value was read"))
        report = run()
    got = report.to_dict()
    assert got == want and got["products_on_spikes"] == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_is_not_waited_for_during_the_run():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), Call(lambda self, x: F.avg_pool2d((x > 0).float(), 2)), nn.Conv2d(4, 3, 2)).cuda()
    x = torch.randn(3, 2, 1, 8, 8)
    with energy.count(net) as cpu_report:
        net.cpu()
        for batch in x:
            net(batch)
    net.cuda()
    x = x.cuda()
    net(x[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with energy.count(net) as report:
            for batch in x:
                net(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert report.synaptic_operations == pytest.approx(cpu_report.synaptic_operations, rel=0.02)
    assert kinds(report) == kinds(cpu_report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_levels_of_rounded_values_are_counted_exactly(dtype):
    """k / 3 and k / 7 are rounded in every dtype; the rounding must not add up."""
    draw = torch.Generator().manual_seed(0)
    for n in (3, 7):
        level = (torch.rand(n, 500, 16, generator=draw) < 0.3).sum(0)
        model = nn.Sequential(Scale(n), nn.Linear(16, 8, dtype=dtype))
        assert energy.count(model, level.to(dtype)).synaptic_operations == 8 * level.sum().item()


class Scale(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.n = n

    def forward(self, x):
        return x / self.n


def test_an_offset_is_not_a_spike():
    spikes = (torch.rand(20, 16, generator=torch.Generator().manual_seed(0)) < 0.3).float()

    class Offset(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 8)

        def forward(self, x):
            return self.linear(x + 1)

    report = energy.count(Offset(), spikes)
    assert report.synaptic_operations == 0 and report.rows[0].inputs[0].kind == "floats"
