"""Write small checkpoints with random weights, laid out like a ComfyUI `models` folder.

python scripts/make_random_checkpoints.py build/models --dtype float16
"""

import argparse
from pathlib import Path

from lib.random_checkpoints import make_checkpoints


def main():
    """Read the command line and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models_directory", type=Path, help="folder to write into")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(make_checkpoints(args.models_directory, args.dtype, args.seed))


if __name__ == "__main__":
    main()
