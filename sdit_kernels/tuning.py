"""The numbers that decide how the kernels cut their work: threads, tiles, tokens between checkpoints.

An op reads the record once per call and gives it to the launchers. The numbers change the time, the memory and, where a
rounding moves, the last bits of a result. Users run the defaults; tests and sweeps run others under ``tuned``.
"""

from contextlib import contextmanager
from typing import NamedTuple


class Tuning(NamedTuple):
    """Percentages and ratios without a source come from an H200: perf/results/gpu_h200.json, "launch parameters"."""

    # wkv: tokens between the scan states kept for the backward pass, a power of two. 16 costs 0.75 bytes per element in fp32.
    # Forward and backward, 8 takes 1.13 to 1.17 times as long, 32 1.10 to 1.17 times.
    wkv_checkpoint_tokens: int = 16
    # spiking_wkv: pairs of simulation step and token between its scan states, and at most wkv_checkpoint_tokens tokens: as many
    # as the backward pass can hold, on the CPU in a cache, in Triton in registers.
    spiking_pairs_cpu: int = 64
    spiking_pairs_triton: int = 16

    # Triton, lif, lif_rate, leaky, relu_squared, token_shift: threads of a program. lif_rate takes 0.875 of the time that it
    # takes with 64; 256 is nowhere faster.
    elementwise_threads: int = 128
    # The same: programs over which rows or tokens are spread where gradients of parameters or mixes are summed.
    sum_programs: int = 2048
    # Triton, token_shift: channels that a tile with a norm holds at most.
    shift_channels: int = 4096

    # Triton, wkv: channels, and threads, of a program. Forward, 32 takes 1.05 to 1.11 times as long; 128 is not faster.
    wkv_threads: int = 64
    # Triton, wkv: threads that keep a GPU busy, from which "auto" and the length of chunks follow. On an H100: 16 warps on each
    # of 132 SMs, each with 4 to 6 KiB of loads in flight.
    wkv_busy_threads: int = 1 << 16
    # Triton, wkv: tokens that the backward pass holds in registers. 4 takes 1.3 times as long, 16 1.2 to 1.7 times: it spills
    # with a gate (compile_report.py).
    wkv_held_tokens: int = 8
    # Triton, wkv and spiking_wkv: rows, and channels, of a tile in which parameter gradients are summed.
    wkv_sums_block: int = 32
    # CPU, wkv: tiles of a segment in the chunked algorithm.
    wkv_segment_tiles: int = 16

    # Triton, spiking_wkv: channels of a program: one warp, two where a wave has 64 lanes and would else be half empty. 64 takes
    # the same time.
    spiking_threads: int = 32
    # Triton, spiking_wkv: pairs of step and token that the backward pass holds in registers; 16 would take all 255 and spill.
    spiking_held_pairs: int = 8
    # Triton, spiking_wkv: B * C from which one walk is faster than the kernels of wkv and lif ("sizes" in the same file).
    spiking_min_channels_fused: int = 1 << 15


_current = Tuning()


def current() -> Tuning:
    """The record that ops read."""
    return _current


@contextmanager
def tuned(record: Tuning | None = None, **changes: int):
    """Run the calls of this block with ``record`` (None: the current one) and ``changes`` made to it.

    The backward pass of such a call belongs in the block too: it reads the record again, and it may run on another thread.
    Therefore the record belongs to the process, not to a thread.

    Example:
        >>> import torch, sdit_kernels
        >>> from sdit_kernels.tuning import tuned
        >>> with tuned(elementwise_threads=64):
        ...     s = sdit_kernels.lif(torch.ones(4, 3) * 2)
    """
    global _current
    before = _current
    _current = (before if record is None else record)._replace(**changes)
    try:
        yield
    finally:
        _current = before
