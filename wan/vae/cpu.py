"""The VAE's convolutions on the CPU with fewer multiplications; the same numbers up to rounding.

- Causal 3x3x3: Winograd's minimal filtering F(m, 3) along time (Lavin and Gray, arXiv:1509.09308). m output
  frames from m + 2 input frames cost m + 2 planar 3x3 convolutions instead of 3m. Only the time axis is
  transformed, so the planes go through the library's convolution, and float32 stays as exact as before.
- Nearest upsampling, then 3x3: each of the four output phases sees 2x2 input pixels only, so it is one
  convolution with four times the channels and 4/9 of the multiplications.

    B N batch    C D input, output channels    f frames    H W height, width    n = m + 2 planes
"""

import torch
import torch.nn.functional as F

POINTS = (0.0, 1.0, -1.0, 2.0, -0.5)  # small errors; the point at infinity comes last
STRIP_BYTES = 12 * 2**20  # rows transformed at a time: what stays in a CPU's last cache level
MIN_VOXELS = 2048  # below, transforming the weights costs more than it saves


def fits(conv, x):
    """Whether the functions below may stand in for `conv`: plain CPU weights, nothing to differentiate."""
    return (
        x.device.type == conv.weight.device.type == "cpu"
        and x.dtype == conv.weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and conv.kernel_size[-2:] == (3, 3)
        and x[0, 0].numel() >= MIN_VOXELS
        and not getattr(conv, "weight_function", None)  # the host's patches apply inside conv.forward
    )


def transforms(m):
    """AT [m, n], G [n, 3], BT [n, n] with y = AT ((G g) * (BT d)) the valid correlation of d with g."""
    n = m + 2
    if m == 1:
        return torch.ones(1, 3), torch.eye(3), torch.eye(3)
    powers = torch.tensor(POINTS[: n - 1], dtype=torch.float64)[:, None] ** torch.arange(n)
    powers = torch.cat((powers, torch.zeros(1, n)))  # [n, n]

    def evaluate(terms):  # the last row reads the leading coefficient
        matrix = powers[:, :terms].clone()
        matrix[-1, -1] = 1
        return matrix

    return evaluate(m).T.float(), evaluate(3).float(), torch.linalg.inv(evaluate(n)).T.float()


def causal_conv3(conv, before, x, norm=None, add_to=None, check=None):
    """`conv` over up to two earlier frames and x, strip by strip of rows, so that nothing else is whole.

    Args:
        before: [B, C, 0..2, H, W], already normed; None is zeros. Two frames are overwritten with the
            new last two.
        x: [B, C, f, H, W].
        norm: applied to x, with SiLU, on the way; x stays as it is.
        add_to: the result is added to it, in place.
        check: called before each strip; may raise.

    Returns:
        (result, the last two frames that the convolution saw, for the next call)
    """
    b, c, f, h, w = x.shape
    if add_to is None:  # channels last in memory, as throughout on the CPU
        y = x.new_empty(b, f, h, w, conv.out_channels).permute(0, 4, 1, 2, 3)
    else:
        y = add_to.contiguous(memory_format=torch.channels_last_3d)
    for start in range(0, f, 4):
        fresh = x[:, :, start : start + 4].permute(0, 2, 3, 4, 1)  # [B, m, H, W, C]
        m = fresh.shape[1]
        earlier = fresh[:, :0] if before is None else before.permute(0, 2, 3, 4, 1)
        known = earlier.shape[1] + m
        # A full cache is overwritten in place: the largest things that outlive a call never move.
        kept = earlier if earlier.shape[1] == 2 else x.new_empty(b, min(2, known), h, w, c)
        filters = Filters(conv, m, known, norm, check)
        for i in range(b):
            out = y[i, :, start : start + m].permute(1, 2, 3, 0)
            filters(earlier[i], fresh[i], out, kept[i], add=add_to is not None)
        before = kept.permute(0, 4, 1, 2, 3)
    return y, before


