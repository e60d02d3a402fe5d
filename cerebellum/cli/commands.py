"""The command line: one command a stage, in the order of the pipeline. A body parses, calls, prints."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cerebellum import __version__, units
from cerebellum.bench.tasks import LOGLIKELIHOOD, PROTOCOLS, SAMPLES, TASKS
from cerebellum.cli import tables
from cerebellum.errors import BadInput, CerebellumError
from cerebellum.measure.curves import ANCHOR, K_LADDER, KLD, OBJECTIVES
from cerebellum.units import parse_size
from cerebellum.workspace import (
    DEMO_MODEL,
    REPORT_TEXT,
    SELECTION_TEXT,
    Settings,
    Workspace,
    read_json,
    write_json,
)

_PIPE_COLUMNS = 110  # rich assumes 80 where there is no terminal, and tables would wrap

_TITLE_COLUMNS = 64
_SECONDS_BETWEEN_LINES = 10.0

OUT = Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS)
ERR = Console(stderr=True)

Command = Callable[..., Any]
PathArgument = click.Path(path_type=Path)


class Pipeline(click.Group):
    """Lists commands in the order they were written, which is the order of the pipeline."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


class ProgressReporter:
    """Progress on stderr: a bar with the time left on a terminal, now and then a line elsewhere."""

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Callable[[], None]]:
        if not ERR.is_terminal:
            yield LineProgress(title, total).tick
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        with Progress(*columns, console=ERR) as progress:
            task = progress.add_task(title[:_TITLE_COLUMNS], total=total)
            yield lambda: progress.advance(task)

    def note(self, text: str) -> None:
        ERR.print(text, style="dim", highlight=False)


