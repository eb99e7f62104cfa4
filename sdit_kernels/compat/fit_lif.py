"""Read the equation of a LIF neuron from the spikes and gradients of a module that runs it, and check it.

``fit_lif`` runs a float64 copy of the module on chosen inputs. The smallest input that fires, after inputs that did not fire
and after inputs that did, gives the decay, the threshold and the reset to the last bit. Gradients at chosen distances from the
threshold give the surrogate gradient. Random inputs then compare the module with the kernels' reference, which has the found
equation.
"""

import copy
import math
import random
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._torch import assume_constant_result
from ..dispatch import backend
from ..dtypes import DATA_DTYPES, state_dtype
from ..ops.leaky import leaky
from ..ops.lif import lif
from ..pending import without_values
from ..surrogate import SURROGATES

SIMPLE = (bool, int, float, str, type(None))  # attributes whose values can be compared


def is_foreign(module: str) -> bool:
    """True if a Python module belongs to a project, not to PyTorch or another common library."""
    return module.partition(".")[0] not in ("torch", "builtins", "numpy", "math", "random", "einops", "functools", "typing")


# --- the equation -----------------------------------------------------------------------------------------------------------


DECAYS: dict[str, Callable[[Tensor], Tensor]] = {  # how published neurons compute the decay from a learned parameter
    "p": lambda p: p,
    "sigmoid(p)": torch.sigmoid,
    "1 - sigmoid(p)": lambda p: torch.sigmoid(-p),
    "1 - 1/p": lambda p: 1 - 1 / p,
    "exp(-p)": lambda p: torch.exp(-p),
    "exp(-1/p)": lambda p: torch.exp(-1 / p),
}


class Form(NamedTuple):
    """The equation of a neuron, in the units of its threshold."""

    decay: float | tuple[str, str]  # a number, or (name of a parameter, key of DECAYS)
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

    def run(self, x: Tensor, parameters) -> Tensor:
        """Return the spikes of the neuron for x, (T, ...)."""
        return _run(self, x, parameters)


class Layout(NamedTuple):
    """Where the time steps are in the data."""

    kind: str  # "axis"; "fold": the first axis is T * B; "fold batch": the first axis is B * T; "none": without a time axis
    axis: int
    steps: int | None  # None: any number

    def time_first(self, x: Tensor) -> Tensor:
        if self.kind == "none":
            return x.unsqueeze(0)
        if self.kind == "axis":
            return x.movedim(self.axis, 0)
        return x.unflatten(0, (self.steps, -1)) if self.kind == "fold" else x.unflatten(0, (-1, self.steps)).movedim(1, 0)

    def back(self, x: Tensor) -> Tensor:
        """Undo ``time_first``."""
        if self.kind == "none":
            return x.squeeze(0)
        if self.kind == "axis":
            return x.movedim(0, self.axis)
        return (x if self.kind == "fold" else x.movedim(0, 1)).flatten(0, 1)

    def fits(self, x: Tensor) -> bool:
        if self.steps is None:
            return True
        return x.shape[self.axis] == self.steps if self.kind == "axis" else x.shape[0] % self.steps == 0


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


def _values(form: Form, parameters, dtype: torch.dtype):
    """Return (decay, threshold): numbers, or scalar tensors of the parameters."""

    def scalar(name):
        p = parameters[name].to(dtype).reshape(())
        return p.detach() if name in form.unused else p

    decay = form.decay if isinstance(form.decay, float) else DECAYS[form.decay[1]](scalar(form.decay[0]))
    return decay, form.threshold if isinstance(form.threshold, float) else scalar(form.threshold)


