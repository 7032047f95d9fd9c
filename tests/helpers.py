"""What tests of several folders measure."""


def relative(ours, reference):
    """Relative error of `ours` against `reference`, by their norms; both of one shape."""
    assert ours.shape == reference.shape
    ours, reference = ours.double(), reference.double()
    return ((ours - reference).norm() / reference.norm()).item()


ON = {
    "cache": "teacache", "cfg_star": "on", "nag": "on", "skip_layers": "on", "step_range": "part",
    "execution": "custom",
}  # fmt: skip


def grouped(**inputs):
    """Inputs of Wan21Sampler with its groups as the host hands them.

    `cache__multiplier=2` switches the group `cache` on and sets `multiplier`; `cfg_star=True` takes the
    defaults.
    """
    found = {}
    for name, value in inputs.items():
        group, _, setting = name.partition("__")
        if group not in ON or isinstance(value, dict):
            found[name] = value
        elif setting or value:
            found.setdefault(group, {group: ON[group]})
            found[group] |= {setting: value} if setting else {}
    return found
