"""The figures in README.md and docs/ equal the figures in perf/results/, and every file there is listed with its command."""

import json
import re
import sys
from pathlib import Path

import pytest

from sdit.checkpoint import load_model

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "perf" / "results"
DOCS = ROOT / "docs"
if not DOCS.is_dir():
    pytest.skip("docs/ is in the repository only, not in the sdist", allow_module_level=True)


def page(path):
    return " ".join(path.read_text().split())


README = page(ROOT / "README.md")
PAGES = {p.relative_to(DOCS).with_suffix("").as_posix(): page(p) for p in DOCS.rglob("*.md")}
PERFORMANCE, SDIT, TRAINING = (PAGES[name] for name in ("performance", "sdit", "training"))


def rows(name, section, run=None):
    """Return the rows of a section of a file, or of one of its runs of gpu_suite.py."""
    found = json.loads((RESULTS / name).read_text())
    if run is not None:
        return found["runs"][run]["parts"][section]["rows"]
    return [r for r in found["rows"] if r["section"] == section]


def row(found, **wanted):
    (one,) = (row for row in found if all(row.get(key) == value for key, value in wanted.items()))
    return one


def digits(x):
    """Round to two digits, as in the tables."""
    return f"{float(f'{x:.2g}'):g}x"


def times(found, peer, key="mode", modes=("inference", "forward+backward")):
    """Return time of the peer / time of ours, measured within each round. Our op is the first contestant."""
    return " | ".join(digits(row(found, name=peer, **{key: mode})["ratio"]) for mode in modes)


def test_the_table_of_the_cpu_equals_the_results():
    peers, rate = rows("lif.json", "peers"), rows("lif.json", "rate")
    for label, found, peer in (
        ("SpikingJelly 2.0.0 `LIFNode` / `lif`", peers, "SpikingJelly LIFNode"),
        ("snnTorch 1.0 `Leaky` / `lif`", peers, "snnTorch Leaky (detached reset)"),
        ("plain PyTorch loop / `lif`", peers, "plain loop"),
        ("`torch.compile` of that loop / `lif`", peers, "torch.compile(plain loop)"),
        ("repeat, SpikingJelly `LIFNode`, mean / `lif_rate`", rate, "repeat, LIFNode, mean"),
    ):
        assert f"| {label} | {times(found, peer)} |" in PERFORMANCE


def test_the_table_of_fused_layers_equals_the_results():
    labels = {
        "cnn_28": "CNN, 28 x 28", "cnn_64": "VGG-like CNN, 64 x 64", "sew_resnet18": "SEW-ResNet18, 32 x 32",
        "spikformer": "Spikformer block",
    }  # fmt: skip
    for section, label in labels.items():
        for T in ("T = 4", "T = 16"):
            ways = ("SpikingJelly", "accelerated", "SpikingJelly, memopt", "fused and packed")
            *others, ours = (row(rows("memory.json", section), name=f"{T}, {way}") for way in ways)
            kept = " | ".join(digits(other["kept_bytes"] / ours["kept_bytes"]) for other in others)
            step = " | ".join(digits(one["ratio"]).removesuffix("x") for one in (ours, others[2]))
            assert f"| {label}, {T} | {kept} | {step} |" in PAGES["fused-layers"]


def test_the_table_of_the_gpu_equals_the_results():
    peers, rate = rows("gpu_h200.json", "lif", 1), rows("gpu_h200.json", "rate", 3)
    for label, found, peer in (
        ("SpikingJelly 2.0.0 `LIFNode`, its Triton kernels / `lif`", peers, "SpikingJelly LIFNode"),
        ("snnTorch 1.0 `Leaky` / `lif`", peers, "snnTorch Leaky (detached reset)"),
        ("plain PyTorch loop / `lif`", peers, "plain loop"),
        ("`torch.compile` of that loop / `lif`", peers, "torch.compile(plain loop)"),
        ("repeat, `LIFNode`, mean / `lif_rate`", rate, "repeat, LIFNode, mean"),
    ):
        assert f"| {label} | {times(found, peer)} |" in PERFORMANCE
    scans = [rows("gpu_h200.json", "wkv", 0), rows("gpu_h200.json", "wkv_backward", 1)]
    for label, peer in (
        ("flash-linear-attention `fused_recurrent_rwkv4` / `wkv`", "flash-linear-attention"),
        ("Heinsen's form, PyTorch / `wkv`", "Heinsen's form"),
    ):  # relative to the algorithm that "auto" chooses at this size
        ratios = [row(found, name=peer)["median_s"] / row(found, name="wkv, chunked")["median_s"] for found in scans]
        assert f"| {label} | {' | '.join(map(digits, ratios))} |" in PERFORMANCE
    mix = times(rows("gpu_h200.json", "mix", 0)[:8], "plain PyTorch", key="pass", modes=("forward", "backward"))
    assert "`token_shift` with norm and three mixes: | other code / op | forward | backward alone |" in PERFORMANCE
    assert f"| plain PyTorch / `token_shift` | {mix} |" in PERFORMANCE
    found = rows("gpu_h200.json", "snn", 0)
    loop = [
        digits(row(found, name="loop", mode=m)["median_s"] / row(found, name="leaky", mode=m)["median_s"])
        for m in ("forward", "forward+backward")
    ]
    assert f"| snnTorch 1.0 `Leaky` in a loop of 25 steps / `leaky` | {' | '.join(loop)} |" in PERFORMANCE


