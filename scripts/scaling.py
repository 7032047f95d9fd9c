"""What a step of a model costs on one to n workers of this machine, as a Markdown table.

    python scripts/scaling.py                 all GPUs, or two processes on the CPU
    python scripts/scaling.py --workers 4     so many
    python scripts/scaling.py --quick         a small model, to see that it runs

The model has random weights at the width of Wan2.1 1.3B, with fewer blocks on a CPU, and two passes, as with
guidance. Rounds are interleaved: each asks every row once, so that what else the machine does meets all
alike; a row shows its fastest. Without a GPU a worker has one thread, as has the row without workers.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from lib import pack

pack.load_pack()
pack.load_host()

import torch  # noqa: E402
from comfy.model_management import load_models_gpu  # noqa: E402
from lib.markdown import table  # noqa: E402
from lib.random_weights import randomise  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from wan21 import host, workers  # noqa: E402
from wan21.wan.config import WanConfig  # noqa: E402
from wan21.wan.dit import WanModel  # noqa: E402

HEADINGS = (
    "workers", "split", "s a step", "speed-up over one", "efficiency", "MB sent between workers a step",
    "largest difference",
)  # fmt: skip
QUICK = WanConfig(in_dim=16, dim=256, ffn_dim=512, num_heads=2, num_layers=2), (1, 16, 3, 6, 10)
HUNG_SECONDS = 600.0  # nobody is to be taken for lost because the machine is busy


class Row(NamedTuple):
    """What is measured of one way to make a step.

    Attributes:
        workers: 0 is this process.
        seconds: of a step, by round.
        sent: bytes between workers, a step.
        difference: the largest from this process's velocity, over its largest value.
    """

    workers: int
    split: str
    seconds: list[float]
    sent: int
    difference: float


def main():
    options = arguments()
    gpus = torch.cuda.device_count()
    most = options.workers or gpus or 2
    layers = 30 if gpus else 1
    config = WanConfig(in_dim=16, dim=1536, ffn_dim=8960, num_heads=12, num_layers=layers)
    shape = (1, 16, 21, 60, 104) if gpus else (1, 16, 5, 16, 32)
    if options.quick:
        config, shape = QUICK
    if reason := workers.cannot_run():
        raise SystemExit(f"{reason}.")
    if not gpus:
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        model = random_model(Path(folder), config)
        settings, paths = host.process_settings()
        setup = workers.Setup(most, gpus > 0, settings, paths, None if gpus else 1)
        client = workers.Client(setup, hung_seconds=HUNG_SECONDS)
        try:
            print(table(HEADINGS, cells(measured(client, model, most, options.rounds, shape))))
        finally:
            client.close()


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workers", type=int, default=0, help="the most [all GPUs, or 2]")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each row [5]")
    parser.add_argument("--quick", action="store_true", help="a small model")
    return parser.parse_args()


def random_model(folder, config):
    """Our MODEL of a checkpoint with random weights."""
    path = folder / "scaling.safetensors"
    save_file(randomise(WanModel(config, torch.nn)).state_dict(), path)
    return host.load_model(path)


def measured(client, model, most, rounds, shape):
    """Rows of this process and of one to `most` workers, each split where there is more than one."""
    splits = ("guidance", "sequence")
    ways = [(1, "auto"), *((count, split) for count in range(2, most + 1) for split in splits)]
    made_by = host.recipe_of(model)
    remotes = [workers.RemoteModel(client, made_by, split, count) for count, split in ways]
    models = [model, *(host.remote_model(model, remote) for remote in remotes)]
    calls = inputs(model, shape, rounds + 1)
    load_models_gpu([model])
    seconds, differences = [[] for _ in models], [0.0] * len(models)
    for round_, call in enumerate(calls):
        want = None
        for i, one in enumerate(models):
            begin = time.perf_counter()
            velocity = one.model.diffusion_model(*call).float().cpu()
            if round_:  # the first loads
                seconds[i].append(time.perf_counter() - begin)
            want = velocity if want is None else want
            differences[i] = max(differences[i], ((velocity - want).abs().max() / want.abs().max()).item())
    rows = [Row(0, "", seconds[0], 0, 0.0)]
    for (count, split), remote, times, difference in zip(ways, remotes, seconds[1:], differences[1:]):
        rows.append(Row(count, split, times, remote.counts.sent[-1], difference))
        remote.end()
    return rows


def inputs(model, shape, count):
    """What the DiT is called with in so many steps: two passes of one noisy latent."""
    g = torch.Generator().manual_seed(0)
    device = model.load_device
    context = torch.randn(2, 512, host.config_of(model).text_dim, generator=g).to(device)
    for step in range(count):
        x = torch.randn(shape, generator=g).repeat(2, 1, 1, 1, 1).to(device)
        t = torch.full((2,), 1000.0 - 100 * step, device=device)
        yield x, t, context, None, None, {"cond_or_uncond": [0, 1]}


def cells(rows):
    """Of the table, row by row."""
    one = min(next(row for row in rows if row.workers == 1).seconds)
    for row in rows:
        best = min(row.seconds)
        gain = one / best
        gained = [f"{gain:.2f}x", f"{gain / row.workers:.0%}"] if row.workers else ["", ""]
        split = row.split if row.workers > 1 else ""
        sent = f"{row.sent / 1e6:.1f}"
        yield [row.workers or "none", split, f"{best:.2f}", *gained, sent, f"{row.difference:.0e}"]


if __name__ == "__main__":
    main()
