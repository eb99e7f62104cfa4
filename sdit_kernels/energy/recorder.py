"""Record the products of a running model: a dispatch mode sees every operator, hooks tell the layer.

Where a tensor comes from decides whether it can be weights or spikes. An operator's result has the highest origin of its
arguments::

    FACTORY      zeros, ones, arange, ...
    WEIGHT       a parameter or buffer, or a view or copy of some
    DERIVED      computed from weights alone
    INDEX        integers or booleans given to the model, or a view or copy of some
    LOOKUP       computed from INDEX and FACTORY alone, such as one-hot tokens
    GIVEN        floats given to the model, or a view or copy of some; INDEX cast to floats
    PREPARED     computed from GIVEN, or drawn, outside every module; GIVEN again if the model is called with it
    ACTIVATION   computed from GIVEN, or from INDEX or LOOKUP and weights (an embedding)

Tensors that were made before the recording or by NumPy are INDEX or GIVEN, as if the model was given them.
"""

import enum
import functools
import inspect
import math
import re
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from .. import own
from .._torch import OperatorMode, in_backward, written_arguments
from . import products
from .products import Product


class Origin(enum.IntEnum):
    FACTORY = 0
    WEIGHT = 1
    DERIVED = 2
    INDEX = 3
    LOOKUP = 4
    GIVEN = 5
    PREPARED = 6
    ACTIVATION = 7


OUTSIDE = "(no module)"  # layer of what runs while no module runs
_COMPUTED = {Origin.WEIGHT: Origin.DERIVED, Origin.INDEX: Origin.LOOKUP, Origin.GIVEN: Origin.ACTIVATION}
_PREPARED = (Origin.FACTORY, Origin.LOOKUP, Origin.PREPARED)  # origins that end when the model is called with the tensor


class Source(NamedTuple):
    """What is known of the values in some memory."""

    origin: Origin
    eps: float = 0.0  # relative rounding of a narrower dtype from which the values were copied
    copies: int = 1  # how often each value is there because PyTorch copied a broadcast tensor


class Operand(NamedTuple):
    """What is known of one operand in one call of a product."""

    origin: Origin | None  # None: it has no values to look at
    values: int  # a value that is broadcast is one value
    elements: int
    eps: float  # relative rounding of the values
    measured: Tensor | None  # products.FIELDS, on the device; None for weights and for operands without values


class Call(NamedTuple):
    """One call of a product."""

    shape: str
    macs: int
    result_values: int
    operands: tuple[Operand, Operand]


@dataclass
class Record:
    """A product at one place of the program."""

    layer: str
    op: str
    calls: list[Call] = field(default_factory=list)
    fired: tuple[dict[int, Tensor], dict[int, Tensor]] = field(default_factory=lambda: ({}, {}))  # {neurons: which fired}


@dataclass
class Recording:
    """What a recorder found."""

    records: dict[tuple, Record] = field(default_factory=dict)
    unknown: Counter[tuple[str, str]] = field(default_factory=Counter)  # (operator, layer): calls
    fused: Counter[tuple[str, str]] = field(default_factory=Counter)  # (operator, layer): elements
    batches: int = 0
    saw_operators: bool = False
    saw_meta: bool = False  # some operand had no values
    # of each module called while no other module ran, for each call: {argument: its fingerprint; None: computed by modules}
    inputs: dict[str, list[dict[tuple, Tensor | None]]] = field(default_factory=dict)


# --- what is known of an operator by its name ---------------------------------------------------------------------------------

_OPERATOR = type(torch.ops.aten.add.Tensor)

# They keep the values of their arguments.
_COPIES = re.compile(
    r"_to_copy|clone|contiguous|lift_fresh|copy_|_unsafe_view|.*_copy|cat|stack|repeat|repeat_interleave|flip|roll|gather|take"
    r"|index|_unsafe_index|index_select|masked_select|constant_pad_nd|(reflection|replication)_pad\dd|(_foreach_)?copy_?"
)