def test_training_steps_on_the_gpu_equal_the_results():
    found = rows("gpu_h200.json", "steps", 0)
    for preset, batch in (("fashion_mnist", 32), ("fashion_mnist", 256), ("cifar10", 256)):
        ours = [row(found, name=f"{preset}, batch {batch}, ours, {dtype}") for dtype in ("bf16", "fp32")]
        cells = [f"{1e3 * r['median_s']:.3g} ms" for r in ours] + [f"{ours[0]['images_per_second']:,.0f}"]
        cells += [f"{r['peak_bytes'] / 2**30:.1f} GiB" for r in ours]
        assert f"| `{preset}`, batch {batch} | {' | '.join(cells)} |" in PERFORMANCE
    plain, ours = (row(found, name=f"fashion_mnist, batch 32, {form}, fp32")["median_s"] for form in ("plain", "ours"))
    assert f"{plain / ours:.0f} times as long" in PERFORMANCE


def published_models():
    """Yield the table rows of the page "Published models": a training step before over after, bytes kept, each neuron layer."""
    found = rows("published_models.json", "published_models")
    for first, second in zip(found, found[1:]):
        if not first["name"].endswith(", training step, fused"):
            continue
        name = first["name"].removesuffix(", training step, fused")
        neurons = [r["times_fused"] for r in found if r["name"].startswith(f"{name}, ") and "times_fused" in r]
        neurons.remove(second["times_fused"])
        saved = second["saved_bytes"] / first["saved_bytes"]
        share = second["neurons_s"] / second["median_s"]
        step = f"{1e3 * second['median_s']:,.0f} ms | {1e3 * first['median_s']:,.0f} ms | {digits(second['times_fused'])}"
        yield f"| {name} | {step} | {digits(saved)} | {share:.0%} | {digits(min(neurons))} to {digits(max(neurons))} |"


def test_the_table_of_published_models_equals_the_results():
    found = list(published_models())
    assert len(found) == 6 and all(row in PAGES["published-models"] for row in found)


def test_the_table_of_originals_equals_the_results():
    found = json.loads((RESULTS / "published_originals.json").read_text())["rows"]
    fused = re.findall(r"\| (\d+) of (\d+) fused \|", PAGES["published-models"])
    assert sorted(fused) == sorted((str(r["fused"]), str(r["neurons"])) for r in found if r["fused"])
    for r in found:  # "equal": outputs identical, gradients to 2e-14, 2e-12 with learned time constants
        bound = 2e-12 if "parametric" in r["name"] else 1e-10 if r["name"].endswith("V2") else 2e-14
        assert r["output_difference"] == 0 and r["grad_difference"] <= bound, r["name"]


def test_sentences_on_vision_rwkv_and_handwritten_neurons_equal_the_results():
    factors = []
    for section in ("vision_rwkv_step", "vision_rwkv_layer"):
        ours, *plain = rows("compat_vision_rwkv.json", section)
        fastest = min(plain, key=lambda r: r["ratio"])
        factors += [fastest["ratio"], fastest["saved_bytes"] / ours["saved_bytes"]]
        factors.append(row(plain, name="plain, loop")["ratio"])
    step, step_bytes, step_loop, layer, layer_bytes, layer_loop = (digits(f)[:-1] for f in factors)
    text = PAGES["vision-rwkv"]
    assert f"{step} times as fast with {step_bytes} times fewer bytes kept for four layers" in text
    assert f"{layer} times as fast with {layer_bytes} times fewer bytes for one spatial mix" in text
    assert f"the factors are {step_loop} and {layer_loop}" in text
    found = rows("compat_handwritten.json", "handwritten_neurons")
    times = [digits(own["times_fused"])[:-1] for own in found[1::2]]
    fewer = [f"{own['saved_bytes'] / fused['saved_bytes']:.0f}" for fused, own in zip(found[::2], found[1::2])]
    sentence = (
        "{} times as fast with a hard reset, with {} times fewer bytes kept; {} times and {} times if the reset is detached"
    )
    assert sentence.format(times[0], fewer[0], times[1], fewer[1]) in PAGES["handwritten"]
    assert f"{times[2]} times with a soft reset" in PAGES["handwritten"]


