"""TeaCache's polynomial for the finished model, by the script that fits one to any checkpoint."""

import calibrate_teacache
from lib import bundled
from lib.scenes import SCENES, small
from safetensors import safe_open
from wan21.host.coefficients import COEFFICIENTS_KEY

SIDE = 128
PROMPTS = ("pan left", "zoom in", "rotate clockwise", "still", "night falls")
# As the graph `Wan2.1 - quick start` samples.
JOB = (
    *("--width", str(SIDE), "--height", str(SIDE), "--num-frames", "17"),
    *("--steps", "20", "--guidance-scale", "2", "--flow-shift", "3", "--solver", "unipc"),
)


def fit(models, work, seeds=3):
    """Write it into the metadata of the DiT's file, where none is: one with other weights has none.

    Args:
        models: folder of the exported files.
        work: folder for the start image.
        seeds: runs for each of the prompts.
    """
    model = models / "diffusion_models" / bundled.MODEL
    with safe_open(model, "pt") as file:
        if COEFFICIENTS_KEY in file.metadata():
            return
    image = work / "teacache.png"
    small(SCENES["meadow"](), SIDE).save(image)
    files = {
        "--text-encoder": models / "text_encoders" / bundled.TEXT_ENCODER,
        "--vae": models / "vae" / bundled.VAE,
        "--image": image,
    }
    named = [str(part) for pair in files.items() for part in pair]
    told = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    calibrate_teacache.main([str(model), *named, *told, *JOB, "--seeds", str(seeds), "--embed"])
