"""The Wan2.1 video autoencoder: the executors that walk the layers of vae_layers.py.

A clip runs as a stream of chunks. Every layer is causal in time and finds the earlier frames it needs in
a `Past`, which one call makes and drops; the model itself stores nothing, and how the clip is cut changes
no number beyond rounding.

Frame 0 is special in Wan: it is one latent of its own, each later latent covers four frames. Hence
F = 4(T - 1) + 1.

    B batch    C channels    F pixel frames (4n+1)    T latent frames    f frames of one chunk
    H W height and width of the pixels (latents: H/8 W/8)
"""

from functools import partial

import torch
from torch import nn

from .vae_layers import Decoder, Encoder, Past, causal_conv
from .vae_tiling import cut_windows, plan_tiles, windowed

# Frames a stage works on at once: few beside the frames that the caches must hold. Four are what the
# CPU's convolution saves most with (vae_cpu.py).
CHUNK_FRAMES = {"cpu": 4, "cuda": 2}


def regroup(chunks, size):
    """Cuts and joins a stream of [B, C, f, H, W] into chunks of `size` frames, the last maybe shorter."""
    waiting = []  # lists are popped as they are handed on, so that nobody here holds a used chunk
    for chunk in chunks:
        waiting.append(chunk)
        del chunk
        if sum(part.shape[2] for part in waiting) >= size:
            joined = waiting[0] if len(waiting) == 1 else torch.cat(waiting, 2)
            waiting = [*joined.split(size, 2)]
            del joined
            while waiting and waiting[0].shape[2] == size:
                yield waiting.pop(0)
    if waiting:
        yield torch.cat(waiting, 2)


def run_stage(layers, chunks, past):
    for x in chunks:
        held = [x]
        del x
        for layer in layers:
            held.append(layer(held.pop(), past))
            if not held[0].shape[2]:  # every frame waits for its partner in time
                break
        else:
            yield held.pop()


def fast_layout(x):
    return torch.channels_last_3d if x.device.type == "cpu" else torch.preserve_format