# Names of operators with products or decompositions. Fused cells are elementwise; resampling counts as pooling does.
_CONTRACTS = re.compile(
    r"mm(?!a)|matmul|conv(?!ert)|linear|dot|attention|multi_head|transformer|rnn|lstm|gru|fft|cdist|pdist|euclidean_dist"
    r"|embedding_bag|linalg_(?!vector_norm|_powsum|cross)|cholesky|solve|inverse|matrix_exp|geqrf|ormqr|^lu_|svd|index_add"
    r"|scatter_add|segment_reduce"
)
_CONTRACTS_NOT = re.compile(r"_thnn_|_?upsample|.*flatten_weight|.*reorder")
_NO_PRODUCTS = ("prim", "profiler", "c10d", "_c10d_functional", "_c10d_functional_autograd")

# Functions that PyTorch computes as an elementwise multiplication, with or without a sum.
_SUMS_OF_PRODUCTS: dict[Any, str] = {
    **dict.fromkeys((torch.outer, torch.ger, Tensor.outer, Tensor.ger), "aten::outer"),
    **dict.fromkeys((torch.kron, Tensor.kron), "aten::kron"),
    torch.linalg.vecdot: "aten::linalg_vecdot",
    torch.cosine_similarity: "aten::cosine_similarity",
    torch.nn.functional.cosine_similarity: "aten::cosine_similarity",
}


def is_fractional(t: Tensor) -> bool:
    """True if t can hold numbers that are not integers."""
    return t.is_floating_point() or t.is_complex() or t.is_quantized


class Facts:
    """What the recorder needs to know of an operator, worked out once."""

    def __init__(self, function: Any):
        self.is_operator = isinstance(function, _OPERATOR)  # else it takes functions, as flex_attention does
        name = function.name() if callable(getattr(function, "name", None)) else str(function)
        self.name = name.partition(".")[0]
        self.namespace: str = self.name.rpartition("::")[0]
        self.short: str = self.name.rpartition("::")[2]
        self.arguments = [a.name for a in function._schema.arguments] if self.namespace == "sdit_kernels" else []
        self.is_known = products.is_known(self.name)
        self.is_view = self.is_operator and function.is_view
        self.is_copy = _COPIES.fullmatch(self.short) is not None
        self.is_random = self.is_operator and torch.Tag.nondeterministic_seeded in function.tags
        self.may_decompose = self.is_operator and not self.is_known and self.namespace != "prim"
        standard = self.namespace in ("aten", "prims")
        named = _CONTRACTS.search(self.short) and not _CONTRACTS_NOT.match(self.short)
        self.may_contract = bool(self.is_known or named or not standard) and self.namespace not in _NO_PRODUCTS
        self.of_integers = standard and (self.is_known or "mm" in self.short)

    def may_contain_products(self, tensors: list[Tensor], out: object) -> bool:
        """True if a call that ``products`` does not understand may contain products."""
        if not self.may_contract:
            return False
        return self.of_integers or any(map(is_fractional, tensors)) and any(map(is_fractional, tensors_in(out)))


@functools.cache
def facts_of(function: Any) -> Facts:
    return Facts(function)


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors of nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


# multiply-adds and additions per element and step of our own operators, without exponentials and divisions
FUSED_COSTS = {
    "lif": (2, 2),  # v + (x - v) / tau, compare, reset
    "lif_rate": (2, 3),  # as lif, and count the spike
    "leaky": (2, 1),  # beta * v + x, compare, reset
    "lapicque": (3, 1),  # two products, compare, reset
    "cuba": (3, 1),  # beta_i * i + x, beta * v + i, compare, reset
    "adlif": (7, 2),  # beta * v + (1 - beta) (x - w), compare, reset, beta_w * w + (1 - beta_w) (a v + b s)
    "lif without leak": (1, 2),  # v + x, compare, reset
    "lif_rate without leak": (1, 3),
    "leaky without leak": (1, 2),
    "wkv": (6, 3),  # numerator and denominator: decay, add the token, add the bonus; three exponents
    "wkv_step_": (6, 3),
    "spiking_wkv": (8, 5),  # wkv and lif
    "token_shift": (3, 1),  # a mix per output
    "relu_squared": (1, 0),
}


