"""Compare leaky on every backend with the reference, and the reference with a plain loop. Also test leaky's properties."""

import math

import hypothesis.strategies as st
import native_triton
import pytest
import torch
from hypothesis import given, settings
from test_lif import (
    BACKENDS,
    DIMENSION,
    LAYOUTS,
    X,
    assert_gradients,
    exact,
    gradients,
    leaf,
    parameter,
    saved,
    with_layout,
)
from torch import Tensor

from sdit_kernels import SURROGATES, backend, lapicque, leaky, lif, tuning
from sdit_kernels.ops.leaky import RESETS

KERNELS = {"leaky_forward_kernel", "leaky_backward_kernel"}
MODES = [("subtract", True), ("zero", True), ("none", True), ("subtract", False), ("zero", False)]


def run(name, function, *args, **kwargs):
    """Call a function under a backend. Under Triton, assert that its kernels were launched."""
    with backend(name), native_triton.launches() as counts:
        out = function(*args, **kwargs)
    if name == "triton":
        assert KERNELS & set(counts), f"no Triton kernel ran, only {dict(counts)}"
    return out


def compare(name, x, v, neuron, beta_kind, theta_kind, outputs=("s", "v", "v_seq"), seed=0, beta=0.5, v_threshold=1.0):
    results = []
    for which in (name, "reference"):
        x_ = leaf(x) if x.is_contiguous() else x.detach().requires_grad_()
        v_ = None if v is None else leaf(v)
        channels = x.shape[-1] if x.dim() > 1 else 1
        b, theta = parameter(beta_kind, beta, channels, x.dtype), parameter(theta_kind, v_threshold, channels, x.dtype)
        tensors = [t for t in (x_, v_, b, theta) if isinstance(t, Tensor)]

        def both(x=x_, v=v_, b=b, theta=theta, tensors=tensors):
            out = leaky(x, v, beta=b, v_threshold=theta, return_v=True, return_v_seq=True, **neuron)
            used = [o for o, n in zip(out, ("s", "v", "v_seq")) if n in outputs]
            return out, gradients(used, tensors, seed)

        results.append(run(which, both))
    (out, grads), (want, want_grads) = results
    for o, w, what in zip(out, want, ("s", "v", "v_seq")):
        assert torch.equal(o, w) and o.dtype == w.dtype, what
    assert_gradients(grads, want_grads, tensors, x.dtype)


# Each variant compiles its own kernels, so there are few. test_oracle.py tests all modes in float32 and float64 and all
# surrogates.
VARIANTS = [  # mode, dtypes of x and v, kinds of beta and v_threshold
    (MODES[0], torch.float32, None, "number", "number"),
    (MODES[1], torch.bfloat16, torch.float32, "number", "number"),
    (MODES[2], torch.float16, torch.float16, "scalar", "scalar"),
    (MODES[3], torch.float64, torch.float64, "channel", "channel"),
    (MODES[4], torch.float32, torch.float32, "channel", "number"),
]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("mode, dtype, v_dtype, beta_kind, theta_kind", VARIANTS, ids=str)
@settings(max_examples=8)
@given(data=st.data())
def test_leaky_equals_the_reference(name, mode, dtype, v_dtype, beta_kind, theta_kind, data):
    """Spikes and membranes are equal bit for bit, gradients up to rounding."""
    shape = (data.draw(st.sampled_from([1, 4, 17, 40])), *data.draw(st.lists(DIMENSION, min_size=1, max_size=3)))
    while math.prod(shape) >= 1 << 15:  # larger tensors compile a second CPU kernel, which later tests would reuse
        shape = shape[:-1]
    seed = data.draw(st.integers(0, 99))
    x = with_layout(exact(shape, dtype, seed), data.draw(st.sampled_from(LAYOUTS)))
    v = None if v_dtype is None else exact(shape[1:], v_dtype, seed + 1, -32, 48)
    outputs = data.draw(st.sampled_from([("s",), ("v_seq",), ("s", "v"), ("s", "v", "v_seq")]))
    beta = data.draw(st.sampled_from([0.5, 0.0, 1.0 if shape[0] < 17 else 0.5]))
    compare(name, x, v, dict(zip(("reset", "reset_delay"), mode)), beta_kind, theta_kind, outputs, seed, beta)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("reset, delay", MODES)
