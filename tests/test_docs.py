"""The documents hold what they say: links lead somewhere, printed commands are commands, the README stays short."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import click
import pytest
import yaml
from click.core import ParameterSource
from markdown_it import MarkdownIt
from markdown_it.token import Token

from cerebellum.cli.commands import cli
from cerebellum.cli.options import take_goal

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    *sorted(DOCS.glob("*.md")),
    DOCS / "demo" / "README.md",
    ROOT / "benchmarks/README.md",
]
SITE = ROOT / "mkdocs.yml"
README_LINES = 150

SHELL = {"sh", "bash", "console"}
OPERATORS = {"|", "&&", "||", ";", "&", "--"}
FOREIGN = {"--tensor-type-file", "--tensor-type", "--target-bpw", "--hellaswag", "--help", "--version"}
"""Options of llama.cpp and of every program, which pages name beside ours."""

OF_SCRIPTS = {
    ROOT / "benchmarks/README.md",
    *map(DOCS.joinpath, ("LOG.md", "RELIABILITY.md", "SCALING.md", "STATISTICS.md")),
}
"""Pages that name options of benchmarks and tests, too."""

PATHS = re.compile(r"(?:benchmarks|cerebellum|docs|examples|tests|training)/[\w./-]*\w")


def tokens(text: str) -> Iterator[Token]:
    """Yields the blocks of a page and, after each, what stands inside it."""
    for block in MarkdownIt("commonmark").enable("table").parse(text):
        yield block
        yield from block.children or ()


def slugs(text: str) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub and the site both name them."""
    blocks = MarkdownIt("commonmark").enable("table").parse(text)
    found: set[str] = set()
    for number, block in enumerate(blocks):
        if block.type == "heading_open":
            words = "".join(part.content for part in blocks[number + 1].children or ())
            found.add(re.sub(r"[^\w\- ]", "", words.lower()).strip().replace(" ", "-"))
    return found


def broken_links(page: Path) -> list[str]:
    """Returns the relative links of a page that lead to no file, or to no heading of one."""
    found = [
        str(token.attrs.get("href") or token.attrs.get("src"))
        for token in tokens(page.read_text())
        if token.type in ("link_open", "image")
    ]
    return [link for link in found if not _leads_somewhere(page, link)]


def _leads_somewhere(page: Path, link: str) -> bool:
    if re.match(r"[a-z]+:", link):
        return True
    path, _, anchor = unquote(link).partition("#")
    target = (page.parent / path) if path else page
    if page.is_relative_to(DOCS) and not target.resolve().is_relative_to(DOCS):
        return False  # the site has docs/ and nothing else
    return target.exists() and (not anchor or anchor in slugs(target.read_text()))


def shell_lines(text: str) -> Iterator[str]:
    """Yields the lines of the fenced blocks of shell, those that a backslash goes on with as one."""
    for token in tokens(text):
        if token.type == "fence" and token.info.strip() in SHELL:
            yield from token.content.replace("\\\n", " ").splitlines()


def called(line: str, program: str) -> list[list[str]]:
    """Returns the arguments of every call of a program that a line makes, behind whatever starts it."""
    words = shlex.split(line.replace("`", " "), comments=True)
    found: list[list[str]] = []
    for number, word in enumerate(words):
        before = words[number - 1] if number else ""
        if word == program and (
            not before.startswith("--") or before in OPERATORS
        ):  # `--model cerebellum` is a value
            rest = words[number + 1 :]
            end = next((at for at, each in enumerate(rest) if each in OPERATORS), len(rest))
            found.append(rest[:end])
    return found


def refusal(arguments: list[str]) -> str | None:
    """Returns why the command line refuses some arguments, None where it takes them; nothing is run."""
    try:
        with cli.make_context("cerebellum", list(arguments)) as outer:
            name, command, rest = cli.resolve_command(outer, list(arguments))
            assert command is not None
            with command.make_context(name, rest, parent=outer, resilient_parsing=False) as context:
                _refuse_mixed_goals(context)
    except click.exceptions.Exit:
        return None  # --help, --version
    except click.UsageError as error:
        return error.format_message()
    return None


def _refuse_mixed_goals(context: click.Context) -> None:
    """Raises what `run` and `measure` raise first in their bodies, where options of two goals were given."""
    if context.command.name in ("run", "measure"):
        recipe = context.get_parameter_source("recipe")
        take_goal(dict(context.params), with_recipe=recipe is ParameterSource.COMMANDLINE)


def flags_of(command: click.Command) -> set[str]:
    return {
        flag
        for param in command.params
        if isinstance(param, click.Option)
        for flag in (*param.opts, *param.secondary_opts)
        if flag.startswith("--")
    }


def named_flags(text: str) -> set[str]:
    """Returns the options that a page names in `code`, whoever's they are."""
    codes = [token.content for token in tokens(text) if token.type == "code_inline"]
    return {flag for code in codes for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)}