def is_fused(name: str) -> bool:
    """True if the operator has costs here. The costs of a neuron of the user follow from its step."""
    base = name.removeprefix("norm_")
    if base not in FUSED_COSTS and (costs := own.costs(base)) is not None:
        FUSED_COSTS[base] = costs
    if name != base and base in FUSED_COSTS:  # (x - mean) * scale + shift, then the neuron; without the statistics
        for suffix in ("", " without leak"):
            if base + suffix in FUSED_COSTS:
                products, sums = FUSED_COSTS[base + suffix]
                FUSED_COSTS[name + suffix] = products + 1, sums + 1
    return name in FUSED_COSTS


def fused_work(facts: "Facts", args: tuple, kwargs: dict) -> tuple[str, int]:
    """Return the name in ``FUSED_COSTS`` of a call of one of our operators, and its number of elements and steps."""
    given = dict(zip(facts.arguments, args)) | kwargs
    name = facts.short
    if name in ("lif", "lif_rate", "norm_lif") and given["tau"] is None and math.isinf(given["tau_value"]):
        name += " without leak"
    if name in ("leaky", "norm_leaky") and given["beta"] is None and given["beta_value"] == 1:
        name += " without leak"
    return name, args[0].numel() * (given["T"] if facts.short == "lif_rate" else 1)


# --- the recorder -------------------------------------------------------------------------------------------------------------

_TORCH = Path(torch.__file__).parent
# Frames of these files are not part of a place: they differ between calls of one place.
_BETWEEN = tuple(
    str(path)
    for path in (
        Path(__file__).parent, _TORCH / "_ops.py", _TORCH / "overrides.py", _TORCH / "_compile.py", _TORCH / "_dynamo",
        _TORCH / "nested", _TORCH / "utils" / "_python_dispatch.py", _TORCH / "utils" / "_stats.py",
    )
)  # fmt: skip
_OVERRIDES = ("__torch_function__", "__torch_dispatch__")  # of tensor subclasses and modes of the user
_MODULE = str(_TORCH / "nn" / "modules" / "module.py")  # calls the code of a module
# They call operators for their caller.
_LIBRARIES = re.compile(rf"{re.escape(str(_TORCH))}[\\/]|.*[\\/](site|dist)-packages[\\/](einops|opt_einsum)[\\/]")


_COMPILING = ("torch._dynamo", "torch.nn.attention.flex_attention")  # flex_attention imports the compiler in its first call


def call_site() -> tuple[tuple[object, int], ...]:
    """Return the place in the program that called the operator.

    The place is a position in the code of the module that runs, or in a function that it calls. If a function of a library,
    such as einsum, calls the operator, the place is the position of that call, and the positions inside the library.
    """
    place: list[tuple[object, int]] = []
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename != _MODULE:
        code = frame.f_code
        if not code.co_filename.startswith(_BETWEEN) and code.co_name not in _OVERRIDES:
            place.append((code, frame.f_lasti))
            if not _LIBRARIES.match(code.co_filename):
                break
        frame = frame.f_back
    return tuple(place)


def _storage(t: Tensor) -> int:
    """Return an identity of the memory of a tensor, 0 if it has none."""
    if t.layout != torch.strided:
        return 0
    try:
        return t.untyped_storage().data_ptr()
    except RuntimeError:  # a wrapper of a transform
        return 0


def _is_wrapper(kind: type) -> bool:
    """True for a subclass of Tensor that is made of other tensors, such as jagged nested tensors."""
    return hasattr(kind, "__tensor_flatten__")


