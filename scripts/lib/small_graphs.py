"""Make a workflow small enough for a CPU: the bundled checkpoint, few pixels, frames and steps."""

import copy
import io

from . import bundled
from .comfy_client import without


def without_clip_vision(graph):
    """Return an API graph without its CLIP vision nodes, whose features are optional.

    The host takes the size of a CLIP vision model from its own table, so there is no small one: the
    ViT-H that Wan2.1 reads has 630 million parameters.
    """
    return without(graph, "CLIPVisionLoader", "CLIPVisionEncode")


def small_graph(graph, size=(64, 64), num_frames=5, steps=2, image=None, video=None):
    """Return a small copy of an API graph on the bundled checkpoint, which serves all kinds of graph.

    Args:
        graph: a graph of `workflows/api`.
        size: (width, height) in pixels.
        num_frames, steps: of the video, of the sampler.
        image, video: names in the host's input folder for LoadImage and LoadVideo; None keeps the graph's.
    """
    values = {
        **bundled.FILES,
        "width": size[0],
        "height": size[1],
        "num_frames": num_frames,
        "length": num_frames,
        "steps": steps,
    }
    values |= {name: value for name, value in (("image", image), ("file", video)) if value is not None}
    graph = copy.deepcopy(without_clip_vision(graph))
    for node in graph.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                continue  # linked
            if name == "length" and node["inputs"].get("batch_index") == -value:
                continue  # the last frames of a clip, from which the next goes on
            if name in values:
                node["inputs"][name] = values[name]
    return graph


def panning_clip(image_path, size, num_frames, fps):
    """Return the bytes of an mp4 that pans over an image from left to right, for LoadVideo."""
    import av
    from PIL import Image, ImageOps

    width, height = size
    wide = ImageOps.fit(Image.open(image_path).convert("RGB"), (width * 3 // 2, height))
    data = io.BytesIO()
    with av.open(data, "w", format="mp4") as container:
        stream = container.add_stream("h264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(num_frames):
            left = i * (wide.width - width) // max(1, num_frames - 1)
            frame = wide.crop((left, 0, left + width, height))
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return data.getvalue()
