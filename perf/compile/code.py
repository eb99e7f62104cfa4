"""Read registers, spills, memory accesses and instructions from the machine code of a compiled Triton kernel.

    row = inspect(compiled, elements_per_thread=8)
    row | limits_h100(row)

This needs Triton 3.6 to 3.8, whose wheel includes NVIDIA's cuobjdump, but neither a GPU nor a driver. The counts are static and
per thread: they count instructions in the code, not instructions that run. So the counts of a kernel with loops come from its
loop bodies. Register counts differ between Triton versions.
"""

import collections
import re
import subprocess
import tempfile

import triton

# {group: pattern}; the first pattern that matches an instruction gives its group. Both vendors share names of the same meaning.
NVIDIA_GROUPS = {
    "load": r"LDG(?!DEPBAR)",
    "store": r"STG",
    "bulk": r"UTMA|UBLKCP",  # tensor memory accelerator: the code does not show the width
    "shared": r"LDS|STS|LDSM|STSM",
    "spill": r"LDL|STL",
    "atomic": r"ATOM|RED\b|RED\.",
    "special": r"MUFU",
    "tensor": r"[HIDQB]MMA|[HQIB]GMMA|UTC|LDTM|STTM",
    "fp64": r"D(ADD|MUL|FMA|SETP|MNMX)|F2F\.F(32|16)\.F64|F2F\.F64",
    "fma": r"FFMA|HFMA2",
    "mul": r"FMUL|HMUL2",
    "add": r"FADD|HADD2",
    "select": r"FSETP|FSET|HSETP|HSET|FMNMX|HMNMX|FSEL|SEL|USEL|FCHK",
    "convert": r"F2|I2|FRND",
    "sync": r"BAR|SYNCS|DEPBAR|LDGDEPBAR|ARRIVES|WARPSYNC|WARPGROUP|MEMBAR|FENCE|ERRBAR|NANOSLEEP",
    "shuffle": r"SHFL|VOTE|MATCH|REDUX|ELECT",
    "branch": r"BRA|BRX|BSSY|BSYNC|BREAK|CALL|RET|EXIT|ACQBULK|PREEXIT",
    "move": r"MOV|UMOV|CS2R|S2R|S2UR|CS2UR|R2UR|LDC|ULDC|P2R|R2P|PRMT|UPRMT|NOP",
    "integer": r"U?(IMAD|IADD|LOP|SHF|LEA|ISETP|PLOP|IABS|POPC|FLO|BREV|SGXT|BMSK|VIADD|VIMNMX|IMNMX|PSETP)",
}
AMD_GROUPS = {
    "load": r"(global|flat|buffer)_load",
    "store": r"(global|flat|buffer)_store",
    "shared": r"ds_",
    "spill": r"scratch_",
    "atomic": r"(global|flat|buffer)_atomic",
    "special": r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_",
    "tensor": r"v_(mfma|wmma|smfmac)",
    "fp64": r"v_\w+_f64",
    "fma": r"v_(pk_|dual_)?(fma|mad_f|mac_f)",
    "divide": r"v_div_",
    "mul": r"v_(pk_|dual_)?mul_(legacy_|dx9_zero_)?f",
    "add": r"v_(pk_|dual_)?(add|sub|subrev)_f",
    "select": r"v_cmpx?_|v_(dual_)?cndmask|v_(pk_|dual_)?(min|max|med)",
    "convert": r"v_(cvt|rndne|trunc|floor|ceil)",
    "move": r"v_(dual_)?(mov|accvgpr|perm|bfi|readlane|writelane|readfirstlane|nop)",
    "sync": r"s_(wait|delay|nop|clause|barrier|sleep)|buffer_(wbl2|inv|gl)",
    "branch": r"s_(c?branch|endpgm|setpc|swappc|set_pc)",
    "constant": r"s_(buffer_)?load",  # kernel arguments and other uniform values, through the scalar cache
    "scalar": r"s_",
    "integer": r"v_",
}