def other_libraries():
    """Yield (page, table row): time and saved bytes of the library's own code, each divided by ours."""

    def pair(section, fused, own):
        found = rows("compat_snn.json", section)
        fused, own = row(found, name=fused), row(found, name=own)
        ratio = own["times_fused"] if "times_fused" in own else own["ratio"] / fused["ratio"]
        return f"{digits(ratio)} | {digits(own['saved_bytes'] / fused['saved_bytes'])} |"

    own = "SpikingJelly's own"
    for label, name in (
        ("`LIFNode`, 4 steps of (8, 394, 384)", "LIFNode"),
        ("`LIFNode`, one step per call", "LIFNode, single steps"),
        ("`IFNode`", "IFNode"),
        ("`ParametricLIFNode`", "ParametricLIFNode"),
    ):
        yield "spikingjelly", f"| {label} | {pair('jelly_neurons', f'{name}, fused', f'{name}, {own}')}"
    for label, name in (
        ("a spiking CNN, a training step", "spiking CNN"),
        ("a Spikformer block, a training step", "Spikformer block"),
    ):
        step = f"{name}, training step"
        yield "spikingjelly", f"| {label} | {pair('jelly_models', f'{step}, fused', f'{step}, {own}')}"
    unrolled = pair("snn_neurons", "subtract, unroll", "subtract, the loop")
    yield "snntorch", f"| `Leaky`, 25 steps of (128, 1000), `unroll` | {unrolled}"
    looped = pair("snn_neurons", "subtract, accelerated, in the loop", "subtract, the loop")
    yield "snntorch", f"| `Leaky`, accelerated, in the loop | {looped}"
    whole = pair("snn_model", "unrolled", "snnTorch's own")
    yield "snntorch", f"| a network of 784, 1000 and 10 over 25 steps, a training step, unrolled | {whole}"


def test_the_tables_of_other_libraries_equal_the_results():
    for name, line in other_libraries():
        assert line in PAGES[name], line


def test_sentences_on_other_libraries_equal_the_results():
    bandwidth = {r["name"]: r["percent_of_copy"] for r in rows("gpu_h200.json", "bandwidth", 1)}
    lif, rate = bandwidth["lif, T=4"], bandwidth["lif_rate, T=4"]
    assert f"`lif` runs at {lif:.0f} % and `lif_rate` at {rate:.0f} % of the bandwidth of `copy_`" in PERFORMANCE
    share = [r for r in rows("gpu_h200.json", "mix", 0) if (r["name"], r.get("pass")) == ("ours", "backward")][0]
    assert f"of `token_shift` reaches {share['percent_of_copy']:.0f} % of `copy_`" in PERFORMANCE
    sizes = [r for r in rows("gpu_h200.json", "sizes", 0) if (r["name"], r["mode"]) == ("wkv, then lif", "forward+backward")]
    assert [digits(f([1 / r["ratio"] for r in sizes if r["B"] <= 64])) for f in (min, max)] == ["1.2x", "1.4x"]
    assert "1.2 to 1.4 times" in PERFORMANCE and all(abs(r["ratio"] - 1) < 0.03 for r in sizes if r["B"] >= 128)
    one, both = (
        row(rows("gpu_h200.json", "algorithms", 1), B=256, L=1024, name="auto", mode=mode)["gb_per_s"] / 1e3
        for mode in ("forward", "forward+backward")
    )
    assert f"reaches {one:.1f} TB/s forward, {both:.1f} forward and backward" in PERFORMANCE
    goals = json.loads((RESULTS / "wkv.json").read_text())["goals"]
    for text, what in (
        ("{:.0f} times as fast as the eager loop over tokens", "forward, times the eager loop"),
        ("{:.0f} times in forward + backward", "forward + backward, times the eager loop"),
    ):
        value = next(float(re.search(r": ([\d.]+)", goal)[1]) for goal in goals if what in goal)
        assert text.format(value) in PERFORMANCE


def test_sentences_on_rwkv_equal_the_results():
    model, layer = (rows("compat_rwkv.json", section) for section in ("rwkv_step", "rwkv_layer"))
    ours, theirs = (row(model, name=name)["saved_bytes"] for name in ("accelerated", "transformers"))
    assert f"run {row(model, name='transformers')['ratio']:.1f} times as fast" in PAGES["rwkv"]
    assert f"keep {100 * ours / theirs:.0f} % of the bytes" in PAGES["rwkv"]
    assert f"runs {row(layer, name='transformers')['ratio']:.1f} times as fast" in PAGES["rwkv"]
    assert f"spends {100 * row(layer, name='the matrix products of both')['ratio']:.0f} % of its time in them" in PAGES["rwkv"]


def test_the_table_of_the_model_equals_the_results():
    for label, section in (
        ("training step, batch 8", "training"), ("sampling step, batch 8", "sampling"),
        ("one image, 50 steps of DPM-Solver++", "image"),
    ):  # fmt: skip
        ours, bf16, plain, plain_bf16 = rows("sdit.json", section)
        ratios = plain["ratio"], plain["median_s"] / bf16["median_s"], plain_bf16["median_s"] / bf16["median_s"]
        assert f"| {label} | {' | '.join(map(digits, ratios))} |" in PERFORMANCE
    kept = [r["saved_per_sample_bytes"] for r in rows("sdit.json", "training")]
    shares = f"{100 * kept[0] / kept[2]:.0f} % of the plain form's bytes, {100 * kept[1] / kept[2]:.0f} % under bf16 autocast"
    assert f"keeps {shares}" in PERFORMANCE
    plain, ours, bf16 = (
        row(rows("sdit.json", "profile"), name=name, group="matrix products")["percent_of_step"]
        for name in ("plain", "ours", "ours, bf16 autocast")
    )
    assert f"are {plain:.0f} % of a plain fp32 step and {ours:.0f} % of ours ({bf16:.0f} % under bf16)" in PERFORMANCE


