"""Retarget LLVM IR from AMD GPUs to x86-64, text to text. Nothing here needs Triton."""

import itertools
import re

_X86_HEADER = """\
target datalayout = "e-m:e-p270:32:32-p271:32:32-p272:64:64-i64:64-i128:128-f80:128-n8:16:32:64-S128"
target triple = "x86_64-unknown-linux-gnu"
"""

# The program and lane indices are thread-local variables that the grid loop sets. Functions that Triton did not inline
# can read them too, which they could not if the indices were arguments of the kernel.
_INDEX_OF = {
    "llvm.amdgcn.workgroup.id.x": "native.pid_x",
    "llvm.amdgcn.workgroup.id.y": "native.pid_y",
    "llvm.amdgcn.workgroup.id.z": "native.pid_z",
    "llvm.amdgcn.workitem.id.x": "native.lane",
}

# Bodies of AMD intrinsics, by name without the type suffix. {t} is the result type, {s} the suffix of generic intrinsics
# for that type. Arguments are %0, %1, ...
_INTRINSIC_BODIES = {
    "exp2": "%r = call {t} @llvm.exp2.{s}({t} %0)\n ret {t} %r",
    "log": "%r = call {t} @llvm.log2.{s}({t} %0)\n ret {t} %r",  # the AMD instruction is a base 2 logarithm
    "sqrt": "%r = call {t} @llvm.sqrt.{s}({t} %0)\n ret {t} %r",
    "rcp": "%r = fdiv {t} 1.0, %0\n ret {t} %r",
    "rsq": "%s = call {t} @llvm.sqrt.{s}({t} %0)\n %r = fdiv {t} 1.0, %s\n ret {t} %r",
    "ldexp": "%r = call {t} @llvm.ldexp.{s}.i32({t} %0, i32 %1)\n ret {t} %r",
    "fdot2": """%x = fpext <2 x half> %0 to <2 x float>
 %y = fpext <2 x half> %1 to <2 x float>
 %products = fmul <2 x float> %x, %y
 %first = extractelement <2 x float> %products, i32 0
 %second = extractelement <2 x float> %products, i32 1
 %s = fadd float %2, %first
 %r = fadd float %s, %second
 ret float %r""",
    "readfirstlane": "ret {t} %0",
    "mbcnt.lo": "ret i32 %1",
    "mbcnt.hi": "ret i32 %1",
    "s.barrier": "ret void",
    "wave.barrier": "ret void",
    "s.waitcnt": "ret void",
    "sched.barrier": "ret void",
    "workitem.id.y": "ret i32 0",
    "workitem.id.z": "ret i32 0",
}

# Intrinsics that a lane computes from its own values alone. Any intrinsic that is not listed counts as an exchange
# between lanes.
_LANE_LOCAL = set(_INDEX_OF) | {
    "llvm.amdgcn." + name for name in ("exp2", "log", "sqrt", "rcp", "rsq", "ldexp", "workitem.id.y", "workitem.id.z")
}

_NUM_PROGRAMS = """\
define internal i64 @__ockl_get_num_groups(i32 %axis) alwaysinline {
  %address = getelementptr i32, ptr @native.grid, i32 %axis
  %size = load i32, ptr %address
  %r = zext i32 %size to i64
  ret i64 %r
}
"""

# LLVM lowers fptrunc float to bfloat to a call of this function, which libgcc contains only since version 13.
_BF16_HELPER = """
define weak_odr hidden bfloat @__truncsfbf2(float %x) {
  %bits = bitcast float %x to i32
  %high = lshr i32 %bits, 16
  %odd = and i32 %high, 1
  %bias = add i32 %odd, 32767
  %sum = add i32 %bits, %bias
  %rounded = lshr i32 %sum, 16
  %quiet = or i32 %high, 64
  %nan = fcmp uno float %x, 0.0
  %word = select i1 %nan, i32 %quiet, i32 %rounded
  %short = trunc i32 %word to i16
  %r = bitcast i16 %short to bfloat
  ret bfloat %r
}
"""


