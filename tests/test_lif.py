"""Compare lif and lif_rate on every backend with the reference, and test their properties."""

import math
import sys
import threading
import warnings
from pathlib import Path

import hypothesis.strategies as st
import native_triton
import numpy as np
import pytest
import torch
from helpers import USERS
from hypothesis import given, settings
from torch import Tensor

import sdit_kernels
from sdit_kernels import SURROGATES, backend, checks, lif, lif_rate
from sdit_kernels.tuning import current, tuned

ROOT = Path(__file__).resolve().parents[1]
BACKENDS = ["cpu", "triton"]
KERNELS = {"lif_forward_kernel", "lif_backward_kernel", "lif_rate_forward_kernel", "lif_rate_backward_kernel"}
HALF = (torch.bfloat16, torch.float16)


def run(name, function, *args, **kwargs):
    """Call a function under a backend. Under Triton, assert that its kernels were launched."""
    with backend(name), native_triton.launches() as counts:
        out = function(*args, **kwargs)
    if name == "triton":
        assert KERNELS & set(counts), f"no Triton kernel ran, only {dict(counts)}"
    return out


def exact(shape, dtype, seed, low=-32, high=64):
    """Multiples of 1/16. If tau is a power of two, every step is exact."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(low, high, shape, generator=generator) / 16).to(dtype)


def leaf(t):
    return t.detach().clone(memory_format=torch.preserve_format).requires_grad_()


def with_layout(x, layout):
    """Return the same values with other strides."""
    if layout == "batch first" and x.dim() > 2:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "time last":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "slice of channels":
        return torch.cat([x, x + 1], -1)[..., : x.shape[-1]]
    if layout == "every other":
        return torch.stack([x, x + 1], -1)[..., 0]
    if layout == "channels last" and x.dim() == 4:
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return x


LAYOUTS = ["contiguous", "batch first", "time last", "slice of channels", "every other", "channels last"]
DIMENSION = st.sampled_from([1, 2, 3, 7, 16, 31, 32, 33, 65])


def neuron(v_reset, decay_input, detach_reset, surrogate):
    return dict(v_reset=v_reset, decay_input=decay_input, detach_reset=detach_reset, surrogate=surrogate)


# Each variant compiles its own kernels, so there are few. Any two settings of an option meet. test_oracle.py has all
# surrogates.
VARIANTS = [  # neuron, kinds of tau and v_threshold, dtype of x, dtype of v or of the residual, steps
    (neuron(0.0, True, False, "atan"), "number", "number", torch.float32, torch.float32, (1, 17)),
    (neuron(None, True, True, "sigmoid"), "number", "scalar", torch.bfloat16, torch.float32, (5, 40)),
    (neuron(-0.5, False, False, "erf"), "channel", "channel", torch.float32, None, (4, 17)),
    (neuron(None, False, False, "rect"), "scalar", "scalar", torch.float16, torch.float16, (16, 40)),
    (neuron(0.0, False, True, "piecewise_exp"), "channel", "number", torch.float64, torch.float64, (2, 17)),
    (neuron(-0.5, True, True, "fast_sigmoid"), "channel", "number", torch.bfloat16, torch.bfloat16, (4, 40)),
    (neuron(None, False, True, "soft_sign"), "number", "number", torch.float32, torch.float32, (16, 17)),
    (neuron(0.0, True, False, "super_spike"), "number", "number", torch.float64, None, (5, 40)),
]


def parameter(kind, value, channels, dtype):
    if kind == "number":
        return value
    dtype = torch.float32 if dtype in HALF else dtype
    return torch.full((channels,) if kind == "channel" else (), value, dtype=dtype, requires_grad=True)


def gradients(outputs, tensors, seed):
    generator = torch.Generator().manual_seed(seed)
    loss = sum((o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype)).sum() for o in outputs)
    return torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)


def assert_close(got, want, dtype, what, scale=0.0):
    """Assert closeness relative to the largest element or to ``scale``, the sum of the absolute values of a sum's terms."""
    assert got.dtype == want.dtype and got.shape == want.shape, what
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    scale = max(scale, want.abs().max().item() if want.numel() else 0.0)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * max(scale, 1e-3), msg=lambda m: f"{what}: {m}")


