"""Three-axis rotary position embedding (RoPE) of Wan2.1.

B batch, L tokens = F*H*W of the patch grid, N heads, D head width. Pairs are interleaved: channels
2i and 2i+1 turn together.
"""

import torch
from torch import Tensor

from .device import is_wide
from .inplace import may_overwrite

TOKENS_AT_ONCE = 8192  # turned in float32 at a time: no float32 copy of a whole 16-bit input


def axis_frequencies(head_dim: int, theta: float = 10000.0) -> tuple[Tensor, ...]:
    """Angle per position step of each pair, for the axes (time, height, width).

    Wan2.1 splits D into (D - 4*(D//6), 2*(D//6), 2*(D//6)): 44, 42, 42 of 128.

    Returns:
        Three float64 tensors, of D_axis/2 frequencies each; options such as RIFLEx edit the first.

    Source: `rope_params` and `WanModel.freqs` in Wan2.1 `wan/modules/model.py`.
    """
    sixth = head_dim // 6
    axes = (head_dim - 4 * sixth, 2 * sixth, 2 * sixth)
    return tuple(theta ** -(torch.arange(0, d, 2, dtype=torch.float64) / d) for d in axes)


def rope_table(
    frequencies: tuple[Tensor, ...], grid: tuple[int, ...], device: torch.device | None = None
) -> Tensor:
    """Rotations of every token of a patch grid.

    Args:
        frequencies: of the three axes, from `axis_frequencies`.
        grid: (F, H, W) of the patch grid.

    Returns:
        (cos, sin) float32 [F*H*W, 1, D/2, 2]; angles are taken in float64, so that late frames lose nothing.
    """
    axes = []
    for axis, (length, frequency) in enumerate(zip(grid, frequencies)):
        angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)  # (length, D_axis/2)
        turns = torch.stack([angle.cos(), angle.sin()], dim=-1).float().to(device)
        shape = [length if a == axis else 1 for a in range(3)]
        axes.append(turns.view(*shape, -1, 2).expand(*grid, -1, 2))  # (F, H, W, D_axis/2, 2)
    return torch.cat(axes, dim=-2).flatten(0, 2).unsqueeze(1)


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Turned queries or keys [B, L, N, D], computed in float32; x itself where it `may_overwrite`.

    Args:
        x: [B, L, N, D].
        table: from `rope_table`, the rows of these tokens.
    """
    if not may_overwrite() or torch.compiler.is_compiling():
        return _turn(x.float(), table).to(x.dtype)
    for part, rotation in zip(x.split(TOKENS_AT_ONCE, dim=1), table.split(TOKENS_AT_ONCE, dim=-4)):
        part.copy_(_turn(part.float(), rotation))
    return x


def _turn(x: Tensor, table: Tensor) -> Tensor:
    pairs = x.unflatten(-1, (-1, 2))  # (B, L, N, D/2, 2)
    if torch.compiler.is_compiling() or not is_wide(x.device):  # inductor writes no code for complex numbers
        (a, b), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)  # (B, L, N, D)
    turned = torch.view_as_complex(pairs) * torch.view_as_complex(table)
    return torch.view_as_real(turned).flatten(-2)  # (B, L, N, D)
