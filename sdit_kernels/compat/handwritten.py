r"""Run LIF neurons that a project wrote itself, as a loop over time steps, on the fused kernels.

Published spiking networks often contain such a class (``LIFSpike``, ``mem_update``, ``IF``, ...)::

    for t in range(T):
        mem = mem * self.tau + x[:, t]
        spike = self.act(mem - self.thresh, self.gama)
        mem = (1 - spike) * mem

This module recognises a neuron by what it computes, not by its name. It runs a copy of the module on chosen inputs and reads
from the spikes and gradients: the time axis, the decay, the threshold, the reset and the surrogate gradient. It replaces the
neuron only if the fused neuron then has the same spikes and the same gradients on fresh random inputs. The page "Hand-written
neurons" of the documentation lists the accepted forms, and the reasons why a module is left.
"""

import copy
import dis
import math
import random
import re
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._torch import assume_constant_result, has_hooks
from ..dispatch import backend
from ..dtypes import DATA_DTYPES, state_dtype
from ..ops.leaky import leaky
from ..ops.lif import lif
from ..ops.operator import values_are_readable
from ..surrogate import SURROGATES
from .swap import (
    Report,
    Swapped,
    class_names,
    counted,
    methods_of,
    named_like_a_neuron,
    original_class,
    refuse_symbols,
    swap,
    swap_back,
    warn,
)

__all__ = ["accelerate", "restore"]

_LIBRARY = "hand-written neurons"


# --- the fused neuron -------------------------------------------------------------------------------------------------------

_DECAYS: dict[str, Callable[[Tensor], Tensor]] = {  # how published neurons compute the decay from a learned parameter
    "p": lambda p: p,
    "sigmoid(p)": torch.sigmoid,
    "1 - sigmoid(p)": lambda p: torch.sigmoid(-p),
    "1 - 1/p": lambda p: 1 - 1 / p,
    "exp(-p)": lambda p: torch.exp(-p),
    "exp(-1/p)": lambda p: torch.exp(-1 / p),
}


class _Form(NamedTuple):
    """The equation of a neuron, in the units of its threshold."""

    decay: float | tuple[str, str]  # a number, or (name of a parameter, key of _DECAYS)
    threshold: float | str  # a number, or the name of a parameter
    decay_input: bool  # the input is multiplied by 1 - decay
    strict: bool  # spike where h > threshold, not where h >= threshold
    reset: str  # "hard", "soft" or "delayed" (soft, in the next step)
    v_reset: float
    start: float  # membrane before the first step / threshold
    detach: bool  # no gradient flows through the reset
    surrogate: str
    alpha: float
    scale: float  # factor of the surrogate gradient
    spike: float | None  # size of a spike; None: the threshold
    unused: tuple[str, ...]  # parameters without a gradient
    exact: bool  # use leaky, whose operations have the order of ``decay * v + x`` and whose comparison is strict

    def __str__(self):
        decay = self.decay if isinstance(self.decay, float) else self.decay[1].replace("p", self.decay[0], 1)
        decay = f"{decay:g}" if isinstance(decay, float) else decay
        threshold = f"{self.threshold:g}" if isinstance(self.threshold, float) else self.threshold
        reset = f"hard reset to {self.v_reset:g}" if self.reset == "hard" else f"{self.reset} reset"
        return f"decay {decay}, threshold {threshold}, {reset}, {self.surrogate} {self.alpha:g}"


class _Layout(NamedTuple):
    """Where the time steps are in the data."""

    kind: str  # "axis"; "fold": the first axis is T * B; "fold batch": the first axis is B * T
    axis: int
    steps: int | None  # None: any number

    def time_first(self, x: Tensor) -> Tensor:
        if self.kind == "axis":
            return x.movedim(self.axis, 0)
        return x.unflatten(0, (self.steps, -1)) if self.kind == "fold" else x.unflatten(0, (-1, self.steps)).movedim(1, 0)

    def back(self, x: Tensor) -> Tensor:
        """Undo ``time_first``."""
        if self.kind == "axis":
            return x.movedim(0, self.axis)
        return (x if self.kind == "fold" else x.movedim(0, 1)).flatten(0, 1)

    def fits(self, x: Tensor) -> bool:
        if self.steps is None:
            return True
        return x.shape[self.axis] == self.steps if self.kind == "axis" else x.shape[0] % self.steps == 0


class _Watched(NamedTuple):
    """A number, flag or string that the neuron's code may read: an attribute of a module, or a global of a file."""

    path: tuple[str, ...]  # names of the children on the way to the attribute; of a global: the file's module
    name: str
    value: Any


class _Fit(NamedTuple):
    """Everything that was read from a neuron."""

    form: _Form
    layout: _Layout
    ranks: tuple[int, ...]  # numbers of axes of the data that the neuron takes
    dtypes: tuple[tuple[torch.dtype, torch.dtype], ...]  # (of the data, of the spikes)
    attributes: tuple[_Watched, ...]
    constants: tuple[_Watched, ...]


def _next_threshold(threshold, steps: int, dtype: torch.dtype):
    """Return the number before or after a threshold in a dtype. The gradient is the gradient of the threshold."""
    if isinstance(threshold, Tensor):
        near = threshold.detach()
        return threshold + (torch.nextafter(near, torch.full_like(near, steps * math.inf)) - near)
    if dtype == torch.float64:
        return math.nextafter(threshold, steps * math.inf)
    return float(np.nextafter(np.float32(threshold), np.float32(steps * math.inf)))


@assume_constant_result
def _next_number(threshold: float, steps: int, dtype: torch.dtype) -> float:
    return _next_threshold(threshold, steps, dtype)


def _values(form: _Form, parameters, dtype: torch.dtype):
    """Return (decay, threshold): numbers, or scalar tensors of the parameters."""

    def scalar(name):
        p = parameters[name].to(dtype).reshape(())
        return p.detach() if name in form.unused else p

    decay = form.decay if isinstance(form.decay, float) else _DECAYS[form.decay[1]](scalar(form.decay[0]))
    return decay, form.threshold if isinstance(form.threshold, float) else scalar(form.threshold)


