"""Record the products of a running model: a dispatch mode sees every operator, hooks tell the layer.

Where a tensor comes from decides whether it can be weights or spikes. An operator's result has the highest origin of its
arguments::

    FACTORY      zeros, ones, arange, ...
    WEIGHT       a parameter or buffer, or a view or copy of some
    DERIVED      computed from weights alone
    INDEX        integers or booleans given to the model, or a view or copy of some
    LOOKUP       computed from INDEX and FACTORY alone, such as one-hot tokens
    GIVEN        floats given to the model, or a view or copy of some; INDEX cast to floats
    ACTIVATION   computed from GIVEN, or from INDEX or LOOKUP and weights (an embedding)
"""

import enum
import inspect
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from .._torch import TorchDispatchMode, in_backward, written_arguments
from . import products
from .products import Product


class Origin(enum.IntEnum):
    FACTORY = 0
    WEIGHT = 1
    DERIVED = 2
    INDEX = 3
    LOOKUP = 4
    GIVEN = 5
    ACTIVATION = 6


_COMPUTED = {Origin.WEIGHT: Origin.DERIVED, Origin.INDEX: Origin.LOOKUP, Origin.GIVEN: Origin.ACTIVATION}


@dataclass
class Operand:
    """What was measured of one operand of a product, over all calls."""

    origin: Origin | None = None  # None: the values are not known
    values: int = 0  # number of values, over all calls
    measured: list[Tensor] = field(default_factory=list)  # products.FIELDS per call, on the device
    fired: dict[int, Tensor] = field(default_factory=dict)  # by number of neurons: which have fired


@dataclass
class Record:
    """A product at one place of the program, over all calls."""

    layer: str
    op: str
    shape: str  # of the first call
    operands: tuple[Operand, Operand]
    calls: int = 0
    macs: int = 0
    result_values: int = 0


# --- operators without products -----------------------------------------------------------------------------------------------

# They keep the values of their arguments.
_COPIES = {
    f"aten::{name}"
    for name in ("_to_copy", "clone", "cat", "stack", "repeat", "index_select", "index", "flip", "roll", "constant_pad_nd",
                 "repeat_interleave", "permute_copy", "copy_", "_unsafe_view", "_reshape_copy", "contiguous", "lift_fresh")
}  # fmt: skip

# They take several float tensors and contain no product, except for work on single elements.
_ELEMENTWISE = {
    f"aten::{name}"
    for name in (
        "_batch_norm_with_update", "_native_batch_norm_legit", "_native_batch_norm_legit_functional",
        "_native_batch_norm_legit_no_training", "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm",
        "batch_norm_elemt", "native_layer_norm", "native_group_norm", "_fused_rms_norm", "_prelu_kernel", "rrelu_with_noise",
        "rrelu_with_noise_", "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "cat", "stack", "copy", "copy_", "fill",
        "fill_", "set_", "index_copy", "index_copy_", "index_fill", "index_fill_", "index_put", "index_put_",
        "_index_put_impl_", "_unsafe_index_put", "masked_fill", "masked_fill_", "masked_scatter", "masked_scatter_", "put",
        "put_", "scatter", "scatter_", "scatter_reduce", "scatter_reduce_", "select_scatter", "slice_scatter",
        "diagonal_scatter", "as_strided_scatter", "where", "lerp", "lerp_", "addcmul", "addcmul_", "addcdiv", "addcdiv_",
        "binary_cross_entropy", "huber_loss", "mse_loss", "smooth_l1_loss", "nll_loss_forward", "nll_loss2d_forward", "dist",
        "grid_sampler_2d", "grid_sampler_3d", "_foreach_add_", "_foreach_mul_", "_foreach_copy_",
    )
}  # fmt: skip

# They contract even a single float tensor.
_CONTRACTING = (
    "linalg_", "_linalg", "fft_", "_fft", "cdist", "_cdist", "_pdist", "embedding_bag", "_embedding_bag", "_scaled_mm",
    "_grouped_mm", "_scaled_grouped_mm", "_int_mm", "mkldnn_", "_cudnn_rnn", "miopen_rnn", "cholesky", "matrix_exp", "inverse",
    "lu_", "triangular_solve", "ormqr", "geqrf", "_native_multi_head_attention", "_transformer_encoder_layer_fwd", "stft",
    "istft", "index_add", "scatter_add", "segment_reduce", "_weight_int", "lstm", "gru", "rnn_",
)  # fmt: skip


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors of nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def may_contract(function: Any, name: str, tensors: list[Tensor], out: object) -> bool:
    """True if an operator that ``products`` does not know may contain products of floats."""
    namespace, _, short = name.partition("::")
    floats = [t for t in tensors if t.is_floating_point() or t.is_complex()]
    if not floats or not any(t.is_floating_point() or t.is_complex() for t in tensors_in(out)):
        return False
    if products.is_known(name):  # its arguments were sparse, or not floats
        return True
    if namespace not in ("aten", "prims", "prim"):
        return True
    if short.startswith(_CONTRACTING):
        return short not in ("linalg_vector_norm", "linalg_cross")
    return len(floats) > 1 and torch.Tag.pointwise not in function.tags and not function.is_view and name not in _ELEMENTWISE


