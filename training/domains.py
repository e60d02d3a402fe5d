"""Makes the texts of several domains that come along, in two halves with no document in common.

One half selects (what a quantization is chosen by), the other reports. Every text is cut from packages that anybody can
fetch again (the commands are in README.md), so that the folder can be made anew byte for byte, and every one may be
shipped: the licences, and the people to be named, go into LICENSES.md beside them.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from texts import articles

HALVES = ("select", "report")
LIMIT = 96_000  # bytes of UTF-8 a domain and half, all whole documents but for the last

CODE = {
    "select": ("queue", "fnmatch", "bisect", "textwrap", "csv", "cmd", "heapq", "statistics"),
    "report": ("shlex", "sched", "glob", "string", "copy", "filecmp", "calendar", "graphlib", "pprint"),
}
FAQS = {
    "select": ("general", "programming"),
    "report": ("design", "library", "extending", "windows", "gui", "installed"),
}
JSON_OF = {
    "select": ("cloud9", "dynamodb", "ecr", "sts", "glacier", "secretsmanager"),
    "report": ("codebuild", "efs", "fsx", "servicediscovery", "batch", "polly", "route53"),
}
TABLES = {
    "select": ("grunfeld", "macrodata", "sunspots", "engel", "elec_equip"),
    "report": ("statecrime", "longley", "stackloss", "elnino", "modechoice", "strikes"),
}
LANGUAGES = {"german": "de", "french": "fr"}
JSON_SHARE = 0.8  # of the structured text; tables are the rest

_ROLE = re.compile(r":[a-z:+-]+:`~?([^`<]+?)(?:\s*<[^`]+>)?`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^`]+>`__?")
_QUESTION = re.compile(r"(?m)^(?P<title>\S.*)\n(?P<rule>-{4,}|={4,})$")
_MALLARD = "{http://projectmallard.org/1.0/}"
_BLOCKS = ("title", "p", "desc")


def main() -> None:
    """Writes one file a domain and half, and the list of people behind the translated pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", type=Path, help="folder with the unpacked packages")
    parser.add_argument("data", type=Path, help="cerebellum/data, with selection.txt and report.txt")
    asked = parser.parse_args()
    help_of = {language: Help() for language in LANGUAGES.values()}
    for half in HALVES:
        for domain, documents in domains(asked.packages, asked.data, half, help_of).items():
            out = asked.data / "domains" / f"{half}-{domain}.txt"
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(taken(documents), encoding="utf-8", newline="")
            print(f"{half} {domain}: {out.stat().st_size:,} bytes")
    for language, found in help_of.items():
        print(f"{language}: {', '.join(sorted(found.people))}")


@dataclass
class Help:
    """What was read of the help in one language: the people to be named, and paragraphs that were there before."""

    people: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)


def domains(packages: Path, data: Path, half: str, help_of: dict[str, Help]) -> dict[str, Iterator[str]]:
    """Returns the documents of every domain for one half, in the order in which they are taken."""
    prose = {"select": "selection.txt", "report": "report.txt"}
    found = {
        "prose": iter(articles((data / prose[half]).read_text(encoding="utf-8"))),
        "code": modules(packages, CODE[half]),
        "questions": questions(packages, FAQS[half]),
        "structured": structured(packages, half),
    }
    for domain, language in LANGUAGES.items():
        found[domain] = pages(packages, language, half, help_of[language])
    return found


def taken(documents: Iterable[str], limit: int = LIMIT) -> str:
    """Returns documents up to ``limit`` bytes; the last one is cut after the line that still fits."""
    text = ""
    for document in documents:
        text += document.rstrip("\n") + "\n\n"
        if len(text.encode()) > limit:
            break
    short = text.encode()[:limit].decode(errors="ignore")
    return short if len(short) == len(text) else short[: short.rfind("\n") + 1]


