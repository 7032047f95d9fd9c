"""The kernels of `wan.kernels` in PyTorch, called as the Triton ones are: to test what is around them."""

from functools import partial

import torch
import torch.nn.functional as F
from wan21.wan.rope import apply_rope


def residual_norm(x, y, gate, affine, eps, dtype):
    if y is not None:
        x.add_(y if gate is None else y.float() * gate)
    if affine is not None:
        weight, bias = affine
        return (F.layer_norm(x, x.shape[-1:], eps=eps) * weight + bias).to(dtype)


def rms_rope(x, weight, eps, heads, table):
    normed = F.rms_norm(x, x.shape[-1:], weight, eps).unflatten(-1, (heads, -1))
    return normed if table is None else apply_rope(normed, table)


def gelu_product(x, weight, bias):
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


ALL = {"residual_norm": residual_norm, "rms_rope": rms_rope, "gelu_product": gelu_product}


def counting():
    """({name: how often it has run}, {name: kernel})"""
    ran = dict.fromkeys(ALL, 0)

    def count(name, *args):
        ran[name] += 1
        return ALL[name](*args)

    return ran, {name: partial(count, name) for name in ALL}


# What they take, for tensors without data.
def residual_norm_room(x, y, gate, affine, eps, dtype):
    return None if affine is None else torch.empty(x.shape, dtype=dtype, device=x.device)


def rms_rope_room(x, weight, eps, heads, table):
    return torch.empty_like(x).unflatten(-1, (heads, -1))


def gelu_product_room(x, weight, bias):
    return x.new_empty(*x.shape[:-1], len(weight))


ROOM = {"residual_norm": residual_norm_room, "rms_rope": rms_rope_room, "gelu_product": gelu_product_room}
