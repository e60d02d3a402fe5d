"""Reads the types of any GGUF's tensors as a recipe, and writes it for llama-quantize and for Cerebellum.

Three forms say the same: a GGUF that somebody made, llama-quantize's ``--tensor-type-file`` (a regular expression
and a type on each line, the first that is found in a tensor's name counts), and a short JSON, in which a star stands
for the layers. What is written here is anchored, because an unanchored ``ffn_gate`` is found in ``ffn_gate_exps``
too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from gguf import GGMLQuantizationType, LlamaFileType

from cerebellum.codec import Artifact, Record, as_json, json_text, read_artifact
from cerebellum.errors import BadInput
from cerebellum.files import atomic_write_text, make_folder, read_refusal
from cerebellum.gguf import LADDER, TensorInfo, parse_type, preset_label
from cerebellum.groups import BLOCK
from cerebellum.source import Source, open_source

_STAR = "*"
_PLAIN = re.compile(r"[a-z0-9_.*-]+")
_MOST_BYTES = 8 << 20  # of a recipe: the largest models have some thousand tensors
_T = GGMLQuantizationType

_UNQUANTIZED = (None, "F32", "F16", "BF16")
"""What a recipe may name as its preset that is none to compare a quantized file with."""

RECIPE_TYPES = frozenset((*LADDER, _T.IQ1_S, _T.IQ1_M, _T.F16, _T.BF16, _T.F32))
"""The types that a recipe may ask for. ggml has others that weights cannot have; one of them would end the process."""


class Rule(Record, frozen=True, kw_only=True):
    """Some tensors at one type. ``name`` is a tensor's name, with a star for the layer where ``layers`` says which.

    ``layers`` is as people write it, ``0-11,14``, counted from 0; ``tensors`` is how many they are.
    """

    name: str
    layers: str | None = None
    type: str
    tensors: int

    def names(self) -> Iterator[str]:
        """Yields the names of the tensors; ValueError where ``layers`` is no list of layers."""
        if self.layers is None:
            yield self.name
            return
        for layer in parse_spans(self.layers):
            yield self.name.replace(_STAR, str(layer))


class Recipe(Artifact, frozen=True, kw_only=True):
    """The types of one file's weights, in the order of the file. Vectors are left out: nobody quantizes them.

    ``made_from`` is the name of the file that they were read from, ``bytes`` its size and ``preset`` the one that
    its metadata names; None where that is no preset of llama.cpp's.
    """

    format: Literal[1] = 1
    made_from: str
    architecture: str
    preset: str | None
    bytes: int
    rules: tuple[Rule, ...]


def is_weight(tensor: TensorInfo) -> bool:
    """Says whether a recipe names a tensor: a matrix of weights. llama-quantize leaves all else as it is."""
    return tensor.name.endswith("weight") and any(n > 1 for n in tensor.shape[1:])


def recipe_of(source: Source) -> Recipe:
    """Returns the recipe that a model was made by, read off its tensors."""
    types = {tensor.name: tensor.type.name for tensor in source.tensors.values() if is_weight(tensor)}
    return Recipe(
        made_from=source.path.name,
        architecture=source.architecture,
        preset=_preset(source),
        bytes=source.n_bytes,
        rules=tuple(_rules(types)),
    )


def _preset(source: Source) -> str | None:
    try:
        return preset_label(LlamaFileType(int(source.value("general.file_type", -1))))
    except (ValueError, TypeError):
        return None


def _rules(types: Mapping[str, str]) -> Iterator[Rule]:
    """Yields a rule for each role and type, the roles in the order of the file."""
    layers: dict[tuple[str, str], list[int]] = {}
    for name, qtype in types.items():
        pattern, layer = _starred(name)
        found = layers.setdefault((pattern, qtype), [])
        if layer is not None:
            found.append(layer)
    order = list(dict.fromkeys(pattern for pattern, _ in layers))
    for (pattern, qtype), found in sorted(layers.items(), key=lambda item: order.index(item[0][0])):
        yield Rule(
            name=pattern,
            layers=spans(found) if found else None,
            type=qtype,
            tensors=max(len(found), 1),
        )


def _starred(name: str) -> tuple[str, int | None]:
    """Splits a name into itself with a star for the layer, and the layer."""
    match = BLOCK.match(name)
    if match is None or _STAR in name:
        return name, None
    return f"{match['prefix']}blk.{_STAR}.{match['rest']}", int(match["layer"])


def spans(numbers: Iterable[int]) -> str:
    """Writes numbers as people do: ``0-3,7``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)