def test_the_tables_of_first_calls_equal_the_results():
    found = json.loads((RESULTS / "start.json").read_text())["rows"]
    assert len(found) == 22
    first, later = re.search(r"First process \(compiles\):(.*)Later processes \(cached\):(.*?)##", PERFORMANCE).groups()
    for one in found:
        label = "`torch.compile` of the plain loop of `lif`" if one["name"].startswith("torch") else f"`{one['name']}`"
        seconds = (digits(one[key]).replace("x", " s") for key in ("forward_s", "forward_and_backward_s"))
        assert f"| {label} | {' | '.join(seconds)} |" in (first if one["state"] == "nothing cached" else later)


def test_sentences_on_the_cpu_equal_the_results():
    share = {r["name"]: r["percent_of_copy"] for r in rows("lif.json", "bandwidth")}
    shares = [f"{share[name]:.0f} %" for name in ("lif, T=4", "lif_rate, T=4", "clone")]
    assert "`lif` reaches {} of the bandwidth of `copy_`, `lif_rate` {} and `clone` {}".format(*shares) in PERFORMANCE
    cost = {
        r["name"].removesuffix(", forward with grad"): f"{1e6 * r['median_s']:.0f} us" for r in rows("lif.json", "overhead")
    }
    assert f"takes {cost['lif']} (`lif_rate` {cost['lif_rate']}). A bare `autograd.Function` takes" in PERFORMANCE
    assert f"takes {cost['autograd.Function']} and `LIFNode` {cost['SpikingJelly LIFNode']}" in PERFORMANCE
    kept = {r["name"]: r["saved_over_ideal"] for r in rows("lif.json", "memory")}
    assert kept["lif, T=4"] == kept["lif_rate, T=4"] == 1
    assert f"`LIFNode` keeps {kept['SpikingJelly LIFNode, T=4']:.0f} times as much" in PERFORMANCE
    assert f"keeps {kept['repeat, LIFNode, mean, T=4']:.0f} times as much" in PERFORMANCE
    assert kept["repeat, LIFNode, mean, T=4"] == 12 and "twelve times" in PAGES["memory-and-precision"]
    wkv = rows("wkv.json", "peers")
    assert f"reaches {wkv[0]['percent_of_copy']:.0f} % of the bandwidth of `copy_`" in PERFORMANCE
    error = f"{row(rows('wkv.json', 'accuracy'), name='k ~ N(0, 8)')['serial_error']:.1e}".replace("e-0", "e-")
    assert f"error of `wkv` is {error} over 4,096 tokens" in PERFORMANCE
    assert f"error is {error} over 4,096 tokens" in PAGES["memory-and-precision"]
    ratio = {r["mode"]: r["ratio"] for r in rows("wkv.json", "spiking") if r["name"] == "wkv, then lif"}
    one, both = (f"{ratio[mode]:.1f} times" for mode in ("forward", "forward+backward"))
    assert f"`spiking_wkv` is {one} as fast as `wkv` followed by `lif`, and {both} in forward + backward" in PERFORMANCE
    goals = " ".join(json.loads((RESULTS / "mix.json").read_text())["goals"])

    def goal(what):
        return float(re.search(rf"{what}: ([\d.]+)", goals)[1])

    times = [f"{goal(f'token_shift {way}, times plain PyTorch'):.2g} times" for way in ("forward", "backward")]
    shares = [f"{goal(f'token_shift {way}, share of copy bandwidth'):.0f} %" for way in ("forward", "backward")]
    assert "is {} as fast as plain PyTorch forward and {} backward, at {} and {} of".format(*times, *shares) in PERFORMANCE
    times = [f"{goal(f'relu_squared {way}, times plain PyTorch'):.2g} times" for way in ("forward", "backward")]
    assert "`relu_squared` is {} as fast forward and {} backward".format(*times) in PERFORMANCE


def test_the_table_and_the_picture_of_whole_models_equal_the_results(tmp_path, monkeypatch):
    from perf import plot_models

    table = {
        "spiking CNN": "SpikingJelly's CNN",
        "Spikformer block": "Spikformer block",
        "784-1000-10, 25 steps": "snnTorch, 784-1000-10",
        "RWKV-4, 4 layers": "RWKV-4, 4 layers",
        "SDiT, batch 8": "SDiT, batch 8",
    }
    for label, ways in plot_models.models():
        cells = [
            f"{digits(1 / ways[way][0])} | {digits(1 / ways[way][1])}" if way in ways else "| "
            for way in ("accelerated", "fused and packed")
        ]
        assert f"| {table[label.split(chr(10))[0]]} | {' | '.join(cells).rstrip()} |" in README
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["plot_models.py", "--out", str(tmp_path)])
    plot_models.main()
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in RESULTS.glob("models_*")}


