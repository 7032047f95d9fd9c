"""`pytest -p pretended_plugin`: tests run on the pretended GPU.

They compare in float32, where the host would choose 16 bits on a GPU. With PRETENDED_AIMDO=1 weights come to
the device at their use, as they do on the host's NVIDIA GPUs.
"""

import os

import pretended_aimdo
import pretended_cuda
import pytest


def pytest_collection_finish(session):
    """After the host is imported, before a fixture is made."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.quant_ops
    from comfy import memory_management
    from comfy.cli_args import args

    if comfy.quant_ops._CK_AVAILABLE:
        comfy.quant_ops.ck.disable_backend("cuda")  # kernels for a GPU of its own
    comfy.model_management.FORCE_FP32 = args.fp32_vae = args.fp32_text_enc = True
    if os.environ.get("PRETENDED_AIMDO") == "1":
        pretended_aimdo.install()
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        memory_management.aimdo_enabled = True
    pretended_cuda.begin()
    assert comfy.model_management.get_torch_device().type == "cuda"  # else the tests would pass on the CPU


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef):
    """Checkpoints are made of models whose weights are there from the start; others' come at their use."""
    from comfy import memory_management

    enabled = memory_management.aimdo_enabled
    memory_management.aimdo_enabled = enabled and fixturedef.argname != "checkpoints"
    try:
        made = yield
        if enabled and fixturedef.argname == "models":
            assert all(model.is_dynamic() for model in made.values())
        return made
    finally:
        memory_management.aimdo_enabled = enabled
