"""The options that commands share, and the goal that they come to."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import click
from click.core import ParameterSource

from cerebellum.errors import BadInput
from cerebellum.gguf import parse_preset, parse_weight_type, preset_label
from cerebellum.settings import (
    ALLOCATED,
    DEFAULT_ENCODER,
    DEFAULT_TEXTS,
    ENCODERS,
    HALVES,
    K_LADDER,
    KLD,
    OBJECTIVES,
    REPORT_TEXT,
    Budget,
    Bytes,
    ComeAlong,
    Domain,
    Given,
    Goal,
    Gpu,
    Half,
    Limit,
    Preset,
    Published,
    held,
    shipped_domains,
    texts_that_come_along,
)
from cerebellum.units import parse_size

if TYPE_CHECKING:
    from cerebellum.source import Source

Command = Callable[..., Any]


class PathName(click.Path):
    """A path that is one: an empty text, as of an unset variable in a script, is not the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Returns the path; fails where nothing was given."""
        if value == "":
            self.fail("an empty text is no path; is a variable of your script not set?", param, ctx)
        return Path(value)


PathArgument = PathName()

MAX_THREADS = 512
"""The most that ggml takes (GGML_MAX_N_THREADS); with more it ends the process without a word."""

DEFAULT_THREADS = min(os.cpu_count() or 1, MAX_THREADS)

_LEAST_GPU = 1 << 20  # bytes: below it a unit was forgotten
_DEFAULT_CONTEXT = 4096

_LIMIT_OPTIONS = ("max_increase", "demote", "indifference", "alpha", "chunks", "max_chunks")
_BUDGET_OPTIONS = ("types", "fine_types", "zoom", "objective", "anchor", "context", "allocate")


class Percent(click.ParamType[float]):
    """``3%`` or ``3``."""

    name = "percent"

    def __init__(self, low: float = 1e-9) -> None:
        self.low = low

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Returns the number; fails where it is none, or is below ``low`` or 1000 and more."""
        try:
            number = float(str(value).removesuffix("%"))
        except ValueError:
            self.fail(f"{value!r} is not a percentage such as 3%", param, ctx)
        if not self.low <= number < 1000:
            self.fail(f"{value} is not between 0% and 1000%", param, ctx)
        return number


