"""compat.handwritten: neurons in the styles of published networks are recognised, other modules are left with the reason."""

import copy
import doctest
import io
import math
import pickle
import random
import re
import time
import types
import warnings

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from sdit_kernels import Levels, backend
from sdit_kernels.compat import handwritten
from sdit_kernels.compat.handwritten import accelerate, restore

# --- surrogates as projects write them --------------------------------------------------------------------------------------


class Triangle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, width):
        ctx.save_for_backward(z)
        ctx.width = width
        return (z > 0).float()

    @staticmethod
    def backward(ctx, g):
        (z,) = ctx.saved_tensors
        return g * (ctx.width - z.abs()).clamp(min=0) / ctx.width**2, None


thresh, lens, decay, time_window = 0.5, 0.5, 0.25, 4


class Window(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mem):
        ctx.save_for_backward(mem)
        return mem.gt(thresh).float()

    @staticmethod
    def backward(ctx, g):
        (mem,) = ctx.saved_tensors
        return g * ((mem - thresh).abs() < lens).float() / (2 * lens)


class ATan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, alpha):
        ctx.save_for_backward(z)
        ctx.alpha = alpha
        return (z >= 0).to(z)

    @staticmethod
    def backward(ctx, g):
        (z,) = ctx.saved_tensors
        return g * ctx.alpha / 2 / (1 + (math.pi / 2 * ctx.alpha * z) ** 2), None


class FastSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return (z > 0).to(z)

    @staticmethod
    def backward(ctx, g):
        return g / (1 + 25 * ctx.saved_tensors[0].abs()) ** 2


def straight_through(spike, smooth):
    """Spikes with the gradient of a smooth function."""
    return (spike.to(smooth) - smooth).detach() + smooth


class SigmoidSpike(nn.Module):
    """A surrogate that is a module."""

    def __init__(self, alpha=4.0):
        super().__init__()
        self.alpha = alpha

    def forward(self, z):
        return straight_through(z >= 0, torch.sigmoid(self.alpha * z))


# --- neurons as projects write them -----------------------------------------------------------------------------------------


class LIFSpike(nn.Module):
    """(B, T, ...), hard reset with gradient."""

    def __init__(self, thresh=1.0, tau=0.5, gama=1.0):
        super().__init__()
        self.act = Triangle.apply
        self.thresh, self.tau, self.gama = thresh, tau, gama

    def forward(self, x):
        mem = 0
        spikes = []
        for t in range(x.shape[1]):
            mem = mem * self.tau + x[:, t, ...]
            spike = self.act(mem - self.thresh, self.gama)
            mem = (1 - spike) * mem
            spikes.append(spike)
        return torch.stack(spikes, dim=1)


class mem_update(nn.Module):
    """(T, B, ...) with T and all constants as globals, the previous spike gates the decay, without gradient."""

    def forward(self, x):
        spike, out, old = torch.zeros_like(x[0]), torch.zeros_like(x), 0
        for i in range(time_window):
            mem = old * decay * (1 - spike.detach()) + x[i] if i else x[i]
            spike = Window.apply(mem)
            old = mem.clone()
            out[i] = spike
        return out


