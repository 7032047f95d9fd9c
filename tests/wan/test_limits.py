"""What a file states about a model is held against the file before anything is built by it."""

import time

import pytest
import torch
from helpers_checkpoint import umt5_state_dict
from torch import nn
from wan21.wan import files as ck
from wan21.wan.config import WanConfig, detect_config
from wan21.wan.dit import WanModel
from wan21.wan.files.limits import MAX_TABLE_BYTES
from wan21.wan.refusal import Refusal

I2V = WanConfig(in_dim=36, dim=256, ffn_dim=512, num_heads=2, num_layers=3, image_dim=1280, image_tokens=514)


def dit():
    with torch.device("meta"):
        return WanModel(I2V, nn).state_dict()


def empty(*shape):
    return torch.empty(shape, device="meta")


NUMBERS = {
    "far away": "999999999",
    "next but one": "4",
    "negative": "-1",
    "with a zero in front": "03",
    "a word": "x",
    "of 5,000 digits": "9" * 5000,
}


@pytest.mark.parametrize("number", NUMBERS)
def test_block_numbers_have_no_gap(number):
    """A number alone had made the loader build as many blocks."""
    began = time.process_time()
    key = f"blocks.{NUMBERS[number]}.ffn.0.weight"
    with pytest.raises(
        ValueError, match=r"not numbered from 0 without a gap: 3 missing, .* there\. .* again"
    ):
        detect_config(dit() | {key: empty(1)})
    umt5 = umt5_state_dict() | {f"encoder.block.{NUMBERS[number]}.layer.0.layer_norm.weight": empty(1)}
    with pytest.raises(ValueError, match=r"blocks are not numbered from 0 without a gap: 3 missing"):
        ck.umt5_config(ck.to_umt5_keys(umt5))
    assert time.process_time() - began < 5


def test_the_count_of_blocks_is_bounded():
    many = {f"blocks.{i}.ffn.2.bias": empty(1) for i in range(257)}
    with pytest.raises(ValueError, match="it numbers 257 blocks, and models have up to 256"):
        detect_config(dit() | many)


