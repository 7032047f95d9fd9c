"""The Wan2.1 video autoencoder: the executors that walk the layers of layers.py.

A clip runs as a stream of chunks (stream.py), a frame whole or in windows (tiling.py). What layers
remember of a stream lives in one call; the model itself stores nothing.

Frame 0 is special in Wan: it is one latent of its own, each later latent covers four frames. Hence
F = 4(T - 1) + 1.

    B batch    C channels    F pixel frames (4n+1)    T latent frames    f frames of one chunk
    H W height and width of the pixels (latents: H/8 W/8)
"""

import torch
from torch import nn

from .layers import Decoder, Encoder, conv_layer
from .stream import frames_per_chunk, regroup, stream
from .tiling import cut_windows, frames_left_out, plan_tiles, scaled, windowed


class WanVAE(nn.Module):
    """Wan2.1's video autoencoder; latents are raw, without the per-channel mean and std of the model.

    Args:
        dim: Channels of the first level; 96 in the release.
        z_dim: Latent channels.
        operations: Namespace with `Conv2d` and `Conv3d`: `torch.nn`, or the host's.
    """

    comfy_has_chunked_io = True  # the host hands decode() the buffer of the final image

    def __init__(self, dim=96, z_dim=16, operations=nn, device=None, dtype=None):
        super().__init__()
        kw = {"device": device, "dtype": dtype}
        self.dim, self.z_dim = dim, z_dim
        self.encoder = Encoder(dim, z_dim, operations, **kw)
        self.conv1 = operations.Conv3d(z_dim * 2, z_dim * 2, 1, **kw)
        self.conv2 = operations.Conv3d(z_dim, z_dim, 1, **kw)
        self.decoder = Decoder(dim, z_dim, operations, **kw)

    def encode(self, x, device=None, chunk_frames=None, progress=None, check=None):
        """Mean of the latent distribution.

        Args:
            x: [B, 3, F, H, W] in [-1, 1], F = 4n+1, H and W multiples of 8; in the dtype of the weights.
            device: Where to compute; `x` may live elsewhere and is then moved chunk by chunk.
            chunk_frames: Frames to work on at once; None chooses by device.
            progress: Called as progress(done, total) with pixel frames after each chunk; may raise.
            check: Called between layers, on the CPU more often; may raise, as on cancel.

        Returns:
            [B, z_dim, (F - 1) / 4 + 1, H / 8, W / 8] on `device`.

        Raises:
            ValueError: If the shape of `x` does not fit.
        """
        check_pixels(x.shape)
        b, _, frames, h, w = x.shape
        device = x.device if device is None else torch.device(device)
        out = x.new_empty(b, self.z_dim, (frames - 1) // 4 + 1, h // 8, w // 8, device=device)
        for t, chunk in self._encode_chunks(x, device, chunk_frames, check):
            out[:, :, t : t + chunk.shape[2]] = chunk
            report(progress, 4 * (t + chunk.shape[2] - 1) + 1, frames)
        return out

    def decode(self, z, output_buffer=None, chunk_frames=None, progress=None, check=None):
        """Pixels of a latent, written chunk by chunk into their final place.

        Args:
            z: [B, z_dim, T, H/8, W/8], raw, on the device to compute on.
            output_buffer: [B, 3, 4(T-1)+1, H, W], any device and floating dtype; None makes one like `z`.
            chunk_frames: Frames to work on at once; None chooses by device.
            progress: Called as progress(done, total) with pixel frames after each chunk; may raise.
            check: As for `encode`.

        Returns:
            `output_buffer`: about [-1, 1], not clamped.

        Raises:
            ValueError: If the shape of `z` or of `output_buffer` does not fit.
        """
        out = self._output(z, output_buffer, z.dtype)
        for f, chunk in self.decode_part(z, chunk_frames=chunk_frames, check=check):
            out[:, :, f : f + chunk.shape[2]] = chunk
            report(progress, f + chunk.shape[2], out.shape[2])
        return out

    def decode_output_shape(self, shape):
        """[B, z_dim, T, H/8, W/8] -> (B, 3, 4(T-1)+1, H, W)."""
        b, _, t, h, w = shape
        return (b, 3, 4 * (t - 1) + 1, h * 8, w * 8)

    def encode_tiled(
        self,
        x,
        tile_x=256,
        tile_y=256,
        overlap=64,
        tile_t=None,
        overlap_t=None,
        device=None,
        progress=None,
        check=None,
    ):
        """`encode` in overlapping tiles, blended linearly: less memory, slightly different numbers.

        `tile_t` and `overlap_t` are ignored: time is streamed exactly, in bounded memory, and a cut
        without the causal past would begin a new clip.

        Args:
            x, device: As for `encode`.
            tile_x, tile_y, overlap: Pixels, multiples of 8; the overlap is smaller than the tile.
            progress: Called as progress(done, total) with tiles; may raise.
            check: As for `encode`.

        Returns:
            As `encode`.

        Raises:
            ValueError: If the shape of `x` or a tile size does not fit.
        """
        check_pixels(x.shape)
        check_multiple_of_8(tile_x=tile_x, tile_y=tile_y, overlap=overlap)
        b, _, frames, h, w = x.shape
        device = x.device if device is None else torch.device(device)
        out = x.new_zeros(b, self.z_dim, (frames - 1) // 4 + 1, h // 8, w // 8, device=device)
        tiles = plan_tiles(h // 8, w // 8, tile_y // 8, tile_x // 8, overlap // 8, scale=1)
        for done, tile in enumerate(tiles, 1):
            pixels = x[..., scaled(tile.ys, 8), scaled(tile.xs, 8)]
            weight = tile.weight.to(out)
            for t, chunk in self._encode_chunks(pixels, device, None, check):
                out[:, :, t : t + chunk.shape[2], tile.ys, tile.xs] += chunk * weight
            report(progress, done, len(tiles))
        return out

    def decode_tiled(
        self,
        z,
        tile_x=32,
        tile_y=32,
        overlap=8,
        tile_t=None,
        overlap_t=None,
        output_buffer=None,
        progress=None,
        check=None,
    ):
        """`decode` tile by tile: less memory, the same numbers up to rounding, so there is no seam.

        After the middle's attention every layer is local. Each tile is computed from all the pixels it
        depends on, as many as each stage needs, which costs time in place of a blend: at 480x832
        with tiles of 256 pixels 1.16 times that of `decode` (on a CPU).

        Args:
            z, output_buffer: As for `decode`; without a buffer the result is float32.
            tile_x, tile_y: Latent pixels (an eighth of an image pixel each).
            overlap, tile_t, overlap_t: Not needed; time is streamed in bounded memory.
            progress: Called as progress(done, total) with tiles; may raise.
            check: As for `encode`.

        Returns:
            `output_buffer`, as `decode`.

        Raises:
            ValueError: If the shape of `z` or of `output_buffer` or a tile size does not fit.
        """
        out = self._output(z, output_buffer, torch.float32)
        tiles = cut_windows(*z.shape[-2:], tile_y, tile_x)
        features = self.features(z, check=check)
        for done, tile in enumerate(tiles, 1):
            place = out[..., scaled(tile[0], 8), scaled(tile[1], 8)]
            for f, chunk in self.decode_part(z, tile, features, check=check):
                place[:, :, f : f + chunk.shape[2]] = chunk
            report(progress, done, len(tiles))
        return out

    def features(self, z, device=None, check=None):
        """What the layers that need whole frames make of `z`: [B, C, T, h, w] on `device`, or on z's."""
        shape = (z.shape[0], self.decoder.conv1.out_channels, *z.shape[2:])
        out = z.new_empty(shape, device=device)
        t = 0
        for chunk in stream(self._decode_stages()[:1], [z], frames_per_chunk(None, z.device), check=check):
            out[:, :, t : t + chunk.shape[2]] = chunk
            t += chunk.shape[2]
        return out

    def decode_part(self, z, window=None, features=None, first=0, chunk_frames=None, check=None):
        """Part of what `decode` gives, with the same numbers up to rounding.

        Args:
            z: As for `decode`.
            window: (rows, columns) as slices of latent pixels; None is the whole frame.
            features: Of `z`, on any device; for a window only.
            first: The first pixel frame wanted.
            chunk_frames, check: As for `decode`.

        Yields:
            (frame index, pixels [B, 3, f, rows * 8, columns * 8])
        """
        size = frames_per_chunk(chunk_frames, z.device)
        stages = self._decode_stages()
        if window is None:
            skipped, drops = frames_left_out(stages, first)
            x = z[:, :, skipped:]
        else:
            skipped, drops = frames_left_out(stages[1:], first)
            (rows, columns), stages = windowed(stages[1:], window, z.shape[-2:])
            # A copy: the first layer adds to its input in place.
            x = features[:, :, skipped:, rows, columns].to(z.device, copy=True)
        for pixels in stream(stages, [x], size, drops, check):
            yield first, pixels
            first += pixels.shape[2]

    def _encode_chunks(self, x, device, chunk_frames, check):
        """Yields (latent index, means [B, z_dim, t, h, w])."""
        size = frames_per_chunk(chunk_frames, device)
        stages = self.encoder.stages()
        stages[-1].append(conv_layer(self.conv1))
        frames = (chunk.to(device) for chunk in regroup([x], size))
        t = 0
        for moments in stream(stages, frames, size, check=check):
            yield t, moments[:, : self.z_dim]
            t += moments.shape[2]

    def _decode_stages(self):
        stages = self.decoder.stages()
        stages[0].insert(0, conv_layer(self.conv2))
        return stages

    def _output(self, z, buffer, dtype):
        if z.ndim != 5 or z.shape[1] != self.z_dim or 0 in z.shape:
            raise ValueError(
                f"Wan VAE latent of shape {tuple(z.shape)}: it must be [batch, {self.z_dim}, latent frames, "
                f"height / 8, width / 8] with nothing empty. Connect a Wan2.1 latent."
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


def check_pixels(shape):
    if len(shape) != 5 or shape[1] != 3 or 0 in shape:
        raise ValueError(
            f"Wan VAE pixels of shape {tuple(shape)}: they must be [batch, 3, frames, height, width] with "
            f"nothing empty. Pass RGB frames channels-first with the frames as third axis."
        )
    frames, h, w = shape[2:]
    if frames % 4 != 1:
        shorter = frames - (frames - 1) % 4
        raise ValueError(
            f"{frames} frames for the Wan VAE: the number must be 4n + 1 (one latent for the first frame, "
            f"one for each four after it). Use {shorter} or {shorter + 4}."
        )
    if h % 8 or w % 8:
        raise ValueError(
            f"Frames of {w} x {h} pixels for the Wan VAE: both must be multiples of 8. "
            f"Resize or crop to {max(8, w // 8 * 8)} x {max(8, h // 8 * 8)}."
        )


def check_multiple_of_8(**pixels):
    for name, value in pixels.items():
        if value % 8:
            raise ValueError(
                f"{name} = {value} pixels for Wan VAE encoding: it must be a multiple of 8 (one latent "
                f"pixel). Use {max(8, value // 8 * 8)}."
            )


def report(progress, done, total):
    if progress is not None:
        progress(done, total)
