"""Count phrases that readers stumble over, in README, docs and all Python files: python tests/words.py (make check).

A count may only fall, so a count that differs from its budget in either direction is an error.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = {
    r"\b(that|those) of\b": 0,
    r"\bis no\b": 0,
    r"\bbut for\b": 0,
    r"\bwalks?\sback\b": 0,
    r"\bcomes? along\b": 0,
    r"\blikewise\b": 0,
}


def count():
    files = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    files += [p for folder in ("sdit_kernels", "sdit", "perf", "tests", "examples") for p in (ROOT / folder).rglob("*.py")]
    text = "\n".join(p.read_text() for p in sorted(files) if p.resolve() != Path(__file__).resolve())
    return {phrase: len(re.findall(phrase, text, re.IGNORECASE)) for phrase in BUDGETS}


if __name__ == "__main__":
    wrong = {phrase: n for phrase, n in count().items() if n != BUDGETS[phrase]}
    for phrase, n in wrong.items():
        print(f"{phrase}: {n} times, its budget is {BUDGETS[phrase]}")
    sys.exit(bool(wrong))
