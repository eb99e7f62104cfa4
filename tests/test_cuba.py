"""cuba, adlif and lapicque on every backend against numpy loops, their saved bytes, chunks, and errors."""

import math

import hypothesis.strategies as st
import native_triton
import numpy as np
import pytest
import torch
from helpers import SMALL
from hypothesis import given, settings
from oracle import loops
from test_lif import DIMENSION, LAYOUTS, X, exact, saved, with_layout

import sdit_kernels
from sdit_kernels import adlif, backend, cuba, lapicque
from sdit_kernels.tuning import tuned

BACKENDS = ["reference", "cpu", "triton"]
STATES = {"cuba": ("i", "v"), "adlif": ("v", "w"), "lapicque": ("v",)}
# Values with which no step rounds for several steps, because all are sums of few powers of two.
VALUES = {
    "cuba": dict(beta_i=0.5, beta=0.75, v_threshold=1.0),
    "adlif": dict(beta=0.5, beta_w=0.75, a=0.5, b=1.5, v_threshold=0.5),
    "lapicque": dict(R=2.0, C=2.0, time_step=0.5, v_threshold=0.5),
}
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def array(t):
    return t.detach().double().numpy() if isinstance(t, torch.Tensor) else t


def call(name, x, states, **settings):
    """Call an op. Return (spikes, *last states, *sequences of the states)."""
    if name == "lapicque":
        return lapicque(x, *states, **settings, return_v=True, return_v_seq=True)
    op = {"cuba": cuba, "adlif": adlif}[name]
    s, last, seq = op(x, None if states[0] is None else tuple(states), **settings, return_state=True, return_state_seq=True)
    return s, *last, *seq


def compare(where, name, x, states, values, flags=(), exact_arithmetic=True, upstream=None, seed=0):
    """Compare outputs and all gradients with the loop. values: numbers or tensors by parameter."""
    state_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    given = {n: v for n, v in zip(STATES[name], states) if v is not None}
    with np.errstate(all="ignore"):
        arrays = {n: array(v) for n, v in (given | values).items()}
        want, backward = getattr(loops, name)(array(x), **arrays, **dict(flags))
    x = x.detach().requires_grad_()
    given = {n: v.detach().clone().requires_grad_() for n, v in given.items()}
    values = {n: v.detach().clone().requires_grad_() if isinstance(v, torch.Tensor) else v for n, v in values.items()}
    tensors = dict(x=x) | given | {n: v for n, v in values.items() if isinstance(v, torch.Tensor)}
    with backend(where), tuned(SMALL), native_triton.launches() as counts:
        outputs = call(name, x, [given.get(n) for n in STATES[name]], **values, **dict(flags))
        if upstream is None:
            made = torch.Generator().manual_seed(seed)
            upstream = [torch.randn(o.shape, generator=made).to(o.dtype) for o in outputs]
        used = [(o, g.to(o.dtype)) for o, g in zip(outputs, upstream) if g is not None]
        found = torch.autograd.grad([o for o, _ in used], list(tensors.values()), [g for _, g in used])
    assert bool(counts) == (where == "triton" and x.numel() > 0), counts
    for j, (o, w) in enumerate(zip(outputs, want, strict=True)):
        assert o.dtype == (state_dtype if j else x.dtype)
        if exact_arithmetic or j == 0:
            np.testing.assert_array_equal(array(o), w)
            number = ~np.isnan(w)
            np.testing.assert_array_equal(np.signbit(array(o))[number], np.signbit(w)[number])
        else:
            np.testing.assert_allclose(array(o), w, rtol=TOLERANCE[state_dtype], atol=TOLERANCE[state_dtype] * 10)
    with np.errstate(all="ignore"):
        wanted = backward(*(None if g is None else array(g) for g in upstream))
    terms = np.abs(wanted["x"][np.isfinite(wanted["x"])]).sum()
    largest = max(np.abs(wanted[n][np.isfinite(wanted[n])]).max(initial=1.0) for n in ("x", *given))
    for (n, t), g in zip(tensors.items(), found):
        tolerance, scale = TOLERANCE[g.dtype], 4 * max(terms, 1.0) if n in values else largest
        assert g.shape == t.shape and g.dtype == t.dtype, n
        np.testing.assert_allclose(array(g), wanted[n], rtol=tolerance, atol=tolerance * scale, err_msg=f"gradient of {n}")