class Expand(nn.Module):
    def __init__(self, T):
        super().__init__()
        self.T = T

    def forward(self, x):
        return x.view(self.T, x.shape[0] // self.T, *x.shape[1:])


class IF(nn.Module):
    """(T * B, ...), a learned threshold that is also the size of a spike, half of it as initial membrane, soft reset."""

    def __init__(self, T=4, thresh=8.0, data=False):
        super().__init__()
        self.thresh = nn.Parameter(torch.tensor([thresh]))
        self.expand = Expand(T)
        self.T, self.data = T, data

    def forward(self, x):
        thre = self.thresh.data if self.data else self.thresh
        x, mem, spikes = self.expand(x), 0.5 * thre, []
        for t in range(self.T):
            mem = mem + x[t]
            spike = Triangle.apply(mem - thre, 1.0) * thre
            mem = mem - spike
            spikes.append(spike)
        return torch.stack(spikes).flatten(0, 1)


class Neuron(nn.Module):
    """(T, ...), with everything as an option."""

    def __init__(self, decay=0.5, th=1.0, **options):
        super().__init__()
        self.decay, self.th, self.rest, self.soft, self.detach, self.strict, self.size = (
            decay,
            th,
            0.0,
            False,
            False,
            False,
            1.0,
        )
        self.alpha, self.factor, self.decay_input = 2.0, 1.0, False
        vars(self).update(options)

    def fire(self, h):
        spike = h > self.th if self.strict else h >= self.th
        return straight_through(spike, self.factor * torch.atan(math.pi / 2 * self.alpha * (h - self.th)) / math.pi)

    def forward(self, x):
        v, spikes = torch.full_like(x[0], self.rest), []
        for x_t in x:
            if self.decay_input:
                h = v + (x_t - (v - self.rest)) * (1 - self.decay)
            else:
                h = self.rest + self.decay * (v - self.rest) + x_t
            s = self.fire(h)
            gate = s.detach() if self.detach else s
            v = h - gate * self.th if self.soft else (1 - gate) * h + gate * self.rest
            spikes.append(s * self.size)
        return torch.stack(spikes)


class DividedByTau(nn.Module):
    def __init__(self, tau=2.0):
        super().__init__()
        self.tau = tau

    def forward(self, x):
        v, spikes = torch.zeros_like(x[0]), []
        for x_t in x:
            v = v + (x_t - v) / self.tau
            spikes.append(ATan.apply(v - 1.0, 2.0))
            v = v * (1 - spikes[-1])
        return torch.stack(spikes)


class LearnedDecay(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        v, spikes = torch.zeros_like(x[0]), []
        for x_t in x:
            v = v + (x_t - v) * self.w.sigmoid()
            spikes.append(ATan.apply(v - 1.0, 2.0))
            v = v * (1 - spikes[-1])
        return torch.stack(spikes)


class LearnedBoth(nn.Module):
    """(T, B, C) only."""

    def __init__(self):
        super().__init__()
        self.beta, self.theta = nn.Parameter(torch.tensor(0.8)), nn.Parameter(torch.tensor(0.6))

    def forward(self, x):
        T, B, C = x.shape
        v, spikes = x.new_zeros(B, C), []
        for t in range(T):
            v = self.beta * v + x[t]
            spikes.append(ATan.apply(v - self.theta, 3.0))
            v = v - spikes[-1].detach() * self.theta
        return torch.stack(spikes)


class LastAxis(nn.Module):
    """(..., T); the surrogate is a module."""

    def __init__(self):
        super().__init__()
        self.spike = SigmoidSpike(4.0)

    def forward(self, x):
        u, out = torch.zeros(x.shape[:-1], device=x.device), torch.zeros(x.shape, device=x.device)
        for t in range(x.shape[-1]):
            u = 0.25 * u * (1 - out[..., t - 1].clone() if t else 1) + x[..., t]
            out[..., t] = self.spike(u - 0.3)
        return out


class ResetInTheNextStep(nn.Module):
    """snnTorch's tutorials."""

    beta, threshold = 0.9, 1.0

    def forward(self, x):
        mem = spike = torch.zeros_like(x[0])
        spikes = []
        for x_t in x:
            mem = self.beta * mem + x_t - spike.detach() * self.threshold
            spike = FastSigmoid.apply(mem - self.threshold)
            spikes.append(spike)
        return torch.stack(spikes)


class BatchFirstLIF(nn.Module):
    """(B * T, ...)."""

    def __init__(self, step=3, tau=4.0):
        super().__init__()
        self.step, self.alpha = step, math.exp(-1 / tau)

    def forward(self, x):
        x = x.reshape(-1, self.step, *x.shape[1:])
        v, spikes = 0.0, []
        for t in range(self.step):
            v = self.alpha * v + x[:, t]
            spikes.append(straight_through(v >= 0.7321, 0.5 * torch.erf(3 * (v - 0.7321))))
            v = v * (1 - spikes[-1].detach())
        return torch.stack(spikes, 1).flatten(0, 1)


class FixedSteps(nn.Module):
    """(B, T, ...) for one T."""

    def __init__(self, T=6):
        super().__init__()
        self.T = T

    def forward(self, x):
        mem, out = 0, torch.zeros_like(x)
        for t in range(self.T):
            mem = 0.5 * mem + x[:, t]
            out[:, t] = ATan.apply(mem - 1, 2.0)
            mem = mem * (1 - out[:, t].detach())
        return out


class Recorder(LIFSpike):
    """Arguments with defaults, and a counter that is off."""

    def __init__(self):
        super().__init__()
        self.recording, self.rates = False, []

    def forward(self, x, stage="train"):
        spikes = super().forward(x)
        if self.recording:
            self.rates.append(spikes.mean().item())
        return spikes if stage == "train" else spikes.detach()


class Quant(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, least, most):
        ctx.save_for_backward(x)
        ctx.ends = least, most
        return torch.round(torch.clamp(x, least, most))

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * ((x >= ctx.ends[0]) & (x <= ctx.ends[1])), None, None


class MultiSpike(nn.Module):
    """Integers without state and without a time axis, over their greatest value."""

    def __init__(self, least=0, most=4, norm=None):
        super().__init__()
        self.least, self.most, self.norm = least, most, most if norm is None else norm

    def forward(self, x):
        return Quant.apply(x, self.least, self.most) / self.norm


class MultiSpike4(nn.Module):
    def forward(self, x):
        return straight_through(x.clamp(0, 4).round(), x.clamp(0, 4))


class integer_mem_update(nn.Module):
    """(T, B, ...), integers with a membrane, reset in the next step without gradient."""

    def __init__(self):
        super().__init__()
        self.quant = MultiSpike4()

    def forward(self, x):
        out, old, spike = torch.zeros_like(x), 0, 0
        for t in range(x.shape[0]):
            mem = (old - spike) * decay + x[t] if t else x[t]
            out[t] = self.quant(mem)
            old, spike = mem, out[t].detach()
        return out


class ILIF(nn.Module):
    """(B, T, ...), another threshold, a wider window, signed integers, and a reset with gradient."""

    def __init__(self, tau=2.0, th=0.5):
        super().__init__()
        self.tau, self.th = tau, th

    def forward(self, x):
        v, spikes = 0, []
        for x_t in x.unbind(1):
            h = (1 - 1 / self.tau) * v + x_t
            z = h / self.th
            c = straight_through(z.clamp(-2, 2).round(), z * ((z >= -3) & (z <= 4)))
            v = h - c * self.th
            spikes.append(c)
        return torch.stack(spikes, 1)


ACCEPTED = {  # (neuron, shape of its data, what must be found)
    "LIFSpike": (LIFSpike, (2, 5, 3), dict(decay=0.5, threshold=1.0, strict=True, reset="hard", detach=False, alpha=1.0,
                                           surrogate="piecewise_quadratic", layout=("axis", 1, None))),
    "LIFSpike, other numbers": (lambda: LIFSpike(0.7, 0.3, 0.4), (2, 5, 3, 2, 2), dict(decay=0.3, threshold=0.7, alpha=2.5)),
    "mem_update": (mem_update, (4, 2, 3), dict(decay=0.25, threshold=0.5, detach=True, surrogate="rect", alpha=1.0,
                                               layout=("axis", 0, 4))),
    "IF": (IF, (8, 3), dict(decay=1.0, threshold="thresh", reset="soft", start=0.5, spike=None, unused=(),
                            layout=("fold", 0, 4))),
    "IF, threshold without gradient": (lambda: IF(data=True), (8, 3), dict(unused=("thresh",))),
    "divided by tau": (lambda: DividedByTau(3.0), (6, 2, 3), dict(decay=2 / 3, threshold=1.0, decay_input=True, strict=False,
                                                                  surrogate="atan", alpha=2.0)),
    "learned decay": (LearnedDecay, (6, 2, 3), dict(decay=("w", "1 - sigmoid(p)"), decay_input=True)),
    "learned decay and threshold": (LearnedBoth, (6, 2, 3), dict(decay=("beta", "p"), threshold="theta", reset="soft",
                                                                 detach=True, alpha=3.0)),
    "last axis": (LastAxis, (2, 3, 6), dict(decay=0.25, threshold=0.3, surrogate="sigmoid", alpha=4.0,
                                            layout=("axis", -1, None))),
    "reset in the next step": (ResetInTheNextStep, (6, 2, 3), dict(reset="delayed", surrogate="fast_sigmoid", alpha=25.0)),
    "batch first": (BatchFirstLIF, (6, 4), dict(decay=math.exp(-0.25), threshold=0.7321, surrogate="erf",
                                             layout=("fold batch", 0, 3))),
    "fixed steps": (FixedSteps, (2, 6, 3), dict(decay=0.5, detach=True, layout=("axis", 1, 6))),
    "fixed steps, two": (lambda: FixedSteps(2), (2, 2, 3), dict(layout=("axis", 1, 2))),
    "IF, two steps": (lambda: IF(2), (4, 3), dict(layout=("fold", 0, 2))),
    "recorder": (Recorder, (2, 5, 3), dict(decay=0.5)),
    "soft reset": (lambda: Neuron(soft=True, strict=True), (6, 2, 3), dict(reset="soft", strict=True, detach=False)),
    "resting potential": (lambda: Neuron(rest=-0.2), (6, 2, 3), dict(reset="hard", v_reset=0.0, threshold=1.2)),
    "no leak, reset to 0.25": (lambda: NoLeak(), (6, 2, 3), dict(decay=1.0, v_reset=0.25)),
    "spikes of size 0.5": (lambda: Neuron(size=0.5), (6, 2, 3), dict(spike=0.5)),
    "scaled surrogate": (lambda: Neuron(factor=0.3, detach=True), (6, 2, 3), dict(surrogate="atan", alpha=2.0, scale=0.3)),
    "MultiSpike": (MultiSpike, (2, 3, 5), dict(decay=None, threshold=1.0, levels=Levels(0, 4, (0.0, 4.0), 0.25),
                                               layout=("none", 0, 1))),
    "MultiSpike, signed": (lambda: MultiSpike(-3, 5, 1), (2, 3), dict(levels=Levels(-3, 5, (-3.0, 5.0), 1.0))),
    "MultiSpike4": (MultiSpike4, (2, 3), dict(levels=Levels(0, 4, (0.0, 4.0), 1.0))),
    "integer mem_update": (integer_mem_update, (6, 2, 3), dict(decay=0.25, threshold=1.0, detach=True,
                                                               levels=Levels(0, 4, (0.0, 4.0), 1.0))),
    "ILIF": (ILIF, (2, 6, 3), dict(decay=0.5, threshold=0.5, detach=False, levels=Levels(-2, 2, (-3.0, 4.0), 1.0),
                                   layout=("axis", 1, None))),
}  # fmt: skip


class NoLeak(Neuron):
    def forward(self, x):
        v, spikes = torch.zeros_like(x[0]), []
        for x_t in x:
            h = v + x_t
            spikes.append(self.fire(h))
            v = torch.where(spikes[-1] > 0, 0.25, h)
            v = v + (spikes[-1] - spikes[-1].detach()) * (0.25 - h.detach())
        return torch.stack(spikes)


def gradients(module, x, g):
    x = x.clone().requires_grad_()
    out = module(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *module.parameters()], g.to(out.dtype), allow_unused=True)]


