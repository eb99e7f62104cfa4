"""What the compilers make of the Triton kernels on GPUs that need not be there; compiler output, no time is measured.

    python perf/compile_report.py                      every kernel, five targets: 15 minutes of CPU time, no GPU
    python perf/compile_report.py --stem wkv           those of one stem
    python perf/compile_report.py --quick --check      a few variants, held against the committed figures

The public functions are called; their launches are compiled as on that GPU and not run (`gpu_code.launches`): so tile
sizes, warps, flags and specialisations are those of a user's call on contiguous tensors.
"""

import argparse
import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import pathlib
import sys
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from perf import harness  # noqa: E402

STEMS = ("lif", "leaky", "wkv", "spiking_wkv", "mix")
RESULTS = {stem: harness.ROOT / "perf" / "results" / f"compile_{stem}.json" for stem in STEMS}
QUICK_TARGETS = ("cuda:90", "hip:gfx942")
SHAPE = (2, 394, 384)  # batch, tokens, channels of SDiT
STRETCH = 16  # steps that a LIF kernel holds in registers; a longer T is a loop over stretches
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = 1.10  # instructions, against the committed figures
SPARE = {"lif": 1.001, "leaky": 1.001, "wkv": 1.10, "spiking_wkv": 1.10, "mix": 1.001}  # bytes, against the floor
MIX = ("token_shift", "relu_squared")  # how the names of its kernels begin


class Case(NamedTuple):
    """A call of lif, lif_rate or leaky."""

    variant: str
    op: str = "lif"
    T: int = 4
    v: bool = False  # membrane given, and its gradient wanted
    parameters: str = ""  # tau (leaky: beta) and v_threshold that learn: "scalar" or "channel"
    extras: bool = False  # lif_rate: residual and gate


CASES = (
    Case("T=4"),
    Case("T=16", T=16),
    Case("T=32", T=32),
    Case("T=4, v given", v=True),
    Case("T=4, learnt scalars", parameters="scalar"),
    Case("T=4, learnt channels", parameters="channel"),
    Case("T=16, learnt channels", T=16, parameters="channel"),
    Case("T=32, learnt channels", T=32, parameters="channel"),
    Case("T=4", "lif_rate"),
    Case("T=32", "lif_rate", T=32),
    Case("T=4, gate, residual", "lif_rate", extras=True),
    Case("T=4, learnt scalars", "lif_rate", parameters="scalar"),
    Case("T=4, learnt channels", "lif_rate", parameters="channel"),
)

STEPPED = ("lif", "leaky")  # those whose input has a time axis
LEAKY_CASES = (
    Case("T=4", "leaky"),
    Case("T=16", "leaky", T=16),
    Case("T=32", "leaky", T=32),
    Case("T=4, v given", "leaky", v=True),
    Case("T=4, learnt scalars", "leaky", parameters="scalar"),
    Case("T=4, learnt channels", "leaky", parameters="channel"),
    Case("T=32, learnt channels", "leaky", T=32, parameters="channel"),
)


class WkvCase(NamedTuple):
    """A call of the WKV launchers, checkpoint kept."""

    variant: str
    algorithm: str = "serial"
    gate: bool = False
    state: bool = False  # given, and its gradient wanted
    bidirectional: bool = False
    packed: bool = False

    @property
    def op(self):
        return "wkv"


WKV_CASES = (
    WkvCase("serial"),
    WkvCase("serial, gate", gate=True),
    WkvCase("serial, state", state=True),
    WkvCase("serial, gate, state, packed", gate=True, state=True, packed=True),
    WkvCase("chunked, gate", "chunked", gate=True),
    WkvCase("bidirectional, gate", gate=True, bidirectional=True),
)


class SpikingCase(NamedTuple):
    """A call of the spiking_wkv launchers, checkpoint kept."""

    variant: str
    gate: bool = False
    rate: bool = False
    T: int = 4

    @property
    def op(self):
        return "spiking_wkv"


SPIKING_CASES = (
    SpikingCase("T=4"),
    SpikingCase("T=4, gate", gate=True),
    SpikingCase("T=4, gate, rate", gate=True, rate=True),
)


class MixCase(NamedTuple):
    """A call of the launchers of token_shift, whose mixes learn; without mixes, of those of relu_squared."""

    variant: str
    mixes: int = 1
    norm: bool = False
    C: int = SHAPE[-1]
    autocast: bool = False  # results in bf16, whatever x is

    @property
    def op(self):
        return "mix"


MIX_CASES = (
    MixCase("relu_squared", 0),
    MixCase("1 mix"),
    MixCase("2 mixes", 2),
    MixCase("3 mixes", 3),
    MixCase("1 mix, norm", norm=True),
    MixCase("2 mixes, norm", 2, True),
    MixCase("3 mixes, norm", 3, True),
    MixCase("3 mixes, norm, bf16 results", 3, True, autocast=True),
    MixCase("3 mixes, C=8192", 3, C=8192),
    MixCase("3 mixes, norm, C=8192", 3, True, 8192),
)


class FlaCase(NamedTuple):
    """A call of flash-linear-attention's fused_recurrent_rwkv4."""

    variant: str = "serial"
    op: str = "fla"


PEER_CASES = (*(Case(f"T={T}", "spikingjelly", T=T) for T in (4, 16)), FlaCase())


# ---- launches --------------------------------------------------------------------------------------------------------