def assert_gradients(got, want, tensors, dtype):
    """The gradient of x comes first. Smaller gradients are sums over x, whose terms may cancel."""
    total = want[0].abs().sum().item()
    for i, (g, w, t) in enumerate(zip(got, want, tensors)):
        assert_close(g, w, dtype, f"gradient {i}", 0.1 * total / t.numel() if t.dim() < 2 else 0.0)


def compare_lif(name, x, v, neuron, tau_kind, theta_kind, tau, outputs=("s", "v", "v_seq"), seed=0):
    results = []
    channels = x.shape[-1]
    for which in (name, "reference"):
        tensors = [leaf(x) if x.is_contiguous() else x.detach().requires_grad_()]
        v_ = None if v is None else leaf(v)
        tau_, theta_ = parameter(tau_kind, tau, channels, x.dtype), parameter(theta_kind, 1.0, channels, x.dtype)
        tensors += [t for t in (v_, tau_, theta_) if isinstance(t, Tensor)]

        def both(x=tensors[0], v=v_, tau=tau_, theta=theta_, tensors=tensors):
            out = lif(x, v, tau=tau, v_threshold=theta, return_v=True, return_v_seq=True, **neuron)
            used = [o for o, n in zip(out, ("s", "v", "v_seq")) if n in outputs]
            return out, gradients(used, tensors, seed)

        results.append(run(which, both))
    (out, grads), (want, want_grads) = results
    for o, w, what in zip(out, want, ("s", "v", "v_seq")):
        assert torch.equal(o, w) and o.dtype == w.dtype, what
    assert_gradients(grads, want_grads, tensors, x.dtype)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("neuron, tau_kind, theta_kind, dtype, v_dtype, steps", VARIANTS, ids=str)
@settings(max_examples=8)
@given(data=st.data())
def test_lif_equals_the_reference(name, neuron, tau_kind, theta_kind, dtype, v_dtype, steps, data):
    """Spikes and membranes are equal bit for bit where the arithmetic is exact. Gradients are equal up to rounding."""
    T = data.draw(st.sampled_from(steps))
    shape = (T, *data.draw(st.lists(DIMENSION, min_size=1, max_size=3)))
    seed = data.draw(st.integers(0, 99))
    x = with_layout(exact(shape, dtype, seed), data.draw(st.sampled_from(LAYOUTS)))
    v = None if v_dtype is None else exact(shape[1:], v_dtype, seed + 1, -16, 16)
    outputs = data.draw(st.sampled_from([("s",), ("s",), ("v",), ("v_seq",), ("s", "v"), ("s", "v", "v_seq")]))
    tau = data.draw(st.sampled_from([1.0, 2.0, 4.0]))
    if T > 16:
        tau = 2.0  # so many steps must round; with tau = 2 only shifted-out bits are lost, equally on both sides
    compare_lif(name, x, v, neuron, tau_kind, theta_kind, tau, outputs, seed)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("surrogate", sorted(SURROGATES))
def test_surrogates_equal_the_reference(name, surrogate):
    """test_oracle.py tests them in float64."""
    for alpha in (None, 0.7):
        neuron = dict(surrogate=surrogate, alpha=alpha, v_reset=0.0)
        compare_lif(name, exact((4, 37), torch.float32, 3), None, neuron, "number", "number", 2.0)


@pytest.mark.parametrize("name", BACKENDS)
def test_arbitrary_numbers_give_the_same_spikes_as_the_reference(name):
    """All backends use one order of operations without fused multiply-adds, so results are equal even with rounding."""
    torch.manual_seed(0)
    for tau, theta, reset, decay in ((1.7, 0.9, 0.1, True), (3.3, 1.1, None, False), (math.inf, 1.0, 0.0, False)):
        x = torch.randn(20, 500) * 2
        kwargs = dict(tau=tau, v_threshold=theta, v_reset=reset, decay_input=decay, return_v_seq=True)
        for got, want in zip(run(name, lif, x, **kwargs), run("reference", lif, x, **kwargs)):
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_membrane_fires_at_the_threshold(name):
    """h == v_threshold fires. The next smaller float does not."""
    two = torch.tensor(2.0)
    x = torch.stack([two, torch.nextafter(two, two * 0), torch.nextafter(two, two * 2)])[None]
    assert run(name, lif, x).tolist() == [[1.0, 0.0, 1.0]]


