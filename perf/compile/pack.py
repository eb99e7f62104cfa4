"""The calls of the kernels of packed_spikes."""

import math
from typing import NamedTuple

import torch

from perf.compile.rows import SHAPE, Figures, Launched, Stem
from sdit_kernels.packed import Values
from sdit_kernels.reference.pack import Window, bits_of
from sdit_kernels.triton import pack
from sdit_kernels.tuning import current


class PackCase(NamedTuple):
    """Pack and restore spikes with the levels lo to hi. hi=None: the indices of a max-pooling with windows of 2 x 2."""

    variant: str
    lo: int = 0
    hi: int | None = 1
    nan: bool = False

    op = "pack"
    load = None

    @property
    def values(self):
        return self.hi - self.lo + 1 + self.nan

    def launch(self, dtype):
        n, tuning = math.prod(SHAPE), current()
        if self.hi is None:
            if dtype == torch.float32:  # no kernel has data of a floating dtype
                indices, shape = torch.empty(n // 32 * 32, dtype=torch.int64), (n // 1024, 32, 32, 1)
                window = Window((2, 2), (2, 2), (0, 0), (1, 1), 64)
                codes, _ = pack.window_codes(indices, shape, window, tuning)
                pack.window_indices(codes, shape, window, indices, tuning)
            return
        table = torch.cat([torch.arange(self.lo, self.hi + 1.0), torch.full((int(self.nan),), math.nan)]).to(dtype)
        values, flat = Values(table, self.lo, 1.0, self.nan), torch.empty(n, dtype=dtype)
        words, _ = pack.pack(flat, values, tuning)
        pack.unpack(words, values, flat, tuning)

    def figures(self, launched: Launched) -> Figures:
        """Count per element. Reads of the table, one per element, come from a cache and do not count as bytes."""
        if self.hi is None:  # per thread 16 indices of 8 bytes, and their codes of one byte
            return Figures(launched.name, launched.found, 16, 8 + 1, widths={128})
        values = launched.neurons * 8 * launched.size
        count, widths = dict(launched.found), launched.widths
        if launched.name == "unpack" and not launched.arguments["BINARY"]:
            count["bytes"] -= values * launched.size
            widths = widths - {8 * launched.size}
        return Figures(launched.name, count, values, launched.size + bits_of(self.values) / 8, widths=widths)


CASES = (
    PackCase("binary"),
    PackCase("ternary", -1),
    PackCase("(0, 4)", 0, 4, True),
    PackCase("(0, 14)", 0, 14, True),
    PackCase("indices, 2 x 2", 0, None),
)

NOTES = """
How to read it:

- Columns as in compile_lif.md; *bytes*, *instructions* and *special* per element. *(lo, hi)*: spikes of the levels lo to hi,
  and a code for NaN.
- *floor*: the element and its bits, once each. To restore levels, a thread reads each value from a table that stays in the L1
  cache; these reads do not count, neither as bytes nor as accesses.
- *indices*: the 64-bit indices of a max-pooling become their places in the windows, one byte each. `pack` packs these further.
"""

PACK = Stem(CASES, CASES[:1], 1.001, True, NOTES)
