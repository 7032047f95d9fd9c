"""Time and memory of our DiT and VAE beside ComfyUI's native ones and diffusers', on the same weights.

    python scripts/bench.py [--only dit,vae-encode,vae-decode,vae-tiles,graph] [--device cpu|cuda]
                            [--repeat N] [--json bench.json] [--quick]

Time: all peers in one process, warmed up, taking turns; the median of the repeats. With `--repeat 0`, on the
CPU: one cold call of each, in the process that measures its memory, and no comparison of results.
Memory: what a call needs beyond its weights and inputs. On CUDA `max_memory_allocated`; on the CPU one fresh
process per peer, its peak resident size during the call less its resident size before.
The ratio is ours over the better of the two peers. Time it on a machine that does nothing else.
`graph`: the quick start from loading to the video's file on a ComfyUI server, and the same with the host's
nodes, in three sizes. Where the CPU multiplies in bf16 itself, "ours bf16" is our DiT in it.
"""

import argparse
import ctypes
import gc
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from lib import graph_race, pack
from lib.host_server import HostServer

pack.load_pack()
pack.load_host()

import torch  # noqa: E402
from lib.peers import OURS, PEERS, decode, dits, encode, random_dit, relative, vaes  # noqa: E402
from wan21.wan.device import multiplies_in_bf16  # noqa: E402

BF16 = "ours bf16"
CONTESTANTS = {
    "dit": ("ours", *[BF16] * multiplies_in_bf16("cpu"), *PEERS),
    "vae-encode": ("ours", *PEERS),
    "vae-decode": ("ours", *PEERS),
    "vae-tiles": ("ours", "tiles 512", "tiles 256", "native"),  # ours whole and in tiles, native whole
}
MIB = 2**20
VAE_CLIPS = {"cuda": (81, 480, 832), "cpu": (17, 256, 256)}  # frames, height, width
TILED_CLIPS = {"cuda": (81, 480, 832), "cpu": (9, 480, 832)}


# Each case returns {peer: call}; only the named peers are kept in memory.


def vae_case(direction, peers, device, dtype, quick):
    clips = TILED_CLIPS if direction == "tiles" else VAE_CLIPS
    frames, height, width = (5, 64, 64) if quick else clips[device]
    dim = 8 if quick else 96
    tiled = [peer for peer in peers if peer.startswith("tiles")]
    built = [peer for peer in peers if peer not in tiled]
    models = vaes(dim, [OURS] if tiled and OURS not in built else built, device, dtype)
    generator = torch.Generator().manual_seed(1)
    if direction == "encode":
        x = (torch.rand(1, 3, frames, height, width, generator=generator) * 2 - 1).to(device, dtype)
        calls = {peer: partial(encode, models[peer], peer, x) for peer in built}
    else:
        shape = (1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
        z = torch.randn(shape, generator=generator).to(device, dtype)
        calls = {peer: partial(decode, models[peer], peer, z) for peer in built}
        for peer in tiled:
            tile = int(peer.split()[1]) // (8 if not quick else 64)
            calls[peer] = partial(models[OURS].decode_tiled, z, tile, tile)
    calls = {peer: calls[peer] for peer in peers}
    return calls, f"dim {dim}, {frames} frames of {width}x{height}"


def dit_case(peers, device, dtype, quick):
    from wan21.wan.config import WanConfig

    width, heads, ffn, layers, side = (256, 2, 1024, 2, 16) if quick else (1536, 12, 8960, 4, 56)
    config = WanConfig(in_dim=16, dim=width, ffn_dim=ffn, num_heads=heads, num_layers=layers)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 16, 5, side, side, generator=generator).to(device)
    context = torch.randn(1, 512, 4096, generator=generator).to(device, dtype)
    timestep = torch.tensor([500.0], device=device)
    models = dits(config, [peer for peer in peers if peer != BF16], device, dtype)
    calls = {peer: partial(model, x, timestep, context) for peer, model in models.items()}
    if BF16 in peers and device == "cpu":
        calls[BF16] = partial(random_dit(config, device, torch.bfloat16), x, timestep, context.bfloat16())
    return calls, f"width {width}, {heads} heads, ffn {ffn}, {layers} layers, {5 * (side // 2) ** 2} tokens"


def make_case(name, peers, device, quick):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if name == "dit":
        return dit_case(peers, device, dtype, quick)
    return vae_case(name.removeprefix("vae-"), peers, device, dtype, quick)


