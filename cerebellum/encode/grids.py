"""What codes of ggml's IQ types stand for: tables that gguf-py has, in the form that iquants.c reads."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

_T = GGMLQuantizationType

_GRIDS: dict[GGMLQuantizationType, Any] = {
    _T.IQ2_XXS: quants.IQ2_XXS,
    _T.IQ2_XS: quants.IQ2_XS,
    _T.IQ2_S: quants.IQ2_S,
    _T.IQ3_XXS: quants.IQ3_XXS,
    _T.IQ3_S: quants.IQ3_S,
}

LISTED = frozenset({_T.IQ4_NL, _T.IQ4_XS})
"""Types whose codes are places in a list of 16 values."""

TABLED = LISTED | frozenset(_GRIDS)
"""All types that there is a table of."""


@cache
def table(kind: GGMLQuantizationType) -> NDArray[np.float32]:
    """Returns the values of a type's codes, (16,), or of its grid's entries, (weights of an entry, entries)."""
    if kind in LISTED:
        return np.array(quants.IQ4_NL.kvalues, np.float32)
    grid = _GRIDS[kind]
    grid.init_grid()
    return np.ascontiguousarray(grid.grid.reshape(grid.grid_shape).T, np.float32)