def test_the_tables_of_training_equal_the_results():
    trials, ablation = (
        json.loads((RESULTS / f"sdit_fashion_{name}.json").read_text())["rows"] for name in ("trials", "ablation")
    )

    def mse(found, arm, **wanted):
        return row([r for r in found if "note" not in r], arm=arm, **wanted)

    def cells(*values):
        assert f"| {' | '.join(map(str, values))} |" in TRAINING, values

    start = "bf16=true reconstruction=true"
    for values, settings, arm in (
        ("research code", "research code", "variant=faithful"),
        ("research code", "ours", "variant=faithful settings=improved"),
        ("every layer fires", "research code", "variant=improved settings=faithful"),
        ("every layer fires", "ours", "variant=improved"),
    ):
        found = mse(ablation, f"{start} {arm}")
        cells(values, settings, f"{found['mse']:.3f}", found["dead_neurons"])
    for lr, arm in (("1e-4", "lr=1e-4"), ("1e-3", "variant=improved")):
        found = mse(ablation, f"{start} {arm}")
        cells(lr, 300, f"{found['mse']:.3f}", found["dead_neurons"], "ablation")
    for lr, arm in (("1e-3", ""), ("3e-3", " lr=3e-3"), ("8e-3", " lr=3e-3 lr=8e-3"), ("2e-2", " lr=8e-3 lr=2e-2")):
        found = mse(trials, f"bf16=true{arm}", steps=400)
        cells(lr, 400, f"{found['mse']:.4f}", found["dead_neurons"], "trials")
    base = mse(ablation, f"{start} variant=improved")["mse"]
    others = [mse(ablation, f"{start} {arm}")["mse"] for arm in ("warmup=0", "cosine=false", "clip=0", "ema=0")]
    assert max(abs(m - base) for m in others) < 0.005
    lower = mse(trials, "bf16=true v_threshold=0.3")["mse"]
    assert f"loss {lower:.4f} instead of {mse(trials, 'bf16=true', steps=400)['mse']:.4f}" in TRAINING
    plain = "bf16=true lr=8e-3 flip=false"
    for prediction, scan, arm in (
        ("noise", "by rows", ""), ("noise", "four orders", " scan=four"), ("v", "four orders", " scan=four prediction=v")
    ):  # fmt: skip
        found = mse(trials, plain + arm)
        cells(prediction, scan, *(f"{found[k]:.{n}f}" for k, n in zip(
            ("frechet_distance_guidance_1.5", "label_accuracy_guidance_1.5"), (1, 2))))  # fmt: skip
    rows_, four = (f"{mse(trials, plain + arm)['mse']:.4f}" for arm in ("", " scan=four"))
    assert f"fell from {rows_} to {four}" in TRAINING
    for label, arm, added in (
        ("noise, by rows", "", "condition=every"),
        ("noise, four orders", " scan=four", "condition=every scan=four"),
        ("v, four orders", " scan=four prediction=v", "condition=every scan=four prediction=v"),
    ):
        loud = row([r for r in trials if "note" in r], arm=f"{plain} {added}")["mse"]
        cells(label, f"{mse(trials, plain + arm)['mse']:.4f}", f"{loud:.4f}")
    for alpha, arm in ((1, " alpha=1"), (2, ""), (4, " alpha=4")):
        found = mse(trials, f"bf16=true lr=8e-3{arm}", steps=500)
        distance = f"{found['frechet_distance_guidance_1.5']:.1f}"
        cells(alpha, f"{found['mse']:.4f}", distance, found["dead_neurons"])
    with_tokens = mse(trials, "bf16=true lr=8e-3", steps=792)["mse"]
    without_tokens = mse(trials, "bf16=true lr=8e-3 reconstruction=false", steps=1632)["mse"]
    cells("reconstruction tokens, half of a step's time", f"{without_tokens:.4f}", f"{with_tokens:.4f}", "150 s")
    for label, arm, steps in (
        ("192 channels instead of 128", "dim=192", 404),
        ("patches of 2 instead of 4, batch 32", "patch_size=2 batch_size=32", 427),
    ):
        cells(label, f"{with_tokens:.4f}", f"{mse(trials, f'bf16=true lr=8e-3 {arm}', steps=steps)['mse']:.4f}", "150 s")
    four_steps, eight = (mse(trials, f"bf16=true lr=3e-3{arm}", steps=400)["mse"] for arm in ("", " T=8"))
    cells("more simulation steps, T = 8 instead of 4", f"{four_steps:.4f}", f"{eight:.4f}", "400 steps")


