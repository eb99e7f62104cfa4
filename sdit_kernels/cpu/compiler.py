"""Options of numba for functions that only compiled code calls, and a short compiler pipeline for them.

numba optimises every jitted function and turns it into machine code. For a function that is inlined into a kernel this work is
wasted: only the kernel's entry, which holds the code of all others, runs. So here such a function stays as LLVM wrote it until
the entry is optimised, and passes over numba's own IR that do nothing for these functions are left out.
"""

import numba
from numba.core import compiler, typed_passes, untyped_passes
from numba.core.compiler_machinery import register_pass

try:
    from numba.core.codegen import JITCodeLibrary
except ImportError:
    JITCodeLibrary = None

_PRIVATE = ("_optimize_final_module", "_finalize_dynamic_globals", "_verify_declare_only_symbols", "_finalize_final_module")


def _make_pipeline():
    class Library(JITCodeLibrary):
        """The LLVM code of a function, neither optimised nor compiled before it is part of an entry."""

        def _optimize_final_module(self):
            pass

        def _finalize_final_module(self):
            self._finalize_dynamic_globals()
            self._verify_declare_only_symbols()
            self._finalized = True

    @register_pass(mutates_CFG=True, analysis_only=False)
    class Lowering(typed_passes.NativeLowering):
        _name = "sdit_kernels_lowering"

        def run_pass(self, state):
            state.library = Library(state.targetctx.codegen(), state.func_id.func_qualname)
            state.flags.no_compile = True
            super().run_pass(state)
            # numba finds the code of a callee by its entry, which must be a distinct builtin. No one calls this one.
            entry = [].append
            state.targetctx.insert_user_function(entry, state["cr"].fndesc, [state.library])
            state["cr"] = state["cr"]._replace(cfunc=entry)
            return True

    class Pipeline(compiler.CompilerBase):
        def define_pipelines(self):
            default = compiler.DefaultPassBuilder.define_nopython_pipeline(self.state)
            unused = (untyped_passes.InlineClosureLikes, typed_passes.NopythonRewrites)  # of closures; of arrays
            ours = compiler.PassManager(default.pipeline_name)
            for found, description in default.passes:
                if found not in unused:
                    ours.add_pass(Lowering if found is typed_passes.NativeLowering else found, description)
            ours.finalize()
            return [ours]

    return Pipeline


NO_ENTRY = dict(no_cpython_wrapper=True, no_cfunc_wrapper=True)
if all(hasattr(JITCodeLibrary, name) for name in _PRIVATE):  # without these names, numba's own pipeline does the same, slower
    NO_ENTRY["pipeline_class"] = _make_pipeline()
INLINE = dict(forceinline=True, error_model="numpy", **NO_ENTRY)
inline = numba.njit(**INLINE)