def _run(form: Form, x: Tensor, parameters) -> Tensor:
    dtype = state_dtype(x.dtype)
    decay, threshold = _values(form, parameters, dtype)
    rests = form.start == 0 and form.v_reset == 0  # without v, the ops start at v_reset
    v = None if rests else without_values(x).new_ones(x.shape[1:], dtype=dtype) * (form.start * threshold)
    # lif compares h >= threshold and leaky h > threshold. h > a is h >= (the next number after a), in the dtype of h.
    nudge = int(form.strict) if not form.exact else int(form.strict) - 1
    fires_at = threshold
    if nudge:
        step = _next_threshold if isinstance(threshold, Tensor) else _next_number
        fires_at = step(threshold, nudge, dtype)
    if form.exact:
        reset = "zero" if form.reset == "hard" else "subtract"
        # A reset in the next step has no gradient in leaky. If nothing but spikes is returned, it equals a detached reset.
        s = leaky(
            x, v, beta=decay, v_threshold=fires_at, reset=reset, reset_delay=form.detach, surrogate=form.surrogate,
            alpha=form.alpha,
        )  # fmt: skip
    else:
        tau = math.inf if isinstance(decay, float) and decay == 1 else 1 / (1 - decay)
        v_reset = None if form.reset == "soft" else form.v_reset
        s = lif(
            x, v, tau=tau, v_threshold=fires_at, v_reset=v_reset, decay_input=form.decay_input, detach_reset=form.detach,
            surrogate=form.surrogate, alpha=form.alpha,
        )  # fmt: skip
    if form.scale != 1:
        s = s + (form.scale - 1) * (s - s.detach())  # only the gradient changes
    if form.spike is None:
        return s * threshold if isinstance(threshold, float) else s * threshold.to(s.dtype)
    return s if form.spike == 1 else s * form.spike


# --- running a copy of the neuron ---------------------------------------------------------------------------------------------


NOT_BINARY = "its output is not binary: it has values other than 0 and one size of spike"


class Cannot(Exception):
    """The reason why a module is left.

    ``progress``: how far the fit came; the report names the reason of the best attempt. 0: the module does not run. 1: it does
    not spike. 2: it is not a neuron along this axis. 3: it is another neuron. 4: its surrogate or the final check fails.
    ``final``: no other attempt can succeed.
    """

    def __init__(self, progress: int, reason: str, final: bool = False):
        super().__init__(reason)
        self.progress, self.final = progress, final


def _random_states(device: str) -> tuple:
    numpy: Any = np.random.get_state()
    torches = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if device == "cuda" else [])
    return random.getstate(), (numpy[1].tobytes(), numpy[2]), [state.numpy().tobytes() for state in torches]


@contextmanager
def isolated(device: str):
    """Undo the draws of random numbers, hide the warnings, and hide the modes of the caller from the neuron."""
    python, numpy = random.getstate(), np.random.get_state()
    gpus = [torch.cuda.current_device()] if device == "cuda" else []
    try:
        with (
            torch.random.fork_rng(devices=gpus), torch.inference_mode(False), torch.enable_grad(), backend("reference"),
            torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False), warnings.catch_warnings(),
        ):  # fmt: skip
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


SECONDS = 10  # for the trial runs of one module; they take 0.1 to 0.5 s of a common neuron


class _InFloat64(TorchFunctionMode):
    """Compute in float64 where the code of a neuron says float32, for example ``(z > 0).float()``."""

    _made = {Tensor.float, Tensor.to, Tensor.type, torch.zeros, torch.ones, torch.empty, torch.full, torch.tensor}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = func in self._made and isinstance(out, Tensor) and out.dtype == torch.float32
        return out.double() if made else out


def _snapshot(module: nn.Module) -> dict:
    """Return what a call of a module could leave behind: attributes and class attributes, containers by their length."""
    found: dict[Any, Any] = {}
    for path, part in module.named_modules():
        spaces = [(path, {**vars(part), **part._parameters})]
        spaces += [(cls, dict(vars(cls))) for cls in type(part).__mro__ if cls is not object and is_foreign(cls.__module__)]
        for where, space in spaces:
            for name, value in space.items():
                if isinstance(value, (list, dict, set)):
                    value = (id(value), len(value))
                elif isinstance(value, Tensor):
                    value = (id(value), value._version)
                elif not isinstance(value, SIMPLE):
                    value = id(value)
                found[where, name] = value
    return found


