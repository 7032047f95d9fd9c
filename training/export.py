"""Trained stages -> the five files of `models/`: float16, Wan2.1's own names, with metadata."""

import json

import torch
from wan21.wan.config import PREVIEW_COLOURS

from .files import commit, holds, stored, write
from .preview_colours import measure
from .progress import Stage
from .train_dit import averaged_model
from .train_four_steps import RANK, SHIFT, STEPS, distil
from .train_lora import trained_lora
from .train_vae import load_vae

FILES = {
    "dit": "diffusion_models/wan21-tiny-i2v.safetensors",
    "vae": "vae/wan21-tiny-vae.safetensors",
    "text": "text_encoders/wan21-tiny-umt5.safetensors",
    "lora": "loras/wan21-tiny-lora.safetensors",
}
LARGEST_BYTES = 40 * 2**20
LARGEST_LORA_BYTES = 2 * 2**20

DESCRIPTIONS = {
    "dit": "Small Wan2.1 image-to-video diffusion transformer (36 input channels, 6 blocks of width 256) for "
    "trying the graph on any machine: camera motions, coloured shapes that move, nightfall, snow and waves, "
    "at 64 to 192 pixels, 5 to 33 frames. "
    "Knows start image, first and last frame, and no image at all. The weights of the CLIP vision branch are "
    "zero: CLIP features change nothing.",
    "vae": "Small Wan2.1 video autoencoder (16 channels at the first level); its latents are standardised by "
    "Wan2.1's mean and std. For use with wan21-tiny-i2v only.",
    "text": "Small umT5 encoder (2 layers of width 128) with its own tokenizer of 512 pieces inside, trained "
    "jointly with wan21-tiny-i2v. Understands descriptions of camera and object motion in English.",
    "lora": "LoRA of rank 8 for wan21-tiny-i2v: the colours drain to grey over the clip.",
}
TITLES = {
    "dit": "Wan2.1 tiny i2v",
    "vae": "Wan2.1 tiny VAE",
    "text": "Wan2.1 tiny umT5",
    "lora": "Wan2.1 tiny LoRA: colours drain",
}


def export(work, models, vae_schedule):
    """Write the four files that need no other below the folder `models`, and return their paths by part.

    One that holds these numbers already is left as it is, with what was added to its metadata.

    Args:
        work: folder of the finished stages.
        vae_schedule: of `train_vae`, for the sizes.
    """
    model = averaged_model(Stage(work, "dit"))
    tokenizer = torch.frombuffer(bytearray(model.text.tokenizer), dtype=torch.uint8)
    vae = load_vae(work, vae_schedule)
    tensors = {
        "dit": model.dit.state_dict(),
        "vae": vae.state_dict(),
        "text": model.text.t5.state_dict() | {"spiece_model": tokenizer},
        "lora": trained_lora(Stage(work, "lora"), model),
    }
    seconds = {path.stem: seconds_of(work, path.stem) for path in sorted(work.glob("*.pt"))}
    tensors = {part: stored(named) for part, named in tensors.items()}  # all of them, before any is written
    told = {part: metadata(part, seconds) for part in FILES}
    told["dit"][PREVIEW_COLOURS] = json.dumps(measure(vae)[0])
    paths = {part: models / name for part, name in FILES.items()}
    for part, path in paths.items():
        if not holds(path, tensors[part]):
            write(tensors[part], path, told[part])
    check_sizes(paths)
    return paths


def metadata(part, seconds):
    """What the file is, how it was made, and what loaders read."""
    common = {
        "title": TITLES[part],
        "description": DESCRIPTIONS[part],
        "license": "Apache-2.0",
        "trained": "from random weights on procedural clips of our own, by `make train-tiny` "
        "(training/); no photograph and no other model was used",
        "training_commit": commit(),
        "training_seconds": json.dumps(seconds),
    }
    if part == "dit":
        # ComfyUI reads every size from the weights except the width of the text features.
        common["config"] = json.dumps({"transformer": {"text_dim": 128}})
        common["empty_start"] = "true"
    if part == "lora":
        common["base_model"] = TITLES["dit"]
    return common


def export_four_steps(work, models, path, schedule, device="cpu"):
    """Distil what `models` holds, where that is not done, and write the LoRA of four steps.

    Args:
        work: folder of the teacher's paths and of the state.
        schedule: one of `train_four_steps.SCHEDULES`.
        device: to distil on.
    """
    told = {
        "title": "Wan2.1 tiny LoRA: four steps",
        "description": f"LoRA of rank {RANK} for wan21-tiny-i2v: {STEPS} steps of euler at shift {SHIFT:g} "
        "and guidance 1 in place of 20 at guidance 2.",
        "license": "Apache-2.0",
        "trained": "on what wan21-tiny-i2v makes of procedural pictures of our own, by `make distil-tiny` "
        "(training/); no photograph and no other model was used",
        "training_commit": commit(),
        "base_model": TITLES["dit"],
    }
    tensors = stored(distil(work, models, schedule, device))
    told["training_seconds"] = json.dumps({"distil": seconds_of(work, "distil")})
    write(tensors, path, told)


def seconds_of(work, name):
    """How long a stage took, over all its runs."""
    stage = Stage(work, name)
    stage.load()
    return round(stage.spent)


def check_sizes(paths):
    """The files are part of the repository: refuse to write more than was agreed."""
    total, lora = sum(p.stat().st_size for p in paths.values()), paths["lora"].stat().st_size
    if total > LARGEST_BYTES or lora > LARGEST_LORA_BYTES:
        raise ValueError(
            f"the files are {total / 2**20:.1f} MiB, the LoRA {lora / 2**20:.2f} MiB; at most "
            f"{LARGEST_BYTES / 2**20:.0f} and {LARGEST_LORA_BYTES / 2**20:.0f}: make VAE or DiT smaller"
        )
