"""norm_lif: the definition against torch's BatchNorm, every backend against the oracle, statistics, groups, memory, errors."""

import contextlib
import dataclasses
import importlib
import inspect
import math
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import native_triton  # noqa: F401  (before triton)
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import python
from hypothesis import assume, given, settings
from oracle import loops

import sdit_kernels
from sdit_kernels import backend, leaky, lif, norm_lif, repeat
from sdit_kernels.cpu import norm_neuron
from sdit_kernels.layout import channel_layout
from sdit_kernels.neuron import LEAKY, Variant
from sdit_kernels.ops.norm_lif import batch_statistics, define_norm
from sdit_kernels.tuning import tuned

BACKENDS = ["reference", "cpu", "triton"]
FUSED = BACKENDS[1:]
LAYOUTS = ["contiguous", "channels last", "batch first", "slice", "transposed"]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def draw(shape, seed=0, dtype=torch.float64, mean=0.0, spread=1.0):
    return (mean + spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def with_layout(x, layout):
    if layout == "channels last":  # the channels of axis 2 are contiguous
        return x.movedim(2, -1).contiguous().movedim(-1, 2)
    if layout == "batch first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "slice":
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 1)
        wide[..., : x.shape[-1]] = x
        return wide[..., : x.shape[-1]]
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    return x


def vectors(T, C, dtype=torch.float64, per_step=False, step_factor=False, learnt=None, seed=0, v_shape=None):
    """Return the parameters by name."""
    shape = (T, C) if per_step else (C,)
    found = dict(weight=1 + 0.3 * draw(shape, seed + 1, dtype), bias=0.5 + 0.3 * draw(shape, seed + 2, dtype))
    if step_factor:
        found["step_factor"] = 1 + 0.2 * draw((T,), seed + 3, dtype)
    if learnt:
        found["tau"] = 2 + draw(() if learnt == "scalar" else (C,), seed + 4, dtype).abs()
        found["v_threshold"] = 1 + 0.1 * draw(() if learnt == "scalar" else (C,), seed + 5, dtype).abs()
    if v_shape is not None:
        found["v"] = 0.3 * draw(v_shape, seed + 6, dtype)
    return found


def run(name, x, tensors, upstream, running=None, **settings):
    """Return (outputs, gradients by name)."""
    x = x.detach().requires_grad_()
    leaves = {n: t.detach().clone().requires_grad_() for n, t in tensors.items()}
    mean, var = running or (None, None)
    with backend(name):
        outputs = norm_lif(
            x, running_mean=mean, running_var=var, training=running is None, return_v=True, return_v_seq=True, **leaves,
            **settings,
        )  # fmt: skip
        used = [(o, g.to(o.dtype)) for o, g in zip(outputs, upstream) if g is not None]
        found = torch.autograd.grad([o for o, _ in used], [x, *leaves.values()], [g for _, g in used])
    return outputs, dict(zip(("x", *leaves), found))


def compare(name, x, tensors, running=None, seed=0, **settings):
    """Compare outputs and gradients with the oracle, in float64 up to rounding, otherwise where no spike differs."""
    shapes = x.shape, x.shape[1:], x.shape
    upstream = [draw(shape, seed + 10 + i, x.dtype).double() for i, shape in enumerate(shapes)]
    arrays = {n: t.double().numpy() for n, t in tensors.items()}
    given = None if running is None else [r.double().numpy() for r in running]
    (*wanted, _, _), backward = loops.norm_lif(x.double().numpy(), running=given, **arrays, **settings)
    outputs, found = run(name, x, tensors, upstream, running, **settings)
    differs = outputs[0].detach().double().numpy() != wanted[0]
    if x.dtype == torch.float64:
        assert not differs.any()
    elif differs.any():  # only where the membrane potential comes to the threshold, and then all later spikes may differ
        assert differs.mean() < 1e-3
        assume(False)
    tolerance = TOLERANCE[torch.float64 if x.dtype == torch.float64 else torch.float32]
    for o, w in zip(outputs[1:], wanted[1:]):
        np.testing.assert_allclose(o.detach().double().numpy(), w, rtol=tolerance, atol=30 * tolerance)
    want = backward(*(g.numpy() for g in upstream))
    for n, g in found.items():
        assert g.dtype == (x.dtype if n == "x" else tensors[n].dtype) and g.shape == (x if n == "x" else tensors[n]).shape
        scale = np.abs(want["x"]).sum() if g.dim() < 2 or n in ("weight", "bias") else np.abs(want[n]).max(initial=1.0)
        np.testing.assert_allclose(
            g.double().numpy(), want[n], rtol=TOLERANCE[g.dtype], atol=TOLERANCE[g.dtype] * max(scale, 1.0), err_msg=n
        )


