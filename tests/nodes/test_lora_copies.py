"""LoRAs on the copies that the host makes of a MODEL: all weights there, or of other memory."""

import comfy.sd
import pytest
from helpers import relative
from test_lora import load, loras  # noqa: F401 (fixture)
from test_lora_merged_schedule import lora, run  # noqa: F401 (fixture)
from wan21 import host

SCHEDULES = {"constant": "", "schedule": "1, 0.25"}


@pytest.mark.parametrize("dtype", ["default", "fp8_e4m3fn", "native"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_lora_acts_equally_on_a_copy_without_dynamic_memory(files, prompts, lora, dtype, schedule):  # noqa: F811
    path = str(files["t2v"])
    plain = comfy.sd.load_diffusion_model(path) if dtype == "native" else host.load_model(path, dtype)
    model = load(plain, lora, 0.8, schedule)[0]
    copy = model.clone(disable_dynamic=True, force_deepcopy=True)
    assert copy.model is not model.model and not copy.is_dynamic()
    expected, copied, without = (run(m, prompts) for m in (model, copy, plain))
    assert relative(copied, expected) < 1e-4 * relative(without, expected)
    assert relative(run(load(copy, lora, 0.5, schedule)[0], prompts), expected) > 0.1 * relative(
        without, expected
    )
