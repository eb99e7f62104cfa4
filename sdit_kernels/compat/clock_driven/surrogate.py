r"""Surrogate gradients under the names of ``spikingjelly.clock_driven.surrogate``.

The forward pass of a surrogate is the Heaviside step s = 1 if x >= 0 else 0, and the backward pass multiplies by a derivative.
With ``spiking=False``, a module returns the primitive, the function with this derivative.

Source: the formulas in the documentation of SpikingJelly 0.0.0.0.12.
"""

import inspect
import math

import torch
from torch import nn

from . import base


def heaviside(x):
    """Return 1 where x >= 0, else 0, in the dtype of x."""
    return (x >= 0).to(x)


def _spike_function(name, derivative):
    """Return an autograd Function (x, *settings) with the Heaviside step forward and ``derivative(x, *settings)`` backward."""

    def forward_with_one(x, setting):
        return heaviside(x)

    def forward_with_two(x, first, second):
        return heaviside(x)

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.settings = inputs[1:]

    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return (grad * derivative(x, *ctx.settings), *(None for _ in ctx.settings))

    # torch.compile counts the parameters of forward, so it has no *settings
    forward = forward_with_two if len(inspect.signature(derivative).parameters) == 3 else forward_with_one
    body = {"forward": forward, "setup_context": setup_context, "backward": backward}
    body = {key: staticmethod(function) for key, function in body.items()}
    return type(name, (torch.autograd.Function,), body | {"__module__": __name__, "generate_vmap_rule": True})


def _sigmoid_derivative(x, alpha):
    s = torch.sigmoid(alpha * x)
    return alpha * s * (1 - s)


def _square_wave_derivative(x, n, T_period):
    w = 2 * math.pi / T_period
    return 4 / T_period * sum((torch.cos((2 * i - 1) * w * x) for i in range(1, n)), torch.zeros_like(x))


piecewise_quadratic = _spike_function("piecewise_quadratic", lambda x, alpha: (alpha - alpha**2 * x.abs()).clamp(min=0))
piecewise_exp = _spike_function("piecewise_exp", lambda x, alpha: alpha / 2 * torch.exp(-alpha * x.abs()))
sigmoid = _spike_function("sigmoid", _sigmoid_derivative)
soft_sign = _spike_function("soft_sign", lambda x, alpha: 1 / (2 * alpha * (1 / alpha + x.abs()) ** 2))
atan = _spike_function("atan", lambda x, alpha: alpha / 2 / (1 + (math.pi / 2 * alpha * x) ** 2))
nonzero_sign_log_abs = _spike_function("nonzero_sign_log_abs", lambda x, alpha: 1 / (1 / alpha + x.abs()))
erf = _spike_function("erf", lambda x, alpha: alpha / math.sqrt(math.pi) * torch.exp(-((alpha * x) ** 2)))
piecewise_leaky_relu = _spike_function(
    "piecewise_leaky_relu", lambda x, w, c: torch.full_like(x, c).masked_fill(x.abs() < w, 1 / w)
)
squarewave_fourier_series = _spike_function("squarewave_fourier_series", _square_wave_derivative)
s2nn = _spike_function("s2nn", lambda x, alpha, beta: torch.where(x < 0, _sigmoid_derivative(x, alpha), beta / (x + 1)))
q_pseudo_spike = _spike_function("q_pseudo_spike", lambda x, alpha: (1 + 2 / (alpha - 1) * x.abs()) ** -alpha)


class _Surrogate(nn.Module):
    """A surrogate whose settings are the attributes in ``_settings``."""

    _settings: tuple[str, ...] = ()

    def __init__(self, spiking):
        super().__init__()
        self.spiking = spiking

    def set_spiking_mode(self, spiking: bool):
        self.spiking = spiking

    @staticmethod
    def spiking_function(x, *settings):
        raise NotImplementedError

    @staticmethod
    def primitive_function(x, *settings):
        raise NotImplementedError

    def forward(self, x):
        function = self.spiking_function if self.spiking else self.primitive_function
        return function(x, *(getattr(self, name) for name in self._settings))


class SurrogateFunctionBase(_Surrogate):
    """Base class of surrogates with one setting, alpha. A subclass defines ``spiking_function`` and ``primitive_function``."""

    _settings = ("alpha",)

    def __init__(self, alpha, spiking=True):
        super().__init__(spiking)
        self.alpha = alpha

    def extra_repr(self):
        return f"alpha={self.alpha}, spiking={self.spiking}"


class MultiArgsSurrogateFunctionBase(_Surrogate):
    """Base class of surrogates with several settings. A subclass defines ``forward``."""

    def __init__(self, spiking: bool, *args, **kwargs):
        super().__init__(spiking)


class PiecewiseQuadratic(SurrogateFunctionBase):
    """ds/dx = max(0, alpha - alpha^2 |x|)"""

    def __init__(self, alpha=1.0, spiking=True):
        super().__init__(alpha, spiking)

    spiking_function = staticmethod(piecewise_quadratic.apply)

    @staticmethod
    def primitive_function(x, alpha):
        y = (alpha * x).clamp(-1, 1)
        return 0.5 + y - y * y.abs() / 2


