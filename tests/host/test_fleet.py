"""The job API of a real ComfyUI with a fleet: real Ray, and stations that are real ComfyUIs on the CPU."""

import io
import time
from pathlib import Path

import inferencesh
import psutil
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
        patch.setenv("WAN21_STATIONS", "2")
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


def stations(fleet):
    return requests.get(f"{fleet.url}/wan21/stations").json()["data"]


def until(condition, seconds=SLOW_START_S):
    """Waits until `condition()` gives something, and returns that."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not happen in time")


def process_of(name, fleet):
    """The process that Ray has for a station: the parent of the ComfyUI that it started, by its folder."""
    marks = {one.pid: one for one in psutil.process_iter() if _station_folder(one)}
    tasks = {one["name"]: one["task"] for one in stations(fleet)}
    for one in marks.values():
        folder = Path(_station_folder(one))
        if tasks[name] and (folder / "input" / "wan21" / tasks[name]).exists():
            return one.parent()
    return None


def _station_folder(process):
    try:
        command = process.cmdline()
    except psutil.Error:
        return None
    found = [part for part in command if "wan21-station-" in part and part.endswith("/output")]
    return str(Path(found[0]).parent) if found else None


def test_a_station_that_is_killed_in_a_job_costs_a_try_and_comes_back(jobs, fleet):
    until(lambda: [one["state"] for one in stations(fleet)] == ["idle", "idle"])
    task = jobs.run(request(num_inference_steps=1000), wait=False)["id"]
    for update in jobs.stream_task(task):
        if update["status"] == TaskStatus.RUNNING:
            break
    first = next(one["name"] for one in stations(fleet) if one["task"] == task)
    process_of(first, fleet).kill()
    died = until(lambda: [line for line in lines(jobs.get_task(task).data) if "died while it ran it" in line])
    assert first in died[0] and "queued once more" in died[0]
    until(lambda: jobs.get_task(task).data["status"] == TaskStatus.RUNNING)
    second = next(one["name"] for one in stations(fleet) if one["task"] == task)
    jobs.cancel(task)
    until(lambda: jobs.get_task(task).data["status"] == TaskStatus.CANCELLED)
    assert second != first
    until(lambda: [one["state"] for one in stations(fleet)] == ["idle", "idle"])
    done = jobs.run(request(seed=3) | {"workers": [first]})
    assert f"given to station {first}" in lines(done)


def test_ray_is_not_in_comfyuis_process_and_listens_for_token_holders_alone(fleet):
    maps = Path(f"/proc/{fleet.process.pid}/maps").read_text()
    assert "/ray/" not in maps
    driver = next(
        p for p in psutil.Process(fleet.process.pid).children() if "driver" in " ".join(p.cmdline())
    )
    environment = driver.environ()
    assert environment["RAY_AUTH_MODE"] == "token" and len(environment["RAY_AUTH_TOKEN"]) == 64


def test_cancel_of_a_running_and_a_waiting_task(jobs):
    running, *_ = three = [jobs.run(request(num_inference_steps=1000), wait=False) for _ in range(3)]
    for update in jobs.stream_task(running["id"]):
        if update["status"] == TaskStatus.RUNNING:
            break
    for task in reversed(three):
        jobs.cancel(task["id"])
        with pytest.raises(RuntimeError, match="cancelled"):
            list(jobs.stream_task(task["id"]))
    assert jobs.run(request())["status"] == TaskStatus.COMPLETED
