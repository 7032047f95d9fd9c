"""What processes say to each other: the same value on the other side, and nothing twice."""

import importlib

import pytest
import torch
from lib.pack import load_pack
from wan21.wan.nag import Nag
from wan21.wan.option import Call
from wan21.wan.run_state import forget_states
from wan21.wan.skip_layer import SkipLayers, skip_layers
from wan21.wan.teacache import Plan, Residuals
from wan21.workers.wire import Packer, unpack

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool)


def big(dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (3, 7, 512), generator=g).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [slice(None), slice(1, 2)])
def test_a_tensor_comes_as_it_was(dtype, rows):
    sent = {
        "large": big(dtype)[:, rows],
        "turned": big(dtype).transpose(0, 2),
        "small": torch.zeros(2, dtype=dtype),
    }
    message = Packer().pack(sent)
    got = unpack(message, message.parts)
    for key, tensor in sent.items():
        assert got[key].dtype == tensor.dtype and torch.equal(got[key].float(), tensor.float()), key


def test_what_was_in_the_last_message_is_not_sent_again():
    packer, x = Packer(), big()
    first = packer.pack([x, x.clone(), big(seed=1)])
    assert len(first.parts) == 2 and len(first.uses) == 2
    x += 1  # what was sent is not what is there now
    second = packer.pack([x, big(seed=1)])
    assert len(second.parts) == 1 and second.uses[1] == first.uses[1]
    got = unpack(second, first.parts | second.parts)
    assert torch.equal(got[0], x) and torch.equal(got[1], big(seed=1))
    packer.forget()
    assert len(packer.pack([x]).parts) == 1


def test_minus_zero_and_nan_are_not_taken_for_others():
    packer = Packer()
    zeros, nan = torch.zeros(2048), torch.full((2048,), torch.nan)
    assert len(packer.pack([zeros, -zeros, nan, nan.clone()]).parts) == 3


def test_a_package_of_another_name_reads_it():
    load_pack("wan21_elsewhere")
    there = importlib.import_module("wan21_elsewhere.workers.wire")
    sent = Call(("cond",), around=(skip_layers((1,)),), context_attention=Nag()._context_attention)
    message = Packer().pack((SkipLayers((1, 2)), sent))
    layers, call = there.unpack(message, message.parts)
    assert type(layers).__module__ == "wan21_elsewhere.wan.skip_layer" and layers.layers == (1, 2)
    assert call.around[0].func.__module__ == "wan21_elsewhere.wan.skip_layer"
    assert type(call.context_attention.__self__).__module__ == "wan21_elsewhere.wan.nag"


def test_residuals_of_a_run_are_one_state_in_a_process():
    forget_states()
    plan = Plan((True, False, True), 0.0, 2)
    here = Residuals(plan)
    there = [unpack(message, {}) for message in (Packer().pack(here.around(step)) for step in (0, 1))]
    first, second = (around.args[0] for around in there)
    assert first is second and first is not here and first.plan == plan
    forget_states()
    assert unpack(Packer().pack(here.around(1)), {}).args[0] is not first
    forget_states()


def test_a_step_that_has_lost_what_it_would_reuse_is_computed():
    from types import SimpleNamespace

    def runner(num_blocks, passes, apply_block):
        for p in passes:
            p.x = p.x + 1

    residuals = Residuals(Plan((True, False, False), 0.0, 1))
    p = SimpleNamespace(name="cond", x=torch.zeros(1, 2, 4), text=torch.zeros(1))
    residuals.around(1)(runner)(2, [p], None)  # nothing was kept: computed, and kept for the next
    assert torch.equal(p.x, torch.ones(1, 2, 4))
    residuals.around(2)(lambda *_: pytest.fail("computed"))(2, [p], None)
    assert torch.equal(p.x, torch.full((1, 2, 4), 2.0))
