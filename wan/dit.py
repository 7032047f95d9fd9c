"""The Wan2.1 diffusion transformer (DiT).

B batch, C channels, F latent frames, H W latent size, L tokens of the (F, H/2, W/2) patch grid,
D width, N heads, T text tokens, I image tokens. Parameter names are the release's own
(Wan-Video/Wan2.1 `wan/modules/model.py`), so that checkpoints load without a key map.

The residual stream and the modulation are float32 and the matrix products are in the compute dtype,
as the release runs under autocast.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .attention import AttentionFn, sdpa
from .config import PATCH_SIZE, WanConfig
from .rope import apply_rope, axis_frequencies, rope_table


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
    """

    name: str
    x: Tensor
    time: Tensor
    modulation: Tensor
    text: Tensor
    image: Tensor | None


BlockCall = Callable[[int, Pass], Tensor]
BlockRunner = Callable[[int, list[Pass], BlockCall], None]


def run_blocks(num_blocks, passes, call):
    """Walk the blocks once, and each pass through every block (the joint pass).

    Whoever brings weights block by block so brings them once for all passes. This is the model's one
    seam: an option is another runner of the same signature. `call(i, p)` returns the tokens of pass `p`
    after block `i`.
    """
    for i in range(num_blocks):
        for p in passes:
            p.x = call(i, p)


def sinusoidal_embedding(timestep, dim):
    """Timesteps [B] in [0, 1000] -> [B, dim] float32, cosines first; angles in float64 where there is one."""
    half, device = dim // 2, timestep.device
    wide = torch.float32 if device.type in ("mps", "xpu") else torch.float64
    frequency = 10000.0 ** -(torch.arange(half, dtype=wide, device=device) / half)
    angle = torch.outer(timestep.to(wide), frequency)  # (B, dim/2)
    return torch.cat([angle.cos(), angle.sin()], dim=1).float()  # (B, dim)


def modulate(x, shift, scale, eps, dtype):
    """adaLN: LayerNorm(x)*(1 + scale) + shift in float32, then `dtype`. x [B, L, D], the others [B, 1, D]."""
    if x.shape[0] == 1:  # one kernel: the modulation is the norm's affine part
        y = F.layer_norm(x, x.shape[-1:], 1 + scale[0, 0], shift[0, 0], eps)
    else:
        y = torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)
    return y.to(dtype)  # (B, L, D)


def add_gated(x, y, gate=None):
    """Residual step x + y*gate; in place on the stream when no gradient needs its old value."""
    if torch.is_grad_enabled():
        return x + y if gate is None else torch.addcmul(x, y.float(), gate)
    return x.add_(y) if gate is None else x.addcmul_(y.float(), gate)


def in_parts(function, parts, x, *more):
    """`function(x, *more)` of tensors [., L, ...], on one part of the tokens after the other.

    What the function makes on the way is then as large as a part. It changes x in place, as `add_gated` does
    without gradients.
    """
    if parts == 1:
        return function(x, *more)
    for pieces in zip(*(t.chunk(parts, dim=1) for t in (x, *more))):
        function(*pieces)
    return x


class WanSelfAttention(nn.Module):
    """Queries, keys and values of the tokens. The block attends and applies `o`: x is freed by then."""

    def __init__(self, config, operations, device=None, dtype=None):
        super().__init__()
        kw = dict(device=device, dtype=dtype)
        dim = config.dim
        self.num_heads = config.num_heads
        self.q = operations.Linear(dim, dim, **kw)
        self.k = operations.Linear(dim, dim, **kw)
        self.v = operations.Linear(dim, dim, **kw)
        self.o = operations.Linear(dim, dim, **kw)
        self.norm_q = operations.RMSNorm(dim, eps=config.eps, elementwise_affine=True, **kw)
        self.norm_k = operations.RMSNorm(dim, eps=config.eps, elementwise_affine=True, **kw)

    def heads(self, x):
        return x.unflatten(-1, (self.num_heads, -1))  # (B, L, D) -> (B, L, N, D/N)

    def forward(self, x, rope):
        q = apply_rope(self.heads(self.norm_q(self.q(x))), rope)  # (B, L, N, D/N)
        k = apply_rope(self.heads(self.norm_k(self.k(x))), rope)  # (B, L, N, D/N)
        v = self.heads(self.v(x))  # (B, L, N, D/N)
        return q, k, v


