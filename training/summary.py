"""Print the table of a training for the README, from the logs in its work folder.

python training/summary.py [build/train_tiny]
"""

import csv
import sys
from pathlib import Path

STAGES = {
    "vae_start": "VAE, the best linear code",
    "vae_video": "VAE, pictures and clips",
    "vae": "VAE, its scale and basis folded in",
    "encode": "clips encoded, in shards",
    "dit": "DiT and text encoder",
    "lora": "LoRA",
    "vae_refined": "VAE decoder refined",
    "four_steps/distil": "LoRA of four steps, behind the teacher's paths",
}
NAMES = {
    "first_frame_psnr": "first frame {:.1f} dB",
    "clip_psnr": "clip {:.1f} dB",
    "first": "first frame {:.1f} dB",
    "psnr": "clip {:.1f} dB",
    "held_out": "loss {}",
    "nearness": "{:.1f} dB from the teacher",
}


def rows(work):
    """One line a stage: its name, steps, minutes over all runs, and the last held-out numbers."""
    for stage, title in STAGES.items():
        log = last_row(work / f"{stage}.csv")
        if log is None:
            continue
        measured = last_row(work / f"{stage}_held_out.csv") or log
        numbers = [text.format(float(measured[name])) for name, text in NAMES.items() if name in measured]
        minutes = f"{max(float(log['seconds']), float(measured['seconds'])) / 60:.0f}"
        yield title, log["step"], minutes, ", ".join(numbers)


def last_row(path):
    if not path.exists():
        return None
    with path.open(newline="") as file:
        return list(csv.DictReader(file))[-1]


def main():
    work = Path(sys.argv[1] if len(sys.argv) > 1 else "build/train_tiny")
    print("| stage | steps | minutes | held out |\n|---|---|---|---|")
    for row in rows(work):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