def inspect(compiled, elements_per_thread=None) -> dict:
    """Read the machine code of a CompiledKernel. Return a row with the keys:

    kernel, target, warps, threads; registers (per thread), spills (NVIDIA: instructions, AMD: registers; should be 0),
    spill_bytes (per thread), shared (bytes per program); warps_resident of warps_max (per SM, CU or WGP), limited_by;
    on AMD also scalar_registers and scalar_spills (to lanes of vector registers, not to memory);
    loads, stores {width in bits: count} of global memory, bytes, instructions, special {operation: count},
    histogram {group: count}; loops, outer: the same six for the body of every innermost and of every outermost loop.
    With elements_per_thread, for example BLOCK / threads, the row also has the keys of `per_element`.
    A dual instruction of RDNA3 counts once in `instructions` and twice elsewhere. "fp64" in a histogram shows that a scalar
    of type double was not cast before an operation with a tensor.
    """
    read = _read_nvidia if "cubin" in compiled.asm else _read_amd
    head, code, loops = read(compiled)
    gpu, warps = compiled.metadata.target, compiled.metadata.num_warps
    row = {"kernel": compiled.metadata.name, "target": f"{gpu.backend}:{gpu.arch}", "warps": warps}
    row |= {"threads": warps * gpu.warp_size, **head, **_count(code)}
    row["loops"] = [_count(code[start:end]) for start, end in _innermost(loops)]
    row["outer"] = [_count(code[start:end]) for start, end in _outermost(loops)]
    return row | per_element(row, elements_per_thread) if elements_per_thread else row


def per_element(part: dict, elements: float) -> dict:
    """Return {instructions_, bytes_, special_}per_element of a row or loop; ``elements`` is the number per thread."""
    counts = {"instructions": part["instructions"], "bytes": part["bytes"], "special": sum(part["special"].values())}
    return {f"{name}_per_element": n / elements for name, n in counts.items()}


def _count(code: list) -> dict:
    """Count [(group, operation, width in bits or None), ...]; a dual instruction is a list of two."""
    parts = [part for instruction in code for part in (instruction if isinstance(instruction, list) else [instruction])]

    def tally(items):
        return dict(sorted(collections.Counter(items).items()))

    loads = tally(width for group, _, width in parts if group == "load")
    stores = tally(width for group, _, width in parts if group == "store")
    return {
        "loads": loads,
        "stores": stores,
        "bytes": sum(width * n for accesses in (loads, stores) for width, n in accesses.items()) // 8,
        "instructions": len(code),
        "special": tally(operation for group, operation, _ in parts if group == "special"),
        "histogram": dict(collections.Counter(group for group, _, _ in parts).most_common()),
    }


def _without_returns(loops: list, ends: list) -> list:
    """Remove jumps back from code that the compiler moved behind the end of the program; they are not loops."""
    return [(start, end) for start, end in loops if not any(start <= i < end for i in ends)]


def _innermost(loops: list) -> list:
    """Return the (start, end) pairs that do not enclose another pair."""
    loops = set(loops)
    return sorted(a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops))


def _outermost(loops: list) -> list:
    """Return the (start, end) pairs that no other pair encloses."""
    loops = set(loops)
    return sorted(a for a in loops if not any(b != a and b[0] <= a[0] and a[1] <= b[1] for b in loops))


def _group(groups: dict, operation: str) -> str:
    return next((name for name, pattern in groups.items() if re.match(pattern, operation)), "other")


# NVIDIA: {arch: (warps, blocks, registers, bytes of shared memory) of an SM}; sm_100 is assumed equal to sm_90
NVIDIA_SM = {80: (64, 32, 65536, 164 << 10), 90: (64, 32, 65536, 228 << 10), 100: (64, 32, 65536, 228 << 10)}


