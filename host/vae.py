"""Our VAE inside a standard VAE."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import torch
from comfy.cli_args import args
from comfy.ldm.modules.diffusionmodules.model import vae_attention
from torch import Tensor

from ..wan import files
from ..wan.kernels import describe
from ..wan.vae import WanVAE
from ..wan.vae.cuda import kernel_choices, suits
from ..wan.vae.fallback import decode_within_memory
from ..wan.vae.layers import AttendFrame, AttentionBlock, attend_frame
from ..wan.vae.memory import LONG_CHUNK, decode_bytes, encode_bytes
from .load import DTYPES
from .memory import need_host_bytes
from .operations import lending
from .progress import Progress, check_cancelled, tell, tell_left_out
from .reader import read_checkpoint
from .stored import spoilt_weight
from .vae_memory import DecodeNeed, in_long_chunks

Device: TypeAlias = torch.device | str | None


_logged: set[tuple[torch.device, torch.dtype]] = set()


class DecodedElsewhere(Protocol):
    """Where a VAE is decoded: see `host.decode`."""

    def decode(self, z: Tensor, out: Tensor, tile_size: str) -> bool:
        """Decodes a latent into `out`; False: nobody is left to do it, and there is room to do it here.

        Args:
            z, out: as for `decode_within_memory`, of whole frames.
            tile_size: as for `decode_video`.
        """
        ...


class HostWanVAE(WanVAE):
    """Our VAE as the host's `comfy.sd.VAE` calls it, with the host's progress and cancel.

    Args:
        dim: as for `WanVAE`.
        encode_dtype, decode_dtype: what each way is computed in, whatever dtype its input has.
        attend: the attention among the pixels of a frame.

    Attributes:
        loaded_from: file and precision, as for `load_vae`.
        elsewhere: where it is decoded, if not here: a `DecodedElsewhere`.
    """

    loaded_from: tuple[Path, str]
    elsewhere: Any = None
    comfy_has_chunked_io = True  # the host gives decode() the final image's buffer, encode() a device

    def __init__(
        self,
        dim: int,
        encode_dtype: torch.dtype,
        decode_dtype: torch.dtype,
        attend: AttendFrame = attend_frame,
    ):
        super().__init__(dim, operations=lending(comfy.ops.disable_weight_init), dtype=decode_dtype)
        for part in self.modules():
            if isinstance(part, AttentionBlock):
                part.attend = attend
        self.encode_dtype, self.decode_dtype = encode_dtype, decode_dtype
        self.encoder.to(encode_dtype)
        self.conv1.to(encode_dtype)

    def log_kernels(self, device: torch.device, dtype: torch.dtype) -> None:
        """Says once in the log which kernels are taken on a GPU, and why others are not."""
        if suits(device, dtype.itemsize) and (device, dtype) not in _logged:
            _logged.add((device, dtype))
            said = describe(kernel_choices(device, dtype, self.dim))
            logging.info("Wan2.1 VAE in %s on %s, kernels: %s", dtype, device, said)

    def is_plain(self, conv: Any) -> bool:
        return not (conv.weight_function or conv.bias_function)  # patches that act inside forward()

    def encode(self, x: Tensor, device: Device = None, **options: Any) -> Tensor:
        x, on = whole_latents(x), torch.device(device or x.device)
        self.log_kernels(on, self.encode_dtype)
        x, encode = x.to(self.encode_dtype), super().encode
        needed = math.inf  # of what is no clip, and refused
        if x.ndim == 5:
            batch, _, frames, height, width = x.shape
            needed = batch * encode_bytes(self, frames, height, width, on, x.element_size(), LONG_CHUNK)

        def run(chunk_frames: int | None) -> Tensor:
            return encode(x, device, chunk_frames=chunk_frames, **_watched(options))

        return in_long_chunks(on, needed, run)

    def decode(self, z: Tensor, output_buffer: Tensor | None = None, **options: Any) -> Tensor:
        if self.elsewhere is not None:
            output_buffer = self._output(z, output_buffer, z.dtype)
            if self.elsewhere.decode(z, output_buffer, "auto"):
                return output_buffer
        self.log_kernels(z.device, self.decode_dtype)
        z, decode = z.to(self.decode_dtype), super().decode
        needed = math.inf
        if z.ndim == 5:
            batch, height, width = len(z), *z.shape[3:]
            needed = batch * decode_bytes(self, height, width, z.device, chunk_frames=LONG_CHUNK)

        def run(chunk_frames: int | None) -> Tensor:
            return decode(z, output_buffer, chunk_frames=chunk_frames, **_watched(options))

        return in_long_chunks(z.device, needed, run)

    def encode_tiled(
        self,
        x: Tensor,
        tile_x: int = 256,
        tile_y: int = 256,
        overlap: int = 64,
        tile_t: int | None = None,
        overlap_t: int | None = None,
        **options: Any,
    ) -> Tensor:
        """As `WanVAE.encode_tiled`.

        Args:
            tile_t, overlap_t: ignored. Time is streamed exactly, in bounded memory, and a cut without the
                causal past would begin a new clip.
        """
        x = whole_latents(x).to(self.encode_dtype)
        return super().encode_tiled(x, tile_x, tile_y, overlap, **_watched(options))

    def decode_tiled(
        self,
        z: Tensor,
        tile_x: int = 32,
        tile_y: int = 32,
        overlap: int | None = None,
        tile_t: int | None = None,
        overlap_t: int | None = None,
        **options: Any,
    ) -> Tensor:
        """As `WanVAE.decode_tiled`.

        Args:
            overlap: ignored, since each tile is computed from all it depends on.
            tile_t, overlap_t: ignored, as for `encode_tiled`.
        """
        if self.elsewhere is not None:
            out = self._output(z, options.pop("output_buffer", None), torch.float32)
            if self.elsewhere.decode(z, out, str(8 * min(tile_x, tile_y))):
                return out
            options["output_buffer"] = out
        return super().decode_tiled(z.to(self.decode_dtype), tile_x, tile_y, **_watched(options))


def whole_latents(x: Tensor) -> Tensor:
    """Pixels [B, 3, F, H, W] without the last frames that do not fill a latent, as the native class encodes.

    What is left out is told: of F frames 4n+1 are left, at most three fewer.
    """
    frames = x.shape[2] if x.ndim == 5 else 1
    rest = (frames - 1) % 4 if frames else 0
    if not rest:
        return x
    tell(
        f"the VAE encodes 4n+1 frames: of {frames} the last {rest} {'is' if rest == 1 else 'are'} left out, "
        f"{frames - rest} remain"
    )
    return x[:, :, : frames - rest]


def _watched(options: dict[str, Any]) -> dict[str, Any]:
    return {"progress": Progress(), "check": check_cancelled} | options


def frame_attention(device: torch.device) -> AttendFrame:
    """The attention of a VAE on a device: PyTorch's on the CPU and where the host trusts it for a VAE.

    Elsewhere (AMD, Apple, DirectML, or by a start option) it is the host's, which works in slices as large as
    memory allows: PyTorch's would make the matrix of all scores there, or crash, as the host says of AMD.
    """
    if device.type == "cpu" or comfy.model_management.pytorch_attention_enabled_vae():
        return attend_frame
    of_the_host = vae_attention()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = of_the_host(*(t[0].transpose(1, 2) for t in (q, k, v)))  # [1, C, H W]
        return found.transpose(1, 2)[None]

    return attend


def load_vae(path: str | Path, precision: str = "auto") -> comfy.sd.VAE:
    """A standard VAE from a Wan2.1 VAE of any published layout.

    Args:
        path: see `wan.files.read_checkpoint`.
        precision: auto encodes in float32, as the release does, and decodes in the host's choice for the
            device; or a name of `DTYPES`, or the host's own flag, for both.

    Raises:
        Refusal: the file is damaged or something else.
    """
    state_dict = files.to_wan_vae_keys(read_checkpoint(path).state_dict)
    dim = files.vae_dim(state_dict)
    with torch.device("meta"):
        expected = {k: tuple(v.shape) for k, v in WanVAE(dim=dim).state_dict().items()}
    left_out = files.check_keys(expected, state_dict)  # before memory is taken by what the file states
    tell_left_out(Path(path).name, left_out)
    state_dict = {key: value for key, value in state_dict.items() if key in expected}
    vae: Any = comfy.sd.VAE(sd=dict(state_dict), dtype=DTYPES.get(precision))
    decode_dtype = vae.vae_dtype
    if precision == "auto" and not (args.bf16_vae or args.fp16_vae):
        vae.vae_dtype = torch.float32  # what the host hands pixels and latents over in
    model = HostWanVAE(
        dim, encode_dtype=vae.vae_dtype, decode_dtype=decode_dtype, attend=frame_attention(vae.device)
    ).eval()
    comfy.model_management.archive_model_dtypes(model)
    patcher = comfy.model_patcher.CoreModelPatcher(
        model, load_device=vae.device, offload_device=comfy.model_management.vae_offload_device()
    )
    model.load_state_dict(state_dict, assign=patcher.is_dynamic())
    model.loaded_from = (Path(path).resolve(), precision)
    vae.first_stage_model = model  # pyright: ignore[reportAttributeAccessIssue] (the host lists its own)
    vae.patcher, vae.handles_tiling = patcher, True
    _set_estimates(vae, model, vae.device)
    return vae


def _set_estimates(vae, model, device):
    """What the host's manager is asked for: bytes of one clip [B, C, frames, height, width]."""

    def encode(shape, dtype):
        frames, height, width = shape[2:]
        return encode_bytes(model, frames, height, width, device, model.encode_dtype.itemsize)

    def decode(shape, dtype):
        height, width = shape[3:]
        return decode_bytes(model, height, width, device, itemsize=model.decode_dtype.itemsize)

    vae.memory_used_encode, vae.memory_used_decode = encode, decode


