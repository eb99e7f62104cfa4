"""token_shift and relu_squared against plain PyTorch (layer_norm, pad, lerps; relu, square) and torch.compile of it.

    python perf/bench_mix.py --json perf/results/mix.json
    python perf/bench_mix.py --quick

One table per op and pass, each behind a correctness gate; goals at the end, PASS or FAIL, which is also the exit status (except
with --quick, whose times mean nothing). The shape is that of SDiT's tokens, and of the hidden layer of its channel mix.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from perf import harness
from perf.harness import Contestant, check, compare, goal
from sdit_kernels import relu_squared, token_shift

B, L, C, EPS = 8, 394, 384, 1e-6


def plain_shift(x, *mixes):
    normal = F.layer_norm(x, x.shape[-1:], eps=EPS)
    shifted = F.pad(normal, (0, 0, 1, -1))
    return tuple(normal * m + shifted * (1 - m) for m in mixes)


def shift(x, *mixes):
    return token_shift(x, *mixes, norm_eps=EPS)


def plain_relu_squared(x):
    return (torch.relu(x).square(),)


def fused_relu_squared(x):
    return (relu_squared(x),)


def without_grad(f, inputs):
    def run():
        with torch.no_grad():
            return f(*inputs)

    return run


def backward(f, inputs, gs):
    """The backward pass alone, of a graph that is kept."""
    out = f(*inputs)
    return lambda: torch.autograd.grad(out, inputs, gs, retain_graph=True)


def compiled(f, inputs):
    """torch.compile of f, or why there is none."""
    compiled = torch.compile(f)
    try:
        compiled(*inputs)
    except Exception as e:  # it needs a C++ compiler on the CPU, Triton on a GPU; each fails with types of its own
        return None, f"torch.compile: {str(e).splitlines()[0][:60]}"
    return compiled, None


def _section(op, title, fused, plain, inputs, args, settings):
    """Rows of forward and backward; both gates come first."""
    outputs = len(fused(*inputs))
    gs = [torch.randn_like(inputs[0]) for _ in range(outputs)]
    check(f"{title}: output", fused(*inputs), plain(*inputs), 1e-5, 1e-5)
    got, want = backward(fused, inputs, gs)(), backward(plain, inputs, gs)()
    check(f"{title}: gradient of x", got[0], want[0], 1e-4, 1e-4)
    for g, w in zip(got[1:], want[1:]):  # sums over all tokens
        check(f"{title}: gradient of a mix", g, w, 1e-4, 1e-4 * w.abs().max().item())
    other, why_not = compiled(plain, inputs)
    rows, nbytes = [], inputs[0].nbytes
    for name, arrays, measured in (("forward", 1 + outputs, without_grad), ("backward", 2 + outputs, None)):

        def contestant(label, f, skip=None, arrays=arrays, measured=measured, name=name):
            if skip:
                return Contestant(label, skip=skip, extra={"pass": name})
            fn = measured(f, inputs) if measured else backward(f, inputs, gs)
            saved = harness.saved_bytes(lambda: f(*inputs))[0]
            return Contestant(label, fn, extra={"pass": name, "saved_bytes": saved}, bytes=arrays * nbytes)

        rows += compare(
            [
                contestant("ours", fused),
                contestant("plain PyTorch", plain),
                contestant("torch.compile(plain)", other, why_not),
                harness.copy_contestant(arrays * nbytes, args.device),
            ],
            **settings,
        )
        ours, peer = rows[-4:-2]
        # relu and square, one after the other, move four arrays where two must: more than twice is luck of the caches
        least = 2 if name == "forward" and not len(inputs) - 1 else 3
        goal(f"{op} {name}, times plain PyTorch", peer["ratio"], least)
        goal(f"{op} {name}, share of copy bandwidth", ours["percent_of_copy"], 40, " %")
    goal(f"{op}, bytes of its inputs over bytes saved", sum(t.nbytes for t in inputs) / rows[0]["saved_bytes"], 1)
    return f"{title}, fp32; bytes: every tensor read or written once", rows


def _tensor(args, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(args.device).requires_grad_()


def shifts(args, settings):
    """LayerNorm, the shift by one token and three lerps, in one pass"""
    mixes = [torch.rand(C, generator=torch.Generator().manual_seed(i)).to(args.device).requires_grad_() for i in range(3)]
    inputs = [_tensor(args, B, L, C), *mixes]
    return _section("token_shift", f"token_shift, norm, 3 mixes, {(B, L, C)}", shift, plain_shift, inputs, args, settings)


def squares(args, settings):
    """The square of ReLU, of the hidden layer"""
    inputs = [_tensor(args, B, L, 4 * C)]
    return _section(
        "relu_squared", f"relu_squared, {(B, L, 4 * C)}", fused_relu_squared, plain_relu_squared, inputs, args, settings
    )


def narrow(args, settings):
    """token_shift of fp32 data for products in bf16, as under autocast: its own bf16 results, or fp32 and a cast of each"""
    mixes = [torch.rand(C, generator=torch.Generator().manual_seed(i)).to(args.device).requires_grad_() for i in range(3)]
    x = _tensor(args, B, L, C)

    def ours(x, *mixes):
        return token_shift(x, *mixes, norm_eps=EPS, dtype=torch.bfloat16)

    def casts(x, *mixes):
        return tuple(y.bfloat16() for y in shift(x, *mixes))

    inputs = x, *mixes
    check("token_shift, bf16 results", ours(*inputs), casts(*inputs), 1e-2, 1e-2)
    gs = [torch.randn_like(y) for y in ours(*inputs)]
    rows = []
    for name, measured in (("forward", without_grad), ("backward", None)):
        found = [
            Contestant(label, measured(f, inputs) if measured else backward(f, inputs, gs), extra={"pass": name})
            for label, f in (("bf16 results", ours), ("fp32 results, cast", casts))
        ]
        rows += compare(found, **settings)
        goal(f"token_shift in bf16 {name}, times the casts", rows[-1]["ratio"], 1)
    return f"token_shift, norm, 3 mixes, {(B, L, C)}, fp32 to bf16", rows


SECTIONS = {"token_shift": shifts, "relu_squared": squares, "narrow": narrow}


if __name__ == "__main__":
    sys.exit(harness.run(__doc__, SECTIONS))
