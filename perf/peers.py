"""The implementations that the ops are compared with: other libraries, plain PyTorch, and torch.compile of plain PyTorch.

A `Peer` holds its call, or the reason why it does not run here. Libraries are imported when they are needed.
"""

import contextlib
import functools
import importlib.util
import pathlib
import sys
import warnings
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F

from perf.harness import reason_if_missing
from perf.ops import EPS, T
from sdit_kernels import lif, reference, wkv


class Peer(NamedTuple):
    """Another implementation of an op, called with the arguments of the op."""

    name: str
    call: Callable | None
    skip: str | None = None  # the reason why it does not run here
    same_as: Callable | None = None  # our call with the same outputs and gradients, if that is not the op's default


compiler = "inductor"  # backend of torch.compile


def try_compile(f, leaves):
    """Return (torch.compile of f, None), or (None, the reason why it fails)."""
    found = torch.compile(f, backend=compiler)
    try:
        found(*leaves)
    except Exception as e:  # a missing C++ compiler (CPU) or Triton (GPU) raises errors of several types
        return None, f"torch.compile: {str(e).splitlines()[0][:60]}"
    return found, None


# ---- neurons ---------------------------------------------------------------------------------------------------------

CLOCK_DRIVEN = pathlib.Path(__file__).resolve().parents[1] / "build" / "peers" / "spikingjelly-0.0.0.0.12" / "spikingjelly"


def clock_driven():
    """Return SpikingJelly 0.0.0.0.12's clock_driven, which `make peers` puts into build/peers; None if it is not there.

    It is imported under another name than spikingjelly, because a newer SpikingJelly has that name.
    """
    if not CLOCK_DRIVEN.is_dir():
        return None
    if "spikingjelly12" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "spikingjelly12", CLOCK_DRIVEN / "__init__.py", submodule_search_locations=[str(CLOCK_DRIVEN)]
        )
        sys.modules["spikingjelly12"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["spikingjelly12"])
    for name in ("base", "encoding", "functional", "layer", "neuron", "surrogate"):
        importlib.import_module(f"spikingjelly12.clock_driven.{name}")
    return sys.modules["spikingjelly12.clock_driven"]


def spikingjelly_lif(v_threshold=1.0):
    """Return SpikingJelly's LIFNode as a function from currents (T, ...) to spikes; None if it is not installed.

    Every call first resets the state, as users of SpikingJelly must do.
    """
    if reason_if_missing("spikingjelly"):
        return None
    from spikingjelly.activation_based import neuron, surrogate

    node = neuron.LIFNode(tau=2.0, v_threshold=v_threshold, v_reset=0.0, surrogate_function=surrogate.ATan(), step_mode="m")

    def run(x):
        node.reset()
        return node(x)

    return run


def snntorch_loop(neuron, membranes=True):
    """Return the loop over time steps that snnTorch's users write, from currents (T, ...) to spikes (and ``membranes``)."""

    def run(x):
        membrane, spikes, history = torch.zeros_like(x[0]), [], []
        for x_t in x:
            s, membrane = neuron(x_t, membrane)
            spikes.append(s)
            if membranes:
                history.append(membrane)
        return (torch.stack(spikes), torch.stack(history)) if membranes else torch.stack(spikes)

    return run


def snntorch_leaky(device):
    """Return snnTorch's Leaky as a function from currents (T, ...) to spikes; None if it is not installed.

    With beta = 1 - 1/tau and a reset to zero, its spikes equal lif(decay_input=False). It detaches the reset, as
    detach_reset=True does.
    """
    if reason_if_missing("snntorch"):
        return None
    import snntorch
    from snntorch import surrogate

    neuron = snntorch.Leaky(beta=0.5, spike_grad=surrogate.atan(), reset_mechanism="zero").to(device)
    return snntorch_loop(neuron, membranes=False)


def load_spikingjelly_kernels():
    """Import the module of SpikingJelly's launchers."""
    import spikingjelly._ops.lif.triton

    return spikingjelly._ops.lif.triton


def launch_spikingjelly(peer, x):
    """Launch SpikingJelly's Triton kernels of LIF, forward and backward, without its device check (for perf/compile)."""
    neuron = (2.0, True, 1.0, 0.0, False, 2.0, False, 1)  # tau, decay_input, threshold, reset, detach, alpha, v_seq, ATan
    no_check, no_device = mock.patch.object(torch, "_check"), mock.patch.object(torch.cuda, "device", contextlib.nullcontext)
    with no_check, no_device:
        s, v, h = peer._forward_impl(x, torch.empty(x.shape[1:]), *neuron)
        peer._backward_impl(torch.empty_like(s), torch.empty_like(v), h, *neuron)


def list_lif_peers(x) -> list[Peer]:
    theirs = functools.partial(lif, decay_input=False, detach_reset=True)
    return [
        Peer("SpikingJelly LIFNode", spikingjelly_lif(), reason_if_missing("spikingjelly")),
        Peer("plain loop", reference.lif),
        Peer("torch.compile(plain loop)", *try_compile(reference.lif, [x])),
        Peer("snnTorch Leaky (detached reset)", snntorch_leaky(x.device), reason_if_missing("snntorch"), theirs),
    ]


