"""GGUF files are read with their shapes, and what is damaged is named."""

import math
import struct
import sys
import time

import gguf
import numpy as np
import pytest
import torch
from wan21.wan.files.gguf import dequantize, read_gguf
from wan21.wan.files.umt5_gguf import read_umt5_gguf
from wan21.wan.refusal import Refusal


def write(path, tensors, orig_shapes=(), family="wan", parts=0):
    """A GGUF file as city96's tool writes it: {name: (array, type or None)}."""
    writer = gguf.GGUFWriter(str(path), family)
    if parts:
        writer.add_uint16("split.count", parts)
    for name, shape in dict(orig_shapes).items():
        writer.add_array(f"comfy.gguf.orig_shape.{name}", shape)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind and gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def small_file(path):
    weight = np.random.default_rng(0).standard_normal((4, 64), dtype=np.float32)
    conv = np.arange(2 * 8 * 1 * 2 * 2, dtype=np.float16)
    tensors = {
        "blocks.0.ffn.0.weight": (gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0), "Q8_0"),
        "blocks.0.ffn.0.bias": (weight[0], None),
        "patch_embedding.weight": (conv, None),
    }
    return write(path, tensors, {"patch_embedding.weight": [2, 8, 1, 2, 2]}), weight, conv


def test_a_file_is_read_with_its_shapes(tmp_path):
    path, weight, conv = small_file(tmp_path / "x.gguf")
    tensors = read_gguf(path)
    assert {k: (v.kind, v.shape) for k, v in tensors.items()} == {
        "blocks.0.ffn.0.weight": ("Q8_0", (4, 64)),
        "blocks.0.ffn.0.bias": ("F32", (64,)),
        "patch_embedding.weight": ("F16", (2, 8, 1, 2, 2)),
    }
    unpacked = {k: dequantize(*v) for k, v in tensors.items()}
    assert np.abs(unpacked["blocks.0.ffn.0.weight"].numpy() - weight).max() < 0.02
    assert np.array_equal(unpacked["blocks.0.ffn.0.bias"].numpy(), weight[0])
    assert np.array_equal(unpacked["patch_embedding.weight"].flatten().numpy(), conv.astype(np.float32))


def test_blocks_may_lie_across_the_rows_of_a_shape_in_the_metadata(tmp_path):
    numbers = np.random.default_rng(0).standard_normal((1, 160), dtype=np.float32)
    packed = gguf.quants.quantize(numbers, gguf.GGMLQuantizationType.Q8_0)[0]  # 170 bytes
    tensors = {"patch_embedding.weight": (packed, "Q8_0")}
    path = write(tmp_path / "x.gguf", tensors, {"patch_embedding.weight": [4, 10, 1, 2, 2]})
    found = read_gguf(path)["patch_embedding.weight"]
    assert np.abs(dequantize(*found).numpy().reshape(1, -1) - numbers).max() < 0.02


@pytest.mark.parametrize(
    "key, value",
    [
        ("tokens", [1, 2]),
        ("scores", ["a", "b"]),
        ("token_type", ["a", "b"]),
        ("eos_token_id", "one"),
        ("precompiled_charsmap", [0.5]),
        ("add_space_prefix", math.inf),
        ("tokens", 7),
        ("scores", [0.5]),
    ],
)
def test_a_tokenizer_of_other_types_is_damaged(tmp_path, key, value):
    path = tmp_path / "umt5.gguf"
    writer = gguf.GGUFWriter(str(path), "t5encoder")
    whole = {"tokens": ["a", "b"], "scores": [0.5, 0.25], "token_type": [1, 1], "model": "t5"}
    for name, given in (whole | {key: value}).items():
        add = {str: writer.add_string, int: writer.add_int32, float: writer.add_float64}
        add.get(type(given), writer.add_array)(f"tokenizer.ggml.{name}", given)
    writer.add_tensor("enc.output_norm.weight", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        Refusal, match=r"^umt5\.gguf: the tokenizer in its metadata is damaged .*\. Download it"
    ):
        read_umt5_gguf(path, torch.float32)


@pytest.mark.parametrize("keep", [0, 10, 40, 200, -40])
def test_a_truncated_file_is_named(tmp_path, keep):
    path, *_ = small_file(tmp_path / "cut.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"^cut\.gguf: .* Download it again"):
        read_gguf(path)


def test_a_count_that_no_file_has_is_refused(tmp_path):
    path, *_ = small_file(tmp_path / "many.gguf")
    data = bytearray(path.read_bytes())
    data[8:16] = (1 << 60).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"^many\.gguf: its head is damaged: it states 1152921504606846976 te"
    ):
        read_gguf(path)


