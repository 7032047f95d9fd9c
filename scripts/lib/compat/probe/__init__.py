"""Nodes for the trial host alone, where a real part has no small size, or a result no node that saves it."""

from pathlib import Path

import comfy.clip_vision
import comfy.ldm.wan.uni3c
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models_base
import comfy.text_encoders.sd3_clip
import comfy.text_encoders.wan
import comfy.utils
import comfy_extras.nodes_model_patch
import folder_paths
import torch
from safetensors.torch import save_file


class ProbeCLIPLoader:
    """The host's own umT5 class at the size of the file; its CLIPLoader takes umT5-XXL alone."""

    CATEGORY, FUNCTION, RETURN_TYPES = "compat", "load", ("CLIP",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"clip_name": (folder_paths.get_filename_list("text_encoders"),)}}

    def load(self, clip_name):
        path = folder_paths.get_full_path_or_raise("text_encoders", clip_name)
        weights, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
        weights, _ = comfy.utils.convert_old_quants(weights, model_prefix="", metadata=metadata)
        found = comfy.text_encoders.sd3_clip.t5_xxl_detect(weights)
        target = comfy.supported_models_base.ClipTarget(
            comfy.text_encoders.wan.WanT5Tokenizer, comfy.text_encoders.wan.te(**found)
        )
        return (
            comfy.sd.CLIP(
                target,
                tokenizer_data={"spiece_model": weights.pop("spiece_model")},
                parameters=comfy.utils.calculate_parameters(weights),
                state_dict=[weights],
                model_options={"umt5xxl_model_config": _umt5_sizes(weights)},
            ),
        )


def _umt5_sizes(weights):
    """The host's configuration of a umT5 encoder, which it reads from a file of its own otherwise."""
    inner, d_model = weights["encoder.block.0.layer.0.SelfAttention.q.weight"].shape
    heads = weights["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].shape[1]
    return {
        "d_model": d_model,
        "d_ff": weights["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0],
        "d_kv": inner // heads,
        "num_heads": heads,
        "num_layers": sum(key.endswith("SelfAttention.q.weight") for key in weights),
        "vocab_size": weights["shared.weight"].shape[0],
        "dense_act_fn": "gelu_pytorch_tanh",
        "is_gated_act": True,
        "model_type": "umt5",
    }


class ProbeCLIPVision:
    """Features as CLIP ViT-H gives them, random but for the picture's own mean; ViT-H has one size."""

    CATEGORY, FUNCTION, RETURN_TYPES = "compat", "encode", ("CLIP_VISION_OUTPUT",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",)}}

    def encode(self, image):
        output = comfy.clip_vision.Output()
        g = torch.Generator().manual_seed(int(1e6 * image.mean().item()))
        output.penultimate_hidden_states = torch.randn(image.shape[0], 257, 1280, generator=g)
        output.last_hidden_state = torch.randn(image.shape[0], 257, 1280, generator=g)
        output.image_embeds = torch.randn(image.shape[0], 1024, generator=g)
        return (output,)


class ProbeModelPatch:
    """What ModelPatchLoader gives for InfiniteTalk and Uni3C: random weights, for a model of 256 channels."""

    CATEGORY, FUNCTION, RETURN_TYPES = "compat", "make", ("MODEL_PATCH",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"kind": (["InfiniteTalk", "Uni3C"],)}}

    def make(self, kind):
        sizes = {"device": "cpu", "operations": comfy.ops.manual_cast, "num_layers": 2}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            if kind == "Uni3C":
                model = comfy.ldm.wan.uni3c.WanUni3CControlnet(
                    conv_out_dim=256, dim=256, ffn_dim=512, time_embed_dim=256, out_proj_dim=256,
                    mid_channels=16, **sizes,
                )  # fmt: skip
            else:
                model = comfy_extras.nodes_model_patch.MultiTalkModelPatch(in_dim=256, **sizes)
            for parameter in model.parameters():
                parameter.data = 0.05 * torch.randn(parameter.shape)
        return (comfy.model_patcher.CoreModelPatcher(model, torch.device("cpu"), torch.device("cpu")),)


class ProbeSpeech:
    """Features as wav2vec 2 gives them of two seconds of speech, random."""

    CATEGORY, FUNCTION, RETURN_TYPES = "compat", "encode", ("AUDIO_ENCODER_OUTPUT",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def encode(self):
        g = torch.Generator().manual_seed(0)
        layers = [torch.randn(1, 100, 768, generator=g) for _ in range(13)]
        return ({"encoded_audio": layers[-1], "encoded_audio_all_layers": layers, "audio_samples": 32000},)


class ProbePictures:
    """Colourful frames [frames, height, width, 3] and a mask from 0 to 1; another seed, another picture."""

    CATEGORY, FUNCTION, RETURN_TYPES = "compat", "make", ("IMAGE", "MASK")

    @classmethod
    def INPUT_TYPES(cls):
        sizes = {name: ("INT", {"default": 64, "max": 4096}) for name in ("width", "height")}
        return {"required": {**sizes, "frames": ("INT", {"default": 1}), "seed": ("INT", {"default": 0})}}

    def make(self, width, height, frames, seed):
        t, y, x = torch.meshgrid(*(torch.linspace(0, 1, n) for n in (frames, height, width)), indexing="ij")
        wave = 0.5 + 0.5 * torch.sin(9 * x * y + 3 * t + seed)
        return torch.stack([x, y, wave], dim=-1), x


class ProbeDump:
    """Writes every tensor inside a value, whatever its type, or the number that it is."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "compat", "dump", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("*",), "name": ("STRING",)}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    def dump(self, value, name):
        found = dict(_tensors("", value))
        path = Path(folder_paths.get_output_directory()) / f"{name}.safetensors"
        save_file(found, path)
        return {"ui": {"text": [str(path)]}}


def _tensors(at, value):
    if isinstance(value, torch.Tensor):
        yield at or "value", value.detach().cpu().clone().contiguous()
    elif isinstance(value, (bool, int, float)) and not at:
        yield "value", torch.tensor(float(value), dtype=torch.float64)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(f"{at}.{key}", item)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _tensors(f"{at}.{i}", item)
    elif hasattr(value, "penultimate_hidden_states"):
        yield f"{at}.features", value.penultimate_hidden_states.clone()


NODES = (ProbeCLIPLoader, ProbeCLIPVision, ProbeModelPatch, ProbeSpeech, ProbePictures, ProbeDump)
NODE_CLASS_MAPPINGS = {node.__name__: node for node in NODES}
