"""Train the bundled checkpoint from nothing to the files in `models/`: `make train-tiny`.

Stages that are done are skipped, and an interrupted one goes on where it was last saved, at most two
minutes back. To do a stage again, delete its files in the work folder, and those of all later ones.
"""

import argparse
import sys
import warnings
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parents[1] / "scripts")  # in place of this folder

from lib import bundled, pack  # noqa: E402

pack.load_pack()
pack.load_host()

from wan21.training import teacache, train_decoder, train_dit, train_four_steps, train_lora, train_vae  # noqa: E402
from wan21.training.export import export, export_four_steps  # noqa: E402
from wan21.training.progress import Stage, keep_to_one_size, work_of  # noqa: E402

# If nothing else runs. Of "cuda" only the devices were checked, on a pretended one.
DURATION = {
    "cpu": "about four and a half hours, more where the processor has no bfloat16 products",
    "cuda": "a schedule that has not been run yet, about half an hour by an estimate",
    "smoke": "about three minutes",
}
STAGES = ("vae", "encode", "dit", "lora", "vae_refined")
VAE_SCHEDULES = {
    "cpu": train_vae.CPU,
    "cuda": train_vae.CUDA,
    "smoke": train_vae.Schedule(video_steps=3, refine_steps=2, batch=1),
}


def stages(work, size, device):
    """The function of every stage, in the order of `STAGES`."""
    vae_schedule, schedule = VAE_SCHEDULES[size], train_dit.SCHEDULES[size]

    def vae(**which):
        return train_vae.load_vae(work, vae_schedule, device, **which)

    def encode():
        train_dit.encode_stage(Stage(work, "encode"), vae(refined=False), schedule, device)

    def lora():
        train_lora.lora_stage(Stage(work, "lora"), Stage(work, "dit"), vae(refined=False), size, device)

    functions = (
        lambda: train_vae.train_vae(work, vae_schedule, device),
        encode,
        lambda: train_dit.dit_stage(Stage(work, "dit"), schedule, device),
        lora,
        lambda: train_decoder.refine(Stage(work, "vae_refined"), vae(refined=False), vae_schedule),
    )
    return dict(zip(STAGES, functions, strict=True))


def main():
    """Read the command line and run what is left to do."""
    options = arguments()
    size = options.size
    device = "cuda" if size == "cuda" else "cpu"
    print(
        f"Training on {device} ({torch.get_num_threads()} threads), {DURATION[size]}. "
        f"Work folder: {options.work}",
        flush=True,
    )
    keep_to_one_size(options.work, size)
    # A norm with float32 weights on what a bfloat16 product gave: torch takes it in float32, as wanted.
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
    for name, run in stages(options.work, size, device).items():
        if options.only and name not in options.only:
            continue
        print(f"{name}: {'done' if Stage(options.work, name).done else 'running'}", flush=True)
        run()
    if options.only:
        return
    paths = export(options.work, options.models, VAE_SCHEDULES[size])
    print("TeaCache, then four steps", flush=True)
    teacache.fit(options.models, options.work, seeds=1 if size == "smoke" else 3)
    paths["four steps"] = paths["lora"].with_name(bundled.FOUR_STEPS_LORA)
    four_steps = train_four_steps.SCHEDULES["smoke" if size == "smoke" else "full"]
    export_four_steps(options.work / "four_steps", options.models, paths["four steps"], four_steps, device)
    for part, path in paths.items():
        print(f"{part:10} {path.stat().st_size / 2**20:6.2f} MiB  {path}")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder of the stages; default: build/train_tiny[_SIZE]")
    parser.add_argument(
        "--models", type=Path, help="folder of the result; default: models, for smoke in the work folder"
    )
    parser.add_argument(
        "--size", choices=[*DURATION], help="schedule; default: cuda if there is one, else cpu"
    )
    parser.add_argument("--only", nargs="+", choices=STAGES, help="run these stages and export nothing")
    options = parser.parse_args()
    options.size = options.size or ("cuda" if torch.cuda.is_available() else "cpu")
    options.work = options.work or work_of(options.size)
    options.models = options.models or (options.work if options.size == "smoke" else pack.ROOT) / "models"
    return options


if __name__ == "__main__":
    main()
