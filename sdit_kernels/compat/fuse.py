"""Fuse a BatchNorm with the neuron that follows it, and keep spikes as bits: ``accelerate(model, fuse=True, packed=True)``.

A fused norm returns a ``Pending`` (../pending.py), and the op of the neuron that gets it computes both. So nothing here looks
for pairs: what follows a norm may change from call to call.
"""

import functools

import torch
from torch import Tensor, nn

from .._torch import has_hooks, is_tracing, transforms_active
from ..dtypes import DATA_DTYPES
from ..ops.pool import max_pool
from ..packed import packed_spikes
from ..pending import Norm, pending
from .swap import Left, Report, Swapped, changed_behaviour, counted, replace_methods

_PLAIN = (Tensor, nn.Parameter)


class FusedNorm(Swapped):
    """A BatchNorm whose output is pending where a neuron can take it, and the norm's own otherwise."""

    def forward(self, x):
        axis = self._find_axis(x)
        if axis is None or not _can_wait(self, x):
            return super().forward(x)
        norm = self._norm(x, axis)
        return super().forward(x) if norm is None else pending(x, norm)

    def _find_axis(self, x):
        """Return the axis of the channels, or None if the norm's own code must judge x."""
        if not isinstance(x, Tensor) or x.dim() < 2:
            return None
        axis = 2 if self._takes_steps() else 1
        try:
            self._check_input_dim(x.flatten(0, 1) if axis == 2 else x)
        except (ValueError, AssertionError):
            return None
        C, N = x.shape[axis] if x.dim() > axis else 0, x.numel()
        return axis if self.num_features == C and C > 1 and N > C else None

    def _takes_steps(self):
        return getattr(self, "step_mode", "s") == "m"

    def _norm(self, x, axis):
        uses_data = self.training or (self.running_mean is None and self.running_var is None)
        momentum = 0.0 if self.momentum is None else self.momentum
        tracks = self.training and self.track_running_stats
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        keeps = not self.training or self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if keeps else (None, None)
        return Norm(self.weight, self.bias, mean, var, uses_data, momentum, self.eps, axis)


class FusedMultiStepNorm(FusedNorm):
    """A norm of clock_driven, which takes (T, B, ...) always."""

    def _takes_steps(self):
        return True


class FusedTEBN(FusedNorm):
    """The output of TEBN has a learnt factor per time step."""

    def _norm(self, x, axis):
        return super()._norm(x, axis)._replace(step_factor=self.scale) if self.scale.shape == x.shape[:1] else None


class FusedBNTT(FusedNorm):
    """BNTT has a BatchNorm per time step."""

    def _find_axis(self, x):
        first, T = self.t + 1, x.shape[0] if isinstance(x, Tensor) and x.dim() > 2 else 0
        norms = self.bn_list[first : first + T] if T and self.step_mode == "m" else []
        if len(norms) != T or not T:
            return None
        try:
            norms[0]._check_input_dim(x[0])
        except ValueError:
            return None
        settings = {(n.num_features, n.eps, n.momentum, n.training, n.track_running_stats, n.affine) for n in norms}
        usable = settings == {(x.shape[2], norms[0].eps, norms[0].momentum, self.training, True, True)}
        return 2 if usable and None not in next(iter(settings)) and x.shape[2] > 1 and x[0].numel() > x.shape[2] else None

    def _norm(self, x, axis):
        first, T = self.t + 1, len(x)
        norms = self.bn_list[first : first + T]
        self.t += T
        mean, var = (torch.stack([getattr(norm, name) for norm in norms]) for name in ("running_mean", "running_var"))

        def write_back():
            with torch.no_grad():
                for norm, *rows in zip(norms, mean, var):
                    norm.running_mean.copy_(rows[0])
                    norm.running_var.copy_(rows[1])

        if self.training:
            for norm in norms:
                norm.num_batches_tracked.add_(1)
        weight = torch.stack([norm.weight for norm in norms])
        return Norm(
            weight, None, mean, var, self.training, norms[0].momentum, norms[0].eps, axis, per_step=True,
            after_update=write_back if self.training else None,
        )  # fmt: skip


def _can_wait(norm, x):
    """True if nothing but a neuron or ordinary PyTorch code will see the output."""
    if torch.compiler.is_compiling() or type(x) not in _PLAIN or x.dtype not in DATA_DTYPES or x.layout is not torch.strided:
        return False
    return not (transforms_active() or is_tracing() or has_hooks(norm) or counted())


_TORCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
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
        is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
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


class Packed(Swapped):
    """A model whose forward pass runs under packed_spikes. torch.compile gets the forward pass without it."""

    def forward(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        with packed_spikes():
            return super().forward(*args, **kwargs)


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


_WHOLE = "packed needs a model with layers that get the spikes"


def pack_spikes(model: nn.Module, report: Report) -> Report:
    """Run the forward pass of the model under packed_spikes. Return the report with the model in it."""
    name, kind = "(the model)", type(model).__name__
    if isinstance(model, Swapped):
        return report if isinstance(model, Packed) else report._replace(left=(*report.left, Left(name, kind, _WHOLE)))
    replace_methods(model, Packed)
    return report._replace(replaced=(*report.replaced, (name, kind)))
