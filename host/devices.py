"""Several GPUs of this process: the copies of a MODEL that the host's MultiGPU CFG Split makes for them."""

from collections.abc import Sequence
from dataclasses import replace
from threading import Event
from typing import Any, Protocol

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.multigpu import MultiGPUThreadPool
from comfy_api.torch_helpers.torch_compile import TORCH_COMPILE_KWARGS
from torch import Tensor

from ..wan.config import WanConfig
from ..wan.dit import ApplyBlock, BlockRunner, Pass
from ..wan.option import Around, Call, Denoiser, EmbedTime
from ..wan.out_of_memory import OutOfMemoryError, OutOfMemoryOn

KEY = "multigpu"  # the host's, of these copies among the models that a MODEL takes along


def patchers_of(model: ModelPatcher) -> list[ModelPatcher]:
    """A MODEL and its copies, each with weights of its own on a device of its own."""
    return [model, *model.get_additional_models_with_key(KEY)]


def devices_of(model: ModelPatcher) -> list[torch.device]:
    """The devices of `patchers_of`."""
    return [one.load_device for one in patchers_of(model)]


def gpu_count(model: ModelPatcher) -> int:
    """GPUs of the kind that a MODEL is on; 0 on the CPU."""
    return torch.cuda.device_count() if model.load_device.type == "cuda" else 0


def spread(model: ModelPatcher, pass_names: Sequence[str]) -> tuple[ModelPatcher, list[str]]:
    """A MODEL for a run of these passes, with as many copies as have a pass of their own.

    Returns:
        The MODEL, and a sentence if copies were left out, which are then not loaded.
    """
    copies = patchers_of(model)[1:]
    compiled = TORCH_COMPILE_KWARGS in model.model_options
    used = 0 if compiled else len(pass_names) - 1
    if len(copies) <= used:
        return model, []
    whole, model = devices_of(model), model.clone()
    model.set_additional_models(KEY, copies[:used])
    busy, idle = (" and ".join(map(str, some)) for some in (whole[: used + 1], whole[used + 1 :]))
    if compiled:
        why = "the MODEL is compiled, and compiled code holds the weights of one device"
        idle += " (to use it too, remove the node that compiles)"
    else:
        why = f"a step has {'one pass' if used == 0 else f'{used + 1} passes'}"
        why += ", guidance_scale being 1" if used == 0 else ""
    return model, [f"MultiGPU CFG Split: {why}; computed on {busy}, not on {idle}"]


class OnDevice(Denoiser, Protocol):
    """A denoiser on one device, which can let go of what that holds beside a step."""

    device: torch.device

    def make_room(self) -> bool: ...


class OnDevices:
    """A `wan.option.Denoiser` of several, each with the model on a device of its own: passes run at once.

    The same passes go to the same device in every step, where TeaCache then finds its residuals.

    Args:
        denoisers: the first has the device of the latent.
        pool: a thread for each of their devices.

    Attributes:
        computed: device by name of pass, of those that have run.
    """

    config: WanConfig
    embed_time: EmbedTime

    def __init__(self, denoisers: Sequence[OnDevice], pool: MultiGPUThreadPool):
        self.denoisers = denoisers
        self.pool = pool
        self.config = denoisers[0].config
        self.embed_time = denoisers[0].embed_time
        self.computed: dict[str, torch.device] = {}
        self._ran_out: list[OnDevice] = []

    def make_room(self) -> bool:
        """Lets go of what those devices hold beside a step that had too little; False: nothing was left."""
        made = [one.make_room() for one in self._ran_out]
        return any(made)

    def predict(self, x: Tensor, timestep: float, call: Call) -> dict[str, Tensor]:
        """The velocity of each pass, on the device of x. Where one fails, the others stop within a block."""
        stop = Event()
        count = len(self.denoisers)
        shares = [(one, call.pass_names[i::count]) for i, one in enumerate(self.denoisers)]
        shares = [(one, names) for one, names in shares if names]
        modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        call = replace(call, around=(*call.around, _until(stop)))
        for one, names in shares:
            own = replace(call, pass_names=names)
            self.pool.submit(one.device, _predict_in_thread, one, (x, timestep, own), modes, stop)
        results = [self.pool.get_result(one.device) for one, _ in shares]
        self._ran_out = [
            one for (one, _), (_, error) in zip(shares, results) if isinstance(error, OutOfMemoryError)
        ]
        errors = [error for _, error in results if error is not None and not isinstance(error, _Stopped)]
        try:
            if errors:
                raise min(errors, key=_rank)
            self.computed |= {name: one.device for one, names in shares for name in names}
            return {name: v for velocities, _ in results for name, v in velocities.items()}
        finally:
            del errors, results  # an error in them holds the tensors of its step, and this frame


class _Stopped(Exception):
    """The pass of another device has failed."""


def _rank(error: BaseException) -> bool:
    """Least for a cancel: it is told once, and a step that ran out of memory would be done again."""
    return not isinstance(error, comfy.model_management.InterruptProcessingException)


def _predict_in_thread(
    one: OnDevice, asked: tuple[Tensor, float, Call], modes: tuple[bool, bool], stop: Event
) -> dict[str, Tensor]:
    x, timestep, call = asked
    inference, grad = modes  # each thread has its own
    try:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            velocities = one.predict(x.to(one.device), timestep, call)
            return {name: v.to(x.device) for name, v in velocities.items()}
    except OutOfMemoryError as error:
        stop.set()
        raise OutOfMemoryOn(str(one.device), str(error)) from None
    except BaseException:  # a cancel is no Exception
        stop.set()
        raise


def _until(stop: Event) -> Around:
    """A runner around the runner, which ends before the next block once the event is set."""

    def around(runner: BlockRunner) -> BlockRunner:
        def run(num_blocks: int, passes: list[Pass], apply_block: ApplyBlock) -> None:
            def unless_stopped(i: int, p: Pass) -> Any:
                if stop.is_set():
                    raise _Stopped
                return apply_block(i, p)

            runner(num_blocks, passes, unless_stopped)

        return run

    return around