def parse_spans(text: str) -> list[int]:
    """Reads what ``spans`` writes; ValueError where it is something else, or more layers than a model can have."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not (first.isascii() and first.isdigit() and (last or first).isdigit()):
            raise ValueError(f"{part!r} is no layer and no span of layers such as 0-3")
        stop = int(last or first)
        if stop >= 10_000 or stop < int(first):
            raise ValueError(f"{part!r} is no span of layers such as 0-3")
        numbers += range(int(first), stop + 1)
    return numbers


# --- llama-quantize's file


def tensor_type_lines(recipe: Recipe) -> list[str]:
    """Returns the lines of a ``--tensor-type-file``: anchored, and each tensor found by one of them alone.

    Where a role has one type in all of its layers, one line with ``[0-9]+`` says it. Raises BadInput for a tensor
    with anything but small letters, digits, dots, dashes and underscores in its name.
    """
    roles = [rule.name for rule in recipe.rules]
    lines = []
    for rule in recipe.rules:
        if not _PLAIN.fullmatch(rule.name):
            raise BadInput(
                f"{recipe.made_from}: a --tensor-type-file cannot name the tensor {rule.name}, for llama-quantize "
                "reads it in lower case, word by word; use the JSON"
            )
        lines.append(f"^{_pattern(rule, alone=roles.count(rule.name) == 1)}$={rule.type.lower()}")
    return lines


def _pattern(rule: Rule, *, alone: bool) -> str:
    """Returns the expression of a rule; ``alone`` says that no other rule is of the same role."""
    if rule.layers is None:
        return _escaped(rule.name)
    layers = [str(layer) for layer in parse_spans(rule.layers)]
    chosen = f"({'|'.join(layers)})" if len(layers) > 1 else layers[0]
    if alone and len(layers) > 1:
        chosen = "[0-9]+"
    before, _, after = rule.name.partition(_STAR)
    return f"{_escaped(before)}{chosen}{_escaped(after)}"


def _escaped(text: str) -> str:
    """Escapes the one character of tensor names that means something else in an expression."""
    return text.replace(".", r"\.")


def write_recipe(recipe: Recipe, folder: Path) -> tuple[Path, Path]:
    """Writes both forms into a folder, ``<name>.tensor-types.txt`` and ``<name>.recipe.json``, and returns the paths.

    Raises BadInput, before anything is written, where another file has such a name.
    """
    stem = Path(recipe.made_from).stem
    forms = {
        folder / f"{stem}.tensor-types.txt": "\n".join(tensor_type_lines(recipe)) + "\n",
        folder / f"{stem}.recipe.json": json_text(as_json(recipe)),
    }
    for path, text in forms.items():
        if path.exists() and (not path.is_file() or path.read_bytes() != text.encode()):
            raise BadInput(f"{path}: is there already and says something else; move it, or give another -o")
    make_folder(folder)
    for path, text in forms.items():
        atomic_write_text(path, text)
    first, second = forms
    return first, second


# --- reading


class Typed(Protocol):
    """What gives the tensors of a model their types, in one of the three forms."""

    @property
    def preset(self) -> str | None:
        """The quantized preset of llama.cpp's that the recipe says it is made from, if any."""
        ...

    def types(self, source: Source) -> dict[str, str]:
        """Returns the types by name, of those tensors of ``source`` that it names.

        Raises BadInput where it is of another model: it names a tensor that the source lacks, or none of its.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Named:
    """Types by the full names of tensors, out of the JSON or a GGUF at ``path``."""

    path: Path
    by_name: Mapping[str, str]
    preset: str | None

    def types(self, source: Source) -> dict[str, str]:
        """Returns them all; BadInput where the source lacks one of the tensors."""
        strange = next((name for name in self.by_name if name not in source.tensors), None)
        if strange is not None:
            raise BadInput(
                f"{self.path}: names {strange}, which {source.path} has not; a recipe is of one architecture and size"
            )
        return dict(self.by_name)


@dataclass(frozen=True, kw_only=True)
class Patterns:
    """Regular expressions with types, in the order of llama-quantize's file at ``path``."""

    path: Path
    rules: tuple[tuple[re.Pattern[str], str], ...]
    preset: None = None

    def types(self, source: Source) -> dict[str, str]:
        """Returns what llama-quantize would: the first expression that is found in a weight's name counts."""
        found: dict[str, str] = {}
        for tensor in filter(is_weight, source.tensors.values()):
            qtype = next((qtype for pattern, qtype in self.rules if pattern.search(tensor.name)), None)
            if qtype is not None:
                found[tensor.name] = qtype
        if not found:
            raise BadInput(f"{self.path}: no expression is found in the name of a tensor of {source.path}")
        return found