def _ours(case: Case, dtype, target):
    """The launches of one forward and backward pass."""
    import sdit_kernels
    from perf import gpu_code

    def tensor(*leading, wanted=True):
        return torch.empty(*leading, *SHAPE, dtype=dtype, requires_grad=wanted)

    inputs = [tensor(case.T) if case.op in STEPPED else tensor()]
    keywords = {"beta": 0.5} if case.op == "leaky" else {}
    if case.v:
        inputs.append(tensor())
    if case.parameters:
        size = () if case.parameters == "scalar" else SHAPE[-1:]
        names = ("beta" if case.op == "leaky" else "tau", "v_threshold")
        keywords = {name: torch.full(size, 1.0, requires_grad=True) for name in names}
    if case.extras:
        keywords |= {"residual": tensor(wanted=False), "gate": tensor()}
    wanted = [t for t in (*inputs, *keywords.values()) if isinstance(t, torch.Tensor) and t.requires_grad]
    with gpu_code.launches(target) as found, _forgetting(), sdit_kernels.backend("triton"):
        if case.op in STEPPED:
            out = getattr(sdit_kernels, case.op)(*inputs, **keywords)
        else:
            out = sdit_kernels.lif_rate(*inputs, case.T, **keywords)
        torch.autograd.grad(out, wanted, torch.empty_like(out))
    return found


def _wkv(case: WkvCase, dtype, target):
    """The launches of one forward and backward pass: launchers, so that the code is the same whoever calls."""
    from perf import gpu_code
    from sdit_kernels import layout
    from sdit_kernels.triton import wkv

    B, L, C = (1, SHAPE[0] * SHAPE[1], SHAPE[2]) if case.packed else SHAPE
    data = [torch.empty(B, L, C, dtype=dtype) for _ in range(8)]
    k, v, out, g, dk, dv, r, dr = data if case.gate else (*data[:6], None, None)
    w, u, d_w, d_u = (torch.empty(C) for _ in range(4))
    states = [torch.empty(SHAPE[0], C) if case.state else None for _ in range(8)]
    ybar, lse, ybar_out, lse_out, g_ybar, g_lse, d_ybar, d_lse = states
    cu = torch.empty(SHAPE[0] + 1, dtype=torch.int32) if case.packed else None
    rows = layout.wkv_rows(B, L, SHAPE[0] if case.packed else None)
    checkpoint = torch.empty(1 + case.bidirectional, 3, rows, C)
    how = (cu, 0, case.bidirectional, case.algorithm)
    with gpu_code.launches(target) as found, _forgetting():
        wkv.wkv_forward(k, v, r, w, u, True, ybar, lse, *how, out, ybar_out, lse_out, checkpoint)
        wkv.wkv_backward(
            g, g_ybar, g_lse, k, v, r, w, u, True, ybar, lse, checkpoint, *how, dk, dv, dr, d_w, d_u, d_ybar, d_lse
        )
    return found


def _spiking(case: SpikingCase, dtype, target):
    """The same of spiking_wkv."""
    from perf import gpu_code
    from sdit_kernels import layout
    from sdit_kernels.ops.lif import Neuron
    from sdit_kernels.triton import spiking_wkv

    B, L, C = SHAPE
    k, v, dk, dv, r, dr = [torch.empty(case.T, *SHAPE, dtype=dtype) for _ in range(6)]
    r, dr = (r, dr) if case.gate else (None, None)
    out, g = [torch.empty(SHAPE if case.rate else (case.T, *SHAPE), dtype=dtype) for _ in range(2)]
    w, u, d_w, d_u = (torch.empty(C) for _ in range(4))
    rows = layout.wkv_rows(case.T * B, L, None, layout.spiking_tile(case.T, "triton"))
    checkpoint = torch.empty(3, rows, C)
    neuron = Neuron(2.0, 1.0, 0.0, True, False, "atan", 2.0)
    with gpu_code.launches(target) as found, _forgetting(), mock.patch.object(spiking_wkv, "_FUSED", 0):
        spiking_wkv.spiking_wkv_forward(
            k, v, r, w, u, True, None, None, None, None, None, neuron, case.rate, out, None, None, None, checkpoint
        )
        spiking_wkv.spiking_wkv_backward(
            g, None, None, None, k, v, r, w, u, True, None, None, None, None, None, checkpoint, neuron, case.rate, False,
            dk, dv, dr, d_w, d_u, None, None, None,
        )  # fmt: skip
    return found


def _mix(case: MixCase, dtype, target):
    """The same of token_shift or relu_squared."""
    from perf import gpu_code
    from sdit_kernels.triton import mix

    x, dx, *outs = (torch.empty(*SHAPE[:2], case.C, dtype=dtype) for _ in range(2 + case.mixes))
    outs = [out.bfloat16() for out in outs] if case.autocast else outs
    mixes, eps = torch.empty(case.mixes, case.C), 1e-6 if case.norm else None
    with gpu_code.launches(target) as found, _forgetting():
        if case.mixes:
            mix.token_shift_forward(x, None, mixes, eps, outs)
            mix.token_shift_backward(outs, x, None, mixes, eps, dx, None, True)
        else:
            mix.relu_squared_forward(x, dx)
            mix.relu_squared_backward(x, x, dx)
    return found


@contextlib.contextmanager
def _forgetting():
    """What the package remembers of its device, it asks anew: inside, and again afterwards."""
    from sdit_kernels import dispatch
    from sdit_kernels.triton import lif

    def forget():
        lif._warps.cache_clear()
        dispatch.triton_on_cpu.cache_clear()
        dispatch._resolved.clear()

    forget()
    try:
        yield
    finally:
        forget()