# --- the definition and torch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape, axis", [((3, 2, 5, 4, 3), 2), ((3, 2, 7, 5), -1), ((3, 4, 5), 2)])
def test_the_result_is_batch_norm_then_lif(name, training, shape, axis):
    x, C = draw(shape, mean=0.5, spread=2.0).requires_grad_(), shape[axis]
    norm = torch.nn.BatchNorm1d(C, momentum=0.3).double().train(training)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * draw((C,), 1))
        norm.bias.copy_(0.4 + draw((C,), 2))
        norm.running_mean.copy_(draw((C,), 3))
        norm.running_var.copy_(1 + draw((C,), 4).abs())
    mean, var, count = norm.running_mean.clone(), norm.running_var.clone(), norm.num_batches_tracked.clone()
    leaves = [x, norm.weight, norm.bias]
    with backend(name):
        s, v = norm_lif(
            x, norm.weight, norm.bias, mean, var, training=training, momentum=0.3, channel_axis=axis, tau=1.7, return_v=True
        )
        found = torch.autograd.grad([s, v], leaves, [draw(s.shape, 5), draw(v.shape, 6)])
    y = norm(x.movedim(axis, -1).reshape(-1, C)).reshape(x.movedim(axis, -1).shape).movedim(-1, axis)
    with backend("reference"):
        wanted, v_wanted = lif(y, tau=1.7, return_v=True)
    assert torch.equal(s, wanted)
    torch.testing.assert_close(v, v_wanted, rtol=1e-12, atol=1e-12)
    want = torch.autograd.grad([wanted, v_wanted], leaves, [draw(s.shape, 5), draw(v.shape, 6)])
    for g, w in zip(found, want):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mean, norm.running_mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(var, norm.running_var, rtol=1e-12, atol=1e-12)
    assert training == bool(norm.num_batches_tracked != count)


# --- every backend and variant against the oracle ---------------------------------------------------------------------------

# Every variant compiles its own kernels, so there are few. "images" have their channels in the middle, "tokens" at the end.
VARIANTS = [  # memory order, variant of the norm, in training, settings of the neuron, learnt parameters, with v
    ("images", dict(), True, dict(), None, False),
    ("tokens", dict(), True, dict(), None, True),
    ("images", dict(), False, dict(v_reset=None), None, True),
    ("tokens", dict(), False, dict(decay_input=False), None, False),
    ("images", dict(scale=1.5), True, dict(v_reset=-0.25, decay_input=False), "channel", True),
    ("tokens", dict(scale=1.5), True, dict(v_reset=None), "channel", False),
    ("tokens", dict(), True, dict(levels="ternary", detach_reset=True), None, False),
    ("images", dict(), True, dict(levels=(0, 4), v_reset=None), None, False),
    ("images", dict(step_factor=True), True, dict(surrogate="sigmoid"), "scalar", False),
    ("tokens", dict(step_factor=True), False, dict(), "channel", False),
    ("images", dict(per_step=True), True, dict(), None, True),
    ("tokens", dict(per_step=True, step_factor=True), True, dict(), None, False),
]


def order(x, name):
    return with_layout(x, "channels last") if name == "tokens" else x


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("memory, norm, training, neuron, learnt, given_v", VARIANTS, ids=str)
def test_variants_equal_the_oracle(name, memory, norm, training, neuron, learnt, given_v):
    shape, norm = (4, 3, 5, 3, 4), dict(norm)
    x = order(draw(shape, mean=1.0, spread=2.0), memory)
    step_factor, per_step = norm.pop("step_factor", False), norm.get("per_step", False)
    tensors = vectors(4, 5, torch.float64, per_step, step_factor, learnt, v_shape=shape[1:] if given_v else None)
    size = (4, 5) if per_step else (5,)
    running = None if training else (draw(size, 7), 1 + draw(size, 8).abs())
    for short_row in (0, 32) if name == "cpu" and memory == "images" else (32,):  # rows of one channel, or of all channels
        with tuned(norm_short_row_cpu=short_row):
            compare(name, x, tensors, running, **norm, **neuron)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("memory, variant", [("images", dict()), ("tokens", dict()), ("images", dict(per_step=True))], ids=str)
def test_more_than_16_steps_equal_the_oracle(name, memory, variant):
    x = order(draw((19, 2, 3, 2, 3), spread=2.0), memory)
    tensors = vectors(19, 3, torch.float64, v_shape=x.shape[1:], **variant)
    compare(name, x, tensors, per_step=variant.get("per_step", False))


