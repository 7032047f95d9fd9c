"""Whatever lies in a model folder is refused in a sentence with its name, or loaded as it says; nothing else.

Files are made from small real ones: their tensors, metadata and bytes are changed at random. The job API's
verdict on a file is that of its loader.
"""

import os
import resource
import time

import pytest
import torch
from helpers_hostile import Gguf, Safetensors, changed_gguf, changed_safetensors, damaged
from hypothesis import HealthCheck, given, settings
from lib.gguf_files import write_umt5
from safetensors.torch import load_file, save_file
from wan21 import host
from wan21.nodes.load import about_file
from wan21.nodes.lora_report import check_lora
from wan21.server.installed import BUNDLED
from wan21.server.traits import read_traits
from wan21.wan.config import WanConfig
from wan21.wan.dit import WanModel
from wan21.wan.vae import WanVAE

SIZE = WanConfig(
    in_dim=36, dim=64, ffn_dim=32, num_heads=1, num_layers=2, text_dim=8, freq_dim=8, image_dim=16
)
SECONDS, MEGABYTES = 10, 400  # for one file, and for all of a kind together
NAME = "made.safetensors"


def numbers(state_dict):
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(value.shape, generator=generator) for key, value in state_dict.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole file of each kind, in parts."""
    folder = tmp_path_factory.mktemp("whole")
    with torch.device("meta"):
        dit, vae = WanModel(SIZE, torch.nn).state_dict(), WanVAE(dim=4).state_dict()
    [bundled] = (BUNDLED / "text_encoders").iterdir()
    umt5 = load_file(bundled)
    lora = {f"blocks.{i}.ffn.0.lora_{ab}.weight": torch.randn(s) for i in (0, 1) for ab, s in FACTORS.items()}
    made = {"dit": numbers(dit), "vae": numbers(vae), "lora": lora | {"blocks.0.ffn.0.alpha": torch.ones(1)}}
    for name, state_dict in made.items():
        save_file(state_dict, folder / name, {"format": "pt"})
    write_umt5(umt5, folder / "umt5.gguf")
    parts = {name: Safetensors.of(folder / name) for name in made} | {"umt5": Safetensors.of(bundled)}
    return parts | {"dit.gguf": Gguf.made_of(made["dit"]), "umt5.gguf": Gguf.of(folder / "umt5.gguf")}


FACTORS = {"A": (2, 64), "B": (32, 2)}
LOADERS = {
    "dit": ("model", host.load_model),
    "vae": ("vae", host.load_vae),
    "umt5": ("text_encoder", host.load_text_encoder),
}


def read(kind, path):
    """What the loader of a kind makes of a file, or its refusal as a person reads it."""
    began = time.process_time()
    try:
        with about_file(path.name):
            loaded = LOADERS[kind.removesuffix(".gguf")][1](path)
        refusal = ""
    except ValueError as error:
        loaded, refusal = None, str(error)
        assert refusal.startswith(f"{path.name}: ") and refusal.count(". ") and refusal.endswith("."), refusal
        assert len(refusal) < 3000
    assert time.process_time() - began < SECONDS
    return loaded, refusal


def check(kind, path):
    """Loads a file and looks at it as the job API does: both refuse it, or both take it."""
    loaded, refusal = read(kind, path)
    part = LOADERS[kind.removesuffix(".gguf")][0]
    traits = read_traits(part, path, None)
    assert "cannot be looked at" not in traits.refusal, traits.refusal
    if refusal:
        assert traits.refusal or is_of_numbers(refusal), refusal
    else:
        assert not traits.refusal or traits.foreign, traits.refusal
    return loaded


def is_of_numbers(refusal):
    """Whether it is about numbers, which a look at the header does not read."""
    return "spiece_model" in refusal


def same(model, path):
    """Whether each weight of a MODEL is the file's."""
    stored = load_file(path)
    own = model.model.diffusion_model.state_dict()
    return all(torch.equal(own[k].float().nan_to_num(), stored[k].float().nan_to_num()) for k in own)


LIMITS = settings(
    max_examples=int(os.environ.get("HOSTILE_FILES", "60")),  # of each kind
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)


@pytest.fixture
def bounded():
    """The test takes little memory beside what its process had."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MEGABYTES


@pytest.mark.parametrize("kind", ["dit", "vae", "umt5"])
def test_safetensors(kind, whole, tmp_path, bounded):
    base, path = whole[kind], tmp_path / NAME
    path.write_bytes(base.raw())
    assert check(kind, path) is not None  # whole, it loads

    @LIMITS
    @given(changed_safetensors(base) | damaged(base.raw()))
    def runs(made):
        path.unlink()  # a MODEL of an earlier one may still map it
        path.write_bytes(made.raw())
        loaded = check(kind, path)
        assert kind != "dit" or loaded is None or same(loaded, path)

    runs()


@pytest.mark.parametrize("kind", ["dit.gguf", "umt5.gguf"])
def test_gguf(kind, whole, tmp_path, bounded):
    base, path = whole[kind], tmp_path / "made.gguf"
    path.write_bytes(base.raw())
    assert check(kind, path) is not None

    @LIMITS
    @given(changed_gguf(base) | damaged(base.raw()))
    def runs(made):
        path.unlink()  # a MODEL of an earlier one may still map it
        path.write_bytes(made.raw())
        check(kind, path)

    runs()


def test_pickles(whole, tmp_path, bounded):
    source, path = tmp_path / NAME, tmp_path / "made.pth"
    source.write_bytes(whole["vae"].raw())
    torch.save(load_file(source), path)
    assert check("vae", path) is not None

    @LIMITS
    @given(damaged(path.read_bytes()))
    def runs(made):
        path.unlink()
        path.write_bytes(made.raw())
        check("vae", path)

    runs()


def test_loras(whole, tmp_path, bounded):
    base, path = whole["lora"], tmp_path / NAME
    path.touch()
    dit = tmp_path / "dit.safetensors"
    dit.write_bytes(whole["dit"].raw())
    model = host.load_model(dit)

    @LIMITS
    @given(changed_safetensors(base) | damaged(base.raw()))
    def runs(made):
        path.unlink()  # a MODEL of an earlier one may still map it
        path.write_bytes(made.raw())
        try:
            with about_file(path.name):
                lora = host.read_lora(path, model)
                check_lora(lora)
        except ValueError as error:
            assert str(error).startswith(f"{path.name}: ") and str(error).endswith(".")
            return
        patched = host.add_lora(model, lora, 1.0, [])
        key = lora.patches[0][0]
        weight = patched.model.diffusion_model.get_parameter(key)
        assert torch.isfinite(weight).all() and patched is not model

    runs()