class Chance(click.ParamType[float]):
    """A probability, neither impossible nor certain; ``nan`` is none."""

    name = "chance"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Returns the number; fails where it is not between 0 and 1."""
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0.0 < number < 1.0:
            self.fail(f"{value} is not between 0 and 1, such as 0.05", param, ctx)
        return number


class Size(click.ParamType[int]):
    """``14.2GB``, ``13GiB`` or bytes."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Returns bytes."""
        try:
            return parse_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class GpuSize(Size):
    """The memory of a graphics card, which is never a handful of bytes: ``24GiB``, not ``24``."""

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Returns bytes; fails where the unit was forgotten."""
        n_bytes = super().convert(value, param, ctx)
        if n_bytes < _LEAST_GPU:
            self.fail(f"{value} is {n_bytes:,} bytes; did you mean {value}GiB?", param, ctx)
        return n_bytes


class Listed(click.ParamType[Any]):
    """Several values by comma, each as ``item`` reads it, none twice."""

    def __init__(self, item: click.ParamType[Any]) -> None:
        self.item = item
        self.name = item.name

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        """Returns the values in the order given; fails where one is named twice, for two files would be one."""
        if isinstance(value, tuple):
            return value
        names = [name.strip() for name in str(value).split(",")]
        found = tuple(self.item.convert(name, param, ctx) for name in names)
        twice = next((name for name, each in zip(names, found, strict=True) if found.count(each) > 1), None)
        if twice is not None:
            self.fail(f"{twice} is named twice; name each size once", param, ctx)
        return found


class FileSize(click.ParamType[Any]):
    """A size in bytes, or a preset whose size for this model is meant."""

    name = "size or preset"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> Bytes | Preset:
        """Returns what was meant; fails, before anything is read, where it is neither."""
        if isinstance(value, Bytes | Preset):
            return value
        try:
            return Bytes(n_bytes=parse_size(str(value)))
        except ValueError as error:
            if str(value)[:1].isdigit() and "more bytes" in str(error):
                self.fail(str(error), param, ctx)
        try:
            return Preset(name=preset_label(parse_preset(str(value))))
        except BadInput as error:
            self.fail(f"{value!r} is neither a size such as 13GiB nor a preset; {error}", param, ctx)


_DOMAIN = re.compile(r"(?P<name>[\w.-]{1,40})=(?P<path>.+)", re.DOTALL)
COME_ALONG = get_args(ComeAlong)
"""Words that stand for texts that come along."""


class NamedText(click.ParamType[Any]):
    """``NAME=FILE``, a text of one domain, or a file alone, or ``prose`` or ``domains``: those that come along."""

    name = "[name=]file"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Domain, ...]:
        """Returns one text, or all of those that come along; a file whose own name has an = in it is a file."""
        text = str(value)
        if text in COME_ALONG:
            reports = param is not None and param.name == "report_text"
            return texts_that_come_along(cast(ComeAlong, text), "report" if reports else "select")
        found = None if Path(text).exists() else _DOMAIN.fullmatch(text)
        if found is not None:
            return (Domain(name=found["name"], path=Path(found["path"])),)
        return (Domain(path=PathArgument.convert(text, param, ctx)),)


def texts_of(given: Sequence[tuple[Domain, ...]], flag: str, half: Half) -> tuple[Domain, ...]:
    """Returns the texts that an option names, or those of the default where it was not given."""
    return named_texts(given, flag) or texts_that_come_along(DEFAULT_TEXTS, half)


def settle_texts(asked: dict[str, Any]) -> None:
    """Puts in place of the texts that were named what settings hold: one path, or several named domains.

    Where none is named for the importance matrix, settings hold none for it: it is made from what selects.
    Raises a usage error where several are given and one has no name, or two have the same.
    """
    for half in HALVES:
        path, domains = held(texts_of(asked.pop(f"{half}_text"), f"--{half}-text", half))
        asked |= {f"{half}_text": path, f"{half}_domains": domains}
    path, domains = held(named_texts(asked.pop("imatrix_text"), "--imatrix-text"))
    asked |= {"imatrix_text": path, "imatrix_domains": domains}


def named_texts(given: Sequence[tuple[Domain, ...]], flag: str) -> tuple[Domain, ...]:
    """Returns all texts that were given by one option; a usage error where they cannot be told apart."""
    texts = tuple(text for several in given for text in several)
    names = [text.name for text in texts]
    if len(texts) > 1 and not all(names):
        raise click.UsageError(f"{flag}: of several texts each needs a name, such as code=FILE")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise click.UsageError(f"{flag}: two texts are named {twice}; give each a name of its own")
    return texts


class WeightType(click.ParamType[str]):
    """A type that weights may have, by its name."""

    name = "type"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Returns the type's canonical name."""
        try:
            return parse_weight_type(str(value)).name
        except BadInput as error:
            self.fail(str(error), param, ctx)


class WeightTypes(click.ParamType[Any]):
    """Several types by comma."""

    name = "types"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """Returns the canonical names in the order given."""
        if isinstance(value, tuple):
            return value
        names = [name.strip() for name in str(value).split(",") if name.strip()]
        if not names:
            self.fail("no type is named; give some, such as Q2_K,Q4_K", param, ctx)
        return tuple(WeightType().convert(name, param, ctx) for name in names)


class PresetName(click.ParamType[str]):
    """One of llama.cpp's presets."""

    name = "preset"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Returns the preset's label."""
        try:
            return preset_label(parse_preset(str(value)))
        except BadInput as error:
            self.fail(str(error), param, ctx)


class BaseModel(click.ParamType[str]):
    """What was quantized, as the Hub names it: owner/name, or its address there."""

    name = "owner/name"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Returns owner/name; fails where the Hub would not take it."""
        from cerebellum.card.origin import repo_id

        found = repo_id(str(value).strip())
        if found is None:
            self.fail(f"{value!r} is no model on the Hub; give owner/name", param, ctx)
        return found


class License(click.ParamType[str]):
    """A licence by the Hub's identifier."""

    name = "license"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Returns the identifier; fails where the Hub knows no such."""
        from cerebellum.card.licenses import LICENSES

        found = str(value).strip().lower()
        if found not in LICENSES:
            self.fail(
                f"{value!r} is no identifier that the Hub knows; give one such as apache-2.0, or other",
                param,
                ctx,
            )
        return found


class GpuLayers(click.ParamType[Any]):
    """A number of layers, or ``auto``: as many as the graphics card holds."""

    name = "layers"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """Returns the number, or None for auto."""
        if value is None or str(value) == "auto":
            return None
        try:
            return int(str(value))
        except ValueError:
            self.fail(f"{value!r} is neither a number of layers nor auto", param, ctx)


def options(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Returns several click options as one decorator, shown in the order given."""

    def apply(command: Command) -> Command:
        return functools.reduce(lambda wrapped, option: option(wrapped), reversed(decorators), command)

    return apply


