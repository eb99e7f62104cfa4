"""PyTorch's private names: only one file uses them, and the ops give the same results when PyTorch lacks one."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
NAMES = [
    "_are_functorch_transforms_active", "_len_torch_dispatch_stack", "_len_torch_function_stack", "_profiler_enabled",
    "_is_zerotensor", "_is_tracing", "_AutoDispatchBelowAutograd", "_current_level", "_dynamo_marked_constant",
    "_get_tracing_state", "_functorch", "_wrap_for_grad", "is_dead_tensor_wrapper", "_get_current_function_mode_stack",
    "_get_current_dispatch_mode_stack", "_forward_hooks", "_C", "_schema",
    "_current_graph_task_id", "_make_wrapper_subclass", "_pytree", "_DisableTorchDispatch", "_foreach_sub", "_dynamo", "_op",
    "_autograd", "_top_saved_tensors_default_hooks", "_storage_Use_Count", "_push_saved_tensors_default_hooks",
    "_pop_saved_tensors_default_hooks", "_is_any_autocast_enabled",
]  # fmt: skip


def private(name):
    return name.startswith("_") and not name.startswith("__")


def private_names_of_torch(source):
    imported, nodes, found = set(), list(ast.walk(ast.parse(source))), []
    for node in nodes:
        if isinstance(node, ast.Import):
            imported |= {alias.asname or "torch" for alias in node.names if alias.name.split(".")[0] == "torch"}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] == "torch":
            imported |= {alias.asname or alias.name for alias in node.names}
            found += [part for part in (*node.module.split("."), *(alias.name for alias in node.names)) if private(part)]
    for node in nodes:
        if isinstance(node, ast.Attribute) and private(node.attr):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in imported:
                found.append(node.attr)
    return found


def test_only_one_file_uses_private_names_of_torch():
    assert private_names_of_torch("import torch\nfrom torch._x import a\na._b\ntorch._C._d()") == ["_x", "_b", "_d", "_C"]
    for path in (path for room in ("sdit_kernels", "sdit") for path in (ROOT / room).rglob("*.py")):
        assert path.name == "_torch.py" or private_names_of_torch(path.read_text()) == [], path


def test_every_private_name_of_that_file_is_tested():
    """Each private name in _torch.py is in NAMES, or belongs to a name that is."""
    source = (ROOT / "sdit_kernels/_torch.py").read_text()
    constants = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
    found = {value for value in constants if isinstance(value, str) and value.isidentifier() and private(value)}
    others = {"_python_dispatch", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"}
    others |= {"_foreach_mul_", "_foreach_add_"}
    assert found - others <= set(NAMES)


PROGRAM = """
import builtins, importlib.util, os, pathlib, sys, traceback
import numba, torch  # shared by all runs; sdit_kernels must be new in each
root, folder, *names = sys.argv[1:]
sys.path.insert(0, root)
for hidden in names:
    child = os.fork()
    if not child: break
    os.waitpid(child, 0)
else: sys.exit()
out = pathlib.Path(folder) / hidden
def failed(*error):
    out.write_text("".join(traceback.format_exception(*error)))
    os._exit(1)
sys.excepthook = failed

spec = importlib.util.spec_from_file_location("sdit_kernels._torch", root + "/sdit_kernels/_torch.py")
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
asked = []
def looked_for(name):
    asked.append(name == hidden)
    return name == hidden
module.getattr = lambda o, name, *rest: rest[0] if looked_for(name) else builtins.getattr(o, name, *rest)
module.hasattr = lambda o, name: not looked_for(name) and builtins.hasattr(o, name)
spec.loader.exec_module(module)
if hidden == "_dynamo_marked_constant":
    asked = [module._MARKS_CONSTANTS]
    module.Path = lambda path: pathlib.Path("nowhere")
    module._MARKS_CONSTANTS = module._marks_constants()
    assert not module._MARKS_CONSTANTS
