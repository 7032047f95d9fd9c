"""Several prompts in one video: the graph, its settings in all segments, what is refused, the log."""

import base64
import json
import time

import pytest
import requests
from helpers_server import wait_until
from inferencesh import APIError, TaskStatus
from lib.comfy_client import without
from lib.pack import ROOT
from test_inputs import UPSAMPLERS, refused
from wan21.server import fields
from wan21.server.graph import build_graph, load_workflow
from wan21.server.progress import JobProgress

SEGMENTS = json.loads(
    (ROOT / "workflows" / "api" / "Wan2.1 long video in segments.json").read_text(encoding="utf-8")
)
MORE = ["look up", "turn (round)"]
FIELDS = dict.fromkeys(row.name for row in fields.FIELDS) | {
    "prompt": "pan left",
    "size": "832*480",
    "seed": 0,
    "temporal_upsampling": "none",
    "spatial_upsampling": "none",
    "segments": MORE,
}


@pytest.fixture
def run(api, job):
    """Queues a job of some segments of 9 frames. -> (graph, task)"""

    def start(segments=MORE, **given):
        task = api.client.run(job(num_frames=9, segments=segments, **given), wait=False)
        return api.host.graphs[api.host.queue[-1]], task

    return start


def of_class(graph, kind):
    return [node["inputs"] for node in graph.values() if node["class_type"] == kind]


def links(graph):
    """Title -> (class, {input: (title of its source, output)}), without what only one of the graphs has."""
    titles = {i: node["_meta"]["title"].replace("Decode 1", "Decode") for i, node in graph.items()}
    left_out = {"Size of the clip", "Last frame", "Save last frame"}
    return {
        titles[i]: (
            node["class_type"],
            {
                name: (titles[value[0]], value[1])
                for name, value in node["inputs"].items()
                if isinstance(value, list) and titles[value[0]] not in left_out
            },
        )
        for i, node in graph.items()
        if titles[i] not in left_out
    }


def test_the_graph_is_that_of_the_workflow(run):
    graph, _ = run()
    expected = links(without(SEGMENTS, "CLIPVisionLoader", "CLIPVisionEncode"))
    assert links(without(graph, "PreviewAny")) == {
        title: node for title, node in expected.items() if not title.startswith("First of the last frames")
    }
    for kind in ("Wan21JoinClips", "ImageFromBatch"):
        ours = [{n: v for n, v in i.items() if not isinstance(v, list)} for i in of_class(graph, kind)]
        theirs = [{n: v for n, v in i.items() if not isinstance(v, list)} for i in of_class(SEGMENTS, kind)]
        assert [i for i in theirs if i.get("batch_index") != 0] == [
            i for i in ours if i.get("batch_index") != -1
        ]


def test_with_clip_vision_each_segment_has_features_of_its_start():
    """The whole graph, built without a server."""
    workflow, names = load_workflow(False), {"clip_vision": "clip_vision_h.safetensors"}
    graph = build_graph(workflow, FIELDS, names, {}, False, "out", lambda kind: None).nodes
    assert links(without(graph, "PreviewAny")) == links(SEGMENTS)


def test_settings_reach_every_segment_and_seeds_differ(run):
    url = "https://example.com/a.safetensors"
    graph, _ = run(seed=2**64 - 2, solver="euler", size="96*64", vae_tile_size=128, lora_url=url, shift=4)
    samplers, videos = of_class(graph, "Wan21Sampler"), of_class(graph, "Wan21ImageToVideo")
    assert [sampler["seed"] for sampler in samplers] == [2**64 - 2, 2**64 - 1, 0]
    assert {(s["solver"], s["steps"], s["flow_shift"]) for s in samplers} == {("euler", 3, 4)}
    assert {graph[sampler["model"][0]]["class_type"] for sampler in samplers} == {"Wan21LoraLoader"}
    assert {(v["width"], v["height"], v["num_frames"], v["tile_size"]) for v in videos} == {
        (96, 64, 9, "128")
    }
    assert [decode["tile_size"] for decode in of_class(graph, "Wan21VAEDecode")] == ["128"] * 3
    texts = {n["_meta"]["title"]: n["inputs"].get("text") for n in graph.values()}
    assert [texts[f"Positive prompt{n}"] for n in ("", " 2", " 3")] == [
        "pan left",
        "look up",
        r"turn \(round\)",
    ]


def test_upsampling_comes_after_the_last_join(run, api):
    real = api.host.node_inputs
    api.host.node_inputs = lambda kind: UPSAMPLERS.get(kind) or real(kind)
    graph, _ = run(temporal_upsampling="x2")
    [temporal] = of_class(graph, "Wan21TemporalUpsample")
    assert graph[temporal["images"][0]]["_meta"]["title"] == "Join 3"
    [video] = of_class(graph, "CreateVideo")
    assert graph[video["images"][0]]["class_type"] == "Wan21TemporalUpsample"


