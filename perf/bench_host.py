"""Host time of small calls: Python and launch, as a ratio to torch.relu on the same tensor. Needs no GPU.

    python perf/bench_host.py --json perf/results/host.json
    python perf/bench_host.py --before perf/results/host.json --json perf/results/host.json

A call on small tensors waits for Python, not for the kernel. The Triton kernels are compiled for an H100, on CPU tensors, and
their launch does nothing. The CPU kernels run. ``--before`` adds the ratios of an earlier file as a column.
"""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch

from perf import harness, ops
from sdit_kernels import backend

TARGET = "cuda:90"
SHAPE = 2, 8, 32  # batch, tokens, channels
MODES = "forward", "forward+backward"
NAMES = "lif", "lif_rate", "leaky", "wkv", "spiking_wkv", "token_shift"
# {(section, op): the greatest ratio forward, and forward and backward}
GOALS = {("triton", "lif"): (6, 3.5), ("triton", "wkv"): (7.5, 4.6), ("cpu", "lif"): (4.5, 3)}


def make_calls():
    """Return {name: (function with one output, leaves)}, torch.relu first."""
    calls = {op: (ops.OPS[op].call, ops.OPS[op].data(*SHAPE)) for op in NAMES}
    shift, leaves = calls["token_shift"]
    calls["token_shift"] = (lambda *leaves: shift(*leaves)[0], leaves)
    return {"torch.relu": (torch.relu, calls["lif"][1])} | calls


def compare_calls(section, args, settings):
    # Other processes of the machine disturb few of many short samples.
    settings = settings | {"rounds": 3 if args.quick else 151, "min_time": 0.002}
    before = {}
    if args.before:
        for row in json.loads(pathlib.Path(args.before).read_text())["rows"]:
            before[row["section"], row["name"], row["mode"]] = row.get("ratio_before", row["ratio"])
    rows, calls = [], make_calls()
    for mode in MODES:
        contestants = []
        for name, (f, leaves) in calls.items():
            with torch.no_grad():
                g = torch.ones_like(f(*leaves))
            contestants.append(ops.make_contestant(name, mode, f, leaves, g))
        for row in harness.compare(contestants, **settings):
            name = row["name"]
            if (section, name) in GOALS:
                limit = GOALS[section, name][MODES.index(mode)]
                harness.record_goal(f"{section}, {name}, {mode}: ratio to torch.relu", row["ratio"], limit, at_least=False)
            rows.append(row | ({"ratio_before": before[section, name, mode]} if before else {}))
    return f"host time of a call, x {(ops.T, *SHAPE)} fp32", rows


def triton(args, settings):
    """Triton kernels, whose launch does nothing"""
    from perf.compile.launch import no_launches

    with no_launches(TARGET), backend("triton"):
        return compare_calls("triton", args, settings)


def cpu(args, settings):
    """CPU kernels"""
    return compare_calls("cpu", args, settings)


def _add_arguments(parser):
    parser.add_argument("--before", metavar="PATH", help="a file of --json, whose ratios are shown too")


if __name__ == "__main__":
    sys.exit(harness.run_sections(__doc__, {"triton": triton, "cpu": cpu}, add_arguments=_add_arguments))
