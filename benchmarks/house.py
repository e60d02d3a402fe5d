"""The house in figures, read off the syntax trees: what a newcomer meets, and how data travels between rooms.

`python benchmarks/house.py` tells this checkout; `--against REVISION` another commit beside it, by `git archive`.
"""

from __future__ import annotations

import argparse
import ast
import io
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import save
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
LONG = 40  # lines of a function that are too many to hold in the head
MODE_WORDS = (
    "by_budget",
    "fit_ctx",
    "Limit",
    "Budget",
    "LimitPlan",
    "BudgetPlan",
    "LimitEvidence",
    "BudgetEvidence",
)


@dataclass(frozen=True, kw_only=True)
class House:
    """Counts over all Python of a package; ``lines`` include blank ones and comments."""

    entries: int
    lines: int
    functions: int
    long_functions: int
    any_names: int
    string_keys: int
    parallel_assignments: int
    docstrings: int
    docstring_words: int
    asks_for_the_mode: int

    def rows(self) -> dict[str, float]:
        """What the table shows; rates are for 1,000 lines."""
        thousand = self.lines / 1000
        return {
            "entries at the top of the package": self.entries,
            "lines": self.lines,
            "functions": self.functions,
            f"functions over {LONG} lines": self.long_functions,
            "Any for 1,000 lines": round(self.any_names / thousand, 1),
            "string keys for 1,000 lines": round(self.string_keys / thousand, 1),
            "parallel assignments for 1,000 lines": round(self.parallel_assignments / thousand, 2),
            "words a docstring": round(self.docstring_words / max(self.docstrings, 1), 1),
            "places that ask for the mode": self.asks_for_the_mode,
        }


def look(package: Path) -> House:
    """Reads every file of a package once."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(package.rglob("*.py"))]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    documented = [*functions, *(n for n in nodes if isinstance(n, ast.ClassDef | ast.Module))]
    texts = [text for node in documented if (text := ast.get_docstring(node))]
    return House(
        entries=sum(not path.name.startswith("__pycache__") for path in package.iterdir()),
        lines=sum(path.read_text(encoding="utf-8").count("\n") for path in package.rglob("*.py")),
        functions=len(functions),
        long_functions=sum((node.end_lineno or 0) - node.lineno >= LONG for node in functions),
        any_names=sum(isinstance(node, ast.Name) and node.id == "Any" for node in nodes),
        string_keys=sum(_is_string_key(node) for node in nodes),
        parallel_assignments=sum(_is_parallel(node) for node in nodes),
        docstrings=len(texts),
        docstring_words=sum(len(text.split()) for text in texts),
        asks_for_the_mode=sum(1 for tree in trees for _ in _mode_questions(tree)),
    )


def _is_string_key(node: ast.AST) -> bool:
    """Says whether a node is ``x["name"]``: a field that no type knows."""
    return (
        isinstance(node, ast.Subscript)
        and isinstance(node.slice, ast.Constant)
        and isinstance(node.slice.value, str)
    )


def _is_parallel(node: ast.AST) -> bool:
    """Says whether a node is ``a, b = x, y``."""
    return (
        isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Tuple)
        and isinstance(node.value, ast.Tuple)
    )


def _mode_questions(tree: ast.AST) -> Iterator[ast.AST]:
    """Yields every place that asks which goal a run has.

    A match with a case of one of the two counts once; so does a test by ``isinstance``, by ``by_budget``, by
    ``evidence.curves``, by ``limit is None`` or by ``plan["mode"]``.
    """
    for node in ast.walk(tree):
        patterns = [case.pattern for case in node.cases] if isinstance(node, ast.Match) else []
        tests = [node.test] if isinstance(node, ast.If | ast.IfExp) else []
        if any(_names_mode(asked) for asked in (*patterns, *tests)):
            yield node


def _names_mode(node: ast.AST) -> bool:
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and part.id in MODE_WORDS:
            return True
        if isinstance(part, ast.Attribute) and part.attr in ("by_budget", "curves", "fit_ctx"):
            return True
        if isinstance(part, ast.Constant) and part.value == "mode":
            return True
    return False


def package_at(revision: str, folder: Path) -> Path:
    """Unpacks the package of another commit."""
    packed = subprocess.run(
        ["git", "archive", revision, "cerebellum"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return folder / "cerebellum"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--against", help="a revision to tell beside this checkout")
    asked = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if asked.against:
            found[asked.against] = look(package_at(asked.against, Path(folder))).rows()
    found["this checkout"] = look(ROOT / "cerebellum").rows()
    table = Table("what", *found, title="The house in figures")
    for name in found["this checkout"]:
        table.add_row(name, *(f"{rows[name]:,}" for rows in found.values()))
    Console(width=110).print(table)
    save("house", found)


if __name__ == "__main__":
    main()
