"""Lay the API graphs out for the editor: `workflows/api/*.json` -> `workflows/*.json`.

The API graphs are the source. The real editor turns each into its own format and fills in the inputs
a graph lacks; the layout, groups and note come from the tables below. Run it after changing an API
graph or a node's inputs, and `make_thumbnails.py` when the pictures should change too.

    python scripts/make_workflows.py             # all of them; needs a Chromium
    python scripts/make_workflows.py i2v t2v     # these
"""

import json
import sys
import tempfile
import uuid

from lib import bundled
from lib.editor import api_graph, editor_graph, load_api_graph, open_editor
from lib.host_server import HostServer
from lib.pack import ROOT

WORKFLOWS = ROOT / "workflows"
REPOSITORY = "https://huggingface.co/Comfy-Org/Wan_2.1_ComfyUI_repackaged"


def _segment(number):
    """Columns of node titles of a segment that goes on from the one before."""
    before = number - 1
    known = [f"Last frames of {before}", f"First of the last frames of {before}"]
    return [
        [f"Positive prompt {number}", *known, f"Start image features {number}"],
        [f"Image to video {number}"],
        [f"Sampler {number}"],
        [f"Report {number}", f"Decode {number}", f"Join {number}"],
    ]


# Group -> columns of node titles, and the groups from left to right, top to bottom.
GROUPS = {
    "Load": [
        ["Model", "High-noise model", "Low-noise model", "Text encoder", "VAE", "CLIP vision"],
        ["LoRA", "High-noise LoRA", "Low-noise LoRA"],
    ],
    "Prompt": [["Positive prompt", "Negative prompt"]],
    "Start image": [["Start image"], ["Start image features"]],
    "End image": [["End image"], ["End image features"]],
    "Source": [["Source video"], ["Frames of the video", "First frames", "Resize", "Encode"]],
    "Sample": [["Image to video", "Size and length", "Size of the clip"], ["Sampler", "Report", "Decode 1"]],
    "Second segment": _segment(2),
    "Third segment": _segment(3),
    "Video": [["Decode", "More frames", "More pixels", "Create video"], ["Save video"]],
}
COLUMNS = [
    ["Load"],
    ["Prompt", "Start image", "End image", "Source"],
    ["Sample"],
    ["Second segment", "Third segment"],
    ["Video"],
]
COLOURS = {
    "Load": "#3f789e",
    "Prompt": "#8A8",
    "Start image": "#a1309b",
    "End image": "#a1309b",
    "Source": "#a1309b",
    "Sample": "#b58b2a",
    "Second segment": "#b58b2a",
    "Third segment": "#b58b2a",
    "Video": "#88A",
}
GAP = 20
WIDE, NARROW = 340, 280
SIZES = {  # (width, least height) in pixels; a node is never lower than its inputs need
    "Positive prompt": (WIDE + GAP + NARROW, 130),
    "Negative prompt": (WIDE + GAP + NARROW, 130),
    "Start image": (WIDE, 340),
    "End image": (WIDE, 340),
    "Source video": (WIDE, 340),
    "Start image features": (NARROW, 0),
    "End image features": (NARROW, 0),
    "Frames of the video": (NARROW, 0),
    "First frames": (NARROW, 0),
    "Resize": (NARROW, 0),
    "Encode": (NARROW, 0),
    "Decode": (NARROW, 0),
    "More frames": (NARROW, 0),
    "More pixels": (NARROW, 0),
    "Create video": (NARROW, 0),
    "Report": (WIDE, 280),
    "Save video": (420, 460),
}
SIZES |= {f"Positive prompt {number}": (WIDE, 130) for number in (2, 3)}
SIZES |= {f"Report {number}": (WIDE, 280) for number in (2, 3)}
# Room below the inputs for the picture or text of a run.
PREVIEW_HEIGHT = {"Sampler": 220, "Sampler 2": 220, "Sampler 3": 220, "Size of the clip": 60}
PREVIEW_HEIGHT |= dict.fromkeys(("Decode", "Decode 1", "Decode 2", "Decode 3"), 90)
NOTE_SIZE = (440, 480)
TITLE_HEIGHT = 30  # the bar above a node, and a group's own title
COLUMN_GAP = 50

