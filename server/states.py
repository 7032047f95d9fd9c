"""States of a task, in the numbers of the client (0.6.1 and newer)."""

RECEIVED = 1
QUEUED = 2
PREPARING = 4
RUNNING = 7
CANCELLING = 8
UPLOADING = 9
COMPLETED = 10
FAILED = 11
CANCELLED = 12

TERMINAL = frozenset({COMPLETED, FAILED, CANCELLED})
NOT_STARTED = frozenset({RECEIVED, QUEUED})
