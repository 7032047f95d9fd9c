"""Write small checkpoints with random weights, laid out like a ComfyUI `models` folder.

They have the key names and shapes of real Wan2.1 files, so everything that loads, runs and saves
can be tried in seconds on a CPU. The pictures are noise. The same seed gives the same bytes.
"""

import io
import json
import math
from pathlib import Path

from . import pack

I2V = "wan21-random-i2v.safetensors"
FLF2V = "wan21-random-flf2v.safetensors"
T2V = "wan21-random-t2v.safetensors"
VAE = "wan21-random-vae.safetensors"
TEXT_ENCODER = "wan21-random-umt5.safetensors"

TEXT_DIM = 128
DIT_SIZE = {"dim": 256, "ffn_dim": 512, "num_layers": 2, "num_heads": 2, "text_dim": TEXT_DIM}
DIT_VARIANTS = {
    I2V: {"model_type": "i2v", "in_dim": 36},
    FLF2V: {"model_type": "i2v", "in_dim": 36, "flf_pos_embed_token_number": 514},
    T2V: {"model_type": "t2v", "in_dim": 16},
}
VAE_SIZE = {"dim": 16, "z_dim": 16, "temperal_downsample": [False, True, True]}
UMT5_SIZE = {
    "d_model": TEXT_DIM,
    "d_ff": 256,
    "d_kv": 64,
    "num_heads": 4,
    "num_layers": 2,
    "dense_act_fn": "gelu_pytorch_tanh",
    "is_gated_act": True,
    "model_type": "umt5",
}

# Enough text for the tokenizer to learn a few pieces; bytes cover every other character.
TOKENIZER_TEXT = (
    "a photograph of a cat walking through the grass in the morning light",
    "the camera moves slowly towards a house by the sea while the waves roll in",
    "a red ball bounces over a wooden table and comes to rest beside a cup",
    "blurry, overexposed, static, low quality, deformed hands, cluttered background",
)


def make_checkpoints(models_directory, dtype="float32", seed=0):
    """Write all five files below `models_directory` and return its path.

    Args:
        models_directory: folder that gets `diffusion_models/`, `vae/` and `text_encoders/`.
        dtype: "float32" or "float16", the type the weights are stored in.
        seed: the same seed always gives the same weights.
    """
    pack.load_host()
    root = Path(models_directory)
    for name, variant in DIT_VARIANTS.items():
        # The host reads every size from the weights except the width of the text features.
        config = json.dumps({"transformer": {"text_dim": TEXT_DIM}})
        save_random(root / "diffusion_models" / name, _dit(variant), dtype, seed, metadata={"config": config})
    save_random(root / "vae" / VAE, _vae(), dtype, seed)
    tokenizer = _train_tokenizer()
    save_random(
        root / "text_encoders" / TEXT_ENCODER,
        _text_encoder(tokenizer),
        dtype,
        seed,
        extra={"spiece_model": _as_bytes_tensor(tokenizer)},
    )
    return root


def _dit(variant):
    import comfy.ops
    from comfy.ldm.wan.model import WanModel

    return WanModel(**DIT_SIZE, **variant, device="meta", operations=comfy.ops.disable_weight_init)


def _vae():
    import torch
    from comfy.ldm.wan.vae import WanVAE

    with torch.device("meta"):
        return WanVAE(**VAE_SIZE)


def _text_encoder(tokenizer):
    import comfy.ops
    import sentencepiece
    from comfy.text_encoders.t5 import T5

    vocab_size = sentencepiece.SentencePieceProcessor(model_proto=tokenizer).get_piece_size()
    return T5({**UMT5_SIZE, "vocab_size": vocab_size}, None, "meta", comfy.ops.disable_weight_init)


def _train_tokenizer():
    """Return a small sentencepiece model with umT5's special ids (pad 0, eos 1, unk 2)."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TOKENIZER_TEXT),
        model_writer=model,
        model_type="bpe",
        vocab_size=384,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _as_bytes_tensor(data):
    import torch

    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def save_random(path, module, dtype, seed, metadata=None, extra=None):
    """Write random weights of `module`'s names and shapes to `path`."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: _random_weight(name, meta.shape, generator).to(getattr(torch, dtype))
        for name, meta in module.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({**weights, **(extra or {})}, path, metadata=metadata)


def _random_weight(name, shape, generator):
    """Draw a tensor whose scale keeps activations near one: fan-in for matrices, one for norms."""
    import torch

    noise = torch.randn(shape, generator=generator)
    if _is_norm_scale(name, shape):
        return torch.ones(shape)
    if name == "shared.weight":
        return noise
    if len(shape) < 2 or "modulation" in name or "emb_pos" in name:
        return 0.02 * noise
    scale = 1 / math.sqrt(math.prod(shape[1:]))
    if name.endswith("SelfAttention.q.weight"):
        scale /= math.sqrt(UMT5_SIZE["d_kv"])  # T5 attention has no 1/sqrt(d) of its own
    return scale * noise


def _is_norm_scale(name, shape):
    return name.endswith("gamma") or (name.endswith("weight") and len(shape) == 1)
