"""``Pending``: the output of a BatchNorm that nobody has computed yet.

A norm returns ``pending(x, norm)``. Views of it stay pending. If a neuron's op gets one, it computes norm and neuron in one
pass from the norm's input (ops/norm_lif.py). Any other use computes the output, and continues with it. So a model may do with
the output of a norm whatever it likes, and nothing has to know in advance which module comes next.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

# Functions that do not read the values.
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "requires_grad", "is_cuda", "layout")),
    *(getattr(Tensor, name).__get__ for name in ("is_nested", "is_sparse", "is_quantized", "is_meta", "is_leaf", "itemsize")),
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.__len__, Tensor.is_floating_point,
    Tensor.is_complex, Tensor.is_inference, Tensor.is_contiguous, Tensor.stride, torch.numel,
    torch.is_floating_point, torch.is_complex,
}  # fmt: skip

# Functions whose result has the values of their first argument, at other places.
_VIEWS = {
    Tensor.view, Tensor.reshape, Tensor.flatten, Tensor.unflatten, Tensor.transpose, Tensor.permute, Tensor.squeeze,
    Tensor.unsqueeze, Tensor.contiguous, Tensor.movedim, Tensor.moveaxis, Tensor.swapaxes, Tensor.swapdims, torch.reshape,
    torch.flatten, torch.unflatten, torch.transpose, torch.permute, torch.squeeze, torch.unsqueeze, torch.movedim,
    torch.moveaxis, torch.swapaxes, torch.swapdims,
}  # fmt: skip
_COPIES = {Tensor.contiguous}


class Norm(NamedTuple):
    """The settings of a BatchNorm for one call, as norm_lif takes them."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool  # the statistics come from the data
    momentum: float
    eps: float
    axis: int  # of the channels: 1 in (N, C, ...), 2 in (T, B, C, ...)
    step_factor: Tensor | None = None  # (T,): a factor per time step, TEBN
    per_step: bool = False  # statistics, weight and bias are (T, C), BNTT
    after_update: Callable[[], None] | None = None  # called when running_mean and running_var were updated

    def compute(self, x: Tensor, update: bool) -> Tensor:
        """Return the output as PyTorch computes it. update: in training, update the running statistics."""
        if self.per_step:
            stacked = (self.weight, self.bias, self.running_mean, self.running_var)
            steps = [
                self._replace(axis=1, per_step=False, **dict(zip(("weight", "bias", "running_mean", "running_var"), row)))
                for row in zip(*((t,) * len(x) if t is None else t for t in stacked))
            ]
            y = torch.stack([norm.compute(step, update) for norm, step in zip(steps, x)])
            if update and self.after_update is not None:
                self.after_update()
            return y
        mean, var = (self.running_mean, self.running_var) if update or not self.training else (None, None)
        y = x.flatten(0, 1) if self.axis == 2 else x
        y = F.batch_norm(y, mean, var, self.weight, self.bias, self.training, self.momentum, self.eps).view(x.shape)
        return y if self.step_factor is None else y * self.step_factor.view(-1, *[1] * (x.dim() - 1))


class _Call:
    """One call of a norm. All pending views of its output share it."""

    def __init__(self, x: Tensor, norm: Norm):
        self.x, self.norm, self.needs_grad = x, norm, torch.is_grad_enabled()
        self.is_counted = not norm.training or norm.running_mean is None  # the running statistics have seen x
        self.output: Tensor | None = None

    def compute(self) -> Tensor:
        if self.output is None:
            with torch.set_grad_enabled(self.needs_grad):
                self.output = self.norm.compute(self.x, not self.is_counted)
            self.is_counted = True
        return self.output

    def __del__(self):  # nobody has read the output; the statistics must see x all the same
        if not self.is_counted:
            self.needs_grad = False
            self.compute()


class _Link(torch.autograd.Function):
    """Leads gradients of a pending tensor to the norm's input and parameters.

    They come here only if a function in C++ got the pending tensor itself, as the first argument of another autograd.Function
    for example. Functions in Python get the computed output, which has a graph of its own.
    """

    @staticmethod
    def forward(ctx, place, *inputs):
        ctx.place = place
        x = place.x
        return Tensor._make_wrapper_subclass(Pending, x.shape, strides=x.stride(), dtype=x.dtype, device=x.device)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        inputs = ctx.place.call.x, *ctx.place.parameters()
        wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad[1:]) if needed]
        found = iter(torch.autograd.grad(ctx.place.compute(), wanted, g, retain_graph=True, allow_unused=True))
        return None, *(next(found) if needed else None for needed in ctx.needs_input_grad[1:])


