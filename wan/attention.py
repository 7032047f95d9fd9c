"""The attention contract and its reference.

An `AttentionFn` maps q [B, Lq, N, D], k and v [B, Lk, N, D] (N heads of width D) to [B, Lq, N, D]:
softmax(q k^T / sqrt(D)) v, no mask. The model calls nothing else; hosts and options inject their own.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

AttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q, k, v):
    """The reference: PyTorch's scaled dot-product attention, on the best kernel the device has."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, N, L, D)
    if q.device.type == "cpu":  # each block of queries reads them all again: one head's rows side by side
        k, v = k.contiguous(), v.contiguous()
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # (B, Lq, N, D)
