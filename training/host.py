"""The bundled checkpoint in a real ComfyUI: pictures go in as files, frames come out exact."""

import hashlib
import io
import json

import av
import numpy as np
import torch
from lib import bundled, pack
from lib.comfy_client import fill, find_node, without
from PIL import Image

WORKFLOWS = pack.ROOT / "workflows" / "api"
LOADERS = {
    "Wan21ModelLoader": "model_name",
    "Wan21TextEncoderLoader": "text_encoder_name",
    "Wan21VAELoader": "vae_name",
}
TIMEOUT_S = 600


class Host:
    """A real ComfyUI that runs graphs and returns frames as they are, without a video codec between.

    Args:
        server: a `HostServer`.
        sampling: inputs of Wan21Sampler that replace those of the graphs.
    """

    def __init__(self, server, **sampling):
        self.server, self.sampling, self.graphs = server, sampling, {}
        for path in WORKFLOWS.glob("*.json"):
            self.graphs[path.stem] = json.loads(path.read_text(encoding="utf-8"))

    def graph(self, name, prompt, size, seed, **images):
        """A workflow with the tiny checkpoint. size: (frames, height, width); images: title -> [3, H, W]."""
        frames, height, width = size
        graph = without(self.graphs[name], "CLIPVisionLoader", "CLIPVisionEncode")
        for loader, name_of_file in LOADERS.items():
            graph = fill(graph, loader, **{name_of_file: bundled.FILES[name_of_file]})
        graph = fill(graph, "Positive prompt", text=prompt)
        graph = fill(graph, "Wan21Sampler", seed=seed, **self.sampling)
        for title, image in images.items():
            graph = fill(graph, title.replace("_", " "), image=self.upload(image))
        if any(node["_meta"]["title"] == "Size and length" for node in graph.values()):  # no start image
            return fill(graph, "Size and length", width=width, height=height, length=frames)
        return fill(graph, "Image to video", width=width, height=height, num_frames=frames)

    def upload(self, image):
        buffer = io.BytesIO()
        to_picture(image).save(buffer, "png")
        name = hashlib.sha256(buffer.getvalue()).hexdigest()[:16]
        return self.server.client.upload_image(buffer.getvalue(), name=f"{name}.png")

    def frames(self, graph):
        """Run a graph and return the decoded frames [F, 3, H, W] in [0, 1]."""
        graph = without(graph, "CreateVideo", "SaveVideo", "PreviewAny")
        decoded = find_node(graph, "Wan21VAEDecode")
        save = {"images": [decoded, 0], "filename_prefix": "frame"}
        graph["save"] = {"class_type": "SaveImage", "inputs": save}
        job = self.run(graph)
        files = [self.server.output_directory / f["subfolder"] / f["filename"] for f in job.files]
        pictures = [np.asarray(Image.open(path)) for path in files]
        for path in files:
            path.unlink()
        return torch.from_numpy(np.stack(pictures)).movedim(-1, 1).float() / 255

    def run(self, graph):
        """Run a graph as it is."""
        return self.server.client.run(graph, timeout_s=TIMEOUT_S)

    def reconstructed(self, video):
        """What the VAE alone makes of a clip [F, 3, H, W]: encoded and decoded by nodes of the host."""
        name = self.server.client.upload_image(lossless(video), name="clip.mkv")
        graph = {
            "1": {"class_type": "Wan21VAELoader", "inputs": {"precision": "auto"}},
            "2": {"class_type": "LoadVideo", "inputs": {"file": name}},
            "3": {"class_type": "GetVideoComponents", "inputs": {"video": ["2", 0]}},
            "4": {"class_type": "VAEEncode", "inputs": {"pixels": ["3", 0], "vae": ["1", 0]}},
            "5": {
                "class_type": "Wan21VAEDecode",
                "inputs": {"vae": ["1", 0], "latent": ["4", 0], "tile_size": "auto"},
            },
        }
        return self.frames(fill(graph, "Wan21VAELoader", vae_name=bundled.VAE))


def to_picture(image):
    return Image.fromarray((image.movedim(0, -1).clamp(0, 1) * 255).round().byte().numpy())


def lossless(video):
    """Bytes of a video file that gives back exactly these 8-bit frames."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=16)
        stream.height, stream.width, stream.pix_fmt = *video.shape[2:], "bgr0"
        for frame in video:
            picture = av.VideoFrame.from_image(to_picture(frame))
            container.mux(stream.encode(picture.reformat(format="bgr0")))
        container.mux(stream.encode())
    return buffer.getvalue()
