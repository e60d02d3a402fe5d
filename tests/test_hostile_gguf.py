"""Damaged and hostile GGUFs: each gets its one line, none gets a traceback, memory or time."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cerebellum.codec import as_json
from cerebellum.errors import BadInput
from cerebellum.gguf import read_gguf, reader
from cerebellum.groups import describe, make_groups
from cerebellum.source import open_source

U32, ARRAY, STRING = 4, 9, 8
F32, F16, Q4_0, Q2_K = 0, 1, 2, 10
HUGE = (1 << 64) - 1


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


def u64(number: int) -> bytes:
    return struct.pack("<Q", number)


def text(raw: bytes) -> bytes:
    return u64(len(raw)) + raw


def kv(key: bytes, kind: int, payload: bytes) -> bytes:
    return text(key) + u32(kind) + payload


def entry(
    name: bytes = b"t.weight",
    dims: tuple[int, ...] = (32, 2),
    kind: int = F16,
    offset: int = 0,
    n_dims: int | None = None,
) -> bytes:
    shape = u32(len(dims) if n_dims is None else n_dims) + b"".join(map(u64, dims))
    return text(name) + shape + u32(kind) + u64(offset)


def gguf(
    records: tuple[bytes, ...] = (),
    entries: tuple[bytes, ...] = (),
    data: bytes = bytes(4096),
    n_records: int | None = None,
    n_tensors: int | None = None,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """Build a file by hand, with any count a lie if asked for."""
    counts = u64(len(entries) if n_tensors is None else n_tensors)
    counts += u64(len(records) if n_records is None else n_records)
    head = b"GGUF" + u32(version) + counts + b"".join(records) + b"".join(entries)
    return head + bytes(-len(head) % alignment) + data


ARCH = kv(b"general.architecture", STRING, text(b"llama"))

HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "is empty"),
    "wrong magic": (b"PK\x03\x04" + bytes(60), "is not a GGUF file"),
    "magic only": (b"GGUF", "cut off in the version"),
    "version 1": (gguf(version=1), "GGUF version 1; versions 2 and 3"),
    "version 0": (gguf(version=0), "GGUF version 0"),
    "version 4": (gguf(version=4), "GGUF version 4"),
    "big-endian": (gguf(version=3 << 24), "big-endian"),
    "cut off in the counts": (gguf()[:20], "cut off in the number of metadata keys"),
    "absurd number of keys": (gguf(n_records=HUGE), "metadata keys, more than it can hold"),
    "more keys than bytes": (gguf(n_records=300), "claims 300 metadata keys"),
    "absurd number of tensors": (gguf(n_tensors=HUGE), "tensors, more than it can hold"),
    "more tensors than bytes": (gguf(n_tensors=200), "claims 200 tensors"),
    "key without a name": (gguf((kv(b"", U32, u32(1)),)), "key 0 has an empty name"),
    "absurd key length": (gguf((u64(HUGE) + bytes(32),)), "name of 18,446,744,073,709,551,615"),
    "key is not UTF-8": (gguf((kv(b"\xff\xfe", U32, u32(1)),)), "key 0 has a name that is not"),
    "key with a line break": (gguf((kv(b"a\nb", U32, u32(1)),)), r"control characters .*'a\\nb'"),
    "key twice": (gguf((ARCH, ARCH)), "'general.architecture' twice"),
    "unknown value type": (gguf((kv(b"a", 13, u32(1)),)), "'a' has the unknown value type 13"),
    "unknown item type": (gguf((kv(b"a", ARRAY, u32(99) + u64(1)),)), "unknown type 99"),
    "absurd string": (gguf((kv(b"a", STRING, u64(HUGE)),)), "cut off in the text of 'a'"),
    "absurd array": (gguf((kv(b"a", ARRAY, u32(U32) + u64(HUGE)),)), "cut off in the .* items"),
    "absurd string array": (
        gguf((kv(b"a", ARRAY, u32(STRING) + u64(HUGE)),)),
        "cut off in the .* strings of 'a'",
    ),
    "string array cut off": (
        gguf((kv(b"a", ARRAY, u32(STRING) + u64(9) + text(b"x" * 5000)),), data=b""),
        "cut off in the 9 strings of 'a'",
    ),
    "string array with an absurd string": (
        gguf((kv(b"a", ARRAY, u32(STRING) + u64(3) + text(b"x") + u64(HUGE)),)),
        "cut off in the 3 strings of 'a'",
    ),
    "depth bomb": (
        gguf((kv(b"a", ARRAY, (u32(ARRAY) + u64(1)) * 100_000),)),
        "array of arrays, which llama.cpp cannot read",
    ),
    "alignment of zero": (gguf((kv(b"general.alignment", U32, u32(0)),)), "general.alignment is 0"),
    "alignment of 48": (gguf((kv(b"general.alignment", U32, u32(48)),)), "general.alignment is 48"),
    "alignment as text": (
        gguf((kv(b"general.alignment", STRING, text(b"32")),)),
        "general.alignment is not a uint32",
    ),
    "tensor without a name": (gguf((), (entry(b""),)), "tensor 0 has an empty name"),
    "name of 64 bytes": (gguf((), (entry(b"n" * 64),)), "tensor 0 has a name of 64 bytes"),
    "name is not UTF-8": (gguf((), (entry(b"\xc3("),)), "tensor 0 has a name that is not UTF-8"),
    "name with a zero byte": (gguf((), (entry(b"a\0b"),)), "control characters"),
    "tensor twice": (gguf((), (entry(), entry(offset=128))), "the tensor 't.weight' twice"),
    "no dimensions": (gguf((), (entry(dims=()),)), "'t.weight' has 0 dimensions"),
    "five dimensions": (gguf((), (entry(dims=(32, 1, 1, 1, 1)),)), "'t.weight' has 5 dimensions"),
    "absurd dimensions": (gguf((), (entry(n_dims=1 << 31),)), "2,147,483,648 dimensions"),
    "zero rows": (gguf((), (entry(dims=(32, 0)),)), "'t.weight' has a dimension of zero: 32 x 0"),
    "product overflows": (gguf((), (entry(dims=(1 << 32, 1 << 32)),)), "too many elements"),
    "dimension overflows": (gguf((), (entry(dims=(HUGE,)),)), "too many elements"),
    "unknown type": (gguf((), (entry(kind=4),)), "'t.weight' has the unknown type 4"),
    "absurd type": (gguf((), (entry(kind=1 << 31),)), "unknown type 2147483648"),
    "row is no whole block": (
        gguf((), (entry(dims=(288,), kind=Q2_K),)),
        "rows of 288, not a multiple of Q2_K's block of 256",
    ),
    "misaligned": (gguf((), (entry(offset=8),)), "'t.weight' is misaligned: offset 8"),
    "overlap": (gguf((), (entry(b"a"), entry(b"b", offset=96))), "'b' overlaps the one before it"),
    "out of order": (gguf((), (entry(b"a", offset=128), entry(b"b"))), "'a'"),
    "gap": (gguf((), (entry(b"a"), entry(b"b", offset=256))), "gap before tensor 'b'"),
    "past the end": (gguf((), (entry(),), data=bytes(127)), "goes past the end of the file"),
    "absurd offset": (gguf((), (entry(offset=HUGE - 31),)), "goes past the end of the file"),
    "cut off in the tensors": (
        gguf((), (entry(),), n_tensors=2, data=b"")[:80],
        "cut off in|more than it can hold|has an empty name",
    ),
}


def assert_one_line(error: BaseException, path: Path) -> None:
    line = str(error)
    assert "\n" not in line and "\r" not in line
    assert line.startswith(str(path))
    assert "; " in line, "says what to do"
    assert len(line) < 400 + len(str(path))


@pytest.mark.parametrize("case", HOSTILE)
def test_each_trouble_has_its_line(tmp_path: Path, case: str) -> None:
    content, words = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    started = time.monotonic()
    with pytest.raises(BadInput, match=words) as caught:
        read_gguf(path)
    assert_one_line(caught.value, path)
    assert caught.value.exit_code == 2
    assert time.monotonic() - started < 2


def test_what_the_cases_are_built_from_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "sound.gguf"
    for version in (2, 3):
        path.write_bytes(gguf((ARCH,), (entry(b"a"), entry(b"b", offset=128)), version=version))
        file = read_gguf(path)
        assert (file.version, [t.name for t in file.tensors]) == (version, ["a", "b"])


def test_missing_folder_pipe_and_forbidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing, pipe, shut = tmp_path / "no.gguf", tmp_path / "pipe.gguf", tmp_path / "shut.gguf"
    os.mkfifo(pipe)
    for path, words in [
        (missing, "no such file"),
        (missing / "below", "no such file"),
        (tmp_path, "is a folder"),
        (pipe, "not a regular file"),
    ]:
        with pytest.raises(BadInput, match=words) as caught:
            read_gguf(path)
        assert_one_line(caught.value, path)

    def forbid(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    shut.write_bytes(gguf())
    monkeypatch.setattr(reader, "open", forbid, raising=False)
    with pytest.raises(BadInput, match="no permission to read it") as caught:
        read_gguf(shut)
    assert_one_line(caught.value, shut)


def test_a_line_break_in_the_path_stays_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a\nb.gguf"
    path.write_bytes(b"nonsense")
    with pytest.raises(BadInput) as caught:
        read_gguf(path)
    assert "\n" not in str(caught.value)


def test_a_big_vocabulary_is_quick_and_a_hostile_one_bounded(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    strings = b"".join(text(b"token%d" % number) for number in range(250_000))
    path.write_bytes(gguf((kv(b"a", ARRAY, u32(STRING) + u64(250_000) + strings),)))
    started = time.monotonic()
    file = read_gguf(path)
    seconds = time.monotonic() - started
    print(f"250,000 strings in {seconds:.3f} s")
    assert seconds < 2
    assert file.value("a")[-1] == "token249999"

    endless = gguf((ARCH, kv(b"a", ARRAY, u32(STRING) + u64(1 << 32))))
    path.write_bytes(endless)
    os.truncate(path, 1 << 36)  # sparse: claims 32 GiB of empty strings and has them
    started = time.monotonic()
    with pytest.raises(BadInput, match="the header goes past 134,217,728 bytes"):
        read_gguf(path)
    assert time.monotonic() - started < 2


SOUND = gguf(
    (
        ARCH,
        kv(b"general.alignment", U32, u32(32)),
        kv(b"general.name", STRING, text(b"small")),
        kv(b"llama.block_count", U32, u32(1)),
        kv(b"llama.expert_used_count", ARRAY, u32(U32) + u64(2) + u32(1) + u32(2)),
        kv(b"llama.attention.head_count_kv", ARRAY, u32(U32) + u64(1) + u32(1)),
        kv(b"tokens", ARRAY, u32(STRING) + u64(2) + text(b"a") + text(b"bc")),
    ),
    (
        entry(b"blk.0.attn_k.weight"),
        entry(b"blk.0.ffn_up_exps.weight", (32, 1, 3), offset=128),
        entry(b"blk.0.attn_norm.weight", (32,), F32, 320),
    ),
    data=bytes(448),
)


def read_everything(path: Path) -> None:
    """Use all of a file as the stages would: whatever it holds, only BadInput may come."""
    file = read_gguf(path)
    for key in file.kv_records:
        file.value(key)
    for tensor in file.tensors:
        assert len(file.data(tensor)) == tensor.n_bytes
    source = open_source(path, allow_requantize=True)
    json.dumps(as_json(describe(source, make_groups(source))))


def test_the_fuzzed_file_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "sound.gguf"
    path.write_bytes(SOUND)
    read_everything(path)


FUZZ = settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
EDITS = st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), min_size=1, max_size=4)


@FUZZ
@given(edits=EDITS)
@example(edits=[(SOUND.index(b"count_kv") + 12, 6)])  # float head counts
def test_flipped_bytes_give_a_line_or_a_file(tmp_path: Path, edits: list[tuple[int, int]]) -> None:
    path, content = tmp_path / "flipped.gguf", bytearray(SOUND)
    for position, byte in edits:
        content[position] = byte
    path.write_bytes(content)
    try:
        read_everything(path)
    except BadInput as error:
        assert_one_line(error, path)


def test_every_flip_of_one_header_byte(tmp_path: Path) -> None:
    """Exhaustive where it is cheap: every header byte to 0, 9 and 255."""
    path = tmp_path / "flipped.gguf"
    path.write_bytes(SOUND)
    n_header = len(SOUND) - 448
    with open(path, "r+b", buffering=0) as stream:
        for position in range(n_header):
            for byte in (0, 9, 255, SOUND[position]):
                os.pwrite(stream.fileno(), bytes([byte]), position)
                try:
                    read_everything(path)
                except BadInput as error:
                    assert_one_line(error, path)


def test_truncated_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(SOUND)
    for n_bytes in reversed(range(len(SOUND))):
        os.truncate(path, n_bytes)
        with pytest.raises(BadInput) as caught:
            read_gguf(path)
        assert_one_line(caught.value, path)
