"""umT5 files of each layout run in the host's own text model, at toy size."""

import json
from pathlib import Path

import comfy.ops
import comfy.text_encoders.t5 as host_t5
import pytest
import torch
import torch.nn.functional as F
from comfy.text_encoders.wan import WanT5Tokenizer
from helpers import relative
from helpers_checkpoint import UMT5_SIZE, umt5_state_dict, with_prefix
from lib.random_weights import randomise
from transformers import UMT5Config, UMT5EncoderModel
from wan21 import host
from wan21.wan import files as ck

XXL = json.loads(Path(host_t5.__file__).with_name("umt5_config_xxl.json").read_text())


def host_umt5(state_dict):
    """The host's own text model of the size that the weights say, loaded strictly."""
    config = XXL | ck.umt5_config(state_dict)  # as the host lays one over the other
    model = host_t5.T5(config, torch.float32, "cpu", comfy.ops.disable_weight_init)
    model.load_state_dict(state_dict, strict=True)
    return model.eval()


def encode(model, ids):
    with torch.no_grad():
        return model(ids, attention_mask=torch.ones_like(ids))[0]


IDS = torch.tensor([[5, 9, 60, 3, 17, 1]])


@pytest.mark.parametrize("embedding", ["shared", "encoder.embed_tokens", "both"])
@pytest.mark.parametrize("prefix", ["", "text_encoder.", "text_encoders.umt5xxl.transformer.", "text_model."])
def test_huggingface_umt5_runs_in_the_host(prefix, embedding):
    published = randomise(UMT5EncoderModel(UMT5Config(**UMT5_SIZE)))
    weights = published.state_dict()
    weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
    for key in ("shared", "encoder.embed_tokens"):
        if embedding not in ("both", key):
            del weights[f"{key}.weight"]
    renamed = ck.to_umt5_keys(with_prefix(prefix, weights))
    assert relative(encode(host_umt5(renamed), IDS), encode(published, IDS)) < 1e-5


def release_umt5(layers=3, dim=16, heads=2, ffn=24, vocab=64):
    """Random weights under the names that `wan/modules/t5.py` of the Wan2.1 release gives them."""
    sizes = {"token_embedding.weight": (vocab, dim), "norm.weight": (dim,)}
    for i in range(layers):
        block = f"blocks.{i}."
        sizes |= {f"{block}attn.{name}.weight": (8, dim) for name in "qkv"}
        sizes |= {f"{block}attn.o.weight": (dim, 8)}
        sizes |= {f"{block}norm{n}.weight": (dim,) for n in (1, 2)}
        sizes |= {f"{block}ffn.{name}.weight": (ffn, dim) for name in ("gate.0", "fc1")}
        sizes |= {f"{block}ffn.fc2.weight": (dim, ffn)}
        sizes |= {f"{block}pos_embedding.embedding.weight": (32, heads)}
    g = torch.Generator().manual_seed(3)
    return {key: torch.randn(size, generator=g) * 0.3 for key, size in sizes.items()}


def run_release_umt5(w, ids, heads=2):
    """A umT5 encoder over the release's names, from the T5 paper's formulas (short inputs only)."""

    def norm(x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight

    def split(x):
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    x = w["token_embedding.weight"][ids]
    position = torch.arange(ids.shape[1])
    offset = position[None, :] - position[:, None]  # key minus query; below 8 each has its own bucket
    bucket = offset.abs() + 16 * (offset > 0)
    for i in range(3):
        layer = {k.removeprefix(f"blocks.{i}."): v for k, v in w.items() if k.startswith(f"blocks.{i}.")}
        h = norm(x, layer["norm1.weight"])
        q, k, v = (split(h @ layer[f"attn.{name}.weight"].T) for name in "qkv")
        bias = layer["pos_embedding.embedding.weight"][bucket].permute(2, 0, 1)
        attended = (q @ k.transpose(-1, -2) + bias).softmax(-1) @ v
        x = x + attended.transpose(1, 2).flatten(2) @ layer["attn.o.weight"].T
        h = norm(x, layer["norm2.weight"])
        gate = F.gelu(h @ layer["ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (gate * (h @ layer["ffn.fc1.weight"].T)) @ layer["ffn.fc2.weight"].T
    return norm(x, w["norm.weight"])


def test_release_umt5_runs_in_the_host():
    weights = release_umt5()
    renamed = ck.to_umt5_keys(weights)
    assert relative(encode(host_umt5(renamed), IDS), run_release_umt5(weights, IDS)) < 1e-5


def test_umt5_config_of_the_xxl_size_is_the_hosts():
    xxl = umt5_state_dict(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
    sizes = ck.umt5_config(ck.to_umt5_keys(xxl))
    assert sizes == {name: XXL[name] for name in sizes} and len(sizes) == 8


@pytest.fixture(scope="module")
def clip(files):
    return host.load_text_encoder(files["umt5"])


def words(clip, count):
    """A text of so many tokens, the end's with them."""
    text = "the cat walks slowly over a wet roof, " * 100
    tokenizer = clip.tokenizer.clip_umt5xxl.tokenizer.tokenizer
    text = tokenizer.decode(tokenizer.encode(text)[: count - 1])
    assert len(tokenizer.encode(text)) == count
    return text


@pytest.mark.parametrize("count, left_out", [(512, None), (513, 1), (700, 188)])
def test_a_prompt_longer_than_the_trained_length_is_read_as_natively_and_said(clip, caplog, count, left_out):
    import nodes

    text = words(clip, count)
    native = clip.clone()
    native.tokenizer = WanT5Tokenizer(tokenizer_data=clip.tokenizer.state_dict())
    expected = nodes.CLIPTextEncode().encode(native, text)[0]
    with caplog.at_level("INFO"):
        got = nodes.CLIPTextEncode().encode(clip, text)[0]
    assert got[0][0].shape[1] == count and torch.equal(got[0][0], expected[0][0])
    said = f"is {count} tokens long, and Wan2.1 was trained with up to 512"
    assert (said in caplog.text) == (left_out is not None)
    assert left_out is None or f"leaves out the last {left_out}" in caplog.text


def test_the_end_of_a_long_prompt_counts(models, clip, sample, image_to_video):
    """All the tokens reach the model, where the release would have cut them."""
    text = words(clip, 600)
    ends = [clip.encode_from_tokens_scheduled(clip.tokenize(text + end)) for end in ("", "fog")]
    inputs = [image_to_video(positive=end) for end in ends]
    results = [
        sample(models["i2v"], *given, guidance_scale=4.0, solver="euler", steps=2)[0]["samples"]
        for given in inputs
    ]
    assert not torch.equal(*results)