@pytest.mark.parametrize("name", BACKENDS)
def test_chunks_of_1000_steps_equal_one_call(name):
    """Pass the state on from chunk to chunk. Compare outputs and gradients."""
    x = exact((1000, 3, 11), torch.float32, 5)

    def whole(x):
        return lif(x, return_v=True)

    def chunks(x):
        v, spikes = None, []
        for part in x.split([1, 15, 16, 17, 100, 851]):
            s, v = lif(part, v, return_v=True)
            spikes.append(s)
        return torch.cat(spikes), v

    a, b = leaf(x), leaf(x)
    out, parts = run(name, whole, a), run(name, chunks, b)
    assert all(torch.equal(o, p) for o, p in zip(out, parts))
    assert torch.equal(out[0], run("reference", whole, x)[0])
    with backend(name):
        (ga,), (gb,) = gradients(out, [a], 1), gradients(parts, [b], 1)
    assert_close(ga, gb, torch.float32, "dx")


@pytest.mark.parametrize("name", BACKENDS)
def test_empty_tensors_and_zero_steps_work(name):
    with backend(name):
        v = torch.randn(3, requires_grad=True)
        s, v_final, v_seq = lif(torch.empty(0, 3), v, return_v=True, return_v_seq=True)
        assert s.shape == v_seq.shape == (0, 3) and torch.equal(v_final, v) and v_final.data_ptr() != v.data_ptr()
        v_final.sum().backward()
        assert torch.equal(v.grad, torch.ones(3))
        assert torch.equal(lif(torch.empty(0, 3), v_reset=-0.5, return_v=True)[1], torch.full((3,), -0.5))
        for shape in ((4, 0), (4, 2, 0), (4, 0, 5)):
            x = torch.empty(shape, requires_grad=True)
            tau = torch.tensor(2.0, requires_grad=True)
            s, v_final = lif(x, tau=tau, return_v=True)
            assert s.shape == shape and v_final.shape == shape[1:]
            s.sum().backward()
            assert x.grad.shape == shape and tau.grad == 0
            assert lif_rate(x).shape == shape
        assert lif(torch.tensor([2.0, 0.5])).tolist() == [1.0, 0.0]  # one neuron without further axes
        assert lif_rate(torch.tensor(2.0)).item() == 1.0


@pytest.mark.parametrize("name", BACKENDS)
def test_not_a_number_and_infinity_equal_the_reference(name):
    x = torch.tensor([[math.nan, math.inf, -math.inf, 3.0]] * 3)
    for kwargs in (dict(v_reset=0.0), dict(v_reset=-0.5), dict(v_reset=None), dict(decay_input=False)):
        for got, want in zip(
            run(name, lif, x, return_v_seq=True, **kwargs), run("reference", lif, x, return_v_seq=True, **kwargs)
        ):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(run(name, lif_rate, x[0], **kwargs), run("reference", lif_rate, x[0], **kwargs))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("surrogate", sorted(SURROGATES))
def test_gradients_of_extreme_inputs_equal_the_reference(name, surrogate):
    """A surrogate that decays exponentially must be 0 far away. A tiny value times 1e38 would be a wrong gradient."""
    x = torch.tensor([1e20, -1e20, 3.4e38, -3.4e38, 1e-40, 100.0, -100.0]).repeat(3, 1)
    for kwargs in (dict(), dict(v_reset=None), dict(alpha=1000.0), dict(alpha=1e-3)):
        for function, data in ((lif, x), (lif_rate, x[0])):
            a, b = leaf(data), leaf(data)
            with backend(name):
                function(a, surrogate=surrogate, **kwargs).sum().backward()
            with backend("reference"):
                function(b, surrogate=surrogate, **kwargs).sum().backward()
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", BACKENDS)
def test_spike_dtypes_hold_the_same_spikes(name):
    for dtype in (torch.float32, torch.bfloat16):
        x = exact((5, 77), dtype, 1)
        s = run(name, lif, x)
        assert s.dtype == dtype
        for spike_dtype in (torch.uint8, torch.bool, dtype):
            other = run(name, lif, x, spike_dtype=spike_dtype)
            assert other.dtype == spike_dtype and torch.equal(other.to(dtype), s)


