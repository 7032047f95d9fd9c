"""A graph that holds our nodes with checks of their own, and what they refuse when it is queued."""

import copy

from lib import bundled

IMAGE_TO_VIDEO, UPSAMPLE, JOIN, SAVE = "5", "7", "8", "10"

_GRAPH = {
    "1": ("Wan21TextEncoderLoader", {"text_encoder_name": bundled.TEXT_ENCODER, "device": "default"}),
    "2": ("CLIPTextEncode", {"text": "", "clip": ["1", 0]}),
    "3": ("Wan21VAELoader", {"vae_name": bundled.VAE, "precision": "auto"}),
    "4": ("LoadImage", {"image": "example.png"}),
    IMAGE_TO_VIDEO: (
        "Wan21ImageToVideo",
        {
            "positive": ["2", 0],
            "negative": ["2", 0],
            "vae": ["3", 0],
            "start_image": ["4", 0],
            "width": 64,
            "height": 64,
            "num_frames": 5,
            "resize_mode": "crop",
            "add_frames_for_end_image": False,
            "tile_size": "auto",
        },
    ),
    "6": ("Wan21VAEDecode", {"vae": ["3", 0], "latent": [IMAGE_TO_VIDEO, 2], "tile_size": "auto"}),
    UPSAMPLE: ("Wan21SpatialUpsample", {"images": ["6", 0], "method": "none"}),
    JOIN: (
        "Wan21JoinClips",
        {
            "images_1": [UPSAMPLE, 0],
            "images_2": [UPSAMPLE, 0],
            "overlap": 1,
            "blend": "linear",
            "match_color": False,
        },
    ),
    "9": ("CreateVideo", {"images": [JOIN, 0], "fps": 16.0, "bit_depth": 8}),
    SAVE: (
        "SaveVideo",
        {"video": ["9", 0], "filename_prefix": "wan21/refused", "format": "auto", "codec": "auto"},
    ),
}

# node, its changed inputs -> the input that is wrong, and the whole sentence
REFUSED = {
    "frames": (
        (IMAGE_TO_VIDEO, {"num_frames": 80}),
        "num_frames",
        "num_frames is 80; Wan2.1 makes 4n+1 frames. Set 77 or 81.",
    ),
    "width": (
        (IMAGE_TO_VIDEO, {"width": 830}),
        "width",
        "width is 830; sides are multiples of 8 pixels from 16 on. Set 824 or 832.",
    ),
    "height": (
        (IMAGE_TO_VIDEO, {"height": 9000}),
        "height",
        "height is 9000; the most is 8192. Set 8192 or less.",
    ),
    "no model": (
        (UPSAMPLE, {"method": "model"}),
        "method",
        "method is model and upscale_model is not connected. Connect Load Upscale Model, or choose lanczos2.",
    ),
    "method": (
        (UPSAMPLE, {"method": "bicubic"}),
        "method",
        "method is 'bicubic'; it is one of none, lanczos1.5, lanczos2, model. Choose one of them.",
    ),
    "colours": (
        (JOIN, {"match_color": True, "overlap": 0}),
        "match_color",
        "match_color is on and overlap is 0: no frame is in both clips. Set overlap to 1 or more, or turn "
        "match_color off.",
    ),
    "overlap": (
        (JOIN, {"overlap": -1}),
        "overlap",
        "overlap is -1; both clips show 0 to 4096 frames. Set the number of frames that the second clip took "
        "for its start_image.",
    ),
}


def graph_with(node: str, changed: dict) -> dict:
    """The graph in API form with inputs of one node changed."""
    graph = {
        node_id: {"class_type": kind, "inputs": copy.deepcopy(inputs)}
        for node_id, (kind, inputs) in _GRAPH.items()
    }
    graph[node]["inputs"] |= changed
    return graph
