"""Everything that needs a GPU in one command of under nine minutes: are the values right there, and how fast is it?

    python perf/gpu_suite.py --json perf/results/gpu.json
    python perf/gpu_suite.py --only checks,rules
    python perf/gpu_suite.py --dry-run          the same on the CPU at small sizes, so that it cannot rot; its times mean nothing

tests     the project's tests of the Triton kernels, whose CPU tensors are carried to the device and back at every launch
checks    tensors that live on the device, at sizes of real models: values and gradients against float64, repeatability, more
          than 2^31 elements, no host syncs, side streams, CUDA graphs, torch.compile, autocast, the whole network
timings   the sections of bench_lif.py, bench_wkv.py, bench_mix.py and bench_sdit.py, and `rules`: launch parameters, and
          "serial" against "chunked", which the launchers' rules quote

Results are written after every part, so that a part that fails or runs out of time leaves those before it. The exit status says
whether a test or a check failed.
"""

import argparse
import concurrent.futures
import contextlib
import copy
import functools
import importlib
import json
import multiprocessing
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import traceback

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch

from perf import bench_lif, bench_mix, bench_sdit, bench_wkv, harness
from perf.bench_wkv import forward_backward, inference, parameters, rms_error
from perf.harness import Contestant, compare
from sdit import PRESETS, SDiT
from sdit_kernels import backend, lif, lif_rate, nn, relu_squared, spiking_wkv, token_shift, wkv, wkv_step, wkv_step_

HALF = (torch.bfloat16, torch.float16)
LIMIT = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # relative rms of outputs
GRADIENT = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


# ---- checks: each takes (device, small) and returns figures, or raises AssertionError --------------------------------------


def normal(*shape, device, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, device=device)).to(dtype).requires_grad_()


def agree(what, f, leaves, exact_output=False):
    """Relative rms errors of outputs and gradients of f(*leaves), against the definition in float64 on the same device."""

    def several(*tensors):
        out = f(*tensors)
        return out if isinstance(out, tuple) else (out,)

    outputs = several(*leaves)
    dtype = outputs[0].dtype
    gs = [normal(*o.shape, device=o.device, dtype=o.dtype, seed=9 + i).detach() for i, o in enumerate(outputs)]
    found = torch.autograd.grad(outputs, leaves, gs)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    with backend("reference"):
        wanted = several(*wide)
        want = torch.autograd.grad(wanted, wide, [g.double() for g in gs])
    if exact_output:
        assert torch.equal(outputs[0].double(), wanted[0]), f"{what}: outputs differ"
    assert all(t.isfinite().all() for t in (*outputs, *found)), f"{what}: not finite"
    for kind, got, exact, limit in (("output", outputs, wanted, LIMIT), ("gradient", found, want, GRADIENT)):
        for i, (a, b) in enumerate(zip(got, exact)):
            error = rms_error(a, b)
            assert error <= limit[dtype], f"{what}: {kind} {i} has relative rms error {error:.2e}, {limit[dtype]:.0e} allowed"
    return {what: {"output": rms_error(outputs, wanted), "gradient": rms_error(found, want)}}


def values_lif(device, small):
    shape = (2, 37, 48) if small else (8, 394, 384)
    found = {}
    for dtype in (torch.float32, *HALF):
        x = bench_lif.current(4, *shape, device=device, dtype=dtype)
        found |= agree(f"lif {dtype}", lif, [x], exact_output=True)
        gate, residual = normal(*shape, device=device, dtype=dtype), normal(*shape, device=device, dtype=dtype, seed=1)
        found |= agree(f"lif_rate {dtype}", lambda x, r, g: lif_rate(x, 4, r, g, tau=4.0), [x[0].detach().requires_grad_(), residual, gate])
    x = bench_lif.current(4, *shape, device=device)
    long = bench_lif.current(37, *shape[:2], 64, device=device)
    found |= agree("lif, 37 steps, soft reset", lambda x: lif(x, v_reset=None, surrogate="sigmoid"), [long])
    v = normal(*shape, device=device, scale=0.1)
    tau = (torch.rand(shape[-1], device=device) + 1.5).requires_grad_()
    found |= agree(
        "lif, learnt tau, states", lambda x, v, tau: lif(x, v, tau=tau, return_v=True, detach_reset=True), [x, v, tau]
    )
    return found