def timed(call, device):
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def times_and_errors(calls, device, repeat):
    """{peer: median seconds}, {peer: relative distance of our result from the peer's}."""
    results = {peer: call().float() for peer, call in calls.items()}  # this is the warm-up as well
    errors = {peer: relative(results["ours"], results[peer]) for peer in results.keys() - {"ours"}}
    del results
    seconds = {peer: [] for peer in calls}
    for _ in range(repeat):
        for peer, call in calls.items():
            seconds[peer].append(timed(call, device))
    return {peer: statistics.median(values) for peer, values in seconds.items()}, errors


def resident(key):
    """`VmRSS` or `VmHWM` of this process in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def cold_call(case, peer, quick):
    """(peak bytes, seconds, size) of the first call in this process."""
    calls, size = make_case(case, [peer], "cpu", quick)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed heap pages would hide part of the call's own need
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    seconds = timed(calls[peer], "cpu")
    peak = min(resident("VmHWM"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return max(0, peak - before), seconds, size


def memory_on_cuda(calls):
    """{peer: bytes}"""
    used = {}
    for peer, call in calls.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        used[peer] = torch.cuda.max_memory_allocated() - before
    return used


def cold_calls(case, peers, quick):
    """{peer: bytes}, {peer: seconds}, size; one call each in a process of its own, on the CPU under Linux."""
    used, seconds = {}, {}
    for peer in peers:
        command = [sys.executable, __file__, "--only", case, "--cold-call", peer, *["--quick"] * quick]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        used[peer], seconds[peer], size = json.loads(output.splitlines()[-1])
    return used, seconds, size


def measure(case, device, repeat, quick, memory=True):
    """One row; `memory` of CPU calls takes a process each."""
    row = {"case": case}
    used = seconds = None
    if repeat:
        calls, row["size"] = make_case(case, CONTESTANTS[case], device, quick)
        seconds, row["relative_error"] = times_and_errors(calls, device, repeat)
        used = memory_on_cuda(calls) if device == "cuda" else None
        del calls
        gc.collect()
    if used is None and memory and sys.platform.startswith("linux"):
        used, cold, row["size"] = cold_calls(case, CONTESTANTS[case], quick)
        seconds = seconds or cold
    row["seconds"] = seconds
    row["time_ratio"] = seconds["ours"] / min(seconds[peer] for peer in PEERS if peer in seconds)
    if used:
        row["memory_mib"] = {peer: used[peer] / MIB for peer in used}
    return row


def graph_rows(repeat, quick):
    """A row a size."""
    sizes, steps = (graph_race.SIZES[:1], 1) if quick else (graph_race.SIZES, graph_race.STEPS)
    rows = []
    with tempfile.TemporaryDirectory() as folder, HostServer(folder) as server:
        for side, frames in sizes:
            seconds = graph_race.race(server, side, frames, steps, repeat, multiplies_in_bf16("cpu"))
            size = f"{frames} frames of {side}x{side}, {steps} steps"
            ratio = seconds["ours"] / seconds["native"]
            rows.append({"case": "graph", "size": size, "seconds": seconds, "time_ratio": ratio})
    return rows


def table(rows):
    lines = ["case         peer        seconds   memory MiB   ours/peer: time  memory  relative error"]
    for row in rows:
        seconds, used, errors = row["seconds"], row.get("memory_mib", {}), row.get("relative_error")
        for peer in seconds:
            mib = used.get(peer, float("nan"))
            line = f"{row['case']:12} {peer:10} {seconds[peer]:8.3f}   {mib:10.0f}"
            if peer != "ours":
                line += f"   {seconds['ours'] / seconds[peer]:15.3f}"
                line += f"  {used.get('ours', mib) / max(mib, 1e-9):6.3f}"
                line += f"  {errors[peer]:14.1e}" if errors else ""
            lines.append(line)
        lines.append(f"             {row['size']}; time {row['time_ratio']:.3f} of the faster peer")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="dit,vae-encode,vae-decode,graph")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that it runs, says nothing")
    parser.add_argument("--cold-call", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    if args.cold_call:
        print(json.dumps(cold_call(args.only, args.cold_call, args.quick)))
        return
    if not args.repeat and (args.device == "cuda" or not sys.platform.startswith("linux")):
        parser.error("--repeat 0 is for the CPU of a Linux machine, where cold calls can be measured.")
    rows = []
    for case in args.only.split(","):
        if case == "graph":
            rows += graph_rows(max(1, args.repeat), args.quick)
        else:
            rows.append(measure(case, args.device, args.repeat, args.quick))
    print(table(rows))
    if args.json:
        info = {"device": args.device, "torch": torch.__version__, "threads": torch.get_num_threads()}
        args.json.write_text(json.dumps({**info, "cases": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
