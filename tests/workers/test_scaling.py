"""The table of scripts/scaling.py, over the engine of the other tests."""

import math
import subprocess
import sys

import scaling
from helpers_workers import LONG, ON_RAY
from lib.pack import ROOT

pytestmark = ON_RAY


def test_the_table_of_a_small_model(client, tmp_path):
    config, shape = scaling.QUICK
    rows = scaling.measured(client, scaling.random_model(tmp_path, config), 2, 1, shape)
    assert [(row.workers, row.split) for row in rows] == [
        (0, ""), (1, "auto"), (2, "guidance"), (2, "sequence"),
    ]  # fmt: skip
    assert all(row.difference < 1e-5 and len(row.seconds) == 1 for row in rows)
    *without, sequence = (row.sent for row in rows)
    assert without == [0, 0, 0]
    tokens, blocks, width = 3 * 3 * 5, 2, 256
    assert math.isclose(sequence, 2 * 4 * blocks * tokens * width * 4 / 2 + 2 * tokens * 64 * 4, rel_tol=0.01)
    table = [*scaling.cells(rows)]
    assert [len(cells) for cells in table] == [len(scaling.HEADINGS)] * 4
    assert table[1][3:5] == ["1.00x", "100%"]


@LONG
def test_from_the_command_line():
    command = [sys.executable, ROOT / "scripts" / "scaling.py", "--quick", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert [*map(str.strip, rows[0].strip("|").split("|"))] == [*scaling.HEADINGS]
    cells = [[*map(str.strip, row.strip("|").split("|"))] for row in rows[2:]]
    assert [row[:2] for row in cells] == [["none", ""], ["1", ""], ["2", "guidance"], ["2", "sequence"]]
    assert all(float(row[2]) > 0 and float(row[6]) < 1e-5 for row in cells)
