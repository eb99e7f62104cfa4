"""Fuse a BatchNorm with the neuron that follows it, and keep spikes as bits: ``accelerate(model, fuse=True, packed=True)``.

A fused norm returns a ``Pending`` (../pending.py), and the op of the neuron that gets it computes both. So nothing here looks
for pairs: what follows a norm may change from call to call.
"""

import functools
import operator
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from .._torch import any_autocast, has_hooks, is_of_transform, is_tracing, transforms_active, tree_map
from ..dispatch import choose
from ..dtypes import DATA_DTYPES, autocast_dtype
from ..ops.norm_lif import Norm
from ..ops.pool import max_pool
from ..packed import packed_spikes, unseen
from ..pending import computed, count_later, is_waiting, make_pending, may_wait, settle, waiting
from .swap import Left, Report, Swapped, changed_behaviour, find_counter, original_class, replace_methods

_PLAIN = (Tensor, nn.Parameter)


@functools.lru_cache(maxsize=512)
def _find_axis(kind, C, axis, shape):
    """Return the axis of the C channels, or None if the norm, of class ``kind``, must judge data of this shape."""
    if len(shape) <= axis or shape[axis] != C or C < 2 or shape.numel() <= C:
        return None
    try:
        kind._check_input_dim(None, torch.empty((0,) * (len(shape) + 1 - axis), dtype=torch.float32, device="meta"))
    except (ValueError, AssertionError):
        return None
    return axis


class FusedNorm(Swapped):
    """A BatchNorm whose output is pending inside an accelerated model, and the norm's own otherwise."""

    def __getattr__(self, name):
        """Return a buffer with the value that it has without this class; see ../pending.py."""
        if name in _TENSORS[2:] and is_waiting():
            buffers = self.__dict__.get("_buffers", {})
            settle(buffers.get("running_mean"), buffers.get("num_batches_tracked"))
        return super().__getattr__(name)

    def forward(self, x):
        if may_wait() and _can_wait(self, x) and 0 <= (self.momentum or 0) <= 1:
            axis = self._find_axis(x)
            y = None if axis is None else self._wait(x, axis)
            if y is not None:
                return y
        return super().forward(x)

    def _find_axis(self, x):
        """Return the axis of the channels, or None if the norm's own code must judge x."""
        return _find_axis(type(self), self.num_features, 2 if self._takes_steps() else 1, x.shape)

    def _takes_steps(self):
        return getattr(self, "step_mode", "s") == "m"

    def _wait(self, x, axis, step_factor=None):
        training, tracks = self.training, self.track_running_stats
        weight, bias, mean, var, count = _find_tensors(self)
        uses_data = training or (mean is None and var is None)
        if training and not tracks:
            mean = var = None
        if (mean is None) != (var is None):
            return None
        count = count if training and tracks else None
        momentum = self.momentum
        if momentum is None:
            momentum = 0.0 if count is None else 1.0 / float(self.num_batches_tracked + 1)
        return _begin(x, axis, weight, bias, mean, var, uses_data, momentum, self.eps, step_factor=step_factor, count=count)


_TENSORS = "weight", "bias", "running_mean", "running_var", "num_batches_tracked"


def _find_tensors(norm):
    """Return the tensors of a norm. nn.Module looks for an attribute in Python, and the norms of a model add up."""
    parameters, buffers = norm._parameters.get, norm._buffers.get
    found = parameters("weight"), parameters("bias"), *map(buffers, _TENSORS[2:])
    for t in found:
        if t is None:  # or an attribute of another kind
            return tuple([getattr(norm, name) for name in _TENSORS])
    return found


def _begin(x, axis, weight, bias, mean, var, training, momentum, eps, per_step=False, step_factor=None, count=None):
    """Return a pending output, or None if norm_lif refuses the arguments.

    count: the number of batches, to be increased.
    """
    backend, statistics = choose(x.device), None
    norm = Norm(weight, bias, mean, var, training, momentum, eps, 2, per_step, step_factor, 1.0, None)
    if backend == "reference" or not _is_accepted(norm, x, axis):
        return None
    in_block = is_waiting()
    if not training or per_step or not in_block or (mean is not None and mean.is_inference()):
        settle(mean)
        with unseen():
            steps = x.detach()
            statistics = norm.statistics(steps if axis == 2 else steps.unsqueeze(0), 2, backend)
            if not training:  # they may change before the output is used
                norm = norm._replace(running_mean=statistics.mean, running_var=var.clone())
    if count is not None and in_block:
        count_later(count)
    elif count is not None:
        count.add_(1)
    return make_pending(x, norm, axis, statistics, backend)


_accepted: dict[tuple, bool] = {}
_properties = operator.attrgetter("__class__", "shape", "dtype", "device", "layout")


