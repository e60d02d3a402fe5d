"""GGUF in and out: round trips, exact sizes, agreement with gguf-py, files whole or not there."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from odd_gguf import any_kv

from cerebellum import files
from cerebellum.errors import BadInput
from cerebellum.gguf import (
    LADDER,
    GGMLQuantizationType,
    GgufFile,
    GGUFValueType,
    TensorInfo,
    TensorSource,
    bits_per_weight,
    encode_kv,
    fits,
    gguf_size,
    legal_types,
    needs_imatrix,
    parse_type,
    read_gguf,
    record_key,
    row_bytes,
    tensor_bytes,
    write_gguf,
)

T, V = GGMLQuantizationType, GGUFValueType

IN_ONE_FOLDER = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def tensor(name: str, type_: GGMLQuantizationType, shape: tuple[int, ...], content: bytes) -> TensorSource:
    return TensorSource(name=name, shape=shape, type=type_, chunks=lambda: [content])


# ---- sizes ----


@pytest.mark.parametrize(
    ("type_", "n_bytes"),
    [(T.F32, 1024), (T.F16, 512), (T.Q2_K, 84), (T.Q3_K, 110), (T.Q4_0, 144), (T.IQ2_XXS, 66)],
)
def test_row_bytes_of_256_elements(type_: GGMLQuantizationType, n_bytes: int) -> None:
    assert row_bytes(type_, 256) == n_bytes
    assert tensor_bytes(type_, (256, 3, 2)) == 6 * n_bytes
    assert bits_per_weight(type_) == n_bytes / 32


def test_a_row_that_is_no_whole_number_of_blocks_is_refused() -> None:
    assert not fits(T.Q2_K, (288, 256))
    with pytest.raises(BadInput, match=r"288.*Q2_K.*256"):
        tensor_bytes(T.Q2_K, (288, 256))


def test_type_names_are_read_as_people_write_them() -> None:
    assert parse_type("q2_k") is parse_type(" Q2_K ") is T.Q2_K
    with pytest.raises(BadInput, match=r"'q2k'.*IQ2_XXS.*Q8_0"):
        parse_type("q2k")


def test_legal_types_follow_row_length_and_imatrix() -> None:
    assert T.IQ2_XXS in legal_types([(256, 8)], has_imatrix=True)
    assert not any(needs_imatrix(type_) for type_ in legal_types([(256, 8)], has_imatrix=False))
    assert T.Q4_0 not in legal_types([(512, 8)], has_imatrix=True)
    short = legal_types([(256, 8), (96, 8)], has_imatrix=True)
    assert short == (T.Q4_0, T.IQ4_NL, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0)
    assert legal_types([(20, 8)], has_imatrix=True) == ()


def test_the_ladder_rises() -> None:
    for has_imatrix in (True, False):
        for n_per_row in (256, 32):
            bits = [bits_per_weight(t) for t in legal_types([(n_per_row,)], has_imatrix)]
            assert bits == sorted(bits)
    assert len(set(LADDER)) == len(LADDER) == 20


# ---- metadata ----

KEYS = st.text(st.characters(min_codepoint=33, exclude_categories=["Cs"]), min_size=1, max_size=12)
"""No key can be general.alignment, which has 17 characters and is the writer's business."""
INTEGERS = {
    kind: st.integers(np.iinfo(np.dtype(code)).min, np.iinfo(np.dtype(code)).max)
    for kind, code in {
        V.UINT8: "u1",
        V.INT8: "i1",
        V.UINT16: "u2",
        V.INT16: "i2",
        V.UINT32: "u4",
        V.INT32: "i4",
        V.UINT64: "u8",
        V.INT64: "i8",
    }.items()
}
SCALARS: dict[GGUFValueType, st.SearchStrategy[Any]] = {
    **INTEGERS,
    V.FLOAT32: st.floats(width=32, allow_nan=False),
    V.FLOAT64: st.floats(allow_nan=False),
    V.BOOL: st.booleans(),
    V.STRING: st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
}


@st.composite
def values(draw: st.DrawFn) -> tuple[Any, GGUFValueType, GGUFValueType | None]:
    kind = draw(st.sampled_from(list(SCALARS)))
    if draw(st.booleans()):
        return draw(SCALARS[kind]), kind, None
    return draw(st.lists(SCALARS[kind], max_size=5)), V.ARRAY, kind


