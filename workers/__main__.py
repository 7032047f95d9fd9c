"""`python workers FD`: the engine process, which hears its requests through that socket."""

import importlib
import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from actor import NAME, load_pack

if __name__ == "__main__":
    HERE = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path or os.getcwd()).resolve() != HERE]
    load_pack(str(HERE.parent))
    engine = importlib.import_module(f"{NAME}.workers.engine")
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)  # Ray's processes must not hold it open
    engine.serve(Connection(descriptor))