def stream(stages, chunks, size):
    """Pulls `chunks` through the stages, cut to `size` frames before each. Yields the results."""
    past = Past()
    if not torch.is_grad_enabled():  # pixels with their channels side by side: the CPU's fast layout
        chunks = (chunk.contiguous(memory_format=fast_layout(chunk)) for chunk in chunks)
    for layers in stages:
        chunks = run_stage(layers, regroup(chunks, size), past)
    return chunks


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
        self.z_dim = z_dim
        self.encoder = Encoder(dim, z_dim, operations, **kw)
        self.conv1 = operations.Conv3d(z_dim * 2, z_dim * 2, 1, **kw)
        self.conv2 = operations.Conv3d(z_dim, z_dim, 1, **kw)
        self.decoder = Decoder(dim, z_dim, operations, **kw)

    def encode(self, x, device=None, chunk_frames=None, progress=None):
        """Mean of the latent distribution.

        Args:
            x: [B, 3, F, H, W] in [-1, 1], F = 4n+1, H and W multiples of 8; in the dtype of the weights.
            device: Where to compute; `x` may live elsewhere and is then moved chunk by chunk.
            chunk_frames: Frames to work on at once; None chooses by device.
            progress: Called as progress(done, total) with pixel frames after each chunk; may raise.

        Returns:
            [B, z_dim, (F - 1) / 4 + 1, H / 8, W / 8] on `device`.

        Raises:
            ValueError: If the shape of `x` does not fit.
        """
        check_pixels(x.shape)
        b, _, frames, h, w = x.shape
        device = x.device if device is None else torch.device(device)
        out = x.new_empty(b, self.z_dim, (frames - 1) // 4 + 1, h // 8, w // 8, device=device)
        for t, chunk in self._encode_chunks(x, device, chunk_frames):
            out[:, :, t : t + chunk.shape[2]] = chunk
            report(progress, 4 * (t + chunk.shape[2] - 1) + 1, frames)
        return out

    def decode(self, z, output_buffer=None, chunk_frames=None, progress=None):
        """Pixels of a latent, written chunk by chunk into their final place.

        Args:
            z: [B, z_dim, T, H/8, W/8], raw, on the device to compute on.
            output_buffer: [B, 3, 4(T-1)+1, H, W], any device and floating dtype; None makes one like `z`.
            chunk_frames: Frames to work on at once; None chooses by device.
            progress: Called as progress(done, total) with pixel frames after each chunk; may raise.

        Returns:
            `output_buffer`: about [-1, 1], not clamped.

        Raises:
            ValueError: If the shape of `z` or of `output_buffer` does not fit.
        """
        out = self._output(z, output_buffer, z.dtype)
        for f, chunk in self._decode_chunks(z, chunk_frames):
            out[:, :, f : f + chunk.shape[2]] = chunk
            report(progress, f + chunk.shape[2], out.shape[2])
        return out

    def decode_output_shape(self, shape):
        """[B, z_dim, T, H/8, W/8] -> (B, 3, 4(T-1)+1, H, W)."""
        b, _, t, h, w = shape
        return (b, 3, 4 * (t - 1) + 1, h * 8, w * 8)

    def encode_tiled(self, x, tile_x=256, tile_y=256, overlap=64, tile_t=None, overlap_t=None, progress=None):
        """`encode` in overlapping tiles, blended linearly: less memory, slightly different numbers.

        `tile_t` and `overlap_t` are ignored: time is streamed exactly, in bounded memory, and a cut
        without the causal past would begin a new clip.

        Args:
            x: As for `encode`.
            tile_x, tile_y, overlap: Pixels, multiples of 8; the overlap is smaller than the tile.
            progress: Called as progress(done, total) with tiles; may raise.

        Returns:
            As `encode`.

        Raises:
            ValueError: If the shape of `x` or a tile size does not fit.
        """
        check_pixels(x.shape)
        check_multiple_of_8(tile_x=tile_x, tile_y=tile_y, overlap=overlap)
        b, _, frames, h, w = x.shape
        out = x.new_zeros(b, self.z_dim, (frames - 1) // 4 + 1, h // 8, w // 8)
        tiles = plan_tiles(h // 8, w // 8, tile_y // 8, tile_x // 8, overlap // 8, scale=1)
        for done, tile in enumerate(tiles, 1):
            pixels = x[..., scaled(tile.ys, 8), scaled(tile.xs, 8)]
            weight = tile.weight.to(out)
            for t, chunk in self._encode_chunks(pixels, x.device, None):
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
    ):
        """`decode` tile by tile: less memory, the same numbers up to rounding, so there is no seam.

        After the middle's attention every layer is local. Each tile is computed from all the pixels it
        depends on, as many as each stage needs, which costs time in place of a blend: with tiles of 128
        pixels about 1.9 times that of `decode`, with 256 about 1.4 times.

        Args:
            z, output_buffer: As for `decode`; without a buffer the result is float32.
            tile_x, tile_y: Latent pixels (an eighth of an image pixel each).
            overlap, tile_t, overlap_t: Not needed; time is streamed in bounded memory.
            progress: Called as progress(done, total) with tiles; may raise.

        Returns:
            `output_buffer`, as `decode`.

        Raises:
            ValueError: If the shape of `z` or of `output_buffer` or a tile size does not fit.
        """
        out = self._output(z, output_buffer, torch.float32)
        size = frames_per_chunk(None, z.device)
        whole, *local = self._decode_stages()
        h, w = z.shape[-2:]
        tiles = cut_windows(h, w, tile_y, tile_x)
        features = torch.cat([*stream([whole], [z], size)], 2)  # [B, C, T, h, w]
        for done, tile in enumerate(tiles, 1):
            near, stages = windowed(local, tile, (h, w))
            f = 0
            for chunk in stream(stages, [features[..., near[0], near[1]].clone()], size):
                place = out[..., scaled(tile[0], 8), scaled(tile[1], 8)]
                place[:, :, f : f + chunk.shape[2]] = chunk
                f += chunk.shape[2]
            report(progress, done, len(tiles))
        return out

    def _encode_chunks(self, x, device, chunk_frames):
        """Yields (latent index, means [B, z_dim, t, h, w])."""
        size = frames_per_chunk(chunk_frames, device)
        stages = self.encoder.stages()
        stages[-1].append(partial(causal_conv, self.conv1))
        frames = (chunk.to(device) for chunk in regroup([x], size))
        t = 0
        for moments in stream(stages, frames, size):
            yield t, moments[:, : self.z_dim]
            t += moments.shape[2]

    def _decode_chunks(self, z, chunk_frames):
        """Yields (frame index, pixels [B, 3, f, H, W])."""
        size = frames_per_chunk(chunk_frames, z.device)
        f = 0
        for pixels in stream(self._decode_stages(), [z], size):
            yield f, pixels
            f += pixels.shape[2]

    def _decode_stages(self):
        stages = self.decoder.stages()
        stages[0].insert(0, partial(causal_conv, self.conv2))
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


def frames_per_chunk(chunk_frames, device):
    if chunk_frames is None:
        return CHUNK_FRAMES.get(device.type, CHUNK_FRAMES["cuda"])
    if chunk_frames < 1:
        raise ValueError(f"chunk_frames = {chunk_frames}: it must be at least 1. Use 4, or None (by device).")
    return chunk_frames


def scaled(span, factor):
    return slice(span.start * factor, span.stop * factor)


def report(progress, done, total):
    if progress is not None:
        progress(done, total)
