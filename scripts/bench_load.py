"""Host memory that loading a checkpoint takes, over the size of its file.

    python scripts/bench_load.py [--gigabytes 2.5] [--weight-dtype default]

Makes a Wan2.1 checkpoint of the 1.3B's width and about that size in the temporary folder, loads it by
Wan21ModelLoader's own function in a new process, and deletes it. What counts is memory that the system cannot
take back: pages of the file that is mapped are its cache, shown apart.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from lib import pack

LIMIT = 1.15
FIELDS = ("RssAnon", "RssFile")


def make_checkpoint(path, gigabytes):
    """Write a t2v DiT of the 1.3B's width, with as many blocks as the size asks for, bf16."""
    import torch
    from safetensors.torch import save_file
    from wan21.wan.config import WanConfig
    from wan21.wan.dit import WanModel

    sizes = dict(in_dim=16, dim=1536, ffn_dim=8960, num_heads=12)
    bytes_of = lambda n: sum(t.numel() * 2 for t in shapes(WanModel, WanConfig, sizes, n).values())  # noqa: E731
    outside = 2 * bytes_of(1) - bytes_of(2)
    blocks = max(1, round((gigabytes * 1e9 - outside) / (bytes_of(2) - bytes_of(1))))
    weights = shapes(WanModel, WanConfig, sizes, blocks)
    save_file({k: torch.zeros(t.shape, dtype=torch.bfloat16) for k, t in weights.items()}, path)


def shapes(model, config, sizes, blocks):
    import torch

    with torch.device("meta"):
        return model(config(num_layers=blocks, **sizes), torch.nn).state_dict()


def resident():
    """{field: bytes} of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return {field: int(found[field].split()[0]) * 1024 for field in FIELDS}


def load_watched(path, weight_dtype):
    """Load the checkpoint and print the most that was held beyond what was held before, as JSON."""
    import torch
    from wan21 import host

    torch.set_grad_enabled(False)
    before, done = resident(), threading.Event()
    most = dict.fromkeys(FIELDS, 0)

    def watch():
        while not done.wait(0.002):
            now = resident()
            most.update((f, max(most[f], now[f] - before[f])) for f in FIELDS)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = host.load_model(path, weight_dtype)
    done.set()
    watcher.join()
    print(json.dumps(most | {"weights": model.model_size()}))


def measure(gigabytes, weight_dtype="default"):
    """-> ({field: bytes}, bytes of the file)"""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "wan21-of-zeros.safetensors"
        make_checkpoint(path, gigabytes)
        command = [sys.executable, __file__, "--load", str(path), "--weight-dtype", weight_dtype]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return json.loads(said.splitlines()[-1]), path.stat().st_size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.5)
    parser.add_argument("--weight-dtype", default="default")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    pack.load_pack()
    pack.load_host()
    if args.load:
        return load_watched(args.load, args.weight_dtype)
    most, size = measure(args.gigabytes, args.weight_dtype)
    print(f"file {size / 1e9:.2f} GB; weight_dtype {args.weight_dtype}")
    print(f"held at most {most['RssAnon'] / 1e9:.2f} GB, {most['RssAnon'] / size:.2f} of the file")
    print(f"pages of the file in its cache {most['RssFile'] / 1e9:.2f} GB")
    return int(most["RssAnon"] > LIMIT * size)


if __name__ == "__main__":
    raise SystemExit(main())
