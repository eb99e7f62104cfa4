"""Thresholds and time constants per token: lif on every backend against the oracle's loops, and the errors."""

import math

import native_triton  # noqa: F401  (before triton)
import numpy as np
import pytest
import torch
from oracle import loops

from sdit_kernels import backend, lif
from sdit_kernels.nn import LIF

BACKENDS = ["reference", "cpu", "triton"]
NEURONS = [dict(), dict(v_reset=None, detach_reset=True), dict(decay_input=False, v_reset=-0.25)]


def parameter(shape, seed, low):
    generator = torch.Generator().manual_seed(seed)
    return (low + torch.rand(shape, generator=generator, dtype=torch.float64)).requires_grad_()


def run(name, x, v, g, leaves, **neuron):
    leaves = [t.detach().clone().requires_grad_() for t in (x, v, *leaves.values())], list(leaves)
    (x, v, *values), names = leaves
    with backend(name):
        s, v_last, v_every = lif(x, v, return_v=True, return_v_seq=True, **dict(zip(names, values)), **neuron)
        return (s, v_last, v_every), torch.autograd.grad((s, v_last, v_every), (x, v, *values), g)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("neuron", NEURONS, ids=str)
@pytest.mark.parametrize("T", [3, 20])
@pytest.mark.parametrize("tau, theta", [("number", "(L, 1)"), ("(C,)", "(T, B, L, 1)"), ("(B, L, 1)", "(1, B, 1, 1)")])
def test_values_per_token_equal_the_oracle(name, neuron, T, tau, theta):
    B, L, C = 2, 5, 37
    shapes = {"number": (), "(C,)": (C,), "(L, 1)": (L, 1), "(B, L, 1)": (B, L, 1), "(T, B, L, 1)": (T, B, L, 1)}
    shapes["(1, B, 1, 1)"] = 1, B, 1, 1
    generator = torch.Generator().manual_seed(T)
    x, v, *g = (torch.randn(s, generator=generator, dtype=torch.float64) for s in [(T, B, L, C), (B, L, C), (T, B, L, C)])
    g += [torch.randn(s, generator=generator, dtype=torch.float64) for s in [(B, L, C), (T, B, L, C)]]
    leaves = dict(tau=parameter(shapes[tau], 1, 1.5), v_threshold=parameter(shapes[theta], 2, 0.4))
    outputs, gradients = run(name, x, v, g, leaves, **neuron)
    known = {k: p.detach().numpy() for k, p in leaves.items()}
    wanted, backward = loops.lif(x.numpy(), v.numpy(), **known, **neuron)
    for found, want in zip(outputs, wanted):
        np.testing.assert_allclose(found.detach().numpy(), want, rtol=1e-12, atol=1e-12)
    for found, want in zip(gradients, map(backward(*(d.numpy() for d in g)).get, ("x", "v", *leaves))):
        np.testing.assert_allclose(found.numpy(), want, rtol=1e-9, atol=1e-9)


