"""The host in this process, in inference mode as it runs nodes."""

from helpers_host import in_inference_mode  # noqa: F401
