"""The Python examples of README and docs/job-api.md run as they are, on another port, for a smaller video."""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import requests
from lib.host_server import free_port
from lib.pack import ROOT, comfyui_path

PAGES = [ROOT / "README.md", ROOT / "docs" / "job-api.md"]
EXAMPLES = [
    code
    for page in PAGES
    for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
]
SMALLER = {'"832*480"': '"64*64"', '"num_frames": 81': '"num_frames": 5, "num_inference_steps": 2'}
TIMEOUT_S = 600


def example(title, changes):
    """The example with a text that no other has, with other texts replaced; each must occur in it."""
    [code] = [code for code in EXAMPLES if title in code]
    for old, new in changes.items():
        assert old in code, f"the example has no {old}"
        code = code.replace(old, new)
    return code


@pytest.fixture
def folder(tmp_path):
    """A folder with the picture of the examples."""
    shutil.copy(comfyui_path() / "input" / "example.png", tmp_path / "cat.jpg")
    return tmp_path


@pytest.mark.parametrize("title", ["result = client.run", "stream=True"])
def test_client(server, folder, title):
    code = example(title, SMALLER | {"http://127.0.0.1:8188": server.url})
    environment = os.environ | {"TQDM_MININTERVAL": "0"}  # or its bar leaves out what comes soon after
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert run.returncode == 0, run.stderr
    address = run.stdout.splitlines()[-1]
    assert address.endswith(".mp4") and requests.get(address).content[4:8] == b"ftyp"
    if title == "stream=True":
        assert "100%" in run.stderr and re.search("step [12]/2", run.stderr)


def test_webhook_receiver(folder):
    from wan21.server.webhooks import signature

    port = free_port()
    code = example("BaseHTTPRequestHandler", {"9000": str(port)})
    environment = os.environ | {"WAN21_WEBHOOK_SECRET": "a secret"}
    receiver = subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        body = b'{"id": "task_1", "status": 10}'
        good = signature("a secret", body, int(time.time()))
        assert _post(port, body, good) == 200
        assert receiver.stdout.readline() == "{'id': 'task_1', 'status': 10}\n"
        assert _post(port, body, signature("another", body, int(time.time()))) == 403
    finally:
        receiver.kill()
        receiver.wait()


def _post(port, body, headers):
    deadline = time.monotonic() + 60
    while True:
        try:
            return requests.post(f"http://127.0.0.1:{port}/", data=body, headers=headers).status_code
        except requests.ConnectionError:
            assert time.monotonic() < deadline, "the receiver does not listen"
            time.sleep(0.1)
