"""A finished run's artifacts without a model: granite-4.0-h-small with FIELD's published figures.

Intervals, traces and benchmarks are made up around them; names can be anything, as in the wild. Everything is
built from the types that the stages write, so that no second definition of an artifact can drift from them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar, cast

from msgspec import Struct
from msgspec.structs import replace

from cerebellum.bench.artifacts import (
    Audit,
    AuditCheck,
    BenchResults,
    ModelRow,
    PairRow,
    RequestRow,
    ScoreRow,
)
from cerebellum.codec import Artifact, write_artifact
from cerebellum.groups import GroupRecord, Groups, SourceFile
from cerebellum.manifest import BaseNamed, Manifest, NamedFile, ResultNamed, SourceNamed
from cerebellum.measure.artifacts import (
    Curves,
    Effect,
    Look,
    MeasurementRow,
    Measurements,
    Response,
    RoundingErrors,
)
from cerebellum.measure.method import Method
from cerebellum.plan.artifacts import (
    BudgetPlan,
    CandidateRow,
    FrontierRow,
    GpuMemory,
    LimitPlan,
    Plan,
    PlanRow,
    PointRow,
)
from cerebellum.settings import Settings
from cerebellum.stats.estimate import Estimate
from cerebellum.verify import Check, Measured, Report, Verified

# name, tensors, layers, base type, bytes saved, delta in percent
GROUPS = (
    ("ffn_gate_exps", 40, "all", "Q3_K", 920_000_000, 4.95),
    ("ffn_up_exps", 40, "all", "Q3_K", 920_000_000, 6.04),
    ("ffn_down_exps", 40, "all", "Q4_K+Q5_K", 2_180_000_000, 10.63),
    ("ffn_gate_shexp", 40, "all", "Q3_K", 25_600_000, 0.52),
    ("ffn_up_shexp", 40, "all", "Q3_K", 25_600_000, 0.55),
    ("ffn_down_shexp", 40, "all", "Q4_K+Q5_K", 60_700_000, 0.84),
    ("ssm_in", 36, "recurrent", "Q3_K", 251_000_000, 12.85),
    ("ssm_out", 36, "recurrent", "Q3_K", 123_000_000, 5.01),
    ("attn_k", 4, "attention", "Q3_K", 1_700_000, 2.9),
)
ATTENTION = (5, 15, 25, 35)
LAYERS = {
    "all": tuple(range(40)),
    "attention": ATTENTION,
    "recurrent": tuple(n for n in range(40) if n not in ATTENTION),
}
LIMIT = 3.0
SHIPPED = ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")
BASE_BYTES = 15_356_500_000
HOSTILE = "<script>alert(1)</script>|`x`\n# $\\alpha$ [click](http://evil.example) {{ 7*7 }}"

P = TypeVar("P", bound=Plan)
S = TypeVar("S", bound=Struct)


def write_run_folder(folder: Path, **changed: Artifact | None) -> Path:
    """Writes the artifacts; keyword arguments replace whole ones by name, and None leaves one out.

    groups.json has the groups of whatever plan is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    planned = cast(Plan, changed.get("plan") or plan())
    artifacts = {
        "source": source(),
        "groups": groups(planned),
        "measurements": measurements(),
        "plan": planned,
        "verify": verify(),
        "manifest": manifest(),
        "bench": bench(),
    } | changed
    for name, value in artifacts.items():
        if value is not None:
            write_artifact(folder / f"{name}.json", value)
    return folder