json_option = click.option("--json", "as_json", is_flag=True, help="JSON on stdout, nothing else there.")
ctx_option = click.option(
    "--ctx",
    type=click.IntRange(8),
    default=512,
    show_default=True,
    help="Tokens of a chunk that is measured.",
)
threads_option = click.option(
    "--threads", type=click.IntRange(1, MAX_THREADS), default=DEFAULT_THREADS, show_default=True
)
engine_options = options(
    threads_option,
    click.option(
        "--gpu-layers",
        type=GpuLayers(),
        default="auto",
        show_default=True,
        help="Layers on the graphics card: a number, -1 for all, or as many as fit.",
    ),
)
timings_option = click.option("--timings", is_flag=True, help="Say at the end where the time went.")
text_option = click.option(
    "--text", type=PathArgument, default=REPORT_TEXT, help="UTF-8 text [default: WikiText-2 test]."
)
first_chunks_option = click.option(
    "--chunks", type=click.IntRange(0), default=0, help="The first N chunks of the text [default: all]."
)
importance_text_option = click.option(
    "--imatrix-text",
    "--text",
    type=NamedText(),
    multiple=True,
    help=f"Text to make it from; NAME=FILE several times, prose or domains [default: {DEFAULT_TEXTS}].",
)
recipe_option = click.option(
    "--recipe",
    type=PathArgument,
    help="Instead of a limit: the types of a recipe (its JSON, a --tensor-type-file, or a GGUF).",
)
folder_option = click.option("-o", "--out", type=PathArgument, required=True, help="The run folder.")
encoder_options = options(
    click.option(
        "--encoder",
        type=click.Choice(ENCODERS),
        default=DEFAULT_ENCODER,
        show_default=True,
        help="Who rounds weights: our encoder, or ggml's as llama-quantize does.",
    ),
    click.option(
        "--feedback/--no-feedback",
        default=True,
        show_default=True,
        help="With our encoder: let columns make up for each other's errors, by second moments of activations.",
    ),
)
size_options = options(
    click.option(
        "--budget",
        type=Listed(FileSize()),
        help="Instead of a limit: the best file of this SIZE or PRESET's size; several by comma.",
    ),
    click.option(
        "--fit",
        type=Listed(GpuSize()),
        help="The best file for a graphics card of this SIZE; several by comma.",
    ),
    click.option(
        "--context",
        type=click.IntRange(8),
        default=_DEFAULT_CONTEXT,
        show_default=True,
        help="With --fit: tokens of context that the card must hold beside the file.",
    ),
)
limit_options = options(
    click.option(
        "--demote",
        type=WeightType(),
        default="Q2_K",
        show_default=True,
        help="Type that groups are tried at.",
    ),
    click.option("--max-increase", type=Percent(), default="3%", show_default=True, help="Limit on damage."),
    click.option(
        "--chunks",
        type=click.IntRange(0),
        default=0,
        help="Exactly N chunks for every group, at the same --alpha [default: as many as a verdict takes].",
    ),
    click.option(
        "--max-chunks", type=click.IntRange(0), default=0, help="A limit for each group [default: the text]."
    ),
    click.option(
        "--indifference",
        type=Percent(0),
        default="0.2%",
        show_default=True,
        help="What is surely under the limit and this much may be called tolerant, and the other way round.",
    ),
    click.option(
        "--alpha",
        type=Chance(),
        default=0.05,
        show_default=True,
        help="Chance that any verdict is wrong.",
    ),
)
budget_options = options(
    click.option(
        "--types",
        type=WeightTypes(),
        default=",".join(K_LADDER),
        show_default=True,
        help="With --budget or --fit: the types that every group is measured at.",
    ),
    click.option(
        "--fine-types/--no-fine-types",
        default=True,
        show_default=True,
        help="With --budget or --fit: try IQ types too, where the plan could want them.",
    ),
    click.option(
        "--zoom/--no-zoom",
        default=True,
        show_default=True,
        help="With --budget or --fit: treat the layers of a role apart where they differ.",
    ),
    click.option(
        "--objective",
        type=click.Choice(OBJECTIVES),
        default=KLD,
        show_default=True,
        help="With --budget or --fit: what is made least, KL divergence from the source or perplexity.",
    ),
    click.option(
        "--anchor",
        type=WeightType(),
        default="Q8_0",
        show_default=True,
        help="With --budget or --fit: the type of all else while a group is measured; smaller saves memory.",
    ),
    click.option(
        "--allocate",
        type=Listed(click.Choice(ALLOCATED)),
        default=(),
        help="With --budget or --fit: plan the output head, the embeddings or both (head,embd) too.",
    ),
)
published_options = options(
    click.option("--base-model", type=BaseModel(), help="For the card: the Hub's id of what is quantized."),
    click.option("--license", type=License(), help="For the card: its license, by the Hub's identifier."),
    click.option("--name", help="For the card: the model's name, instead of the metadata's."),
)
converter_options = options(
    click.option(
        "--converter",
        type=PathArgument,
        help="For safetensors: a checkout of llama.cpp to convert with [default: the one on PyPI].",
    ),
    click.option(
        "--converter-python",
        type=PathArgument,
        help="Python to run the converter with, torch in it [default: one made in the cache].",
    ),
)
source_options = options(
    converter_options,
    click.option(
        "--base",
        type=PresetName(),
        help="Preset everything is compared with [default: Q3_K_M, or a smaller one for a smaller --budget PRESET].",
    ),
    click.option("--base-file", type=PathArgument, help="A base made already, instead of --base."),
    limit_options,
    size_options,
    budget_options,
    click.option("--imatrix", type=PathArgument, help="An importance matrix (GGUF or .dat)."),
    click.option(
        "--imatrix-text",
        type=NamedText(),
        multiple=True,
        help="Text to make one from; NAME=FILE several times, prose or domains [default: --select-text].",
    ),
    click.option("--imatrix-chunks", type=click.IntRange(0), default=0, help="First N of it [default: all]."),
    encoder_options,
    click.option(
        "--select-text",
        type=NamedText(),
        multiple=True,
        help=f"Text that decides; NAME=FILE several times, prose or domains [default: {DEFAULT_TEXTS}].",
    ),
    click.option(
        "--report-text",
        type=NamedText(),
        multiple=True,
        help=f"Text that reports; NAME=FILE several times, prose or domains [default: {DEFAULT_TEXTS}].",
    ),
    ctx_option,
    click.option(
        "--kld-cache", type=Size(), help="Disk for predictions [default: 1GiB; with --budget 8GiB]."
    ),
    click.option(
        "--report-chunks", type=click.IntRange(0), default=0, help="N random chunks of --report-text."
    ),
    engine_options,
    click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Order of the chunks."),
    click.option(
        "--split-above",
        type=Size(),
        default="50GB",
        show_default=True,
        help="Write a larger result as splits of at most this SIZE, named as llama.cpp names them.",
    ),
    click.option("--allow-requantize", is_flag=True, help="Accept a source that is quantized already."),
    click.option(
        "--tokens-per-second",
        is_flag=True,
        help="Time the finished file and its base: prompt and generation.",
    ),
    click.option("--keep-shards", is_flag=True, help="Leave on the disk what only measuring needed."),
    published_options,
)
bench_options = options(
    click.option("--bench", is_flag=True, help="Question benchmarks of base and result at the end."),
    click.option("--bench-limit", type=click.IntRange(0), default=400, show_default=True, help="0: all."),
    click.option(
        "--data", type=PathArgument, help="Folder of the benchmark files [default: CEREBELLUM_DATA]."
    ),
)