def copy_of(module: nn.Module) -> nn.Module:
    """Copy a module. It shares instances of autograd functions, which have no state and which PyTorch cannot copy."""
    values = [value for part in module.modules() for value in vars(part).values()]
    return copy.deepcopy(module, {id(value): value for value in values if isinstance(value, torch.autograd.Function)})


class Probe:
    """A float64 copy of a module that runs on chosen inputs with one layout and one number of axes."""

    def __init__(self, twin: nn.Module, layout: Layout, rank: int, device: str, until: float):
        self.twin, self.layout, self.rank, self.device, self.until = twin, layout, rank, device, until
        self.steps = layout.steps or 2
        self.names = [name for name, _ in twin.named_parameters(recurse=False)]
        self.parameters = [p for _, p in twin.named_parameters(recurse=False)]

    def call(self, x: Tensor) -> Tensor:
        """Run the copy on data x."""
        if time.monotonic() > self.until:
            raise Cannot(1, f"its trial runs take more than {SECONDS} s", final=True)
        before = _random_states(self.device)
        try:
            with _InFloat64():
                out: Any = self.twin(x)
        except Exception as error:  # code that is not ours may raise anything
            raise Cannot(0, f"its forward does not run on a trial input ({type(error).__name__}: {error})") from None
        if _random_states(self.device) != before:
            raise Cannot(3, "it draws random numbers", final=True)
        if not isinstance(out, Tensor) or out.shape != x.shape:
            raise Cannot(0, "its output is not one tensor with the shape of its input")
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
            raise Cannot(3, "it changes its input in place", final=True)
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
            raise Cannot(4, "its spikes have no gradient", final=True)
        (gradient,) = torch.autograd.grad(out.sum(), rows)
        return gradient[of]


_POWERS = [2.0**k for k in range(-24, 42)]
_WIDE_GRID = [-p for p in reversed(_POWERS)] + [0.0] + _POWERS


def first_input(fires: Callable[[list[float]], list[bool]], what: str) -> tuple[float, float]:
    """Return adjacent numbers (low, high): the first does not fire, the second does. ``fires`` must be a step function."""
    grid = _WIDE_GRID
    for _ in range(64):
        fired = fires(grid)
        if not fired[-1] or fired[0]:
            raise Cannot(2, f"{what} does not depend on its input as in a LIF neuron")
        first = fired.index(True)
        if not all(fired[first:]):
            raise Cannot(2, f"{what} is not a step function of its input")
        low, high = grid[first - 1], grid[first]
        if math.nextafter(low, math.inf) == high:
            break
        grid = sorted({low, high, *(low + (high - low) * (i / 64) for i in range(1, 64))})
        grid = [value for value in grid if low <= value <= high]
        if len(grid) == 2:
            break
    return low, high


# --- the fit ----------------------------------------------------------------------------------------------------------------


def near(a: float, b: float, tolerance=1e-9) -> bool:
    return abs(a - b) <= tolerance * max(abs(a), abs(b), 1e-9)


def rounded(value: float, known: list[float]) -> float:
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
    high: float  # the smallest first input that fires
    spike: float


