"""README.md and docs/: their Python blocks run, their commands and links exist, and the README stays short.

The blocks of one page share one namespace, in order. A comment before a block says what it needs:

    <!-- no run: needs a GPU -->     Python is only compiled, and shell is only checked by bash -n
    <!-- needs: snntorch -->         the block runs if that module is installed
"""

import dataclasses
import importlib.util
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from words import BUDGETS

import sdit_kernels

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
if not DOCS.is_dir():
    pytest.skip("docs/ is in the repository only, not in the sdist", allow_module_level=True)
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
# replacements in blocks that would run for minutes
SMALLER = {"steps=200": "steps=2", 'sampler="ddim", ': 'sampler="ddim", steps=2, '}


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str
    mark: str  # the comment before the block: "no run" or "needs"
    reason: str


FENCE = re.compile(r"(?:<!-- (no run|needs): (.+?) -->\n)?```(\w*)\n(.*?)^```$", re.M | re.S)


def blocks(page):
    text = page.read_text()
    assert text.count("```") == 2 * len(FENCE.findall(text)), f"{page}: a fence is not closed"
    for match in FENCE.finditer(text):
        mark, reason, language, code = match.groups()
        yield Block(page, text[: match.start(4)].count("\n"), language, code, mark or "", reason or "")


BLOCKS = [block for page in PAGES for block in blocks(page)]


def test_python_blocks_run_unless_a_comment_says_why():
    assert {block.language for block in BLOCKS} <= {"python", "bash", "text"}
    assert sum(block.language == "python" for block in BLOCKS) > 25
    unrun = [block for block in BLOCKS if block.mark == "no run" and block.language == "python"]
    assert len(unrun) <= 3, [(block.page.name, block.line) for block in unrun]  # the README's section "your model, one line"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    from sdit import PRESETS

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS, "digits", dataclasses.replace(PRESETS["digits"], dim=32, depth=2))
    namespace, missing = {"__name__": "docs"}, []
    for block in (b for b in BLOCKS if b.page == page and b.language == "python"):
        text = block.text
        for long, short in SMALLER.items():
            text = text.replace(long, short)
        code = compile("\n" * block.line + text, str(page), "exec")
        if block.mark == "needs" and importlib.util.find_spec(block.reason) is None:
            missing.append(block.reason)
        elif block.mark != "no run":
            exec(code, namespace)
    if missing:
        pytest.skip(f"not installed (make peers): {', '.join(missing)}")


@pytest.mark.process
@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_parses_every_shell_block():
    for block in BLOCKS:
        if block.language == "bash":
            done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
            assert done.returncode == 0, f"{block.page}:{block.line}: {done.stderr}"


def commands():
    """Yield (block, words) of every command, without comments and variables."""
    for block in BLOCKS:
        if block.language == "bash":
            for line in block.text.replace("\\\n", " ").splitlines():
                for part in " ".join(map(shlex.quote, shlex.split(line, comments=True))).split(" '&&' "):
                    words = shlex.split(part)
                    while words and re.match(r"[A-Z_]+=", words[0]):
                        words = words[1:]
                    if words:
                        yield block, words


def is_target(words):
    targets = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    return all(word in targets for word in words if "=" not in word)


def is_installable(words):
    extras = set(re.findall(r'^        "(\w+)": \[', (ROOT / "setup.py").read_text(), re.M))
    (what,) = (word for word in words[1:] if not word.startswith("-"))
    name, bracket, asked = what.partition("[")
    return words[0] == "install" and name == "." and (not bracket or set(asked.rstrip("]").split(",")) <= extras)


def is_script(words):
    path = ROOT / words[0]
    shared = ("perf/harness.py", "perf/compile/report.py")
    text = "".join((ROOT / name).read_text() for name in (words[0], *shared)) if path.exists() else ""
    return path.exists() and all(f'"{word}"' in text for word in words[1:] if word.startswith("--"))


def sdit_parses(words):
    from sdit.cli import make_parser

    return make_parser().parse_args(words)