_SIX = tuple((text.name, text.path) for text in shipped_domains("report"))


class NamedTexts(click.ParamType[Any]):
    """Texts with the names that tables give them: ``code=FILE``, or ``domains`` for the six that report.

    A file has its own name where none is given.
    """

    name = "name=file"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[tuple[str, Path], ...]:
        """Returns the name and path of each."""
        if isinstance(value, tuple):
            return value
        if value == "domains":
            return _SIX
        name, _, path = str(value).rpartition("=")
        if not path:
            self.fail(f"{value!r} names no file; give NAME=FILE", param, ctx)
        return ((name or Path(path).stem, Path(path)),)


def take_texts(
    _ctx: click.Context, _param: click.Parameter, given_texts: Sequence[tuple[tuple[str, Path], ...]]
) -> dict[str, Path]:
    """Returns texts by name, the domains that report where none was given; refuses a name that is there twice."""
    named = [text for texts in given_texts or (_SIX,) for text in texts]
    found = dict(named)
    if len(found) < len(named):
        raise click.UsageError("--text: two texts have one name; give each its own with NAME=FILE")
    return found


judge_options = options(
    click.option(
        "--text",
        "texts",
        type=NamedTexts(),
        multiple=True,
        callback=take_texts,
        help="NAME=FILE, a UTF-8 text, `domains`, or .jsonl with conversations for the model's chat template; "
        "may be repeated [default: the six domains that report].",
    ),
    ctx_option,
    click.option("--chunks", type=click.IntRange(0), default=0, help="Exactly N of each text, in one look."),
    click.option("--max-chunks", type=click.IntRange(0), default=0, help="A limit for each text."),
    click.option(
        "--alpha", type=Chance(), default=0.05, show_default=True, help="Chance that any order is wrong."
    ),
    click.option(
        "--tie",
        "tie_pct",
        type=Percent(0),
        default="2%",
        show_default=True,
        help="Damages that surely differ by less count as alike.",
    ),
    click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Order of the chunks."),
    click.option(
        "--kld-cache",
        "prediction_bytes",
        type=Size(),
        default="8GiB",
        show_default=True,
        help="Disk for the source's predictions.",
    ),
)


