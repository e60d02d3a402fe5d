"""Is this machine ready? llama.cpp's build and devices, memory, disk, what is missing."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import Any

from cerebellum import __version__
from cerebellum.errors import BadInput
from cerebellum.gguf import parse_preset
from cerebellum.llama.library import build_id, devices, llama, system_info
from cerebellum.llama.presets import preset_types
from cerebellum.settings import DEMO_MODEL, REPORT_TEXT, SELECTION_TEXT

PINNED_BINDINGS = "0.3.36"


def examine(folder: Path) -> dict[str, Any]:
    """Facts, and a list of problems in words; no problems means ready."""
    facts: dict[str, Any] = {
        "cerebellum": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "disk_free_bytes": shutil.disk_usage(folder).free,
    }
    problems = _missing_data()
    try:
        facts |= _engine_facts()
        problems += _engine_problems(facts)
    except BadInput as error:
        problems.append(str(error))
    return facts | {"problems": problems, "ok": not problems}


def _missing_data() -> list[str]:
    files = (DEMO_MODEL, SELECTION_TEXT, REPORT_TEXT)
    return [f"{path} is missing: install the package again" for path in files if not path.exists()]


def _engine_facts() -> dict[str, Any]:
    import llama_cpp

    found = devices()
    return {
        "llama_cpp_python": llama_cpp.__version__,
        "llama_cpp": build_id(),
        "gpu_offload": bool(llama().llama_supports_gpu_offload()),
        "system_info": system_info(),
        "devices": [
            {"name": d.name, "description": d.description, "free_bytes": d.free, "total_bytes": d.total}
            for d in found
        ],
    }


def _engine_problems(facts: dict[str, Any]) -> list[str]:
    """A wrong version is a problem of its own: struct layouts and log lines are the pinned one's."""
    if facts["llama_cpp_python"] != PINNED_BINDINGS:
        found = facts["llama_cpp_python"]
        return [f"llama-cpp-python {found} found, {PINNED_BINDINGS} is what this release was tested with"]
    if DEMO_MODEL.exists():
        preset_types(DEMO_MODEL, parse_preset("Q3_K_M"), has_imatrix=True)
    return []
