"""packed_spikes: what autograd keeps of spikes is bits, restored exactly. Gradients are the same bit for bit."""

import contextlib
import gc
import inspect
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import SMALL, USERS, python
from torch import nn
from torch.utils.checkpoint import checkpoint

import sdit_kernels
from sdit_kernels import Levels, backend, lif, lif_rate, neuron, packed, packed_spikes, spiking_wkv
from sdit_kernels.cpu import pack as cpu_pack
from sdit_kernels.reference import pack as definition
from sdit_kernels.triton import pack as triton_pack

KERNELS = {"cpu": cpu_pack, "triton": triton_pack, "reference": definition}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.bool]


@pytest.fixture(autouse=True)
def numbers():
    torch.manual_seed(0)


def words_of(t):
    return t.contiguous().view(definition.WORDS[t.itemsize])


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(words_of(a), words_of(b))


class Kept:
    """What autograd keeps in the block, as packed_spikes hands it over."""

    def __init__(self):
        self.items = []

    def spikes(self):
        """The saved tensors that are packed."""
        return [item for _, item in self.items if type(item) is packed._Saved]

    def others(self):
        return [t for t, item in self.items if type(item) is not packed._Saved]

    def storages(self):
        return {id(item.packed): item.packed for item in self.spikes()}.values()


@contextlib.contextmanager
def keeping(monkeypatch, **settings):
    """Enter packed_spikes and record what it keeps. Each packed tensor must be restored exactly, with its strides."""
    kept = Kept()

    def pack(t):
        item = packed._pack(t)
        kept.items.append((t.clone() if type(item) is packed._Saved else t, item))
        return item

    with monkeypatch.context() as patch:
        patch.setattr(packed, "_HOOKS", torch.autograd.graph.saved_tensors_hooks(pack, packed._unpack))
        with packed_spikes():
            yield kept
    for t, item in kept.items:
        found = packed._unpack(item)
        assert (found.stride(), found.dtype) == (item.stride, t.dtype) if type(item) is packed._Saved else True
        assert same_bits(found, t)


def weight(*shape, dtype=torch.float32):
    return (torch.randint(-4, 5, shape) / 4).to(dtype).requires_grad_()