def lanes_are_independent(ir):
    """True if no lane of this AMD IR can see values of another lane."""
    if "addrspace(3)" in re.sub(r"^@global_smem = .*$", "", ir, flags=re.M):  # shared memory in use
        return False
    used = {re.sub(r"(\.[if]\d+)+$", "", name) for name in re.findall(r"@(llvm\.amdgcn\.[\w.]+)\(", ir)}
    return used <= _LANE_LOCAL


def retarget(ir, shared_bytes, fast):
    """Convert AMD IR to x86 IR.

    Return it with the exported function ``native_launch``, the kernel's name and parameter types.
    """
    ir = _drop_gpu_markers(ir)
    kernel, types = _kernel_signature(ir)
    for address, place in _PLACES.items():
        ir = ir.replace(f"inttoptr (i64 {address} to ptr)", place)
    ir = re.sub(r"^define .*?^}$", lambda match: _shorten_blocks(match[0], fast), ir, flags=re.M | re.S)
    ir, definitions = _replace_intrinsics(ir)
    ir, library_calls = _replace_device_library(ir)
    ir = ir.replace("define void @", "define internal void @")
    ir = re.sub(
        r"@global_smem = .*",
        f"@global_smem = internal thread_local global [{max(shared_bytes or 0, 16)} x i8] zeroinitializer, align 16",
        ir,
    )
    parts = [_X86_HEADER, ir, *definitions, *library_calls, _BF16_HELPER, _grid_loop(kernel, types)]
    return _without_repeated_declarations("\n".join(parts)), kernel, types


def _drop_gpu_markers(ir):
    ir = re.sub(r"^(target |source_filename|attributes |!|; ).*$", "", ir, flags=re.M)
    ir = re.sub(r",? ![\w.]+ !\d+", "", ir)  # metadata: debug locations, AMD hints, accuracy permissions
    ir = re.sub(r" #\d+\b", "", ir)  # attribute groups: name of the GPU, work-group sizes
    ir = re.sub(r' syncscope\("[^"]*"\)', "", ir)
    ir = ir.replace(" inreg", "")
    # There is one flat address space, so a cast between address spaces becomes a cast of a pointer to its own type.
    ir = re.sub(r", addrspace\(\d+\)", "", ir)
    ir = re.sub(r" addrspace\(\d+\)", "", ir)
    return ir.replace("addrspacecast", "bitcast")


def _kernel_signature(ir):
    """Return the name and the LLVM parameter types of the kernel."""
    match = re.search(r"^define void @([\w.]+)\((.*)\)[^()]*\{$", ir, re.M)
    parameters = re.sub(r"\([^()]*\)", "", match[2])  # attributes such as dereferenceable(8)
    return match[1], [parameter.split()[0] for parameter in parameters.split(",") if parameter.strip()]


# --- Making long functions cheap to compile ---
#
# A tile with one lane is a function of thousands of lines. Several of the compiler's algorithms take time quadratic in
# the number of branches or in the length of a basic block: a masked sum of 1024 elements took 15 s. It takes a fraction
# of a second without branches around accesses, in shorter blocks and with the fast instruction selector.

# These stand in Triton IR for two addresses that have no name there: one takes masked-off stores, and masked-off loads
# read the other. The latter holds NaN, because a load without ``other`` may return anything.
_SPARE_ADDRESS, _UNDEFINED_ADDRESS = 0x5EA7ED000000, 0x5EA7ED000040
_PLACES = {_SPARE_ADDRESS: "@native.spare", _UNDEFINED_ADDRESS: "@native.undefined"}
_LINES_PER_BLOCK = 256

