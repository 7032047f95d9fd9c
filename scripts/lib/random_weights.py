"""Random weights for models that are compared, timed or counted, and never show anything."""

import torch


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Gives `module` random weights of unit gain, for inference.

    Activations stay near 1 through all layers, and every bias, norm and modulation is away from its neutral
    value: one that is left out, or taken twice, shows. The same seed gives the same weights on the same kind
    of device; they are made where they lie.

    Returns:
        The module itself.
    """
    generators = {}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            device = parameter.device
            if device not in generators:
                generators[device] = torch.Generator(device).manual_seed(seed)
            parameter.copy_(_random_weight(name, parameter.shape, generators[device]))
    return module.eval().requires_grad_(False)


def _random_weight(name, shape, generator):
    noise = torch.randn(shape, generator=generator, device=generator.device)
    if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
        return 1 + 0.2 * noise
    if len(shape) > 1 and "modulation" not in name and "emb_pos" not in name:
        return noise / shape[1:].numel() ** 0.5
    return 0.2 * noise
