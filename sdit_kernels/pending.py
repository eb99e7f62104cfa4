"""``Pending``: the output of a BatchNorm that nobody has computed yet.

Inside a ``waiting`` block, a norm returns ``make_pending(x, norm, ..)``. Views of it stay pending. If a neuron's op gets one,
it computes norm and neuron in one pass from the norm's input (ops/norm_lif.py). Any other use computes the output, and
continues with it. At its end, the block computes all pending tensors that are still alive. So a model may do with the output
of a norm whatever it likes, and nothing has to know in advance which module comes next.

In training, whoever computes first also updates the running statistics; ``settle`` does so where nobody has. The norm calls it
before it shows its running statistics to anyone (compat/fuse.py), and the block calls it at its end.
"""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._torch import (
    find_apply,
    in_backward,
    increase,
    is_of_transform,
    make_wrapper_subclass,
    tree_map,
    without_functions_of_subclasses,
)
from .packed import unseen

# Functions that do not read the values.
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "requires_grad", "is_cuda", "layout")),
    *(getattr(Tensor, name).__get__ for name in ("is_nested", "is_sparse", "is_quantized", "is_meta", "is_leaf", "itemsize")),
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.__len__, Tensor.is_floating_point,
    Tensor.is_complex, Tensor.is_inference, Tensor.is_contiguous, Tensor.stride, torch.numel, torch.is_floating_point,
    torch.is_complex,
}  # fmt: skip

# Functions whose result has the values of their first argument, at other places.
_VIEWS = {
    Tensor.view, Tensor.reshape, Tensor.flatten, Tensor.unflatten, Tensor.transpose, Tensor.permute, Tensor.squeeze,
    Tensor.unsqueeze, Tensor.contiguous, Tensor.movedim, Tensor.moveaxis, Tensor.swapaxes, Tensor.swapdims, torch.reshape,
    torch.flatten, torch.unflatten, torch.transpose, torch.permute, torch.squeeze, torch.unsqueeze, torch.movedim,
    torch.moveaxis, torch.swapaxes, torch.swapdims,
}  # fmt: skip
_COPIES = {Tensor.contiguous}
_TOO_LATE = {Tensor.register_hook, Tensor.retain_grad, Tensor.register_post_accumulate_grad_hook}


class _Block:
    """What a ``waiting`` block must do at its end."""

    def __init__(self):
        self.made: list[weakref.ref] = []  # its pending tensors
        self.owing: dict[int, _Call] = {}  # by id(running_mean), the calls that have not updated it
        self.counts: dict[int, Tensor] = {}  # by id, the numbers of batches to be increased

    def end(self, compute):
        if self.counts:
            with unseen():
                increase(list(self.counts.values()))
        try:
            for reference in self.made if compute else ():
                if (t := reference()) is not None:
                    t._place.compute()
        finally:
            for call in list(self.owing.values()):
                if compute or not call.has_changes():  # an error of the model must not be hidden by one of this file
                    call.update()


class _Local(threading.local):
    def __init__(self):
        self.blocks: list[_Block] = []  # of the thread


_local = _Local()


def is_waiting() -> bool:
    """True inside a ``waiting`` block of this thread."""
    return bool(_local.blocks) and make_wrapper_subclass is not None


def may_wait() -> bool:
    """True if a norm may return a pending tensor. Activation checkpointing repeats a forward pass without its block, in the
    backward pass, and what it then saves must be what the forward pass has saved."""
    return is_waiting() or (make_wrapper_subclass is not None and not torch.compiler.is_compiling() and in_backward())


@contextlib.contextmanager
def waiting():
    """Let norms wait for their neurons inside this block."""
    _local.blocks.append(_Block())
    compute = False  # after an exception: activation checkpointing raises one to stop a forward pass
    try:
        yield
        compute = True
    finally:
        _local.blocks.pop().end(compute)


def settle(running_mean: Tensor | None, count: Tensor | None = None) -> None:
    """Update the statistics of a norm, and its number of batches, if a block of this thread has put that off."""
    for block in _local.blocks:
        if (call := block.owing.get(id(running_mean))) is not None:
            call.update()
        if count is not None and block.counts.pop(id(count), None) is not None:
            increase([count])