@pytest.mark.parametrize("name", BACKENDS)
def test_upstream_gradients_may_have_any_strides(name):
    x = exact((4, 6, 40), torch.float32, 2)
    for upstream in (
        torch.ones(()).expand(4, 6, 40),
        torch.randn(6, 40).expand(4, 6, 40),
        torch.randn(4, 40, 6).transpose(1, 2),
        torch.randn(4, 6, 1).expand(4, 6, 40),
        torch.randn(4, 6, 80)[..., ::2],
    ):
        for function, xx, g in ((lif, x, upstream), (lif_rate, x[0], upstream[0])):
            a, b = leaf(xx), leaf(xx)
            with backend(name):
                function(a).backward(g)
            with backend("reference"):
                function(b).backward(g)
            assert_close(a.grad, b.grad, torch.float32, "dx")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("neuron, tau_kind, theta_kind, dtype, wide, steps", VARIANTS, ids=str)
@settings(max_examples=8)
@given(data=st.data())
def test_lif_rate_equals_the_reference(name, neuron, tau_kind, theta_kind, dtype, wide, steps, data):
    T = data.draw(st.sampled_from([1, 2, 3, 4, 8, 17, 50]))
    shape = tuple(data.draw(st.lists(DIMENSION, min_size=1, max_size=3)))
    seed = data.draw(st.integers(0, 99))
    x = with_layout(exact((1, *shape), dtype, seed), data.draw(st.sampled_from(LAYOUTS[:1] + LAYOUTS[3:])))[0]
    residual = gate = None
    if data.draw(st.booleans()):
        residual = exact(shape, wide or dtype, seed + 1)
    if steps[0] % 2 == 0:  # half of the variants
        gate = exact(shape, dtype, seed + 2)
    results = []
    for which in (name, "reference"):
        inputs = [None if t is None else t.detach().clone().requires_grad_() for t in (x, residual, gate)]
        inputs[0] = x.detach().requires_grad_()
        tau, theta = parameter(tau_kind, 2.0, shape[-1], dtype), parameter(theta_kind, 1.0, shape[-1], dtype)
        tensors = [t for t in (*inputs, tau, theta) if isinstance(t, Tensor)]

        def both(inputs=inputs, tau=tau, theta=theta, tensors=tensors):
            out = lif_rate(inputs[0], T, *inputs[1:], tau=tau, v_threshold=theta, **neuron)
            return out, gradients([out], tensors, seed)

        results.append(run(which, both))
    (out, grads), (want, want_grads) = results
    if gate is None:
        assert torch.equal(out, want) and out.dtype == want.dtype
    else:  # the sigmoid rounds, so a spike may differ where the membrane is close to the limit
        assert out.dtype == want.dtype and (out != want).float().mean() < 0.02
        if not torch.equal(out, want):
            return
    assert_gradients(grads, want_grads, tensors, dtype)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("T", [1, 4, 7, 200, 255])
def test_rate_is_the_mean_of_lif(name, T):
    torch.manual_seed(T)
    x = torch.cat([torch.randn(3000) * 3, torch.linspace(0.9, 2.2, 3000), torch.tensor([16 / 15, 4 / 3, 2.0, 1.0])])
    for kwargs in (
        dict(), dict(tau=1.7), dict(tau=3.0, v_threshold=0.4), dict(tau=50.0), dict(v_reset=-0.3), dict(v_reset=None),
        dict(decay_input=False), dict(decay_input=False, tau=math.inf), dict(tau=1.0),
    ):  # fmt: skip
        s = run(name, lif, x.expand(T, -1), **kwargs)
        counts = run(name, lif_rate, x, T, return_counts=True, **kwargs)
        assert counts.dtype == torch.uint8
        assert torch.equal(counts.long(), s.sum(0).long()), kwargs
        assert torch.equal(run(name, lif_rate, x, T, **kwargs), s.sum(0) / T), kwargs


@pytest.mark.parametrize("name", BACKENDS)
def test_rate_staircase_of_sdits_neuron(name):
    """The rate rises at 16/15, 4/3 and 2."""
    x = torch.tensor([1.0666, 1.0667, 1.3333, 1.3334, 1.9999, 2.0])
    assert run(name, lif_rate, x).tolist() == [0.0, 0.25, 0.25, 0.5, 0.5, 1.0]


@pytest.mark.parametrize("name", BACKENDS)
def test_permuting_the_batch_permutes_the_spikes(name):
    x = exact((4, 9, 21), torch.float32, 7)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run(name, lif, x)[:, order], run(name, lif, x[:, order]))


