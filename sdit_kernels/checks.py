"""The checks of arguments that several ops share, and their error messages.

Range checks read the values of CPU tensors only: reading the values of a GPU tensor would wait for the GPU.
"""

import functools
import math
import numbers
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from ._torch import current_trace
from .dtypes import DATA_DTYPES, state_dtype
from .levels import BINARY, encode, span
from .surrogate import SURROGATES

# --- tensors, numbers and flags ---------------------------------------------------------------------------------------------


def refuse_proxy(value):
    """If torch.fx passes a proxy instead of a tensor, raise and say how to trace a program that calls an op."""
    if isinstance(value, torch.fx.Proxy):
        raise TypeError(
            "torch.fx.symbolic_trace cannot trace sdit_kernels, whose ops need tensors, not proxies: use torch.export or "
            "make_fx, or keep the call whole with torch.fx.wrap (an op) or Tracer.is_leaf_module (a module)"
        )


def is_number(value):
    """True for a real number of Python or numpy, or a symbolic number; False for a bool."""
    if isinstance(value, (int, float, torch.SymFloat)):
        return not isinstance(value, bool)
    return isinstance(value, numbers.Real)


def check_flag(name, flag):
    if not isinstance(flag, bool):
        raise TypeError(f"{name} must be a bool, got {type(flag).__name__}")


def check_tensor(name, t, optional=False):
    if not isinstance(t, Tensor):
        refuse_proxy(t)
        raise TypeError(f"{name} must be a tensor{' or None' if optional else ''}, got {type(t).__name__}")
    if t.layout is not torch.strided or t.is_nested:
        kind = "a nested tensor" if t.is_nested else t.layout
        raise TypeError(f"{name} must be a dense (strided) tensor, got {kind}")


def check_data(name, t, like=None):
    """Check a data tensor. With ``like``, check that t has the shape and device of ``like``, which the messages call x."""
    check_tensor(name, t, optional=like is not None)
    if like is None:
        if t.dtype not in DATA_DTYPES:
            raise TypeError(
                f"{name} must be float32, float64, bfloat16 or float16, got {t.dtype}; cast it, e.g. {name}.float()"
            )
    elif t.shape != like.shape:
        raise ValueError(f"{name} must have the shape of x, {tuple(like.shape)}, got {tuple(t.shape)}")
    if like is not None and t.device != like.device:
        raise ValueError(f"{name} must be on the device of x, {like.device}, got {t.device}")


def wants_gradient(*tensors):
    """True if autograd needs a gradient of one of the tensors.

    False under torch.jit.trace, because its graph runs both with and without gradients.
    """
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return wanted and current_trace() is None


# --- neurons ----------------------------------------------------------------------------------------------------------------


class Neuron(NamedTuple):
    """The settings of a LIF neuron as operators take them. A tensor tau or v_threshold overrides the number here."""

    tau: float
    v_threshold: float
    v_reset: float | None
    decay_input: bool
    detach_reset: bool
    surrogate: str
    alpha: float
    levels: str  # see levels.encode


_NUMBERS = float, int


def check_neuron(
    x, channels, tau, v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha, levels=None, data="x", tokens=False,
    axis="last axis",
):  # fmt: skip
    """Check the settings of a neuron for data x, which the messages call ``data``. ``channels``: the size of x's last axis.

    axis: another name of the axis of the channels, for messages. tokens: tau and v_threshold may have a value per token too.
    Return (Neuron, tau tensor, v_threshold tensor). The Neuron is None if the user gave a surrogate function.
    """
    dtype = state_dtype(x.dtype)
    known = type(tau) in _NUMBERS and type(v_threshold) in _NUMBERS and type(surrogate) is str
    if known and (levels is None or type(levels) is str) and not torch.compiler.is_compiling():
        settings = float(tau), float(v_threshold), v_reset, decay_input, detach_reset, surrogate, alpha, levels, dtype
        try:
            return _check_known_settings(*settings), None, None
        except TypeError:  # a setting is not hashable, or has a wrong type
            return _check_settings(*settings), None, None
    tau_value, tau = check_neuron_parameter("tau", tau, x, channels, data, tokens, axis)
    threshold_value, v_threshold = check_neuron_parameter("v_threshold", v_threshold, x, channels, data, tokens, axis)
    neuron = _check_settings(
        tau_value, threshold_value, v_reset, decay_input, detach_reset, surrogate, alpha, levels, dtype
    )  # fmt: skip
    return neuron, tau, v_threshold