def first_look(probe: Probe, binary: bool = True):
    """Check on random inputs that a call leaves nothing behind, that the output is binary, and that neurons are independent.

    ``binary``: False to allow other outputs.
    """
    draw = torch.Generator().manual_seed(0)
    sizes = 2.0 ** (torch.arange(0, 64, 8, dtype=torch.int64, device="cpu") / 4 - 5)
    rows = (torch.randn(probe.steps, 8, generator=draw, dtype=torch.float64, device="cpu") * sizes).to(probe.device)
    rows = rows.index_fill(1, torch.tensor([7], device=probe.device, dtype=torch.int64), 1e6)  # a neuron that fires
    for training in (False, True):
        probe.twin.train(training)
        before = _snapshot(probe.twin)
        first = probe.run(rows).detach()
        after = _snapshot(probe.twin)
        values = first.unique().tolist()
        if binary and (len(values) != 2 or 0 not in values):
            raise Cannot(1, NOT_BINARY)
        changed = sorted({str(key[1]) for key in before.keys() | after.keys() if before.get(key) != after.get(key)})
        if changed or not torch.equal(probe.run(rows).detach(), first):
            raise Cannot(3, f"it keeps state between calls: {', '.join(changed) or 'two equal calls differ'}", final=True)
    # If the time axis is another one, the membrane potential of a neuron reaches other neurons. These values make it large.
    rows[:, ::2] = -(2.0**20)
    if not torch.equal(probe.run(rows).detach()[:, 1::2], first[:, 1::2]):
        raise Cannot(2, "its neurons depend on each other")


def _measure(probe: Probe) -> _Measured:
    """Read decay, threshold, reset and initial membrane from the smallest inputs that fire."""
    if probe.steps < 2:
        raise Cannot(3, "it runs one time step, which does not show its decay")

    def first(*history):
        where = "its first spike" if not history else "its second spike"
        return first_input(lambda x: (probe.run(probe.rows(history, x))[len(history)].detach() != 0).tolist(), where)

    _, high = first()
    if high <= 0:
        raise Cannot(3, "it fires without input")
    spike = probe.run(probe.rows((), [high]))[0].item()
    far = -(2.0**20)
    second = first(0.0)[1]
    decay = (first(far)[1] - second) / -far
    decay = 1.0 if near(decay, 1, 1e-12) else decay
    if abs(decay) <= 1e-6:
        raise Cannot(2, "it keeps no membrane potential from step to step")
    if not 0 < decay <= 1:
        raise Cannot(3, f"its decay is {decay:g}, and the kernels take 0 to 1")
    drift = second - high  # decay * start * (1 - decay); a constant input other than zero would show as drift at decay = 1
    drift = 0.0 if abs(drift) <= 1e-9 * high else drift
    if decay == 1 and drift:
        raise Cannot(3, "a constant current flows into it")
    start = 0.0 if decay == 1 else drift / (decay * (1 - decay))
    threshold = high + decay * start
    charged = [4 * high, 8 * high]
    after = [(threshold - first(x)[1]) / decay for x in charged]  # membrane after a spike
    removed = [x + decay * start - v for x, v in zip(charged, after)]
    if near(after[0], after[1]) or max(map(abs, after)) <= 1e-9 * high:
        v_reset = sum(after) / 2
        v_reset = 0.0 if abs(v_reset) <= 1e-9 * high else v_reset
        if v_reset and decay != 1:
            raise Cannot(3, f"it resets to {v_reset:g}, and leaks towards 0; the kernels take one value for both")
        return _Measured(decay, threshold, start, "hard", v_reset, high, spike)
    if not near(removed[0], removed[1]):
        raise Cannot(3, "its reset neither sets the membrane potential to a value nor subtracts one")
    if decay == 1:  # the initial membrane potential and the threshold show only as a difference
        start, threshold = removed[0] - high, removed[0]
        start = 0.0 if abs(start) <= 1e-9 * high else start
    if near(removed[0], threshold):
        return _Measured(decay, threshold, start, "soft", 0.0, high, spike)
    if near(removed[0] * decay, threshold):
        return _Measured(decay, threshold, start, "delayed", 0.0, high, spike)
    raise Cannot(3, f"its reset subtracts {removed[0]:g}, and its threshold is {threshold:g}")


class _Slope(NamedTuple):
    """The surrogate gradient at the threshold, and the distance at which it is half as large."""

    peak: float
    width: float
    inputs: Tensor  # distances from the threshold, and the surrogate gradient there
    values: Tensor


