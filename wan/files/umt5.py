"""umT5 text encoders in the layouts people have -> Hugging Face's key names, and their sizes.

The Wan2.1 release's own names (`wan/modules/t5.py`) are shorter: `blocks.0.attn.q.weight`.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..refusal import Refusal
from .bad_file import AGAIN
from .keys import refuse_quanto, renamed, replace_module, select_part
from .kinds import UMT5, detect_kind, not_a
from .limits import check_sides, count_blocks

UMT5_PREFIXES = (
    "text_encoders.umt5xxl.transformer.", "umt5xxl.transformer.", "umt5xxl.", "text_encoder.", "text_model.",
    "transformer.",
)  # fmt: skip
# Ends of keys that each has, wherever in a file it lies: Hugging Face's and the release's.
UMT5_INSIDE = ("encoder.block.0.layer.0.SelfAttention.q.weight", "blocks.0.attn.q.weight")
LAST_NORM = "encoder.final_layer_norm.weight"
TOKENIZER_KEY = "spiece_model"  # some files carry the SentencePiece tokenizer as bytes
BUCKETS = 32  # of relative positions, in every umT5
TOKENIZERS_BESIDE = ("spiece.model", "google/umt5-xxl/spiece.model", "../tokenizer/spiece.model")

RELEASE_MODULES = {"token_embedding": "shared", "norm": LAST_NORM.removesuffix(".weight")}
RELEASE_BLOCK_MODULES = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",  # the branch that goes through GELU
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


def to_umt5_keys(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A umT5 encoder under Hugging Face's names.

    Read are Hugging Face's layout (with `shared.weight`, `encoder.embed_tokens.weight` or both)
    and the Wan2.1 release's, bare or below any prefix. A decoder and its output layer, which encoding does
    not use, are left out. The tokenizer's bytes stay under `spiece_model`, where present;
    scales of quantised layers follow their layer. The tensors are those given, uncopied.

    Raises:
        Refusal: the file is another text encoder, or no text encoder; names it.
    """
    refuse_quanto(state_dict)
    part = select_part(state_dict, UMT5_PREFIXES, UMT5_INSIDE)
    if detect_kind(part) is not UMT5:
        raise not_a(UMT5, state_dict)
    if "token_embedding.weight" in part:
        part = renamed(part, _huggingface_key)
    embedding = part.pop("encoder.embed_tokens.weight", None)
    if embedding is not None:
        part.setdefault("shared.weight", embedding)
    tokenizer = next((v for k, v in state_dict.items() if k.rpartition(".")[2] == TOKENIZER_KEY), None)
    if tokenizer is not None:
        part[TOKENIZER_KEY] = tokenizer
    return {k: v for k, v in part.items() if not k.startswith(("decoder.", "lm_head."))}


def _huggingface_key(key: str) -> str:
    block = re.match(r"blocks\.(\d+)\.(.*)", key)
    if block:
        return f"encoder.block.{block[1]}.{replace_module(block[2], RELEASE_BLOCK_MODULES)}"
    return replace_module(key, RELEASE_MODULES)


def umt5_config(state_dict: Mapping[str, Tensor]) -> dict[str, int]:
    """Sizes of a umT5 encoder, read from its weights.

    Args:
        state_dict: in Hugging Face's names (`to_umt5_keys`).

    Returns:
        `d_model`, `d_ff`, `d_kv`, `num_heads`, `num_layers`, `num_decoder_layers`, `vocab_size` and
        `relative_attention_num_buckets`, as in Hugging Face's `config.json`. What that holds besides is the
        same in every umT5.

    Raises:
        Refusal: a tensor that a size is read from is missing, or the sizes contradict each other.
    """
    block = "encoder.block.0.layer."
    sources = {
        "embedding": "shared.weight",  # [vocab_size, d_model]
        "query": f"{block}0.SelfAttention.q.weight",  # [num_heads * d_kv, d_model]
        "positions": f"{block}0.SelfAttention.relative_attention_bias.weight",  # [buckets, num_heads]
        "gate": f"{block}1.DenseReluDense.wi_0.weight",  # [d_ff, d_model]
    }
    missing = [key for key in sources.values() if key not in state_dict or state_dict[key].ndim != 2]
    if LAST_NORM not in state_dict:  # of a set of shards, only the last has it
        missing.append(LAST_NORM)
    if missing:
        raise Refusal(
            f"this umT5 text encoder lacks {', '.join(missing)}: the file is incomplete, or one of several",
            "Download it again, or all of them with their index",
        )
    shapes = {name: state_dict[key].shape for name, key in sources.items()}
    vocab_size, d_model = shapes["embedding"]
    num_buckets, num_heads = shapes["positions"]
    inner_dim = shapes["query"][0]
    if not num_heads or inner_dim % num_heads:
        raise Refusal(
            f"this umT5 text encoder has {inner_dim} query channels for {num_heads} heads, which do not "
            "divide them evenly: the file is damaged",
            AGAIN,
        )
    num_layers = count_blocks(key.split(".")[2] for key in state_dict if key.startswith("encoder.block."))
    check_sides({"width": d_model, "feed-forward": shapes["gate"][0], "vocabulary": vocab_size})
    check_sides({"count of positions": num_buckets, "query width": inner_dim})
    return {
        "d_model": d_model,
        "d_ff": shapes["gate"][0],
        "d_kv": inner_dim // num_heads,
        "num_heads": num_heads,
        "num_layers": num_layers,
        "num_decoder_layers": num_layers,
        "relative_attention_num_buckets": num_buckets,
        "vocab_size": vocab_size,
    }


def umt5_shapes(config: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Shape by key of a umT5 encoder, in Hugging Face's names.

    Args:
        config: as of `umt5_config`.
    """
    d_model, d_ff, num_heads = config["d_model"], config["d_ff"], config["num_heads"]
    inner_dim = num_heads * config["d_kv"]
    block = {
        "0.layer_norm": (d_model,),
        "0.SelfAttention.q": (inner_dim, d_model),
        "0.SelfAttention.k": (inner_dim, d_model),
        "0.SelfAttention.v": (inner_dim, d_model),
        "0.SelfAttention.o": (d_model, inner_dim),
        "0.SelfAttention.relative_attention_bias": (BUCKETS, num_heads),
        "1.layer_norm": (d_model,),
        "1.DenseReluDense.wi_0": (d_ff, d_model),
        "1.DenseReluDense.wi_1": (d_ff, d_model),
        "1.DenseReluDense.wo": (d_model, d_ff),
    }
    shapes = {"shared.weight": (config["vocab_size"], d_model), LAST_NORM: (d_model,)}
    for i in range(config["num_layers"]):
        shapes |= {f"encoder.block.{i}.layer.{name}.weight": shape for name, shape in block.items()}
    return shapes


def tokenizer_beside(path: Path) -> Path:
    """The SentencePiece model beside a text encoder's file that does not carry one.

    Raises:
        Refusal: there is none.
    """
    found = next((path.parent / n for n in TOKENIZERS_BESIDE if (path.parent / n).is_file()), None)
    if found is None:
        raise Refusal(
            "the file holds no tokenizer, and there is no spiece.model beside it",
            "Put spiece.model (google/umt5-xxl on Hugging Face) into the same folder, or use a file that "
            "carries it, such as umt5_xxl_fp8_e4m3fn_scaled.safetensors",
        )
    return found