def allocated(run):
    """Bytes that ``run`` allocates and that live while its result lives."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    del result
    return sum(event.self_cpu_memory_usage for event in profile.events())


# --- kernels ----------------------------------------------------------------------------------------------------------------


def table(first, last, scale, dtype, nan):
    values = packed._multiples(first, last, scale, 1, nan and dtype.is_floating_point, dtype)
    if values is None:  # as many bits as an element: the kernels still pack it
        t = torch.arange(first, last + 1).to(dtype)
        values = packed.Values(t, first, 1 / scale, False)
    return values


# first, last, scale, whether NaN has a code
TABLES = [
    (0, 1, 1.0, False),
    (-1, 1, 1.0, False),
    (1, 2, 1.0, False),
    (0, 4, 0.1, True),
    (0, 14, 1.0, True),
    (-30, 60, 0.1, True),
    (-30, 60, 0.25, False),
]
CASES = [(torch.float32, t) for t in TABLES] + [(d, TABLES[i]) for d in DTYPES[1:4] for i in (0, 3, 5, 6)]
CASES += [(torch.uint8, (0, 1, 1.0, False)), (torch.uint8, (0, 20, 1.0, False)), (torch.bool, (0, 1, 1.0, False))]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype, numbers", CASES)
def test_packing_restores_every_bit(name, dtype, numbers):
    values, kernels = table(*numbers[:3], dtype, numbers[3]), KERNELS[name]
    for n, tuning in ((1, SMALL), (9001, SMALL), (5000, USERS)):
        x = values.table[torch.randint(values.n, (n,))]
        words, exact = kernels.pack(x, values, tuning)
        assert exact and words.shape == definition.words_shape(n, x.itemsize, values.n)
        if name == "cpu":  # Triton packs other padding
            assert torch.equal(words, definition.pack(x, values)[0])
        found = torch.empty_like(x)
        kernels.unpack(words, values, found, tuning)
        assert same_bits(found, x)
    x = values.table[torch.randint(values.n, (6 * definition.BLOCK,))]
    assert torch.equal(kernels.pack(x, values, USERS, 3)[0], kernels.pack(x, values, USERS)[0])  # in another order


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("dtype, numbers", [case for case in CASES if case[0].is_floating_point])
def test_packing_finds_any_other_value(name, dtype, numbers):
    first, last, scale, nan = numbers
    values = table(first, last, scale, dtype, nan)
    x = values.table[torch.randint(values.n - nan, (9001,))]
    for other in [-0.0, 0.57, 1e4, -torch.inf] + [torch.nan] * (not nan):
        for at in (0, 9000):
            y = x.clone()
            y[at] = other
            assert not KERNELS[name].pack(y, values, USERS)[1], (other, at)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("unit", [1.0, 2.0**-5, 4.0])
def test_counts_are_restored_and_any_other_value_is_found(name, dtype, unit):
    kernels = KERNELS[name]
    for n in (1, 15, 9001, 2 * definition.BLOCK):
        counts = torch.randint(1 << 15, (n,), dtype=torch.int32)
        counts[-1] = (1 << 15) - 1
        x = counts.to(dtype) * unit
        numbers, exact = kernels.pack_counts(x, unit, USERS)
        assert exact and torch.equal(numbers, counts.short())
        found = torch.empty_like(x)
        kernels.unpack_counts(numbers, unit, found, USERS)
        assert same_bits(found, x)
    for other in (-0.0, -1.0, 0.57, 1.5, 32768.0, 1e30, torch.inf, -torch.inf, torch.nan) if name != "triton" else ():
        for at in (0, 8191):
            y = x.clone()
            y[at] = other * unit
            assert not kernels.pack_counts(y, unit, USERS)[1], (other, at)


def test_launchers_have_equal_signatures_on_every_backend():
    for name in ("pack", "unpack", "pack_counts", "unpack_counts", "window_codes", "window_indices"):
        cpu, triton, reference = (inspect.signature(getattr(KERNELS[k], name)) for k in KERNELS)
        assert list(cpu.parameters) == list(triton.parameters) == list(reference.parameters)


POOLS = [  # size, stride, padding, dilation, ceil_mode, height, width
    (2, 2, 0, 1, False, 8, 8), (2, 2, 0, 1, False, 7, 9), (2, 2, 1, 1, True, 7, 9), (3, 2, 1, 1, False, 9, 7),
    ((2, 3), (1, 2), (1, 1), (2, 1), True, 9, 8), (5, 3, 2, 1, False, 5, 2), (2, 2, 0, 3, False, 9, 9),
    (1, 1, 0, 1, False, 3, 4),
]  # fmt: skip


def pair(value):
    return value if isinstance(value, tuple) else (value, value)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("pool", POOLS)
def test_indices_of_windows_are_restored(name, pool):
    *settings, height, width = pool
    x = torch.randn(2, 3, height, width)
    x[0, 0, 0, 0], x[1, 1, 1] = torch.nan, -torch.inf
    window = definition.Window(*(pair(s) for s in settings[:4]), width)
    for memory, order in ((torch.contiguous_format, (0, 1, 2, 3)), (torch.channels_last, (0, 2, 3, 1))):
        _, indices = F.max_pool2d(x.to(memory_format=memory), *settings, return_indices=True)
        n, c, h, w = indices.shape
        shape = (n * c, h, w, 1) if order == (0, 1, 2, 3) else (n, h, w, c)
        flat = indices.permute(order).reshape(-1)
        codes, exact = KERNELS[name].window_codes(flat, shape, window, SMALL)
        assert exact and torch.equal(codes, definition.window_codes(flat, shape, window)[0])
        found = torch.empty_like(flat)
        KERNELS[name].window_indices(codes, shape, window, found, SMALL)
        assert torch.equal(found, flat)
        if name != "triton":
            flat[-1] += height * width + 1
            assert not KERNELS[name].window_codes(flat, shape, window, SMALL)[1]


# --- the spikes of every op -------------------------------------------------------------------------------------------------


def klif(x, s, p, o):
    h = s.v + (x - s.v) * 0.5
    fired = o.fire(h - 1.0)
    return fired, h - fired * 1.0


def counter(x, s, p, o):
    c = o.level(x, 0, 3)
    return c, s.v


OPS = {  # a function of x, (4, 3, 8, 100), and the bits of a spike; None: not packed
    "lif": (lif, 1),
    "lif, states": (lambda x: lif(x, x[0], return_v=True, return_v_seq=True)[0], 1),
    "lif, custom surrogate": (lambda x: lif(x, surrogate=lambda z: 1 / (1 + z * z)), 1),
    "lif, ternary": (lambda x: lif(x, levels="ternary"), 2),
    "lif, (0, 1)": (lambda x: lif(x, v_reset=None, levels=(0, 1)), 2),
    "lif, (0, 4)": (lambda x: lif(x, v_reset=None, levels=(0, 4)), 3),
    "lif, scale": (lambda x: lif(x, v_reset=None, levels=Levels(-3, 4, scale=0.1)), 4),
    "lif, (0, 30)": (lambda x: lif(x * 20, v_reset=None, levels=(0, 30)), 5),
    "lif, (0, 300)": (lambda x: lif(x.float() * 200, v_reset=None, levels=(0, 300)).to(x.dtype), None),
    "lif_rate, 1": (lambda x: lif_rate(x, 1), 1),
    "lif_rate, 4": (lif_rate, 3),
    "lif_rate, 5, gate": (lambda x: lif_rate(x, 5, gate=x), 3),
    "lif_rate, levels": (lambda x: lif_rate(x, 4, v_reset=None, levels=(0, 4)), 5),
    "lif_rate, scale": (lambda x: lif_rate(x, 4, v_reset=None, levels=Levels(0, 4, scale=0.5)), 5),
    "lif_rate, other scale": (lambda x: lif_rate(x, 4, v_reset=None, levels=Levels(0, 4, scale=0.3)), None),
    "lif_rate, one step, other scale": (lambda x: lif_rate(x, 1, tau=1.0, v_reset=None, levels=Levels(0, 4, scale=0.3)), 3),
    "lif_rate, ternary": (lambda x: lif_rate(x, 3, levels="ternary"), 3),
    "lif_rate, residual": (lambda x: lif_rate(x, residual=x), None),
    "leaky": (lambda x: sdit_kernels.leaky(x, beta=0.9), 1),
    "lapicque": (lambda x: sdit_kernels.lapicque(x, C=1.0), 1),
    "cuba": (lambda x: sdit_kernels.cuba(x, beta_i=0.5, beta=0.9), 1),
    "adlif": (lambda x: sdit_kernels.adlif(x, beta=0.9, beta_w=0.5, a=0.5, b=1.0, return_state=True)[0], 1),
    "own neuron": (lambda x: neuron.define(klif)(x), 1),
    "own neuron, integers": (lambda x: neuron.define(counter)(x), None),
    "spiking_wkv": (lambda x: spiking_wkv(torch.zeros(100), torch.zeros(100), x, x * 3), 1),
    "spiking_wkv, rate": (lambda x: spiking_wkv(torch.zeros(100), torch.zeros(100), x, x * 3, rate=True), 3),
    "spiking_wkv, state": (
        lambda x: spiking_wkv(torch.zeros(100), torch.zeros(100), x, x * 3, levels="ternary", return_state=True)[0], 2
    ),
    "wkv": (lambda x: sdit_kernels.wkv(torch.zeros(100), torch.zeros(100), x[0], x[0]), None),
}  # fmt: skip


@pytest.mark.parametrize("name", ["cpu", "triton", "reference"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.filterwarnings("ignore:.*surrogate.*")
def test_the_spikes_of_every_op_are_kept_as_bits(op, name, monkeypatch):
    call, bits = OPS[op]
    both = name == "cpu" and op in ("lif", "lif, (0, 4)", "lif, scale", "lif_rate, 5, gate", "lif_rate, scale", "cuba")
    for dtype in (torch.float32, torch.bfloat16) if both else (torch.float32,):
        x, w = (3 * torch.randn(4, 3, 8, 100)).to(dtype).requires_grad_(), weight(5, 100, dtype=dtype)
        results = []
        for context in (contextlib.nullcontext(), keeping(monkeypatch)):
            with backend(name), context as kept:
                y = F.linear(call(x), w)
            results.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, w])])
        assert all(map(same_bits, *results))
        assert results[0][1].abs().sum() > 0
        if bits is None:
            assert not kept.spikes()
        else:
            spikes = [item for t, item in kept.items if type(item) is packed._Saved and t.shape[-1] == 100]
            assert spikes and spikes[-1].packed.words.shape[1] == bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_is_not_lost(dtype):
    """Binary and ternary spikes of NaN are 0. Integer levels keep the NaN: it has a code.

    On the CPU, spikes with a NaN of other bits than torch.nan stay as they are. On a GPU, where nothing is checked, each NaN
    becomes torch.nan.
    """
    x = torch.randn(4, 2000, dtype=dtype)
    x[:, ::7], x[:, 1::7] = torch.nan, -torch.nan
    for name in ("cpu", "triton", "reference"):
        for levels, bits in ((None, 1), ("ternary", 2), ((0, 4), 3)):
            with backend(name), packed_spikes():
                s = lif(x, v_reset=None, levels=levels)
                saved = packed._pack(s)
            assert s.isnan().any() == (bits == 3)
            assert name != "triton" or saved.packed.words.shape[1] == bits
            torch.testing.assert_close(packed._unpack(saved), s, rtol=0, atol=0, equal_nan=True)


def test_no_op_writes_a_negative_zero():
    x = torch.cat([torch.randn(4, 1000), torch.full((4, 10), -0.0), torch.full((4, 10), -1e-30)], 1)
    for name in ("cpu", "triton", "reference"):
        for levels in (None, "ternary", (-2, 2), Levels(-2, 2, scale=0.1)):
            with backend(name):
                for s in (lif(x, v_reset=None, levels=levels), lif_rate(x, 4, v_reset=None, levels=levels)):
                    assert not (s == 0)[s.signbit()].any()


def test_a_neuron_of_the_user_that_writes_a_negative_zero_is_not_binary():
    def negative(x, s, p, o):
        return o.where(o.fire(x - 1.0), 1.0, -0.0), s.v

    with packed_spikes():
        s = neuron.define(negative)(torch.randn(4, 2000))
    assert s.signbit().any() and packed._find(s) is None


# --- what is known ----------------------------------------------------------------------------------------------------------


def spikes(*shape, levels=None, dtype=torch.float32):
    return lif(3 * torch.randn(*shape, dtype=dtype), v_reset=None, levels=levels)


def test_outside_of_the_context_nothing_is_noted():
    before = len(packed._known)
    s = spikes(4, 3000)
    assert packed._find(s) is None and len(packed._known) == before and packed._local.depth == 0
    with packed_spikes():
        assert packed._find(s) is None


def test_small_tensors_stay_as_they_are(monkeypatch):
    """Spikes of single steps may be small, and their stack large."""
    with keeping(monkeypatch) as kept:
        for n in (1023, 1024):
            spikes(1, n) * weight(n)
        torch.stack([spikes(1, 500) for _ in range(4)]) * weight(500)
    assert [item.size for item in kept.spikes()] == [(1, 1024), (4, 1, 500)]


@pytest.mark.parametrize("name", ["cpu", "triton", "reference"])
@pytest.mark.parametrize("levels, dtype, bits", [
    (None, torch.bool, 1), (None, torch.uint8, 1), ("ternary", torch.int8, 2), ((0, 4), torch.uint8, 3),
    ((-8, 9), torch.int8, 5),
])  # fmt: skip
def test_spikes_of_integer_dtypes(levels, dtype, bits, name):
    with backend(name), packed_spikes():
        s = lif(4 * torch.randn(4, 2000), v_reset=None, levels=levels, spike_dtype=dtype)
        saved = packed._pack(s)
        assert same_bits(packed._unpack(saved), s)
        if bits < 5 or name != "cpu":  # numba reads bytes as unsigned, so it finds no codes of more than 16 signed levels
            assert saved.packed.words.shape[1] == bits
            assert packed._values_at(s.float()) is not None


def test_a_reused_address_is_not_taken_for_spikes(monkeypatch):
    """The memory of freed spikes soon holds other tensors."""
    addresses, reused = set(), 0
    with keeping(monkeypatch) as kept:
        for _ in range(3000):  # how soon memory is reused depends on what ran before
            s = spikes(4, 3000)
            addresses.add(s.data_ptr())
            del s
            x = torch.randn(4, 3000)
            reused += x.data_ptr() in addresses
            x * weight(3000)
            del x
            if reused > 5:
                break
    assert reused > 5 and not kept.spikes()


def test_knowledge_dies_with_the_spikes():
    gc.collect()
    before = len(packed._known)
    with packed_spikes():
        s = spikes(4, 3000)
        y = s * weight(3000)
        assert len(packed._known) == before + 1
        bits = packed._find(s).packed
        assert bits() is not None
        del y
        gc.collect()
        assert bits() is None  # nothing holds the bits but the graph
        view = s[1]
        del s
        assert len(packed._known) == before + 1
        del view
    assert len(packed._known) == before


def test_spikes_changed_in_place_stay_as_they_are(monkeypatch):
    w = weight(3000)
    with keeping(monkeypatch) as kept:
        s = spikes(4, 3000)
        s[0, :5].add_(0.25)  # through a view
        y = s * w
    assert not kept.spikes()
    assert torch.equal(torch.autograd.grad(y.sum(), w)[0], s.sum(0))


def test_a_change_in_place_after_packing_does_not_reach_the_backward_pass():
    w = weight(3000)
    with packed_spikes():
        s = spikes(4, 3000)
        before, y = s.clone(), s * w
        s.zero_()
    assert torch.equal(torch.autograd.grad(y.sum(), w)[0], before.sum(0))


def test_a_change_of_other_saved_tensors_in_place_is_an_error_as_without_the_context():
    for make in (lambda x: x.exp(), lambda x: x * 1.0):
        with packed_spikes():
            y = make(torch.randn(2000, requires_grad=True))
            z = y * y
            with torch.no_grad():
                y.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation: .torch.FloatTensor .2000.. is at version 1"):
            z.sum().backward()


def test_a_change_that_no_version_counts_is_found_on_the_cpu(monkeypatch):
    w = weight(3000)
    with keeping(monkeypatch) as kept:
        s = spikes(4, 3000)
        s.numpy()[1, 1] = 0.5
        y = s * w
    assert not kept.spikes() and torch.equal(torch.autograd.grad(y.sum(), w)[0], s.sum(0))


VIEWS = {
    "whole": lambda s: s,
    "detached": lambda s: s.detach(),
    "transposed": lambda s: s.transpose(0, 2),
    "permuted": lambda s: s.permute(2, 0, 1),
    "flat": lambda s: s.flatten(),
    "slice": lambda s: s[1, :, 3:90:2],
    "expanded": lambda s: s[:, None].expand(-1, 2, -1, -1),
    "part": lambda s: s.chunk(3, -1)[1],
    "diagonal": lambda s: s.diagonal(),
    "strided": lambda s: s.as_strided((4, 4), (3, 1), 7),
    "unfolded": lambda s: s.unfold(2, 5, 3),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_of_spikes_are_packed_and_restored_with_their_strides(view, monkeypatch):
    with keeping(monkeypatch) as kept:
        v = VIEWS[view](spikes(4, 9, 300))
        v * weight(*v.shape)
    assert [(item.size, item.stride, item.offset) for item in kept.spikes()] == [(v.shape, v.stride(), v.storage_offset())]


def test_a_view_of_another_dtype_stays_as_it_is(monkeypatch):
    with keeping(monkeypatch) as kept:
        v = spikes(4, 9, 300).view(torch.int32).view(torch.float32)
        v * weight(300)
        spikes(4, 9, 300).view(torch.bfloat16) * weight(600, dtype=torch.bfloat16)
    assert len(kept.spikes()) == 1


def test_layers_with_the_same_input_share_its_bits(monkeypatch):
    s_bytes = 4 * 8 * 32 * 64 // 8
    q, k, v = (weight(64, 64) for _ in range(3))
    with keeping(monkeypatch) as kept:
        s = spikes(4, 8, 32, 64)
        for w in (q, k, v):
            F.linear(s, w)
        s.transpose(1, 2) * weight(64)
    assert len(kept.spikes()) == 4
    (bits,) = kept.storages()
    assert bits.words.nbytes == s_bytes


MOVES = {  # function, bits per element for binary spikes
    "clone": lambda s: s.clone(),
    "contiguous": lambda s: s.transpose(0, 3).contiguous(),
    "reshape": lambda s: s.transpose(1, 3).reshape(4, -1),
    "flatten": lambda s: s.permute(3, 0, 1, 2).flatten(1),
    "channels last": lambda s: s.to(memory_format=torch.channels_last),
    "double": lambda s: s.double(),
    "half": lambda s: s.half(),
    "bfloat16 and back": lambda s: s.bfloat16().float(),
    "type_as": lambda s: s.type_as(torch.ones(1, dtype=torch.float64)),
    "uint8 and back": lambda s: s.to(torch.uint8).float(),
    "bool and back": lambda s: s.bool().float(),
    "cat": lambda s: torch.cat([s, s.flip(1)], 1),
    "stack": lambda s: torch.stack([s, s]),
    "repeat": lambda s: s.repeat(1, 2, 1, 1),
    "expand and contiguous": lambda s: s[None].expand(2, -1, -1, -1, -1).contiguous(),
    "roll": lambda s: s.roll(1, 2),
    "index": lambda s: s[:, torch.tensor([3, 1, 0])],
    "index_select": lambda s: s.index_select(1, torch.tensor([1, 1])),
    "gather": lambda s: s.gather(1, torch.zeros(4, 2, 16, 16, dtype=torch.long)),
    "pad": lambda s: F.pad(s, (1, 2, 0, 3)),
    "unfold": lambda s: F.unfold(s, 3, padding=1),
    "relu": lambda s: torch.relu(s),
    "dropout in evaluation": lambda s: F.dropout(s, training=False),
    "max_pool2d": lambda s: F.max_pool2d(s, 2),
    "adaptive_max_pool2d": lambda s: F.adaptive_max_pool2d(s, 5),
    "max_pool3d": lambda s: F.max_pool3d(s[None], 2),
}


@pytest.mark.parametrize("levels", [None, "ternary", (0, 4)])
@pytest.mark.parametrize("move", MOVES)
def test_tensors_made_by_moving_spikes_are_spikes(move, levels, monkeypatch):
    if levels == "ternary" and move.startswith(("uint8", "bool")):
        pytest.skip("the cast changes values")
    if levels == (0, 4) and move.startswith(("uint8", "bool")):
        pytest.skip("NaN has no such cast")
    with keeping(monkeypatch) as kept:
        t = MOVES[move](spikes(4, 12, 16, 16, levels=levels))
        t * weight(*t.shape, dtype=t.dtype)
    assert kept.spikes()[-1].packed.words.shape[1] == {None: 1, "ternary": 2, (0, 4): 3}[levels]


OTHERS = {  # results that are not spikes of the same values
    "pad with another value": lambda s: F.pad(s, (1, 1), value=0.5),
    "average pooling": lambda s: F.avg_pool2d(s, 2),
    "multiple": lambda s: s * 0.3,
    "cat with others": lambda s: torch.cat([s, torch.randn_like(s)]),
    "cat with other levels": lambda s: torch.cat([s, spikes(*s.shape, levels="ternary")]),
    "sum with others": lambda s: s + torch.randn_like(s),
    "weighted sum": lambda s: torch.add(s, s, alpha=0.3),
    "dropout": lambda s: F.dropout(s, 0.4),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_results_stay_as_they_are(other, monkeypatch):
    with keeping(monkeypatch) as kept:
        s = spikes(4, 6, 16, 16)
        t = OTHERS[other](s)
        t.reshape(-1) * weight(t.numel())
    assert any(t.numel() == kept_.numel() for kept_ in kept.others())
    assert packed._find(t) is None


def test_sums_and_products_of_spikes(monkeypatch):
    """Residual connections of spikes are integers; a binary mask keeps the values."""
    with keeping(monkeypatch) as kept:
        a, b, t, c = (spikes(4, 3000, levels=levels) for levels in (None, None, "ternary", (0, 4)))
        for result, bits in ((a + b, 2), (a + b + a, 2), (a + t, 2), (a + c, 3), (a * b, 1), (a * c, 3)):
            result * weight(3000)
            assert kept.spikes()[-1].packed.words.shape[1] == bits
        n = len(kept.spikes())
        (a * t).requires_grad_() * 1.5  # 0 times -1 is -0
        F.linear(a * t, weight(3, 3000))
    assert packed._values_at(a * t) is None and n == 6


# --- pooling ----------------------------------------------------------------------------------------------------------------


def test_matmuls_of_spikes_are_counts(monkeypatch):
    def attention(q, k, v):
        y = (q @ k.transpose(-1, -2)) @ v * 0.125  # multiples of 1/8 up to 64 * 64 / 8
        return y.transpose(1, 2).reshape(4, 64, 256).square().sum() + ((q @ k.mT) * 0.5).square().sum()

    x = torch.randn(3, 4, 4, 64, 64, requires_grad=True)
    with keeping(monkeypatch) as kept:
        loss = attention(*(lif(t) for t in x))
    (found,) = torch.autograd.grad(loss, x)
    wanted = attention(*(lif(t) for t in x))
    assert same_bits(loss, wanted) and same_bits(found, torch.autograd.grad(wanted, x)[0])
    assert [t.shape for t in kept.others()] == 3 * [x.shape[1:]]
    assert {type(item).__name__ for item in kept.storages()} == {"_Bits", "_Multiples"}


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64, torch.complex64])
def test_casts_to_other_dtypes_stay_as_they_are(dtype):
    x = torch.randn(4, 8, 64, 64, requires_grad=True)
    with packed_spikes():
        s = lif(x)
        y = s * s.to(dtype)
    assert same_bits(y.real if y.is_complex() else y, s)


def test_matmuls_that_are_not_counts_stay_as_they_are():
    weight = torch.randn(64, 64)
    for make in (
        lambda s: s @ weight, lambda s: (s @ s) * 0.3, lambda s: (s @ s) * -0.5,
        lambda s: lif(3 * torch.randn(4, 64, 64), levels="ternary") @ s, lambda s: s.repeat(1, 1, 300) @ s.repeat(1, 300, 1),
    ):  # fmt: skip
        with packed_spikes():
            t = make(lif(torch.randn(4, 64, 64)))
            assert packed._find(t) is None


@pytest.mark.parametrize("name", ["cpu", "triton", "reference"])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_the_indices_of_max_pooling_take_two_bits(name, memory, monkeypatch):
    x = torch.randn(4, 8, 33, 35).to(memory_format=memory).requires_grad_()
    grads = []
    for context in (contextlib.nullcontext(), keeping(monkeypatch)):
        with backend(name), context as kept:
            y = F.max_pool2d(x, 2)
        grads.append(torch.autograd.grad(y.square().sum(), x)[0])
    assert torch.equal(*grads)
    (codes,) = kept.storages()
    assert codes.bits.words.nbytes == 512 * 2 * -(-y.numel() // 4096)
    assert kept.spikes()[0].stride == y.stride()


def test_indices_of_other_windows_take_the_bytes_they_need(monkeypatch):
    x = torch.randn(2, 4, 40, 40, requires_grad=True)
    pools = {
        "3 x 3": (lambda: F.max_pool2d(x, 3, 2, 1), lambda kept: kept.bits.words.shape[1] == 4),
        "12 x 12": (lambda: F.max_pool2d(x, 12, 1), lambda kept: kept.bits.codes.dtype == torch.uint8),
        "ceil_mode": (lambda: F.max_pool2d(x, 2, 1, ceil_mode=True), lambda kept: kept.bits.words.shape[1] == 2),
        "20 x 20": (lambda: F.max_pool2d(x, 20, 1), lambda kept: kept.flat.dtype == torch.int16),
        "adaptive": (lambda: F.adaptive_max_pool2d(x, 11), lambda kept: kept.flat.dtype == torch.int16),
        "volume": (lambda: F.max_pool3d(x[None].expand(1, 2, 4, 40, 40), 2), lambda kept: kept.flat.dtype == torch.int16),
        "unbatched": (lambda: F.max_pool2d(x[0], 2, 1), lambda kept: kept.bits.words.shape[1] == 2),
        "indices returned": (lambda: F.max_pool2d(x, 2, 1, return_indices=True)[0], lambda kept: kept.bits.words.shape[1] == 2),
    }
    for name, (pool, is_small) in pools.items():
        grads = []
        for context in (contextlib.nullcontext(), keeping(monkeypatch)):
            with context as kept:
                y = pool()
            grads.append(torch.autograd.grad(y.square().sum(), x)[0])
        assert torch.equal(*grads), name
        assert any(is_small(found) for found in kept.storages()), name


def test_large_planes_keep_32_bits():
    indices = packed.Indices(1 << 20, (), None).pack(torch.tensor([0, 1 << 19]), "cpu")
    assert indices.flat.dtype == torch.int32 and indices.restore((2,)).tolist() == [0, 1 << 19]
    assert packed.Indices(1 << 32, (), None).pack(torch.tensor([1 << 31]), "cpu") is None


# --- a network --------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """conv, lif, conv, pool, lif, linear, for inputs (T, B, 3, 16, 16)."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.pool, self.linear = nn.MaxPool2d(2), nn.Linear(16 * 64, 10)

    def forward(self, x):
        shape = x.shape[:2]
        s = lif(self.conv1(x.flatten(0, 1)).unflatten(0, shape))
        s = self.pool(lif(self.conv2(s.flatten(0, 1)).unflatten(0, shape)).flatten(0, 1))
        return self.linear(s.flatten(1).unflatten(0, shape)).mean(0)