def _measure_surrogate(probe: Probe, measured: _Measured, centre: float) -> _Slope:
    def slope(distances):
        return probe.slopes((), [centre + z for z in distances], 0) / measured.spike

    (peak,) = slope([0.0]).tolist()
    if not peak > 0:
        raise Cannot(4, "its surrogate gradient is zero at the threshold", final=True)
    try:
        _, width = first_input(lambda z: [g <= peak / 2 for g in slope([abs(a) if a > 0 else 0.0 for a in z]).tolist()], "")
    except Cannot:
        raise Cannot(4, "its surrogate gradient does not fall with the distance from the threshold", final=True) from None
    inputs = width * torch.tensor(
        [s * z for z in (0.1, 0.3, 0.7, 0.95, 1.05, 1.5, 1.9, 2.1, 3.0, 7.0) for s in (1, -1)],
        dtype=torch.float64,
        device="cpu",
    )
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
        alpha = rounded(alpha, [*known, *inverse])
        scale = slope.peak / gain / surrogate.derivative(torch.zeros(1, dtype=torch.float64, device="cpu"), alpha).item()
        scale = 1.0 if near(scale, 1) else rounded(scale, known)
        wanted = scale * surrogate.derivative(z, alpha) * gain
        if (wanted - slope.values).abs().max() <= 1e-7 * slope.peak:
            found.append((name, alpha, scale))
    if not found:
        sided = (slope.values[::2] - slope.values[1::2]).abs().max() > 1e-7 * slope.peak
        why = "is not symmetric about the threshold" if sided else "has none of the formulas in sdit_kernels.SURROGATES"
        raise Cannot(4, f"its surrogate gradient {why}", final=True)
    return min(found, key=lambda match: match[2] != 1)


def _is_detached(probe: Probe, measured: _Measured, centre: float, slope: _Slope) -> bool:
    """True if no gradient flows through the reset: compare d s[1] / d x[0] of a neuron that fires at step 0."""
    d, h = measured.decay, measured.threshold + slope.width / 4
    after = measured.v_reset if measured.reset == "hard" else h - measured.threshold / (d if measured.reset == "delayed" else 1)
    x = [centre + slope.width / 4, measured.threshold - d * after + slope.width / 4]
    (total,) = probe.slopes(x[:1], x[1:], 0).tolist()
    (last,) = probe.slopes(x[:1], x[1:], 1).tolist()
    if last == 0:
        raise Cannot(4, "its surrogate gradient depends on more than the membrane potential", final=True)
    return near(total / (last * d) + 1, 1 if measured.reset == "hard" else 2, 1e-6)


class _Roles(NamedTuple):
    decay: float | tuple[str, str]
    thresholds: dict[bool, float | str]  # by decay_input; without the units in which it is neither
    spike_is_threshold: bool


