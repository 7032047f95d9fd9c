"""Our MODEL in the host's own sampler and patch system, against the native model on the same file."""

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.sd
import pytest
import torch
from helpers import relative
from helpers_nodes import clip_vision
from safetensors.torch import load_file
from wan21 import host


def native(path):
    return comfy.sd.load_diffusion_model(str(path))


def ksample(model, positive, negative, latent, cfg=3.0):
    samples = latent["samples"]
    noise = comfy.sample.prepare_noise(samples, 5)
    return comfy.sample.sample(
        model, noise, 3, cfg, "euler", "simple", positive, negative, samples, seed=5, disable_pbar=True
    )


@pytest.mark.parametrize("clip_tokens", [0, 257, 514])
def test_ksampler_gives_what_the_native_model_gives(files, models, image_to_video, clip_tokens):
    kind = "flf2v" if clip_tokens == 514 else "i2v"
    extra = {"clip_vision_start": clip_vision(clip_tokens)} if clip_tokens else {}
    positive, negative, latent = image_to_video(**extra)
    ours = ksample(models[kind], positive, negative, latent)
    assert relative(ours, ksample(native(files[kind]), positive, negative, latent)) < 1e-5


def test_ksampler_text_to_video(files, models, prompts):
    latent = {"samples": torch.zeros(2, 16, 3, 8, 6)}
    ours = ksample(models["t2v"], *prompts, latent)
    assert relative(ours, ksample(native(files["t2v"]), *prompts, latent)) < 1e-5


def test_ksampler_pads_odd_latents_like_the_native_model(files, models, prompts):
    latent = {"samples": torch.zeros(1, 16, 2, 7, 5)}
    ours = ksample(models["t2v"], *prompts, latent)
    assert relative(ours, ksample(native(files["t2v"]), *prompts, latent)) < 1e-5


def test_model_sampling_sd3_applies(files, models, prompts):
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    latent = {"samples": torch.zeros(1, 16, 2, 4, 4)}
    shifted = [ModelSamplingSD3().patch(m, 2.0)[0] for m in (models["t2v"], native(files["t2v"]))]
    ours, theirs = (ksample(m, *prompts, latent) for m in shifted)
    assert relative(ours, theirs) < 1e-5
    assert relative(ours, ksample(models["t2v"], *prompts, latent)) > 1e-3


def test_host_lora_applies_and_strength_zero_is_absent(files, models, prompts, tmp_path):
    g = torch.Generator().manual_seed(1)
    lora = {}
    for name in ("self_attn.q", "ffn.0"):
        out = 512 if name == "ffn.0" else 256
        lora[f"diffusion_model.blocks.1.{name}.lora_A.weight"] = torch.randn(4, 256, generator=g) / 16
        lora[f"diffusion_model.blocks.1.{name}.lora_B.weight"] = torch.randn(out, 4, generator=g)
    latent = {"samples": torch.zeros(1, 16, 2, 4, 4)}
    plain = ksample(models["t2v"], *prompts, latent)
    ours, theirs = (
        ksample(comfy.sd.load_lora_for_models(m, None, lora, 1.0, 0)[0], *prompts, latent)
        for m in (models["t2v"], native(files["t2v"]))
    )
    assert relative(ours, theirs) < 1e-5
    assert relative(ours, plain) > 1e-3
    none = comfy.sd.load_lora_for_models(models["t2v"], None, lora, 0.0, 0)[0]
    assert torch.equal(ksample(none, *prompts, latent), plain)
    assert torch.equal(ksample(models["t2v"], *prompts, latent), plain)


def test_native_skip_layer_node_replaces_our_blocks(models, prompts):
    latent = {"samples": torch.zeros(1, 16, 2, 4, 4)}
    plain = ksample(models["t2v"], *prompts, latent)
    patched = models["t2v"].clone()
    patched.set_model_patch_replace(lambda args, extra: args, "dit", "double_block", 0)
    skipped = ksample(patched, *prompts, latent)
    through = models["t2v"].clone()
    through.set_model_patch_replace(
        lambda args, extra: extra["original_block"](args), "dit", "double_block", 0
    )
    assert relative(skipped, plain) > 1e-3
    assert torch.equal(ksample(through, *prompts, latent), plain)


