"""Two network namespaces of this machine as two machines, each with a node of one Ray cluster. For root."""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = ("wan21a", "wan21b")
HEAD = "10.77.21.1"
RAY = str(Path(sys.executable).with_name("ray"))


def cannot():
    """Why there can be none here; None when there can be."""
    if shutil.which("ip") is None:
        return "there is no `ip`"
    if os.geteuid() != 0:
        return "namespaces are made by root"
    done = _run("ip", "netns", "add", NAMES[0])
    if done.returncode:
        return f"`ip netns add` says {done.stderr.strip()}"
    _run("ip", "netns", "del", NAMES[0])
    return None


@contextlib.contextmanager
def cluster(cpus):
    """Yields a function that runs a command in the first namespace, and the environment for it.

    Args:
        cpus: of each node.
    """
    folder = tempfile.mkdtemp(prefix="wan21-ns-")
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "WAN21_RAY_ADDRESS": f"{HEAD}:6379"}

    def inside(name, *command, **more):
        prefix = ["ip", "netns", "exec", NAMES[name]]
        return subprocess.run([*prefix, *command], env=environment | more, check=True)

    common = (f"--num-cpus={cpus}", "--object-store-memory=200000000")
    try:
        for name in NAMES:
            _must("ip", "netns", "add", name)
        _must("ip", "link", "add", "va", "netns", NAMES[0], "type", "veth", "peer", "vb", "netns", NAMES[1])
        for number, (name, device) in enumerate(zip(NAMES, ("va", "vb")), 1):
            _must("ip", "-n", name, "addr", "add", f"10.77.21.{number}/24", "dev", device)
            for one in (device, "lo"):
                _must("ip", "-n", name, "link", "set", one, "up")
        head = ("--head", f"--node-ip-address={HEAD}", "--port=6379", "--include-dashboard=false")
        inside(0, RAY, "start", *head, f"--temp-dir={folder}", *common, WAN21_STATION_NAME="first")
        other = (f"--address={HEAD}:6379", "--node-ip-address=10.77.21.2")
        inside(1, RAY, "start", *other, *common, WAN21_STATION_NAME="second")
        yield lambda *command, **more: inside(0, *command, **more)
    finally:
        for name in NAMES:
            for pid in _run("ip", "netns", "pids", name).stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
            _run("ip", "netns", "del", name)
        shutil.rmtree(folder, ignore_errors=True)


def _run(*command):
    return subprocess.run(command, capture_output=True, text=True)


def _must(*command):
    done = _run(*command)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} says {done.stderr.strip()}")