def read_typed(path: Path) -> Typed:
    """Reads a recipe of any form; which one it is, its first bytes say.

    Raises BadInput where it is none of them, or names a type that weights cannot have.
    """
    start = _start(path)
    if start.startswith(b"GGUF"):
        return _named(recipe_of(open_source(path, allow_requantize=True)), path)
    if start.lstrip().startswith(b"{"):
        return _named(read_artifact(path, Recipe, "make it anew with `cerebellum recipe`"), path)
    return Patterns(path=path, rules=tuple(_read_lines(path)))


def _named(recipe: Recipe, path: Path) -> Named:
    """Returns the types of a recipe by the full names of tensors."""
    preset = None if recipe.preset in _UNQUANTIZED else recipe.preset
    return Named(path=path, by_name=_names(recipe.rules, path), preset=preset)


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(64)
    except OSError as error:
        raise read_refusal(path, error) from error


def _names(rules: Iterable[Rule], path: Path) -> dict[str, str]:
    """Returns the type of every tensor that some rules name."""
    found: dict[str, str] = {}
    for rule in rules:
        qtype = _checked(rule.type, f"{path}: {rule.name}")
        try:
            found |= dict.fromkeys(rule.names(), qtype)
        except ValueError as error:
            raise BadInput(f"{path}: {rule.name}: {error}") from error
    return found


def _read_lines(path: Path) -> Iterator[tuple[re.Pattern[str], str]]:
    """Yields what llama-quantize reads: words of EXPRESSION=TYPE, the expression in lower case."""
    text = _text(path)
    for number, line in enumerate(text.splitlines(), 1):
        for word in line.split():
            where = f"{path}: line {number}: {word[:60]!r}"
            pattern, _, qtype = word.partition("=")
            if not pattern or not qtype:
                raise BadInput(
                    f"{where} is not EXPRESSION=TYPE; give a --tensor-type-file, a recipe's JSON or a GGUF"
                )
            try:
                expression = re.compile(pattern.lower())
            except re.error as error:
                raise BadInput(f"{where} is no regular expression ({error})") from error
            yield expression, _checked(qtype, where)


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes() if path.stat().st_size <= _MOST_BYTES else b"\xff"
        return raw.decode("utf-8")
    except OSError as error:
        raise read_refusal(path, error) from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: is neither a GGUF, a recipe's JSON nor a --tensor-type-file") from error


def _checked(qtype: str, where: str) -> str:
    """Returns a type's canonical name; BadInput where weights cannot have it."""
    try:
        found = parse_type(qtype)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from error
    if found not in RECIPE_TYPES:
        raise BadInput(f"{where}: {found.name} is no type that Cerebellum gives to weights")
    return found.name
