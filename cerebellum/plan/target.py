"""A card and a context -> the bytes of file that fit, and what a plan then takes on the card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cerebellum.groups import attention_layers, recurrent_layers
from cerebellum.memory.shape import (
    Memory,
    Shape,
    ask,
    memory_json,
    memory_shape,
    off_the_card,
    plain_metadata,
    weights_budget,
)
from cerebellum.plan.limit import Sizes
from cerebellum.source import Source


class Card:
    """``card_bytes`` of memory, on which a model shall run with ``context`` tokens."""

    def __init__(self, source: Source, sizes: Sizes, card_bytes: int, context: int) -> None:
        self.sizes, self.bytes = sizes, card_bytes
        self._elsewhere = off_the_card(source.tensors.keys())
        self.shape: Shape = memory_shape(
            plain_metadata(source.files[0]),
            attention_layers(source),
            len(recurrent_layers(source)),
            self._on_card({}),
        )
        self.memory: Memory = ask(self.shape, [file.path for file in source.files], context)

    def file_bytes(self) -> int:
        """The largest file that goes on the card; AnswerIsNo where the rest leaves no room for one."""
        elsewhere = self.sizes.total({}) - self._on_card({})
        return weights_budget(self.shape, self.memory, self.bytes) + elsewhere + self.sizes.header_bytes()

    def plan_json(self, changes: Mapping[str, str]) -> dict[str, Any]:
        """What the base with ``changes`` takes, part by part, in bytes."""
        weights = self._on_card(changes)
        memory = replace(self.memory, weights=weights)
        return memory_json(replace(self.shape, weights=weights), memory, self.bytes)

    def _on_card(self, changes: Mapping[str, str]) -> int:
        elsewhere = (self.sizes.tensor_bytes(name) for name in self._elsewhere)
        return self.sizes.total(changes) - sum(elsewhere)