def inputs(shape, scale=1.0, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return scale * (torch.randn(shape, generator=draw) + 0.3), torch.randn(shape, generator=draw)


def assert_equal_neurons(found, wanted, x, g):
    assert found(x).stride() == wanted(x).stride()
    for a, b in zip(gradients(found, x, g), gradients(wanted, x, g), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ACCEPTED)
def test_published_neurons_are_recognised(name):
    make, shape, wanted = ACCEPTED[name]
    own = make()
    module = copy.deepcopy(own)
    keys = list(module.state_dict())
    report = accelerate(module)
    assert [kind for _, kind in report.replaced] == [type(own).__name__] and not report.left, str(report)
    fit = module._handwritten.neuron
    for key, value in wanted.items():
        found = tuple(fit.layout) if key == "layout" else getattr(fit.form, key)
        if (
            key == "levels"
        ):  # the gradient of torch.clamp at its bounds, the ends of the window, depends on the version of torch
            assert found.window == pytest.approx(value.window, abs=1e-6)
            found = found._replace(window=value.window)
        assert found == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value), key
    assert isinstance(module, type(own)) and list(module.state_dict()) == keys
    assert "fused by sdit_kernels" in repr(module)
    with warnings.catch_warnings(), backend("reference"):
        warnings.simplefilter("error")
        for training in (True, False):
            assert_equal_neurons(module.train(training), own.train(training), *inputs(shape, 3.0))
    assert restore(module).replaced and type(module) is type(own) and vars(module).keys() == vars(own).keys()
    assert torch.equal(module(inputs(shape)[0]), own(inputs(shape)[0]))


