"""One step of both passes in three ways: jointly through each block, one after the other, stacked as a batch.

    python scripts/bench_joint.py [--device cpu|cuda] [--repeat 5] [--quick]

Weights are resident; on CUDA also streamed: they stay in CPU memory and each layer fetches its own at each
call, as the host does for models that do not fit. Median of the repeats, the ways taking turns; on CUDA also
the peak of memory above the weights. Joint and separate passes must give the same bits.
"""

import argparse
import statistics

from lib import pack

pack.load_pack()
pack.load_host()

import torch  # noqa: E402
from bench import timed  # noqa: E402
from lib.random_weights import randomise  # noqa: E402
from wan21.wan.attention import best_kernels  # noqa: E402
from wan21.wan.config import WanConfig  # noqa: E402
from wan21.wan.dit import WanModel  # noqa: E402

PASSES = ("cond", "uncond")


def ways(model, x, timestep, context):
    """{name: call} that give the velocities of both passes [2, 16, F, H, W]."""

    def separate():
        parts = [model(x[i : i + 1], timestep[i : i + 1], context[i : i + 1]) for i in range(2)]
        return torch.cat(parts)

    return {
        "joint": lambda: model(x, timestep, context, pass_names=PASSES),
        "separate": separate,
        "stacked": lambda: model(x, timestep, context),
    }


def make_model(device, dtype, streamed, quick):
    import comfy.ops

    small = dict(dim=256, ffn_dim=512, num_heads=2, num_layers=2)
    large = dict(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30 if device == "cuda" else 2)
    config = WanConfig(in_dim=16, **(small if quick else large))
    operations = comfy.ops.manual_cast if streamed else torch.nn
    model = randomise(WanModel(config, operations))
    for name, parameter in model.named_parameters():  # the patch embedding stays in float32
        parameter.data = parameter.data.to(torch.float32 if name.startswith("patch_embedding") else dtype)
    return model if streamed else model.to(device)


def inputs(device, dtype, quick):
    frames, height, width = (2, 8, 8) if quick else ((21, 60, 104) if device == "cuda" else (2, 32, 52))
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, frames, height, width, generator=g).to(device)
    context = torch.randn(2, 512, 4096, generator=g).to(device, dtype)
    return x, torch.full((2,), 500.0, device=device), context


def peak_mib(call, device):
    """Peak above what is held before the call, in MiB; None on the CPU."""
    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(device, streamed, repeat, quick):
    """Rows of (way, seconds, MiB or None)."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    calls = ways(make_model(device, dtype, streamed, quick), *inputs(device, dtype, quick))
    results = {name: call() for name, call in calls.items()}
    assert torch.equal(results["joint"], results["separate"])
    del results
    seconds = {name: [] for name in calls}
    for _ in range(repeat):
        for name, call in calls.items():
            seconds[name].append(timed(call, device))
    return [(name, statistics.median(seconds[name]), peak_mib(call, device)) for name, call in calls.items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that it runs, says nothing")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    for streamed in (False, True) if args.device == "cuda" else (False,):
        with best_kernels(torch.device(args.device)):
            rows = measure(args.device, streamed, args.repeat, args.quick)
        print("weights streamed from CPU memory" if streamed else "weights resident")
        for name, seconds, mib in rows:
            memory = "" if mib is None else f"  {mib:8.0f} MiB"
            print(f"  {name:9} {seconds:8.3f} s  {seconds / rows[0][1]:6.3f} of joint{memory}")


if __name__ == "__main__":
    main()