# Loader -> (input with the file's name, folder below ComfyUI's `models`)
FILES = {
    "Wan21ModelLoader": ("model_name", "diffusion_models"),
    "Wan21TextEncoderLoader": ("text_encoder_name", "text_encoders"),
    "Wan21VAELoader": ("vae_name", "vae"),
    "CLIPVisionLoader": ("clip_name", "clip_vision"),
    "Wan21LoraLoader": ("lora_name", "loras"),
}
# Files that are not in `REPOSITORY`, by how their names begin.
ELSEWHERE = {
    "wan2.2_": "https://huggingface.co/Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files/{folder}/",
    "lightx2v_": "https://huggingface.co/Kijai/WanVideo_comfy/resolve/main/Lightx2v/",
}
SIDES_AND_FRAMES = "Sides are multiples of 16 (8 works too); frames are 4n+1 (5, 9 … 81) at 16 a second."
TEXT_ENCODER = "**Text encoder**: set `device` to `cpu` to keep it out of GPU memory."
NOTES = {
    "quick_start": (
        "# Quick start\nA still image moves, on any machine, in about a minute: the small model that comes "
        "with these nodes. Press **Run**.",
        "**Start image**: your picture. It is cropped to 128x128; the model was made for 64 to 128 pixels.",
        "**Positive prompt**: one motion. `pan left`, `pan right`, `pan up`, `pan down`, `zoom in`, "
        "`zoom out`, `rotate clockwise`, `rotate counterclockwise`, `still`; or a shape of the picture that "
        "moves: `a red circle moves left`.",
        "**Image to video**: sides of 64 to 128 in steps of 16, 5 to 33 frames (4n+1).",
        "For real pictures open the graph **i2v**, whose note names the files to download.",
    ),
    "quick_start_four_steps": (
        "# Quick start in 4 steps\nThe graph **quick_start** with a LoRA that was distilled from the same "
        "small model: 4 passes through the model in place of 40. Press **Run**.",
        "**Sampler**: 4 steps, guidance 1, shift 5 and euler are what the LoRA was trained on. At guidance 1 "
        "the negative prompt is not read.",
        "**LoRA**: strength 0 shows what 4 steps are without it.",
        "**Start image**: your picture. It is cropped to 128x128; the model was made for 64 to 128 pixels.",
        "**Positive prompt**: one motion, as in **quick_start**: `pan left`, `zoom in`, `rotate clockwise`, "
        "`still`, `a red circle moves left`.",
        "For real pictures open the graph **four_steps**, whose note names the files to download.",
    ),
    "i2v": (
        "# Image to video\nA still image becomes five seconds of video.",
        "**Start image**: your picture. **Positive prompt**: what moves in it, and how the camera does.",
        f"**Image to video**: size and length. {SIDES_AND_FRAMES} 832x480 or 480x832 suits this model; "
        "`resize_mode` says what happens to a picture of another shape.",
        "**Sampler**: the release runs 40 steps at guidance 5. Shift 3 is for 480p; with the 720p model "
        "(`wan2.1_i2v_720p_14B_fp16.safetensors`) use 1280x720 and shift 5.",
        "**CLIP vision** is optional: delete its nodes to save memory, the picture then follows the image "
        "less closely.",
        TEXT_ENCODER,
    ),
    "four_steps": (
        "# Image to video in 4 steps\nA LoRA that was distilled to four steps without guidance: 4 passes "
        "through the model in place of 60.",
        "**LoRA**: LightX2V's for the 480p model. **Sampler**: 4 steps, guidance 1, shift 5 and euler are "
        "what it was trained on; `lcm` adds noise on the way. At guidance 1 the negative prompt is not read: "
        "switch `nag` on to have it act.",
        "**Start image**: your picture. **Positive prompt**: what moves in it, and how the camera does.",
        f"**Image to video**: size and length. {SIDES_AND_FRAMES}",
        TEXT_ENCODER,
    ),
    "wan22_i2v": (
        "# Wan2.2 image to video\nTwo experts of 14B: one for the steps of high noise, one for the rest.",
        "**High-noise model**, **Low-noise model**: both files of one release; the sampler changes over by "
        "itself. **Sampler**: the release runs 40 steps at guidance 3.5 and shift 5.",
        "**Start image**: your picture. **Positive prompt**: what moves in it, and how the camera does.",
        f"**Image to video**: size and length. {SIDES_AND_FRAMES} There is no CLIP vision in these models.",
        TEXT_ENCODER,
    ),
    "wan22_four_steps": (
        "# Wan2.2 image to video in 4 steps\nBoth experts with their LoRA: two steps each.",
        "**High-noise LoRA**, **Low-noise LoRA**: LightX2V's pair. **Sampler**: 4 steps, guidance 1, shift 5 "
        "and euler are what they were trained on; switch `nag` on to have the negative prompt act.",
        "**Start image**: your picture. **Positive prompt**: what moves in it, and how the camera does.",
        f"**Image to video**: size and length. {SIDES_AND_FRAMES}",
        TEXT_ENCODER,
    ),
    "fast": (
        "# Image to video, fast\nHalf of the steps reuse what another step computed (TeaCache).",
        "**Sampler**: `cache.multiplier` is the speed-up asked for; 1.5 stays nearer to the full run, 2.5 "
        "is for drafts. **Report** shows the computed steps and the speed-up measured. `cfg_star` "
        "(CFG-Zero*) costs nothing; switch it off to compare.",
        "**Start image**: your picture. **Positive prompt**: what moves in it, and how the camera does.",
        f"**Image to video**: size and length. {SIDES_AND_FRAMES}",
        TEXT_ENCODER,
    ),
    "long_video": (
        "# Long video\nTwelve seconds in one piece: more than twice what the model was trained on.",
        "**Sampler**: `riflex` slows the frequency by which a long clip starts over. It changes nothing "
        "below 181 frames. Compare with `off`: motion or detail may suffer.",
        f"**Image to video**: size and length. {SIDES_AND_FRAMES} Time grows faster than the length, "
        "and memory with it.",
        "**Start image**: your picture. **Positive prompt**: describe motion that can go on for so long.",
        TEXT_ENCODER,
    ),
    "upscaled": (
        "# Image to video, upscaled\nThe video gets a new frame between every two and half as much again of "
        "width and height: 32 frames a second at 1248x720.",
        "**More frames**: `x2` or `x4`. Without weights FFmpeg follows the motion of blocks; for a network "
        "connect **Load Frame Interpolation Model** (RIFE or FILM). Scene cuts are kept.",
        "**More pixels**: Lanczos invents nothing; for new detail choose `model` and connect **Load Upscale "
        "Model**.",
        "**Start image**: your picture. **Positive prompt**: what moves in it, and how the camera does.",
        f"**Image to video**: size and length before upsampling. {SIDES_AND_FRAMES}",
        TEXT_ENCODER,
    ),
    "low_memory": (
        "# Image to video, low memory\nFor a GPU that runs out of memory with the other graph.",
        "**Model**: `fp8_e4m3fn` halves the weights, a little detail is lost. **Text encoder**: `cpu` keeps "
        "it out of GPU memory; prompts take longer there.",
        "**Image to video**, **Decode**: `tile_size` 128 takes a fraction of the memory of whole frames, and "
        "about twice the time.",
        "**Sampler**: takes less memory by itself when it runs out. If that is not enough, take a smaller "
        "size or fewer frames.",
        f"**Image to video**: size and length. {SIDES_AND_FRAMES}",
        "**CLIP vision** is optional: delete its nodes to save memory, the picture then follows the image "
        "less closely.",
    ),
    "first_last_frame": (
        "# First and last frame to video\nThe video that leads from one image to another.",
        "**Start image**, **End image**: your two pictures, of the same shape. "
        "**Positive prompt**: what happens between them.",
        f"**Image to video**: size and length. {SIDES_AND_FRAMES} The model was made for 720p; 832x480 takes "
        "well under half the time.",
        "**Sampler**: the release runs 50 steps at guidance 5 and shift 16.",
        "**add_frames_for_end_image** stays off for this model. Turn it on to use an end image "
        "with a plain i2v model.",
        TEXT_ENCODER,
    ),
    "segments": (
        "# Segments\nThree prompts, one after the other, in one video of 14 seconds: each segment goes on "
        "from the last frames of the one before.",
        "**Start image**: your picture. **Positive prompt**, **2** and **3**: what happens in each segment. "
        "**Negative prompt** serves all.",
        "**Last frames**: five tell the next segment how things move; one (batch_index -1, length 1) only "
        "where they are. Set `overlap` of **Join** to the same number.",
        "**Join**: `match_color` brings the colours of a segment to those of the one before.",
        f"**Image to video**: size and length. {SIDES_AND_FRAMES} The second and third take the size from "
        "**Size of the clip**.",
        "A segment more: copy the nodes of the third, its **Last frames** from **Decode 3**, its **Join** "
        "after **Join 3**. A segment less: connect **Create video** to **Join 2**.",
        "**CLIP vision** is optional: delete its nodes to save memory, the video then follows its first "
        "frames less closely.",
        TEXT_ENCODER,
    ),
    "t2v": (
        "# Text to video\nFive seconds of video from a sentence or two.",
        "**Positive prompt**: what is seen, what moves, how the camera does.",
        f"**Size and length**. {SIDES_AND_FRAMES} 832x480 suits this model.",
        "**Sampler**: the release runs 50 steps. For this 1.3B model it recommends guidance 6 and shift 8 to "
        "12; for the 14B model (`wan2.1_t2v_14B_fp16.safetensors`) guidance 5 and shift 5.",
        TEXT_ENCODER,
    ),
    "video_to_video": (
        "# Video to video\nA clip is partly turned back into noise and made anew after the prompt.",
        "**Source video**: your clip, uploaded with its button. **Positive prompt**: what it should become.",
        "**First frames**: how many to use, 4n+1 (5, 9 … 81) and no more than the clip has.",
        "**Resize**: the size of the result; sides are multiples of 16.",
        "**Sampler**: `denoise` is how much may change; 0.3 keeps nearly everything, 0.9 nearly nothing.",
        "Speed and sound of the clip are kept: **Create video** takes them from **Frames of the video**.",
        TEXT_ENCODER,
    ),
}