def list_lif_rate_peers() -> list[Peer]:
    node = spikingjelly_lif()

    def repeated(x):
        return node(x.repeat(T, *[1] * x.dim())).mean(0)

    return [
        Peer("repeat, LIFNode, mean", repeated, reason_if_missing("spikingjelly")),
        Peer("plain loop", reference.lif_rate),
    ]


# ---- scans -----------------------------------------------------------------------------------------------------------


def eager_step(w, time_first, k, v, state):
    """Compute one token of RWKV's recurrence with a running maximum: return (output, (numerator, denominator, maximum))."""
    a, b, o = state
    top = torch.maximum(o, time_first + k)
    old, new = torch.exp(o - top), torch.exp(time_first + k - top)
    out = (old * a + new * v) / (old * b + new)
    top = torch.maximum(w + o, k)
    old, new = torch.exp(w + o - top), torch.exp(k - top)
    return out, (old * a + new * v, old * b + new, top)


def eager_loop(time_decay, time_first, k, v, unbind=False):
    """Run `eager_step` in a loop over tokens, as users write it in PyTorch.

    The loop reads k[:, t], whose gradient is a whole tensor, mostly zeros, for each token. ``unbind=True`` splits k and v into
    tokens once instead.
    """
    w, dtype = -torch.exp(time_decay), k.dtype
    k, v = (t.to(torch.promote_types(dtype, torch.float32)) for t in (k, v))
    zeros = torch.zeros_like(k[:, 0])
    state, out = (zeros, zeros, torch.full_like(zeros, -1e38)), []
    for kt, vt in zip(k.unbind(1), v.unbind(1)) if unbind else ((k[:, t], v[:, t]) for t in range(k.shape[1])):
        y, state = eager_step(w, time_first, kt, vt, state)
        out.append(y)
    return torch.stack(out, 1).to(dtype)


def heinsen(time_decay, time_first, k, v):
    """Compute the recurrence with two cumulative log-sum-exps (Heinsen, arXiv 2311.06281).

    The values are shifted to be positive. The output is an average, so the shift is subtracted from it.
    """
    w, dtype = -torch.exp(time_decay), k.dtype
    k, v = k.float(), v.float()
    low = v.detach().amin() - 1
    steps = torch.arange(k.shape[1], device=k.device, dtype=k.dtype)[:, None]
    weight = k - steps * w
    value = torch.log(v - low)
    n, d = torch.logcumsumexp(weight + value, 1), torch.logcumsumexp(weight, 1)
    past = (steps[1:] - 1) * w  # decay exponent of the state before token t
    n = torch.logaddexp(n[:, :-1] + past, time_first + k[:, 1:] + value[:, 1:])
    d = torch.logaddexp(d[:, :-1] + past, time_first + k[:, 1:])
    return torch.cat([v[:, :1], torch.exp(n - d) + low], 1).to(dtype)


def flash_linear_attention(time_decay, time_first, k, v):
    from fla.ops.rwkv4 import fused_recurrent_rwkv4

    state = k.new_zeros(len(k), 3, 1, k.shape[2], dtype=torch.float32)  # numerator, denominator, exponent
    state[:, 2] = -1e38
    return fused_recurrent_rwkv4(time_decay, time_first, k, v, state)[0]


def load_fla_kernels():
    """Import the module of flash-linear-attention's launchers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that it sees no GPU
        import fla.ops.rwkv4.fused_recurrent as peer
    return peer


def launch_fla(peer, time_decay, time_first, k, v):
    """Launch flash-linear-attention's Triton kernels, forward and backward, with a state in and out (for perf/compile)."""
    B, _, C = k.shape
    out, states = peer.fused_recurrent_rwkv4_forward(time_decay, time_first, k, v, torch.empty(B, 3, 1, C))
    peer.fused_recurrent_rwkv4_backward(time_decay, time_first, k, v, states, out, states[:, :, -1:])


def list_wkv_peers(device) -> list[Peer]:
    no_gpu = None if torch.device(device).type == "cuda" else "needs a GPU"
    return [
        Peer("eager loop", eager_loop),
        Peer("eager loop, unbound", functools.partial(eager_loop, unbind=True)),
        Peer("Heinsen's form", heinsen),
        Peer("flash-linear-attention", flash_linear_attention, no_gpu or reason_if_missing("fla")),
    ]


def wkv_then_lif(time_decay, time_first, k, v, r=None):
    """Compute spiking_wkv as a chain of two ops, wkv and lif."""
    steps = k.shape[:2]
    k, v, r = (t if t is None else t.flatten(0, 1) for t in (k, v, r))
    return lif(wkv(time_decay, time_first, k, v, r=r).unflatten(0, steps))


# ---- token_shift and relu_squared ------------------------------------------------------------------------------------


def plain_token_shift(x, *mixes):
    """Apply layer norm, shift by one token, and interpolate with each mix vector."""
    x = F.layer_norm(x, x.shape[-1:], eps=EPS)
    before = F.pad(x, (0, 0, 1, -1))
    return tuple(x * m + before * (1 - m) for m in mixes)


def plain_relu_squared(x):
    return torch.relu(x).square()


def list_mix_peers(plain, leaves) -> list[Peer]:
    return [Peer("plain PyTorch", plain), Peer("torch.compile(plain)", *try_compile(plain, leaves))]
