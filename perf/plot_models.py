"""Draw the chart of README: step time and kept bytes of whole models, as they are and with the kernels.

    python perf/plot_models.py        # reads perf/results/models.json, writes models_light.png and models_dark.png there

All bars are relative to the model as it is. Times are ratios within a round of one run.
"""

import argparse
import json
import pathlib

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
LABELS = {  # {section of models.json: label}
    "spiking_cnn": "spiking CNN\nSpikingJelly",
    "spikformer": "Spikformer block\nSpikingJelly",
    "snntorch": "784-1000-10, 25 steps\nsnnTorch",
    "rwkv": "RWKV-4, 4 layers\ntransformers",
    "sdit": "SDiT, batch 8\nPyTorch + SpikingJelly",
}
WAYS = ("as it is", "accelerated", "fused and packed", "compiled")
# text, as it is, then Okabe and Ito's blue, green and orange; background
LIGHT = ("#24292f", ("#b4bac1", "#0072b2", "#009e73", "#e69f00"), "white")
DARK = ("#e6edf3", ("#5c6670", "#56b4e9", "#009e73", "#e69f00"), "none")


def models(results=RESULTS):
    """Return [(label, {way: (time relative to the model as it is, bytes relative to it)})]."""
    rows = json.loads((results / "models.json").read_text())["rows"]
    found = []
    for section, label in LABELS.items():
        own = {r["name"]: r for r in rows if r["section"] == section and "ratio" in r}
        kept = own[WAYS[0]]["kept_bytes"]
        found.append((label, {way: (own[way]["ratio"], own[way]["kept_bytes"] / kept) for way in WAYS if way in own}))
    return found


def draw(path, found, text, colors, background):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"text.color": text, "axes.labelcolor": text, "xtick.color": text, "ytick.color": text, "font.size": 9.5}
    with pyplot.rc_context(style):
        figure, both = pyplot.subplots(1, 2, figsize=(8, 5.4), sharey=True, layout="constrained", facecolor=background)
        titles = {
            "time of a training step": lambda r: f"{1 / r:.1f}x as fast",
            "bytes kept for the backward pass": "{:.0%}".format,
        }
        for axes, (title, words), which in zip(both, titles.items(), (0, 1), strict=True):
            shown = set()
            for i, (_, ways) in enumerate(found):
                for j, (way, values) in enumerate(ways.items()):
                    at, value = i + 0.2 * (j - (len(ways) - 1) / 2), values[which]
                    label = None if way in shown else way
                    axes.barh(at, value, 0.18, color=colors[WAYS.index(way)], label=label)
                    shown.add(way)
                    if j:
                        axes.text(value + 0.015, at, words(value), va="center", size=8, color=text)
            axes.set(xlim=(0, 1.2), xticks=[], facecolor="none")
            axes.set_title(title, fontsize=10.5, color=text)
            axes.spines[:].set_visible(False)
            axes.axvline(0, color=text, linewidth=0.8)
            axes.tick_params(length=0)
        both[0].set_yticks(range(len(found)), [label for label, _ in found])
        both[0].invert_yaxis()
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06)
        figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, dpi=200, facecolor=background)
        pyplot.close(figure)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", metavar="FOLDER", type=pathlib.Path, default=RESULTS, help="default: perf/results")
    out = p.parse_args().out
    for theme, colors in (("light", LIGHT), ("dark", DARK)):
        draw(out / f"models_{theme}.png", models(), *colors)


if __name__ == "__main__":
    main()
