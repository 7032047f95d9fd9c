"""A LATENT kept in the host's output folder while other nodes work on it."""

from pathlib import Path

import comfy.utils
import folder_paths
import torch
from safetensors import SafetensorError
from torch import Tensor

PREFIX = "wan21/undecoded"


class KeptLatent:
    """A file of the host's native LATENT format, as SaveLatent writes and LoadLatent reads it.

    Args:
        samples: [B, 16, T, h, w], raw.

    Raises:
        OSError: The output folder cannot be written.
    """

    def __init__(self, samples: Tensor):
        output = folder_paths.get_output_directory()
        try:
            folder, name, counter, _, _ = folder_paths.get_save_image_path(PREFIX, output)
        except Exception as error:  # the host raises a plain one when the folder is a link to elsewhere
            raise OSError(str(error)) from error
        self.path = Path(folder) / f"{name}_{counter:05}_.latent"
        # LoadLatent divides by SD's factor unless this marker is there.
        tensors = {
            "latent_tensor": samples.cpu().contiguous(),
            "latent_format_version_0": torch.tensor([]),
        }
        try:
            comfy.utils.save_torch_file(tensors, str(self.path))
        except SafetensorError as error:
            self.remove()  # a full disk leaves a part of it
            raise OSError(str(error)) from error

    def remove(self) -> None:
        """Deletes the file, if it is there."""
        self.path.unlink(missing_ok=True)
