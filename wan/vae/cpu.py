"""The VAE's convolutions on the CPU with fewer multiplications; the same numbers up to rounding.

- Causal 3x3x3: Winograd's minimal filtering F(m, 3) along time (Lavin and Gray, arXiv:1509.09308). m output
  frames from m + 2 input frames cost m + 2 planar 3x3 convolutions instead of 3m. Only the time axis is
  transformed, so the planes go through the library's convolution, and float32 stays as exact as before.
- Nearest upsampling, then 3x3: as four phases (phases.py).

Nothing else in the VAE depends on this file but the choice of a `Past` in stream.py.

    B N batch    C D input, output channels    f frames of a chunk    H W height, width
    m output frames at a time (1 to 4)    n = m + 2 planes    k known input frames, at most m + 2
"""

from collections.abc import Callable, Iterator
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .norm import RMSNorm
from .past import Check, Past, batch_to_frames, frames_to_batch
from .phases import phase_filters

POINTS = (0.0, 1.0, -1.0, 2.0, -0.5)  # of interpolation, for small errors; the point at infinity comes last
MOST_FRAMES = len(POINTS) - 1  # m: F(m, 3) takes m + 1 finite points
STRIP_BYTES = 12 * 2**20  # of transformed rows: about what stays in a CPU's last cache level
MIN_VOXELS = 2048  # in smaller chunks, transforming the weights costs more than it saves


class CpuPast(Past):
    """A `Past` with the convolutions of this file, where they save time.

    Args:
        is_plain: whether calling a convolution is no more than convolving with its weight and bias.
    """

    def __init__(self, check: Check | None, is_plain: Callable[[nn.Module], bool]):
        super().__init__(check)
        self.is_plain = is_plain

    def arrange(self, chunk: Tensor) -> Tensor:
        """Channels side by side."""
        return chunk.contiguous(memory_format=torch.channels_last_3d)

    def causal_conv(
        self,
        conv: nn.Conv3d,
        x: Tensor,
        norm: RMSNorm | None = None,
        overwrite: bool = False,
        add_to: Tensor | None = None,
    ) -> Tensor:
        if conv.kernel_size[0] == 1 or not self.fits(conv, x):
            return super().causal_conv(conv, x, norm, overwrite, add_to)
        y, self.frames[conv] = causal_conv3(conv, self.frames.get(conv), x, norm, add_to, self.check)
        return y

    def upsample_conv(self, upsample: nn.Module, conv: nn.Conv2d, x: Tensor) -> Tensor:
        if not self.fits(conv, x):
            return super().upsample_conv(upsample, conv, x)
        return batch_to_frames(upsample_conv(conv, frames_to_batch(x), self.check), x.shape[0])

    def fits(self, conv: nn.Conv2d | nn.Conv3d, x: Tensor) -> bool:
        """Whether the functions below may stand in for `conv`, and save time."""
        return (
            x.device.type == conv.weight.device.type == "cpu"
            and x.dtype == conv.weight.dtype == torch.float32
            and conv.kernel_size[-2:] == (3, 3)
            and x[0, 0].numel() >= MIN_VOXELS
            and self.is_plain(conv)
        )


def causal_conv3(
    conv: nn.Conv3d,
    before: Tensor | None,
    x: Tensor,
    norm: RMSNorm | None = None,
    add_to: Tensor | None = None,
    check: Check = lambda: None,
) -> tuple[Tensor, Tensor]:
    """`conv` of the frames before and x, in strips of rows, so that only these are transformed at once.

    Args:
        conv: 3x3x3, padded by 1 in height and width.
        before: [B, C, 0 to 2, H, W], normed; None and missing frames are zeros. Two frames are overwritten
            with the new last two: caches that move leave holes in the C heap (half as much memory again).
        x: [B, C, f, H, W]; it stays as it is.
        norm: applied to x, followed by SiLU; None leaves both out.
        add_to: [B, D, f, H, W]; the result is added to it, in place where its channels are last.
        check: called before each strip; may raise.

    Returns:
        (result [B, D, f, H, W], the last two frames of all that were read, normed, for the next call)
    """
    b, c, f, h, w = x.shape
    if add_to is None:  # channels last in memory, as throughout on the CPU
        y = x.new_empty(b, f, h, w, conv.out_channels)
    else:
        y = channels_last(add_to.contiguous(memory_format=torch.channels_last_3d))
    earlier = x.new_empty(b, 0, h, w, c) if before is None else channels_last(before)
    for start in range(0, f, MOST_FRAMES):
        span = slice(start, start + MOST_FRAMES)
        fresh, out = channels_last(x)[:, span], y[:, span]
        known = earlier.shape[1] + fresh.shape[1]
        kept = earlier if earlier.shape[1] == 2 else x.new_empty(b, min(2, known), h, w, c)
        filters = Winograd(conv, fresh.shape[1], known, h, w)
        for i in range(b):
            for strip, rows, inside in filters.strips(earlier[i], fresh[i], norm):
                check()
                kept[i, :, rows] = strip[-2:, inside]
                filters.convolve(strip, inside, out[i, :, rows], add=add_to is not None)
        earlier = kept
    return y.permute(0, 4, 1, 2, 3), earlier.permute(0, 4, 1, 2, 3)


