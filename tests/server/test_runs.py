"""Runs, streams, cancel, delete and restarts, with the unmodified client."""

import json
import threading
import time

import pytest
import requests
from helpers_server import STEPS, serve, stored_status, wait_until
from inferencesh import TaskStatus
from wan21.server import app
from wan21.server.store import Store


def test_run_waits_for_the_output(api, job):
    threading.Timer(0.2, api.play_next).start()
    result = api.client.run(job(seed=7))
    assert result["status"] == TaskStatus.COMPLETED
    output = result["output"]
    assert output["seed"] == 7
    for name, body in (("video", b"mp4"), ("last_frame", b"png"), ("report", b"seed: 1\n")):
        answer = requests.get(output[name])
        assert answer.content == body and answer.headers["X-Content-Type-Options"] == "nosniff"


def test_stream_tells_every_change(api, job):
    updates = api.client.run(job(), stream=True)
    api.play_next(pause=0.1)
    seen = list(updates)
    states = list(dict.fromkeys(update["status"] for update in seen))
    assert states[-1] == TaskStatus.COMPLETED and states == sorted(states)
    assert {TaskStatus.PREPARING, TaskStatus.RUNNING} <= set(states)
    lines = [entry["content"] for entry in seen[-1]["logs"]]
    assert sum(line.startswith("step ") for line in lines) == STEPS
    assert "s per step, preview http" in lines[-2]
    assert seen[-1]["output"]["video"].startswith(api.url)


def test_a_late_reader_gets_the_present_snapshot(api, job):
    task = api.client.run(job(), wait=False)
    assert task["status"] == TaskStatus.QUEUED
    api.play_next()
    wait_until(lambda: api.client.get_task(task["id"]).data["status"] == TaskStatus.COMPLETED)
    whole = api.client.get_task(task["id"]).data
    assert whole["progress"] == 100 and whole["short_id"] in task["id"]
    [line] = requests.get(f"{api.url}/tasks/{task['id']}/stream").text.splitlines()
    assert json.loads(line) == whole
    status = requests.get(f"{api.url}/tasks/{task['id']}/status").json()["data"]
    assert status == {name: whole[name] for name in ("id", "status", "updated_at")}


def test_a_stream_that_says_nothing_new_repeats_itself(api, job, monkeypatch):
    from wan21.server import routes

    monkeypatch.setattr(routes, "SNAPSHOT_SECONDS", 0.05)
    task = api.client.run(job(), wait=False)
    with requests.get(f"{api.url}/tasks/{task['id']}/stream", stream=True) as answer:
        lines = answer.iter_lines()
        first = [json.loads(next(lines)) for _ in range(3)]
    assert first[0] == first[1] == first[2] and first[0]["status"] == TaskStatus.QUEUED
    api.client.cancel(task["id"])


def test_preview_is_there_while_the_task_runs(api, job):
    task = api.client.run(job(), wait=False)
    address = f"{api.url}/tasks/{task['id']}/preview"
    assert requests.get(address).status_code == 404
    [prompt_id] = api.host.queue
    api.do(api.host.start, prompt_id)
    api.do(api.host.step, prompt_id, 1)
    answer = requests.get(address)
    assert answer.content == b"jpeg" and answer.headers["Content-Type"] == "image/jpeg"
    api.client.cancel(task["id"])


@pytest.mark.parametrize("running", [False, True])
def test_cancel(api, job, running):
    task = api.client.run(job(), wait=False)
    [prompt_id] = api.host.queue
    if running:
        api.do(api.host.start, prompt_id)
    for _ in range(3):
        api.client.cancel(task["id"])
    done = wait_until(
        lambda: (t := api.client.get_task(task["id"]).data)["status"] == TaskStatus.CANCELLED and t
    )
    assert done["output"] is None and api.host.queue == []
    with pytest.raises(RuntimeError, match="cancelled"):
        list(api.client.stream_task(task["id"]))


def test_a_job_removed_in_the_editor_is_cancelled(api, job):
    task = api.client.run(job(), wait=False)
    api.do(api.host.queue.clear)
    wait_until(lambda: api.client.get_task(task["id"]).data["status"] == TaskStatus.CANCELLED)
    assert "removed" in api.client.get_task(task["id"]).data["error"]


