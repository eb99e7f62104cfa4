"""Time token_shift and relu_squared against plain PyTorch (layer_norm, pad, lerps; relu, square) and torch.compile of it.

    python perf/bench_mix.py --json perf/results/mix.json
    python perf/bench_mix.py --quick

Each op has a correctness gate and a table. The goals at the end say PASS or FAIL, and a FAIL sets the exit status (except with
--quick, whose times mean nothing). The shapes are SDiT's tokens and the hidden layer of its channel mix.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch

from perf import harness, peers
from perf.harness import Contestant, check, check_gradients, compare, make_inference, record_goal
from perf.ops import OPS, as_tuple, normal

MODES = "forward", "backward"


def make_call(mode, f, leaves, gs):
    """Return a function that runs the forward pass, or only the backward pass of a graph that is kept."""
    if mode == "forward":
        return make_inference(f, leaves)
    out = f(*leaves)
    return lambda: torch.autograd.grad(out, leaves, gs, retain_graph=True)


def _measure_op(op, title, plain, leaves, args, settings):
    """Check forward and backward pass, then time them; return (title, rows)."""
    call = OPS[op].call
    outputs = as_tuple(call(*leaves))
    gs = [torch.randn_like(y) for y in outputs]
    check(f"{title}: output", outputs, as_tuple(plain(*leaves)), 1e-5, 1e-5)
    got, want = (make_call("backward", f, leaves, gs)() for f in (call, plain))
    check(f"{title}: gradient of x", got[0], want[0], 1e-4, 1e-4)
    check_gradients(f"{title}: gradient of mix", got[1:], want[1:], 1e-4)
    rows, saved = [], {}
    for mode in MODES:
        nbytes = OPS[op].bytes(mode, leaves)

        def row(name, f, skip=None, mode=mode, nbytes=nbytes):
            if skip:
                return Contestant(name, skip=skip, extra={"pass": mode})
            saved[name] = harness.saved_bytes(lambda: f(*leaves))[0]
            run = make_call(mode, f, leaves, gs)
            return Contestant(name, run, extra={"pass": mode, "saved_bytes": saved[name]}, bytes=nbytes)

        others = [row(p.name, p.call, p.skip) for p in peers.list_mix_peers(plain, leaves)]
        new = compare([row("ours", call), *others, harness.make_copy_contestant(nbytes, args.device)], **settings)
        # relu, then square, move four tensors where the op moves two, so a factor of two is the most to expect
        least = 2 if mode == "forward" and len(leaves) == 1 else 3
        record_goal(f"{op} {mode}, times plain PyTorch", new[1]["ratio"], least)
        record_goal(f"{op} {mode}, share of copy bandwidth", new[0]["percent_of_copy"], 40, " %")
        rows += new
    record_goal(f"{op}, bytes of its inputs over bytes saved", sum(t.nbytes for t in leaves) / saved["ours"], 1)
    return f"{title}, fp32; bytes: every tensor read or written once", rows


def shifts(args, settings):
    """LayerNorm, shift by one token and three lerps in one pass over the data"""
    leaves, title = OPS["token_shift"].data(*args.shape, device=args.device), f"token_shift, norm, 3 mixes, {args.shape}"
    return _measure_op("token_shift", title, peers.plain_token_shift, leaves, args, settings)


def squares(args, settings):
    """The squared ReLU of the hidden layer"""
    B, L, C = args.shape
    leaves = [normal(B, L, 4 * C, device=args.device)]
    return _measure_op("relu_squared", f"relu_squared, {(B, L, 4 * C)}", peers.plain_relu_squared, leaves, args, settings)


def narrow(args, settings):
    """token_shift of fp32 data under bf16 autocast: direct bf16 results against fp32 results and a cast"""
    op = OPS["token_shift"]
    leaves = op.data(*args.shape, device=args.device)

    def ours(x, *mixes):
        return op.call(x, *mixes, dtype=torch.bfloat16)

    def casts(x, *mixes):
        return tuple(y.bfloat16() for y in op.call(x, *mixes))

    check("token_shift, bf16 results", ours(*leaves), casts(*leaves), 1e-2, 1e-2)
    gs = [torch.randn_like(y) for y in ours(*leaves)]
    rows = []
    for mode in MODES:
        forms = {"bf16 results": ours, "fp32 results, cast": casts}
        found = [Contestant(name, make_call(mode, f, leaves, gs), extra={"pass": mode}) for name, f in forms.items()]
        rows += compare(found, **settings)
        record_goal(f"token_shift in bf16 {mode}, times the casts", rows[-1]["ratio"], 1)
    return f"token_shift, norm, 3 mixes, {args.shape}, fp32 to bf16", rows


SECTIONS = {"token_shift": shifts, "relu_squared": squares, "narrow": narrow}


if __name__ == "__main__":
    sys.exit(harness.run_sections(__doc__, SECTIONS))
