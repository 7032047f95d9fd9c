"""Two machines on one: network namespaces with a link between them, and a node of Ray in each."""

import ctypes
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ADDRESSES = ("10.77.0.1", "10.77.0.2")
CLONE_NEWNET = 0x40000000
RAY = str(Path(sys.executable).with_name("ray"))


def cannot_be_made():
    """Why there can be none, or an empty text."""
    if shutil.which("ip") is None:
        return "two machines need ip (iproute2)"
    name = f"w{os.getpid()}x"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"two machines need the right to make network namespaces ({made.stderr.strip()})"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


class Machines:
    """Two of them.

    Args:
        folder: for what Ray writes.
        token: of the cluster.
        cpus: that Ray gives out on each.
    """

    def __init__(self, folder, token, cpus=1):
        self.names = [f"w{os.getpid()}{letter}" for letter in "ab"]
        self.folder, self.cpus = folder, cpus
        keep = ("PATH", "HOME", "OMP_NUM_THREADS")
        self.environment = {name: os.environ[name] for name in keep if name in os.environ} | {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DISABLE_IMPORT_WARNING": "1",
        }  # fmt: skip

    def make(self):
        for name in self.names:
            ip("netns", "add", name)
        a, b = self.names
        ip("link", "add", f"v{a}", "netns", a, "type", "veth", "peer", "name", f"v{b}", "netns", b)
        for name, address in zip(self.names, ADDRESSES):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", f"v{name}")
            ip("-n", name, "link", "set", f"v{name}", "up")
            ip("-n", name, "link", "set", "lo", "up")

    def start_ray(self, machine, environment=None, instead=None):
        """A node of Ray; the first machine's is the head. Gives what it said, and whether it could.

        Args:
            instead: (path, other): for what is started there, the file at `path` is the one at `other`.
        """
        place = ["--head", "--port=6379"] if machine == 0 else [f"--address={ADDRESSES[0]}:6379"]
        command = [
            RAY, "start", *place, f"--node-ip-address={ADDRESSES[machine]}", f"--num-cpus={self.cpus}",
            "--object-store-memory=100000000",
        ]  # fmt: skip
        if machine == 0:
            command += ["--include-dashboard=false", f"--temp-dir={self.folder}"]
        if instead:  # of its own is not the network alone, but what is mounted as well
            path, other = instead
            command = [
                "sh",
                "-c",
                'mount --bind "$0" "$1" && shift && exec "$@"',
                str(other),
                str(path),
                *command,
            ]
        done = subprocess.run(
            self.inside(machine, command),
            env=environment or self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        return done.stdout, done.returncode == 0

    def inside(self, machine, command):
        return ["ip", "netns", "exec", self.names[machine], *command]

    @contextmanager
    def entered(self, machine):
        """This thread is on one of them, and so are the processes that it starts."""
        setns = ctypes.CDLL(None, use_errno=True).setns
        with open("/proc/thread-self/ns/net") as home, open(f"/run/netns/{self.names[machine]}") as there:
            assert setns(there.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            try:
                yield
            finally:
                assert setns(home.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())

    def cut(self):
        """Takes the link away."""
        ip("-n", self.names[1], "link", "set", f"v{self.names[1]}", "down")

    def kill(self, machine):
        """Ends all that runs on one."""
        told = subprocess.run(["ip", "netns", "pids", self.names[machine]], capture_output=True, text=True)
        for pid in told.stdout.split():
            subprocess.run(["kill", "-9", pid], capture_output=True)

    def leave(self, machine):
        """Ends a node as `ray stop` does: the cluster knows at once, where one killed counts for seconds."""
        told = subprocess.run(["ip", "netns", "pids", self.names[machine]], capture_output=True, text=True)
        for pid in told.stdout.split():
            with suppress(psutil.NoSuchProcess):
                one = psutil.Process(int(pid))
                if one.name() == "raylet":
                    one.terminate()
                    one.wait(30)
        self.kill(machine)

    def remove(self):
        for machine, name in enumerate(self.names):
            self.kill(machine)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def two_machines(folder, token, cpus=1):
    """`Machines`, made and removed."""
    machines = Machines(folder, token, cpus)
    try:
        machines.make()
        yield machines
    finally:
        machines.remove()