def _check_settings(tau, v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha, levels, dtype):
    """Return the Neuron, None if the user gave a surrogate function. dtype: of the arithmetic."""
    _check_tau(tau, decay_input)
    check_threshold(v_threshold, dtype)
    if v_reset is not None:
        if not is_number(v_reset):
            raise TypeError(f"v_reset must be a number or None (soft reset), got {type(v_reset).__name__}")
        if not _is_finite(v_reset, dtype):
            raise ValueError(f"v_reset must be finite or None (soft reset), {_got(v_reset, dtype)}")
        v_reset = float(v_reset)
    for name, flag in (("decay_input", decay_input), ("detach_reset", detach_reset)):
        check_flag(name, flag)
    if levels is not None:
        levels = _check_levels(levels, v_threshold, v_reset, surrogate, alpha)
    alpha = check_surrogate(surrogate, alpha, dtype)
    if alpha is None:
        return None
    # 0.0 and -0.0 are one key of the cache below, so both become 0.0
    v_threshold, v_reset = v_threshold + 0.0, None if v_reset is None else v_reset + 0.0
    return Neuron(tau, v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha, levels or BINARY)


# The checks take 3 us, and most calls repeat the settings of an earlier one. typed: True is not a number here.
_check_known_settings = functools.lru_cache(maxsize=1024, typed=True)(_check_settings)


def _check_levels(levels, v_threshold, v_reset, surrogate, alpha):
    """Check levels and the settings that depend on them. Return the levels as operators take them."""
    found = encode(levels)
    _check_positive(v_threshold)
    if found != "ternary":
        if v_reset is not None:
            raise ValueError(f"integer levels subtract c * v_threshold: v_reset must be None, got {v_reset}")
        if surrogate != "atan" or alpha is not None:
            raise ValueError(
                "integer levels have the gradient of their window: leave surrogate and alpha out, or use "
                f"Levels(lo, hi, window); got surrogate={surrogate!r}, alpha={alpha!r}"
            )
    return found


def _check_positive(v_threshold):
    if not v_threshold > 0:
        raise ValueError(f"v_threshold must be positive where levels are given, got {v_threshold}")


def check_levels_fit(levels, dtype, what):
    """Check that ``dtype`` holds all spikes exactly. ``what``: where the dtype comes from, for the message."""
    lo, hi = span(levels)
    if dtype.is_floating_point:
        most = int(2 / torch.finfo(dtype).eps)
        least = -most
    else:
        least, most = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    if lo < least or hi > most:
        raise ValueError(f"{what} is {dtype}, which holds integers from {least} to {most}, got levels from {lo} to {hi}")
    scale = 1.0 if levels == "ternary" or len(levels) < 4 else levels[3]
    if dtype.is_floating_point and not torch.finfo(dtype).tiny <= scale <= torch.finfo(dtype).max / max(-lo, hi):
        raise ValueError(f"{what} is {dtype}, which does not hold levels from {lo} to {hi} times the scale {scale}")


def check_neuron_parameter(name, p, x, channels, data="x", tokens=False, axis="last axis"):
    """Check tau, beta or v_threshold. Return (number, None), or (1.0, tensor) for a tensor.

    tokens: p may have a value per token of x, (T, .., L, C). Such a p is returned with all axes of x except C, which is 1, and
    without T if it is the same at every step.
    """
    if isinstance(p, Tensor):
        check_tensor(name, p)
        if p.dtype not in DATA_DTYPES or torch.promote_types(p.dtype, x.dtype) != p.dtype:
            raise TypeError(
                f"{name} must be a floating tensor at least as wide as {data} ({x.dtype}), got {p.dtype}; "
                f"cast it: {name}.to({x.dtype})"
            )
        if p.device != x.device:
            raise ValueError(f"{name} must be on the device of {data}, {x.device}, got {p.device}")
        if tokens and p.dim() > 1 and channels is not None and (spread := _spread_over_tokens(p, x.shape)) is not None:
            return 1.0, spread
        if p.dim() > 1 or (p.numel() != 1 and p.shape != (channels,)):
            allowed = f" or have shape ({channels},), one per channel of {data}'s {axis}" if channels is not None else ""
            if tokens and x.dim() > 2:
                shapes = (*x.shape[1:-1], 1), (*x.shape[:-1], 1)
                allowed += f", or broadcast to {shapes[0]} or {shapes[1]}, one per token or per token and step"
            raise ValueError(f"{name} must be a scalar{allowed}, got {tuple(p.shape)}")
        return 1.0, p
    if not is_number(p):
        raise TypeError(f"{name} must be a number or a tensor, got {type(p).__name__}")
    return float(p), None


