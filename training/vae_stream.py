"""The VAE forwards and backwards as fast as a CPU can: 2.5 times as fast as by `RecordedPast`.

A clip is one chunk. Channels lie side by side, convolutions run in bfloat16 where the processor multiplies in
it, the sum that the blocks add to stays float32, and norm and SiLU are one pass over memory each way.

    B batch    C channels    F pixel frames    T latent frames    N pixels of a whole chunk
"""

from functools import cache

import torch
import torch.nn.functional as F

from ..wan.device import multiplies_in_bf16
from ..wan.vae.past import Past
from ..wan.vae.stream import stream


def encode(vae, video):
    """[B, 3, F, H, W] in [-1, 1] -> means [B, 16, T, H/8, W/8]."""
    return run(vae.encode_stages(), video)[:, : vae.z_dim]


def decode(vae, z):
    """[B, 16, T, H/8, W/8] -> [B, 3, F, H, W]."""
    return run(vae.decode_stages(), z)


def run(stages, x):
    """One chunk through the stages; other layers than causal convolutions take their products by autocast."""
    device = x.device.type
    dtype = torch.bfloat16 if multiplies_in_bf16(x.device) else torch.float32
    with torch.autocast(device, torch.bfloat16, enabled=dtype is torch.bfloat16):
        (y,) = stream(stages, [x], 4 * x.shape[2], TrainingPast(dtype))
    return y.float()


class TrainingPast(Past):
    """For one chunk only; overwrites nothing, since gradients are recorded.

    Args:
        dtype: of the causal convolutions over several pixels.
    """

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def arrange(self, chunk):
        return chunk.contiguous(memory_format=torch.channels_last_3d)

    def causal_conv(self, conv, x, norm=None, overwrite=False, add_to=None):
        if norm is not None:
            x = NormSilu.apply(x, norm.gamma.flatten() * norm.scale, self.dtype)
        back = conv.kernel_size[0] - 1
        dtype = self.dtype if back else torch.float32  # of one pixel: cheap, and what latents come out of
        with torch.autocast(x.device.type, enabled=False):
            x, weight, bias = x.to(dtype), conv.weight.to(dtype), conv.bias.to(dtype)
            if back and x.shape[2] == 1:  # its past is zeros, so only the last tap counts
                y = F.conv2d(x[:, :, 0], weight[:, :, -1], bias, padding=conv.padding[1:]).unsqueeze(2)
            else:
                x = self.arrange(F.pad(x, (0, 0, 0, 0, back, 0))) if back else x
                y = F.conv3d(x, weight, bias, conv.stride, conv.padding)
        return y.float() if add_to is None else add_to.float() + y


class NormSilu(torch.autograd.Function):
    """silu(x / |x| * gain) over the channels of x [B, C, f, H, W]; keeps x alone for the way back."""

    @staticmethod
    def forward(ctx, x, gain, dtype):
        flat = pixels(x.float())
        ctx.save_for_backward(flat, gain)
        return like(norm_silu(flat, gain.data, dtype), x)

    @staticmethod
    def backward(ctx, dy):
        flat, gain = ctx.saved_tensors
        dx, d_gain = norm_silu_backward(flat, gain.data, pixels(dy))
        return like(dx, dy), d_gain, None


def pixels(x):
    """[B, C, f, H, W] -> [N, C]; no view, for each way to view a tensor `torch.compile` compiles anew."""
    return x.movedim(1, -1).flatten(0, 3).contiguous().data


def like(flat, x):
    """[N, C] -> [B, C, f, H, W], the shape of x."""
    return flat.view(len(x), *x.shape[2:], -1).movedim(-1, 1)


def compiled(function):
    """`function`, its passes over memory joined on a CPU where that can be done."""
    joined = torch.compile(function, dynamic=True)
    return lambda x, *others: (joined if x.device.type == "cpu" and compiles() else function)(x, *others)


@cache
def compiles():
    """Whether `torch.compile` works on this machine's CPU: it needs a C++ compiler and Python's headers."""
    try:
        torch.compile(torch.square)(torch.ones(2))
    except Exception as error:  # each thing that is missing has its own
        print(f"norm and SiLU are not compiled, which is slower: {type(error).__name__}", flush=True)
        return False
    return True


@compiled
def norm_silu(x, gain, dtype):
    """x [N, C], gain [C] -> [N, C] of dtype."""
    z = x * inverse_length(x) * gain
    return (z * z.sigmoid()).to(dtype)


@compiled
def norm_silu_backward(x, gain, dy):
    """Gradients of x [N, C] and of gain [C]."""
    inverse = inverse_length(x)
    unit = x * inverse
    z = unit * gain
    gate = z.sigmoid()
    dz = dy.float() * gate * (1 + z * (1 - gate))
    d_unit = dz * gain
    dx = inverse * (d_unit - unit * (d_unit * unit).sum(-1, keepdim=True))
    return dx, (dz * unit).sum(0)


def inverse_length(x):
    return torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-24)
