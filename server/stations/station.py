"""What Ray starts on a machine: a whole ComfyUI of it without a window, on loopback, and one job at a time.

Ray pickles this module whole, because a machine's Python does not know the pack by name. So nothing here may
need another module of it, or anything beyond the standard library and aiohttp, which ComfyUI requires.
"""

import asyncio
import contextlib
import ctypes
import glob
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import aiohttp

FULL_BYTES = 256 * 2**20  # of a disk: with less free, a job's pictures or video may not find room
START_SECONDS = 1800.0  # for ComfyUI to answer: it imports every custom node
LISTEN_SECONDS = 1.0  # that a question for news is held open; the answer is a sign of life
LOOK_SECONDS = 2.0  # between looks whether the job is still known to ComfyUI
TELL_SECONDS = 30.0  # between looks at the model folders
LAST_WORDS_SECONDS = 1.5  # for the reason to be heard before the process ends
ASK_SECONDS = 120.0  # for ComfyUI to answer what takes it a while
PREFIX = "wan21-station-"
COMFYUI, ARGS, NAME = "WAN21_STATION_COMFYUI", "WAN21_STATION_ARGS", "WAN21_STATION_NAME"
PR_SET_PDEATHSIG = 1
News = tuple  # ("json", text), ("bytes", data), ("about", dict), ("ended", record, files), ("dying", why)


class CannotStart(RuntimeError):
    """Why there is no ComfyUI."""