def test_without_segments_the_graph_is_as_before(run):
    graph, _ = run(segments=[])
    assert len(of_class(graph, "Wan21Sampler")) == 1 and not of_class(graph, "Wan21JoinClips")


@pytest.mark.parametrize(
    "given, path, message",
    [
        ({"segments": ["a"] * 16}, "segments", "at most 15 items"),
        ({"segments": ["a", ""]}, "segments", "at least 1 character"),
        ({"segments": "a"}, "segments", "valid list"),
        ({"segments": [5]}, "segments", "valid string"),
        ({"segments": ["a" * 2000] * 3}, "segments", "have 6000 characters together; the most is 5000"),
        ({"segments": ["a"], "num_frames": 5}, "num_frames", "at least 9 with segments"),
        ({"segments": ["a"], "end_image": True}, "end_image", "one segment"),
    ],
)
def test_refused(api, job, image, given, path, message):
    given = {"num_frames": 9} | given | ({"end_image": image} if "end_image" in given else {})
    [(found, said)] = refused(api, job(**given)).items()
    assert found == f"input.{path}" and message in said


def test_a_complaint_of_the_host_on_a_later_segment_names_its_field(api, job):
    check = api.host.check

    async def complain(prompt_id, graph):
        [third] = [i for i, node in graph.items() if node["_meta"]["title"] == "Positive prompt 3"]
        api.host.refuses = [(third, "text", "too odd")]
        return await check(prompt_id, graph)

    api.host.check = complain
    assert refused(api, job(num_frames=9, segments=MORE)) == {"input.segments": "too odd"}


def test_a_prompt_that_looks_like_base64_is_read_and_a_file_refused(api, run, image):
    text = base64.b64encode(b"a prompt of letters only" * 40).decode()
    graph, _ = run([text, "plain"])
    texts = [inputs["text"] for inputs in of_class(graph, "CLIPTextEncode")]
    assert text in texts and "plain" in texts
    with pytest.raises(APIError, match="is a file"):
        run([image])


def test_most_segments_are_followed_at_once(api, run):
    """What a node is hangs on all segments before it: that is not written out for each way there."""
    graph, _ = run(["on"] * 15)
    assert len(of_class(graph, "Wan21Sampler")) == 16
    progress = JobProgress(graph, {"sampler": "10", "report": "11", "video": "14", "last_frame": "15"}, {})
    started = time.process_time()
    progress.handle("execution_cached", {"nodes": list(graph)})
    assert time.process_time() - started < 1 and progress.percent == 100


def test_steps_reports_and_the_file_tell_the_segments_apart(api, run):
    graph, task = run()
    [prompt_id] = api.host.queue
    ids = {node["_meta"]["title"]: i for i, node in graph.items()}
    api.do(api.host.start, prompt_id)

    def step(title, at):
        state = {"value": at, "max": 3, "state": "running" if at < 3 else "finished"}
        api.do(api.host.tell, "progress_state", {"prompt_id": prompt_id, "nodes": {ids[title]: state}})

    percentages = []
    for title in ("Sampler", "Sampler 2", "Sampler 3"):
        for at in (1, 2, 3):
            step(title, at)
            percentages.append(api.client.get_task(task["id"]).data["progress"])
    now = api.client.get_task(task["id"]).data
    assert now["status"] == TaskStatus.RUNNING and percentages == sorted(percentages)
    lines = [entry["content"].partition(",")[0] for entry in now["logs"]]
    assert [line for line in lines if line.startswith("step")] == [
        f"step {at}/3 of segment {number}" for number in (1, 2, 3) for at in (1, 2)
    ]
    outputs = api.host.write_outputs(prompt_id)
    for number, title in enumerate(("Report", "Report 2", "Report 3"), 1):
        text = f"seed: {number}\nnote: part {number} was adjusted"
        outputs[ids[title]] = {"text": (text,)}
        executed = {"prompt_id": prompt_id, "node": ids[title], "output": outputs[ids[title]]}
        api.do(api.host.tell, "executed", executed)
    logs = [entry["content"] for entry in api.client.get_task(task["id"]).data["logs"]]
    assert [line for line in logs if "adjusted" in line] == [
        f"Wan21Sampler: part {number} was adjusted" for number in (1, 2, 3)
    ]
    api.do(api.host.finish, prompt_id, (), outputs)
    done = wait_until(lambda: (t := api.client.get_task(task["id"]).data)["status"] == 10 and t)
    report = requests.get(done["output"]["report"]).text
    assert [line for line in report.splitlines() if line.startswith("seed")] == [
        "seed: 1",
        "seed: 2",
        "seed: 3",
    ]