class PiecewiseExp(SurrogateFunctionBase):
    """ds/dx = alpha/2 exp(-alpha |x|)"""

    def __init__(self, alpha=1.0, spiking=True):
        super().__init__(alpha, spiking)

    spiking_function = staticmethod(piecewise_exp.apply)

    @staticmethod
    def primitive_function(x, alpha):
        tail = torch.exp(-alpha * x.abs()) / 2
        return torch.where(x >= 0, 1 - tail, tail)


class Sigmoid(SurrogateFunctionBase):
    """ds/dx = alpha sigmoid(alpha x) (1 - sigmoid(alpha x))"""

    def __init__(self, alpha=4.0, spiking=True):
        super().__init__(alpha, spiking)

    spiking_function = staticmethod(sigmoid.apply)

    @staticmethod
    def primitive_function(x, alpha):
        return torch.sigmoid(alpha * x)


class SoftSign(SurrogateFunctionBase):
    """ds/dx = 1 / (2 alpha (1/alpha + |x|)^2)"""

    def __init__(self, alpha=2.0, spiking=True):
        super().__init__(alpha, spiking)
        if not alpha > 0:
            raise ValueError(f"alpha must be above 0, got {alpha}")

    spiking_function = staticmethod(soft_sign.apply)

    @staticmethod
    def primitive_function(x, alpha):
        return (nn.functional.softsign(alpha * x) + 1) / 2


class ATan(SurrogateFunctionBase):
    """ds/dx = alpha/2 / (1 + (pi/2 alpha x)^2)"""

    def __init__(self, alpha=2.0, spiking=True):
        super().__init__(alpha, spiking)

    spiking_function = staticmethod(atan.apply)

    @staticmethod
    def primitive_function(x, alpha):
        return torch.atan(math.pi / 2 * alpha * x) / math.pi + 0.5


class NonzeroSignLogAbs(SurrogateFunctionBase):
    """ds/dx = 1 / (1/alpha + |x|)"""

    def __init__(self, alpha=1.0, spiking=True):
        super().__init__(alpha, spiking)

    spiking_function = staticmethod(nonzero_sign_log_abs.apply)

    @staticmethod
    def primitive_function(x, alpha):
        size = torch.log(alpha * x.abs() + 1)
        return torch.where(x >= 0, size, -size)


class Erf(SurrogateFunctionBase):
    """ds/dx = alpha/sqrt(pi) exp(-(alpha x)^2)"""

    def __init__(self, alpha=2.0, spiking=True):
        super().__init__(alpha, spiking)

    spiking_function = staticmethod(erf.apply)

    @staticmethod
    def primitive_function(x, alpha):
        return torch.erfc(-alpha * x) / 2


class QPseudoSpike(SurrogateFunctionBase):
    """ds/dx = (1 + 2 |x| / (alpha - 1))^-alpha"""

    def __init__(self, alpha=2.0, spiking=True):
        super().__init__(alpha, spiking)

    spiking_function = staticmethod(q_pseudo_spike.apply)

    @staticmethod
    def primitive_function(x, alpha):
        tail = (1 + 2 / (alpha - 1) * x.abs()) ** (1 - alpha) / 2
        return torch.where(x >= 0, 1 - tail, tail)


class PiecewiseLeakyReLU(MultiArgsSurrogateFunctionBase):
    """ds/dx = 1/w if |x| < w else c"""

    _settings = ("w", "c")

    def __init__(self, w=1.0, c=0.01, spiking=True):
        super().__init__(spiking)
        if not w > 0:
            raise ValueError(f"w must be above 0, got {w}")
        self.w = w
        self.c = c

    spiking_function = staticmethod(piecewise_leaky_relu.apply)

    @staticmethod
    def primitive_function(x, w, c):
        inside = x.clamp(-w, w)
        return inside / (2 * w) + 0.5 + c * (x - inside)


class SquarewaveFourierSeries(MultiArgsSurrogateFunctionBase):
    """ds/dx = 4/T_period sum over i = 1 .. n-1 of cos((2i-1) 2 pi x / T_period)"""

    _settings = ("n", "T_period")

    def __init__(self, n: int = 2, T_period: float = 8, spiking=True):
        super().__init__(spiking)
        if not isinstance(n, int) or not T_period > 0:
            raise ValueError(f"n must be an int and T_period above 0, got {n!r} and {T_period}")
        self.n = n
        self.T_period = T_period

    spiking_function = staticmethod(squarewave_fourier_series.apply)

    @staticmethod
    def primitive_function(x, n, T_period):
        w = 2 * math.pi / T_period
        waves = (torch.sin((2 * i - 1) * w * x) / (2 * i - 1) for i in range(1, n))
        return 0.5 + 2 / math.pi * sum(waves, torch.zeros_like(x))


class S2NN(MultiArgsSurrogateFunctionBase):
    """ds/dx = alpha sigmoid(alpha x) (1 - sigmoid(alpha x)) if x < 0 else beta / (x + 1)"""

    _settings = ("alpha", "beta")

    def __init__(self, alpha=4.0, beta=1.0, spiking=True):
        super().__init__(spiking)
        self.alpha = alpha
        self.beta = beta

    spiking_function = staticmethod(s2nn.apply)

    @staticmethod
    def primitive_function(x, alpha, beta):
        return torch.where(x < 0, torch.sigmoid(alpha * x), beta * torch.log((x + 1).abs() + 1e-5) + 0.5)


__getattr__ = base.refuse_names("surrogate", "check_manual_grad", "check_cuda_grad")
