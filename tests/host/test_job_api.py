"""The job API on a real host, with the unmodified client and the bundled checkpoint."""

import contextlib
import hashlib
import io
import json
import os
import signal
import sqlite3
import time
import uuid

import av
import inferencesh
import pytest
import requests
import torch
from helpers_checkpoint import write_sparse
from inferencesh import APIError, TaskStatus
from lib import pack
from lib.host_server import HostServer
from lib.job_api import Receiver
from lib.pack import ROOT, comfyui_path
from PIL import Image
from safetensors.torch import load_file, save_file

APP = "infsh/wan2-1-i2v"
SLOW_START_S = 1800  # of a server that is started in a test, on a busy machine


def connect(server):
    return inferencesh.inference(api_key="any", base_url=f"{server.url}/wan21")


def request(**fields):
    small = {"size": "64*64", "num_frames": 5, "num_inference_steps": 2}
    image = str(comfyui_path() / "input" / "example.png")
    return {"app": APP, "input": {"prompt": "pan left", "image": image} | small | fields}


@pytest.fixture
def jobs(server):
    """The client, on the running server."""
    return connect(server)


def test_run_gives_video_last_frame_report_and_seed(jobs, server):
    result = jobs.run(request(seed=11, end_image=request()["input"]["image"]))
    assert result["status"] == TaskStatus.COMPLETED
    output = result["output"]
    with av.open(io.BytesIO(requests.get(output["video"]).content)) as container:
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 16
    assert len(frames) == 5 and frames[0].shape == (64, 64, 3)
    with Image.open(io.BytesIO(requests.get(output["last_frame"]).content)) as last:
        assert last.size == (64, 64)
    assert "seed: 11" in requests.get(output["report"]).text and output["seed"] == 11
    prompt_id = str(uuid.UUID(result["id"].removeprefix("task_")))
    assert server.client.history(prompt_id)["status"]["status_str"] == "success"


def test_segments_are_one_video(jobs):
    result = jobs.run(request(num_frames=9, seed=3, segments=["zoom in", "still"]))
    output = result["output"]
    with av.open(io.BytesIO(requests.get(output["video"]).content)) as container:
        assert len(list(container.decode(video=0))) == 9 + 4 + 4
    report = requests.get(output["report"]).text
    assert [f"seed: {seed}" in report for seed in (3, 4, 5)] == [True] * 3 and output["seed"] == 3
    steps = [entry["content"] for entry in result["logs"] if entry["content"].startswith("step")]
    assert [line.split(",")[0] for line in steps if "2/2" in line] == [
        f"step 2/2 of segment {number}" for number in (1, 2, 3)
    ]


def test_stream_has_states_steps_progress_and_previews(jobs):
    updates, percentages, preview = [], [], None
    for update in jobs.run(request(num_inference_steps=4), stream=True):
        updates.append(update)
        percentages.append(jobs.get_task(update["id"]).data["progress"])
        line = update["logs"][-1]["content"]
        if preview is None and "preview http" in line:
            answer = requests.get(line.partition("preview ")[2])
            preview = answer.content if answer.ok else None
    states = [update["status"] for update in updates]
    assert states == sorted(states) and states[-1] == TaskStatus.COMPLETED and TaskStatus.RUNNING in states
    lines = [entry["content"] for entry in updates[-1]["logs"]]
    assert [line.split(",")[0] for line in lines if line.startswith("step")] == [
        f"step {i}/4" for i in (1, 2, 3, 4)
    ]
    assert percentages == sorted(percentages) and percentages[-1] == 100
    assert Image.open(io.BytesIO(preview)).format == "JPEG"


def test_options_reach_a_graph_that_the_host_runs(jobs):
    options = {
        "fps": 24, "guidance_scale": 4.5, "solver": "dpm++", "shift": 4, "enable_riflex": True,
        "joint_pass": False, "attention": "sdpa", "cfg_star": True, "cfg_star_step": 1, "vae_tile_size": 128,
    }  # fmt: skip
    result = jobs.run(request(**options))
    report = requests.get(result["output"]["report"]).text
    assert "dpm++" in report and "CFG-Zero*" in report
    url = "https://lora.invalid/style.safetensors"
    with pytest.raises(RuntimeError, match=r"Wan21LoraLoader: .*lora\.invalid/style\.safetensors could not"):
        jobs.run(request(lora_url=url, lora_multiplier=0.5))


def test_cancel_of_a_running_and_a_waiting_task(jobs):
    running, waiting = (jobs.run(request(num_inference_steps=1000), wait=False) for _ in range(2))
    for update in jobs.stream_task(running["id"]):
        if update["status"] == TaskStatus.RUNNING:
            break
    for task in (waiting, running):
        jobs.cancel(task["id"])
        with pytest.raises(RuntimeError, match="cancelled"):
            list(jobs.stream_task(task["id"]))
        jobs.cancel(task["id"])
    assert jobs.run(request())["status"] == TaskStatus.COMPLETED


def test_the_hosts_ranges_are_those_of_the_schema(server):
    schema = requests.get(f"{server.url}/wan21/apps/{APP}").json()["properties"]
    node = server.client.object_info("Wan21Sampler")["input"]["required"]
    for field, name in (("num_inference_steps", "steps"), ("guidance_scale", "guidance_scale")):
        assert (schema[field]["minimum"], schema[field]["maximum"]) == (
            node[name][1]["min"],
            node[name][1]["max"],
        )
    assert schema["solver"]["enum"] == node["solver"][1]["options"]


