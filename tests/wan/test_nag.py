"""Normalized attention guidance against its formula in float64, and its neutral values."""

import pytest
import torch
from wan21.wan.nag import Nag, nag
from wan21.wan.option import Run
from wan21.wan.refusal import Refusal


def results(dtype=torch.float32, spread=1.0):
    g = torch.Generator().manual_seed(0)
    return [(spread * torch.randn(2, 7, 3, 8, generator=g)).to(dtype) for _ in range(2)]


def formula(positive, negative, scale, tau, alpha):
    """Section 3 of the paper, token by token, in float64."""
    out = torch.empty(positive.shape, dtype=torch.float64)
    for b in range(positive.shape[0]):
        for i in range(positive.shape[1]):
            z, n = positive[b, i].double().flatten(), negative[b, i].double().flatten()
            g = scale * z - (scale - 1) * n
            ratio = g.abs().sum() / z.abs().sum()
            if ratio > tau:
                g = g * tau * z.abs().sum() / (g.abs().sum() + 1e-7)
            out[b, i] = (alpha * g + (1 - alpha) * z).view_as(positive[b, i])
    return out


@pytest.mark.parametrize("scale, tau, alpha", [(11, 2.5, 0.25), (4, 1.5, 0.5), (2, 100, 1), (30, 0.5, 0.75)])
def test_equals_the_formula(scale, tau, alpha):
    for spread in (1e-3, 1.0, 1e3):
        positive, negative = results(spread=spread)
        ours, expected = (
            nag(positive, negative, scale, tau, alpha),
            formula(positive, negative, scale, tau, alpha),
        )
        assert ((ours - expected).norm() / expected.norm()).item() < 1e-6


def test_some_tokens_are_normalised_and_some_not():
    positive, negative = results()
    guided = positive + 2 * (positive - negative)
    grown = guided.flatten(2).abs().sum(-1) > 3.6 * positive.flatten(2).abs().sum(-1)
    assert 0 < grown.sum() < grown.numel()  # so that the comparison above sees both
    same = (nag(positive, negative, 3, 3.6, 1) - guided).flatten(2).abs().amax(-1) < 1e-5
    assert torch.equal(same, ~grown)


def test_16_bits_are_worked_out_in_float32():
    positive, negative = results(torch.bfloat16)
    exact = formula(positive, negative, 11, 2.5, 0.25)
    ours = nag(positive, negative, 11, 2.5, 0.25)
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - exact).abs().max() <= (exact.bfloat16().double() - exact).abs().max() * 1.01


def test_a_token_that_found_nothing_stays_finite():
    positive, negative = results()
    positive[0, 0] = 0
    assert nag(positive, negative, 11, 2.5, 0.25).isfinite().all()
    negative[0, 0] = 0
    assert nag(positive, negative, 11, 2.5, 0.25)[0, 0].abs().max() == 0


@pytest.mark.parametrize("values", [{"scale": 1.0}, {"alpha": 0.0}])
def test_neutral_values_give_the_positive_and_are_idle(values):
    positive, negative = results()
    arguments = {"scale": 11.0, "tau": 2.5, "alpha": 0.25} | values
    assert torch.equal(nag(positive, negative, **arguments), positive)
    assert "no effect" in Nag(**values).idle(None)


@pytest.mark.parametrize("values", [{"scale": 0.5}, {"tau": 0.0}, {"alpha": 1.5}, {"alpha": -0.1}])
def test_values_out_of_range_are_refused(values):
    [(name, value)] = values.items()
    with pytest.raises(Refusal, match=f"nag.{name} is {value:g}"):
        Nag(**values).check(Run(None, (), [], ()))
