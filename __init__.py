"""Wan2.1 image-to-video for ComfyUI: our own DiT, VAE and solvers behind the host's standard sockets.

The host calls `comfy_entrypoint`; everything else is imported there, so that this file costs the
host's start nothing and tests can import `wan/` without a host.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .extension import Wan21Extension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> "Wan21Extension":
    """The extension that lists this pack's nodes; called by ComfyUI at start."""
    from .extension import Wan21Extension

    return Wan21Extension()
