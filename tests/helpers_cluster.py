"""Nodes of one Ray cluster on this machine, with as many GPUs as a test pretends."""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

RAY = str(Path(sys.executable).with_name("ray"))
START_S = 300
LOOPBACK = "127.0.0.1"


class Cluster:
    """A head, and nodes that join it.

    Attributes:
        address: of the head.
        token: without which nobody is let in.
    """

    def __init__(self, folder):
        self.folder, self.token = folder, secrets.token_hex(32)
        with socket.socket() as probe:
            probe.bind((LOOPBACK, 0))
            self.address = f"{LOOPBACK}:{probe.getsockname()[1]}"
        self.nodes = []

    def start(self, *options, **environment):
        """One more node; the first is the head. Gives its process, which lives as long as the node."""
        if self.nodes:
            place = [f"--address={self.address}"]
        else:
            port = self.address.rpartition(":")[2]
            place = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={self.folder}"]
        environment |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_health_check_initial_delay_ms": "1000",  # a node is known to be gone in seconds
            "RAY_health_check_period_ms": "1000",
        }
        log = Path(self.folder) / f"node-{len(self.nodes)}"
        with log.open("wb") as file:
            node = subprocess.Popen(
                [
                    RAY, "start", *place, "--block", f"--node-ip-address={LOOPBACK}",
                    "--object-store-memory=100000000", "--disable-usage-stats", *options,
                ],
                env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip
        self.nodes.append(node)
        end = time.monotonic() + START_S
        while "Ray runtime started" not in (said := log.read_text(errors="replace")):
            assert node.poll() is None and time.monotonic() < end, said
            time.sleep(0.1)
        return node

    def end(self, node):
        """Kills a node with all that it started, as when its machine loses its power."""
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):
                if os.getsid(process.pid) == node.pid:
                    process.kill()
        node.wait()


@contextmanager
def ray_cluster():
    """A cluster without a node, which leaves nothing behind."""
    with tempfile.TemporaryDirectory(prefix="wan21-c-", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(folder)
        try:
            yield cluster
        finally:
            for node in cluster.nodes:
                cluster.end(node)
