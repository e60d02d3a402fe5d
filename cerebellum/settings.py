"""What was asked of a run: the source, the texts, the engine and the goal. It is settings.json."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import msgspec

from cerebellum.codec import Artifact, Record
from cerebellum.gguf import SEARCHED
from cerebellum.verdicts import Threshold

DATA = Path(__file__).parent / "data"
DEMO_MODEL = DATA / "cerebellum-demo.F16.gguf"
SELECTION_TEXT = DATA / "selection.txt"
REPORT_TEXT = DATA / "report.txt"

Half = Literal["select", "report"]
HALVES: tuple[Half, ...] = ("select", "report")
"""What texts are for: to decide, or to tell what became of it."""

DOMAINS = ("prose", "code", "questions", "structured", "german", "french")
"""The texts of several domains that come along, each in two halves; training/domains.py makes them."""

K_LADDER = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
"""The types that every role is measured at for a budget."""

FINE_LADDER = SEARCHED
"""Types that quantize ten times as slowly: measured only where a plan could want them."""

Allocated = Literal["head", "embd"]
ALLOCATED: tuple[Allocated, ...] = ("head", "embd")
"""What the method calls sacred and a budget may yet be told to spend bytes on: output head and embeddings."""

Objective = Literal["kld", "ppl"]
KLD: Objective = "kld"
PPL: Objective = "ppl"
OBJECTIVES = (KLD, PPL)
"""What a budget makes least: KL divergence from the source, or perplexity."""


EncoderName = Literal["ours", "ggml"]
OURS: EncoderName = "ours"
GGML: EncoderName = "ggml"
ENCODERS = (OURS, GGML)
"""Who rounds weights: cerebellum/encode, or llama.cpp's own library as llama-quantize does."""

DEFAULT_ENCODER: EncoderName = OURS
"""What commands take where --encoder is not given."""


SPLIT_ABOVE_BYTES = 50_000_000_000
"""The Hub takes no larger file in one piece, and Ollama pulls no file that is split: split only where it must be."""


class Domain(Record, frozen=True, kw_only=True):
    """A text by the name of what it is of, such as code; a text that is given alone needs no name."""

    name: str = ""
    path: Path


def shipped_domains(half: Half) -> tuple[Domain, ...]:
    """Returns the texts of several domains that come along: those that select, or those that report."""
    return tuple(Domain(name=name, path=DATA / "domains" / f"{half}-{name}.txt") for name in DOMAINS)


ComeAlong = Literal["prose", "domains"]
"""The two sets of texts that come along: Wikipedia's prose, or texts of several domains."""

USUAL_BASE = "Q3_K_M"
"""The preset that everything is compared with where nobody names one and the goal wants no smaller one."""

DEFAULT_TEXTS: ComeAlong = "domains"
"""Which of them a command reads where none are named; benchmarks/domains.py measures what the choice does.

``perplexity`` and ``compare`` read REPORT_TEXT instead, WikiText-2 test: that number is held against other people's.
"""


def texts_that_come_along(which: ComeAlong, half: Half) -> tuple[Domain, ...]:
    """Returns one set of texts by its name: those that select, or those that report."""
    match which:
        case "domains":
            return shipped_domains(half)
        case "prose":
            return _alone(SELECTION_TEXT if half == "select" else REPORT_TEXT)


def held(texts: Sequence[Domain]) -> tuple[Path | None, tuple[Domain, ...]]:
    """Returns texts as Settings has them, absolute: one without a name as its path, others as domains and None."""
    if len(texts) == 1 and not texts[0].name:
        return texts[0].path.absolute(), ()
    return None, tuple(Domain(name=text.name, path=text.path.absolute()) for text in texts)


class Bytes(Record, frozen=True, kw_only=True, tag="bytes", tag_field="by"):
    """A size given as bytes of the whole file."""

    n_bytes: int


class Preset(Record, frozen=True, kw_only=True, tag="preset", tag_field="by"):
    """The size that one of llama.cpp's presets has for this model."""

    name: str


class Gpu(Record, frozen=True, kw_only=True, tag="gpu", tag_field="by"):
    """The largest file that runs on a GPU of ``n_bytes`` with ``context`` tokens of context."""

    n_bytes: int
    context: int = 4096