def test_the_table_of_spikes_equals_the_results(tmp_path):
    found = json.loads((RESULTS / "spike_information.json").read_text())["rows"]
    equal_steps = [r for r in found if "wanted_cpu_seconds" not in r]

    def mean(rows_, key):
        return sum(r[key] for r in rows_) / len(rows_)

    by_arm = {arm: [r for r in equal_steps if r["arm"] == arm] for arm in sorted({r["arm"] for r in equal_steps})}
    groups = list(by_arm.items()) + [(r["arm"], [r]) for r in found if "wanted_cpu_seconds" in r]
    for arm, rows_ in groups:
        label = arm.partition("+")[0].replace("binary", "binary, T = 4")
        label += ", a factor per step" * ("scale" in arm) + ", fixed threshold" * ("learnt" not in arm)
        label += f", {rows_[0]['steps']:,} steps" if "wanted_cpu_seconds" in rows_[0] else ""
        values = len(rows_), *(f"{mean(rows_, key):.2f}" for key in ("mean_error", "mean_information"))
        values += f"{mean(rows_, 'mse'):.4f}", f"{mean(rows_, 'frechet_distance'):.2f}"
        values += f"{100 * mean(rows_, 'label_accuracy'):.0f} %", f"{mean(rows_, 'cpu_seconds') / 60:.0f} min"
        assert f"| {label} | {' | '.join(map(str, values))} |" in TRAINING, (label, values)
    first = [f"{sum(r['mse_by_time'][0] for r in by_arm[arm]) / 3:.3f}" for arm in ("-4..4+learnt", "0..4+learnt")]
    assert "the loss is {} with -4..4 against {} with 0..4".format(*first) in TRAINING
    (small,) = by_arm["-1..1+learnt"]
    assert small["mse"] == max(r["mse"] for r in equal_steps)
    for r in by_arm["0..4+learnt"]:
        assert small["mean_error"] < r["mean_error"] and small["mean_information"] > r["mean_information"]
    learnt, fixed = mean(by_arm["-4..4+learnt"], "mse"), mean(by_arm["-4..4"], "mse")
    assert f"the loss is {fixed - learnt:.3f} higher" in TRAINING
    hidden = [n["error"] for r in by_arm["-4..4+learnt"] for name, n in r["neurons"].items() if "hidden" in name]
    assert f"their error is {sum(hidden) / len(hidden):.2f} with -4..4" in TRAINING
    best = max(r["mse"] for r in by_arm["-4..4+learnt"])
    assert best < min(r["mse"] for arm in ("0..4+learnt", "binary+learnt") for r in by_arm[arm])
    pytest.importorskip("matplotlib")
    from perf import spike_information

    spike_information.plot(tmp_path / "chart.png", found)
    assert (tmp_path / "chart.png").stat().st_size > 10_000


def label_of_trial(r):
    """Return the first cell of a row of the table of trials of fashion_pure."""
    words = dict(word.split("=") for word in r["arm"].split()[1:])
    if "averages" in words:
        return {0.999: "no change", 0: "trained weights, no average"}.get(r["ema"], f"average with decay {r['ema']:g}")
    if "batch_size" in words:
        return f"batch {words['batch_size']}, {r['steps']:,} steps, learning rate {words.get('lr', '5e-3')}"
    if "times" in words:
        kind, number = words["times"].split(":")
        label = f"times 1000 u^{number}" if kind == "power" else f"logit-normal times, mean {number}"
        return f"{label}, seed {words['seed']}" if "seed" in words else label
    return {"keys": "keys normalised", "keys_learnt": "keys normalised, a learnt factor per channel"}[words["norm"]]


def test_the_table_of_trials_of_the_pure_model_equals_the_results():
    found = json.loads((RESULTS / "sdit_fashion_pure_trials.json").read_text())["rows"]
    table = TRAINING.partition("## Train more at the times between noise and image")[2].partition("## ")[0]
    assert table.count(" s |") == len(found)  # CPU times
    for r in found:
        values = f"{r['mse']:.4f}", *(f"{r[f'frechet_distance_guidance_{g}']:.2f}" for g in ("1", "1.5"))
        values += *(f"{100 * r[f'label_accuracy_guidance_{g}']:.0f} %" for g in ("1", "1.5")), f"{r['cpu_seconds']:.0f} s"
        assert f"| {label_of_trial(r)} | {' | '.join(values)} |" in table
        assert r["steps"] * r["batch_size"] == 3000 * 64
    averages = {r["ema"]: {k: v for k, v in r.items() if k not in ("ema", "date")} for r in found if "averages" in r["arm"]}
    assert averages[0.999] == averages[0.9995]  # "give the same model"
    others = [r for r in found if "times" not in r["arm"]]
    assert max(r["mse"] for r in found) - min(r["mse"] for r in found) < 0.002  # "by less than 0.002"
    for guidance in ("1", "1.5"):
        key = f"frechet_distance_guidance_{guidance}"
        best = min(r[key] for r in others)
        assert all(r[key] < best for r in found if r not in others)
        assert max(others, key=lambda r: r[key])["batch_size"] == 128
    logit_normal, base = (
        row(found, arm=f"bf16=true {arm}", ema=0.999) for arm in ("times=logit_normal:-1", "averages=0,0.99,0.9995")
    )
    small, large = row(found, batch_size=32), row(found, batch_size=128)
    assert small["cpu_seconds"] > base["cpu_seconds"]
    assert f"half of the steps | {base['mse']:.4f} | {large['mse']:.4f} | 192,000 images |" in TRAINING
    rises = [a > b for a, b in zip(logit_normal["mse_by_time"], base["mse_by_time"])]
    assert rises == [True, *[False] * 5, True, True]  # "below 125 and above 750"
    spikes = json.loads((RESULTS / "spike_information.json").read_text())["rows"]
    distances = [r["frechet_distance"] for r in spikes if r["arm"] == "-4..4+learnt"]
    seeds = [row(found, arm=f"bf16=true times=logit_normal:-1{words}") for words in ("", " seed=1")]
    pairs = [(before, r["frechet_distance_guidance_1"]) for before, r in zip(distances, seeds)]
    assert "from {:.2f} to {:.2f}, and from {:.2f} to {:.2f} with seed 1".format(*pairs[0], *pairs[1]) in TRAINING
    assert f'three seeds of "no change" are within {max(distances) - min(distances):.2f}' in TRAINING


