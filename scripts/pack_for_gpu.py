"""One archive with all that scripts/bench_gpu.py and tests/gpu need on a machine without network.

    python scripts/pack_for_gpu.py [--to build/gpu-bench.tar.gz] [--python 3.12]
                                   [--wheel comfy-kitchen==0.2.40] [--without sageattention]

There: tar xf gpu-bench.tar.gz && sh gpu-bench/run.sh      (arguments are those of bench_gpu.py)

It holds this tree's Python files as they lie here, ComfyUI's, and wheels of what a machine with PyTorch,
triton, einops, safetensors and transformers may lack. Wheels are downloaded once, into build/wheels/. About
53 MB; most of that are comfy-kitchen's CUDA kernels.
"""

import argparse
import importlib.metadata
import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from lib import commit
from lib.pack import ROOT, comfyui_path
from packaging.utils import parse_wheel_filename

TOP = "gpu-bench"
INSTALLED = (
    "comfy-kitchen",
    "comfy-aimdo",
    "diffusers",
    "torchsde",
    "trampoline",
)  # in the versions of .venv
WHEELS = ("sageattention==1.0.6",)  # of pure Python
HOST_FOLDERS = ("comfy", "comfy_api", "comfy_execution", "utils", "app")
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_24_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
    "any",
)
KINDS = ("*.py", "pyproject.toml")
RUN = """#!/bin/sh
# The benchmark; results go to $OUT, or here. `sh run.sh pytest` runs tests/gpu in its place.
cd "$(dirname "$0")" || exit
for wheel in wheels/*.whl; do
  [ -d site ] || python3 -m zipfile -e "$wheel" site.part || exit
done
[ -d site.part ] && mv site.part site
export PYTHONPATH="$PWD/site" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
if [ "$1" = pytest ]; then shift; exec python3 -m pytest -p no:cacheprovider tests/gpu "$@"; fi
exec python3 scripts/bench_gpu.py --json "${OUT:-$PWD}/bench-gpu.json" "$@"
"""


def tree_files():
    """Python files of this tree, tracked or new, and what names it to pytest; paths from ROOT."""
    command = [
        "git",
        "-C",
        str(ROOT),
        "ls-files",
        "-co",
        "--exclude-standard",
        "-z",
        "*.py",
        "pyproject.toml",
    ]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    return [Path(name) for name in listed if name and (ROOT / name).is_file()]


def host_files(host):
    """What of ComfyUI is imported without its nodes; paths from its folder."""
    found = [path for folder in HOST_FOLDERS for path in sorted((host / folder).rglob("*.py"))]
    return [path.relative_to(host) for path in (*sorted(host.glob("*.py")), *found)]


def wanted_wheels(extra=(), without=()):
    """NAME==VERSION of what is packed: `extra` in place of the same name's."""
    pinned = {name: importlib.metadata.version(name) for name in INSTALLED}
    pinned |= dict(item.split("==") for item in (*WHEELS, *extra))
    return [f"{name}=={version}" for name, version in pinned.items() if name not in without]


def download(wheels, folder, python):
    """Paths of the wheels for Linux and this version of Python, fetched where they are not in `folder`."""
    tag = "cp" + python.replace(".", "")
    options = ["--no-deps", "--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    options += [f"--abi={abi}" for abi in (tag, "abi3", "none")]
    options += [f"--platform={name}" for name in PLATFORMS]
    paths = []
    for wheel in wheels:
        if not lying(folder, wheel, tag):
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                *options,
                f"--dest={folder}",
                wheel,
            ]
            if subprocess.run(command).returncode:
                name = wheel.partition("==")[0]
                raise SystemExit(f"pip could not download {wheel}. Leave it out: --without {name}")
        paths += lying(folder, wheel, tag)
    return paths


def lying(folder, wheel, tag):
    """Paths in a folder of NAME==VERSION for a version of Python, such as cp312."""
    found = folder.glob(wheel.replace("-", "_").replace("==", "-") + "-*.whl")
    return [
        path
        for path in found
        if any(one.abi in (tag, "abi3", "none") for one in parse_wheel_filename(path.name)[3])
    ]


def pack(target, wheels):
    """Writes the archive.

    Args:
        target: its path.
        wheels: paths of files that run.sh unpacks.
    """
    host = comfyui_path()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(target, "w:gz", compresslevel=1) as tar:
        for path in tree_files():
            tar.add(ROOT / path, f"{TOP}/{path.as_posix()}")
        for path in host_files(host):
            tar.add(host / path, f"{TOP}/.host/ComfyUI/{path.as_posix()}")
        add_text(tar, commit.FILE, commit.commit() + "\n")
        add_text(tar, "run.sh", RUN)
        for wheel in wheels:
            tar.add(wheel, f"{TOP}/wheels/{wheel.name}")


def add_text(tar, name, text):
    info = tarfile.TarInfo(f"{TOP}/{name}")
    info.size = len(text.encode())
    tar.addfile(info, io.BytesIO(text.encode()))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--to", type=Path, default=ROOT / "build" / "gpu-bench.tar.gz")
    parser.add_argument("--python", default="3.12", help="version there")
    parser.add_argument(
        "--wheel", action="append", default=[], help="NAME==VERSION to pack as well, or instead"
    )
    parser.add_argument("--without", action="append", default=[], help="a package to leave out")
    args = parser.parse_args(argv)
    if not shutil.which("git"):
        parser.error("git is not installed, and says which files belong to this tree.")
    wheels = ROOT / "build" / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    pack(args.to, download(wanted_wheels(args.wheel, args.without), wheels, args.python))
    print(
        f"{args.to}: {args.to.stat().st_size / 1e6:.0f} MB. There: tar xf {args.to.name} && sh {TOP}/run.sh"
    )


if __name__ == "__main__":
    main()
