"""The Triton operations of printed neurons, and the kernels of neurons that are not in the library."""

import math

import native_triton
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl

from sdit_kernels.neuron import Neuron, Variant
from sdit_kernels.reference.neuron import bind as bind_reference
from sdit_kernels.reference.neuron import surrogate_function
from sdit_kernels.triton import neuron as kernels
from sdit_kernels.triton.neuron import level, maximum, minimum, share, sign
from sdit_kernels.triton.rate import rate_backward, rate_forward
from sdit_kernels.triton.tiles import divide
from sdit_kernels.tuning import current


@triton.jit
def operations_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(out_ptr + at, maximum(x, y))
    tl.store(out_ptr + N + at, minimum(x, y))
    tl.store(out_ptr + 2 * N + at, maximum(0.5, minimum(y, 1.5)))
    tl.store(out_ptr + 3 * N + at, level(x, -2.0, 4.0))
    tl.store(out_ptr + 4 * N + at, sign(x))
    tl.store(out_ptr + 5 * N + at, divide(x, y))
    tl.store(out_ptr + 6 * N + at, divide(x, 3.0))
    tl.store(out_ptr + 7 * N + at, share(x, y, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operations_equal_torch_for_every_pair_of_values(dtype):
    values = torch.tensor([-math.inf, -3.5, -2.5, -1.0, -0.0, 0.0, 0.1, 0.5, 1.0, 1.5, 2.5, 3.5, 4.5, 1e30, math.inf, math.nan])
    x, y = (t.reshape(-1).to(dtype) for t in torch.meshgrid(values, values, indexing="ij"))
    out = torch.empty(8, len(x), dtype=dtype)
    operations_kernel[(1,)](x, y, out, len(x))
    wanted = [
        torch.maximum(x, y), torch.minimum(x, y), y.clamp(max=1.5).clamp(min=0.5), x.clamp(-2, 4).round(),
        torch.where(x.isnan(), x, torch.sign(x)), x / y, x / 3.0, torch.where(x < y, 0.0, torch.where(x == y, x / 2, x)),
    ]  # fmt: skip
    for i, want in enumerate(wanted):
        assert torch.equal(out[i].nan_to_num(7.5), want.nan_to_num(7.5)), i


def exponential(x, s, p, o):
    h = s.v + (x - (s.v - p.rest) + p.sharp * o.exp(o.minimum((s.v - p.cut) / p.sharp, 3.0))) * 0.3
    fired = o.fire(h - p.v_threshold)
    return fired, o.where(fired, p.rest, h)


def adaptive(x, s, p, o):
    w = p.rho * s.w + (1.0 - p.rho) * p.a * s.v
    h = p.alpha * s.v + (1.0 - p.alpha) * (x - w)
    fired = o.fire_above(h - p.theta)
    return fired, (h - fired * p.theta, w + o.detach(fired) * p.b)


def ternary(x, s, p, o):
    h = p.beta * s.v + x
    spike = o.fire(h - p.theta) - o.fire(0.0 - h - p.theta)
    return spike, h - spike * p.theta


def integer(x, s, p, o):
    h = p.beta * s.v + x
    level = o.level(h / p.theta, 0, 4)
    return level, h - o.detach(level) * p.theta


def constants(x, s, p, o):
    h = o.maximum(o.abs(s.v), 0.25) * p.k + x / 2.0 + o.minimum(s.c, x)
    fired = o.fire(h - 1.0)
    return fired, (o.where(fired, 0.1, h), 0.3)


ADAPTIVE = ("alpha", "rho", "theta", "a", "b")  # more than a kernel takes as real numbers
NEURONS = {
    "exponential": (
        Neuron("exponential", exponential, parameters=("v_threshold", "sharp"), numbers=("rest", "cut"), start=("rest",)),
        (1.0, 0.7, -0.1, 0.4),
    ),
    "adaptive": (Neuron("adaptive", adaptive, ("v", "w"), ADAPTIVE, start=(None, None)), (0.9, 0.8, 0.3, 0.5, 0.3)),
    "ternary": (Neuron("ternary", ternary, parameters=("beta", "theta")), (0.7, 0.8)),
    "integer": (Neuron("integer", integer, parameters=("beta", "theta")), (0.7, 0.8)),
    "constants": (Neuron("constants", constants, ("v", "c"), ("k",), start=(None, None)), (0.7,)),
}


def simulate(step, xs, states):
    """Return the spikes and, per state, its sequence."""
    spikes, sequences = [], [[] for _ in states]
    for x in xs:
        s, after = step(x, states)
        states = [v if isinstance(v, torch.Tensor) else torch.full_like(x, v) + 0.0 * x for v in after]
        spikes.append(s)
        for sequence, v in zip(sequences, states):
            sequence.append(v)
    return torch.stack(spikes), [torch.stack(sequence) for sequence in sequences]


def detached(tensors):
    return [None if t is None else t.detach() for t in tensors]


@pytest.mark.parametrize("name", NEURONS)
@pytest.mark.parametrize("T, kind", [(3, None), (3, ()), (18, (20,))], ids=str)
def test_kernels_of_any_neuron_equal_its_step(name, T, kind):
    """kind: the shape of the parameters and the given states; None: numbers, and no states are given."""
    (neuron, values), shape, float64 = NEURONS[name], (3, 20), torch.float64
    S, P = len(neuron.states), len(neuron.parameters)
    variant = Variant(neuron, (), values, "atan", 2.0)
    x = (3 * torch.randn(T, *shape, dtype=float64)).requires_grad_()  # large enough for every neuron to fire
    states = [None if kind is None else torch.randn(shape, dtype=float64, requires_grad=True) for _ in range(S)]
    p = [None if kind is None else torch.full(kind, value, dtype=float64, requires_grad=True) for value in values[:P]]
    given = [value if t is None else t for value, t in zip(values, [*p, *[None] * len(neuron.numbers)])]
    step = bind_reference(neuron, given, surrogate_function("atan", 2.0))
    numbers = dict(zip((*neuron.parameters, *neuron.numbers), values))
    start = [torch.full(shape, numbers.get(n, 0.0), dtype=float64) if v is None else v for n, v in zip(neuron.start, states)]
    want, want_seqs = simulate(step, x, start)
    g, g_seqs = torch.randn_like(want), [torch.randn_like(seq) for seq in want_seqs]
    g_finals = [torch.randn_like(seq[-1]) for seq in want_seqs]
    inputs = [t for t in (x, *states, *p) if t is not None]
    finals = [seq[-1] for seq in want_seqs]
    gradients = torch.autograd.grad((want, *finals, *want_seqs), inputs, (g, *g_finals, *g_seqs), materialize_grads=True)

    s, dx = torch.empty_like(want), torch.empty_like(want)
    finals, d_states = ([torch.empty(shape, dtype=float64) for _ in range(S)] for _ in range(2))
    seqs, keeps = ([torch.empty(n, *shape, dtype=float64) for _ in range(S)] for n in (T, (T - 1) // 16))
    x, states, p = x.detach(), detached(states), detached(p)
    kernels.neuron_forward(variant, x, states, p, s, finals, seqs, [k if len(k) else None for k in keeps], current())
    d_states = [None if v is None else d for v, d in zip(states, d_states)]
    sums = kernels.neuron_backward(variant, g, g_finals, g_seqs, x, states, p, keeps, dx, d_states, kind is not None, current())
    found = [dx, *(d for d in d_states if d is not None), *([q.sum(0) if kind else q.sum() for q in sums] if sums else [])]
    assert torch.equal(s, want.detach()) and s.any()
    for seq, final, want_seq in zip(seqs, finals, want_seqs):
        torch.testing.assert_close(seq, want_seq.detach(), rtol=1e-12, atol=1e-12)
        assert torch.equal(final, seq[-1])
    assert len(found) == len(gradients)
    for d, gradient in zip(found, gradients):
        torch.testing.assert_close(d, gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NEURONS)
@pytest.mark.parametrize("T", [3, 18])
def test_rates_of_any_neuron_equal_its_step(name, T):
    (neuron, values), shape, float64 = NEURONS[name], (3, 20), torch.float64
    P, variant = len(neuron.parameters), Variant(neuron, (), values, "atan", 2.0)
    x = torch.randn(shape, dtype=float64, requires_grad=True)
    p = [torch.full((20,), value, dtype=float64, requires_grad=True) for value in values[:P]]
    step = bind_reference(neuron, [*p, *values[P:]], surrogate_function("atan", 2.0))
    numbers = dict(zip((*neuron.parameters, *neuron.numbers), values))
    spikes, _ = simulate(step, [x] * T, [torch.full(shape, numbers.get(n, 0.0), dtype=float64) for n in neuron.start])
    want, g = spikes.mean(0), torch.randn(shape, dtype=float64)
    gradients = torch.autograd.grad(want, [x, *p], g, materialize_grads=True)
    out, dx, x, p = torch.empty_like(g), torch.empty_like(g), x.detach(), detached(p)
    rate_forward(variant, x, None, None, p, T, out, current())
    sums = rate_backward(variant, g, x, None, p, T, dx, None, True, current())
    torch.testing.assert_close(out, want.detach(), rtol=1e-14, atol=1e-14)
    for d, gradient in zip([dx, *(q.sum(0) for q in sums)], gradients):
        torch.testing.assert_close(d, gradient, rtol=1e-10, atol=1e-10)


def test_cache_keys_tell_an_edited_step_apart():
    def step(x, s, p, o):
        return o.fire(s.v + x - p.th), s.v + x

    def edited(x, s, p, o):
        return o.fire_above(s.v + x - p.th), s.v + x

    if native_triton.setup() == "interpreter":
        pytest.skip("the interpreter caches nothing")
    neurons = [Neuron("same_name", f, parameters=("th",)) for f in (step, edited, step)]
    found = [kernels.bind(kernels.forward_kernel, "same_name_forward_kernel", neuron, ()) for neuron in neurons]
    assert found[0].cache_key == found[2].cache_key != found[1].cache_key