@pytest.mark.parametrize("name", ["LIFSpike", "mem_update", "IF", "MultiSpike", "integer mem_update"])
def test_the_kernels_compute_the_neurons(name):
    make, shape, _ = ACCEPTED[name]
    own = make()
    module = copy.deepcopy(own)
    accelerate(module)
    assert_equal_neurons(module, own, *inputs(shape, 3.0))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_a_neuron_that_holds_an_instance_of_its_function_is_recognised():
    """PyTorch cannot copy it."""
    module = MultiSpike()
    module.quant = Quant()
    assert accelerate(module).replaced


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("th", [1.0, 0.3])
def test_a_membrane_at_the_threshold_fires_as_before(strict, soft, th):
    own = Neuron(th=th, strict=strict, soft=soft)
    module = copy.deepcopy(own)
    assert accelerate(module).replaced
    x = torch.tensor([[th, math.nextafter(th, 0), th / 2, 0.0]], dtype=torch.float64)
    for data in (x, x.float()):
        rows = torch.cat([data, data, torch.zeros_like(data)])
        assert torch.equal(module(rows)[0], own(rows)[0])
    assert torch.equal(module(x.float())[0], torch.tensor([0.0 if strict else 1.0] * 2 + [0.0] * 2))


# --- modules that must be left ----------------------------------------------------------------------------------------------


class NoisyLIF(LIFSpike):
    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn_like(x))


class PythonNoiseLIF(LIFSpike):
    def forward(self, x):
        return super().forward(x + 0.1 * random.random())


class DropoutLIF(LIFSpike):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        return super().forward(self.drop(x))


class NormLIF(LIFSpike):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(3)


class TimeVaryingLIF(LIFSpike):
    def __init__(self):
        super().__init__()
        self.th = nn.Parameter(torch.ones(4))


class AdaptiveLIF(nn.Module):
    def forward(self, x):
        v, th, spikes = 0, 1.0, []
        for x_t in x:
            v = 0.5 * v + x_t
            spikes.append(ATan.apply(v - th, 2.0))
            v, th = v * (1 - spikes[-1]), 0.9 * (th - 1) + 1 + 0.2 * spikes[-1]
        return torch.stack(spikes)


class RefractoryLIF(nn.Module):
    def forward(self, x):
        v, last, spikes = 0, 0, []
        for x_t in x:
            v = (0.5 * v + x_t) * (1 - last)
            last = ATan.apply(v - 1, 2.0)
            spikes.append(last)
            v = v * (1 - last)
        return torch.stack(spikes)


class KeepsStateLIF(nn.Module):
    def __init__(self):
        super().__init__()
        self.mem = None

    def forward(self, x):
        v, spikes = 0 if self.mem is None else self.mem, []
        for x_t in x:
            v = 0.5 * v + x_t
            spikes.append(ATan.apply(v - 1, 2.0))
            v = v * (1 - spikes[-1])
        self.mem = v.detach()
        return torch.stack(spikes)


class CountingLIF(LIFSpike):
    rates: list = []

    def forward(self, x):
        out = super().forward(x)
        self.rates.append(out.detach().mean())
        return out


class TernaryLIF(nn.Module):
    def forward(self, x):
        v, spikes = 0, []
        for x_t in x:
            v = 0.5 * v + x_t
            spikes.append(ATan.apply(v - 1, 2.0) - ATan.apply(-1 - v, 2.0))
            v = v * (1 - spikes[-1].abs())
        return torch.stack(spikes)