def test_sentences_on_training_equal_the_results():
    found = json.loads((RESULTS / "sdit_fashion_trials.json").read_text())

    def trial(arm, steps=500, note=False):
        return row([r for r in found["rows"] if ("note" in r) == note], arm=f"bf16=true lr=8e-3{arm}", steps=steps)

    def quality(r, guidance=1.5):
        return f"{r[f'frechet_distance_guidance_{guidance}']:.1f}", f"{r[f'label_accuracy_guidance_{guidance}']:.2f}"

    none, both, wide, deep = (trial(arm) for arm in ("", " bidirectional=true", " dim=192", " depth=6"))
    assert f"it was worse: {both['mse']:.4f} against {none['mse']:.4f}" in TRAINING
    early = trial(" bidirectional=true", 400)["mse"], row(found["rows"], arm="bf16=true lr=3e-3 lr=8e-3")["mse"]
    assert "{:.4f} against {:.4f} after 400 steps".format(*early) in TRAINING
    seconds = trial(" alpha=1")["cpu_seconds"]  # other processes slowed down the run without a change
    more = [f"{r['cpu_seconds'] / seconds:.1f} times the time" for r in (wide, deep)]
    assert f"(Frechet distance {quality(wide)[0]} against {quality(none)[0]}) at {more[0]}" in TRAINING
    assert f"depth 6 ({quality(deep)[0]}) at {more[1]}" in TRAINING
    loud = " flip=false condition=every scan=four prediction="
    flow, v = trial(f"{loud}flow learn_sigma=false", note=True), trial(f"{loud}v", note=True)
    assert "worse than v: {} and {} against {} and {}".format(*quality(flow), *quality(v)) in TRAINING
    (distance, label), (before, label_before) = quality(trial(" weighting=min_snr")), quality(none)
    words = f"({distance} instead of {before}) and also the label accuracy ({label} instead of {label_before})"
    assert words in TRAINING
    assert f"Normalised first, it helped: {trial(' condition=every')['mse']:.4f} instead of {none['mse']:.4f}" in TRAINING
    real, mirrored = found["frechet_distance_train"], found["frechet_distance_train_half_mirrored"]
    assert f"{real:g} from the test images. With half of them mirrored it is {mirrored:g}" in TRAINING
    assert f"500 real images reach {real:g} and {found['label_accuracy_train']:g}" in TRAINING


def test_marks_of_figures_name_existing_files():
    for path in (ROOT / "README.md", *DOCS.rglob("*.md")):
        text = path.read_text()
        marks = re.findall(r"<!-- figures: (\S+) -->", text)
        assert all((ROOT / mark).exists() for mark in marks) and text.count("<!-- end of figures -->") == len(marks), path


def measured(name):
    return json.loads((RESULTS / f"fashion_mnist_{name}.json").read_text())


def figures(of):
    return f"{of['frechet_distance']:.3f} | {1000 * of['kid']:.1f} ± {1000 * of['kid_standard_error']:.1f}"


def percent(of):
    return f"{100 * of['label_accuracy']:.1f} %"


def find_rows(n=5000):
    """Return the rows of the figures of the included models with so many images."""
    return [row for row in json.loads((RESULTS / "fashion_mnist_pictures.json").read_text())["rows"] if row["n"] == n]


def cells_of_sampling(row):
    """Return steps, guidance and noise scale."""
    steps = f"{row['steps']}" + ("" if row["sampler"] == "dpm++" else f", {row['sampler'].upper()}")
    interval = row["guidance_interval"]
    guidance = f"{row['guidance']:g}" + ("" if interval is None else f" at {interval[0]:g} to {interval[1]:g}")
    return f"{steps} | {guidance} | {row['noise_scale']:g}"


def settings_of(row):
    return [row[key] for key in ("seed", "sampler", "steps", "guidance", "guidance_interval", "noise_scale")]


def cells_of(of):
    measures = [f"{of[key]:.2f}" for key in ("precision", "recall")]
    return f"{of['frechet_distance']:.3f} | {1000 * of['kid']:.1f} | {' | '.join(measures)} | {percent(of)}"


