"""Check the figures of the compiled kernels against the floor and the committed files, and print them."""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import pathlib

from perf import harness
from perf.compile import launch
from perf.compile.lif import CUBA, LEAKY, LIF
from perf.compile.mix import MIX
from perf.compile.norm_lif import NORM_LIF
from perf.compile.pack import PACK
from perf.compile.rows import rows_of
from perf.compile.spiking_wkv import SPIKING_WKV
from perf.compile.wkv import WKV

STEMS = {
    "lif": LIF,
    "leaky": LEAKY,
    "cuba": CUBA,
    "norm_lif": NORM_LIF,
    "wkv": WKV,
    "spiking_wkv": SPIKING_WKV,
    "mix": MIX,
    "pack": PACK,
}
# {prefix of a kernel's name: its stem}, where they differ
KERNELS = {
    "adlif": "cuba",
    "lapicque": "cuba",
    "norm": "norm_lif",
    "token_shift": "mix",
    "relu_squared": "mix",
    "unpack": "pack",
    "window": "pack",
    "fla": "wkv",
    "spikingjelly": "lif",
}
QUICK_TARGETS = ("cuda:90", "hip:gfx942")
TOLERANCE = 1.10  # allowed growth of instructions over the committed figures


def rows_of_all(targets, cases, jobs: int) -> list[dict]:
    if jobs == 1:
        return [row for target in targets for row in rows_of(target, cases)]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
        return [row for rows in pool.map(rows_of, targets, [cases] * len(targets)) for row in rows]


# ---- check -----------------------------------------------------------------------------------------------------------


def is_ours(row: dict) -> bool:
    """Return True for a kernel of this project, not of a peer, and not the sum over a call."""
    return not row["kernel"].startswith(("fla", "spikingjelly")) and "(call)" not in row["kernel"]


def stem_of(row: dict) -> str:
    """Return the stem whose table has the row. A peer's kernel is in the table of the stem that it is compared with."""
    names = {**KERNELS, **{stem: stem for stem in STEMS}}
    return next(stem for name, stem in names.items() if row["kernel"].startswith(name))


def key(row: dict) -> tuple:
    return row["kernel"], row["variant"], row["data"], row["target"]


def is_spilling(row: dict) -> bool:
    return bool(row["spills"] or row["spill_bytes"])


def is_above_floor(row: dict) -> bool:
    moved = row["bytes_per_element"]  # None for a kernel that works per chunk, not per token
    return moved is not None and moved > STEMS[stem_of(row)].spare * row["floor"]


def find_faults(rows: list[dict], committed: dict | None = None) -> list[str]:
    """List the faults of rows, one line each. ``committed``: the committed file, from the same Triton version."""
    found, before = [], {}
    if committed:
        before = {key(row): row for row in committed["rows"] if "note" not in row}
    for row in filter(is_ours, rows):
        where = " ".join(key(row))
        if is_spilling(row):
            found.append(f"{where}: spills {row['spills']}, {row['spill_bytes']} bytes a thread")
        size = 4 if row["data"] == "fp32" and "bf16 results" not in row["variant"] else 2
        wanted = min(128, int(row["neurons_per_thread"] * 8 * size))
        if row["narrowest"] < wanted:
            found.append(f"{where}: an access of {row['narrowest']} bits, {wanted} wanted")
        if is_above_floor(row):
            found.append(f"{where}: {row['bytes_per_element']:.2f} bytes per element, the floor is {row['floor']:.2f}")
        old = before.get(key(row))
        if old and old["instructions_per_step"] and row["instructions_per_step"] > TOLERANCE * old["instructions_per_step"]:
            change = f"{old['instructions_per_step']:.1f} -> {row['instructions_per_step']:.1f}"
            found.append(f"{where}: instructions per neuron and step {change}")
    return found


def _committed(stem: str, version: str) -> dict | None:
    """Return the committed figures of a stem, or None if another Triton version made them."""
    path = harness.ROOT / "perf" / "results" / f"compile_{stem}.json"
    committed = json.loads(path.read_text()) if path.exists() else None
    if not committed:
        print(f"check: no {path.name}, so instructions are compared with nothing")
    elif committed["provenance"]["versions"]["triton"] != version:
        other = committed["provenance"]["versions"]["triton"]
        print(f"check: {path.name} is from Triton {other}, so instructions are compared with nothing")
        return None
    return committed


# ---- tables ----------------------------------------------------------------------------------------------------------

COLUMNS = ("kernel", "variant", "data", "registers", "spills", "shared", "resident", "loads", "stores", "bytes", "floor")
COLUMNS += ("instructions", "special")
PAPER = ("paper_memory", "paper_issue", "paper_special", "bound_by")


def _shown(row: dict) -> dict:
    if "note" in row:
        return row
    shown = {k: row.get(k) for k in ("kernel", "variant", "data", "registers", "shared", "loads", "stores", "floor")}
    if "spills" in row:  # not the sum over a call
        lanes = row["scalar_spills"]
        shown["spills"] = f"{row['spills']} (+{lanes} scalar)" if lanes else str(row["spills"])
        shown["resident"] = f"{row['warps_resident']}/{row['warps_max']}"
    shown |= {"bytes": row["bytes_per_element"], "instructions": row["instructions_per_step"]}
    shown |= {"special": row["special_per_step"]}
    if "paper_bound_by" in row:
        shown |= {f"paper_{k}": row[f"paper_limit_{k}_ms"] for k in ("memory", "issue", "special")}
        shown["bound_by"] = row["paper_bound_by"]
    return shown