def _spread_over_tokens(p, shape):
    """Expand p to a value per token, (.., L, 1), or per token and step, (T, .., L, 1); a scalar if p has one element.

    Return None if p has another shape. shape: (T, .., L, C).
    """
    if p.shape[-1] != 1 or p.dim() > len(shape):
        return None
    if p.numel() == 1:
        return p.reshape(())
    if p.dim() == len(shape) and p.shape[0] == 1:  # the same at every step
        p = p[0]
    wanted = (*(shape if p.dim() == len(shape) else shape[1:])[:-1], 1)
    if any(n not in (1, m) for n, m in zip(reversed(p.shape), reversed(wanted))):
        return None
    p = p.expand(wanted)
    return p if p.dim() > 1 and p.numel() != 1 else p.reshape(())


def check_membrane(name, t, shape, like, data="x"):
    """Check a membrane or residual. Its dtype must be the dtype of the data ``like`` or of the arithmetic."""
    check_tensor(name, t, optional=True)
    if t.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(t.shape)}")
    allowed = (like.dtype, state_dtype(like.dtype))
    if t.dtype not in allowed:
        names = " or ".join(str(d) for d in dict.fromkeys(allowed))
        raise TypeError(f"{name} must be {names} where {data} is {like.dtype}, got {t.dtype}; cast it: {name}.to({allowed[1]})")
    if t.device != like.device:
        raise ValueError(f"{name} must be on the device of {data}, {like.device}, got {t.device}")


def check_surrogate(surrogate, alpha, dtype):
    """Check the surrogate gradient. Return its sharpness, or None if the user gave a surrogate function."""
    if callable(surrogate):
        if alpha is not None:
            raise ValueError("alpha belongs to the named surrogates; a surrogate function brings its own constants")
        return None
    if surrogate not in SURROGATES:
        raise ValueError(f"surrogate must be one of {', '.join(SURROGATES)} or a function of z, got {surrogate!r}")
    if alpha is None:
        return SURROGATES[surrogate].alpha
    if not is_number(alpha):
        raise TypeError(f"alpha must be a number or None, got {type(alpha).__name__}")
    check_positive("alpha", alpha, dtype)
    return float(alpha)


def _check_tau(tau, decay_input):
    if not (1 <= tau < math.inf or (tau == math.inf and not decay_input)):
        raise ValueError(f"tau must be at least 1 (and infinite only with decay_input=False), got {tau}")


def check_number(name, value, dtype):
    if not _is_finite(value, dtype):
        raise ValueError(f"{name} must be finite, {_got(value, dtype)}")


def check_positive(name, value, dtype):
    if not (value > 0 and _is_finite(value, dtype)):
        raise ValueError(f"{name} must be positive and finite, {_got(value, dtype)}")


def check_decay(name, value, dtype):
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value}")


def check_threshold(v_threshold, dtype):
    check_number("v_threshold", v_threshold, dtype)


def _is_finite(number, dtype):
    limit = torch.finfo(dtype).max
    return -limit <= number <= limit


def _got(number, dtype):
    """Return the end of an error message about a number that is not finite in ``dtype``, the dtype of the arithmetic."""
    return f"got {number}" + (f", more than {dtype} holds" if math.isfinite(number) and not _is_finite(number, dtype) else "")


