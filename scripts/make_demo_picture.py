"""Write `docs/demo.webp`, which moves, and `docs/demo.jpg`: what the bundled model makes of drawn scenes.

The still image stands beside its videos, all enlarged twice by the pack's own Lanczos.
"""

import tempfile
from pathlib import Path

from lib import pack

pack.load_pack()
pack.load_host()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from lib.host_server import HostServer  # noqa: E402
from lib.moving import Card, drawn, webp  # noqa: E402
from lib.scenes import SCENES, small  # noqa: E402
from PIL import Image  # noqa: E402
from wan21.frames.lanczos import lanczos  # noqa: E402
from wan21.training.host import Host, to_picture  # noqa: E402

GRAPH = "Wan2.1 - quick start"
SIZE = (17, 128, 128)  # frames, height, width
SIDE = 256  # pixels of a picture on the page
ROWS = {"bay": ("waves on the water", "pan left"), "winter": ("it snows", "night falls")}
GAP = 8
MOST_BYTES = 3_000_000


def main():
    """Run the graph `Wan2.1 - quick start` for each scene and prompt."""
    with tempfile.TemporaryDirectory() as folder, HostServer(Path(folder)) as server:
        host = Host(server)
        rows = [_row(host, scene, prompts) for scene, prompts in ROWS.items()]
    sheets = [_sheet([[column[k] for column in row] for row in rows]) for k in range(SIZE[0])]
    (pack.ROOT / "docs" / "demo.webp").write_bytes(webp(sheets, MOST_BYTES))
    sheets[-1].save(pack.ROOT / "docs" / "demo.jpg", quality=90)


def _row(host, scene, prompts):
    """The columns of a scene, each with as many frames as a video: the still, and what each prompt makes."""
    still = small(SCENES[scene](), SIZE[1])
    start = torch.from_numpy(np.array(still)).movedim(-1, 0) / 255
    columns = [drawn([_enlarged(start[None])[0]] * SIZE[0], Card("still image"), SIDE)]
    for prompt in prompts:
        video = host.frames(host.graph(GRAPH, prompt, SIZE, 0, Start_image=start))
        columns.append(drawn(_enlarged(video), Card(f"“{prompt}”"), SIDE))
    return columns


def _enlarged(video):
    """Frames [F, 3, H, W] in [0, 1] as Pillow images of SIDE pixels."""
    return [to_picture(frame) for frame in lanczos(video, SIDE, SIDE)]


def _sheet(rows):
    """Pictures in rows, with gaps between."""
    height, width = (count * (SIDE + GAP) - GAP for count in (len(rows), len(rows[0])))
    sheet = Image.new("RGB", (width, height), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * (SIDE + GAP), y * (SIDE + GAP)))
    return sheet


if __name__ == "__main__":
    main()