def test_a_failed_node_is_named(api, job):
    task = api.client.run(job(), wait=False)
    [prompt_id] = api.host.queue
    error = {"node_type": "Wan21Sampler", "exception_message": "no memory\n", "node_id": "10"}
    api.do(api.host.start, prompt_id)
    api.do(api.host.finish, prompt_id, [("execution_error", error)])
    with pytest.raises(RuntimeError, match="Wan21Sampler: no memory"):
        list(api.client.stream_task(task["id"]))


@pytest.mark.parametrize(
    "node, message, told",
    [
        (
            "Wan21Sampler",
            "Wan21Sampler: steps is 0. Set 1 or more.\n",
            "Wan21Sampler: steps is 0. Set 1 or more.",
        ),
        ("Wan21Sampler", "no memory\n", "Wan21Sampler: no memory"),
        ("Wan21Sampler", "Wan21Samplers: of another name", "Wan21Sampler: Wan21Samplers: of another name"),
        ("KSampler", "size mismatch", "KSampler: size mismatch"),
        ("KSampler", "\n", "KSampler: AssertionError"),
    ],
)
def test_the_name_of_a_failed_node_stands_once_in_front(api, job, node, message, told):
    task = api.client.run(job(), wait=False)
    [prompt_id] = api.host.queue
    error = {"node_type": node, "exception_message": message, "exception_type": "AssertionError"}
    api.do(api.host.start, prompt_id)
    api.do(api.host.finish, prompt_id, [("execution_error", error)])
    ended = wait_until(
        lambda: (t := api.client.get_task(task["id"]).data)["status"] == TaskStatus.FAILED and t
    )
    assert ended["error"] == told
    assert not any(node in entry["content"] for entry in ended["logs"])


def test_a_job_that_is_refused_after_a_restart_names_its_node_once(host, job):
    with serve(host) as api:
        task = api.client.run(job(), wait=False)["id"]
    [prompt_id] = host.queue
    sampler, decode = host.node(prompt_id, "Wan21Sampler"), host.node(prompt_id, "Wan21VAEDecode")
    host.refuses = [
        (sampler, "steps", "Value too large"),
        (decode, "tile_size", "Wan21VAEDecode: tile_size is 5. Use 128."),
        (decode, "vae", "Wan21VAEDecode: tile_size is 5. Use 128."),
        ("", "", "Node 'x' not found"),
    ]
    host.queue.clear()
    with serve(host) as api:
        assert api.client.get_task(task).data["error"] == (
            "after a restart the host refused it: Wan21Sampler: Value too large; "
            "Wan21VAEDecode: tile_size is 5. Use 128; Node 'x' not found"
        )


def test_delete_with_and_without_files(api, job):
    tasks = [api.client.run(job(), wait=False)["id"] for _ in range(2)]
    assert requests.delete(f"{api.url}/tasks/{tasks[0]}").status_code == 409
    for task in tasks:
        api.play_next()
        wait_until(lambda task=task: api.client.get_task(task).data["status"] == TaskStatus.COMPLETED)
    files = api.client.tasks.files(tasks[0]).data
    outputs = [file for file in files if file["role"] == "output"]
    assert len(outputs) == 3 and len(files) == 4
    api.client.tasks.delete(tasks[0])
    assert requests.get(f"{api.url}/tasks/{tasks[0]}").status_code == 404
    assert requests.get(outputs[0]["url"]).ok
    second = api.client.tasks.files(tasks[1]).data
    assert requests.delete(f"{api.url}/tasks/{tasks[1]}?files=true").status_code == 204
    assert not any(requests.get(file["url"]).ok for file in second)
    assert not (api.host.output_directory / "wan21" / tasks[1]).exists()
    assert not (api.host.input_directory / "wan21" / tasks[1]).exists()


def test_restart_queues_waiting_tasks_again_and_fails_running_ones(host, job):
    with serve(host) as api:
        running, first, second = (api.client.run(job(seed=i), wait=False)["id"] for i in range(3))
        order = list(host.queue)
        api.do(host.start, order[0])
        wait_until(lambda: api.client.get_task(running).data["status"] == TaskStatus.PREPARING)
    host.queue.clear()  # the host's queue is in memory
    with serve(host) as api:
        assert host.queue == order[1:]
        failed = api.client.get_task(running).data
        assert failed["status"] == TaskStatus.FAILED and "stopped while the task ran" in failed["error"]
        for task in (first, second):
            api.play_next()
            wait_until(lambda task=task: api.client.get_task(task).data["status"] == TaskStatus.COMPLETED)
    with serve(host) as api:
        assert api.client.get_task(second).data["output"]["seed"] == 2 and host.queue == []