def test_a_guider_of_three_conditionings(files, models, prompts):
    """DualCFGGuider hands all three in one batch."""
    from comfy_extras.nodes_custom_sampler import DualCFGGuider

    def dual(model):
        guider = DualCFGGuider.execute(model, *prompts, prompts[1], 3.0, 2.0, "regular").result[0]
        samples = torch.zeros(1, 16, 2, 4, 4)
        noise = comfy.sample.prepare_noise(samples, 5)
        sigmas = torch.tensor([1.0, 0.5, 0.0])
        return guider.sample(noise, samples, comfy.samplers.sampler_object("euler"), sigmas, seed=5)

    assert relative(dual(models["t2v"]), dual(native(files["t2v"]))) < 1e-5


def test_scale_rope_acts_as_on_the_native_model(files, models, prompts):
    from comfy_extras.nodes_rope import ScaleROPE

    latent = {"samples": torch.zeros(1, 16, 3, 8, 6)}
    scaled = [
        ScaleROPE.execute(m, 0.5, 1.0, 0.7, 0.0, 2.0, 3.0).result[0]
        for m in (models["t2v"], native(files["t2v"]))
    ]
    ours, theirs = (ksample(m, *prompts, latent) for m in scaled)
    assert relative(ours, theirs) < 1e-5
    assert relative(ours, ksample(models["t2v"], *prompts, latent)) > 1e-3


def test_context_windows_and_easycache_act_as_on_the_native_model(files, models, prompts):
    """In the host's KSampler; our own sampler refuses them."""
    from comfy_extras.nodes_context_windows import WanContextWindowsManualNode
    from comfy_extras.nodes_easycache import EasyCacheNode

    latent = {"samples": torch.zeros(1, 16, 7, 4, 4)}
    plain = ksample(models["t2v"], *prompts, latent)
    windows = (17, 8, "standard_static", 1, False, "pyramid", False)
    patches = [
        lambda m: WanContextWindowsManualNode.execute(m, *windows),
        lambda m: EasyCacheNode.execute(m, 3.0, 0.0, 1.0, False),
    ]
    for patch in patches:
        ours, theirs = (
            ksample(patch(m).result[0], *prompts, latent) for m in (models["t2v"], native(files["t2v"]))
        )
        assert relative(ours, theirs) < 1e-5
        assert relative(ours, plain) > 1e-4


@pytest.mark.parametrize("kind", ["attn1_patch", "attn2_patch", "double_block"])
def test_a_patch_inside_a_block_is_refused(models, prompts, kind):
    patched = models["t2v"].clone()
    patched.set_model_patch(lambda args: args["x"], kind)
    with pytest.raises(ValueError, match=f"^another node put {kind} on the MODEL"):
        ksample(patched, *prompts, {"samples": torch.zeros(1, 16, 2, 4, 4)})


@pytest.mark.parametrize("weight_dtype, tolerance", [("fp32", 0), ("bf16", 0.1), ("fp16", 0.02)])
def test_weight_dtype(files, models, prompts, weight_dtype, tolerance):
    latent = {"samples": torch.zeros(1, 16, 2, 4, 4)}
    model = host.load_model(files["t2v"], weight_dtype)
    assert model.model.diffusion_model.blocks[0].ffn[0].weight.dtype == host.DTYPES[weight_dtype]
    error = relative(ksample(model, *prompts, latent), ksample(models["t2v"], *prompts, latent))
    assert error <= tolerance
    assert error > 0 or weight_dtype == "fp32"