class Station:
    """A ComfyUI and the job that it runs.

    Args:
        program: "main" and "args" of the ComfyUI that asks, for a machine that does not name its own; "env":
            variables to set; "gpus": whether it has any; "hung": seconds without an answer of ComfyUI, after
            which it is given up; "sharing": stations that share its machine's cores, where they have no GPU.
    """

    def __init__(self, program: dict[str, Any]):
        self.program = program
        self.news: list[News] = []
        self.there = asyncio.Event()  # news
        self.starting: asyncio.Task[dict[str, Any]] | None = None
        self.job: str | None = None  # prompt id
        self.queued: str | None = None  # the same, once ComfyUI has it
        self.folder = ""  # of its outputs
        self.inputs: list[Path] = []
        self.background: list[asyncio.Task] = []

    # --- what the driver calls ------------------------------------------------------------------------

    async def here(self) -> None:
        """Answers as soon as there was room for this process on a machine."""

    async def ready(self) -> dict[str, Any]:
        """What ComfyUI says of itself, as soon as it answers.

        Raises:
            CannotStart: why it does not; the next call tries again.
        """
        if self.starting is None or (self.starting.done() and self.starting.exception()):
            self.starting = asyncio.ensure_future(self._start())
        return await asyncio.shield(self.starting)

    async def listen(self) -> list[News]:
        """What has happened since the last call; nothing after a while without news."""
        try:
            await asyncio.wait_for(self.there.wait(), LISTEN_SECONDS)
        except asyncio.TimeoutError:
            return []
        self.there.clear()
        news, self.news = self.news, []
        return news

    async def run(self, prompt_id: str, graph: dict, inputs: dict[str, bytes], folder: str) -> None:
        """Queues a job; what becomes of it is news.

        Args:
            inputs: files by name in the input folder.
            folder: of its outputs, in the output folder.
        """
        self.job, self.folder = prompt_id, folder
        self.inputs = [self.base / "input" / name for name in inputs]
        if why := _is_full(self.base):  # another station may have room, and this one no second job until then
            await self._die(why)
        for path, data in zip(self.inputs, inputs.values()):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        asked = {"prompt": graph, "prompt_id": prompt_id, "client_id": self.client}
        async with self.web.post(f"{self.url}/prompt", json=asked) as answer:
            told = await answer.json()
        self.queued = self.job
        if told.get("node_errors") or "error" in told:  # it would run the outputs that are in order
            await self.cancel(prompt_id)
            await self._end({"refused": (told.get("node_errors") or {}, told.get("error"))})

    async def cancel(self, prompt_id: str) -> None:
        """Takes a job off ComfyUI's queue, or interrupts it."""
        async with self.web.post(f"{self.url}/api/jobs/{prompt_id}/cancel", json={}):
            pass

    # --- its ComfyUI ----------------------------------------------------------------------------------

    async def _start(self) -> dict[str, Any]:
        for task in self.background:
            task.cancel()
        _remove_left_behind()
        if why := _is_full(Path(tempfile.gettempdir())):
            raise CannotStart(why)
        self.base = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        self.web = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ASK_SECONDS))
        self.client = uuid.uuid4().hex
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        with open(self.base / "log", "wb") as log:
            self.process = subprocess.Popen(
                self._command(port),
                cwd=self.program.get("cwd") if os.path.isdir(self.program.get("cwd", "")) else self.base,
                env=_environment(self.program),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent(),
            )
        about = await self._first_answer()
        self.socket = await self._connect()
        self.background = [
            asyncio.ensure_future(work()) for work in (self._hear, self._watch, self._look_at_files)
        ]
        return about | {"machine": os.environ.get(NAME) or socket.gethostname(), "pid": os.getpid()}

    def _command(self, port: int) -> list[str]:
        here = os.environ.get(COMFYUI)
        main = Path(here) / "main.py" if here else Path(self.program["main"])
        if not main.is_file():
            raise CannotStart(
                f"there is no {main} on {socket.gethostname()}; set {COMFYUI} to the folder of its ComfyUI "
                "before `ray start`"
            )
        given = os.environ.get(ARGS)
        args = shlex.split(given) if given is not None else _without_device(self.program["args"])
        folders = [
            part for name in ("input", "output", "temp", "user") for part in (f"--{name}-directory", name)
        ]
        folders = [str(self.base / part) if not part.startswith("-") else part for part in folders]
        for name in folders[1::2]:
            Path(name).mkdir()
        # Of an option that is given twice the last counts.
        own = ["--listen", "127.0.0.1", "--port", str(port), "--disable-auto-launch"]
        own += ["--tls-keyfile", "", "--tls-certfile", "", "--database-url", "sqlite:///:memory:", *folders]
        return [sys.executable, "-u", str(main), *args, *own, *([] if self.program["gpus"] else ["--cpu"])]

    async def _first_answer(self) -> dict[str, Any]:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise CannotStart(f"ComfyUI ended while it started: {self._last_words()}")
            try:
                return await self._about()
            except aiohttp.ClientConnectorError:
                await asyncio.sleep(0.1)
        self.process.kill()
        raise CannotStart(f"ComfyUI did not answer within {START_SECONDS:g} s")

    async def _about(self) -> dict[str, Any]:
        async with self.web.get(f"{self.url}/wan21/station") as answer:
            if answer.status != 200:
                raise CannotStart(
                    f"its ComfyUI has no Wan2.1 pack that serves stations: {self._last_words()}"
                )
            return await answer.json()

    async def _connect(self) -> aiohttp.ClientWebSocketResponse:
        ws = await self.web.ws_connect(f"{self.url}/ws?clientId={self.client}", max_msg_size=0)
        features = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
        await ws.send_str(json.dumps(features))
        async for message in ws:  # the answer says that it knows
            if message.type == aiohttp.WSMsgType.TEXT and json.loads(message.data)["type"] == "feature_flags":
                return ws
        raise CannotStart("its ComfyUI closed the connection")

    def _status(self) -> str:
        try:
            return str(self.process.wait(LAST_WORDS_SECONDS))
        except subprocess.TimeoutExpired:
            return "unknown: it closed the connection"

    def _last_words(self) -> str:
        text = re.sub(r"\x1b\[[\d;]*m", "", (self.base / "log").read_text(errors="replace"))
        lines = text.strip().splitlines()
        return " / ".join(lines[-3:]) or "it said nothing"

    # --- news of it -----------------------------------------------------------------------------------

    def _tell(self, *news: Any) -> None:
        self.news.append(news)
        self.there.set()

    async def _hear(self) -> None:
        try:
            async for message in self.socket:
                if message.type == aiohttp.WSMsgType.TEXT:
                    await self._take(message.data)
                elif message.type == aiohttp.WSMsgType.BINARY and self.job is not None:
                    self._tell("bytes", message.data)
        except Exception as error:
            await self._die(f"{type(error).__name__}: {error}")
        status = await asyncio.to_thread(self._status)
        await self._die(f"its ComfyUI ended with status {status}")

    async def _take(self, text: str) -> None:
        message = json.loads(text)
        data = message["data"]
        if self.job is None or not isinstance(data, dict) or data.get("prompt_id") != self.job:
            return
        if message["type"] == "executing" and data["node"] is None:
            await self._end(None)
        else:
            self._tell("json", text)

    async def _watch(self) -> None:
        """Finds a hung ComfyUI, and a job that ended without a message, as one cancelled before it began."""
        hung = self.program["hung"]
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            job = self.queued
            try:
                async with self.web.get(f"{self.url}/queue", timeout=aiohttp.ClientTimeout(hung)) as answer:
                    queue = await answer.json()
            except asyncio.TimeoutError:
                await self._die(f"its ComfyUI gave no sign of life for {hung:g} s")
            except aiohttp.ClientError:
                continue  # `_hear` finds out when it has ended
            known = [item[1] for item in (*queue["queue_running"], *queue["queue_pending"])]
            if job is not None and job not in known and job == self.job:
                await self._end(None)

    async def _look_at_files(self) -> None:
        told = None
        while True:
            await asyncio.sleep(TELL_SECONDS)
            try:
                about = await self._about()
            except (aiohttp.ClientError, asyncio.TimeoutError):
                continue
            if about != told:
                self._tell("about", about)
                told = about

    async def _end(self, record: dict[str, Any] | None) -> None:
        job, self.job, self.queued = self.job, None, None
        if job is None:
            return
        if record is None:
            async with self.web.get(f"{self.url}/history/{job}") as answer:
                record = (await answer.json()).get(job)
        async with self.web.post(f"{self.url}/history", json={"delete": [job]}):
            pass
        folder = self.base / "output" / self.folder
        files = {path.name: path.read_bytes() for path in folder.glob("*") if path.is_file()}
        shutil.rmtree(folder, ignore_errors=True)
        for path in self.inputs:
            path.unlink(missing_ok=True)
        self._tell("ended", job, record, files)

    async def _die(self, why: str) -> NoReturn:
        """Ends this process, and Ray starts another: there is one way back for all that goes wrong."""
        self._tell("dying", why)
        await asyncio.sleep(LAST_WORDS_SECONDS)
        shutil.rmtree(self.base, ignore_errors=True)
        os._exit(1)


