"""Count how often Triton compiles. A new batch size, length or number of steps above 16 must not recompile anything.

Triton calls a hook before it compiles. The hook here records what would be compiled and refuses it, so counting is fast.
test_the_hook_counts_real_compilations compares these counts with real compilations.
"""

import collections
import contextlib
import inspect
import itertools

import native_triton
import pytest
import torch

from sdit_kernels import backend, leaky, lif, lif_rate, relu_squared, repeat, spiking_wkv, token_shift, wkv

if native_triton.setup() == "interpreter":
    pytest.skip(f"the interpreter compiles nothing: {native_triton.reason()}", allow_module_level=True)

import triton

import sdit_kernels.triton.mix
import sdit_kernels.triton.neuron
import sdit_kernels.triton.rate
import sdit_kernels.triton.spiking_wkv
import sdit_kernels.triton.wkv
from sdit_kernels.tuning import tuned

SIZES = [  # (B, L)
    (1, 1), (1, 2), (1, 16), (1, 63), (2, 1), (2, 7), (3, 5), (3, 16), (4, 4), (5, 31), (7, 64), (8, 1), (8, 17), (16, 2),
    (16, 16), (17, 40), (20, 3), (32, 33), (33, 10), (40, 100),
]  # fmt: skip
LONG = 17, 18, 23, 31, 32, 33, 47, 64, 100
MODULES = [getattr(sdit_kernels.triton, name) for name in ("mix", "neuron", "rate", "spiking_wkv", "wkv")]
KERNELS = {k for m in MODULES for k in vars(m).values() if isinstance(k, triton.runtime.jit.JITFunction)}


@contextlib.contextmanager
def empty_caches():
    """Clear Triton's caches, as in a fresh process."""
    before = {kernel: dict(kernel.device_caches) for kernel in KERNELS}
    for kernel in KERNELS:
        kernel.device_caches.clear()
    sdit_kernels.triton.neuron.bind.cache_clear()
    repeat.forget()
    try:
        yield
    finally:
        for kernel, caches in before.items():
            kernel.device_caches.clear()
            kernel.device_caches.update(caches)
        sdit_kernels.triton.neuron.bind.cache_clear()


def compilations(calls):
    """Return how many variants of each kernel would be compiled."""
    wanted = collections.defaultdict(set)

    def refuse(key, fn, **_):
        wanted[fn.jit_function.__name__.removesuffix("_kernel")].add((fn.jit_function.cache_key, key))
        return True

    before = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = refuse
    try:
        with empty_caches(), backend("triton"):
            for call in calls:
                call()
    finally:
        triton.knobs.runtime.jit_cache_hook = before
    return {name: len(keys) for name, keys in wanted.items()}


def forward_and_backward(f, *shape, dtype=torch.float32):
    x = torch.ones(shape, dtype=dtype, requires_grad=True)
    out = f(x)
    torch.autograd.backward(out, [torch.ones_like(out[0])] * len(out) if isinstance(out, tuple) else torch.ones_like(out))


def run_wkv(x, C, **options):
    d, u = (torch.zeros(C, requires_grad=True) for _ in range(2))
    return wkv(d, u, x, x, r=x, **options)


def run_spiking_wkv(x, C, fused):
    d, u, tau = (torch.full((C,), 2.0, requires_grad=True) for _ in range(3))
    with tuned(spiking_min_channels_fused=0 if fused else 1 << 40):
        out = spiking_wkv(d, u, x, x, r=x, tau=tau)
        out.backward(torch.ones_like(out))  # inside the block, because the backward pass reads the tuning number as well
    return x * 1.0


def tau_of(C):
    return torch.full((C,), 2.0, requires_grad=True)


