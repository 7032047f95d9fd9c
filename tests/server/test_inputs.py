"""The input: schema, checks, and the graph that is queued."""

import re
import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests
from helpers_server import APP
from inferencesh import APIError
from lib.random_checkpoints import FLF2V, I2V, T2V
from wan21.server import installed, routes
from wan21.server.graph import load_workflow, preferred_names


def refused(api, params):
    """The errors of a refused run, by path; nothing may be queued."""
    with pytest.raises(APIError) as raised:
        api.client.run(params, wait=False)
    assert raised.value.status_code == 422
    assert api.host.queue == [] and not list(api.host.input_directory.glob("wan21/*/*"))
    body = requests.models.complexjson.loads(raised.value.response_body)
    return {error["path"]: error["message"] for error in body["errors"]}


def graph_of(api, params):
    """(graph by class, task) of a run."""
    task = api.client.run(params, wait=False)
    graph = api.host.graphs[api.host.queue[-1]]
    return {node["class_type"]: node["inputs"] for node in graph.values()}, task


def test_schema(api):
    schema = requests.get(f"{api.url}/apps/{APP}").json()
    assert set(schema["required"]) == {"prompt", "image"} and schema["additionalProperties"] is False
    fields = schema["properties"]
    assert all("description" in field for field in fields.values())
    assert (fields["num_frames"]["minimum"], fields["num_frames"]["default"]) == (1, 81)
    assert fields["solver"]["enum"][:2] == ["unipc", "dpm++"]
    assert fields["spatial_upsampling"]["const"] == "none"
    assert fields["attention"]["enum"][0] == "auto" and fields["teacache"]["maximum"] == 10


def test_each_wrong_field_is_named(api, job):
    errors = refused(
        api,
        job(
            size="70*64", num_frames=80, solver="ddim", guidance_scale=-1, seed="x", bogus=1, model="none.pt"
        ),
    )
    assert errors.keys() == {
        f"input.{name}" for name in ("size", "num_frames", "solver", "guidance_scale", "seed", "bogus")
    }
    assert "such as 77" in errors["input.num_frames"] and errors["input.bogus"] == "unknown field"
    assert refused(api, job(model="none.pt")).keys() == {"input.model"}
    assert refused(api, {"app": APP}).keys() == {"input"}
    assert refused(api, {"app": APP, "input": {}}).keys() == {"input.prompt", "input.image"}


@pytest.mark.parametrize("field, value", [("temporal_upsampling", "x2"), ("spatial_upsampling", "lanczos2")])
def test_what_this_version_lacks_is_said(api, job, field, value):
    [(path, message)] = refused(api, job(**{field: value})).items()
    assert path == f"input.{field}" and "not available" in message


def test_other_requests_are_refused(api, job):
    for params, status in (
        ({"app": "infsh/other"}, 404),
        ({"run_at": "2030-01-01T00:00:00Z"}, 422),
        ({"setup": {"a": 1}}, 422),
        ({"function": "other"}, 422),
        ({"webhok": "https://example.com"}, 422),
        ({"metadata": "x"}, 422),
        ({"webhook": 5}, 422),
        ({"webhook": "ftp://example.com"}, 422),
        ({"webhook": "http://127.0.0.1/"}, 422),
        ({"session_timeout": 0, "session": "new"}, 422),
        ({"session_timeout": 3601}, 422),
        ({"session_timeout": True}, 422),
        ({"session_timeout": 30.5}, 422),
        ({"session_timeout": "30"}, 422),
    ):
        with pytest.raises(APIError) as raised:
            api.client.run(job(params), wait=False)
        assert raised.value.status_code == status, params
    for body in ("{", '{"fps": NaN}', r'{"app": "\ud800"}', "[" * 100_000, "1" * 10_000, b"\xff"):
        assert requests.post(f"{api.url}/apps/run", data=body).status_code == 400, body[:20]
    assert requests.post(f"{api.url}/apps/run", data=b" " * (2**20 + 1)).status_code == 413
    assert api.host.queue == []


def test_complaints_of_the_host_are_told_by_field(api, job):
    api.host.refuses = [("10", "steps", "Value too large"), ("99", "", "something else")]
    errors = refused(api, job())
    assert errors == {"input.num_inference_steps": "Value too large", "input": "something else"}


def test_a_complaint_names_its_field_or_else_its_node_once(api, job):
    workflow = load_workflow(False)
    video = next(i for i, node in workflow.items() if node["class_type"] == "Wan21ImageToVideo")
    told = "num_frames is 80. Use 81."
    for name, path, message in (
        ("num_frames", "input.num_frames", told),
        ("vae", "input", f"Wan21ImageToVideo: {told}"),
    ):
        for said in (told, f"Wan21ImageToVideo: {told}"):
            api.host.refuses = [(video, name, said)]
            assert refused(api, job()) == {path: message.removesuffix(".")}, said


