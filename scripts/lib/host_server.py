"""Start a real ComfyUI server for a demo or a test, talk to it, and leave nothing behind.

    with HostServer(base_directory, models_directory=models) as server:
        image = server.client.upload_image("cat.png")
        job = server.client.run(fill(graph, "LoadImage", image=image))
        data = server.client.download(job.files[0])

The server keeps everything it writes below `base_directory`: a user's own ComfyUI folders, models
and custom nodes are neither read nor touched. The pack is linked into that folder's `custom_nodes`.
"""

import contextlib
import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

from .comfy_client import ComfyClient
from .pack import comfyui_path, link_pack

LOG_TAIL_LINES = 30
STOP_GRACE_S = 10
PR_SET_PDEATHSIG = 1


class HostServer:
    """A ComfyUI server on a free loopback port, in its own process group, as a context manager.

    Args:
        base_directory: folder for custom_nodes, models, input, output, temp and user; created.
        models_directory: folder laid out like ComfyUI's `models`; default is `base_directory/models`.
        extra_args: further command-line arguments for ComfyUI's `main.py`.
        link: link this pack into `custom_nodes`.
        start_timeout_s: seconds until a server that does not answer is given up.

    Attributes:
        url: address of the server, `http://127.0.0.1:port`.
        client: a `ComfyClient` for it.
        log_path: file with everything the server printed.
        output_directory, input_directory: folders below `base_directory`.

    Enter it from the thread that lives longest: on Linux the kernel ends the server together with
    the thread that started it, so that not even `kill -9` of the parent leaves one behind.
    """

    def __init__(self, base_directory, models_directory=None, extra_args=(), link=True, start_timeout_s=600):
        self.base_directory = Path(base_directory).resolve()
        self.models_directory = Path(models_directory or self.base_directory / "models").resolve()
        self.output_directory = self.base_directory / "output"
        self.input_directory = self.base_directory / "input"
        self.log_path = self.base_directory / "server.log"
        self.extra_args = list(extra_args)
        self.link = link
        self.start_timeout_s = start_timeout_s
        self.process = None

    def __enter__(self):
        self._make_folders()
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.client = ComfyClient(self.url)
        try:
            self._start(port)
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_):
        self.stop()

    def log(self):
        """Return everything the server has printed so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def log_tail(self):
        """Return the last lines of the log, for error messages."""
        return "\n".join(self.log().splitlines()[-LOG_TAIL_LINES:])

    def stop(self):
        """End the server and every process it started; safe to call twice."""
        if self.process is None:
            return
        for sig, grace_s in ((signal.SIGTERM, STOP_GRACE_S), (signal.SIGKILL, None)):
            _signal_group(self.process.pid, sig)
            try:
                self.process.wait(timeout=grace_s)
            except subprocess.TimeoutExpired:
                continue
        self.process = None

    def _make_folders(self):
        for name in ("custom_nodes", "input", "output", "temp", "user"):
            (self.base_directory / name).mkdir(parents=True, exist_ok=True)
        self.models_directory.mkdir(parents=True, exist_ok=True)
        if self.link:
            link_pack(self.base_directory / "custom_nodes")

    def _start(self, port):
        command = [sys.executable, "-u", *self._program(), *self._arguments(port)]
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.base_directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent() if sys.platform == "linux" else None,
            )

    def _program(self):
        return [str(comfyui_path() / "main.py")]

    def _arguments(self, port):
        import torch

        return [
            *("--port", str(port)),
            *("--base-directory", str(self.base_directory)),
            *("--models-directory", str(self.models_directory)),
            *("--database-url", "sqlite:///:memory:"),
            "--disable-api-nodes",
            "--use-pytorch-cross-attention",
            *([] if torch.cuda.is_available() else ["--cpu"]),
            *self.extra_args,
        ]

    def _wait_until_ready(self):
        deadline = time.monotonic() + self.start_timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(
                    f"ComfyUI ended with status {self.process.returncode} while starting. "
                    f"The last lines of {self.log_path}:\n{self.log_tail()}"
                )
            try:
                return self.client.get("/system_stats")
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        raise RuntimeError(
            f"ComfyUI did not answer at {self.url} within {self.start_timeout_s} s. "
            f"The last lines of {self.log_path}:\n{self.log_tail()}"
        )


def group_lives(group):
    """Return whether any process of a process group is alive; the dead and unburied do not count."""
    import psutil

    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
        except ProcessLookupError:
            continue  # it ended while we looked
    return False


def free_port():
    """Return a loopback port that nobody listens on.

    It lies below those that systems give to outgoing connections: such a one could be taken before the
    server listens.
    """
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def _signal_group(group, sig):
    with contextlib.suppress(ProcessLookupError):  # every process of the group has already ended
        os.killpg(group, sig)


def _die_with_parent():
    """Return the call that asks the Linux kernel to kill the child when its parent dies."""
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
