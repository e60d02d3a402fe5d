"""The command line: one command a stage, in the order of the pipeline. A body parses, calls, prints."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from cerebellum import __version__, units
from cerebellum.base import base_for
from cerebellum.bench.tasks import LOGLIKELIHOOD, PROTOCOLS, SAMPLES, TASKS
from cerebellum.cli import tables
from cerebellum.cli.options import (
    NamedText,
    PathArgument,
    Percent,
    PresetName,
    WeightType,
    bench_options,
    ctx_option,
    encoder_options,
    engine_options,
    first_chunks_option,
    folder_option,
    given,
    given_by,
    importance_text_option,
    json_option,
    judge_options,
    named_texts,
    published_options,
    recipe_option,
    refuse_beside,
    settle_texts,
    size_options,
    source_options,
    take_goal,
    take_published,
    take_sizes,
    text_option,
    texts_of,
    threads_option,
    timings_option,
)
from cerebellum.cli.progress import OUT, ProgressReporter, say
from cerebellum.cli.streams import answering, keep_stdout_for_answers, open_missing_streams
from cerebellum.cli.workers import Hiring, take_workers, worker_options
from cerebellum.codec import as_json as plain
from cerebellum.codec import write_artifact
from cerebellum.engine.protocols import Engine
from cerebellum.errors import BadInput, CerebellumError
from cerebellum.folder import MEASUREMENTS, SETTINGS, RunFolder
from cerebellum.manifest import ResultNamed
from cerebellum.plan.artifacts import AnyPlan
from cerebellum.settings import (
    DEFAULT_ENCODER,
    DEMO_MODEL,
    REPORT_TEXT,
    SELECTION_TEXT,
    USUAL_BASE,
    Domain,
    Given,
    Goal,
    Limit,
    Settings,
)
from cerebellum.verify import Verified
from cerebellum.workspace import Workspace

if TYPE_CHECKING:
    from cerebellum.llama.native import LlamaEngine
    from cerebellum.llama.offload import Offload
    from cerebellum.source import Source


class Pipeline(click.Group):
    """Lists commands in the order they were written, which is the order of the pipeline."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


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
@worker_options
@click.option("--bench", is_flag=True, help="Question benchmarks too, on the samples that come along.")
@timings_option
@json_option
def demo(
    out: Path,
    threads: int,
    gpu_layers: int | None,
    bench: bool,
    timings: bool,
    as_json: bool,
    **workers: Any,
) -> None:
    """The whole pipeline on the small model that comes with Cerebellum.

    It decides and reports on English prose, which is all that this model was trained on.
    """
    hiring = take_workers(workers | {"gpu_layers": gpu_layers})
    placed = _placed(out, DEMO_MODEL, 512)
    settings = Settings(
        source=DEMO_MODEL,
        select_text=SELECTION_TEXT,  # and not DEFAULT_TEXTS: code, German and French are foreign to this model,
        report_text=REPORT_TEXT,  # which has 15M parameters and learned from the English Wikipedia alone
        imatrix_chunks=100,
        report_chunks=100,
        threads=threads,
        gpu_layers=placed.gpu_layers if gpu_layers is None else gpu_layers,
        gpu_room=placed.gpu_room if gpu_layers is None else None,
        encoder=DEFAULT_ENCODER,
    )
    _run(_workspace(out, settings, hiring), as_json, _DEMO_BENCH if bench else None, timings)


@cli.command()
@click.argument("source", type=PathArgument)
@folder_option
@recipe_option
@source_options
@worker_options
@bench_options
@timings_option
@json_option
def run(
    as_json: bool, out: Path, bench: bool, bench_limit: int, data: Path | None, timings: bool, **asked: Any
) -> None:
    """The whole pipeline: SOURCE to a smaller GGUF with its evidence.

    SOURCE is a GGUF, a folder of safetensors, owner/repo of the Hub, or hf:owner/repo/file.gguf.
    """
    hiring = take_workers(asked)
    request = {"limit": bench_limit, "data": data, "seed": asked["seed"]} if bench else None
    workspace = _workspace(out, _settings(asked, out), hiring)
    _run(workspace, as_json, request, timings)


@cli.command()
@click.argument("model", type=PathArgument)
@json_option
def inspect(model: Path, as_json: bool) -> None:
    """What a GGUF is made of: its groups, and the types each may take."""
    from cerebellum import inspect as inspected

    described = inspected(model)
    _answer(described, as_json, *tables.inspect_tables(described))