@pytest.fixture
def net():
    return Net()


IMAGES = (4, 4, 3, 16, 16)


def gradients(net, run, x):
    net.zero_grad()
    loss = run(x).square().sum()
    loss.backward()
    return [p.grad.clone() for p in net.parameters()]


def packed_run(net):
    def run(x):
        with packed_spikes():
            return net(x)

    return run


@pytest.mark.parametrize("name", ["cpu", "triton", "reference"])
def test_a_network_has_the_same_gradients_and_keeps_fewer_bytes(name, net):
    x = torch.randn(IMAGES)
    with backend(name):
        wanted, found = (gradients(net, run, x) for run in (net, packed_run(net)))
    assert all(map(torch.equal, wanted, found))
    if name == "cpu":
        n = 4 * 4 * 16  # images times channels
        spikes, indices = 4 * n * (256 + 256 + 64), 8 * n * 64
        bits = [1 * n * 256 // 8] * 2 + [n * 64 // 8, 2 * n * 64 // 8]
        saved = allocated(lambda: net(x)) - allocated(lambda: packed_run(net)(x))
        assert saved == pytest.approx(spikes + indices - sum(bits), abs=4096)
        assert (spikes + indices) / sum(bits) > 30


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_cast_spikes_are_kept_as_bits(dtype, net, monkeypatch):
    x, results = torch.randn(IMAGES), []
    for context in (contextlib.nullcontext(), keeping(monkeypatch)):
        net.zero_grad()
        with context as kept, torch.autocast("cpu", dtype=dtype):
            # a neuron in float32, as a norm in float32 before it causes
            s = lif(net.conv1(x.flatten(0, 1)).float().unflatten(0, (4, 4)))
            y = net.linear(net.pool(net.conv2(s.flatten(0, 1))).flatten(1)).float() + F.linear(s, torch.ones(1, 16)).mean()
        y.square().sum().backward()
        results.append([p.grad.clone() for p in net.parameters()])
    assert all(map(torch.equal, *results))
    assert not any(t.numel() == s.numel() and bool(((t == 0) | (t == 1)).all()) for t in kept.others())
    assert {item.packed.dtype for item in kept.spikes() if hasattr(item.packed, "dtype")} >= {dtype}


def test_attention_between_spikes(monkeypatch):
    """q, k and v are spikes; matmul saves permuted copies."""
    w = [weight(64, 64) for _ in range(4)]
    x, results = 3 * torch.randn(4, 2, 32, 64), []
    for context in (contextlib.nullcontext(), keeping(monkeypatch)):
        with context as kept:
            s = lif(x)
            q, k, v = (lif(F.linear(s, m)).unflatten(-1, (4, 16)).transpose(2, 3) for m in w[:3])
            y = F.linear(lif((q @ k.transpose(-1, -2)) @ v * 0.125).transpose(2, 3).reshape(4, 2, 32, 64), w[3])
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), w)])
    assert all(map(torch.equal, *results)) and results[0][1].abs().sum() > 0
    floats = [t for t in kept.others() if t.numel() >= 1024 and bool(((t == 0) | (t == 1)).all())]
    # s for three layers, q, k, v, the product of q and k, the input of the last neuron, the last input
    assert not floats and len(kept.spikes()) == 3 + 3 + 1 + 1 + 1


