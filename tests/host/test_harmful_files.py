"""Files that mean harm in the model folders of a real host: it lists, loads and serves the others as ever."""

import json
import os
import struct
import sys
import time

import inferencesh
import pytest
import requests
from helpers_hostile import Safetensors, archive, tuples
from lib.comfy_client import JobFailed, fill
from lib.job_api import upload
from lib.pack import ROOT, comfyui_path
from lib.small_graphs import small_graph
from wan21.wan.refusal import printable

APP = "infsh/wan2-1-i2v"
PICTURE = comfyui_path() / "input" / "example.png"
PARTS = {"diffusion_models": "model", "vae": "vae", "text_encoders": "text_encoder"}
LOADERS = {
    "diffusion_models": ("Wan21ModelLoader", "model_name"),
    "vae": ("Wan21VAELoader", "vae_name"),
    "text_encoders": ("Wan21TextEncoderLoader", "text_encoder_name"),
}
NO_TEXT = "\udcff"  # of a name whose bytes are no UTF-8
SECONDS = 60  # for answers that take one on a machine of its own


def bundled(folder):
    [path] = (ROOT / "models" / folder).glob("*.safetensors")
    return Safetensors.of(path)


def changed(folder, change):
    whole = bundled(folder)
    change(whole.tensors)
    return whole.raw()


def stray_block(tensors):
    tensors.append(("blocks.999999999.ffn.0.weight", "F32", [1], bytes(4)))


def scalar(tensors):
    i = next(i for i, tensor in enumerate(tensors) if tensor[0].endswith("decoder.conv1.weight"))
    tensors[i] = (tensors[i][0], "F32", [], bytes(4))


def without_norm(tensors):
    tensors[:] = [tensor for tensor in tensors if not tensor[0].endswith("final_layer_norm.weight")]


HARMFUL = {  # by name: what makes it, and words of what is said
    "diffusion_models/0-endless.gguf": (
        lambda: b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"x", 9, 0, 2**62),
        "its head goes on for 4611686018427387904 bytes",
    ),
    "diffusion_models/0-gap.safetensors": (
        lambda: changed("diffusion_models", stray_block),
        "its blocks are not numbered from 0 without a gap",
    ),
    "diffusion_models/0-page.safetensors": (lambda: b"<!DOCTYPE html><html>log in</html>", "a web page"),
    "diffusion_models/0-cut.safetensors": (lambda: bundled("diffusion_models").raw()[:-99], "truncated"),
    f"diffusion_models/0-{NO_TEXT}.safetensors": (lambda: bytes(999), "unfinished download"),
    "vae/0-years.pth": (lambda: archive(tuples(60, 2)), "a tuple in it holds more than 1000 values"),
    "vae/0-scalar.safetensors": (lambda: changed("vae", scalar), "decoder.conv1.weight"),
    "text_encoders/0-lacks.safetensors": (
        lambda: changed("text_encoders", without_norm),
        "lacks encoder.final_layer_norm.weight",
    ),
}


NO_FILES = ("0-folder.gguf", "0-itself.safetensors", "0-pipe.safetensors")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="names of other systems are text, and no pipes"
)


@pytest.fixture(scope="module")
def harmful(server):
    """The files by name, in the server's folders for as long as these tests run."""
    there = {}
    for name, (make, _) in HARMFUL.items():
        path = server.models_directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make())
        there[name] = path
    folder, itself, pipe = (server.models_directory / "diffusion_models" / name for name in NO_FILES)
    folder.mkdir()
    itself.symlink_to(itself.name)
    os.mkfifo(pipe)  # nobody writes to it: who opens it waits
    yield there
    folder.rmdir()
    for path in (*there.values(), itself, pipe):
        path.unlink()


def test_they_are_listed_and_others_load(client, harmful):
    began = time.monotonic()
    for folder, (node, name) in LOADERS.items():
        options = client.object_info(node)["input"]["required"][name]
        options = options[1]["options"] if len(options) > 1 and "options" in options[1] else options[0]
        wanted = {path.partition("/")[2] for path in harmful if path.startswith(folder)}
        assert wanted <= set(options)
    assert time.monotonic() - began < SECONDS


@pytest.fixture(scope="module")
def graph(server):
    image = server.client.upload_image(PICTURE)
    path = ROOT / "workflows" / "api" / "Wan2.1 image to video (i2v).json"
    api = json.loads(path.read_text(encoding="utf-8"))
    return fill(small_graph(api, (64, 48), 5, image=image, video=None), "Wan21Sampler", steps=1)


def test_each_fails_its_own_job_in_a_sentence_with_its_name(client, harmful, graph):
    for path, (_, words) in HARMFUL.items():
        folder, _, name = path.partition("/")
        node, field = LOADERS[folder]
        with pytest.raises(JobFailed) as failed:
            client.run(fill(graph, node, **{field: name}))
        said = str(failed.value)
        assert f"{node}: {printable(name)}: " in said and words in said, said
    assert client.run(graph).files


def test_the_job_api_serves_and_names_them(server, harmful):
    url = f"{server.url}/wan21"
    given = {"prompt": "pan", "size": "64*64", "num_frames": 5, "num_inference_steps": 2, "seed": 77}
    given["image"] = upload(url, PICTURE.read_bytes(), requests)
    for path, (_, words) in HARMFUL.items():
        folder, _, name = path.partition("/")
        if NO_TEXT in name:
            continue
        began = time.monotonic()
        answer = requests.post(f"{url}/apps/run", json={"app": APP, "input": given | {PARTS[folder]: name}})
        assert answer.status_code == 422 and time.monotonic() - began < SECONDS
        [error] = answer.json()["errors"]
        assert error["path"] == f"input.{PARTS[folder]}" and name in error["message"], error
        assert words in error["message"], error
    jobs = inferencesh.inference(api_key="any", base_url=url)
    result = jobs.run({"app": APP, "input": given})
    [chosen, *_] = [entry["content"] for entry in jobs.get_task(result["id"]).data["logs"]]
    assert chosen.startswith("the job runs with model wan21-tiny-i2v.safetensors"), chosen
    log = server.log()
    assert all(f"{printable(str(path))} would not load: " in log for path in harmful.values())
