"""What a Wan2.1 model is made of, and how to read that from its weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from .files.bad_file import AGAIN
from .files.kinds import WrongKind, kind_by_metadata
from .files.limits import check_sides, count_blocks, json_table
from .refusal import Refusal

HEAD_DIM = 128
PATCH_SIZE = (1, 2, 2)
LATENT_CHANNELS = 16
MASK_CHANNELS = 4
CLIP_TOKENS = 257
VAE_STRIDE = (4, 8, 8)
PREVIEW_COLOURS = "latent_rgb_factors"  # key in a checkpoint's metadata


@dataclass(frozen=True)
class WanConfig:
    """Sizes of one Wan2.1 DiT, named as in the release's `wan/configs` and `config.json`.

    Attributes:
        in_dim: input channels, 16 (text to video) or 36 (16 noise + 4 mask + 16 image latent).
        dim: width D of a token.
        ffn_dim: hidden width of the feed-forward.
        num_heads: attention heads; `dim // num_heads` is the head width, 128 in every release.
        num_layers: transformer blocks.
        text_dim: width of the text encoder's features (4096 for umT5-XXL).
        image_dim: width of the CLIP vision features (1280), or None without an image branch.
        image_tokens: length of `img_emb.emb_pos` (514, first-last-frame models), or None.
        freq_dim: width of the sinusoidal time embedding.
        out_dim: output channels.
        eps: epsilon of every norm.
        empty_start: an image model that was also trained without any image (mask and image latent zero),
            so that it serves as text-to-video too. No release is; the bundled one is.
    """

    in_dim: int
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    text_dim: int = 4096
    image_dim: int | None = None
    image_tokens: int | None = None
    freq_dim: int = 256
    out_dim: int = LATENT_CHANNELS
    eps: float = 1e-6
    empty_start: bool = False

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise Refusal(
                f"width {self.dim} does not divide into {self.num_heads} heads of an even size",
                "Set num_heads in the checkpoint's metadata",
            )
        if self.freq_dim % 2:
            raise Refusal(
                f"its time embedding is {self.freq_dim} wide, and sines and cosines share it evenly", AGAIN
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def takes_image(self) -> bool:
        """Whether the model's input carries the mask and the image latent besides the noise."""
        return self.in_dim > LATENT_CHANNELS

    @property
    def kind(self) -> str:
        """The release's name for this sort of model: t2v, i2v or flf2v."""
        if not self.takes_image:
            return "t2v"
        return "flf2v" if self.image_tokens else "i2v"