def as_kind(values, kind, C, dtype):
    """Give all values of a neuron as numbers, scalar tensors, or one value per channel."""
    if kind == "number":
        return dict(values)
    return {n: torch.full((C,) if kind == "channel" else (), v, dtype=dtype) for n, v in values.items()}


# Every variant compiles its own kernels, so there are few: op, flags, kind of the parameters, dtypes of x and of the states.
VARIANTS = [
    ("cuba", dict(reset="subtract"), "channel", torch.float64, torch.float64),
    ("cuba", dict(reset="zero"), "number", torch.float32, None),
    ("cuba", dict(reset="subtract", reset_delay=False), "number", torch.float32, torch.float32),
    ("cuba", dict(reset="zero", reset_delay=False), "number", torch.bfloat16, torch.bfloat16),
    ("adlif", dict(), "scalar", torch.float32, torch.float32),
    ("lapicque", dict(reset="subtract"), "scalar", torch.float32, torch.float32),
    ("lapicque", dict(reset="zero"), "number", torch.float32, None),
]
IDS = [f"{name}-{'-'.join(map(str, flags.values()))}-{kind}-{dtype}" for name, flags, kind, dtype, _ in VARIANTS]


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("name, flags, kind, dtype, state_dtype", VARIANTS, ids=IDS)
@settings(max_examples=6)
@given(data=st.data())
def test_outputs_and_gradients_equal_the_loop(where, name, flags, kind, dtype, state_dtype, data):
    T = data.draw(st.sampled_from([4, 20]))
    shape = (T, *data.draw(st.lists(DIMENSION, min_size=1, max_size=2)))
    while math.prod(shape) >= 1 << 15:  # larger tensors compile a second CPU kernel
        shape = shape[:-1]
    if len(shape) == 1 and kind == "channel":
        shape = (*shape, 5)
    seed = data.draw(st.integers(0, 99))
    x = with_layout(exact(shape, dtype, seed), data.draw(st.sampled_from(LAYOUTS)))
    states = [None if state_dtype is None else exact(shape[1:], state_dtype, seed + j, -16, 24) for j in (1, 2)]
    values = as_kind(VALUES[name], kind, shape[-1], torch.float64 if dtype == torch.float64 else torch.float32)
    # every step uses up to three more bits
    compare(where, name, x, states[: len(STATES[name])], values, flags, T < 5, seed=seed)


# three steps that combine NaN, infinities, zeros of both signs and ordinary numbers in every order
ODD = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0, 2.5], dtype=torch.float64)
ODD_STEPS = torch.stack([ODD.repeat(36), ODD.repeat_interleave(6).repeat(6), ODD.repeat_interleave(36)])


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("name, flags", [v[:2] for v in VARIANTS if v[2] == "number" and v[3] == torch.float32], ids=str)
def test_nan_infinities_and_negative_zeros_equal_the_loop(where, name, flags):
    check_odd_numbers(where, name, flags)


@pytest.mark.parametrize("where", BACKENDS)
def test_nan_infinities_and_negative_zeros_equal_the_loop_of_adlif(where):
    check_odd_numbers(where, "adlif", {})


def check_odd_numbers(where, name, flags):
    with np.errstate(all="ignore"):
        want, _ = getattr(loops, name)(array(ODD_STEPS), **VALUES[name], **flags)
    x = ODD_STEPS.float()
    with backend(where):
        outputs = call(name, x, [None] * len(STATES[name]), **VALUES[name], **flags)
    for o, w in zip(outputs, want, strict=True):
        np.testing.assert_array_equal(array(o), w)
        number = ~np.isnan(w)
        np.testing.assert_array_equal(np.signbit(array(o))[number], np.signbit(w)[number])
    # gradients are not defined for neurons that a NaN reaches
    good = ~np.isnan(np.stack([w for w in want if w.ndim == 2])).any((0, 1))
    one = torch.ones(3, int(good.sum()))
    n = len(STATES[name])
    for upstream in ([one, *[None] * 2 * n], [one, *[one[0]] * n, *[None] * n]):
        compare(where, name, x[:, torch.from_numpy(good)], [None] * n, VALUES[name], flags, upstream=upstream)