def values_wkv(device, small, dtypes=(torch.float32,)):
    B, L, C = (2, 37, 48) if small else (8, 394, 384)
    found = {}
    for dtype in dtypes:
        k, v, r = (normal(B, L, C, device=device, dtype=dtype, seed=i) for i in range(3))
        p = [t.requires_grad_() for t in parameters(C, device)]
        for algorithm in ("serial", "chunked"):
            for gate in (False, True):
                leaves = [*p, k, v, r][: 5 if gate else 4]

                def f(d, u, k, v, r=None, algorithm=algorithm):
                    return wkv(d, u, k, v, r=r, algorithm=algorithm)

                found |= agree(f"wkv {algorithm}{', gate' * gate} {dtype}", f, leaves)
    return found


def values_wkv_half(device, small):
    return values_wkv(device, small, HALF)


def values_wkv_states(device, small):
    B, L, C = (2, 37, 48) if small else (4, 300, 384)
    k, v = (normal(B, L, C, device=device, seed=i) for i in range(2))
    p = [t.requires_grad_() for t in parameters(C, device)]
    state = [normal(B, C, device=device, seed=i) for i in (3, 4)]
    flat = lambda out: (out[0], *out[1])
    found = {}
    for algorithm in ("serial", "chunked"):
        found |= agree(
            f"wkv {algorithm}, states",
            lambda d, u, k, v, y, s, a=algorithm: flat(wkv(d, u, k, v, state=(y, s), return_state=True, algorithm=a)),
            [*p, k, v, *state],
        )
        found |= agree(
            f"wkv {algorithm}, bidirectional",
            lambda d, u, k, v, a=algorithm: wkv(d, u, k, v, bidirectional=True, algorithm=a),
            [*p, k, v],
        )
        ends = torch.tensor([0, 5, 5, L // 2, B * L], device=device)
        packed = [t.detach().reshape(1, B * L, C).requires_grad_() for t in (k, v)]
        found |= agree(
            f"wkv {algorithm}, packed",
            lambda d, u, k, v, a=algorithm: wkv(d, u, k, v, cu_seqlens=ends, max_seqlen=B * L, algorithm=a),
            [*p, *packed],
        )
    return found


def steep_decays(device, small):
    """log_decay = -inf: a token sees itself and its neighbour. Exponents of 1e20 must not leave their rounding behind."""
    C = 48
    k, v = (normal(2, 21, C, device=device, seed=i) for i in range(2))
    k.data[:, 3:5], k.data[1, 15:] = -torch.inf, -torch.inf
    u, w = parameters(C, device)[1], torch.full((C,), -torch.inf, device=device)
    found = {}
    for algorithm in ("serial", "chunked"):
        for both in (False, True):
            f = lambda k, v, a=algorithm, b=both: wkv(
                None, u.to(k.dtype), k, v, log_decay=w.to(k.dtype), bidirectional=b, algorithm=a
            )
            found |= agree(f"wkv {algorithm}{', bidirectional' * both}", f, [k, v])
    return found


def accuracy(device, small):
    args = argparse.Namespace(device=device, dtype=torch.float32, quick=small)
    before = len(harness.goals)
    _, rows = bench_wkv.accuracy(args, {})
    missed = [g for g in harness.goals[before:] if g.startswith("FAIL")]
    del harness.goals[before:]
    assert not missed, missed
    return {row.pop("name"): row for row in rows}


def values_spiking_wkv(device, small):
    """Spikes within rounding of the threshold may differ, and their gradients with them."""
    found = {}
    for B in (2, 3) if small else (4, 96):  # the kernels of wkv and lif; one walk
        for dtype in (torch.float32, torch.bfloat16):
            T, L, C = (4, 21, 48) if small else (4, 131, 384)
            k, r = (normal(T, B, L, C, device=device, dtype=dtype, seed=i) for i in range(2))
            v = normal(T, B, L, C, device=device, dtype=dtype, scale=3.0, seed=2)
            leaves = [*(t.requires_grad_() for t in parameters(C, device)), k, v, r]

            def chain(d, u, *data):
                k, v, r = (t.float().flatten(0, 1) for t in data)
                return lif(wkv(d, u, k, v, r=r).unflatten(0, (T, B))).to(dtype)

            s, t = spiking_wkv(*leaves), chain(*leaves)
            same = (s == t).float().mean().item()
            g = torch.randn_like(s)
            errors = [rms_error(a, b) for a, b in zip(torch.autograd.grad(s, leaves, g), torch.autograd.grad(t, leaves, g))]
            assert same > 0.9999, f"spikes agree in {same:.4%}"
            assert max(errors) < (0.02 if dtype == torch.float32 else 0.03), errors
            found[f"B={B}, {dtype}"] = {"spikes_equal": same, "gradient_errors": errors}
    return found


def values_mix(device, small):
    found = {}
    for C in (48, 40) if small else (384, 1536, 4096):
        for dtype in (torch.float32, torch.bfloat16):
            x = normal(2, 37 if small else 394, C, device=device, dtype=dtype)
            mixes = [torch.rand(C, device=device).requires_grad_() for _ in range(3)]
            for eps in (None, 1e-6):
                f = lambda x, *m, eps=eps: token_shift(x, *m, norm_eps=eps)
                found |= agree(f"token_shift{', norm' * bool(eps)}, C={C}, {dtype}", f, [x, *mixes])
            found |= agree(f"relu_squared, C={C}, {dtype}", relu_squared, [x])
    return found


def calls(device, small):
    """{name: (function, leaves)}: one call of each op."""
    B, L, C = (2, 21, 48) if small else (8, 394, 384)
    x, k, v, r = (normal(B, L, C, device=device, seed=i) for i in range(4))
    d, u = (t.requires_grad_() for t in parameters(C, device))
    four = [normal(4, 2, L, C, device=device, seed=i) for i in range(3)]
    tau = torch.full((C,), 2.0, device=device).requires_grad_()
    ends = torch.tensor([0, L // 3, B * L], device=device)
    return {
        "lif": (lambda x, tau: lif(x, tau=tau), [normal(4, B, L, C, device=device), tau]),
        "lif_rate": (lambda x, tau: lif_rate(x, tau=tau), [x, tau]),
        "wkv serial": (lambda *a: wkv(*a, algorithm="serial"), [d, u, k, v]),
        "wkv chunked": (lambda *a: wkv(*a, algorithm="chunked"), [d, u, k, v]),
        "wkv gate, packed": (
            lambda d, u, k, v, r: wkv(d, u, k, v, r=r, cu_seqlens=ends, max_seqlen=B * L),
            [d, u, *(t.detach().reshape(1, B * L, C).requires_grad_() for t in (k, v, r))],
        ),
        "wkv bidirectional": (lambda *a: wkv(*a, bidirectional=True), [d, u, k, v]),
        "spiking_wkv": (spiking_wkv, [d, u, *four]),
        "token_shift": (lambda x, m: token_shift(x, m, norm_eps=1e-6)[0], [x, torch.rand(C, device=device).requires_grad_()]),
        "relu_squared": (relu_squared, [x]),
    }


def run(f, leaves):
    out = f(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out)))


def repeatable(device, small):
    """Bit for bit, also under the load of other work on the device."""
    for name, (f, leaves) in calls(device, small).items():
        first = run(f, leaves)
        for _ in range(3):
            assert all(map(torch.equal, first, run(f, leaves))), f"{name} differs from run to run"
    return {"ops": len(calls(device, True))}


def no_host_sync(device, small):
    if device == "cpu":
        small = True
    ops = calls(device, small)
    for f, leaves in ops.values():
        run(f, leaves)  # compile
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        for name, (f, leaves) in ops.items():
            try:
                run(f, leaves)
            except RuntimeError as e:
                raise AssertionError(f"{name}: {e}") from None
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return {"ops": len(ops)}


def side_stream(device, small):
    """Work queued on another stream sees the inputs that this stream makes, and no others."""
    if device == "cpu":
        return {"note": "needs a GPU"}
    for name, (f, leaves) in calls(device, small).items():
        want = run(f, leaves)
        stream = torch.cuda.Stream()
        late = [torch.full_like(t, float("nan")).requires_grad_() for t in leaves]
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            with torch.no_grad():
                for a, b in zip(late, leaves):
                    a.copy_(b)
            got = run(f, late)
        stream.synchronize()
        assert all(map(torch.equal, want, got)), f"{name} does not keep to its stream"
    return {}


def on_its_stream(device, small):
    """What takes the same calls, in one process, so that they compile once."""
    for check in (repeatable, no_host_sync, side_stream, cuda_graph):
        check(device, small)
    return {"ops": len(calls(device, True))}


def cuda_graph(device, small):
    """Forward and backward captured once, replayed on other inputs; decoding with wkv_step_ likewise."""
    if device == "cpu":
        return {"note": "needs a GPU"}
    found = {}
    for name, (f, leaves) in calls(device, small).items():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run(f, leaves)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            static = run(f, leaves)
        with torch.no_grad():
            leaves[-1].add_(0.25)
        graph.replay()
        torch.cuda.synchronize()
        got = [t.clone() for t in static]
        assert all(map(torch.equal, got, run(f, leaves))), f"{name}: the replay differs"
    B, C = 4, 768
    d, u = parameters(C, device)
    k, v = (normal(B, C, device=device, seed=i).detach() for i in range(2))
    state = torch.zeros(B, C, device=device), torch.full((B, C), -torch.inf, device=device)
    other = None
    wkv_step_(d, u, k, v, tuple(t.clone() for t in state))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = wkv_step_(d, u, k, v, state)
    for i in range(5):
        k.copy_(normal(B, C, device=device, seed=10 + i))
        graph.replay()
        want, other = wkv_step(d, u, k, v, other)
        assert torch.equal(out, want), f"token {i} of a replayed wkv_step_ differs"
    return found


def compiled(device, small):
    """torch.compile(fullgraph=True) of a block over the ops, forward and backward, for two batch sizes."""
    torch.manual_seed(0)
    C = 32 if small else 384

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.time, self.channel = nn.TimeMix(C, neuron=nn.LIFRate()), nn.ChannelMix(C, neuron=nn.LIFRate())

        def forward(self, x):
            x = self.time(x, residual=x)
            x = x[0] if isinstance(x, tuple) else x
            x = self.channel(x, residual=x)
            return x[0] if isinstance(x, tuple) else x

    block = Block().to(device)
    fast = torch.compile(block, fullgraph=True, backend="aot_eager" if small else "inductor", dynamic=True)
    worst = 0.0
    for batch in (2, 3):
        x = normal(batch, 33, C, device=device, seed=batch)
        a = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
        b = torch.autograd.grad(fast(x).square().sum(), [x, *block.parameters()])
        worst = max(worst, *(rms_error(p, q.double()) for p, q in zip(b, a)))
    assert worst < 0.05, f"relative rms {worst:.2e} between a compiled block and the block"  # spikes flip within rounding
    return {"gradients_rms": worst}


def autocast(device, small):
    """A training step of SDiT in bf16: finite, and near that in fp32."""
    args = argparse.Namespace(device=device, batch=1 if small else 16)
    model, inputs = bench_sdit.case(args, args.batch)
    target = torch.zeros((), device=device)
    losses = [bench_sdit.step(copy.deepcopy(model), inputs, target, dtype=dtype).item() for dtype in (None, torch.bfloat16)]
    assert abs(losses[1] / losses[0] - 1) < 0.1, f"loss {losses[0]:.4g} in fp32, {losses[1]:.4g} in bf16"
    return {"loss_fp32": losses[0], "loss_bf16": losses[1]}


def network(device, small):
    """The whole network in float64, outputs and every gradient, against its plain form."""
    return bench_sdit.agree(argparse.Namespace(device=device, batch=1))


def big_offsets(device, small):
    """More than 2^31 elements a tensor: the last rows equal those of a call on them alone, forward and backward."""
    rows, L, C = (3, 40, 8) if small else (350, 16384, 384)  # 2.2e9 elements
    dtype = torch.bfloat16
    x = torch.empty(rows, L, C, device=device, dtype=dtype)
    for i in range(0, rows, 10):
        x[i : i + 10].normal_()
    found = {"elements": x.numel()}

    def far(name, f, x, last, g_last):
        """``last``: the part that a small call gets; the backward pass is compared too."""
        x.requires_grad_()
        y = f(x)
        dx = torch.autograd.grad(y, x, torch.ones((), device=device, dtype=y.dtype).expand(y.shape))[0]
        part = last(x).detach().clone().requires_grad_()
        z = f(part)
        dz = torch.autograd.grad(z, part, torch.ones_like(z))[0]
        assert torch.equal(g_last(y), z) and torch.equal(last(dx), dz), f"{name}: wrong behind 2^31 elements"
        found[name] = "equal"

    d, u = parameters(C, device)
    batch, time_ = (lambda t: t[-1:]), (lambda t: t[:, -1:])
    far("relu_squared", relu_squared, x, batch, batch)
    far("lif_rate", lif_rate, x, batch, batch)
    far("token_shift", lambda x: token_shift(x, torch.full((C,), 0.3, device=device), norm_eps=1e-6)[0], x, batch, batch)
    far("wkv serial", lambda k: wkv(d, u, k, k, algorithm="serial"), x, batch, batch)
    four = x.detach().view(-1)[: x.numel() // 4 * 4].view(4, -1, 4 if small else 64)
    far("lif", lif, four, time_, time_)
    five = x.detach()[: rows // 2 * 2].view(2, rows // 2, L, C)
    far("spiking_wkv", lambda k: spiking_wkv(d, u, k, k), five, time_, time_)
    return found


CHECKS = {
    f.__name__: f
    for f in (
        on_its_stream, values_wkv_half, values_wkv_states, values_wkv, network, autocast, values_spiking_wkv, compiled,
        big_offsets, steep_decays, values_mix, values_lif, accuracy,
    )
}  # fmt: skip


def _check(name, device, small):
    """One check in a process of its own: (name, result)."""
    began = time.perf_counter()
    try:
        result = {"passed": True, "figures": CHECKS[name](device, small)}
    except Exception as e:  # a check that breaks is one that fails, and the others go on
        result = {"passed": False, "error": f"{type(e).__name__}: {e}"[:2000], "where": traceback.format_exc()[-1500:]}
    return name, result | {"seconds": round(time.perf_counter() - began, 1)}


# ---- launch rules ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def launched_with(module, **values):
    kernels = importlib.import_module(f"sdit_kernels.{module}")
    before = {name: getattr(kernels, name) for name in values}
    for name, value in values.items():
        setattr(kernels, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(kernels, name, value)


def launch_cases(device, small):
    """(name, module, parameters to try, function, shapes of its data, ideal passes over one of them forward and in all)"""
    L, C = (33, 48) if small else (394, 384)
    n = 1 << (12 if small else 24)
    d, u = (t.requires_grad_() for t in parameters(C, device))
    mixes = [torch.rand(C, device=device).requires_grad_() for _ in range(3)]
    many, few, one = (2, 1, 1) if small else (128, 32, 1)

    def tries(name, *values):
        return [{name: value} for value in values]

    for threads in (tries("_THREADS", 64, 128, 256),):
        yield "lif", "triton.lif", threads, lif, [(4, n // 4)], (2, 5)
        yield "lif_rate", "triton.lif", threads, lif_rate, [(n,)], (2, 5)
        yield "token_shift", "triton.mix", threads, lambda x: token_shift(x, *mixes, norm_eps=1e-6), [(few, L, C)], (4, 8)
        yield "relu_squared", "triton.mix", threads, relu_squared, [(n,)], (2, 5)
    for B in (few, many):
        for name, module, values in (
            ("threads", "triton.wkv", tries("_THREADS", 32, 64, 128)),
            ("tokens held", "triton.wkv", tries("_HELD", 4, 8, 16)),
            ("tile", "layout", tries("TILE", 8, 16, 32) if device == "cuda" else []),  # compiled into the CPU's kernels
        ):
            f = lambda k, v: wkv(d, u, k, v, algorithm="serial")
            yield f"wkv serial, B={B}: {name}", module, values, f, [(B, L, C)] * 2, (3, 8)
    for B, length in ((one, 16 * L), (few // 4 or 1, L), (few, L)):
        f = lambda k, v: wkv(d, u, k, v, algorithm="chunked")
        fill = tries("_FILL", *(1 << e for e in (15, 16, 17, 18)))
        yield f"wkv chunked, B={B}, L={length}: fill", "triton.wkv", fill, f, [(B, length, C)] * 2, (3, 8)
    f = lambda k, v, r: spiking_wkv(d, u, k, v, r)
    yield "spiking_wkv", "triton.spiking_wkv", tries("_THREADS", 32, 64), f, [(4, few, L, C)] * 3, (4, 11)


def launch_case(case, device):
    """The case with its data: (name, module, parameters to try, function, leaves, gradient of the output, passes)"""
    name, module, values, f, shapes, passes = case
    leaves = [normal(*shape, device=device, seed=i) for i, shape in enumerate(shapes)]
    with torch.no_grad():
        out = f(*leaves)
    return name, module, values, f, leaves, tuple(map(torch.randn_like, out)) if isinstance(out, tuple) else torch.randn_like(out), passes


def compile_launches(i, device, small):
    """Not a check: compiles what case i of `rules` times, beside the checks."""
    _, module, values, f, leaves, g, _ = launch_case(list(launch_cases(device, small))[i], device)
    for value in values:
        with launched_with(module, **value):
            torch.autograd.grad(f(*leaves), leaves, g)
    return {}


COMPILE = [f"compile_{i}" for i in range(14)]
CHECKS |= {name: functools.partial(compile_launches, i) for i, name in enumerate(COMPILE)}


def rules(args, settings):
    """Launch parameters side by side; "percent of copy" is of the bytes that an ideal kernel moves"""
    rows = []
    for case in launch_cases(args.device, args.quick):
        name, module, values, f, leaves, g, passes = launch_case(case, args.device)
        for mode, arrays in zip(("forward", "forward+backward"), passes):

            def contestant(value, mode=mode, arrays=arrays):
                run = inference(f, leaves) if mode == "forward" else forward_backward(f, leaves, g)

                def call():
                    with launched_with(module, **value):
                        run()

                label = ", ".join(f"{k}={v}" for k, v in value.items())
                return Contestant(label, call, extra={"op": name, "mode": mode}, bytes=arrays * leaves[0].nbytes)

            rows += compare([*map(contestant, values), harness.copy_contestant(arrays * leaves[0].nbytes, args.device)], **settings)
        del g, leaves
    return "launch parameters, fp32", rows


def spiking_sizes(args, settings):
    """spiking_wkv against the chain of wkv and lif by batch, T = 4"""
    rows = []
    L, C = (33, 48) if args.quick else (394, 384)
    d, u = (t.requires_grad_() for t in parameters(C, args.device))

    def chain(k, v):
        return lif(wkv(d, u, k.flatten(0, 1), v.flatten(0, 1)).unflatten(0, k.shape[:2]))

    for B in (1, 2) if args.quick else (8, 32, 64, 128, 256):
        leaves = [normal(4, B, L, C, device=args.device, seed=i, scale=1.0 + 2 * i) for i in range(2)]
        g = torch.randn_like(leaves[0])
        for mode in ("forward", "forward+backward"):
            found = []
            for name, f in (("spiking_wkv", lambda k, v: spiking_wkv(d, u, k, v)), ("wkv, then lif", chain)):
                fn = inference(f, leaves) if mode == "forward" else forward_backward(f, leaves, g)
                passes = 3 if mode == "forward" else 8
                found.append(Contestant(name, fn, bytes=passes * g.nbytes, extra={"mode": mode, "B": B}))
            rows += compare(found, **settings)
    return f"spiking_wkv, (4, B, {L}, {C}), fp32; bytes of the fused form", rows


def algorithms(args, settings):
    """wkv "serial" against "chunked", C = 384: what "auto" should choose"""
    rows = []
    batches, lengths = ((1, 2), (64,)) if args.quick else ((1, 4, 16, 32, 64, 96, 128, 256), (64, 394, 1024, 4096, 16384))
    for B in batches:
        for L in lengths:
            if B * L > 1 << 18:
                continue
            data = [normal(B, L, 384, device=args.device, dtype=torch.float32, seed=i) for i in range(2)]
            data = [*(t.requires_grad_() for t in parameters(384, args.device)), *data]
            g = torch.randn_like(data[2])
            for mode in ("forward", "forward+backward"):
                found = []
                for algorithm in ("serial", "chunked", "auto"):
                    f = bench_wkv.ours(algorithm)
                    fn = inference(f, data) if mode == "forward" else forward_backward(f, data, g)
                    passes = 3 if mode == "forward" else 8
                    found.append(Contestant(algorithm, fn, bytes=passes * g.nbytes, extra={"mode": mode, "B": B, "L": L}))
                rows += compare(found, **settings)
    return "wkv, C = 384, fp32", rows


def steps(args, settings):
    """Training steps of SDiT: images a second. The plain form, which walks the tokens one by one, is timed once"""
    rows = []
    cases = ("digits", 2, True), ("digits", 2, False)
    if not args.quick:
        cases = ("fashion_mnist", 64, True), ("fashion_mnist", 256, False), ("cifar10", 64, False), ("cifar10", 256, False)
    for preset, batch, plain in cases:
        torch.manual_seed(0)
        model = SDiT(PRESETS[preset], variant="improved").to(args.device)
        c = model.config
        x = torch.randn(batch, c.channels, c.image_size, c.image_size, device=args.device)
        inputs = x, torch.randint(0, 1000, (batch,), device=args.device), torch.zeros(batch, dtype=torch.long, device=args.device)
        target = torch.zeros((), device=args.device)
        for form, dtype in (("ours", torch.bfloat16), ("ours", None), *[("plain", None)] * plain):
            network = bench_sdit.Plain(model) if form == "plain" else model
            optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            fn = lambda: bench_sdit.step(network, inputs, target, optimizer, dtype)
            row = {"name": f"{preset}, batch {batch}, {form}, {'bf16' if dtype else 'fp32'}"}
            if form == "plain":
                fn()
                began = time.perf_counter()
                fn().item()
                row["median_s"] = time.perf_counter() - began
            else:
                row |= compare([Contestant(row["name"], fn)], **settings | {"rounds": 2 if args.quick else 5})[0]
                began = time.perf_counter()
                fn()
                row["host_s"] = time.perf_counter() - began
            rows.append(row | {"images_per_second": batch / row["median_s"]})
            if args.device == "cuda":
                rows[-1]["peak_bytes"] = torch.cuda.max_memory_allocated()
        del model, optimizer, network
    return "training steps", rows


def host(args, settings):
    """Time in which Python and the launch are done with a call on small tensors, the device not waited for"""
    rows = []
    for name, (f, leaves) in calls(args.device, True).items():
        g = torch.ones_like(f(*leaves))
        found = compare(
            [
                Contestant("no_grad", inference(f, leaves), extra={"op": name}),
                Contestant("forward+backward", forward_backward(f, leaves, g), extra={"op": name}),
            ],
            **settings | {"device": "cpu", "min_time": 0.002},
        )
        if args.device == "cuda":
            torch.cuda.synchronize()
        rows += found
    return "host time of a call", rows


def profile(args, settings):
    """Kernels of one training step of fashion_mnist in bf16, by time on the device"""
    from torch.profiler import ProfilerActivity

    args = argparse.Namespace(**vars(args) | {"batch": 2 if args.quick else 128})
    model, inputs = bench_sdit.case(args, args.batch)
    target = torch.zeros((), device=args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    bench_sdit.step(model, inputs, target, optimizer, torch.bfloat16)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (args.device == "cuda")
    with torch.profiler.profile(activities=kinds) as found:
        bench_sdit.step(model, inputs, target, optimizer, torch.bfloat16)
        if args.device == "cuda":
            torch.cuda.synchronize()
    events = [e for e in found.key_averages() if args.device == "cpu" or e.device_type == torch.autograd.DeviceType.CUDA]
    cost = (lambda e: e.self_cpu_time_total) if args.device == "cpu" else (lambda e: e.self_device_time_total)
    total = sum(map(cost, events))
    top = sorted(events, key=cost, reverse=True)[:40]
    rows = [{"name": e.key[:90], "calls": e.count, "median_s": cost(e) / 1e6, "percent_of_step": 100 * cost(e) / total} for e in top]
    return f"fashion_mnist, batch {args.batch}: {total / 1e3:.1f} ms of kernels", rows


def section(module, name, rounds=None, **changes):
    """A section of a bench, with other arguments."""

    def run(args, settings):
        settings = settings | {"rounds": min(settings["rounds"], rounds or settings["rounds"])}
        return getattr(module, name)(argparse.Namespace(**vars(args) | changes), settings)

    run.__doc__ = getattr(module, name).__doc__ or module.__doc__.splitlines()[0]
    return run


def mix(args, settings):
    """token_shift and relu_squared against plain PyTorch and torch.compile"""
    titles, rows = zip(*(f(args, settings) for f in bench_mix.SECTIONS.values()))
    return ", ".join(titles), sum(rows, [])


TIMINGS = {
    "steps": steps,
    "profile": profile,
    "spiking": section(bench_wkv, "spiking", backward=True),
    "spiking sizes": spiking_sizes,
    "host": host,
    "wkv": section(bench_wkv, "peers"),
    "wkv backward": section(bench_wkv, "backward"),
    "algorithms": algorithms,
    "lif": section(bench_lif, "peers"),
    "rate": section(bench_lif, "rate"),
    "bandwidth": section(bench_lif, "bandwidth"),
    "mix": mix,
    "decoding": section(bench_wkv, "decoding"),
    "memory": section(bench_lif, "memory"),
    "wkv bf16": section(bench_wkv, "peers", dtype=torch.bfloat16),
    "wkv backward bf16": section(bench_wkv, "backward", dtype=torch.bfloat16),
    "sweep": section(bench_wkv, "sweep"),
    "rules": rules,
}


# ---- the parts -------------------------------------------------------------------------------------------------------------


def start_tests(seconds, workers):
    """pytest of what runs Triton kernels, in the background; the process and its log."""
    log = tempfile.TemporaryFile("w+")
    command = [sys.executable, "-m", "pytest", "-q", "-k", "triton and not interpreter", "-n", str(workers), "--dist", "worksteal"]
    command += ["-p", "no:cacheprovider", "-rfE", "--tb=short", "--color=no", "--durations=10", str(harness.ROOT / "tests")]
    command = ["timeout", "--signal=INT", str(int(seconds)), *command]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=harness.ROOT), log


def tests_result(process, log):
    process.wait()
    log.seek(0)
    text = log.read()
    last = next((line for line in reversed(text.splitlines()) if re.search(r"\d+ (passed|failed|error)", line)), "no summary")
    failed = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return {"passed": process.returncode == 0, "summary": last, "failed": failed, "tail": text[-20000:]}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--dry-run", action="store_true", help="on the CPU, small: does everything run?")
    p.add_argument("--json", metavar="PATH", help="where the results go, after every part")
    p.add_argument("--only", metavar="NAME[,NAME]", help=f"of tests, checks, {', '.join(TIMINGS)}")
    p.add_argument("--minutes", type=float, default=9, help="parts that would begin later are left out (default: %(default)s)")
    p.add_argument("--workers", type=int, default=8, help="processes for tests and for checks, each (default: %(default)s)")
    options = p.parse_args(argv)
    names = options.only.split(",") if options.only else ["tests", "checks", *TIMINGS]
    if unknown := set(names) - {"tests", "checks", *CHECKS, *TIMINGS}:
        p.error(f"--only knows tests, checks, {', '.join(CHECKS)}, {', '.join(TIMINGS)}; got {', '.join(sorted(unknown))}")
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("gpu_suite.py: torch sees no GPU; --dry-run goes through it on the CPU")
    device = "cpu" if options.dry_run else "cuda"
    if options.dry_run:
        bench_lif.SHAPE = bench_wkv.SHAPE = bench_mix.B, bench_mix.L, bench_mix.C = 1, 33, 32
        bench_sdit.PRESET = "digits"
    deadline = time.monotonic() + 60 * options.minutes
    left = lambda: deadline - time.monotonic()
    args = argparse.Namespace(
        device=device, quick=options.dry_run, threads=None, plot=None, json=options.json, csv=None, dtype=torch.float32,
        backward=True, batch=1 if options.dry_run else 64, rounds=None,
    )  # fmt: skip
    settings = harness.setup(args) | {"rounds": 2 if options.dry_run else 9}
    parts, failed = {}, []

    def save():
        if options.json:
            path = pathlib.Path(options.json)
            path.parent.mkdir(parents=True, exist_ok=True)
            facts = {"title": __doc__.splitlines()[0], "provenance": harness.provenance(device), "goals": harness.goals}
            path.write_text(json.dumps(facts | {"parts": parts}, indent=1, default=str) + "\n")

    tests = None
    if "tests" in names and not options.dry_run:
        tests = start_tests(left() * 0.5, options.workers)
    wanted = list(CHECKS) if "checks" in names else [n for n in CHECKS if n in names]
    if wanted:
        checks = {}
        if options.dry_run:
            found = (_check(name, device, True) for name in wanted)
        else:
            pool = concurrent.futures.ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn"))
            jobs = [pool.submit(_check, name, device, False) for name in wanted]
            found = (job.result() for job in concurrent.futures.as_completed(jobs))
        for name, result in found:
            checks[name] = result
            print(f"{'ok  ' if result['passed'] else 'FAIL'} {name} ({result['seconds']} s) {result.get('error', '')}", flush=True)
            failed += [name] * (not result["passed"])
        parts["checks"] = checks
        save()
    if tests:
        parts["tests"] = tests_result(*tests)
        failed += ["tests"] * (not parts["tests"]["passed"])
        print(parts["tests"]["summary"], *parts["tests"]["failed"], sep="\n", flush=True)
        save()
    for name in (n for n in TIMINGS if n in names):
        if left() < 15:
            parts[name] = {"note": "skipped: out of time"}
            print(f"skipped for want of time: {name}")
            continue
        began = time.perf_counter()
        try:
            title, rows = TIMINGS[name](args, settings)
            for row in rows:
                row.pop("samples_s", None)
            parts[name] = {"title": title, "rows": rows, "seconds": round(time.perf_counter() - began, 1)}
            harness.show(f"[{name}] {title}, {time.perf_counter() - began:.0f} s", rows, args)
        except Exception as e:  # the parts after it are worth having
            parts[name] = {"error": f"{type(e).__name__}: {e}"[:2000], "where": traceback.format_exc()[-3000:]}
            failed.append(name)
            print(f"\n[{name}] {parts[name]['where']}", flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
        save()
    print(f"\n{'failed: ' + ', '.join(failed) if failed else 'all passed'}; {options.minutes - left() / 60:.1f} minutes")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