def _run_form(form: _Form, x: Tensor, parameters) -> Tensor:
    """Return the spikes of the neuron for x, (T, ...)."""
    dtype = state_dtype(x.dtype)
    decay, threshold = _values(form, parameters, dtype)
    v = None if form.start == 0 else x.new_ones(x.shape[1:], dtype=dtype) * (form.start * threshold)
    # lif compares h >= threshold and leaky h > threshold. h > a is h >= (the next number after a), in the dtype of h.
    nudge = int(form.strict) if not form.exact else int(form.strict) - 1
    fires_at = threshold
    if nudge:
        step = _next_threshold if isinstance(threshold, Tensor) else _next_number
        fires_at = step(threshold, nudge, dtype)
    surrogate = dict(surrogate=form.surrogate, alpha=form.alpha)
    if form.exact:
        reset = "zero" if form.reset == "hard" else "subtract"
        # A reset in the next step has no gradient in leaky. If nothing but spikes is returned, it equals a detached reset.
        s = leaky(x, v, beta=decay, v_threshold=fires_at, reset=reset, reset_delay=form.detach, **surrogate)
    else:
        tau = math.inf if isinstance(decay, float) and decay == 1 else 1 / (1 - decay)
        v_reset = None if form.reset == "soft" else form.v_reset
        s = lif(
            x, v, tau=tau, v_threshold=fires_at, v_reset=v_reset, decay_input=form.decay_input, detach_reset=form.detach,
            **surrogate,
        )  # fmt: skip
    if form.scale != 1:
        s = s + (form.scale - 1) * (s - s.detach())  # only the gradient changes
    if form.spike is None:
        return s * threshold if isinstance(threshold, float) else s * threshold.to(s.dtype)
    return s if form.spike == 1 else s * form.spike


class _HandWritten(Swapped):
    """A neuron that a project wrote itself, on the fused kernels."""

    _handwritten_fit: _Fit

    def forward(self, x, *args, **kwargs):
        refuse_symbols(self, x)
        fit = self._handwritten_fit
        reason = counted() or _why_not_now(self, fit, x, args, kwargs)
        if reason is not None:
            warn(f"{type(self).__name__} runs its own code: {reason}", 3)
            return original_class(self).forward(self, x, *args, **kwargs)
        spikes = fit.layout.back(_run_form(fit.form, fit.layout.time_first(x), self._parameters))
        spikes = spikes.contiguous() if x.is_contiguous() else spikes
        return spikes.to(next(out for dtype, out in fit.dtypes if dtype == x.dtype))

    def extra_repr(self):
        return ", ".join(filter(None, (super().extra_repr(), f"{self._handwritten_fit.form}, fused by sdit_kernels")))


def _why_not_now(module, fit: _Fit, x, args, kwargs) -> str | None:
    """Return why the neuron must run its own code for this call, or None."""
    if args or kwargs:
        return "it is called with more than its input"
    if not isinstance(x, Tensor) or all(x.dtype != dtype for dtype, _ in fit.dtypes):
        return f"the kernels do not take its data, {x.dtype if isinstance(x, Tensor) else type(x).__name__}"
    if x.dim() not in fit.ranks or not fit.layout.fits(x):
        return f"it was not checked for data of shape {tuple(x.shape)}"
    if any(has_hooks(child) for child in module.children()):
        return "a module in it has hooks, which the kernels would not call"
    decay = fit.form.decay
    if isinstance(decay, tuple):
        p = module._parameters[decay[0]]
        if p.device != x.device:
            return "its parameter and its data are on different devices"
        if values_are_readable(p) and not 0 <= _DECAYS[decay[1]](p.detach()).item() < 1:
            return "its decay is not between 0 and 1"
    changed = _changed_attribute(module, fit.attributes) or _changed_constant(fit.constants)
    return None if changed is None else f"{changed} since accelerate; call accelerate again"


def _changed_attribute(module, attributes) -> str | None:
    for path, name, value in attributes:
        holder = module
        for part in path:
            holder = getattr(holder, part)
        now = getattr(holder, name, None)
        if type(now) is not type(value) or now != value:
            return f"its attribute {'.'.join((*path, name))} changed from {value!r}"
    return None


@assume_constant_result  # torch.compile cannot guard the globals of another file
def _changed_constant(constants) -> str | None:
    for (file,), name, value in constants:
        now = vars(sys.modules[file]).get(name) if file in sys.modules else value
        if type(now) is not type(value) or now != value:
            return f"{name} in {file} changed from {value!r}"
    return None


# --- what the code of a neuron reads ----------------------------------------------------------------------------------------

_BARE = {*vars(nn.Module()), "training"}
_SIMPLE = (bool, int, float, str, type(None))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _is_foreign(name: str) -> bool:
    return name.partition(".")[0] not in ("torch", "builtins", "numpy", "math", "random", "einops", "functools", "typing")


def _functions(module: nn.Module) -> list[types.FunctionType]:
    """Return the functions of the project that the forward of a module may call."""
    found: dict[int, types.FunctionType] = {}
    owner = {}
    todo: list[Any] = []
    for part in module.modules():
        todo.append(type(part).forward)
        owner[id(type(part).forward)] = part
    while todo and len(found) < 64:
        f = todo.pop()
        f = getattr(f, "__func__", f)
        f = getattr(f, "__wrapped__", f)
        part = owner.get(id(f))
        if isinstance(getattr(f, "__self__", None), type):  # Function.apply
            f = f.__self__
        if isinstance(f, type):
            if _is_foreign(f.__module__):
                todo += [getattr(f, name) for name in ("forward", "backward", "setup_context") if hasattr(f, name)]
            continue
        if not isinstance(f, types.FunctionType) or id(f) in found or not _is_foreign(f.__module__ or ""):
            continue
        found[id(f)] = f
        for code in _codes(f.__code__):
            for name in code.co_names:
                for value in (f.__globals__.get(name), getattr(part, name, None) if part is not None else None):
                    if callable(value) and not isinstance(value, nn.Module):
                        todo.append(value)
                        owner.setdefault(id(getattr(value, "__func__", value)), part)
        todo += [cell.cell_contents for cell in f.__closure__ or () if callable(_content(cell))]
    return list(found.values())