@pytest.mark.parametrize("weight_dtype, tolerance", [("fp8_e4m3fn", 0.1), ("fp8_e5m2", 0.2)])
def test_fp8_stores_the_matrices_of_the_blocks(files, models, prompts, weight_dtype, tolerance):
    latent = {"samples": torch.zeros(1, 16, 2, 4, 4)}
    model = host.load_model(files["t2v"], weight_dtype)
    dit = model.model.diffusion_model
    fp8 = {k for k, v in dit.state_dict().items() if v.dtype.itemsize == 1}
    matrices = {k for k, v in dit.state_dict().items() if k.startswith("blocks.") and v.ndim == 2}
    assert fp8 == matrices and len(matrices) == 2 * 10
    exact = ksample(models["t2v"], *prompts, latent)
    assert 0 < relative(ksample(model, *prompts, latent), exact) < tolerance


def test_fp8_multiplication_is_refused_where_the_device_cannot(files):
    if comfy.model_management.supports_fp8_compute(comfy.model_management.get_torch_device()):
        pytest.skip("this device multiplies in fp8")
    with pytest.raises(ValueError, match=r"cannot multiply in fp8 .* Set fp8_e4m3fn, which stores in fp8"):
        host.load_model(files["t2v"], "fp8_e4m3fn_fast")


def test_lora_on_fp8_weights(files, models, prompts):
    """A LoRA changes an fp8 model as it changes the exact one, merged by the host or over the steps."""
    from wan21.wan.lora import match_lora

    g = torch.Generator().manual_seed(1)
    name = "blocks.1.ffn.0"
    file = {
        f"{name}.lora_A.weight": torch.randn(4, 256, generator=g) / 16,
        f"{name}.lora_B.weight": torch.randn(512, 4, generator=g),
    }
    lora = match_lora(file, {f"{name}.weight": (512, 256)})
    latent = {"samples": torch.zeros(1, 16, 2, 4, 4)}
    fp8 = host.load_model(files["t2v"], "fp8_e4m3fn")
    plain = ksample(models["t2v"], *prompts, latent)
    for schedule in ((), (1.0, 0.9)):
        ours, exact = (
            ksample(host.add_lora(m, lora, 1.0, schedule), *prompts, latent) for m in (fp8, models["t2v"])
        )
        assert relative(ours, exact) < 0.1 < relative(exact, plain)
    off = host.add_lora(fp8, lora, 0.0)
    assert torch.equal(ksample(off, *prompts, latent), ksample(fp8, *prompts, latent))


def test_the_recipe_the_host_keeps_builds_the_same_model(models, prompts):
    build, args = models["t2v"].cached_patcher_init
    again = build(*args, disable_dynamic=True)
    latent = {"samples": torch.zeros(1, 16, 2, 4, 4)}
    assert torch.equal(ksample(again, *prompts, latent), ksample(models["t2v"], *prompts, latent))


@pytest.mark.parametrize("device", ["default", "cpu"])
def test_text_encoder_runs_where_it_was_told(files, device):
    """The two differ on a GPU, the pretended one too."""
    told = {"default": comfy.model_management.text_encoder_device(), "cpu": torch.device("cpu")}
    assert host.load_text_encoder(files["umt5"], device).patcher.load_device == told[device]


def test_text_encoder_equals_hugging_face(files, prompts):
    import sentencepiece
    from transformers import UMT5Config, UMT5EncoderModel

    state = load_file(files["umt5"])
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=state.pop("spiece_model").numpy().tobytes())
    config = UMT5Config(
        d_model=128, d_ff=256, d_kv=64, num_heads=4, num_layers=2, vocab_size=state["shared.weight"].shape[0],
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    peer = UMT5EncoderModel(config).eval()
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"encoder.embed_tokens.weight"}
    tokens = [*tokenizer.encode("a cat walks through the grass"), 1]
    expected = peer(torch.tensor([tokens])).last_hidden_state
    ours = prompts[0][0][0]
    assert ours.shape == (1, 512, 128)
    assert relative(ours[:, : len(tokens)], expected) < 1e-5
    assert not ours[:, len(tokens) :].any()
