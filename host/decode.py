"""A VAE whose decodes are shared by workers, each with a window of the frame; see `wan.vae.spread`."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import comfy.model_management
import comfy.sd
import torch
from torch import Tensor

from ..wan.files.fingerprint import fingerprint
from ..wan.refusal import Refusal
from ..wan.vae.fallback import Piece, Retreat, decode_pieces
from ..wan.vae.spread import spread_windows
from .progress import Progress, check_cancelled, tell
from .rank import check_file, gpu_of
from .vae import HostWanVAE, load_vae
from .vae_memory import DecodeNeed

Place = tuple[int, ...]  # sample, rows from, to, columns from, to, first pixel frame


@dataclass(frozen=True)
class VaeRecipe:
    """How to make a VAE of ours.

    Attributes:
        path, precision: as of `load_vae`.
        mark: of the file, by `fingerprint`.
        hosts_gpu: the GPU that the host computes on, by `gpu_of`.
    """

    path: Path
    precision: str
    mark: str
    hosts_gpu: str


@dataclass(frozen=True)
class AskedDecode:
    """What a VAE is to decode.

    Attributes:
        latent: [B, 16, T, h, w], raw.
        tile_size: as for `decode_video`.
    """

    latent: Tensor
    tile_size: str


def load_vae_recipe(recipe: VaeRecipe) -> "LoadedVae":
    """The VAE in a worker."""
    check_file(recipe.path, recipe.mark)
    vae = load_vae(recipe.path, recipe.precision)
    device = gpu_of(vae.device)
    return LoadedVae(vae, bool(device) and device == recipe.hosts_gpu)


class LoadedVae:
    """A VAE in a worker; see `workers.rank.Decoder`.

    Args:
        gives_back: whether its device is the host's, where others need room between the decodes.
    """

    def __init__(self, vae: comfy.sd.VAE, gives_back: bool = False):
        self.vae: Any = vae
        self.model: HostWanVAE = self.vae.first_stage_model
        self.gives_back = gives_back

    def pieces(
        self, asked: AskedDecode, place: Place, watch: Callable[[], None]
    ) -> Iterator[tuple[Place, Tensor, list[str]]]:
        """As of `workers.rank.Decoder`."""
        sample, top, bottom, left, right, _ = place
        device, window = self.vae.device, (slice(top, bottom), slice(left, right))
        latent = asked.latent[sample : sample + 1]
        said: list[str] = []

        def put(piece: Piece, pixels: Tensor) -> tuple[Place, Tensor, list[str]]:
            rows, columns = piece.rows, piece.columns
            at = (sample, rows.start, rows.stop, columns.start, columns.stop, piece.first)
            told, said[:] = [*said], []
            return at, pixels.cpu(), told

        need = DecodeNeed(self.vae, self.model, latent.shape, asked.tile_size, window=window)
        need.load()
        tile = need.tile(0, said.append)
        go_on = need.retreat(said.append), need.last_resort(), need.chunk_frames(tile, 0)
        retreat = Retreat(torch.device("cpu"), *go_on)
        z = latent.to(device, self.model.decode_dtype)
        yield from decode_pieces(self.model, z, put, tile, retreat, watch, window)

    def end(self) -> None:
        """As of `workers.rank.Model`."""
        if self.gives_back:
            comfy.model_management.unload_all_models()
            comfy.model_management.soft_empty_cache()


class Decoders(Protocol):
    """Who decodes: see `workers.remote.RemoteVae`."""

    def start(self, check: Callable[[], object]) -> int: ...

    def decode(
        self,
        asked: object,
        places: Sequence[Place],
        take: Callable[[Place, Tensor, list[str]], None],
        check: Callable[[], object],
    ) -> None: ...

    def report(self) -> list[str]: ...

    def end(self) -> None: ...


class SharedDecode:
    """What decodes in the place of a VAE; see `vae.DecodedElsewhere`.

    Args:
        vae: ours, which decodes where no worker is left.
    """

    def __init__(self, vae: comfy.sd.VAE, decoders: Decoders):
        self.vae: Any = vae
        self.decoders = decoders

    def decode(self, z: Tensor, out: Tensor, tile_size: str) -> bool:
        """As of `vae.DecodedElsewhere`."""
        if self.vae.device.type == "cuda":  # for the worker on it
            comfy.model_management.free_memory(1e30, self.vae.device)
            comfy.model_management.soft_empty_cache()
        try:
            places = self._places(z, self.decoders.start(check_cancelled))
            take = _Taken(out)
            self.decoders.decode(AskedDecode(z.cpu(), tile_size), places, take, check_cancelled)
            return True
        except ConnectionError as error:
            tell(f"{error}. This decode goes on without workers, on {self.vae.device}")
            DecodeNeed(self.vae, self.vae.first_stage_model, z.shape, tile_size).load()
            return False
        finally:
            for sentence in self.decoders.report():
                tell(sentence)
            self.decoders.end()

    def _places(self, z: Tensor, devices: int) -> list[Place]:
        h, w = z.shape[-2:]
        windows = spread_windows(self.vae.first_stage_model, h, w, devices)
        return [
            (sample, rows.start, rows.stop, columns.start, columns.stop, 0)
            for sample in range(len(z))
            for rows, columns in windows
        ]


class _Taken:
    """Puts what comes into its place in `out`, [B, 3, F, H, W], and moves the node's bar."""

    def __init__(self, out: Tensor):
        self.out = out
        self.seen: set[Place] = set()
        self.done = 0
        self.progress = Progress()

    def __call__(self, place: Place, pixels: Tensor, said: list[str]) -> None:
        sample, top, bottom, left, right, first = place
        frames = slice(first, first + pixels.shape[1])
        self.out[sample, :, frames, 8 * top : 8 * bottom, 8 * left : 8 * right] = pixels
        for sentence in said:
            tell(sentence)
        if place not in self.seen:  # a window that was lost comes again
            self.seen.add(place)
            self.done += pixels[0].numel()
        batch, _, count, height, width = self.out.shape
        self.progress(min(self.done // (height * width), batch * count), batch * count)


def vae_recipe_of(vae: comfy.sd.VAE) -> tuple[Callable[[VaeRecipe], LoadedVae], tuple[VaeRecipe]]:
    """(factory, arguments) by which a worker makes a VAE of ours.

    Raises:
        Refusal: it is none, or something on it cannot be sent.
    """
    model: Any = vae.first_stage_model
    if not isinstance(model, HostWanVAE):
        raise Refusal(
            "the VAE was not loaded by Wan21VAELoader",
            "Load it with Wan21VAELoader, or leave vae unconnected",
        )
    if model.elsewhere is not None:
        raise Refusal("the VAE comes from a Wan21Workers already", "Remove one of the two")
    patcher = vae.patcher
    if patcher.patches or patcher.object_patches:
        raise Refusal("another node changes the VAE, which workers cannot be sent", "Remove that node")
    path, precision = model.loaded_from
    return load_vae_recipe, (VaeRecipe(path, precision, fingerprint(path), gpu_of(vae.device)),)


def shared_vae(vae: comfy.sd.VAE, decoders: Decoders) -> comfy.sd.VAE:
    """A VAE of ours that workers decode; what it encodes is encoded here, by the weights of `vae`."""
    shared: Any = copy.copy(vae)
    model: Any = copy.copy(vae.first_stage_model)
    model.elsewhere = SharedDecode(vae, decoders)
    shared.first_stage_model = model
    shared.memory_used_decode = lambda shape, dtype: 1  # a byte: the host divides by it
    return shared