NO = (None,)
FORWARD_BACKWARD = {  # op: (call with C channels, steps of its input, T given to it)
    "lif": (lambda x, C, T: lif(x), (4,), NO),
    "lif, many steps": (lambda x, C, T: lif(x), LONG, NO),
    "lif, tau per channel": (lambda x, C, T: lif(x, tau=tau_of(C)), (4,), NO),
    "leaky": (lambda x, C, T: leaky(x, beta=0.5), (4,), NO),
    "leaky, many steps": (lambda x, C, T: leaky(x, beta=0.5), LONG, NO),
    "leaky, beta per channel": (lambda x, C, T: leaky(x, beta=tau_of(C) / 2), (4,), NO),
    "lif_rate": (lambda x, C, T: lif_rate(x, T=4, residual=x, gate=x), NO, NO),
    "lif_rate, many steps": (lambda x, C, T: lif_rate(x, T=T, residual=x, gate=x), NO, LONG),
    "relu_squared": (lambda x, C, T: relu_squared(x), NO, NO),
    "token_shift": (lambda x, C, T: token_shift(x, tau_of(C), tau_of(C), tau_of(C), norm_eps=1e-6), NO, NO),
    "wkv, serial": (lambda x, C, T: run_wkv(x, C, algorithm="serial"), NO, NO),
    "wkv, chunked": (lambda x, C, T: run_wkv(x, C, algorithm="chunked"), NO, NO),
    "wkv, both ways": (lambda x, C, T: run_wkv(x, C, algorithm="serial", bidirectional=True), NO, NO),
    "spiking_wkv": (lambda x, C, T: run_spiking_wkv(x, C, True), (4,), NO),
    "spiking_wkv, in parts": (lambda x, C, T: run_spiking_wkv(x, C, False), (4,), NO),
}


def calls_of_all_sizes(name, C, dtype):
    f, leading, inner = FORWARD_BACKWARD[name]
    for (B, L), T, steps in zip(SIZES, itertools.cycle(leading), itertools.cycle(inner)):
        shape = (B, L, C) if T is None else (T, B, L, C)
        yield lambda shape=shape, steps=steps: forward_and_backward(lambda x: f(x, C, steps), *shape, dtype=dtype)