class LineProgress:
    """For logs and pipes: a line at the start, then one every ten seconds with the time left."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done = title, total, 0
        self.started = self.said = time.monotonic()
        ERR.print(f"{title}: {total} steps", highlight=False, soft_wrap=True)

    def tick(self) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.said >= _SECONDS_BETWEEN_LINES and self.done < self.total:
            left = (now - self.started) / self.done * (self.total - self.done)
            line = f"{self.title}: {self.done} of {self.total}, {left:.0f} s left"
            ERR.print(line, highlight=False, soft_wrap=True)
            self.said = now


class Percent(click.ParamType[float]):
    """``3%`` or ``3``."""

    name = "percent"

    def __init__(self, low: float = 1e-9) -> None:
        self.low = low

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(str(value).removesuffix("%"))
        except ValueError:
            self.fail(f"{value!r} is not a percentage such as 3%", param, ctx)
        if not self.low <= number < 1000:
            self.fail(f"{value} is not between 0% and 1000%", param, ctx)
        return number


class Size(click.ParamType[int]):
    """``14.2GB``, ``13GiB`` or bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def options(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several click options as one decorator, shown in the order given."""

    def apply(command: Command) -> Command:
        return functools.reduce(lambda wrapped, option: option(wrapped), reversed(decorators), command)

    return apply


json_option = click.option("--json", "as_json", is_flag=True, help="JSON on stdout, nothing else there.")
ctx_option = click.option(
    "--ctx", type=click.IntRange(8), default=512, show_default=True, help="Chunk length."
)
engine_options = options(
    click.option("--threads", type=click.IntRange(1), default=os.cpu_count() or 1, show_default=True),
    click.option("--gpu-layers", type=int, default=0, show_default=True, help="-1 offloads all."),
)
text_option = click.option(
    "--text", type=PathArgument, default=REPORT_TEXT, help="UTF-8 text [default: WikiText-2 test]."
)
first_chunks_option = click.option(
    "--chunks", type=click.IntRange(0), default=0, help="The first N chunks of the text [default: all]."
)
source_options = options(
    click.option("--base", default="Q3_K_M", show_default=True, help="Preset everything is compared with."),
    click.option("--base-file", type=PathArgument, help="A base made already, instead of --base."),
    click.option("--demote", default="Q2_K", show_default=True, help="Type that groups are tried at."),
    click.option("--max-increase", type=Percent(), default="3%", show_default=True, help="Limit on damage."),
    click.option("--budget", help="Instead of a limit: the best file of this SIZE or PRESET's size."),
    click.option("--fit", help="The best file for a card of this SIZE at --ctx tokens [default: 4096]."),
    click.option(
        "--types",
        default=",".join(K_LADDER),
        show_default=True,
        help="With --budget: the types that every group is measured at.",
    ),
    click.option(
        "--fine-types/--no-fine-types",
        default=True,
        show_default=True,
        help="With --budget: try IQ types too, where the plan could want them.",
    ),
    click.option(
        "--zoom/--no-zoom",
        default=True,
        show_default=True,
        help="With --budget: treat the layers of a role apart where they differ.",
    ),
    click.option(
        "--objective",
        type=click.Choice(OBJECTIVES),
        default=KLD,
        show_default=True,
        help="With --budget: what is made least, KL divergence from the source or perplexity.",
    ),
    click.option(
        "--anchor",
        default=ANCHOR,
        show_default=True,
        help="With --budget: the type of the rest while a group is measured; smaller saves memory.",
    ),
    click.option("--imatrix", type=PathArgument, help="An importance matrix (GGUF or .dat)."),
    click.option("--imatrix-text", type=PathArgument, help="Text to make one from [default: --select-text]."),
    click.option("--imatrix-chunks", type=click.IntRange(0), default=0, help="First N of it [default: all]."),
    click.option("--select-text", type=PathArgument, default=SELECTION_TEXT, help="Text that decides."),
    click.option("--report-text", type=PathArgument, default=REPORT_TEXT, help="Text that reports."),
    ctx_option,
    click.option(
        "--chunks",
        type=click.IntRange(0),
        default=0,
        help="Exactly N chunks for every group [default: as many as a verdict takes].",
    ),
    click.option(
        "--max-chunks", type=click.IntRange(0), default=0, help="A limit for each group [default: the text]."
    ),
    click.option(
        "--indifference",
        type=Percent(0),
        default="0.2%",
        show_default=True,
        help="A near-tie this close to the limit may be called either way.",
    ),
    click.option(
        "--alpha",
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        default=0.05,
        show_default=True,
        help="Chance that any verdict is wrong.",
    ),
    click.option(
        "--kld-cache", type=Size(), help="Disk for predictions [default: 1GiB; with --budget 8GiB]."
    ),
    click.option("--report-chunks", type=click.IntRange(0), default=0, help="First N of --report-text."),
    engine_options,
    click.option("--seed", type=int, default=1, show_default=True, help="Order of the chunks."),
    click.option("--allow-requantize", is_flag=True, help="Accept a source that is quantized already."),
)
bench_options = options(
    click.option("--bench", is_flag=True, help="Question benchmarks of base and result at the end."),
    click.option("--bench-limit", type=click.IntRange(0), default=400, show_default=True, help="0: all."),
    click.option(
        "--data", type=PathArgument, help="Folder of the benchmark files [default: CEREBELLUM_DATA]."
    ),
)
folder_option = click.option("-o", "--out", type=PathArgument, required=True, help="The run folder.")


@click.group(
    cls=Pipeline,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="cerebellum")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Sensitivity-guided mixed-precision quantization of GGUF models.

    \b
    source -> groups -> importance matrix -> base -> shards
    -> measure -> plan -> build -> verify -> bench -> card
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@cli.command()
@click.option("-o", "--out", type=PathArgument, default=Path("cerebellum-demo"), show_default=True)
@engine_options
@click.option("--bench", is_flag=True, help="Question benchmarks too, on the samples that come along.")
@json_option
def demo(out: Path, threads: int, gpu_layers: int, bench: bool, as_json: bool) -> None:
    """The whole pipeline on the small model that comes with Cerebellum."""
    settings = Settings(
        source=DEMO_MODEL,
        imatrix_chunks=100,
        report_chunks=200,
        threads=threads,
        gpu_layers=gpu_layers,
    )
    _run(Workspace(out, settings, ProgressReporter()), as_json, _DEMO_BENCH if bench else None)


@cli.command()
@click.argument("source", type=PathArgument)
@folder_option
@source_options
@bench_options
@json_option
def run(as_json: bool, out: Path, bench: bool, bench_limit: int, data: Path | None, **asked: Any) -> None:
    """The whole pipeline: SOURCE (a GGUF, or hf:owner/repo/file.gguf) to a smaller GGUF with its evidence."""
    request = {"limit": bench_limit, "data": data, "seed": asked["seed"]} if bench else None
    _run(Workspace(out, _settings(asked), ProgressReporter()), as_json, request)


@cli.command()
@click.argument("model", type=PathArgument)
@json_option
def inspect(model: Path, as_json: bool) -> None:
    """What a GGUF is made of: its groups, and the types each may take."""
    from cerebellum.groups import describe, make_groups
    from cerebellum.source import open_source

    source = open_source(model, allow_requantize=True)
    described = describe(source, make_groups(source))
    _answer(described, as_json, *tables.inspect_tables(described))


@cli.command()
@click.argument("source", type=PathArgument)
@click.option("-o", "--out", type=PathArgument, required=True, help="The GGUF to write.")
@click.option("--imatrix-text", "--text", type=PathArgument, default=SELECTION_TEXT, help="UTF-8 text.")
@ctx_option
@first_chunks_option
@engine_options
@json_option
def imatrix(
    source: Path,
    out: Path,
    imatrix_text: Path,
    ctx: int,
    chunks: int,
    threads: int,
    gpu_layers: int,
    as_json: bool,
) -> None:
    """Importance matrix of SOURCE, in llama.cpp's format."""
    from cerebellum.imatrix import compute_or_reuse
    from cerebellum.llama.native import EngineSettings, LlamaEngine
    from cerebellum.source import open_source
    from cerebellum.texts import load_corpus

    opened = open_source(source, allow_requantize=True)
    engine = LlamaEngine(EngineSettings(threads=threads, gpu_layers=gpu_layers))
    corpus = load_corpus(engine, source, imatrix_text, ctx)
    matrix = compute_or_reuse(
        engine=engine,
        shards=[file.path for file in opened.files],
        source_sha256=opened.sha256(),
        corpus=corpus,
        chunks=chunks or corpus.n_chunks,
        out=out,
        reporter=ProgressReporter(),
    )
    answer = {
        "path": str(out),
        "entries": len(matrix.entries),
        "chunks": matrix.chunk_count,
        "ctx": ctx,
        "sha256": matrix.sha256,
    }
    _answer(
        answer, as_json, f"{out}: {len(matrix.entries)} entries from {matrix.chunk_count} chunks of {ctx}"
    )


@cli.command()
@click.argument("source", type=PathArgument)
@folder_option
@source_options
@json_option
def measure(as_json: bool, out: Path, **asked: Any) -> None:
    """Every group of SOURCE alone at the demoted type, into the ledger of the run folder."""
    from cerebellum.run import measure_stage

    workspace = Workspace(out, _settings(asked), ProgressReporter())
    with workspace.locked():
        found = measure_stage(workspace)
    _answer(found, as_json, tables.measurements_table(found), tables.tokens_saved(found), _counts(found))


@cli.command()
@click.argument("target", type=PathArgument)
@click.option("--measurements", type=PathArgument, help="Measurements to plan from, instead of the folder's.")
@click.option("--max-increase", type=Percent(), help="Another limit than the run's.")
@click.option("--budget", help="Another SIZE or PRESET, from the response curves of a `run --budget`.")
@click.option("--fit", help="The best file for a card of this SIZE, with --ctx tokens.")
@click.option("--ctx", type=click.IntRange(8), default=4096, show_default=True, help="Context for --fit.")
@click.option("--frontier", is_flag=True, help="The whole curve of size against damage, from those curves.")
@click.option("--base", help="Another preset [with a GGUF; default: Q3_K_M].")
@click.option("--demote", help="Another type [with a GGUF; default: Q2_K].")
@json_option
def plan(
    target: Path,
    measurements: Path | None,
    max_increase: float | None,
    base: str | None,
    demote: str | None,
    budget: str | None,
    fit: str | None,
    ctx: int,
    frontier: bool,
    as_json: bool,
) -> None:
    """What to demote: from a run folder, or from a GGUF (its header is enough) and --measurements."""
    asked = {"base": base, "demote": demote, "max_increase_pct": max_increase}
    given: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
    if budget or fit:
        given |= {"budget": None if fit else budget, "fit": fit, "fit_ctx": ctx}
    if frontier:
        _show_frontier(target, as_json)
        return
    make = _plan_folder if target.is_dir() else _plan_file
    planned = make(target, measurements, given)
    _answer(planned, as_json, *tables.planned_tables(planned))


@cli.command()
@click.argument("folder", type=PathArgument)
@json_option
def build(folder: Path, as_json: bool) -> None:
    """The GGUF that the run folder's plan.json describes."""
    from cerebellum.run import build_stage

    workspace = Workspace.reopen(folder, ProgressReporter())
    with workspace.locked():
        path = build_stage(workspace)
    answer = {"path": str(path), "bytes": path.stat().st_size}
    _answer(answer, as_json, f"{path}  {units.size(path.stat().st_size)}")


@cli.command()
@click.argument("folder", type=PathArgument)
@json_option
def verify(folder: Path, as_json: bool) -> None:
    """Proof of the finished file: read again, byte by byte, and measured on the report text."""
    from cerebellum.run import manifest_stage, verify_stage

    workspace = Workspace.reopen(folder, ProgressReporter())
    with workspace.locked():
        found = verify_stage(workspace)
        manifest_stage(workspace)
    _answer(found, as_json, tables.verify_table(found), tables.report_table(found))
    sys.exit(0 if found["ok"] else 1)


@cli.command()
@click.argument("model", type=PathArgument)
@click.option("--against", type=PathArgument, multiple=True, help="A base to compare with; may be repeated.")
@click.option("--tasks", default=",".join(TASKS), show_default=True, help="Benchmarks, by comma.")
@click.option("--protocol", type=click.Choice(["both", *PROTOCOLS]), default="both", show_default=True)
@click.option("--limit", type=click.IntRange(0), default=0, help="N questions of each [default: all].")
@click.option("--data", type=PathArgument, help="Folder of the benchmark files [default: CEREBELLUM_DATA].")
@click.option("-o", "--out", type=PathArgument, help="Folder for the answers [default: <MODEL>-bench].")
@click.option("--rotations", type=click.IntRange(1, 5), default=1, help="Ask with the options turned, too.")
@click.option("--generate", type=click.IntRange(0), default=0, help="Also let it write up to N tokens.")
@click.option("--seed", type=int, default=1, show_default=True, help="Which questions a --limit takes.")
@engine_options
@json_option
def bench(
    model: Path,
    against: tuple[Path, ...],
    tasks: str,
    protocol: str,
    out: Path | None,
    threads: int,
    gpu_layers: int,
    as_json: bool,
    **asked: Any,
) -> None:
    """Question benchmarks of MODEL, paired with each base; asks nothing twice."""
    from cerebellum.bench.stage import Request, bench_files
    from cerebellum.cli.bench_tables import bench_tables
    from cerebellum.llama.native import EngineSettings

    request = Request(
        tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()),
        protocols=PROTOCOLS if protocol == "both" else (protocol,),
        **asked,
    )
    folder = out or model.with_name(f"{model.stem}-bench")
    settings = EngineSettings(threads=threads, gpu_layers=gpu_layers)
    found = bench_files((model, *against), request, settings, folder, ProgressReporter())
    write_json(folder / "bench.json", found)
    _answer(found, as_json, *bench_tables(found))
    sys.exit(0 if found["audit"]["ok"] else 1)


