"""Knows the tensor types and their sizes, as the only place in the package.

Everything comes from gguf-py's `GGML_QUANT_SIZES` table (block size in elements, block size in bytes). Sizes
are integer bytes, shapes are in ggml's order: `shape[0]` is the row length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from cerebellum.errors import BadInput

_T = GGMLQuantizationType


@dataclass(frozen=True, kw_only=True)
class WeightType:
    """A type that weights may get, and where: everything that is asked of a type stands in its one row.

    ``needs_imatrix``: llama.cpp refuses to make it without an importance matrix (llama-quant.cpp,
    tensor_requires_imatrix; Q2_K asks for one in a Q2_K_S file only, which Cerebellum never makes). ``rows`` says
    which rows it is offered for: "256" are whole numbers of 256-element blocks, "32" those that are none of 256,
    "any" are both. ``searched`` types are rounded by a search that is ten times as slow, so that a budget measures
    them only where a plan could want them.
    """

    type: GGMLQuantizationType
    rows: Literal["256", "32", "any"] = "256"
    needs_imatrix: bool = False
    searched: bool = False


WEIGHT_TYPES = (
    WeightType(type=_T.IQ1_S, needs_imatrix=True),
    WeightType(type=_T.IQ1_M, needs_imatrix=True),
    WeightType(type=_T.IQ2_XXS, needs_imatrix=True, searched=True),
    WeightType(type=_T.IQ2_XS, needs_imatrix=True, searched=True),
    WeightType(type=_T.IQ2_S, needs_imatrix=True, searched=True),
    WeightType(type=_T.Q2_K),
    WeightType(type=_T.IQ3_XXS, needs_imatrix=True, searched=True),
    WeightType(type=_T.Q3_K),
    WeightType(type=_T.IQ3_S, searched=True),
    WeightType(type=_T.IQ4_XS, searched=True),
    WeightType(type=_T.MXFP4),
    WeightType(type=_T.Q4_K),
    WeightType(type=_T.Q5_K),
    WeightType(type=_T.Q6_K),
    WeightType(type=_T.Q4_0, rows="32"),
    WeightType(type=_T.IQ4_NL, rows="32"),
    WeightType(type=_T.Q4_1, rows="32"),
    WeightType(type=_T.Q5_0, rows="32"),
    WeightType(type=_T.Q5_1, rows="32"),
    WeightType(type=_T.Q8_0, rows="any"),
)
"""Every type a group may be demoted or promoted to, cheapest first for rows of one kind. IQ1_S, IQ1_M and MXFP4 are
tried only where --types or --demote names them: at a bit a weight nothing is foretold, and MXFP4 has no importance."""

LADDER = tuple(each.type for each in WEIGHT_TYPES)
"""The types of the table."""

SEARCHED = tuple(each.type.name for each in WEIGHT_TYPES if each.searched)
"""The names of the types that are rounded by a slow search."""

_BY_TYPE = {each.type: each for each in WEIGHT_TYPES}


def block_size(type_: GGMLQuantizationType) -> int:
    """Returns how many elements of a row one block of the type holds: 256 for a k-quant, 1 for a float."""
    return GGML_QUANT_SIZES[type_][0]


def bits_per_weight(type_: GGMLQuantizationType) -> float:
    """Returns the bits that one element costs, with its share of the block's scales."""
    n_elements, n_bytes = GGML_QUANT_SIZES[type_]
    return 8 * n_bytes / n_elements


def row_bytes(type_: GGMLQuantizationType, n_per_row: int) -> int:
    """Returns the bytes of a row of `n_per_row` elements.

    Raises:
        BadInput: the row is not a whole number of blocks.
    """
    n_elements, n_bytes = GGML_QUANT_SIZES[type_]
    if n_per_row % n_elements:
        raise BadInput(
            f"a row of {n_per_row} is no multiple of {type_.name}'s block of {n_elements}; "
            f"choose a type with a smaller block"
        )
    return n_per_row // n_elements * n_bytes


def tensor_bytes(type_: GGMLQuantizationType, shape: Sequence[int]) -> int:
    """Returns the bytes of a tensor of `shape` (ggml's order), without padding.

    Raises:
        BadInput: its row is not a whole number of blocks.
    """
    return row_bytes(type_, shape[0]) * math.prod(shape[1:])


def fits(type_: GGMLQuantizationType, shape: Sequence[int]) -> bool:
    """Says whether rows of `shape` are whole numbers of the type's blocks.

    llama-quantize silently takes another type where this is false; Cerebellum calls the type illegal instead,
    so that a fallback is never booked as the demotion that was asked for.
    """
    return shape[0] % block_size(type_) == 0


def needs_imatrix(type_: GGMLQuantizationType) -> bool:
    """Says whether llama.cpp refuses to make this type without an importance matrix."""
    return type_ in _BY_TYPE and _BY_TYPE[type_].needs_imatrix


def is_quantized(type_: GGMLQuantizationType) -> bool:
    """Says whether the type packs several elements into a block; floats and integer tables do not."""
    return block_size(type_) > 1


def parse_type(text: str) -> GGMLQuantizationType:
    """Reads a type's name as people write it: `q2_k`, `Q2_K`, `iq3_xxs`.

    Raises:
        BadInput: there is no such type; the message names the ladder.
    """
    try:
        return GGMLQuantizationType[text.strip().upper()]
    except KeyError:
        known = ", ".join(type_.name for type_ in LADDER)
        raise BadInput(f"unknown tensor type {text!r}; choose one of {known}") from None


def parse_weight_type(text: str) -> GGMLQuantizationType:
    """Reads the name of a type that Cerebellum gives to weights.

    ggml has types for other uses too (I8, Q8_K), and asking it to quantize weights to one of them ends the
    whole process, so they are refused here.

    Raises:
        BadInput: there is no such type, or it is none for weights.
    """
    found = parse_type(text)
    if found not in LADDER:
        names = ", ".join(type_.name for type_ in LADDER)
        raise BadInput(f"{found.name} is not a type for weights here; choose one of {names}")
    return found


def legal_types(shapes: Iterable[Sequence[int]], has_imatrix: bool) -> tuple[GGMLQuantizationType, ...]:
    """Returns the ladder's types that every one of `shapes` can take, the cheapest first.

    The 32-block types are offered only where a row takes none of 256 elements, because elsewhere a 256-block
    type of the same size is better. Without an importance matrix, types that need one are left out.
    """
    row_lengths = {shape[0] for shape in shapes}
    take_256 = all(n_per_row % 256 == 0 for n_per_row in row_lengths)
    offered = ("256", "any") if take_256 else ("32", "any")
    return tuple(
        each.type
        for each in WEIGHT_TYPES
        if each.rows in offered
        and all(fits(each.type, (n_per_row,)) for n_per_row in row_lengths)
        and (has_imatrix or not each.needs_imatrix)
    )