@pytest.mark.parametrize("name", BACKENDS)
def test_parameter_gradients_repeat_bit_for_bit(name):
    x = torch.randn(4, 70, 130)
    found = []
    for threads in (1, 2, 1):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        tensors = [torch.full((130,), 2.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)]
        with backend(name):
            found.append(torch.autograd.grad(lif(x, tau=tensors[0], v_threshold=tensors[1]).square().sum(), tensors))
        torch.set_num_threads(before)
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again))


@pytest.mark.parametrize("name", BACKENDS)
def test_offsets_beyond_31_bits_are_read(name):
    torch.use_deterministic_algorithms(False)  # deterministic mode would fill the memory between the rows
    stride = (1 << 31) + 64
    memory = torch.empty(stride + 64, dtype=torch.bfloat16)
    x = memory.as_strided((2, 40), (stride, 1))
    x.copy_(exact((2, 40), torch.bfloat16, 1))
    assert torch.equal(run(name, lif, x), run("reference", lif, x.contiguous()))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("T, kind", [(3, "number"), (18, "channel"), (33, "scalar")])
def test_small_tensors_with_all_options_equal_the_reference(name, T, kind):
    """Small enough to run in Triton's interpreter."""
    x, v = exact((T, 5, 7), torch.float32, T), exact((5, 7), torch.float32, 1, -16, 16)
    compare_lif(name, x, v, dict(v_reset=-0.5), kind, kind, 2.0)


@pytest.mark.skipif(native_triton.setup() != "native", reason="the interpreter has no compiled tiles")
def test_tiles_of_a_gpu_equal_the_reference():
    """Run one case with the tile sizes that are launched on GPUs."""
    with tuned(USERS):
        for dtype in (torch.float32, torch.bfloat16):
            compare_lif("triton", exact((4, 3, 700), dtype, 4), None, {}, "number", "number", 2.0)


@pytest.mark.parametrize("shape, kind", [((3, 70), None), ((3, 2, 35), ()), ((3, 9, 13), (13,)), ((18, 5, 7), (7,))])
def test_triton_kernels_write_all_their_outputs_and_nothing_else(shape, kind):
    """Call launchers directly, so that a tool that watches memory accesses sees only kernels. test_ttsem.py runs this test."""
    from sdit_kernels.neuron import LIF, Variant
    from sdit_kernels.triton.neuron import neuron_backward, neuron_forward
    from sdit_kernels.triton.rate import rate_backward, rate_forward

    variant = Variant(LIF, (False, True, False), (0.5, 1.0, 0.0), "atan", 2.0)
    p = (None, None) if kind is None else (torch.full(kind, 2.0), torch.full(kind, 1.0))
    x, g, state = exact(shape, torch.float32, 1), torch.randn(shape), shape[1:]
    keep = torch.full(((shape[0] - 1) // 16, *state), math.nan)
    outputs = [torch.full(size, math.nan) for size in (shape, state, shape, shape, state, state, state, state)]
    with native_triton.guarded(x, g, *outputs) as (x, g, s, v, seq, dx, dv, rate, d, d_gate):
        neuron_forward(variant, x, [x[1]], p, s, [v], [seq], [keep if keep.numel() else None], current())
        sums = neuron_backward(variant, g, [g[0]], [g], x, [x[1]], p, [keep], dx, [dv], kind is not None, current())
        rate_forward(variant, x[0], x[1], x[2], p, 4, rate, current())
        rate_sums = rate_backward(variant, g[0], x[0], x[2], p, 4, d, d_gate, kind is not None, current())
        for t in (s, v, seq, dx, dv, rate, d, d_gate, keep, *(sums or ()), *(rate_sums or ())):
            assert not t.isnan().any()
        assert torch.equal(s, run("reference", lif, x, x[1]))


# --- memory saved for the backward pass -------------------------------------------------------------------------------------


def saved(function):
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t.nbytes) and t if t.nbytes else t, lambda t: t
    ):
        out = function()
    return sum(kept.values()), out