def test_arbitrary_numbers_give_the_same_bits_as_the_reference(name, reset, delay):
    """All backends use one order of operations without fused multiply-adds, so results are equal even with rounding."""
    torch.manual_seed(0)
    x, v = 1.5 * torch.randn(20, 2000), 2 * torch.randn(2000)  # enough for two threads
    kwargs = dict(beta=0.87, v_threshold=0.9, reset=reset, reset_delay=delay, return_v=True, return_v_seq=True)
    for got, want in zip(run(name, leaky, x, v, **kwargs), run("reference", leaky, x, v, **kwargs)):
        assert torch.equal(got, want)


@pytest.mark.parametrize("reset, delay", MODES)
def test_the_reference_equals_the_equations(reset, delay):
    """Compute the docstring's equations for each neuron and step with Python numbers."""
    x, v = exact((9, 40), torch.float64, 1), exact((40,), torch.float64, 2, -32, 48)
    spikes, history = (t.T.tolist() for t in run("reference", leaky, x, v, beta=0.5, v_threshold=0.75, reset=reset,
                                                 reset_delay=delay, return_v_seq=True))  # fmt: skip
    for n, before in enumerate(v.tolist()):
        for t, current in enumerate(x[:, n].tolist()):
            r = before > 0.75
            h = {"subtract": 0.5 * before + current - r * 0.75, "zero": 0.5 * (1 - r) * before + current}.get(
                reset, 0.5 * before + current
            )
            s = h > 0.75
            after = h if delay else h - (s - r) * (0.75 if reset == "subtract" else h)
            assert (spikes[n][t], history[n][t]) == (s, after)
            before = after


def test_gradients_use_the_surrogate():
    """One neuron fires in the first of two steps: ds/dh = 1 / (1 + |h - 1|)^2, and the reset passes no gradient."""
    for reset, h2, kept in (("subtract", 0.0, 1.0), ("zero", 0.25, 0.0), ("none", 1.0, 1.0)):
        x = torch.tensor([[1.5], [0.25]], dtype=torch.float64, requires_grad=True)
        b, theta = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.5, 1.0))
        with backend("reference"):
            s, v = leaky(x, beta=b, v_threshold=theta, reset=reset, surrogate="fast_sigmoid", alpha=1.0, return_v_seq=True)
        assert v.flatten().tolist() == [1.5, h2] and s.flatten().tolist() == [1.0, 0.0]
        dx, db, dtheta = torch.autograd.grad(s.sum(), (x, b, theta))
        g1, g2 = 1 / 1.5**2, 1 / (1 + abs(h2 - 1)) ** 2
        torch.testing.assert_close(dx.flatten(), torch.tensor([g1 + 0.5 * kept * g2, g2], dtype=torch.float64))
        assert math.isclose(db, 1.5 * kept * g2, abs_tol=1e-15)
        assert math.isclose(dtheta, -g1 - g2 * (2 if reset == "subtract" else 1))


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
def test_a_membrane_fires_only_above_the_threshold(name):
    """h == v_threshold neither fires nor resets. The next larger float does."""
    one = torch.tensor(1.0)
    x = torch.stack([torch.stack([one, torch.nextafter(one, 2 * one), torch.nextafter(one, 0 * one)]), torch.zeros(3)])
    s, v = run(name, leaky, x, beta=1.0, return_v_seq=True)
    assert s.tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert v[1].tolist() == [1.0, v[0, 1].item() - 1.0, v[0, 2].item()]


@pytest.mark.parametrize("name", BACKENDS)
def test_reset_to_zero_without_delay_equals_lif(name):
    """This reset has a gradient, like lif's hard reset. No membrane equals the threshold here."""
    x, v = exact((20, 300), torch.float32, 3).requires_grad_(), exact((300,), torch.float32, 4, -16, 14)
    got = run(name, leaky, x, v, beta=0.5, v_threshold=0.9, reset="zero", reset_delay=False, return_v=True)
    with backend(name):
        want = lif(x, v, tau=2.0, v_threshold=0.9, decay_input=False, return_v=True)
    assert all(torch.equal(g, w) for g, w in zip(got, want))
    (a,), (b,) = gradients(got, [x], 1), gradients(want, [x], 1)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("reset, delay", [("subtract", True), ("zero", False)])
def test_chunks_of_steps_equal_one_call(name, reset, delay):
    """Split T = 100 into chunks and pass the membrane on. Compare outputs and gradients."""
    x = exact((100, 3, 11), torch.float32, 5)

    def chunks(x):
        v, spikes = None, []
        for part in x.split([4, 17, 79]):
            s, v = leaky(part, v, beta=0.5, reset=reset, reset_delay=delay, return_v=True)
            spikes.append(s)
        return torch.cat(spikes), v

    a, b = leaf(x), leaf(x)
    whole, parts = run(name, leaky, a, beta=0.5, reset=reset, reset_delay=delay, return_v=True), run(name, chunks, b)
    assert all(torch.equal(o, p) for o, p in zip(whole, parts))
    with backend(name):
        (ga,), (gb,) = gradients(whole, [a], 1), gradients(parts, [b], 1)
    torch.testing.assert_close(ga, gb)


