"""GGUF files are read with their shapes, and what is damaged is named."""

import gguf
import numpy as np
import pytest
from wan21.wan.files.gguf import dequantize, read_gguf


def write(path, tensors, orig_shapes=(), family="wan"):
    """A GGUF file as city96's tool writes it: {name: (array, type or None)}."""
    writer = gguf.GGUFWriter(str(path), family)
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
    with pytest.raises(ValueError, match=r"^many\.gguf: not a GGUF file, or its head is damaged"):
        read_gguf(path)


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="pip install gguf"):
        read_gguf(tmp_path / "x.gguf")


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
