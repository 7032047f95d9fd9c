"""Write `docs/demo.jpg`: held-out pictures and what the bundled checkpoint makes of them."""

import tempfile
from pathlib import Path

from lib import pack

pack.load_pack()
pack.load_host()

import torch  # noqa: E402
from lib.host_server import HostServer  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402
from wan21.training import data  # noqa: E402
from wan21.training.host import Host, to_picture  # noqa: E402

GRAPH = "Wan2.1 - quick start"
SIZE = (17, 128, 128)  # frames, height, width
SEED = data.HELD_OUT + 6 * 10**6
SHOWN = (0, 4, 8, 12, 16)
LABEL = 170  # pixels
PROMPTS = ("pan left", "zoom in", "rotate clockwise")
OBJECT = data.Motion("object", "grow", "red", "circle")
OBJECT_PROMPTS = ("a red circle moves left", "a red circle moves up")


def main():
    """Run the graph `Wan2.1 - quick start` for each row."""
    scene = data.images(SEED, 1, *SIZE[1:])[0]
    thing = data.clips(SEED + 1, 1, *SIZE, motions=[OBJECT])[0][0, :, SIZE[0] // 2]
    jobs = [(scene, prompt) for prompt in PROMPTS] + [(thing, prompt) for prompt in OBJECT_PROMPTS]
    with tempfile.TemporaryDirectory() as folder, HostServer(Path(folder)) as server:
        host = Host(server)
        rows = [
            (
                prompt,
                host.frames(host.graph(GRAPH, prompt, SIZE, 0, Start_image=(image + 1) / 2)),
            )
            for image, prompt in jobs
        ]
    sheet(rows).save(pack.ROOT / "docs" / "demo.jpg", quality=90)


def sheet(rows):
    """[(prompt, video)] as lines of frames with the prompt in front."""
    height, width = SIZE[1:]
    picture = Image.new("RGB", (LABEL + width * len(SHOWN), height * len(rows)), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(14)
    for i, (prompt, video) in enumerate(rows):
        draw.text((8, (i + 0.5) * height), prompt, fill="black", font=font, anchor="lm")
        frames = torch.cat([video[t] for t in SHOWN], dim=2)
        picture.paste(to_picture(frames), (LABEL, i * height))
    return picture


if __name__ == "__main__":
    main()
