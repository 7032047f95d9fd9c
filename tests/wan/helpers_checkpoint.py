"""State dicts of toy models in the layouts that files come in."""

import torch


def randomise(module, seed=0):
    """Every parameter different, biases and norms too; matrices of unit gain."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 and "gamma" not in name else 0.2
        parameter.data = noise * scale + ("norm" in name or "gamma" in name)
    return module.eval().requires_grad_(False)


def meta_state_dict(build):
    """Keys and shapes of a model, without its memory."""
    with torch.device("meta"):
        return build().state_dict()


def with_prefix(prefix, state_dict):
    return {prefix + key: tensor for key, tensor in state_dict.items()}
