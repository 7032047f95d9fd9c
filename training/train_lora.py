"""A tiny LoRA on the trained DiT: the colours drain to grey over the clip, whatever else it shows.

LoRA: Hu et al., arXiv:2106.09685. Stored in the form that most trainers for Wan write,
`diffusion_model.<module>.lora_A.weight`, without alpha: strength 1 is what was trained.

The model itself is the teacher. Each clip is there twice, in colour and drained, and the LoRA shall turn what
the model makes of the coloured one into the drained one: everything that cannot be foreseen of a clip is in
both and drops out, and only colour is left to learn. It does so from inputs that still hold some colour, as
its own earlier steps leave them; trained on drained inputs alone it believed what it saw and kept half.
"""

import random
import re
from contextlib import contextmanager

import torch

from . import latents
from .optim import MuonAdamW, bf16_products, warm_up_then_decay
from .progress import Parts, train
from .train_dit import HeldOut, averaged_model, random_captions, random_sigmas

RANK = 8
LEARNING_RATE = 4e-3
TARGETS = re.compile(r"blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02])")
BUCKETS = (
    latents.Bucket(17, 64, 64, 0.7),
    latents.Bucket(17, 96, 96, 0.1),
    latents.Bucket(9, 64, 64, 0.1),
    latents.Bucket(33, 64, 64, 0.1),
)
FIRST_SEED = 5 * 10**8
LUMA = (0.299, 0.587, 0.114)  # BT.601
STEPS = {"smoke": (6, 16), "cpu": (1400, 200), "cuda": (1400, 2000)}  # steps, clips


def drained(video):
    """[B, 3, F, H, W]: the first frame in full colour, the last one grey, evenly between."""
    grey = torch.einsum("bcfhw,c->bfhw", video, video.new_tensor(LUMA))[:, None]
    share = torch.linspace(0, 1, video.shape[2], device=video.device)[:, None, None]
    return video + (grey - video) * share


class Lora(torch.nn.Module):
    """Low-rank additions to the linear layers of a DiT, put there by hooks while training."""

    def __init__(self, model, rank=RANK, seed=0, targets=TARGETS):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.down, self.up = torch.nn.ParameterDict(), torch.nn.ParameterDict()
        self.on = True
        for name, module in model.named_modules():
            if not re.fullmatch(targets, name):
                continue
            key = name.replace(".", "/")  # a ParameterDict takes no dots
            down = torch.randn(rank, module.in_features, generator=generator) * module.in_features**-0.5
            self.down[key] = torch.nn.Parameter(down)
            self.up[key] = torch.nn.Parameter(torch.zeros(module.out_features, rank))
            module.register_forward_hook(self._hook(key))

    def _hook(self, key):
        def add(_module, args, output):
            return output + args[0] @ self.down[key].T @ self.up[key].T if self.on else output

        return add

    @contextmanager
    def switched_off(self):
        self.on = False
        yield
        self.on = True

    def to_file(self):
        """The tensors under the names that the host's LoRA loader knows."""
        tensors = {}
        for key in self.down:
            name = "diffusion_model." + key.replace("/", ".")
            tensors[f"{name}.lora_A.weight"] = self.down[key].detach()
            tensors[f"{name}.lora_B.weight"] = self.up[key].detach()
        return tensors


def colour_loss(model, lora, coloured, drained, texts, sigma, seed):
    """Mean squared error of the velocity against the teacher's, led from the input to the drained clip.

    Args:
        coloured, drained: (clip [B, 16, T, h, w], conditioning [B, 20, T, h, w]) of the same clips.
        seed: of the noise and of how much colour an input holds.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(drained[0].shape, generator=generator).to(drained[0])
    left = torch.rand(len(sigma), generator=generator).to(noise)  # of the colour, over sigma
    sigma = sigma.to(noise)
    share, left = (t[:, None, None, None, None] for t in (sigma, left))
    colour = coloured[0] - drained[0]
    with torch.no_grad(), lora.switched_off():
        teacher = model((1 - share) * coloured[0] + share * noise, sigma, coloured[1], texts)
    x = (1 - share) * (drained[0] + share * left * colour) + share * noise
    # The teacher's clip is x0 = x_coloured - sigma * teacher; this is (x - (x0 - colour)) / sigma.
    expected = teacher + colour * (1 + left * (1 - share))
    return (model(x, sigma, drained[1], texts) - expected).square().mean()


def lora_stage(stage, dit_stage, vae, size="cpu", device="cpu"):
    """Train the LoRA on drained clips; the state's `lora` holds the result."""
    if stage.done:
        return
    steps, count = STEPS[size]
    plan = latents.shard_plan(count, BUCKETS, FIRST_SEED)
    kept = latents.shard_plan(max(4, count // 10), BUCKETS[:1], 2 * latents.data.HELD_OUT)
    folder, folder_coloured = stage.work / "latents_lora", stage.work / "latents_lora_coloured"
    encoder = latents.Encoder(vae, device, drained)
    latents.write_shards(encoder, folder, plan)
    latents.write_shards(encoder, folder, kept)
    latents.write_shards(latents.Encoder(vae, device), folder_coloured, plan)
    clips, coloured = latents.Latents(folder, plan), latents.Latents(folder_coloured, plan)
    held_out = HeldOut(folder, kept, device)
    model = averaged_model(dit_stage).to(device)
    lora = Lora(model.dit).to(device)
    optimizer = MuonAdamW(lora.named_parameters(), LEARNING_RATE, LEARNING_RATE, adam=("*",))

    def do_step(step):
        *one, motions = clips.draw(random.Random(f"lora {step}"), 16 * 80)
        *other, _ = coloured.draw(random.Random(f"lora {step}"), 16 * 80)  # the same clips
        one, other = ([part.to(device) for part in parts] for parts in (one, other))
        rng = random.Random(f"lora texts {step}")
        texts, sigma = random_captions(motions, rng), random_sigmas(rng, len(motions))
        with bf16_products(device):
            loss = colour_loss(model, lora, other, one, texts, sigma, step)
        loss.backward()
        return {"loss": loss.item(), "norm": optimizer.step(warm_up_then_decay(step, steps))}

    def measure():
        return {"held_out": held_out.loss(model)}

    train(stage, Parts(lora=lora, optimizer=optimizer), steps, do_step, measure, measure_every=100)


def trained_lora(stage, model):
    """The trained LoRA's tensors, for the export."""
    lora = Lora(model.dit)
    lora.load_state_dict(stage.load()["parts"]["lora"])
    return lora.to_file()
