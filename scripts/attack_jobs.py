"""Attack the job API of a real host: inputs by its schema, nonsense, and two keys that look at each other.

    python scripts/attack_jobs.py                   # 3000 inputs by the published schema, 2000 other requests
    python scripts/attack_jobs.py --inputs 300

Exits with 1 when an answer is a 500 or no JSON, or when one key sees anything of the other.
"""

import argparse
import json
import os
import secrets
import sys
import tempfile
from collections import Counter

import requests
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from lib.host_server import HostServer
from lib.job_api import upload
from lib.pack import comfyui_path

APP = "infsh/wan2-1-i2v"
SLOW_START_S = 900
KEYS = [secrets.token_hex(16) for _ in range(2)]
SETTINGS = {"WAN21_API_KEYS": ",".join(KEYS), "WAN21_REQUESTS_PER_MINUTE": "1000000"}
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


class Caller:
    """One key's requests; each answer is counted, and looked at."""

    def __init__(self, url, key):
        self.url, self.counts, self.wrong = url, Counter(), []
        self.web = requests.Session()
        self.web.headers["Authorization"] = f"Bearer {key}"

    def send(self, method, path, **content):
        """One request; a 500, and an answer that is no JSON, is kept in `wrong`."""
        answer = self.web.request(method, f"{self.url}{path}", timeout=120, **content)
        self.counts[answer.status_code] += 1
        good = answer.status_code != 500
        if (
            good
            and "json" in answer.headers.get("Content-Type", "")
            and "ndjson" not in answer.headers["Content-Type"]
        ):
            json.loads(answer.content, parse_constant=self._no_json)
        if not good:
            self.wrong.append((method, path, repr(content)[:300], answer.text[:200]))
        return answer

    def _no_json(self, text):
        self.wrong.append(("an answer holds", text))

    def run(self, given, **more):
        """Queue a job and, if it was accepted, take it back."""
        answer = self.send("POST", "/apps/run", data=json.dumps({"app": APP, "input": given} | more))
        if answer.ok:
            task = answer.json()["data"]["id"]
            self.send("POST", f"/tasks/{task}/cancel")
            self.send("DELETE", f"/tasks/{task}?files=true")
        return answer


def values_of(schema):
    """Values that a part of the schema allows."""
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "anyOf" in schema and "type" not in schema:
        return st.one_of([values_of(one) for one in schema["anyOf"]])
    if "pattern" in schema:
        return st.from_regex(schema["pattern"], fullmatch=True)
    low, high = schema.get("minimum"), schema.get("maximum")
    longest = min(schema.get("maxLength", 60), 60)
    match schema.get("type"):
        case "integer":
            whole = st.integers(low, high)
            return whole | whole.filter(lambda n: abs(n) < 2**53).map(float)
        case "number":
            return st.floats(low, high, allow_nan=False, allow_infinity=False)
        case "boolean":
            return st.booleans()
        case "array":
            return st.lists(values_of(schema["items"]), max_size=min(schema.get("maxItems", 3), 3))
        case "string":
            return st.text(
                st.characters(exclude_categories=["Cs"]),
                min_size=schema.get("minLength", 0),
                max_size=longest,
            )
    return st.none()


def inputs_of(schema, image):
    """Inputs that the schema allows, some with one value that it does not."""
    optional = {name: values_of(part) for name, part in schema["properties"].items()}
    needed = {"prompt": optional.pop("prompt"), "image": st.just(image)}
    optional["end_image"] = st.none() | st.just(image)
    del optional["image"], optional["lora_url"]
    good = st.fixed_dictionaries(needed, optional=optional)
    junk = st.tuples(st.sampled_from([*schema["properties"], "other"]), JUNK)
    return good | st.tuples(good, junk).map(lambda pair: pair[0] | dict([pair[1]]))


def many(count, *strategies):
    """Runs a function on `count` draws, each a request of its own; there is nothing to shrink."""
    chosen = settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )

    def run(function):
        def once(drawn):
            function(*drawn)

        chosen(given(st.tuples(*strategies))(once))()

    return run