def _content(cell):
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None


def _has_loop(functions) -> bool:
    codes = (code for f in functions for code in _codes(f.__code__))
    return any(
        i.opname == "FOR_ITER" or i.opname.startswith("JUMP_BACKWARD") for code in codes for i in dis.get_instructions(code)
    )


def _attributes(module: nn.Module) -> tuple[_Watched, ...]:
    """Return the simple attributes of a module, its class and its children."""
    found = []
    for path, part in module.named_modules():
        names = [*vars(part)]
        for cls in type(part).__mro__:
            if _is_foreign(cls.__module__) and cls is not object:
                names += [name for name in vars(cls) if not name.startswith("__")]
        for name in dict.fromkeys(names):
            value = getattr(part, name, None) if name in vars(part) else getattr(type(part), name, None)
            if name not in _BARE and isinstance(value, _SIMPLE):
                found.append(_Watched(tuple(filter(None, path.split("."))), name, value))
    return tuple(found)


def _constants(functions) -> tuple[_Watched, ...]:
    """Return the simple globals that functions read."""
    found = []
    for f in functions:
        space = f.__globals__
        file = space.get("__name__", "")
        if file in sys.modules and vars(sys.modules[file]) is space:
            for name in (name for code in _codes(f.__code__) for name in code.co_names):
                if name in space and isinstance(space[name], _SIMPLE) and not name.startswith("__"):
                    found.append(_Watched((file,), name, space[name]))
    return tuple(dict.fromkeys(found))


def _snapshot(module: nn.Module) -> dict:
    """Return what a call of a module could leave behind: attributes and class attributes, containers by their length."""
    found: dict[Any, Any] = {}
    for path, part in module.named_modules():
        spaces = [(path, {**vars(part), **part._parameters})]
        spaces += [(cls, dict(vars(cls))) for cls in type(part).__mro__ if cls is not object and _is_foreign(cls.__module__)]
        for where, space in spaces:
            for name, value in space.items():
                if isinstance(value, (list, dict, set)):
                    value = (id(value), len(value))
                elif isinstance(value, Tensor):
                    value = (id(value), value._version)
                elif not isinstance(value, _SIMPLE):
                    value = id(value)
                found[where, name] = value
    return found


# --- running a copy of the neuron ---------------------------------------------------------------------------------------------


class _Cannot(Exception):
    """The reason why a module is left. ``progress``: how far the fit came; the report names the reason of the best attempt.

    ``final``: no other attempt can succeed.
    """

    def __init__(self, progress: int, reason: str, final: bool = False):
        super().__init__(reason)
        self.progress, self.final = progress, final


def _random_states(device: str) -> tuple:
    kind, keys, position, *_ = np.random.get_state()
    cuda = torch.cuda.get_rng_state().tolist() if device == "cuda" else None
    return random.getstate(), (kind, keys.tobytes(), position), torch.get_rng_state().numpy().tobytes(), cuda


