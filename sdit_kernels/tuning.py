"""The numbers that set how the kernels split their work: threads, tiles, tokens between checkpoints.

An op reads the record once per call and passes it to the launchers. The numbers change the time, the memory and, by rounding,
the last bits of a result. Users run the defaults. Tests and benchmarks run other numbers under ``tuned``.
"""

from contextlib import contextmanager
from typing import NamedTuple


class Tuning(NamedTuple):
    """Percentages and ratios without a source come from an H200: perf/results/gpu_h200.json, "launch parameters"."""

    # wkv: tokens between the checkpoints of the scan state, a power of two. 16 costs 0.75 bytes per element in float32.
    # Forward and backward together, 8 takes 1.13 to 1.17 times as long, and 32 takes 1.10 to 1.17 times as long.
    wkv_checkpoint_tokens: int = 16
    # spiking_wkv: pairs (time step, token) between its checkpoints, and at most wkv_checkpoint_tokens tokens: as many as the
    # backward pass can hold, in a cache on the CPU and in registers in Triton.
    spiking_pairs_cpu: int = 64
    spiking_pairs_triton: int = 16

    # Triton, lif, lif_rate, leaky, relu_squared, token_shift: threads per program. lif_rate takes 0.875 of its time with 64
    # threads. 256 is not faster for any op.
    elementwise_threads: int = 128
    # The same ops: number of programs if they sum gradients of parameters or mixes.
    sum_programs: int = 2048
    # Triton, token_shift: maximum channels of a tile with a norm.
    shift_channels: int = 4096

    # Triton, wkv: channels per program, which is the number of its threads. Forward, 32 takes 1.05 to 1.11 times as long; 128
    # is not faster.
    wkv_threads: int = 64
    # Triton, wkv: threads that keep a GPU busy. "auto" and the length of chunks follow from it. On an H100: 16 warps on each of
    # 132 SMs, each with 4 to 6 KiB of loads in flight.
    wkv_busy_threads: int = 1 << 16
    # Triton, wkv: tokens that the backward pass holds in registers. 4 takes 1.3 times as long. 16 takes 1.2 to 1.7 times as
    # long: it spills registers with a gate (compile_report.py).
    wkv_held_tokens: int = 8
    # Triton, wkv and spiking_wkv: rows and channels of a tile that sums parameter gradients.
    wkv_sums_block: int = 32
    # CPU, norm_lif: if a channel has at most so many contiguous values, a row of the kernels holds all channels, because every
    # row costs time.
    norm_short_row_cpu: int = 32
    # CPU, wkv: tiles per segment in the chunked algorithm.
    wkv_segment_tiles: int = 16

    # Triton, spiking_wkv: channels per program, one per thread. 64 takes the same time.
    spiking_threads: int = 32
    # Triton, spiking_wkv: pairs (time step, token) that the backward pass holds in registers; 16 would spill.
    spiking_held_pairs: int = 8
    # Triton, spiking_wkv: smallest B * C for which the fused kernel is faster than the kernels of wkv and lif ("sizes" in the
    # same file).
    spiking_min_channels_fused: int = 1 << 15


_current = Tuning()


def current() -> Tuning:
    """Return the record that ops read."""
    return _current


@contextmanager
def tuned(record: Tuning | None = None, **changes: int):
    """Run the calls of this block with ``record`` (None: the current record) and with ``changes`` applied to it.

    Run the backward pass in the block too, because it reads the record again. The backward pass may run on another thread, so
    the record belongs to the process, not to a thread.

    Args:
        record: a complete record; None: the current record.
        changes: fields of the record and their new values.

    Raises:
        ValueError: the record has no such field.

    Example:
        >>> import torch, sdit_kernels
        >>> from sdit_kernels.tuning import tuned
        >>> with tuned(elementwise_threads=64):
        ...     s = sdit_kernels.lif(torch.ones(4, 3) * 2)
    """
    global _current
    if unknown := changes.keys() - set(Tuning._fields):  # Python 3.13 raises another error than the versions before
        raise ValueError(f"tuned takes the fields {', '.join(Tuning._fields)}, got {', '.join(sorted(unknown))}")
    before = _current
    _current = (before if record is None else record)._replace(**changes)
    try:
        yield
    finally:
        _current = before