_NAME = r"%[\w$.#-]+"  # Triton 3.8 names values after variables: %found.1_64
_TTIR_ACCESS = re.compile(rf"( *(?:{_NAME} = )?)tt\.(load|store) ({_NAME}(?:, {_NAME})*)(.*?) : (\S+)( loc\(.*\))?")
_SELECT = re.compile(r"  (%[\w.]+) = select i1 (%[\w.]+), (half|bfloat|float|double) (\S+), \3 (\S+)$")
_BITS = {"half": "i16", "bfloat": "i16", "float": "i32", "double": "i64"}


def without_masks(ttir):
    """Replace masked loads and stores in Triton IR by unmasked ones.

    The lowering would branch around each masked element. Here, a masked-off access uses a spare address instead. This needs no
    branch and still never touches the address that the mask protects.
    """
    lines, count = [], 0
    for line in ttir.splitlines():
        access = _TTIR_ACCESS.fullmatch(line)
        operands = access[3].split(", ") if access else []
        if access and len(operands) > (1 if access[2] == "load" else 2):
            line = _unmasked(access, operands, f"%native{count}")
            count += 1
        lines.append(line)
    return "\n".join(lines)


def _unmasked(access, operands, name):
    """Return the lines for one masked access. All values they define have names that begin with ``name``."""
    start, kind, _, attributes, pointers, location = access.groups()
    pointer = re.search(r"!tt\.ptr<.*?>", pointers)[0]
    values = pointers.replace(pointer, pointer[len("!tt.ptr<") : -1])
    is_tensor = pointers.startswith("tensor<")
    masks = pointers.replace(pointer, "i1") + ", " if is_tensor else ""
    mask = operands[1 if kind == "load" else 2]
    lines = [
        f"{name}_a = arith.constant {_SPARE_ADDRESS if kind == 'store' else _UNDEFINED_ADDRESS} : i64",
        f"{name}_b = tt.int_to_ptr {name}_a : i64 -> {pointer}",
        f"{name}_c = tt.splat {name}_b : {pointer} -> {pointers}" if is_tensor else "",
        f"{name}_d = arith.select {mask}, {operands[0]}, {name}_{'c' if is_tensor else 'b'} : {masks}{pointers}",
    ]
    if kind == "store":
        lines.append(f"tt.store {name}_d, {operands[1]}{attributes} : {pointers}{location or ''}")
    elif len(operands) == 2:
        lines.append(f"{start}tt.load {name}_d{attributes} : {pointers}{location or ''}")
    else:
        lines.append(f"{name}_e = tt.load {name}_d{attributes} : {pointers}{location or ''}")
        lines.append(f"{start}arith.select {mask}, {name}_e, {operands[2]} : {masks}{values}")
    return "\n".join(lines)


def _shorten_blocks(function, fast):
    """Cut the basic blocks of a function in LLVM IR into shorter ones. ``fast`` also switches the optimiser off."""
    header, *body = _name_values(function).splitlines()
    blocks = {label: _cut(label, lines) for label, lines in _blocks_of(header, body[:-1])}
    if fast:
        header = header.replace(" {", " noinline optnone {")
    lines = [header]
    for label, piece in itertools.chain.from_iterable(blocks.values()):
        lines.append(label[1:] + ":")
        for line in piece:
            if " = phi " in line:  # the branch now comes from the last piece of a predecessor
                line = re.sub(r", (%[\w.]+) \]", lambda match: f", {blocks[match[1]][-1][0]} ]", line)
            select = _SELECT.match(line)
            lines += _integer_select(*select.groups()) if select else [line]
    return "\n".join([*lines, "}"])


def _name_values(function):
    """Name the values that only have a number, because numbers must be in order and new lines would break it."""
    function = re.sub(r"%(\d+)\b", r"%v\1", function)
    return re.sub(r"^(\d+):", r"v\1:", function, flags=re.M)