@pytest.mark.parametrize("where", BACKENDS[1:])
@pytest.mark.parametrize("name", STATES)
def test_arbitrary_numbers_give_the_same_bits_as_the_reference(where, name):
    x = 1.5 * torch.randn(20, 2000, generator=torch.Generator().manual_seed(0))
    values = {n: 0.9 * v + 0.03 for n, v in VALUES[name].items()}
    flags, found = {} if name == "adlif" else {"reset": "zero"}, []
    for which in (where, "reference"):
        with backend(which):
            found.append(call(name, x, [None] * len(STATES[name]), **values, **flags))
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("where", BACKENDS)
def test_chunks_of_steps_equal_one_call(where):
    x = exact((24, 3, 5), torch.float32, 5)

    def run(x, parts):
        state, spikes = None, []
        for part in x.split(parts):
            s, state = cuba(part, state, **VALUES["cuba"], reset="zero", return_state=True)
            spikes.append(s)
        return torch.cat(spikes), *state

    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    with backend(where):
        whole, parts = run(a, [24]), run(b, [4, 20])
        assert all(torch.equal(o, p) for o, p in zip(whole, parts))
        ga, gb = (torch.autograd.grad(sum(o.square().sum() for o in out), t)[0] for out, t in ((whole, a), (parts, b)))
    torch.testing.assert_close(ga, gb)


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("name", ["cuba", "adlif"])
def test_empty_tensors_and_zero_steps_work(where, name):
    state = torch.randn(3, requires_grad=True), torch.randn(3)
    with backend(where):
        s, *rest = call(name, torch.zeros(0, 3), state, **VALUES[name])
        assert s.shape == rest[2].shape == rest[3].shape == (0, 3)
        assert torch.equal(rest[0], state[0]) and torch.equal(rest[1], state[1])
        rest[0].sum().backward()
        assert torch.equal(state[0].grad, torch.ones(3))
        assert call(name, torch.zeros(4, 0), (None, None), **VALUES[name])[0].shape == (4, 0)
        op = getattr(sdit_kernels, name)
        assert op(torch.zeros(2), (None, torch.tensor(0.0)), **VALUES[name]).shape == (2,)


@pytest.mark.parametrize("where", BACKENDS[1:])
def test_saved_bytes_are_inputs_and_few_states(where):
    with backend(where):
        x, v = torch.randn(4, 64, 32, requires_grad=True), torch.randn(64, 32, requires_grad=True)
        long = torch.randn(64, 8, 32, requires_grad=True)
        for name, states in STATES.items():
            op, values, n = getattr(sdit_kernels, name), VALUES[name], len(states)
            assert saved(lambda op=op, values=values: op(x, **values))[0] == x.nbytes
            assert saved(lambda op=op, values=values: op(long, **values))[0] == long.nbytes + 3 * n * 8 * 32 * 4
        assert saved(lambda: cuba(x, (None, v), **VALUES["cuba"], return_state_seq=True))[0] == x.nbytes + v.nbytes


@pytest.mark.parametrize("where", BACKENDS[1:])
def test_parameter_gradients_repeat_bit_for_bit(where):
    x, found = torch.randn(4, 70, 130), []
    for threads in (1, 2, 1):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        betas = [torch.full((130,), 0.5, requires_grad=True), torch.tensor(0.75, requires_grad=True)]
        with backend(where):
            s, state = cuba(x, beta_i=betas[0], beta=betas[1], return_state=True)
            found.append(torch.autograd.grad(s.sum() + sum(v.square().sum() for v in state), betas))
        torch.set_num_threads(before)
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again))