def count_later(count: Tensor) -> None:
    """Increase the number of batches of a norm at the end of the block, in one operator with all others of the block."""
    counts = _local.blocks[-1].counts
    if id(count) in counts:  # the operator must not get a tensor twice
        increase([count])
    counts[id(count)] = count


class _Call:
    """One call of a norm. All pending views of its output share it."""

    def __init__(self, x, norm, axis, statistics, backend):
        self.x, self.norm, self.axis, self.statistics, self.backend = x, norm, axis, statistics, backend
        self.owed: dict[int, _Call] | None = None  # where the block keeps the call while the running statistics wait for x
        self.has_paid = False
        self.needs_grad = torch.is_grad_enabled()
        self.inputs, self.versions = [x], [x._version]
        for t in norm.learnt:
            if t is not None:
                self.inputs.append(t)
                self.versions.append(t._version)
        self.output: Tensor | None = None
        self.is_fused = False

    def owe(self):
        """Let the running statistics wait for the first use."""
        mean = self.norm.running_mean
        settle(mean)
        self.owed, self.version = _local.blocks[-1].owing, mean._version
        self.owed[id(mean)] = self

    def pay(self, certain=True):
        """Note that the running statistics have seen x. Not certain: if their version tells so."""
        if self.owed is not None and (certain or self.norm.running_mean._version != self.version):
            del self.owed[id(self.norm.running_mean)]
            self.owed, self.has_paid = None, True

    def update(self):
        """Update the running statistics without the output."""
        if self.owed is not None:
            self.check_changes()
            x = self.x.detach()
            with unseen():
                self.norm.statistics(x if self.axis == 2 else x.unsqueeze(0), 2, self.backend)
            self.pay()

    def has_changes(self):
        if self.owed is not None and self.norm.running_mean._version != self.version:
            return True
        return self.versions != [t._version for t in self.inputs]

    def check_changes(self):
        if self.has_changes():
            raise RuntimeError(
                "the input, weight, bias or running statistics of a fused BatchNorm were changed in place before its output "
                "was used: change a copy, or use the output before, or accelerate the model without fuse"
            )

    def compute(self) -> Tensor:
        """Return the output as PyTorch computes it."""
        if self.output is not None:
            return self.output
        with torch.set_grad_enabled(self.needs_grad):
            y = self.evaluate(self.x, *self.norm.learnt, self.owed is not None)
        self.pay()
        # Below autograd, as inside torch.func.vmap, y has no graph, which a neuron would need later.
        if y.requires_grad or not (self.needs_grad and any(t.requires_grad for t in self.inputs)):
            self.output = y
        return y

    def evaluate(self, x, weight, bias, step_factor, update=False):
        """update: update the running statistics."""
        self.check_changes()
        norm, running = self.norm, (None, None)
        if update:
            running = norm.running_mean, norm.running_var
        elif not norm.training:  # they may have changed since
            running = self.statistics.mean.to(norm.running_var.dtype), norm.running_var
        if norm.per_step:
            rows = zip(x, *((None,) * len(x) if t is None else t for t in (weight, bias, *running)))
            y = torch.stack([self._normalise(*row) for row in rows])
        else:
            y = self._normalise(x.flatten(0, 1) if self.axis == 2 else x, weight, bias, *running)
            y = y.view(x.shape) if self.axis == 2 else y
        return y if step_factor is None else y * step_factor.view(-1, *[1] * (x.dim() - 1))

    def _normalise(self, x, weight, bias, mean, var):
        return F.batch_norm(x, mean, var, weight, bias, self.norm.training, self.norm.momentum, self.norm.eps)


class _Link(torch.autograd.Function):
    """Leads gradients of a pending tensor to the norm's input and parameters.

    They come here only if a function in C++ got the pending tensor itself, as the first argument of another autograd.Function
    for example. Functions in Python get the computed output, which has a graph of its own.
    """

    @staticmethod
    def forward(ctx, place, *inputs):
        ctx.place = place
        meta, x = place.meta, place.x
        return make_wrapper_subclass(Pending, meta.shape, strides=meta.stride(), dtype=x.dtype, device=x.device)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        place, needed = ctx.place, ctx.needs_input_grad[1:]
        # the graph of the computed output may have been used already
        copies = [None if t is None else t.detach().requires_grad_() for t in (place.call.x, *place.call.norm.learnt)]
        with torch.enable_grad():
            y = place.show(place.call.evaluate(*copies))
        inputs = [t for t in copies if t is not None]
        found = iter(torch.autograd.grad(y, [t for t, n in zip(inputs, needed) if n], g))
        return None, *(next(found) if n else None for n in needed)


