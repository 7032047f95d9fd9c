"""Distil the bundled model to four steps, as a LoRA on it: `make distil-tiny`, the end of `make train-tiny`.

Needs the other files in `models/`. An interrupted run goes on where it was last saved: what the teacher does
is kept in shards, the LoRA at most two minutes back.
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

from wan21.training.export import export_four_steps  # noqa: E402
from wan21.training.progress import keep_to_one_size  # noqa: E402
from wan21.training.train_four_steps import SCHEDULES  # noqa: E402

WORK = pack.ROOT / "build" / "distil_tiny"


def main():
    """Read the command line and run what is left to do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder of paths and states; default: build/distil_tiny")
    parser.add_argument("--models", type=Path, default=pack.ROOT / "models", help="with the teacher's files")
    parser.add_argument("--out", type=Path, help="default: among the LoRAs of `models`, for smoke in `work`")
    parser.add_argument("--size", choices=[*SCHEDULES], default="full", help="schedule")
    options = parser.parse_args()
    smoke = options.size == "smoke"
    work = options.work or Path(f"{WORK}_smoke" if smoke else WORK)
    out = options.out or (work if smoke else options.models / "loras") / bundled.FOUR_STEPS_LORA
    # A norm with float32 weights on what a bfloat16 product gave: torch takes it in float32, as wanted.
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
    keep_to_one_size(work, options.size)
    device = "cuda" if torch.cuda.is_available() and not smoke else "cpu"
    export_four_steps(work, options.models, out, SCHEDULES[options.size], device)
    print(f"{out.stat().st_size / 2**20:.2f} MiB  {out}")


if __name__ == "__main__":
    main()
