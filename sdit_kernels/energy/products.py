"""The products (matrix multiplications and convolutions) inside operators of PyTorch, and what is measured on their operands.

``find`` turns the call of an operator into ``MatMul`` and ``Convolution`` objects. Each has two operands, 0 and 1. The fan-out
of an element is the number of multiply-adds that it takes part in. All measurements stay on the operand's device: nothing here
waits for a GPU.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LEVEL = 64  # integer levels above this are called floats: an 8-bit image would otherwise count as up to 255 spikes a pixel
_EUCLID_STEPS = 5  # each step at least halves the factor


@dataclass(frozen=True)
class MatMul:
    """x (..., m, k) @ y (..., k, n). x is None if the operator does not return it: the attention weights after softmax."""

    op: str
    x: Tensor | None
    y: Tensor
    x_shape: tuple[int, ...]

    @property
    def operands(self) -> tuple[Tensor | None, Tensor]:
        return self.x, self.y

    @property
    def shape(self) -> str:
        return f"{_times(self.x_shape)} @ {_times(self.y.shape)}"

    @property
    def macs(self) -> int:
        return math.prod(self.x_shape) * self.y.shape[-1]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Return the number of values of both operands and of the result. A value that is broadcast is one value."""
        x = math.prod(self.x_shape) if self.x is None else distinct(self.x)
        return x, distinct(self.y), math.prod(self.x_shape[:-1]) * self.y.shape[-1]

    def weigh(self, i: int, magnitude: Tensor) -> Tensor:
        """Return the sum of magnitude x fan-out over operand i."""
        return magnitude.sum(dtype=torch.float64) * (self.y.shape[-1] if i == 0 else self.x_shape[-2])

    def pairs(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the sum of the products of the magnitudes x and y that meet."""
        return (x.sum(-2, dtype=torch.float64) * y.sum(-1, dtype=torch.float64)).sum()

    def fired(self, i: int) -> Tensor:
        """Return which neurons of operand i fired. A neuron is an entry of the contracted axis, for example a channel."""
        operand = self.operands[i]
        assert operand is not None
        some = (operand != 0).any(-2 if i == 0 else -1)
        return some.flatten(0, -2).any(0) if some.dim() > 1 else some


@dataclass(frozen=True)
class Convolution:
    """A convolution, or a transposed one, of x (N, C, *space) with weight, as aten::convolution takes it."""

    op: str
    x: Tensor
    weight: Tensor
    out: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @property
    def operands(self) -> tuple[Tensor, Tensor]:
        return self.x, self.weight

    @property
    def shape(self) -> str:
        return f"{_times(self.x.shape)} * {_times(self.weight.shape)}"

    @property
    def macs(self) -> int:
        """Return the multiply-adds of the dense convolution, zeros of the padding included, as papers count them."""
        positions = self.x if self.transposed else self.out
        return self.weight.numel() * positions.shape[0] * math.prod(positions.shape[2:])

    @property
    def sizes(self) -> tuple[int, int, int]:
        return distinct(self.x), distinct(self.weight), self.out.numel()

    def weigh(self, i: int, magnitude: Tensor) -> Tensor:
        total = magnitude.sum((0, 1), dtype=torch.float64)
        for axis in range(self.x.dim() - 2):
            meets = tap_positions(
                self.x.shape[2 + axis], self.out.shape[2 + axis], self.weight.shape[2 + axis], self.stride[axis],
                self.padding[axis], self.dilation[axis], self.transposed, self.x.device,
            )  # fmt: skip
            total = torch.tensordot(meets[i], total, dims=([0], [0]))  # sums over the first axis that is left
        if i == 1:
            return total * self.x.shape[0]
        return total * (self.weight.shape[1] if self.transposed else self.weight.shape[0] // self.groups)

    def pairs(self, x: Tensor, y: Tensor) -> Tensor:
        out = torch.ops.aten.convolution.default(
            x.double(), y.double(), None, self.stride, self.padding, self.dilation, self.transposed, self.output_padding,
            self.groups,
        )  # fmt: skip
        return out.sum()

    def fired(self, i: int) -> Tensor:
        """Return which neurons of operand i fired. A neuron is a channel at a position."""
        return (self.operands[i] != 0).any(0).flatten()


Product = MatMul | Convolution


def distinct(t: Tensor) -> int:
    """Return the number of values of t, each once if t.expand repeats it."""
    return math.prod(size for size, stride in zip(t.shape, t.stride()) if stride or not size)


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


@functools.lru_cache(256)
def tap_positions(
    size: int, out: int, taps: int, stride: int, padding: int, dilation: int, transposed: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Count, along one axis, the taps of the kernel that meet each input, and the inputs that each tap meets."""
    tap = torch.arange(taps, device=device, dtype=torch.int64) * dilation - padding
    if transposed:  # each input meets each tap once; the result falls outside the output at the borders
        at = torch.arange(size, device=device, dtype=torch.int64)[:, None] * stride + tap
        meets = ((at >= 0) & (at < out)).double()
        return meets.sum(1), meets.sum(0)
    at = torch.arange(out, device=device, dtype=torch.int64)[:, None] * stride + tap
    inside = ((at >= 0) & (at < size)).double()
    counts = torch.zeros(size, dtype=torch.float64, device=device)
    counts.scatter_add_(0, at.clamp(0, size - 1).flatten(), inside.flatten())
    return counts, inside.sum(0)


# --- which operators contain products -----------------------------------------------------------------------------------------


def _matmul(op: str, x: Tensor, y: Tensor) -> list[Product]:
    return [MatMul(op, x, y, tuple(x.shape))]


def _dot(op, x, y):
    return _matmul(op, x[None], y[:, None])


def _convolution(op, args, out):
    x, weight, _, stride, padding, dilation, transposed, output_padding, groups = args[:9]
    axes = weight.dim() - 2
    if x.dim() == axes + 1:  # without a batch axis
        x, out = x[None], out[None]
    each = [tuple(v) * axes if len(v) == 1 else tuple(v) for v in (stride, padding, dilation, output_padding)]
    return [Convolution(op, x, weight, out, *each[:3], bool(transposed), each[3], groups)]


def _attention(op, args, out):
    q, k, v = args[:3]
    if k.shape[-3] != q.shape[-3]:  # each head of keys and values serves a group of heads of queries
        heads = k.shape[-3]
        q = q.unflatten(-3, (heads, -1))
        k, v = (t.unsqueeze(-3).expand(*t.shape[:-2], q.shape[-3], *t.shape[-2:]) for t in (k, v))
    weights = (*q.shape[:-1], k.shape[-2])
    return [
        MatMul(f"{op}: q k", q, k.transpose(-2, -1), tuple(q.shape)),
        MatMul(f"{op}: weights v", None, v, weights),
    ]


_FINDERS = {
    "aten::mm": lambda op, a, out: _matmul(op, a[0], a[1]),
    "aten::bmm": lambda op, a, out: _matmul(op, a[0], a[1]),
    "aten::addmm": lambda op, a, out: _matmul(op, a[1], a[2]),
    "aten::addmm_": lambda op, a, out: _matmul(op, a[1], a[2]),
    "aten::_addmm_activation": lambda op, a, out: _matmul(op, a[1], a[2]),
    "aten::baddbmm": lambda op, a, out: _matmul(op, a[1], a[2]),
    "aten::baddbmm_": lambda op, a, out: _matmul(op, a[1], a[2]),
    "aten::mv": lambda op, a, out: _matmul(op, a[0], a[1][:, None]),
    "aten::addmv": lambda op, a, out: _matmul(op, a[1], a[2][:, None]),
    "aten::addmv_": lambda op, a, out: _matmul(op, a[1], a[2][:, None]),
    "aten::dot": lambda op, a, out: _dot(op, a[0], a[1]),
    "aten::vdot": lambda op, a, out: _dot(op, a[0], a[1]),
    "aten::addbmm": lambda op, a, out: _matmul(op, a[1], a[2]),
    "aten::addbmm_": lambda op, a, out: _matmul(op, a[1], a[2]),
    "aten::addr": lambda op, a, out: _matmul(op, a[1][:, None], a[2][None]),
    "aten::addr_": lambda op, a, out: _matmul(op, a[1][:, None], a[2][None]),
    "aten::convolution": _convolution,
    "aten::_convolution": _convolution,
    "aten::convolution_overrideable": _convolution,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention": _attention,
    "aten::_scaled_dot_product_efficient_attention": _attention,
    "aten::_scaled_dot_product_cudnn_attention": _attention,
    "aten::_scaled_dot_product_fused_attention_overrideable": _attention,
    "flex_attention": _attention,
}


def find(name: str, args: tuple, out: object) -> list[Product] | None:
    """Return the products of a call of the operator ``name``, as in "aten::mm"; None if it is not known here."""
    finder = _FINDERS.get(name)
    if finder is None:
        return None
    tensors = [a for a in args if isinstance(a, Tensor)]
    if any(t.layout != torch.strided or t.is_nested or not t.is_floating_point() for t in tensors):
        return None
    return finder(name.removeprefix("aten::"), args, out)


def is_known(name: str) -> bool:
    return name in _FINDERS


# --- the values of an operand -------------------------------------------------------------------------------------------------


def is_readable(t: Tensor) -> bool:
    """True if Python may read values now. On a GPU that would wait for the GPU."""
    return t.device.type == "cpu"


def find_factor(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Find the largest f for which x / f are integers up to ``MAX_LEVEL``.

    Return the smallest absolute value that is not 0, f, and whether there is such an f, as tensors.

    Euclid's algorithm on all values at once. A value may differ from its level by eps times itself, because it was rounded.
    """
    bound = min(MAX_LEVEL, int(1 / (8 * eps)))  # above it the rounding could hide the distance to the next level
    a = x.abs().to(torch.promote_types(x.dtype, torch.float32))
    most = a.amax()
    least = torch.where(a > 0, a, math.inf).amin()
    f = torch.where(least.isfinite(), least, 1.0)
    if is_readable(f) and not most <= f * MAX_LEVEL:
        return least, f, torch.zeros((), dtype=torch.bool, device=f.device)  # the usual case of floats: no need to look further
    for _ in range(_EUCLID_STEPS):
        rest = (a - f * (a / f).round()).abs()
        f = torch.minimum(f, torch.where(rest > 2 * eps * a, rest, math.inf).amin())
    top = (most / f).round()
    f = torch.where(top > 0, most / top, f)  # the largest value has the smallest relative error
    level = (a / f).round()
    rest = (a - f * level).abs()
    fits = ((rest <= 2 * eps * a) & (level <= bound)) | ((rest == 0) & (level <= MAX_LEVEL))
    return least, f, fits.all()


def fingerprint(x: Tensor) -> Tensor:
    """Return a number that differs, almost surely, for tensors with different values."""
    rows = x.reshape(-1, x.shape[-1]) if x.dim() > 1 else x.reshape(1, -1)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for axis in (0, 1):
        sums = rows.sum(axis, dtype=torch.float64)
        total = total + (sums * torch.arange(1, len(sums) + 1, device=x.device, dtype=torch.float64).sqrt()).sum()
    return total


def get_fits(measured: Tensor) -> Tensor:
    """Return a boolean tensor: True if an operand with these numbers is on a grid of levels."""
    return measured[FIELDS.index("fits")] != 0


def _level(x: Tensor, factor: Tensor) -> Tensor:
    return (x.abs().to(factor.dtype) / factor).round()


FIELDS = ("nonzero", "low", "high", "least", "factor", "fits", "events", "magnitude", "fingerprint", "pairs", "pair_magnitude")


def measure(product: Product, i: int, eps: tuple[float, float], pairs: bool) -> Tensor:
    """Return the numbers ``FIELDS`` of operand i as one tensor on its device. eps: the rounding of both operands.

    least: the smallest absolute value that is not 0.
    events: sum of the fan-outs of nonzero elements. magnitude: the same, times the level of the element, its absolute value
    divided by the factor and rounded, so that the rounding of x does not add up. pairs and pair_magnitude: the same over pairs
    of elements, if the argument pairs is True.
    """
    x = product.operands[i]
    assert x is not None
    if x.numel() == 0:
        return torch.zeros(len(FIELDS), dtype=torch.float64, device=x.device)
    low, high = x.aminmax()
    least, factor, fits = find_factor(x, eps[i])
    some = x != 0
    if is_readable(x) and not fits:  # floats: nothing else is needed
        return torch.tensor(
            [some.sum(), low, high, least, factor, *[0.0] * (len(FIELDS) - 5)], dtype=torch.float64, device="cpu"
        )
    level = _level(x, factor)
    found = [some.sum(), low, high, least, factor, fits, product.weigh(i, some), product.weigh(i, level), fingerprint(x)]
    other = product.operands[1]
    if pairs and other is not None:
        found += [product.pairs(some, other != 0), product.pairs(level, _level(other, find_factor(other, eps[1])[1]))]
    else:
        found += [torch.zeros((), dtype=torch.float64, device=x.device)] * 2
    return torch.stack([n.double() for n in found])
