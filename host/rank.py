"""What a worker holds: a MODEL of ours, loaded there by our own loader, and calls of its DiT."""

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..wan.dit import ApplyBlock, BlockRunner, Pass
from ..wan.files.fingerprint import fingerprint
from ..wan.option import Around, Call
from ..wan.refusal import Refusal
from ..wan.run_state import forget_states
from ..wan.shard import Shard
from .attention import attention_named
from .changes import Changes, at_step_of, with_changes
from .load import load_model
from .memory import make_room, tell_out_of_memory
from .model import CALL, SHARD, TEXTS
from .runner import pass_name


@dataclass(frozen=True)
class Recipe:
    """How to make a MODEL of ours.

    Attributes:
        path: of the checkpoint.
        weight_dtype: as of `load_model`.
        changes: what stands on it beside the file's weights.
        mark: of the file, by `fingerprint`.
        hosts_gpu: the GPU that the host computes on, by `gpu_of`.
    """

    path: Path
    weight_dtype: str
    changes: Changes
    mark: str
    hosts_gpu: str = ""


@dataclass(frozen=True)
class Asked:
    """What the DiT of a MODEL is called with, by pass where it differs between them.

    Attributes:
        x: by pass the noisy latent, and mask with image latent: [b, 16, T, h, w], [b, 20, T, h, w] or less.
        timestep, context, clip_fea, time_dim_concat: by pass, as of `HostWanModel.forward`.
        options: what of the host's transformer_options is plain data.
        texts: text features by name, of passes that do not run.
        call: our sampler's, without its attention.
        attention: name of that, or None for the model's own.
    """

    x: list[tuple[Tensor, ...]]
    timestep: Sequence[Tensor]
    context: Sequence[Tensor]
    clip_fea: Sequence[Tensor] | None
    time_dim_concat: Sequence[Tensor] | None
    options: dict[str, Any]
    texts: Mapping[str, Tensor]
    call: Call | None
    attention: str | None


def gpu_of(device: torch.device) -> str:
    """What names a GPU in every process; empty for the CPU."""
    if device.type != "cuda":
        return ""
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))


def check_file(path: Path, mark: str) -> None:
    """Whether a file is here, and the one that was meant.

    Raises:
        Refusal: it is not.
    """
    where = f"{path} on {platform.node()}"
    if not path.is_file():
        raise Refusal(f"there is no {where}", "Put the same file at the same path on every machine")
    if fingerprint(path) != mark:
        raise Refusal(
            f"{where} is another file than in ComfyUI (its size, beginning or end differs)",
            "Put the same file at the same path on every machine",
        )


def load_recipe(recipe: Recipe) -> "LoadedModel":
    """The MODEL in a worker."""
    check_file(recipe.path, recipe.mark)
    model = with_changes(load_model(recipe.path, recipe.weight_dtype), recipe.changes)
    device = gpu_of(model.load_device)
    return LoadedModel(model, bool(device) and device == recipe.hosts_gpu)


class LoadedModel:
    """A MODEL in a worker, or in its place in the host's process; see `workers.rank.Model`.

    Args:
        gives_back: whether its device is the host's, where others need room between the runs.
    """

    def __init__(self, patcher: ModelPatcher, gives_back: bool = False):
        self.patcher = patcher
        self.gives_back = gives_back
        self.is_running = False

    def call(self, asked: Asked, passes: Sequence[int], shard: Shard, watch: Callable[[], None]) -> Tensor:
        """As of `workers.rank.Model`."""
        with tell_out_of_memory():
            self._begin(asked, passes)
            at_step_of(self.patcher, asked.options | ({CALL: asked.call} if asked.call else {}))
            options = self._options(asked, passes, watch)
            device = self.patcher.load_device

            def those(parts: Sequence[Tensor] | None) -> Tensor | None:
                return None if parts is None else torch.cat([parts[i] for i in passes]).to(device)

            return self.patcher.model.diffusion_model(
                those([torch.cat(parts, dim=1) for parts in asked.x]),
                those(asked.timestep),
                those(asked.context),
                those(asked.clip_fea),
                those(asked.time_dim_concat),
                options | {SHARD: shard},
            )

    def embed_time(self, timesteps: list[float]) -> Tensor:
        """As of `wan.option.Denoiser`."""
        told = torch.tensor(timesteps, device=self.patcher.load_device)
        if not self.is_running:
            comfy.model_management.load_models_gpu([self.patcher])
        return self.patcher.model.diffusion_model.embed_time(told)

    def make_room(self) -> bool:
        """As of `host.memory.make_room`."""
        return make_room(self.patcher)

    def end(self) -> None:
        """Takes off what a run put on the model."""
        if self.is_running:
            self.patcher.cleanup()
        if self.gives_back:
            comfy.model_management.unload_all_models()
            comfy.model_management.soft_empty_cache()
        forget_states()
        self.is_running = False

    def _begin(self, asked: Asked, passes: Sequence[int]) -> None:
        if self.is_running:
            return
        batch, _, *sides = asked.x[0][0].shape
        need = self.patcher.memory_required([batch * len(passes), 16, *sides])
        comfy.model_management.load_models_gpu([self.patcher], memory_required=need)
        self.patcher.pre_run()
        self.is_running = True

    def _options(self, asked: Asked, passes: Sequence[int], watch: Callable[[], None]) -> dict[str, Any]:
        chunks = asked.options["cond_or_uncond"]
        names = tuple(pass_name(chunks[i]) for i in passes)
        call = asked.call or Call(names)
        texts = dict(asked.texts)
        for i, chunk in enumerate(chunks):
            if (name := pass_name(chunk)) in call.contexts and name not in names:
                texts[name] = asked.context[i]
        device = self.patcher.load_device
        options = {k: v.to(device) if torch.is_tensor(v) else v for k, v in asked.options.items()}
        options |= {"cond_or_uncond": [chunks[i] for i in passes], TEXTS: texts}
        attention = None if asked.attention is None else attention_named(self.patcher, asked.attention)
        around = (*call.around, _watched(watch))
        return options | {CALL: replace(call, pass_names=names, attention=attention, around=around)}


def _watched(watch: Callable[[], None]) -> Around:
    """A runner around the runner, which says of each block that it begins."""

    def around(runner: BlockRunner) -> BlockRunner:
        def run(num_blocks: int, passes: list[Pass], apply_block: ApplyBlock) -> None:
            def watched(i: int, p: Pass) -> Tensor:
                watch()
                return apply_block(i, p)

            runner(num_blocks, passes, watched)

        return run

    return around
