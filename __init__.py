"""Wan2.1 image-to-video for ComfyUI: our own DiT, VAE and solvers behind the host's standard sockets.

The host calls `comfy_entrypoint`; everything else is imported there, so that this file costs the
host's start nothing and tests can import `wan/` without a host.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Return the extension that lists this pack's nodes (called by ComfyUI at start)."""
    from .extension import Wan21Extension

    return Wan21Extension()