# multiply-adds and additions per element and step of our own operators, without exponentials and divisions
FUSED_COSTS = {
    "lif": (2, 2),  # v + (x - v) / tau, compare, reset
    "lif_rate": (2, 3),  # as lif, and count the spike
    "leaky": (2, 1),  # beta * v + x, compare, reset
    "wkv": (6, 3),  # numerator and denominator: decay, add the token, add the bonus; three exponents
    "wkv_step_": (6, 3),
    "spiking_wkv": (8, 5),  # wkv and lif
    "token_shift": (3, 1),  # a mix per output
    "relu_squared": (1, 0),
}
_TIME_STEPS_ARGUMENT = 5  # position of T in the schema of lif_rate


def fused_elements(short: str, args: tuple) -> int:
    """Return the number of elements and steps that one of our operators works on."""
    steps = args[_TIME_STEPS_ARGUMENT] if short == "lif_rate" else 1
    return args[0].numel() * steps


# --- the recorder -------------------------------------------------------------------------------------------------------------

_OPERATOR = type(torch.ops.aten.add.Tensor)
_TORCH = Path(torch.__file__).parent
# files whose functions stand between the caller of an operator and the recorder
_BETWEEN = tuple(
    str(path)
    for path in (
        Path(__file__).parent, _TORCH / "_ops.py", _TORCH / "overrides.py", _TORCH / "_compile.py", _TORCH / "_dynamo",
        _TORCH / "utils" / "_python_dispatch.py", _TORCH / "utils" / "_stats.py",
    )
)  # fmt: skip


