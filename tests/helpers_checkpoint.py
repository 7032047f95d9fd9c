"""State dicts of toy models, as files hold them."""

import torch
from transformers import UMT5Config, UMT5EncoderModel

UMT5_SIZE = {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 3, "num_heads": 2}


def meta_state_dict(build):
    """Keys and shapes of a model, without its memory."""
    with torch.device("meta"):
        return build().state_dict()


def with_prefix(prefix, state_dict):
    return {prefix + key: tensor for key, tensor in state_dict.items()}


def umt5_state_dict(**changes):
    return meta_state_dict(lambda: UMT5EncoderModel(UMT5Config(**UMT5_SIZE | changes)))
