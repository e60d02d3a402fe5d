"""Reads the types of any GGUF's tensors as a recipe, and writes it for llama-quantize and for Cerebellum.

Three forms say the same: a GGUF that somebody made, llama-quantize's ``--tensor-type-file`` (a regular expression
and a type on each line, the first that is found in a tensor's name counts), and a short JSON, in which a star stands
for the layers. What is written here is anchored, because an unanchored ``ffn_gate`` is found in ``ffn_gate_exps``
too.
"""

from __future__ import annotations

import re
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from gguf import GGMLQuantizationType, LlamaFileType

from cerebellum.codec import Artifact, Record, as_json, json_text, read_artifact
from cerebellum.errors import BadInput
from cerebellum.files import atomic_write_text, make_folder, read_refusal
from cerebellum.gguf import LADDER, TensorInfo, is_quantized, parse_type, preset_label
from cerebellum.groups import BLOCK, llama_leaves_alone
from cerebellum.source import Source, open_source

_STAR = "*"
_PLAIN = re.compile(r"[a-z0-9_.*-]+")
_PYTHON_ONLY = re.compile(r"\(\?(?![:!])|[*+?}]\+|\{,")
"""What Python's expressions have and those of C++ have not, outside of sets and escapes."""

_MOST_SECONDS = (
    5  # of processor time, for all expressions on all names: thousands of lines take a tenth of one
)
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
        if self.name.count(_STAR) != 1:
            raise ValueError("has layers, so one star in its name has to stand for them")
        layers = parse_spans(self.layers)
        if len(layers) != self.tensors:
            raise ValueError(f"names {len(layers)} layers and says {self.tensors} tensors")
        for layer in layers:
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
    starred = next((name for name in types if _STAR in name), None)
    if starred is not None:
        raise BadInput(f"{source.path}: has a star in the name of {starred!a}, where recipes write the layer")
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
    if match is None or len(match["layer"]) > 4 or str(int(match["layer"])) != match["layer"]:
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
    """Reads what ``spans`` writes; ValueError where it is something else, or more layers than a model can have.

    Layers rise, so that none is there twice and a short text never stands for many numbers.
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not (first.isascii() and first.isdigit() and (last or first).isdigit()):
            raise ValueError(f"{part[:40]!r} is no layer and no span of layers such as 0-3")
        stop = int(last or first)
        if len(part) > 9 or stop >= 10_000 or stop < int(first) or (numbers and int(first) <= numbers[-1]):
            raise ValueError(f"{part[:40]!r} is no span of layers such as 0-3, above those before it")
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
        for name, qtype in self.by_name.items():
            _check_may_change(self.path, source, name, qtype)
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
        with _in_time(self.path):
            for tensor in filter(is_weight, source.tensors.values()):
                qtype = next((qtype for pattern, qtype in self.rules if pattern.search(tensor.name)), None)
                if qtype is not None and not llama_leaves_alone(tensor.name, source.architecture):
                    found[tensor.name] = qtype
        if not found:
            raise BadInput(f"{self.path}: no expression is found in the name of a tensor of {source.path}")
        return found


def _check_may_change(path: Path, source: Source, name: str, qtype: str) -> None:
    """Raises BadInput where a tensor is to have a type that llama.cpp does not run it in."""
    tensor = source.tensors[name]
    if tensor.type.name == qtype:
        return
    if not is_weight(tensor):
        raise BadInput(
            f"{path}: {name!a} is no matrix of weights, and stays {tensor.type.name}; leave it out"
        )
    if is_quantized(parse_type(qtype)) and llama_leaves_alone(name, source.architecture):
        raise BadInput(
            f"{path}: {name!a} is never quantized by llama.cpp, and cannot be {qtype}; leave it out"
        )


@contextmanager
def _in_time(path: Path) -> Iterator[None]:
    """Raises BadInput where the block takes more than some seconds of processor time, as expressions can that repeat
    what repeats; only a main thread can be interrupted so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ended(_signal: int, _frame: object) -> None:
        raise BadInput(
            f"{path}: its expressions take more than {_MOST_SECONDS} s to look for in the names of tensors; write "
            "them without repeats of repeats"
        )

    before = signal.signal(signal.SIGVTALRM, ended)
    signal.setitimer(signal.ITIMER_VIRTUAL, _MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def read_typed(path: Path) -> Typed:
    """Reads a recipe of any form; which one it is, its first bytes say.

    Raises BadInput where it is none of them, or names a type that weights cannot have.
    """
    start = _start(path)
    if start.startswith(b"GGUF"):
        return _named(recipe_of(open_source(path, allow_requantize=True)), path)
    if path.stat().st_size > _MOST_BYTES:
        raise BadInput(f"{path}: is neither a GGUF, nor a recipe: those have {_MOST_BYTES >> 20} MiB at most")
    if start.lstrip().startswith(b"{"):
        return _named(read_artifact(path, Recipe, "make it anew with `cerebellum recipe`"), path)
    with _in_time(path):
        return Patterns(path=path, rules=tuple(_read_lines(path)))


def _named(recipe: Recipe, path: Path) -> Named:
    """Returns the types of a recipe by the full names of tensors."""
    preset = None if recipe.preset in _UNQUANTIZED else recipe.preset
    return Named(path=path, by_name=_names(recipe.rules, path), preset=preset)


def _start(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise BadInput(f"{path}: is no file; give a --tensor-type-file, a recipe's JSON or a GGUF")
        with path.open("rb") as stream:
            return stream.read(64)
    except OSError as error:
        raise read_refusal(path, error) from error


def _names(rules: Iterable[Rule], path: Path) -> dict[str, str]:
    """Returns the type of every tensor that some rules name."""
    found: dict[str, str] = {}
    for rule in rules:
        where = f"{path}: {rule.name[:60]!a}"
        qtype = _checked(rule.type, where)
        try:
            names = list(rule.names())
        except ValueError as error:
            raise BadInput(f"{where}: {error}") from error
        twice = next((name for name in names if name in found), None)
        if twice is not None:
            raise BadInput(
                f"{where}: gives {twice!a} a type, which another rule does too; leave one of them out"
            )
        found |= dict.fromkeys(names, qtype)
    if not found:
        raise BadInput(f"{path}: names no tensor; make it anew with `cerebellum recipe`")
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
            yield _expression(pattern.lower(), where), _checked(qtype, where)


def _expression(pattern: str, where: str) -> re.Pattern[str]:
    """Returns what llama-quantize's C++ would read; BadInput where that would not, or would read something else."""
    bare = re.sub(r"\\.", "_", pattern)
    if any(start in bare for start in ("[:", "[.", "[=")):
        raise BadInput(f"{where} has a class such as [:digit:]; write it out, as [0-9]")
    bare = re.sub(r"\[[^\]]*\]", "_", bare)
    if _PYTHON_ONLY.search(bare):
        raise BadInput(
            f"{where} is no expression of C++, which llama-quantize reads; write it without (?...), {{,n}}, *+"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sets in sets, which are read here as C++ does
            return re.compile(pattern)
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        raise BadInput(f"{where} is no regular expression ({error})") from error


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