@contextmanager
def _isolated():
    """Undo the draws of random numbers, and hide the modes of the caller from the neuron."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with (
            torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad(), backend("reference"),
            torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False),
        ):  # fmt: skip
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class _InFloat64(TorchFunctionMode):
    """Compute in float64 where the code of a neuron says float32, for example ``(z > 0).float()``."""

    _made = {Tensor.float, Tensor.to, Tensor.type, torch.zeros, torch.ones, torch.empty, torch.full, torch.tensor}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out.double() if func in self._made and out.dtype == torch.float32 else out


class _Probe:
    """A float64 copy of a module that runs on chosen inputs with one layout and one number of axes."""

    def __init__(self, twin: nn.Module, layout: _Layout, rank: int, device: str):
        self.twin, self.layout, self.rank, self.device = twin, layout, rank, device
        self.steps = layout.steps or 2

    def call(self, x: Tensor) -> Tensor:
        """Run the copy on data x."""
        before = _random_states(self.device)
        try:
            with _InFloat64():
                out: Any = self.twin(x)
        except Exception as error:  # code that is not ours may raise anything
            raise _Cannot(0, f"its forward does not run on a trial input ({type(error).__name__}: {error})") from None
        if _random_states(self.device) != before:
            raise _Cannot(3, "it draws random numbers", final=True)
        if not isinstance(out, Tensor) or out.shape != x.shape:
            raise _Cannot(0, "its output is not one tensor with the shape of its input")
        return out

    def data(self, rows: Tensor) -> Tensor:
        """Return data of N neurons from their inputs at each step, (T, N)."""
        axes = self.rank - 2 if self.layout.kind == "axis" else self.rank - 1
        return self.layout.back(rows.reshape(*rows.shape, *[1] * axes)).contiguous()

    def run(self, rows: Tensor) -> Tensor:
        x = self.data(rows)
        given = x.detach().clone()
        out = self.layout.time_first(self.call(x)).reshape(rows.shape)
        if not torch.equal(x.detach(), given):
            raise _Cannot(3, "it changes its input in place", final=True)
        return out

    def rows(self, history, values) -> Tensor:
        """Return inputs (T, N): N neurons get the same history, then each its own value, then zeros."""
        values = torch.as_tensor(values, dtype=torch.float64, device=self.device)
        rows = torch.zeros(self.steps, len(values), dtype=torch.float64, device=self.device)
        for t, value in enumerate(history):
            rows[t] = value
        rows[len(history)] = values
        return rows

    def slopes(self, history, values, of: int) -> Tensor:
        """Return d s[last] / d x[of] for N neurons."""
        rows = self.rows(history, values).requires_grad_()
        out = self.run(rows)[len(history)]
        if not out.requires_grad:
            raise _Cannot(2, "its spikes have no gradient")
        (gradient,) = torch.autograd.grad(out.sum(), rows)
        return gradient[of]


_POWERS = [2.0**k for k in range(-24, 42)]
_WIDE_GRID = [-p for p in reversed(_POWERS)] + [0.0] + _POWERS


def _first_input(fires: Callable[[list[float]], list[bool]], what: str) -> tuple[float, float]:
    """Return adjacent numbers (low, high): the first does not fire, the second does. ``fires`` must be a step function."""
    grid = _WIDE_GRID
    for _ in range(64):
        fired = fires(grid)
        if not fired[-1] or fired[0]:
            raise _Cannot(2, f"{what} does not depend on its input as in a LIF neuron")
        first = fired.index(True)
        if not all(fired[first:]):
            raise _Cannot(2, f"{what} is not a step function of its input")
        low, high = grid[first - 1], grid[first]
        if math.nextafter(low, math.inf) == high:
            break
        grid = sorted({low, high, *(low + (high - low) * (i / 64) for i in range(1, 64))})
        grid = [value for value in grid if low <= value <= high]
        if len(grid) == 2:
            break
    return low, high


# --- the fit ----------------------------------------------------------------------------------------------------------------


def _near(a: float, b: float, tolerance=1e-9) -> bool:
    return abs(a - b) <= tolerance * max(abs(a), abs(b), 1e-9)


def _rounded(value: float, known: list[float]) -> float:
    """Undo the rounding of the fit: return a constant of the neuron or a decimal of eight digits within 1e-12 of the value."""
    for candidate in (*known, float(f"{value:.8g}")):
        if abs(candidate - value) <= 1e-12 * abs(value):
            return candidate
    return value


class _Measured(NamedTuple):
    """A neuron in the units of its input: h = decay * v + x."""

    decay: float
    threshold: float
    start: float
    reset: str
    v_reset: float
    low: float  # the largest first input that does not fire, and the smallest that does
    high: float
    spike: float


def _spike_size(probe: _Probe) -> float:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(probe.steps, 64, generator=draw, dtype=torch.float64) * 2.0 ** (torch.arange(64) / 4 - 5)
    out = probe.run(rows.to(probe.device)).detach()
    sizes = out.unique().tolist()
    if len(sizes) != 2 or 0 not in sizes:
        raise _Cannot(1, "its output is not binary: it has values other than 0 and one size of spike")
    return sum(sizes)


def _measure(probe: _Probe) -> _Measured:
    """Read decay, threshold, reset and initial membrane from the smallest inputs that fire."""
    if probe.steps < 2:
        raise _Cannot(2, "it runs one time step, which does not show its decay")
    spike = _spike_size(probe)

    def first(*history):
        where = "its first spike" if not history else "its second spike"
        return _first_input(lambda x: (probe.run(probe.rows(history, x))[len(history)].detach() != 0).tolist(), where)

    low, high = first()
    if high <= 0:
        raise _Cannot(2, "it fires without input")
    far = -(2.0**20)
    second = first(0.0)[1]
    decay = (first(far)[1] - second) / -far
    decay = 1.0 if _near(decay, 1) else decay
    if not 1e-6 < decay <= 1:
        raise _Cannot(2, "it keeps no membrane potential from step to step" if abs(decay) <= 1e-6 else
                      f"its decay is {decay:g}, and the kernels take 0 to 1")  # fmt: skip
    drift = second - high  # decay * start * (1 - decay); a constant input other than zero would show as drift at decay = 1
    drift = 0.0 if abs(drift) <= 1e-9 * high else drift
    if decay == 1 and drift:
        raise _Cannot(2, "a constant current flows into it")
    start = 0.0 if decay == 1 else drift / (decay * (1 - decay))
    threshold = high + decay * start
    charged = [4 * high, 8 * high]
    after = [(threshold - first(x)[1]) / decay for x in charged]  # membrane after a spike
    removed = [x + decay * start - v for x, v in zip(charged, after)]
    if _near(after[0], after[1]) or max(map(abs, after)) <= 1e-9 * high:
        v_reset = sum(after) / 2
        v_reset = 0.0 if abs(v_reset) <= 1e-9 * high else v_reset
        if v_reset and decay != 1:
            raise _Cannot(2, f"it resets to {v_reset:g}, and leaks towards 0; the kernels take one value for both")
        return _Measured(decay, threshold, start, "hard", v_reset, low, high, spike)
    if not _near(removed[0], removed[1]):
        raise _Cannot(2, "its reset neither sets the membrane potential to a value nor subtracts one")
    if decay == 1:  # the initial membrane potential and the threshold show only as a difference
        start, threshold = removed[0] - high, removed[0]
        start = 0.0 if abs(start) <= 1e-9 * high else start
    if _near(removed[0], threshold):
        return _Measured(decay, threshold, start, "soft", 0.0, low, high, spike)
    if _near(removed[0] * decay, threshold):
        return _Measured(decay, threshold, start, "delayed", 0.0, low, high, spike)
    raise _Cannot(2, f"its reset subtracts {removed[0]:g}, and its threshold is {threshold:g}")


class _Slope(NamedTuple):
    """The surrogate gradient at the threshold, and the distance at which it is half as large."""

    peak: float
    width: float
    inputs: Tensor  # distances from the threshold, and the surrogate gradient there
    values: Tensor


def _measure_surrogate(probe: _Probe, measured: _Measured, centre: float) -> _Slope:
    def slope(distances):
        return probe.slopes((), [centre + z for z in distances], 0) / measured.spike

    (peak,) = slope([0.0]).tolist()
    if not peak > 0:
        raise _Cannot(2, "its surrogate gradient is zero at the threshold")
    try:
        _, width = _first_input(lambda z: [g <= peak / 2 for g in slope([abs(a) if a > 0 else 0.0 for a in z]).tolist()], "")
    except _Cannot:
        raise _Cannot(2, "its surrogate gradient does not fall with the distance from the threshold") from None
    inputs = width * torch.tensor([s * z for z in (0.1, 0.3, 0.7, 0.95, 1.05, 1.5, 1.9, 2.1, 3.0, 7.0) for s in (1, -1)])
    inputs = inputs.to(torch.float64)
    return _Slope(peak, width, inputs, slope(inputs.tolist()).cpu())


_HALF_WIDTHS = {  # the distance z at which a surrogate with alpha = 1 is half as large as at 0
    "atan": 2 / math.pi, "sigmoid": math.log(3 + math.sqrt(8)), "piecewise_quadratic": 0.5, "piecewise_exp": math.log(2),
    "soft_sign": math.sqrt(2) - 1, "erf": math.sqrt(math.log(2)), "rect": 0.5, "fast_sigmoid": math.sqrt(2) - 1,
}  # fmt: skip


def _match_surrogate(slope: _Slope, gain: float, known: list[float]) -> tuple[str, float, float]:
    """Return (name, alpha, scale) of a surrogate of our table. ``gain``: units of the threshold per unit of the input."""
    z = slope.inputs * gain
    found = []
    for name, surrogate in SURROGATES.items():
        alpha = slope.peak / gain if name == "super_spike" else _HALF_WIDTHS[name] / (slope.width * gain)
        inverse = [1 / a for a in known if a] + [1 / (2 * a) for a in known if a]
        alpha = _rounded(alpha, [*known, *inverse])
        scale = slope.peak / gain / surrogate.derivative(torch.zeros(1, dtype=torch.float64), alpha).item()
        scale = 1.0 if _near(scale, 1) else _rounded(scale, known)
        wanted = scale * surrogate.derivative(z, alpha) * gain
        if (wanted - slope.values).abs().max() <= 1e-7 * slope.peak:
            found.append((name, alpha, scale))
    if not found:
        sided = (slope.values[::2] - slope.values[1::2]).abs().max() > 1e-7 * slope.peak
        why = "is not symmetric about the threshold" if sided else "has none of the formulas in sdit_kernels.SURROGATES"
        raise _Cannot(2, f"its surrogate gradient {why}")
    return min(found, key=lambda match: match[2] != 1)


def _is_detached(probe: _Probe, measured: _Measured, centre: float, slope: _Slope) -> bool:
    """True if no gradient flows through the reset: compare d s[1] / d x[0] of a neuron that fires at step 0."""
    d, h = measured.decay, measured.threshold + slope.width / 4
    after = measured.v_reset if measured.reset == "hard" else h - measured.threshold / (d if measured.reset == "delayed" else 1)
    x = [centre + slope.width / 4, measured.threshold - d * after + slope.width / 4]
    (total,) = probe.slopes(x[:1], x[1:], 0).tolist()
    (last,) = probe.slopes(x[:1], x[1:], 1).tolist()
    if last == 0:
        raise _Cannot(2, "its surrogate gradient depends on more than the membrane potential")
    return _near(total / (last * d) + 1, 1 if measured.reset == "hard" else 2, 1e-6)


class _Roles(NamedTuple):
    decay: float | tuple[str, str]
    thresholds: dict[bool, float | str]  # by decay_input; a unit is missing if the threshold is no parameter or number in it
    spike_is_threshold: bool


def _roles(probe: _Probe, measured: _Measured, known: list[float]) -> _Roles:
    """Find what each learned parameter is: the decay, the threshold, or both. Measure the neuron with other values of it."""
    decay: float | tuple[str, str] = _rounded(measured.decay, [*known, *(1 - 1 / a for a in known if a)])
    thresholds: dict[bool, float | str] = {}
    for decay_input in (False, True):
        gain = 1 - measured.decay if decay_input else 1.0
        if gain:
            thresholds[decay_input] = _rounded(measured.threshold * gain, known)
    scaled = False
    for name, p in probe.twin.named_parameters(recurse=False):
        own = p.detach().clone()
        trials = [(own.item(), measured)]
        for sign in (1, -1):
            with torch.no_grad():
                p.copy_(own + sign * (own.abs() / 16 if own.item() else 1 / 16))
            trials.append((p.item(), _measure(probe)))
        with torch.no_grad():
            p.copy_(own)
        used = False
        if any(not _near(m.decay, measured.decay) for _, m in trials):
            used = True
            maps = (key for key, f in _DECAYS.items()
                    if all(_near(f(torch.tensor(a, dtype=torch.float64)).item(), m.decay) for a, m in trials))  # fmt: skip
            key = next(maps, None)
            if key is None:
                raise _Cannot(2, f"its decay is an unknown function of its parameter {name}")
            decay = (name, key)
        for decay_input in [*thresholds]:
            found = [m.threshold * (1 - m.decay if decay_input else 1) for _, m in trials]
            if any(not _near(f, found[0]) for f in found):
                if all(_near(f, a) for f, (a, _) in zip(found, trials)):
                    thresholds[decay_input], used = name, True
                else:
                    del thresholds[decay_input]
        if any(not _near(m.spike, measured.spike) for _, m in trials):
            scaled = True
        if not used and thresholds:
            raise _Cannot(2, f"its parameter {name} changes neither its decay nor its threshold")
        if not thresholds:
            raise _Cannot(2, f"its threshold is an unknown function of its parameter {name}")
    return _Roles(decay, thresholds, scaled)


def _forms(probe: _Probe, measured: _Measured, known: list[float]) -> list[_Form]:
    """Return the forms that this neuron may have. They differ in the order of the operations."""
    roles = _roles(probe, measured, known)
    centre = _rounded(measured.high, known)
    slope = _measure_surrogate(probe, measured, centre)
    detach = _is_detached(probe, measured, centre, slope)
    # One of the two numbers around the step is the threshold. It is the short one, or a constant of the neuron.
    strict = measured.low in known or (measured.high not in known and len(repr(measured.low)) < len(repr(measured.high)))
    forms = []
    for decay_input, threshold in roles.thresholds.items():
        gain = 1 - measured.decay if decay_input else 1.0
        surrogate, alpha, scale = _match_surrogate(slope, gain, known)
        if scale != 1 and not detach:
            why = f"its surrogate gradient is {scale:g} times the {surrogate} of sdit_kernels.SURROGATES"
            raise _Cannot(2, f"{why}, and its reset has a gradient")
        form = _Form(
            roles.decay, threshold, decay_input, strict, measured.reset, measured.v_reset * gain,
            _rounded(measured.start / measured.threshold, known), detach, surrogate, alpha, scale,
            None if roles.spike_is_threshold else measured.spike, (), False,
        )  # fmt: skip
        leaky_has_it = measured.reset == "delayed" and detach or measured.reset == "hard" and measured.v_reset == 0
        if leaky_has_it and not decay_input:
            forms.append(form._replace(exact=True))
        if measured.reset != "delayed":
            forms.append(form)
    if not forms:
        raise _Cannot(2, "its reset in the next step has a gradient, and the reset of leaky does not")
    return forms


# --- the check on fresh inputs ----------------------------------------------------------------------------------------------


def _gradients(f: Callable[[Tensor], Tensor], x: Tensor, g: Tensor, parameters):
    """Return (spikes, gradient of x, gradients of the parameters), None for a parameter without a gradient."""
    x = x.detach().clone().requires_grad_()
    out = f(x)
    if not out.requires_grad:
        raise _Cannot(3, "its spikes have no gradient in every mode")
    return out.detach(), torch.autograd.grad(out, [x, *parameters], g.to(out.dtype), allow_unused=True)


def _check(probe: _Probe, form: _Form, x: Tensor, g: Tensor) -> _Form:
    """Compare the spikes and gradients of the neuron and the form on data x. Return the form, with its unused parameters."""
    names = [name for name, _ in probe.twin.named_parameters(recurse=False)]
    parameters = [p for _, p in probe.twin.named_parameters(recurse=False)]
    wanted, own = _gradients(probe.call, x, g, [p for p in parameters if p.requires_grad])
    learned = [name for name, p in zip(names, parameters) if p.requires_grad]
    form = form._replace(unused=tuple(name for name, d in zip(learned, own[1:]) if d is None))

    def fused(x):
        return probe.layout.back(_run_form(form, probe.layout.time_first(x), dict(zip(names, parameters))))

    found, ours = _gradients(fused, x, g, [p for p in parameters if p.requires_grad])
    if not torch.equal(found != 0, wanted != 0) or not torch.allclose(found, wanted.to(found.dtype), rtol=1e-6):
        share = ((found != 0) != (wanted != 0)).double().mean().item()
        raise _Cannot(3, f"it computes something else than a LIF neuron: {share:.0%} of the spikes differ on random inputs")
    for a, b in zip(ours, own):
        if (a is None) != (b is None) or a is not None and (a - b).abs().max() > 1e-9 * (1 + b.abs().max()):
            raise _Cannot(3, "its gradient is not the gradient of a LIF neuron with its surrogate")
    return form


def _fresh(probe: _Probe, steps: int, scale: float, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return random data, and gradients that are exact in float32."""
    axes = probe.rank - 1 if probe.layout.kind == "axis" else probe.rank
    shape = (steps, *(2, 3, 2, 3, 2)[:axes])
    x = scale * (torch.randn(*shape, generator=draw, dtype=torch.float64) + 0.3)
    g = torch.randint(-16, 17, shape, generator=draw).double() / 16
    return tuple(probe.layout.back(t).contiguous().to(probe.device) for t in (x, g))