SIZE = st.sampled_from([1, 3, 7, 33])


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("dtype, learnt", [(torch.float32, "channel"), (torch.bfloat16, None)])
@settings(max_examples=5)
@given(data=st.data())
def test_random_shapes_and_layouts_equal_the_oracle(name, dtype, learnt, data):
    T = data.draw(st.sampled_from([4, 18]))
    shape = (T, data.draw(SIZE), data.draw(SIZE), *data.draw(st.lists(SIZE, min_size=0, max_size=1)))
    while math.prod(shape) >= 1 << 15:  # larger tensors compile a second CPU kernel
        shape = (*shape[:-1], 1)
        shape = shape if math.prod(shape) < 1 << 15 else (shape[0], 2, *shape[2:])
    axis = data.draw(st.sampled_from([2, len(shape) - 1]))
    assume(math.prod(shape) > shape[axis])
    layout = data.draw(st.sampled_from(LAYOUTS))
    seed = data.draw(st.integers(0, 99))
    x = with_layout(draw(shape, seed, dtype, mean=0.5, spread=1.5), layout)
    tensors = vectors(T, shape[axis], torch.float32, learnt=learnt, seed=seed)
    training = data.draw(st.booleans())
    running = None if training else (draw(shape[axis : axis + 1], 7).float(), 1 + draw(shape[axis : axis + 1], 8).abs().float())
    if training:  # with a variance of almost 0, rounding is as large as the values
        axes = [a for a in range(x.dim()) if a != axis]
        assume(x.double().var(axes).min() > 1e-2)
    compare(name, x, tensors, running, seed, channel_axis=axis)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_spikes_in_evaluation_equal_the_reference_bit_for_bit(name, layout):
    x = with_layout(draw((4, 2, 9, 5, 3), dtype=torch.float32), layout)
    tensors, running = vectors(4, 9, torch.float32), (draw((9,), 1).float(), draw((9,), 2).float().abs() + 0.1)
    found = []
    for where in (name, "reference"):
        with backend(where), torch.no_grad():
            found.append(norm_lif(x, **tensors, running_mean=running[0], running_var=running[1], training=False, return_v=True))
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_outputs_take_the_memory_order_of_x():
    for name in FUSED:
        for layout in ("contiguous", "channels last"):
            x = with_layout(draw((2, 3, 4, 5, 6), dtype=torch.float32), layout).requires_grad_()
            with backend(name):
                s, v, seq = norm_lif(x, training=True, return_v=True, return_v_seq=True)
                (dx,) = torch.autograd.grad(s, x, torch.ones_like(s))
            assert s.stride() == seq.stride() == dx.stride() == x.stride() and v.stride() == x.stride()[1:], (name, layout)


# --- statistics -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("case", ["mean 1000", "constant", "outlier first", "random"])
def test_statistics_are_exact_to_rounding(name, layout, per_step, case):
    """Sums of squares about zero would lose all digits at mean 1000 and spread 1."""
    x = draw((4, 5, 3, 13, 11), mean=1000.0 if case == "mean 1000" else 0.1)
    if case == "constant":
        x[:, :, 1] = 1e4 / 3
    if case == "outlier first":
        x[:, 0, :, 0, 0] = 1e3
    x = with_layout(x.float(), layout)
    with backend(name):
        mean, squares, rstd, count = batch_statistics(x, 2, per_step, 1e-5, None, name)
    axes = (1, 3, 4) if per_step else (0, 1, 3, 4)
    want = x.double()
    torch.testing.assert_close(mean.double(), want.mean(axes), rtol=2e-7, atol=1e-5 * max(0.2, want.std().item()))
    torch.testing.assert_close(squares.double() / count, want.var(axes, unbiased=False), rtol=2e-6, atol=1e-12)
    torch.testing.assert_close(rstd.double(), 1 / (squares.double() / count + 1e-5).sqrt(), rtol=3e-7, atol=0)
    with backend(name):
        again = batch_statistics(x, 2, per_step, 1e-5, None, name)
    assert all(map(torch.equal, (mean, squares, rstd), again))