def test_wrong_fields_queue_nothing(jobs, server):
    before = len(server.client.get("/history"))
    with pytest.raises(APIError) as raised:
        jobs.run(request(num_frames=6, bogus=1), wait=False)
    paths = {error["path"] for error in json.loads(raised.value.response_body)["errors"]}
    assert raised.value.status_code == 422 and paths == {"input.num_frames", "input.bogus"}
    queue = server.client.get("/queue")
    assert queue["queue_pending"] == [] and queue["queue_running"] == []
    assert len(server.client.get("/history")) == before


def lines(task):
    return [entry["content"] for entry in task["logs"]]


def test_what_the_lora_and_the_nodes_say_is_in_the_log(jobs, server):
    """A LoRA with keys that fit nothing, as if fetched before; the second job finds its loader cached."""
    url = "https://example.com/drain.safetensors"
    mark = hashlib.sha256(url.encode()).hexdigest()[:12]
    path = server.models_directory / "loras" / f"drain-{mark}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    lora = load_file(ROOT / "models" / "loras" / "wan21-tiny-lora.safetensors")
    spare = {f"diffusion_model.blocks.99.ffn.0.lora_{end}.weight": torch.zeros(8, 8) for end in "AB"}
    save_file(lora | spare, path)
    for seed in (1, 2):
        result = jobs.run(
            request(seed=seed, lora_url=url, lora_multiplier=0.5, prompt="pan (left:1.2) \\o/ :)")
        )
        said = lines(jobs.get_task(result["id"]).data)
        assert any(line.startswith(f"Wan21LoraLoader: LoRA: {path.name}, strength 0.5") for line in said), (
            said
        )
        assert any("Wan21LoraLoader: left out: 2 keys" in line and "blocks.99" in line for line in said), said
        assert any(line.startswith("Wan21Sampler: ") and "s per step" in line for line in said), said
        report = requests.get(result["output"]["report"]).text
        assert report.startswith("LoRA: drain-") and f"seed: {seed}" in report


def test_a_foreign_vae_does_not_decode_the_bundled_model(jobs, server):
    """The release's VAE, by its header, is all that is installed beside the bundled files."""
    pack.load_pack()
    from wan21.wan.vae import WanVAE

    with torch.device("meta"):
        state_dict = WanVAE().state_dict()
    name = "wan_2.1_vae.safetensors"
    path = write_sparse(server.models_directory / "vae" / name, state_dict)
    try:
        result = jobs.run(request(seed=5))
        assert lines(jobs.get_task(result["id"]).data)[0] == (
            "the job runs with model wan21-tiny-i2v.safetensors, text encoder wan21-tiny-umt5.safetensors "
            "and VAE wan21-tiny-vae.safetensors"
        )
        with pytest.raises(APIError) as raised:
            jobs.run(request(model="wan21-tiny-i2v.safetensors", vae=name), wait=False)
        [error] = json.loads(raised.value.response_body)["errors"]
        assert raised.value.status_code == 422 and error["path"] == "input.vae" and name in error["message"]
    finally:
        path.unlink()


def test_a_killed_server_loses_no_task(tmp_path, monkeypatch):
    """kill -9 while one runs and one waits: the first has failed and its webhook comes, the second runs."""
    monkeypatch.setenv("WAN21_ALLOW_PRIVATE_URLS", "1")
    receiver = Receiver()
    hook = {"webhook": receiver.url}
    with HostServer(tmp_path, start_timeout_s=SLOW_START_S) as server:
        jobs = connect(server)
        running = jobs.run(request(num_inference_steps=1000) | hook, wait=False)["id"]
        waiting = jobs.run(request(seed=3) | hook, wait=False)["id"]
        for update in jobs.stream_task(running):
            if update["status"] == TaskStatus.RUNNING:
                break
        server.process.kill()
        server.process.wait()
    with HostServer(tmp_path, start_timeout_s=SLOW_START_S) as server:
        jobs = connect(server)
        failed = jobs.get_task(running).data
        assert failed["status"] == TaskStatus.FAILED and "stopped while the task ran" in failed["error"]
        for update in jobs.stream_task(waiting, max_reconnects=1000):
            last = update
        assert last["status"] == TaskStatus.COMPLETED and last["output"]["seed"] == 3
        deadline = time.monotonic() + 120
        while len(receiver.events) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
    assert {event["id"]: event["status"] for event in receiver.events} == {
        running: TaskStatus.FAILED,
        waiting: TaskStatus.COMPLETED,
    }


@pytest.fixture
def interruptible():
    """A shell that runs the tests in the background has them ignore Ctrl+C, and all that they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(os.name == "nt", reason="Ctrl+C is no signal that a process can be sent there")
def test_ctrl_c_during_a_job_ends_cleanly_with_the_state_written(tmp_path, interruptible):
    """A thread of torch had ended the process by SIGABRT."""
    with HostServer(tmp_path, start_timeout_s=SLOW_START_S) as server:
        jobs = connect(server)
        running, waiting = (jobs.run(request(num_inference_steps=1000), wait=False)["id"] for _ in range(2))
        for update in jobs.stream_task(running):
            if update["logs"][-1]["content"].startswith("step "):
                break
        os.kill(server.process.pid, signal.SIGINT)
        assert server.process.wait(60) == 0, server.log_tail()
    with contextlib.closing(sqlite3.connect(tmp_path / "user" / "__wan21_jobs" / "jobs.sqlite")) as database:
        stored = dict(database.execute("SELECT id, status FROM tasks"))
    assert stored == {running: TaskStatus.FAILED, waiting: TaskStatus.QUEUED}