def _verify(probe: _Probe, form: _Form, unit: float, many: bool) -> _Form:
    """Check a form on fresh inputs: several lengths, sizes of the input, modes, and values of the parameters.

    ``unit``: the smallest first input that fires.
    """
    draw = torch.Generator().manual_seed(1)
    lengths = [probe.layout.steps] if probe.layout.steps else [1, 4, 20] if many else [5]
    own = [p.detach().clone() for p in probe.twin.parameters()]
    for training in (True, False) if many else (True,):
        probe.twin.train(training)
        for T in lengths if training else lengths[-1:]:
            for scale in (0.5, 1.5, 6.0) if many and training else (1.5,):
                form = _check(probe, form, *_fresh(probe, T, scale * unit, draw))
    probe.twin.train()
    for factor in (0.95, 1.02) if own and many else ():
        with torch.no_grad():
            for p, value in zip(probe.twin.parameters(), own):
                p.copy_(value * factor + (0 if value.item() else factor - 1))
        _check(probe, form, *_fresh(probe, lengths[-1], unit, draw))
    with torch.no_grad():
        for p, value in zip(probe.twin.parameters(), own):
            p.copy_(value)
    return form


def _differing_spikes(probe: _Probe, form: _Form, measured: _Measured, single: nn.Module) -> int:
    """Count the spikes that differ in float32 where the membrane equals the threshold, or nearly.

    It tells the order of the operations, and whether the neuron fires at the threshold.
    """
    draw = torch.Generator().manual_seed(2)
    unit = _rounded(measured.high, [])
    steps = probe.layout.steps or 2
    rows = unit / 16 * torch.randint(-16, 48, (steps, 1024), generator=draw).double()
    first = unit * torch.rand(512, generator=draw, dtype=torch.float64).float().double()  # does not fire
    rounding = unit * 2.0**-24 * torch.randint(-4, 5, (512,), generator=draw)
    rows[0, :512] = first
    rows[1, :512] = measured.threshold - measured.decay * (first + measured.decay * measured.start) + rounding
    rows[0, -8:] = unit
    x = probe.data(rows.to(probe.device)).float()
    with torch.no_grad():
        parameters = dict(single.named_parameters(recurse=False))
        ours = probe.layout.back(_run_form(form, probe.layout.time_first(x), parameters))
        return int(((ours != 0) != (single(x) != 0)).sum())


