"""The ops for all measurements: call, data, result of the definition in float64, and the bytes that an op must move."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from perf.harness import Contestant, make_forward_backward, make_inference
from sdit_kernels import adlif, backend, cuba, lapicque, leaky, lif, lif_rate, relu_squared, spiking_wkv, token_shift, wkv

T = 4  # time steps
EPS = 1e-6  # eps of the norm in token_shift
HALF = (torch.bfloat16, torch.float16)
# Allowed relative rms error against float64, for outputs and for gradients
OUTPUT_ERROR = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
GRADIENT_ERROR = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


# ---- data ------------------------------------------------------------------------------------------------------------


def current(*shape, device="cpu", dtype=torch.float32, requires_grad=True):
    """Make input currents for which a sixth of the neurons fire.

    The values are odd multiples of 1/32, so every membrane potential is exact and none equals the threshold. So spikes must
    agree bit for bit for any order of operations, also in bfloat16.
    """
    generator = torch.Generator().manual_seed(0)
    x = (0.5 + 1.5 * torch.randn(shape, generator=generator)).clamp(-7, 7)
    x = ((x * 16).floor() + 0.5) / 16
    return x.to(device, dtype).requires_grad_(requires_grad)


def normal(*shape, device="cpu", dtype=torch.float32, scale=1.0, mean=0.0, seed=0, requires_grad=True):
    """Draw values from a normal distribution; the same device and seed give the same values."""
    generator = torch.Generator(device).manual_seed(seed)
    x = mean + scale * torch.randn(shape, generator=generator, device=device)
    return x.to(dtype).requires_grad_(requires_grad)


def decay_and_bonus(channels, device="cpu", requires_grad=True):
    """Make time_decay and time_first: RWKV-4's initial values for a layer in the middle of a network."""
    c = torch.arange(channels, device=device, dtype=torch.float32)
    vectors = -5 + 8 * (c / max(channels - 1, 1)) ** 0.9, -1.2 + 0.5 * ((c + 1) % 3 - 1)
    return [t.requires_grad_(requires_grad) for t in vectors]


def mixes(channels, number=3, device="cpu", requires_grad=True):
    """Make mix vectors of token_shift, between 0 and 1."""
    vectors = torch.rand(number, channels, generator=torch.Generator().manual_seed(0)).to(device)
    return [t.requires_grad_(requires_grad) for t in vectors.unbind()]


def _scan(tensors, *shape, scale_of_v=1.0, device="cpu", dtype=torch.float32, requires_grad=True):
    """Make time_decay and time_first in float32, then k, v and, with tensors=3, r."""
    how = {"device": device, "dtype": dtype, "requires_grad": requires_grad}
    data = [normal(*shape, scale=scale_of_v if i == 1 else 1.0, seed=i, **how) for i in range(tensors)]
    return [*decay_and_bonus(shape[-1], device, requires_grad), *data]


def _steps(*shape, **how):
    return [current(T, *shape, **how)]


def _shift(*shape, device="cpu", dtype=torch.float32, requires_grad=True):
    x = normal(*shape, device=device, dtype=dtype, requires_grad=requires_grad)
    return [x, *mixes(shape[-1], device=device, requires_grad=requires_grad)]


# ---- ops -------------------------------------------------------------------------------------------------------------


def passes(mode: str, inputs: float, outputs: float = 1) -> float:
    """Return the number of tensors that an ideal implementation reads or writes, each once.

    The forward pass moves the inputs and the outputs. The backward pass moves the inputs, their gradients and the gradients of
    the outputs.
    """
    forward, backward = inputs + outputs, 2 * inputs + outputs
    return {"forward": forward, "inference": forward, "backward": backward, "forward+backward": forward + backward}[mode]


class Op(NamedTuple):
    """An op, called as `op.call(*op.data(*shape))`."""

    call: Callable
    data: Callable  # (*shape of one time step, device=, dtype=, requires_grad=) -> the arguments
    inputs: int = 1  # number of arguments that are as large as the data; the others are vectors of channels
    outputs: int = 1

    def bytes(self, mode: str, leaves) -> int:
        """Return the bytes that an ideal implementation moves, see `passes`."""
        return passes(mode, self.inputs, self.outputs) * max(t.nbytes for t in leaves)