@pytest.mark.parametrize("name", FUSED)
def test_statistics_of_16_bit_data_are_float32(name):
    x = draw((4, 8, 3, 16, 16), mean=100.0, dtype=torch.bfloat16)
    with backend(name):
        mean, squares, rstd, count = batch_statistics(x, 2, False, 1e-5, None, name)
    assert mean.dtype == squares.dtype == rstd.dtype == torch.float32
    torch.testing.assert_close(mean.double(), x.double().mean((0, 1, 3, 4)), rtol=1e-6, atol=0)
    torch.testing.assert_close(squares.double() / count, x.double().var((0, 1, 3, 4), unbiased=False), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", BACKENDS)
def test_running_statistics_are_updated_as_batch_norm_does(name):
    x = draw((4, 3, 5, 2), mean=2.0, dtype=torch.float32)
    norm = torch.nn.BatchNorm2d(5, momentum=None)  # cumulative average
    mean, var = torch.zeros(5), torch.ones(5)
    for step in range(3):
        norm((x + step).flatten(0, 1).unsqueeze(-1))
        with backend(name), torch.no_grad():
            norm_lif(x + step, running_mean=mean, running_var=var, training=True, momentum=1 / (step + 1))
    torch.testing.assert_close(mean, norm.running_mean)
    torch.testing.assert_close(var, norm.running_var)
    with backend(name):  # one of them alone, none, and evaluation, which changes nothing
        norm_lif(x, running_mean=mean, training=True, momentum=1.0)
        norm_lif(x, training=True)
        kept = mean.clone(), var.clone()
        norm_lif(x, running_mean=mean, running_var=var, training=False)
    torch.testing.assert_close(mean, x.mean((0, 1, 3)))
    assert torch.equal(mean, kept[0]) and torch.equal(var, kept[1])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("case", ["contiguous", "strided", "float64", "one missing", "inference"])
def test_running_statistics_of_any_kind_are_updated(name, per_step, case):
    x, size = draw((3, 4, 5, 6), mean=2.0).float(), (3, 5) if per_step else (5,)
    dtype = torch.float64 if case == "float64" else torch.float32
    kept = torch.zeros(size, dtype=dtype), torch.ones(size, dtype=dtype)
    if case == "strided":
        kept = tuple(torch.stack([t, t + 7], -1)[..., 0] for t in kept)
    if case == "one missing":
        kept = kept[0], None
    versions = [None if t is None else t._version for t in kept]
    axes = (1, 3) if per_step else (0, 1, 3)
    with backend(name), torch.inference_mode(case == "inference"):
        kept = tuple(t.clone() for t in kept) if case == "inference" else kept
        for _ in range(4):  # a known call repeats what it did
            norm_lif(x, running_mean=kept[0], running_var=kept[1], training=True, momentum=0.3, per_step=per_step)
    share = 1 - 0.7**4
    torch.testing.assert_close(kept[0].double(), share * x.double().mean(axes), rtol=1e-5, atol=1e-6)
    if kept[1] is not None:
        torch.testing.assert_close(kept[1].double(), 1 - share + share * x.double().var(axes), rtol=1e-5, atol=1e-6)
    if case == "strided":
        assert torch.equal(kept[1]._base[..., 1], torch.full(size, 8.0))  # the neighbours in memory stay
    if case != "inference":
        assert all(t is None or t._version == before + 4 for t, before in zip(kept, versions))


@pytest.mark.parametrize("name", BACKENDS)
def test_running_statistics_that_cannot_be_updated_stay_as_they_are(name):
    x, kept = draw((3, 4, 5, 6)).float(), torch.zeros(5)
    with torch.inference_mode():
        made = torch.zeros(5), torch.ones(5)
    for mean, var, message in (
        (*made, "running_mean was made in inference_mode and can be updated only there"),
        (kept, made[1], "running_var was made in inference_mode"),
        (kept, torch.ones(1).expand(5), "running_var is updated in place, and its elements must not share memory"),
    ):
        for _ in range(3):
            with backend(name), pytest.raises(ValueError, match=message):
                norm_lif(x, None, None, mean, var, training=True)
    assert not kept.any() and not made[0].any()
    with backend(name):
        norm_lif(x, None, None, *made, training=False)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("shape", [(4, 3, 5, 40), (4, 3, 5, 6), (18, 3, 5)])
def test_one_call_for_statistics_and_neuron_equals_two(name, shape):
    """Under a profiler PyTorch sees the operators of both. The third call repeats the first."""
    found = []
    for watched in (True, False, False, False):
        leaves = [draw(shape).float(), 1 + draw((5,), 1).float().abs(), draw((5,), 2).float(), torch.full((5,), 2.5)]
        x, weight, bias, tau = [t.requires_grad_() for t in leaves]
        running = torch.zeros(5), torch.ones(5)
        context = (
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) if watched else contextlib.nullcontext()
        )
        with backend(name):
            with context:
                s, v = norm_lif(x, weight, bias, *running, training=True, tau=tau, return_v=True, momentum=0.3)
            gradients = torch.autograd.grad(s.sum() + v.square().sum(), (x, weight, bias, tau))
        found.append((s, v, *gradients, *running))
        with backend(name), torch.no_grad():
            norm_lif(x, weight, bias, *running, training=True, tau=tau)
        assert [t._version for t in running] == [2, 2]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