def source(**changed: object) -> SourceFile:
    metadata = {
        "general.architecture": "granitehybrid",
        "general.name": "Granite 4.0 H Small",
        "general.license": "apache-2.0",
        "general.source.huggingface.repository": "ibm-granite/granite-4.0-h-small",
        "general.languages": ["en", "de"],
        "granitehybrid.embedding_length": 4096,
        "granitehybrid.attention.head_count": 32,
        "granitehybrid.attention.head_count_kv": [8 if n in ATTENTION else 0 for n in range(40)],
        "granitehybrid.ssm.conv_kernel": 4,
        "granitehybrid.ssm.inner_size": 8192,
        "granitehybrid.ssm.state_size": 128,
        "granitehybrid.ssm.group_count": 1,
        "granitehybrid.vocab_size": 100_352,
        "vocabulary": 100_352,
        "chat_template": True,
    }
    made_up = SourceFile(
        architecture="granitehybrid",
        name="Granite 4.0 H Small",
        parameters=32_200_000_000,
        active_parameters=9_000_000_000,
        layers=40,
        experts=72,
        experts_used=10,
        attention_layers=ATTENTION,
        recurrent_layers=36,
        context_length=131_072,
        bytes=64_400_000_000,
        path="granite-4.0-h-small-F16.gguf",
        sha256="a" * 64,
        fingerprint="c" * 64,
        header_sha256="b" * 64,
        requantized=False,
        metadata=metadata,
    )
    return replace(made_up, **changed)


def with_metadata(**changed: object) -> SourceFile:
    """The source with other metadata, where ``__`` stands for the dot of a key."""
    given = {key.replace("__", "."): value for key, value in changed.items()}
    return source(metadata=source().metadata | given)


def groups(planned: Plan) -> Groups:
    return Groups(
        groups=tuple(
            GroupRecord(
                name=row.name,
                role=row.role,
                layers=row.layers,
                tensors=row.tensors,
                tensor_names=tuple(f"blk.{layer}.{row.role}.weight" for layer in row.layers),
                parameters=abs(row.bytes_saved),
                bytes=4 * abs(row.bytes_saved),
                types={"F16": row.tensors},
                protected=False,
                legal_types=("Q2_K", "Q3_K"),
            )
            for row in planned.groups
        )
    )


def verdict_of(delta: float, half: float) -> str:
    if delta + half < LIMIT:
        return "tolerant"
    return "sensitive" if delta - half > LIMIT else "undecided"


def trace(delta: float, n_chunks: int) -> tuple[Look, ...]:
    """An interval that closes as the square root of what was read."""
    steps = [Look(chunks=1, delta_pct=delta)]
    n = 4
    while n <= n_chunks:
        half = 6.4 / math.sqrt(n)
        wobble = 0.3 * half * math.sin(n)
        mean = delta + (0 if n * 2 > n_chunks else wobble)
        steps.append(Look(chunks=n, delta_pct=mean, ci_pct=(mean - half, mean + half)))
        n *= 2
    return tuple(steps)


def alone(name: str, delta: float) -> MeasurementRow:
    """A group at Q2_K, read on as many chunks as its verdict needs."""
    steps = trace(delta, 256 if abs(delta - LIMIT) < 1 else 4 if delta > 10 else 16 if delta > 6 else 64)
    last = steps[-1]
    assert last.ci_pct is not None
    return MeasurementRow(
        groups=(name,),
        type="Q2_K",
        delta_pct=delta,
        ci_pct=last.ci_pct,
        chunks=last.chunks,
        verdict=verdict_of(delta, last.ci_pct[1] - delta),
        kld_mean=delta / 150,
        kld_ci=(delta / 170, delta / 130),
        top1_agreement=0.97 - delta / 100,
        trace=steps,
    )


def measurements(**changed: object) -> Measurements:
    together = MeasurementRow(
        groups=tuple(sorted(SHIPPED)),
        type="Q2_K",
        delta_pct=1.9,
        ci_pct=(1.7, 2.1),
        chunks=256,
        verdict="tolerant",
        kld_mean=0.0127,
        kld_ci=(0.0121, 0.0133),
        top1_agreement=0.951,
    )
    made_up = Measurements(
        base="Q3_K_M",
        demote="Q2_K",
        threshold_pct=LIMIT,
        indifference_pct=0.0,
        text="selection.txt",
        text_sha256="c" * 64,
        ctx=512,
        seed=1,
        chunks_in_text=592,
        chunks_scored=1184,
        tokens_scored=310_000,
        tokens_full=1_510_000,
        alpha=0.05,
        measurements=(*(alone(name, delta) for name, *_, delta in GROUPS), together),
    )
    return replace(made_up, **changed)


