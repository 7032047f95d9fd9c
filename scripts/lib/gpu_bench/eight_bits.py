"""A step with the weights of one file in every dtype that our loader offers below 16 bits."""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..peers import random_dit
from .bench import PASSES, Bench, Missing, Race, Row, few_blocks
from .dit import inputs, tera_operations


def rows(bench: Bench) -> Iterator[Row]:
    """By way of the file and Wan21ModelLoader's own function; `default`, 16 bits on CUDA, comes first."""
    import comfy.model_management
    from safetensors.torch import save_file
    from wan21 import host

    size = few_blocks(bench.size)
    names = ["default", *(name for name in host.WEIGHT_DTYPES if name not in host.DTYPES)]
    given, work = inputs(bench), tera_operations(size) / size.scale
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "wan21-random.safetensors"
        weights = random_dit(size.config, bench.device, bench.dtype).state_dict()
        save_file({key: value.cpu() for key, value in weights.items()}, path)
        del weights
        bench.clear()
        for name in names:  # two at a time: where memory is short the host would take others off the device
            both = dict.fromkeys(("default", name))
            makers = {key: partial(_loaded, path, key, given) for key in both}
            yield bench.race(Race(makers, scale=size.scale, work=work))[-1]
            comfy.model_management.unload_all_models()


def _loaded(path: Path, name: str, given: tuple[Tensor, ...]) -> Callable[[], Any]:
    import comfy.model_management
    from wan21 import host
    from wan21.wan.refusal import Refusal

    try:
        patcher = host.load_model(path, name)
    except Refusal as refusal:
        raise Missing(refusal.problem) from refusal
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    dtype = patcher.model.get_dtype_inference()
    x, timestep, text, clip = given
    dit = patcher.model.diffusion_model
    # The host's name of the passes, by which our model knows that there are two.
    options = {"cond_or_uncond": list(range(len(PASSES)))}

    def call() -> Tensor:
        return dit(x, timestep, text.to(dtype), clip.to(dtype), transformer_options=options)

    call.patcher = patcher  # pyright: ignore[reportFunctionMemberAccess] (the host keeps a weak reference)
    return call