@pytest.mark.parametrize("name", BACKENDS)
def test_running_statistics_stay_where_a_value_is_refused(name):
    running, x = (torch.zeros(5), torch.ones(5)), draw((4, 3, 5, 6)).float()
    for tau in (torch.tensor(0.5), torch.full((5,), -1.0)):
        for _ in range(3):
            with backend(name), pytest.raises(ValueError, match="tau"):
                norm_lif(x, None, None, *running, training=True, tau=tau)
    assert not running[0].any() and (running[1] == 1).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_running_statistics_of_16_bit_models(name):
    """A model in bfloat16 has parameters and running statistics in bfloat16."""
    x = draw((4, 3, 5, 2), mean=2.0, dtype=torch.bfloat16)
    mean, var, weight = torch.zeros(5).bfloat16(), torch.ones(5).bfloat16(), torch.ones(5).bfloat16()
    with backend(name):
        s = norm_lif(x, weight, None, mean, var, training=True)
    assert s.dtype == mean.dtype == torch.bfloat16
    torch.testing.assert_close(mean.float(), 0.1 * x.float().mean((0, 1, 3)), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", BACKENDS)
def test_one_value_per_channel_is_refused_in_training_only(name):
    x = torch.randn(1, 1, 3, 1, 1)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        F.batch_norm(x[0], None, None, training=True)
    with backend(name):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training, got input size"):
            norm_lif(x, training=True)
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            norm_lif(x.expand(4, -1, -1, -1, -1), training=True, per_step=True)
        assert norm_lif(x, running_mean=torch.zeros(3), running_var=torch.ones(3), training=False).shape == x.shape


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (4, 0, 3, 4), (4, 2, 3, 0), (4, 2, 0, 4)])
@pytest.mark.parametrize("training", [True, False])
def test_empty_tensors(name, shape, training):
    C = shape[2]
    x, v = torch.empty(shape, requires_grad=True), torch.ones(shape[1:], requires_grad=True)
    mean, var, weight = torch.zeros(C), torch.ones(C), torch.ones(C, requires_grad=True)
    with backend(name):
        s, v_last = norm_lif(x, weight, None, mean, var, v, training=training, return_v=True)
        found = torch.autograd.grad([s, v_last], [x, weight, v], [torch.ones_like(s), torch.ones_like(v_last)])
    assert s.shape == x.shape and found[0].shape == x.shape and torch.equal(found[1], torch.zeros(C))
    assert torch.equal(found[2], torch.ones_like(v)) and torch.equal(v_last, v)
    assert torch.equal(mean, torch.zeros(C)) and torch.equal(var, torch.ones(C))


# --- what a layer keeps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("T", [4, 20])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_the_only_large_tensor_kept_is_x(name, T, layout):
    x = with_layout(draw((T, 4, 6, 5, 5), dtype=torch.float32), layout).requires_grad_()
    weight, bias = torch.ones(6, requires_grad=True), torch.zeros(6, requires_grad=True)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with backend(name), hooks:
        norm_lif(x, weight, bias, torch.zeros(6), torch.ones(6), training=True)
    others = [t for t in kept if t.data_ptr() != x.data_ptr()]
    assert len(others) < len(kept)
    step = x[0].numel()
    assert sum(t.numel() for t in others) <= 4 * 6 + (T > 16) * step


# --- torch ------------------------------------------------------------------------------------------------------------------


def test_under_autocast(dtype=torch.bfloat16):
    """The convolution before it gives 16-bit data; weight, bias and running statistics stay float32."""
    conv, x = torch.nn.Conv2d(3, 8, 3), torch.randn(6, 3, 8, 8)
    weight, bias = torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)
    mean, var = torch.zeros(8), torch.ones(8)
    with torch.autocast("cpu", dtype):
        y = conv(x).unflatten(0, (2, 3))
        s = norm_lif(y, weight, bias, mean, var, training=True)
    assert y.dtype == s.dtype == dtype and mean.dtype == torch.float32
    s.sum().backward()
    assert weight.grad.dtype == torch.float32 and conv.weight.grad is not None


@pytest.mark.parametrize("training", [True, False])
def test_torch_compile_in_one_graph(training):
    def layer(x, weight, bias, mean, var):
        return norm_lif(x * 1.5, weight, bias, mean, var, training=training) * 2

    results = []
    for call in (layer, torch.compile(layer, fullgraph=True)):
        x = draw((4, 2, 3, 5), dtype=torch.float64).requires_grad_()
        weight, bias = torch.ones(3).double().requires_grad_(), torch.zeros(3).double().requires_grad_()
        mean, var = torch.zeros(3).double(), torch.ones(3).double()
        s = call(x, weight, bias, mean, var)
        results.append((s, mean, var, *torch.autograd.grad(s, [x, weight, bias], draw(s.shape, 1))))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("per_step", [False, True])