class FloorSpike(nn.Module):
    def forward(self, x):
        return straight_through((x.clamp(0, 4) + 0.5).floor(), x.clamp(0, 4))


class UnevenSpike(nn.Module):
    def forward(self, x):
        return straight_through(x.clamp(0, 4).round() ** 2, x.clamp(0, 4))


class StraightSpike(nn.Module):
    def forward(self, x):
        return straight_through(x.clamp(0, 4).round(), x)


class SlowSpike(nn.Module):
    def forward(self, x):
        return straight_through(x.clamp(0, 4).round(), x.clamp(0, 4) / 2)


class HardResetILIF(nn.Module):
    def forward(self, x):
        v, spikes = 0, []
        for x_t in x:
            v = 0.5 * v + x_t
            spikes.append(straight_through(v.clamp(0, 4).round(), v.clamp(0, 4)))
            v = v * (spikes[-1] == 0)
        return torch.stack(spikes)


class LearnedILIF(ILIF):
    def __init__(self):
        super().__init__()
        self.th = nn.Parameter(torch.tensor(0.5))


class SmoothSpike(nn.Module):
    def forward(self, x):
        return torch.sigmoid(x)


class NormalisedLIF(LIFSpike):
    def forward(self, x):
        return super().forward(x / (1 + x.abs().mean()))


class BufferLIF(LIFSpike):
    def __init__(self):
        super().__init__()
        self.register_buffer("decay", torch.tensor(0.5))


class TensorLIF(LIFSpike):
    def __init__(self):
        super().__init__()
        self.tau = torch.tensor(0.5)


class HoldsModelLIF(LIFSpike):
    def __init__(self):
        super().__init__()
        self.model = [nn.Linear(3, 3)]  # not a child: a copy of the neuron would copy it


class TanhLIF(Neuron):
    def fire(self, h):
        smooth = torch.tanh(3 * (h.clamp(0, 2) - self.th))
        return straight_through(h >= self.th, smooth)


class OffCentreLIF(Neuron):
    def fire(self, h):
        return straight_through(h >= self.th, torch.sigmoid(4 * h))


class NoGradientLIF(Neuron):
    def fire(self, h):
        return (h >= self.th).to(h)


class EvalDiffersLIF(LIFSpike):
    def forward(self, x):
        return super().forward(x if self.training else 2 * x)


class InPlaceLIF(LIFSpike):
    def forward(self, x):
        return super().forward(x.mul_(0.5) if not x.requires_grad else x * 0.5)


class TwoInputsLIF(nn.Module):
    def forward(self, x, mem):
        return ATan.apply(0.5 * mem + x - 1, 2.0)


class OneStepLIF(nn.Module):
    def forward(self, x):
        return ATan.apply(x - 1, 2.0)


class PerChannelLIF(LIFSpike):
    def forward(self, x):
        return super().forward(x * torch.arange(1, x.shape[2] + 1).to(x).reshape(-1, *[1] * (x.dim() - 3)))


class LateLIF(LIFSpike):
    """It does not fire from the tenth step."""

    def forward(self, x):
        first, *late = x.split(10, 1)
        spikes = super().forward(first)
        return torch.cat([spikes, *(0 * part for part in late)], 1)


class LearnedGainLIF(LIFSpike):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return super().forward(x * self.gain)


class BrokenLIF(nn.Module):
    def forward(self, x):
        raise RuntimeError("needs a camera")


def hooked():
    module = LIFSpike()
    module.register_forward_hook(lambda *_: None)
    return module


LEFT = {
    NoisyLIF: "it draws random numbers",
    PythonNoiseLIF: "it draws random numbers",
    DropoutLIF: "it draws random numbers",
    NormLIF: "it contains modules with parameters or buffers",
    TimeVaryingLIF: r"its parameter th has shape \(4,\)",
    AdaptiveLIF: "something else than a LIF neuron|leaks towards 0",
    RefractoryLIF: "its reset neither|something else than a LIF neuron|does not depend on its input",
    KeepsStateLIF: "it keeps state between calls: mem",
    CountingLIF: "it keeps state between calls: rates",
    TernaryLIF: "its gradient is not one over the threshold",
    FloorSpike: "it does not round halves to the even integer",
    UnevenSpike: "its spikes are not the rounded multiples of a threshold",
    StraightSpike: "its gradient does not end",
    SlowSpike: "its gradient is not one over the threshold",
    HardResetILIF: "something else than a LIF neuron|not the gradient",
    LearnedILIF: "integers are recognised of neurons without parameters",
    SmoothSpike: "not binary",
    NormalisedLIF: "its neurons depend on each other",
    BufferLIF: r"it has buffers \(decay\)",
    TensorLIF: "its attribute tau is a tensor",
    HoldsModelLIF: "its attribute model holds tensors or modules",
    TanhLIF: "none of the formulas in sdit_kernels.SURROGATES",
    OffCentreLIF: "not symmetric about the threshold|does not fall",
    NoGradientLIF: "its spikes have no gradient",
    EvalDiffersLIF: "something else than a LIF neuron|gradient",
    InPlaceLIF: "it changes its input in place",
    TwoInputsLIF: "its forward does not take one tensor",
    OneStepLIF: "no membrane potential from step to step",
    PerChannelLIF: "something else than a LIF neuron|not the gradient of a LIF neuron",
    LearnedGainLIF: "unknown function of its parameter gain|neither its decay nor its threshold",
    BrokenLIF: "does not run on a trial input .RuntimeError: needs a camera",
    hooked: "has hooks",
    (lambda: Neuron(decay=1.5)): "its decay is 1.5, and the kernels take 0 to 1",
    (lambda: Neuron(factor=0.3)): "its surrogate gradient is 0.3 times the atan",
    (lambda: Neuron(th=-1.0)): "it fires without input",
    (lambda: BatchFirstLIF(step=1)): "it runs one time step|does not run|no membrane",
}