def _dtypes(probe: _Probe, module: nn.Module) -> tuple[tuple[torch.dtype, torch.dtype], ...]:
    """Return the dtypes of data that the neuron takes, and the dtypes of its spikes."""
    found = []
    for dtype in DATA_DTYPES:
        twin = copy.deepcopy(module).to(probe.device)
        try:
            with torch.no_grad():
                found.append((dtype, twin(probe.data(torch.ones(probe.steps, 2, device=probe.device)).to(dtype)).dtype))
        except Exception:  # code that is not ours may raise anything
            continue
    return tuple(found)


def _check_stateless(probe: _Probe):
    rows = probe.rows((1.0,), [0.0, 1.0, 2.0])
    for training in (True, False):
        probe.twin.train(training)
        before = _snapshot(probe.twin)
        outs = [probe.run(rows).detach() for _ in range(2)]
        after = _snapshot(probe.twin)
        changed = sorted({str(key[1]) for key in before.keys() | after.keys() if before.get(key) != after.get(key)})
        if changed or not torch.equal(*outs):
            raise _Cannot(3, f"it keeps state between calls: {', '.join(changed) or 'two equal calls differ'}", final=True)
    probe.twin.train()


def _layouts(known: list) -> Iterator[_Layout]:
    for axis in (0, 1, -1):
        yield _Layout("axis", axis, None)
    for steps in [n for n in dict.fromkeys(known) if type(n) is int and 2 <= n <= 128][:8]:
        for axis in (0, 1, -1):
            yield _Layout("axis", axis, steps)
        yield _Layout("fold", 0, steps)
        yield _Layout("fold batch", 0, steps)


