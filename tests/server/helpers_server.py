"""The job API on a web server of its own, over a host that a test moves on by hand.

Here the API's own bookkeeping is tested, with the unmodified client; tests/host runs it on a real host.
"""

import asyncio
import contextlib
import sqlite3
import threading
import time

import inferencesh
from aiohttp import web
from lib.random_checkpoints import FLF2V, I2V, T2V, TEXT_ENCODER, VAE
from wan21.host.node_inputs import describe_inputs
from wan21.nodes.image_to_video import Wan21ImageToVideo
from wan21.nodes.lora import Wan21LoraLoader
from wan21.nodes.sampler import Wan21Sampler
from wan21.nodes.vae_decode import Wan21VAEDecode
from wan21.server.app import create_app

APP = "infsh/wan2-1-i2v"
GIVE_UP_S = 120  # only a failure waits so long, or a machine that is busy with other things
STEPS = 3


LISTS = {  # what the loaders offer: the random checkpoints
    "Wan21ModelLoader": {"model_name": [FLF2V, I2V, T2V]},
    "Wan21TextEncoderLoader": {"text_encoder_name": [TEXT_ENCODER]},
    "Wan21VAELoader": {"vae_name": [VAE]},
    "CLIPVisionLoader": {"clip_name": []},
}


def node_inputs(node_class):
    """Inputs of our real nodes, described as `host.queue.Host` does."""
    nodes = {n.__name__: n for n in (Wan21ImageToVideo, Wan21LoraLoader, Wan21Sampler, Wan21VAEDecode)}
    if node_class == "CreateVideo":
        return {"images": {"type": "IMAGE"}, "fps": {"type": "FLOAT", "min": 1.0, "max": 120.0}}
    if node_class in LISTS:
        return {name: {"type": "COMBO", "options": names} for name, names in LISTS[node_class].items()}
    if node_class not in nodes:
        return None
    return describe_inputs(nodes[node_class].INPUT_TYPES())


class FakeHost:
    """Stands in for `host.queue.Host`. Its methods and `play` are for the event loop of the server.

    Attributes:
        queue: prompt ids that wait or run, in order.
        records: prompt id -> what the host's history would hold.
        graphs: prompt id -> graph of everything ever queued.
        refuses: problems that the next check tells.
    """

    node_inputs = staticmethod(node_inputs)

    def __init__(self, folder, models):
        self._models = models
        self.data_directory = folder / "data"
        self.input_directory = folder / "input"
        self.output_directory = folder / "output"
        self.queue, self.records, self.graphs, self.refuses = [], {}, {}, []
        self.running = None
        self.tell = lambda kind, data: None

    def observe(self, on_message):
        self.tell = on_message

    async def check(self, prompt_id, graph):
        return [], self.refuses

    def put(self, prompt_id, graph, outputs, created_at, *_of_a_fleet):
        self.graphs[prompt_id] = graph
        self.queue.append(prompt_id)

    def known(self):
        return set(self.queue)

    def history(self, prompt_id):
        return self.records.get(prompt_id)

    def forget(self, prompt_id):
        self.records.pop(prompt_id, None)

    def cancel(self, prompt_id):
        if prompt_id not in self.queue:
            return "absent"
        if prompt_id != self.running:
            self.queue.remove(prompt_id)
            return "removed"
        self.finish(prompt_id, [("execution_interrupted", {"prompt_id": prompt_id})])
        return "interrupted"

    def stop_running(self, seconds):
        self.queue = [prompt_id for prompt_id in self.queue if prompt_id == self.running]
        if self.running:
            self.queue.remove(self.running)
            self.running = None

    def model_path(self, folder, name):
        return self._models / folder / name

    def node(self, prompt_id, kind):
        """Id of the node of a class in a queued graph."""
        return next(i for i, node in self.graphs[prompt_id].items() if node["class_type"] == kind)

    def start(self, prompt_id):
        """Begin with a job."""
        self.running = prompt_id
        self.tell("execution_start", {"prompt_id": prompt_id})

    def step(self, prompt_id, step):
        """Tell of one step of the sampler."""
        sampler = self.node(prompt_id, "Wan21Sampler")
        state = {"value": step, "max": STEPS, "state": "running"}
        self.tell("preview", {"prompt_id": prompt_id, "image": b"jpeg", "type": "image/jpeg"})
        self.tell("progress_state", {"prompt_id": prompt_id, "nodes": {sampler: state}})

    def finish(self, prompt_id, messages=(), outputs=None):
        """Be done with a job."""
        self.queue.remove(prompt_id)
        self.running = None
        self.records[prompt_id] = {"outputs": outputs or {}, "status": {"messages": list(messages)}}
        self.tell("executing", {"node": None, "prompt_id": prompt_id})

    def write_outputs(self, prompt_id):
        """Write what the graph of a job would, and return the host's record of it."""
        nodes = self.graphs[prompt_id].items()
        outputs = {i: {"text": ("seed: 1",)} for i, node in nodes if node["class_type"] == "PreviewAny"}
        for kind, ending in (("SaveVideo", "mp4"), ("SaveImage", "png")):
            node_id = self.node(prompt_id, kind)
            prefix = self.graphs[prompt_id][node_id]["inputs"]["filename_prefix"]
            subfolder, _, name = prefix.rpartition("/")
            item = {"filename": f"{name}_00001_.{ending}", "subfolder": subfolder, "type": "output"}
            path = self.output_directory / subfolder / item["filename"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(ending.encode())
            outputs[node_id] = {"images": [item]}
        return outputs

    async def play(self, prompt_id, pause=0.0):
        """Run a job from its start to its end."""
        self.start(prompt_id)
        for step in range(1, STEPS + 1):
            await asyncio.sleep(pause)
            self.step(prompt_id, step)
        self.finish(prompt_id, outputs=self.write_outputs(prompt_id))


class Api:
    """A running API.

    Attributes:
        url: base URL for the client.
        host: its `FakeHost`.
        client: a client with the key "x".
    """

    def __init__(self, host, loop, port):
        self.host = host
        self.url = f"http://127.0.0.1:{port}/wan21"
        self.client = inferencesh.inference(api_key="x", base_url=self.url)
        self._loop = loop

    def do(self, function, *args):
        """Call a method of the host (or await a coroutine function) on the server's event loop."""

        async def call():
            result = function(*args)
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(GIVE_UP_S)

    def play_next(self, pause=0.0):
        """Let the oldest waiting job run while the test goes on."""
        wait_until(lambda: self.host.queue)
        asyncio.run_coroutine_threadsafe(self.host.play(self.host.queue[0], pause), self._loop)

    def client_of(self, key):
        return inferencesh.inference(api_key=key, base_url=self.url)


@contextlib.contextmanager
def serve(host):
    """Run the API over `host` until the block ends."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    async def start():
        main = web.Application()
        main.add_subapp("/wan21", create_app(host))
        runner = web.AppRunner(main)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return runner, site._server.sockets[0].getsockname()[1]

    runner, port = asyncio.run_coroutine_threadsafe(start(), loop).result(GIVE_UP_S)
    try:
        yield Api(host, loop, port)
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(GIVE_UP_S)
        loop.call_soon_threadsafe(loop.stop)


def wait_until(condition, seconds=GIVE_UP_S):
    """Wait until `condition()` is true and return what it gave."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")


def stored_status(host, task_id, column="id"):
    """Status of a task as the database has it, which is a moment behind what the API tells."""
    with contextlib.closing(sqlite3.connect(host.data_directory / "jobs.sqlite")) as database:
        return database.execute(f"SELECT status FROM tasks WHERE {column} = ?", (task_id,)).fetchone()[0]
