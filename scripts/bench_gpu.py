"""Everything worth knowing of a GPU, in one process and within ten minutes: see docs/gpu-benchmark.md.

    python scripts/bench_gpu.py [--only step,vae] [--blocks 10] [--seconds 540] [--repeat 3]
                                [--json build/bench-gpu.json] [--device cuda|cpu] [--quick]

A line a number, as it comes, and all of them as JSON, written anew after every row. What the machine lacks is
named with its reason. The model is of the 14B's width with fewer blocks; a step's seconds are scaled to all.
"""

import argparse
import time
import traceback
from pathlib import Path

from lib import pack

pack.load_pack()
pack.load_host()

import torch  # noqa: E402
from lib.gpu_bench import SECTIONS, Bench, Missing, Row, Section, report  # noqa: E402, F401
from lib.gpu_bench.bench import cpu_size, failure, gpu_size, toy_size  # noqa: E402
from lib.gpu_bench.environment import facts  # noqa: E402


def arguments(argv=None):
    names = "\n".join(f"  {name:12} {section.what}" for name, section in SECTIONS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"sections:\n{names}", formatter_class=argparse.RawTextHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, in their order")
    parser.add_argument("--blocks", type=int, default=10, help="of the model's 40 that are run; less memory")
    parser.add_argument("--seconds", type=float, default=540, help="for all; nothing is begun after them")
    parser.add_argument("--repeat", type=int, default=3, help="timed calls of each, after one that warms up")
    parser.add_argument("--json", type=Path, default=pack.ROOT / "build" / "bench-gpu.json")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if cuda else "cpu")
    parser.add_argument("--quick", action="store_true", help="toy size: shows that it runs, says nothing")
    args = parser.parse_args(argv)
    args.only = args.only.split(",")
    if unknown := [name for name in args.only if name not in SECTIONS]:
        parser.error(f"--only has {', '.join(unknown)}; there are {', '.join(SECTIONS)}.")
    if args.device == "cuda" and not cuda:
        parser.error("--device is cuda, and PyTorch finds none here. Use cpu.")
    if args.blocks < 1 or args.repeat < 1:
        parser.error(f"--blocks is {args.blocks} and --repeat {args.repeat}: each is at least 1.")
    return args


def make_bench(args):
    on_cuda = args.device == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
    if args.quick:
        return Bench(toy_size(), device, repeat=1)
    return Bench(gpu_size(args.blocks) if on_cuda else cpu_size(), device, args.repeat)


def run_section(name, bench, seconds, write):
    """Prints and keeps the rows of a section as they come; `write` is called with what there is of it."""
    result = {"section": name, "seconds": 0.0, "rows": []}
    start = time.monotonic()
    bench.begin(seconds)
    print(report.heading(name), flush=True)
    try:
        for row in SECTIONS[name].rows(bench):
            result["rows"].append(row.as_dict())
            result["seconds"] = round(time.monotonic() - start, 2)
            print(report.line(row), flush=True)
            write(result)
    except Missing as missing:
        result["skipped"] = str(missing)
    except Exception as error:  # the next section may work
        result["skipped"] = failure(error)
        traceback.print_exc()
    result["seconds"] = round(time.monotonic() - start, 2)
    if "skipped" in result:
        print(f"  not measured: {result['skipped']}", flush=True)
    write(result)
    bench.clear()
    return result


def run(args):
    """The sections asked for, each in its part of what time is left; -> what the JSON holds of them."""
    bench, end = make_bench(args), time.monotonic() + args.seconds
    head, done = facts(bench) | {"repeat": bench.repeat}, []
    print(f"{head['card']}; torch {head['torch']}; {head['host']}; {head['commit']}\n{head['size']}")
    waiting = [name for name in SECTIONS if name in args.only]
    while waiting:
        share = SECTIONS[waiting[0]].seconds / sum(SECTIONS[name].seconds for name in waiting)
        seconds = max(0.0, share * (end - time.monotonic()))
        write = lambda part: report.write(args.json, head, [*done, part])  # noqa: E731
        done.append(run_section(waiting.pop(0), bench, seconds, write))
    print(f"\n{sum(part['seconds'] for part in done):.0f} s; {args.json}")
    return done


def main(argv=None):
    args = arguments(argv)
    with torch.inference_mode():  # as the host runs nodes
        return run(args)


if __name__ == "__main__":
    main()
