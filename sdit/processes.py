"""One process or several: join the group that torchrun starts, let the first process write, and collect results in it."""

import os
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist

__all__ = ["Processes", "join_processes", "resolve_device"]


def resolve_device(device) -> torch.device:
    """Return the device that a user names. Raise ValueError if it cannot be used."""
    try:
        resolved = torch.empty(0, device=device).device
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from None
    if resolved.type == "meta":
        raise ValueError("device 'meta' cannot be used: it holds no numbers")
    return resolved


class Processes(NamedTuple):
    """This process among the processes of a command."""

    rank: int
    world: int
    device: torch.device

    @contextmanager
    def only_first(self, *contexts):
        """Enter these contexts in the first process. If one cannot be entered, all processes raise its error."""
        refused = None
        with ExitStack() as stack:
            if self.rank == 0:
                try:
                    for context in contexts:
                        stack.enter_context(context)
                except (OSError, ValueError) as error:
                    refused = error
            refused = self.share(refused)
            if refused is not None:
                raise refused
            yield

    def share(self, value):
        """Return the value of the first process in all processes."""
        shared = [value]
        if self.world > 1:
            dist.broadcast_object_list(shared)
        return shared[0]

    def wait(self):
        """Wait until all processes have called this."""
        if self.world > 1:
            dist.all_reduce(torch.zeros((), dtype=torch.float32, device="cpu"))

    def collect(self, value):
        """Return the values of all processes, by rank, in the first process; None in the others."""
        if self.world == 1:
            return [value]
        found = [None] * self.world if self.rank == 0 else None
        dist.gather_object(value, found)
        return found


@contextmanager
def join_processes(device):
    """Yield the Processes of this process. Under torchrun, join the process group until the with block ends.

    device: None takes a GPU if there is one, each process its own.
    """
    ours = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
    local = int(os.environ.get("LOCAL_RANK", "0")) if ours or dist.is_initialized() else 0
    if device is None:
        device = f"cuda:{local % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    device = resolve_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ours:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), device) if dist.is_initialized() else Processes(0, 1, device)
    finally:
        if ours:
            dist.destroy_process_group()
