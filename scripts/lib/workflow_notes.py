"""The note of each workflow, and where the files that it needs are found."""

from . import bundled

NOTE = "Read me"  # title
REPOSITORY = "https://huggingface.co/Comfy-Org/Wan_2.1_ComfyUI_repackaged"
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
TEXT_ENCODER = "**Text encoder**: set *device* to *cpu* to keep it out of GPU memory."
NOTES = {
    "Wan2.1 - quick start": (
        "# Quick start\nA still image moves within seconds, also without a GPU: the small model that comes "
        "with these nodes. Press **Run**.",
        "**Start image**: your picture. It is cropped to 128x128; the model was made for 64 to 192 pixels.",
        "**Positive prompt**: one motion. *pan left*, *pan right*, *pan up*, *pan down*, *zoom in*, "
        "*zoom out*, *rotate clockwise*, *rotate counterclockwise*, *still*; *night falls*, *it snows*, "
        "*waves on the water*; or a shape of the picture that moves: *a red circle moves left*.",
        "**Image to video**: sides of 64 to 192 in steps of 16, 5 to 33 frames (4n+1).",
        "For real pictures open the graph **Wan2.1 image to video (i2v)**, whose note names the files to "
        "download.",
    ),
    "Wan2.1 - quick start 4 steps": (
        "# Quick start in 4 steps\nThe graph **Wan2.1 - quick start** with a LoRA distilled from the same "
        "small model: 4 passes through the model in place of 40. Press **Run**.",
        "**Sampler**: 4 steps, guidance 1, shift 5 and euler are what the LoRA was trained on. At guidance 1 "
        "the negative prompt is not read.",
        "**LoRA**: strength 0 shows what 4 steps are without it.",
        "**Start image**: your picture. It is cropped to 128x128; the model was made for 64 to 192 pixels.",
        "**Positive prompt**: one motion, as in **Wan2.1 - quick start**: *pan left*, *zoom in*, "
        "*rotate clockwise*, *still*, *night falls*, *it snows*, *a red circle moves left*.",
        "For real pictures open the graph **Wan2.1 4 steps image to video (lightx2v)**, whose note names the "
        "files to download.",
    ),
    "Wan2.1 image to video (i2v)": (
        "# Image to video\nA still image becomes five seconds of video.",
        "**Start image**: your picture. **Positive prompt**: what moves in it, and how the camera does.",
        f"**Image to video**: size and length. {SIDES_AND_FRAMES} 832x480 or 480x832 suits this model; "
        "*resize_mode* says what happens to a picture of another shape.",
        "**Sampler**: the release runs 40 steps at guidance 5. Shift 3 is for 480p; with the 720p model "
        "(*wan2.1_i2v_720p_14B_fp16.safetensors*) use 1280x720 and shift 5.",
        "**CLIP vision** is optional: delete its nodes to save memory, the picture then follows the image "
        "less closely.",
        TEXT_ENCODER,
    ),
    "Wan2.1 4 steps image to video (lightx2v)": (
        "# Image to video in 4 steps\nA LoRA that was distilled to four steps without guidance: 4 passes "
        "through the model in place of 60.",
        "**LoRA**: LightX2V's for the 480p model. **Sampler**: 4 steps, guidance 1, shift 5 and euler are "
        "what it was trained on; *lcm* adds noise on the way. At guidance 1 the negative prompt is not read: "
        "switch *nag* on to have it act.",
        "**Start image**: your picture. **Positive prompt**: what moves in it, and how the camera does.",
        f"**Image to video**: size and length. {SIDES_AND_FRAMES}",
        TEXT_ENCODER,
    ),
    "Wan2.2 image to video (i2v)": (
        "# Wan2.2 image to video\nTwo experts of 14B: one for the steps of high noise, one for the rest.",
        "**High-noise model**, **Low-noise model**: both files of one release; the sampler changes over by "
        "itself. **Sampler**: the release runs 40 steps at guidance 3.5 and shift 5.",
        "**Start image**: your picture. **Positive prompt**: what moves in it, and how the camera does.",
        f"**Image to video**: size and length. {SIDES_AND_FRAMES} There is no CLIP vision in these models.",
        TEXT_ENCODER,
    ),
    "Wan2.2 text to video (t2v)": (
        "# Wan2.2 text to video\nTwo experts of 14B: one for the steps of high noise, one for the rest.",
        "**Positive prompt**: what is seen, what moves, how the camera does.",
        f"**Size and length**. {SIDES_AND_FRAMES} 832x480 takes well under half the time of 1280x720.",
        "**High-noise model**, **Low-noise model**: both files of one release; the sampler changes over by "
        "itself. **Sampler**: the release runs 40 steps at shift 12, guidance 4 for the first expert and 3 "
        "for the second (**Low-noise guidance**).",
        TEXT_ENCODER,
    ),
    "Wan2.2 4 steps image to video (lightx2v)": (
        "# Wan2.2 image to video in 4 steps\nBoth experts with their LoRA: two steps each.",
        "**High-noise LoRA**, **Low-noise LoRA**: LightX2V's pair. **Sampler**: 4 steps, guidance 1, shift 5 "
        "and euler are what they were trained on; switch *nag* on to have the negative prompt act.",
        "**Start image**: your picture. **Positive prompt**: what moves in it, and how the camera does.",
        f"**Image to video**: size and length. {SIDES_AND_FRAMES}",
        TEXT_ENCODER,
    ),
    "Wan2.1 image to video TeaCache": (
        "# Image to video, fast\nHalf of the steps reuse what another step computed (TeaCache).",
        "**Sampler**: *cache.multiplier* is the speed-up asked for; 1.5 stays nearer to the full run, 2.5 "
        "is for drafts. **Report** shows the computed steps and the speed-up measured. *cfg_star* "
        "(CFG-Zero*) costs nothing; switch it off to compare.",
        "**Start image**: your picture. **Positive prompt**: what moves in it, and how the camera does.",
        f"**Image to video**: size and length. {SIDES_AND_FRAMES}",
        TEXT_ENCODER,
    ),
    "Wan2.1 long video RIFLEx": (
        "# Long video\nTwelve seconds in one piece: more than twice what the model was trained on.",
        "**Sampler**: *riflex* slows the frequency by which a long clip starts over. It changes nothing "
        "below 181 frames. Compare with *off*: motion or detail may suffer.",
        f"**Image to video**: size and length. {SIDES_AND_FRAMES} Time grows faster than the length, "
        "and memory with it.",
        "**Start image**: your picture. **Positive prompt**: describe motion that can go on for so long.",
        TEXT_ENCODER,
    ),
    "Wan2.1 image to video upscaled": (
        "# Image to video, upscaled\nThe video gets a new frame between every two and half as much again of "
        "width and height: 32 frames a second at 1248x720.",
        "**More frames**: *x2* or *x4*. Without weights FFmpeg follows the motion of blocks; for a network "
        "connect **Load Frame Interpolation Model** (RIFE or FILM). Scene cuts are kept.",
        "**More pixels**: Lanczos invents nothing; for new detail choose *model* and connect **Load Upscale "
        "Model**.",
        "**Start image**: your picture. **Positive prompt**: what moves in it, and how the camera does.",
        f"**Image to video**: size and length before upsampling. {SIDES_AND_FRAMES}",
        TEXT_ENCODER,
    ),
    "Wan2.1 image to video low VRAM": (
        "# Image to video, low memory\nFor a GPU that runs out of memory with the other graph.",
        "**Model**: *fp8_e4m3fn* halves the weights, a little detail is lost. **Text encoder**: *cpu* keeps "
        "it out of GPU memory; prompts take longer there.",
        "**Image to video**, **Decode**: *tile_size* 128 takes a fraction of the memory of whole frames, and "
        "about twice the time.",
        "**Sampler**: takes less memory by itself when it runs out. If that is not enough, take a smaller "
        "size or fewer frames.",
        f"**Image to video**: size and length. {SIDES_AND_FRAMES}",
        "**CLIP vision** is optional: delete its nodes to save memory, the picture then follows the image "
        "less closely.",
    ),
    "Wan2.1 first and last frame (flf2v)": (
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
    "Wan2.1 long video in segments": (
        "# Segments\nThree prompts, one after the other, in one video of 14 seconds: each segment goes on "
        "from the last frames of the one before.",
        "**Start image**: your picture. **Positive prompt**, and *prompt* on **Segment 2** and **3**: what "
        "happens in each. **Negative prompt** serves all.",
        f"**Image to video**: size and length. {SIDES_AND_FRAMES}",
        "*match_color* brings the colours of a segment to those of the one before.",
        "Inside a segment, **Last frames**: five tell it how things move; one (batch_index -1, length 1) "
        "only where they are. Set *overlap* of **Join** to the same number.",
        "A segment more: copy **Segment 3**; *clip so far* and *frames before* come from **Segment 3**, its "
        "*clip* goes to **Create video**. A segment less: connect **Create video** to **Segment 2**.",
        "**CLIP vision** is optional: delete its nodes to save memory, the video then follows its first "
        "frames less closely.",
        TEXT_ENCODER,
    ),
    "Wan2.1 text to video (t2v)": (
        "# Text to video\nFive seconds of video from a sentence or two.",
        "**Positive prompt**: what is seen, what moves, how the camera does.",
        f"**Size and length**. {SIDES_AND_FRAMES} 832x480 suits this model.",
        "**Sampler**: the release runs 50 steps. For this 1.3B model it recommends guidance 6 and shift 8 to "
        "12; for the 14B model (*wan2.1_t2v_14B_fp16.safetensors*) guidance 5 and shift 5.",
        TEXT_ENCODER,
    ),
    "Wan2.1 video to video (v2v)": (
        "# Video to video\nA clip is partly turned back into noise and made anew after the prompt.",
        "**Source video**: your clip, uploaded with its button. **Positive prompt**: what it should become.",
        "**First frames**: how many to use, 4n+1 (5, 9 … 81) and no more than the clip has.",
        "**Resize**: the size of the result; sides are multiples of 16.",
        "**Sampler**: *denoise* is how much may change; 0.3 keeps nearly everything, 0.9 nearly nothing.",
        "Speed and sound of the clip are kept: **Create video** takes them from **Frames of the video**.",
        TEXT_ENCODER,
    ),
}


def offer_download(node):
    """Let the editor offer the file of a loader, unless the pack brings it."""
    input_name, folder = FILES[node["type"]]
    widgets = [slot["name"] for slot in node["inputs"] if "widget" in slot]
    name = node["widgets_values"][widgets.index(input_name)]
    if name not in bundled.FILES.values():
        where = next((url for begins, url in ELSEWHERE.items() if name.startswith(begins)), None)
        url = (where or f"{REPOSITORY}/resolve/main/split_files/{{folder}}/").format(folder=folder) + name
        node["properties"]["models"] = [{"name": name, "url": url, "directory": folder}]


def note(name, files, node_id):
    """The node with a workflow's note.

    Args:
        name: of the workflow.
        files: (name, url, directory) of what is to be downloaded, as tables.
        node_id: of the node.
    """
    title, *changes = NOTES[name]
    text = [title]
    if files:
        text += [
            "## Files",
            "Into these folders of ComfyUI; then press *R*.",
            "\n".join(f"- *models/{f['directory']}*: [{f['name']}]({f['url']})" for f in files),
        ]
    text += ["## What to change", "\n".join(f"- {change}" for change in changes)]
    return {
        "id": node_id,
        "type": "MarkdownNote",
        "pos": [0, 0],
        "size": [0, 0],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": NOTE,
        "properties": {},
        "widgets_values": ["\n\n".join(text)],
        "color": "#432",
        "bgcolor": "#653",
    }