def _read_nvidia(compiled):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "-sass", "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    #                            address               predicate      operation     operands
    line = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?(U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
    lines = [(int(address, 16), *rest) for address, *rest in line.findall(text)]
    while lines and _is_padding(*lines[-1]):
        lines.pop()

    code, loops, ends, index = [], [], [], {address: i for i, (address, *_) in enumerate(lines)}
    for i, (address, predicate, operation, operands) in enumerate(lines):
        group = _group(NVIDIA_GROUPS, operation)
        code.append((group, operation, _nvidia_width(operation) if group in ("load", "store") else None))
        if operation == "EXIT" and not predicate:
            ends.append(i)
        jump = re.search(r"0x([0-9a-f]+)\s*$", operands) if operation.startswith("BRA") else None
        if jump and int(jump[1], 16) < address:
            loops.append((index[int(jump[1], 16)], i + 1))
    loops = _without_returns(loops, ends)

    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups())
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    max_warps, max_blocks, sm_registers, sm_shared = NVIDIA_SM[compiled.metadata.target.arch]
    per_warp = -(-registers * 32 // 256) * 256  # allocated in units of 256, in each of the four partitions of the SM
    fits = {
        "warps": max_warps // warps,
        "blocks": max_blocks,
        "registers": sm_registers // 4 // per_warp * 4 // warps,
        "shared": sm_shared // (-(-(shared + 1024) // 128) * 128),  # the system reserves 1 KiB per block
    }
    head = {"registers": registers, "spills": sum(group == "spill" for group, _, _ in code), "spill_bytes": stack}
    return head | {"shared": shared} | _occupancy(fits, warps, max_warps), code, loops


def _is_padding(address: int, _predicate: str, operation: str, operands: str) -> bool:
    """Return True for a NOP or a branch to itself; they pad the code after its end."""
    return operation == "NOP" or (operation.startswith("BRA") and operands.strip().endswith(f"{address:#x}"))


def _nvidia_width(operation: str) -> int:
    found = re.search(r"\.[US]?(256|128|64|16|8)\b", operation)
    return int(found[1]) if found else 32


# AMD, per CU (CDNA) or WGP (RDNA), each of four SIMDs: (waves per SIMD, work-groups of several waves, bytes of LDS)
AMD_CU = {"gfx942": (8, 16, 64 << 10), "gfx1100": (16, 32, 128 << 10)}
AMD_WIDTHS = {128: "x4|b128", 96: "x3|b96", 64: "x2|b64", 16: "short|[iub]16", 8: "byte|[iub]8", 32: ""}


def _read_amd(compiled):
    text = compiled.asm["amdgcn"]
    code, loops, ends, labels = [], [], [], {}
    for line in text.splitlines():
        line = line.split(";")[0]
        if label := re.match(r"(\.?LBB\w+):", line):
            labels[label[1]] = len(code)
        parts = []
        for half in line.split("::"):  # RDNA3 has dual instructions with two operations
            if operation := re.match(r"\s+((?:v|s|ds|global|flat|buffer|scratch)_\w+)", half):
                name = re.sub(r"_e(32|64)$", "", operation[1])
                group = _group(AMD_GROUPS, name)
                parts.append((group, name, _amd_width(name) if group in ("load", "store") else None))
        if parts:
            code.append(parts[0] if len(parts) == 1 else parts)
        if re.match(r"\s+s_endpgm", line):
            ends.append(len(code) - 1)
        jump = re.match(r"\s+s_c?branch\w*\s+(\.?LBB\w+)", line)
        if jump and jump[1] in labels:
            loops.append((labels[jump[1]], len(code)))
    loops = _without_returns(loops, ends)

    def read_metadata(key: str) -> int:  # the metadata follows the code
        return int(re.findall(rf"{key}:\s*(\d+)", text)[-1])

    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    waves, groups, lds = AMD_CU[compiled.metadata.target.arch]
    fits = {
        "warps": 4 * waves // warps,
        "blocks": groups if warps > 1 else 4 * waves,
        "registers": 4 * read_metadata("Occupancy") // warps,
        "shared": lds // shared if shared else 4 * waves,
    }
    head = {"registers": read_metadata(r"\.vgpr_count"), "scalar_registers": read_metadata(r"\.sgpr_count")}
    head |= {"spills": read_metadata(r"\.vgpr_spill_count"), "scalar_spills": read_metadata(r"\.sgpr_spill_count")}
    head |= {"spill_bytes": read_metadata(r"\.private_segment_fixed_size"), "shared": shared}
    return head | _occupancy(fits, warps, 4 * waves), code, loops


def _amd_width(operation: str) -> int:
    return next(width for width, pattern in AMD_WIDTHS.items() if re.search(pattern, operation))


def _occupancy(fits: dict, warps: int, max_warps: int) -> dict:
    """Return the occupancy from `fits`: {resource: number of programs that fit}."""
    least = min(fits, key=fits.get)
    return {"warps_resident": fits[least] * warps, "warps_max": max_warps, "limited_by": least}


def limits_h100(row: dict) -> dict:
    """Calculate lower limits of the time on an H100 SXM at its boost clock, in ms per 1e9 elements. Nothing is measured.

    The limits follow from the counts per element: memory at 3.35 TB/s; 16 special operations and 128 instructions (four warps
    of 32) per clock and SM; 132 SMs at 1.755 GHz. `paper_bound_by` names the largest limit. ``row`` is a row for cuda:90, or
    `per_element` of one of its loops.
    """
    if row.get("target", "cuda:90") != "cuda:90":
        raise ValueError(f"limits_h100: the code is for {row['target']}")
    clocks = 132 * 1.755e9
    limits = {
        "memory": row["bytes_per_element"] / 3.35e12,
        "special": row["special_per_element"] / (16 * clocks),
        "issue": row["instructions_per_element"] / (128 * clocks),
    }
    times = {f"paper_limit_{name}_ms": 1e12 * seconds for name, seconds in limits.items()}
    return times | {"paper_bound_by": max(limits, key=limits.get)}