@cli.command()
@click.argument("source", type=PathArgument)
@click.option("-o", "--out", type=PathArgument, required=True, help="The GGUF to write.")
@click.option("--force", is_flag=True, help="Replace a file that is no matrix made here.")
@importance_text_option
@ctx_option
@first_chunks_option
@engine_options
@json_option
def imatrix(
    source: Path,
    out: Path,
    imatrix_text: tuple[tuple[Domain, ...], ...],
    ctx: int,
    chunks: int,
    threads: int,
    gpu_layers: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Importance matrix of SOURCE, in llama.cpp's format."""
    from cerebellum.imatrix import compute_or_reuse, refuse_foreign
    from cerebellum.source import open_source
    from cerebellum.texts import load_corpora

    texts = texts_of(imatrix_text, "--imatrix-text", "select")
    if not force:
        refuse_foreign(out)
    opened = open_source(source, allow_requantize=True)
    _admitted(source)
    engine = _engine(threads, gpu_layers, source, ctx)
    corpus = load_corpora(engine, source, texts, ctx)
    matrix = compute_or_reuse(
        engine=engine,
        shards=opened.paths,
        fingerprint=lambda: opened.fingerprint,
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
    _answer(answer, as_json, tables.matrix_line(out, len(matrix.entries), matrix.chunk_count, ctx))


@cli.command()
@click.argument("source", type=PathArgument)
@click.argument("preset", type=PresetName())
@click.option("-o", "--out", type=PathArgument, required=True, help="The GGUF to write.")
@click.option("--imatrix", type=PathArgument, help="An importance matrix (GGUF or .dat) [default: none].")
@encoder_options
@click.option(
    "--moments",
    type=PathArgument,
    help="Second moments, used as they are, or made where missing [default: beside OUT].",
)
@importance_text_option
@ctx_option
@first_chunks_option
@click.option("--force", is_flag=True, help="Replace a file that this command did not write.")
@click.option("--allow-requantize", is_flag=True, help="Accept a source that is quantized already.")
@engine_options
@json_option
def quantize(source: Path, threads: int, gpu_layers: int | None, as_json: bool, **asked: Any) -> None:
    """SOURCE at one of llama.cpp's presets, llama-quantize's job: rounded by our encoder or by ggml's."""
    from cerebellum.cli.quantize import Quantizing
    from cerebellum.cli.quantize import quantize as quantized

    asked["texts"] = texts_of(asked.pop("imatrix_text"), "--imatrix-text", "select")
    request = Quantizing(source=source, threads=threads, **asked)
    _admitted(source)
    found = quantized(request, _engine(threads, gpu_layers, source, asked["ctx"]), ProgressReporter())
    _answer(found, as_json, tables.quantized_line(found))


@cli.command()
@click.argument("source", type=PathArgument)
@folder_option
@source_options
@worker_options
@json_option
def measure(as_json: bool, out: Path, **asked: Any) -> None:
    """Every group of SOURCE alone at the demoted type, or with --budget at every type, into the run folder."""
    from cerebellum.run import measure_stage

    hiring = take_workers(asked)
    done = measure_stage(_workspace(out, _settings(asked, out), hiring))
    answer = plain(done.found) | {"measured": done.measured, "reused": done.reused}
    counts = f"{done.measured} chunks measured now, {done.reused} already in the ledger"
    _answer(answer, as_json, *tables.measured_tables(done.found), counts)


@cli.command()
@click.argument("target", type=PathArgument)
@click.option("--measurements", type=PathArgument, help="Measurements to plan from, instead of the folder's.")
@click.option("--max-increase", type=Percent(), help="Another limit than the run's.")
@size_options
@recipe_option
@click.option("--frontier", is_flag=True, help="The whole curve of size against damage, from those curves.")
@click.option("--base", type=PresetName(), help="Another preset [with a GGUF; default: Q3_K_M].")
@click.option("--demote", type=WeightType(), help="Another type [with a GGUF; default: Q2_K].")
@json_option
def plan(
    target: Path,
    measurements: Path | None,
    base: str | None,
    frontier: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """What to demote: from a run folder, or from a GGUF (its header is enough) and --measurements."""
    if frontier:
        _show_frontier(target, as_json)
        return
    if target.is_dir():
        planned = _plan_folder(target, measurements, asked)
    else:
        planned = _plan_file(target, measurements, base, asked)
    _answer(_of_sizes(planned), as_json, *(part for each in planned for part in tables.planned_tables(each)))


@cli.command()
@click.argument("folder", type=PathArgument)
@json_option
def build(folder: Path, as_json: bool) -> None:
    """The GGUF that the run folder's plan.json describes."""
    from cerebellum.run import build_stage

    workspace = _reopened(folder)
    with workspace.locked():
        paths = build_stage(workspace)
    built = [{"path": str(path), "bytes": _model_bytes(path)} for path in paths]
    lines = [f"{tables.shown(str(path))}  {units.size(_model_bytes(path))}" for path in paths]
    _answer(built[0] | ({"sizes": built} if len(built) > 1 else {}), as_json, *lines)


@cli.command()
@click.argument("folder", type=PathArgument)
@json_option
def verify(folder: Path, as_json: bool) -> None:
    """Proof of the finished file: read again, byte by byte, and measured on the report text."""
    from cerebellum.manifest import make_manifest
    from cerebellum.run import verify_stage

    workspace = _reopened(folder)
    with workspace.locked():
        found = verify_stage(workspace)
        manifest = make_manifest(workspace)
    names = [result.file for result in manifest.results]
    _answer(_of_sizes(found), as_json, *_verified_shown(names, found))
    sys.exit(0 if all(each.ok for each in found) else 1)


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
@click.option(
    "--seed", type=click.IntRange(0), default=1, show_default=True, help="Which questions a --limit takes."
)
@engine_options
@worker_options
@json_option
def bench(
    model: Path,
    against: tuple[Path, ...],
    tasks: str,
    protocol: str,
    out: Path | None,
    threads: int,
    as_json: bool,
    **asked: Any,
) -> None:
    """Question benchmarks of MODEL, paired with each base; asks nothing twice."""
    from cerebellum.bench.stage import BenchRequest, bench_files
    from cerebellum.cli.bench_tables import bench_tables

    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    if not names:
        raise click.UsageError(f"--tasks names none; give some of {','.join(TASKS)}")
    hiring = take_workers(asked)
    gpu_layers = asked.pop("gpu_layers")
    request = BenchRequest(tasks=names, protocols=PROTOCOLS if protocol == "both" else (protocol,), **asked)
    _admitted(model, *against)
    folder = out or model.with_name(f"{model.stem}-bench")
    engine = _engine(threads, gpu_layers, model)
    askers = hiring.askers(engine) if hiring else None
    found = bench_files((model, *against), request, engine.asker, folder, ProgressReporter(), askers)
    write_artifact(folder / "bench.json", found)
    _answer(found, as_json, *bench_tables(found))
    sys.exit(0 if found.audit.ok else 1)


@cli.command()
@click.argument("folder", type=PathArgument)
@click.option("--repo", help="The Hub repository it is for: owner/name.")
@published_options
@json_option
def card(folder: Path, repo: str | None, as_json: bool, **asked: Any) -> None:
    """The model card, report and charts of a finished run, from its artifacts alone."""
    from cerebellum.run import card_stage

    written = [str(path) for path in card_stage(folder, repo, take_published(asked))]
    _answer({"files": written}, as_json, *map(tables.shown, written))


@cli.command()
@click.argument("folder", type=PathArgument)
@click.argument("repo")
@click.option("--dry-run", is_flag=True, help="Only say what would be uploaded.")
@click.option("--private", is_flag=True, help="If the repository is made, make it private.")
@click.option("--texts", is_flag=True, help="Publish the run's own texts too, not only those of Cerebellum.")
@json_option
def push(folder: Path, repo: str, dry_run: bool, private: bool, texts: bool, as_json: bool) -> None:
    """A finished run to the Hub: model, card, report, evidence, manifest; REPO is owner/name."""
    from cerebellum.hub import push as push_run
    from cerebellum.run import card_stage

    found = push_run(folder, repo, lambda: card_stage(folder, repo), dry_run, private, texts)
    _answer(
        found,
        as_json,
        tables.upload_table(found),
        tables.shown(found.url or "") or "nothing was uploaded (--dry-run)",
    )


@cli.command()
@click.argument("manifest", type=PathArgument)
@click.option("--source", type=PathArgument, required=True, help="The GGUF that the manifest names.")
@click.option("-o", "--out", type=PathArgument, help="Where to build [default: reproduced/ beside it].")
@click.option("--base-file", type=PathArgument, help="The base, where the run was given one.")
@click.option(
    "--select-text",
    type=NamedText(),
    multiple=True,
    help="To compare, NAME=FILE of several [default: beside it, or Cerebellum's].",
)
@click.option(
    "--report-text",
    type=NamedText(),
    multiple=True,
    help="To compare, NAME=FILE of several [default: beside it, or Cerebellum's].",
)
@threads_option
@json_option
def reproduce(
    manifest: Path,
    source: Path,
    out: Path | None,
    base_file: Path | None,
    select_text: tuple[tuple[Domain, ...], ...],
    report_text: tuple[tuple[Domain, ...], ...],
    threads: int,
    as_json: bool,
) -> None:
    """The same GGUF again, bit for bit, from a MANIFEST and its source; names what changed."""
    from cerebellum.manifest import text_part
    from cerebellum.recipes.reproduce import Reproduction
    from cerebellum.recipes.reproduce import reproduce as make_again

    selection = named_texts(select_text, "--select-text")
    texts = {text_part("selection", text.name): text.path for text in selection}
    for text in named_texts(report_text, "--report-text"):
        texts[text_part("report", text.name)] = text.path
    request = Reproduction(
        manifest=manifest,
        source=source,
        out=out or manifest.parent / "reproduced",
        base_file=base_file,
        texts=texts,
        threads=threads,
    )
    found = make_again(request, _engine(threads, 0), ProgressReporter())
    _answer(found, as_json, tables.reproduced_table(found), tables.reproduced_line(found))
    sys.exit(0 if found.ok else 1)


@cli.command()
@click.argument("run_folder", metavar="RUN", type=PathArgument)
@click.option(
    "--select-text", type=NamedText(), multiple=True, help="The text that decides [default: the run's]."
)
@click.option(
    "--report-text", type=NamedText(), multiple=True, help="The text that reports [default: the run's]."
)
@click.option("--source", type=PathArgument, required=True, help="A finetune of the run's model, as GGUF.")
@folder_option
@click.option(
    "--chunks", type=click.IntRange(2), default=300, show_default=True, help="To check the plan on."
)
@click.option("--imatrix", type=PathArgument, help="The finetune's importance matrix [default: made now].")
@click.option("--base-file", type=PathArgument, help="The finetune's base, where the run was given one.")
@click.option(
    "--revise/--no-revise", default=True, show_default=True, help="Plan anew where it does not hold."
)
@engine_options
@json_option
def transfer(
    run_folder: Path,
    source: Path,
    out: Path,
    select_text: tuple[tuple[Domain, ...], ...],
    report_text: tuple[tuple[Domain, ...], ...],
    chunks: int,
    revise: bool,
    threads: int,
    gpu_layers: int | None,
    as_json: bool,
    **asked: Any,
) -> None:
    """The plan of a finished RUN on a finetune of its model: applied, checked, revised where it does not hold."""
    from cerebellum.cli.transfer_tables import transfer_tables
    from cerebellum.recipes.transfer import Finetune, transferred_settings
    from cerebellum.recipes.transfer import transfer as carried

    run = RunFolder(run_folder)
    given_paths = {name: path.absolute() for name, path in asked.items() if path is not None}
    finetune = Finetune(
        source=source,
        select_texts=named_texts(select_text, "--select-text"),
        report_texts=named_texts(report_text, "--report-text"),
        **given_paths,
    )
    settings = transferred_settings(run, finetune)
    placed = _placed(out, source, settings.ctx) if gpu_layers is None else None
    settings = msgspec.structs.replace(
        settings,
        threads=threads,
        gpu_layers=placed.gpu_layers if placed else gpu_layers or 0,
        gpu_room=placed.gpu_room if placed else None,
    )
    done = carried(run, settings, lambda asked: _workspace(out, asked), chunks, revise=revise)
    path = out / done.manifest.result.file
    answer = {"file": str(path), "transfer": done.transferred, "plan": done.plan, "verify": done.verified}
    _answer(answer, as_json, *transfer_tables(done), f"[bold]{tables.shown(str(path))}[/]")
    sys.exit(0 if done.ok else 1)


@cli.command()
@click.argument("model", type=PathArgument)
@click.option(
    "-o", "--out", type=PathArgument, help="Write both forms into this folder [default: say the first]."
)
@json_option
def recipe(model: Path, out: Path | None, as_json: bool) -> None:
    """The types of any GGUF's tensors: as llama-quantize's --tensor-type-file, and as a short JSON."""
    from cerebellum.recipes.recipe import recipe_of, tensor_type_lines, write_recipe
    from cerebellum.source import open_source

    found = recipe_of(open_source(model, allow_requantize=True))
    if out is None:
        _answer(found, as_json, *([] if as_json else map(tables.shown, tensor_type_lines(found))))
        return
    written = write_recipe(found, out)
    _answer(found, as_json, *tables.recipe_lines(found, *written))


@cli.command()
@click.argument("a", type=PathArgument)
@click.argument("b", type=PathArgument)
@text_option
@ctx_option
@first_chunks_option
@click.option("--until", type=Percent(), help="Stop when the change is known to within this (0.5%).")
@click.option(
    "--seed", type=click.IntRange(0), default=1, show_default=True, help="Order of the chunks with --until."
)
@engine_options
@json_option
def compare(a: Path, b: Path, threads: int, gpu_layers: int | None, as_json: bool, **asked: Any) -> None:
    """B against A on the same tokens: perplexity, KL divergence, top token, with intervals."""
    from cerebellum.comparison.pair import ComparisonSettings, open_pair
    from cerebellum.comparison.pair import compare as compare_models

    open_pair(a, b)
    _admitted(a, b)
    asked["until_pct"] = asked.pop("until")
    found = compare_models(
        _engine(threads, gpu_layers, a, asked["ctx"]), a, b, ComparisonSettings(**asked), ProgressReporter()
    )
    _answer(found, as_json, tables.comparison_table(found))


@cli.command()
@click.argument("files", type=PathArgument, nargs=-1, required=True)
@click.option("--source", type=PathArgument, required=True, help="The model that all of them were made from.")
@click.option(
    "-o", "--out", type=PathArgument, help="A folder: goes on if stopped, keeps table, picture, JSON."
)
@judge_options
@engine_options
@json_option
def judge(
    files: tuple[Path, ...],
    source: Path,
    out: Path | None,
    threads: int,
    gpu_layers: int | None,
    as_json: bool,
    **asked: Any,
) -> None:
    """Any FILES of one model on several texts at once: who is not beaten in both size and damage."""
    from cerebellum.cli.judge_tables import judge_tables
    from cerebellum.comparison.judge import Judging, open_judged
    from cerebellum.comparison.judge import judge as judged
    from cerebellum.comparison.published import publish

    request = Judging(files=files, source=source, **asked)
    open_judged(request)
    _admitted(source, *files)
    engine = _engine(threads, gpu_layers, source, asked["ctx"])
    found = judged(request, engine, ProgressReporter(), out)
    written = publish(out, found) if out else ()
    _answer(found, as_json, *judge_tables(found), *(tables.shown(str(path)) for path in written))


@cli.command()
@click.argument("model", type=PathArgument)
@text_option
@ctx_option
@first_chunks_option
@engine_options
@json_option
def perplexity(
    model: Path, text: Path, ctx: int, chunks: int, threads: int, gpu_layers: int | None, as_json: bool
) -> None:
    """Perplexity of MODEL, equal to llama-perplexity's."""
    from cerebellum.comparison.pair import perplexity_of

    _admitted(model)
    found = perplexity_of(
        _engine(threads, gpu_layers, model, ctx), model, text, ctx, chunks, ProgressReporter()
    )
    line = f"PPL = {found.ppl:.4f} ± {found.se:.5f}  ({found.chunks} chunks of {ctx})"
    _answer(found, as_json, line)


@cli.command()
@click.option(
    "--swap",
    "model",
    type=PathArgument,
    help="Check that variants swapped into MODEL are fresh loads, bit for bit.",
)
@engine_options
@json_option
def doctor(model: Path | None, threads: int, gpu_layers: int | None, as_json: bool) -> None:
    """What this machine has, and what is missing."""
    from cerebellum.cli.doctor import check_swaps, examine

    if model is not None:
        report = check_swaps(model, _engine(threads, gpu_layers, model), ProgressReporter())
        trouble = (
            [report.refusal] if report.refusal else [f"[red]not a fresh load's:[/] {w}" for w in report.wrong]
        )
        _answer(report.as_json(), as_json, f"{report.tried} variants swapped in and opened afresh", *trouble)
        sys.exit(0 if report.ok else 1)
    found = examine(Path.cwd())
    lines = [f"{key}: {value}" for key, value in found.items() if key not in ("problems", "ok", "devices")]
    for device in found.get("devices", []):
        free = units.size(device["free_bytes"])
        total = units.size(device["total_bytes"])
        lines.append(f"device {device['name']}: {device['description']}, {free} free of {total}")
    lines = [tables.shown(line) for line in lines]
    lines += [f"[red]problem:[/] {tables.shown(problem)}" for problem in found["problems"]] or [
        "[green]ready"
    ]
    _answer(found, as_json, *lines)
    sys.exit(0 if found["ok"] else 1)


def _settings(asked: dict[str, Any], folder: Path) -> Settings:
    """Returns what a run was asked for; a source on the Hub is fetched first, and a checkpoint converted."""
    recipe = asked.pop("recipe", None)
    goal = take_goal(asked, with_recipe=recipe is not None)
    asked["published"] = take_published(asked)
    settle_texts(asked)
    asked["source"] = _source(
        asked.pop("source"), asked.pop("converter"), asked.pop("converter_python"), folder
    )
    if recipe is not None:
        goal = _given(recipe, goal, asked)
    asked["base"] = asked["base"] or base_for(goal)
    asked["kld_cache_bytes"] = asked.pop("kld_cache")
    asked["split_above_bytes"] = asked.pop("split_above")
    if asked["gpu_layers"] is None:
        placed = _placed(folder, Path(asked["source"]), asked["ctx"])
        asked |= {"gpu_layers": placed.gpu_layers, "gpu_room": placed.gpu_room}
    values: dict[str, Any] = {
        key: value.absolute() if isinstance(value, Path) else value for key, value in asked.items()
    }
    return Settings(goal=goal, **values)


def _given(recipe: Path, goal: Goal, asked: dict[str, Any]) -> Given:
    """Returns the types that a recipe gives the source; its preset is the base, unless another was asked for."""
    from cerebellum.recipes.recipe import read_typed
    from cerebellum.source import open_source

    source = open_source(asked["source"], allow_requantize=asked["allow_requantize"])
    if asked["base"] is None and asked["base_file"] is None:
        asked["base"] = read_typed(recipe).preset
    found = given_by(recipe, source)
    chunks = goal.chunks if isinstance(goal, Limit) else 0
    return msgspec.structs.replace(found, chunks=chunks) if given("chunks") else found


def _source(source: Path, converter: Path | None, python: Path | None, folder: Path) -> Path:
    """Returns the GGUF that a run starts from; whatever is no file here is fetched or converted."""
    if source.is_file():
        return source
    from cerebellum.source.convert import model_file  # huggingface_hub takes half a second to load
    from cerebellum.source.converter import Chosen

    return model_file(str(source), Chosen(converter=converter, python=python), folder, ProgressReporter())


def _engine(
    threads: int, gpu_layers: int | None, model: Path | None = None, ctx: int = 512, room: int | None = None
) -> LlamaEngine:
    """Returns llama.cpp. Without a number of layers, as much of ``model`` as fits goes onto the graphics card."""
    from cerebellum.llama.native import EngineSettings, LlamaEngine

    tell = ProgressReporter().note
    if gpu_layers is None and model is not None:
        placed = _offload(model, ctx)
        gpu_layers = placed.gpu_layers
        room = placed.gpu_room
    settings = EngineSettings(threads=threads, gpu_layers=gpu_layers or 0, gpu_room=room)
    return LlamaEngine(settings, tell)


def _offload(model: Path, ctx: int) -> Offload:
    """Returns what of a model goes onto the graphics card, and says so in a line where there is one."""
    from cerebellum.llama.library import gpus
    from cerebellum.llama.offload import auto_offload
    from cerebellum.source import open_source

    if not gpus():
        return auto_offload([], ctx)
    placed = auto_offload(open_source(model, allow_requantize=True).paths, ctx)
    ProgressReporter().note(f"graphics card: {placed.line}")
    return placed


def _engine_for(settings: Settings) -> Engine:
    return _engine(settings.threads, settings.gpu_layers, room=settings.gpu_room)


def _placed(folder: Path, source: Path, ctx: int) -> Settings | Offload:
    """Returns where the layers go: as this folder's run had them, so that it goes on, or worked out now."""
    if (folder / SETTINGS).exists():
        with suppress(BadInput):
            before = RunFolder(folder).settings()
            if before.source == source.absolute() and before.ctx == ctx:
                return before
    return _offload(source, ctx)


def _workspace(folder: Path, settings: Settings, hiring: Hiring | None = None) -> Workspace:
    from cerebellum.llama.guard import admit

    hire = hiring.hire_for(settings) if hiring else None
    return Workspace(folder, settings, _engine_for(settings), ProgressReporter(), admit=admit, hire=hire)


def _admitted(*models: Path) -> None:
    """Raises BadInput where llama.cpp cannot bear one of the models; they are tried in another process."""
    from cerebellum.llama.guard import admit
    from cerebellum.source import open_source

    for model in models:
        admit(open_source(model, allow_requantize=True))


def _reopened(folder: Path) -> Workspace:
    return Workspace.reopen(folder, _engine_for, ProgressReporter())


# The demo's model is no chat model: a letter from it would say nothing.
_DEMO_BENCH = {"protocols": (LOGLIKELIHOOD,), "data": SAMPLES}


def _run(
    workspace: Workspace, as_json: bool, bench_request: dict[str, Any] | None, with_timings: bool
) -> None:
    from cerebellum.bench.stage import BenchRequest
    from cerebellum.cli.bench_tables import bench_tables
    from cerebellum.run import run_all

    manifest = run_all(workspace, BenchRequest(**bench_request) if bench_request else None)
    views = workspace.artifacts.results()
    finished = [
        _finished(workspace, view, result) for view, result in zip(views, manifest.results, strict=True)
    ]
    benched = [view.bench() for view in views] if bench_request else []
    first = finished[0]
    answer: dict[str, Any] = {
        "file": str(first.path),
        "plan": first.plan,
        "verify": first.verified,
        "manifest": manifest,
    }
    answer |= {"bench": benched[0]} if benched else {}
    answer |= {"sizes": [each.as_json() for each in finished]} if len(finished) > 1 else {}
    verified = [each.verified for each in finished]
    _answer(
        answer,
        as_json,
        *(part for each in finished for part in _plan_shown(workspace, each.plan)),
        *_verified_shown([each.path.name for each in finished], verified),
        *(part for each in benched if each is not None for part in bench_tables(each)),
        *((manifest.timings.table(),) if with_timings and manifest.timings else ()),
        *((tables.sizes_table([each.plan for each in finished], verified),) if len(finished) > 1 else ()),
        *(each.line() for each in finished),
        tables.card_line(workspace.folder),
        tables.run_instructions(first.path, first.plan.memory),
    )
    sys.exit(0 if all(each.ok for each in verified) else 1)


@dataclass(frozen=True, kw_only=True)
class _Finished:
    """One size of a finished run: its file, or the first of its splits, its bytes in all, its artifacts."""

    path: Path
    n_bytes: int
    plan: AnyPlan
    verified: Verified

    def as_json(self) -> dict[str, Any]:
        """Returns what `run --json` says of each of several sizes."""
        told = {"label": self.plan.file_label, "file": str(self.path), "bytes": self.n_bytes}
        return told | {"plan": self.plan, "verify": self.verified}

    def line(self) -> str:
        """Names the file and its size."""
        return f"[bold]{tables.shown(str(self.path))}[/]  {units.size(self.n_bytes)}"


def _finished(workspace: Workspace, view: RunFolder, result: ResultNamed) -> _Finished:
    path = workspace.path(result.file)
    return _Finished(path=path, n_bytes=result.bytes, plan=view.plan(), verified=view.verified())


def _verified_shown(names: Sequence[str], found: Sequence[Verified]) -> Iterator[Any]:
    """Shows the checks and perplexities of each size; of several each under the name of its file."""
    for name, each in zip(names, found, strict=True):
        if len(found) > 1:
            yield f"[bold]{tables.shown(name)}[/]"
        yield tables.verify_table(each)
        yield tables.report_table(each)
        if each.speeds is not None:
            yield tables.shown(each.speeds.told())
        yield from tables.domain_tables(each)


def _of_sizes(found: Sequence[Any]) -> Any:
    """Returns the one answer of a run for one size, or the answers of several in their order."""
    return found[0] if len(found) == 1 else {"sizes": [plain(each) for each in found]}


def _model_bytes(path: Path) -> int:
    """Returns the bytes of a model with all of its splits."""
    from cerebellum.source import open_source

    return open_source(path, allow_requantize=True).n_bytes


def _plan_shown(workspace: Workspace, plan: AnyPlan) -> tuple[Any, ...]:
    measured = workspace.path(MEASUREMENTS).exists()
    saved = (tables.tokens_saved(workspace.artifacts.measurements()),) if measured else ()
    return *tables.planned_tables(plan), *saved


def _show_frontier(folder: Path, as_json: bool) -> None:
    from cerebellum.plan.budget import frontier

    workspace = Workspace.reopen(folder, _engine_for, ProgressReporter(), planning=True)
    curve = frontier(workspace.artifacts.curves(), workspace.layout, workspace.settings.goal.objective)
    _answer(curve, as_json, tables.frontier_table(curve))


def _plan_folder(folder: Path, measurements: Path | None, asked: dict[str, Any]) -> tuple[AnyPlan, ...]:
    """Plans in a folder; where that fails, the folder stays as it was."""
    from cerebellum.run import way_of
    from cerebellum.source import open_source

    def changed(settings: Settings) -> Settings:
        source = open_source(settings.source, allow_requantize=True)
        return msgspec.structs.replace(settings, goal=_replanned_goal(settings.goal, asked, source))

    workspace = Workspace.reopen(folder, _engine_for, ProgressReporter(), planning=True, changed=changed)
    with workspace.locked():
        planned = way_of(workspace.settings.goal).replan(workspace, measurements)
        workspace.save_settings()
    return planned


def _replanned_goal(goal: Goal, asked: dict[str, Any], source: Source) -> Goal:
    """Returns the folder's goal with what was asked for instead; another kind of goal replaces it."""
    sizes = take_sizes(asked)
    if asked["recipe"] is not None:
        refuse_beside("--recipe", ("budget", "fit", "max_increase", "demote", "measurements"))
        return given_by(asked["recipe"], source)
    limit = {"max_increase_pct": asked["max_increase"], "demote": asked["demote"]}
    limit = {key: value for key, value in limit.items() if value is not None}
    if sizes and limit:
        raise click.UsageError(
            "a size and a limit exclude each other: give --budget or --fit, or --max-increase and --demote"
        )
    if sizes:
        return goal.with_sizes(sizes)
    return goal.with_limit(limit) if limit else goal


def _plan_file(
    model: Path, measurements: Path | None, base: str | None, asked: dict[str, Any]
) -> tuple[AnyPlan, ...]:
    from cerebellum.llama.guard import check_contents
    from cerebellum.recipes.recipe import read_typed
    from cerebellum.run import way_of
    from cerebellum.source import open_source

    source = open_source(model, allow_requantize=True)
    check_contents(source)
    goal = _replanned_goal(Limit(), asked, source)
    preset = base or (asked["recipe"] and read_typed(asked["recipe"]).preset) or USUAL_BASE
    settings = Settings(source=model, goal=goal, base=preset)
    return way_of(settings.goal).plan_header(settings, _engine_for(settings), measurements)


def _answer(value: Any, as_json: bool, *shown: Any) -> None:
    with answering():
        if as_json:
            click.echo(json.dumps(plain(value), indent=2, allow_nan=False))
            return
        for part in shown:
            OUT.print(part, highlight=False, soft_wrap=isinstance(part, str))


def main() -> None:
    """Exit codes: 0 done, 1 the answer is no, 2 wrong use or bad input, 130 interrupted."""
    open_missing_streams()
    signal.signal(signal.SIGTERM, _interrupt)
    keep_stdout_for_answers()
    try:
        cli.main(standalone_mode=False)
    except CerebellumError as error:
        _fail(str(error), error.exit_code)
    except click.ClickException as error:
        _fail(error.format_message(), 2)
    except (click.exceptions.Abort, KeyboardInterrupt):
        _fail("interrupted; the same command goes on from here", 130)
    except BrokenPipeError:
        _fail("the reader of the output left before all of it was said", 1)
    except OSError as error:
        _fail(f"{error.filename or 'the disk'}: {error.strerror or error}; was it moved or removed?", 2)


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> None:
    say(f"cerebellum: {' '.join(message.splitlines())}")
    sys.exit(code)