# --- other contexts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_activation_checkpointing(reentrant, inside, net):
    """The backward pass runs in the context or after it."""
    x = torch.randn(IMAGES, requires_grad=True)
    wanted = gradients(net, net, x)
    net.zero_grad()
    with packed_spikes():
        loss = checkpoint(net, x, use_reentrant=reentrant).square().sum()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), wanted))


def test_the_context_inside_of_checkpointing(net):
    x = torch.randn(IMAGES, requires_grad=True)
    wanted = gradients(net, net, x)
    for reentrant in (True, False):
        found = gradients(net, lambda x, r=reentrant: checkpoint(packed_run(net), x, use_reentrant=r), x)
        assert all(map(torch.equal, wanted, found))


def test_save_on_cpu_inside_and_outside(net):
    x = torch.randn(IMAGES)
    wanted = gradients(net, net, x)

    def inside(x):
        with packed_spikes(), torch.autograd.graph.save_on_cpu():
            return net(x)

    def outside(x):
        with torch.autograd.graph.save_on_cpu(), packed_spikes():
            return net(x)

    for run in (inside, outside):
        assert all(map(torch.equal, wanted, gradients(net, run, x)))


def state():
    from sdit_kernels._torch import dispatch_mode_count

    return packed._local.depth, len(packed._local.entered), dispatch_mode_count()


