"""Write `web/docs/resize_modes.jpg`: what each resize mode of Wan2.1 Image to Video makes of one picture."""

import numpy as np
import torch
from lib import pack
from PIL import Image, ImageDraw, ImageFont

pack.load_pack()

from wan21.wan.conditioning import RESIZE_MODES, fit_image, keep_aspect_size  # noqa: E402

PICTURE = (360, 480)  # width, height: a portrait for a video in landscape
VIDEO = (416, 240)
SHOWN = 0.75  # of these sizes
GAP, LABEL = 12, 26  # pixels


def main():
    """Draw the picture and its four sizes, in two columns that fit the narrow help panel."""
    drawn = portrait()
    image = torch.from_numpy(np.array(drawn)).float().div(255)[None]
    cells = [(f"the picture, {PICTURE[0]}x{PICTURE[1]}", drawn)]
    for mode in RESIZE_MODES:
        width, height = keep_aspect_size(*PICTURE, *VIDEO) if mode == "keep_aspect" else VIDEO
        pixels = fit_image(image, width, height, mode)[0].mul(255).round().byte().numpy()
        cells.append((f"{mode}, {width}x{height}", Image.fromarray(pixels)))
    sheet(cells).save(pack.ROOT / "web" / "docs" / "resize_modes.jpg", quality=88)


def portrait():
    """A sun over a hill below a cloud: round things and something at each edge, so that cuts are seen."""
    width, height = PICTURE
    picture = Image.new("RGB", PICTURE, "#7db4e0")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((-120, height - 170, width + 120, height + 260), fill="#4f8f4a")
    draw.ellipse((90, 150, 270, 330), fill="#f3c545")
    for x, y, size in ((30, 40, 70), (75, 25, 90), (130, 45, 70)):
        draw.ellipse((x, y, x + size, y + size * 0.7), fill="white")
    draw.rectangle((250, 330, 310, 420), fill="#a8553f")
    draw.polygon(((235, 330), (280, 285), (325, 330)), fill="#6b3428")
    return picture


def sheet(cells):
    """[(label, picture)] below each other in two columns: portraits left, landscapes right."""
    shown = [
        (label, picture.resize((round(picture.width * SHOWN), round(picture.height * SHOWN)), Image.LANCZOS))
        for label, picture in cells
    ]
    columns = [
        [cell for cell in shown if cell[1].width < cell[1].height],
        [cell for cell in shown if cell[1].width > cell[1].height],
    ]
    widths = [max(picture.width for _, picture in column) for column in columns]
    height = max(sum(picture.height + LABEL + GAP for _, picture in column) for column in columns)
    page = Image.new("RGB", (sum(widths) + 3 * GAP, height + GAP), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(18)
    x = GAP
    for column, width in zip(columns, widths):
        y = GAP
        for label, picture in column:
            draw.text((x, y), label, fill="black", font=font)
            page.paste(picture, (x, y + LABEL))
            y += picture.height + LABEL + GAP
        x += width + GAP
    return page


if __name__ == "__main__":
    main()