def _ours(vae: comfy.sd.VAE) -> HostWanVAE | None:
    """Our model in a VAE; None in one of another loader."""
    model: Any = vae.first_stage_model
    return model if isinstance(model, HostWanVAE) else None


def encode_video(vae: comfy.sd.VAE, video: Tensor, tile_size: str) -> Tensor:
    """Latent of a clip, [F, H, W, 3] in [0, 1] -> [1, 16, T, H/8, W/8]; sides are multiples of 8.

    The host would bring the whole clip to the device before it is cut into tiles; ours go there by chunks.
    """
    if tile_size in ("auto", "0"):
        return vae.encode(video)
    tile, model = int(tile_size), _ours(vae)
    if model is None:
        return vae.encode_tiled(video, tile_x=tile, tile_y=tile, overlap=tile // 4)
    vae.throw_exception_if_invalid()
    device = vae.device
    frames, height, width = video.shape[:3]
    needed = encode_bytes(
        model, frames, min(tile, height), min(tile, width), device, model.encode_dtype.itemsize
    )
    comfy.model_management.load_models_gpu(
        [vae.patcher], memory_required=needed, force_full_load=vae.disable_offload
    )
    with comfy.model_management.cuda_device_context(device):
        x = vae.process_input(video.movedim(-1, 0)[None]).to(vae.vae_dtype)
        latent = model.encode_tiled(x, tile_x=tile, tile_y=tile, overlap=tile // 4, device=device)
    return latent.to(vae.output_device, vae.vae_output_dtype())


def decode_video(vae: comfy.sd.VAE, samples: Tensor, tile_size: str, say: Callable[[str], None]) -> Tensor:
    """The frames of a video latent, in as much memory as there is.

    A VAE of another loader is decoded as the host does it, which has its own answer to a lack of memory.

    Args:
        vae: ours, or another loader's.
        samples: [B, 16, T, h, w], raw.
        tile_size: "auto", or pixels as text; "0" is whole frames.
        say: called with one sentence on how it is done.

    Returns:
        [B, F, H, W, 3] in [0, 1].
    """
    model = _ours(vae)
    if model is not None:
        vae.throw_exception_if_invalid()
        with comfy.model_management.cuda_device_context(vae.device):
            return _decode_ours(vae, model, samples, tile_size, say)
    if tile_size in ("auto", "0"):
        return vae.decode(samples)
    tile = int(tile_size) // cast(int, vae.spacial_compression_decode())
    return vae.decode_tiled(samples, tile_x=tile, tile_y=tile, overlap=tile // 4)


def _decode_ours(
    vae: comfy.sd.VAE, model: HostWanVAE, samples: Tensor, tile_size: str, say: Callable[[str], None]
) -> Tensor:
    device = vae.device
    shape, dtype = model.decode_output_shape(samples.shape), vae.vae_output_dtype()
    if vae.output_device.type == "cpu":
        what = f"{shape[0] * shape[2]} frames of {shape[4]}x{shape[3]}"
        need_host_bytes(math.prod(shape) * dtype.itemsize, what, "Close other programs or add swap")
    if model.elsewhere is not None:
        out = torch.empty(shape, device=vae.output_device, dtype=dtype)
        if model.elsewhere.decode(samples, out, tile_size):
            return vae.process_output(out).movedim(1, -1)
        del out
    held = samples.shape[2] if vae.output_device.type == device.type else 0
    need = DecodeNeed(vae, model, samples.shape, tile_size, held)
    need.load()
    out = torch.empty(shape, device=vae.output_device, dtype=dtype)
    taken = out.nbytes if out.device == device else 0
    tile = need.tile(taken, say)
    model.log_kernels(device, model.decode_dtype)
    decode_within_memory(
        model,
        samples.to(device, model.decode_dtype),
        out,
        tile,
        need.retreat(say),
        need.last_resort(),
        Progress(),
        check_cancelled,
        chunk_frames=need.chunk_frames(tile, taken),
    )
    return vae.process_output(out).movedim(1, -1)


def why_nan(vae: comfy.sd.VAE) -> str:
    """Why a VAE makes NaN of a latent of numbers, and what to do."""
    model: Any = vae.first_stage_model
    if spoilt := spoilt_weight(model):
        return f"{spoilt} in the VAE's file holds NaN or infinite numbers. Get the file again"
    return "the decode overflowed in 16 bits. Set precision to fp32 on Wan21VAELoader"


def vae_shape(vae: comfy.sd.VAE) -> tuple[int, int, int]:
    """(latent channels, latent dimensions, spatial compression), for the checks."""
    return vae.latent_channels, vae.latent_dim, cast(int, vae.spacial_compression_encode())


def latent_device() -> torch.device:
    """Where the host keeps latents between nodes."""
    return comfy.model_management.intermediate_device()
