"""Launch kernels, and note launches for repeat.py, which repeats them through the compiled kernel."""

import inspect

import torch
from triton.knobs import compilation, runtime
from triton.runtime import JITFunction
from triton.runtime import driver as drivers

from .. import repeat


def _find_run():
    """Return Triton's own launch function, or None if it was replaced, as tools do that must see every launch."""
    code = getattr(getattr(JITFunction, "run", None), "__code__", None)
    return JITFunction.run if code is not None and code.co_filename == inspect.getfile(JITFunction) else None


_TRITON_RUN = _find_run()


def _is_set(hook) -> bool:
    """True if a hook of Triton, None or a chain of functions, calls something."""
    return hook is not None and bool(getattr(hook, "calls", True))


def _environment():
    """Return what a launch depends on besides its arguments. None: Triton must see the call."""
    if (
        JITFunction.run is not _TRITON_RUN
        or _is_set(runtime.launch_enter_hook)
        or _is_set(runtime.launch_exit_hook)
        or runtime.jit_cache_hook is not None
        or getattr(runtime, "add_stages_inspection_hook", None) is not None
    ):
        return None
    driver = drivers.active
    return driver, driver.get_current_device(), runtime.debug, compilation.instrumentation_mode


def can_repeat() -> bool:
    """True if this version of Triton has all names that repeated launches need, and compiles its kernels."""
    names = "launch_enter_hook", "launch_exit_hook", "jit_cache_hook", "debug"
    known = all(hasattr(runtime, name) for name in names) and hasattr(compilation, "instrumentation_mode")
    return known and _TRITON_RUN is not None and not runtime.interpret


if can_repeat():
    repeat.environments["triton"] = _environment


def launch(kernel, programs, device, *args, **flags):
    """Launch with the tensors' device as the current one, because Triton uses the current device."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        repeat.refuse()
        with torch.cuda.device(device):
            kernel[(programs,)](*args, **flags)
    else:
        _note(kernel, kernel[(programs,)](*args, **flags), programs, args, flags)


def _note(kernel, compiled, programs, args, flags):
    """Note the launch for repeat.py, through the function that the compiled kernel offers."""
    names = getattr(kernel, "arg_names", ())[len(args) :]
    known = all(hasattr(compiled, name) for name in ("run", "function", "packed_metadata")) and hasattr(kernel, "pre_run_hooks")
    if not known or not all(name in flags for name in names):
        repeat.refuse()
        return
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata

    def start(*args):
        driver = drivers.active
        stream = driver.get_current_stream(driver.get_current_device())
        run(programs, 1, 1, stream, function, metadata, None, None, None, *args)

    repeat.note_launch(start, (*args, *(flags[name] for name in names)), kernel.pre_run_hooks)
