"""Both passes jointly through each block, one after the other, or stacked; weights resident or streamed."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..peers import random_dit
from .bench import Bench, Race, Row, few_blocks
from .dit import inputs, ways


def rows(bench: Bench) -> Iterator[Row]:
    """All weights on the device."""
    size = bench.size
    model = random_dit(size.config, bench.device, bench.dtype)
    calls = ways(model, inputs(bench))
    yield from bench.race(
        Race({name: lambda call=call: call for name, call in calls.items()}, scale=size.scale)
    )


def streamed(bench: Bench) -> Iterator[Row]:
    """Weights in the computer's memory, which each layer fetches at each call, as the host streams them.

    At all tokens and at a quarter of them: what is fetched is the same, and hides behind less.
    """
    size = few_blocks(bench.size)
    resident = random_dit(size.config, bench.device, bench.dtype)
    away = _in_host_memory(resident, bench)
    frames, height, width = size.latent
    for part in (size, replace(size, latent=(frames, height // 2, width // 2))):
        given = inputs(bench, part)
        calls = {"resident": ways(resident, given)["joint"]}
        calls |= {f"streamed, {name}": call for name, call in ways(away, given).items()}
        makers = {f"{part.tokens} tokens, {name}": lambda call=call: call for name, call in calls.items()}
        notes = {} if bench.on_cuda else dict.fromkeys(makers, "nothing is fetched on a CPU")
        yield from bench.race(Race(makers, scale=size.scale, notes=notes))


def _in_host_memory(model: nn.Module, bench: Bench) -> nn.Module:
    """The same model with the host's layers that fetch, its weights in memory that the device can read."""
    from wan21.host.operations import casting_operations, lending
    from wan21.wan.dit import WanModel

    weights = {key: value.cpu() for key, value in model.state_dict().items()}
    if bench.on_cuda:
        weights = {key: value.pin_memory() for key, value in weights.items()}
    config: Any = model.config
    with torch.device("meta"):
        away = WanModel(config, lending(casting_operations(bench.device)))
    away.load_state_dict(weights, assign=True)
    return away.eval().requires_grad_(False)
