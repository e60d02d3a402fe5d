"""llama.cpp's own choice of types as one more proposal, so that no plan ships that measured worse than it.

A preset gives some layers of a role more than others, by a rule that nobody measured on this model. A plan has one type
for each group, so that a preset is followed group by group: at the type that most of a group's bytes have, or at the
smaller of its types where the file would be too large.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from gguf import GGMLQuantizationType

from cerebellum.gguf import tensor_bytes
from cerebellum.layout import Layout
from cerebellum.plan.artifacts import PointRow

Types = Mapping[str, GGMLQuantizationType]


def largest_fitting(
    presets: Mapping[str, Types], points: Sequence[PointRow], layout: Layout, file_bytes: int
) -> tuple[str, tuple[PointRow, ...]] | None:
    """Returns the preset with the largest file within ``file_bytes``, and its points; None where none has all of them.

    A preset that asks for a type that is not among ``points`` is left out, and so is the base itself.
    """
    known = {(point.group, point.type): point for point in points}
    fitting = []
    for name, types in presets.items():
        for choose in (_most, _least):
            chosen = [known.get((group, _type_of(group, types, layout, choose))) for group in layout.groups]
            whole = tuple(point for point in chosen if point is not None)
            n_bytes = layout.fixed_bytes() + sum(point.bytes for point in whole)
            if len(whole) == len(chosen) and n_bytes <= file_bytes:
                fitting.append((n_bytes, name, whole))
                break
    if not fitting:
        return None
    _, name, whole = max(fitting, key=lambda one: one[0])
    return name, whole


Choose = Callable[[Mapping[GGMLQuantizationType, int]], GGMLQuantizationType]


def _type_of(group: str, types: Types, layout: Layout, choose: Choose) -> str | None:
    """Returns the one type of a preset for a group; None where it is the base's."""
    names = layout.groups[group].tensors
    if all(types.get(name) == layout.base.types[name] for name in names):
        return None
    chosen = choose(_bytes_by_type(names, types, layout)).name
    return None if layout.base_types([group]) == (chosen,) else chosen


def _bytes_by_type(names: Sequence[str], types: Types, layout: Layout) -> dict[GGMLQuantizationType, int]:
    found: dict[GGMLQuantizationType, int] = {}
    for name in names:
        kind = types[name]
        found[kind] = found.get(kind, 0) + tensor_bytes(kind, layout.tensors[name].shape)
    return found


def _most(n_bytes: Mapping[GGMLQuantizationType, int]) -> GGMLQuantizationType:
    return max(n_bytes, key=lambda kind: n_bytes[kind])


def _least(n_bytes: Mapping[GGMLQuantizationType, int]) -> GGMLQuantizationType:
    return min(n_bytes, key=lambda kind: tensor_bytes(kind, (256,)))