def test_the_graph_is_what_was_asked_for(api, job):
    nodes, task = graph_of(
        api,
        job(
            size="96x64", num_frames=9, fps=24.0, guidance_scale=2, seed=5, solver="dpm++", vae_tile_size=128
        ),
    )
    sampler, video = nodes["Wan21Sampler"], nodes["Wan21ImageToVideo"]
    assert (sampler["seed"], sampler["steps"], sampler["solver"], sampler["guidance_scale"]) == (
        5,
        3,
        "dpm++",
        2,
    )
    assert (video["width"], video["height"], video["num_frames"], video["tile_size"]) == (96, 64, 9, "128")
    assert nodes["Wan21VAEDecode"]["tile_size"] == "128" and nodes["CreateVideo"]["fps"] == 24.0
    assert nodes["LoadImage"]["image"] == f"wan21/{task['id']}/image.png"
    assert (api.host.input_directory / nodes["LoadImage"]["image"]).is_file()
    assert nodes["SaveVideo"]["filename_prefix"] == f"wan21/{task['id']}/video"
    assert "CLIPVisionLoader" not in nodes  # no file of it is installed
    assert sampler["flow_shift"] == 3.0
    assert task["input"]["prompt"] == "pan left"


def test_an_end_image_takes_the_other_graph(api, job, image):
    task = api.client.run(job(end_image=image), wait=False)
    graph = api.host.graphs[api.host.queue[-1]]
    images = {
        node["_meta"]["title"]: node["inputs"]["image"]
        for node in graph.values()
        if node["class_type"] == "LoadImage"
    }
    assert images == {
        "Start image": f"wan21/{task['id']}/image.png",
        "End image": f"wan21/{task['id']}/end_image.png",
    }


def test_a_seed_is_drawn_each_time(api, job):
    seeds = {graph_of(api, job())[0]["Wan21Sampler"]["seed"] for _ in range(4)}
    assert len(seeds) == 4 and all(0 <= seed < 2**32 for seed in seeds)


def test_the_negative_prompt_of_the_release_is_the_default(api, job):
    from wan21.server.graph import load_workflow

    release = next(n for n in load_workflow(False).values() if n["_meta"]["title"] == "Negative prompt")
    graph_of(api, job())
    graph_of(api, job(negative_prompt="rain"))
    texts = [
        next(n["inputs"]["text"] for n in graph.values() if n["_meta"]["title"] == "Negative prompt")
        for graph in api.host.graphs.values()
    ]
    assert texts == [release["inputs"]["text"], "rain"]


def test_every_option_reaches_its_node(api, job):
    url = "https://example.com/a.safetensors"
    nodes, _ = graph_of(
        api,
        job(
            teacache=2.0, teacache_start_percent=10, enable_riflex=True, joint_pass=False, attention="sdpa",
            cfg_star=True, cfg_star_step=2, shift=7.5, lora_url=url, lora_multiplier=0.5,
        ),
    )  # fmt: skip
    sampler = nodes["Wan21Sampler"]
    expected = {
        "cache": "teacache", "cache.multiplier": 2.0, "cache.start_percent": 10, "riflex": "on",
        "execution": "custom", "execution.joint_pass": False, "execution.attention": "sdpa",
        "cfg_star": "on", "cfg_star.start_step": 2, "flow_shift": 7.5,
    }  # fmt: skip
    assert {name: sampler[name] for name in expected} == expected
    lora = nodes["Wan21LoraLoader"]
    assert (lora["lora_url"], lora["strength"], lora["lora_name"]) == (url, 0.5, "none")
    graph = api.host.graphs[api.host.queue[-1]]
    assert graph[sampler["model"][0]]["class_type"] == "Wan21LoraLoader"
    assert graph[lora["model"][0]]["class_type"] == "Wan21ModelLoader"
    plain, _ = graph_of(api, job())
    assert "Wan21LoraLoader" not in plain and plain["Wan21Sampler"]["riflex"] == "off"


UPSAMPLERS = {
    "Wan21TemporalUpsample": {
        "images": {"type": "IMAGE"},
        "fps": {"type": "FLOAT"},
        "method": {"type": "COMBO", "options": ["x2", "x4"]},
    },
    "Wan21SpatialUpsample": {
        "images": {"type": "IMAGE"},
        "method": {"type": "COMBO", "options": ["none", "lanczos2", "model"], "default": "none"},
    },
    "UpscaleModelLoader": {"model_name": {"type": "COMBO", "options": ["4x.pth"]}},
}