def test_the_package_is_needed_for_its_own_types_alone(tmp_path, monkeypatch):
    plain, weight, _ = small_file(tmp_path / "plain.gguf")
    kind = gguf.GGMLQuantizationType.IQ4_XS
    rows, size = 4, gguf.GGML_QUANT_SIZES[kind][1]
    foreign = write(tmp_path / "iq4.gguf", {"a": (np.zeros((rows, size), np.uint8), "IQ4_XS")})
    assert read_gguf(foreign)["a"].kind == "IQ4_XS" and read_gguf(foreign)["a"].shape == (rows, 256)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert np.abs(dequantize(*read_gguf(plain)["blocks.0.ffn.0.weight"]).numpy() - weight).max() < 0.02
    with pytest.raises(ValueError, match=r"^iq4\.gguf: a: the GGUF type of number 23 .* pip install gguf"):
        read_gguf(foreign)


@pytest.mark.parametrize("folded", [(16, 1, 2, 2), (2, 8, 2, 2)])
def test_a_patch_embedding_of_four_axes_is_unfolded(tmp_path, folded):
    weight = np.arange(64, dtype=np.float32).reshape(folded)
    tensors = {"patch_embedding.weight": (weight, None), "patch_embedding.bias": (weight[0, 0, 0], None)}
    read = read_gguf(write(tmp_path / "folded.gguf", tensors))["patch_embedding.weight"]
    assert read.shape == (2, 8, 1, 2, 2)
    assert np.array_equal(dequantize(*read).numpy().ravel(), weight.ravel())


@pytest.mark.parametrize("family", ["hunyuan", "flux", "ltxv"])
def test_another_family_is_named_by_its_metadata(tmp_path, family):
    tensors = {"double_blocks.0.weight": (np.zeros((2, 4), np.float32), None)}
    with pytest.raises(ValueError, match=rf"general\.architecture is '{family}'.* Pick a Wan2\.1 file"):
        read_gguf(write(tmp_path / "other.gguf", tensors, family=family))


@pytest.mark.parametrize("parts", [1, 2])
def test_a_part_of_a_split_file_is_named(tmp_path, parts):
    path = write(tmp_path / "a-00001-of-00002.gguf", {"bias": (np.zeros(4, np.float32), None)}, parts=parts)
    if parts == 1:
        assert list(read_gguf(path)) == ["bias"]
        return
    with pytest.raises(ValueError, match="one of the 2 parts of a GGUF file"):
        read_gguf(path)


# --- heads that state what the file does not hold ----------------------------------------------------------


def text(value):
    value = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(value)) + value


def head(values=b"", num_values=0, tensors=b"", num_tensors=0, version=3, order="<"):
    return b"GGUF" + struct.pack(f"{order}IQQ", version, num_tensors, num_values) + values + tensors