def normed(x, kind):
    return x.square().mean(-1, keepdim=True).add(1e-6).sqrt() if kind == "rms" else x.abs().mean(-1, keepdim=True) + 1e-6


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", ["rms", "mean"])
@pytest.mark.parametrize("C", [6, 1500])
def test_a_norm_makes_the_thresholds(name, kind, C):
    """C = 1500 is more than one program or task holds."""
    generator = torch.Generator().manual_seed(C)
    x = torch.randn(3, 2, 4, C, generator=generator, dtype=torch.float64).requires_grad_()
    factor = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    g = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    with backend(name):
        s = lif(x, v_threshold=factor, threshold=kind, surrogate="fast_sigmoid")
        found = torch.autograd.grad(s, (x, factor), g)
        (alone,) = torch.autograd.grad(
            lif(x, v_threshold=factor, threshold=kind, detach_threshold=True, surrogate="fast_sigmoid"), x, g
        )
    with backend("reference"):
        want = lif(x, v_threshold=factor * normed(x, kind), surrogate="fast_sigmoid")
        wanted = torch.autograd.grad(want, (x, factor), g)
        (detached,) = torch.autograd.grad(
            lif(x, v_threshold=factor.detach() * normed(x, kind).detach(), surrogate="fast_sigmoid"), x, g
        )
    assert torch.equal(s, want) and 0 < s.mean() < 1
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(alone, detached, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_other_dtypes_strides_and_levels_equal_the_reference(name):
    generator = torch.Generator().manual_seed(0)
    theta = (1 + torch.randint(0, 8, (5, 1), generator=generator) / 8).requires_grad_()
    for dtype in (torch.float32, torch.bfloat16):
        x = (torch.randint(-32, 64, (4, 3, 37, 5), generator=generator) / 16).to(dtype).transpose(2, 3).requires_grad_()
        outputs = []
        for where in (name, "reference"):
            with backend(where):
                s, v = lif(x, v_threshold=theta, v_reset=None, levels=(0, 4), return_v=True)
                outputs.append((s, v, *torch.autograd.grad((s, v), (x, theta), (torch.ones_like(s), torch.ones_like(v)))))
        for found, want in zip(*outputs):
            torch.testing.assert_close(found, want, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)
        assert torch.equal(outputs[0][0], outputs[1][0])


def test_transforms_and_the_compiler_take_values_per_token():
    x, theta = torch.randn(6, 3, 2, 4, 5), torch.rand(4, 1) + 0.5
    one = [lif(member, v_threshold=theta) for member in x]
    assert torch.equal(torch.func.vmap(lambda x: lif(x, v_threshold=theta))(x), torch.stack(one))
    thetas = torch.rand(6, 4, 1) + 0.5
    one = [lif(member, v_threshold=t) for member, t in zip(x, thetas)]
    assert torch.equal(torch.func.vmap(lambda x, t: lif(x, v_threshold=t))(x, thetas), torch.stack(one))
    compiled = torch.compile(lambda x, t: lif(x, v_threshold=t, threshold="rms"), fullgraph=True, backend="aot_eager")
    x, theta = x[0].requires_grad_(), theta.requires_grad_()
    for f in (compiled, lambda x, t: lif(x, v_threshold=t, threshold="rms")):
        found = torch.autograd.grad(f(x, theta).sum(), (x, theta))
        torch.testing.assert_close(found, torch.autograd.grad(lif(x, v_threshold=theta, threshold="rms").sum(), (x, theta)))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(v_threshold=torch.ones(3, 1)), r"broadcast to \(2, 4, 1\) or \(3, 2, 4, 1\).*got \(3, 1\)"),
        (dict(tau=torch.full((4, 5), 2.0)), r"tau must be a scalar or have shape \(5,\)"),
        (dict(v_threshold=torch.full((4, 1), math.nan)), "v_threshold must be finite"),
        (dict(detach_threshold=True), "detach_threshold=True needs threshold"),
        (dict(threshold="max"), "threshold must be None, 'rms' or 'mean', got 'max'"),
        (dict(threshold="rms", v_threshold=torch.ones(5)), r"a factor where threshold='rms'.*got \(5,\)"),
        (dict(v_threshold=torch.zeros(4, 1), v_reset=None, levels=(0, 4)), "v_threshold must be positive"),
    ],
    ids=str,
)
def test_errors_name_the_shapes(settings, message):
    with pytest.raises(ValueError, match=message):
        lif(torch.zeros(3, 2, 4, 5), **settings)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_norm_that_is_not_finite_makes_a_finite_threshold(name):
    x = torch.tensor([math.nan, math.inf, 1e30, 0.0])[None, :, None].expand(1, 4, 3)
    with backend(name):
        assert lif(x, tau=1.0, v_threshold=0.5, threshold="rms")[0, :, 0].tolist() == [0, 1, 1, 0]
        assert lif(x[..., :0], threshold="mean").shape == (1, 4, 0)


def test_a_module_learns_thresholds_of_tokens():
    neuron = LIF(v_threshold=torch.nn.Parameter(torch.ones(4, 1)), threshold="mean")
    neuron(torch.rand(3, 2, 4, 5)).sum().backward()
    assert "threshold='mean', detach_threshold=False" in repr(neuron)
    assert neuron.v_threshold.grad.shape == (4, 1) and neuron.v_threshold.grad.abs().sum() > 0