def _is_accepted(norm, x, axis):
    """True if norm_lif accepts these arguments. The checks take 20 us, and what they look at seldom changes."""
    weight, bias, mean, var, training, momentum, eps, _, per_step, step_factor, *_ = norm
    key = (
        _properties(x), axis, training, type(momentum), eps, type(eps), per_step,
        mean is None or (mean.requires_grad, mean.is_inference(), mean.stride(), *_properties(mean)),
        var is None or (var.requires_grad, var.is_inference(), var.stride(), *_properties(var)),
        weight is None or _properties(weight), bias is None or _properties(bias),
        step_factor is None or _properties(step_factor), training and torch.is_inference_mode_enabled(),
    )  # fmt: skip
    found = _accepted.get(key)
    if found is None:
        if len(_accepted) > 1024:
            _accepted.clear()
        try:
            norm.check(x if axis == 2 else x.unsqueeze(0))  # (T, B, C, ..)
            found = True
        except (TypeError, ValueError):
            found = False
        _accepted[key] = found
    return found


class FusedMultiStepNorm(FusedNorm):
    """A norm of clock_driven, which takes (T, B, ...) always."""

    def _takes_steps(self):
        return True


class FusedTEBN(FusedNorm):
    """The output of TEBN has a learnt factor per time step."""

    def _wait(self, x, axis):
        return super()._wait(x, axis, self.scale) if self.scale.shape == x.shape[:1] else None


class FusedBNTT(FusedNorm):
    """BNTT has a BatchNorm per time step."""

    momentum = None  # each step has its own

    def _find_axis(self, x):
        first, T = self.t + 1, x.shape[0] if x.dim() > 2 else 0
        norms = self.bn_list[first : first + T] if T and self.step_mode == "m" else []
        if len(norms) != T or not T:
            return None
        try:
            norms[0]._check_input_dim(x[0])
        except ValueError:
            return None
        settings = {(n.num_features, n.eps, n.momentum, n.training, n.track_running_stats, n.affine) for n in norms}
        usable = settings == {(x.shape[2], norms[0].eps, norms[0].momentum, self.training, True, True)}
        usable = usable and norms[0].momentum is not None and 0 <= norms[0].momentum <= 1
        return 2 if usable and x.shape[2] > 1 and x[0].numel() > x.shape[2] else None

    def _wait(self, x, axis):
        first, T = self.t + 1, len(x)
        norms = self.bn_list[first : first + T]
        mean, var = (torch.stack([getattr(norm, name) for norm in norms]) for name in ("running_mean", "running_var"))
        weight = torch.stack([norm.weight for norm in norms])
        y = _begin(x, axis, weight, None, mean, var, self.training, norms[0].momentum, norms[0].eps, per_step=True)
        if y is not None:
            self.t += T
            if self.training:
                with torch.no_grad():
                    for norm, new_mean, new_var in zip(norms, mean, var):
                        norm.running_mean.copy_(new_mean)
                        norm.running_var.copy_(new_var)
                        norm.num_batches_tracked.add_(1)
        return y


def _can_wait(norm, x):
    """True if the module may return something else than its own code would for x."""
    if torch.compiler.is_compiling() or type(x) not in _PLAIN or x.dtype not in DATA_DTYPES or x.is_inference():
        return False
    if x.layout is not torch.strided or is_of_transform(x):
        return False
    return not (transforms_active() or is_tracing() or has_hooks(norm) or find_counter())


_TORCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_OTHERS = (nn.SyncBatchNorm, nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)
_JELLY_FILES = (
    "spikingjelly.activation_based.layer", "spikingjelly.clock_driven.layer", "sdit_kernels.compat.clock_driven.layer",
)  # fmt: skip
_KINDS = {  # by the names of the classes without 1d, 2d, 3d
    "BatchNorm": FusedNorm,
    "ThresholdDependentBatchNorm": FusedNorm,
    "MultiStepThresholdDependentBatchNorm": FusedMultiStepNorm,
    "TemporalEffectiveBatchNorm": FusedTEBN,
    "BatchNormThroughTime": FusedBNTT,
}


def _find_base(module):
    """Return the class of PyTorch or SpikingJelly that a norm derives from, and how to fuse it; (None, None) for no norm."""
    for cls in type(module).__mro__:
        kind = _KINDS.get(cls.__name__[:-2]) if cls.__name__[-2:] in ("1d", "2d", "3d") else None
        if cls in _TORCH:
            return cls, FusedNorm
        if kind is not None and cls.__module__.startswith(_JELLY_FILES):
            return cls, kind
    return None, None


def _choose_norm(names, module):
    base, kind = _find_base(module)
    if base is None:
        is_norm = isinstance(module, _OTHERS)
        return f"a {type(module).__name__} has no fused form here" if is_norm else None
    reason = changed_behaviour(module, base)
    if reason is None and has_hooks(module):
        reason = "it has hooks, which would see an output that is not computed"
    if reason is None and len(names[module]) > 1:
        reason = f"it is shared: the model holds it as {' and '.join(names[module])}"
    return reason or kind