def row_of(name: str, n: int, where: str, base_type: str, saved: int, delta: float) -> PlanRow:
    found = alone(name, delta)
    return PlanRow(
        name=name,
        role=name,
        layers=LAYERS[where],
        tensors=n,
        base_type=base_type,
        chosen_type="Q2_K" if name in SHIPPED else "base",
        bytes_saved=saved,
        delta_pct=found.delta_pct,
        ci_pct=found.ci_pct,
        chunks=found.chunks,
        verdict=found.verdict,
        decision="demoted" if name in SHIPPED else "kept",
    )


def plan(**changed: object) -> LimitPlan:
    rows = tuple(row_of(*group) for group in GROUPS)
    saved = sum(row.bytes_saved for row in rows if row.changed)
    made_up = LimitPlan(
        threshold_pct=LIMIT,
        indifference_pct=0.0,
        base="Q3_K_M",
        demote="Q2_K",
        groups=rows,
        predicted_delta_pct=1.92,
        measured_delta_pct=1.9,
        ci_pct=(1.7, 2.1),
        base_tensor_bytes=BASE_BYTES,
        tensor_bytes=BASE_BYTES - saved,
        bytes_saved=saved,
        file_bytes=BASE_BYTES - saved + 4_000_000,
        tensor_types={},
    )
    return replace(made_up, **changed)


def changed_at(rows: Sequence[S], place: int, **changed: object) -> tuple[S, ...]:
    """The same rows with one of them changed; a negative place counts from the end."""
    found = list(rows)
    found[place] = replace(found[place], **changed)
    return tuple(found)


def with_group(planned: P, place: int, **changed: object) -> P:
    """The same plan with one of its groups changed."""
    return replace(planned, groups=changed_at(planned.groups, place, **changed))


def verify(ok: bool = True, checks: Sequence[Check] | None = None, **report: object) -> Verified:
    """verify.json; further keyword arguments change its report."""
    made_up = Report(
        text="report.txt",
        text_sha256="d" * 64,
        same_as_selection=False,
        chunks=592,
        of_chunks=592,
        seed=None,
        source=Measured(ppl=5.9312, se=0.031, tokens=150_960),
        base=Measured(ppl=6.3376, se=0.034, tokens=150_960),
        result=Measured(ppl=6.4580, se=0.035, tokens=150_960),
        delta_pct=1.8998,
        ci_pct=(1.74, 2.06),
    )
    looked = (
        Check(name="types as planned", ok=True, detail="666 tensors"),
        Check(name="tensor bytes", ok=True, detail="546 bit-equal to the base, 120 to the demotion"),
        Check(name="metadata", ok=True, detail="43 keys copied as bytes"),
        Check(name="finite logits", ok=True, detail="150960 tokens scored"),
    )
    return Verified(ok=ok, checks=tuple(checks or looked), report=replace(made_up, **report))


def manifest(**changed: object) -> Manifest:
    made_up = Manifest(
        cerebellum="0.1.0",
        llama_cpp="llama-cpp-python",
        versions={"python": "3.11"},
        settings=Settings(source=Path("granite-F16.gguf")),
        seed=1,
        source=SourceNamed(
            name="Granite 4.0 H Small",
            files=("granite-F16.gguf",),
            sha256="a" * 64,
            header_sha256="b" * 64,
        ),
        imatrix=NamedFile(file="imatrix.gguf", sha256="e" * 64),
        base=BaseNamed(label="Q3_K_M", file=None, sha256=None),
        texts={"selection": "c" * 64, "report": "d" * 64},
        text_files={"selection": "selection.txt", "report": "report.txt"},
        tensor_types={},
        shards={"00-protected.base.000000000000.gguf": "f" * 64},
        evidence={},
        ledger_digest="1" * 64,
        result=ResultNamed(
            file="granite-4.0-h-small-Cerebellum-Q3_K_M.gguf",
            sha256="2" * 64,
            bytes=BASE_BYTES - 111_900_000 + 4_000_000,
        ),
    )
    return replace(made_up, **changed)


