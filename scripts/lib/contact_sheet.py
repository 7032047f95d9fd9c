"""Show a whole video in one picture: evenly spaced frames in a grid, read left to right."""

import math

MAX_FRAMES = 12
GAP_PX = 4


def read_frames(video):
    """Return every frame of a video, a path or an open file, as a Pillow image."""
    import av

    with av.open(video) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def contact_sheet(frames, max_frames=MAX_FRAMES):
    """Return one image with up to `max_frames` of `frames`, the first and the last among them."""
    from PIL import Image

    picked = [frames[i] for i in _evenly_spaced(len(frames), max_frames)]
    columns = math.ceil(math.sqrt(len(picked)))
    rows = math.ceil(len(picked) / columns)
    width, height = picked[0].size
    size = (columns * (width + GAP_PX) - GAP_PX, rows * (height + GAP_PX) - GAP_PX)
    sheet = Image.new("RGB", size, "white")
    for index, frame in enumerate(picked):
        row, column = divmod(index, columns)
        sheet.paste(frame, (column * (width + GAP_PX), row * (height + GAP_PX)))
    return sheet


def _evenly_spaced(length, count):
    """Return `count` rising indices from 0 to length - 1, or all of them if there are fewer."""
    if length <= count:
        return range(length)
    return [round(i * (length - 1) / (count - 1)) for i in range(count)]
