"""umT5 layouts against Hugging Face's classes; tests/nodes runs them in the host's text model."""

import pytest
import torch
from helpers_checkpoint import UMT5_SIZE, meta_state_dict, umt5_state_dict
from transformers import UMT5Config, UMT5ForConditionalGeneration
from wan21.wan import files as ck


def test_decoder_of_a_full_umt5_is_left_out():
    full = meta_state_dict(lambda: UMT5ForConditionalGeneration(UMT5Config(**UMT5_SIZE)))
    assert any(key.startswith("decoder.") for key in full) and "lm_head.weight" in full
    assert ck.to_umt5_keys(full).keys() == ck.to_umt5_keys(umt5_state_dict()).keys()


def test_umt5_tokenizer_and_scales_stay():
    extra = {
        "spiece_model": torch.zeros(9, dtype=torch.uint8),
        "scaled_fp8": torch.zeros(0),
        "encoder.block.0.layer.0.SelfAttention.q.scale_weight": torch.ones(()),
    }
    renamed = ck.to_umt5_keys(umt5_state_dict() | extra)
    assert all(renamed[key] is extra[key] for key in extra)


def test_umt5_of_one_block_is_umt5():
    assert ck.umt5_config(ck.to_umt5_keys(umt5_state_dict(num_layers=1)))["num_layers"] == 1


def test_umt5_config_names_what_is_missing_or_contradictory():
    weights = ck.to_umt5_keys(umt5_state_dict())
    with pytest.raises(ValueError, match=r"lacks shared\.weight.*incomplete"):
        ck.umt5_config({k: v for k, v in weights.items() if k != "shared.weight"})
    query = "encoder.block.0.layer.0.SelfAttention.q.weight"
    with pytest.raises(ValueError, match="9 query channels for 2 heads"):
        ck.umt5_config(weights | {query: torch.zeros(9, 16)})
