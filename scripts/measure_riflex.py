"""Whether a long clip repeats itself, without and with RIFLEx: how alike frames are by distance in time.

    python scripts/measure_riflex.py MODELS --width 64 --height 64 --num-frames 205 [--prompt TEXT ...]
        [--out build/riflex]

MODELS is laid out like ComfyUI's `models`. Prints, for each distance, the mean correlation of the pixels of
frames so far apart (1 = the same picture), over all prompts. A clip that repeats has a second maximum at a
distance above zero. Both runs have the same seed; the frames are written as one picture a prompt.
"""

import argparse
from pathlib import Path

import torch
from compare_options import files_in, run_case, side_by_side
from lib.local_job import PROMPT, LocalJob, add_job_arguments
from lib.markdown import table
from lib.pack import ROOT

CASES = {"without": {"riflex": "off"}, "with": {"riflex": "on"}}
ROWS = 12


def correlations(video):
    """[F, H, W, 3] -> [F]: mean correlation of the frames that are so many frames apart."""
    frames = video.flatten(1).float()
    frames = frames - frames.mean(1, keepdim=True)
    frames = frames / frames.norm(dim=1, keepdim=True).clamp_min(1e-6)
    alike = frames @ frames.mT  # [F, F]
    return torch.stack([alike.diagonal(distance).mean() for distance in range(len(video))])


def second_maximum(curve):
    """(distance, rise): where the curve is highest after its lowest point so far, and by how much."""
    lowest = torch.cummin(curve, 0).values
    rise = (curve - lowest)[: len(curve) * 9 // 10]  # the longest distances have few pairs
    at = int(rise.argmax())
    return at, float(rise[at])


def as_table(curves):
    frames = len(next(iter(curves.values())))
    places = [row * (frames - 1) // (ROWS + 1) for row in range(1, ROWS + 1)]
    rows = [(at, *(f"{curve[at]:.2f}" for curve in curves.values())) for at in places]
    found = [second_maximum(curve) for curve in curves.values()]
    rows.append(("highest return", *(f"+{rise:.2f} at {at}" for at, rise in found)))
    return table(("frames apart", *curves), rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "riflex")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacache-profile", default="auto")
    add_job_arguments(parser, steps=20)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    local = LocalJob(files_in(args.models), args)
    sums = dict.fromkeys(CASES, 0)
    prompts = args.prompt or [PROMPT]
    for i, prompt in enumerate(prompts):
        videos = {}
        for name, options in CASES.items():
            videos[name], seconds, _ = run_case(local, local.conditioning(prompt), options, args)
            sums[name] = sums[name] + correlations(videos[name])
            print(f"{prompt}, {name}: {seconds:.0f} s", flush=True)
        side_by_side(videos).save(args.out / f"{i}.png")
    print(as_table({name: total / len(prompts) for name, total in sums.items()}))


if __name__ == "__main__":
    main()
