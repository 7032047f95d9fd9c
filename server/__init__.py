"""The job API on the host's own web server: submit, stream, webhook, files, keys.

And what we change in the host's own answers.
"""

import logging
import os


def mount() -> None:
    """Serves the API below /wan21; where that is not possible, the log says why and the nodes still load."""
    try:
        from ..host.queue import Host
        from .app import create_app, create_failed_app
        from .routes import PREFIX
        from .stations.about import STATION, create_station_app

        host = Host()
        if os.environ.get(STATION):
            host.mount(PREFIX, create_station_app(host))
            return
        try:
            app = create_app(host, host.weight_formats)
        except Exception as error:
            host.mount(PREFIX, create_failed_app(f"{type(error).__name__}: {error}"))
            raise
        host.mount(PREFIX, app)
    except Exception as error:
        logging.warning("Wan2.1 jobs: the API is not served: %s: %s", type(error).__name__, error)
    else:
        logging.info("Wan2.1 jobs: the API is served at %s", PREFIX)


def correct_answers() -> None:
    """Files refusals of queued graphs under their inputs; where that is not possible, the log says why."""
    try:
        from ..host.refused import correct_answers

        correct_answers()
    except Exception as error:
        logging.warning("Wan2.1: refusals are filed under other inputs: %s: %s", type(error).__name__, error)
