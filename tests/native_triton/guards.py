"""Find accesses outside of tensors."""

import contextlib
import math

import torch

_MARGIN = 4096  # bytes on both sides of a guarded tensor
_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def poison_(tensor):
    """Fill an output with NaN or the smallest integer, so that a test notices elements the kernel does not write."""
    if tensor.dtype.is_floating_point:
        return tensor.fill_(math.nan)
    return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).min)


@contextlib.contextmanager
def guarded(*tensors):
    """Copy the tensors between canaries, yield the copies as a tuple, and assert afterwards that no canary changed.

    Copies have the shape, strides, dtype and alignment of the originals, so the same kernel variant runs. All memory around a
    copy and between its rows is filled with canaries. Read as floating point numbers, canaries are NaN. So an out-of-bounds
    load shows in the result, and an out-of-bounds store fails the assertion.
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
        # The copy has the original's address modulo 64, because Triton specialises kernels by alignment.
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
        # The 16-bit words 0xFFC0 to 0xFFFF are NaN in fp16, bf16, fp32 and fp64. Each tensor has its own word, so that a kernel
        # that copies values from past its input to past its output is noticed.
        word = 0xFFC0 | (5 + 17 * number) % 64
        words = torch.full((count // 2 + 8,), word - 0x10000, dtype=torch.int16)
        return words.view(torch.uint8)

    def check(self):
        changed = torch.nonzero(self.free)[:, 0][self.words[self.free] != self.expected] - self.first
        assert changed.numel() == 0, (
            f"{changed.numel()} elements were written outside of guarded tensor {self.number} ({self.kind}, "
            f"{tuple(self.copy.shape)}), at element offsets {changed[:8].tolist()}"
        )
