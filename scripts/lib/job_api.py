"""The other side of the job API: a receiver of webhooks, and an upload."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Receiver:
    """A web server that keeps what it is sent, and answers with the statuses it was given, then 200.

    Attributes:
        url: where webhooks are to be sent.
        requests: (headers, body) of each request.
    """

    def __init__(self, *statuses):
        self.requests = []
        remaining = list(statuses)
        requests = self.requests

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                requests.append((self.headers, body))
                self.send_response(remaining.pop(0) if remaining else 200)
                self.end_headers()

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook"

    @property
    def events(self) -> list[dict]:
        """What the bodies say, in order."""
        return [json.loads(body) for _, body in self.requests]

    def close(self):
        self._server.shutdown()
        self._server.server_close()


def upload(url, data, session):
    """Uploads the bytes of a PNG and returns the URI for a job's input.

    Args:
        url: base URL of the API.
        data: the file.
        session: a `requests.Session`, or `requests` itself.
    """
    wanted = {"files": [{"filename": "a.png", "content_type": "image/png", "size": len(data)}]}
    [file] = session.post(f"{url}/files", json=wanted).json()["data"]
    session.put(file["upload_url"], data=data).raise_for_status()
    return file["uri"]
