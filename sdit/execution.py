"""How a model is executed: the precision of matrix multiplications, CUDA graphs, and errors that name a switch that failed.

A CUDA graph holds the kernels of a function, recorded once. One call launches them all, so that a GPU does not wait for Python.
A replay reads and writes the memory that the recording saw, and repeats every Python number that it saw.
"""

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["CudaGraphs", "Replayed", "make_recorder", "matmul_precision", "name_switch", "replay_by_shape", "to_device"]

WARM_UP = 2  # calls before the recording: the first compiles kernels, the second still allocates memory and selects matmuls


@contextmanager
def name_switch(compiles: bool, command: str):
    """Name the switch in the error of a failed compilation."""
    try:
        yield
    except Exception as error:
        if not compiles or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        raise RuntimeError(f"compile (--compile) failed, {command} without it: {_first_line(error)}") from error


def _first_line(error):
    return next(filter(None, str(error).splitlines()), type(error).__name__)


@contextmanager
def matmul_precision(device: torch.device, tf32: bool):
    """On a GPU, compute float32 matrix multiplications in TF32, or in full float32, inside the with block."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def to_device(t: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device. For a GPU the copy is queued, so the CPU does not wait for earlier work of the GPU."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)


class CudaGraphs:
    """Record functions on one GPU. The graphs share their memory, so only one may run at a time."""

    def __init__(self, device: torch.device):
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable):
        """Run work on the stream of the recordings, because libraries keep workspaces per stream."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            out = work()
        current.wait_stream(self.stream)
        return out

    def record(self, work: Callable) -> Callable:
        """Record work without computing it. Return a function that computes it; each call overwrites the same result."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, such as TensorBoard's or NCCL's, may use the GPU meanwhile
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            out = work()

        def replay():
            graph.replay()
            return out

        return replay


def make_recorder(graph: bool, device: torch.device, world: int = 1) -> CudaGraphs | None:
    """Return the recorder of a run with the switch ``graph``, None without it. Raise ValueError if the run cannot use it."""
    if not graph:
        return None
    if device.type != "cuda":
        raise ValueError(f"graph (--graph) needs a GPU with CUDA graphs, the device is {device.type}")
    if world > 1:
        raise ValueError(f"graph (--graph) trains in one process, got {world} processes")
    return CudaGraphs(device)


class Replayed:
    """A function that is recorded at its third call and replayed from then on.

    Args:
        function: takes tensors by name; returns a tensor or None. Everything that changes between calls must be one of these
            tensors, or a tensor that is changed in place.
        recorder: a CudaGraphs.
        command: what the user does, for the error message: "train" or "draw".

    The shapes of the first call hold for all calls. The result is a copy, because the next call overwrites the original.
    """

    def __init__(self, function: Callable, recorder: CudaGraphs, command: str):
        self.function, self.recorder, self.command = function, recorder, command
        self.inputs, self.calls, self.replay = None, 0, None

    def __call__(self, **inputs: Tensor) -> Tensor | None:
        if self.inputs is None:
            self.inputs = {name: t.clone() for name, t in inputs.items()}
        for name, t in inputs.items():
            self.inputs[name].copy_(t)
        self.calls += 1
        if self.calls <= WARM_UP:
            return self.recorder.warm_up(self._work)
        if self.replay is None:
            try:
                self.replay = self.recorder.record(self._work)
            except Exception as error:
                raise RuntimeError(f"graph (--graph) failed, {self.command} without it: {_first_line(error)}") from error
        out = self.replay()
        return None if out is None else out.clone()

    def _work(self):
        return self.function(**self.inputs)


def replay_by_shape(function: Callable, recorder: CudaGraphs, command: str) -> Callable:
    """Return ``function`` with one :class:`Replayed` for each combination of input shapes."""
    found = {}

    def call(**inputs):
        shapes = tuple(t.shape for t in inputs.values())
        if shapes not in found:
            found[shapes] = Replayed(function, recorder, command)
        return found[shapes](**inputs)

    return call