@pytest.mark.parametrize("name", BACKENDS)
def test_empty_tensors_and_zero_steps_work(name):
    v = torch.randn(3, requires_grad=True)
    with backend(name):
        s, last, seq = leaky(torch.zeros(0, 3), v, beta=0.5, return_v=True, return_v_seq=True)
        assert s.shape == seq.shape == (0, 3) and torch.equal(last, v)
        last.sum().backward()
        assert torch.equal(v.grad, torch.ones(3))
        assert leaky(torch.zeros(4, 0), beta=0.5).shape == (4, 0)
        assert leaky(torch.zeros(0, 2), beta=0.5, return_v=True)[1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", BACKENDS)
def test_not_a_number_and_infinity_equal_the_reference(name):
    """A reset turns an infinite membrane into 0, not NaN. A NaN stays NaN."""
    x = torch.tensor([[math.inf, math.nan, 2.0], [0.5, 0.5, 0.5]])
    for delay in (True, False):
        kwargs = dict(beta=0.5, reset="zero", reset_delay=delay, return_v=True)
        got, want = run(name, leaky, x, **kwargs), run("reference", leaky, x, **kwargs)
        assert all(torch.equal(g.nan_to_num(7.0), w.nan_to_num(7.0)) for g, w in zip(got, want))
        assert got[1].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("name", BACKENDS)
def test_parameter_gradients_repeat_bit_for_bit(name):
    x = torch.randn(4, 70, 130)
    found = []
    for threads in (1, 2, 1):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        tensors = [torch.full((130,), 0.5, requires_grad=True), torch.tensor(1.0, requires_grad=True)]
        with backend(name):
            out = leaky(x, beta=tensors[0], v_threshold=tensors[1], return_v_seq=True)
            found.append(torch.autograd.grad(sum(o.square().sum() for o in out), tensors))
        torch.set_num_threads(before)
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again))


@pytest.mark.parametrize("reset, delay", MODES)
def test_small_tensors_in_every_mode_equal_the_reference(reset, delay):
    """Small enough to run in Triton's interpreter."""
    x, v = exact((18, 5, 7), torch.float32, 18), exact((5, 7), torch.float32, 1, -16, 32)
    compare("triton", x, v, dict(reset=reset, reset_delay=delay), "channel", "channel")


