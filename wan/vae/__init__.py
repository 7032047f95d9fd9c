"""The Wan2.1 video autoencoder: the executors that walk the layers of layers.py.

A clip runs as a stream of chunks (stream.py), a frame whole or in windows (tiling.py). What layers
remember of a stream lives in one call; the model itself stores nothing.

Frame 0 is special in Wan: it is one latent of its own, each later latent covers four frames. Hence
F = 4(T - 1) + 1.

    B batch    C channels    F pixel frames (4n+1)    T latent frames    f frames of one chunk
    H W height and width of the pixels (latents: H/8 W/8)
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..refusal import Refusal
from .layers import Decoder, Encoder, Stage, conv_layer
from .past import Check
from .stream import frames_per_chunk, new_past, regroup, stream
from .tiling import Window, cut_windows, frames_left_out, plan_tiles, scaled, windowed

Progress: TypeAlias = Callable[[int, int], object]


class WanVAE(nn.Module):
    """Wan2.1's video autoencoder; latents are raw, without the per-channel mean and std of the model.

    Args:
        dim: channels of the first level; 96 in the release.
        z_dim: latent channels.
        operations: namespace with the classes `Conv2d` and `Conv3d`.
        device, dtype: of the weights.
    """

    def __init__(
        self,
        dim: int = 96,
        z_dim: int = 16,
        operations: Any = nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        kw = {"device": device, "dtype": dtype}
        self.dim, self.z_dim = dim, z_dim
        self.encoder = Encoder(dim, z_dim, operations, **kw)
        self.conv1: nn.Conv3d = operations.Conv3d(z_dim * 2, z_dim * 2, 1, **kw)
        self.conv2: nn.Conv3d = operations.Conv3d(z_dim, z_dim, 1, **kw)
        self.decoder = Decoder(dim, z_dim, operations, **kw)

    def is_plain(self, conv: nn.Module) -> bool:
        """Whether calling `conv` is no more than convolving with its weight and bias; else it is called."""
        return True

    def encode(
        self,
        x: Tensor,
        device: torch.device | str | None = None,
        *,
        chunk_frames: int | None = None,
        progress: Progress | None = None,
        check: Check | None = None,
    ) -> Tensor:
        """The mean of the latent distribution.

        Args:
            x: [B, 3, F, H, W] in [-1, 1], F = 4n+1, H and W multiples of 8; in the dtype of the weights.
            device: where to compute; x may live elsewhere and is then moved chunk by chunk.
            chunk_frames: frames to work on at once; None chooses by device.
            progress: called as progress(done, total) with pixel frames after each chunk; may raise.
            check: called between layers, on the CPU more often; may raise, as on cancel.

        Returns:
            [B, z_dim, (F - 1) / 4 + 1, H / 8, W / 8] on `device`.

        Raises:
            Refusal: if the shape of x does not fit.
        """
        out = self._latent_like(x, device)
        for t, chunk in self.encode_chunks(x, out.device, chunk_frames, check):
            out[:, :, t : t + chunk.shape[2]] = chunk
            report(progress, 4 * (t + chunk.shape[2] - 1) + 1, x.shape[2])
        return out

    def decode(
        self,
        z: Tensor,
        output_buffer: Tensor | None = None,
        *,
        chunk_frames: int | None = None,
        progress: Progress | None = None,
        check: Check | None = None,
    ) -> Tensor:
        """Pixels of a latent, written chunk by chunk into their final place.

        Args:
            z: [B, z_dim, T, H/8, W/8], raw, on the device to compute on.
            output_buffer: [B, 3, 4(T-1)+1, H, W], any device and floating dtype; None makes one like z.
            chunk_frames, progress, check: as for `encode`.

        Returns:
            `output_buffer`: about [-1, 1], not clamped.

        Raises:
            Refusal: if the shape of z does not fit.
            ValueError: if that of `output_buffer` does not.
        """
        out = self._output(z, output_buffer, z.dtype)
        for f, chunk in self.decode_part(z, chunk_frames=chunk_frames, check=check):
            out[:, :, f : f + chunk.shape[2]] = chunk
            report(progress, f + chunk.shape[2], out.shape[2])
        return out

    def decode_output_shape(self, shape: Sequence[int]) -> tuple[int, int, int, int, int]:
        """[B, z_dim, T, H/8, W/8] -> (B, 3, 4(T-1)+1, H, W)."""
        b, _, t, h, w = shape
        return (b, 3, 4 * (t - 1) + 1, h * 8, w * 8)

    def encode_tiled(
        self,
        x: Tensor,
        tile_x: int = 256,
        tile_y: int = 256,
        overlap: int = 64,
        *,
        device: torch.device | str | None = None,
        progress: Progress | None = None,
        check: Check | None = None,
    ) -> Tensor:
        """`encode` in overlapping tiles, blended linearly: less memory, slightly different numbers.

        Args:
            x, device: as for `encode`.
            tile_x, tile_y, overlap: pixels, multiples of 8; the overlap is smaller than a tile, where
                there are several.
            progress: called as progress(done, total) with tiles; may raise.
            check: as for `encode`.

        Returns:
            As `encode`.

        Raises:
            Refusal: if the shape of x or a tile size does not fit.
        """
        out = self._latent_like(x, device).zero_()
        check_multiple_of_8(tile_x=tile_x, tile_y=tile_y, overlap=overlap)
        h, w = out.shape[-2:]
        tiles = plan_tiles(h, w, tile_y // 8, tile_x // 8, overlap // 8, scale=1)
        for done, tile in enumerate(tiles, 1):
            pixels = x[..., scaled(tile.ys, 8), scaled(tile.xs, 8)]
            weight = tile.weight.to(out)
            for t, chunk in self.encode_chunks(pixels, out.device, check=check):
                out[:, :, t : t + chunk.shape[2], tile.ys, tile.xs] += chunk * weight
            report(progress, done, len(tiles))
        return out

    def decode_tiled(
        self,
        z: Tensor,
        tile_x: int = 32,
        tile_y: int = 32,
        *,
        output_buffer: Tensor | None = None,
        progress: Progress | None = None,
        check: Check | None = None,
    ) -> Tensor:
        """`decode` tile by tile: less memory, the same numbers up to rounding, so there is no seam.

        After the middle's attention every layer is local. Each tile is computed from all the pixels it
        depends on, as many as each stage needs, which costs time in place of a blend: at 480x832
        with tiles of 256 pixels 1.16 times that of `decode` (on a CPU).

        Args:
            z, output_buffer: as for `decode`; without a buffer the result is float32.
            tile_x, tile_y: latent pixels (8 pixels of an image each).
            progress: called as progress(done, total) with tiles; may raise.
            check: as for `encode`.

        Returns:
            `output_buffer`, as `decode`.

        Raises:
            Refusal: if the shape of z or a tile size does not fit.
            ValueError: if the shape of `output_buffer` does not.
        """
        out = self._output(z, output_buffer, torch.float32)
        h, w = z.shape[-2:]
        tiles = cut_windows(h, w, tile_y, tile_x)
        features = self.features(z, check=check)
        for done, (rows, columns) in enumerate(tiles, 1):
            place = out[..., scaled(rows, 8), scaled(columns, 8)]
            for f, chunk in self.decode_part(z, (rows, columns), features, check=check):
                place[:, :, f : f + chunk.shape[2]] = chunk
            report(progress, done, len(tiles))
        return out

    def features(
        self, z: Tensor, device: torch.device | str | None = None, check: Check | None = None
    ) -> Tensor:
        """What the layers that read whole frames make of z, for `decode_part`.

        Args:
            z: as for `decode`.
            device: where to keep them; None is that of z.
            check: as for `encode`.

        Returns:
            [B, 4 dim, T, H/8, W/8] on `device`.
        """
        shape = (z.shape[0], self.decoder.conv1.out_channels, *z.shape[2:])
        out = z.new_empty(shape, device=device)
        size = frames_per_chunk(None, z.device)
        past = new_past(z.device, z.dtype, check, self.is_plain)
        t = 0
        for chunk in stream(self.decode_stages()[:1], [z], size, past):
            out[:, :, t : t + chunk.shape[2]] = chunk
            t += chunk.shape[2]
        return out

    def decode_part(
        self,
        z: Tensor,
        window: Window | None = None,
        features: Tensor | None = None,
        first: int = 0,
        chunk_frames: int | None = None,
        check: Check | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Part of what `decode` gives, with the same numbers up to rounding.

        Args:
            z: as for `decode`.
            window: rows and columns, in latent pixels; None is the whole frame.
            features: of z, on any device; needed for a window.
            first: the first pixel frame wanted.
            chunk_frames, check: as for `encode`.

        Yields:
            (frame index, pixels [B, 3, f, rows * 8, columns * 8])
        """
        size = frames_per_chunk(chunk_frames, z.device)
        past = new_past(z.device, z.dtype, check, self.is_plain)
        stages = self.decode_stages()
        if window is None:
            skipped, drops = frames_left_out(stages, first)
            x = z[:, :, skipped:]
        else:
            assert features is not None
            skipped, drops = frames_left_out(stages[1:], first)
            (rows, columns), stages = windowed(stages[1:], window, (z.shape[-2], z.shape[-1]))
            # A copy: the first layer adds to its input in place.
            x = features[:, :, skipped:, rows, columns].to(z.device, copy=True)
        for pixels in stream(stages, [x], size, past, drops):
            yield first, pixels
            first += pixels.shape[2]

    def encode_chunks(
        self,
        x: Tensor,
        device: torch.device | None = None,
        chunk_frames: int | None = None,
        check: Check | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """What `encode` gives, chunk by chunk; the arguments are the same.

        Yields:
            (latent frame index, means [B, z_dim, t, H/8, W/8])
        """
        device = x.device if device is None else device
        size = frames_per_chunk(chunk_frames, device)
        past = new_past(device, x.dtype, check, self.is_plain)
        frames = (chunk.to(device) for chunk in regroup([x], size))
        t = 0
        for moments in stream(self.encode_stages(), frames, size, past):
            yield t, moments[:, : self.z_dim]
            t += moments.shape[2]

    def encode_stages(self) -> list[Stage]:
        """All layers from pixels to means and log-variances."""
        stages = self.encoder.stages()
        stages[-1].append(conv_layer(self.conv1))
        return stages

    def decode_stages(self) -> list[Stage]:
        """All layers from latents to pixels."""
        stages = self.decoder.stages()
        stages[0].insert(0, conv_layer(self.conv2))
        return stages

    def _latent_like(self, x: Tensor, device: torch.device | str | None) -> Tensor:
        """An empty latent for the pixels x, whose shape is checked."""
        check_pixels(x.shape)
        b, _, frames, h, w = x.shape
        return x.new_empty(b, self.z_dim, (frames - 1) // 4 + 1, h // 8, w // 8, device=device)

    def _output(self, z: Tensor, buffer: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The buffer for the pixels of z, or a new one; both shapes are checked."""
        if z.ndim != 5 or z.shape[1] != self.z_dim or 0 in z.shape:
            raise Refusal(
                f"Wan VAE latent of shape {tuple(z.shape)}: it must be [batch, {self.z_dim}, latent frames, "
                f"height / 8, width / 8] with nothing empty",
                "Connect a Wan2.1 latent",
            )
        shape = self.decode_output_shape(z.shape)
        if buffer is None:
            return z.new_empty(shape, dtype=dtype)
        if tuple(buffer.shape) != shape:
            raise ValueError(
                f"Output buffer of shape {tuple(buffer.shape)} for a latent of shape {tuple(z.shape)}: it "
                f"must be {shape}. Make it with decode_output_shape()."
            )
        return buffer


def check_pixels(shape: Sequence[int]) -> None:
    """Refuses what is not [B, 3, 4n+1, 8m, 8k]."""
    if len(shape) != 5 or shape[1] != 3 or 0 in shape:
        raise Refusal(
            f"Wan VAE pixels of shape {tuple(shape)}: they must be [batch, 3, frames, height, width] with "
            f"nothing empty",
            "Pass RGB frames channels-first with the frames as third axis",
        )
    frames, h, w = shape[2:]
    if frames % 4 != 1:
        shorter = frames - (frames - 1) % 4
        raise Refusal(
            f"{frames} frames for the Wan VAE: the number must be 4n + 1 (one latent for the first frame, "
            f"one for each four after it)",
            f"Use {shorter} or {shorter + 4}",
        )
    if h % 8 or w % 8:
        raise Refusal(
            f"Frames of {w} x {h} pixels for the Wan VAE: both must be multiples of 8",
            f"Resize or crop to {max(8, w // 8 * 8)} x {max(8, h // 8 * 8)}",
        )


def check_multiple_of_8(**pixels: int) -> None:
    """Refuses a size that is no whole number of latent pixels; the keyword names it."""
    for name, value in pixels.items():
        if value % 8:
            raise Refusal(
                f"{name} = {value} pixels for Wan VAE encoding: it must be a multiple of 8 (one latent "
                f"pixel)",
                f"Use {max(8, value // 8 * 8)}",
            )


def report(progress: Progress | None, done: int, total: int) -> None:
    """Calls `progress`, if there is one."""
    if progress is not None:
        progress(done, total)