@cli.command()
@click.argument("folder", type=PathArgument)
@click.option("--repo", help="The Hub repository it is for: owner/name.")
@json_option
def card(folder: Path, repo: str | None, as_json: bool) -> None:
    """The model card, report and charts of a finished run, from its artifacts alone."""
    from cerebellum.run import card_stage

    written = [str(path) for path in card_stage(folder, repo)]
    _answer({"files": written}, as_json, "\n".join(written))


@cli.command()
@click.argument("folder", type=PathArgument)
@click.argument("repo")
@click.option("--dry-run", is_flag=True, help="Only say what would be uploaded.")
@click.option("--private", is_flag=True, help="If the repository is made, make it private.")
@json_option
def push(folder: Path, repo: str, dry_run: bool, private: bool, as_json: bool) -> None:
    """A finished run to the Hub: model, card, report, evidence, manifest; REPO is owner/name."""
    from cerebellum.hub import push as push_run
    from cerebellum.run import card_stage

    found = push_run(folder, repo, lambda: card_stage(folder, repo), dry_run, private)
    _answer(found, as_json, tables.upload_table(found), found["url"] or "nothing was uploaded (--dry-run)")


@cli.command()
@click.argument("manifest", type=PathArgument)
@click.option("--source", type=PathArgument, required=True, help="The GGUF that the manifest names.")
@click.option("-o", "--out", type=PathArgument, help="Where to build [default: reproduced/ beside it].")
@click.option("--base-file", type=PathArgument, help="The base, where the run was given one.")
@click.option("--select-text", type=PathArgument, help="To compare [default: beside it, or Cerebellum's].")
@click.option("--report-text", type=PathArgument, help="To compare [default: beside it, or Cerebellum's].")
@click.option("--threads", type=click.IntRange(1), default=os.cpu_count() or 1, show_default=True)
@json_option
def reproduce(
    manifest: Path,
    source: Path,
    out: Path | None,
    base_file: Path | None,
    select_text: Path | None,
    report_text: Path | None,
    threads: int,
    as_json: bool,
) -> None:
    """The same GGUF again, bit for bit, from a MANIFEST and its source; names what changed."""
    from cerebellum.reproduce import Request
    from cerebellum.reproduce import reproduce as make_again

    texts = {"selection": select_text, "report": report_text}
    request = Request(
        manifest=manifest,
        source=source,
        out=out or manifest.parent / "reproduced",
        base_file=base_file,
        texts={part: path for part, path in texts.items() if path},
        threads=threads,
    )
    found = make_again(request, ProgressReporter())
    _answer(found, as_json, tables.reproduced_table(found), tables.reproduced_line(found))
    sys.exit(0 if found["ok"] else 1)