@pytest.mark.parametrize("make", LEFT, ids=lambda make: make.__name__)
def test_other_modules_are_left_with_the_reason(make):
    module = make()
    cls, attributes = type(module), dict(vars(module))
    model = nn.Sequential(nn.Linear(3, 3), module)
    state, python = torch.get_rng_state(), random.getstate()
    report = accelerate(model)
    assert not report.replaced and len(report.left) == 1, str(report)
    assert report.left[0].name == "1" and report.left[0].kind == cls.__name__
    assert re.search(LEFT[make], report.left[0].reason), report.left[0].reason
    assert type(module) is cls and vars(module) == attributes
    assert torch.equal(state, torch.get_rng_state()) and python == random.getstate()


class ChangesLaterLIF(LIFSpike):
    def forward(self, x):
        own = super().forward
        return torch.cat([own(part) for part in x.split(30, 1)], 1)


def test_a_neuron_that_changes_after_many_steps_is_not_fused_for_any_number_of_steps():
    module = ChangesLaterLIF()
    accelerate(module)
    with warnings.catch_warnings(), backend("reference"):
        warnings.simplefilter("ignore")
        x = inputs((2, 64, 3))[0]
        assert torch.equal(module(x), ChangesLaterLIF()(x))


def test_neurons_of_libraries_are_not_tried():
    cls = type("LIFNode", (LIFSpike,), {"__module__": "spikingjelly.activation_based.neuron"})
    report = accelerate(nn.Sequential(cls()))
    assert not report.replaced and not report.left


class Smoother(nn.Module):
    """Not a neuron, but with a loop over time steps."""

    def forward(self, x):
        v, out = 0, []
        for x_t in x:
            v = 0.5 * v + x_t
            out.append(v)
        return torch.stack(out)


class Binary(nn.Module):
    """Binary weights or activations: an elementwise function without a loop."""

    calls = 0

    def forward(self, x):
        Binary.calls += 1
        return straight_through(x >= 0, x)


def test_ordinary_modules_are_neither_touched_nor_reported():
    ordinary = [
        nn.ReLU(), nn.GELU(), nn.Linear(3, 3), nn.BatchNorm1d(3), nn.LayerNorm(3), nn.Conv2d(3, 3, 1), nn.MaxPool2d(2),
        nn.LSTM(3, 3), nn.MultiheadAttention(4, 2), nn.TransformerEncoderLayer(8, 2), nn.Identity(), Smoother(), Binary(),
    ]  # fmt: skip
    model = nn.ModuleList(copy.deepcopy(m) for _ in range(20) for m in ordinary)
    classes = [type(m) for m in model.modules()]
    start = time.process_time()
    report = accelerate(model)
    assert time.process_time() - start < 1
    assert not report.replaced and not report.left and [type(m) for m in model.modules()] == classes
    assert Binary.calls == 0
    assert str(report).endswith("no such neuron was found in the model")


def test_a_neuron_that_depends_on_the_number_of_steps_is_fused_for_a_checked_number_only():
    module = LateLIF()
    if accelerate(module).replaced:
        steps = module._handwritten.neuron.layout.steps
        assert steps is not None and steps <= 10
        with pytest.warns(UserWarning, match="was not checked"):
            x = inputs((2, 20, 3))[0]
            assert torch.equal(module(x), LateLIF()(x))


def test_equal_neurons_are_tried_once(monkeypatch):
    calls = []
    original = handwritten.fit_lif
    monkeypatch.setattr(handwritten, "fit_lif", lambda *args: calls.append(args) or original(*args))
    model = nn.Sequential(*(LIFSpike() for _ in range(5)), LIFSpike(0.7), IF(), IF(), IF(thresh=2.0))
    report = accelerate(model)
    assert len(report.replaced) == 9 and len(calls) == 4
    assert model[5]._handwritten.neuron.form.threshold == 0.7


# --- after accelerate -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fast():
    with backend("reference"):
        yield


def accelerated(module):
    assert accelerate(module).replaced
    return module