ONCE = {
    "lif": {"lif_forward": 1, "lif_backward": 1},
    "leaky": {"leaky_forward": 1, "leaky_backward": 1},
    "lif_rate": {"lif_rate_forward": 1, "lif_rate_backward": 1},
    "relu_squared": {"relu_squared_forward": 1, "relu_squared_backward": 1},
    "token_shift": {"token_shift_forward": 1, "token_shift_backward": 1},
    "wkv, serial": {"wkv_forward": 1, "wkv_backward": 1, "wkv_sums": 1},
    # one variant for sequences of a single chunk, one that sums up a chunk, one that starts from the state of the chunk before
    "wkv, chunked": {"wkv_forward": 3, "wkv_backward": 3, "wkv_combine": 2, "wkv_sums": 1},
    "wkv, both ways": {"wkv_forward": 3, "wkv_backward": 3, "wkv_sums": 1},
    "spiking_wkv": {"spiking_wkv_forward": 1, "spiking_wkv_backward": 1, "wkv_sums": 1},
}
ONCE |= {"leaky, many steps": ONCE["leaky"], "leaky, beta per channel": ONCE["leaky"]}
ONCE |= {"lif, many steps": ONCE["lif"], "lif_rate, many steps": ONCE["lif_rate"]}
# "in parts" runs the kernels of wkv (algorithm "auto") and of lif
ONCE |= {"lif, tau per channel": ONCE["lif"], "spiking_wkv, in parts": ONCE["lif"] | ONCE["wkv, chunked"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORWARD_BACKWARD)
def test_kernels_compile_once_for_all_sizes(name, dtype):
    """The number of channels is a multiple of 16, as in practice."""
    assert len(SIZES) == len(set(SIZES)) == 20
    assert compilations(calls_of_all_sizes(name, 32, dtype)) == ONCE[name]


# Triton compiles a separate variant when a stride is a multiple of 16, because it can then use wider accesses. With an odd C,
# the batch stride (or step stride, or number of elements) is such a multiple for some sizes only: two variants for one stride,
# three for two strides. A bidirectional scan has further variants, because half of its checkpoint may be unaligned.
ODD = {"spiking_wkv": 3}
ODD_BOTH_WAYS = {"wkv_forward": 10, "wkv_backward": 18, "wkv_sums": 1}


@pytest.mark.parametrize("name", FORWARD_BACKWARD)
def test_an_odd_number_of_channels_compiles_once_per_alignment(name):
    found = compilations(calls_of_all_sizes(name, 33, torch.float32))
    if name == "wkv, both ways":
        assert set(found) == set(ODD_BOTH_WAYS) and all(found[kernel] <= n for kernel, n in ODD_BOTH_WAYS.items())
        return
    assert set(found) == set(ONCE[name])
    for kernel, count in found.items():
        assert count <= ONCE[name][kernel] * (1 if kernel in ("wkv_sums", "wkv_combine") else ODD.get(name, 2)), kernel


@pytest.mark.parametrize("op", ["lif", "lif_rate"])
def test_up_to_16_steps_compile_once_for_each_number(op):
    def calls():
        for T in (*range(1, 17), *LONG):
            for B, L in SIZES[::7]:
                if op == "lif":
                    yield lambda T=T, B=B, L=L: forward_and_backward(lif, T, B, L, 32)
                else:
                    yield lambda T=T, B=B, L=L: forward_and_backward(lambda x: lif_rate(x, T=T), B, L, 32)

    assert compilations(calls()) == {f"{op}_forward": 17, f"{op}_backward": 17}


def test_packed_sequences_of_any_number_and_length_compile_once():
    def calls():
        for lengths in ([1], [3, 5], [16, 16, 16], [0, 7, 1], [40, 1, 2, 64, 9], [17] * 12):
            ends = torch.tensor([0, *itertools.accumulate(lengths)])
            run = {"algorithm": "serial", "cu_seqlens": ends, "max_seqlen": max(lengths)}
            yield lambda ends=ends, run=run: forward_and_backward(lambda x: run_wkv(x, 32, **run), 1, int(ends[-1]), 32)

    assert compilations(calls()) == ONCE["wkv, serial"]


def test_settings_of_a_neuron_do_not_recompile():
    def calls():
        for tau, threshold, reset, alpha in ((2.0, 1.0, 0.0, 2.0), (1.0, 0.5, 0.25, 4.0), (16.0, 1.5, -1.0, 1.0), (3, 1, 0, 1)):
            neuron = {"tau": float(tau), "v_threshold": float(threshold), "v_reset": float(reset), "alpha": float(alpha)}
            yield lambda neuron=neuron: forward_and_backward(lambda x: lif(x, **neuron), 4, 3, 32)
            yield lambda neuron=neuron: forward_and_backward(lambda x: lif_rate(x, T=4, **neuron), 3, 32)

    assert compilations(calls()) == ONCE["lif"] | ONCE["lif_rate"]


def test_the_hook_counts_real_compilations():
    kernels = sdit_kernels.triton.mix.relu_squared_forward_kernel, sdit_kernels.triton.mix.relu_squared_backward_kernel
    for C, wanted in ((32, 1), (33, 2)):
        with empty_caches(), backend("triton"):
            for B, L in SIZES[:8]:
                forward_and_backward(relu_squared, B, L, C)
            assert [sum(len(cache) for cache, *_ in k.device_caches.values()) for k in kernels] == [wanted] * 2


def test_a_kernel_takes_at_most_16_parameters():
    kernels = {f for m in MODULES for name, f in vars(m).items() if name.endswith("_kernel")}
    counts = {f.__name__: len(getattr(f, "arg_names", None) or inspect.signature(f).parameters) for f in kernels}
    assert {"forward_kernel", "rate_backward_kernel", "spiking_wkv_backward_kernel", "wkv_forward_kernel"} <= counts.keys()
    assert {name: n for name, n in counts.items() if n > 16} == {}
