"""What nodes say and report of a job is in its task's log."""

import pytest
import requests
from helpers_server import wait_until
from inferencesh import TaskStatus
from wan21.server.progress import MAX_LOGS

URL = "https://example.com/style.safetensors"
LORA_REPORT = (
    "LoRA: style.safetensors, strength 0.5\napplied: 120 of 144 keys\nleft out: 24 keys, no layer: a, b"
)
REPORT = "seed: 1\nsolver: unipc\nnote: ModelSamplingSD3 is ignored"


@pytest.fixture
def lora_job(job):
    """Makes a run request with a LoRA."""
    return lambda **fields: job(lora_url=URL, lora_multiplier=0.5, **fields)


def nodes_by_title(host, prompt_id):
    return {node["_meta"]["title"]: i for i, node in host.graphs[prompt_id].items()}


def say(api, prompt_id, title, text):
    node = nodes_by_title(api.host, prompt_id)[title]
    api.do(api.host.tell, "progress_text", {"prompt_id": prompt_id, "node": node, "text": text})


def executed(api, prompt_id, title, text):
    node = nodes_by_title(api.host, prompt_id)[title]
    data = {"prompt_id": prompt_id, "node": node, "output": {"text": (text,)}}
    api.do(api.host.tell, "executed", data)


def lines(api, task):
    return [entry["content"] for entry in api.client.get_task(task["id"]).data["logs"]]


def test_sentences_of_nodes_are_lines_once_each(api, job):
    task = api.client.run(job(), wait=False)
    [prompt_id] = api.host.queue
    api.do(api.host.start, prompt_id)
    api.do(api.host.step, prompt_id, 1)
    say(api, prompt_id, "Sampler", "goes on  in halves")
    say(api, prompt_id, "Sampler", "goes on  in halves\nkeeps the latent")
    say(api, prompt_id, "Decode", "Wan21VAEDecode: decodes tiles of 64 pixels")
    api.do(
        api.host.tell, "progress_text", {"prompt_id": prompt_id, "node": "999", "text": "of another graph"}
    )
    told = [line for line in lines(api, task) if line.startswith("Wan21")]
    assert told == [
        "Wan21Sampler: goes on in halves",
        "Wan21Sampler: keeps the latent",
        "Wan21VAEDecode: decodes tiles of 64 pixels",
    ]


def test_reports_of_the_lora_and_the_sampler_are_lines_and_both_in_the_file(api, lora_job):
    task = api.client.run(lora_job(), wait=False)
    [prompt_id] = api.host.queue
    graph, titles = api.host.graphs[prompt_id], nodes_by_title(api.host, prompt_id)
    source = graph[titles["LoRA report"]]["inputs"]["source"]
    assert source == [titles["LoRA"], 1]
    api.do(api.host.start, prompt_id)
    executed(api, prompt_id, "LoRA report", LORA_REPORT)
    executed(api, prompt_id, "Report", REPORT)
    say(api, prompt_id, "Sampler", "ModelSamplingSD3 is ignored")
    told = [line for line in lines(api, task) if line.startswith("Wan21")]
    assert told == [
        *(f"Wan21LoraLoader: {line}" for line in LORA_REPORT.splitlines()),
        "Wan21Sampler: ModelSamplingSD3 is ignored",
    ]
    outputs = api.host.write_outputs(prompt_id)
    outputs |= {titles["LoRA report"]: {"text": (LORA_REPORT,)}, titles["Report"]: {"text": (REPORT,)}}
    api.do(api.host.finish, prompt_id, (), outputs)
    done = wait_until(
        lambda: (t := api.client.get_task(task["id"]).data)["status"] == TaskStatus.COMPLETED and t
    )
    assert requests.get(done["output"]["report"]).text == f"{LORA_REPORT}\n{REPORT}\n"


def test_what_a_node_said_is_said_again_when_the_host_need_not_run_it(api, job):
    first, second, other = (api.client.run(job(**f), wait=False) for f in ({}, {}, {"vae_tile_size": 128}))
    ids = list(api.host.queue)
    for prompt_id, task, is_told in zip(ids, (first, second, other), (True, True, True)):
        titles = nodes_by_title(api.host, prompt_id)
        api.do(api.host.start, prompt_id)
        cached = [] if prompt_id == ids[0] else [titles["Model"], titles["Image to video"]]
        api.do(api.host.tell, "execution_cached", {"prompt_id": prompt_id, "nodes": cached})
        if not cached:
            for title in ("Model", "Image to video"):
                api.do(api.host.tell, "executing", {"prompt_id": prompt_id, "node": titles[title]})
                say(api, prompt_id, title, f"{title} was adjusted")
        told = lines(api, task)
        assert ("Wan21ModelLoader: Model was adjusted" in told) == is_told
        # The picture of another run is another file, so that this node is another one.
        assert ("Wan21ImageToVideo: Image to video was adjusted" in told) == (prompt_id == ids[0])


def test_a_node_that_runs_again_and_says_nothing_is_not_quoted(api, job):
    tasks = [api.client.run(job(), wait=False) for _ in range(3)]
    for prompt_id, says in zip(list(api.host.queue), (True, False, False)):
        model = nodes_by_title(api.host, prompt_id)["Model"]
        cached = [model] if prompt_id == api.host.queue[2] else []
        api.do(api.host.start, prompt_id)
        api.do(api.host.tell, "execution_cached", {"prompt_id": prompt_id, "nodes": cached})
        if not cached:
            api.do(api.host.tell, "executing", {"prompt_id": prompt_id, "node": model})
        if says:
            say(api, prompt_id, "Model", "was adjusted")
    assert ["Wan21ModelLoader: was adjusted" in lines(api, task) for task in tasks] == [True, False, False]


def test_steps_make_room_for_what_is_said(api, job):
    task = api.client.run(job(), wait=False)
    [prompt_id] = api.host.queue
    first = lines(api, task)
    api.do(api.host.start, prompt_id)
    say(api, prompt_id, "Sampler", "an early warning")
    for step in range(1, 101):
        api.do(api.host.step, prompt_id, step)
    said = lines(api, task)
    assert len(said) == MAX_LOGS and said[: len(first)] == first
    assert "Wan21Sampler: an early warning" in said and said[-1].startswith("step 100/")
    for i in range(50):
        say(api, prompt_id, "Sampler", f"warning {i} " + "long " * 500)
    said = lines(api, task)
    assert len(said) == MAX_LOGS and max(map(len, said)) == 1000 and "warning 49" in said[-1]
    assert not any(text.startswith("step ") for text in said)