def check_neuron_values(tau, v_threshold, decay_input, dtype=torch.float64, levels=BINARY):
    """Check the values of tensors tau and v_threshold on the CPU."""
    if v_threshold is not None and levels != BINARY and v_threshold.numel():
        _check_positive((v_threshold if v_threshold.numel() == 1 else v_threshold.min()).item())
    for p in (tau, v_threshold):
        if p is not None and p.numel():
            for extreme in (p.item(),) if p.numel() == 1 else (p.min().item(), p.max().item()):
                if p is tau:
                    _check_tau(extreme, decay_input)
                else:
                    check_threshold(extreme, dtype)


_warned_of_custom_surrogate = False


def warn_of_custom_surrogate():
    """Warn once per process."""
    global _warned_of_custom_surrogate
    if not _warned_of_custom_surrogate:
        _warned_of_custom_surrogate = True
        warnings.warn("a surrogate function of your own runs on the plain PyTorch path, not on the fused kernels", stacklevel=4)


# --- scans ------------------------------------------------------------------------------------------------------------------


def check_tokens(time_decay, time_first, k, v, r, log_decay, axes):
    """Check the arguments of a scan except states and flags. ``axes``: the names of k's axes.

    Return (decay, decay_is_log_of_rate). The flag is True for RWKV's time_decay: the decay is then w = -exp(time_decay).
    """
    check_data("k", k)
    if k.dim() != len(axes):
        raise ValueError(f"k must have the axes ({', '.join(axes)}), got shape {tuple(k.shape)}")
    check_like_keys("v", v, k)
    if isinstance(r, (tuple, list)):
        state = "state" if len(axes) == 3 else "scan_state"
        raise TypeError(f"r must be a tensor or None, got {type(r).__name__}; a state goes in by name: {state}=(ybar, lse)")
    if r is not None:
        check_like_keys("r", r, k)
    if (time_decay is None) == (log_decay is None):
        raise ValueError("give either time_decay, or None and log_decay; got " + ("neither" if log_decay is None else "both"))
    decay_is_log_of_rate = log_decay is None
    decay = time_decay if decay_is_log_of_rate else log_decay
    check_channel_vector("time_decay" if decay_is_log_of_rate else "log_decay", decay, k)
    check_channel_vector("time_first", time_first, k)
    return decay, decay_is_log_of_rate


def check_like_keys(name, t, k):
    """Check that v or r matches k in dtype, shape and device."""
    check_tensor(name, t)
    if t.dtype != k.dtype:
        raise TypeError(f"{name} must have the dtype of k, {k.dtype}, got {t.dtype}; cast it: {name}.to({k.dtype})")
    if t.shape != k.shape:
        raise ValueError(f"{name} must have the shape of k, {tuple(k.shape)}, got {tuple(t.shape)}")
    if t.device != k.device:
        raise ValueError(f"{name} must be on the device of k, {k.device}, got {t.device}")


def check_channel_vector(name, p, k):
    """Check a parameter with one value per channel of k."""
    check_tensor(name, p)
    if p.dtype != k.dtype and (p.dtype not in DATA_DTYPES or torch.promote_types(p.dtype, k.dtype) != p.dtype):
        raise TypeError(
            f"{name} must be a floating tensor at least as wide as k ({k.dtype}), got {p.dtype}; cast it: {name}.to({k.dtype})"
        )
    if p.shape != k.shape[-1:]:
        raise ValueError(f"{name} must have shape ({k.shape[-1]},), one per channel, got {tuple(p.shape)}")
    if p.device != k.device:
        raise ValueError(f"{name} must be on the device of k, {k.device}, got {p.device}")


def check_scan_state(state, shape, k, label="state"):
    """Check the state of a scan, a pair (ybar, lse), and return it."""
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        found = f"{len(state)} items" if isinstance(state, (tuple, list)) else type(state).__name__
        raise TypeError(f"{label} must be None or a pair (ybar, lse) of tensors, got {found}")
    dtype = state_dtype(k.dtype)
    for name, t in zip(("ybar", "lse"), state):
        name = f"{label}'s {name}"
        check_tensor(name, t)
        if t.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(t.shape)}")
        if t.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} where k is {k.dtype}, got {t.dtype}; cast it with .to({dtype})")
        if t.device != k.device:
            raise ValueError(f"{name} must be on the device of k, {k.device}, got {t.device}")
    return state
