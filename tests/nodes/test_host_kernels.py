"""Kernels on the host's layers: norms give them their numbers as stored, patched and fetched."""

from dataclasses import replace

import pytest
import torch
from comfy_api.torch_helpers.torch_compile import TORCH_COMPILE_KWARGS
from helpers import relative
from helpers_kernels import ALL, counting
from safetensors.torch import load_file, save_file
from test_gguf import pair  # noqa: F401
from wan21 import host
from wan21.host import kernels as host_kernels
from wan21.wan import glue, kernels
from wan21.wan.attention import SDPA, AttentionSize

METADATA = {"config": '{"transformer": {"text_dim": 128}}'}
LATENT = {"samples": torch.zeros(1, 16, 2, 4, 4)}
NORMS = [
    "blocks.0.norm3.diff",
    "blocks.1.norm3.diff_b",
    "blocks.0.self_attn.norm_q.diff",
    "blocks.1.self_attn.norm_k.diff",
    "blocks.0.cross_attn.norm_q.diff",
    "blocks.1.cross_attn.norm_k.diff",
]


@pytest.fixture
def switch(monkeypatch):
    """`switch(on)` turns the kernels on, in PyTorch and in any dtype, or off. Gives how often each ran."""
    ran, counted = counting()

    def run(on):
        ran.update(dict.fromkeys(ALL, 0))
        choices = {name: kernels.Choice(counted[name] if on else None) for name in ALL}
        monkeypatch.setattr(kernels, "choose", lambda name, *_: choices[name])
        return ran

    monkeypatch.setattr(glue, "_takes_kernels", lambda x: x.ndim == 3)  # on the pretended GPU too
    return run


@pytest.fixture(params=["float32", "bfloat16", "float8_e4m3fn", "fp8_e4m3fn", "gguf"])
def loaded(request, files, tmp_path):
    """The text-to-video model from a file in a dtype, with a weight_dtype, and from a GGUF file."""
    if request.param == "gguf":
        return host.load_model(request.getfixturevalue("pair")[0])
    if request.param == "fp8_e4m3fn":
        return host.load_model(files["t2v"], request.param)
    dtype, path = getattr(torch, request.param), tmp_path / "stored.safetensors"
    norms = dtype if dtype.itemsize > 1 else torch.bfloat16
    state = {k: v.to(dtype if v.ndim == 2 else norms) for k, v in load_file(files["t2v"]).items()}
    save_file(state, path, metadata=METADATA)
    return host.load_model(path)


@pytest.fixture(params=[(), (1.0, 0.5)], ids=["merged", "schedule"])
def with_lora(request, tmp_path):
    """Puts differences on the norms of a MODEL."""
    g = torch.Generator().manual_seed(4)
    file = {f"diffusion_model.{key}": torch.randn(256, generator=g) for key in NORMS}
    path = tmp_path / "norms.safetensors"
    save_file(file, path)
    return lambda model: host.add_lora(model, host.read_lora(path, model), 1.0, request.param)


def test_norms_lend_what_they_use(loaded, with_lora, prompts, sample, switch):
    model = with_lora(loaded)
    ran = switch(True)
    ours = sample(model, *prompts, LATENT, steps=2)[0]["samples"]
    # Steps, passes, blocks, calls; and the head's norm, float32 as here all is.
    packed = hasattr(loaded.model.diffusion_model.blocks[0].ffn[0], "packed")
    rides = 0 if packed or not hasattr(loaded.model.diffusion_model.blocks[0].ffn[0], "lend") else 2 * 2 * 2
    assert ran == {"residual_norm": 2 * 2 * (2 * 4 + 1), "rms_rope": 2 * 2 * 2 * 4, "gelu_product": rides}
    switch(False)
    plain, patched = (sample(m, *prompts, LATENT, steps=2)[0]["samples"] for m in (loaded, model))
    assert relative(ours, patched) < 1e-5 and relative(ours, plain) > 1e-2


def test_the_report_says_which_kernels_a_gpu_runs(models, prompts, sample, monkeypatch):
    model, gpus = models["t2v"], [torch.device("cuda", i) for i in range(2)]
    if model.load_device.type == "cpu":
        assert host.kernels_of(model) is None
        assert "kernels:" not in sample(model, *prompts, LATENT, steps=1)[1]
    monkeypatch.setattr(host_kernels, "devices_of", lambda model: gpus)
    assert host.kernels_of(model).startswith("none of our own: they ")  # without a GPU, or in float32
    why = {gpus[0]: None, gpus[1]: "they need compute capability 8.0 and the device has 7.5"}

    def choices(device, *sizes):
        return dict.fromkeys(ALL, kernels.Choice(None if why[device] else len, why[device]))

    monkeypatch.setattr(host_kernels, "kernel_choices", choices)
    elsewhere = f"on cuda:1 none of our own: {why[gpus[1]]}"
    packed = f"on cuda:0 residual_norm, rms_rope; not gelu_product: {host_kernels.PACKED}; {elsewhere}"
    plain = f"on cuda:0 residual_norm, rms_rope, gelu_product; {elsewhere}"
    lends = hasattr(model.model.diffusion_model.blocks[0].ffn[0], "lend")  # not our product of the CPU
    assert f"kernels: {plain if lends else packed}\n" in sample(model, *prompts, LATENT, steps=1)[1]
    for found, said in ((True, plain), (None, packed)):
        monkeypatch.setattr(host_kernels, "lent", lambda layer, x, found=found: found)
        assert host.kernels_of(model) == said
    compiled = model.clone()
    compiled.model_options[TORCH_COMPILE_KWARGS] = {"backend": "inductor"}
    assert "the MODEL is compiled" in host.kernels_of(compiled) and "fp8" not in host.kernels_of(compiled)
    monkeypatch.setattr(model.model.diffusion_model.blocks[0].ffn[0], "by_rows", True, raising=False)
    assert host.kernels_of(compiled).endswith("weights of fp8_e4m3fn_rows are unpacked then at each use")


def test_the_report_says_which_attention_a_gpu_runs(models, prompts, sample, monkeypatch):
    """It was tried at the tokens of the run; what a missing package would give is told once a process."""
    model, tried = models["t2v"], []
    # Of PyTorch's kernels the CPU has this one.
    expected = "" if model.load_device.type == "cpu" else "attention: sdpa by flash\n"
    report = sample(model, *prompts, LATENT, steps=1)[1]
    assert expected in report and ("attention:" in report) == bool(expected)

    def choose(name, device, dtype, size, *_):
        tried.append(size)
        return replace(SDPA, kernel="cuDNN", seconds=(("sdpa cuDNN", 0.012), ("sdpa flash", 0.0344)))

    monkeypatch.setattr(host.attention, "choose_attention", choose)
    monkeypatch.setattr(host.attention, "attentions_to_get", lambda *_: "much")
    monkeypatch.setattr(host.attention, "_told", set())
    reports = [sample(model, *prompts, LATENT, steps=1)[1] for _ in range(2)]
    said = "attention: sdpa by cuDNN; one self-attention of this run: sdpa cuDNN 12 ms, sdpa flash 34.4 ms\n"
    assert all(said in report for report in reports)
    assert ["attention to install, by published figures: much" in r for r in reports] == [True, False]
    config = model.model.diffusion_model.config
    assert tried == 2 * [AttentionSize(2 * 2 * 2, config.num_heads, config.head_dim)]
    monkeypatch.setattr(host.attention, "_told", set())
    named = sample(model, *prompts, LATENT, steps=1, execution__attention="sdpa")[1]
    assert said in named and "attention to install" not in named