def test_upsampling_on_a_host_that_has_its_nodes(api, job):
    real = api.host.node_inputs
    api.host.node_inputs = lambda kind: UPSAMPLERS.get(kind) or real(kind)
    nodes, _ = graph_of(api, job(temporal_upsampling="x2", spatial_upsampling="model", fps=12.0))
    graph = api.host.graphs[api.host.queue[-1]]
    temporal, spatial, video = (
        nodes[name] for name in ("Wan21TemporalUpsample", "Wan21SpatialUpsample", "CreateVideo")
    )
    assert (temporal["fps"], temporal["method"], spatial["method"]) == (12.0, "x2", "model")
    assert nodes["UpscaleModelLoader"]["model_name"] == "4x.pth"
    sources = {
        "fps": (video["fps"], "Wan21TemporalUpsample"),
        "video": (video["images"], "Wan21SpatialUpsample"),
        "last frame": (nodes["ImageFromBatch"]["image"], "Wan21SpatialUpsample"),
        "larger": (spatial["images"], "Wan21TemporalUpsample"),
        "more": (temporal["images"], "Wan21VAEDecode"),
        "model": (spatial["upscale_model"], "UpscaleModelLoader"),
    }
    for name, (link, kind) in sources.items():
        assert graph[link[0]]["class_type"] == kind, name
    plain, _ = graph_of(api, job(temporal_upsampling="none", spatial_upsampling="none"))
    assert "Wan21TemporalUpsample" not in plain and "Wan21SpatialUpsample" not in plain


def test_models_are_chosen_by_what_they_are(api, job, image):
    nodes, task = graph_of(api, job())
    assert nodes["Wan21ModelLoader"]["model_name"] == I2V
    assert any("clip_vision: no ViT-H file" in entry["content"] for entry in task["logs"])
    pair = {"end_image": image}
    assert graph_of(api, job(**pair))[0]["Wan21ModelLoader"]["model_name"] == FLF2V
    behind = graph_of(api, job(**pair, add_frames_for_end_image=True))[0]
    assert behind["Wan21ModelLoader"]["model_name"] == I2V
    assert behind["Wan21ImageToVideo"]["add_frames_for_end_image"] is True
    for part, name, message in (
        ("model", T2V, "not a Wan2.1 image-to-video model"),
        ("vae", "x.pt", "there is no"),
    ):
        with pytest.raises(APIError, match=message):
            api.client.run(job(**{part: name}), wait=False)


def test_the_graphs_own_name_then_the_users_files_then_the_bundled_one(api, job, tmp_path, monkeypatch):
    """The same checkpoint under four names, of which the best is taken away each time."""
    of_graph = preferred_names(load_workflow(False))["model"]
    bundled = "wan21-tiny.safetensors"
    monkeypatch.setattr(installed, "BUNDLED", tmp_path / "bundled")
    offered = [bundled, "b.safetensors", "a.safetensors", of_graph]
    paths = {name: tmp_path / ("bundled" if name == bundled else "own") / name for name in offered}
    for path in paths.values():
        path.parent.mkdir(exist_ok=True)
        path.hardlink_to(api.host.model_path("diffusion_models", I2V))
    real_inputs, real_path = api.host.node_inputs, api.host.model_path
    api.host.model_path = lambda folder, name: paths.get(name) or real_path(folder, name)
    api.host.node_inputs = lambda kind: (
        {"model_name": {"type": "COMBO", "options": list(offered)}}
        if kind == "Wan21ModelLoader"
        else real_inputs(kind)
    )
    for expected in (of_graph, "a.safetensors", "b.safetensors", bundled):
        nodes, task = graph_of(api, job())
        log = " ".join(entry["content"] for entry in task["logs"])
        assert nodes["Wan21ModelLoader"]["model_name"] == expected
        assert (f"model: {expected} was chosen of" in log) == (len(offered) > 1)
        assert ("the small one that comes with Wan21" in log) == (expected == bundled)
        offered.remove(expected)


@pytest.mark.parametrize(
    "fields, shift",
    [
        ({"size": "832*480"}, 3),
        ({"size": "848*480"}, 5),
        ({"end_image": True}, 16),
        ({"end_image": True, "add_frames_for_end_image": True}, 3),  # on a plain model
        ({"end_image": True, "shift": 7.5}, 7.5),
    ],
)
def test_shift_by_size_and_model(api, job, image, fields, shift):
    if "end_image" in fields:
        fields = fields | {"end_image": image}
    assert graph_of(api, job(**fields))[0]["Wan21Sampler"]["flow_shift"] == shift


