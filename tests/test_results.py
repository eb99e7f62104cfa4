"""Figures in README.md are those of the files in perf/results/, and every file there is listed with its command."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "perf" / "results"
README = " ".join((ROOT / "README.md").read_text().split())


def rows(name, section, run=None):
    """Rows of a section of a file, or of one of the runs of gpu_suite.py in it."""
    found = json.loads((RESULTS / name).read_text())
    if run is not None:
        return found["runs"][run]["parts"][section]["rows"]
    return [r for r in found["rows"] if r["section"] == section]


def row(found, **wanted):
    (one,) = (row for row in found if all(row.get(key) == value for key, value in wanted.items()))
    return one


def digits(x):
    """To two digits, as in the tables."""
    return f"{float(f'{x:.2g}'):g}x"


def times(found, peer, key="mode", modes=("inference", "forward+backward")):
    """Time over that of ours, the first contestant, within each round."""
    return " | ".join(digits(row(found, name=peer, **{key: mode})["ratio"]) for mode in modes)


def test_the_table_of_the_cpu():
    peers, rate = rows("lif.json", "peers"), rows("lif.json", "rate")
    for label, found, peer in (
        ("SpikingJelly 2.0.0 `LIFNode` / `lif`", peers, "SpikingJelly LIFNode"),
        ("snnTorch 1.0 `Leaky` / `lif`", peers, "snnTorch Leaky (detached reset)"),
        ("plain PyTorch loop / `lif`", peers, "plain loop"),
        ("`torch.compile` of that loop / `lif`", peers, "torch.compile(plain loop)"),
        ("repeat, SpikingJelly `LIFNode`, mean / `lif_rate`", rate, "repeat, LIFNode, mean"),
    ):
        assert f"| {label} | {times(found, peer)} |" in README


def test_the_table_of_the_gpu():
    peers, rate = rows("gpu_h200.json", "lif", 1), rows("gpu_h200.json", "rate", 3)
    for label, found, peer in (
        ("SpikingJelly 2.0.0 `LIFNode`, its Triton kernels / `lif`", peers, "SpikingJelly LIFNode"),
        ("snnTorch 1.0 `Leaky` / `lif`", peers, "snnTorch Leaky (detached reset)"),
        ("plain PyTorch loop / `lif`", peers, "plain loop"),
        ("`torch.compile` of that loop / `lif`", peers, "torch.compile(plain loop)"),
        ("repeat, `LIFNode`, mean / `lif_rate`", rate, "repeat, LIFNode, mean"),
    ):
        assert f"| {label} | {times(found, peer)} |" in README
    scans = [rows("gpu_h200.json", "wkv", 0), rows("gpu_h200.json", "wkv_backward", 1)]
    for label, peer in (
        ("flash-linear-attention `fused_recurrent_rwkv4` / `wkv`", "flash-linear-attention"),
        ("Heinsen's form, PyTorch / `wkv`", "Heinsen's form"),
    ):  # over the algorithm that "auto" takes at this size
        ratios = [row(found, name=peer)["median_s"] / row(found, name="wkv, chunked")["median_s"] for found in scans]
        assert f"| {label} | {' | '.join(map(digits, ratios))} |" in README
    mix = times(rows("gpu_h200.json", "mix", 0)[:8], "plain PyTorch", key="pass", modes=("forward", "backward"))
    assert f"`token_shift` with norm and three mixes (backward alone in the second column) | {mix} |" in README
    found = rows("gpu_h200.json", "snn", 0)
    loop = [
        digits(row(found, name="loop", mode=m)["median_s"] / row(found, name="leaky", mode=m)["median_s"])
        for m in ("forward", "forward+backward")
    ]
    assert f"| snnTorch 1.0 `Leaky` in a loop of 25 steps / `leaky` | {' | '.join(loop)} |" in README


def test_the_training_steps_on_the_gpu():
    found = rows("gpu_h200.json", "steps", 0)
    for preset, batch in (("fashion_mnist", 32), ("fashion_mnist", 256), ("cifar10", 256)):
        ours = [row(found, name=f"{preset}, batch {batch}, ours, {dtype}") for dtype in ("bf16", "fp32")]
        cells = [f"{1e3 * r['median_s']:.3g} ms" for r in ours] + [f"{ours[0]['images_per_second']:,.0f}"]
        cells += [f"{r['peak_bytes'] / 2**30:.1f} GiB" for r in ours]
        assert f"| `{preset}`, batch {batch} | {' | '.join(cells)} |" in README
    plain, ours = (row(found, name=f"fashion_mnist, batch 32, {form}, fp32")["median_s"] for form in ("plain", "ours"))
    assert f"{plain / ours:.0f} times as long" in README


def other_libraries():
    """The rows of README's table in "Use it in your project": time and bytes kept, over those of the fused form."""

    def pair(section, fused, own):
        found = rows("compat_snn.json", section)
        fused, own = row(found, name=fused), row(found, name=own)
        ratio = own["times_fused"] if "times_fused" in own else own["ratio"] / fused["ratio"]
        return f"{digits(ratio)} | {digits(own['saved_bytes'] / fused['saved_bytes'])} |"

    own = "SpikingJelly's own"
    for label, name in (
        ("`LIFNode`, 4 steps of (8, 394, 384)", "LIFNode"),
        ("... a step at a time", "LIFNode, single steps"),
        ("`IFNode`", "IFNode"),
        ("`ParametricLIFNode`", "ParametricLIFNode"),
    ):
        yield f"| {label} | {pair('jelly_neurons', f'{name}, fused', f'{name}, {own}')}"
    for label, name in (
        ("a spiking CNN, a training step", "spiking CNN"),
        ("a Spikformer block, likewise", "Spikformer block"),
    ):
        step = f"{name}, training step"
        yield f"| {label} | {pair('jelly_models', f'{step}, fused', f'{step}, {own}')}"
    yield f"| `Leaky`, 25 steps of (128, 1000), `unroll` | {pair('snn_neurons', 'subtract, unroll', 'subtract, the loop')}"
    looped = pair("snn_neurons", "subtract, accelerated, in the loop", "subtract, the loop")
    yield f"| ... accelerated, in the loop | {looped}"
    whole = pair("snn_model", "unrolled", "snnTorch's own")
    yield f"| a network of 784, 1000 and 10 over 25 steps, a training step, unrolled | {whole}"


