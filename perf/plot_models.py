"""Draw the chart of README: step time and kept bytes of whole models, with another library's code and with ours.

    python perf/plot_models.py        # reads perf/results/*.json, writes models_light.png and models_dark.png there

The bars of the other library's code are 1, and ours are relative to them. Times are ratios within a round of one run.
"""

import argparse
import json
import pathlib

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
BARS = (  # label, result file, section, name of the rows
    ("spiking CNN\nSpikingJelly", "compat_snn", "jelly_models", "spiking CNN, training step, {}"),
    ("Spikformer block\nSpikingJelly", "compat_snn", "jelly_models", "Spikformer block, training step, {}"),
    ("784-1000-10, 25 steps\nsnnTorch", "compat_snn", "snn_model", None),
    ("RWKV-4, 4 layers\ntransformers", "compat_rwkv", "rwkv_step", None),
    ("SDiT, batch 8\nPyTorch + SpikingJelly", "sdit", "training", None),
)
NAMES = {  # {section: (row of the other library's code, our row)}
    "jelly_models": ("SpikingJelly's own", "fused"),
    "snn_model": ("snnTorch's own", "unrolled"),
    "rwkv_step": ("transformers", "accelerated"),
    "training": ("plain", "ours"),
}
THEMES = {"light": ("#24292f", "#b4bac1", "#0072b2", "white"), "dark": ("#e6edf3", "#5c6670", "#56b4e9", "none")}


def models(results=RESULTS):
    """Return [(label, time of theirs / time of ours, kept bytes of theirs / kept bytes of ours)]."""
    found = []
    for label, file, section, name in BARS:
        rows = {r["name"]: r for r in json.loads((results / f"{file}.json").read_text())["rows"] if r["section"] == section}
        theirs, ours = (rows[name.format(n) if name else n] for n in NAMES[section])
        size = "saved_per_sample_bytes" if section == "training" else "saved_bytes"
        found.append((label, theirs.get("times_fused", theirs.get("ratio")), theirs[size] / ours[size]))
    return found


def draw(path, found, text, other, own, background):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"text.color": text, "axes.labelcolor": text, "xtick.color": text, "ytick.color": text, "font.size": 9.5}
    with pyplot.rc_context(style):
        figure, both = pyplot.subplots(1, 2, figsize=(8, 4.1), sharey=True, layout="constrained", facecolor=background)
        titles = {"time of a step": "{:.1f}x as fast".format, "bytes kept for the backward pass": lambda r: f"{100 / r:.0f} %"}
        for axes, (title, words), ratios in zip(both, titles.items(), list(zip(*found))[1:], strict=True):
            for i, ratio in enumerate(ratios):
                first = i == 0
                axes.barh(i - 0.19, 1, 0.36, color=other, label="plain PyTorch, or the library's own code" if first else None)
                axes.barh(i + 0.19, 1 / ratio, 0.36, color=own, label="the same model on sdit-kernels" if first else None)
                axes.text(1 / ratio + 0.02, i + 0.19, words(ratio), va="center", weight="bold", color=text)
            axes.set(xlim=(0, 1.02), xticks=[], facecolor="none")
            axes.set_title(title, fontsize=10.5, color=text)
            axes.spines[:].set_visible(False)
            axes.axvline(0, color=text, linewidth=0.8)
            axes.tick_params(length=0)
        both[0].set_yticks(range(len(found)), [label for label, *_ in found])
        both[0].invert_yaxis()
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06)
        figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(path, dpi=200, facecolor=background)
        pyplot.close(figure)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", metavar="FOLDER", type=pathlib.Path, default=RESULTS, help="default: perf/results")
    out = p.parse_args().out
    for theme, colors in THEMES.items():
        draw(out / f"models_{theme}.png", models(), *colors)


if __name__ == "__main__":
    main()