@cli.command()
@click.argument("a", type=PathArgument)
@click.argument("b", type=PathArgument)
@text_option
@ctx_option
@first_chunks_option
@click.option("--until", type=Percent(), help="Stop when the change is known to within this (0.5%).")
@click.option("--seed", type=int, default=1, show_default=True, help="Order of the chunks with --until.")
@engine_options
@json_option
def compare(a: Path, b: Path, threads: int, gpu_layers: int, as_json: bool, **asked: Any) -> None:
    """B against A on the same tokens: perplexity, KL divergence, top token, with intervals."""
    from cerebellum.compare import ComparisonSettings
    from cerebellum.compare import compare as compare_models
    from cerebellum.llama.native import EngineSettings, LlamaEngine

    asked["until_pct"] = asked.pop("until")
    engine = LlamaEngine(EngineSettings(threads=threads, gpu_layers=gpu_layers))
    found = compare_models(engine, a, b, ComparisonSettings(**asked), ProgressReporter())
    _answer(found, as_json, tables.comparison_table(found))


@cli.command()
@click.argument("model", type=PathArgument)
@text_option
@ctx_option
@first_chunks_option
@engine_options
@json_option
def perplexity(
    model: Path, text: Path, ctx: int, chunks: int, threads: int, gpu_layers: int, as_json: bool
) -> None:
    """Perplexity of MODEL, equal to llama-perplexity's."""
    from cerebellum.compare import perplexity_of
    from cerebellum.llama.native import EngineSettings, LlamaEngine

    engine = LlamaEngine(EngineSettings(threads=threads, gpu_layers=gpu_layers))
    found = perplexity_of(engine, model, text, ctx, chunks, ProgressReporter())
    line = f"PPL = {found['ppl']:.4f} ± {found['se']:.5f}  ({found['chunks']} chunks of {ctx})"
    _answer(found, as_json, line)