def test_the_table_of_other_libraries():
    for line in other_libraries():
        assert line in README


def test_the_sentences():
    bandwidth = {r["name"]: r["percent_of_copy"] for r in rows("gpu_h200.json", "bandwidth", 1)}
    lif, rate = bandwidth["lif, T=4"], bandwidth["lif_rate, T=4"]
    assert f"`lif` runs at {lif:.0f} % and `lif_rate` at {rate:.0f} % of the bandwidth of `copy_`" in README
    one, both = (
        row(rows("gpu_h200.json", "algorithms", 1), B=256, L=1024, name="auto", mode=mode)["gb_per_s"] / 1e3
        for mode in ("forward", "forward+backward")
    )
    assert f"reaches {one:.1f} TB/s forward, {both:.1f} forward and backward" in README
    goals = json.loads((RESULTS / "wkv.json").read_text())["goals"]
    for text, what in (
        ("{:.0f} times as fast as the eager loop over tokens", "forward, times the eager loop"),
        ("{:.0f} times forward and backward", "forward + backward, times the eager loop"),
    ):
        value = next(float(re.search(r": ([\d.]+)", goal)[1]) for goal in goals if what in goal)
        assert text.format(value) in README


def test_the_sentences_on_rwkv():
    model, layer = (rows("compat_rwkv.json", section) for section in ("rwkv_step", "rwkv_layer"))
    ours, theirs = (row(model, name=name)["saved_bytes"] for name in ("accelerated", "transformers"))
    assert f"run {row(model, name='transformers')['ratio']:.1f} times as fast" in README
    assert f"keep {100 * ours / theirs:.0f} % of the bytes" in README
    assert f"runs {row(layer, name='transformers')['ratio']:.1f} times as fast" in README
    assert f"spends {100 * row(layer, name='the matrix products of both')['ratio']:.0f} % of its time in them" in README