def _blocks_of(header, body):
    """Return the basic blocks of a function as pairs of label and lines."""
    # The text has no label for the entry block. Its number follows the numbers of the parameters.
    blocks = [("%v" + str(len(re.findall(r"%v\d+", header))), [])]
    for line in body:
        if match := re.match(r"([\w.]+):", line):
            blocks.append(("%" + match[1], []))
        elif line:
            blocks[-1][1].append(line)
    return blocks


def _cut(label, lines):
    """Cut a long block into several that follow each other. Phis stay together at the beginning."""
    phis = sum(" = phi " in line for line in lines)
    starts = range(phis + _LINES_PER_BLOCK, len(lines), _LINES_PER_BLOCK)
    labels = [label] + [f"{label}.{start}" for start in starts]
    bounds = itertools.pairwise([0, *starts, len(lines)])
    pieces = [(name, lines[low:high]) for name, (low, high) in zip(labels, bounds, strict=True)]
    for (_, piece), (following, _) in itertools.pairwise(pieces):
        piece.append(f"  br label {following}")
    return pieces


def _integer_select(result, condition, kind, first, second):
    """Choose between floating point numbers through integers, because x86 has no float select and would branch."""
    bits = _BITS[kind]
    yield f"  {result}.a = bitcast {kind} {first} to {bits}"
    yield f"  {result}.b = bitcast {kind} {second} to {bits}"
    yield f"  {result}.c = select i1 {condition}, {bits} {result}.a, {bits} {result}.b"
    yield f"  {result} = bitcast {bits} {result}.c to {kind}"


# --- Replacing what only a GPU has ---


def _replace_intrinsics(ir):
    definitions = []
    for line in re.findall(r"^declare .*@llvm\.amdgcn\..*$", ir, re.M):
        result, name, arguments = re.search(r"(\{.*?\}|<.*?>|\w+) @([\w.]+)\((.*)\)", line).groups()
        local = "native." + name
        ir = ir.replace(line, "").replace(f"@{name}(", f"@{local}(")
        kinds = re.findall(r"(?:^|, )(<.*?>|\w+)", arguments)
        parameters = ", ".join(f"{kind} %{i}" for i, kind in enumerate(kinds))
        body = intrinsic_body(name, result)
        definitions.append(f"define internal {result} @{local}({parameters}) alwaysinline {{\n {body}\n}}")
        definitions += _declarations_in(body)
    return ir, definitions


def intrinsic_body(name, result):
    if name in _INDEX_OF:
        return f"%r = load i32, ptr @{_INDEX_OF[name]}\n ret i32 %r"
    base = re.sub(r"(\.[if]\d+)+$", "", name)
    body = _INTRINSIC_BODIES.get(base.removeprefix("llvm.amdgcn."))
    if body is None:
        raise NotImplementedError(f"native_triton has no x86 counterpart of the intrinsic {name}")
    suffix = name.rsplit(".", 1)[-1]
    return body.format(t=result, s=suffix)


def _declarations_in(body):
    for result, name, arguments in re.findall(r"call (\w+) @(llvm\.[\w.]+)\(([^)]*)\)", body):
        yield f"declare {result} @{name}({', '.join(argument.split()[0] for argument in arguments.split(','))})"


def _replace_device_library(ir):
    """Replace calls of AMD's device library (``__ocml_erf_f32``) by calls of the C library (``erff``)."""
    definitions = []
    if "@__ockl_get_num_groups(" in ir:  # tl.num_programs
        ir = re.sub(r"^declare .*@__ockl_get_num_groups\(.*$", _NUM_PROGRAMS, ir, flags=re.M)
    for line in re.findall(r"^declare .*@__ocml_\w+\(.*$", ir, re.M):
        name, function, width = re.search(r"@(__ocml_(\w+)_f(32|64))\(", line).groups()
        result = "float" if width == "32" else "double"
        count = line.count(result) - 1
        arguments = ", ".join(f"{result} %{i}" for i in range(count))
        if function == "rsqrt":  # the C library has no rsqrt
            body = _INTRINSIC_BODIES["rsq"].format(t=result, s="f" + width)
            definitions += _declarations_in(body)
        else:
            target = function + ("f" if width == "32" else "")
            body = f"%r = call {result} @{target}({arguments})\n ret {result} %r"
            definitions.append(f"declare {result} @{target}({', '.join([result] * count)})")
        definitions.append(f"define internal {result} @{name}({arguments}) alwaysinline {{\n {body}\n}}")
        ir = ir.replace(line, "")
    return ir, definitions


