"""Marks of quantised layers are measured before the host reads them."""

import json

import pytest
import torch
from helpers_hostile import SIZES, Safetensors
from wan21.wan.files import read_shapes
from wan21.wan.files.marks import MARK, check_scales, mark_of, marks_in, unpacked_shapes


def as_bytes(text):
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def test_marks_are_read():
    assert mark_of("a", as_bytes('{"format": "nvfp4"}')) == {"format": "nvfp4"}
    stored = {"layers": {"blocks.0.ffn.0": {"format": "int8_tensorwise"}}}
    assert marks_in({"_quantization_metadata": json.dumps(stored)}) == stored["layers"]
    assert marks_in({}) == {}


@pytest.mark.parametrize(
    "mark",
    [
        as_bytes("nvfp4"),
        as_bytes('["nvfp4"]'),
        as_bytes("{" * 5000),
        torch.tensor([255, 254], dtype=torch.uint8),
        torch.zeros(0, dtype=torch.uint8),
        torch.zeros((), dtype=torch.uint8),
        torch.zeros(3),
        torch.zeros(2**30, dtype=torch.uint8, device="meta"),
        torch.zeros(3).to(torch.float8_e4m3fn),  # single bytes too, and NumPy has no such type
        torch.zeros(3, dtype=torch.bool),
    ],
)
def test_a_damaged_mark_is_named(mark):
    with pytest.raises(ValueError, match=r"^blocks\.0\.ffn\.0\.comfy_quant (is no JSON|must be a)"):
        mark_of("blocks.0.ffn.0", mark)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "BF16", "F4", "BOOL", "U16", "I64"])
def test_a_mark_of_any_type_is_looked_at(tmp_path, dtype):
    """The look at the header had failed on types that NumPy does not have."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(Safetensors([("a.comfy_quant", dtype, [4], bytes(int(4 * SIZES[dtype])))]).raw())
    with pytest.raises(ValueError, match=r"^a\.comfy_quant must be a text in bytes"):
        mark_of("a", read_shapes(path).state_dict["a.comfy_quant"])


@pytest.mark.parametrize("size", [0, -16, 7, 2**40, "x", True, 16.5, [], None])
def test_columns_are_rotated_together_by_powers_of_four(size):
    """The host had divided by it at the first product of a run."""
    mark = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": size}
    with pytest.raises(ValueError, match=r"^a has the convrot_groupsize .*; 4, 16, 64, 256, 1024, 4096 are"):
        mark_of("a", as_bytes(json.dumps(mark)))
    with pytest.raises(ValueError, match=r"^a has the convrot_groupsize"):
        mark_of("a", as_bytes(json.dumps({"format": "int8_tensorwise", "params": mark})))
    with pytest.raises(ValueError, match=r"^a has the convrot_groupsize"):
        marks_in({"_quantization_metadata": json.dumps({"layers": {"a": mark}})})
    with pytest.raises(ValueError, match=r"^a has the convrot_groupsize"):
        mark_of("a", as_bytes(json.dumps({"format": "convrot_w4a4", "convrot_groupsize": size})))
    for read in (64, 64.0):  # the host makes an int of it
        changed = mark | {"convrot_groupsize": read}
        assert mark_of("a", as_bytes(json.dumps(changed)))["convrot_groupsize"] == 64
    for unread in ({"convrot": False}, {"format": "float8_e4m3fn", "convrot": None}):  # nor by the host
        assert mark_of("a", as_bytes(json.dumps(mark | unread)))["convrot_groupsize"] == size


@pytest.mark.parametrize("stored", ["", "[]", "{}", '{"layers": []}', '{"layers": {"a": 1}}', "[" * 9000])
def test_damaged_metadata_is_named(stored):
    with pytest.raises(ValueError, match=r"`_quantization_metadata` in its metadata (is no JSON|must be a)"):
        marks_in({"_quantization_metadata": stored})


def test_a_layer_that_cannot_be_unpacked_is_named():
    formats = {"a": "float8_e4m3fn"}
    with pytest.raises(ValueError, match="a is stored as float8_e4m3fn and lacks a scale"):
        check_scales({"a.weight": torch.zeros(2, 2)}, formats)
    with pytest.raises(ValueError, match=r"a\.weight is quantised and has 1 axes instead of 2"):
        check_scales({"a.weight": torch.zeros(2), "a.weight_scale": torch.ones(1)}, formats)
    with pytest.raises(ValueError, match="a is stored as nvfp4 and lacks a scale"):
        check_scales({"a.weight": torch.zeros(2, 2), "a.weight_scale": torch.ones(1)}, {"a": "nvfp4"})
    for scales in (0, 3, 9):
        odd = {"a.weight": torch.zeros(2, 2), "a.weight_scale": torch.ones(scales)}
        with pytest.raises(ValueError, match=f"a has {scales} scales for 2 rows"):
            check_scales(odd, {"a": "int8_tensorwise"})
    check_scales(
        {"a.weight": torch.zeros(2, 2), "a.weight_scale": torch.ones(2, 1)}, {"a": "int8_tensorwise"}
    )
    whole = {"a.weight": torch.zeros(2, 3), "a.weight_scale": torch.ones(1), f"a{MARK}": as_bytes("{}")}
    check_scales(whole, formats)
    assert unpacked_shapes(whole, {"a": "convrot_w4a4"})["a.weight"].shape == (2, 6)


@pytest.mark.parametrize(
    "name, shape, scales, mark, problem",
    [
        ("mxfp8", (130, 160), 256 * 8, {}, None),
        ("mxfp8", (130, 160), 130 * 5, {}, "has 650 block scales; its 130 x 160 take 2048"),
        ("nvfp4", (128, 32), 128 * 4, {}, None),  # 64 columns
        ("nvfp4", (128, 32), 1, {}, "has 1 block scales; its 128 x 64 take 512"),
        ("int8_tensorwise", (4, 320), 4, {"convrot": True, "convrot_groupsize": 64}, None),
        (
            "int8_tensorwise",
            (4, 320),
            4,
            {"convrot": True},
            "has 320 columns, which are no whole groups of 256",
        ),
        ("int8_tensorwise", (4, 320), 4, {"params": {"convrot": True}}, "no whole groups of 256"),
        ("int8_tensorwise", (4, 320), 4, {"convrot_groupsize": 256}, None),  # not rotated
        ("convrot_w4a4", (4, 96), 12, {"convrot_groupsize": 64}, None),
        ("convrot_w4a4", (4, 96), 12, {"convrot_groupsize": 64.0}, None),
        ("convrot_w4a4", (4, 96), 12, {}, "has 192 columns, which are no whole groups of 256"),
    ],
)
def test_scales_and_rotations_go_with_the_size(name, shape, scales, mark, problem):
    """The host had said so in its own words, without the file, at the first product of a run."""
    layer = {"a.weight": torch.zeros(shape), "a.weight_scale": torch.ones(scales)}
    layer |= {"a.weight_scale_2": torch.ones(1), f"a{MARK}": as_bytes(json.dumps(mark))}
    if problem is None:
        return check_scales(layer, {"a": name})
    with pytest.raises(ValueError, match=f"^a .*{problem}"):
        check_scales(layer, {"a": name})
