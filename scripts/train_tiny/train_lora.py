"""A tiny LoRA on the trained DiT: the colours drain to grey over the clip, whatever else it shows.

LoRA: Hu et al., arXiv:2106.09685. Stored in the form that most trainers for Wan write,
`diffusion_model.<module>.lora_A.weight`, without alpha: strength 1 is what was trained.
"""

import random
import re

import torch
from train_tiny import latents
from train_tiny.optim import MuonAdamW, warm_up_then_decay
from train_tiny.progress import Parts, train
from train_tiny.train_dit import HeldOut, averaged_model, flow_loss, random_captions, random_sigmas

RANK = 8
LEARNING_RATE = 2e-3
TARGETS = re.compile(r"blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02])")
BUCKETS = (
    latents.Bucket(17, 64, 64, 0.7),
    latents.Bucket(17, 96, 96, 0.1),
    latents.Bucket(9, 64, 64, 0.1),
    latents.Bucket(33, 64, 64, 0.1),
)
FIRST_SEED = 5 * 10**8
LUMA = (0.299, 0.587, 0.114)  # BT.601
STEPS = {"smoke": (6, 16), "cpu": (300, 200), "cuda": (800, 2000)}  # steps, clips


def drained(video):
    """[B, 3, F, H, W]: the first frame in full colour, the last one grey, evenly between."""
    grey = torch.einsum("bcfhw,c->bfhw", video, video.new_tensor(LUMA))[:, None]
    share = torch.linspace(0, 1, video.shape[2], device=video.device)[:, None, None]
    return video + (grey - video) * share


class Lora(torch.nn.Module):
    """Low-rank additions to the linear layers of a DiT, put there by hooks while training."""

    def __init__(self, model, rank=RANK, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.down, self.up = torch.nn.ParameterDict(), torch.nn.ParameterDict()
        for name, module in model.named_modules():
            if not TARGETS.fullmatch(name):
                continue
            key = name.replace(".", "/")  # a ParameterDict takes no dots
            down = torch.randn(rank, module.in_features, generator=generator) * module.in_features**-0.5
            self.down[key] = torch.nn.Parameter(down)
            self.up[key] = torch.nn.Parameter(torch.zeros(module.out_features, rank))
            module.register_forward_hook(self._hook(key))

    def _hook(self, key):
        return lambda _module, args, output: output + args[0] @ self.down[key].T @ self.up[key].T

    def to_file(self):
        """The tensors under the names that the host's LoRA loader knows."""
        tensors = {}
        for key in self.down:
            name = "diffusion_model." + key.replace("/", ".")
            tensors[f"{name}.lora_A.weight"] = self.down[key].detach()
            tensors[f"{name}.lora_B.weight"] = self.up[key].detach()
        return tensors


def lora_stage(stage, dit_stage, vae, size="cpu", device="cpu"):
    """Train the LoRA on drained clips; the state's `lora` holds the result."""
    if stage.done:
        return
    steps, count = STEPS[size]
    folder = stage.work / "latents_lora"
    plan = latents.shard_plan(count, BUCKETS, FIRST_SEED)
    kept = latents.shard_plan(max(4, count // 10), BUCKETS[:1], 2 * latents.data.HELD_OUT)
    latents.write_shards(latents.Encoder(vae, device, drained), folder, plan + kept)
    clips, held_out = latents.Latents(folder, plan), HeldOut(folder, kept, device)
    model = averaged_model(dit_stage).to(device)
    lora = Lora(model.dit).to(device)
    optimizer = MuonAdamW(lora.named_parameters(), LEARNING_RATE, LEARNING_RATE, adam=("*",))

    def do_step(step):
        rng = random.Random(f"lora {step}")
        clip, condition, motions = clips.draw(rng, 16 * 80)
        texts, sigma = random_captions(motions, rng), random_sigmas(rng, len(clip))
        loss = flow_loss(model, clip.to(device), condition.to(device), texts, sigma, step)
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