def markdown_table(rows: list[dict], columns=None) -> str:
    """Format dicts as a Markdown table. By default all keys except histogram, loops and outer are columns."""
    if columns is None:
        columns = [k for k in dict.fromkeys(k for row in rows for k in row) if k not in ("histogram", "loops", "outer")]

    def cell(value) -> str:
        if isinstance(value, dict):  # {128: 4} -> 128 x 4
            return ", ".join(f"{k} x {n}" for k, n in value.items()) or "-"
        return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    numeric = [all(isinstance(row.get(k), int | float | None) for row in rows) for k in columns]
    lines = [[k.replace("_", " ") for k in columns], ["--:" if n else "---" for n in numeric]]
    lines += [[cell(row.get(k)) for k in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table(rows: list[dict]) -> str:
    columns = COLUMNS + (PAPER if rows[0]["target"] == "cuda:90" else ())
    text = markdown_table([_shown(row) for row in rows if "note" not in row], columns)
    notes = dict.fromkeys(f"{row['kernel']}: {row['note']}" for row in rows if "note" in row)
    return "\n".join([text, *(f"\n{note}" for note in notes)])


TITLE = """# The {stem} kernels as compiled

Compiler output, read from machine code. **Nothing here was run and no time was measured**; no GPU took part.

`{command}`, {date}, torch {torch}, Triton {triton}, SpikingJelly {spikingjelly}, fla-core {fla-core}, commit {commit}.

{verdict}
"""


def verdict(rows: list[dict]) -> str:
    ours = [row for row in rows if is_ours(row)]
    wide = [row for row in ours if STEMS[stem_of(row)].wide]
    found = (f"{r['kernel']} {r['variant']} {r['data']} ({r['narrowest']})" for r in wide if r["narrowest"] < 128)
    narrow = list(dict.fromkeys(found))
    spilt, over = (sum(map(is_wrong, ours)) for is_wrong in (is_spilling, is_above_floor))
    text = f"{len(ours)} kernels of this project: {spilt} with spills to memory, {over} above the floor of "
    if over or len(wide) < len(ours):
        text = text.replace("above", "more than 10 % (lif, leaky, cuba, mix: 0.1 %) above")
    if not wide:
        return text + "bytes; accesses as wide as an element, the accesses of a warp side by side."
    return text + f"bytes; accesses of 128 bits {'in all except ' + '; '.join(narrow) if narrow else 'throughout'}."


def markdown(rows: list[dict], facts: dict) -> str:
    versions = facts["versions"]
    commit = f"{facts['commit']}{' with changes' if facts['dirty'] else ''}"
    versions = {k: versions[k] or "(not installed)" for k in ("torch", "triton", "spikingjelly", "fla-core")}
    words = {"command": f"python {facts['command']}", "date": facts["date"], "commit": commit, "verdict": verdict(rows)}
    stem = stem_of(rows[0])
    text = TITLE.format(stem=stem.upper(), **words, **versions) + STEMS[stem].notes
    for target in dict.fromkeys(row["target"] for row in rows):
        text += f"\n## {target}\n\n{table([row for row in rows if row['target'] == target])}\n"
    return text


def main(arguments=None) -> int:
    p = argparse.ArgumentParser(description="Triton kernels as compiled for five GPUs (compiler output, no timings)")
    p.add_argument("--quick", action="store_true", help=f"only a few variants and {' and '.join(QUICK_TARGETS)}")
    p.add_argument("--stem", choices=STEMS, help="only the kernels of one stem (default: all)")
    p.add_argument("--target", action="append", help="a GPU, for example cuda:90; repeatable (default: all)")
    p.add_argument("--json", metavar="PATH", help="write the rows; needs --stem")
    p.add_argument("--markdown", metavar="PATH", help="write the tables; needs --stem")
    p.add_argument("--check", action="store_true", help="fail on spills, narrow accesses, excess bytes, more instructions")
    p.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: %(default)s)")
    p.set_defaults(csv=None, device="cpu")
    args = p.parse_args(arguments)
    if (args.json or args.markdown) and not args.stem:
        p.error("--json and --markdown hold one stem: add --stem")
    targets = args.target or (QUICK_TARGETS if args.quick else launch.TARGETS)
    stems = [STEMS[args.stem]] if args.stem else STEMS.values()
    cases = [case for stem in stems for case in (stem.quick if args.quick else stem.cases)]
    rows = rows_of_all(targets, cases, min(args.jobs, len(targets)))
    facts = harness.provenance()
    facts = {k: facts[k] for k in ("date", "command", "commit", "dirty", "versions")}
    for target in targets:
        print(f"\n{target}: compiler output, no time was measured\n")
        print(table([row for row in rows if row["target"] == target]))
    print(f"\n{verdict(rows)}")
    harness.save(f"{(args.stem or 'all').upper()} kernels as compiled; no timings", rows, args, provenance=facts)
    if args.markdown:
        pathlib.Path(args.markdown).write_text(markdown(rows, facts))
    if not args.check:
        return 0
    found = []
    for stem in STEMS:
        ours = [row for row in rows if stem_of(row) == stem]
        found += find_faults(ours, _committed(stem, facts["versions"]["triton"])) if ours else []
    print("\n".join(["check: " + line for line in found] or ["check: passed"]))
    return 1 if found else 0
