"""Launch kernels, and repeat a known call of a launcher without its Python code.

Before a launch, a launcher looks at strides, computes sizes and builds 25 to 50 arguments, and Triton inspects each of them.
For small tensors this takes longer than the kernel. All of it follows from the shapes, strides, dtypes and alignments of the
tensors and from the other arguments. So ``repeatable`` keeps, per set of these, the launches of a call: the compiled kernel,
the number of programs and the arguments. The next call with the same set only fills in the addresses.

A launcher may be repeatable if it reads no values of tensors, calls PyTorch only for views and for ``empty``, and returns None
or tensors from ``empty``. If a call did more, for example copied a tensor, a launch has an address of unknown origin, and the
call is not kept.
"""

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.knobs import compilation, runtime
from triton.runtime import JITFunction
from triton.runtime import driver as drivers

from ..neuron import Variant

_MOST_CALLS = 4096  # calls that are kept per launcher
_ONCE, _NEVER = "seen once", "cannot be repeated"
_TENSORS = {Tensor, torch.nn.Parameter}
_VALUES = {type(None), bool, int, float, str, Variant}
# For AMD, Triton also specialises on tensors whose storage is below 2 GiB.
_LARGE_STORAGE = 1 << 31 if torch.version.hip else None


def _find_run():
    """Return Triton's own launch function, or None if it was replaced, as tools do that must see every launch."""
    run = getattr(JITFunction, "run", None)
    code = getattr(run, "__code__", None)
    return run if code is not None and code.co_filename == inspect.getfile(JITFunction) else None


_RUN = _find_run()


def _is_set(hook) -> bool:
    """True if a hook of Triton, None or a chain of functions, calls something."""
    return hook is not None and bool(getattr(hook, "calls", True))


def _environment():
    """Return what a launch depends on besides its arguments. None: Triton must see the call."""
    if (
        JITFunction.run is not _RUN
        or _is_set(runtime.launch_enter_hook)
        or _is_set(runtime.launch_exit_hook)
        or runtime.jit_cache_hook is not None
        or getattr(runtime, "add_stages_inspection_hook", None) is not None
    ):
        return None
    driver = drivers.active
    return driver, driver.get_current_device(), runtime.debug, compilation.instrumentation_mode


def _is_supported() -> bool:
    """True if this version of Triton has all names that repeated calls need."""
    names = "launch_enter_hook", "launch_exit_hook", "jit_cache_hook", "debug"
    known = all(hasattr(runtime, name) for name in names) and hasattr(compilation, "instrumentation_mode")
    return known and _RUN is not None and not runtime.interpret


_SUPPORTED = _is_supported()


class _Local(threading.local):
    recording: "_Recording | None" = None  # of the launcher that runs on this thread


_local = _Local()


# --- launches ---------------------------------------------------------------------------------------------------------------


def launch(kernel, programs, device, *args, **flags):
    """Launch with the tensors' device as the current one, because Triton uses the current device."""
    recording = _local.recording
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        if recording is not None:
            recording.is_complete = False
        with torch.cuda.device(device):
            kernel[(programs,)](*args, **flags)
        return
    compiled = kernel[(programs,)](*args, **flags)
    if recording is not None:
        recording.add(kernel, compiled, programs, args, flags)


