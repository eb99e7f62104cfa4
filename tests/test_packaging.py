"""The wheel and the sdist: their contents, and that the wheel works with only its required packages installed."""

import email
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import sdit_kernels

ROOT = Path(__file__).resolve().parents[1]
FILES = ("setup.py", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "Makefile")
FOLDERS = ("sdit_kernels", "sdit", "tests", "perf", "examples")


def run(command, cwd, **environment):
    """Run a command without the environment variables of the tests, which would point into the checkout."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TRITON", "SDIT", "NUMBA"))}
    done = subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def sources(folder):
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    return folder


def build(folder, what):
    """Call what `python -m build` calls, in this environment."""
    out = folder / "dist"
    code = f"import setuptools.build_meta as b; print('>', b.build_{what}({str(out)!r}))"
    return out / run([sys.executable, "-c", code], folder).splitlines()[-1].removeprefix("> ")


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("RECORD")}


def metadata(wheel):
    (text,) = (text for name, text in contents(wheel).items() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(text)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return (the wheel, the sdist)."""
    version = importlib.metadata.version("setuptools") if importlib.util.find_spec("setuptools") else "0"
    if int(version.split(".")[0]) < 77:
        pytest.skip(f"building needs setuptools 77 or later, found {version}")
    folder = sources(tmp_path_factory.mktemp("sources"))
    return build(folder, "wheel"), build(folder, "sdist")


def test_the_wheel_has_every_module_and_nothing_else(built):
    found = {name for name in contents(built[0]) if ".dist-info/" not in name}
    files = {p.relative_to(ROOT).as_posix() for folder in FOLDERS[:2] for p in (ROOT / folder).rglob("*") if p.is_file()}
    assert found == {name for name in files if not re.search(r"__pycache__|\.(nb[ic]|pyc)$", name)}
    assert {"sdit/py.typed", "sdit_kernels/py.typed"} <= found


def test_the_metadata_for_a_package_index_is_complete(built):
    told = metadata(built[0])
    assert told["Version"] == sdit_kernels.__version__ and f"## {told['Version']}" in (ROOT / "CHANGELOG.md").read_text()
    assert told["License-Expression"] == "Apache-2.0" and told.get_all("License-File") == ["LICENSE"]
    classifiers = told.get_all("Classifier")
    least = re.search(r"3\.(\d+)", told["Requires-Python"])[1]
    assert f"Programming Language :: Python :: 3.{least}" in classifiers
    assert {"Operating System :: OS Independent", "Typing :: Typed"} <= set(classifiers)
    assert any(Requirement(line).name == "mypy" and Requirement(line).specifier for line in told.get_all("Requires-Dist"))


LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def test_links_of_the_readme_work_on_a_package_index(built, tmp_path):
    """Relative links do not work there. They become plain text, or full addresses if REPOSITORY is set in setup.py."""
    links = [link for link in LINK.findall((ROOT / "README.md").read_text()) if "://" not in link and link[0] != "#"]
    assert len(links) > 20  # tests/test_docs.py follows them
    text = metadata(built[0]).get_payload()
    assert "| [`lif`]" not in text and "| `lif` |" in text and "](perf" not in text and "<picture>" not in text
    assert all("://" in link or link[0] == "#" for link in LINK.findall(text))
    folder = sources(tmp_path)
    setup = (folder / "setup.py").read_text()
    (folder / "setup.py").write_text(setup.replace('REPOSITORY = ""', 'REPOSITORY = "https://example.org/us/it"'))
    told = metadata(build(folder, "wheel"))
    at = f"https://example.org/us/it/blob/v{sdit_kernels.__version__}"
    text = told.get_payload()
    # the second address is for images
    assert f"[`lif`]({at}/docs/ops/lif.md)" in text and "](https://example.org/us/it/raw/v" in text
    assert {link.startswith(at.replace("blob", "raw")) for link in re.findall(r'(?:src|srcset)="([^"]+)"', text)} == {True}
    assert f"Changes, {at}/CHANGELOG.md" in told.get_all("Project-URL")


def test_the_sdist_builds_the_same_wheel_and_has_the_tests(built, tmp_path):
    with tarfile.open(built[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    with_them = "tests/conftest.py", "tests/native_triton/__init__.py", "perf/harness.py", "examples/rwkv_text.py"
    for name in (*with_them, "Makefile", "CHANGELOG.md"):
        assert (folder / name).exists(), name
    assert not [*folder.rglob("*.pyc"), *folder.rglob("*.nb[ic]")]
    again = build(folder, "wheel")
    assert again.name == built[0].name and contents(again) == contents(built[0])


def requirements(name, seen):
    """Add a distribution and all packages it requires here to ``seen``, without extras."""
    if name in seen or name == "triton":
        return seen
    seen.add(name)
    for line in importlib.metadata.requires(name) or ():
        needed = Requirement(line)
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            requirements(re.sub(r"[-_.]+", "-", needed.name).lower(), seen)
    return seen


CODE = """
import importlib.util, json, torch, sdit, sdit_kernels
from sdit_kernels.compat import rwkv
x = torch.full((2, 3, 4), 2.0, requires_grad=True)
sdit_kernels.lif(x).sum().backward()
w, k = torch.zeros(4), torch.zeros(1, 3, 4)
print(json.dumps([
    [name for name in ("triton", "diffusers", "pytest", "hypothesis") if importlib.util.find_spec(name)],
    sdit_kernels.__file__, sdit.__file__, x.grad.shape, sdit_kernels.wkv(w, w, k, k + 1).sum().item(),
    rwkv.RUN_CUDA(1, 3, 4, w, w, k, k + 1).sum().item(),
]))
"""


def test_the_wheel_works_with_only_its_requirements(built, tmp_path):
    """Create an environment with this wheel and links to the packages it requires, without triton.

    Copies would take gigabytes.
    """
    venv.create(tmp_path / "venv", symlinks=True, with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path).strip())
    wanted = set()
    for line in metadata(built[0]).get_all("Requires-Dist"):
        if Requirement(line).marker is None:
            requirements(Requirement(line).name, wanted)
    assert {"torch", "numpy", "numba", "llvmlite"} <= wanted
    for name in wanted:
        for file in importlib.metadata.files(name):
            top = site / file.parts[0]
            if file.parts[0] not in ("..", "__pycache__") and not top.exists():
                top.symlink_to(Path(importlib.metadata.distribution(name).locate_file(file.parts[0])).resolve())
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    run([*pip, str(built[0])], tmp_path)
    absent, ours, sdit, shape, wkv, same = json.loads(run([str(python), "-c", CODE], tmp_path).splitlines()[-1])
    assert absent == [] and ours.startswith(str(site)) and sdit.startswith(str(site))
    assert (shape, wkv, same) == ([2, 3, 4], 12.0, 12.0)
    text = run([str(tmp_path / "venv" / "bin" / "sdit"), "--help"], tmp_path)
    assert "usage: sdit" in text and "train" in text
    assert "torch " in run([str(python), "-m", "sdit_kernels"], tmp_path)
