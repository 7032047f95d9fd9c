"""The tiny umT5 and its tokenizer: the host's own text encoder class, so that training and use agree.

B captions    T tokens of the longest one, plus one pad    D width of the features
"""

import functools
import io
import math
import random

import comfy.ops
import sentencepiece
import torch
from comfy.text_encoders.t5 import T5, T5LayerNorm
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import captions, data

VOCABULARY = 512
EOS = 1
HOST_TOKENS = 512  # the host pads every prompt to as many, with features of zero
CONFIG = {
    "d_model": 128,
    "d_ff": 256,
    "d_kv": 32,
    "num_heads": 4,
    "num_layers": 2,
    "dense_act_fn": "gelu_pytorch_tanh",
    "is_gated_act": True,
    "model_type": "umt5",
}
# So that prompts about anything fall into words and letters, and few become <unk>.
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'\"-()/&|"


def train_tokenizer(sentences=20000, seed=0):
    """Bytes of a unigram sentencepiece model with umT5's special ids; it folds case.

    Without byte fallback a run of foreign characters is one <unk>, not dozens of bytes: a Chinese
    negative prompt then reads as little more than its commas.
    """
    rng = random.Random(seed)
    lines = [captions.caption(data.random_motion(rng, data.SCENE_SHARE), rng) for _ in range(sentences)]
    lines += 20 * (captions.SCENES + captions.QUALITY) + 20 * captions.ENGLISH
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="unigram",
        vocab_size=VOCABULARY,
        normalization_rule_name="nmt_nfkc_cf",
        required_chars=LETTERS,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=EOS,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


class TextEncoder(torch.nn.Module):
    """Prompts -> the features that the host gives a Wan model for them.

    Args:
        tokenizer: bytes of the sentencepiece model.
    """

    def __init__(self, tokenizer, seed=0):
        super().__init__()
        self.tokenizer = tokenizer
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer, add_eos=True)
        config = CONFIG | {"vocab_size": self.pieces.get_piece_size()}
        self.t5 = T5(config, torch.float32, "cpu", comfy.ops.disable_weight_init)
        initialise(self.t5, torch.Generator().manual_seed(seed))
        for module in self.t5.modules():
            if isinstance(module, T5LayerNorm):
                # The host adds residuals in place, onto what the norm has saved for its gradient.
                module.register_forward_pre_hook(lambda _, args: (args[0].clone(),))
        self.encode = functools.lru_cache(maxsize=100_000)(self._encode)

    def _encode(self, text):
        return self.pieces.encode(text)[:HOST_TOKENS]

    def forward(self, texts):
        """Returns (features [B, T, D], zero at pads, of which every caption has one; lengths [B])."""
        ids = [self.encode(text) for text in texts]
        device = self.t5.shared.weight.device
        lengths = torch.tensor([len(i) for i in ids], device=device)
        tokens = torch.zeros(len(ids), max(map(len, ids)) + 1, dtype=torch.long)
        for row, values in zip(tokens, ids):
            row[: len(values)] = torch.tensor(values)
        known = torch.arange(tokens.shape[1], device=device) < lengths[:, None]  # [B, T]
        features = self.t5(tokens.to(device), known.long())[0]  # [B, T, D]
        return features * known[:, :, None], lengths


def initialise(t5, generator):
    """T5's own scales: its attention has no 1/sqrt(d), so queries are small."""
    for name, weight in t5.named_parameters():
        if weight.ndim == 1:
            torch.nn.init.ones_(weight)
            continue
        std = 1 / math.sqrt(weight.shape[1])
        if name == "shared.weight":
            std = 1.0
        elif name.endswith("SelfAttention.q.weight"):
            std /= math.sqrt(CONFIG["d_kv"])
        elif name.endswith("relative_attention_bias.weight"):
            std = 0.1
        torch.nn.init.normal_(weight, std=std, generator=generator)


# On a CPU torch's flash attention is slow backwards with so few tokens: with plain products a step of the
# training takes 13 % less. cuDNN's would be planned anew for the text of each batch.
KERNELS = {"cpu": [SDPBackend.MATH]}
WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class PaddedTextAttention:
    """Cross-attention to HOST_TOKENS tokens at the cost of T, as an `AttentionFn` for `WanModel`.

    All pads are one and the same key and value, since the model tells text tokens apart by content only:
    m equal keys draw as much attention as one whose logit is larger by log(m). Exact, not an estimate.

    Args:
        lengths: [B] tokens of each caption.
        width: T; longer than every caption. Cross-attention is recognised by it.
    """

    def __init__(self, lengths, width):
        position = torch.arange(width, device=lengths.device)
        one_pad = torch.log((HOST_TOKENS - lengths).clamp_min(1e-30).float())[:, None]
        bias = torch.where(position == lengths[:, None], one_pad, -torch.inf)
        bias = torch.where(position < lengths[:, None], 0.0, bias)
        self.bias, self.width = bias[:, None, None], width  # [B, 1, 1, T]

    def __call__(self, q, k, v):
        bias = self.bias if k.shape[1] == self.width != q.shape[1] else None
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, N, L, D/N]
        with sdpa_kernel(KERNELS.get(q.device.type, WITHOUT_PLANS)):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)