def test_nested_contexts_exceptions_and_reuse(net, monkeypatch):
    before, context = state(), packed_spikes()
    with context as entered:
        assert entered is context and state() == (1, 1, 1)
        with context, packed_spikes():
            assert state() == (3, 3, 1)  # one mode serves all
            with pytest.raises(KeyError), packed_spikes():
                raise KeyError
            assert state() == (3, 3, 1)
        with keeping(monkeypatch) as kept:
            spikes(4, 3000) * weight(3000)
        assert len(kept.spikes()) == 1
    assert state() == before
    with context, keeping(monkeypatch) as kept:
        spikes(4, 3000) * weight(3000)
    assert len(kept.spikes()) == 1 and state() == before


def test_as_a_decorator(net):
    @packed_spikes()
    def run(x):
        """A docstring."""
        assert packed._local.depth == 1
        return net(x)

    x = torch.randn(IMAGES)
    assert all(map(torch.equal, gradients(net, net, x), gradients(net, run, x)))
    assert run.__doc__ == "A docstring." and packed._local.depth == 0

    def steps():
        yield 1

    async def later():
        return 1

    for wrong in (steps, later, Net):
        with pytest.raises(TypeError, match="decorates a function that runs when it is called, got .*: use a with statement"):
            packed_spikes()(wrong)
    with pytest.raises(TypeError, match="decorates a function, got int"):
        packed_spikes()(1)


