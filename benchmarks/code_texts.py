"""Texts of code to select by and to report on: modules of Python's standard library, none in both."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path

SELECT_MODULES = (
    *("ast", "base64", "calendar", "cmd", "codecs", "configparser", "copy", "csv", "dataclasses"),
    *("datetime", "dis", "enum", "ftplib", "gettext", "hashlib", "heapq", "inspect", "ipaddress"),
)
REPORT_MODULES = (
    *("argparse", "bdb", "cProfile", "code", "colorsys", "contextlib", "difflib", "doctest", "fileinput"),
    *("fractions", "functools", "getopt", "gzip", "imaplib", "linecache", "mailbox", "operator", "optparse"),
    *("pickletools", "plistlib", "pprint", "random", "sched", "shlex", "smtplib", "statistics", "tarfile"),
    *("tempfile", "tokenize", "traceback", "typing", "uuid", "weakref"),
)
_BYTES_OF_A_MODULE = 12_000


def code_text(path: Path, modules: Sequence[str]) -> Path:
    """Writes the beginnings of modules of this Python's standard library as one text; those that it lacks are left out.

    No module is in both lists, and none of the texts of the package is in the reports'. Python's version decides the
    bytes, so that whoever reports figures names the text's SHA-256.
    """
    library = Path(sysconfig.get_path("stdlib"))
    parts = []
    for name in modules:
        found = library / f"{name}.py"
        if found.exists():
            text = found.read_text(encoding="utf-8")[:_BYTES_OF_A_MODULE]
            parts.append(f"# module {name}\n{text[: text.rfind(chr(10)) + 1]}\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(parts), encoding="utf-8")
    return path