DECAYS = dict(beta_i=0.5, beta=0.5)
ADAPTIVE = dict(beta=0.5, beta_w=0.5, a=0.5, b=0.5)


@pytest.mark.parametrize(
    "kind, message, call",
    [
        (TypeError, "x must be a tensor", lambda: cuba([1.0], **DECAYS)),
        (TypeError, r"state must be None or a tuple \(i, v\) of tensors or None, got Tensor", lambda: cuba(X, X[0], **DECAYS)),
        (TypeError, r"a tuple \(v, w\) of tensors or None, got 1 items", lambda: adlif(X, (X[0],), **ADAPTIVE)),
        (ValueError, r"state's v must have shape \(2, 3\)", lambda: cuba(X, (None, torch.zeros(2, 4)), **DECAYS)),
        (TypeError, "state's i must be torch.float32 where x is", lambda: cuba(X, (X[0].double(), None), **DECAYS)),
        (ValueError, "beta_i must be between 0 and 1, got 1.5", lambda: cuba(X, beta_i=1.5, beta=0.5)),
        (ValueError, "beta must be between 0 and 1, got nan", lambda: cuba(X, beta_i=0.5, beta=math.nan)),
        (ValueError, "beta must be between 0 and 1", lambda: cuba(X, beta_i=0.5, beta=torch.tensor([0.5, -1.0, 0.5]))),
        (TypeError, "missing 1 required keyword-only argument: 'beta_i'", lambda: cuba(X, beta=0.5)),
        (ValueError, "reset must be one of 'subtract', 'zero', 'none'", lambda: cuba(X, **DECAYS, reset="hard")),
        (TypeError, "reset_delay must be a bool", lambda: cuba(X, **DECAYS, reset_delay=1)),
        (TypeError, "return_state must be a bool", lambda: cuba(X, **DECAYS, return_state=1)),
        (TypeError, "return_state_seq must be a bool", lambda: adlif(X, **ADAPTIVE, return_state_seq=None)),
        (ValueError, "a must be finite, got inf", lambda: adlif(X, **ADAPTIVE | dict(a=math.inf))),
        (ValueError, "b must be finite", lambda: adlif(X, **ADAPTIVE | dict(b=torch.tensor(math.nan)))),
        (ValueError, "beta_w must be between 0 and 1", lambda: adlif(X, **ADAPTIVE | dict(beta_w=-0.5))),
        (ValueError, r"v_threshold must be a scalar or have shape \(3,\)", lambda: cuba(X, **DECAYS, v_threshold=X)),
        (ValueError, "surrogate must be one of atan", lambda: cuba(X, **DECAYS, surrogate="arctan")),
        (ValueError, "alpha must be positive", lambda: adlif(X, **ADAPTIVE, alpha=0.0)),
        (ValueError, "spike_dtype must be None", lambda: cuba(X, **DECAYS, spike_dtype=torch.int8)),
        (ValueError, "C must be positive and finite, got 0", lambda: lapicque(X, C=0.0)),
        (ValueError, "R must be positive and finite, got -1", lambda: lapicque(X, R=torch.tensor(-1.0), C=1.0)),
        (ValueError, "time_step must be positive and finite, got inf", lambda: lapicque(X, C=1.0, time_step=math.inf)),
        (ValueError, "reset must be one of", lambda: lapicque(X, C=1.0, reset=None)),
        (TypeError, "return_v must be a bool", lambda: lapicque(X, C=1.0, return_v=1)),
        (ValueError, r"v must have shape \(2, 3\)", lambda: lapicque(X, torch.zeros(3), C=1.0)),
    ],
)
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_wrong_arguments_are_refused(kind, message, call, name):
    with backend(name), pytest.raises(kind, match=message):
        call()


def test_spikes_of_inference_may_be_bytes():
    s = cuba(X + 1, **DECAYS, spike_dtype=torch.uint8)
    assert s.dtype == torch.uint8 and torch.equal(s.float(), cuba(X + 1, **DECAYS)) and s.any()