def test_a_generator_that_enters_the_context():
    """As with torch.no_grad, the context is active between the steps of the generator, and ends with it."""

    def steps():
        with packed_spikes():
            while True:
                yield spikes(4, 3000)

    before, running = state(), steps()
    s = next(running)
    assert packed._find(s) is not None and state() == (1, 1, 1)
    running.close()
    assert state() == before


def test_threads_have_contexts_of_their_own(net):
    x = torch.randn(IMAGES)
    wanted, found, inside = gradients(net, net, x), {}, threading.Barrier(3)

    def work(i):
        assert packed._local.depth == 0
        with packed_spikes() if i else contextlib.nullcontext():
            inside.wait(60)
            y = net(x)
            inside.wait(60)
        found[i] = torch.autograd.grad(y.square().sum(), list(net.parameters()))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(found) == 3 and all(map(torch.equal, found[i], wanted) for i in found)
    assert all(all(map(torch.equal, f, wanted)) for f in found.values())


@pytest.mark.parametrize("changed", [False, True])
def test_readers_of_one_tensor_share_what_is_restored(changed, monkeypatch):
    restored, own = [], packed._Bits.restore
    monkeypatch.setattr(packed._Bits, "restore", lambda self, shape: restored.append(own(self, shape)) or restored[-1])
    layers, x = [nn.Linear(64, 8) for _ in range(3)], torch.randn(4, 8, 16, 64)
    found = []
    for context in (contextlib.nullcontext(), packed_spikes()):
        with context:
            s = lif(3 * x)
            ys = [layer(t) for layer, t in zip(layers, (s, s.flatten(0, 1), s))]
            unread = layers[0](s)
        for y in ys:
            y.square().sum().backward()
            if changed and restored:
                restored[-1].mul_(2)  # as a faulty backward pass of somebody else would
        found.append([layer.weight.grad.clone() for layer in layers])
        [layer.zero_grad() for layer in layers]
    assert all(map(torch.equal, *found)) and len(restored) == (3 if changed else 1)
    unread.square().sum().backward()  # the last reader
    assert len(restored) == (4 if changed else 1)
    address = weakref.ref(restored.pop(0))
    restored.clear()
    gc.collect()
    assert address() is None