Size = Bytes | Preset | Gpu


class Limit(Record, frozen=True, kw_only=True, tag="limit", tag_field="goal"):
    """The published method: demote every group that does less damage than a limit allows.

    ``chunks`` 0 stops each group as soon as its verdict is sure; N gives every group the same N.
    ``max_chunks`` 0 means as many as the text has.

    What stages ask of either goal: which sacred tensors may be changed, whether layers of a role are told apart,
    the disk that predictions may take where nobody says (the first block of chunks here), and how many whole models
    the run folder will hold.
    """

    demote: str = "Q2_K"
    max_increase_pct: float = 3.0
    indifference_pct: float = 0.2
    alpha: float = 0.05
    chunks: int = 0
    max_chunks: int = 0

    allocate: ClassVar[tuple[Allocated, ...]] = ()
    layers_apart: ClassVar[bool] = False
    prediction_bytes: ClassVar[int] = 1 << 30
    wholes: ClassVar[int] = 2
    objective: ClassVar[Objective] = KLD

    @property
    def threshold(self) -> Threshold:
        """The limit with its indifference, as verdicts want it."""
        return Threshold(limit_pct=self.max_increase_pct, indifference_pct=self.indifference_pct)

    def with_sizes(self, sizes: tuple[Size, ...]) -> Budget:
        """Returns the budget that takes this goal's place."""
        return Budget(sizes=sizes)

    def with_limit(self, changed: dict[str, Any]) -> Limit:
        """Returns this limit with some of its fields changed."""
        return msgspec.structs.replace(self, **changed)


class Budget(Record, frozen=True, kw_only=True, tag="budget", tag_field="goal"):
    """The best file of each of some sizes: bytes go where the measurement says that they matter.

    All ``sizes`` are planned from one set of curves, and each becomes a file of its own. ``types`` are measured
    for every role, and IQ types too with ``fine_types``; with ``zoom`` the layers of a role are told apart.
    ``anchor`` is the type of all else while a part is measured. ``passes`` limits what the measurement may cost,
    in passes over the selection text. What ``allocate`` names is measured and planned like any group; else it is
    protected, as it is against a limit.
    """

    sizes: tuple[Bytes | Preset | Gpu, ...]
    types: tuple[str, ...] = K_LADDER
    fine_types: bool = True
    zoom: bool = True
    objective: Objective = KLD
    anchor: str = "Q8_0"
    passes: float = 2.0
    allocate: tuple[Allocated, ...] = ()

    prediction_bytes: ClassVar[int] = 8 << 30

    @property
    def layers_apart(self) -> bool:
        """Whether a plan may treat the layers of a role apart."""
        return self.zoom

    @property
    def wholes(self) -> int:
        """How many whole models the folder will hold: base, a result of each size and the IQ types of plans."""
        return 1 + len(self.sizes) + self.fine_types

    def with_sizes(self, sizes: tuple[Size, ...]) -> Budget:
        """Returns this budget for other sizes."""
        return msgspec.structs.replace(self, sizes=sizes)

    def with_limit(self, changed: dict[str, Any]) -> Limit:
        """Returns the limit that takes this goal's place."""
        return Limit(**changed)

    @property
    def offered(self) -> tuple[str, ...]:
        """The types that a plan may choose: those measured, and IQ types, which rounding errors foretell."""
        return tuple(dict.fromkeys((*self.types, *(FINE_LADDER if self.fine_types else ()))))


class Given(Record, frozen=True, kw_only=True, tag="given", tag_field="goal"):
    """The types are given, by somebody's recipe: nothing is chosen, and the whole is measured against the base.

    ``recipe`` is the name of its file and ``types`` has the type of every tensor that it names; others stay at
    the base. ``chunks`` of the selection text are read, 0 for all of it. ``label`` is that of the file's name, the
    base's where it is None.
    """

    recipe: str
    types: dict[str, str]
    chunks: int = 200
    label: str | None = None

    allocate: ClassVar[tuple[Allocated, ...]] = ()
    layers_apart: ClassVar[bool] = False
    prediction_bytes: ClassVar[int] = 8 << 30
    wholes: ClassVar[int] = 2
    objective: ClassVar[Objective] = KLD

    def with_sizes(self, sizes: tuple[Size, ...]) -> Budget:
        """Returns the budget that takes this goal's place."""
        return Budget(sizes=sizes)

    def with_limit(self, changed: dict[str, Any]) -> Limit:
        """Returns the limit that takes this goal's place."""
        return Limit(**changed)