METADATA = st.dictionaries(KEYS, values(), max_size=6)
TYPES = st.sampled_from([T.F32, T.F16, T.I32, T.Q4_0, T.Q8_0, T.Q2_K, T.IQ3_XXS])


def pieces(content: bytes, cut: int) -> list[bytes | memoryview]:
    return [content[:cut], memoryview(content)[cut:]]


def content_of(source: TensorSource) -> bytes:
    return b"".join(np.frombuffer(c, np.uint8).tobytes() for c in source.chunks())


@st.composite
def tensor_sources(draw: st.DrawFn) -> list[TensorSource]:
    made = []
    name_text = st.text(st.sampled_from("abz._0\u00e9"), min_size=1, max_size=20)
    for name in draw(st.lists(name_text, max_size=4, unique=True)):
        type_ = draw(TYPES)
        blocks = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
        shape = (blocks[0] * gguf.GGML_QUANT_SIZES[type_][0], *blocks[1:])
        n_bytes = tensor_bytes(type_, shape)
        seed = draw(st.integers(0, 2**16))
        content = np.random.default_rng(seed).bytes(n_bytes)
        cut = draw(st.integers(0, n_bytes))
        made.append(
            TensorSource(
                name=name,
                shape=shape,
                type=type_,
                chunks=partial(pieces, content, cut),
            )
        )
    return made


def equal(read: Any, given_value: Any) -> bool:
    return list(read) == list(given_value) if isinstance(read, np.ndarray) else read == given_value


@IN_ONE_FOLDER
@given(metadata=METADATA, tensors=tensor_sources(), alignment=st.sampled_from([8, 32, 64, 4096]))
def test_what_is_written_is_read_back(
    tmp_path: Path,
    metadata: dict[str, tuple[Any, GGUFValueType, GGUFValueType | None]],
    tensors: list[TensorSource],
    alignment: int,
) -> None:
    path = tmp_path / "a.gguf"
    records = [any_kv(key, *value) for key, value in metadata.items()]
    if alignment != 32:
        records.append(encode_kv("general.alignment", alignment, V.UINT32))
    n_bytes = write_gguf(path, records, tensors, alignment)
    assert n_bytes == gguf_size(records, tensors, alignment) == path.stat().st_size

    file = read_gguf(path)
    assert (file.version, file.alignment, file.n_bytes) == (3, alignment, n_bytes)
    assert list(file.kv_records.values()) == records
    assert list(file.kv_records) == [record_key(record) for record in records]
    for key, (value, _, _) in metadata.items():
        assert equal(file.value(key), value)
    assert [(t.name, t.shape, t.type) for t in file.tensors] == [(t.name, t.shape, t.type) for t in tensors]
    for source, info in zip(tensors, file.tensors, strict=True):
        assert info.offset % alignment == 0
        assert file.data(info).tobytes() == content_of(source)
    head = path.read_bytes()[: file.data_start]
    assert file.header_sha256 == hashlib.sha256(head).hexdigest()
    assert list(tmp_path.iterdir()) == [path]


def test_metadata_is_copied_as_bytes(tmp_path: Path) -> None:
    nan = struct.unpack("<f", b"\x01\x02\xc0\x7f")[0]
    records = [
        any_kv("odd.nan", nan, V.FLOAT32),
        any_kv("odd.bytes", b"\xff\xfe", V.STRING),
        any_kv("odd.list", [b"\xf0\x9f", "ok"], V.ARRAY, V.STRING),
    ]
    write_gguf(tmp_path / "a.gguf", records, [])
    first = read_gguf(tmp_path / "a.gguf")
    assert first.value("odd.bytes") == "\ufffd\ufffd"
    assert first.value("odd.list") == ["\ufffd", "ok"]
    assert first.value("not.there", 7) == 7
    write_gguf(tmp_path / "b.gguf", list(first.kv_records.values()), [])
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


def test_the_bytes_a_hand_can_derive(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, [encode_kv("k", 258, V.UINT16)], [tensor("t", T.F32, (2, 1), b"abcdefgh")])
    header = (
        b"GGUF\x03\0\0\0" + b"\x01\0\0\0\0\0\0\0" * 2
        + b"\x01\0\0\0\0\0\0\0k\x02\0\0\0\x02\x01"
        + b"\x01\0\0\0\0\0\0\0t\x02\0\0\0" + b"\x02\0\0\0\0\0\0\0" + b"\x01\0\0\0\0\0\0\0"
        + b"\0\0\0\0" + b"\0" * 8
    )  # fmt: skip
    assert path.read_bytes() == header.ljust(96, b"\0") + b"abcdefgh".ljust(32, b"\0")


