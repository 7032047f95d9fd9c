"""A host without a process: the real nodes' inputs, and a queue that a test moves on by hand."""

import asyncio


class FakeHost:
    """Stands in for `server.host.Host` where a test is about our bookkeeping, not the host's.

    Attributes:
        queue: prompt ids that wait or run, in order.
        records: prompt id -> what the host's history would hold.
        interrupted: prompt ids that were interrupted.
    """

    def __init__(self, folder):
        self.output_directory = folder
        self.queue = []
        self.running = None
        self.records = {}
        self.interrupted = []

    def observe(self, on_message):
        self.tell = on_message

    async def check(self, prompt_id, graph):
        return [], []

    def put(self, prompt_id, graph, outputs, created_at):
        self.queue.append(prompt_id)

    def known(self):
        return set(self.queue)

    def history(self, prompt_id):
        return self.records.get(prompt_id)

    def cancel(self, prompt_id):
        if prompt_id == self.running:
            self.interrupted.append(prompt_id)
            return "interrupted"
        if prompt_id in self.queue:
            self.queue.remove(prompt_id)
            return "removed"
        return "absent"

    def start(self, prompt_id):
        """The host begins with a job."""
        self.running = prompt_id
        self.tell("execution_start", {"prompt_id": prompt_id})

    def finish(self, prompt_id, messages=(), outputs=None):
        """The host is done with a job."""
        self.queue.remove(prompt_id)
        self.running = None
        self.records[prompt_id] = {"outputs": outputs or {}, "status": {"messages": list(messages)}}
        self.tell("executing", {"node": None, "prompt_id": prompt_id})


async def until(condition, seconds=5):
    """Wait until `condition()` holds."""
    for _ in range(int(seconds * 100)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen in time")