@pytest.mark.parametrize("name", BACKENDS)
def test_saved_bytes_are_inputs_and_few_membranes(name):
    with backend(name):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(4, 64, 32).to(dtype).requires_grad_()
            v = torch.randn(64, 32, requires_grad=True)
            assert saved(lambda x=x: lif(x))[0] == x.nbytes
            assert saved(lambda x=x, v=v: lif(x, v, return_v=True))[0] == x.nbytes + v.nbytes
            assert saved(lambda x=x: lif_rate(x[0]))[0] == x[0].nbytes
            assert saved(lambda x=x: lif_rate(x[0], 4, x[1], x[2]))[0] <= x.nbytes
            long = torch.randn(64, 8, 32).to(dtype).requires_grad_()
            assert saved(lambda long=long: lif(long))[0] == long.nbytes + 3 * 8 * 32 * 4


# --- errors -----------------------------------------------------------------------------------------------------------------

X = torch.zeros(4, 2, 3)
BAD = [
    (TypeError, "x must be a tensor", lambda f: f([1.0])),
    (TypeError, "x must be float32.*int64", lambda f: f(torch.zeros(4, 3, dtype=torch.int64))),
    (ValueError, "tau must be at least 1.*0.5", lambda f: f(X, tau=0.5)),
    (ValueError, "tau must be at least 1.*nan", lambda f: f(X, tau=math.nan)),
    (ValueError, "tau must be at least 1", lambda f: f(X, tau=math.inf)),
    (ValueError, "tau must be at least 1", lambda f: f(X, tau=torch.tensor(0.5))),
    (ValueError, "tau must be at least 1", lambda f: f(X, tau=torch.tensor([2.0, math.nan, 2.0]))),
    (ValueError, r"tau must be a scalar or have shape \(3,\)", lambda f: f(X, tau=torch.ones(2))),
    (ValueError, r"tau must be a scalar or have shape \(3,\)", lambda f: f(X, tau=torch.ones(2, 3))),
    (TypeError, "tau must be a number or a tensor", lambda f: f(X, tau="2")),
    (TypeError, "tau must be a floating tensor", lambda f: f(X, tau=torch.tensor(2))),
    (TypeError, "v_threshold must be a floating tensor at least as wide", lambda f: f(X.double(), v_threshold=torch.ones(()))),
    (ValueError, "v_threshold must be finite", lambda f: f(X, v_threshold=math.inf)),
    (ValueError, "v_threshold must be finite", lambda f: f(X, v_threshold=torch.tensor(math.nan))),
    (ValueError, "v_threshold must be on the device of x", lambda f: f(X, v_threshold=torch.ones((), device="meta"))),
    (TypeError, "v_reset must be a number or None", lambda f: f(X, v_reset="hard")),
    (ValueError, "v_reset must be finite", lambda f: f(X, v_reset=math.nan)),
    (TypeError, "decay_input must be a bool", lambda f: f(X, decay_input=1)),
    (TypeError, "detach_reset must be a bool", lambda f: f(X, detach_reset=None)),
    (ValueError, "surrogate must be one of atan", lambda f: f(X, surrogate="arctan")),
    (ValueError, "alpha must be positive", lambda f: f(X, alpha=0.0)),
    (TypeError, "alpha must be a number", lambda f: f(X, alpha="2")),
    (ValueError, "alpha belongs to the named surrogates", lambda f: f(X, surrogate=torch.sin, alpha=1.0)),
]


@pytest.mark.parametrize("function", [lif, lif_rate])
@pytest.mark.parametrize("kind, message, call", BAD, ids=range(len(BAD)))
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_wrong_arguments_are_refused(function, kind, message, call, name):
    with backend(name), pytest.raises(kind, match=message):
        call(function)


