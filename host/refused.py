"""What our nodes refuse when a graph is queued, as the host answers it: one entry, at its input.

A node's `validate_inputs` raises its `Refusal`. Of a sentence that it returned the host would make an entry
for each of its arguments, and the editor would show it behind a click only; a raised one is one entry, and
its sentence is shown at once. But the host files it under the input by which another node led to ours: that
is put right here.
"""

import json
import re
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

# The host's nodes.py and server.py; a type checker finds our own folders of these names.
from nodes import NODE_CLASS_MAPPINGS  # pyright: ignore[reportAttributeAccessIssue]
from server import PromptServer  # pyright: ignore[reportAttributeAccessIssue]

from ..wan.refusal import Refusal

REFUSED = "Refused"  # the `message` of an entry whose `details` are the sentence of a refusal
# As the host writes it: the module is named by its path.
_TYPE = f"{Refusal.__module__}.{Refusal.__qualname__}"
_QUEUE = ("/prompt", "/api/prompt")
NodeErrors = dict[str, dict[str, Any]]  # node id -> {"class_type", "errors": [...]}, as the host answers


def name_inputs(node_errors: NodeErrors) -> None:
    """Files every refusal of ours under the input that its sentence names first, in place."""
    for found in node_errors.values():
        for problem in found["errors"]:
            if (problem.get("extra_info") or {}).get("exception_type") == _TYPE:
                name = _named_first(problem["details"], found["class_type"])
                problem |= {"message": REFUSED, "extra_info": {"input_name": name} if name else {}}


def _named_first(sentence: str, class_type: str) -> str | None:
    inputs = NODE_CLASS_MAPPINGS[class_type].INPUT_TYPES()
    names = [*inputs.get("required", {}), *inputs.get("optional", {})]
    found = re.search(rf"\b({'|'.join(map(re.escape, names))})\b", sentence)
    return found and found[1]


@web.middleware
async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    response = await handler(request)
    if (
        request.method == "POST"
        and request.path in _QUEUE
        and isinstance(response, web.Response)
        and response.content_type == "application/json"
        and isinstance(response.body, bytes)
        and json.dumps(_TYPE)[1:-1].encode() in response.body  # else it is as the host made it
    ):
        answer = json.loads(response.body)
        name_inputs(answer["node_errors"])
        return web.json_response(answer, status=response.status)
    return response


def correct_answers() -> None:
    """Lets the host's answers to queued graphs go through `name_inputs`; to be called before it serves."""
    PromptServer.instance.app.middlewares.append(_answer)
