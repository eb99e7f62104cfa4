"""Draw the chart of docs/fused-layers.md: kept bytes and step time of four models, four ways.

python perf/plot_memory.py        # reads perf/results/memory.json, writes memory.png there
"""

import argparse
import json
import pathlib

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
MODELS = {"cnn_28": "CNN, 28 x 28", "cnn_64": "CNN, 64 x 64", "sew_resnet18": "SEW-ResNet18", "spikformer": "Spikformer block"}
WAYS = {  # color of Okabe and Ito
    "SpikingJelly": "#999999",
    "SpikingJelly, memopt": "#e69f00",
    "accelerated": "#56b4e9",
    "fused and packed": "#0072b2",
}


def read(T, results=RESULTS):
    """Return {model: {way: (kept bytes, time relative to accelerated)}}; "ideal" has no time.

    Such a ratio is the median of the ratios within each round, so what slows a whole round down does not change it.
    """
    rows, found = json.loads((results / "memory.json").read_text())["rows"], {}
    for row in rows:
        steps, way = row["name"].split(", ", 1)
        if steps == f"T = {T}":
            found.setdefault(row["section"], {})[way] = row["kept_bytes"], row.get("ratio")
    return found


def draw(path, found):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 9}):
        figure, both = pyplot.subplots(1, 2, figsize=(8, 4.2), sharey=True, layout="constrained", facecolor="white")
        for axes, title, which in zip(
            both, ("bytes kept for the backward pass", "time of a training step"), (0, 1), strict=True
        ):
            for i, model in enumerate(MODELS):
                most = found[model]["SpikingJelly"][which]
                for j, (way, color) in enumerate(WAYS.items()):
                    share, y = found[model][way][which] / most, i + 0.2 * (j - 1.5)
                    axes.barh(y, share, 0.19, color=color, label=way if i == 0 else None)
                    text = f"{found[model][way][0] / 2**20:.3g} MiB" if which == 0 else f"{share:.2f}"
                    axes.text(share + 0.01, y, text, va="center", fontsize=7.5)
                if which == 0:
                    ideal = found[model]["ideal"][0] / most
                    axes.plot([ideal] * 2, [i + 0.2, i + 0.4], color="black", linewidth=1.5, label="ideal" if i == 0 else None)
            axes.set(xlim=(0, 1.25 if which == 0 else 1.75), xticks=[])
            axes.set_title(title + ("" if which == 0 else ", SpikingJelly = 1"), fontsize=10)
            axes.spines[["top", "right", "bottom"]].set_visible(False)
            axes.tick_params(length=0)
        both[0].set_yticks(range(len(MODELS)), list(MODELS.values()))
        both[0].invert_yaxis()
        figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", metavar="FILE", type=pathlib.Path, default=RESULTS / "memory.png", help="default: %(default)s")
    draw(p.parse_args().out, read(4))


if __name__ == "__main__":
    main()
