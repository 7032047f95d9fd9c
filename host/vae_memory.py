"""The memory that our VAE takes on a device: weights brought there, and what else there is room for."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import comfy.model_management
import comfy.sd
import torch
from comfy import memory_management
from comfy.model_prefetch import cleanup_prefetched_modules
from comfy_aimdo import model_vbar

from ..wan.vae import WanVAE
from ..wan.vae.fallback import on_cpu
from ..wan.vae.memory import LONG_CHUNK, choose_tile, decode_bytes
from ..wan.vae.tiling import Window
from .memory import raise_unless_out_of_memory

T = TypeVar("T")


def in_long_chunks(device: torch.device, needed: float, run: Callable[[int | None], T]) -> T:
    """What `run` gives, called with `LONG_CHUNK` frames at once on a GPU with room for that, else with None.

    Where the room was not there after all it is run again with None. The host would go on in tiles, and its
    tiles for an encode give other numbers.

    Args:
        needed: bytes beside the weights.
    """
    if device.type == "cuda" and needed <= _free_bytes(device):
        try:
            return run(LONG_CHUNK)
        except Exception as error:
            raise_unless_out_of_memory(error)
        comfy.model_management.soft_empty_cache()  # here: the error held the tensors
    return run(None)


def _free_bytes(device: torch.device) -> float:
    """What is free on a device, as the host counts it for models: also what its dynamic memory gives back."""
    free = comfy.model_management.get_free_memory(device)
    assert isinstance(free, (int, float))  # a pair only where it is asked for
    return free + (model_vbar.vbars_analyze(device.index) if memory_management.aimdo_enabled else 0)


class DecodeNeed:
    """The memory of a decode on the device of a VAE.

    Args:
        vae, model: ours, and the model in it.
        shape: of the latent, [B, 16, T, h, w].
        tile_size: as for `decode_video`.
        held_frames, window: as for `decode_bytes`.
    """

    def __init__(
        self,
        vae: comfy.sd.VAE,
        model: WanVAE,
        shape: Sequence[int],
        tile_size: str,
        held_frames: int = 0,
        window: Window | None = None,
    ):
        self.vae, self.model, self.tile_size = vae, model, tile_size
        self.size = (model, shape[-2], shape[-1], vae.device)
        self.given = {
            "itemsize": model.decode_dtype.itemsize, "held_frames": held_frames, "window": window,
        }  # fmt: skip
        tile = None if tile_size == "auto" else int(tile_size)
        self.bytes = decode_bytes(*self.size, tile=tile, **self.given)

    def load(self) -> None:
        """Brings the weights to the device, with room beside them."""
        vae = self.vae
        comfy.model_management.load_models_gpu(
            [vae.patcher], memory_required=self.bytes, force_full_load=vae.disable_offload
        )

    def chunk_frames(self, tile: int | None, taken: int) -> int | None:
        """Frames at once in tiles of so many pixels: more than usual on a GPU with room for them."""
        needed = decode_bytes(*self.size, tile=tile, chunk_frames=LONG_CHUNK, **self.given)
        device = self.vae.device
        roomy = device.type == "cuda" and needed + taken <= self.vae.patcher.get_free_memory(device)
        return LONG_CHUNK if roomy else None

    def tile(self, taken: int, say: Callable[[str], None]) -> int | None:
        """Pixels of a tile to begin with; None and 0 are whole frames.

        Args:
            taken: bytes of the device that are not free for it.
            say: called with a sentence if memory alone asks for tiles.
        """
        if self.tile_size != "auto":
            return int(self.tile_size)
        free = self.vae.patcher.get_free_memory(self.vae.device) - taken
        tile = choose_tile(*self.size, free_bytes=free, **self.given)
        if tile:
            say(
                f"decodes tiles of {tile} pixels: whole frames take {self.bytes / 2**30:.2f} GiB, "
                f"{free / 2**30:.2f} GiB are free"
            )
        return tile

    def retreat(self, say: Callable[[str], None]) -> Callable[[str], None]:
        """What frees memory and says so, as of `decode_within_memory`."""

        def retreat(sentence: str) -> None:
            say(sentence)
            if self.vae.patcher.is_dynamic():  # as in memory.make_room
                cleanup_prefetched_modules(self.model.modules())
            comfy.model_management.soft_empty_cache()

        return retreat

    def last_resort(self) -> Callable[[], WanVAE] | None:
        """The same VAE on the CPU, unless it is there."""
        return None if self.vae.device.type == "cpu" else partial(on_cpu, self.model)