class WanCrossAttention(WanSelfAttention):
    """Tokens look at the text and, with an image branch and CLIP features, at the image as well."""

    def __init__(self, config, operations, device=None, dtype=None):
        super().__init__(config, operations, device, dtype)
        self.k_img = None
        if config.image_dim is not None:
            kw = dict(device=device, dtype=dtype)
            self.k_img = operations.Linear(config.dim, config.dim, **kw)
            self.v_img = operations.Linear(config.dim, config.dim, **kw)
            self.norm_k_img = operations.RMSNorm(config.dim, eps=config.eps, elementwise_affine=True, **kw)

    def forward(self, x, text, image, attention):
        q = self.heads(self.norm_q(self.q(x)))  # (B, L, N, D/N)
        k = self.heads(self.norm_k(self.k(text)))  # (B, T, N, D/N)
        v = self.heads(self.v(text))  # (B, T, N, D/N)
        y = attention(q, k, v)  # (B, L, N, D/N)
        if image is not None:
            k = self.heads(self.norm_k_img(self.k_img(image)))  # (B, I, N, D/N)
            v = self.heads(self.v_img(image))  # (B, I, N, D/N)
            y = add_gated(y, attention(q, k, v))  # (B, L, N, D/N)
        return self.o(y.flatten(2))  # (B, L, D)


class WanAttentionBlock(nn.Module):
    def __init__(self, config, operations, device=None, dtype=None):
        super().__init__()
        kw = dict(device=device, dtype=dtype)
        self.eps = config.eps
        self.self_attn = WanSelfAttention(config, operations, **kw)
        self.norm3 = operations.LayerNorm(config.dim, config.eps, elementwise_affine=True, **kw)
        self.cross_attn = WanCrossAttention(config, operations, **kw)
        self.ffn = nn.Sequential(
            operations.Linear(config.dim, config.ffn_dim, **kw),
            nn.GELU(approximate="tanh"),
            operations.Linear(config.ffn_dim, config.dim, **kw),
        )
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim, **kw))

    def forward(self, x, modulation, text, image, rope, attention, parts=1):
        """x [B, L, D] -> [B, L, D]. All but the self-attention is done in `parts` of the tokens."""
        dtype = text.dtype
        e = (self.modulation.to(modulation) + modulation).chunk(6, dim=1)  # 6 x (B, 1, D)

        def cross(x):
            return add_gated(x, self.cross_attn(self.norm3(x).to(dtype), text, image, attention))

        def feed_forward(x):
            return add_gated(x, self.feed_forward(modulate(x, e[3], e[4], self.eps, dtype)), e[5])

        x = self.attend(x, e, rope, attention, dtype, parts)  # (B, L, D)
        x = in_parts(cross, parts, x)  # (B, L, D)
        return in_parts(feed_forward, parts, x)  # (B, L, D)

    def attend(self, x, e, rope, attention, dtype, parts):
        """The self-attention of all tokens and its residual step."""

        def project(x, rope):
            return self.self_attn(modulate(x, e[0], e[1], self.eps, dtype), rope)  # 3 x (B, L, N, D/N)

        def store(x, rope, *places):
            for place, part in zip(places, project(x, rope)):
                place.copy_(part)

        if parts == 1:
            q, k, v = project(x, rope)
        else:
            shape = (*x.shape[:2], self.self_attn.num_heads, x.shape[2] // self.self_attn.num_heads)
            q, k, v = (x.new_empty(shape, dtype=dtype) for _ in range(3))
            in_parts(store, parts, x, rope.unsqueeze(0), q, k, v)
        y = attention(q, k, v).flatten(2)  # (B, L, D)
        del q, k, v
        return in_parts(lambda x, y: add_gated(x, self.self_attn.o(y), e[2]), parts, x, y)  # (B, L, D)

    def feed_forward(self, x):
        if torch.is_grad_enabled():
            return self.ffn(x)  # (B, L, D)
        hidden = self.ffn[0](x)  # (B, L, ffn_dim), the largest tensor of a step: GELU takes no second one
        return self.ffn[2](torch.ops.aten.gelu_(hidden, approximate="tanh"))  # (B, L, D)


class Head(nn.Module):
    def __init__(self, config, operations, device=None, dtype=None):
        super().__init__()
        kw = dict(device=device, dtype=dtype)
        self.eps = config.eps
        patch = PATCH_SIZE[0] * PATCH_SIZE[1] * PATCH_SIZE[2]
        self.head = operations.Linear(config.dim, patch * config.out_dim, **kw)
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim, **kw))

    def forward(self, x, time):
        shift, scale = (self.modulation.to(time) + time.unsqueeze(1)).chunk(2, dim=1)  # 2 x (B, 1, D)
        return self.head(modulate(x, shift, scale, self.eps, x.dtype))  # (B, L, 4*C)


