"""`python workers FD [MODULE]`: a process that drives Ray, and hears its requests through that socket.

MODULE has a `serve`; it is the engine of workers, or the driver of the job API's stations.
"""

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
    driver = importlib.import_module(f"{NAME}.{sys.argv[2] if len(sys.argv) > 2 else 'workers.engine'}")
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)  # Ray's processes must not hold it open
    driver.serve(Connection(descriptor))