def main():
    """Write the editor graphs of the API graphs named on the command line, or of all, and these anew."""
    names = sys.argv[1:] or sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))
    with tempfile.TemporaryDirectory() as folder, HostServer(folder) as server:
        for path in (WORKFLOWS / "api" / f"{name}.json" for name in names):
            with open_editor(server.url) as page:
                load_api_graph(page, json.loads(path.read_text(encoding="utf-8")), path.stem)
                _write(path, api_graph(page))
                _write(WORKFLOWS / path.name, arranged(editor_graph(page), path.stem, heights(page)))


def heights(page):
    """Return what each node needs: id, as text -> pixels."""
    found = page.evaluate("() => app.graph._nodes.map(node => [String(node.id), node.computeSize()[1]])")
    return dict(found)


def arranged(graph, name, node_heights):
    """Return an editor graph with places, sizes, groups, download links and its note."""
    nodes = {node["title"]: node for node in graph["nodes"]}
    homeless = nodes.keys() - {title for columns in GROUPS.values() for titles in columns for title in titles}
    if homeless:
        raise SystemExit(f"{name}: no group in make_workflows.py holds {', '.join(sorted(homeless))}.")
    for title, node in nodes.items():
        width, height = SIZES.get(title, (WIDE, 0))
        needed = round(node_heights[str(node["id"])]) + PREVIEW_HEIGHT.get(title, 0)
        node["size"] = [width, max(height, needed)]
    groups = []
    left = NOTE_SIZE[0] + COLUMN_GAP
    for column in COLUMNS:
        boxes = _place_column(column, nodes, left)
        groups += boxes
        if boxes:  # few graphs have further segments
            left = max(box["bounding"][0] + box["bounding"][2] for box in boxes) + COLUMN_GAP
    for index, group in enumerate(groups):
        group["id"] = index + 1
    files = [_offer_download(node) for node in graph["nodes"] if node["type"] in FILES]
    files = [file for file in files if file is not None]
    note = _note(name, files, graph["last_node_id"] + 1)
    return graph | {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"wan21/{name}")),
        "last_node_id": note["id"],
        "nodes": [*graph["nodes"], note],
        "groups": groups,
        "extra": {"ds": {"scale": 0.6, "offset": [120, 160]}},
    }