@cli.command()
@json_option
def doctor(as_json: bool) -> None:
    """What this machine has, and what is missing."""
    from cerebellum.doctor import examine

    found = examine(Path.cwd())
    lines = [f"{key}: {value}" for key, value in found.items() if key not in ("problems", "ok", "devices")]
    for device in found.get("devices", []):
        free, total = units.size(device["free_bytes"]), units.size(device["total_bytes"])
        lines.append(f"device {device['name']}: {device['description']}, {free} free of {total}")
    lines += [f"[red]problem:[/] {problem}" for problem in found["problems"]] or ["[green]ready"]
    _answer(found, as_json, *lines)
    sys.exit(0 if found["ok"] else 1)


def _settings(asked: dict[str, Any]) -> Settings:
    asked["max_increase_pct"] = asked.pop("max_increase")
    asked["indifference_pct"] = asked.pop("indifference")
    asked["kld_cache_bytes"] = asked.pop("kld_cache")
    if click.get_current_context().get_parameter_source("ctx") == ParameterSource.COMMANDLINE:
        asked["fit_ctx"] = asked["ctx"]
    asked["types"] = tuple(kind.strip() for kind in asked["types"].split(",") if kind.strip())
    from cerebellum.hub import download, is_address  # huggingface_hub takes half a second to load

    address = str(asked["source"])
    if is_address(address):
        asked["source"] = download(address, ProgressReporter().note)
    given: dict[str, Any] = {k: v.absolute() if isinstance(v, Path) else v for k, v in asked.items()}
    return Settings(**given)


