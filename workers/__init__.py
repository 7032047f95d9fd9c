"""One job over several devices: each call of the DiT is made by workers, one a device, outside this process.

    this process  --pipe-->  engine process (driver of Ray)  -->  workers, one a device

What samples stays where it is, with its state: solver, guidance, random numbers, previews, cancel. What is
lost with a worker is one call, which is made again. `client`, `process` and `remote` are this process's side,
`engine`, `cluster`, `watch` and `decode` the engine's, `rank` a worker's; `wire` is what they say to each
other. Ray is imported in the engine's process only.
"""

from .client import Client, Setup, WorkersLost, cannot_join, cannot_run, not_taken, unreachable
from .remote import Counts, RemoteModel, RemoteVae

__all__ = [
    "Client",
    "Counts",
    "RemoteModel",
    "RemoteVae",
    "Setup",
    "WorkersLost",
    "cannot_join",
    "cannot_run",
    "not_taken",
    "unreachable",
]