def given(name: str) -> bool:
    """Says whether an option of the current command was typed, whatever its value."""
    source = click.get_current_context().get_parameter_source(name)
    return source not in (None, ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)


def take_sizes(asked: dict[str, Any]) -> tuple[Bytes | Preset | Gpu, ...]:
    """Takes --budget, --fit and --context out of what was asked; nothing where neither size was given.

    Raises a usage error that names both options where two of them exclude each other.
    """
    budget, fit, context = (asked.pop(name) for name in ("budget", "fit", "context"))
    if budget is not None and fit is not None:
        raise click.UsageError("--budget and --fit exclude each other: give sizes, or graphics cards")
    if fit is None and given("context"):
        raise click.UsageError("--context is for --fit: give the graphics card's size with --fit too")
    if fit is not None:
        return tuple(Gpu(n_bytes=n_bytes, context=context) for n_bytes in fit)
    return budget or ()


def refuse_beside(flag: str, others: Iterable[str]) -> None:
    """Raises a usage error where one of some options was typed beside a flag that makes no use of it."""
    for name in others:
        if given(name):
            raise click.UsageError(f"{flag} and {_flag(name)} exclude each other: give one of them")


def given_by(recipe: Path, source: Source) -> Given:
    """Returns the goal of a recipe for a source; BadInput where it is of another model, or no recipe."""
    from cerebellum.recipes.recipe import read_typed

    return Given(recipe=recipe.name, types=read_typed(recipe).types(source))


def take_goal(asked: dict[str, Any], *, with_recipe: bool = False) -> Goal:
    """Takes the options of both goals out of what was asked and returns the one that was meant.

    Raises a usage error that names both options where one belongs to the other goal: an option that would be
    ignored in silence is a misunderstanding. ``with_recipe`` says that a recipe gives the types: of both goals'
    options it takes --chunks alone.
    """
    if with_recipe:
        others = {*_LIMIT_OPTIONS, *_BUDGET_OPTIONS, "budget", "fit"} - {"chunks"}
        refuse_beside("--recipe", sorted(others))
    sizes = take_sizes(asked)
    size_flag = "--budget" if given("budget") else "--fit"
    for name in _LIMIT_OPTIONS if sizes else ():
        if given(name):
            flag = _flag(name)
            raise click.UsageError(
                f"{size_flag} and {flag} exclude each other: {flag} is of runs with a limit"
            )
    for name in _BUDGET_OPTIONS if not sizes else ():
        if given(name):
            raise click.UsageError(f"{_flag(name)} is of runs with a size: give --budget or --fit too")
    limit = {name: asked.pop(name) for name in _LIMIT_OPTIONS}
    budget = {name: asked.pop(name) for name in _BUDGET_OPTIONS if name != "context"}
    if sizes:
        return Budget(sizes=sizes, **budget)
    if limit["chunks"] and limit["max_chunks"]:
        raise click.UsageError("--chunks and --max-chunks exclude each other: --chunks is exact already")
    limit["max_increase_pct"] = limit.pop("max_increase")
    limit["indifference_pct"] = limit.pop("indifference")
    return Limit(**limit)


def take_published(asked: dict[str, Any]) -> Published:
    """Takes what is said of the model for its card out of what was asked."""
    return Published(**{name: asked.pop(name) for name in ("base_model", "license", "name")})


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