def _best_form(probe: _Probe, measured: _Measured, known: list[float], single: nn.Module) -> _Form:
    """Return the form of the neuron that passes the check and whose operations have the same order, or nearly."""
    forms = _forms(probe, measured, known)
    if len(forms) > 1:
        forms.sort(key=lambda form: _differing_spikes(probe, form, measured, single))
    for form in forms[:-1]:
        try:
            return _verify(probe, form, measured.high, True)
        except _Cannot:
            continue
    return _verify(probe, forms[-1], measured.high, True)


def _fit_on(module: nn.Module, device: str, watched: list) -> tuple[_Form, _Layout, tuple[int, ...], tuple]:
    twin = copy.deepcopy(module).to(device).double().train()
    single = copy.deepcopy(module).to(device).float()
    known = [float(value) for value in watched if type(value) in (int, float) and math.isfinite(value)]
    known += [p.item() for p in twin.parameters()]
    best = _Cannot(0, "its forward does not run on trial inputs")
    for layout in _layouts(watched):
        for rank in (4, 3, 5, 2):
            probe = _Probe(twin, layout, rank, device)
            try:
                measured = _measure(probe)
                _check_stateless(probe)
                form = _best_form(probe, measured, known, single)
            except _Cannot as reason:
                if reason.final:
                    raise
                twin.train()
                best = max(best, reason, key=lambda r: r.progress)
                continue
            ranks = [rank]
            for other in {2, 3, 4, 5} - {rank}:
                try:
                    _verify(_Probe(twin, layout, other, device), form, measured.high, False)
                    ranks.append(other)
                except _Cannot:
                    continue
            return form, layout, tuple(sorted(ranks)), _dtypes(probe, module)
    raise best


# --- which modules are tried ------------------------------------------------------------------------------------------------


_NAME = re.compile(r"(?i:spike|spiking|mem_?update)")


def _is_named(module: nn.Module) -> bool:
    return named_like_a_neuron(module) is not None or any(_NAME.search(name) for _, name in class_names(module))


def _unfit(module: nn.Module) -> str | None:
    """Return why a module cannot be a neuron that the kernels serve, before it is run, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by TorchScript, which keeps its code: accelerate the model from which it was made"
    if "forward" in vars(module):
        return "its forward is replaced on the instance, by hooks perhaps: accelerate the model before"
    if any(has_hooks(part) for part in module.modules()):
        return "it, or a module in it, has hooks that a trial would call"
    if any(
        next(child.parameters(), None) is not None or next(child.buffers(), None) is not None for child in module.children()
    ):
        return "it contains modules with parameters or buffers"
    if module._buffers:
        return f"it has buffers ({', '.join(module._buffers)}), and the kernels take numbers and parameters"
    for name, p in module.named_parameters(recurse=False):
        if p.numel() != 1:
            return f"its parameter {name} has shape {tuple(p.shape)}, and only parameters with one value are taken"
    tensors = [name for part in module.modules() for name, value in vars(part).items() if isinstance(value, Tensor)]
    if tensors:
        return f"its attribute {tensors[0]} is a tensor, and may be a state: make it a number or a parameter"
    return None


def _takes_one_tensor(module: nn.Module) -> bool:
    code = getattr(type(module).forward, "__code__", None)
    if code is None:
        return False
    defaults = len(type(module).forward.__defaults__ or ())
    return code.co_argcount - defaults == 2 or code.co_argcount == 2


def _candidate(module: nn.Module) -> bool:
    """True if a module may be a neuron: it is the project's own class, takes one tensor, and has no big parts."""
    names = class_names(module)
    libraries = ("spikingjelly", "snntorch", "norse", "transformers", "timm")
    return bool(names) and all(path.partition(".")[0] not in libraries for path, _ in names)


