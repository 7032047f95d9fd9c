"""The job API in a process of its own, made to be killed: jobs are played one after the other for ever.

The next begins when the end of the last is in the database. One that is over and not yet noted is lost with
the server, as is the one that runs; real jobs take long enough that these are never two.
"""

import os
import time

from lib import pack

pack.load_pack()
pack.load_host()

from helpers_server import FakeHost, serve, stored_status, wait_until  # noqa: E402
from wan21.server import states  # noqa: E402

SETTINGS = {
    "WAN21_ALLOW_PRIVATE_URLS": "1",
    "WAN21_REQUESTS_PER_MINUTE": "100000",
    "WAN21_MAX_UNFINISHED": "100000",
}
STEP_S = 0.01


def run(folder, models, connection):
    """Serve until the process is killed; the URL goes through `connection`."""
    os.environ |= SETTINGS
    host = FakeHost(folder, models)
    with serve(host) as api:
        connection.send(api.url)
        while True:
            if host.queue:
                play(api, host, host.queue[0])
            else:
                time.sleep(STEP_S)


def play(api, host, prompt_id):
    """Let a job run and wait until its end is stored."""
    api.do(host.play, prompt_id, STEP_S)
    wait_until(lambda: stored_status(host, prompt_id, "prompt_id") in states.TERMINAL)