@pytest.mark.parametrize(
    ("value", "value_type"),
    [
        (1 << 16, V.UINT16),
        (-1, V.UINT32),
        (1 << 31, V.INT32),
        ("text", V.INT32),
        (1.5, V.INT32),
        (7, V.STRING),
        (["a", 1], V.ARRAY),
        ([[1], [2]], V.ARRAY),
        (0.5, V.FLOAT32),
    ],
)
def test_values_that_do_not_fit_their_type_are_refused(value: Any, value_type: GGUFValueType) -> None:
    with pytest.raises(BadInput, match=r"'some\.key'"):
        encode_kv("some.key", value, value_type)


@pytest.mark.parametrize(
    ("value", "value_type", "item_type"),
    [
        ("caf\u00e9", V.STRING, None),
        (65_535, V.UINT16, None),
        (4_294_967_295, V.UINT32, None),
        (-2_147_483_648, V.INT32, None),
        (["a", "\u00e9"], V.ARRAY, V.STRING),
        ([], V.ARRAY, V.STRING),
    ],
)
def test_what_is_written_has_gguf_pys_bytes(
    value: Any, value_type: GGUFValueType, item_type: GGUFValueType | None
) -> None:
    assert encode_kv("some.key", value, value_type) == any_kv("some.key", value, value_type, item_type)


# ---- gguf-py ----


def one_chunk(file: GgufFile, info: TensorInfo) -> list[npt.NDArray[np.uint8]]:
    return [file.data(info)]


def test_gguf_py_reads_ours(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    weights = np.arange(512, dtype=np.float32).reshape(2, 256)
    packed = np.random.default_rng(0).bytes(tensor_bytes(T.Q4_0, (256, 2)))
    write_gguf(
        path,
        [
            encode_kv("general.architecture", "llama", V.STRING),
            encode_kv("llama.block_count", 2, V.UINT32),
            encode_kv("tokens", ["a", "\u00e9"], V.ARRAY),
        ],
        [
            TensorSource(name="w", shape=(256, 2), type=T.F32, chunks=lambda: [weights]),
            tensor("q", T.Q4_0, (256, 2), packed),
        ],
    )
    theirs = gguf.GGUFReader(path)
    assert theirs.fields["general.architecture"].contents() == "llama"
    assert theirs.fields["llama.block_count"].contents() == 2
    assert theirs.fields["tokens"].contents() == ["a", "\u00e9"]
    assert [t.name for t in theirs.tensors] == ["w", "q"]
    assert np.array_equal(theirs.tensors[0].data, weights)
    assert theirs.tensors[1].data.tobytes() == packed


def test_we_read_gguf_pys_and_write_the_same_bytes(tmp_path: Path) -> None:
    path, again = tmp_path / "a.gguf", tmp_path / "b.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_array("tokens", ["a", "b\u00e9"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_float64("pi", 3.14)
    weights = np.arange(6, dtype=np.float16).reshape(2, 3)
    writer.add_tensor("w", weights)
    writer.add_tensor("b", np.ones(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = read_gguf(path)
    assert file.value("general.architecture") == "llama"
    assert file.value("tokens") == ["a", "b\u00e9"]
    assert list(file.value("numbers")) == [1, 2, 3]
    assert file.value("pi") == 3.14
    assert (file.tensors[0].shape, file.tensors[0].n_elements) == ((3, 2), 6)
    assert file.data("w").view(np.float16).reshape(2, 3).tolist() == weights.tolist()
    copies = [
        TensorSource(name=t.name, shape=t.shape, type=t.type, chunks=partial(one_chunk, file, t))
        for t in file.tensors
    ]
    write_gguf(again, list(file.kv_records.values()), copies)
    assert again.read_bytes() == path.read_bytes()


def test_data_is_a_read_only_view(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", [], [tensor("t", T.F32, (2,), b"abcdefgh")])
    view = read_gguf(tmp_path / "a.gguf").data("t")
    assert not view.flags.writeable and not view.flags.owndata
    with pytest.raises(BadInput, match=r"a\.gguf: has no tensor 'u'"):
        read_gguf(tmp_path / "a.gguf").data("u")


def test_a_file_that_changed_since_its_header_was_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, [], [tensor("t", T.F32, (2,), b"abcdefgh")])
    file = read_gguf(path)
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(BadInput, match=r"a\.gguf: was 96 bytes and is now 100"):
        file.data("t")


# ---- whole or not there ----


def test_a_tensor_must_give_exactly_its_bytes(tmp_path: Path) -> None:
    for content in (b"", b"abcdefg", b"abcdefghi"):
        with pytest.raises(BadInput, match=r"'t'.*8 bytes"):
            write_gguf(tmp_path / "a.gguf", [], [tensor("t", T.F32, (2,), content)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "n" * 64])
def test_names_that_llama_cpp_cannot_hold_are_not_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput, match="tensor name"):
        write_gguf(tmp_path / "a.gguf", [], [tensor(name, T.F32, (2,), b"abcdefgh")])


def test_contradictions_are_not_written(tmp_path: Path) -> None:
    path, one = tmp_path / "a.gguf", tensor("t", T.F32, (2,), b"abcdefgh")
    aligned = encode_kv("general.alignment", 64, V.UINT32)
    for records, tensors, alignment, words in [
        ([aligned, aligned], [], 64, "given twice"),
        ([], [one, one], 32, "given twice"),
        ([aligned], [one], 32, "alignment 64"),
        ([], [one], 64, "alignment 32"),
        ([], [one], 48, "power of two"),
        ([], [tensor("t", T.F32, (2, 0), b"")], 32, "shape"),
    ]:
        with pytest.raises(BadInput, match=words):
            write_gguf(path, records, tensors, alignment)
    assert list(tmp_path.iterdir()) == []


def failing(error: BaseException) -> Callable[[], Iterator[bytes]]:
    def chunks() -> Iterator[bytes]:
        yield b"abcd"
        raise error

    return chunks


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("x"), OSError(errno.EACCES, "x")])
def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"old")
    source = TensorSource(name="t", shape=(2,), type=T.F32, chunks=failing(error))
    with pytest.raises(type(error)):
        write_gguf(path, [], [source])
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_seen_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(BadInput, match=r"a\.gguf: the disk is full: 96 bytes are needed .* 10 are"):
        write_gguf(tmp_path / "a.gguf", [], [tensor("t", T.F32, (2,), b"abcdefgh")])
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile(tmp_path: Path) -> None:
    source = TensorSource(name="t", shape=(2,), type=T.F32, chunks=failing(OSError(errno.ENOSPC, "no space")))
    with pytest.raises(BadInput, match=r"a\.gguf: the disk is full: 96 bytes are needed"):
        write_gguf(tmp_path / "a.gguf", [], [source])
    assert list(tmp_path.iterdir()) == []


