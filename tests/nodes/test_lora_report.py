"""What of a LoRA is used and what is left out, in the sentences of the loader's report and refusals."""

import comfy.lora
import pytest
import torch
from wan21.nodes.lora_report import check_lora, lora_report
from wan21.wan.config import WanConfig
from wan21.wan.dit import WanModel
from wan21.wan.lora import match_lora

SMALL = dict(dim=8, ffn_dim=12, num_heads=2, text_dim=6, freq_dim=4)


def shapes_of(**config):
    with torch.device("meta"):
        model = WanModel(WanConfig(**(SMALL | config)), torch.nn)
    return {k: tuple(v.shape) for k, v in model.state_dict().items()}


T2V = shapes_of(in_dim=16, num_layers=2)


def low_rank(name, rank=2, rows=8, columns=8):
    return {
        f"{name}.lora_A.weight": torch.zeros(rank, columns),
        f"{name}.lora_B.weight": torch.zeros(rows, rank),
    }


def test_ranks_are_counted():
    file = {}
    for rank, layer in ((1, "self_attn.q"), (3, "self_attn.k"), (4, "cross_attn.o")):
        file |= low_rank(f"diffusion_model.blocks.0.{layer}", rank)
    assert "rank: 1 x 1, 1 x 3, 1 x 4" in "\n".join(lora_report(match_lora(file, T2V)))


def test_an_i2v_lora_on_t2v_is_reported_with_what_is_left_out():
    image = low_rank("diffusion_model.blocks.0.cross_attn.k_img") | low_rank("diffusion_model.img_emb.proj.1")
    size = {"diffusion_model.patch_embedding.diff": torch.zeros(8, 36, 1, 2, 2)}
    lora = match_lora(low_rank("diffusion_model.blocks.0.self_attn.q") | image | size, T2V)
    report = "\n".join(lora_report(lora))
    assert "applied: 2 of 7 keys, 1 layers, 1 x low-rank" in report
    assert "left out: 4 keys, image-branch keys on a model without image branch: diffusion_model." in report
    check_lora(lora)
    with pytest.raises(ValueError, match=r"^5 keys do not fit the model: .*Turn strict off"):
        check_lora(lora, strict=True)


def test_a_lora_of_which_nothing_fits_is_refused():
    file = low_rank("blocks.0.self_attn.q") | {"blocks.0.self_attn.q.dora_scale": torch.zeros(5, 1)}
    with pytest.raises(ValueError, match=r"none of its 3 keys fits the model: .*magnitude"):
        check_lora(match_lora(file, T2V))


@pytest.mark.parametrize("keys", [1, 2])
def test_strict_refuses_by_the_number_of_keys(keys):
    odd = {f"blocks.0.self_attn.q.odd{i}": torch.zeros(1) for i in range(keys)}
    lora = match_lora(odd | low_rank("blocks.0.self_attn.v"), T2V)
    check_lora(lora)
    with pytest.raises(ValueError, match=f"^{keys} keys do not fit the model: .*Turn strict off"):
        check_lora(lora, strict=True)


def test_no_more_than_ten_names_are_shown():
    file = {}
    for i in range(2, 9):
        file |= low_rank(f"diffusion_model.blocks.{i}.self_attn.q")
    text = str(lora_report(match_lora(file, T2V)))
    assert text.count("lora_") == 10 and "and 4 more" in text


def test_blocks_are_named_as_ranges():
    file = {}
    for i in (0, 1, 2, 4):
        file |= low_rank(f"blocks.{i}.self_attn.q")
    lines = lora_report(match_lora(file | low_rank("text_embedding.2"), shapes_of(in_dim=16, num_layers=6)))
    assert "blocks: 0-2, 4" in lines and "outside the blocks: text_embedding.2" in lines


def test_a_dora_says_how_it_differs_from_the_hosts_loader():
    plain = low_rank("blocks.0.self_attn.q")
    assert "dora" not in "\n".join(lora_report(match_lora(plain, T2V)))
    rows, columns = T2V["blocks.0.self_attn.q.weight"]
    for sides, differs in (((rows, 1), True), ((rows,), True), ((1, columns), False)):
        file = plain | {"blocks.0.self_attn.q.dora_scale": torch.ones(sides)}
        assert ("LoraLoaderModelOnly divides" in "\n".join(lora_report(match_lora(file, T2V)))) == differs


@pytest.mark.parametrize("form", ["lora_{}.weight", "lora_{}.default.weight"])
def test_biases_of_factors_which_the_hosts_loader_leaves_out_are_said(form):
    """The host's list of patches is asked what it would do."""
    name = "diffusion_model.blocks.0.self_attn.q"
    file = {f"{name}.{form.format(side)}": torch.ones(size) for side, size in (("A", (2, 8)), ("B", (8, 2)))}
    bias = f"{name}.{form.format('B')}".replace("weight", "bias")
    said = "biases of factors (1) act, as in PEFT; the host's LoraLoaderModelOnly leaves them out"
    assert said not in "\n".join(lora_report(match_lora(file, T2V)))
    assert f"{said}: {bias}" in "\n".join(lora_report(match_lora(file | {bias: torch.ones(8)}, T2V)))
    to_load = {name: f"{name}.weight", f"{name}.bias": f"{name}.bias"}
    patched = comfy.lora.load_lora(file | {bias: torch.ones(8)}, to_load, log_missing=False)
    assert f"{name}.bias" not in patched