class _Place:
    """What a pending tensor shows of the output of a call: the views that led to it, applied to the norm's input too."""

    def __init__(self, call, x, probe, views=()):
        self.call, self.x, self.views = call, x, views
        self.probe = probe  # a tensor without memory, see find_axes
        self._output = None

    def parameters(self):
        norm = self.call.norm
        return [t for t in (norm.weight, norm.bias, norm.step_factor) if t is not None]

    def compute(self) -> Tensor:
        if self._output is None:
            y = self.call.compute()
            with torch.set_grad_enabled(self.call.needs_grad):
                for function, args, kwargs in self.views:
                    y = function(y, *args, **kwargs)
            self._output = y
        return self._output

    def view(self, function, args, kwargs) -> "_Place":
        with torch.set_grad_enabled(self.call.needs_grad):
            x = function(self.x, *args, **kwargs)
        probe = self.probe if function in _COPIES else function(self.probe, *args, **kwargs)
        return _Place(self.call, x, probe, (*self.views, (function, args, kwargs)))

    def find_axis(self) -> int | None:
        """Return the axis of the channels, or None if the views have torn them apart or moved the first axis where it matters.

        The probe has the shape of the tensor. A step along its axis of channels moves it by 1, along its axis of time steps by
        a larger number, along all others by 0.
        """
        moves = [(axis, move) for axis, (n, move) in enumerate(zip(self.probe.shape, self.probe.stride())) if n > 1 and move]
        channels, steps = [axis for axis, move in moves if move == 1], [axis for axis, move in moves if move > 1]
        norm = self.call.norm
        has_steps = norm.per_step or norm.step_factor is not None
        if len(channels) != 1 or channels[0] == 0 or self.probe.shape[channels[0]] != self.call.x.shape[norm.axis]:
            return None
        return channels[0] if steps == ([0] if has_steps and self.call.x.shape[0] > 1 else []) else None


class Pending(Tensor):
    """See the top of this file."""

    _place: _Place

    @classmethod
    def __torch_function__(cls, function: Any, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        is_view = function in _VIEWS and args and type(args[0]) is Pending and not any(isinstance(a, torch.dtype) for a in args)
        if is_view and args[0]._place.call.output is None:
            return _make(args[0]._place.view(function, args[1:], kwargs))
        return function(*tree_map(computed, args), **tree_map(computed, kwargs))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def plain(t):
            return t._place.compute().detach() if isinstance(t, Pending) else t

        return function(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


def _make(place: _Place) -> Tensor:
    t = _Link.apply(place, place.call.x, *place.parameters())
    t._place = place
    return t


def computed(t):
    """Return a pending tensor's values as an ordinary tensor; anything else as it is."""
    return t._place.compute() if isinstance(t, Pending) else t


def pending(x: Tensor, norm: Norm) -> Tensor:
    """Return the output of a BatchNorm on x, without computing it."""
    C = x.shape[norm.axis]
    moves = [0] * x.dim()
    moves[norm.axis] = 1
    if norm.per_step or norm.step_factor is not None:
        moves[0] = C
    return _make(_Place(_Call(x, norm), x, torch.empty(0, device="meta").as_strided(x.shape, moves)))


def run_with_norm(op: Callable[..., Any], t: Pending, *state: Tensor | None, **settings: Any) -> Any:
    """Compute the norm and the neuron ``op``, norm_lif or an op with the same arguments for the norm, in one pass.

    Return the outputs of op, or None if t must be computed first, because somebody has read it or its axes have no place.
    """
    place = t._place
    call, axis = place.call, place.find_axis()
    if call.output is not None or axis is None:
        return None
    norm = call.norm
    if call.is_counted and norm.training:
        norm = norm._replace(running_mean=None, running_var=None, after_update=None)
    call.is_counted = True
    outputs = op(
        place.x, norm.weight, norm.bias, norm.running_mean, norm.running_var, *state, training=norm.training,
        momentum=norm.momentum, eps=norm.eps, channel_axis=axis, per_step=norm.per_step, step_factor=norm.step_factor,
        **settings,
    )  # fmt: skip
    if norm.after_update is not None:
        norm.after_update()
    return outputs


def without_values(t):
    """Return a tensor of the shape, dtype and device of t that can be read at no cost. Its values may be others."""
    return t._place.x if isinstance(t, Pending) else t
