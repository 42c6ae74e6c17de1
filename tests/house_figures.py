"""Figures of the house, of any commits side by side: how many rooms, how large, and how much is refused in them.

    python tests/house_figures.py                 # of what is checked out
    python tests/house_figures.py c2fd231 HEAD

A module is a Python file of the package. Lines are all of its lines. An error class is one whose name ends so, or that
of one of its bases.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "peft_layerrope"
SMALL = 66
GOALS = {
    "modules": 80,
    "lines": 15_500,
    f"files of {SMALL} lines or fewer": 8,
    "raise statements": 280,
    "error classes": 7,
}


def sources(commit: str | None) -> list[str]:
    """The text of each module, at a commit or as it lies here."""
    if commit is None:
        return [path.read_text(encoding="utf-8") for path in sorted((ROOT / PACKAGE).rglob("*.py"))]
    listed = _git("ls-tree", "-r", "--name-only", commit, PACKAGE).splitlines()
    return [_git("show", f"{commit}:{name}") for name in listed if name.endswith(".py")]


def figures(texts: Iterable[str]) -> dict[str, int]:
    """Counts what `GOALS` has goals for."""
    texts = list(texts)
    lengths = [text.count("\n") for text in texts]
    nodes = [node for text in texts for node in ast.walk(ast.parse(text))]
    return {
        "modules": len(texts),
        "lines": sum(lengths),
        f"files of {SMALL} lines or fewer": sum(length <= SMALL for length in lengths),
        "raise statements": sum(isinstance(node, ast.Raise) for node in nodes),
        "error classes": sum(isinstance(node, ast.ClassDef) and _is_error(node) for node in nodes),
    }


def _is_error(node: ast.ClassDef) -> bool:
    names = [node.name, *(ast.unparse(base) for base in node.bases)]
    return any(name.endswith(("Error", "Exception")) for name in names)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", ROOT, *arguments], check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Prints the table as Markdown."""
    commits: list[str | None] = list(sys.argv[1:]) or [None]
    found = [figures(sources(commit)) for commit in commits]
    print("| measure |", " | ".join(commit or "here" for commit in commits), "| goal |")
    print("| --- |", " ---: |" * (len(commits) + 1))
    for name, goal in GOALS.items():
        print(f"| {name} |", " | ".join(f"{one[name]:,}" for one in found), f"| {goal:,} |")


if __name__ == "__main__":
    main()