SIZES = {
    "a scalar": ("patch_embedding.weight", (), r"patch_embedding\.weight has the shape \[\], and 5 axes"),
    "one axis": ("patch_embedding.weight", (36,), r"\[36\], and 5 axes are read"),
    "no width": (
        "patch_embedding.weight",
        (0, 36, 1, 2, 2),
        "its dim is 0; sizes from 1 to 1048576 are read",
    ),
    "no feed-forward": ("blocks.0.ffn.0.weight", (0, 256), "its ffn_dim is 0"),
    "a vast feed-forward": ("blocks.0.ffn.0.weight", (2**40, 0), "its ffn_dim is 1099511627776"),
    "a head without rows": ("head.head.weight", (0, 256), "takes 36 channels and gives 0"),
    "a head of one axis": ("head.head.weight", (64,), r"head\.head\.weight has the shape \[64\]"),
    "text of one axis": ("text_embedding.0.weight", (4096,), r"text_embedding\.0\.weight has the shape"),
    "time of no width": ("time_embedding.0.weight", (256, 0), "its freq_dim is 0"),
    "time of odd width": ("time_embedding.0.weight", (256, 255), "255 wide"),
    "an image branch of no axis": ("img_emb.proj.0.weight", (), r"img_emb\.proj\.0\.weight has the shape"),
    "positions of one axis": ("img_emb.emb_pos", (514,), r"img_emb\.emb_pos has the shape \[514\]"),
    "positions of no token": ("img_emb.emb_pos", (1, 0, 1280), "its image_tokens is 0"),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes_that_no_model_has_are_named(case):
    key, shape, words = SIZES[case]
    with pytest.raises(ValueError, match=words):
        detect_config(dit() | {key: empty(*shape)})


@pytest.mark.parametrize("key", ["head.head.weight", "text_embedding.0.weight", "time_embedding.0.weight"])
def test_a_layer_that_a_size_is_read_from_is_named(key):
    state_dict = dit()
    del state_dict[key]
    with pytest.raises(ValueError, match=rf"it lacks {key}: the file is incomplete\. Download it again"):
        detect_config(state_dict)


CONFIGS = {
    "broken": ("{", "is no JSON"),
    "endless": ('{"transformer":' + "[" * 100_000, "is no JSON"),
    "a list": ("[]", "must be a JSON table"),
    "a number": ("7", "must be a JSON table"),
    "a list below": ('{"transformer": []}', r"`config\.transformer` in its metadata must be a JSON table"),
    "heads in words": ('{"transformer": {"num_heads": "two"}}', "num_heads in its metadata is a str"),
    "heads yes": ('{"transformer": {"num_heads": true}}', "num_heads in its metadata is a bool"),
    "half a head": ('{"transformer": {"num_heads": 2.5}}', "num_heads in its metadata is a float"),
    "no heads": ('{"transformer": {"num_heads": 0}}', "its num_heads is 0"),
    "negative heads": ('{"transformer": {"num_heads": -2}}', "its num_heads is -2"),
    "very many heads": ('{"transformer": {"num_heads": ' + "9" * 4000 + "}}", "its num_heads is 999"),
    "heads that do not divide": (
        '{"transformer": {"num_heads": 3}}',
        "width 256 does not divide into 3 heads",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_metadata_that_states_no_model_is_named(case):
    config, words = CONFIGS[case]
    with pytest.raises(ValueError, match=words):
        detect_config(dit(), {"config": config})


def test_a_table_in_the_metadata_is_bounded():
    """One of 14 MB had been read four times for a model, of which it said nothing."""
    table = '{"transformer": {"x": "' + "x" * MAX_TABLE_BYTES + '"}}'
    with pytest.raises(ValueError, match="`config` in its metadata has 4000026 bytes, and up to 4000000 are"):
        detect_config(dit(), {"config": table})


UMT5_SIZES = {
    "no heads": ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 0), "0 heads"),
    "no vocabulary": ("shared.weight", (0, 16), "its vocabulary is 0"),
    "a vast width": ("shared.weight", (0, 2**50), "its width is 1125899906842624"),
    "no feed-forward": ("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", (0, 16), "feed-forward is 0"),
    "no query": ("encoder.block.0.layer.0.SelfAttention.q.weight", (0, 16), "its query width is 0"),
    "no positions": (
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        (0, 2),
        "its count of positions is 0",
    ),
}


@pytest.mark.parametrize("case", UMT5_SIZES)
def test_sizes_that_no_encoder_has_are_named(case):
    key, shape, words = UMT5_SIZES[case]
    with pytest.raises(ValueError, match=words):
        ck.umt5_config(ck.to_umt5_keys(umt5_state_dict()) | {key: empty(*shape)})


def test_what_is_said_can_be_written_to_any_log():
    """A name of bytes that are no UTF-8 had ended the thread that runs ComfyUI's queue."""
    said = str(Refusal("wan\udcff.safetensors: no \x1b[31mfile\n", "猫 é: pick it").about("Node"))
    assert said == r"Node: wan\udcff.safetensors: no \x1b[31mfile\n. 猫 é: pick it."
    assert said.encode().isascii() is False


CAUSAL = {
    "ComfyUI": {"config": '{"transformer": {"causal_ar": true}}'},
    "diffusers": {"config": '{"_class_name": "CausalWanModel", "model_type": "t2v"}'},
    "a class below": {"config": '{"transformer": {"_class_name": "CausalWanTransformer3DModel"}}'},
    "an architecture": {"modelspec.architecture": "wan2.1-self-forcing"},
    "a kind": {"model_type": "causal"},
}


@pytest.mark.parametrize("case", CAUSAL)
def test_an_autoregressive_model_is_told_by_its_metadata(case):
    """Keys and shapes are those of Wan2.1, and it had been sampled as one."""
    with pytest.raises(ck.WrongKind, match=r"It is an autoregressive Wan model .*; pick a Wan2\.1 text"):
        detect_config(dit(), CAUSAL[case])


@pytest.mark.parametrize(
    "metadata",
    [
        {"config": '{"transformer": {"causal_ar": false}}'},
        {"config": '{"_class_name": "WanTransformer3DModel", "model_type": "i2v"}'},
        {"modelspec.title": "I2V 14B, distilled by self-forcing", "modelspec.architecture": "wan2.1"},
        {"modelspec.description": "causal"},
    ],
)
def test_a_model_of_the_usual_kind_is_not_taken_for_one(metadata):
    assert detect_config(dit(), metadata) == I2V
