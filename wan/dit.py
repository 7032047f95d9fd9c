"""The Wan2.1 diffusion transformer (DiT).

B batch, C channels, F latent frames, H W latent size, L tokens of the (F, H/2, W/2) patch grid,
D width, N heads, T text tokens, I image tokens. Parameter names are the release's own
(Wan-Video/Wan2.1 `wan/modules/model.py`), so that checkpoints load without a key map.

The residual stream and the modulation are float32 and the matrix products are in the compute dtype,
as the release runs under autocast.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from .attention import AttentionFn, sdpa
from .changed import is_changed
from .config import PATCH_SIZE, WanConfig
from .device import is_wide
from .glue import GELU, activated, added, added_then_modulated, added_then_normed, modulated, normed_heads
from .rope import axis_frequencies, rope_table
from .shard import ALL, WHOLE, Shard


@dataclass
class Pass:
    """One token stream on its way through the blocks, with the context that belongs to it.

    Attributes:
        name: `cond`, `uncond`, ...; state of an option is keyed by it.
        x: tokens [B, L, D], float32.
        time: time embedding [B, D], float32.
        modulation: its projection for the blocks [B, 6, D], float32.
        text: [B, T, D].
        image: [B, I, D], or None without CLIP features.
        rope: rotations of the tokens, as of `rope_table`.
        attention: see `wan.attention`.
    """

    name: str
    x: Tensor
    time: Tensor
    modulation: Tensor
    text: Tensor
    image: Tensor | None
    rope: Tensor
    attention: AttentionFn


Device = torch.device | str | None
DType = torch.dtype | None
ApplyBlock = Callable[[int, Pass], Tensor]
BlockRunner = Callable[[int, list[Pass], ApplyBlock], None]
# How tokens attend to a text: see `attend_text`, the plain way.
AttendText = Callable[["WanCrossAttention", Tensor, Tensor, AttentionFn], Tensor]
# How a pass attends, chosen once a call of the model: its pass, and the embedded texts [B, T, D] by name, of
# all passes of the call and of the further `contexts` that it was given.
ContextAttention = Callable[[Pass, Mapping[str, Tensor]], AttendText]


def run_blocks(num_blocks: int, passes: list[Pass], apply_block: ApplyBlock) -> None:
    """The walk of each pass through every block, all passes through one before the next (the joint pass).

    Weights that are brought block by block could so come once for all passes; those brought layer by layer
    come at each call. This is the seam for options that change the walk: another runner of the same
    signature.

    Args:
        num_blocks: how many there are.
        passes: their tokens are replaced.
        apply_block: `apply_block(i, p)` -> tokens of pass `p` after block `i`.
    """
    for i in range(num_blocks):
        for p in passes:
            p.x = apply_block(i, p)


def attend_text(cross: "WanCrossAttention", q: Tensor, text: Tensor, attention: AttentionFn) -> Tensor:
    """What queries [B, rows, N, D/N] find in a text [B, T, D]; of their shape, before the projection `o`."""
    return attention(q, *cross.keys_and_values(text))


def own_text(p: Pass, texts: Mapping[str, Tensor]) -> AttendText:
    """Each pass attends to its own text. Options that change how are another `ContextAttention`."""
    return attend_text


def sinusoidal_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Timesteps [B] in [0, 1000] -> [B, dim] float32, cosines first; angles in float64 where there is one."""
    half, device = dim // 2, timestep.device
    wide = torch.float64 if is_wide(device) else torch.float32
    frequency = 10000.0 ** -(torch.arange(half, dtype=wide, device=device) / half)
    angle = torch.outer(timestep.to(wide), frequency)  # (B, dim/2)
    return torch.cat([angle.cos(), angle.sin()], dim=1).float()  # (B, dim)