def _fit(module: nn.Module) -> _Fit | str | None:
    """Return what was read from a neuron, the reason to leave it, or None if it does not look like a neuron."""
    if not _candidate(module):
        return None
    named = _is_named(module)
    reason = _unfit(module)
    if reason is None and not _takes_one_tensor(module):
        reason = "its forward does not take one tensor"
    if reason is not None:
        return reason if named and not reason.startswith("it contains") else None
    functions = _functions(module)
    if not named and not _has_loop(functions):
        return None
    attributes, constants = _attributes(module), _constants(functions)
    watched = [w.value for w in (*attributes, *constants)]
    watched += [c for f in functions for code in _codes(f.__code__) for c in code.co_consts if type(c) in (int, float)]
    best: _Cannot | None = None
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):  # some files move data to the GPU themselves
        try:
            with _isolated():
                return _Fit(*_fit_on(module, device, watched), attributes, constants)
        except _Cannot as found:
            best = found if best is None or found.progress >= best.progress else best
            if found.progress:
                break
        except Exception as error:  # deepcopy and code that is not ours may raise anything
            best = best or _Cannot(0, f"it cannot be copied and run ({type(error).__name__}: {error})")
    assert best is not None
    return str(best) if named or best.progress > 1 else None


def _key(module: nn.Module):
    """Return a key that equal neurons share, or None: a neuron with learned parameters or unknown attributes has none."""
    if next(module.parameters(), None) is not None or next(module.children(), None) is not None:
        return None
    items = {name: value for name, value in vars(module).items() if name not in _BARE}
    if not all(isinstance(value, _SIMPLE) or callable(value) for value in items.values()):
        return None
    try:
        return type(module), module.training, frozenset(items.items())
    except TypeError:
        return None


def accelerate(model: nn.Module) -> Report:
    r"""Run LIF neurons that a project wrote itself on the fused kernels, in place, on CPUs and GPUs.

    The function tries modules of the project's own classes that take one tensor and loop over time steps, or have the name of a
    neuron. It runs a float64 copy of each on chosen inputs. From the spikes and their gradients it reads::

        h[t] = decay * v[t-1] + x[t]       or    v[t-1] + (1 - decay) * (x[t] - v[t-1])
        s[t] = 1 where h[t] > threshold    or    h[t] >= threshold
        v[t] = v_reset where s[t]          or    h[t] - s[t] * threshold

    It also reads the time axis (the first, the second, the last, or T folded into the batch), the surrogate gradient (name and
    alpha in ``sdit_kernels.SURROGATES``), the initial membrane potential, the size of a spike, and the use of learned scalars.
    It replaces a module only if the spikes are equal and the gradients agree to 1e-9 on fresh float64 inputs: several lengths,
    numbers of axes and scales of the input, in training and evaluation mode.

    Each neuron stays the same object with the same attributes, parameters and state_dict. Its class becomes a subclass of its
    class. The fused neuron compares the attributes and the globals that its code reads with their values at ``accelerate``.
    After a change it runs its own code, with a warning, until you call ``accelerate`` again. It also runs its own code, with a
    warning, on data that were not checked (another number of axes, integers), and while one of SpikingJelly's counters is
    active.

    Args:
        model: any module; the function searches all of it. Call it before you compile or wrap the model. A second call changes
            only neurons whose attributes changed.

    Returns:
        A report that you can print. ``replaced`` holds pairs (name, class). ``left`` holds triples (name, class, reason) of the
        modules that look like neurons and did not change.

    Raises:
        TypeError: model is not a module.

    Example:
        >>> import torch
        >>> from sdit_kernels.compat import handwritten
        >>> class Spike(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, z):
        ...         ctx.save_for_backward(z)
        ...         return (z > 0).to(z.dtype)
        ...     @staticmethod
        ...     def backward(ctx, g):
        ...         return g * (1 - ctx.saved_tensors[0].abs()).clamp(min=0)
        >>> class LIFSpike(torch.nn.Module):
        ...     def forward(self, x):  # (B, T, ...)
        ...         mem, spikes = 0, []
        ...         for t in range(x.shape[1]):
        ...             mem = 0.5 * mem + x[:, t]
        ...             spikes.append(Spike.apply(mem - 1))
        ...             mem = (1 - spikes[-1]) * mem
        ...         return torch.stack(spikes, 1)
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), LIFSpike())
        >>> print(handwritten.accelerate(model))
        hand-written neurons: 1 replaced, 0 left as they were
          1  LIFSpike: fused
        >>> model[1]
        LIFSpike(decay 0.5, threshold 1, hard reset to 0, piecewise_quadratic 1, fused by sdit_kernels)
        >>> handwritten.restore(model).replaced
        (('1', 'LIFSpike'),)
    """
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if methods_of(module) is _HandWritten and _changed(module):
            restore(module)
    fits: dict[Any, _Fit | str | None] = {}

    def choose(module):
        if methods_of(module) is not None:
            return None
        key = _key(module)
        if key is None or key not in fits:
            found = _fit(module)
            if key is not None:
                fits[key] = found
        else:
            found = fits[key]
        if not isinstance(found, _Fit):
            return found
        module.__dict__["_handwritten_fit"] = found
        return _HandWritten

    def suspect(module):
        return _unfit(module) if _candidate(module) and named_like_a_neuron(module) else None

    return swap(_LIBRARY, model, choose, suspect)


def _changed(module) -> bool:
    fit = module._handwritten_fit
    return bool(_changed_attribute(module, fit.attributes) or _changed_constant(fit.constants))


def restore(model: nn.Module) -> Report:
    """Undo :func:`accelerate`: the neurons run their own code again.

    Args:
        model: the model that ``accelerate`` changed, or a part, copy or unpickled copy of it. The function changes it in place.

    Returns:
        A report like the report of ``accelerate``. ``replaced`` holds the neurons that run their own code again.

    Raises:
        TypeError: model is not a module.

    Example:
        >>> import torch
        >>> from sdit_kernels.compat.handwritten import restore
        >>> restore(torch.nn.Linear(1, 1)).replaced
        ()
    """
    report = swap_back(_LIBRARY, model, _HandWritten)
    for module in model.modules():
        if methods_of(module) is not _HandWritten:
            vars(module).pop("_handwritten_fit", None)
    return report