def _without_repeated_declarations(ir):
    """Remove repeated declarations, because LLVM allows each once and the kernel may declare the same functions."""
    seen, lines = set(), []
    for line in ir.splitlines():
        if line.startswith("declare "):
            name = re.search(r"@([\w.]+)\(", line)[1]
            if name in seen:
                continue
            seen.add(name)
        lines.append(line)
    return "\n".join(lines)


def _grid_loop(kernel, types):
    """IR of ``native_launch(arguments, lanes, grid_x, grid_y, grid_z)``, which runs program after program.

    ``arguments`` is an array of pointers to the values. The loop is written in IR, because compiling it from C would take more
    time than all other steps of a small kernel.
    """
    loads = []
    for i, kind in enumerate(types):
        loads += [
            f"  %slot{i} = getelementptr ptr, ptr %arguments, i64 {i}",
            f"  %address{i} = load ptr, ptr %slot{i}",
            f"  %value{i} = load {kind}, ptr %address{i}",
        ]
    values = ", ".join(f"{kind} %value{i}" for i, kind in enumerate(types))
    undefined = "".join(["\\FF"] * 64)
    grid = "@native.grid = internal thread_local global [3 x i32] zeroinitializer"
    variables = "\n".join(f"@{name} = internal thread_local global i32 0" for name in sorted(_INDEX_OF.values()))
    return f"""
@native.spare = internal global [64 x i8] zeroinitializer, align 64
@native.undefined = internal constant [64 x i8] c"{undefined}", align 64
{grid}
{variables}
define void @native_launch(ptr %arguments, i32 %lanes, i32 %grid_x, i32 %grid_y, i32 %grid_z) {{
entry:
{chr(10).join(loads)}
  store i32 %grid_x, ptr @native.grid
  %grid_1 = getelementptr i32, ptr @native.grid, i32 1
  store i32 %grid_y, ptr %grid_1
  %grid_2 = getelementptr i32, ptr @native.grid, i32 2
  store i32 %grid_z, ptr %grid_2
  br label %loop_z
loop_z:
  %z = phi i32 [ 0, %entry ], [ %next_z, %end_y ]
  %more_z = icmp ult i32 %z, %grid_z
  br i1 %more_z, label %loop_y, label %done
loop_y:
  %y = phi i32 [ 0, %loop_z ], [ %next_y, %end_x ]
  %more_y = icmp ult i32 %y, %grid_y
  br i1 %more_y, label %loop_x, label %end_y
loop_x:
  %x = phi i32 [ 0, %loop_y ], [ %next_x, %end_lane ]
  %more_x = icmp ult i32 %x, %grid_x
  br i1 %more_x, label %program, label %end_x
program:
  store i32 %x, ptr @native.pid_x
  store i32 %y, ptr @native.pid_y
  store i32 %z, ptr @native.pid_z
  br label %loop_lane
loop_lane:
  %lane = phi i32 [ 0, %program ], [ %next_lane, %loop_lane ]
  store i32 %lane, ptr @native.lane
  call void @{kernel}({values})
  %next_lane = add i32 %lane, 1
  %more_lane = icmp ult i32 %next_lane, %lanes
  br i1 %more_lane, label %loop_lane, label %end_lane
end_lane:
  %next_x = add i32 %x, 1
  br label %loop_x
end_x:
  %next_y = add i32 %y, 1
  br label %loop_y
end_y:
  %next_z = add i32 %z, 1
  br label %loop_z
done:
  ret void
}}
"""