class Winograd:
    """F(m, 3) along time: the transformed weights of `conv`, and buffers for one strip of rows at a time.

    The buffers are made once for all strips: blocks of their size, made and freed, leave holes in the C heap.

    Args:
        conv: 3x3x3.
        m: output frames.
        known: k, how many of the m + 2 input frames there are; those before are zeros.
        h, w: of a frame.
    """

    def __init__(self, conv: nn.Conv3d, m: int, known: int, h: int, w: int):
        at, g, bt = transforms(m)
        bt = bt[:, -known:]
        used = [i for i in range(m + 2) if bt[i].any()]
        self.at, self.bt = at[:, used].contiguous(), bt[used].contiguous()  # [m, n], [n, k]
        n, (d, c) = len(used), conv.weight.shape[:2]
        taps = g[used] @ conv.weight.permute(2, 0, 3, 4, 1).reshape(3, -1)
        self.taps = taps.view(n, d, 3, 3, c).permute(0, 1, 4, 2, 3)  # [n, D, C, 3, 3], channels last
        # AT's column for point 1 (for m = 1: the last) is all ones: a bias there is added once per output.
        biased = used.index(1) if m > 1 else n - 1
        self.biases = [conv.bias if i == biased else None for i in range(n)]
        self.rows = min(h, max(8, STRIP_BYTES // (n * w * max(c, d) * 4)))
        read = min(h, self.rows + 2)
        self.strip = conv.weight.new_empty(known, read, w, c)
        self.planes = conv.weight.new_empty(n, read * w * c)
        self.filtered = conv.weight.new_empty(n, self.rows * w * d)

    def strips(
        self, earlier: Tensor, fresh: Tensor, norm: RMSNorm | None
    ) -> Iterator[tuple[Tensor, slice, slice]]:
        """Slides over the rows of the frames before and of the new ones, which are normed here.

        Each row is read once, before it is yielded, so rows already yielded may be overwritten.

        Args:
            earlier: [., H, W, C].
            fresh: [., H, W, C].
            norm: applied to `fresh`, followed by SiLU; None leaves both out.

        Yields:
            (strip [k, r, W, C] with a row more on each side, as far as there is one; its rows in the frame
            without these; the same rows in the strip). The strip is overwritten by the next.
        """
        (old, h, _, _), strip = earlier.shape, self.strip
        for top in range(0, h, self.rows):
            bottom, shared = min(h, top + self.rows), min(top, 2)
            new = slice(top + 1 if top else 0, min(h, bottom + 1))
            strip, before = self.strip[:, : shared + new.stop - new.start], strip
            strip[:, :shared] = before[:, before.shape[1] - shared :]
            strip[:old, shared:], strip[old:, shared:] = earlier[:, new], fresh[:, new]
            if norm is not None:
                norm_silu_(norm, strip[old:, shared:])
            first = min(top, 1)
            yield strip, slice(top, bottom), slice(first, first + bottom - top)

    def convolve(self, strip: Tensor, inside: slice, y: Tensor, add: bool) -> None:
        """Writes the rows `inside` of the convolution of `strip` [k, r, W, C] into y [m, rows, W, D].

        Args:
            add: adds to y in place of overwriting it.
        """
        _, r, w, c = strip.shape
        size, rows, d = r * w * c, y.shape[1], y.shape[3]
        torch.mm(self.bt, strip.reshape(len(strip), -1), out=self.planes[:, :size])
        filtered = self.filtered[:, : rows * w * d]
        for plane, tap, bias, line in zip(self.planes, self.taps, self.biases, filtered):
            plane = plane[:size].view(1, r, w, c).permute(0, 3, 1, 2)
            result = F.conv2d(plane, tap, bias, padding=1)[0, :, inside]  # [D, rows, W]
            line.view(rows, w, d).copy_(result.permute(1, 2, 0))
        y.view(len(y), -1).addmm_(self.at, filtered, beta=int(add))


def transforms(m: int) -> tuple[Tensor, Tensor, Tensor]:
    """AT [m, n], G [n, 3], BT [n, n] with y = AT ((G g) * (BT d)) the valid correlation of d with g."""
    n = m + 2
    if m == 1:
        return torch.ones(1, 3), torch.eye(3), torch.eye(3)
    powers = torch.tensor(POINTS[: n - 1], dtype=torch.float64)[:, None] ** torch.arange(n)
    powers = torch.cat((powers, torch.zeros(1, n)))  # [n, n]

    def evaluate(terms: int) -> Tensor:
        """A polynomial of so many terms at the points; at infinity, its leading coefficient."""
        matrix = powers[:, :terms].clone()
        matrix[-1, -1] = 1
        return matrix

    return evaluate(m).T.float(), evaluate(3).float(), torch.linalg.inv(evaluate(n)).T.float()


def norm_silu_(norm: RMSNorm, x: Tensor) -> None:
    """silu(norm(x)) in place, for channels in the last axis."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    x.mul_(norm.scale / length.clamp_min_(1e-12)).mul_(norm.gamma.flatten())
    F.silu(x, inplace=True)


def channels_last(x: Tensor) -> Tensor:
    """[B, C, f, H, W] -> [B, f, H, W, C], a view."""
    return x.permute(0, 2, 3, 4, 1)


def upsample_conv(conv: nn.Conv2d, x: Tensor, check: Check = lambda: None) -> Tensor:
    """`conv` (3x3, padded by 1) of x doubled in height and width: [N, C, H, W] -> [N, D, 2H, 2W].

    `check` is called before each of the N; may raise.
    """
    n, _, h, w = x.shape
    taps = phase_filters(conv.weight)
    bias = None if conv.bias is None else conv.bias.repeat(4)
    y = x.new_empty(n, 2 * h, 2 * w, conv.out_channels).permute(0, 3, 1, 2)
    for frame, out in zip(x.split(1), y.split(1)):
        check()
        phases = F.conv2d(frame, taps, bias, padding=1).chunk(4, 1)  # 4 of [1, D, H + 1, W + 1]
        for phase, (p, q) in zip(phases, product(range(2), repeat=2)):
            out[:, :, p::2, q::2] = phase[:, :, p : p + h, q : q + w]
    return y