def _parts(t: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors of which a tensor is made."""
    flatten = getattr(t, "__tensor_flatten__", None)
    if flatten is None:
        yield t
        return
    for name in flatten()[0]:
        yield from _parts(getattr(t, name))


def _eps(t: Tensor) -> float:
    return torch.finfo(t.dtype).eps if t.is_floating_point() else 0.0


_this_thread = threading.local()  # busy: some recorder of this thread works on tensors itself


def _is_busy() -> bool:
    return getattr(_this_thread, "busy", False)


@contextmanager
def _own_work() -> Iterator[None]:
    """A recorder's own operators are not recorded, also not by other recorders, and touch no graph."""
    _this_thread.busy = True
    try:
        with torch.no_grad():
            yield
    finally:
        _this_thread.busy = False


class Recorder:
    """Record all products of this thread while ``running()`` is active. It changes nothing in the model.

    A mode of PyTorch sees the operators of one thread only. If another thread runs modules of the model, ``unknown`` says so.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.found = Recording()
        self.ordinal = 0  # of a product within one call of a function of torch
        self._names: dict[nn.Module, str] = {}
        self._foreign: dict[nn.Module, str] = {}
        self._layers: list[str] = []
        self._thread = threading.get_ident()
        self._sources: dict[int, tuple[Source, StorageWeakRef]] = {}  # by address
        self._many_sources = 1000  # clear entries of freed memory when there are more
        self._weights: set[int] = set()
        self._parameters: set[int] = set()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Record inside the with block. Hooks and modes go when it ends, also after an error."""
        self._names = {m: _without_wrappers(name) for name, m in self.model.named_modules()}
        self._layers, self._thread = [], threading.get_ident()
        self._weights, self._parameters = _memory_of(self.model), _addresses(self.model.parameters())
        with ExitStack() as stack:
            # Inside compiled code nothing can be counted, so it runs as Python. A compilation while a mode is active would also
            # spoil the compiler's caches. The import of the compiler takes seconds, so do it only if something may compile.
            if sys.modules.keys().isdisjoint(_COMPILING):
                stack.callback(_reset_compiler)
            else:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
                stack.enter_context(warnings.catch_warnings())  # the hooks run once more for the compiled wrapper: no harm
                warnings.filterwarnings("ignore", message=".*global hooks on modules")
            stack.callback(register_module_forward_pre_hook(self._enter).remove)
            if not isinstance(self.model, torch.jit.ScriptModule):
                call = self._call_model  # copies of the model copy a function as it is
                hook = self.model.register_forward_pre_hook(lambda *given: call(*given), with_kwargs=True)
                stack.callback(hook.remove)
            stack.callback(register_module_forward_hook(self._leave, always_call=True).remove)
            stack.enter_context(_Functions(self))
            stack.enter_context(_Operators(self))
            yield

    def _enter(self, module, args):
        if in_backward():
            return
        if threading.get_ident() != self._thread:
            if module in self._names or (self._layers and getattr(module, "_is_replica", False)):
                self.found.unknown["modules called in another thread", ""] += 1
            return
        name = self._name(module)
        if not self._layers and module is not self.model and module in self._names:
            self._weights |= _memory_of(module)
            self._parameters |= _addresses(module.parameters())
            self._note_inputs(name, args, {})
        self._layers.append(name)
        if module is self.model and isinstance(module, torch.jit.ScriptModule):
            self._call_model(module, args, {})

    def _call_model(self, module, args, kwargs):
        """Note that the model is called. Global hooks do not see keyword arguments, so this is a hook of the model."""
        if module is not self.model or in_backward() or threading.get_ident() != self._thread or len(self._layers) > 1:
            return
        self._weights, self._parameters = _memory_of(module), _addresses(module.parameters())
        self.found.batches += 1
        for t in tensors_in((args, kwargs)):
            before = self.source(t)
            if before.origin in _PREPARED:
                self._set_source(t, before._replace(origin=Origin.GIVEN if is_fractional(t) else Origin.INDEX))
        self._note_inputs("", args, kwargs)

    def _name(self, module):
        """Return the name of a module. A module that the model does not own is named after its class."""
        if module in self._names:
            return self._names[module]
        if module not in self._foreign:
            self._foreign[module] = f"({type(module).__name__} {len(self._foreign)})"
        self._weights |= _memory_of(module)
        return ".".join(filter(None, (*self._layers[-1:], self._foreign[module])))

    def _leave(self, module, args, out):
        if not in_backward() and self._layers and threading.get_ident() == self._thread:
            self._layers.pop()

    def _note_inputs(self, name, args, kwargs):
        """Note the fingerprints of the tensors that a module is given, to know later which of them changed."""
        given: dict[tuple, Tensor | None] = {}
        with _own_work():
            for argument, value in (*enumerate(args), *kwargs.items()):
                for i, t in enumerate(tensors_in(value)):
                    dense = t.layout == torch.strided and not t.is_nested and not _is_wrapper(type(t))
                    if dense and t.numel() and not t.is_meta and not t.is_complex():
                        computed = self.source(t).origin == Origin.ACTIVATION
                        given[argument, i] = None if computed else products.fingerprint(t.double())
        self.found.inputs.setdefault(name, []).append(given)

    @property
    def layer(self) -> str:
        return self._layers[-1] if self._layers else OUTSIDE

    def source(self, t: Tensor) -> Source:
        memory = _storage(t)
        if memory in self._sources:
            source, owner = self._sources[memory]
            if not owner.expired():  # else another tensor may have got its address
                return source
        if memory in self._weights:
            return Source(Origin.WEIGHT)
        return Source(Origin.GIVEN if is_fractional(t) else Origin.INDEX)

    def _trace(self, function, facts, args, kwargs, tensors, out):
        """Note where the results of an operator come from."""
        if facts.short.startswith("_foreach_") and not isinstance(args[0], Tensor):
            return self._trace_each(function, facts, args, out)
        sources = [self.source(t) for t in tensors]
        origins = [source.origin for source in sources]
        origin, eps, copies = max(origins, default=Origin.FACTORY), 0.0, 1
        if not tensors and facts.is_random:
            origin = Origin.ACTIVATION
            if not self._layers:
                integers = any(not is_fractional(t) for t in tensors_in(out))
                origin = Origin.INDEX if integers else Origin.PREPARED
        if origin in (Origin.INDEX, Origin.LOOKUP) and (Origin.WEIGHT in origins or Origin.DERIVED in origins):
            origin = Origin.ACTIVATION
        if facts.short == "lift_fresh":  # torch.tensor of Python's numbers: data outside the modules, a constant inside
            origin = Origin.FACTORY if self._layers else Origin.GIVEN if is_fractional(tensors[0]) else Origin.INDEX
        elif facts.is_copy:
            if facts.short == "_to_copy" and origin == Origin.INDEX and out.is_floating_point():
                origin = Origin.GIVEN
            eps = max((max(source.eps, _eps(t)) for source, t in zip(sources, tensors)), default=0.0)
            if len(tensors) == 1 and tensors[0].numel() and tensors[0].layout == torch.strided:
                copies = sources[0].copies * (tensors[0].numel() // products.distinct(tensors[0]))
        elif not facts.is_view:
            origin = _COMPUTED.get(origin, origin)
            if origin == Origin.ACTIVATION and not self._layers and max(origins, default=origin) == Origin.GIVEN:
                origin = Origin.PREPARED
            elif origin == Origin.PREPARED and self._layers:
                origin = Origin.ACTIVATION
        for t in tensors_in(written_arguments(function, args, kwargs) if facts.is_operator else ()):
            if not self._layers and _storage(t) in self._parameters:
                continue  # an optimizer writes into parameters
            before = self.source(t)
            self._set_source(t, Source(max(origin, before.origin), max(eps, before.eps)))
        if facts.is_view:
            return  # it shares the memory of its argument
        known = {_storage(t) for t in tensors}
        for t in tensors_in(out):
            if _storage(t) not in known:
                self._set_source(t, Source(origin, eps, copies))

    def _trace_each(self, function, facts, args, out):
        """Trace an operator on lists of tensors as one call per position in the lists."""
        n = len(args[0])
        for i in range(n):
            each = tuple(a[i] if isinstance(a, (list, tuple)) and len(a) == n else a for a in args)
            made = out[i] if isinstance(out, (list, tuple)) and len(out) == n else None
            self._trace(function, facts, each, {}, list(tensors_in(each)), made)

    def _set_source(self, t, source):
        memory = _storage(t)
        if not memory:
            return
        self._sources[memory] = source, StorageWeakRef(t.untyped_storage())
        if len(self._sources) > self._many_sources:
            self._sources = {m: entry for m, entry in self._sources.items() if not entry[1].expired()}
            self._many_sources = 1000 + 2 * len(self._sources)

    def see(self, function: Any, facts: Facts, args: tuple, kwargs: dict, out: object) -> None:
        self.found.saw_operators = True
        tensors = list(tensors_in(args))
        if kwargs:
            tensors += tensors_in(kwargs)
        if facts.namespace == "sdit_kernels":
            if is_fused(facts.short):
                name, elements = fused_work(facts, args, kwargs)
                self.found.fused[name, self.layer] += elements
        elif facts.may_contract:
            with _own_work():
                found = products.find(facts.name, args, out)
                for product in found or ():
                    self._record(product)
            if found is None and facts.may_contain_products(tensors, out):
                self.found.unknown[facts.name, self.layer] += 1
        self._trace(function, facts, args, kwargs, tensors, out)

    def _record(self, product: Product):
        self.ordinal += 1
        key = (self.layer, product.op, call_site(), self.ordinal)
        if key not in self.found.records:
            self.found.records[key] = Record(self.layer, product.op)
        record = self.found.records[key]
        sources = [None if t is None or t.is_meta else self.source(t) for t in product.operands]
        a, b = (0.0 if t is None or s is None else max(s.eps, _eps(t)) for t, s in zip(product.operands, sources))
        eps = a, b
        self.found.saw_meta |= any(t is not None and t.is_meta for t in product.operands)
        are_data = all(s is None or s.origin >= Origin.INDEX for s in sources)
        operands = []
        for i, (t, source) in enumerate(zip(product.operands, sources)):
            values, measured = product.sizes[i], None
            if source is not None:
                values = -(-values // source.copies)
                if source.origin not in (Origin.WEIGHT, Origin.DERIVED):
                    measured = products.measure(product, i, eps, pairs=are_data and i == 0)
                    self._remember_fired(record.fired[i], product, i, measured)
            origin = None if source is None else source.origin
            operands.append(Operand(origin, values, 0 if t is None else t.numel(), eps[i], measured))
        record.calls.append(Call(product.shape, product.macs, product.sizes[2], (operands[0], operands[1])))

    @staticmethod
    def _remember_fired(fired, product, i, measured):
        """Note which neurons fired, if the operand is on a grid of levels. On a GPU, only the GPU knows that now."""
        fits = products.get_fits(measured)
        if products.is_readable(fits) and not fits:
            return
        now = product.fired(i) & fits
        n = now.numel()
        fired[n] = fired[n] | now if n in fired else now

    def begin_function(self, function: Any) -> None:
        """Note that the program calls a function of torch."""
        if _is_busy():
            return
        self.ordinal = 0
        if not in_backward() and function in _SUMS_OF_PRODUCTS:
            self.found.unknown[_SUMS_OF_PRODUCTS[function], self.layer] += 1

    def operate(self, function: Any, facts: Facts, args: tuple, kwargs: dict) -> Any:
        out = function(*args, **kwargs)
        if _is_busy() or in_backward() or threading.get_ident() != self._thread:
            return out
        self.see(function, facts, args, kwargs, out)
        return out


def _addresses(tensors: Iterable[Tensor]) -> set[int]:
    return {_storage(part) for t in tensors for part in _parts(t)} - {0}


def _memory_of(module: nn.Module) -> set[int]:
    return _addresses((*module.parameters(), *module.buffers()))


def _reset_compiler() -> None:
    """Clear the caches of a compiler that was imported while a mode was active."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _without_wrappers(name: str) -> str:
    """Remove what torch.compile adds to the names of modules."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


class _Operators(OperatorMode):
    supports_higher_order_operators = True

    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(map(_is_wrapper, types)):
            return NotImplemented  # the subclass does its work on the tensors of which it is made, and those calls come here
        kwargs = kwargs or {}
        facts = facts_of(function)
        # In inference mode, operators that are made of others arrive whole. Nested tensors have kernels for the whole.
        if facts.may_decompose and not any(t.is_nested for t in tensors_in(args)):
            with self:
                out = function.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
            facts.may_decompose = False
        return self.recorder.operate(function, facts, args, kwargs)


class _Functions(TorchFunctionMode):
    """Tells apart the products inside one call of a function, such as einsum, from products of later calls."""

    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.recorder.begin_function(function)
        return function(*args, **(kwargs or {}))