@pytest.mark.parametrize(
    "kind, message, call",
    [
        (ValueError, r"v must have shape \(2, 3\), got \(2, 4\)", lambda: lif(X, torch.zeros(2, 4))),
        (TypeError, "v must be torch.float32 where x is torch.float32, got torch.float64", lambda: lif(X, X[0].double())),
        (TypeError, "v must be torch.bfloat16 or torch.float32", lambda: lif(X.bfloat16(), X[0].half())),
        (TypeError, "v must be a tensor or None", lambda: lif(X, 0.0)),
        (ValueError, "x must have a time axis", lambda: lif(torch.tensor(1.0))),
        (ValueError, "spike_dtype must be None", lambda: lif(X, spike_dtype=torch.int32)),
        (ValueError, "carries no gradient", lambda: lif(X.clone().requires_grad_(), spike_dtype=torch.uint8)),
        (ValueError, "T must be at least 1", lambda: lif_rate(X, 0)),
        (TypeError, "T must be an int", lambda: lif_rate(X, 4.0)),
        (ValueError, "residual must have shape", lambda: lif_rate(X, residual=X[0])),
        (TypeError, "residual must be", lambda: lif_rate(X, residual=X.bfloat16())),
        (ValueError, "gate must have the shape of x", lambda: lif_rate(X, gate=X[0])),
        (TypeError, "gate must have the dtype of x", lambda: lif_rate(X, gate=X.double())),
        (ValueError, "T <= 255", lambda: lif_rate(X, 256, return_counts=True)),
        (ValueError, "leave residual out", lambda: lif_rate(X, residual=X, return_counts=True)),
        (ValueError, "carries no gradient", lambda: lif_rate(X.clone().requires_grad_(), return_counts=True)),
        (TypeError, "return_v must be a bool, got int", lambda: lif(X, return_v=1)),
        (TypeError, "return_v_seq must be a bool, got str", lambda: lif(X, return_v_seq="yes")),
        (TypeError, "return_counts must be a bool", lambda: lif_rate(X, return_counts=1)),
        (TypeError, "gate must be a tensor or None, got float", lambda: lif_rate(X, gate=0.5)),
        (TypeError, r"v must be a dense \(strided\) tensor, got torch.sparse_coo", lambda: lif(X, X[0].to_sparse())),
    ],
)
def test_wrong_arguments_of_one_op_are_refused(kind, message, call):
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("function", [lif, lif_rate])
def test_sparse_and_nested_tensors_are_refused(function):
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)])
    for x, kind in ((X.to_sparse(), "torch.sparse_coo"), (X.to_mkldnn(), "torch._mkldnn"), (nested, "a nested tensor")):
        with pytest.raises(TypeError, match=rf"x must be a dense \(strided\) tensor, got {kind}"):
            function(x)


def test_numpy_numbers_are_accepted():
    want = lif_rate(X, 3, tau=1.5, v_threshold=0.5, v_reset=-0.5, alpha=3.0)
    f = np.float32
    assert torch.equal(want, lif_rate(X, np.int64(3), tau=f(1.5), v_threshold=f(0.5), v_reset=f(-0.5), alpha=f(3)))
    assert torch.equal(lif(X, tau=2.0), lif(X, tau=np.int32(2)))


def test_a_users_surrogate_runs_the_reference_with_one_warning(monkeypatch):
    monkeypatch.setattr(checks, "_warned_of_custom_surrogate", False)
    x = exact((4, 5), torch.float32, 0).requires_grad_()
    with pytest.warns(UserWarning, match="plain PyTorch path"):
        own = torch.autograd.grad(lif(x, surrogate=lambda z: 1 / (1 + (math.pi * z) ** 2)).sum(), x)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lif_rate(x, surrogate=lambda z: z)
    torch.testing.assert_close(own, torch.autograd.grad(lif(x).sum(), x)[0])


# --- PyTorch's machinery ----------------------------------------------------------------------------------------------------


def random(*shape, grad=True):
    return torch.randn(shape, requires_grad=grad)


def network(x):
    s, v = lif(x * 2, return_v=True)
    return s.sum() + v.sum() + lif_rate(x[0] * 3, residual=x[1], gate=x[2]).sum()


@pytest.mark.parametrize("options", [dict(), dict(dynamic=True), dict(backend="aot_eager")], ids=str)
def test_compiled_equals_eager(options):
    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True, **options)
    for shape in ((4, 6, 5), (4, 7, 5)):
        a, b = random(*shape), None
        b = leaf(a)
        compiled(a).backward()
        network(b).backward()
        torch.testing.assert_close(a.grad, b.grad)


def test_a_compiled_op_follows_a_change_of_the_backend():
    x = exact((4, 9), torch.float32, 1)
    compiled = torch.compile(lambda x: lif(x), fullgraph=True, backend="aot_eager")
    want = lif(x)
    for name in ("cpu", "reference", "cpu"):
        with backend(name):
            assert torch.equal(compiled(x), want)


