"""A finished run's artifacts without a model: granite-4.0-h-small with FIELD's published figures.

Intervals, traces and benchmarks are made up around them; names can be anything, as in the wild.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

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
LAYERS = {
    "all": list(range(40)),
    "attention": [5, 15, 25, 35],
    "recurrent": [n for n in range(40) if n not in (5, 15, 25, 35)],
}
LIMIT = 3.0
SHIPPED = ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")
BASE_BYTES = 15_356_500_000
HOSTILE = "<script>alert(1)</script>|`x`\n# $\\alpha$ [click](http://evil.example) {{ 7*7 }}"


def write_run_folder(folder: Path, **changed: Any) -> Path:
    """Write the artifacts; keyword arguments replace whole artifacts by name."""
    folder.mkdir(parents=True, exist_ok=True)
    artifacts = {
        "source": source(),
        "groups": groups(),
        "measurements": measurements(),
        "plan": plan(),
        "verify": verify(),
        "manifest": manifest(),
        "bench": bench(),
    } | changed
    for name, value in artifacts.items():
        if value is not None:
            (folder / f"{name}.json").write_text(json.dumps(value, indent=2))
    return folder


def source(**changed: Any) -> dict[str, Any]:
    metadata = {
        "general.architecture": "granitehybrid",
        "general.name": "Granite 4.0 H Small",
        "general.license": "apache-2.0",
        "general.source.huggingface.repository": "ibm-granite/granite-4.0-h-small",
        "general.languages": ["en", "de"],
        "granitehybrid.embedding_length": 4096,
        "granitehybrid.attention.head_count": 32,
        "granitehybrid.attention.head_count_kv": [8 if n in LAYERS["attention"] else 0 for n in range(40)],
        "granitehybrid.ssm.conv_kernel": 4,
        "granitehybrid.ssm.inner_size": 8192,
        "granitehybrid.ssm.state_size": 128,
        "granitehybrid.ssm.group_count": 1,
        "granitehybrid.vocab_size": 100_352,
        "vocabulary": 100_352,
        "chat_template": True,
    }
    return {
        "architecture": "granitehybrid",
        "name": "Granite 4.0 H Small",
        "parameters": 32_200_000_000,
        "active_parameters": 9_000_000_000,
        "layers": 40,
        "experts": 72,
        "experts_used": 10,
        "attention_layers": LAYERS["attention"],
        "recurrent_layers": 36,
        "context_length": 131_072,
        "bytes": 64_400_000_000,
        "path": "granite-4.0-h-small-F16.gguf",
        "sha256": "a" * 64,
        "header_sha256": "b" * 64,
        "requantized": False,
        "metadata": metadata,
    } | changed


def groups() -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "role": name,
            "layers": LAYERS[where],
            "tensors": n,
            "tensor_names": [f"blk.{layer}.{name}.weight" for layer in LAYERS[where]],
            "parameters": saved,
            "bytes": 4 * saved,
            "types": {"F16": n},
            "protected": False,
            "legal_types": ["Q2_K", "Q3_K"],
        }
        for name, n, where, _, saved, _ in GROUPS
    ]


def verdict_of(delta: float, half: float) -> str:
    if delta + half < LIMIT:
        return "tolerant"
    return "sensitive" if delta - half > LIMIT else "undecided"


def trace(delta: float, n_chunks: int) -> list[dict[str, Any]]:
    """An interval that closes as the square root of what was read."""
    steps: list[dict[str, Any]] = [{"chunks": 1, "delta_pct": delta, "ci_pct": None}]
    n = 4
    while n <= n_chunks:
        half = 6.4 / math.sqrt(n)
        wobble = 0.3 * half * math.sin(n)
        mean = delta + (0 if n * 2 > n_chunks else wobble)
        steps.append({"chunks": n, "delta_pct": mean, "ci_pct": [mean - half, mean + half]})
        n *= 2
    return steps


def measurements() -> dict[str, Any]:
    rows = []
    for name, _, _, _, _, delta in GROUPS:
        steps = trace(delta, 256 if abs(delta - LIMIT) < 1 else 4 if delta > 10 else 16 if delta > 6 else 64)
        half = steps[-1]["ci_pct"][1] - steps[-1]["delta_pct"]
        rows.append(
            {
                "groups": [name],
                "type": "Q2_K",
                "delta_pct": delta,
                "ci_pct": [delta - half, delta + half],
                "chunks": steps[-1]["chunks"],
                "verdict": verdict_of(delta, half),
                "kld_mean": delta / 150,
                "kld_ci": [delta / 170, delta / 130],
                "top1_agreement": 0.97 - delta / 100,
                "trace": steps,
            }
        )
    rows.append(
        {
            "groups": sorted(SHIPPED),
            "type": "Q2_K",
            "delta_pct": 1.9,
            "ci_pct": [1.7, 2.1],
            "chunks": 256,
            "verdict": "tolerant",
            "kld_mean": 0.0127,
            "kld_ci": [0.0121, 0.0133],
            "top1_agreement": 0.951,
            "trace": [],
        }
    )
    return {
        "base": "Q3_K_M",
        "demote": "Q2_K",
        "threshold_pct": LIMIT,
        "text": "selection.txt",
        "text_sha256": "c" * 64,
        "ctx": 512,
        "seed": 1,
        "chunks_in_text": 592,
        "tokens_scored": 310_000,
        "tokens_full": 1_510_000,
        "alpha": 0.05,
        "measurements": rows,
    }


def plan(**changed: Any) -> dict[str, Any]:
    rows = []
    alone = {row["groups"][0]: row for row in measurements()["measurements"] if len(row["groups"]) == 1}
    for name, n, _, base_type, saved, _ in GROUPS:
        row = alone[name]
        rows.append(
            {
                "name": name,
                "tensors": n,
                "base_type": base_type,
                "chosen_type": "Q2_K" if name in SHIPPED else "base",
                "bytes_saved": saved,
                "delta_pct": row["delta_pct"],
                "ci_pct": row["ci_pct"],
                "chunks": row["chunks"],
                "verdict": row["verdict"],
                "decision": "demoted" if name in SHIPPED else "kept",
                "measured_with": [],
            }
        )
    saved = sum(row["bytes_saved"] for row in rows if row["decision"] == "demoted")
    return {
        "mode": "threshold",
        "threshold_pct": LIMIT,
        "base": "Q3_K_M",
        "demote": "Q2_K",
        "groups": rows,
        "predicted_delta_pct": 1.92,
        "measured_delta_pct": 1.9,
        "ci_pct": [1.7, 2.1],
        "base_tensor_bytes": BASE_BYTES,
        "tensor_bytes": BASE_BYTES - saved,
        "bytes_saved": saved,
        "tensor_types": {},
    } | changed


def verify(**changed: Any) -> dict[str, Any]:
    report = {
        "text": "report.txt",
        "text_sha256": "d" * 64,
        "same_as_selection": False,
        "chunks": 592,
        "of_chunks": 592,
        "source": {"ppl": 5.9312, "se": 0.031, "tokens": 150_960},
        "base": {"ppl": 6.3376, "se": 0.034, "tokens": 150_960},
        "result": {"ppl": 6.4580, "se": 0.035, "tokens": 150_960},
        "delta_pct": 1.8998,
        "ci_pct": [1.74, 2.06],
    }
    checks = [
        {"name": "types as planned", "ok": True, "detail": "666 tensors"},
        {"name": "tensor bytes", "ok": True, "detail": "546 bit-equal to the base, 120 to the demotion"},
        {"name": "metadata", "ok": True, "detail": "43 keys copied as bytes"},
        {"name": "finite logits", "ok": True, "detail": "150960 tokens scored"},
    ]
    return {"ok": True, "checks": checks, "report": report | changed}


def manifest(**changed: Any) -> dict[str, Any]:
    return {
        "format": 2,
        "cerebellum": "0.1.0",
        "source": {"name": "Granite 4.0 H Small", "files": ["granite-F16.gguf"], "sha256": "a" * 64},
        "imatrix": {"file": "imatrix.gguf", "sha256": "e" * 64},
        "texts": {"selection": "c" * 64, "report": "d" * 64},
        "text_files": {"selection": "selection.txt", "report": "report.txt"},
        "shards": {"00-protected.base.000000000000.gguf": "f" * 64},
        "ledger_digest": "1" * 64,
        "result": {
            "file": "granite-4.0-h-small-Cerebellum-Q3_K_M.gguf",
            "sha256": "2" * 64,
            "bytes": BASE_BYTES - 111_900_000 + 4_000_000,
        },
    } | changed


def bench(**changed: Any) -> dict[str, Any]:
    """What `bench` writes: the finished file against its base, with keys that the card does not know."""
    scores, paired = [], []
    for task, n, right, base, p in (
        ("hellaswag", 10_042, 8_750, 8_771, 0.31),
        ("arc_challenge", 1_172, 1_063, 1_066, 0.72),
        ("mmlu_redux", 2_400, 1_647, 1_702, 0.0016),
    ):
        way = {"task": task, "protocol": "loglikelihood", "metric": "acc_norm", "labels": "original"}
        for model, correct in (("finished", right), ("Q3_K_M", base)):
            share = 100 * correct / n
            half = 196 * math.sqrt(correct / n * (1 - correct / n) / n)
            row = {"model": model, "correct": correct, "n": n, "accuracy_pct": share}
            scores.append(way | row | {"ci_pct": [share - half, share + half], "chance_pct": 25.0})
        change = 100 * (right - base) / n
        pair = {"model": "finished", "against": "Q3_K_M", "n": n, "difference_pct": change, "p_value": p}
        could_show = {"detectable_pct": 60 / math.sqrt(n) + 0.3}
        paired.append(way | pair | could_show | {"ci_pct": [change - 0.5, change + 0.5]})
    models = [{"name": "finished", "sha256": "3" * 64}, {"name": "Q3_K_M", "sha256": "4" * 64}]
    return {
        "format": 1,
        "models": models,
        "scores": scores,
        "paired": paired,
        "audit": {"ok": True},
    } | changed


def by_budget() -> dict[str, Any]:
    """The artifacts of `run --budget`, to give to `write_run_folder`: three groups moved."""
    chosen = {"ssm_in": "Q4_K", "ssm_out": "Q4_K", "ffn_up_exps": "Q2_K"}
    points = [point for name, _, _, _, saved, delta in GROUPS for point in curve(name, saved, delta)]
    rows = []
    for name, n, _, base_type, saved, delta in GROUPS:
        kind = chosen.get(name, "base")
        moved = {"base": 0, "Q2_K": saved, "Q4_K": -saved}[kind]
        verdict = "kept" if not moved else "demoted" if moved > 0 else "promoted"
        change = {"base": 0.0, "Q2_K": delta, "Q4_K": -delta / 3}[kind]
        rows.append(
            {
                "name": name,
                "tensors": n,
                "base_type": base_type,
                "chosen_type": kind,
                "bytes_saved": moved,
                "delta_pct": change,
                "ci_pct": [change - 0.1, change + 0.1],
                "kld_change": change / 100,
                "chunks": 24,
                "verdict": verdict,
                "decision": verdict,
                "measured_with": [],
            }
        )
    saved = sum(row["bytes_saved"] for row in rows)
    file_bytes = BASE_BYTES - saved + 4_000_000
    candidates = [
        {"changes": chosen, "file_bytes": file_bytes, "predicted_kld": -0.03, "measured_kld": -0.0312},
        {"changes": {}, "file_bytes": file_bytes - 9_000_000, "predicted_kld": -0.02, "measured_kld": -0.02},
    ]
    planned = plan(
        mode="budget",
        budget_bytes=15_000_000_000,
        objective="kld",
        groups=rows,
        measured_kld=-0.0312,
        kld_ci=[-0.034, -0.0284],
        candidates=candidates,
        file_bytes=file_bytes,
        tensor_bytes=BASE_BYTES - saved,
        bytes_saved=saved,
    )
    del planned["threshold_pct"], planned["demote"]
    text = {"text": "selection.txt", "text_sha256": "c" * 64, "ctx": 512, "seed": 1, "chunks": 24}
    measured = {"format": 2, "base_kld": 0.09, "rounding": {"anchor": "Q8_0"}, "responses": [{}] * 18}
    curves = text | measured | {"base": "Q3_K_M", "tokens_scored": 1, "passes": 1.5, "points": points}
    return {"plan": planned, "curves": curves, "measurements": None}


def curve(name: str, saved: int, delta: float) -> list[dict[str, Any]]:
    """A group at its base, one type down and one up; damage falls as bytes rise."""

    def at(kind: str, n_bytes: int, damage: float) -> dict[str, Any]:
        def around(mean: float) -> dict[str, float]:
            return {"mean": mean, "low": mean - 0.0005, "high": mean + 0.0005, "chunks": 24}

        return {"group": name, "type": kind, "bytes": n_bytes, "kld": around(damage), "nll": around(damage)}

    rows = [
        at("base", 4 * saved, 0.0),
        at("Q2_K", 3 * saved, delta / 100),
        at("Q4_K", 5 * saved, -delta / 300),
    ]
    return [*rows, {"group": name, "type": "Q6_K", "bytes": 6 * saved, "kld": None, "nll": None}]