def test_a_changed_attribute_is_noticed(fast):
    model = nn.Sequential(accelerated(LIFSpike()))
    x, _ = inputs((2, 5, 3))
    model[0].thresh = 0.25
    own = LIFSpike(0.25)
    with pytest.warns(UserWarning, match="LIFSpike runs its own code: its attribute thresh changed from 1.0 since accelerate"):
        assert torch.equal(model(x), own(x))
    report = accelerate(model)
    assert len(report.replaced) == 1 and model[0]._handwritten.neuron.form.threshold == 0.25
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(x), own(x))
    assert str(accelerate(model)) == "hand-written neurons: 0 replaced, 0 left as they were: 1 run fused already"


def test_a_changed_attribute_of_a_surrogate_module_is_noticed(fast):
    module = accelerated(LastAxis())
    module.spike.alpha = 2.0
    with pytest.warns(UserWarning, match="its attribute spike.alpha changed from 4.0"):
        module(inputs((2, 3, 6))[0])


def test_a_changed_global_is_noticed(fast, monkeypatch):
    module, x = accelerated(mem_update()), inputs((4, 2, 3))[0]
    monkeypatch.setitem(globals(), "decay", 0.5)
    with pytest.warns(UserWarning, match="decay in .*test_compat_handwritten changed from 0.25"):
        found = module(x)
    assert torch.equal(found, mem_update()(x))


class Scheduled(torch.autograd.Function):
    width = 1.0

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return (z > 0).to(z)

    @staticmethod
    def backward(ctx, g):
        return g * (Scheduled.width - ctx.saved_tensors[0].abs()).clamp(min=0) / Scheduled.width**2


class Config:
    th = 1.0


CONFIG, OPTIONS = Config(), {"gain": [1.0]}


class ConfiguredLIF(nn.Module):
    def __init__(self):
        super().__init__()
        self.args = types.SimpleNamespace(decay=0.5)
        self.cfg = {"leak": {"decay": 0.5}}

    def charge(self, mem, x):
        return mem * (self.args.decay + self.cfg["leak"]["decay"]) / 2 + x * OPTIONS["gain"][0]

    def forward(self, x):
        mem, spikes = 0, []
        for step in x:
            mem = self.charge(mem, step)
            spike = Scheduled.apply(mem - CONFIG.th)
            mem = mem * (1 - spike)
            spikes.append(spike)
        return torch.stack(spikes)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m, patch: setattr(m.args, "decay", 0.75), "what its attribute args holds changed"),
        (lambda m, patch: m.cfg["leak"].update(decay=0.75), "what its attribute cfg holds changed"),
        (lambda m, patch: patch.setitem(OPTIONS, "gain", [2.0]), "OPTIONS in .* changed"),
        (lambda m, patch: patch.setattr(Config, "th", 0.5), "CONFIG in .* changed"),
        (lambda m, patch: patch.setattr(CONFIG, "th", 0.5, raising=False), "CONFIG in .* changed"),
        (lambda m, patch: patch.setattr(Scheduled, "width", 2.0), "Scheduled in .* changed"),
        (lambda m, patch: setattr(m, "charge", lambda mem, x: 0.75 * mem + x), "a method was replaced on it"),
    ],
)
def test_a_changed_setting_in_a_container_is_noticed(change, message, monkeypatch):
    node = ConfiguredLIF()
    assert accelerate(node).replaced
    x, _ = inputs((4, 2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        node(x)
        pickle.loads(pickle.dumps(node))(x)
    change(node, monkeypatch)
    with pytest.warns(UserWarning, match=message):
        node(x)


def test_data_that_were_not_checked_run_the_neurons_own_code(fast):
    module = accelerated(mem_update())
    with pytest.warns(UserWarning, match=r"was not checked for data of shape \(5, 2\)"):
        module(torch.ones(5, 2))
    module = accelerated(LearnedBoth())
    with pytest.warns(UserWarning, match=r"was not checked"), pytest.raises(ValueError):
        module(torch.ones(5, 2))
    module = accelerated(Recorder())
    with pytest.warns(UserWarning, match="it is called with more than its input"):
        assert not module(torch.ones(2, 3, requires_grad=True), stage="test").requires_grad
    with pytest.warns(UserWarning, match="the kernels do not take its data, torch.int64"):
        module(torch.ones(2, 3, dtype=torch.int64))
    module = accelerated(LearnedBoth())
    module.beta.data.fill_(1.25)
    with pytest.warns(UserWarning, match="its decay is not between 0 and 1"):
        module(torch.ones(4, 2, 3))
    module = accelerated(LastAxis())
    module.spike.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="has hooks"):
        module(torch.ones(4, 2, 3))


def test_learned_values_are_read_in_each_call(fast):
    own = LearnedBoth()
    module = accelerated(copy.deepcopy(own))
    for m in (own, module):
        m.beta.data.fill_(0.3), m.theta.data.fill_(1.5)
    assert_equal_neurons(module, own, *inputs((6, 2, 3), 2.0))


def test_copies_pickles_and_checkpoints(fast):
    own = IF()
    module = accelerated(copy.deepcopy(own))
    x, g = inputs((8, 3), 8.0)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module)
        assert_equal_neurons(twin, own, x, g)
        assert restore(twin).replaced and type(twin) is IF
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    IF().load_state_dict(torch.load(file))