def empty(shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate a tensor for use between or after the launches of a launcher."""
    t = torch.empty(shape, dtype=dtype, device=device)
    if _local.recording is not None:
        _local.recording.made.append(t)
    return t


# --- repeated calls ---------------------------------------------------------------------------------------------------------


class _Launch(NamedTuple):
    """A launch whose arguments are a function of (addresses of the launcher's tensors, addresses of those from ``empty``)."""

    kernel: Any
    run: Callable[..., None]
    function: Any
    metadata: Any
    programs: int
    arguments: Callable[[list[int], list[int]], tuple]


class _Call(NamedTuple):
    launches: tuple[_Launch, ...]
    made: tuple[tuple, ...]  # the arguments of ``empty``
    returned: tuple[int, ...] | None  # indices into ``made``
    tuning: Any  # kept alive, because the key holds its address


class _Recording:
    def __init__(self, tensors, addresses):
        self.tensors, self.addresses, self.made = tensors, addresses, []
        self.launches: list[_Launch] = []
        self.is_complete = True

    def add(self, kernel, compiled, programs, args, flags):
        names = kernel.arg_names[len(args) :]
        usable = all(hasattr(compiled, name) for name in ("run", "function", "packed_metadata"))
        if not (self.is_complete and usable and all(name in flags for name in names)):
            self.is_complete = False
            return
        constants: list = []
        source = self._source((*args, *(flags[name] for name in names)), constants)
        if source is None:
            self.is_complete = False
            return
        arguments = eval(f"lambda a, m: {source}", {"c": tuple(constants)})
        self.launches.append(
            _Launch(kernel, compiled.run, compiled.function, compiled.packed_metadata, programs, arguments)
        )

    def _source(self, value, constants):
        """Return an expression for an argument, or None if it holds an unknown address. a: addresses of the launcher's tensors,
        m: of the tensors from ``empty``, c: constants."""
        if type(value) is tuple:
            items = [self._source(item, constants) for item in value]
            return None if None in items else f"({''.join(f'{item}, ' for item in items)})"
        if isinstance(value, Tensor):
            return self._address(value)
        constants.append(value)
        return f"c[{len(constants) - 1}]"

    def _address(self, t):
        address, storage = t.data_ptr(), t.untyped_storage().data_ptr()
        owners = [(f"a[{i}]", p, u) for i, (p, u) in enumerate(zip(self.addresses, self.tensors))]
        owners += [(f"m[{i}]", u.data_ptr(), u) for i, u in enumerate(self.made)]
        same = [name for name, p, _ in owners if p == address]
        if len(same) == 1:
            return same[0]
        inside = [(name, p) for name, p, u in owners if u.untyped_storage().data_ptr() == storage]
        if same or len(inside) != 1 or not address:
            return None
        (name, start), *_ = inside
        return f"{name} + {address - start}"

    def finish(self, found, tuning):
        """Return the recorded call, or None if it cannot be repeated."""
        returned = None
        if found is not None:
            indices = [next((i for i, u in enumerate(self.made) if u is t), None) for t in found]
            if None in indices or not isinstance(found, tuple):
                return None
            returned = tuple(indices)
        if not self.is_complete or any(t.data_ptr() % 16 for t in self.made):
            return None
        return _Call(tuple(self.launches), tuple((tuple(t.shape), t.dtype, t.device) for t in self.made), returned, tuning)


def _describe(args, key, tensors, addresses):
    """Append to key what a launch can depend on; return False for an argument of another kind."""
    for group in args:
        kind = type(group)
        if kind is tuple or kind is list:
            key.append(len(group))
        else:
            group = (group,)
        for a in group:
            kind = type(a)
            if kind in _TENSORS:
                address = a.data_ptr()
                key += a.shape, a.stride(), a.dtype, address & 15
                if _LARGE_STORAGE is not None:
                    key.append(a.untyped_storage().nbytes() >= _LARGE_STORAGE)
                tensors.append(a)
                addresses.append(address)
            elif kind in _VALUES:
                key.append(a)
            else:
                return False
    return True


_all_calls: list[dict] = []


def forget() -> None:
    """Forget all calls, for tools that change Triton's driver or caches."""
    for calls in _all_calls:
        calls.clear()


def repeatable(launcher):
    """Decorate a launcher whose arguments are positional and end with the record of tuning numbers; see the top of this file.

    A call is kept when it is seen for the second time, so shapes that come once cost little.
    """
    if not _SUPPORTED:
        return launcher
    calls: dict[tuple, _Call | str] = {}
    _all_calls.append(calls)

    @functools.wraps(launcher)
    def run(*args):
        environment = _environment()
        if environment is None or _local.recording is not None:
            return launcher(*args)
        *given, tuning = args
        key, tensors, addresses = [*environment, id(tuning)], [], []
        if not _describe(given, key, tensors, addresses):
            return launcher(*args)
        key.append(tensors[0].device)
        key = tuple(key)
        call = calls.get(key)
        if type(call) is _Call:
            for one in call.launches:
                if one.kernel.pre_run_hooks:
                    return launcher(*args)
            return _repeat(call, addresses, environment)
        if call is _NEVER:
            return launcher(*args)
        if len(calls) >= _MOST_CALLS:
            calls.clear()
        if call is None:
            calls[key] = _ONCE
            return launcher(*args)
        recording = _local.recording = _Recording(tensors, addresses)
        try:
            found = launcher(*args)
        finally:
            _local.recording = None
        calls[key] = recording.finish(found, tuning) or _NEVER
        return found

    return run


def _repeat(call, addresses, environment):
    driver, device, *_ = environment
    made = [torch.empty(shape, dtype=dtype, device=on) for shape, dtype, on in call.made]
    scratch = [t.data_ptr() for t in made]
    stream = driver.get_current_stream(device)
    for _, run, function, metadata, programs, arguments in call.launches:
        run(programs, 1, 1, stream, function, metadata, None, None, None, *arguments(addresses, scratch))
    return None if call.returned is None else tuple(made[i] for i in call.returned)
