"""Finding stray accesses."""

import contextlib
import math

import torch

_MARGIN = 4096  # bytes on both sides of a guarded tensor
_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def poison_(tensor):
    """Fill an output with values that a test notices if the kernel leaves them: NaN, or the least integer."""
    if tensor.dtype.is_floating_point:
        return tensor.fill_(math.nan)
    return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).min)


@contextlib.contextmanager
def guarded(*tensors):
    """Copies of the tensors among canaries: yields a tuple of them, and asserts afterwards that no canary changed.

    Shape, strides, type and alignment are those of the originals, so the same kernel variant runs.  All memory
    around a copy and in the gaps between its rows is canary.  Read as floating point, canaries are NaN: a load out of
    bounds shows in the result, a store out of bounds fails the block.
    """
    guards = [_Guard(tensor, number) for number, tensor in enumerate(tensors)]
    yield tuple(guard.copy for guard in guards)
    for guard in guards:
        guard.check()


class _Guard:
    def __init__(self, tensor, number):
        self.number = number
        self.kind = tensor.dtype
        size = tensor.element_size()
        extent = 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
        extent = 0 if tensor.numel() == 0 else extent
        buffer = self._canaries(extent * size + 2 * _MARGIN + 64, number)
        # The copy starts as far behind a multiple of 64 as the original, which alignment specialisation looks at.
        start = _MARGIN + (tensor.data_ptr() - buffer.data_ptr() - _MARGIN) % 64
        if (buffer.data_ptr() + start) % size:
            raise ValueError("the tensor is not aligned to its own element size")
        skip = start % size
        elements = (buffer.numel() - skip) // size
        self.words = buffer[skip : skip + elements * size].view(_INTEGER_OF_SIZE[size])
        self.first = (start - skip) // size
        place = (tensor.shape, tensor.stride(), self.first)
        self.copy = self.words.view(tensor.dtype).as_strided(*place)
        self.copy.copy_(tensor)
        owned = torch.zeros(elements, dtype=torch.bool)
        owned.as_strided(*place).fill_(True)
        self.free = ~owned
        self.expected = self.words[self.free]

    @staticmethod
    def _canaries(count, number):
        # 16-bit words 0xFFC0 to 0xFFFF make NaNs of fp16, bf16, fp32 and fp64.  Each tensor has its own, so that a
        # kernel which carries values from behind its input to behind its output does not go unseen.
        word = 0xFFC0 | (5 + 17 * number) % 64
        words = torch.full((count // 2 + 8,), word - 0x10000, dtype=torch.int16)
        return words.view(torch.uint8)

    def check(self):
        changed = torch.nonzero(self.free)[:, 0][self.words[self.free] != self.expected] - self.first
        assert changed.numel() == 0, (
            f"{changed.numel()} elements were written outside of guarded tensor {self.number} ({self.kind}, "
            f"{tuple(self.copy.shape)}), at element offsets {changed[:8].tolist()}"
        )
