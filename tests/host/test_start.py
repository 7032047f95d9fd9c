"""The host starts with this pack in it, quickly and without complaint, and stops without a trace."""

import json
import re
import signal
import subprocess
import sys
import time

from lib.host_server import group_lives
from lib.pack import LINK_NAME, ROOT

NODE_IDS = {
    "Wan21ModelLoader",
    "Wan21TextEncoderLoader",
    "Wan21VAELoader",
    "Wan21LoraLoader",
    "Wan21ImageToVideo",
    "Wan21Sampler",
    "Wan21VAEDecode",
    "Wan21TemporalUpsample",
    "Wan21SpatialUpsample",
    "Wan21JoinClips",
}
IMPORT_BUDGET_S = (
    0.3  # of CPU time; on a busy machine the same import takes 0.18 to 0.32, so it has three tries
)

# Imports the pack as the host does and calls its entry point, in a process where the host's own
# modules are already there; prints what that took and what it loaded.
IMPORT_PROBE = """
import asyncio, json, sys, time
sys.path.insert(0, "scripts")
from lib import pack
pack.load_host()
import nodes, comfy_api.latest, comfy_extras.nodes_wan
before = set(sys.modules)
start = time.process_time()
module = pack.load_pack()
light = set(sys.modules) - before
extension = asyncio.run(module.comfy_entrypoint())
asyncio.run(extension.get_node_list())
print(json.dumps({
    "seconds": time.process_time() - start,
    "package": sorted(light),
    "nodes": sorted(set(sys.modules) - before - light),
}))
"""


def test_nodes_appear(client):
    missing = NODE_IDS - client.object_info().keys()
    assert not missing, f"the host does not know {sorted(missing)}"


def test_log_has_no_complaint_about_the_pack(server):
    complaint = re.compile(r"error|warning|failed|traceback|exception", re.IGNORECASE)
    start = server.log().partition("To see the GUI")[0]  # later, other tests make errors on purpose
    ours = [line for line in start.splitlines() if "wan21" in line.lower()]
    assert any(LINK_NAME in line for line in ours)
    assert [line for line in ours if complaint.search(line)] == []


def test_host_reports_the_import(server):
    match = re.search(rf"[\d.]+ seconds(.*): .*{LINK_NAME}$", server.log(), re.MULTILINE)
    assert match, f"no import time of {LINK_NAME} in the log:\n{server.log_tail()}"
    assert match[1] == ""  # "(IMPORT FAILED)" otherwise


def test_import_is_quick_and_light():
    for _ in range(3):
        run = subprocess.run(
            [sys.executable, "-c", IMPORT_PROBE], cwd=ROOT, capture_output=True, text=True, check=True
        )
        probe = json.loads(run.stdout.splitlines()[-1])
        if probe["seconds"] < IMPORT_BUDGET_S:
            break
    assert probe["seconds"] < IMPORT_BUDGET_S
    assert probe["package"] == ["wan21"], "importing the package itself must load nothing else"
    foreign = {name.split(".")[0] for name in probe["nodes"]} - {"wan21"} - sys.stdlib_module_names
    assert foreign <= {"comfy", "comfy_api", "comfy_extras"}, "the host has not loaded these by itself"


def test_server_ends_with_a_killed_parent(tmp_path):
    script = (
        "import sys, time; sys.path.insert(0, 'scripts')\n"
        "from lib.host_server import HostServer\n"
        f"with HostServer({str(tmp_path)!r}, extra_args=['--disable-all-custom-nodes']) as server:\n"
        "    print(server.process.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    group = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 120
    while group_lives(group) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not group_lives(group)
