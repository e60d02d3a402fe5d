"""The names of llama.cpp's presets, as people type them and as the Hub reads them in file names."""

from __future__ import annotations

from gguf import LlamaFileType

from cerebellum.errors import BadInput

_PREFIXES = ("MOSTLY_", "ALL_")
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # llama-quantize's own


def preset_label(preset: LlamaFileType) -> str:
    """Returns the label that people and the Hub use in file names: ``Q3_K_M`` of MOSTLY_Q3_K_M."""
    return preset.name.split("_", 1)[1] if preset.name.startswith(_PREFIXES) else preset.name


def preset_names() -> tuple[str, ...]:
    """Returns the presets by the names that llama-quantize's users type."""
    return tuple(preset_label(preset) for preset in LlamaFileType if preset.name.startswith(_PREFIXES))


def parse_preset(text: str) -> LlamaFileType:
    """Reads ``q3_k_m`` as MOSTLY_Q3_K_M; raises BadInput with the names of all presets otherwise."""
    wanted = text.upper()
    wanted = _ALIASES.get(wanted, wanted)
    for preset in LlamaFileType:
        if preset.name.startswith(_PREFIXES) and preset_label(preset) == wanted:
            return preset
    raise BadInput(f"unknown preset {text!r}: choose one of {', '.join(preset_names())}")
