"""Workers: a MODEL whose every step, and a VAE whose every decode, is shared between GPUs."""

import os
from weakref import WeakValueDictionary

import torch
from comfy_api.latest import io

from .. import host, workers
from ..wan.refusal import Refusal
from ..wan.shard import SPLITS
from . import checks
from .load import CATEGORY
from .named import named

NODE = "Wan21Workers"
MAX_DEVICES = 64
NO_VAE = host.blocked("Wan21Workers: its VAE is used, and no vae comes in. Connect vae, or use the loader's")
# Engines by what they were started for; one lives as long as a MODEL of it is held.
_engines: WeakValueDictionary[tuple, workers.Client] = WeakValueDictionary()


class Wan21Workers(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NODE,
            display_name="Wan2.1 Workers",
            category=CATEGORY,
            description="Share every step of a Wan2.1 model, and the VAE's decode, between the GPUs of this "
            "machine. Needs Ray.",
            search_aliases=["multi gpu", "multigpu", "ray", "parallel", "ulysses", "distributed"],
            inputs=[
                io.Model.Input("model", tooltip="From Wan21ModelLoader, after all nodes that change it."),
                io.Int.Input(
                    "devices",
                    default=0,
                    min=0,
                    max=MAX_DEVICES,
                    tooltip="How many GPUs take part; 0 is all. Without a GPU, so many processes on the CPU.",
                ),
                io.Combo.Input(
                    "split",
                    options=list(SPLITS),
                    default="auto",
                    tooltip="guidance gives each pass to devices of its own and sends almost nothing; "
                    "sequence shares the tokens of each pass; auto does the first as far as it goes evenly.",
                    advanced=True,
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="From Wan21VAELoader. It comes out as VAE, and its decodes are shared: each "
                    "device takes a part of the frame.",
                ),
            ],
            outputs=[io.Model.Output(), io.Vae.Output()],
        )

    @classmethod
    @named(NODE)
    def execute(
        cls, model: host.ModelPatcher, devices: int, split: str, vae: host.VAE | None = None
    ) -> io.NodeOutput:
        checks.check_model(model)
        if host.is_remote(model):
            raise Refusal("the MODEL comes from a Wan21Workers already", "Remove one of the two")
        gpus, address = host.gpu_count(model), os.environ.get("WAN21_RAY_ADDRESS", "")
        count = devices if address else _count(devices, gpus)
        if count == 1:
            host.tell("there is one device: what comes in is handed on as it is")
            return io.NodeOutput(model, vae or NO_VAE)
        recipe, vae_recipe = host.recipe_of(model), None if vae is None else host.vae_recipe_of(vae)
        if reason := workers.cannot_run():
            host.tell(f"{reason}. What comes in is handed on as it is, and computes on one device")
            return io.NodeOutput(model, vae or NO_VAE)
        if address and (refusal := workers.cannot_join()):
            raise refusal
        engine = _engine(count, gpus > 0, address)
        model = host.remote_model(model, workers.RemoteModel(engine, recipe, split, count))
        if vae is not None and vae_recipe is not None:
            vae = host.shared_vae(vae, workers.RemoteVae(engine, vae_recipe, count))
        return io.NodeOutput(model, vae or NO_VAE)


def _count(devices: int, gpus: int) -> int:
    """Devices that take part.

    Raises:
        Refusal: there are not so many.
    """
    if gpus:
        if devices > gpus:
            have = "1 GPU" if gpus == 1 else f"{gpus} GPUs"
            raise Refusal(f"devices is {devices}, and this machine has {have}", f"Set {gpus}, or 0 for all")
        return devices or gpus
    cores = os.cpu_count() or 1
    if devices > cores:
        raise Refusal(f"devices is {devices}, and this machine has no GPU and {cores} cores", f"Set {cores}")
    return devices or 1


def _engine(count: int, gpus: bool, address: str) -> workers.Client:
    key = (count, gpus, address) if address else (count, gpus)
    engine = _engines.get(key)
    if engine is None:
        settings, paths = host.process_settings()
        threads = None if gpus or not count else max(1, torch.get_num_threads() // count)
        engine = workers.Client(workers.Setup(count, gpus, settings, paths, threads, address))
        _engines[key] = engine
    return engine
