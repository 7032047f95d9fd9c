"""The same job with each sampler option: time, PSNR and SSIM against the plain run, and a picture of both.

    python scripts/compare_options.py MODELS [--out build/options] [--only teacache-2,riflex ...]
        [--image FILE] [--prompt TEXT] [--width 832 --height 480 --num-frames 81 --steps 30 ...]

MODELS is laid out like ComfyUI's `models`: the first file in `diffusion_models`, `text_encoders` and `vae` is
taken, or `--model NAME`. PSNR and SSIM say how far a video is from the plain one, not which is better: an
option that changes the composition scores low with both being good. Rows are sampled one after the other;
the first sampling, which also loads the model, is done twice and timed the second time.
"""

import argparse
import re
import time
from pathlib import Path

from lib.local_job import PROMPT, Files, LocalJob, add_job_arguments
from lib.markdown import table
from lib.pack import ROOT, load_pack
from lib.quality import psnr, ssim

load_pack()

import torch  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402
from wan21.nodes.sampler import Wan21Sampler  # noqa: E402
from wan21.nodes.vae_decode import Wan21VAEDecode  # noqa: E402

CASES = {
    "plain": {},
    "teacache-1.5": {"cache": {"multiplier": 1.5}},
    "teacache-2": {"cache": {"multiplier": 2.0}},
    "teacache-2.5": {"cache": {"multiplier": 2.5}},
    "cfg-zero-star": {"cfg_star": {}},
    "zero-init-1": {"cfg_star": {"zero_init_steps": 1, "start_step": 1000}},
    "teacache-2+cfg-zero-star": {"cache": {"multiplier": 2.0}, "cfg_star": {}},
    "nag": {"nag": {}},
    "skip-layers": {"skip_layers": {"layers": "middle"}},
    "riflex": {"riflex": "on"},
    "separate-passes": {"execution": {"joint_pass": False}},
}
ON = {"cache": "teacache", "cfg_star": "on", "nag": "on", "skip_layers": "on", "execution": "custom"}
COLUMNS = 5  # frames of a video in the picture
LABEL_HEIGHT = 18


def run_case(local, conditioning, options, args):
    """-> (video [F, H, W, 3], seconds of sampling, report)."""
    options = {k: v if k == "riflex" else {k: ON[k], **v} for k, v in options.items()}
    if "skip_layers" in options:  # Wan2GP's 9 of 30 or 40, at the same depth of this model
        options["skip_layers"]["layers"] = str(9 * local.config.num_layers // 30)
    if "cache" in options:
        options["cache"]["profile"] = args.teacache_profile
    start = time.perf_counter()
    latent, report = Wan21Sampler.execute(
        local.model,
        *conditioning,
        seed=args.seed,
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        flow_shift=args.flow_shift,
        solver=args.solver,
        denoise=1.0,
        **options,
    ).result
    seconds = time.perf_counter() - start
    return Wan21VAEDecode.execute(local.vae, latent, "auto").result[0], seconds, report


def compare(files, args):
    """Rows of (name, seconds, speed-up, PSNR, SSIM, computed steps), and the videos by name."""
    names = ["plain", *(n for n in args.only.split(",") if n != "plain")] if args.only else [*CASES]
    local = LocalJob(files, args)
    conditioning = local.conditioning(args.prompt[0] if args.prompt else PROMPT)
    run_case(local, conditioning, {}, args)
    rows, videos = [], {}
    for name in names:
        video, seconds, report = run_case(local, conditioning, CASES[name], args)
        videos[name] = video
        computed = re.search(r"teacache: (\d+) of", report)
        zeros = CASES[name].get("cfg_star", {}).get("zero_init_steps", 0)
        rows.append(
            (
                name,
                seconds,
                (rows[0][1] if rows else seconds) / seconds,
                psnr(video, videos["plain"]),
                ssim(video, videos["plain"]),
                int(computed[1]) if computed else args.steps - zeros,
            )
        )
    return rows, videos


def as_table(rows):
    return table(
        ("options", "computed steps", "s", "speed-up", "PSNR", "SSIM"),
        (
            (name, computed, f"{seconds:.1f}", f"{speed_up:.2f}", f"{p:.1f} dB", f"{s:.3f}")
            for name, seconds, speed_up, p, s, computed in rows
        ),
    )


def side_by_side(videos):
    """One row of frames for each video, its name above."""
    first = next(iter(videos.values()))
    frames, height, width, _ = first.shape
    count = min(COLUMNS, frames)
    at = [round(i * (frames - 1) / max(1, count - 1)) for i in range(count)]
    sheet = Image.new("RGB", (count * width, len(videos) * (height + LABEL_HEIGHT)), "white")
    for row, (name, video) in enumerate(videos.items()):
        top = row * (height + LABEL_HEIGHT)
        ImageDraw.Draw(sheet).text((4, top + 3), name, fill="black")
        for column, i in enumerate(at):
            pixels = (video[i].clamp(0, 1) * 255).round().byte().cpu().numpy()
            sheet.paste(Image.fromarray(pixels), (column * width, top + LABEL_HEIGHT))
    return sheet


def files_in(models, model_name=None):
    """The files of a folder laid out like ComfyUI's `models`."""

    def first(folder):
        found = sorted(
            path for path in (Path(models) / folder).glob("*") if path.suffix in (".safetensors", ".pth")
        )
        if not found:
            raise SystemExit(f"There is no checkpoint in {Path(models) / folder}.")
        return found[0]

    model = Path(models) / "diffusion_models" / model_name if model_name else first("diffusion_models")
    return Files(model, first("text_encoders"), first("vae"))


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--model", help="file name in diffusion_models")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "options")
    parser.add_argument("--only", help=f"with commas, of {', '.join(CASES)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacache-profile", default="auto")
    add_job_arguments(parser, steps=30)
    return parser.parse_args(argv)


def main():
    args = arguments()
    with torch.inference_mode():
        rows, videos = compare(files_in(args.models, args.model), args)
    args.out.mkdir(parents=True, exist_ok=True)
    text = as_table(rows)
    (args.out / "options.md").write_text(text + "\n", encoding="utf-8")
    side_by_side(videos).save(args.out / "options.jpg", quality=90)
    print(f"{text}\n\n{args.out / 'options.jpg'}")


if __name__ == "__main__":
    main()