def _environment(program: dict[str, Any]) -> dict[str, str]:
    """Of ComfyUI: this process's without what is Ray's, and with what the API says (None: not set).

    Without a GPU the cores are divided: two ComfyUIs that both have as many threads as there are cores wait
    for each other in every product (measured: a seventh of one station's jobs a second, in place of 1.4
    times as many). The user's own OMP_NUM_THREADS holds.
    """
    more = program["env"]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    kept |= {k: v for k, v in more.items() if v is not None}
    found = {k: v for k, v in kept.items() if more.get(k, "") is not None}
    if program["sharing"] > 1:
        found.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // program["sharing"])))
    return found


def _without_device(args: list[str]) -> list[str]:
    """The arguments without those that choose a device, which Ray has done, or open it to web pages."""
    kept, skip = [], 0
    for i, arg in enumerate(args):
        name, _, value = arg.partition("=")
        if name in ("--cuda-device", "--default-device", "--enable-cors-header"):
            skip = int(not value and i + 1 < len(args) and not args[i + 1].startswith("-"))
        elif skip:
            skip = 0
        elif name not in ("--cpu", "--auto-launch", "--multi-user"):
            kept.append(arg)
    return kept


def _is_full(folder: Path) -> str:
    """Why a job would find no room on a disk, empty if it would."""
    free = shutil.disk_usage(folder).free
    if free >= FULL_BYTES:
        return ""
    return f"its disk is full: {free >> 20} MiB are free in {folder} of {socket.gethostname()}"


def _remove_left_behind() -> None:
    """Folders of stations that were killed."""
    for folder in glob.glob(f"{tempfile.gettempdir()}/{PREFIX}*"):
        pid = Path(folder).name.removeprefix(PREFIX).partition("-")[0]
        if not os.path.exists(f"/proc/{pid}"):
            shutil.rmtree(folder, ignore_errors=True)


def _free_port() -> int:
    """A port that nobody listens on, below those that systems give to outgoing connections."""
    while True:
        port = random.randrange(10_000, 30_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def _die_with_parent() -> Callable[[], object]:
    """What the child calls, so that the Linux kernel ends it when its parent ends, even by `kill -9`."""
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