def test_streams_end_with_the_server(host, job):
    with serve(host) as api:
        task = api.client.run(job(), wait=False)
        answer = requests.get(f"{api.url}/tasks/{task['id']}/stream", stream=True)
        lines = answer.iter_lines()
        assert json.loads(next(lines))["status"] == TaskStatus.QUEUED
        begin = time.monotonic()
    assert list(lines) == [] and time.monotonic() - begin < 20


def test_two_servers_do_not_share_a_folder(api, host):
    from wan21.server.app import create_app

    with pytest.raises(RuntimeError, match="another server"):
        api.do(create_app, host)


def test_unknown_things_are_problems(api):
    for path in ("/tasks/none", "/tasks/none/stream", "/tasks/%ff", "/files/none", "/sessions/no", "/no"):
        answer = requests.get(api.url + path)
        assert answer.status_code == 404, path
        assert answer.headers["Content-Type"].startswith("application/problem+json")
        assert answer.json()["type"] == "https://inference.sh/errors/not_found"


def test_sessions(api, job):
    first = api.client.run(job({"session": "new"}), wait=False)
    session = first["session_id"]
    assert api.client.run(job({"session": session}), wait=False)["session_id"] == session
    [listed] = requests.get(f"{api.url}/sessions").json()["data"]
    expires_at = listed["expires_at"]
    assert listed["call_count"] == 2 and listed["status"] == "active"
    assert requests.post(f"{api.url}/sessions/{session}/keepalive").ok
    [listed] = requests.get(f"{api.url}/sessions").json()["data"]
    assert listed["call_count"] == 2 and listed["expires_at"] > expires_at
    assert requests.delete(f"{api.url}/sessions/{session}").status_code == 204
    assert requests.get(f"{api.url}/sessions/{session}").status_code == 410
    body = {"app": "infsh/wan2-1-i2v", "session": session, "input": first["input"]}
    assert requests.post(f"{api.url}/apps/run", json=body).status_code == 410


def test_what_a_job_wrote_goes_when_it_fails(api, job):
    task = api.client.run(job(), wait=False)["id"]
    [prompt_id] = api.host.queue
    api.do(api.host.start, prompt_id)
    api.do(api.host.write_outputs, prompt_id)
    folder = api.host.output_directory / "wan21" / task
    assert (folder / "video_00001_.mp4").is_file()
    api.client.cancel(task)
    wait_until(lambda: not folder.exists())


def test_what_a_job_wrote_goes_before_its_end_is_stored(api, job, monkeypatch):
    """A server that was killed in between had left it for ever: nobody looks at tasks that are over."""
    task, seen = api.client.run(job(), wait=False)["id"], []
    folder, real = api.host.output_directory / "wan21" / task, Store.end_task

    async def watch(self, *args):
        seen.append(folder.exists())
        await real(self, *args)

    monkeypatch.setattr(Store, "end_task", watch)
    [prompt_id] = api.host.queue
    api.do(api.host.start, prompt_id)
    api.do(api.host.write_outputs, prompt_id)
    api.client.cancel(task)
    wait_until(lambda: api.client.get_task(task).data["status"] == 12)
    assert seen == [False]


@pytest.mark.parametrize("cancelling", [False, True])
def test_the_end_of_the_process_is_written_without_its_event_loop(host, job, monkeypatch, cancelling):
    at_exit = []
    monkeypatch.setattr(app.atexit, "register", at_exit.append)
    with serve(host) as api:
        running, waiting = (api.client.run(job(), wait=False)["id"] for _ in range(2))
        api.do(host.start, host.queue[0])
        api.do(host.write_outputs, host.queue[0])
        if cancelling:
            host.cancel = lambda prompt_id: "interrupted"  # and not heard yet
            api.client.cancel(running)
        [stop] = at_exit
        stop()
        expected = TaskStatus.CANCELLED if cancelling else TaskStatus.FAILED
        assert [stored_status(host, task) for task in (running, waiting)] == [expected, TaskStatus.QUEUED]
        assert not (host.output_directory / "wan21" / running).exists()