class MLPProj(nn.Module):
    """CLIP vision features [B, I, 1280] -> image tokens [B, I, D]."""

    def __init__(self, config, operations, device=None, dtype=None):
        super().__init__()
        kw = dict(device=device, dtype=dtype)
        width = config.image_dim
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

    def forward(self, features):
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

    def __init__(self, config: WanConfig, operations, device=None, dtype=None):
        super().__init__()
        kw = dict(operations=operations, device=device, dtype=dtype)
        at = dict(device=device, dtype=dtype)
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

    def embed_time(self, timestep):
        """Timesteps [B] in [0, 1000] -> time embedding [B, D], float32."""
        return self.time_embedding(sinusoidal_embedding(timestep, self.config.freq_dim))

    def forward(
        self,
        x,
        timestep,
        context,
        clip_fea=None,
        *,
        pass_names=("cond",),
        frequencies=None,
        attention: AttentionFn = sdpa,
        runner: BlockRunner = run_blocks,
        parts=1,
    ):
        """Predict the velocity (noise minus clean sample) of every pass.

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
            parts: of the tokens, one after the other in all that is not self-attention: less memory and the
                same numbers, and each layer's weights are fetched once a part. Without gradients only.

        Returns:
            [B, 16, F, H, W], float32.
        """
        grid = tuple(n // p for n, p in zip(x.shape[2:], PATCH_SIZE))
        if frequencies is None:
            frequencies = axis_frequencies(self.config.head_dim)
        rope = rope_table(frequencies, grid, x.device)  # (L, 1, D/N/2, 2)
        count = len(pass_names)
        clips = (None,) * count if clip_fea is None else clip_fea.chunk(count)
        inputs = zip(pass_names, x.chunk(count), timestep.chunk(count), context.chunk(count), clips)
        passes = [self.embed(*one) for one in inputs]

        def call(i, p):
            return self.blocks[i](p.x, p.modulation, p.text, p.image, rope, attention, parts)

        runner(len(self.blocks), passes, call)
        return torch.cat([unpatchify(self.head(p.x, p.time), grid) for p in passes])  # (B, 16, F, H, W)

    def embed(self, name, x, timestep, context, clip_fea):
        """Inputs of one pass -> its tokens and context, before the first block."""
        tokens = self.patch_embedding(x.float())  # (B, D, F, H/2, W/2)
        tokens = tokens.flatten(2).transpose(1, 2).contiguous()  # (B, L, D)
        time = self.embed_time(timestep)  # (B, D)
        modulation = self.time_projection(time).unflatten(1, (6, -1))  # (B, 6, D)
        text = self.text_embedding(context)  # (B, T, D)
        image = None
        if clip_fea is not None and self.img_emb is not None:
            image = self.img_emb(clip_fea.to(text.dtype))  # (B, I, D)
        return Pass(name, tokens, time, modulation, text, image)


def unpatchify(tokens, grid):
    """[B, F*H*W, 4*C] of a patch grid (F, H, W) -> [B, C, F, 2H, 2W]."""
    f, h, w = grid
    pf, ph, pw = PATCH_SIZE
    return rearrange(
        tokens, "b (f h w) (pf ph pw c) -> b c (f pf) (h ph) (w pw)", f=f, h=h, w=w, pf=pf, ph=ph, pw=pw
    )
