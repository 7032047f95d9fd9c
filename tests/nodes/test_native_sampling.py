"""Schedule and guidance beside the host's own."""

from types import SimpleNamespace

import comfy.samplers
import torch
from comfy_extras.nodes_cfg import CFGZeroStar
from helpers_guidance import authors_formula, random_velocities
from hypothesis import given
from hypothesis import strategies as st
from wan21.wan.guidance import cfg, cfg_zero_star
from wan21.wan.sigmas import flow_sigmas, partial_sigmas
from wan21.wan.solvers import SOLVERS


@given(st.integers(1, 60), st.floats(0.001, 1000), st.sampled_from(sorted(SOLVERS)), st.floats(0.01, 1))
def test_partial_schedule_is_the_hosts(steps, shift, solver, denoise):
    host = SimpleNamespace(
        device="cpu",
        calculate_sigmas=lambda n: torch.tensor(flow_sigmas(n, shift, solver), dtype=torch.float64),
    )
    comfy.samplers.KSampler.set_steps(host, steps, denoise)
    assert partial_sigmas(steps, shift, solver, denoise) == host.sigmas.tolist()


def test_the_native_node_drops_a_term():
    """The host's CFGZeroStar works on denoised latents and lacks (1 - w)(1 - s*) x."""

    class Model:
        def clone(self):
            return self

        def set_model_sampler_post_cfg_function(self, function):
            self.function = function

    cond, uncond = random_velocities()
    sigma, w = 0.7, 5.0
    x = torch.randn(cond.shape, generator=torch.Generator().manual_seed(1))
    clean = {name: x - sigma * v for name, v in (("cond", cond), ("uncond", uncond))}
    model = Model()
    CFGZeroStar.execute(model)
    theirs = model.function(
        {
            "cond_scale": w, "input": x, "cond_denoised": clean["cond"], "uncond_denoised": clean["uncond"],
            "denoised": cfg(clean["cond"], clean["uncond"], w),
        }
    )  # fmt: skip
    exact = x - sigma * authors_formula(cond, uncond, w)
    assert torch.allclose((x - sigma * cfg_zero_star(cond, uncond, w)).double(), exact, atol=1e-5)
    s = torch.stack([(c * u).sum() / u.square().sum() for c, u in zip(cond, uncond)]).view(-1, 1, 1, 1, 1)
    missing = (1 - w) * (1 - s) * x
    assert missing.abs().max() > 0.1
    assert torch.allclose(theirs + missing, exact.float(), atol=1e-4)
