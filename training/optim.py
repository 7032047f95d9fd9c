"""Muon for matrices and AdamW for everything else, as one optimizer; and a running average of weights.

Muon: Keller Jordan et al., https://kellerjordan.github.io/posts/muon. The size of its step follows
Liu et al., "Muon is Scalable for LLM Training" (arXiv:2502.16982): a root mean square of 0.2 lr, as AdamW's.
"""

import fnmatch
from collections import defaultdict
from contextlib import contextmanager

import torch

from ..wan.device import multiplies_in_bf16

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def bf16_products(device):
    """A context in which matrix products are taken in bfloat16 where that is faster; weights stay float32."""
    enabled = multiplies_in_bf16(device)
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)


class MuonAdamW:
    """Matrices and convolution kernels (as [out, in * taps]) go to Muon, vectors to AdamW.

    Args:
        named_parameters: Of the modules to train; those that need no gradient are left out.
        lr_muon, lr_adam: Step sizes at scale 1.
        adam: Patterns of names that AdamW trains although they are matrices: embeddings, first and last
            layers.
        weight_decay: Decoupled; of matrices only.
        iterations: Of Newton-Schulz; 4 is cheaper and nearly as good.
        in_bf16: Newton-Schulz in bfloat16 but for wide matrices.
    """

    def __init__(
        self,
        named_parameters,
        lr_muon,
        lr_adam,
        adam=(),
        weight_decay=0.0,
        momentum=0.95,
        iterations=5,
        in_bf16=False,
    ):
        named = [(name, p) for name, p in named_parameters if p.requires_grad]
        is_vector = [p.ndim < 2 or any(fnmatch.fnmatch(n, pattern) for pattern in adam) for n, p in named]
        self.matrices = [p for (_, p), vector in zip(named, is_vector) if not vector]
        vectors = [p for (_, p), vector in zip(named, is_vector) if vector]
        self.lr_muon, self.lr_adam = lr_muon, lr_adam
        self.weight_decay, self.momentum, self.iterations = weight_decay, momentum, iterations
        self.in_bf16 = in_bf16
        self.buffers = [torch.zeros_like(p) for p in self.matrices]
        self.adamw = torch.optim.AdamW(vectors, lr_adam, betas=(0.9, 0.98), weight_decay=0.0, foreach=True)
        self.parameters = self.matrices + vectors

    @torch.no_grad()
    def step(self, scale=1.0, clip=1.0):
        """One step at `scale` times both learning rates, then gradients are dropped.

        Args:
            clip: Largest norm of the whole gradient; larger ones are scaled down to it.

        Returns:
            The gradient's norm before the clipping.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, clip, foreach=True)
        groups = defaultdict(list)
        for p, buffer in zip(self.matrices, self.buffers):
            if p.grad is not None:
                buffer.lerp_(p.grad, 1 - self.momentum)
                groups[matrix_shape(p)].append((p, p.grad.lerp(buffer, self.momentum)))
        for (rows, columns), members in groups.items():
            stacked = torch.stack([g.reshape(len(g), -1) for _, g in members])
            updates = orthogonalize(stacked, self.iterations, self.in_bf16)
            updates = updates * (0.2 * max(rows, columns) ** 0.5)
            for (p, _), update in zip(members, updates):
                p.mul_(1 - scale * self.lr_muon * self.weight_decay)
                p.sub_(update.view(p.shape), alpha=scale * self.lr_muon)
        self.adamw.param_groups[0]["lr"] = scale * self.lr_adam
        self.adamw.step()
        for p in self.parameters:
            p.grad = None
        return norm.item()

    def state_dict(self):
        return {"muon": self.buffers, "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state):
        for buffer, saved in zip(self.buffers, state["muon"]):
            buffer.copy_(saved)
        self.adamw.load_state_dict(state["adamw"])


def matrix_shape(p):
    return p.shape[0], p[0].numel()


def orthogonalize(matrices, iterations, in_bf16=False):
    """[n, rows, columns] -> about the nearest matrices whose singular values are all one."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    if 2 * x.shape[1] <= x.shape[2]:
        x = newton_schulz_wide(x, iterations)
    else:
        x = newton_schulz(x.bfloat16() if in_bf16 else x, iterations).to(matrices.dtype)
    return x.mT if is_tall else x


def newton_schulz(x, iterations):
    a, b, c = NEWTON_SCHULZ
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def newton_schulz_wide(x, iterations):
    """The same, 1.7 times as fast for four times as many columns as rows: all but the first and the last
    product are of the square gram matrix, which is led along with the factor before `x`."""
    a, b, c = NEWTON_SCHULZ
    gram, product = x @ x.mT, None
    for i in range(iterations):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        if i + 1 < iterations:
            gram = factor @ (factor @ gram)
    return product @ x


class Average:
    """Exponential running average of a module's parameters; starts as their plain mean."""

    def __init__(self, module, decay=0.998):
        self.module, self.decay, self.steps = module, decay, 0
        self.weights = [p.detach().clone() for p in module.parameters()]

    @torch.no_grad()
    def update(self):
        self.steps += 1
        share = max(1 - self.decay, 1 / (self.steps + 1))
        torch._foreach_lerp_(self.weights, list(self.module.parameters()), share)

    @contextmanager
    def applied(self):
        """The module has the averaged weights inside the `with`."""
        self._swap()
        try:
            yield self.module
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self):
        for p, average in zip(self.module.parameters(), self.weights):
            mine = p.clone()
            p.copy_(average)
            average.copy_(mine)

    def state_dict(self):
        return {"weights": self.weights, "steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]
        for average, saved in zip(self.weights, state["weights"]):
            average.copy_(saved)


def warm_up_then_decay(step, steps, warm_up=20, hold=0.5, last=0.0):
    """Learning rate as a part of its full size: rises, stays up to `hold` of all steps, falls; linearly."""
    rise = min(1.0, (step + 1) / max(1, warm_up))
    fall = (steps - step) / max(1, steps * (1 - hold))
    return rise * max(last, min(1.0, last + (1 - last) * fall))
