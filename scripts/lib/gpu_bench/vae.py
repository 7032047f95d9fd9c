"""VAE encode and decode of a clip: native, diffusers and ours, whole, in other chunks and in tiles."""

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ..peers import decode, encode, peer_vae, random_vae
from .bench import Bench, Race, Row
from .kernels import in_eager

CHUNKS = (4, 8)
TILES = (512, 256)  # pixels


def rows(bench: Bench) -> Iterator[Row]:
    """The peers compute in the dtype that the host takes here. Ours is put beside native.

    The encoder of ours runs in float32 by default, as the release's, and so has a row for each dtype.
    """
    frames, height, width = bench.size.clip
    ours = random_vae(bench.size.vae_dim, bench.device, bench.dtype)
    yield from bench.race(Race(_decoding(bench, ours, (frames - 1) // 4 + 1, height // 8, width // 8)))
    yield from bench.race(Race(_encoding(bench, ours, frames, height, width)))


def _decoding(bench: Bench, ours: Any, *sides: int) -> dict[str, Callable[[], Callable]]:
    z = bench.random(1, 16, *sides)
    makers = {
        f"decode, {name}": lambda name=name: partial(decode, peer_vae(name, ours), name, z)
        for name in ("native", "diffusers")
    }
    makers["decode, ours"] = lambda: partial(ours.decode, z)
    makers["decode, ours without kernels"] = lambda: in_eager(ours.decode, z)
    makers["decode, ours in the plain way"] = lambda: partial(_in_the_plain_way, ours, z)
    for chunk in CHUNKS:
        makers[f"decode, ours, {chunk} frames at once"] = lambda chunk=chunk: partial(
            ours.decode, z, chunk_frames=chunk
        )
    for tile in TILES:
        # Tiles are in latent pixels here; a clip that is smaller than one is cut in two.
        side = min(tile // 8, max(1, max(sides[1:]) // 2))
        makers[f"decode, ours, tiles of {tile}"] = lambda side=side: partial(ours.decode_tiled, z, side, side)
    return makers


def _in_the_plain_way(ours: Any, z: torch.Tensor) -> torch.Tensor:
    """As on other devices: without channels last, phases and kernels."""
    module: Any = importlib.import_module("wan21.wan.vae.cuda")
    suits = module.suits
    module.suits = lambda device, itemsize: False
    try:
        return ours.decode(z)
    finally:
        module.suits = suits


def _encoding(bench: Bench, ours: Any, *sides: int) -> dict[str, Callable[[], Callable]]:
    x = bench.random(1, 3, *sides, scale=0.3).clamp(-1, 1)
    makers = {
        f"encode, {name}": lambda name=name: partial(encode, peer_vae(name, ours), name, x)
        for name in ("native", "diffusers")
    }
    makers["encode, ours"] = lambda: partial(ours.encode, x)
    if bench.dtype != torch.float32:

        def in_float32() -> Callable:
            exact = random_vae(bench.size.vae_dim, bench.device, torch.float32)
            exact.load_state_dict(ours.state_dict())
            return partial(exact.encode, x.float())

        makers["encode, ours in float32"] = in_float32
    return makers
