"""Time every op of two commits side by side, in two processes that take turns.

    python perf/compare_trees.py main~10                       # the working tree against an older commit
    python perf/compare_trees.py v0.1 main --only lif,wkv --shape 4,8,16 --rounds 61

Each process imports the package from its own tree. A third process with the first tree again states the noise: the ratio of a
tree to itself. A row fails if the new tree takes longer than the old one by more than that noise and 5 %.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODES = ("forward", "forward+backward")


def serve(tree, shape, threads):
    """Time one call per line of stdin, {"op", "mode", "n"}, and print the seconds of a call."""
    sys.path.insert(0, tree)
    import torch

    from perf.harness import make_forward_backward, make_inference
    from perf.ops import OPS, as_tuple

    torch.set_num_threads(threads)
    runs = {}

    def find(op, mode):
        if (op, mode) not in runs:
            torch.manual_seed(0)
            leaves = OPS[op].data(*shape)
            gs = [torch.randn_like(y) for y in as_tuple(OPS[op].call(*leaves))]
            both = make_forward_backward(OPS[op].call, leaves, gs if len(gs) > 1 else gs[0])
            runs[op, mode] = make_inference(OPS[op].call, leaves) if mode == "forward" else both
        return runs[op, mode]

    print(json.dumps(sorted(OPS)), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        run, n = find(asked["op"], asked["mode"]), asked["n"]
        start = time.perf_counter()
        for _ in range(n):
            run()
        print((time.perf_counter() - start) / n, flush=True)


class Worker:
    """A process that times ops of one tree."""

    def __init__(self, tree, args):
        command = [sys.executable, __file__, "--serve", str(tree), "--shape", ",".join(map(str, args.shape))]
        command += ["--threads", str(args.threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ops = json.loads(self.process.stdout.readline() or "[]")
        if not self.ops:
            raise SystemExit(f"{tree}: the process ended with status {self.process.wait()}")

    def seconds(self, op, mode, n):
        self.process.stdin.write(json.dumps({"op": op, "mode": mode, "n": n}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{op}, {mode}: the process ended with status {self.process.wait()}")
        return float(line)


def compare(workers, op, mode, rounds, min_time):
    """Return the median ratios to the first worker, within each round."""
    for worker in workers:
        worker.seconds(op, mode, 3)
    n = max(1, round(min_time / workers[0].seconds(op, mode, 1)))
    times = [[worker.seconds(op, mode, n) for worker in workers] for _ in range(rounds)]
    ratios = [statistics.median(row[i] / row[0] for row in times) for i in range(1, len(workers))]
    return statistics.median(row[0] for row in times), ratios


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("old", nargs="?", help="commit to compare with")
    p.add_argument("new", nargs="?", help="default: the working tree")
    p.add_argument("--only", metavar="OP[,OP]", help="default: the ops that both trees have")
    p.add_argument("--shape", metavar="B,L,C", default=(8, 394, 384), type=lambda s: tuple(map(int, s.split(","))))
    p.add_argument("--threads", type=int, default=1, metavar="N")
    p.add_argument("--rounds", type=int, default=61, metavar="N")
    p.add_argument("--serve", metavar="TREE", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.serve:
        return serve(args.serve, args.shape, args.threads)
    if args.old is None:
        p.error("old must be a commit")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        trees = []
        for i, commit in enumerate((args.old, args.new)):
            tree = ROOT
            if commit:
                tree = pathlib.Path(folder, str(i))
                tree.mkdir()
                archive = subprocess.run(["git", "-C", ROOT, "archive", commit], capture_output=True)
                if archive.returncode:
                    p.error(archive.stderr.decode().strip())
                subprocess.run(["tar", "-x", "-C", tree], input=archive.stdout, check=True)
            trees.append(tree)
        workers = [Worker(tree, args) for tree in (trees[0], trees[0], trees[1])]
        ops = args.only.split(",") if args.only else [op for op in workers[0].ops if op in workers[2].ops]
        print(f"{args.shape}, {args.threads} threads, {args.rounds} rounds; time of the new tree / time of the old\n")
        print(f"{'op':14} {'pass':17} {'old':>9} {'old/old':>8} {'new/old':>8}")
        for op in ops:
            for mode in MODES:
                seconds, (noise, ratio) = compare(workers, op, mode, args.rounds, 0.02)
                fails = ratio > 1.05 * max(noise, 1 / noise)
                failed |= fails
                print(
                    f"{op:14} {mode:17} {1e6 * seconds:6.0f} us {noise:8.3f} {ratio:8.3f}{'  FAIL' if fails else ''}",
                    flush=True,
                )
        for worker in workers:
            worker.process.stdin.close()
            worker.process.wait()
    return failed


if __name__ == "__main__":
    sys.exit(main())