def test_the_page_names_every_field_with_its_default(api):
    page = (Path(__file__).parents[2] / "docs" / "job-api.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `(\w+)` \| (.+?) \|(.*)", page.partition("## Output")[0], re.MULTILINE)
    rows, words = {name: default for name, default, _ in table}, {name: text for name, _, text in table}
    schema = requests.get(f"{api.url}/apps/{APP}").json()
    assert rows.keys() == schema["properties"].keys()
    for name, field in schema["properties"].items():
        default = field.get("default")
        if name in schema["required"]:
            assert rows[name] == "required", name
        elif default is None or default == "":
            assert rows[name] == "-", name
        else:
            shown = str(default).lower() if isinstance(default, bool) else str(default)
            assert rows[name] == f"`{shown}`", name
        if name in ("solver", "attention"):
            assert all(f"`{value}`" in rows[name] + words[name] for value in field["enum"]), name


@pytest.mark.parametrize(
    "fields, path, message",
    [
        ({"num_frames": 1, "end_image": True}, "num_frames", "at least 5"),
        ({"add_frames_for_end_image": True}, "add_frames_for_end_image", "there is none"),
        ({"lora_url": "http://example.com/a.safetensors"}, "lora_url", "must be an https link"),
        ({"lora_url": "https://10.0.0.1/a.safetensors"}, "lora_url", "private"),
    ],
)
def test_fields_that_do_not_fit(api, job, image, fields, path, message):
    if "end_image" in fields:
        fields = fields | {"end_image": image}
    errors = refused(api, job(**fields))
    assert errors.keys() == {f"input.{path}"} and message in errors[f"input.{path}"]


def test_a_host_input_of_any_type_is_described():
    """The host's type for anything says of itself that it is unequal to nothing."""
    from comfy.comfy_types.node_typing import IO
    from wan21.host.node_inputs import describe_inputs

    assert describe_inputs({"required": {"source": (IO.ANY, {})}}) == {"source": {"type": "*"}}


def test_sides_are_those_that_the_node_takes(api, job):
    nodes, _ = graph_of(api, job(size="1080*1920"))
    assert (nodes["Wan21ImageToVideo"]["width"], nodes["Wan21ImageToVideo"]["height"]) == (1080, 1920)
    with pytest.raises(Exception, match="width is 1084; it must be a multiple of 8"):
        graph_of(api, job(size="1084*1920"))


def test_a_whole_number_may_be_written_as_a_float(api, job):
    given = {"num_frames": 5.0, "num_inference_steps": 3.0, "seed": 7.0, "vae_tile_size": 128.0}
    graph, task = graph_of(api, job(**given))
    assert (graph["Wan21Sampler"]["seed"], graph["Wan21Sampler"]["steps"]) == (7, 3)
    assert type(graph["Wan21Sampler"]["seed"]) is int and graph["Wan21VAEDecode"]["tile_size"] == "128"
    api.client.cancel(task["id"])
    api.host.queue.clear()
    wrong = {"num_frames": 5.5, "num_inference_steps": True, "seed": 1e300, "vae_tile_size": False}
    assert len(refused_with(api, job(**wrong))) == 4


def refused_with(api, params):
    answer = requests.post(f"{api.url}/apps/run", json=params)
    assert answer.status_code == 422
    return answer.json()["errors"]


def test_the_schema_knows_sizes_and_speed_ups(api):
    fields = requests.get(f"{api.url}/apps/{APP}").json()["properties"]
    size = re.compile(fields["size"]["pattern"], re.ASCII)
    assert size.search("832*480") and size.search("64x64") and not size.search("832 480")
    assert fields["teacache"]["anyOf"] == [{"const": 0}, {"minimum": 1}]


@pytest.mark.parametrize("number", ["1e999", "-1e400", "NaN", "Infinity"])
def test_numbers_that_json_lacks_are_refused(api, job, number):
    body = f'{{"app": "{APP}", "input": {{"prompt": "a", "image": "b"}}, "metadata": {{"x": [{number}]}}}}'
    answer = requests.post(f"{api.url}/apps/run", data=body)
    assert answer.status_code == 400 and "not JSON" in answer.json()["detail"]


def test_a_body_that_is_not_packed_as_it_says(api):
    for path in ("/apps/run", "/files"):
        answer = requests.post(api.url + path, data=b"{}", headers={"Content-Encoding": "gzip"})
        assert answer.status_code == 400 and "the body cannot be read" in answer.json()["detail"]


def test_a_body_that_stops_half_way_is_given_up(api, monkeypatch):
    monkeypatch.setattr(routes, "BODY_SECONDS", 0.2)
    address = urlsplit(api.url)
    for path in ("/wan21/apps/run", "/wan21/files"):
        with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
            head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n"
            connection.sendall(head.encode() + b'{"app": ')
            assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")
