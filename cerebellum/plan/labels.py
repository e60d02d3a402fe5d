"""Gives every size of a run a label for its file's name: one that the Hub reads as a quantization label.

The Hub, Ollama and llama.cpp choose a file of a repository by the label in its name, so that two files of one
repository must never have the same. A preset's size is labelled with the preset. A size in bytes, or that of a GPU,
gets the preset whose own file is nearest in size on this model; labels are in the order of the sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cerebellum.base import USUAL_PRESETS, preset_base
from cerebellum.engine.protocols import Engine
from cerebellum.errors import BadInput
from cerebellum.layout import Layout
from cerebellum.plan.target import Target, target_of
from cerebellum.settings import Budget, Preset, Size
from cerebellum.source import Source


@dataclass(frozen=True, kw_only=True)
class Sized:
    """One size of a run: what was ``asked``, the bytes that it comes to, and the ``label`` of its file."""

    asked: Size
    target: Target
    label: str


def sized(budget: Budget, engine: Engine, source: Source, layout: Layout) -> tuple[Sized, ...]:
    """Returns the sizes of a budget with their bytes and labels, in the order given.

    Of sizes that have room for more than the largest file that the types allow, only the first is there: the
    others would be the same file. ``layout`` is that of shapes alone, without an importance matrix, so that labels
    are known before any work and are the same when it is done. Raises BadInput where there are not enough labels
    between two sizes, and as ``target_of`` does.
    """
    pairs = [(size, target_of(size, engine, source, layout)) for size in budget.sizes]
    largest = layout.fixed_bytes() + sum(
        max(layout.group_bytes(name, qtype) for qtype in (None, *layout.ladder(name, budget.offered)))
        for name in layout.groups
    )
    roomy = [pair for pair in pairs if pair[1].file_bytes >= largest]
    pairs = [pair for pair in pairs if pair not in roomy[1:]]
    sizes = [size for size, _ in pairs]
    targets = [target for _, target in pairs]
    presets = [size.name if isinstance(size, Preset) else None for size in sizes]
    labels = [preset for preset in presets if preset is not None]
    if len(labels) < len(sizes):
        wanted = dict.fromkeys((*USUAL_PRESETS, *labels))
        known = ((name, _preset_bytes(name, engine, source, layout)) for name in wanted)
        n_bytes = {name: size for name, size in known if size is not None}
        labels = labels_by_size([target.file_bytes for target in targets], presets, n_bytes)
    found = zip(sizes, targets, labels, strict=True)
    return tuple(Sized(asked=size, target=target, label=label) for size, target, label in found)


def _preset_bytes(name: str, engine: Engine, source: Source, layout: Layout) -> int | None:
    """Returns the bytes of a preset's own file; None where llama.cpp cannot make it of this model."""
    try:
        base = preset_base(engine, source, name, None)
    except BadInput:
        return None
    return Layout(tensors=layout.tensors, groups={}, base=base).file_bytes()


def labels_by_size(
    sizes: Sequence[int], given: Sequence[str | None], presets: Mapping[str, int]
) -> list[str]:
    """Returns a label for each of ``sizes``, in bytes: the one that is ``given``, or that of a preset near in size.

    ``presets`` maps labels to the bytes of their own files. No label is used twice, a larger file has the label
    of a larger preset, and the sum of the distances, as logarithms, is the least. Raises BadInput where that
    cannot be.
    """
    ladder = sorted(
        presets, key=lambda name: presets[name]
    )  # stable: equal sizes stay in their nominal order
    places = [0 if label is None else ladder.index(label) for label in given]
    order = sorted(range(len(sizes)), key=lambda index: (sizes[index], places[index]))
    best: dict[int, tuple[float, tuple[str, ...]]] = {-1: (0.0, ())}
    for index in order:
        best = _one_more(best, sizes[index], given[index], ladder, presets)
    if not best:
        raise BadInput(
            "--budget, --fit: there are more sizes than labels for their files between two of them; name "
            "fewer, or sizes further apart"
        )
    _, labels = min(best.values())
    found = dict(zip(order, labels, strict=True))
    return [found[index] for index in range(len(sizes))]


def _one_more(
    best: Mapping[int, tuple[float, tuple[str, ...]]],
    n_bytes: int,
    given: str | None,
    ladder: Sequence[str],
    presets: Mapping[str, int],
) -> dict[int, tuple[float, tuple[str, ...]]]:
    """Returns the best labels of one size more, by the place in the ladder of the last of them."""
    longer: dict[int, tuple[float, tuple[str, ...]]] = {}
    for place, name in enumerate(ladder):
        before = [known for last, known in best.items() if last < place]
        if before and given in (None, name):
            distance, labels = min(before)
            distance += abs(math.log(max(n_bytes, 1) / presets[name]))
            longer[place] = (distance, (*labels, name))
    return longer
