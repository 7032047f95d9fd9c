"""The job API of a real ComfyUI with a fleet: real Ray, and stations that are real ComfyUIs on the CPU."""

import io

import inferencesh
import pytest
import requests
from inferencesh import TaskStatus
from lib.host_server import HostServer
from lib.pack import comfyui_path
from PIL import Image
from wan21.workers import cannot_run

pytestmark = [
    pytest.mark.xdist_group("fleet"),  # one fleet for all of them
    pytest.mark.skipif(cannot_run() is not None, reason=str(cannot_run())),
]

SLOW_START_S = 1800


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """A ComfyUI with the job API and two stations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WAN21_STATIONS", "1")
        folder = tmp_path_factory.mktemp("fleet")
        previews = ["--preview-method", "auto"]
        with HostServer(folder, extra_args=previews, start_timeout_s=SLOW_START_S) as server:
            yield server


@pytest.fixture(scope="module")
def jobs(fleet):
    return inferencesh.inference(api_key="any", base_url=f"{fleet.url}/wan21")


def request(**fields):
    small = {"size": "64*64", "num_frames": 5, "num_inference_steps": 2}
    image = str(comfyui_path() / "input" / "example.png")
    return {"app": "infsh/wan2-1-i2v", "input": {"prompt": "pan left", "image": image} | small | fields}


def lines(task):
    return [entry["content"] for entry in task["logs"]]


def test_a_job_goes_to_a_station_and_comes_back_with_steps_previews_and_files(jobs, fleet):
    updates, preview = [], None
    for update in jobs.run(request(num_inference_steps=4, seed=7), stream=True):
        updates.append(update)
        line = lines(update)[-1]
        if preview is None and "preview http" in line:
            answer = requests.get(line.partition("preview ")[2])
            preview = answer.content if answer.ok else None
    states = [update["status"] for update in updates]
    assert states == sorted(states) and states[-1] == TaskStatus.COMPLETED and TaskStatus.RUNNING in states
    said = lines(updates[-1])
    assert [line.split(",")[0] for line in said if line.startswith("step")] == [
        f"step {i}/4" for i in (1, 2, 3, 4)
    ]
    assert any(line.startswith("given to station ") for line in said)
    assert Image.open(io.BytesIO(preview)).format == "JPEG"
    output = updates[-1]["output"]
    with Image.open(io.BytesIO(requests.get(output["last_frame"]).content)) as last:
        assert last.size == (64, 64)
    assert "seed: 7" in requests.get(output["report"]).text
    assert fleet.client.get("/history") == {}  # of the ComfyUI that has the API


def test_cancel_of_a_running_and_a_waiting_task(jobs):
    running, waiting = (jobs.run(request(num_inference_steps=1000), wait=False) for _ in range(2))
    for update in jobs.stream_task(running["id"]):
        if update["status"] == TaskStatus.RUNNING:
            break
    for task in (waiting, running):
        jobs.cancel(task["id"])
        with pytest.raises(RuntimeError, match="cancelled"):
            list(jobs.stream_task(task["id"]))
    assert jobs.run(request())["status"] == TaskStatus.COMPLETED
