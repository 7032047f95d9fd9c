"""The seam inside cross-attention, shown with a toy of normalised attention guidance (NAG)."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from wan21.wan.attention import sdpa
from wan21.wan.chunked import block_executor
from wan21.wan.config import WanConfig
from wan21.wan.dit import WanModel, attend_text, unpatchify
from wan21.wan.glue import modulated
from wan21.wan.option import Option
from wan21.wan.rope import axis_frequencies, rope_table
from wan21.wan.sample import SampleJob, sample

SMALL = dict(dim=128, ffn_dim=192, num_heads=2, num_layers=3, text_dim=24)
CONFIGS = {"t2v": WanConfig(in_dim=16, **SMALL), "i2v": WanConfig(in_dim=36, image_dim=1280, **SMALL)}


def guided(positive, negative, scale, tau, alpha):
    """NAG (Chen et al., arXiv 2505.21179) of attention results [B, L, N, D/N]; norms over all of a token."""
    z = positive + scale * (positive - negative)
    ratio = z.flatten(2).norm(p=1, dim=-1) / positive.flatten(2).norm(p=1, dim=-1)
    z = z * (ratio.clamp(max=tau) / ratio)[..., None, None]
    return alpha * z + (1 - alpha) * positive


@dataclass(frozen=True)
class Nag(Option):
    scale: float = 4.0
    tau: float = 1.5
    alpha: float = 0.5
    needs_negative = True

    def begin(self, run, embed_time, record):
        return lambda call: replace(call, context_attention=self.context_attention)

    def context_attention(self, p, texts):
        if p.name != "cond":
            return attend_text

        def attend(cross, q, text, attention):
            results = (attend_text(cross, q, t, attention) for t in (text, texts["uncond"]))
            return guided(*results, self.scale, self.tau, self.alpha)

        return attend


class Loaded:
    """A denoiser of a model and its two prompts."""

    def __init__(self, kind, parts=1):
        g = torch.Generator().manual_seed(0)
        self.config = CONFIGS[kind]
        self.model = WanModel(self.config, torch.nn).eval().requires_grad_(False)
        for p in self.model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / max(1, p[0].numel()) ** 0.5)
        features = torch.randn(2, 9, self.config.text_dim, generator=g)
        self.texts = {"cond": features[:1], "uncond": features[1:]}
        self.image = torch.randn(1, self.config.in_dim - 16, 2, 4, 6, generator=g)
        self.clip = torch.randn(1, 257, 1280, generator=g) if self.config.image_dim else None
        self.execute = block_executor(parts)
        self.asked = []

    def predict(self, x, timestep, call):
        self.asked.append(call.pass_names)
        names, count = call.pass_names, len(call.pass_names)
        v = self.model(
            torch.cat([x, self.image], 1).repeat(count, 1, 1, 1, 1),
            torch.full((count,), timestep),
            torch.cat([self.texts[name] for name in names]),
            None if self.clip is None else self.clip.repeat(count, 1, 1),
            pass_names=names,
            execute=self.execute,
            context_attention=call.context_attention,
            contexts={name: self.texts[name] for name in call.contexts if name not in names},
        )
        return dict(zip(names, v.chunk(count)))

    def embed_time(self, timesteps):
        return self.model.embed_time(torch.tensor(timesteps))


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def noise():
    return torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(1))


def written_out(loaded, x, timestep, option):
    """The velocity of one conditional pass with NAG, cross-attention in plain torch on the weights."""
    model, config = loaded.model, loaded.config
    x = torch.cat([x, loaded.image], 1)
    negative = model.text_embedding(loaded.texts["uncond"])
    grid = (2, 2, 3)
    rope = rope_table(axis_frequencies(config.head_dim), grid)
    p = model.embed("cond", x, torch.tensor([timestep]), loaded.texts["cond"], loaded.clip, rope, sdpa)
    heads = lambda t: t.unflatten(-1, (config.num_heads, -1)).movedim(2, 1)  # noqa: E731

    def rms(t, weight):
        return t * (t.square().mean(-1, keepdim=True) + config.eps).rsqrt() * weight

    def softmax_attention(q, k, v):
        scores = heads(q) @ heads(k).mT / config.head_dim**0.5
        return (scores.softmax(-1) @ heads(v)).movedim(1, 2)

    x = p.x
    for block in model.blocks:
        e = (block.modulation + p.modulation).chunk(6, dim=1)
        q, k, v = block.self_attn(modulated(x, e[0], e[1], config.eps, x.dtype), rope)
        y = F.scaled_dot_product_attention(*(t.movedim(2, 1) for t in (q, k, v))).movedim(1, 2)
        x = x + block.self_attn.o(y.flatten(2)) * e[2]
        c = block.cross_attn
        q = rms(c.q(block.norm3(x)), c.norm_q.weight)
        found = [softmax_attention(q, rms(c.k(t), c.norm_k.weight), c.v(t)) for t in (p.text, negative)]
        y = guided(*found, option.scale, option.tau, option.alpha)
        if p.image is not None:
            y = y + softmax_attention(q, rms(c.k_img(p.image), c.norm_k_img.weight), c.v_img(p.image))
        x = x + c.o(y.flatten(2))
        x = x + block.ffn(modulated(x, e[3], e[4], config.eps, x.dtype)) * e[5]
    return unpatchify(model.head(x, p.time), grid)


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("kind", CONFIGS)
def test_one_pass_reads_the_negative_text_too(noise, kind, parts):
    """At guidance 1 no unconditional pass runs, and the option gets its text all the same."""
    loaded, option = Loaded(kind, parts), Nag()
    job = SampleJob(steps=1, guidance_scale=1.0, solver="euler", options=(option,))
    out, record = sample(job, loaded, noise, None)
    assert loaded.asked == record.passes == [("cond",)]
    expected = noise - written_out(loaded, noise, 1000.0, option)
    assert torch.allclose(out, expected, rtol=1e-4, atol=1e-4)
    plain, _ = sample(replace(job, options=()), Loaded(kind, parts), noise, None)
    assert not torch.allclose(out, plain, rtol=1e-2, atol=1e-2)


def test_beside_an_unconditional_pass(noise):
    """Both passes walk, jointly or alone; the text of the other is there in each case."""
    loaded, option = Loaded("t2v"), Nag()
    job = SampleJob(steps=1, guidance_scale=3.0, solver="euler", options=(option,))
    jointly, _ = sample(job, loaded, noise, None)
    cond = written_out(loaded, noise, 1000.0, option)
    uncond = loaded.model(noise, torch.tensor([1000.0]), loaded.texts["uncond"])
    assert torch.allclose(jointly, noise - uncond - 3 * (cond - uncond), rtol=1e-4, atol=1e-4)

    class Alone(Loaded):
        def predict(self, x, timestep, call):
            return {
                n: super(Alone, self).predict(x, timestep, replace(call, pass_names=(n,)))[n]
                for n in call.pass_names
            }

    assert torch.equal(sample(job, Alone("t2v"), noise, None)[0], jointly)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_negative_like_the_positive_changes_nothing(noise, kind):
    loaded = Loaded(kind)
    loaded.texts["uncond"] = loaded.texts["cond"]
    job = SampleJob(steps=2, guidance_scale=1.0)
    guided_out, _ = sample(replace(job, options=(Nag(),)), loaded, noise, None)
    assert torch.allclose(guided_out, sample(job, loaded, noise, None)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_plain_seam_is_bitwise_absent(noise, kind):
    """With the text of another pass at hand and nobody who reads it."""

    class Reads(Option):
        needs_negative = True

    job = SampleJob(steps=2, guidance_scale=1.0)
    with_text, _ = sample(replace(job, options=(Reads(),)), Loaded(kind), noise, None)
    assert torch.equal(with_text, sample(job, Loaded(kind), noise, None)[0])