def _place_column(names, nodes, left):
    """Place the groups `names` below each other; returns those of them that this graph has."""
    boxes, top = [], 0
    for name in names:
        columns = [[nodes[title] for title in titles if title in nodes] for titles in GROUPS[name]]
        columns = [column for column in columns if column]
        if columns:
            boxes.append(_place_group(name, columns, left, top))
            top += boxes[-1]["bounding"][3] + COLUMN_GAP
    return boxes


def _place_group(name, columns, left, top):
    x, bottom = left + GAP, top
    for column in columns:
        y = top + TITLE_HEIGHT + GAP
        for node in column:
            node["pos"] = [x, y + TITLE_HEIGHT]
            y += TITLE_HEIGHT + node["size"][1] + GAP
        x += max(node["size"][0] for node in column) + GAP
        bottom = max(bottom, y)
    bounding = [left, top, x - left, bottom - top]
    return {"title": name, "bounding": bounding, "color": COLOURS[name], "font_size": 24, "flags": {}}


def _offer_download(node):
    """Let the editor offer the file of a loader that lacks it.

    Returns:
        (folder, name, address), or None for a file that the pack brings.
    """
    input_name, folder = FILES[node["type"]]
    widgets = [slot["name"] for slot in node["inputs"] if "widget" in slot]
    name = node["widgets_values"][widgets.index(input_name)]
    if name in bundled.FILES.values():
        return None
    where = next((url for begins, url in ELSEWHERE.items() if name.startswith(begins)), None)
    url = (where or f"{REPOSITORY}/resolve/main/split_files/{{folder}}/").format(folder=folder) + name
    node["properties"]["models"] = [{"name": name, "url": url, "directory": folder}]
    return folder, name, url


def _note(name, files, node_id):
    title, *changes = NOTES[name]
    text = [title]
    if files:
        text += [
            "## Files",
            "Into these folders of ComfyUI; then press `R`.",
            "\n".join(f"- `models/{folder}`: [{file}]({url})" for folder, file, url in files),
        ]
    text += ["## What to change", "\n".join(f"- {change}" for change in changes)]
    return {
        "id": node_id,
        "type": "MarkdownNote",
        "pos": [0, TITLE_HEIGHT],
        "size": list(NOTE_SIZE),
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": "Read me",
        "properties": {},
        "widgets_values": ["\n\n".join(text)],
        "color": "#432",
        "bgcolor": "#653",
    }


def _write(path, graph):
    path.write_text(json.dumps(graph, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