_link = find_apply(_Link)


class _Values(torch.autograd.Function):
    """The values of a pending tensor that another autograd.Function has returned. Gradients go through that function."""

    @staticmethod
    def forward(ctx, t, values):
        return values.detach()

    @staticmethod
    def backward(ctx, g):
        return g, None


class _Place:
    """What a pending tensor shows of the output of a call: the views that led to it, applied to the norm's input too."""

    def __init__(self, call, x, probe, meta, views=()):
        self.call, self.x, self.views = call, x, views
        self.probe = probe  # a tensor without memory, see find_axis
        self.meta = meta  # a tensor without memory, with the strides of the output
        self.output: Tensor | None = None

    def compute(self) -> Tensor:
        if self.output is not None:
            return self.output
        y = self.call.compute()
        with torch.set_grad_enabled(self.call.needs_grad):
            shown = self.show(y)
        if y is self.call.output:
            self.output = shown
        return shown

    def show(self, y):
        """Return this view of the output y of the call."""
        for function, args, kwargs in self.views:
            y = function(y, *args, **kwargs)
        return y

    def view(self, function, args, kwargs) -> "_Place | None":
        """Return the place of a view of this one, or None if the norm's input or the probe have no such view."""
        arguments = self.meta, self.probe, function, tuple(tuple(a) if type(a) is list else a for a in args)
        try:
            meta, probe = _view_without_memory(*arguments, **kwargs)
        except TypeError:  # an argument without a hash
            meta, probe = _view_without_memory.__wrapped__(*arguments, **kwargs)
        if probe is None:
            return None
        try:
            with torch.set_grad_enabled(self.call.needs_grad), unseen():
                x = function(self.x, *args, **kwargs)
        except RuntimeError:
            return None
        return _Place(self.call, x, probe, meta, (*self.views, (function, args, kwargs)))

    def find_axis(self) -> int | None:
        """Return the axis of the channels, or None if the views have torn them apart or moved the first axis where it matters.

        The probe has the shape of the tensor. A step along its axis of channels moves it by 1, along its axis of time steps by
        a larger number, along all others by 0.
        """
        call, norm = self.call, self.call.norm
        has_steps = (norm.per_step or norm.step_factor is not None) and call.x.shape[0] > 1
        return _find_channel_axis(self.probe.shape, self.probe.stride(), call.x.shape[call.axis], has_steps)


@functools.lru_cache(maxsize=512)
def _find_channel_axis(shape, strides, C, has_steps):
    moves = [(axis, move) for axis, (n, move) in enumerate(zip(shape, strides)) if n > 1 and move]
    channels, steps = [axis for axis, move in moves if move == 1], [axis for axis, move in moves if move > 1]
    if len(channels) != 1 or channels[0] == 0 or shape[channels[0]] != C:
        return None
    return channels[0] if steps == ([0] if has_steps else []) else None


@functools.lru_cache(maxsize=512)
def _view_without_memory(meta, probe, function, args, **kwargs):
    """Return the tensors ``meta`` and ``probe`` of a view; a probe that has no such view is None."""
    with unseen():
        meta = function(meta, *args, **kwargs)
        try:
            return meta, probe if function in _COPIES else function(probe, *args, **kwargs)
        except RuntimeError:
            return meta, None