def _roles(probe: Probe, measured: _Measured, known: list[float]) -> _Roles:
    """Find what each learned parameter is: the decay, the threshold, or both. Measure the neuron with other values of it."""
    decay: float | tuple[str, str] = rounded(measured.decay, [*known, *(1 - 1 / a for a in known if a)])
    thresholds: dict[bool, float | str] = {}
    for decay_input in (False, True):
        gain = 1 - measured.decay if decay_input else 1.0
        if gain:
            thresholds[decay_input] = rounded(measured.threshold * gain, known)
    scaled = False
    for name, p in zip(probe.names, probe.parameters):
        own = p.detach().clone()
        trials = [(own.item(), measured)]
        for sign in (1, -1):
            with torch.no_grad():
                p.copy_(own + sign * (own.abs() / 16 if own.item() else 1 / 16))
            trials.append((p.item(), _measure(probe)))
        with torch.no_grad():
            p.copy_(own)
        used = False
        if any(not near(m.decay, measured.decay) for _, m in trials):
            used = True
            values = [torch.tensor(a, dtype=torch.float64, device="cpu") for a, _ in trials]
            decays = [m.decay for _, m in trials]
            maps = (key for key, f in DECAYS.items() if all(near(f(a).item(), d) for a, d in zip(values, decays)))
            key = next(maps, None)
            if key is None:
                raise Cannot(4, f"its decay is an unknown function of its parameter {name}", final=True)
            decay = (name, key)
        for decay_input in [*thresholds]:
            found = [m.threshold * (1 - m.decay if decay_input else 1) for _, m in trials]
            if any(not near(f, found[0]) for f in found):
                if all(near(f, a) for f, (a, _) in zip(found, trials)):
                    thresholds[decay_input], used = name, True
                else:
                    del thresholds[decay_input]
        if any(not near(m.spike, measured.spike) for _, m in trials):
            scaled = True
        if not used and thresholds:
            raise Cannot(4, f"its parameter {name} changes neither its decay nor its threshold", final=True)
        if not thresholds:
            raise Cannot(4, f"its threshold is an unknown function of its parameter {name}", final=True)
    return _Roles(decay, thresholds, scaled)


def _forms(probe: Probe, measured: _Measured, known: list[float]) -> list[Form]:
    """Return the forms that this neuron may have. They differ in the order of the operations."""
    roles = _roles(probe, measured, known)
    # Two adjacent numbers surround the step. The threshold is the one that is a constant of the neuron, or short.
    centre = rounded(measured.high, [*known, *(a / 2 for a in known)])  # some neurons start at half the threshold
    slope = _measure_surrogate(probe, measured, centre)
    detach = _is_detached(probe, measured, centre, slope)
    strict = not probe.run(probe.rows((), [centre]))[0].item()
    forms = []
    for decay_input, threshold in roles.thresholds.items():
        gain = 1 - measured.decay if decay_input else 1.0
        surrogate, alpha, scale = _match_surrogate(slope, gain, known)
        if scale != 1 and not detach:
            why = f"its surrogate gradient is {scale:g} times the {surrogate} of sdit_kernels.SURROGATES"
            raise Cannot(4, f"{why}, and its reset has a gradient", final=True)
        form = Form(
            roles.decay, threshold, decay_input, strict, measured.reset, measured.v_reset * gain,
            rounded(measured.start / measured.threshold, known), detach, surrogate, alpha, scale,
            None if roles.spike_is_threshold else measured.spike, (), False,
        )  # fmt: skip
        leaky_has_it = measured.reset == "delayed" and detach or measured.reset == "hard" and measured.v_reset == 0
        if leaky_has_it and not decay_input:
            forms.append(form._replace(exact=True))
        if measured.reset != "delayed":
            forms.append(form)
    if isinstance(roles.decay, float) and any(isinstance(form.threshold, str) for form in forms):
        forms = [form for form in forms if not form.exact] or forms  # the hard reset of leaky needs a positive threshold
    if not forms:
        raise Cannot(4, "its reset in the next step has a gradient, and the reset of leaky does not", final=True)
    return forms


# --- the check on fresh inputs ----------------------------------------------------------------------------------------------


def _gradients(f: Callable[[Tensor], Tensor], x: Tensor, g: Tensor, parameters):
    """Return (spikes, gradient of x, gradients of the parameters), None for a parameter without a gradient."""
    x = x.detach().clone().requires_grad_()
    out = f(x)
    if not out.requires_grad:
        raise Cannot(4, "its spikes have no gradient in every mode")
    return out.detach(), torch.autograd.grad(out, [x, *parameters], g.to(out.dtype), allow_unused=True)