class WanSelfAttention(nn.Module):
    """Queries, keys and values of the tokens. The block attends and applies `o`: x is freed by then."""

    def __init__(self, config: WanConfig, operations: Any, device: Device = None, dtype: DType = None):
        super().__init__()
        kw: dict[str, Any] = dict(device=device, dtype=dtype)
        dim = config.dim
        self.num_heads = config.num_heads
        self.q = operations.Linear(dim, dim, **kw)
        self.k = operations.Linear(dim, dim, **kw)
        self.v = operations.Linear(dim, dim, **kw)
        self.o = operations.Linear(dim, dim, **kw)
        self.norm_q = operations.RMSNorm(dim, eps=config.eps, elementwise_affine=True, **kw)
        self.norm_k = operations.RMSNorm(dim, eps=config.eps, elementwise_affine=True, **kw)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))  # (B, L, D) -> (B, L, N, D/N)

    def forward(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = normed_heads(self.q(x), self.norm_q, self.num_heads, rope)  # (B, L, N, D/N)
        k = normed_heads(self.k(x), self.norm_k, self.num_heads, rope)  # (B, L, N, D/N)
        v = self.heads(self.v(x))  # (B, L, N, D/N)
        return q, k, v


class WanCrossAttention(WanSelfAttention):
    """Tokens look at the text and, with an image branch and CLIP features, at the image as well."""

    def __init__(self, config: WanConfig, operations: Any, device: Device = None, dtype: DType = None):
        super().__init__(config, operations, device, dtype)
        self.k_img = None
        if config.image_dim is not None:
            kw: dict[str, Any] = dict(device=device, dtype=dtype)
            self.k_img = operations.Linear(config.dim, config.dim, **kw)
            self.v_img = operations.Linear(config.dim, config.dim, **kw)
            self.norm_k_img = operations.RMSNorm(config.dim, eps=config.eps, elementwise_affine=True, **kw)

    def keys_and_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Of a text [B, T, D]: 2 x [B, T, N, D/N]."""
        return normed_heads(self.k(text), self.norm_k, self.num_heads), self.heads(self.v(text))

    def image_keys_and_values(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Of image tokens [B, I, D]: 2 x [B, I, N, D/N]."""
        assert self.k_img is not None
        keys = normed_heads(self.k_img(image), self.norm_k_img, self.num_heads)
        return keys, self.heads(self.v_img(image))

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        image: Tensor | None,
        attention: AttentionFn,
        attend: AttendText = attend_text,
    ) -> Tensor:
        q = normed_heads(self.q(x), self.norm_q, self.num_heads)  # (B, L, N, D/N)
        y = attend(self, q, text, attention)  # (B, L, N, D/N)
        if image is not None:
            y = added(y, attention(q, *self.image_keys_and_values(image)))  # (B, L, N, D/N)
        return self.o(y.flatten(2))  # (B, L, D)


class FeedForward(nn.Sequential):
    """Linear, GELU, Linear: tokens [B, rows, D] -> the same."""

    def forward(self, x: Tensor) -> Tensor:
        up, activation, down = self
        # A host's layer that rounds its input anyway may do GELU on the way.
        folds: Any = getattr(down, "folds_gelu", None) if type(activation) is GELU else None
        if folds and not (is_changed(activation) or is_changed(down)) and folds(x.device):
            of_gelu: Any = down.of_gelu
            return of_gelu(up(x))  # (B, rows, D)
        return down(activated(x, up, activation))  # (B, rows, D)


class WanAttentionBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each added to the stream.

    Every step below acts on any tokens [B, rows, D] of the stream; self-attention alone needs all of them.
    """

    def __init__(self, config: WanConfig, operations: Any, device: Device = None, dtype: DType = None):
        super().__init__()
        kw: dict[str, Any] = dict(device=device, dtype=dtype)
        self.eps = config.eps
        self.self_attn = WanSelfAttention(config, operations, **kw)
        self.norm3 = operations.LayerNorm(config.dim, config.eps, elementwise_affine=True, **kw)
        self.cross_attn = WanCrossAttention(config, operations, **kw)
        self.ffn = FeedForward(
            operations.Linear(config.dim, config.ffn_dim, **kw),
            GELU(),
            operations.Linear(config.ffn_dim, config.dim, **kw),
        )
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim, **kw))

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        text: Tensor,
        image: Tensor | None,
        rope: Tensor,
        attention: AttentionFn,
        attend: AttendText = attend_text,
        among: AttentionFn | None = None,
    ) -> Tensor:
        """The stream after this block.

        Args:
            x: tokens [B, L, D], float32.
            modulation: of the pass [B, 6, D], float32.
            text: [B, T, D], in the dtype to compute in.
            image: [B, I, D], or None.
            rope: from `rope_table`.
            attention: see `wan.attention`.
            attend: how the tokens attend to the text.
            among: how they attend to each other, where others than these L take part; None is `attention`.
        """
        e = self.modulations(modulation)  # 6 x (B, 1, D)
        y = (among or attention)(*self.qkv(x, e, rope, text.dtype)).flatten(2)  # (B, L, D)
        x, y = self.attended(x, y, e, text.dtype)  # 2 x (B, L, D)
        x, y = self.crossed(x, y, e, text, image, attention, attend)  # 2 x (B, L, D)
        return self.fed_forward(x, y, e)  # (B, L, D)

    def modulations(self, modulation: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of the self-attention, then of the feed-forward: 6 x [B, 1, D]."""
        return (self.modulation.to(modulation) + modulation).chunk(6, dim=1)

    def qkv(self, x: Tensor, e: tuple[Tensor, ...], rope: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Queries, keys and values of tokens, 3 x [B, rows, N, D/N]; `rope` has the rows of these tokens."""
        return self.self_attn(modulated(x, e[0], e[1], self.eps, dtype), rope)

    def attended(
        self, x: Tensor, found: Tensor, e: tuple[Tensor, ...], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Tokens with what self-attention found for them, [B, rows, D]; and as cross-attention reads them."""
        return added_then_normed(x, self.self_attn.o(found), e[2], self.norm3, dtype)

    def crossed(
        self,
        x: Tensor,
        normed: Tensor,
        e: tuple[Tensor, ...],
        text: Tensor,
        image: Tensor | None,
        attention: AttentionFn,
        attend: AttendText,
    ) -> tuple[Tensor, Tensor]:
        """Tokens with what they found in text and image; and as the feed-forward reads them."""
        return added_then_modulated(
            x, self.cross_attn(normed, text, image, attention, attend), e[3], e[4], self.eps, text.dtype
        )

    def fed_forward(self, x: Tensor, modulated: Tensor, e: tuple[Tensor, ...]) -> Tensor:
        """Tokens after the feed-forward."""
        return added(x, self.ffn(modulated), e[5])


BlockExecutor = Callable[..., Tensor]


def at_once(block: nn.Module, *inputs: Any) -> Tensor:
    """The block's own forward. Another executor of this signature does a block's steps in another way."""
    return block(*inputs)


class Head(nn.Module):
    def __init__(self, config: WanConfig, operations: Any, device: Device = None, dtype: DType = None):
        super().__init__()
        kw: dict[str, Any] = dict(device=device, dtype=dtype)
        self.eps = config.eps
        patch = PATCH_SIZE[0] * PATCH_SIZE[1] * PATCH_SIZE[2]
        self.head = operations.Linear(config.dim, patch * config.out_dim, **kw)
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim, **kw))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.modulation.to(time) + time.unsqueeze(1)).chunk(2, dim=1)  # 2 x (B, 1, D)
        return self.head(modulated(x, shift, scale, self.eps, x.dtype))  # (B, L, 4*C)