class Pending(Tensor):
    """See the top of this file."""

    _place: _Place

    @classmethod
    def __torch_function__(cls, function: Any, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _METADATA:
            with without_functions_of_subclasses():
                return function(*args, **kwargs)
        first = args[0] if args else None
        if function in _VIEWS and type(first) is Pending and _waits(first):
            place = None
            if not any(isinstance(a, torch.dtype) for a in args):
                place = first._place.view(function, args[1:], kwargs)
            if place is not None:
                return _make(place)
        if function in _TOO_LATE and isinstance(first, Pending) and first._place.call.is_fused:
            raise RuntimeError(
                f"{function.__name__} on the output of a fused BatchNorm has no effect after a neuron has used it: call it "
                "before, or accelerate the model without fuse"
            )
        return function(*tree_map(computed, args), **tree_map(computed, kwargs))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def plain(t):
            return t._place.compute().detach() if isinstance(t, Pending) else t

        return function(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


def _is_own(t: Pending) -> bool:
    """True if gradients of t go to the norm, and not to an autograd.Function that returned t."""
    with without_functions_of_subclasses():
        node = t.grad_fn
        return node is None and not t.requires_grad or type(node).__name__ == "_LinkBackward"


def _waits(t: Pending) -> bool:
    return t._place.call.output is None and t._place.output is None and _is_own(t)


def _make(place: _Place, ends_with_block=True) -> Tensor:
    inputs = place.call.inputs
    t = _Link.apply(place, *inputs) if any(map(is_of_transform, inputs)) else _link(place, *inputs)
    t._place = place
    if ends_with_block:
        if _local.blocks:
            _local.blocks[-1].made.append(weakref.ref(t))
        elif not in_backward():
            place.compute()
    return t


def keep_waiting(t):
    """Return a copy of a pending tensor that the end of the block does not compute; another tensor as it is."""
    return _make(t._place, False) if isinstance(t, Pending) and _waits(t) else t


def computed(t):
    """Return a pending tensor's values as an ordinary tensor; anything else as it is."""
    if not isinstance(t, Pending):
        return t
    y = t._place.compute()
    return y if _is_own(t) else _Values.apply(t, y)


def make_pending(x: Tensor, norm, axis: int, statistics, backend: str) -> Tensor:
    """Return the output of a BatchNorm on x, without computing it.

    norm: a Norm of ops/norm_lif.py, which accepts x; in evaluation its running statistics must not change later. axis: the axis
    of the channels, 1 or 2. statistics: of x, which the running statistics have seen; None: they wait for the first use.
    """
    strides = x.stride()
    if not x.is_contiguous():  # as F.batch_norm chooses the order of its output
        keeps = x.dim() == 4 and axis == 1 and x.is_contiguous(memory_format=torch.channels_last)
        strides = strides if keeps else None
    has_steps = norm.per_step or norm.step_factor is not None
    meta, probe = _without_memory(x.shape, strides, x.dtype, axis, has_steps)
    call = _Call(x, norm, axis, statistics, backend)
    if statistics is None and (norm.running_mean is not None or norm.running_var is not None):
        call.owe()
    return _make(_Place(call, x, probe, meta))


@functools.lru_cache(maxsize=512)
def _without_memory(shape, strides, dtype, axis, has_steps):
    """Return the tensors ``meta`` and ``probe`` of a place."""
    meta = torch.empty(shape, dtype=dtype, device="meta")
    moves = [0] * len(shape)
    moves[axis] = 1
    if has_steps:
        moves[0] = shape[axis]
    probe = torch.empty(0, dtype=dtype, device="meta").as_strided(shape, moves)
    return meta if strides is None else torch.empty_strided(shape, strides, dtype=dtype, device="meta"), probe


def run_with_norm(op: Callable[..., Any], t: Pending, v: Tensor | None, **settings: Any) -> Any:
    """Run op(x, norm, v, statistics, checked, ..), which computes norm and neuron in one pass, in place of a neuron on t.

    Return None if t must be computed first, because somebody has read it, or its axes have no place in the op.
    """
    place = t._place
    call, axis = place.call, place.find_axis()
    if axis is None or not _waits(t) or (torch.is_grad_enabled() and not call.needs_grad):
        return None
    call.check_changes()
    call.is_fused = True
    norm = call.norm.without_update() if call.has_paid else call.norm
    norm = norm if axis == norm.channel_axis else norm._replace(channel_axis=axis)
    try:
        return op(place.x, norm, v, call.statistics, True, **settings)
    finally:  # activation checkpointing stops a forward pass by an exception when the op saves its tensors
        call.pay(certain=False)


def without_values(t):
    """Return a tensor of the shape, dtype and device of t that can be read at no cost. Its values may be others."""
    return t._place.x if isinstance(t, Pending) else t