def tensor(name="a", shape=(4,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def a_list(kind, count, items=b"", key="x"):
    return text(key) + struct.pack("<IIQ", 9, kind, count) + items


def one(*tensors, values=b"", num_values=0, data=bytes(64)):
    raw = head(values, num_values, b"".join(tensors), len(tensors))
    return raw + bytes(-len(raw) % 32) + data


DAMAGED = {
    "a list of 2^62 bytes": (head(a_list(0, 2**62), 1), "its head goes on for 4611686018427387904 bytes"),
    "a list of 2^62 doubles": (head(a_list(12, 2**62), 1), "its head goes on"),
    "2^62 texts": (head(a_list(8, 2**62), 1), "the metadata has 4611686018427387904 texts"),
    "zeros as texts": (head(a_list(8, 1_900_000, bytes(8 * 1_900_000)) * 2, 2), "has 3800000 texts"),
    "lists of lists": (head(a_list(9, 1), 1), r"x in the metadata is of no known type \(9\)"),
    "a value of no type": (head(text("x") + struct.pack("<I", 77), 1), r"no known type \(77\)"),
    "a text past the end": (
        head(text("x") + struct.pack("<IQ", 8, 2**63), 1),
        "its head goes on for 9223372",
    ),
    "a key without end": (
        head(struct.pack("<Q", 2**63), 1),
        "a key of the metadata at 24 is 9223372036854775808",
    ),
    "a key that is no text": (head(text(b"\xff\xfe") + struct.pack("<IB", 0, 1), 1), "no text"),
    "one key twice": (
        head((text("x") + struct.pack("<IB", 0, 1)) * 2, 2),
        "gives a value of the metadata twice",
    ),
    "2^40 values": (head(num_values=2**40), "it states 0 tensors and 1099511627776 values"),
    "more values than there are": (head(num_values=99_999), "its head goes on for 8 bytes"),
    "more tensors than there are": (head(num_tensors=99_999), "its head goes on for 8 bytes"),
    "no tensors": (one(), "without any tensor"),
    "zero rows": (one(tensor(shape=(4, 0))), r"a has the shape \(0, 4\)"),
    "no axes": (one(tensor(shape=())), "a has 0 axes"),
    "a million axes": (one(text("a") + struct.pack("<I", 10**6)), "a has 1000000 axes"),
    "sides whose product overflows": (one(tensor(shape=(2**32, 2**32))), "truncated or damaged: a"),
    "past the end": (one(tensor(offset=2**40)), "takes 16 bytes at 1099511627"),
    "out of line": (one(tensor(offset=8)), "truncated or damaged: a"),
    "one over another": (one(tensor("a", (16,)), tensor("b", (4,), offset=32)), "a and b overlap"),
    "two of one name": (one(tensor(), tensor()), "two tensors have one name"),
    "long names": (
        one(*(tensor("blocks.1." * 50 + f"{i:05}", (8,), offset=32 * i) for i in range(10_000))),
        "the names of its tensors take 4550000 letters",
    ),
    "no type of ggml": (one(tensor(kind=99)), "there is no GGUF type of number 99"),
    "a type that was taken away": (one(tensor(kind=4)), "there is no GGUF type of number 4"),
    "broken blocks": (one(tensor(shape=(33,), kind=8)), "rows of 33 numbers are no whole blocks"),
    "an integer type": (one(tensor(kind=26)), "the GGUF type I32 is not read here"),
    "a negative first shape": (
        one(
            tensor(), values=a_list(5, 2, struct.pack("<ii", -1, -4), "comfy.gguf.orig_shape.a"), num_values=1
        ),
        r"a has the shape \[-1, -4\]",
    ),
    "another first shape": (
        one(tensor(), values=a_list(5, 2, struct.pack("<ii", 3, 3), "comfy.gguf.orig_shape.a"), num_values=1),
        r"a is \[4\], and by its metadata \[3, 3\]",
    ),
    "a first shape of truths": (
        one(
            tensor(shape=(1,)),
            values=a_list(7, 2, b"\1\1", "comfy.gguf.orig_shape.a"),
            num_values=1,
        ),
        r"a has the shape \[True, True\]",
    ),
    "a first shape in words": (
        one(tensor(), values=a_list(8, 1, text("4"), "comfy.gguf.orig_shape.a"), num_values=1),
        r"a has the shape \['4'\]",
    ),
    "an alignment of 3": (
        one(tensor(), values=text("general.alignment") + struct.pack("<II", 4, 3), num_values=1),
        "general.alignment must be a power of two",
    ),
    "big-endian": (head(version=3, order=">", num_tensors=1), "for big-endian machines"),
    "version 1": (head(version=1), "of version 1, and 2 and 3 are read"),
    "version 4 billion": (head(version=2**32 - 1), "of version 4294967295"),
    "a web page": (b"<!DOCTYPE html><html>log in</html>", "a web page"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid x\nsize 1\n", "Git LFS"),
    "nothing": (b"", "empty"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_head_is_named_at_once(tmp_path, case):
    """The first of these, of 1 KB, had taken all memory of the machine."""
    content, words = DAMAGED[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    began = time.process_time()
    with pytest.raises(ValueError, match=rf"^bad\.gguf: .*{words}"):
        read_gguf(path)
    assert time.process_time() - began < 5


def test_a_folder_and_nothing_are_named(tmp_path):
    (tmp_path / "x.gguf").mkdir()
    for name in ("x.gguf", "y.gguf"):
        with pytest.raises(ValueError, match=rf"^{name}: there is no file of this name"):
            read_gguf(tmp_path / name)


def test_many_tensors_and_values_are_read_at_once(tmp_path):
    """A LoRA of many small tensors is no attack; the package had taken 12 s for them."""
    values = b"".join(text(f"k{i}") + struct.pack("<IB", 0, 1) for i in range(50_000))
    tensors = b"".join(tensor(f"t{i}", (8,), offset=32 * i) for i in range(50_000))
    raw = head(values, 50_000, tensors, 50_000)
    path = tmp_path / "many.gguf"
    path.write_bytes(raw + bytes(-len(raw) % 32) + bytes(32 * 50_000))
    began = time.process_time()
    assert len(read_gguf(path)) == 50_000
    assert time.process_time() - began < 10
