"""The lines of metrics.jsonl, the progress bar and TensorBoard of a training run."""

import json
import math
import os
import sys
import time
from contextlib import suppress

import torch

from .files import name_in_errors

__all__ = ["Log", "lines_until"]


def lines_until(path, step: int) -> bytes:
    """Return the complete lines of a metrics.jsonl up to this step; none if the file does not exist."""
    if not path.exists():
        return b""
    return b"".join(line for line in path.read_bytes().splitlines(True) if _step_of_line(line) <= step)


def _step_of_line(line):
    """Return the step of a line of metrics.jsonl; infinity if the line is incomplete."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


class Log:
    """Write the metrics to metrics.jsonl, the progress bar and TensorBoard."""

    def __init__(self, run, start):
        self.run, self.start, self.file, self.board, self.bar = run, start, None, None, None

    def __enter__(self):
        run = self.run
        if run.processes.rank == 0:
            self.file = (run.out / "metrics.jsonl").open("ab")
            with suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(run.out / "tensorboard"), purge_step=self.start + 1)
        if run.progress:
            try:
                from tqdm import tqdm
            except ImportError:
                raise ImportError("the progress bar needs tqdm: pip install tqdm") from None
            name = run.out.name
            self.bar = tqdm(total=run.settings.steps, initial=self.start, desc=name, unit=" steps", dynamic_ncols=True)
        self.restart_clock()
        return self

    def __exit__(self, *_):
        for each in (self.bar, self.board, self.file):
            if each is not None:
                each.close()

    def restart_clock(self):
        self.began, self.seen = time.perf_counter(), 0

    def advance(self):
        self.seen += 1
        if self.bar is not None:
            self.bar.update()

    def write_line(self, step, rate, rates):
        """Write the means of the pending steps, and empty the list of pending steps."""
        run = self.run
        loss, mse, vb, norm = torch.stack(run.pending).mean(0).tolist()
        run.pending.clear()
        if self.file is None:
            return
        rates = {name: round(value.item(), 6) for name, value in rates.items()}
        speed = (self.seen + 1) * run.settings.batch_size / (time.perf_counter() - self.began)
        record = {"step": step, "loss": loss, "mse": mse, "vb": vb, "grad_norm": norm, "lr": rate, "rates": rates}
        record |= {"images_per_s": round(speed, 1), "memory_mb": _peak_memory_mb(run.processes.device)}
        advice = f"free some space, then --resume {run.out} continues from the newest checkpoint"
        with name_in_errors(run.out / "metrics.jsonl", advice):
            self.file.write(json.dumps(record).encode() + b"\n")
            self.file.flush()
        self.restart_clock()
        self.seen = -1  # advance() still counts this step, whose time is already measured
        firing = sum(rates.values()) / max(1, len(rates))
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{loss:.4f}", firing=f"{firing:.3f}", refresh=False)
        if self.board is not None:
            for name in ("loss", "mse", "vb", "grad_norm", "lr", "images_per_s"):
                self.board.add_scalar(name, record[name], step)
            for name, value in rates.items():
                self.board.add_scalar(f"firing rate/{name}", value, step)

    def flush(self):
        if self.file is not None:
            os.fsync(self.file.fileno())


def _peak_memory_mb(device):
    """Return the peak memory so far in MB: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
    with suppress(ImportError):
        import resource

        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)