def test_low_precision_and_autocast(fast):
    own = LIFSpike()
    module, (x, _) = accelerated(copy.deepcopy(own)), inputs((2, 5, 3))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        found, wanted = module(x.to(dtype)), own(x.to(dtype))
        assert found.dtype == wanted.dtype and (found != wanted).float().mean() < 0.05
    model = nn.Sequential(nn.Linear(3, 3), module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == nn.Sequential(model[0], own)(x).dtype


@pytest.mark.parametrize("name", ["LIFSpike", "mem_update", "IF"])
def test_torch_compile_with_one_graph(name):
    make, shape, _ = ACCEPTED[name]
    own = make()
    module = accelerated(copy.deepcopy(own))
    compiled = torch.compile(copy.deepcopy(module), backend="aot_eager", fullgraph=True)
    assert_equal_neurons(compiled, own, *inputs(shape, 3.0))


def test_a_compiled_neuron_notices_a_changed_attribute():
    module, (x, _) = accelerated(LIFSpike()), inputs((2, 5, 3))
    compiled = torch.compile(module, backend="eager")
    compiled(x)
    module.tau = 0.25
    with pytest.warns(UserWarning, match="its attribute tau changed"):
        assert torch.equal(compiled(x), LIFSpike(tau=0.25)(x))


def test_empty_and_strided_data(fast):
    own = LIFSpike()
    module = accelerated(copy.deepcopy(own))
    assert module(torch.zeros(0, 4, 3)).shape == (0, 4, 3)
    x = inputs((5, 2, 3))[0].transpose(0, 1)
    assert torch.equal(module(x), own(x))


def test_a_neuron_trains_in_a_model(fast):
    own = nn.Sequential(nn.Linear(3, 8), LIFSpike(), nn.Linear(8, 1))
    model = copy.deepcopy(own)
    assert accelerate(model).replaced == (("1", "LIFSpike"),)
    x, _ = inputs((4, 5, 3))
    for net in (own, model):
        optimiser = torch.optim.SGD(net.parameters(), 0.1)
        for _ in range(3):
            optimiser.zero_grad()
            net(x).square().mean().backward()
            optimiser.step()
    for a, b in zip(own.parameters(), model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_accelerate_works_in_any_mode():
    with torch.no_grad(), torch.autocast("cpu"):
        assert accelerate(LIFSpike()).replaced
    with torch.inference_mode():
        assert accelerate(LIFSpike()).replaced


@pytest.mark.parametrize("function", [accelerate, restore])
def test_only_modules_are_accepted(function):
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
        function(3)


def test_examples_run():
    found = doctest.testmod(handwritten)
    assert found.attempted > 5 and found.failed == 0


# --- any neuron of the family -----------------------------------------------------------------------------------------------


class AnySurrogate(Neuron):
    def fire(self, h):
        spike, z, a = h > self.th if self.strict else h >= self.th, h - self.th, self.alpha
        smooth = {
            "atan": lambda: torch.atan(math.pi / 2 * a * z) / math.pi,
            "sigmoid": lambda: torch.sigmoid(a * z),
            "erf": lambda: torch.erf(a * z) / 2,
            "soft_sign": lambda: a * z / (1 + a * z.abs()) / 2,
            "rect": lambda: (a * z).clamp(-0.5, 0.5),
            "piecewise_exp": lambda: -torch.sign(z) * torch.exp(-a * z.abs()) / 2,
        }[self.surrogate]()
        return straight_through(spike, smooth)


numbers = st.floats(0.05, 0.95)


@given(
    decay=st.one_of(st.sampled_from([0.5, 0.25, 0.9, 1.0]), numbers), th=st.one_of(st.sampled_from([1.0, 0.5, 0.3]), numbers),
    soft=st.booleans(), detach=st.booleans(), strict=st.booleans(), decay_input=st.booleans(),
    surrogate=st.sampled_from(["atan", "sigmoid", "erf", "soft_sign", "rect"]), alpha=st.floats(0.5, 8),
    rest=st.sampled_from([0.0, -0.5]),
)  # fmt: skip
@settings(max_examples=15)
def test_any_neuron_of_the_family_is_found_again(decay, th, soft, detach, strict, decay_input, surrogate, alpha, rest):
    decay_input, rest = decay_input and decay != 1, 0.0 if soft or decay == 1 else rest
    own = AnySurrogate(
        decay, th, soft=soft, detach=detach, strict=strict, decay_input=decay_input, surrogate=surrogate, alpha=alpha, rest=rest
    )
    module = copy.deepcopy(own)
    report = accelerate(module)
    assert report.replaced, str(report)
    form = module._handwritten.neuron.form
    gain = 1.0 if form.decay_input == decay_input else 1 - decay if form.decay_input else 1 / (1 - decay)
    assert form.decay == pytest.approx(decay, rel=1e-11) and form.threshold == pytest.approx((th - rest) * gain, rel=1e-11)
    assert (form.reset, form.detach, form.surrogate) == ("soft" if soft else "hard", detach, surrogate)
    assert form.alpha == pytest.approx(alpha / gain, rel=1e-9)
    x, g = (t.double() for t in inputs((7, 40), 2 * (th - rest), seed=3))
    with backend("reference"):
        for a, b in zip(gradients(module, x, g), gradients(own, x, g)):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
