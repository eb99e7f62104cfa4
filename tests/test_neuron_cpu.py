"""The CPU kernels of neurons: the operations of generated code, and neurons that differ from lif in states and spikes."""

import math

import numba
import numpy as np
import pytest
import torch

from sdit_kernels.cpu import neuron as kernels
from sdit_kernels.cpu import rate, vector
from sdit_kernels.cpu.intrinsics import F32, F64, load, store
from sdit_kernels.neuron import Neuron, Variant
from sdit_kernels.reference.neuron import bind, surrogate_function
from sdit_kernels.tuning import current

INF, NAN = math.inf, math.nan
VALUES = [NAN, INF, -INF, -0.0, 0.0, 0.5, -0.5, 1.0, 1.5, 2.5, -1.5, -2.5, 3.49, 3.5, 40.0, -40.0]
VALUES += [80.5, 88.6, 89.0, -87.0, -95.0, -120.0]


def apply(function, V, *columns):
    """Call function(*values, V) in compiled code for each row of the columns, and return the results."""
    S, lanes, vectors = V % 8, max(1, V // 8), V >= 8
    dtype = np.float64 if S == F64 else np.float32
    arrays = [np.resize(np.asarray(c, dtype), -(-len(c) // lanes) * lanes) for c in columns]
    out = np.empty_like(arrays[0])
    read, write = (vector.vload, vector.vstore) if vectors else (load, store)
    compiled, n = numba.njit(function), len(out)

    @numba.njit
    def run(a, b, out):
        for i in range(0, n, lanes):
            write(out, i, compiled(read(a, i, V), read(b, i, V)), V)

    run(arrays[0].ctypes.data, arrays[-1].ctypes.data, out.ctypes.data)
    return out[: len(columns[0])]


@pytest.mark.parametrize("V", [F32, F64, vector.vec(F32, 16), vector.vec(F64, 4)])
def test_operations_of_generated_code_have_the_values_of_torch(V):
    dtype = torch.float64 if V % 8 == F64 else torch.float32
    a = torch.tensor(VALUES, dtype=dtype).repeat_interleave(len(VALUES))
    b = torch.tensor(VALUES, dtype=dtype).repeat(len(VALUES))
    vset, level, inside, sign, share, exp = (getattr(vector, n) for n in ("vset", "level", "inside", "sign", "share", "exp"))
    maximum, minimum = vector.maximum, vector.minimum

    def same(function, want):
        np.testing.assert_array_equal(apply(function, V, a.numpy(), b.numpy()), want.numpy())

    same(lambda x, y: maximum(x, y), torch.maximum(a, b))
    same(lambda x, y: minimum(x, y), torch.minimum(a, b))
    same(lambda x, y: -x, -a)
    same(lambda x, y: level(x, vset(-2.0, V), vset(3.0, V), V), a.clamp(-2, 3).round())
    same(lambda x, y: level(x, vset(0.0, V), vset(1e7, V), V), a.clamp(0, 1e7).round())
    same(lambda x, y: inside(x, vset(-0.5, V), vset(1.5, V), y, V), torch.where((a >= -0.5) & (a <= 1.5), b, 0.0))
    same(lambda x, y: sign(x, V), torch.where(a.isnan(), a, a.sign()))
    same(lambda x, y: share(x, y, vset(3.0, V), V), torch.where(a < b, 0.0, torch.where(a == b, 1.5, 3.0)).to(dtype))
    tolerance = 5 * torch.finfo(dtype).eps
    np.testing.assert_allclose(
        apply(lambda x, y: exp(x, V), V, a.numpy(), b.numpy()), a.exp().numpy(), rtol=tolerance, atol=torch.finfo(dtype).tiny
    )


def eif(x, s, p, o):
    """An exponential integrate-and-fire neuron whose threshold and sharpness are learnt."""
    h = s.v + (x - s.v + p.delta * o.exp(o.minimum((s.v - p.theta) / p.delta, 4.0))) / p.tau
    fired = o.fire(h - p.theta)
    return fired, o.where(fired, p.v_reset, h)


def adlif(x, s, p, o, *, detach=False):
    """Two states: the membrane, and a current that spikes and the membrane drive."""
    h = p.alpha * s.v + (1.0 - p.alpha) * (x - s.w)
    fired = o.fire_above(h - p.theta)
    gate = o.detach(fired) if detach else fired
    return fired, (h - gate * p.theta, p.beta * s.w + (1.0 - p.beta) * (0.5 * s.v) + 0.25 * fired)


def integers(x, s, p, o):
    """Integer levels, a number instead of a condition."""
    h = p.beta * s.v + x
    spike = o.level(h / p.theta, 0, 4)
    return spike, h - spike * p.theta


def ternary(x, s, p, o):
    h = 0.5 * s.v + x
    up, down = o.fire(h - p.theta), o.fire(-h - p.theta)
    return up - down, h - (up - down) * p.theta


def bare(x, s, p, o):
    """No parameters and no numbers."""
    h = 0.75 * s.v + o.abs(x)
    fired = o.fire(h - 1.0)
    return fired, o.where(fired, 0.0, h)


EIF = Neuron("eif", eif, parameters=("theta", "delta"), numbers=("tau", "v_reset"), start=("v_reset",))
ADLIF = Neuron("adlif", adlif, ("v", "w"), ("alpha", "beta", "theta"), start=(None, None))
NEURONS = [
    (EIF, (), (0.8, 0.3, 2.0, -0.25)),
    (EIF, (), (0.8, 0.3, 2.0, 0.0)),
    (ADLIF, (False,), (0.8, 0.9, 0.4)),
    (ADLIF, (True,), (0.8, 0.9, 0.4)),
    (Neuron("integers", integers, parameters=("beta", "theta")), (), (0.75, 0.5)),
    (Neuron("ternary", ternary, parameters=("theta",)), (), (0.75,)),
    (Neuron("bare", bare), (), ()),
]


def check(variant, dtype, T, kind, C=37):
    """Compare the launchers with autograd through the definition, in float64."""
    neuron, n = variant.neuron, len(variant.neuron.parameters)
    made = torch.Generator().manual_seed(T)
    x = torch.randn(T, 3, C, generator=made, dtype=torch.float64).to(dtype)
    states = [0.1 * torch.randn(3, C, generator=made, dtype=torch.float64) for _ in neuron.states]
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    states = [v.to(dtype if i else state_dtype) for i, v in enumerate(states)]
    if kind == "number":
        parameters, states = [None] * n, [None] * len(states)
    else:
        parameters = [torch.full((C,) if kind == "channel" else (), v, dtype=state_dtype) for v in variant.values[:n]]
    # the definition
    given = [t.double().requires_grad_() for t in (x, *(v for v in states if v is not None))]
    learnt = [torch.tensor(v, dtype=torch.float64).expand(C).clone().requires_grad_() for v in variant.values[:n]]
    step = bind(
        neuron, (*learnt, *variant.values[n:]), surrogate_function(variant.surrogate, variant.alpha),
        **dict(zip(neuron.flags, variant.flags)),
    )  # fmt: skip
    names = *neuron.parameters, *neuron.numbers
    starts = [0.0 if name is None else variant.values[names.index(name)] for name in neuron.start]
    now = given[1:] or [torch.full((3, C), start, dtype=torch.float64) for start in starts]
    spikes, rows = [], []
    for x_t in given[0]:
        s, now = step(x_t, now)
        spikes.append(s)
        rows.append(now)
    want_s, want_seq = torch.stack(spikes), [torch.stack(v) for v in zip(*rows)]
    upstream = torch.randn(T, 3, C, generator=made, dtype=torch.float64).to(dtype)
    g_seqs = [torch.randn(T, 3, C, generator=made, dtype=torch.float64).to(state_dtype) for _ in want_seq]
    loss = (want_s * upstream.double()).sum() + sum((v * g.double()).sum() for v, g in zip(want_seq, g_seqs))
    loss = loss + sum(v[-1].sum() for v in want_seq)
    wanted = torch.autograd.grad(loss, [*given, *learnt], materialize_grads=True, allow_unused=True)
    # the kernels
    s = torch.full_like(x, NAN)
    seqs, keeps = ([torch.full((k, 3, C), NAN, dtype=state_dtype) for _ in states] for k in (T, (T - 1) // 16))
    finals = [torch.full((3, C), NAN, dtype=state_dtype) for _ in states]
    kept = [k if k.numel() else None for k in keeps]
    kernels.neuron_forward(variant, x, states, parameters, s, finals, seqs, kept, current())
    dx, d_states = torch.full_like(x, NAN), [None if v is None else torch.full_like(v, NAN) for v in states]
    ones = [torch.ones_like(v) for v in finals]
    sums = kernels.neuron_backward(
        variant, upstream, ones, g_seqs, x, states, parameters, keeps, dx, d_states, n > 0 and kind != "number", current()
    )
    tolerance = dict(rtol=1e-9, atol=1e-9) if dtype == torch.float64 else dict(rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(s.double(), want_s, **tolerance)
    for v, want, final in zip(seqs, want_seq, finals):
        torch.testing.assert_close(v.double(), want, **tolerance)
        assert torch.equal(v[-1], final)
    found = [dx, *(d for d in d_states if d is not None)]
    for d, want in zip(found, wanted):
        torch.testing.assert_close(d.double(), want, **tolerance)
    if sums is not None:
        for d, want in zip(sums, wanted[len(given) :]):
            scale = max(1.0, want.abs().sum().item())
            got = d.sum(0) if kind == "channel" else d.sum()
            want = want if kind == "channel" else want.sum()
            torch.testing.assert_close(got.double() / scale, want / scale, **tolerance)


@pytest.mark.parametrize("neuron, flags, values", NEURONS, ids=lambda v: getattr(v, "name", None))
@pytest.mark.parametrize(
    "dtype, T, kind", [(torch.float64, 18, "channel"), (torch.float32, 3, "scalar"), (torch.float64, 5, "number")], ids=str
)
def test_any_neuron_equals_its_definition(neuron, flags, values, dtype, T, kind):
    check(Variant(neuron, flags, values, "sigmoid", 4.0), dtype, T, kind)


@pytest.mark.parametrize("neuron, flags, values", NEURONS, ids=lambda v: getattr(v, "name", None))
def test_the_rate_of_any_neuron_equals_its_definition(neuron, flags, values):
    n, C, T = len(neuron.parameters), 37, 6
    variant = Variant(neuron, flags, values, "atan", 2.0)
    x = torch.randn(3, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    learnt = [torch.full((C,), v, dtype=torch.float64).requires_grad_() for v in values[:n]]
    step = bind(neuron, (*learnt, *values[n:]), surrogate_function("atan", 2.0), **dict(zip(neuron.flags, flags)))
    names = *neuron.parameters, *neuron.numbers
    now = [torch.full_like(x, 0.0 if name is None else values[names.index(name)]) for name in neuron.start]
    given, total = x.clone().requires_grad_(), torch.zeros_like(x)
    for _ in range(T):
        s, now = step(given, now)
        total = total + s
    g = torch.randn(3, C, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wanted = torch.autograd.grad((total / T * g).sum(), [given, *learnt], materialize_grads=True, allow_unused=True)
    out, dx, parameters = torch.full_like(x, NAN), torch.full_like(x, NAN), [p.detach() for p in learnt]
    rate.rate_forward(variant, x, None, None, parameters, T, out, current())
    sums = rate.rate_backward(variant, g, x, None, parameters, T, dx, None, n > 0, current())
    torch.testing.assert_close(out, total.detach() / T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dx, wanted[0], rtol=1e-9, atol=1e-9)
    for d, want in zip(sums if sums is not None else (), wanted[1:]):
        torch.testing.assert_close(d.sum(0), want, rtol=1e-9, atol=1e-9)
