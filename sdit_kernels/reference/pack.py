"""Spikes as bits: the definition of the packed form in plain PyTorch.

The code of an element is its place in a table of n values. A code has b bits, b = ceil(log2(n)). Element e of a tensor stands
in block e // 4096. There, with words as wide as an element, W bits each, and 512 bytes of words in a row::

    words[block, j, l] has in bit k the bit j of the code of element  block * 4096 + k * (4096 // W) + l

So the bits of a word belong to elements that lie 512 bytes apart, and kernels need no exchange between the lanes of a vector.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 4096  # elements of a block
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


def bits_of(n: int) -> int:
    """Return the number of bits of a code of n values."""
    return max(1, (n - 1).bit_length())


def words_shape(elements: int, itemsize: int, n: int) -> tuple[int, int, int]:
    return -(-elements // BLOCK), bits_of(n), BLOCK // (8 * itemsize)


def pack(flat: Tensor, values, tuning=None, parts=1) -> tuple[Tensor, bool]:
    """Return (words, True if each element is a value of ``values.table`` bit for bit). flat has one axis.

    parts: a kernel on the CPU may work on so many equal parts of flat side by side. The result is the same.
    """
    word = WORDS[flat.itemsize]
    blocks, bits, lanes = words_shape(flat.numel(), flat.itemsize, values.n)
    x, table = flat.view(word), values.on(flat.device).view(word)
    codes, exact = torch.zeros_like(x, dtype=torch.int16), torch.zeros_like(x, dtype=torch.bool)
    for code in range(values.n):
        here = x == table[code]
        codes, exact = torch.where(here, code, codes), exact | here
    padded = codes.new_zeros(blocks * BLOCK)
    padded[: flat.numel()] = codes
    rows = padded.view(blocks, 1, 8 * flat.itemsize, lanes)
    planes = torch.arange(bits, dtype=torch.int16, device=flat.device).view(bits, 1, 1)
    ones = (rows >> planes & 1).to(word)
    shifts = torch.arange(8 * flat.itemsize, dtype=word, device=flat.device).view(-1, 1)
    return (ones << shifts).sum(2, dtype=word), bool(exact.all())


def unpack(words: Tensor, values, flat: Tensor, tuning=None) -> None:
    """Fill flat, of any shape, with the elements that ``pack`` has packed."""
    shifts = torch.arange(8 * words.itemsize, dtype=words.dtype, device=words.device).view(-1, 1)
    ones = (words.unsqueeze(2) >> shifts & 1).int()  # (blocks, bits, bits of a word, lanes)
    planes = torch.arange(words.shape[1], dtype=torch.int32, device=words.device).view(-1, 1, 1)
    codes = (ones << planes).sum(1).flatten()[: flat.numel()]
    flat.view(-1).copy_(values.on(flat.device)[codes])


def pack_counts(flat: Tensor, unit: float, tuning=None) -> tuple[Tensor, bool]:
    """Return (the elements divided by unit, in 16 bits, True if each is such a multiple from 0 to 32,767 bit for bit)."""
    numbers, word = (flat / unit).nan_to_num().clamp(0, (1 << 15) - 1).to(torch.int16), WORDS[flat.itemsize]
    found = torch.empty_like(flat)
    unpack_counts(numbers, unit, found)
    return numbers, torch.equal(found.view(word), flat.view(word))


def unpack_counts(numbers: Tensor, unit: float, flat: Tensor, tuning=None) -> None:
    """Fill flat."""
    flat.view(-1).copy_(numbers.view(-1)).mul_(unit)


# --- the indices of a max-pooling -------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """The window of a max-pooling over planes with rows of ``width`` elements. Pairs: along the height, along the width."""

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    width: int


def _starts(shape, window, device):
    """Return the row and the column at which each window starts, in the shape (1, H, 1, 1) and (1, 1, W, 1)."""
    (sh, sw), (ph, pw) = window.stride, window.padding
    rows, columns = (torch.arange(n, dtype=torch.int64, device=device) for n in shape[1:3])
    return (rows * sh - ph).view(1, -1, 1, 1), (columns * sw - pw).view(1, 1, -1, 1)


def window_codes(flat: Tensor, shape: tuple, window: Window, tuning=None) -> tuple[Tensor, bool]:
    """Return (the place of each index in its window, uint8, True if all indices are in their windows).

    flat: the indices of torch.nn.functional.max_pool2d in the order of their memory, which is ``shape``, (planes, height of the
    output, width of the output, channels if they are innermost, else 1).
    """
    indices, (row, column), (dh, dw) = flat.view(shape), _starts(shape, window, flat.device), window.dilation
    i, j = (indices // window.width - row) // dh, (indices % window.width - column) // dw
    codes = i * window.size[1] + j
    inside = (i >= 0) & (i < window.size[0]) & (j >= 0) & (j < window.size[1])
    codes, found = codes.flatten().to(torch.uint8), torch.empty_like(flat)
    window_indices(codes, shape, window, found)
    return codes, bool(inside.all()) and torch.equal(found, flat)


def window_indices(codes: Tensor, shape: tuple, window: Window, flat: Tensor, tuning=None) -> None:
    """Fill flat with the indices."""
    codes, (row, column), (dh, dw) = codes.view(shape).long(), _starts(shape, window, flat.device), window.dilation
    i, j = codes // window.size[1], codes % window.size[1]
    flat.copy_(((row + i * dh) * window.width + column + j * dw).flatten())