def _fla(case: FlaCase, dtype, target):
    """The same of flash-linear-attention's RWKV-4: its launchers, which take and return a state."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it sees no GPU
        import fla.ops.rwkv4.fused_recurrent as peer

    from perf import gpu_code

    k, v, (w, u) = *(torch.empty(SHAPE, dtype=dtype) for _ in range(2)), torch.empty(2, SHAPE[-1])
    with gpu_code.launches(target) as found:
        out, states = peer.fused_recurrent_rwkv4_forward(w, u, k, v, torch.empty(SHAPE[0], 3, 1, SHAPE[-1]))
        peer.fused_recurrent_rwkv4_backward(w, u, k, v, states, out, states[:, :, -1:])
    return found


def _spikingjelly(case: Case, dtype, target):
    """The same of SpikingJelly's LIF: its launchers, talked out of their look at the device."""
    import spikingjelly._ops.lif.triton as peer

    from perf import gpu_code

    neuron = (2.0, True, 1.0, 0.0, False, 2.0, False, 1)  # tau, decay_input, threshold, reset, detach, alpha, v_seq, ATan
    no_check, no_device = mock.patch.object(torch, "_check"), mock.patch.object(torch.cuda, "device", contextlib.nullcontext)
    with gpu_code.launches(target) as found, no_check, no_device:
        s, v, h = peer._forward_impl(torch.empty(case.T, *SHAPE, dtype=dtype), torch.empty(SHAPE), *neuron)
        peer._backward_impl(torch.empty_like(s), torch.empty_like(v), h, *neuron)
    return found


# ---- figures ---------------------------------------------------------------------------------------------------------


def floor(case: Case, backward: bool, size: int, rows: int) -> float:
    """Bytes per element of x that must move: MATH, section 1. `size` of an element; `rows` that share a channel in a tile.

    States (membrane given, checkpoint) count once per neuron and stretch, vectors of parameters once per program.
    """
    steps = min(case.T, STRETCH) if case.op in STEPPED else 1
    passes = 3 if backward else 2
    per_neuron = 0
    if case.T > STRETCH and case.op in STEPPED:
        per_neuron += 4  # checkpoint
    if case.v:
        per_neuron += 2 * size if backward else size
    if case.extras:
        passes += 2
    if case.parameters == "channel":
        per_neuron += (16 if backward else 8) / rows  # tau, threshold; partial sums of their gradients
    return passes * size + per_neuron / steps


def _turn(found: dict, parts: int) -> dict:
    """Counts of one turn of the outermost loop. Going back, inner loops rebuild the states of a part of a tile over the tile's
    other parts, (parts - 1) / 2 turns on average; what they read comes from a cache: no bytes."""
    outer = max(found["outer"], key=lambda loop: loop["instructions"])
    count = {"instructions": outer["instructions"], "special": dict(outer["special"]), "bytes": outer["bytes"]}
    apart = outer in found["loops"]  # the inner loops, placed behind it by the compiler
    turns = (parts - 1) / 2 - (not apart)
    for loop in found["loops"]:
        if loop == outer or any("rsq" in operation.lower() for operation in loop["special"]):
            continue  # no inner loop: the body, with another jump back
        count["instructions"] += loop["instructions"] * turns
        count["bytes"] -= 0 if apart else loop["bytes"]
        for k, n in loop["special"].items():
            count["special"][k] += n * turns
    return count


def _wkv_part(case: WkvCase, found: dict, arguments: dict) -> dict:
    """What sets a WKV launch apart: name, counts of one turn of its loop, tokens of a turn, floor in bytes per element. Going
    back, the checkpoint is read once per part, for all but one of a tile from a cache: no bytes."""

    def has(name):
        return arguments.get(name) is not None

    name = found["kernel"].removesuffix("_kernel")
    if name == "wkv_sums":
        return {"name": name, "count": None, "widths": set(found["loads"])}  # it stores a number for many
    tile = arguments["TILE"]
    if name == "wkv_combine":
        what = "carries" if arguments["CARRY"] else "states"
        return {"name": f"{name} ({what})", "count": None}
    backward = "backward" in name
    tokens = arguments["HELD"] if backward else tile
    parts, size = tile // tokens, arguments["k_ptr"].element_size()
    out, both = has("dk_ptr" if backward else "out_ptr"), has("right_ptr")
    states = (1 + both if backward or both else 0) + (has("keep_ptr") and not backward)
    count = _turn(found, parts)
    if backward:
        count["bytes"] -= (1 - 1 / parts) * 12 * states
    passes = 2 + backward * has("g_ptr") + has("r_ptr") + out * (1 + backward * (1 + has("r_ptr")))
    floor = passes * size + 12 * states / tile
    if backward and both:
        floor += (16 if out else 8) / tokens  # carries
    role = "" if out else " (summary)" if has("exit_ptr") else " (walk)"
    role += " leftwards" if arguments.get("LEFTWARDS") else " rightwards" if arguments.get("RIGHTWARDS") else ""
    return {"name": name + role, "count": count, "tokens": tokens, "floor": floor}