_T2V_SMALL = WanConfig(in_dim=16, dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
_T2V_LARGE = WanConfig(in_dim=16, dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)

# The released sizes (Wan2.1 `wan/configs`; the 1.3B image model is Wan2.1-Fun-InP).
SIZES = {
    "t2v-1.3B": _T2V_SMALL,
    "t2v-14B": _T2V_LARGE,
    "i2v-1.3B": replace(_T2V_SMALL, in_dim=36, image_dim=1280),
    "i2v-14B": replace(_T2V_LARGE, in_dim=36, image_dim=1280),
    "flf2v-14B": replace(_T2V_LARGE, in_dim=36, image_dim=1280, image_tokens=2 * CLIP_TOKENS),
}


def detect_config(state_dict: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> WanConfig:
    """The sizes of a Wan2.1 DiT, read from its weights.

    Args:
        state_dict: tensors under Wan2.1's own names (`wan.files.to_wan_dit_keys`).
        metadata: safetensors metadata; its `config` JSON may set `num_heads` under `"transformer"`;
            `empty_start` = "true" sets the field of that name.

    Raises:
        Refusal: the weights are no Wan2.1 DiT of 16 or 36 input channels, or of sizes that no model has.
    """
    if kind := kind_by_metadata(metadata or {}):
        raise WrongKind("this file is not a Wan2.1 diffusion model", f"It is {kind}", kind)
    absent = [key for key in ("patch_embedding.weight", "blocks.0.ffn.0.weight") if key not in state_dict]
    if absent:
        raise Refusal(
            f"these are not Wan2.1 diffusion weights (no {' and '.join(absent)})",
            "Pick a Wan2.1 t2v, i2v or flf2v file",
        )
    dim, in_dim = _shape(state_dict, "patch_embedding.weight", 5)[:2]
    out_dim = _shape(state_dict, "head.head.weight", 2)[0] // math.prod(PATCH_SIZE)
    if in_dim not in (16, 36) or out_dim != LATENT_CHANNELS:
        raise Refusal(
            f"this Wan model takes {in_dim} channels and gives {out_dim}; Wan2.1 takes 16 (t2v) or 36 (i2v) "
            "and gives 16. 48 in and out is Wan2.2-5B, 48 in and 16 out is Fun-Control",
            "Pick a Wan2.1 t2v, i2v or flf2v file, or load this one with a loader of its own family",
        )
    sizes = {
        "dim": dim,
        "ffn_dim": _shape(state_dict, "blocks.0.ffn.0.weight", 2)[0],
        "text_dim": _shape(state_dict, "text_embedding.0.weight", 2)[1],
        "freq_dim": _shape(state_dict, "time_embedding.0.weight", 2)[1],
    }
    if "img_emb.proj.0.weight" in state_dict:
        sizes["image_dim"] = _shape(state_dict, "img_emb.proj.0.weight", 1)[0]
    if "img_emb.emb_pos" in state_dict:
        sizes["image_tokens"] = _shape(state_dict, "img_emb.emb_pos", 3)[1]
    check_sides(sizes)
    return WanConfig(
        in_dim=in_dim,
        num_heads=_stored_heads(metadata or {}) or max(1, dim // HEAD_DIM),
        num_layers=count_blocks(key.split(".")[1] for key in state_dict if key.startswith("blocks.")),
        out_dim=out_dim,
        empty_start=(metadata or {}).get("empty_start") == "true",
        **sizes,
    )


def _shape(state_dict: Mapping[str, Tensor], key: str, axes: int) -> tuple[int, ...]:
    """The shape of a tensor that a size is read from."""
    if key not in state_dict:
        raise Refusal(f"it lacks {key}: the file is incomplete", AGAIN)
    shape = tuple(state_dict[key].shape)
    if len(shape) != axes:
        raise Refusal(f"{key} has the shape {list(shape)}, and {axes} axes are read", AGAIN)
    return shape


def _stored_heads(metadata: Mapping[str, str]) -> int | None:
    """The number of heads in a checkpoint's metadata, which shapes do not show; None where it gives none."""
    table = json_table(metadata.get("config", "{}"), "`config` in its metadata").get("transformer", {})
    if not isinstance(table, dict):
        raise Refusal("`config.transformer` in its metadata must be a JSON table", AGAIN)
    heads = table.get("num_heads")
    if heads is None:
        return None
    if isinstance(heads, bool) or not isinstance(heads, int):
        raise Refusal(f"num_heads in its metadata is a {type(heads).__name__}, not a whole number", AGAIN)
    check_sides({"num_heads": heads})
    return heads


def preview_colours(metadata: Mapping[str, str]) -> tuple[list[list[float]], list[float]] | None:
    """The colour of each latent channel, of a model whose VAE is not Wan2.1's; None where it is.

    Returns:
        (16 times [r, g, b], [r, g, b] to add), for normalised latents and pixels in [-1, 1]; or 9 times as
        many rows, where a colour comes of a latent pixel's 3x3: nine for each channel, row by row.

    Raises:
        Refusal: the metadata holds something else there.
    """
    if PREVIEW_COLOURS not in metadata:
        return None
    table = json_table(metadata[PREVIEW_COLOURS], f"`{PREVIEW_COLOURS}` in its metadata")
    factors, bias = table.get("factors"), table.get("bias")
    rows = factors if isinstance(factors, list) else []
    if len(rows) not in (LATENT_CHANNELS, 9 * LATENT_CHANNELS) or not all(map(_is_colour, [*rows, bias])):
        raise Refusal(
            f"`{PREVIEW_COLOURS}` in its metadata must be {LATENT_CHANNELS} or {9 * LATENT_CHANNELS} rows of "
            "3 numbers as `factors` and one as `bias`",
            AGAIN,
        )
    assert isinstance(bias, list)
    return rows, bias


def _is_colour(row: object) -> bool:
    return isinstance(row, list) and len(row) == 3 and all(_is_number(value) for value in row)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e3