def test_a_file_size_limit_met_for_real(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(BadInput, match=r"a\.gguf: a file may not grow that big"):
            write_gguf(tmp_path / "a.gguf", [], [tensor("t", T.F32, (4096,), bytes(16384))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.DISK, "create", refuse)
    with pytest.raises(BadInput, match=r"a\.gguf: no permission to write in .*; choose another"):
        write_gguf(tmp_path / "a.gguf", [], [])


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not exist; create it"):
        write_gguf(tmp_path / "no" / "a.gguf", [], [])
    with pytest.raises(BadInput, match="is a folder"):
        write_gguf(tmp_path, [], [])


def test_text_is_written_whole_and_hashed(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.atomic_write_text(path, "old")
    files.atomic_write_text(path, "h\u00e9\n")
    assert path.read_bytes() == b"h\xc3\xa9\n"
    seen: list[tuple[int, int]] = []
    digest = files.sha256_file(path, lambda done, total: seen.append((done, total)))
    assert digest == hashlib.sha256(b"h\xc3\xa9\n").hexdigest()
    assert seen == [(4, 4)]
    with pytest.raises(BadInput, match=r"no\.json: no such file"):
        files.sha256_file(tmp_path / "no.json")


def test_the_tee_sees_every_byte_of_the_file(tmp_path: Path) -> None:
    digest = hashlib.sha256()
    data = np.arange(100, dtype=np.float32)
    source = TensorSource(name="t", shape=(100,), type=GGMLQuantizationType.F32, chunks=lambda: iter([data]))
    write_gguf(tmp_path / "t.gguf", [], [source], tee=digest.update)
    assert digest.hexdigest() == hashlib.sha256((tmp_path / "t.gguf").read_bytes()).hexdigest()