def test_opcheck(layout, per_step):
    x = with_layout(draw((3, 2, 4, 3), dtype=torch.float32), layout)
    size = (3, 4) if per_step else (4,)
    mean, rstd, weight = draw(size).float(), draw(size, 1).abs().float(), torch.ones(size, requires_grad=True)
    operators = torch.ops.sdit_kernels
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    settings = 2, per_step, 1e-5, 0.1, "cpu"
    torch.library.opcheck(operators.norm_statistics.default, (x, None, None, *settings), test_utils=tests)
    running = torch.zeros(size), torch.ones(size)
    torch.library.opcheck(operators.norm_statistics_.default, (x, *running, *settings), test_utils=tests)
    neuron = 2.0, 1.0, 0.0, True, False, "atan", 2.0, "binary"
    vectors_ = weight, None, None, mean, rstd, None, None, None, 1.0, 2, per_step, True, ""
    arguments = (x.requires_grad_(), None, *vectors_, *neuron, True, True, None, False, "cpu")
    torch.library.opcheck(operators.norm_lif.default, arguments, test_utils=(*tests, "test_aot_dispatch_static"))
    behind = (x.detach(), None, *(t.detach() if isinstance(t, torch.Tensor) else t for t in vectors_[:8]), None, *vectors_[8:])
    arguments = (torch.ones_like(x.detach()), None, None, *behind, *neuron, True, "cpu")
    for operator in (operators.norm_lif_backward.default, operators.norm_lif_sums.default):
        torch.library.opcheck(operator, arguments, test_utils=tests)
    joint = torch.zeros(2, *size)
    torch.library.opcheck(operators.norm_lif_apply.default, (joint, *arguments), test_utils=tests)


def test_vmap_gives_each_member_its_statistics():
    x = draw((5, 3, 2, 4, 3))
    found = torch.func.vmap(lambda x: norm_lif(x, training=True))(x)
    assert torch.equal(found, torch.stack([norm_lif(part, training=True) for part in x]))


def test_a_surrogate_function_runs_the_reference():
    x = draw((4, 2, 3, 5)).requires_grad_()
    own = norm_lif(x, training=True, surrogate=lambda z: 1 / (1 + (math.pi * z) ** 2))
    named = norm_lif(x, training=True)
    assert torch.equal(own, named)
    gradients = [torch.autograd.grad(s, x, draw(s.shape, 1))[0] for s in (own, named)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


# --- groups of processes ----------------------------------------------------------------------------------------------------

GROUP = """
import sys
sys.path[:0] = ["tests"]
import native_triton
import test_norm_lif as tests
import torch
from helpers import SMALL
from sdit_kernels import backend, norm_lif
from sdit_kernels.tuning import tuned
from torch import distributed
rank = int(sys.argv[1])
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
whole = tests.draw((4, 5, 3, 2, 3), mean=3.0)
part = slice(0, 2) if rank else slice(2, 5)
for name in tests.BACKENDS:
    for variant in (dict(), dict(step_factor=True), dict(per_step=True)):
        tensors = {n: t.requires_grad_() for n, t in tests.vectors(4, 3, learnt="channel", **variant).items()}
        size = (4, 3) if variant.get("per_step") else (3,)
        results = []
        for x, group in ((whole, None), (whole[:, part].contiguous(), distributed.group.WORLD)):
            x, running = x.clone().requires_grad_(), (torch.zeros(size).double(), torch.ones(size).double())
            with backend(name), tuned(SMALL), native_triton.alignment_ignored():
                s = norm_lif(
                    x, running_mean=running[0], running_var=running[1], training=True, process_group=group,
                    per_step=variant.get("per_step", False), **tensors,
                )
                g = tests.draw(whole.shape, 1)
                g = g if group is None else g[:, part]
                found = torch.autograd.grad(s, [x, *tensors.values()], g)
            results.append((s, *running, *found))
        (s, mean, var, dx, *want), (s_, mean_, var_, dx_, *got) = results
        assert torch.equal(s[:, part], s_)
        close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        close(mean, mean_), close(var, var_), close(dx[:, part], dx_)
        for total, own in zip(want, got):
            distributed.all_reduce(own)
            close(total, own)
print("equal", rank)
distributed.destroy_process_group()
"""


@pytest.mark.process
def test_two_processes_with_unequal_batches_equal_one(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda rank: python(GROUP, rank, str(tmp_path / "store")), "01"))
    assert [run.stdout for run in runs] == ["equal 0\n", "equal 1\n"], [run.stderr for run in runs]


# --- errors -----------------------------------------------------------------------------------------------------------------