def id_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=id_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=id_of)
def test_every_command_that_is_printed_is_accepted(page: Path) -> None:
    for line in shell_lines(page.read_text()):
        for arguments in called(line, "cerebellum"):
            assert refusal(arguments) is None, line


def test_commands_are_looked_at_at_all() -> None:
    """The check above is empty where blocks are not found; the README and the pages have many commands."""
    lines = [line for page in PAGES for line in shell_lines(page.read_text())]
    names = {arguments[0] for line in lines for arguments in called(line, "cerebellum") if arguments}
    assert set(cli.commands) - names <= {"demo"}


@pytest.mark.parametrize("page", PAGES, ids=id_of)
def test_make_targets_and_scripts_are_there(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in shell_lines(page.read_text()):
        assert all(set(arguments) <= targets for arguments in called(line, "make")), line
        for arguments in called(line, "python"):
            assert arguments[0] == "-m" or (ROOT / arguments[0]).exists(), line


@pytest.mark.parametrize("page", PAGES, ids=id_of)
def test_files_of_the_repository_that_are_named_are_there(page: Path) -> None:
    codes = [token.content for token in tokens(page.read_text()) if token.type == "code_inline"]
    named = {path for code in codes for path in PATHS.findall(code) if code.startswith(path)}
    assert [
        path for path in sorted(named) if not (ROOT / path).exists() and not path.startswith("tests/fuzz")
    ] == []


def test_every_option_is_on_the_page_of_options_and_no_other() -> None:
    ours = set().union(*map(flags_of, cli.commands.values()))
    named = named_flags((DOCS / "OPTIONS.md").read_text())
    assert ours - named == set()
    assert named - ours - FOREIGN == set()


@pytest.mark.parametrize("page", [page for page in PAGES if page not in OF_SCRIPTS], ids=id_of)
def test_options_that_are_named_in_passing_are_options(page: Path) -> None:
    ours = set().union(*map(flags_of, cli.commands.values()))
    assert named_flags(page.read_text()) - ours - FOREIGN == set()


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    def pages(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        for part in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            yield from pages(part)

    listed = list(pages(yaml.safe_load(SITE.read_text())["nav"]))
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_the_formats_of_artifacts_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `[\w.]+\.json`.*", (DOCS / "ARTIFACTS.md").read_text(), re.MULTILINE)
    assert len(rows) >= 11
    for row in rows:
        _, _, number, *_, record, _ = (cell.strip() for cell in row.split("|"))
        [path] = PATHS.findall(record)
        formats = re.findall(r"format: Literal\[(\d+)\]", _artifact(ROOT / path, record))
        assert formats == [number], row


def _artifact(path: Path, record: str) -> str:
    """Returns the code of the class that a row names first; a plan's number stands in the class that all share."""
    name = record.split("`")[1].replace("LimitPlan", "Plan")
    return next(part for part in path.read_text().split("\nclass ") if part.startswith(f"{name}("))


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= README_LINES


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("run model.gguf", "--out"),
        ("run model.gguf -o out --bugdet 13GiB", "--bugdet"),
        ("run model.gguf -o out --budget large", "large"),
        ("run model.gguf -o out --budget 13GiB --max-increase 3%", "--max-increase"),
        ("run model.gguf -o out --recipe a.gguf --demote Q2_K", "--demote"),
        ("quantise model.gguf Q3_K_M -o out.gguf", "quantise"),
        ("judge --source model.gguf", "FILES"),
        ("run model.gguf -o out --fit 24", "GiB"),
    ],
)
def test_the_check_of_commands_sees_what_is_wrong(arguments: str, why: str) -> None:
    found = refusal(shlex.split(arguments))
    assert found is not None and why in found


def test_the_check_of_commands_finds_them_behind_other_programs() -> None:
    assert called(
        "srun -w x cerebellum run m.gguf -o out --ray a:1 && make demo  # cerebellum", "cerebellum"
    ) == [["run", "m.gguf", "-o", "out", "--ray", "a:1"]]


@pytest.mark.parametrize(
    ("link", "broken"),
    [
        ("other.md", False),
        ("other.md#two-words-1", False),
        ("#here", False),
        ("https://example.org/nowhere", False),
        ("missing.md", True),
        ("other.md#no-such-heading", True),
        ("#nowhere", True),
    ],
)
def test_the_check_of_links_sees_what_is_wrong(tmp_path: Path, link: str, broken: bool) -> None:
    (tmp_path / "other.md").write_text("# Two *words*: 1\n")
    page = tmp_path / "page.md"
    page.write_text(f"# Here\n\nSee [this]({link}), or\n\n| a |\n| --- |\n| [that]({link}) |\n")
    assert broken_links(page) == ([link, link] if broken else [])