def one(packages: Path, pattern: str) -> Path:
    """Returns the one file that a pattern finds in the packages."""
    found = sorted(packages.glob(pattern))
    if not found:
        raise SystemExit(f"{packages}: no {pattern}; unpack the packages that README.md names there")
    return found[0]


def modules(packages: Path, names: Iterable[str]) -> Iterator[str]:
    """Yields modules of CPython's standard library, as they are."""
    for name in names:
        yield one(packages, f"*/usr/lib/python3.11/{name}.py").read_text(encoding="utf-8")


def questions(packages: Path, names: Iterable[str]) -> Iterator[str]:
    """Yields questions and answers of CPython's FAQ, in plain text."""
    for name in names:
        source = one(packages, f"*/usr/share/doc/python3.11/html/_sources/faq/{name}.rst.txt")
        text = source.read_text(encoding="utf-8")
        marks = list(_QUESTION.finditer(text))
        for mark, following in zip(marks, [*marks[1:], None], strict=True):
            answer = text[mark.end() : following.start() if following else len(text)]
            if mark["rule"].startswith("-") and answer.strip():
                yield f"Question: {plain(mark['title'])}\n\nAnswer: {plain(answer).strip()}"


def plain(text: str) -> str:
    """Returns reStructuredText without the marks that only a documentation builder reads."""
    text = _LINK.sub(r"\1", _ROLE.sub(r"\1", text)).replace("``", "`")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith((".. ", ":"))]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).replace("::\n", ":\n")


def structured(packages: Path, half: str) -> Iterator[str]:
    """Yields JSON documents, then tables: each as comma-separated values and again, other rows, in Markdown."""
    yield taken(requests(packages, JSON_OF[half]), int(LIMIT * JSON_SHARE))
    for name in TABLES[half]:
        path = one(packages, f"*/statsmodels/datasets/{name}/{name}.csv")
        rows = [row for row in csv.reader(path.read_text(encoding="utf-8").splitlines()) if row]
        middle = min(len(rows) // 2, 100)
        yield "\n".join(",".join(row) for row in rows[:middle])
        yield markdown([rows[0], *rows[middle : 2 * middle]])


def requests(packages: Path, services: Iterable[str]) -> Iterator[str]:
    """Yields example requests and answers of web services, indented as people write them."""
    for service in services:
        path = one(packages, f"*/botocore/data/{service}/*/examples-1.json")
        yield json.dumps(json.loads(path.read_text(encoding="utf-8")), indent=2, ensure_ascii=False)


def markdown(rows: list[list[str]]) -> str:
    """Returns a table in Markdown; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def pages(packages: Path, language: str, half: str, found: Help) -> Iterator[str]:
    """Yields pages of GNOME's help in one language; a page and its translations are of one half.

    A paragraph that an earlier page had is left out, so that none is in both halves.
    """
    folder = one(packages, f"*/usr/share/help/{language}/gnome-help/index.page").parent
    chosen = sorted(folder.glob("*.page"))[HALVES.index(half) :: len(HALVES)]
    for path in chosen:
        root = ElementTree.parse(path).getroot()
        found.people.update(
            name.text.strip()
            for credit in root.iter()
            if credit.tag.endswith("}credit")
            for name in credit
            if name.tag.endswith("}name") and name.text
        )
        lines = [text for text in map(words, blocks(root)) if text and text not in found.read]
        if len(lines) > 4:
            found.read.update(lines)
            yield "\n\n".join(lines)


def blocks(element: ElementTree.Element) -> Iterator[ElementTree.Element]:
    """Yields what is read of a page, from the top: its summary, titles and paragraphs."""
    for part in element:
        if part.tag in {_MALLARD + name for name in _BLOCKS}:
            yield part
        else:
            yield from blocks(part)


def words(element: ElementTree.Element) -> str:
    """Returns the text of an element and all in it, in one line."""
    return " ".join("".join(element.itertext()).split())


if __name__ == "__main__":
    main()