X = torch.randn(4, 2, 3, 5)
MEAN, VAR = torch.zeros(3), torch.ones(3)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(channel_axis=0), ValueError, r"channel_axis must be an axis of x, \(4, 2, 3, 5\), and not its first"),
        (dict(channel_axis=4), ValueError, "channel_axis must be an axis of x"),
        (dict(channel_axis=2.0), TypeError, "channel_axis must be an int, got float"),
        (dict(x=X[:, 0, 0, 0]), ValueError, "x must have a time axis and a channel axis"),
        (dict(x=X.int()), TypeError, "x must be float32"),
        (dict(weight=torch.ones(5)), ValueError, r"weight must have shape \(3,\), one per channel, got \(5,\)"),
        (dict(weight=1.0), TypeError, "weight must be a tensor or None, got float"),
        (dict(x=X.double(), bias=torch.ones(3)), TypeError, r"bias must be a floating tensor at least as wide as x"),
        (dict(bias=torch.ones(3), per_step=True), ValueError, r"bias must have shape \(4, 3\), one per time step and channel"),
        (dict(running_mean=torch.ones(4)), ValueError, r"running_mean must have shape \(3,\)"),
        (dict(running_var=torch.ones(3, requires_grad=True)), ValueError, "running_var is updated in place and must not"),
        (
            dict(training=False, running_mean=MEAN),
            ValueError,
            "running_mean and running_var must be given where training=False",
        ),
        (dict(training=1), TypeError, "training must be a bool, got int"),
        (dict(per_step=1), TypeError, "per_step must be a bool"),
        (dict(momentum=None), TypeError, "momentum must be a number, got NoneType; for a cumulative average give 1 / num"),
        (dict(momentum=1.5), ValueError, "momentum must be between 0 and 1, got 1.5"),
        (dict(eps=-1.0), ValueError, "eps must be finite and at least 0, got -1.0"),
        (dict(eps="1"), TypeError, "eps must be a number, got str"),
        (dict(scale=math.inf), ValueError, "scale must be finite, got inf"),
        (dict(step_factor=torch.ones(3)), ValueError, r"step_factor must have one value per time step, shape \(4,\) or"),
        (dict(step_factor=torch.ones(4).half()), TypeError, "step_factor must be a floating tensor at least as wide"),
        (dict(v=torch.zeros(3)), ValueError, r"v must have shape \(2, 3, 5\), got \(3,\)"),
        (dict(tau=torch.ones(5) * 2), ValueError, r"tau must be a scalar or have shape \(3,\), one per channel"),
        (dict(tau=0.5), ValueError, "tau must be at least 1"),
        (dict(tau=torch.tensor(0.5)), ValueError, "tau must be at least 1"),
        (dict(return_v=1), TypeError, "return_v must be a bool"),
        (dict(levels=(0, 4)), ValueError, "integer levels subtract"),
        (dict(surrogate="step"), ValueError, "surrogate must be one of"),
        (dict(process_group="world"), TypeError, "process_group must be a group of torch.distributed or None, got str"),
    ],
)
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_errors(name, arguments, error, message):
    x, training = arguments.get("x", X), arguments.get("training", True)
    rest = {n: a for n, a in arguments.items() if n not in ("x", "training")}
    with backend(name), pytest.raises(error, match=message):
        norm_lif(x, training=training, **rest)


def test_spikes_for_inference():
    with torch.no_grad():
        s = norm_lif(X, training=True, spike_dtype=torch.uint8)
    assert s.dtype == torch.uint8 and torch.equal(s.float(), norm_lif(X, training=True))
    with pytest.raises(ValueError, match="carries no gradient"):
        norm_lif(X.clone().requires_grad_(), training=True, spike_dtype=torch.uint8)


def test_define_norm_serves_other_neurons():
    """The operators of snnTorch's Leaky behind a BatchNorm."""

    def variant(beta, v_threshold, reset, delay, surrogate, alpha):
        return Variant(mine, (reset, delay), (beta, v_threshold), surrogate, alpha)

    mine = dataclasses.replace(LEAKY, name="leaky_of_this_test")  # leaky itself has these operators after its first use

    schema = "float beta_value, float v_threshold_value, str reset, bool delay, str surrogate, float alpha"
    call = define_norm(mine, ("beta", "v_threshold"), schema, variant, lambda *_: None).call
    x, weight = draw((4, 3, 5, 6)).requires_grad_(), (1 + draw((5,), 1).abs()).requires_grad_()
    mean, _, rstd, _ = batch_statistics(x, 2, False, 1e-5, None, "cpu")
    vectors_ = weight, None, None, mean, rstd, None, None, None
    neuron = 0.9, 1.0, "subtract", True, "atan", 2.0
    s = call(x, None, *vectors_, 1.0, 2, False, True, "", *neuron, False, False, None, False, "cpu")[0]
    y = F.batch_norm(x.flatten(0, 1), None, None, weight, None, training=True).view(x.shape)
    want = leaky(y, beta=0.9)
    assert torch.equal(s, want)
    gradients = [torch.autograd.grad(o, [x, weight], draw(o.shape, 2)) for o in (s, want)]
    for found, wanted in zip(*gradients):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_launchers_have_equal_signatures():
    """Triton has no norm_backward: it runs the kernel of the neuron twice."""
    cpu, triton = (importlib.import_module(f"sdit_kernels.{room}.norm") for room in ("cpu", "triton"))
    for name in ("norm_forward", "norm_gradients"):
        assert inspect.signature(getattr(cpu, name)) == inspect.signature(getattr(triton, name))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axis", [2, -1])