def norm_silu_(norm, x):
    """silu(norm(x)) in place, channels in the last axis."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return F.silu(x.mul_(norm.scale / length.clamp_min_(1e-12)).mul_(norm.gamma.flatten()), inplace=True)


class Filters:
    """Weights of `conv` transformed for m outputs from the last `known` of m + 2 frames, the rest zero."""

    def __init__(self, conv, m, known, norm=None, check=None):
        self.norm = norm
        self.check = check or (lambda: None)
        at, g, bt = transforms(m)
        bt = bt[:, -known:]
        used = [i for i in range(m + 2) if bt[i].any()]
        self.at, self.bt = at[:, used].contiguous(), bt[used].contiguous()
        d, c = conv.weight.shape[:2]
        taps = g[used] @ conv.weight.permute(2, 0, 3, 4, 1).reshape(3, -1)
        self.taps = taps.view(-1, d, 3, 3, c).permute(0, 1, 4, 2, 3)  # [n, D, C, 3, 3], channels last
        # Every output takes the plane of point 1 once (for m = 1: the last plane): the bias rides on it.
        biased = used.index(1) if m > 1 else len(used) - 1
        self.biases = [conv.bias if i == biased else None for i in range(len(used))]

    def __call__(self, earlier, fresh, y, kept, add):
        """y [m, H, W, D] = or += the filtered frames, `earlier` then `fresh` [., H, W, C]; fills `kept`.

        `kept` may be `earlier` itself.
        """
        (old, h, w, c), new = earlier.shape, len(fresh)
        n, d = self.taps.shape[:2]
        rows = min(h, max(8, STRIP_BYTES // (n * w * max(c, d) * 4)))
        # One allocation of each for all strips: blocks of this size leave holes in the C heap otherwise.
        strips = fresh.new_empty(old + new, min(h, rows + 2), w, c)
        planes = fresh.new_empty(n, strips[0].numel())
        filtered = fresh.new_empty(n, rows * w * d)
        above = earlier[:, :0]  # the last row that `kept` has replaced
        for top in range(0, h, rows):
            self.check()
            bottom = min(h, top + rows)
            a, z = max(0, top - 1), min(h, bottom + 1)  # a row more on each side, as far as there is one
            strip = strips[:, : z - a]
            strip[:old, : top - a], strip[:old, top - a :] = above, earlier[:, top:z]
            strip[old:] = fresh[:, a:z]
            if self.norm is not None:
                norm_silu_(self.norm, strip[old:])
            above = strip[:old, bottom - a - 1 : bottom - a].clone()
            kept[:, top:bottom] = strip[-len(kept) :, top - a : bottom - a]
            torch.mm(self.bt, strip.reshape(old + new, -1), out=planes[:, : strip[0].numel()])
            lines = filtered[:, : (bottom - top) * w * d]
            for plane, tap, bias, line in zip(planes, self.taps, self.biases, lines):
                plane = plane[: strip[0].numel()].view(1, z - a, w, c).permute(0, 3, 1, 2)
                result = F.conv2d(plane, tap, bias, padding=1)[0, :, top - a : bottom - a]
                line.view(bottom - top, w, d).copy_(result.permute(1, 2, 0))
            y[:, top:bottom].view(len(y), -1).addmm_(self.at, lines, beta=int(add))


def upsample_conv(conv, x, check=lambda: None):
    """`conv` (3x3, padding 1) of x [N, C, H, W] doubled in height and width: [N, D, 2H, 2W].

    `check` is called before each of the N; may raise.
    """
    n, _, h, w = x.shape
    # [phase, tap of two, tap of three]: which rows (columns) of the kernel fall on one input pixel
    fold = x.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
    taps = torch.einsum("puk,qvl,dckl->pqdcuv", fold, fold, conv.weight).flatten(0, 2)
    taps = taps.contiguous(memory_format=torch.channels_last)  # [4D, C, 2, 2]
    y = x.new_empty(n, 2 * h, 2 * w, conv.out_channels).permute(0, 3, 1, 2)
    for frame, out in zip(x.split(1), y.split(1)):
        check()
        phases = F.conv2d(frame, taps, conv.bias.repeat(4), padding=1).chunk(
            4, 1
        )  # [1, D, H + 1, W + 1] each
        for i, phase in enumerate(phases):
            p, q = divmod(i, 2)
            out[:, :, p::2, q::2] = phase[:, :, p : p + h, q : q + w]
    return y