def test_export_takes_any_number_of_steps():
    """The number of saved membranes depends on T, so the graph must not contain it as a constant. tau learns."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tau = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return lif(x, tau=self.tau, return_v=True)

    net, x = Net(), exact((90, 6, 5), torch.float32, 1)
    sizes = {0: torch.export.Dim("T", min=2), 1: torch.export.Dim("batch")}
    exported = torch.export.export(net, (x[:20],), dynamic_shapes={"x": sizes}).module()
    for T in (3, 16, 17, 33, 90):
        part, found = x[:T, :4], []
        for module in (exported, net):
            out = module(part)
            found.append((*out, *torch.autograd.grad((out[0] * part).sum(), module.parameters())))
        assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("name", BACKENDS)
def test_vmap_and_grad_equal_a_loop(name):
    from torch.func import grad, vmap

    x, v = exact((7, 4, 6, 5), torch.float32, 1), exact((7, 6, 5), torch.float32, 2)
    tau = torch.linspace(1, 4, 7)

    def each(f, *args):
        return torch.stack([f(*a) for a in zip(*args)])

    def loss(x, tau):
        return (lif(x, tau=tau) * x).sum()

    with backend(name), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # Triton warns of deprecations on Python 3.13
        assert torch.equal(vmap(lif)(x, v), each(lif, x, v))
        assert torch.equal(vmap(lif, in_dims=(None, 0))(x[0], v), each(lambda v: lif(x[0], v), v))
        assert torch.equal(vmap(lif, in_dims=2, out_dims=2)(x), each(lif, x.unbind(2)).movedim(0, 2))
        assert torch.equal(vmap(lambda x, t: lif(x, tau=t))(x, tau), each(lambda x, t: lif(x, tau=t), x, tau))
        assert torch.equal(vmap(lambda x, r: lif_rate(x, residual=r))(x, x), each(lambda x: lif_rate(x, residual=x), x))
        torch.testing.assert_close(vmap(grad(loss), in_dims=(0, None))(x, 2.0), each(lambda x: grad(loss)(x, 2.0), x))
        per_sample = vmap(grad(loss, 1), in_dims=(0, None))(x, torch.tensor(2.0))
        torch.testing.assert_close(per_sample, each(lambda x: grad(loss, 1)(x, torch.tensor(2.0)), x))
        long = exact((3, 20, 5), torch.float32, 4)
        want = leaf(long[0])
        lif(want).sum().backward()
        torch.testing.assert_close(vmap(grad(lambda x: lif(x).sum()))(long)[0], want.grad)


@pytest.mark.parametrize("dtype", HALF)
def test_autocast_runs_fused(dtype):
    x = random(4, 6, 8)
    linear = torch.nn.Linear(8, 8)
    with torch.autocast("cpu", dtype=dtype), torch.profiler.profile() as profile:
        current = linear(x)
        s, v = lif(current, return_v=True)
        rate = lif_rate(current, residual=x)
    assert (s.dtype, v.dtype, rate.dtype) == (dtype, torch.float32, torch.float32)
    (s.sum() + rate.sum()).backward()
    assert x.grad.dtype == torch.float32 and linear.weight.grad.abs().sum() > 0
    assert {"sdit_kernels::lif", "sdit_kernels::lif_rate"} <= {event.name for event in profile.events()}


def test_fake_and_meta_tensors_get_shapes():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        x = mode.from_tensor(torch.randn(4, 3, 5, requires_grad=True))
        s, v = lif(x, return_v=True)
        assert s.shape == (4, 3, 5) and v.shape == (3, 5)
    assert lif(torch.empty(4, 3, device="meta")).shape == (4, 3)


# --- threads ----------------------------------------------------------------------------------------------------------------


def test_two_threads_may_call_at_once():
    x = exact((4, 40, 3000), torch.float32, 1)
    want, found = lif(x), []

    def work():
        for _ in range(20):
            found.append(torch.equal(lif(x), want))

    threads = [threading.Thread(target=work) for _ in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(found) == 40 and all(found)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("tasks", [0, 1, 6, 7, 100])
def test_every_task_runs_on_exactly_one_thread(tasks, parts):
    from sdit_kernels.cpu.kernel import share

    assert [i for part in range(parts) for i in share.py_func(tasks, (part, parts))] == list(range(tasks))


def test_docstring_examples_run():
    import doctest

    for module in ("sdit_kernels.ops.lif", "sdit_kernels.dispatch"):
        result = doctest.testmod(sys.modules[module])
        assert result.attempted and not result.failed


assert sdit_kernels.__version__
