"""The model under any changes: which groups it has, what types they may take, and exact bytes.

Everything here follows from shapes alone, so it is known before a weight is read. A group that no change
names is at its base types: being at the base is absence, never a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gguf import GGMLQuantizationType

from cerebellum.base import Base
from cerebellum.errors import BadInput
from cerebellum.gguf import TensorInfo, block_size, fits, gguf_size, parse_type, tensor_bytes
from cerebellum.groups import Group, span_name
from cerebellum.source import Source
from cerebellum.verdicts import NOTHING, Changes

ILLEGAL = "illegal"
NOTHING_TO_SAVE = "nothing to save"


@dataclass(frozen=True, kw_only=True)
class Part:
    """Groups that are looked at together: a role, or some neighbouring layers of it."""

    name: str
    groups: tuple[str, ...]

    def at(self, qtype: str | None) -> Changes:
        """Returns the changes that bring the part to a type; None leaves it at the base."""
        return NOTHING if qtype is None else dict.fromkeys(self.groups, qtype)


@dataclass(frozen=True, kw_only=True)
class _Meta:
    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The source's tensors, the groups that may be changed, and the base that changes are made from."""

    tensors: Mapping[str, TensorInfo]
    groups: Mapping[str, Group]
    base: Base

    @classmethod
    def of(cls, source: Source, groups: Iterable[Group], base: Base) -> Layout:
        """Returns the layout of a model; protected groups stay out of it."""
        free = {group.name: group for group in groups if not group.protected}
        return cls(tensors=source.tensors, groups=free, base=base)

    # --- types

    def types(self, changes: Changes = NOTHING) -> dict[str, GGMLQuantizationType]:
        """Returns the type of every tensor of the model, by its name."""
        types = dict(self.base.types)
        for name, qtype in changes.items():
            types |= self.group_types(name, qtype)
        return types

    def type_names(self, changes: Changes = NOTHING) -> dict[str, str]:
        """Returns the same as names, for artifacts."""
        return {name: type_.name for name, type_ in self.types(changes).items()}

    def group_types(self, name: str, qtype: str | None = None) -> dict[str, GGMLQuantizationType]:
        """Returns the types of a group's tensors at ``qtype``, or at the base.

        Raises BadInput where a row cannot take the type: llama.cpp would silently take another.
        """
        tensors = self.groups[name].tensors
        if qtype is None:
            return {tensor: self.base.types[tensor] for tensor in tensors}
        wanted = parse_type(qtype)
        for tensor in tensors:
            if not fits(wanted, self.tensors[tensor].shape):
                raise BadInput(f"{tensor}: rows of {self.tensors[tensor].shape[0]} cannot be {wanted.name}")
        return dict.fromkeys(tensors, wanted)

    def base_types(self, names: Sequence[str]) -> tuple[str, ...]:
        """Returns the names of the types that some groups' tensors have in the base, sorted."""
        return tuple(sorted({type_.name for name in names for type_ in self.group_types(name).values()}))

    def legal(self, name: str, qtype: str) -> bool:
        """Says whether all rows of a group can be of a type."""
        wanted = parse_type(qtype)
        return all(fits(wanted, self.tensors[tensor].shape) for tensor in self.groups[name].tensors)

    def why_not(self, name: str, qtype: str) -> str | None:
        """Says why a group cannot be demoted to a type, or None where it can."""
        if not self.legal(name, qtype):
            return ILLEGAL
        return None if self.bytes_saved({name: qtype}) > 0 else NOTHING_TO_SAVE

    def demotions(self, qtype: str) -> list[Changes]:
        """Returns one change for every group that can be demoted to a type."""
        return [{name: qtype} for name in self.groups if self.why_not(name, qtype) is None]

    def ladder(self, name: str, qtypes: Sequence[str]) -> list[str]:
        """Returns those of ``qtypes`` that a group's rows can take.

        Rows that are no multiple of 256 get all types of 32-element blocks, which is what llama.cpp has in
        their stead.
        """
        legal = self.groups[name].legal_types
        if any(block_size(parse_type(qtype)) > 32 for qtype in legal):
            return [qtype for qtype in dict.fromkeys(qtypes) if qtype in legal]
        return list(legal)

    # --- bytes

    def raw_bytes(self, name: str, qtype: str | None = None) -> int:
        """Returns the bytes of a group's tensors at a type or at the base, without padding."""
        types = self.group_types(name, qtype)
        return sum(tensor_bytes(type_, self.tensors[tensor].shape) for tensor, type_ in types.items())

    def group_bytes(self, name: str, qtype: str | None = None) -> int:
        """Returns what a group takes in the file, every tensor padded to the alignment."""
        return sum(self._padded(tensor, type_) for tensor, type_ in self.group_types(name, qtype).items())

    def part_bytes(self, part: Part, qtype: str | None = None) -> int:
        """Returns what a part takes in the file."""
        return sum(self.group_bytes(name, qtype) for name in part.groups)

    def bytes_saved(self, changes: Changes) -> int:
        """Returns how many bytes of tensors the changes save against the base; negative where they add."""
        return sum(self.raw_bytes(name) - self.raw_bytes(name, qtype) for name, qtype in changes.items())

    def tensor_bytes(self, changes: Changes = NOTHING) -> int:
        """Returns the bytes of all tensors, without metadata or padding."""
        types = self.types(changes)
        return sum(tensor_bytes(type_, self.tensors[name].shape) for name, type_ in types.items())

    def file_bytes(self, changes: Changes = NOTHING) -> int:
        """Returns the exact bytes of the file: header, metadata, tensors and padding."""
        types = self.types(changes)
        metas = [_Meta(name=name, shape=self.tensors[name].shape, type=t) for name, t in types.items()]
        return gguf_size(self.base.records, metas, self.base.alignment)

    def fixed_bytes(self) -> int:
        """Returns the bytes of the file that no change touches: header, metadata, protected tensors."""
        return self.file_bytes() - sum(self.group_bytes(name) for name in self.groups)

    def header_bytes(self) -> int:
        """Returns the bytes of the file before its tensors: header, metadata and the list of tensors."""
        padded = (self._padded(name, type_) for name, type_ in self.base.types.items())
        return self.file_bytes() - sum(padded)

    def _padded(self, tensor: str, type_: GGMLQuantizationType) -> int:
        n_bytes = tensor_bytes(type_, self.tensors[tensor].shape)
        alignment = self.base.alignment
        return -(-n_bytes // alignment) * alignment

    # --- parts

    def roles(self) -> tuple[Part, ...]:
        """Returns every role that may be changed, with all of its groups."""
        found: dict[str, list[str]] = {}
        for name, group in self.groups.items():
            found.setdefault(group.role, []).append(name)
        return tuple(Part(name=role, groups=tuple(names)) for role, names in found.items())

    def part(self, names: Sequence[str]) -> Part:
        """Returns groups of one role as a part: the role itself, or named after its runs of layers."""
        role = self.groups[names[0]].role
        whole = [name for name, group in self.groups.items() if group.role == role]
        if len(whole) == len(names):
            return Part(name=role, groups=tuple(names))
        runs: list[list[str]] = []
        for name in names:
            beside = runs and whole.index(name) == whole.index(runs[-1][-1]) + 1
            runs[-1].append(name) if beside else runs.append([name])
        layers = ([layer for name in run for layer in self.groups[name].layers] for run in runs)
        spans = "+".join(span_name("", sorted(run)).lstrip(".") for run in layers)
        return Part(name=f"{role}.{spans}", groups=tuple(names))

    def anchored(self, anchor: str) -> Changes:
        """Returns the changes that bring all groups to the anchor that can take it; the rest stays."""
        return {name: anchor for name in self.groups if self.legal(name, anchor)}