def test_a_second_backward_pass_and_a_backward_pass_on_another_thread(net):
    x = torch.randn(IMAGES)
    wanted = gradients(net, net, x)
    net.zero_grad()
    loss = packed_run(net)(x).square().sum()
    loss.backward(retain_graph=True)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), wanted))
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(net.parameters(), wanted))
    with pytest.raises(RuntimeError, match="graph a second time"):
        loss.backward()


def test_second_derivatives_of_layers_behind_spikes():
    s, results = None, []
    w = weight(5, 300)
    for context in (contextlib.nullcontext(), packed_spikes()):
        torch.manual_seed(1)
        with context:
            s = spikes(4, 9, 300)
            y = F.linear(s, w).tanh()
        (g,) = torch.autograd.grad(y.square().sum(), w, create_graph=True)
        results.append(torch.autograd.grad(g.square().sum(), w)[0])
    assert torch.equal(*results)


def test_saving_spikes_makes_no_cycle(net):
    with packed_spikes():
        y = net(torch.randn(IMAGES))
    reference = weakref.ref(y)
    gc.disable()
    try:
        del y
        assert reference() is None
    finally:
        gc.enable()


def test_transforms_of_torch_func():
    """Inside a transform the context does nothing. torch.func.grad refuses to run in any context with hooks."""
    x, w = torch.randn(4, 3, 8, 100), weight(5, 100)

    def plain(x):
        return F.linear(lif(x), w).square().sum()

    def inside(x):
        with packed_spikes():
            return plain(x)

    for transform in (torch.func.grad, torch.func.vmap):
        assert torch.equal(transform(inside)(x), transform(plain)(x))
    with packed_spikes():
        assert torch.equal(torch.func.vmap(plain)(x[None])[0], plain(x))
        with pytest.raises(RuntimeError, match="don't yet support saved tensor hooks"):
            torch.func.grad(plain)(x)
    assert state() == (0, 0, 0)