def test_every_command_is_valid():
    known = 0
    for block, words in commands():
        where = f"{block.page.name}:{block.line}: {shlex.join(words)}"
        if words[0] == "sdit":
            assert sdit_parses(words[1:]), where
        elif words[0] == "torchrun":
            assert words[3:5] == ["-m", "sdit"] and sdit_parses(words[5:]), where
        elif words[0] == "make":
            assert is_target(words[1:]), where
        elif words[0] == "pip":
            assert is_installable(words[1:]), where
        elif words[:2] == ["python", "-m"]:
            # the second runs a user's script; test_compat_clock_driven.py and test_neuron.py run the last two
            starts = ["sdit_kernels"], ["sdit_kernels.compat", "train.py"], ["sdit_kernels.neuron", "lif"]
            assert any(words[2:4] == start for start in starts), where
        elif words[0] == "python":
            assert is_script(words[1:]), where
        else:
            assert block.mark == "no run", f"{where}: no check for this command"
        known += 1
    assert known > 40


def test_the_readmes_first_command_draws_samples(tmp_path, capsys):
    """It runs with one image and two steps."""
    from sdit.cli import main

    words = next(words for block, words in commands() if block.page == PAGES[0] and words[:2] == ["sdit", "sample"])
    out = tmp_path / "samples.png"
    assert main([*words[1:], "-n", "1", "--steps", "2", "--no-gif", "--out", str(out)]) == 0
    assert out.exists() and "1 image" in capsys.readouterr().out


def test_the_readme_is_short():
    text = PAGES[0].read_text()
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1200


def slug(heading):
    """Return the anchor of a heading, as mkdocs and repository hosts make it."""
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.strip().lower()))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_existing_files_and_headings(page):
    """`make docs` checks the same with mkdocs, if mkdocs is installed."""
    text = FENCE.sub("", page.read_text())
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for link in links:
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {link}"
            if target.suffix == ".md" and anchor:
                assert anchor in map(slug, re.findall(r"^#+ (.+)$", target.read_text(), re.M)), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_named_in_the_text_exist(page):
    for path in re.findall(r"`((?:sdit_kernels|sdit|tests|perf|examples|docs)/[\w./-]+)`", page.read_text()):
        assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_every_page_is_in_the_navigation():
    navigation = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(navigation) == sorted([p.relative_to(DOCS).as_posix() for p in PAGES[1:]] + ["perf/results/README.md"])


def test_every_public_name_is_in_the_api_reference():
    import sdit_kernels.energy
    import sdit_kernels.nn

    listed = set(re.findall(r"^::: ([\w.]+)$", "\n".join(p.read_text() for p in (DOCS / "api").glob("*.md")), re.M))
    ops = {f"sdit_kernels.{name}" for name in sdit_kernels.__all__ if callable(getattr(sdit_kernels, name))}
    modules = {f"sdit_kernels.nn.{name}" for name in sdit_kernels.nn.__all__}
    drop_ins = ("clock_driven", "handwritten", "install", "rwkv", "snntorch", "spikingjelly", "uninstall", "vision_rwkv")
    libraries = {f"sdit_kernels.compat.{name}" for name in drop_ins}
    counting = {f"sdit_kernels.energy.{name}" for name in sdit_kernels.energy.__all__}
    own = {"sdit_kernels.own.define", "sdit_kernels.own.Op"}  # users import sdit_kernels.neuron.define
    assert listed == ops | modules | counting | libraries | own


def test_the_tables_list_all_surrogates_and_ops():
    text = (DOCS / "ops" / "lif.md").read_text()
    for name, surrogate in sdit_kernels.SURROGATES.items():
        formula = surrogate.formula.replace("|", "\\|")
        assert f"| `{name}` | {formula} | {surrogate.alpha:g} |" in text
    ops = [name for name in sdit_kernels.__all__ if name.islower() and not re.search("_$|state|^backend$|surrogate", name)]
    for page in (PAGES[0], DOCS / "ops" / "index.md"):
        assert all(f"| [`{op}`](" in page.read_text() for op in ops), page


def test_the_citation_has_the_version():
    text = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {sdit_kernels.__version__}\n" in text and "arXiv:2402.11588" in text


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_pages_avoid_listed_words(page):
    text = FENCE.sub("", page.read_text())
    found = [match.group() for phrase in BUDGETS for match in re.finditer(phrase, text)]
    assert not found, f"{page.name}: {found}"