def test_16_bit_spikes_of_float32_data(name, dtype, axis):
    x, weight = draw((4, 3, 6, 6), dtype=torch.float32).requires_grad_(), draw((6,), 1, torch.float32).requires_grad_()
    running = torch.zeros(6), torch.ones(6)
    upstream = draw(x.shape, 2, dtype)
    with backend(name):
        for _ in range(3):
            s = norm_lif(x, weight, None, *running, training=True, channel_axis=axis, spike_dtype=dtype)
            found = torch.autograd.grad(s, [x, weight], upstream)
        want = norm_lif(x, weight, None, *running, training=True, channel_axis=axis)
        wanted = torch.autograd.grad(want, [x, weight], upstream.float())
    assert s.dtype == dtype and torch.equal(s.float(), want)
    for f, w in zip(found, wanted):
        torch.testing.assert_close(f, w, rtol=0, atol=0)


# --- blocks of channels on the CPU ------------------------------------------------------------------------------------------


def run_in_blocks(monkeypatch, block, shape, dtype, affine, states, threads=2):
    """Return the results of training, with so many channels at a time; 0: one kernel after the other on all channels."""
    monkeypatch.setattr(norm_neuron, "block_of", lambda *_: block or None)
    repeat.forget()
    C, before = shape[2], torch.get_num_threads()
    learnt = {"x": draw(shape, 0, dtype, 1.0, 2.0)}
    if affine:
        learnt |= {"weight": 1 + 0.3 * draw((C,), 1, dtype), "bias": draw((C,), 2, dtype)}
    if states:
        learnt |= {"v": 0.3 * draw(shape[1:], 3, dtype)}
    learnt = {name: t.requires_grad_() for name, t in learnt.items()}
    torch.set_num_threads(threads)
    try:
        for _ in range(3):  # plainly, recorded, repeated
            wide = torch.promote_types(dtype, torch.float32)
            running = draw((C,), 4, wide), draw((C,), 5, wide).abs()
            out = norm_lif(
                **learnt, running_mean=running[0], running_var=running[1], training=True, return_v=states, return_v_seq=states
            )
            out = out if states else (out,)
            upstream = [draw(o.shape, 6 + i, o.dtype) for i, o in enumerate(out)]
            found = *out, *running, *torch.autograd.grad(out, learnt.values(), upstream)
    finally:
        torch.set_num_threads(before)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(4, 2, 12, 4, 4), (3, 2, 12, 7, 9), (18, 70, 4, 3), (2, 3, 6, 300)])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("states", [True, False])
def test_blocks_of_channels_change_nothing(shape, dtype, affine, states, monkeypatch):
    """Rows of the kernel of the neuron hold a channel, or all channels of a sample if a channel has at most 32 values."""
    wanted = run_in_blocks(monkeypatch, 0, shape, dtype, affine, states)
    for block, threads in ((1, 2), (2, 1), (shape[2] // 2, 2), (shape[2], 2)):
        found = run_in_blocks(monkeypatch, block, shape, dtype, affine, states, threads)
        for f, w in zip(found, wanted, strict=True):
            # the sums over a channel of more than 256 values are added in another order, in float64
            exact = shape[3:] != (300,) or dtype != torch.float64
            torch.testing.assert_close(f, w, rtol=0 if exact else 1e-12, atol=0 if exact else 1e-12)


def test_blocks_divide_the_channels_and_fit_into_a_cache(monkeypatch):
    def block_of(*shape, dtype=torch.float32, threads=2, forward=True):
        monkeypatch.setattr(norm_neuron, "thread_count", lambda work: threads)
        return norm_neuron.block_of(shape[0], channel_layout(torch.empty(shape, dtype=dtype), 2, False), dtype, forward)

    assert block_of(4, 2, 64, 32, 32) == 8 and block_of(4, 2, 64, 32, 32, forward=False) == 4
    assert block_of(4, 2, 512, 4, 4) == 256 and block_of(4, 2, 512, 4, 4, threads=16) == 32
    assert block_of(4, 2, 7, 9, 9) == 1 and block_of(4, 2, 9, 9, 9) == 3
    assert block_of(4, 2, 64, 32, 32, dtype=torch.bfloat16) == 8  # the arithmetic is float32
    assert block_of(16, 16, 64, 64, 64) is None  # 4 MiB a channel
    assert block_of(4, 2, 61, 4, 4) is None  # runs of 64 bytes


def test_the_op_is_exported():
    assert "norm_lif" in sdit_kernels.__all__


INTERPRETED = """
import torch
from sdit_kernels import backend, norm_lif

x = torch.randn(3, 2, 6, 4)
spikes = norm_lif(x, training=True)
with backend("reference"):
    print(torch.equal(spikes, norm_lif(x, training=True)))
"""


@pytest.mark.process
def test_training_runs_in_the_interpreter():
    done = python(INTERPRETED, TRITON_INTERPRET="1")
    assert done.stdout.split() == ["True"], done.stderr
