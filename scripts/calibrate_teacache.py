"""Fit TeaCache's polynomial to a checkpoint, by running it without TeaCache.

    python scripts/calibrate_teacache.py MODEL --text-encoder FILE [--vae FILE] [--image FILE]
        [--prompt TEXT ...] [--seeds 1] [--width 832 --height 480 --steps 50 ...] [--print | --embed]

After each step two changes are noted: of the time embedding, and of what the blocks add to the tokens. Both
are the mean absolute difference from the step before over the mean absolute value there. A polynomial of
degree 4 leads from the first to the second, as the authors fit it (ali-vilab/TeaCache, issue 2: the points of
all steps of 70 prompts; one run gives a usable rule, several a steadier one). It is written to
`MODEL.teacache.json`, where Wan21Sampler finds it, or with --embed into the metadata of the safetensors file
itself, as `teacache_coefficients`. Sample with the steps, shift and size you will use.
"""

import argparse
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

from lib.local_job import PROMPT, Files, LocalJob, add_job_arguments
from lib.pack import load_pack

load_pack()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from wan21 import host  # noqa: E402
from wan21.host.coefficients import COEFFICIENTS_KEY, COEFFICIENTS_SUFFIX  # noqa: E402
from wan21.wan.sample import SampleJob, sample  # noqa: E402
from wan21.wan.teacache import DEGREE, relative_changes  # noqa: E402


class Recorder:
    """A denoiser around the denoiser that measures how the blocks' residual changes from step to step."""

    def __init__(self, denoiser):
        self.denoiser = denoiser
        self.config = denoiser.config
        self.embed_time = denoiser.embed_time
        self.timesteps = []
        self.changes = {}  # pass -> one number a step, from the second on
        self._last = {}

    def predict(self, x, timestep, call):
        self.timesteps.append(timestep)
        return self.denoiser.predict(x, timestep, replace(call, around=(*call.around, self._around)))

    def _around(self, runner):
        def run(num_blocks, passes, call):
            before = {p.name: p.x.clone() for p in passes}
            runner(num_blocks, passes, call)
            for p in passes:
                residual = p.x - before[p.name]
                if p.name in self._last:
                    change = relative_changes(torch.stack([self._last[p.name], residual]))
                    self.changes.setdefault(p.name, []).extend(change)
                self._last[p.name] = residual

        return run

    def points(self):
        """(changes of the embedding, changes of the residual), of all passes."""
        x = relative_changes(self.embed_time(self.timesteps))
        return [*x] * len(self.changes), [y for changes in self.changes.values() for y in changes]


def record(job, local, prompt, seed):
    """Points of one run."""
    positive, negative, latent = local.conditioning(prompt)

    def run(denoiser, noise, start, *_):
        recorder = Recorder(denoiser)
        samples, _ = sample(job, recorder, noise, start)
        return samples, recorder.points()

    negative = negative if "uncond" in job.legs[0].pass_names else None
    prepared = host.Prepared(positive=positive, negative=negative, sigmas=job.sigmas)
    return host.run_sampling(local.model, prepared, latent, seed, run)[1]


def fit(x, y):
    """Least squares of degree 4 -> (coefficients, highest power first; share of the variance explained)."""
    x, y = np.asarray(x), np.asarray(y)
    if len(set(x)) <= DEGREE:
        raise SystemExit(
            f"{len(set(x))} points are too few for degree {DEGREE}: use at least {DEGREE + 2} steps."
        )
    coefficients = np.polyfit(x, y, DEGREE)
    rest = y - np.polyval(coefficients, x)
    return coefficients.tolist(), 1 - rest.var() / max(y.var(), 1e-12)


def calibrate(files, args):
    """-> (coefficients, share of the variance explained, number of points)."""
    local = LocalJob(files, args)
    job = SampleJob(args.steps, args.guidance_scale, args.flow_shift, args.solver)
    x, y = [], []
    for prompt in args.prompt or [PROMPT]:
        for seed in range(args.seeds):
            points = record(job, local, prompt, seed)
            x += points[0]
            y += points[1]
    coefficients, explained = fit(x, y)
    return coefficients, explained, len(x)


def embed(path, coefficients):
    """Write them into the metadata of a safetensors file, which is replaced whole or not at all."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    unfinished = path.with_suffix(".part")
    save_file(load_file(path), unfinished, {**metadata, COEFFICIENTS_KEY: json.dumps(coefficients)})
    shutil.copymode(path, unfinished)
    os.replace(unfinished, path)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, help="a Wan2.1 checkpoint of any published layout")
    parser.add_argument("--text-encoder", required=True)
    parser.add_argument("--vae")
    parser.add_argument("--seeds", type=int, default=1, help="runs for each prompt")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--print", action="store_true", help="print the list, write no file")
    target.add_argument("--embed", action="store_true", help="write it into MODEL, a single safetensors file")
    add_job_arguments(parser, steps=50)
    return parser.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    with torch.inference_mode():
        coefficients, explained, count = calibrate(Files(args.model, args.text_encoder, args.vae), args)
    print(f"{count} points, {100 * explained:.0f} % of the variance explained: {coefficients}")
    if args.embed:
        embed(args.model, coefficients)
        print(f"written into {args.model}")
    elif not args.print:
        path = args.model.with_name(args.model.name + COEFFICIENTS_SUFFIX)
        path.write_text(json.dumps(coefficients) + "\n", encoding="utf-8")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