TASKS = (
    ("hellaswag", 10_042, 8_750, 8_771, 0.31),
    ("arc_challenge", 1_172, 1_063, 1_066, 0.72),
    ("mmlu_redux", 2_400, 1_647, 1_702, 0.0016),
)


def bench(**changed: object) -> BenchResults:
    """What `bench` writes: the finished file against its base."""
    scores = [
        score(task, model, correct, n)
        for task, n, right, base, _ in TASKS
        for model, correct in (("finished", right), ("Q3_K_M", base))
    ]
    made_up = BenchResults(
        models=(
            ModelRow(name="finished", sha256="3" * 64),
            ModelRow(name="Q3_K_M", sha256="4" * 64),
        ),
        request=RequestRow(
            tasks=tuple(task for task, *_ in TASKS),
            protocols=("loglikelihood",),
            limit=0,
            seed=1,
            rotations=1,
            generate=0,
            data={},
        ),
        scores=tuple(scores),
        paired=tuple(pair(*task) for task in TASKS),
        audit=Audit(ok=True, checks=()),
        evidence=(),
        session=(),
    )
    return replace(made_up, **changed)


def score(task: str, model: str, correct: int, n: int) -> ScoreRow:
    share = 100 * correct / n
    half = 196 * math.sqrt(correct / n * (1 - correct / n) / n)
    return ScoreRow(
        task=task,
        protocol="loglikelihood",
        metric="acc_norm",
        labels="original",
        model=model,
        correct=correct,
        n=n,
        accuracy_pct=share,
        ci_pct=(share - half, share + half),
        chance_pct=25.0,
        by_subject={},
    )


def pair(task: str, n: int, right: int, base: int, p: float) -> PairRow:
    change = 100 * (right - base) / n
    return PairRow(
        task=task,
        protocol="loglikelihood",
        metric="acc_norm",
        labels="original",
        model="finished",
        against="Q3_K_M",
        n=n,
        only_model=right,
        only_against=base,
        difference_pct=change,
        ci_pct=(change - 0.5, change + 0.5),
        p_value=p,
        detectable_pct=60 / math.sqrt(n) + 0.3,
        smallest_significant_pct=None,
        same_answer=0,
    )


def audit_row(model: str, task: str, protocol: str, problem: str) -> AuditCheck:
    """What the audit says of answers with one problem."""
    return AuditCheck(
        model=model,
        task=task,
        protocol=protocol,
        questions=100,
        not_finite=0,
        unread=0,
        empty=0,
        truncated=0,
        mojibake_prompts=0,
        mojibake_answers=0,
        chosen_shares={},
        letter_bias=(),
        turned=None,
        problems=(problem,),
    )


# --- by budget

CHOSEN = {"ssm_in": "Q4_K", "ssm_out": "Q4_K", "ffn_up_exps": "Q2_K"}
BASE_KLD = 0.09


def by_budget(**changed: object) -> dict[str, Artifact | None]:
    """The artifacts of `run --budget`, to give to `write_run_folder`: three groups moved."""
    return {"plan": budget_plan(**changed), "curves": curves(), "measurements": None}


def budget_plan(**changed: object) -> BudgetPlan:
    rows = tuple(budget_row(*group) for group in GROUPS)
    saved = sum(row.bytes_saved for row in rows)
    file_bytes = BASE_BYTES - saved + 4_000_000
    made_up = BudgetPlan(
        budget_bytes=15_000_000_000,
        objective="kld",
        base="Q3_K_M",
        groups=rows,
        predicted_delta_pct=1.92,
        measured_delta_pct=1.9,
        ci_pct=(1.7, 2.1),
        base_kld=BASE_KLD,
        predicted_kld=-0.03,
        measured_kld=-0.0312,
        kld_ci=(-0.034, -0.0284),
        candidates=(
            candidate(CHOSEN, file_bytes, -0.03, -0.0312),
            candidate({}, file_bytes - 9_000_000, -0.02, -0.02),
        ),
        points=tuple(point for name, *_, saved, delta in GROUPS for point in points(name, saved, delta)),
        frontier=tuple(
            FrontierRow(
                file_bytes=file_bytes + step * 10**8, predicted=-0.01 * step, predicted_kld=0.09 - 0.01 * step
            )
            for step in range(-2, 3)
        ),
        file_bytes=file_bytes,
        base_tensor_bytes=BASE_BYTES,
        tensor_bytes=BASE_BYTES - saved,
        bytes_saved=saved,
        tensor_types={},
    )
    return replace(made_up, **changed)