def call_site() -> tuple[object, int]:
    """Return the place in the program that called the operator: its code and the position in it."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame = frame.f_back
    return (None, 0) if frame is None else (frame.f_code, frame.f_lasti)


def _storage(t: Tensor) -> int:
    """Return an identity of the memory of a tensor, 0 if it has none."""
    if t.layout != torch.strided:
        return 0
    try:
        return t.untyped_storage().data_ptr()
    except RuntimeError:  # a wrapper of a transform
        return 0


class Recorder:
    """Records of all products inside the model's modules while ``running()`` is active. It changes nothing in the model."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.records: dict[tuple, Record] = {}
        self.unknown: Counter[tuple[str, str]] = Counter()  # (operator, layer): calls
        self.fused: Counter[tuple[str, str]] = Counter()  # (operator, layer): elements
        self.batches = 0
        self.inputs: list[list[Tensor]] = []  # fingerprints of the inputs of each batch
        self.ordinal = 0  # of a product within one call of a function of torch
        self.busy = False
        self._names: dict[nn.Module, str] = {}
        self._foreign: dict[nn.Module, str] = {}
        self._layers: list[str] = []
        self._depth = 0  # of modules of this model
        self._origins: dict[int, tuple[Origin, StorageWeakRef]] = {}  # by address
        self._weights: set[int] = set()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Record inside the with block. Hooks and modes go when it ends, also after an error."""
        self._names = {m: _without_wrappers(name) for name, m in self.model.named_modules()}
        self._layers, self._depth = [], 0
        with ExitStack() as stack:
            # Inside compiled code nothing can be counted, so a compiled model runs its own Python code.
            if _uses_compiler(self.model):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
                stack.enter_context(warnings.catch_warnings())  # the hooks run once more for the compiled wrapper: no harm
                warnings.filterwarnings("ignore", message=".*global hooks on modules")
            stack.callback(register_module_forward_pre_hook(self._enter).remove)
            stack.callback(register_module_forward_hook(self._leave, always_call=True).remove)
            stack.enter_context(_Functions(self))
            stack.enter_context(_Operators(self))
            yield

    def _enter(self, module, args):
        if in_backward():
            return
        if module in self._names:
            if self._depth == 0:
                self._begin(args)
            self._depth += 1
        self._layers.append(self._name(module))

    def _name(self, module):
        """Return the name of a module. A module that the model does not own is named after its class."""
        if module in self._names:
            return self._names[module]
        if module not in self._foreign:
            self._foreign[module] = f"({type(module).__name__} {len(self._foreign)})"
        self._weights |= {_storage(t) for t in (*module.parameters(), *module.buffers())} - {0}
        return ".".join(filter(None, (self.layer, self._foreign[module])))

    def _leave(self, module, args, out):
        if in_backward() or not self._layers:
            return
        self._layers.pop()
        if module in self._names:
            self._depth -= 1
            if self._depth == 0:
                self._origins = {m: entry for m, entry in self._origins.items() if not entry[1].expired()}

    def _begin(self, args):
        state = [*self.model.parameters(), *self.model.buffers()]
        self._weights = {_storage(t) for t in state} - {0}
        tensors = [t for t in tensors_in(args) if t.layout == torch.strided]
        given = [t for t in tensors if t.numel() and not t.is_meta and not t.is_complex()]
        self.batches += 1
        with self._own_work():
            self.inputs.append([products.fingerprint(t.double()) for t in given])

    @property
    def layer(self) -> str:
        return self._layers[-1] if self._layers else ""

    @contextmanager
    def _own_work(self):
        """Our own operators are not recorded and touch no graph."""
        self.busy = True
        try:
            with torch.no_grad():
                yield
        finally:
            self.busy = False

    def origin(self, t: Tensor) -> Origin:
        memory = _storage(t)
        if memory in self._origins:
            origin, owner = self._origins[memory]
            if not owner.expired():  # else another tensor may have got its address
                return origin
        if memory in self._weights:
            return Origin.WEIGHT
        return Origin.GIVEN if t.is_floating_point() or t.is_complex() else Origin.INDEX

    def _trace(self, function, name, args, kwargs, tensors, out):
        """Note where the results of an operator come from."""
        origins = [self.origin(t) for t in tensors]
        origin = max(origins, default=Origin.FACTORY)
        if not tensors and torch.Tag.nondeterministic_seeded in function.tags:
            origin = Origin.ACTIVATION  # random numbers
        if origin in (Origin.INDEX, Origin.LOOKUP) and any(o in (Origin.WEIGHT, Origin.DERIVED) for o in origins):
            origin = Origin.ACTIVATION
        if name == "aten::lift_fresh":
            origin = Origin.FACTORY
        elif name == "aten::_to_copy" and origin == Origin.INDEX and out.is_floating_point():
            origin = Origin.GIVEN
        elif not function.is_view and name not in _COPIES:
            origin = _COMPUTED.get(origin, origin)
        for t in written_arguments(function, args, kwargs):
            if isinstance(t, Tensor):
                self._set_origin(t, max(origin, self.origin(t)))
        if function.is_view:
            return  # it shares the memory of its argument
        known = {_storage(t) for t in tensors}
        for t in tensors_in(out):
            if _storage(t) not in known:
                self._set_origin(t, origin)

    def _set_origin(self, t, origin):
        memory = _storage(t)
        if memory:
            self._origins[memory] = origin, StorageWeakRef(t.untyped_storage())

    def see(self, function: Any, name: str, args: tuple, kwargs: dict, out: object) -> None:
        tensors = list(tensors_in((args, kwargs)))
        namespace, _, short = name.partition("::")
        if namespace == "sdit_kernels":
            if short in FUSED_COSTS:
                self.fused[short, self.layer] += fused_elements(short, args)
        else:
            found = products.find(name, args, out)
            for product in found or ():
                self._record(product)
            if found is None and may_contract(function, name, tensors, out):
                self.unknown[name, self.layer] += 1
        self._trace(function, name, args, kwargs, tensors, out)

    def _record(self, product: Product):
        self.ordinal += 1
        key = (self.layer, product.op, *call_site(), self.ordinal)
        if key not in self.records:
            self.records[key] = Record(self.layer, product.op, product.shape, (Operand(), Operand()))
        record = self.records[key]
        record.calls += 1
        record.macs += product.macs
        record.result_values += product.sizes[2]
        origins = [None if t is None or t.is_meta else self.origin(t) for t in product.operands]
        attention = all(o is None or o >= Origin.INDEX for o in origins)
        for i, (operand, origin) in enumerate(zip(record.operands, origins)):
            operand.values += product.sizes[i]
            if origin is None:
                continue
            operand.origin = origin if operand.origin is None else max(origin, operand.origin)
            if origin >= Origin.INDEX:
                numbers = products.measure(product, i, attention)
                operand.measured.append(numbers)
                if not products.are_floats(numbers):
                    self._remember_fired(operand, product.fired(i))

    @staticmethod
    def _remember_fired(operand, fired):
        n = fired.numel()
        operand.fired[n] = operand.fired[n] | fired if n in operand.fired else fired

    def operate(self, function: Any, args: tuple, kwargs: dict) -> Any:
        name = function.name().partition(".")[0] if hasattr(function, "name") else str(function)
        out = function(*args, **kwargs)
        if in_backward() or self.busy or not self._depth:
            return out
        if not isinstance(function, _OPERATOR):  # an operator that takes functions, such as flex_attention
            if callable(getattr(function, "name", None)):
                self.unknown[name, self.layer] += 1
            return out
        with self._own_work():
            self.see(function, name, args, kwargs, out)
        return out


def _without_wrappers(name: str) -> str:
    """Remove what torch.compile adds to the names of modules."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _uses_compiler(model: nn.Module) -> bool:
    return any(
        type(m).__name__ == "OptimizedModule" or getattr(m, "_compiled_call_impl", None) is not None for m in model.modules()
    )


class _Operators(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if isinstance(function, _OPERATOR) and not products.is_known(function.name().partition(".")[0]):
            with self:  # in inference mode, operators that are made of others arrive whole
                out = function.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        return self.recorder.operate(function, args, kwargs)


class _Functions(TorchFunctionMode):
    """Tells apart the products inside one call of a function, such as einsum, from products of later calls."""

    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if not self.recorder.busy:
            self.recorder.ordinal = 0
        return function(*args, **(kwargs or {}))
