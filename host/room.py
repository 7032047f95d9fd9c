"""Room on a device."""

import comfy.model_management
import torch


def usable_bytes(device: torch.device) -> float:
    """Bytes of a device for models and activations: what is free, and what the host would free for us."""
    management = comfy.model_management
    # Entries of collected MODELs (`model` is None) stay in the list until the host's next load.
    loaded = (m for m in management.current_loaded_models if m.device == device and m.model is not None)
    held = 0 if device.type == "cpu" else sum(m.model_loaded_memory() for m in loaded)
    free = management.get_free_memory(device)
    assert isinstance(free, (int, float))  # a pair only where it is asked for
    return free + held - management.extra_reserved_memory()