@pytest.mark.parametrize("shape, kind", [((3, 70), None), ((3, 2, 35), ()), ((3, 9, 13), (13,)), ((18, 5, 7), (7,))])
@pytest.mark.parametrize("reset, delay", [("subtract", True), ("zero", False)])
def test_triton_kernels_write_all_their_outputs_and_nothing_else(shape, kind, reset, delay):
    """Call launchers directly, so that a tool that watches memory accesses sees only kernels."""
    from sdit_kernels.neuron import LEAKY, Variant
    from sdit_kernels.triton.neuron import neuron_backward, neuron_forward

    variant, numbers = Variant(LEAKY, (reset, delay), (0.5, 1.0), "atan", 2.0), tuning.current()
    p = (None, None) if kind is None else (torch.full(kind, 0.5), torch.full(kind, 1.0))
    x, g, state = exact(shape, torch.float32, 1), torch.randn(shape), shape[1:]
    keep = torch.full(((shape[0] - 1) // 16, *state), math.nan)
    outputs = [torch.full(size, math.nan) for size in (shape, state, shape, shape, state)]
    with native_triton.guarded(x, g, *outputs) as (x, g, s, v, seq, dx, dv):
        neuron_forward(variant, x, [x[1]], p, s, [v], [seq], [keep if keep.numel() else None], numbers)
        sums = neuron_backward(variant, g, [g[0]], [g], x, [x[1]], p, [keep], dx, [dv], kind is not None, numbers)
        for t in (s, v, seq, dx, dv, keep, *(sums or ())):
            assert not t.isnan().any()
        assert torch.equal(s, run("reference", leaky, x, x[1], beta=0.5, reset=reset, reset_delay=delay))


@pytest.mark.parametrize("name", BACKENDS)
def test_saved_bytes_are_inputs_and_few_membranes(name):
    with backend(name):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(4, 64, 32).to(dtype).requires_grad_()
            v = torch.randn(64, 32, requires_grad=True)
            assert saved(lambda x=x: leaky(x, beta=0.5))[0] == x.nbytes
            assert saved(lambda x=x, v=v: leaky(x, v, beta=0.5, return_v_seq=True))[0] == x.nbytes + v.nbytes
            long = torch.randn(64, 8, 32).to(dtype).requires_grad_()
            assert saved(lambda long=long: leaky(long, beta=0.5))[0] == long.nbytes + 3 * 8 * 32 * 4


@pytest.mark.parametrize(
    "kind, message, call",
    [
        (TypeError, "x must be a tensor", lambda: leaky([1.0], beta=0.5)),
        (TypeError, "x must be float32.*int64", lambda: leaky(torch.zeros(4, 3, dtype=torch.int64), beta=0.5)),
        (ValueError, "x must have a time axis", lambda: leaky(torch.tensor(1.0), beta=0.5)),
        (ValueError, r"v must have shape \(2, 3\), got \(2, 4\)", lambda: leaky(X, torch.zeros(2, 4), beta=0.5)),
        (TypeError, "v must be torch.float32 where x is", lambda: leaky(X, X[0].double(), beta=0.5)),
        (ValueError, "beta must be between 0 and 1, got 1.5", lambda: leaky(X, beta=1.5)),
        (ValueError, "beta must be between 0 and 1, got nan", lambda: leaky(X, beta=math.nan)),
        (ValueError, "beta must be between 0 and 1", lambda: leaky(X, beta=torch.tensor([0.5, -0.5, 0.5]))),
        (ValueError, r"beta must be a scalar or have shape \(3,\)", lambda: leaky(X, beta=torch.ones(2))),
        (TypeError, "beta must be a number or a tensor, got str", lambda: leaky(X, beta="0.5")),
        (TypeError, "missing 1 required keyword-only argument: 'beta'", lambda: leaky(X)),
        (ValueError, "v_threshold must be finite", lambda: leaky(X, beta=0.5, v_threshold=math.inf)),
        (ValueError, "v_threshold must be finite", lambda: leaky(X, beta=0.5, v_threshold=torch.tensor(math.nan))),
        (ValueError, "reset must be one of 'subtract', 'zero', 'none', got 'hard'", lambda: leaky(X, beta=0.5, reset="hard")),
        (TypeError, "reset_delay must be a bool, got int", lambda: leaky(X, beta=0.5, reset_delay=1)),
        (TypeError, "return_v must be a bool", lambda: leaky(X, beta=0.5, return_v=1)),
        (TypeError, "return_v_seq must be a bool", lambda: leaky(X, beta=0.5, return_v_seq=None)),
        (ValueError, "surrogate must be one of atan", lambda: leaky(X, beta=0.5, surrogate="arctan")),
        (ValueError, "alpha must be positive", lambda: leaky(X, beta=0.5, alpha=0.0)),
        (TypeError, "alpha must be a number", lambda: leaky(X, beta=0.5, alpha="2")),
        (ValueError, "alpha belongs to the named surrogates", lambda: leaky(X, beta=0.5, surrogate=torch.sin, alpha=1.0)),
    ],
)
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_wrong_arguments_are_refused(kind, message, call, name):
    with backend(name), pytest.raises(kind, match=message):
        call()


@pytest.mark.filterwarnings("ignore:a surrogate function of your own")
def test_a_users_surrogate_gives_the_gradient():
    x = exact((4, 5), torch.float32, 0).requires_grad_()
    entry = SURROGATES["fast_sigmoid"]
    own = torch.autograd.grad(leaky(x, beta=0.5, surrogate=lambda z: entry.derivative(z, 3.0)).sum(), x)[0]
    torch.testing.assert_close(own, torch.autograd.grad(leaky(x, beta=0.5, surrogate="fast_sigmoid", alpha=3.0).sum(), x)[0])


@pytest.mark.parametrize("name", BACKENDS)
def test_lapicque_of_two_steps_per_time_constant_is_leaky_on_half_the_input(name):
    """R = 1 and C = 2: h = x / 2 + v / 2. test_cuba.py compares lapicque with loops."""
    x = exact((4, 30), torch.float32, 3).requires_grad_()
    with backend(name):
        found = [lapicque(x, C=2.0, return_v=True), leaky(x / 2, beta=0.5, return_v=True)]
        assert all(map(torch.equal, *found))
        assert torch.equal(*(gradients(out, [x], 1)[0] for out in found))


def test_the_modes_contain_every_reset():
    assert {reset for reset, _ in MODES} == set(RESETS)