def _fla_part(case: FlaCase, found: dict, arguments: dict) -> dict:
    """The same of a launch of fla, whose loop walks over tokens, some of them unrolled; beside the floor of our serial call.
    It writes the state after every token and, going back, reads it, in fp32 as it stands after its concatenation."""
    name, size = found["kernel"].removesuffix("_kernel"), arguments["k_ptr"].element_size()
    backward = "backward" in name
    loop = max(found["loops"], key=lambda loop: loop["instructions"])
    count = {key: loop[key] for key in ("instructions", "bytes", "special")}
    tokens = round(count["bytes"] / (5 * size + 12 if backward else 6 * size))
    return {"name": f"fla {name}", "count": count, "tokens": tokens, "floor": (5 if backward else 3) * size + 12 / 16}


def _spiking_part(case: SpikingCase, found: dict, arguments: dict) -> dict:
    """The same of a spiking_wkv launch, per element of k. A rate's gradient, which all steps read, counts once."""
    name, T = found["kernel"].removesuffix("_kernel"), case.T
    if name == "wkv_sums":
        return {"name": name, "count": None, "widths": set(found["loads"])}  # it stores a number for many
    backward, size = "backward" in name, arguments["k_ptr"].element_size()
    tokens = arguments["HELD"] if backward else arguments["TOKENS"]
    parts = arguments["TOKENS"] // tokens
    count = _turn(found, parts)
    count["bytes"] -= (1 - 1 / parts) * 12 * T
    if backward and case.rate:
        count["bytes"] -= (T - 1) * tokens * size
    passes = (4 if backward else 2) + case.gate * (2 if backward else 1) + (1 / T if case.rate else 1)
    return {"name": name, "count": count, "tokens": T * tokens, "floor": passes * size + 12 / arguments["TOKENS"]}


def _more_turns(whole: dict, loop: dict, turns: float) -> dict:
    """Counts with a loop gone round so many times more than it stands in the code."""
    count = {key: whole[key] + turns * loop[key] for key in ("instructions", "bytes")}
    special = whole["special"].keys() | loop["special"].keys()
    return count | {"special": {k: whole["special"].get(k, 0) + turns * loop["special"].get(k, 0) for k in special}}