def test_figures_of_the_models_equal_the_results():
    rows = find_rows()
    for row in rows:
        energy = " / ".join(f"{row['energy_mj'][kind]:.2g}" for kind in ("arithmetic", "with_memory", "quantised"))
        line = f"| {row['model']} | {cells_of_sampling(row)} | {cells_of(row['drawn'])} | {energy} |"
        assert line in SDIT, line
    assert f"| 5,000 real images | | | | {cells_of(rows[0]['floor'])} | |" in SDIT
    assert SDIT.count("| hybrid | ") + SDIT.count("| pure | ") == len(rows)
    recommended = {name: load_model(f"pretrained-{name}").recommended for name in ("hybrid", "pure")}
    shown = {
        row["model"]: row
        for row in rows
        if (row["sampler"], row["steps"]) == ("dpm++", 20)
        and recommended[row["model"]] == {key: row[key] for key in recommended[row["model"]]}
    }
    assert set(shown) == {"hybrid", "pure"}
    for title, name in (("5,000 drawn images, 20 steps of DPM-Solver++", "pure"), ("the same, `pretrained-hybrid`", "hybrid")):
        of = shown[name]["drawn"]
        assert f"| {title} | {figures(of)} | {percent(of)} |" in README
    floor = rows[0]["floor"]
    assert f"| 5,000 real images, for comparison | {figures(floor)} | {percent(floor)} |" in README
    for name, total in (("hybrid", "1,280"), ("pure", "5,248")):
        text = (RESULTS / f"fashion_mnist_{name}_info.txt").read_text()
        silent = re.search(r"([\d,]+) of ([\d,]+) neurons fire nowhere", text).groups()
        assert silent[1] == total and f"{silent[0]} of {total}" in SDIT


def test_figures_of_sampling_equal_the_results():
    """The tables of 1,000 images, and the sentences on DDPM and on the models before their last steps."""
    lines, distances = set(), {}
    rows_of_times = [row for row in find_rows(1000) if "logit-normal" in row["model"] and row["noise_scale"] == 1.02]
    assert len(rows_of_times) == 6
    for row in find_rows(1000):
        of = row["drawn"]
        cells = f"{of['frechet_distance']:.3f} | {of['recall']:.2f} | {percent(of)}"
        if row["seed"] == 1:
            lines.add(f"| {row['model']} | {' | '.join(cells_of_sampling(row).split(' | ')[1:])} | {cells} |")
        distances[row["model"], row["sampler"], row["seed"]] = f"{of['frechet_distance']:.3f}"
    shown = sum(line in TRAINING for line in lines)
    assert shown == TRAINING.count("| pure | ") + TRAINING.count("| hybrid | ") >= 8
    for model in ("pure", "hybrid"):
        log = [json.loads(line) for line in (RESULTS / f"fashion_mnist_{model}_run.jsonl").read_text().splitlines()]
        losses = {at: [row["loss"] for row in log if at - 1000 < row["step"] <= at] for at in (24_000, 40_000)}
        before, after = (f"{sum(values) / len(values):.4f}" for values in losses.values())
        assert f"from {before} to {after} (`{model}`)" in TRAINING
    for row in rows_of_times:
        name = row["model"].partition(",")[0]
        (same,) = (other for other in find_rows(1000) if other["model"] == name and settings_of(other) == settings_of(row))
        guidance = cells_of_sampling(row).split(" | ")[1]
        shown = (f"{of['drawn']['frechet_distance']:.3f}" for of in (same, row))
        assert f"| {name}, {guidance} | {' | '.join(shown)} |" in TRAINING
        if row["guidance"] == 1:
            assert f"from {percent(same['drawn'])} to {percent(row['drawn'])} (`{name}`)" in TRAINING
    log_snr, time = sorted(f"{row['drawn']['frechet_distance']:.3f}" for row in find_rows(1000) if "spacing" in row)
    assert f"from {time} to {log_snr}" in TRAINING
    for model in ("pure", "hybrid"):
        assert f"{distances[f'{model}, 24,000 steps', 'dpm++', 1]} with `{model}`" in TRAINING
        assert f"{distances[model, 'ddpm', 0]} with `{model}`" in SDIT


def test_figures_of_the_spiking_form_equal_the_results():
    for found in measured("wkv")["rows"]:
        text = "\n".join(found["info"])
        energy = re.search(r"AC where a product is of spikes +([\d.]+) +([\d.]+) +([\d.]+)", text).groups()
        silent, neurons = re.search(r"([\d,]+) of ([\d,]+) neurons fire nowhere", text).groups()
        cells = [f"{found['images_per_s']:.0f}", f"{found['evaluate']['drawn']['frechet_distance']:.3f}"]
        cells += [percent(found["evaluate"]["drawn"]), *energy[:2], f"{energy[2]} mJ", f"{silent} of {neurons}"]
        assert f'| `spiking="{found["spiking"]}"` | {" | ".join(cells)} |' in SDIT
    (energy,) = re.findall(r"every product a MAC.* ([\d.]+)$", "\n".join(measured("wkv")["rows"][1]["info"]), re.M)
    assert f"would take {energy} mJ" in SDIT
    every, first = measured("wkv")["condition_every"]["evaluate"]["drawn"], measured("wkv")["rows"][0]["evaluate"]["drawn"]
    distances = f"{every['frechet_distance']:.3f} against {first['frechet_distance']:.3f}"
    assert f"Frechet distance {distances}, label accuracy {percent(every)} against {percent(first)}" in TRAINING


@pytest.mark.parametrize("file", sorted(p.name for p in RESULTS.iterdir() if p.name != "README.md"))
def test_every_file_is_listed_with_its_command(file):
    text = (RESULTS / "README.md").read_text()
    command = "none" if file == "published_originals.json" else "(python perf/|sdit )"  # other projects' files are not here
    assert re.search(rf"\[{re.escape(file)}\]\({re.escape(file)}\)[^\n]*`{command}", text), (
        f"{file} is not listed with its command"
    )
