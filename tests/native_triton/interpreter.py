"""Triton's interpreter, corrected where it computes something else than hardware."""

import functools
import os
import sys

from .counting import count_runs_of
from .support import triton_version


def use_interpreter():
    if "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret:
        raise RuntimeError("native_triton.setup() chose the interpreter, but triton was imported before it.")
    os.environ["TRITON_INTERPRET"] = "1"
    if triton_version() is None:
        return
    if triton_version() < (3, 6):
        raise RuntimeError("The tests need Triton 3.6 or newer: pip install --no-deps triton==3.6.0")
    _mend_interpreter_bf16()
    _mend_interpreter_index()
    _mend_interpreter_floats()
    count_runs_of("triton.runtime.interpreter", "InterpretedFunction")


def _mend_interpreter_bf16():
    """Cast between fp32 and bf16 as hardware does.

    The interpreter truncates where hardware rounds to nearest even. It holds bf16 as uint16 bit patterns, so bf16 *arithmetic*
    stays wrong. Kernels have to compute in fp32, as ours do.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def to_bf16(values):
        bits = np.ascontiguousarray(values).view(np.uint32)
        # Adding just under half a unit, plus the last bit that remains, rounds half-way cases to even. The carry correctly runs
        # into the exponent. A NaN could carry over into infinity, so NaN is a separate case.
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
        return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)

    def to_fp32(bits):
        return (np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)

    def convert_float(values, source, target, rounding_mode):
        toward_zero = rounding_mode is not None and "RTZ" in str(rounding_mode)
        if source == tl.float32 and target == tl.bfloat16 and not toward_zero:
            return to_bf16(values)
        if source == tl.bfloat16 and target == tl.float32:
            return to_fp32(values)
        return original(values, source, target, rounding_mode)

    interpreter._convert_float = convert_float


def _mend_interpreter_index():
    """Let Triton 3.6 work with a recent numpy, which no longer converts an array of shape (1,) to an int."""
    if triton_version() != (3, 6):
        return
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_lang_tensor


def _mend_interpreter_floats():
    """Pass Python floats as compiled kernels get them: as fp32 values or, if annotated "fp64", as doubles.

    The interpreter passes the Python object, which has another precision and no methods such as ``to``.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter.InterpretedFunction.run

    def convert(value, annotation):
        kind = annotation if isinstance(annotation, str) else ""
        if kind not in ("fp32", "fp64") and (not isinstance(value, float) or "constexpr" in str(annotation)):
            return value
        dtype, numpy_type = (tl.float64, np.float64) if kind == "fp64" else (tl.float32, np.float32)
        return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=numpy_type), dtype), dtype)

    @functools.wraps(original)
    def run(self, *args, grid, warmup, **kwargs):
        known = self.fn.__annotations__
        # Not strict: trailing arguments may be missing, because they are passed by name or have a default.
        args = [convert(value, known.get(name)) for name, value in zip(self.arg_names, args, strict=False)]
        kwargs = {name: convert(value, known.get(name)) for name, value in kwargs.items()}
        return original(self, *args, grid=grid, warmup=warmup, **kwargs)

    interpreter.InterpretedFunction.run = run
