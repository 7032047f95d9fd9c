"""Our DiT against diffusers', in float32 with the same random weights, and the laws it must keep."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from helpers import relative
from helpers_dit import FLF, I2V, KINDS, SMALL, T2V, inputs, ours
from lib.random_weights import randomise
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from wan21.wan.config import WanConfig, detect_config
from wan21.wan.dit import WanModel, run_blocks
from wan21.wan.files import to_wan_dit_keys
from wan21.wan.glue import added


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_equals_diffusers(config):
    peer = WanTransformer3DModel(
        in_channels=config.in_dim, num_attention_heads=config.num_heads, attention_head_dim=config.head_dim,
        text_dim=config.text_dim, ffn_dim=config.ffn_dim, num_layers=config.num_layers,
        image_dim=config.image_dim, added_kv_proj_dim=config.dim if config.image_dim else None,
        pos_embed_seq_len=config.image_tokens,
    )  # fmt: skip
    randomise(peer, seed=3)
    state = to_wan_dit_keys(peer.state_dict())
    assert detect_config(state) == config
    model = WanModel(config, torch.nn).eval()
    model.load_state_dict(state)
    x, t, _, clip = inputs(config, 3, 6, 10)
    text = torch.randn(1, 512, config.text_dim)  # diffusers splits the context at 512 text tokens
    theirs = clip.view(2, 257, 1280) if config.image_tokens else clip  # start and end as a batch
    expected = peer(x, t, text, encoder_hidden_states_image=theirs, return_dict=False)[0]
    assert relative(model(x, t, text, clip), expected) < 1e-5


@pytest.mark.parametrize("config", [T2V, FLF], ids=["t2v", "flf2v"])
def test_joint_pass_equals_separate_passes_bitwise(config):
    model = ours(config)
    x, t, text, clip = inputs(config, batch=2, seed=7)
    joint = model(x, t, text, clip, pass_names=("cond", "uncond"))
    for i in range(2):
        alone = model(x[i : i + 1], t[i : i + 1], text[i : i + 1], None if clip is None else clip[i : i + 1])
        assert torch.equal(joint[i : i + 1], alone)


def test_the_runner_sees_every_block_of_every_pass_in_joint_order():
    model = ours(T2V)
    x, t, text, _ = inputs(T2V, batch=2)
    seen = []

    def spy(num_blocks, passes, call):
        def record(i, p):
            seen.append((i, p.name))
            return call(i, p)

        run_blocks(num_blocks, passes, record)

    out = model(x, t, text, pass_names=("cond", "uncond"), runner=spy)
    assert seen == [(i, name) for i in range(3) for name in ("cond", "uncond")]
    assert torch.equal(out, model(x, t, text, pass_names=("cond", "uncond")))


def test_same_input_same_bytes_and_nothing_is_kept():
    model = ours(I2V)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    args = inputs(I2V)
    kept = [None if a is None else a.clone() for a in args]
    first, second = model(*args), model(*args)
    assert torch.equal(first, second)
    assert all(a is None or torch.equal(a, b) for a, b in zip(args, kept))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}


def test_training_gradients_equal_finite_differences():
    with torch.inference_mode(False):
        config = WanConfig(in_dim=16, dim=24, ffn_dim=16, num_heads=1, num_layers=1, text_dim=8, freq_dim=8)
        model = randomise(WanModel(config, torch.nn)).requires_grad_(True)
        x, t, text, _ = inputs(config, 1, 2, 4)
        model(x, t, text).square().sum().backward()
        weight = model.blocks[0].self_attn.q.weight
        i = weight.grad.abs().argmax().item()
        with torch.no_grad():
            values = []
            for step in (1e-2, -2e-2):
                weight.view(-1)[i] += step
                values.append(model(x, t, text).double().square().sum())
        slope = ((values[0] - values[1]) / 2e-2).item()
        assert slope == pytest.approx(weight.grad.view(-1)[i].item(), rel=2e-2)


@pytest.mark.parametrize(
    "extra, family",
    [("vace_blocks.0.after_proj.weight", "VACE"), ("ref_conv.weight", "Fun-Control")],
)
def test_other_families_are_named(extra, family):
    with torch.device("meta"):
        state = WanModel(T2V, torch.nn).state_dict()
    with pytest.raises(ValueError, match=family):
        to_wan_dit_keys(state | {extra: torch.empty(1)})


def test_other_channel_counts_are_named():
    with torch.device("meta"):
        state = WanModel(WanConfig(in_dim=48, out_dim=48, **SMALL), torch.nn).state_dict()
    with pytest.raises(ValueError, match=r"48 channels.*Wan2\.2-5B"):
        detect_config(state)


def test_metadata_sets_the_head_count():
    with torch.device("meta"):
        state = WanModel(T2V, torch.nn).state_dict()
    config = detect_config(state, {"config": '{"transformer": {"num_heads": 4}}'})
    assert config.num_heads == 4 and config.head_dim == 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_residual_step_widens_what_it_adds(dtype):
    """Bit for bit what a float32 copy of y would give."""
    x, y, gate = torch.randn(2, 70, 64), torch.randn(2, 70, 64).to(dtype), torch.randn(2, 1, 64)
    expected = torch.addcmul(x, y.float(), gate)
    with torch.no_grad():
        stream = x.clone()
        assert added(stream, y, gate) is stream
    assert torch.equal(stream, expected)


class Narrow(TorchDispatchMode):
    """`meta`, a device that is neither the CPU nor CUDA, has no float64 and no complex numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if torch.is_tensor(t) and t.device.type == "meta":
                assert t.dtype not in (torch.float64, torch.complex64), func
        return out


def test_a_device_without_float64_and_complex_numbers():
    with torch.device("meta"):
        model = WanModel(I2V, torch.nn)
    x, t, text, clip = (part.to("meta") for part in inputs(I2V))
    with Narrow():
        assert model(x, t, text, clip).shape == (1, 16, *x.shape[2:])