def budget_row(name: str, n: int, where: str, base_type: str, saved: int, delta: float) -> PlanRow:
    qtype = CHOSEN.get(name, "base")
    moved = {"base": 0, "Q2_K": saved, "Q4_K": -saved}[qtype]
    change = {"base": 0.0, "Q2_K": delta, "Q4_K": -delta / 3}[qtype]
    verdict = "kept" if not moved else "demoted" if moved > 0 else "promoted"
    return PlanRow(
        name=name,
        role=name,
        layers=LAYERS[where],
        tensors=n,
        base_type=base_type,
        chosen_type=qtype,
        bytes_saved=moved,
        delta_pct=change,
        ci_pct=(change - 0.1, change + 0.1),
        kld_change=change / 100,
        chunks=24,
        verdict=verdict,
        decision=verdict,
    )


def candidate(changes: dict[str, str], file_bytes: int, predicted: float, measured: float) -> CandidateRow:
    return CandidateRow(
        how="learned",
        changes=changes,
        file_bytes=file_bytes,
        predicted_kld=predicted,
        measured_kld=measured,
        kld_ci=(measured - 0.003, measured + 0.003),
        delta_pct=1.9,
        ci_pct=(1.7, 2.1),
        chunks=48,
    )


def points(name: str, saved: int, delta: float) -> tuple[PointRow, ...]:
    """A group at its base, one type down and one up, and one that broke; damage falls as bytes rise."""

    def at(qtype: str | None, n_bytes: int, damage: float) -> PointRow:
        around = Estimate(mean=damage, se=0.0005 / 2.0687, n=24)
        return PointRow(group=name, type=qtype, bytes=n_bytes, kld=around, nll=around)

    return (
        at(None, 4 * saved, 0.0),
        at("Q2_K", 3 * saved, delta / 100),
        at("Q4_K", 5 * saved, -delta / 300),
        PointRow(group=name, type="Q6_K", bytes=6 * saved, kld=None, nll=None),
    )


def curves() -> Curves:
    nothing = Estimate.exact(0.0)
    return Curves(
        base="Q3_K_M",
        text="selection.txt",
        text_sha256="c" * 64,
        ctx=512,
        seed=1,
        chunks=24,
        tokens_scored=1,
        passes=1.5,
        anchor_kld=0.001,
        base_kld=BASE_KLD,
        base_above_anchor=Effect(kld=nothing, nll=nothing),
        responses=tuple(
            Response(part=name, groups=(name,), type=qtype, kld=nothing, nll=nothing)
            for name, *_ in GROUPS
            for qtype in ("Q2_K", "Q4_K")
        ),
        rounding=RoundingErrors(anchor="Q8_0", at_anchor={}, at_base={}, of={}),
        method=Method(),
    )


def gpu_memory(**changed: object) -> GpuMemory:
    """What a plan takes on a gpu of 24 GiB: 4 attention layers and 36 recurrent ones."""
    made_up = GpuMemory(
        context=8192,
        sequences=1,
        weights=14 << 30,
        cache=128 << 20,
        cache_bytes_per_token=16_384,
        cache_from="llama.cpp",
        attention_layers=4,
        window=0,
        state=147 << 20,
        recurrent_layers=36,
        server_sequences=4,
        compute=341 << 20,
        compute_from="llama.cpp",
        reserve=512 << 20,
        total=(14 << 30) + (1128 << 20),
        card=24 << 30,
        free=(10 << 30) - (1128 << 20),
    )
    return replace(made_up, **changed)