def test_under_fake_tensors_and_tracing():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(), packed_spikes():
        s = lif(torch.randn(4, 3000, requires_grad=True))
        (s * torch.ones(3000)).sum().backward()

    def run(x):
        with packed_spikes():
            return lif(x) * 2

    x = torch.randn(4, 3000)
    assert torch.equal(torch.jit.trace(run, x)(x), run(x))
    with packed_spikes():  # PyTorch cannot trace `* 2` while a mode is active
        assert torch.equal(torch.jit.trace(lambda x: lif(x), x)(x) * 2, run(x))
    with packed_spikes(), torch.inference_mode():
        assert torch.equal(lif(x), run(x) / 2)


def test_compiled_functions_run_eagerly_in_the_context(monkeypatch):
    """PyTorch compiles nothing while the context's mode is active. fullgraph=True is refused by PyTorch."""
    w, x = weight(5, 100), (3 * torch.randn(4, 3, 8, 100)).requires_grad_()

    def loss(x):
        return F.linear(lif(x).clone(), w).square().sum()

    def whole(x):
        with packed_spikes():
            return loss(x)

    def entered(x):
        with packed_spikes():
            return x * 2

    wanted = torch.autograd.grad(loss(x), [x, w])
    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager")
    for _ in range(2):  # before and after it was compiled outside
        with keeping(monkeypatch) as kept:
            y = compiled(x)
        assert len(kept.spikes()) == 1
        assert all(map(torch.equal, torch.autograd.grad(y, [x, w]), wanted))
        y = compiled(x)
        assert all(map(torch.equal, torch.autograd.grad(y, [x, w]), wanted))
    assert all(map(torch.equal, torch.autograd.grad(torch.compile(whole, backend="aot_eager")(x), [x, w]), wanted))
    torch.compiler.reset()  # or it may remember to run a frame as it is, also with fullgraph=True
    with packed_spikes(), pytest.raises(RuntimeError, match="fullgraph"):
        torch.compile(lambda x: loss(x) * 2, fullgraph=True, backend="aot_eager")(x)
    with pytest.raises(Exception, match=r"packed_spikes\(\) cannot be entered in a function that torch.compile compiles"):
        torch.compile(entered, fullgraph=True, backend="aot_eager")(x)
    assert state() == (0, 0, 0)
    torch.compiler.reset()


def test_ops_skip_the_dispatcher_if_no_other_mode_is_active():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    x = torch.randn(4, 3000)
    assert not packed.has_other_modes()
    with packed_spikes():
        assert not packed.has_other_modes()
        with Names() as names:
            assert packed.has_other_modes()
            s = lif(x)
        assert "sdit_kernels.lif.default" in names.seen and packed._find(s) is not None
    with Names() as names, packed_spikes():
        s = lif(x)
    assert "sdit_kernels.lif.default" in names.seen and packed._find(s) is not None


DISTRIBUTED = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, "tests")
from test_packed import IMAGES, Net, gradients, packed_run
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
torch.manual_seed(0)
net, x = Net(), torch.randn(IMAGES)
wanted = gradients(net, net, x)
parallel = DistributedDataParallel(net)
found = gradients(net, packed_run(parallel), x)
print(all(map(torch.equal, wanted, found)))
dist.destroy_process_group()
"""


@pytest.mark.process
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed package")
def test_distributed_data_parallel():
    done = python(DISTRIBUTED)
    assert done.returncode == 0 and done.stdout.strip() == "True", done.stderr