assert hidden == "nothing" or any(asked), "nobody looks for it"

import sdit_kernels
from sdit_kernels import leaky, lif, lif_rate, nn, relu_squared, spiking_wkv, token_shift, wkv, wkv_step_
from torch.func import grad, jvp, vmap
found = []
def keep(*tensors): found.extend(t.detach().clone() for t in tensors)
def refused(message, function, *args):
    try: function(*args)
    except RuntimeError as error: assert message in str(error), error
    else: raise AssertionError(message)

torch.manual_seed(0)
one, data = torch.ones(5), torch.randn(3, 4, 5)
OPS = dict(leaky=lambda x: leaky(x, beta=0.5), lif=lif, lif_rate=lif_rate, relu_squared=relu_squared,
           token_shift=lambda x: token_shift(x, 0.3 * one)[0], wkv=lambda x: wkv(one, one, x, x),
           spiking_wkv=lambda x: spiking_wkv(one, one, x[None], x[None]))
for op in OPS.values():
    x = data.clone().requires_grad_()
    y = op(x)
    y.backward(torch.randn(y.shape))
    keep(y, x.grad, op(data), op(torch._neg_view(data.neg())))
    refused("no second derivative", lambda: torch.autograd.grad(op(x).sum(), x, create_graph=True)[0].sum().backward())
    refused("no forward-mode", jvp, op, (data,), (data,))
    with torch.autograd.forward_ad.dual_level():
        refused("no forward-mode", op, torch.autograd.forward_ad.make_dual(data, data))
    keep(vmap(op)(data[None].repeat(2, 1, 1, 1)), vmap(grad(lambda x: op(x).sum()))(data[None].repeat(2, 1, 1, 1)))
with torch.profiler.profile() as profile:
    keep(lif(data))
assert any(event.name.startswith("sdit_kernels::lif") for event in profile.events())
with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
    assert lif(mode.from_tensor(data.clone().requires_grad_())).requires_grad
state = torch.zeros(4, 5), torch.full((4, 5), -torch.inf)
keep(wkv_step_(one, one, data[0], data[1], state), *state)
refused("has no gradient", wkv_step_, one, one, data[0].clone().requires_grad_(), data[1], state)
with sdit_kernels.backend("reference"):
    keep(lif(data, tau=torch.tensor(2.0)))

averages = [data.clone(), one.clone()]
module.move_towards(averages, [2 * data, 3 * one], torch.tensor(0.3))
keep(*averages)

neuron = nn.LIF()
traced = torch.jit.trace(torch.nn.Sequential(neuron, torch.nn.Linear(5, 5), neuron), data)  # records twice to check its graph
keep(traced(data), traced(2 * data))
neuron.reset()
keep(vmap(neuron)(data[:, None].expand(3, 2, 4, 5)))
try: neuron(data)
except (RuntimeError, AssertionError): pass  # torch.func raises AssertionError
else: raise AssertionError("a membrane without values")
if hidden in ("nothing", "_dynamo_marked_constant", "_get_tracing_state", "_forward_hooks"):
    from sdit_kernels.compat import swap
    keep(torch.compile(lif, fullgraph=True, backend="eager")(data))
    assert swap.counted() is None
torch.save(found, out.with_suffix(".pt"))
os._exit(0)
"""


@pytest.mark.process
def test_ops_do_not_need_any_private_name(tmp_path):
    names = ["nothing", *NAMES]
    command = [sys.executable, "-c", PROGRAM, str(ROOT), str(tmp_path), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    errors = {name: (tmp_path / name).read_text() for name in names if (tmp_path / name).exists()}
    assert not errors, "\n".join(map(str, errors.items()))
    wanted, *results = (torch.load(tmp_path / f"{name}.pt") for name in names)
    for name, found in zip(NAMES, results):
        assert len(found) >= len(wanted) - 1, name  # torch.compile runs for some names only
        for a, b in zip(found, wanted):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")