Goal = Limit | Budget | Given
"""What a run is for. Whoever must know which matches on it; most only ask what both can tell."""


class Published(Artifact, frozen=True, kw_only=True):
    """published.json: what people say of a model for its card, where its own metadata lacks it or is wrong.

    ``base_model`` is the Hub's id of what was quantized, ``license`` one of the Hub's identifiers. None leaves the
    word to the metadata.
    """

    format: Literal[1] = 1
    base_model: str | None = None
    license: str | None = None
    name: str | None = None

    def over(self, before: Published) -> Published:
        """Returns what was said before, but for what is said here."""
        return Published(
            base_model=self.base_model or before.base_model,
            license=self.license or before.license,
            name=self.name or before.name,
        )


class Settings(Artifact, frozen=True, kw_only=True):
    """Everything that was asked. A count of 0 chunks means all that there are.

    ``gpu_layers`` go onto the GPU (-1: all), but of each model no more than ``gpu_room`` bytes of weights (None: no
    end); both as they were worked out, so that a run goes on with the numbers it began with.
    ``keep_shards`` leaves on the disk what only measuring needed; ``tokens_per_second`` times base and result.
    Where ``select_domains`` or ``report_domains`` name texts of several domains, these are read in place of the one
    text, which is None then. Settings that name no text are of prose, as those of older folders; what the command line
    takes where nobody names one is DEFAULT_TEXTS. The importance matrix is made from ``imatrix_text`` or
    ``imatrix_domains``, and where neither is named, from what selects.
    ``encoder`` rounds weights and ``feedback`` lets ours make up for errors by other columns; a folder that
    does not say was made with ggml's. A finished file of more than ``split_above_bytes`` is written as splits,
    each no larger than that.
    """

    format: Literal[3] = 3
    source: Path
    goal: Limit | Budget | Given = Limit()
    base: str = USUAL_BASE
    base_file: Path | None = None
    imatrix: Path | None = None
    imatrix_text: Path | None = None
    imatrix_domains: tuple[Domain, ...] = ()
    imatrix_chunks: int = 0
    select_text: Path | None = SELECTION_TEXT
    select_domains: tuple[Domain, ...] = ()
    report_text: Path | None = REPORT_TEXT
    report_domains: tuple[Domain, ...] = ()
    ctx: int = 512
    kld_cache_bytes: int | None = None
    report_chunks: int = 0
    threads: int = os.cpu_count() or 1
    gpu_layers: int = 0
    gpu_room: int | None = None
    seed: int = 1
    allow_requantize: bool = False
    encoder: EncoderName = GGML
    feedback: bool = True
    keep_shards: bool = False
    tokens_per_second: bool = False
    split_above_bytes: int = SPLIT_ABOVE_BYTES
    published: Published = Published()

    @property
    def select_texts(self) -> tuple[Domain, ...]:
        """The text that decides, or those of several domains."""
        return self.select_domains or _alone(self.select_text or SELECTION_TEXT)

    @property
    def select_name(self) -> str:
        """What people call the text that decides: its file's name, or its domains."""
        return " + ".join(text.name or text.path.name for text in self.select_texts)

    @property
    def report_texts(self) -> tuple[Domain, ...]:
        """The text that reports, or those of several domains."""
        return self.report_domains or _alone(self.report_text or REPORT_TEXT)

    @property
    def imatrix_texts(self) -> tuple[Domain, ...]:
        """The texts that were named for the importance matrix, none where it is made from those that select."""
        return self.imatrix_domains or (_alone(self.imatrix_text) if self.imatrix_text else ())

    @property
    def prediction_bytes(self) -> int:
        """Disk for predictions: a budget compares every part with them, a limit the first block of chunks."""
        return self.goal.prediction_bytes if self.kld_cache_bytes is None else self.kld_cache_bytes


def _alone(path: Path) -> tuple[Domain, ...]:
    return (Domain(path=path),)
