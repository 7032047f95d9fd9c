"""What tests of several folders measure."""


def relative(ours, reference):
    """Relative error of `ours` against `reference`, by their norms; both of one shape."""
    assert ours.shape == reference.shape
    ours, reference = ours.double(), reference.double()
    return ((ours - reference).norm() / reference.norm()).item()
