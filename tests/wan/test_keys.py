"""Names of single keys, and files that no key map can make sense of."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from helpers_checkpoint import meta_state_dict
from wan21.wan import files as ck


def test_scales_and_adapters_follow_their_layer():
    assert (
        ck.wan_dit_key("blocks.3.attn2.add_k_proj.scale_weight") == "blocks.3.cross_attn.k_img.scale_weight"
    )
    assert ck.wan_dit_key("blocks.3.attn1.to_q.lora_A.weight") == "blocks.3.self_attn.q.lora_A.weight"
    assert ck.wan_dit_key("blocks.3.norm2.weight") == "blocks.3.norm3.weight"
    assert ck.wan_dit_key("blocks.3.self_attn.q.weight") == "blocks.3.self_attn.q.weight"


def test_one_layer_under_two_names_is_refused():
    published = meta_state_dict(lambda: WanTransformer3DModel(in_channels=16, num_layers=1))
    published["head.modulation"] = published["scale_shift_table"]
    with pytest.raises(ValueError, match="one layer under two names"):
        ck.to_wan_dit_keys(published)


def test_scales_of_no_known_format_are_refused():
    scales = {"blocks.0.ffn.0.weight_scale": torch.ones(1), "blocks.0.ffn.2.weight_scale": torch.ones(1)}
    formats = {f"blocks.0.ffn.{i}.comfy_quant": torch.zeros(1) for i in (0, 2)}
    ck.refuse_loose_scales(scales | formats)
    with pytest.raises(ValueError, match=r"^1 layers have scales \(blocks.0.ffn.2.weight_scale\).*_comfyui"):
        ck.refuse_loose_scales(scales | {"blocks.0.ffn.0.comfy_quant": torch.zeros(1)})


@pytest.mark.parametrize("rename", [ck.to_wan_dit_keys, ck.to_umt5_keys])
def test_quanto_files_are_named(rename):
    with pytest.raises(ValueError, match="quanto"):
        rename({"blocks.0.ffn.0.weight._data": torch.zeros(1), "blocks.0.ffn.0.weight._scale": torch.ones(1)})
