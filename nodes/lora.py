"""LoRAs: a file in any dialect changes a MODEL, and a report says what of it was used."""

import logging
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from .. import host
from ..net.fetch import fetch
from ..wan.files import check_head, detect_kind, read_checkpoint
from ..wan.files.kinds import LORA, not_a
from ..wan.lora import parse_schedule
from ..wan.refusal import Refusal, printable
from .load import CATEGORY, about_file
from .lora_report import check_lora, left_out, lora_report, notes
from .named import named

NODE = "Wan21LoraLoader"
NONE = "none"
LINKED = "the file behind lora_url"


class Wan21LoraLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NODE,
            display_name="Wan2.1 LoRA Loader",
            category=CATEGORY,
            description="Apply a LoRA of any dialect to a Wan2.1 model, and report what of it was used.",
            search_aliases=["lora", "wan lora", "lycoris", "dora", "load lora"],
            inputs=[
                io.Model.Input("model", tooltip="From Wan21ModelLoader, or from another LoRA loader."),
                io.Combo.Input(
                    "lora_name",
                    options=[NONE, *folder_paths.get_filename_list("loras")],
                    default=NONE,
                    tooltip="A file in models/loras. none passes the model through.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="How much of the LoRA is added. 0 leaves the model as it is.",
                ),
                io.String.Input(
                    "strength_schedule",
                    default="",
                    tooltip="Multipliers of strength, spread over the steps: 1, 0.5, 0 is full in the first "
                    "third, half in the second and off in the last. Empty is 1 throughout.",
                    advanced=True,
                ),
                io.String.Input(
                    "lora_url",
                    default="",
                    tooltip="https link to a .safetensors LoRA (Hugging Face, Civitai), in place of "
                    "lora_name. It is fetched once into models/loras.",
                    advanced=True,
                ),
                io.Boolean.Input(
                    "strict",
                    default=False,
                    tooltip="on refuses a LoRA of which any key does not fit the model.",
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output(), io.String.Output(display_name="report")],
        )

    @classmethod
    @named(NODE)
    def execute(
        cls,
        model: host.ModelPatcher,
        lora_name: str,
        strength: float,
        strength_schedule: str,
        lora_url: str,
        strict: bool,
    ) -> io.NodeOutput:
        schedule = parse_schedule(strength_schedule)
        path = _path(lora_name, lora_url)
        if path is None:
            return io.NodeOutput(model, "no LoRA chosen")
        if host.is_remote(model):
            raise host.WITHOUT_WEIGHTS
        if family := host.other_family(model):
            raise Refusal(f"the MODEL is a {family}, not a Wan2.1 model", "Load one with Wan21ModelLoader")
        if host.packed_by_another_pack(model):
            raise Refusal(
                "the MODEL holds GGUF weights in another pack's form, which LoRAs of this node do not reach",
                "Load the file with Wan21ModelLoader, or the LoRA with the host's LoraLoaderModelOnly",
            )
        with about_file(path.name):
            lora = host.read_lora(path, model)
            check_lora(lora, strict)
        if lora.unmatched:
            host.tell(f"{path.name}: left out {'; '.join(left_out(lora))}")
            for key, reason in lora.unmatched.items():
                logging.warning("lora key not loaded: %s (%s)", printable(key), reason)
        for note in notes(lora):
            host.tell(note)
        lines = [f"LoRA: {path.name}, strength {_strength(strength, schedule)}", *lora_report(lora)]
        return io.NodeOutput(host.add_lora(model, lora, strength, schedule), "\n".join(lines))


def _path(lora_name: str, lora_url: str) -> Path | None:
    """The LoRA's file, fetched if it is given as a link; None without any."""
    if not lora_url.strip():
        if lora_name == NONE:
            return None
        return Path(folder_paths.get_full_path_or_raise("loras", lora_name))
    if lora_name != NONE:
        raise Refusal(
            f"lora_name is {lora_name} and lora_url is set; a loader applies one LoRA",
            f"Set lora_name to {NONE}, or add a second Wan21LoraLoader",
        )
    folder = folder_paths.get_folder_paths("loras")[0]
    return fetch(lora_url, folder, ".safetensors", _check_is_lora, _check_head, host.Progress())


def _check_head(head: bytes) -> None:
    with about_file(LINKED):
        check_head(head)


def _check_is_lora(path: Path) -> None:
    with about_file(LINKED):
        state_dict = read_checkpoint(path, LINKED).state_dict
        if detect_kind(state_dict) is not LORA:
            raise not_a(LORA, state_dict)


def _strength(strength: float, schedule: list[float]) -> str:
    if not schedule:
        return f"{strength:g}" + (" (off)" if strength == 0 else "")
    return f"{strength:g} x ({', '.join(f'{value:g}' for value in schedule)}) over the steps"