# The demo's model is no chat model: a letter from it would say nothing.
_DEMO_BENCH = {"protocols": (LOGLIKELIHOOD,), "data": SAMPLES}


def _run(workspace: Workspace, as_json: bool, bench_request: dict[str, Any] | None = None) -> None:
    from cerebellum.bench.stage import Request
    from cerebellum.cli.bench_tables import bench_tables
    from cerebellum.run import run_all

    manifest = run_all(workspace, Request(**bench_request) if bench_request else None)
    planned, verified = (read_json(workspace.path(f"{name}.json")) for name in ("plan", "verify"))
    path = workspace.path(manifest["result"]["file"])
    answer = {"file": str(path), "plan": planned, "verify": verified, "manifest": manifest}
    benched = read_json(workspace.path("bench.json")) if bench_request else None
    if benched:
        answer["bench"] = benched
    _answer(
        answer,
        as_json,
        *_plan_shown(workspace, planned),
        tables.verify_table(verified),
        tables.report_table(verified),
        *(bench_tables(benched) if benched else ()),
        f"[bold]{path}[/]  {units.size(path.stat().st_size)}",
        f"card {workspace.path('README.md')}, report {workspace.path('report.html')}",
        tables.run_instructions(path, planned.get("memory")),
    )
    sys.exit(0 if verified["ok"] else 1)


def _plan_shown(workspace: Workspace, planned: dict[str, Any]) -> tuple[Any, ...]:
    shown = tables.planned_tables(planned)
    if planned["mode"] == "budget":
        return shown
    return *shown, tables.tokens_saved(read_json(workspace.path("measurements.json")))


def _show_frontier(folder: Path, as_json: bool) -> None:
    from cerebellum.plan.by_budget import frontier_of

    curve = frontier_of(Workspace.reopen(folder, ProgressReporter(), planning=True))
    _answer(curve, as_json, tables.frontier_table(curve))


def _plan_folder(folder: Path, measurements: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    from cerebellum.plan.by_budget import rebudget
    from cerebellum.run import replan

    workspace = Workspace.reopen(folder, ProgressReporter(), planning=True, **given)
    with workspace.locked(save=False):  # a plan that fails leaves the folder as it was
        by_budget = given.get("budget") or given.get("fit")
        found = measurements or workspace.path("measurements.json")
        planned = rebudget(workspace) if by_budget else replan(workspace, found)
        write_json(workspace.path("plan.json"), planned)
        workspace.save_settings()
    return planned


def _plan_file(model: Path, measurements: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    from cerebellum.run import plan_header

    if measurements is None:
        raise BadInput(f"{model}: a GGUF has no measurements; give --measurements FILE or a run folder")
    return plan_header(Settings(source=model, **given), measurements)


def _counts(found: dict[str, Any]) -> str:
    return f"{found['measured']} chunks measured now, {found['reused']} already in the ledger"


def _answer(value: Any, as_json: bool, *shown: Any) -> None:
    try:
        if as_json:
            click.echo(json.dumps(value, indent=2, allow_nan=False))
            return
        for part in shown:
            OUT.print(part, highlight=False, soft_wrap=isinstance(part, str))
    except BrokenPipeError:  # whoever read us is gone, which is no fault of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Exit codes: 0 done, 1 the answer is no, 2 wrong use or bad input, 130 interrupted."""
    signal.signal(signal.SIGTERM, _interrupt)
    _keep_stdout_for_answers()
    try:
        cli.main(standalone_mode=False)
    except CerebellumError as error:
        _fail(str(error), error.exit_code)
    except click.ClickException as error:
        _fail(error.format_message(), 2)
    except (click.exceptions.Abort, KeyboardInterrupt):
        _fail("interrupted; the same command goes on from here", 130)


def _keep_stdout_for_answers() -> None:
    """What C libraries print goes to stderr: HiGHS writes a line to stdout now and then, told or not."""
    try:
        real = sys.stdout.fileno() == 1
    except (OSError, ValueError):  # a stand-in without a file, or closed
        return
    if real:
        sys.stdout.flush()
        kept = os.dup(1)
        os.dup2(2, 1)
        sys.stdout = os.fdopen(kept, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> None:
    ERR.print(f"cerebellum: {message}", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)