def _check(probe: Probe, form: Any, x: Tensor, g: Tensor) -> Any:
    """Compare the spikes and gradients of the neuron and the form on data x. Return the form, with its unused parameters."""
    wanted, own = _gradients(probe.call, x, g, probe.parameters)
    form = form._replace(unused=tuple(name for name, d in zip(probe.names, own[1:]) if d is None))

    def fused(x):
        return probe.layout.back(form.run(probe.layout.time_first(x), dict(zip(probe.names, probe.parameters))))

    found, ours = _gradients(fused, x, g, probe.parameters)
    if not torch.equal(found != 0, wanted != 0) or not torch.allclose(found, wanted.to(found.dtype), rtol=1e-6):
        share = ((found != 0) != (wanted != 0)).double().mean().item()
        raise Cannot(4, f"it computes something else than a LIF neuron: {share:.0%} of the spikes differ on random inputs")
    for a, b in zip(ours, own):
        if (a is None) != (b is None) or a is not None and (a - b).abs().max() > 1e-9 * (1 + b.abs().max()):
            raise Cannot(4, "its gradient is not the gradient of a LIF neuron with its surrogate")
    return form


def _fresh(probe: Probe, steps: int, scale: float, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return random data, and gradients that are exact in float32."""
    axes = probe.rank - 1 if probe.layout.kind == "axis" else probe.rank
    shape = (steps, *(2, 3, 2, 3, 2)[:axes])
    x = scale * (torch.randn(*shape, generator=draw, dtype=torch.float64, device="cpu") + 0.3)
    g = torch.randint(-16, 17, shape, generator=draw, dtype=torch.int64, device="cpu").double() / 16
    x, g = (probe.layout.back(t).contiguous().to(probe.device) for t in (x, g))
    return x, g


def verify(probe: Probe, form: Any, unit: float, many: bool) -> Any:
    """Check a form on fresh inputs: several lengths, sizes of the input, modes, and values of the parameters.

    ``unit``: the smallest first input that fires.
    """
    draw = torch.Generator().manual_seed(1)
    lengths = [probe.layout.steps] if probe.layout.steps else [1, 4, 20] if many else [5]
    own = [p.detach().clone() for p in probe.parameters]
    for training in (True, False) if many else (True,):
        probe.twin.train(training)
        for T in lengths if training else lengths[-1:]:
            for scale in (0.5, 1.5, 6.0) if many and training else (1.5,):
                form = _check(probe, form, *_fresh(probe, T, scale * unit, draw))
    probe.twin.train()
    if many and probe.layout.steps is None:
        form = _check(probe, form, *_fresh(probe, 70, unit, draw))
    for factor in (0.95, 1.02) if own and many else ():
        with torch.no_grad():
            for p, value in zip(probe.parameters, own):
                p.copy_(value * factor + (0 if value.item() else factor - 1))
        _check(probe, form, *_fresh(probe, lengths[-1], unit, draw))
    with torch.no_grad():
        for p, value in zip(probe.parameters, own):
            p.copy_(value)
    return form


def _differing_spikes(probe: Probe, form: Form, measured: _Measured, single: nn.Module) -> int:
    """Count the spikes that differ in float32 where the membrane equals the threshold, or nearly.

    It tells the order of the operations, and whether the neuron fires at the threshold.
    """
    draw = torch.Generator().manual_seed(2)
    unit = rounded(measured.high, [])
    steps = probe.layout.steps or 2
    rows = unit / 16 * torch.randint(-16, 48, (steps, 1024), generator=draw, dtype=torch.int64, device="cpu").double()
    first = unit * torch.rand(512, generator=draw, dtype=torch.float64, device="cpu").float().double()  # does not fire
    rounding = unit * 2.0**-24 * torch.randint(-4, 5, (512,), generator=draw, dtype=torch.int64, device="cpu")
    rows[0, :512] = first
    rows[1, :512] = measured.threshold - measured.decay * (first + measured.decay * measured.start) + rounding
    rows[0, -8:] = unit
    x = probe.data(rows.to(probe.device)).float()
    with torch.no_grad():
        parameters = dict(single.named_parameters(recurse=False))
        ours = probe.layout.back(form.run(probe.layout.time_first(x), parameters))
        return int(((ours != 0) != (single(x) != 0)).sum())


def dtypes_of(probe: Probe, module: nn.Module) -> tuple[tuple[torch.dtype, torch.dtype], ...]:
    """Return the dtypes of data that the neuron takes, and the dtypes of its spikes."""
    found = []
    for dtype in DATA_DTYPES:
        twin = copy_of(module).to(probe.device)
        try:
            with torch.no_grad():
                found.append(
                    (
                        dtype,
                        twin(probe.data(torch.ones(probe.steps, 2, device=probe.device, dtype=torch.float64)).to(dtype)).dtype,
                    )
                )
        except Exception:  # code that is not ours may raise anything
            continue
    return tuple(found)


def layouts(numbers: list) -> Iterator[Layout]:
    for axis in (0, 1, -1):
        yield Layout("axis", axis, None)
    for steps in [n for n in dict.fromkeys(numbers) if type(n) is int and 2 <= n <= 128][:8]:
        yield Layout("fold", 0, steps)
        yield Layout("fold batch", 0, steps)
        for axis in (0, 1, -1):
            yield Layout("axis", axis, steps)


def _best_form(probe: Probe, measured: _Measured, known: list[float], single: nn.Module) -> Form:
    """Return the form of the neuron that passes the check, if possible the form with its order of operations."""
    forms = _forms(probe, measured, known)
    if len(forms) > 1:
        forms.sort(key=lambda form: _differing_spikes(probe, form, measured, single))
    for form in forms[:-1]:
        try:
            return verify(probe, form, measured.high, True)
        except Cannot:
            continue
    return verify(probe, forms[-1], measured.high, True)


class Found(NamedTuple):
    """The neuron that a module computes."""

    form: Any  # a Form, or a LevelForm of fit_levels.py
    layout: Layout
    ranks: tuple[int, ...]  # numbers of axes of the data that the module takes
    dtypes: tuple[tuple[torch.dtype, torch.dtype], ...]  # (of the data, of the spikes)


def fit_lif(module: nn.Module, device: str, numbers: list) -> Found:
    """Return the LIF neuron that a module computes, or raise Cannot. The module does not change.

    ``device``: where the copies of the module run. ``numbers``: the constants in the module's code and attributes. They tell
    which of two adjacent floats is the threshold, and how many time steps the module may want.
    """
    with isolated(device):
        return _fit(module, device, numbers)


def _fit(module: nn.Module, device: str, numbers: list) -> Found:
    twin = copy_of(module).to(device).double().requires_grad_().train()
    single = copy_of(module).to(device).float()
    known = [float(value) for value in numbers if type(value) in (int, float) and math.isfinite(value)]
    known += [p.item() for p in twin.parameters()]
    until = time.monotonic() + SECONDS
    best = Cannot(-1, "")
    has_axis = False  # along an axis it is a neuron for two steps, so it can only want any number of steps, or two
    for layout in layouts(numbers):
        if has_axis and layout.steps not in (None, 2):
            continue
        for rank in (4, 3, 5) if layout.axis == 1 else (4, 3, 5, 2):  # the second of two axes is the last
            probe = Probe(twin, layout, rank, device, until)
            try:
                first_look(probe)
                measured = _measure(probe)
                form = _best_form(probe, measured, known, single)
            except Cannot as reason:
                if reason.final:
                    raise best if reason.progress < best.progress else reason from None
                twin.train()
                best = max(best, reason, key=lambda r: r.progress)
                if reason.progress > 2:
                    has_axis = True
                    break  # data with another number of axes would give the same reason
                continue
            ranks = [rank]
            for other in {2, 3, 4, 5} - {rank}:
                try:
                    verify(Probe(twin, layout, other, device, until), form, measured.high, False)
                    ranks.append(other)
                except Cannot:
                    continue
            return Found(form, layout, tuple(sorted(ranks)), dtypes_of(probe, module))
    raise best