OPS = {
    "lif": Op(lif, _steps),
    "lif_rate": Op(lif_rate, lambda *shape, **how: [current(*shape, **how)]),
    "leaky": Op(functools.partial(leaky, beta=0.9), _steps),
    "lapicque": Op(functools.partial(lapicque, C=5.0), _steps),
    "cuba": Op(functools.partial(cuba, beta_i=0.8, beta=0.9), _steps),
    "adlif": Op(functools.partial(adlif, beta=0.9, beta_w=0.95, a=0.5, b=1.0), _steps),
    "wkv": Op(wkv, functools.partial(_scan, 2), 2),
    # v is large, so that some neurons fire
    "spiking_wkv": Op(spiking_wkv, lambda *shape, **how: _scan(3, T, *shape, scale_of_v=3.0, **how), 3),
    "token_shift": Op(functools.partial(token_shift, norm_eps=EPS), _shift, 1, 3),
    "relu_squared": Op(relu_squared, lambda *shape, **how: [normal(*shape, **how)]),
}


def calls(shape, device="cpu") -> dict:
    """Return {name: (function with one output, leaves)} of all ops, and of calls that use other kernels of them."""
    B, L, C = shape
    found = {name: (op.call, op.data(*shape, device=device)) for name, op in OPS.items()}

    def learnt(op, name, value):
        vector = torch.full((C,), value, device=device, requires_grad=True)
        return lambda x, vector: op(x, **{name: vector}), [found[op.__name__][1][0], vector]

    found |= {"lif": learnt(lif, "tau", 2.0), "lif_rate": learnt(lif_rate, "tau", 2.0), "leaky": learnt(leaky, "beta", 0.9)}
    shift, leaves = found["token_shift"]
    found["token_shift"] = (lambda x, m: shift(x, m)[0], leaves[:2])
    _, leaves = found.pop("wkv")
    ways = {"serial": {"algorithm": "serial"}, "chunked": {"algorithm": "chunked"}, "bidirectional": {"bidirectional": True}}
    found |= {f"wkv {name}": (functools.partial(wkv, **how), leaves) for name, how in ways.items()}
    ends = torch.tensor([0, L // 3, B * L], device=device)
    packed = [normal(1, B * L, C, device=device, seed=i) for i in range(3)]
    packed_call = functools.partial(wkv, cu_seqlens=ends, max_seqlen=B * L)
    found["wkv gate, packed"] = (lambda d, u, k, v, r: packed_call(d, u, k, v, r=r), [*leaves[:2], *packed])
    return found


def make_contestant(name, mode, f, leaves, g=None, parameters=(), bytes=None, skip=None, **extra) -> Contestant:
    """Return the contestant f(*leaves) in a mode: "forward", "inference" or "forward+backward". ``extra``: more columns."""
    run = make_forward_backward(f, leaves, g, parameters) if mode == "forward+backward" else make_inference(f, leaves)
    return Contestant(name, run, skip=skip, extra={"mode": mode, **extra}, bytes=bytes)


# ---- definition ------------------------------------------------------------------------------------------------------


def compute_exact(f, leaves, gs=None):
    """Compute (outputs, gradients) of f(*leaves) with the definition in float64; without ``gs`` no gradients."""
    leaves = [t.detach().double().requires_grad_(gs is not None) for t in leaves]
    with backend("reference"):
        outputs = as_tuple(f(*leaves))
        return outputs, None if gs is None else torch.autograd.grad(outputs, leaves, [g.double() for g in gs])


def as_tuple(outputs) -> tuple:
    """Return one output or several as a tuple."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def rms_error(got, want) -> float:
    """Return the relative rms error against float64, the largest over several tensors."""
    pairs = zip(as_tuple(got), as_tuple(want), strict=True)
    return max(((a.double() - b).square().mean() / b.square().mean()).sqrt().item() for a, b in pairs)


def check_against_definition(what, f, leaves, exact_output=False) -> dict:
    """Raise AssertionError unless outputs and gradients of f(*leaves) are close to the definition; return the errors."""
    outputs = as_tuple(f(*leaves))
    dtype = outputs[0].dtype
    gs = [normal(*o.shape, device=o.device, dtype=o.dtype, seed=9 + i, requires_grad=False) for i, o in enumerate(outputs)]
    found = torch.autograd.grad(outputs, leaves, gs)
    wanted, want = compute_exact(f, leaves, gs)
    if exact_output:
        assert torch.equal(outputs[0].double(), wanted[0]), f"{what}: outputs differ"
    assert all(t.isfinite().all() for t in (*outputs, *found)), f"{what}: not finite"
    for kind, got, exactly, limit in (("output", outputs, wanted, OUTPUT_ERROR), ("gradient", found, want, GRADIENT_ERROR)):
        for i, (a, b) in enumerate(zip(got, exactly)):
            error = rms_error(a, b)
            assert error <= limit[dtype], f"{what}: {kind} {i} has relative rms error {error:.2e}, {limit[dtype]:.0e} allowed"
    return {what: {"output": rms_error(outputs, wanted), "gradient": rms_error(found, want)}}
