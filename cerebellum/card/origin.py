"""What was quantized, as the Hub names it: from a header's facts, or in the words of whoever publishes the result.

Without it the Hub draws no model tree, and nobody who looks at the original finds the result.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_HUB = re.compile(r"^(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)?([\w.-]+/[\w.-]+)/?$", re.ASCII)
_SOURCES = (
    "general.source.huggingface.repository",
    "general.source.repo_url",
    "general.source.url",
    "general.repo_url",
    "general.base_model.0.repo_url",
)
"""Where a GGUF says what it was made from: the repository of the very weights before its ancestors."""


def base_model(metadata: Mapping[str, object]) -> str | None:
    """Returns the Hub's id of what was quantized, or None where the file does not tell a usable one.

    Any text may stand in a GGUF, so only a valid id passes.
    """
    given = [metadata.get(key) for key in _SOURCES]
    owner, name = (metadata.get(f"general.base_model.0.{part}") for part in ("organization", "name"))
    if owner and name:
        given.append(f"{owner}/{name}".replace(" ", "-"))
    return next((repo for value in given if (repo := repo_id(value))), None)


def repo_id(value: object) -> str | None:
    """Returns ``owner/name`` of a value that is that or an address on the Hub, if the Hub would take it."""
    from huggingface_hub.errors import HFValidationError  # half a second to load
    from huggingface_hub.utils import validate_repo_id

    match = _HUB.match(value) if isinstance(value, str) else None
    if match is None:
        return None
    try:
        validate_repo_id(match[1])
    except HFValidationError:
        return None
    return match[1]
