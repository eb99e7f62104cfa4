"""What mkdocs needs to know beyond mkdocs.yml: the files of perf/results, and reStructuredText in docstrings."""

import re
import textwrap
from pathlib import Path

from griffe import Extension
from mkdocs.structure.files import File

RESULTS = Path(__file__).resolve().parents[1] / "perf" / "results"


def on_files(files, config):
    """Add perf/results to the site, so that pages can link to the files behind their figures."""
    for path in sorted(RESULTS.iterdir()):
        files.append(File.generated(config, f"perf/results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links to ../perf/results/FILE lead out of docs/ in the repository, and stay inside the site."""
    return re.sub(r"\]\(\.\./((?:\.\./)*perf/results/)", r"](\1", markdown)


class PlainDocstrings(Extension):
    """Turn the reStructuredText of our docstrings into Markdown: roles, literal blocks, doctests, sections of plain text."""

    def on_instance(self, *, obj, **_):
        if obj.docstring:
            text = re.sub(r":(?:func|class|meth|mod):`([^`]+)`", r"`\1`", obj.docstring.value)
            text = re.sub(r"^( *)::$\n", "", text, flags=re.M)
            text = re.sub(r" ?::$", ":", text, flags=re.M)
            text = re.sub(
                r"^(Returns|Raises|Shape|State):\n((?: {4}.*\n?|\n)+)",
                lambda match: f"**{match[1]}:**\n\n{textwrap.dedent(match[2])}",
                text,
                flags=re.M,
            )
            if obj.is_module:  # doctests outside a section, which Markdown would take for quotations
                text = re.sub(r"^>>> (?:.+\n?)+", lambda match: f"```pycon\n{match[0].rstrip()}\n```\n", text, flags=re.M)
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.M)