def fuzz(caller, inputs, others):
    """Inputs by the schema, then anything at all on every route."""
    schema = caller.send("GET", f"/apps/{APP}").json()
    picture = (comfyui_path() / "input" / "example.png").read_bytes()
    image = upload(caller.url, picture, caller.web)
    many(inputs, inputs_of(schema, image))(lambda given: caller.run(given))
    print(f"{inputs} inputs by the schema: {dict(caller.counts)}", flush=True)
    more = st.dictionaries(
        st.sampled_from(["webhook", "session", "session_timeout", "metadata", "infra", "run_at", "x"]),
        JUNK,
        max_size=3,
    )
    many(others, st.fixed_dictionaries({}) | JUNK, more)(lambda given, more: caller.run(given, **more))
    routes = ["/apps/run", "/apps/x", "/files", "/files/x", "/files/x/y", "/upload/x"]
    routes += ["/tasks/x", "/tasks/x/cancel", "/tasks/x/files"]
    routes += ["/sessions", "/sessions/x", "/sessions/x/keepalive"]
    body = JUNK.map(json.dumps) | st.binary(max_size=60) | st.just('{"files": [{"size": 1e999}]}')
    body |= st.dictionaries(st.sampled_from(["files", "app", "input"]), JUNK | st.lists(JUNK)).map(json.dumps)
    methods = st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH"])
    many(others, methods, st.sampled_from(routes), body)(
        lambda method, route, body: caller.send(method, route, data=body)
    )
    print(f"and {2 * others} other requests: {dict(caller.counts)}", flush=True)


def look_at_each_other(callers):
    """What each of two keys finds of the other's tasks, files and sessions: (requests, found)."""
    picture = (comfyui_path() / "input" / "example.png").read_bytes()
    paths, seen, asked = [], [], 0
    for caller in callers:
        image = upload(caller.url, picture, caller.web)
        small = {"prompt": "pan", "image": image, "size": "64*64", "num_frames": 5, "num_inference_steps": 2}
        body = {"app": APP, "input": small, "session": "new"}
        task = caller.send("POST", "/apps/run", json=body).json()["data"]
        files = [f"/files/{image.rpartition('/')[2]}"]
        for line in caller.send("GET", f"/tasks/{task['id']}/stream").iter_lines():
            ended = json.loads(line)
        assert ended["status"] == 10, ended["error"]
        for file in caller.send("GET", f"/tasks/{task['id']}/files").json()["data"]:
            files.append(f"/files/{file['id']}")
        one, session = f"/tasks/{task['id']}", f"/sessions/{task['session_id']}"
        paths.append(
            [("GET", one + end) for end in ("", "/status", "/stream", "/preview", "/files")]
            + [("GET", path) for path in files]
            + [("GET", session), ("POST", f"{session}/keepalive"), ("DELETE", session)]
            + [("POST", f"{one}/cancel"), ("DELETE", f"{one}/files"), ("DELETE", one)]
        )
    for caller, theirs in zip(callers, paths[::-1]):
        for method, path in theirs:
            asked += 1
            if (answer := caller.send(method, path)).status_code != 404:
                seen.append((method, path, answer.status_code))
        listed = caller.send("GET", "/sessions").json()["data"]
        seen += [("GET", "/sessions", row["id"]) for row in listed if f"/sessions/{row['id']}" in str(theirs)]
    for caller, own in zip(callers, paths):
        for method, path in own:
            if method == "GET" and not path.endswith("/preview") and not caller.send(method, path).ok:
                seen.append((method, path, "is gone"))
    return asked, seen


def attack(url, inputs, others):
    """Both parts on an API that has `KEYS`: (answers that are wrong, what one key saw of the other)."""
    callers = [Caller(url, key) for key in KEYS]
    asked, seen = look_at_each_other(callers)
    print(f"two keys: {asked} requests for what is the other's, {len(seen)} answered", *seen, sep="\n  ")
    fuzz(callers[0], inputs, others)
    wrong = [one for caller in callers for one in caller.wrong]
    print(f"{len(wrong)} answers of 500 or without JSON", *wrong[:20], sep="\n  ")
    return wrong, seen


def main():
    """Run both parts and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--inputs", type=int, default=3000)
    parser.add_argument("--others", type=int, default=1000)
    options = parser.parse_args()
    os.environ |= SETTINGS
    with tempfile.TemporaryDirectory() as folder, HostServer(folder, start_timeout_s=SLOW_START_S) as server:
        found = attack(f"{server.url}/wan21", options.inputs, options.others)
    sys.exit(any(found))


if __name__ == "__main__":
    main()
