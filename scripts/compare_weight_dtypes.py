"""What each weight_dtype of fewer bits is off by on the bundled model: layer by layer, and a whole run.

    python scripts/compare_weight_dtypes.py [--size 64 --pictures 4 --steps 20 --only int8_convrot ...]

A layer: the relative error of what it gives for the same input, one that it had in a run of the exact model
(float32); the mean over the blocks. Run: of the latent after all steps, from the same noise. PSNR: of the
frames with the exact model's. Means over drawn pictures, each with a camera prompt.

A CPU multiplies fp8 weights unpacked. `as a GPU multiplies` rounds their input too, in float32.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from compare_steps import CASES as STEPS
from compare_steps import FULL, NUM_FRAMES, Clip, Job
from lib import bundled
from lib.markdown import table
from lib.quality import psnr
from wan21 import host
from wan21.host import eight_bits, products
from wan21.nodes.image_to_video import Wan21ImageToVideo
from wan21.nodes.sampler import Wan21Sampler
from wan21.nodes.vae_decode import Wan21VAEDecode
from wan21.training import captions, data
from wan21.training.held_out import pictures

LAYERS = ("self_attn.q", "self_attn.o", "cross_attn.q", "ffn.0", "ffn.2")


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        weight_dtype: of the loader.
        groups: columns that int8 rotates together; none for no rotation.
        as_gpu: whether products are those of a GPU that multiplies in fp8.
    """

    weight_dtype: str
    groups: tuple[int, ...] = eight_bits.GROUPS
    as_gpu: bool = False


EXACT = Case("fp32")
CASES = {
    "fp16": Case("fp16"),
    "bf16": Case("bf16"),
    "fp8_e4m3fn": Case("fp8_e4m3fn"),
    "fp8_e5m2": Case("fp8_e5m2"),
    "int8_convrot": Case("int8_convrot"),
    "int8_convrot, not rotated": Case("int8_convrot", groups=()),
    "fp8_e4m3fn_rows, unpacked": Case("fp8_e4m3fn_rows"),
    "fp8_e4m3fn_rows, as a GPU multiplies": Case("fp8_e4m3fn_rows", as_gpu=True),
}


def multiplied(x, x_scale, weight, weight_scale, bias, dtype):
    """`wan.kernels.row_product` where PyTorch has none."""
    return F.linear(x.float() * x_scale, weight.float() * weight_scale, bias.float()).to(dtype)


@contextmanager
def loaded(case: Case) -> Iterator[Any]:
    """The bundled model by a case, while this lasts."""
    groups, product_of = eight_bits.GROUPS, products.product_of
    eight_bits.GROUPS = case.groups
    products.product_of = (lambda *_: multiplied) if case.as_gpu else product_of
    model = host.load_model(bundled.MODELS / "diffusion_models" / bundled.MODEL, case.weight_dtype)
    if case.as_gpu:
        for layer in model.model.diffusion_model.modules():
            if getattr(layer, "by_rows", False):
                layer._full_precision_mm = False
    try:
        yield model
    finally:
        eight_bits.GROUPS, products.product_of = groups, product_of


def block_layers(model) -> dict[str, torch.nn.Module]:
    """By name, those of `LAYERS` in every block."""
    blocks = enumerate(model.model.diffusion_model.blocks)
    return {f"{i}.{name}": block.get_submodule(name) for i, block in blocks for name in LAYERS}


@contextmanager
def heard(layers: dict[str, torch.nn.Module], hear: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Inside, `hear` gets the input of each call of a layer."""
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: hear(name, args[0]))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.float() - exact.float()).norm() / exact.float().norm()).item()


class Exact:
    """The model in float32: inputs and results of its layers, latents and frames of its runs.

    Args:
        job: `compare_steps.Job`, whose encoder and VAE are used.
        clips: what is asked for.
        inputs: of the sampler.
    """

    def __init__(self, job: Job, clips: list[Clip], inputs: dict[str, Any]):
        self.job, self.clips, self.inputs = job, clips, inputs
        self.given: dict[str, torch.Tensor] = {}
        with loaded(EXACT) as model:
            layers = block_layers(model)
            with heard(layers, lambda name, x: self.given.setdefault(name, x.clone())):
                self.run(model, clips[0], steps=1)
            self.results = {name: layers[name](x.clone()) for name, x in self.given.items()}
            self.runs = [self.run(model, clip) for clip in clips]

    def run(self, model: Any, clip: Clip, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(latent, frames [F, 3, H, W])."""
        conditioning = Wan21ImageToVideo.execute(
            self.job.encode(captions.canonical(clip.motion)), self.job.negative, self.job.vae,
            start_image=clip.image.movedim(0, -1)[None], width=self.job.side, height=self.job.side,
            num_frames=NUM_FRAMES, resize_mode="crop", add_frames_for_end_image=False, tile_size="auto",
        ).result  # fmt: skip
        options = self.inputs | changes
        latent, _ = Wan21Sampler.execute(model, *conditioning, seed=clip.seed, denoise=1.0, **options).result
        frames = Wan21VAEDecode.execute(self.job.vae, latent, "auto").result[0].movedim(-1, 1)
        return latent["samples"], frames

    def row(self, case: Case) -> list[str]:
        """The cells of a case."""
        with loaded(case) as model:
            layers = block_layers(model)
            self.run(model, self.clips[0], steps=1)  # loads the weights, where the host's memory is dynamic
            found = {k: relative(layers[k](x.clone()), self.results[k]) for k, x in self.given.items()}
            by_layer = [[v for k, v in found.items() if k.endswith(f".{name}")] for name in LAYERS]
            runs = [self.run(model, clip) for clip in self.clips]
        off = [relative(ours[0], exact[0]) for ours, exact in zip(runs, self.runs)]
        like = [psnr(ours[1], exact[1]) for ours, exact in zip(runs, self.runs)]
        means = [100 * sum(v) / len(v) for v in (*by_layer, off)]
        return [*(f"{mean:.2f} %" for mean in means), f"{sum(like) / len(like):.1f} dB"]


def compare(size: int, count: int, steps: int, names: list[str]) -> str:
    """The table of these cases, in clips of `size` pixels on `count` pictures."""
    job = Job(bundled.MODELS / "loras" / bundled.FOUR_STEPS_LORA, size)
    images = pictures(8000 + size, count, (NUM_FRAMES, size, size))
    clips = [
        Clip(image, data.as_motion(data.CAMERA[i % len(data.CAMERA)]), i) for i, image in enumerate(images)
    ]
    exact = Exact(job, clips, STEPS[FULL][1] | {"steps": steps})
    rows = []
    for name in names:
        rows.append((name, *exact.row(CASES[name])))
        print("; ".join(rows[-1]), flush=True)
    return table(("weight_dtype", *LAYERS, "run", "PSNR"), rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="side of the clips, 64 to 192 pixels")
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=[*CASES], default=[*CASES])
    args = parser.parse_args()
    with torch.inference_mode():
        print(compare(args.size, args.pictures, args.steps, args.only))


if __name__ == "__main__":
    main()
