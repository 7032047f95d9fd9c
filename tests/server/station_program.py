"""In the place of a station's ComfyUI, where a test is about what keeps it: as much as a station asks of one.

It starts at once. A job lasts as long as its one node says, and writes a file.
"""

import asyncio
import json
import os
import sys
from pathlib import Path

from aiohttp import web

options = dict(zip(sys.argv, sys.argv[1:]))  # of those given twice the last
sockets, running, records = [], {}, {}


async def about(_):
    """What a test wants to know of its process stands in the place of the device."""
    told = {
        name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "WAN21_RAY_ADDRESS", "RAY_ADDRESS")
    }
    told |= {"pid": os.getpid(), "args": sys.argv[1:]}
    return web.json_response(
        {"pack": "p", "device": json.dumps(told), "lists": {}, "shelf": {}, "prints": []}
    )


async def connect(request):
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    sockets.append(socket)
    async for message in socket:
        if json.loads(message.data)["type"] == "feature_flags":
            await socket.send_json({"type": "feature_flags", "data": {}})
    return socket


async def tell(kind, **data):
    for socket in sockets:
        await socket.send_json({"type": kind, "data": data})


async def prompt(request):
    asked = await request.json()
    running[asked["prompt_id"]] = asyncio.ensure_future(
        run(asked["prompt_id"], asked["prompt"]["1"]["inputs"])
    )
    return web.json_response({"prompt_id": asked["prompt_id"], "node_errors": {}})


async def run(prompt_id, inputs):
    await tell("execution_start", prompt_id=prompt_id)
    try:
        await asyncio.sleep(inputs["seconds"])
        file = Path(options["--output-directory"]) / inputs["folder"] / "file"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(prompt_id)
        messages = []
    except asyncio.CancelledError:
        messages = [("execution_interrupted", {})]
    records[prompt_id] = {"outputs": {}, "status": {"messages": messages}}
    del running[prompt_id]
    await tell("executing", node=None, prompt_id=prompt_id)


async def cancel(request):
    if task := running.get(request.match_info["id"]):
        task.cancel()
    return web.json_response({})


async def queue(_):
    return web.json_response({"queue_running": [[0, one] for one in running], "queue_pending": []})


async def history(request):
    prompt_id = request.match_info["id"]
    return web.json_response({one: records[one] for one in [prompt_id] if one in records})


async def delete(request):
    for prompt_id in (await request.json())["delete"]:
        records.pop(prompt_id, None)
    return web.json_response({})


if __name__ == "__main__":
    app = web.Application()
    app.add_routes(
        [
            web.get("/wan21/station", about),
            web.get("/ws", connect),
            web.post("/prompt", prompt),
            web.get("/queue", queue),
            web.get("/history/{id}", history),
            web.post("/history", delete),
            web.post("/api/jobs/{id}/cancel", cancel),
        ]
    )
    web.run_app(app, host="127.0.0.1", port=int(options["--port"]), print=None)
