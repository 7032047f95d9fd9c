"""The job API in a process of its own, made to be killed: jobs are played one after the other for ever."""

import os
import time

from lib import pack

pack.load_pack()
pack.load_host()

from helpers_server import FakeHost, serve  # noqa: E402

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
                api.do(host.play, host.queue[0], STEP_S)
            else:
                time.sleep(STEP_S)
