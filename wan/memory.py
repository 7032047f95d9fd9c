"""What sampling takes on the device, from sizes alone, and the plans that take less.

    L  tokens of one pass with its batch: B*F*(H/2)*(W/2)    D  width    e  bytes of the compute dtype

Weights are counted apart: they may stay on the device or be streamed; activations cannot be. The
formulas follow `dit.py` line by line and hold for kernels that fuse (attention of any backend; RMSNorm where
PyTorch does): on an accelerator. tests/nodes/test_step_memory.py counts the tensors of a forward pass against
them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.torch_version import TorchVersion

from .config import PATCH_SIZE, WanConfig
from .rope import TOKENS_AT_ONCE
from .shard import shares

GIB = 2**30
PARTS = 4  # from here on self-attention is the peak: more parts refetch streamed weights and save nothing
LATENT_COPIES = 6  # noise, start and the history of the solver (UniPC keeps most)

# What a backend takes besides q, k, v and its output, in copies of q at 2 bytes a number. SageAttention keeps
# q and k in 8 bit, v in 8 bit and transposed, and a k without its mean; comfy-kitchen's q, k and v in 8 bit.
ATTENTION_COPIES = {"sage": 3.0, "kitchen": 1.5}
# Before, RMSNorm is a product after the other: the input in float32, that normed, and that times the weight.
FUSED_NORM = TorchVersion(torch.__version__) >= "2.9"


class Beside(NamedTuple):
    """Bytes that a product takes beside its input and its result, for each number of these.

    One in 8 bits rounds its input to a copy, and may sum into wider numbers than it gives.
    """

    input: float = 0.0
    result: float = 0.0

    def bytes(self, width: int, hidden: int) -> float:
        """Of a token, by the widths of input and result."""
        return self.input * width + self.result * hidden


EXACT = Beside()


@dataclass(frozen=True)
class MemoryPlan:
    """How a step is walked. Every plan gives the same numbers.

    Attributes:
        joint: passes go through each block together; each keeps its tokens.
        parts: of the tokens, one after the other in all that is not self-attention (`wan.chunked`).
        spread: whether passes are on several devices; said and nothing else.
        ahead: where weights are streamed, those of a block come whole and while the one before computes, once
            for all passes and parts; else those of a layer, at each of its calls.
    """

    joint: bool = True
    parts: int = 1
    spread: bool = False
    ahead: bool = True

    def __str__(self) -> str:
        walk = "passes together" if self.joint else "one pass after the other"
        if self.spread:
            walk = "each pass on its own device"
        walk += f", tokens in {self.parts} parts" if self.parts > 1 else ""
        return walk + ("" if self.ahead else ", weights fetched layer by layer")


JOINT = MemoryPlan()


def plans_from(joint: bool, passes: int = 2, spread: bool = False) -> tuple[MemoryPlan, ...]:
    """Plans from the one asked for to the one that takes least; parts come first, they cost less time.

    Args:
        joint, spread: as of `MemoryPlan`.
        passes: of a step on one device.
    """
    plans = [MemoryPlan(joint, spread=spread), MemoryPlan(joint, PARTS, spread)]
    return (*plans, MemoryPlan(False, PARTS)) if joint and passes > 1 else tuple(plans)


def choose_plans(
    plans: Sequence[MemoryPlan],
    needs: Sequence[float],
    weights: float,
    budget: float,
    ahead: float = 0.0,
) -> Sequence[MemoryPlan]:
    """The plans less those that are known not to fit.

    Args:
        plans: as from `plans_from`.
        needs: activations of each, in bytes.
        weights: of the model, in bytes.
        budget: bytes of the device that may be used for both.
        ahead: what the blocks that are fetched ahead take, of plans that do so, where weights are streamed.

    Returns:
        The plans from the first that leaves room for all weights; if there is none (weights are streamed),
        from the first whose activations fit in nine tenths; if there is none, the last.
    """
    for limit, fetched in ((budget - weights, 0.0), (0.9 * budget, ahead)):
        for i, need in enumerate(needs):
            if need + (fetched if plans[i].ahead else 0.0) <= limit:
                return plans[i:]
    return plans[-1:]


@dataclass(frozen=True)
class StepSize:
    """One sampling step, as far as memory goes.

    Attributes:
        config: sizes of the model.
        latent: shape of the latent [B, 16, T, h, w].
        passes: model evaluations of a step on one device.
        itemsize: e, bytes a number of the compute dtype.
        attention: name of the backend.
        teacache: whether TeaCache is on, which keeps residuals of the passes and tokens of those that walk.
        nag: whether NAG is on, which works on what a pass found in two texts.
        text_tokens, image_tokens: of the context; no image tokens without CLIP features.
        matrix_bytes: what a number of a matrix takes while it is used; None is e.
        attention_beside, ffn_beside: of the products of attention and of the feed-forward.
        fused_norm: whether RMSNorm is one kernel.
        lora_bytes: of LoRA factors that lie beside the weights.
        ranks: devices that share the tokens of a pass, see `wan.shard`; this one has the most to hold.
    """

    config: WanConfig
    latent: tuple[int, ...]
    passes: int = 2
    itemsize: int = 2
    attention: str = "sdpa"
    teacache: bool = False
    nag: bool = False
    text_tokens: int = 512
    image_tokens: int = 0
    matrix_bytes: float | None = None
    attention_beside: Beside = EXACT
    ffn_beside: Beside = EXACT
    fused_norm: bool = FUSED_NORM
    lora_bytes: int = 0
    ranks: int = 1

    @property
    def tokens(self) -> int:
        """L, of one pass with its whole batch; odd sides are padded."""
        return self.latent[0] * self._sequence

    @property
    def here(self) -> int:
        """Those of them that are on this device."""
        return self.latent[0] * shares(self._sequence, self.ranks)[0]

    @property
    def attended(self) -> float:
        """What it attends among: all tokens with its share of the heads, in tokens with all heads."""
        heads = self.config.num_heads
        return self.tokens * shares(heads, self.ranks)[0] / heads

    @property
    def _sequence(self) -> int:
        return math.prod(-(-n // p) for n, p in zip(self.latent[2:], PATCH_SIZE))


def step_bytes(size: StepSize, plan: MemoryPlan = JOINT) -> int:
    """Peak of one denoising step above the weights, in bytes."""
    together = size.passes if plan.joint else 1
    return _held_bytes(size, together) + max(_embedding_bytes(size), _block_bytes(size, plan.parts))


def _held_bytes(size: StepSize, together: int) -> int:
    """What is there from the first block to the last, `together` passes walking at once."""
    config, tokens = size.config, size.tokens
    batch, passes = size.latent[0], size.passes
    area = 4 * 4 * tokens  # bytes of one channel of a latent: 4 pixels a token, float32
    latents = area * config.out_dim * (LATENT_COPIES + passes)  # the solver's, and a velocity of each pass
    inputs = area * together * (2 * config.in_dim)  # the model's input, and the parts it is joined from
    rope = 4 * config.head_dim * tokens // batch
    context = batch * size.itemsize * config.dim * (size.text_tokens + size.image_tokens)
    stream = 4 * config.dim * size.here
    teacache = 0
    if size.teacache:  # the tokens before the blocks, and the residuals of passes that are not walking
        residual = min(size.itemsize, 4) * config.dim * size.here
        teacache = together * stream + (passes - together) * residual
    return latents + inputs + rope + together * (context + stream) + teacache + size.lora_bytes


def _embedding_bytes(size: StepSize) -> int:
    """The patches as the convolution makes them; their transposed copy is the stream, which is counted."""
    frames = size.latent[2]
    area = size.tokens // frames  # of all samples
    with_rows = min(
        frames, math.ceil(size.here / area) + (size.ranks > 1)
    )  # a share may begin within a frame
    return 4 * size.config.dim * area * with_rows


def _block_bytes(size: StepSize, parts: int) -> int:
    """The most that one block makes on the way, one pass in it, with the largest matrix cast to e bytes."""
    config, e, hidden = size.config, size.itemsize, size.config.ffn_dim
    row = e * config.dim  # a token in the compute dtype
    norm = 4 * config.dim + (row if e < 4 else 0)  # LayerNorm in float32, then cast
    part = size.here / parts
    turned = 2 * 4 * config.dim * min(TOKENS_AT_ONCE, part)  # RoPE in float32, bytes
    normed = 0 if size.fused_norm else 4 * config.dim * (3 if e < 4 else 2)  # RMSNorm of queries and keys
    rounded = size.attention_beside.bytes(config.dim, config.dim)
    project = max(norm * part, (3 * row + max(row + rounded, normed)) * part, 3 * row * part + turned)
    if parts > 1:
        project += 3 * row * size.here
    copies = ATTENTION_COPIES.get(size.attention, 0)
    attend = (4 * row + 2 * copies * config.dim + 4 * config.num_heads) * size.attended
    if size.ranks > 1:  # beside queries, keys and values of these tokens, from which those were traded
        attend += 3 * row * size.here
    output = row * size.here + max(row + rounded, norm) * part
    # With NAG: tokens, queries, what was found in two texts and its result; beside them three float32 copies.
    texts = 5 * row + 3 * 4 * config.dim if size.nag else 4 * row
    found = row * size.here if parts > 1 else 0  # by self-attention, kept until the last part is through
    cross = max(row + norm, texts, 2 * row + max(rounded, normed)) * part + found
    up, down = (size.ffn_beside.bytes(*w) for w in ((config.dim, hidden), (hidden, config.dim)))
    feed_forward = (row + e * hidden + max(up, row + down)) * part + found
    matrix = (e if size.matrix_bytes is None else size.matrix_bytes) * config.dim * hidden
    return round(max(project, attend, output, cross, feed_forward) + matrix)
