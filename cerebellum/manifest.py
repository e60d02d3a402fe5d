"""What made what -> manifest.json: enough to make the same file again, and to see what changed since.

It goes out with the file, so it names files and never says where on somebody's disk they lie.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cerebellum import __version__
from cerebellum.build import output_path
from cerebellum.files import atomic_writer, sha256_file
from cerebellum.llama.library import build_id
from cerebellum.workspace import Settings, Workspace, read_json, write_json

FORMAT = 2  # 1: hashes and settings; 2: tensor types, base and file names too, so that it can be reproduced
EVIDENCE = ("source.json", "groups.json", "measurements.json", "curves.json", "plan.json", "verify.json")
_PACKAGES = ("gguf", "llama-cpp-python", "numpy", "scipy")


def make_manifest(workspace: Workspace, changes: Mapping[str, str]) -> dict[str, Any]:
    """manifest.json of a run that shipped ``changes``; a matrix from elsewhere is put beside it."""
    out = output_path(workspace.folder, workspace.source, workspace.base)
    matrix = _beside(workspace.matrix.path, workspace.folder)
    manifest = {
        "format": FORMAT,
        "cerebellum": __version__,
        "llama_cpp": build_id(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "settings": _settings(workspace.settings),
        "seed": workspace.settings.seed,
        "source": _source(workspace),
        "imatrix": {"file": matrix.name, "sha256": workspace.matrix.sha256},
        "base": _base(workspace),
        "texts": {"selection": workspace.selection.sha256, "report": workspace.report_corpus.sha256},
        "text_files": {
            "selection": workspace.selection.path.name,
            "report": workspace.report_corpus.path.name,
        },
        "tensor_types": read_json(workspace.path("plan.json"))["tensor_types"],
        "shards": {path.name: sha256_file(path) for path in _shard_paths(workspace, changes)},
        "evidence": _evidence(workspace),
        "ledger_digest": workspace.ledger.digest(),
        "result": {"file": out.name, "sha256": sha256_file(out), "bytes": out.stat().st_size},
    }
    write_json(workspace.path("manifest.json"), manifest)
    return manifest


def _evidence(workspace: Workspace) -> dict[str, str]:
    """Of a plan by limit the measurements, of one by budget the curves."""
    paths = [workspace.path(name) for name in EVIDENCE]
    return {path.name: sha256_file(path) for path in paths if path.exists()}


def _settings(settings: Settings) -> dict[str, Any]:
    return {key: value.name if isinstance(value, Path) else value for key, value in asdict(settings).items()}


def _source(workspace: Workspace) -> dict[str, Any]:
    return {
        "name": workspace.source.name,
        "files": [file.path.name for file in workspace.source.files],
        "sha256": workspace.source_sha256,
        "header_sha256": workspace.source.header_sha256,
    }


def _base(workspace: Workspace) -> dict[str, Any]:
    """A preset is made again from the source; a file that was given is named by its hash."""
    file = workspace.base.file
    return {
        "label": workspace.base.label,
        "file": file.path.name if file else None,
        "sha256": file.sha256() if file else None,
    }


def _beside(path: Path, folder: Path) -> Path:
    """``path`` if it lies in ``folder``, else a copy of it there under the same name."""
    target = folder / path.name
    if path.resolve() != target.resolve():
        with path.open("rb") as source, atomic_writer(target, path.stat().st_size) as stream:
            shutil.copyfileobj(source, stream)
    return target


def _shard_paths(workspace: Workspace, changes: Mapping[str, str]) -> list[Path]:
    """The shards of the base and of the finished file."""
    base, result = workspace.shards.variant({}), workspace.shards.variant(changes)
    return sorted({*base.paths, *result.paths})