class MLPProj(nn.Module):
    """CLIP vision features [B, I, 1280] -> image tokens [B, I, D]."""

    def __init__(self, config: WanConfig, operations: Any, device: Device = None, dtype: DType = None):
        super().__init__()
        kw: dict[str, Any] = dict(device=device, dtype=dtype)
        width = config.image_dim
        assert width is not None
        self.proj = nn.Sequential(
            operations.LayerNorm(width, **kw),
            operations.Linear(width, width, **kw),
            nn.GELU(),
            operations.Linear(width, config.dim, **kw),
            operations.LayerNorm(config.dim, **kw),
        )
        self.emb_pos = None
        if config.image_tokens:
            self.emb_pos = nn.Parameter(torch.empty(1, config.image_tokens, width, **kw))

    def forward(self, features: Tensor) -> Tensor:
        if self.emb_pos is not None:
            features = features + self.emb_pos[:, : features.shape[1]].to(features)
        return self.proj(features)  # (B, I, D)


class WanModel(nn.Module):
    """Wan2.1 DiT: text-to-video, image-to-video and first-last-frame, of any size.

    Args:
        config: the sizes.
        operations: namespace that holds Linear, Conv3d, LayerNorm and RMSNorm: `torch.nn`, or a host's
            own classes that cast, quantise or stream their weights at each call.
        device, dtype: of the parameters.
    """

    def __init__(self, config: WanConfig, operations: Any, device: Device = None, dtype: DType = None):
        super().__init__()
        kw: dict[str, Any] = dict(operations=operations, device=device, dtype=dtype)
        at: dict[str, Any] = dict(device=device, dtype=dtype)
        dim = config.dim
        self.config = config
        # The release keeps the patch embedding in float32; so do we.
        self.patch_embedding = operations.Conv3d(
            config.in_dim, dim, PATCH_SIZE, stride=PATCH_SIZE, device=device, dtype=torch.float32
        )
        self.text_embedding = nn.Sequential(
            operations.Linear(config.text_dim, dim, **at),
            nn.GELU(approximate="tanh"),
            operations.Linear(dim, dim, **at),
        )
        self.time_embedding = nn.Sequential(
            operations.Linear(config.freq_dim, dim, **at), nn.SiLU(), operations.Linear(dim, dim, **at)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), operations.Linear(dim, 6 * dim, **at))
        self.blocks = nn.ModuleList([WanAttentionBlock(config, **kw) for _ in range(config.num_layers)])
        self.head = Head(config, **kw)
        self.img_emb = None if config.image_dim is None else MLPProj(config, **kw)

    def embed_time(self, timestep: Tensor) -> Tensor:
        """Timesteps [B] in [0, 1000] -> time embedding [B, D], float32."""
        return self.time_embedding(sinusoidal_embedding(timestep, self.config.freq_dim))

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        clip_fea: Tensor | None = None,
        *,
        pass_names: Sequence[str] = ("cond",),
        frequencies: tuple[Tensor, ...] | None = None,
        attention: AttentionFn = sdpa,
        runner: BlockRunner = run_blocks,
        execute: BlockExecutor = at_once,
        context_attention: ContextAttention = own_text,
        contexts: Mapping[str, Tensor] | None = None,
        shard: Shard = WHOLE,
    ) -> Tensor:
        """The velocity (noise minus clean sample) of every pass.

        The batch holds the passes one after the other: B = len(pass_names) * samples.

        Args:
            x: [B, C, F, H, W], C = `config.in_dim`: noisy latent, then mask and image latent (i2v).
                H and W are even.
            timestep: [B] in [0, 1000].
            context: text features [B, T, text_dim], in the dtype to compute in.
            clip_fea: CLIP vision features [B, I, 1280], or None; ignored without an image branch.
            pass_names: one name a pass.
            frequencies: RoPE frequencies of the three axes; `axis_frequencies` unless an option edits them.
            attention: see `wan.attention`.
            runner: see `run_blocks`.
            execute: how one block is done: see `at_once` and `wan.chunked`.
            context_attention: how a pass attends to its text: see `ContextAttention`.
            contexts: further text features [samples, T, text_dim] by name, for `context_attention`.
            shard: the part of the tokens that this process has; the others call with the same inputs.

        Returns:
            [B, 16, F, H, W], float32; whole, whatever the shard.
        """
        grid = tuple(n // p for n, p in zip(x.shape[2:], PATCH_SIZE))
        if frequencies is None:
            frequencies = axis_frequencies(self.config.head_dim)
        tokens = math.prod(grid)  # L of all; below it is that of this shard
        frames, rows = shard.frames(*grid)
        rope = rope_table(frequencies, grid, x.device)[shard.rows(tokens)]  # (L, 1, D/N/2, 2)
        count = len(pass_names)
        clips = (None,) * count if clip_fea is None else clip_fea.chunk(count)
        x = x[:, :, frames]  # (B, C, F or fewer, H, W)
        inputs = zip(pass_names, x.chunk(count), timestep.chunk(count), context.chunk(count), clips)
        passes = [self.embed(*one, rope, attention, rows) for one in inputs]
        texts = {name: self.text_embedding(features) for name, features in (contexts or {}).items()}
        texts |= {p.name: p.text for p in passes}
        attends = {p.name: context_attention(p, texts) for p in passes}

        def apply_block(i: int, p: Pass) -> Tensor:
            among = shard.among(p.attention, tokens)
            context = p.text, p.image, p.rope, p.attention, attends[p.name], among
            return execute(self.blocks[i], p.x, p.modulation, *context)

        runner(len(self.blocks), passes, apply_block)
        patches = (shard.whole(self.head(p.x, p.time), tokens) for p in passes)  # (B, F*H/2*W/2, 4*16) each
        return torch.cat([unpatchify(one, grid) for one in patches])  # (B, 16, F, H, W)

    def embed(
        self, name: str, x: Tensor, timestep: Tensor, context: Tensor, clip_fea: Tensor | None,
        rope: Tensor, attention: AttentionFn, rows: slice = ALL,
    ) -> Pass:  # fmt: skip
        """These rows of the tokens of a pass, and its context, before the first block."""
        tokens = self.patch_embedding(x.float())  # (B, D, F, H/2, W/2)
        tokens = tokens.flatten(2).transpose(1, 2)[:, rows].contiguous()  # (B, L, D)
        time = self.embed_time(timestep)  # (B, D)
        modulation = self.time_projection(time).unflatten(1, (6, -1))  # (B, 6, D)
        text = self.text_embedding(context)  # (B, T, D)
        image = None
        if clip_fea is not None and self.img_emb is not None:
            image = self.img_emb(clip_fea.to(text.dtype))  # (B, I, D)
        return Pass(name, tokens, time, modulation, text, image, rope, attention)


def unpatchify(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """[B, F*H*W, 4*C] of a patch grid (F, H, W) -> [B, C, F, 2H, 2W]."""
    f, h, w = grid
    pf, ph, pw = PATCH_SIZE
    return rearrange(
        tokens, "b (f h w) (pf ph pw c) -> b c (f pf) (h ph) (w pw)", f=f, h=h, w=w, pf=pf, ph=ph, pw=pw
    )
