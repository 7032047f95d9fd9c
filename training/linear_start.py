"""Starts a VAE as the best linear code for our clips that its shortcuts can hold, before any training.

From random weights, 450 steps on clips leave an encoder that keeps little more than the mean of each four
frames: what sets the four apart reaches the latents 14 times weaker, and no decoder finds it again. The
plain principal components of 4x8x8 blocks, as many as a latent has channels, are better than that at 128
pixels. So the layers that no residual branch can bypass are computed rather than trained:

- **Encoder**: where height and width halve, principal components of 2x2 blocks (Karhunen-Loeve transform).
  Where the frame rate halves, means of two frames, and half of the difference of those that move most in
  the place of the weakest.
- **Decoder**: each such layer is the least-squares estimate of what the encoder had at the same place.
- Residual branches add nothing yet. The last channel of every level is constant, so that the norms, which
  divide by a pixel's length, leave brightness in; what passes a norm and SiLU to the output does so as a
  pair (x, -x), since silu(x) - silu(-x) = x.

    B batch    C D input, output channels    f frames    H W height, width of the tensor at hand
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..wan.vae.layers import AttentionBlock, Downsample, ResidualBlock
from ..wan.vae.past import RecordedPast, batch_to_frames, frames_to_batch
from . import data

SEED = 5 * 10**8
# Batch, frames, height, width of the clips that the statistics come from.
SIZES = ((24, 9, 64, 64), (6, 17, 64, 64), (4, 9, 96, 96), (4, 9, 128, 128))
STRONGER = 8  # energy of the constant channel over all others, where pairs pass a norm
# Of what stands before the norms, in units of pixels or latents. They take it out again; but a branch that
# begins to learn disturbs the picture that much less.
SCALE = 8.0
NOISE = 0.05  # of latents of unit variance, when the decoder is fitted
ROWS = 40_000  # pixels of each size that a fit looks at
RIDGE = 1e-4  # of the mean variance


@torch.no_grad()
def start_linear(vae, norm):
    """Sets the weights of `vae`, and the statistics of `norm` (a `LatentNorm`) to what comes out.

    Args:
        vae: of at least 8 channels at the first level; what is not set here stays as it is.
    """
    device = norm.mean.device
    clips = [data.clips(SEED + i, *size, device=device)[0] for i, size in enumerate(SIZES)]
    latents, seen = start_encoder(vae, clips)
    flat = torch.cat([z.transpose(0, 1).flatten(1) for z in latents], 1)
    norm.mean.copy_(flat.mean(1))
    norm.var.copy_(flat.var(1))
    norm.steps.fill_(1 / norm.momentum)
    generator = torch.Generator(device).manual_seed(SEED)
    norm.eval()
    latents = [norm(z) for z in latents]
    noisy = [z + NOISE * torch.randn(z.shape, generator=generator, device=device) for z in latents]
    start_decoder(vae, noisy, seen)


def start_encoder(vae, clips):
    """Returns (latents of each of `clips`, what stood before each change of size and at the end)."""
    encoder, seen = vae.encoder, []
    silence(encoder.conv1)
    encoder.conv1.weight[:3, :, -1, 1, 1] = SCALE * torch.eye(3)
    encoder.conv1.bias[-1] = SCALE
    xs = each(clips, encoder.conv1)
    pairs, filled = count_pairs(encoder.conv1.out_channels * 4), 3
    blocks = [*encoder.downsamples]
    last = max(i for i, block in enumerate(blocks) if isinstance(block, Downsample))
    for i, block in enumerate(blocks):
        if not isinstance(block, Downsample):
            xs = through_block(block, xs)
            continue
        seen.append([x[:, :filled] for x in xs])
        scale = halve_space(block.resample[1], seen[-1], pairs if i == last else None)
        filled = min(4 * filled, pairs if i == last else block.resample[1].out_channels - 1)
        xs = [block.halve_space(x, RecordedPast()) for x in xs]
        if block.time_conv is not None:
            before = [x[:, :filled] for x in xs]
            seen.append(weakened(before, scale))
            halve_time(block.time_conv, before, scale, min(vae.z_dim, pairs) if i == last else filled)
            xs = [block.halve_time(x, RecordedPast()) for x in xs]
    seen.append(weakened([x[:, :filled] for x in xs], scale))
    for block in encoder.middle:
        xs = through_block(block, xs)
    _, _, conv = encoder.head.parts()
    even_out(encoder.head.parts()[0], xs)
    kept = min(vae.z_dim, pairs)
    conv.weight[:kept] = 0
    difference(conv, kept, pairs)
    silence(vae.conv1)
    vae.conv1.weight[:, :, 0, 0, 0] = torch.eye(2 * vae.z_dim)
    return [x[:, : vae.z_dim] for x in each(xs, encoder.head)], seen


def start_decoder(vae, latents, seen):
    """Fits the decoder to `seen` by the encoder, given its latents."""
    decoder, seen = vae.decoder, [*seen]
    silence(vae.conv2)
    vae.conv2.weight[:, :, 0, 0, 0] = torch.eye(vae.z_dim)
    fit(decoder.conv1, latents, seen.pop())
    xs = each(latents, decoder.conv1)
    for block in (*decoder.middle, *decoder.upsamples):
        if isinstance(block, (ResidualBlock, AttentionBlock)):
            xs = through_block(block, xs)
            continue
        if block.time_conv is not None:
            fit_time(block.time_conv, xs, seen.pop())
            xs = [block.double_time(x, RecordedPast()) for x in xs]
        upsample, conv = block.resample
        larger = [batch_to_frames(upsample(frames_to_batch(x)), len(x)) for x in xs]
        target = seen.pop()
        fit(conv, larger, [torch.cat((t[:, :3], -t[:, :3]), 1) for t in target] if not seen else target)
        xs = [block.double_space(x, RecordedPast()) for x in xs]
    norm, _, conv = decoder.head.parts()
    even_out(norm, xs)
    silence(conv)
    difference(conv, 3, 3)
    colours = each(xs, decoder.head)
    gains = [(t[:, :3] * x).sum() / x.square().sum() for t, x in zip(target, colours)]
    conv.weight *= torch.stack(gains).mean() / SCALE


def per_channel(vector):
    return vector[:, None, None, None]


def each(xs, module):
    """A convolution or a head on each of `xs`."""
    if isinstance(module, nn.Conv3d):
        return [RecordedPast().causal_conv(module, x) for x in xs]
    return [module(x, RecordedPast()) for x in xs]


def silence(conv):
    """All of its weights to nothing."""
    conv.weight.zero_()
    conv.bias.zero_()


def count_pairs(channels):
    """How many pairs (x, -x) fit beside the constant."""
    return (channels - 1) // 2


def through_block(block, xs):
    """A block whose branch adds nothing, on each of `xs`: what it has of a shortcut keeps all channels."""
    if isinstance(block, AttentionBlock):
        silence(block.proj)
        return xs
    silence(block.residual[6])
    even_out(block.residual[0], xs)
    if isinstance(block.shortcut, nn.Conv3d):
        silence(block.shortcut)
        before, after = block.shortcut.in_channels - 1, block.shortcut.out_channels - 1
        block.shortcut.weight[:before, :before, 0, 0, 0] = torch.eye(before)
        block.shortcut.weight[after, before] = 1  # the constant stays the last
        return each(xs, block.shortcut)
    return xs


def even_out(norm, xs):
    """Weak channels leave the norm less weak; those without anything keep their factor."""
    norm.gamma.fill_(1)
    power = torch.stack([norm(x).square().mean((0, 2, 3, 4)) for x in xs]).mean(0)
    norm.gamma.copy_(torch.where(power > 1e-6, power.clamp_min(1e-6) ** -0.25, 1.0).view_as(norm.gamma))


def difference(conv, count, pairs):
    """Output j of a convolution becomes channel j - channel (pairs + j), for j < count."""
    j = torch.arange(count)
    conv.bias[:count] = 0
    conv.weight[j, j, -1, 1, 1] = 1
    conv.weight[j, pairs + j, -1, 1, 1] = -1


def halve_space(conv, xs, pairs=None):
    """The strongest principal components of 2x2 blocks; their scale is kept, half of that of a sum.

    Args:
        xs: [B, C, f, H, W] each; the first C inputs of the convolution.
        pairs: as many, as pairs, each of the same strength; None: as many as there is room for.

    Returns:
        By how much [count] each component was strengthened less; or None.
    """
    # [4 C, n], the order of weight[:, :, :2, :2]
    corners = [torch.stack([x[:, :, :, a::2, b::2] for a in (0, 1) for b in (0, 1)], 2) for x in xs]
    values = torch.cat([c.movedim((1, 2), (0, 1)).flatten(0, 1).flatten(1) for c in corners], 1)
    mean = values.mean(1)
    power, axes = torch.linalg.eigh(torch.cov(values))
    count = min(pairs or conv.out_channels - 1, len(mean))
    power, axes = power.flip(0)[:count].clamp_min(0), axes.flip(1)[:, :count].T
    std = power.sqrt() / 2
    rows = axes / 2 / (std[:, None].clamp_min(1e-3) / SCALE if pairs else 1)
    silence(conv)
    conv.weight[:count, : xs[0].shape[1], :2, :2] = rows.unflatten(1, (-1, 2, 2))
    conv.bias[:count] = -(rows @ mean)
    if pairs:
        conv.weight[pairs : 2 * pairs] = -conv.weight[:pairs]
        conv.bias[pairs : 2 * pairs] = -conv.bias[:pairs]
    conv.bias[-1] = (STRONGER * 2 * pairs) ** 0.5 * SCALE if pairs else power.sum().sqrt() / 2
    return std if pairs else None


def weakened(xs, scale):
    """Components in units of pixels again, as the decoder is to have them."""
    return xs if scale is None else [x * per_channel(scale) / SCALE for x in xs]


def halve_time(conv, xs, scale, kept):
    """Means of two frames, and differences in the place of the weakest of the first `kept` channels.

    Frame 0 does not pass here: there every channel keeps its meaning.

    Args:
        xs: [B, C, f, H, W] each; the first C inputs of the convolution.
        scale: of channels in units of pixels; given, they are pairs.
    """
    count = xs[0].shape[1]
    weigh = scale.square() if scale is not None else 1
    first, second = (torch.cat([x[:, :, i::2].transpose(0, 1).flatten(1) for x in xs], 1) for i in (1, 2))
    mean, half = ((first + second) / 2).var(1), ((second - first) / 2).var(1)
    moving = (half * weigh).argsort(descending=True)
    gained = torch.cat((torch.zeros(1), (half * weigh)[moving].cumsum(0).cpu()))
    means = torch.cat((torch.zeros(1), (mean * weigh).cumsum(0).cpu()))
    still = max(range(kept + 1), key=lambda s: float(means[s] + gained[kept - s]))
    silence(conv)
    weight = conv.weight[..., 0, 0]  # [out, in, 3], a view
    for start in (0, count) if scale is not None else (0,):
        own = torch.arange(count) + start
        weight[own, own, 1:] = 0.5
        for place, channel in zip(range(still, kept), moving.tolist()):
            gain = 0.5 if scale is None else 0.5 * SCALE / float(half[channel].sqrt())
            weight[start + place] = 0
            weight[start + place, start + channel, 1:] = torch.tensor([-gain, gain])
    weight[-1, -1, 2] = 1


def fit(conv, xs, targets):
    """Sets a convolution of 3x3 pixels (and 3 frames) to the least-squares estimate of `targets`.

    Args:
        xs: [B, C, f, H, W] each; the last channel is the constant where conv is not the first one.
        targets: [B, D, f, H, W] each, for its first D outputs; the last output becomes a constant.
    """
    back = conv.kernel_size[0] - 1 if isinstance(conv, nn.Conv3d) else 0
    windows = []
    for x in xs:
        x = F.pad(x, (1, 1, 1, 1, back, 0))
        x = x.unfold(2, back + 1, 1).unfold(3, 3, 1).unfold(4, 3, 1)  # [B, C, f, H, W, k, 3, 3]
        windows.append(x.permute(0, 2, 3, 4, 1, 5, 6, 7))
    weight, bias = solve(windows, [t.movedim(1, -1) for t in targets])
    silence(conv)
    conv.weight[: len(weight)] = weight.view(len(weight), *conv.weight.shape[1:])
    conv.bias[: len(bias)] = bias
    power = torch.stack([t.square().mean((0, 2, 3, 4)).sum() for t in targets]).mean()
    is_output = len(bias) == 6  # colours as pairs, before the last norm
    conv.bias[-1] = (power * (STRONGER if is_output else 1)).sqrt()


def fit_time(conv, xs, targets):
    """The same of a convolution that doubles the frame rate: outputs are the first and the second frame."""
    channels = conv.in_channels
    windows = [F.pad(x[:, :, 1:], (0, 0, 0, 0, 2, 0)).unfold(2, 3, 1).movedim(1, -2) for x in xs]
    pairs = [torch.cat((t[:, :, 1::2], t[:, :, 2::2]), 1).movedim(1, -1) for t in targets]
    weight, bias = solve(windows, pairs)
    silence(conv)
    count = len(bias) // 2
    for half in (0, 1):
        first = half * channels
        conv.weight[first : first + count] = weight.chunk(2)[half].view(count, channels, 3, 1, 1)
        conv.bias[first : first + count] = bias.chunk(2)[half]
        conv.weight[first + channels - 1, channels - 1, 2] = 1


def solve(windows, targets):
    """Least squares with a little ridge: (weights [D, what a window holds], biases [D]).

    Args:
        windows: [..., C, taps...] each, `targets` [..., D] each, with the same leading axes.
    """
    generator = torch.Generator().manual_seed(SEED)
    rows, wanted = [], []
    for window, target in zip(windows, targets):
        axes = target.ndim - 1
        shape = target.shape[:axes]
        picked = torch.randperm(shape.numel(), generator=generator)[:ROWS].to(target.device)
        where = torch.unravel_index(picked, shape)
        rows.append(window[where].flatten(1))
        wanted.append(target[where])
    x, y = torch.cat(rows).double(), torch.cat(wanted).double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    gram = x.T @ x
    gram.diagonal().add_(RIDGE * gram.diagonal().mean() + 1e-9)
    weight = torch.linalg.solve(gram, x.T @ y).T
    return weight.float(), (mean_y - weight @ mean_x).float()
