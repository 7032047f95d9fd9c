"""What stands on a MODEL beside the weights of its file, as data that another process puts on its own."""

from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from comfy.model_patcher import ModelPatcher

from ..wan.refusal import Refusal
from .lora import KEY, AtUse, run_of, scheduled_loras, work_in_at_use
from .lora_run import ScheduledLora


@dataclass(frozen=True)
class Changes:
    """Patches of weights.

    Attributes:
        patches: the host's list, by key.
        scheduled: LoRAs under a schedule.
        at_use: whether runs work in what is not merged; see `host.lora`.
    """

    patches: dict[str, list[tuple]]
    scheduled: tuple[ScheduledLora, ...]
    at_use: bool


def changes_of(model: ModelPatcher) -> Changes:
    """Those of a MODEL of ours.

    Raises:
        Refusal: one of them is a function, or the weights of another MODEL.
    """
    for key, patches in model.patches.items():
        for _, change, _, _, function in patches:
            if isinstance(change, list):
                raise Refusal(
                    "another MODEL is merged into this one, whose weights workers do not have",
                    "Save the merged model (ModelSave), and load its file with Wan21ModelLoader",
                )
            if function is not None:
                raise Refusal(
                    f"another node changes {key} by a function, which workers cannot be sent",
                    "Remove that node",
                )
    return Changes(dict(model.patches), scheduled_loras(model), isinstance(model, AtUse))


def with_changes(model: ModelPatcher, changes: Changes) -> ModelPatcher:
    """A MODEL just loaded, with them on it."""
    model.patches = {key: list(patches) for key, patches in changes.patches.items()}
    model.patches_uuid = uuid4()
    if changes.scheduled:
        model.set_attachments(KEY, changes.scheduled)
    if changes.at_use:
        work_in_at_use(model)
    return model


def at_step_of(model: ModelPatcher, transformer_options: dict[str, Any]) -> None:
    """Gives the LoRAs that a run works in the strengths of the step that these options belong to."""
    run_of(model).set_step(transformer_options)
