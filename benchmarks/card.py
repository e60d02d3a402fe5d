"""What a plan for a card takes on a real one, beside what was foretold.

A file of the planned types is written from the header alone (its weights are holes, so 23 GB take a few
MB of disk), loaded with all layers on the first device, and a batch is decoded; the device then says how
much of its memory is gone.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from common import cerebellum, save
from rich.console import Console
from rich.table import Table

from cerebellum.base import preset_base
from cerebellum.files import atomic_writer
from cerebellum.gguf import TensorSource, encode_header, gguf_size, parse_type
from cerebellum.llama.library import Device, devices
from cerebellum.llama.native import EngineSettings, LlamaEngine
from cerebellum.source import open_source
from cerebellum.units import gib

EXAMPLE = Path(__file__).parent.parent / "examples" / "granite-4.0-h-small.json"


def write_planned(header: Path, types: dict[str, str], path: Path) -> None:
    """The planned file without a single weight."""
    source = open_source(header)
    records = preset_base(LlamaEngine(), source, "Q3_K_M", None, has_imatrix=True).records
    tensors = [
        TensorSource(name=name, shape=tensor.shape, type=parse_type(types[name]), chunks=list)
        for name, tensor in source.tensors.items()
    ]
    with atomic_writer(path) as stream:
        stream.write(encode_header(records, tensors))
        stream.truncate(gguf_size(records, tensors))


def card() -> Device:
    """The first device that is no CPU, as it is now."""
    return next(device for device in devices() if device.name != "CPU")


def taken(path: Path, context: int) -> dict[str, int]:
    """Bytes that went when the model was loaded, its context made, and a batch decoded."""
    engine = LlamaEngine(EngineSettings(gpu_layers=-1))
    before = card().free
    with engine.open([path], context) as model:
        opened = card().free
        model.logits(np.arange(context, dtype=np.int32) % 1000)
        return {"opened": before - opened, "decoded": before - card().free}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("header", type=Path, help="granite-4.0-h-small, F16; its header is read")
    parser.add_argument("--measurements", type=Path, default=EXAMPLE)
    parser.add_argument("--fit", nargs="+", default=["16GiB", "24GiB"])
    parser.add_argument("--ctx", nargs="+", type=int, default=[4096, 32768])
    asked = parser.parse_args()
    table = Table("card", "context", "foretold", "opened", "after a batch", "foretold / taken")
    rows: list[dict[str, Any]] = []
    path = asked.header.with_name("planned.gguf")
    for size in asked.fit:
        for context in asked.ctx:
            flags = ("--measurements", asked.measurements, "--fit", size, "--context", str(context))
            plan, _ = cerebellum("plan", asked.header, *flags)
            write_planned(asked.header, plan["tensor_types"], path)
            found, memory = taken(path, context), plan["memory"]
            foretold = memory["total"] - memory["reserve"]
            rows.append({"card": size, "context": context, "memory": memory, "taken": found})
            share = f"{foretold / found['decoded']:.3f}"
            shown = (gib(n) for n in (foretold, found["opened"], found["decoded"]))
            table.add_row(size, f"{context:,}", *shown, share)
            path.unlink()
    Console(width=110).print(table)
    print(save("card", {"device": card().description, "rows": rows}))


if __name__ == "__main__":
    main()