def norm_chooser(model: nn.Module):
    """Return the function ``choose`` of ``swap`` for the norms of a model."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return functools.partial(_choose_norm, names)


# --- spikes as bits -----------------------------------------------------------------------------------------------------------


class Whole(Swapped):
    """A model in whose forward pass norms wait for their neurons, or later layers keep spikes as bits, or both.

    torch.compile gets the forward pass without it.
    """

    _fuses = _packs = False

    def forward(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        with packed_spikes() if self._packs else nullcontext(), waiting() if self._fuses else nullcontext():
            out = super().forward(*args, **kwargs)
        return tree_map(computed, out) if self._fuses else out


class PackedMaxPool(Swapped):
    """A MaxPool2d that keeps the places of the maxima as bits, and not its input."""

    def forward(self, x):
        window = _pair(self.kernel_size)
        usual = _pair(self.stride) == window and _pair(self.padding) == (0, 0) and _pair(self.dilation) == (1, 1)
        usual = usual and not self.ceil_mode and not self.return_indices and _can_wait(self, x)
        y = max_pool(x, window) if usual and x.dim() == (5 if getattr(self, "step_mode", "s") == "m" else 4) else None
        return super().forward(x) if y is None else y


def _pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def choose_pool(module):
    """Return PackedMaxPool for a MaxPool2d of PyTorch or SpikingJelly, the reason to leave it, or None for other modules."""
    if not isinstance(module, nn.MaxPool2d):
        return None
    base = next(c for c in type(module).__mro__ if c is nn.MaxPool2d or c.__module__.startswith(_JELLY_FILES))
    return changed_behaviour(module, base) or ("it has hooks" if has_hooks(module) else PackedMaxPool)


class Reader(Swapped):
    """A layer that reads spikes and returns none, so the mode of packed_spikes need not see its operators: 0.1 ms less a call.

    The mode must see a cast or a copy of the spikes, which is what the layer keeps then.
    """

    _of_steps: type | None = None  # PyTorch's class of a layer of SpikingJelly that flattens T and B of its input

    @classmethod
    def made_from(cls, mixin, original):
        if original.__name__.startswith("Conv") and original.__module__.startswith("spikingjelly.activation_based."):
            cls._of_steps = getattr(nn, original.__name__)

    def forward(self, *args, **kwargs):
        x = args[0] if args else None
        if type(x) not in _PLAIN or torch.compiler.is_compiling() or not x.is_contiguous():
            return super().forward(*args, **kwargs)
        if any_autocast() and autocast_dtype(x) is not None:
            return super().forward(*args, **kwargs)
        own = self._of_steps
        with unseen():
            if own is None or self.step_mode != "m" or len(args) + len(kwargs) > 1 or x.dim() != self.weight.dim() + 1:
                return super().forward(*args, **kwargs)
            y = own.forward(self, x.flatten(0, 1))
            return y.view(*x.shape[:2], *y.shape[1:])


_READERS = ("Linear", *(f"{name}{d}d" for name in ("Conv", "AvgPool", "AdaptiveAvgPool") for d in (1, 2, 3)))


def _is_reader(module):
    kind = type(module)
    theirs = kind.__module__.startswith(_JELLY_FILES)
    known = theirs or kind.__module__ in ("torch.nn.modules.conv", "torch.nn.modules.linear", "torch.nn.modules.pooling")
    pads = getattr(module, "padding_mode", "zeros") == "zeros" and not isinstance(getattr(module, "padding", 0), str)
    return known and pads and kind.__name__ in _READERS and "forward" not in vars(module) and not isinstance(module, Swapped)


def restore_readers(model: nn.Module):
    for module in model.modules():
        if isinstance(module, Reader) and "_original" in vars(type(module)):
            module.__class__ = original_class(module)


def accelerate_whole(model: nn.Module, report: Report, fuse: bool, packed: bool) -> Report:
    """Let norms wait, or keep spikes as bits, in the forward pass of the model. Return the report with the model in it."""
    name, kind = "(the model)", type(model).__name__
    if isinstance(model, Swapped) and not isinstance(model, Whole):
        reason = "fuse and packed need a model that contains the layers"
        return report._replace(left=(*report.left, Left(name, kind, reason)))
    before = vars(model).get("_fuses", False), vars(model).get("_packs", False)
    if not isinstance(model, Whole):
        replace_methods(model, Whole)
    vars(model).update(_fuses=before[0] or fuse, _packs=before[1] or packed)
    for module in model.modules() if packed else ():
        if _is_reader(module):
            replace_methods(module, Reader)
    changed = before != (before[0] or fuse, before[1] or packed)
    if not changed:
        return report
    options = " and ".join(["fuse"] * fuse + ["packed"] * packed)
    outcome = report.outcome if report.replaced else f"{options} in its forward pass; {report.outcome}"
    return report._replace(outcome=outcome, replaced=(*report.replaced, (name, kind)))