def _mix_part(case: MixCase, found: dict, arguments: dict) -> dict:
    """The same of a launch of token_shift or relu_squared, per element of x, in a program with one run of tokens. No bytes:
    what a cache has (the token and gradients that the next run reads too; a token's channels again in the same program; mixes;
    sums of a norm), and the sums over tokens that a program leaves behind all its runs."""
    name, size, M = found["kernel"].removesuffix("_kernel"), arguments["x_ptr"].element_size(), case.mixes
    mixed = 2 if case.autocast else size  # of a result, or of its gradient
    backward, values = "backward" in name, arguments["BC"] * arguments.get("BR", 1) // found["threads"]
    whole = {key: found[key] for key in ("instructions", "bytes", "special")}
    if name.startswith("relu"):
        return {"name": name, "count": whole, "tokens": values, "floor": (3 if backward else 2) * size}
    if name.endswith("stats"):
        M = arguments["M"]
        count = {"instructions": 0, "bytes": 0, "special": {}}
        for i, loop in enumerate(found["loops"]):  # sum, sum of squares, products with the gradients: unrolled by the compiler
            read = size if i < 2 else size + 2 * M * mixed + 4 * M
            count = _more_turns(count, loop, 1 / max(1, loop["bytes"] // (read * values)))
        again = (size + M * mixed + 4 * M if M else 0) + size
        count["bytes"] -= values * again
        name = f"{name} ({'backward' if M else 'forward'})"
        return {"name": name, "count": count, "tokens": values, "floor": size + M * mixed, "widths": set(found["loads"])}
    run, normed, count = arguments["RUN"], arguments["NORM"] == 2, whole
    again = size + backward * M * mixed + (run + backward) * 4 * M
    if backward:  # a loop over the tokens of a run, of which the compiler may have taken some out, or put several in one turn
        body = max(found["loops"], key=lambda loop: loop["instructions"])
        stored, in_loop = (sum(width * n for width, n in part["stores"].items()) // 8 for part in (found, body))
        count = _more_turns(whole, body, (run * values * size + 4 * M * values - stored) / in_loop)
        again += 4 * M
    scalars = normed * 4 * ((4 if backward else 2) * run + 2)
    count = count | {"bytes": count["bytes"] - values * again - scalars}
    floor = (1 + backward) * size + M * mixed
    widths = {*found["loads"], *found["stores"]} - ({32} if normed else set())
    return {"name": name, "count": count, "tokens": run * values, "floor": floor, "widths": widths}


def _calls(rows: list[dict]) -> list[dict]:
    """What the launches of one call move and do together, where there is more than one, against the floor of a single pass."""
    calls = {}
    for row in rows:
        if row["bytes_per_element"] is not None:
            direction = "backward" if "backward" in row["kernel"] else "forward"
            calls.setdefault((direction, row["variant"], row["data"]), []).append(row)
    summed = ("bytes_per_element", "instructions_per_step", "special_per_step")
    found = []
    for (direction, variant, data), parts in calls.items():
        if len(parts) > 1:
            stem = parts[-1]["kernel"].split(f"_{direction}")[0]
            total = {"kernel": f"{stem}_{direction} (call)", "variant": variant, "data": data, "target": parts[0]["target"]}
            size, gate = 4 if data == "fp32" else 2, "gate" in variant
            passes = 5 + 2 * gate if direction == "backward" else 3 + gate
            floor = passes * size + 12 / 16 if stem == "wkv" else parts[-1]["floor"]
            total |= {key: sum(row[key] for row in parts) for key in summed} | {"floor": floor}
            if total["target"] == "cuda:90":
                from perf import gpu_code

                pairs = {"bytes": "bytes_per_element", "instructions": "instructions_per_step", "special": "special_per_step"}
                total |= gpu_code.limits_h100({f"{k}_per_element": total[name] for k, name in pairs.items()})
            found.append(total)
    return found


def _part_row(case: WkvCase | SpikingCase | MixCase | FlaCase, compiled, arguments) -> dict:
    from perf import gpu_code

    found = gpu_code.inspect(compiled)
    part = PARTS[case.op](case, found, arguments)
    channels = arguments["BLOCK_SIZE_C" if case.op == "fla" else "BC"]
    keys = ("registers", "spills", "spill_bytes", "shared", "warps_resident", "warps_max", "limited_by", "loads", "stores")
    data = next((arguments[n].dtype for n in ("k_ptr", "x_ptr") if n in arguments), torch.float32)
    row = {"kernel": part["name"], "variant": case.variant, "data": "fp32" if data == torch.float32 else "bf16"}
    row |= {"target": found["target"], "neurons_per_thread": channels * arguments.get("BR", 1) / found["threads"]}
    row |= {k: found[k] for k in keys} | {"scalar_spills": found.get("scalar_spills")}
    widths = part.get("widths") or {*found["loads"], *found["stores"]}
    row |= {"narrowest": min(widths), "bytes_per_element": None, "floor": None}
    row |= {"instructions_per_step": None, "special_per_step": None}
    if part["count"]:
        counts = part["count"] | {"special": sum(part["count"]["special"].values())}
        per = {f"{k}_per_element": n / part["tokens"] for k, n in counts.items()}
        row |= {"bytes_per_element": per["bytes_per_element"], "floor": part["floor"]}
        row |= {"instructions_per_step": per["instructions_per_element"], "special_per_step": per["special_per_element"]}
        if found["target"] == "cuda:90":
            row |= gpu_code.limits_h100(per)
    return row


def _row(case: Case, compiled, arguments) -> dict:
    from perf import gpu_code

    if case.op in PARTS:
        return _part_row(case, compiled, arguments)
    found = gpu_code.inspect(compiled)
    name = compiled.metadata.name.removesuffix("_kernel")
    tile = arguments["BR"] * arguments["BC"] if "BR" in arguments else arguments["BLOCK"]
    size = arguments["x_ptr" if "x_ptr" in arguments else "gs_ptr"].element_size()
    backward, peer = "backward" in name, case.op == "spikingjelly"
    neurons = tile / found["threads"]
    count, steps = found, min(case.T, STRETCH)  # the code of one stretch stands for all
    if peer or case.op == "lif_rate" and case.T > STRETCH:
        steps = case.T
        count = _whole(found, neurons, case, size, backward)
    elements = neurons * (1 if case.op == "lif_rate" else steps)
    loads, stores = dict(count["loads"]), dict(count["stores"])
    if case.parameters == "scalar":  # one number that all threads load, and partial sums: one number a program
        loads.pop(32, None)
        stores.pop(32, None)
    moved = sum(width * n for part in (loads, stores) for width, n in part.items()) / 8
    like = Case("") if peer else case
    row = {
        "kernel": f"spikingjelly{name}" if peer else name,
        "variant": case.variant,
        "data": "fp32" if size == 4 else "bf16",
        "target": found["target"],
        "neurons_per_thread": neurons,
        "registers": found["registers"],
        "spills": found["spills"],
        "spill_bytes": found["spill_bytes"],
        "scalar_spills": found.get("scalar_spills"),
        "shared": found["shared"],
        "warps_resident": found["warps_resident"],
        "warps_max": found["warps_max"],
        "limited_by": found["limited_by"],
        "loads": found["loads"],
        "stores": found["stores"],
        "narrowest": min(*loads, *stores),
        "bytes_per_element": moved / elements,
        "floor": floor(like, backward, size, arguments.get("BR", 1)),
        "instructions_per_step": count["instructions"] / neurons / steps,
        "special_per_step": sum(count["special"].values()) / neurons / steps,
    }
    if found["target"] == "cuda:90":
        per = {"bytes_per_element": row["bytes_per_element"]}
        per["instructions_per_element"] = count["instructions"] / elements
        per["special_per_element"] = sum(count["special"].values()) / elements
        row |= gpu_code.limits_h100(per)
    return row


def _whole(found: dict, neurons: float, case: Case, size: int, backward: bool) -> dict:
    """Counts with the loop over time gone round T times."""
    if not found["loops"]:
        return found
    (body,) = found["loops"]
    trips = case.T
    if body["bytes"]:  # the peer's, which the compiler may have unrolled: a step reads x, or h and the gradient, ...
        trips = case.T * neurons * (2 * size + 4) / body["bytes"]
    whole = {"instructions": found["instructions"] + (trips - 1) * body["instructions"]}
    for key in ("loads", "stores", "special"):
        keys = found[key].keys() | body[key].keys()
        whole[key] = {k: found[key].get(k, 0) + (trips - 1) * body[key].get(k, 0) for k in keys}
    return whole


LAUNCHES = {"wkv": _wkv, "spiking_wkv": _spiking, "mix": _mix}
PARTS = {"wkv": _wkv_part, "spiking_wkv": _spiking_part, "mix": _mix_part, "fla": _fla_part}
PEERS = {"spikingjelly": _spikingjelly, "fla": _fla}


def rows_of(target: str, cases=CASES + LEAKY_CASES + WKV_CASES + SPIKING_CASES + MIX_CASES + PEER_CASES) -> list[dict]:
    """A row for every kernel that the cases launch on one target; a peer's, where they cannot be had, have a `note`."""
    rows = []
    for case in cases:
        for name, dtype in TYPES.items():
            if case.op in PEERS:
                found, reason = [], harness.missing(case.op)
                if not reason:
                    try:
                        found = PEERS[case.op](case, dtype, target)
                    except Exception as error:  # another library, of any version
                        reason = f"{type(error).__name__}: {error}"
                if not found:
                    row = {"kernel": case.op, "variant": case.variant, "data": name, "target": target}
                    rows.append(row | {"note": f"skipped: {reason}"})
            else:
                found = LAUNCHES.get(case.op, _ours)(case, dtype, target)
            new = [_row(case, compiled, arguments) for compiled, arguments in found]
            rows += new + (_calls(new) if case.op in ("wkv", "mix") else [])
    return rows


def rows_of_all(targets, cases, jobs: int) -> list[dict]:
    if jobs == 1:
        return [row for target in targets for row in rows_of(target, cases)]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
        return [row for rows in pool.map(rows_of, targets, [cases] * len(targets)) for row in rows]


# ---- check -----------------------------------------------------------------------------------------------------------


def is_ours(row: dict) -> bool:
    """Whether it is a kernel of this project: not a peer's, nor the sum over a call."""
    return row["kernel"].startswith(STEMS + MIX) and "(call)" not in row["kernel"]


def stem_of(row: dict) -> str:
    """A peer's stand with those that they are compared with."""
    if row["kernel"].startswith(MIX):
        return "mix"
    if row["kernel"].startswith("fla"):
        return "wkv"
    return next((stem for stem in ("wkv", "spiking_wkv", "leaky") if row["kernel"].startswith(stem)), "lif")


def key(row: dict) -> tuple:
    return row["kernel"], row["variant"], row["data"], row["target"]


def faults(rows: list[dict], committed: dict | None = None) -> list[str]:
    """What is not as it should be, a line each. `committed`: the file of an earlier run, under the same Triton."""
    found, before = [], {}
    if committed:
        before = {key(row): row for row in committed["rows"] if "note" not in row}
    for row in filter(is_ours, rows):
        where = " ".join(key(row))
        if row["spills"] or row["spill_bytes"]:
            found.append(f"{where}: spills {row['spills']}, {row['spill_bytes']} bytes a thread")
        size = 4 if row["data"] == "fp32" and "bf16 results" not in row["variant"] else 2
        wanted = min(128, int(row["neurons_per_thread"] * 8 * size))
        if row["narrowest"] < wanted:
            found.append(f"{where}: an access of {row['narrowest']} bits, {wanted} wanted")
        if row["bytes_per_element"] is None:  # per chunk, not per token
            continue
        if row["bytes_per_element"] > SPARE[stem_of(row)] * row["floor"]:
            found.append(f"{where}: {row['bytes_per_element']:.2f} bytes per element, the floor is {row['floor']:.2f}")
        old = before.get(key(row))
        if old and row["instructions_per_step"] > TOLERANCE * old["instructions_per_step"]:
            change = f"{old['instructions_per_step']:.1f} -> {row['instructions_per_step']:.1f}"
            found.append(f"{where}: instructions per neuron and step {change}")
    return found


# ---- output ----------------------------------------------------------------------------------------------------------

COLUMNS = ("kernel", "variant", "data", "registers", "spills", "shared", "resident", "loads", "stores", "bytes", "floor")
COLUMNS += ("instructions", "special")
PAPER = ("paper_memory", "paper_issue", "paper_special", "bound_by")


def _shown(row: dict) -> dict:
    if "note" in row:
        return row
    shown = {k: row.get(k) for k in ("kernel", "variant", "data", "registers", "shared", "loads", "stores", "floor")}
    if "spills" in row:  # not the sum over a call
        lanes = row["scalar_spills"]
        shown["spills"] = f"{row['spills']} (+{lanes} scalar)" if lanes else str(row["spills"])
        shown["resident"] = f"{row['warps_resident']}/{row['warps_max']}"
    shown |= {"bytes": row["bytes_per_element"], "instructions": row["instructions_per_step"]}
    shown |= {"special": row["special_per_step"]}
    if "paper_bound_by" in row:
        shown |= {f"paper_{k}": row[f"paper_limit_{k}_ms"] for k in ("memory", "issue", "special")}
        shown["bound_by"] = row["paper_bound_by"]
    return shown


def table(rows: list[dict]) -> str:
    from perf import gpu_code

    columns = COLUMNS + (PAPER if rows[0]["target"] == "cuda:90" else ())
    text = gpu_code.markdown_table([_shown(row) for row in rows if "note" not in row], columns)
    notes = dict.fromkeys(f"{row['kernel']}: {row['note']}" for row in rows if "note" in row)
    return "\n".join([text, *(f"\n{note}" for note in notes)])


TITLE = """# The {stem} kernels as compiled

Compiler output, read from machine code. **Nothing here was run and no time was measured**; no GPU took part.

`{command}`, {date}, torch {torch}, Triton {triton}, SpikingJelly {spikingjelly}, fla-core {fla-core}, commit {commit}.

{verdict}
"""

WKV_NOTES = """
How to read it:

- *registers*, *spills*, *shared*, *resident*, *loads*, *stores*: as in compile_lif.md. A thread holds one channel, so that an
  access is as wide as an element and a warp's are side by side.
- *bytes* per element of k, against the *floor*: k, v, r, g, the outputs and the states (12 bytes per tile; in two directions
  twice that) once each. *instructions* and *special* (exponentials, reciprocals) per token and channel, in the loop over
  tokens. The walk back holds 8 tokens and rebuilds their states from those of the tile: half of the tokens are walked twice,
  which counts as instructions; their k and v were read just before, which does not count as bytes.
  The forward walk stands in the code twice, for full tiles, which are counted, and with masks for the last; *loads* and
  *stores* show both.
- "chunked" launches, besides the kernel of "serial", those that make summaries and scan them (`wkv_combine`, per chunk);
  "bidirectional" those that make the states (forward) and carries (backward) that enter each tile. *(call)* is all of them
  together, beside the floor of one pass: k and v are read once more for the summaries ("chunked": twice in all) or for the
  states of either direction (three times), and backward g and r with them. Where L is short the later reads come from the L2
  cache: (8, 394, 384) in fp32 is 4.8 MB a tensor, an H100's L2 50 MB; no measurement backs that.
- Two-way backward kernels read one exponent of the tile beside (0.5 bytes) above their floor.
- *paper* ...: lower limits for an H100 SXM from these counts and its data sheet, in ms per 1e9 elements of k, and which is the
  largest; arithmetic on paper, not a prediction.
- `fla`: flash-linear-attention's fused_recurrent_rwkv4 with its own launch settings. It writes the state after every token and
  reads it again going back; the copy that it makes of all states in between is not in these figures.
- For comparison: RWKV's CUDA forward kernel has 33 instructions per token on sm_90 with fast math, 72 without, 5 of them
  special; its backward kernel keeps 48 KiB of local memory per thread.
"""

LIF_NOTES = """
How to read it:

- *registers*, *spills* and *shared* (bytes per program) as the compiler reports them. *(+n scalar)*: on AMD, scalar registers
  moved to lanes of a vector register; that costs an instruction, not memory. *resident*: warps (AMD: waves) that an SM, CU or
  WGP holds at once, of how many.
- *loads*, *stores*: width in bits x how often it stands in the code of a thread.
- *bytes* per element of x (`lif`: T x neurons; `lif_rate`: neurons), against the *floor*: each tensor read or written once.
  `lif` reads and writes 2 b forward and moves 3 b backward, b bytes being an element's size; on top of that a given membrane,
  a checkpoint per 16 steps (T > 16), gate and residual, and, once per program, its channels of parameters and of their
  gradients (counted as for a small input, where a program has one tile; on large inputs it has several).
- *instructions* and *special* (reciprocals, exponentials) per neuron and step, everything included: addresses, loads, stores,
  and what a program does once. On gfx1100 the scheduler's hints (`s_delay_alu`) count as instructions.
- *paper* ...: lower limits for an H100 SXM from these counts and its data sheet, in ms per 1e9 elements of x, and which is
  the largest; arithmetic on paper, not a prediction.
- learnt: tau and v_threshold are tensors whose gradients are wanted. T=32 is a loop over stretches of 16 steps. Backward
  kernels that keep much per neuron take narrower tiles, so that nothing spills: their accesses have 64 or 32 bits, contiguous
  across the warp.
- `spikingjelly`: its Triton kernels for LIF with its own launch settings. They take a membrane and return one, and the forward
  kernel writes the charge of every step, fp32, for the backward one; their floor is that of `lif` without a membrane.
"""


SPIKING_NOTES = """
How to read it:

- columns as in compile_wkv.md; per element of k, that is per simulation step, token and channel. A tile is 16 pairs of step and
  token; the *floor* is k, v, r, the spikes (with rate: one value for all steps), the gradients and the scan states, once each.
- Against the chain of wkv and lif, without states: 4 passes against 6 forward with a gate, 7 against 10 backward.
- On gfx942 a wave of 64 lanes serves 32 channels: half of them idle.
"""
MIX_NOTES = """
How to read it:

- columns as in compile_lif.md; *bytes*, *instructions* and *special* per element of x, in a program with one run of tokens (4
  forward, 8 going back), for whole tiles: C = 384 fills three quarters of one.
- *floor*: forward x and an output per mix; backward x, a gradient per mix and dx, once each. What is read again from a cache is
  no bytes: the token (and the gradients) that a run shares with its neighbour, the mixes, the channels of a token that
  `token_shift_stats` walks over twice or three times, and the four numbers a token that it leaves. Nor are the sums for the
  mixes' gradients, one row a program.
- A norm over more channels than registers hold (forward 4096, backward fewer) takes its sums from `token_shift_stats`, so that
  x, and backward the gradients, are read twice: *(call)*, beside the floor of one pass.
- Going back, the loop over a run's tokens is counted by its stores: compilers take tokens out of it, or put two in a turn.
"""
LEAKY_NOTES = """\

- columns as in compile_lif.md. reset "subtract", with delay. `leaky` moves what `lif` does: 2 b forward, 3 b backward, b bytes
  being an element's size.
"""
NOTES = {"lif": LIF_NOTES, "leaky": LEAKY_NOTES, "wkv": WKV_NOTES, "spiking_wkv": SPIKING_NOTES, "mix": MIX_NOTES}


def verdict(rows: list[dict]) -> str:
    ours = [row for row in rows if is_ours(row)]
    wide = [r for r in ours if stem_of(r) in ("lif", "leaky", "mix")]  # those of wkv are as wide as an element
    found = (f"{r['kernel']} {r['variant']} {r['data']} ({r['narrowest']})" for r in wide if r["narrowest"] < 128)
    narrow = list(dict.fromkeys(found))
    spilt = [r for r in ours if r["spills"] or r["spill_bytes"]]
    over = [r for r in ours if (r["bytes_per_element"] or 0) > SPARE[stem_of(r)] * (r["floor"] or 0)]
    text = f"{len(ours)} kernels of this project: {len(spilt)} with spills to memory, {len(over)} above the floor of "
    if over or any(stem_of(r) not in ("lif", "leaky", "mix") for r in ours):
        text = text.replace("above", "more than 10 % (lif, leaky, mix: 0.1 %) above")
    if not wide:
        return text + "bytes; accesses as wide as an element, a warp's side by side."
    return text + f"bytes; accesses of 128 bits {'in all but ' + '; '.join(narrow) if narrow else 'throughout'}."


def markdown(rows: list[dict], facts: dict) -> str:
    versions = facts["versions"]
    commit = f"{facts['commit']}{' with changes' if facts['dirty'] else ''}"
    versions = {k: versions[k] or "(not installed)" for k in ("torch", "triton", "spikingjelly", "fla-core")}
    words = {"command": f"python {facts['command']}", "date": facts["date"], "commit": commit, "verdict": verdict(rows)}
    stem = stem_of(rows[0])
    text = TITLE.format(stem=stem.upper(), **words, **versions) + NOTES[stem]
    for target in dict.fromkeys(row["target"] for row in rows):
        text += f"\n## {target}\n\n{table([row for row in rows if row['target'] == target])}\n"
    return text


def _committed(stem: str, version: str) -> dict | None:
    """The committed figures of a stem, if this Triton made them."""
    path = RESULTS[stem]
    committed = json.loads(path.read_text()) if path.exists() else None
    if not committed:
        print(f"check: no {path.name}, so instructions are compared with nothing")
    elif committed["provenance"]["versions"]["triton"] != version:
        other = committed["provenance"]["versions"]["triton"]
        print(f"check: {path.name} is from Triton {other}, so instructions are compared with nothing")
        return None
    return committed


def main(arguments=None) -> int:
    p = argparse.ArgumentParser(description="Triton kernels as compiled for five GPUs (compiler output, no timings)")
    p.add_argument("--quick", action="store_true", help=f"a few variants, {' and '.join(QUICK_TARGETS)}")
    p.add_argument("--stem", choices=STEMS, help="the kernels of one stem (default: all)")
    p.add_argument("--target", action="append", help="such as cuda:90; may be repeated (default: all)")
    p.add_argument("--json", metavar="PATH", help="write the rows; needs --stem")
    p.add_argument("--markdown", metavar="PATH", help="write the tables; needs --stem")
    p.add_argument("--check", action="store_true", help="fail on spills, narrow accesses, bytes, or growth over results/")
    p.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: %(default)s)")
    args = p.parse_args(arguments)
    if (args.json or args.markdown) and not args.stem:
        p.error("--json and --markdown hold one stem: add --stem")
    if os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "yes", "on", "true"):
        raise SystemExit("TRITON_INTERPRET is set: kernels that are interpreted cannot be compiled")
    if reason := harness.missing("triton"):
        raise SystemExit(reason.split(" (")[0])
    from perf import gpu_code

    targets = args.target or (QUICK_TARGETS if args.quick else gpu_code.TARGETS)
    cases = [c for c in CASES + PEER_CASES[:-1] if not args.quick or c.T == 4 and not c.v and c.parameters != "scalar"]
    cases = cases if args.stem in (None, "lif") else []
    if args.stem in (None, "leaky"):
        cases += LEAKY_CASES[:1] if args.quick else LEAKY_CASES
    if args.stem in (None, "wkv"):
        cases += WKV_CASES[1:2] if args.quick else WKV_CASES
        cases += PEER_CASES[-1:]
    if args.stem in (None, "spiking_wkv"):
        cases += SPIKING_CASES[1:2] if args.quick else SPIKING_CASES
    if args.stem in (None, "mix"):
        cases += MIX_CASES[6:7] if args.quick else MIX_CASES
    rows = rows_of_all(targets, cases, min(args.jobs, len(targets)))
    facts = harness.provenance()
    facts = {k: facts[k] for k in ("date", "command", "commit", "dirty", "versions")}
    for target in targets:
        print(f"\n{target}: compiler output, no time was measured\n")
        print(table([row for row in rows if row["target"] == target]))
    print(f"\n{verdict(rows)}")
    if args.json:
        title = f"{args.stem.upper()} kernels as compiled; no timings"
        head = json.dumps({"title": title, "provenance": facts}, indent=1).removesuffix("\n}")
        body = ",\n  ".join(json.dumps(row) for row in rows)
        pathlib.Path(args.json).write_text(f'{head},\n "rows": [\n  {body}\n ]\n}}\n')
    if args.markdown:
        pathlib.Path(args.markdown).write_text(markdown(rows, facts))
    if not args.check:
        return 0
    found = []
    for stem in STEMS:
        ours = [row for row in rows if stem_of(row) == stem]
        found += faults(ours, _committed(stem, facts["versions"]["triton"])) if ours else []
    print("\n".join(["check: " + line for line in found] or ["check: passed"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