def test_the_table_of_the_model():
    for label, section in (
        ("training step, batch 8", "training"), ("sampling step, batch 8", "sampling"),
        ("one image, 50 steps of DPM-Solver++", "image"),
    ):  # fmt: skip
        ours, bf16, plain, plain_bf16 = rows("sdit.json", section)
        ratios = plain["ratio"], plain["median_s"] / bf16["median_s"], plain_bf16["median_s"] / bf16["median_s"]
        assert f"| {label} | {' | '.join(map(digits, ratios))} |" in README
    kept = [r["saved_per_sample_bytes"] for r in rows("sdit.json", "training")]
    assert f"{100 * kept[0] / kept[2]:.0f} % of the plain form's bytes, {100 * kept[1] / kept[2]:.0f} % under bf16" in README
    plain, ours, bf16 = (
        row(rows("sdit.json", "profile"), name=name, group="matrix products")["percent_of_step"]
        for name in ("plain", "ours", "ours, bf16 autocast")
    )
    assert f"are {plain:.0f} % of a plain fp32 step and {ours:.0f} % of ours ({bf16:.0f} % under bf16)" in README


def test_the_table_of_first_results():
    found = json.loads((RESULTS / "start.json").read_text())["rows"]
    assert len(found) == 16
    for name in {r["name"] for r in found}:
        label = "`torch.compile` of the plain loop of `lif`" if name.startswith("torch") else f"`{name}`"
        seconds = [
            row(found, name=name, state=state)[key]
            for state in ("nothing cached", "compiled before")
            for key in ("forward_s", "forward_and_backward_s")
        ]
        assert f"| {label} | {' | '.join(digits(s).replace('x', ' s') for s in seconds)} |" in README


def measured(name):
    return json.loads((RESULTS / f"fashion_mnist_{name}.json").read_text())


def figures(of):
    return f"{of['frechet_distance']:.3f} | {1000 * of['kid']:.1f} ± {1000 * of['kid_standard_error']:.1f}"


def percent(of):
    return f"{100 * of['label_accuracy']:.1f} %"


def test_the_figures_of_the_model():
    found, slow = measured("dpm"), measured("ddpm")
    assert found["n"] == slow["n"] == 5000 and found["floor"] == slow["floor"]
    for label, of in (
        ("5,000 drawn images, 50 steps of DPM-Solver++", found["drawn"]),
        ("5,000 drawn images, 250 steps of DDPM", slow["drawn"]),
        ("5,000 train images, the floor", found["floor"]),
    ):
        assert f"| {label} | {figures(of)} | {percent(of)} |" in README
    assert f"| all test images | | | {percent(found['test'])} |" in README
    for guidance in ("1", "1.5", "2", "3"):
        of = measured("guidance")[guidance]["drawn"]
        assert f"{guidance}: {of['frechet_distance']:.2f}, {100 * of['label_accuracy']:.0f} %" in README
    lines = (RESULTS / "fashion_mnist_run.jsonl").read_text().splitlines()
    assert min(min(json.loads(line)["rates"].values()) for line in lines) >= 0.03


def test_the_figures_of_the_spiking_form():
    for found in measured("wkv")["rows"]:
        text = "\n".join(found["info"])
        energy = re.search(r"AC where a product is of spikes +([\d.]+) +([\d.]+) +([\d.]+)", text).groups()
        silent, neurons = re.search(r"([\d,]+) of ([\d,]+) neurons fire nowhere", text).groups()
        cells = [f"{found['images_per_s']:.0f}", f"{found['evaluate']['drawn']['frechet_distance']:.3f}"]
        cells += [percent(found["evaluate"]["drawn"]), *energy[:2], f"{energy[2]} mJ", f"{silent} of {neurons}"]
        assert f'| `spiking="{found["spiking"]}"` | {" | ".join(cells)} |' in README
    silent = re.search(r"([\d,]+ of [\d,]+) neurons fire nowhere", "\n".join(measured("wkv")["pretrained"]["info"]))[1]
    assert f"of single neurons {silent} fire nowhere on 512 noisy images" in README
    every, first = measured("wkv")["condition_every"]["evaluate"]["drawn"], measured("wkv")["rows"][0]["evaluate"]["drawn"]
    distances = f"{every['frechet_distance']:.3f} against {first['frechet_distance']:.3f}"
    assert f"Frechet distance {distances}, label accuracy {percent(every)} against {percent(first)}" in README


@pytest.mark.parametrize("file", sorted(p.name for p in RESULTS.iterdir() if p.name != "README.md"))
def test_every_file_is_listed(file):
    text = (RESULTS / "README.md").read_text()
    assert re.search(rf"\[{re.escape(file)}\]\({re.escape(file)}\)[^\n]*`(python perf/|sdit )", text), (
        f"{file} is not listed with its command"
    )
