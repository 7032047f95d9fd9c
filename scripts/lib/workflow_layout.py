"""Where the nodes of a workflow stand: groups in columns that fit a screen of 1600x900 in both renderers.

The editor fits an opened graph into three quarters of the window. A graph whose text the classic renderer
then draws is at most 2100 wide and 1180 high.
"""

from .workflow_notes import NOTE

# Group -> columns of node titles. A node that grows in a run stands low in its group.
GROUPS = {
    "Load": [
        ["Model", "High-noise model", "Low-noise model"],
        ["LoRA", "High-noise LoRA", "Low-noise LoRA"],
        ["VAE", "Text encoder"],
    ],
    "Prompt": [["Positive prompt", "Negative prompt"]],
    "Images": [["Start image", "CLIP vision"], ["Start image features", "Image to video"]],
    "Size": [["Size and length"], ["Low-noise guidance"]],
    "Source": [["Source video"], ["Frames of the video", "First frames", "Resize"]],
    "Sample": [["Encode", "Sampler"]],
    "First segment": [["Decode 1", "Size of the clip"]],
    "More segments": [["Segment 2", "Segment 3"]],
    "Video": [["Decode", "More frames", "More pixels", "Create video", "Save video"]],
}
GROUPS_WITH_END_IMAGE = GROUPS | {
    "Load": [["Model", "VAE"], ["Text encoder", "CLIP vision"]],
    "Images": [
        ["Start image", "Start image features"],
        ["End image", "End image features"],
        ["Image to video"],
    ],
}
GROUPS_UPSCALED = GROUPS | {
    "Sample": [["Sampler", "Decode"]],
    "Video": [["More frames", "More pixels"], ["Create video", "Save video"]],
}
COLUMNS = [
    [NOTE, "Prompt"],
    ["Load", "Images", "Size", "Source"],
    ["Sample"],
    ["More segments"],
    ["First segment", "Video"],
]
COLOURS = dict.fromkeys(("Images", "Size", "Source"), "#a1309b")
COLOURS |= dict.fromkeys(("Sample", "First segment", "More segments"), "#b58b2a")
COLOURS |= {"Load": "#3f789e", "Prompt": "#8A8", "Video": "#88A"}
WIDTH = 290
WIDTHS = {NOTE: 400, "Positive prompt": 360, "Negative prompt": 360, "Save video": 300}
# Least heights; a node is never lower than either renderer needs.
HEIGHTS = {"Positive prompt": 120, "Negative prompt": 100, "Start image": 320, "End image": 320}
HEIGHTS |= {"Source video": 320, "Save video": 300}
# Room below the inputs for the preview and the words of a run.
ROOM = {"Sampler": 100, "Size of the clip": 40}
# Room below a node, in its group: it grows by the preview or the video of a run, here one as wide as high.
BELOW = {"Sampler": 190, "Save video": 80}
TITLE_HEIGHT = 30  # the bar above a node, and a group's own title
GAP = 8
FOOTER = 27  # below a node of Nodes 2.0: "Error", "Show advanced inputs"
SPOKEN = 92  # below a node of ours, of Nodes 2.0, for two lines that it says; the classic renderer needs less
COLUMN_GAP = 16


def with_heights(graph, needed):
    """Return the graph with nodes at least as high as they need."""
    for node in graph["nodes"]:
        node["size"][1] = max(node["size"][1], round(needed[str(node["id"])]))
    return graph


def arranged(graph):
    """Return an editor graph with places and groups."""
    nodes = {node["title"]: node for node in graph["nodes"]}
    for title, room in ROOM.items():
        if title in nodes:
            nodes[title]["size"][1] += room
    places = GROUPS_WITH_END_IMAGE if "End image" in nodes else GROUPS
    places = GROUPS_UPSCALED if "More frames" in nodes else places
    groups, placed, left = [], {NOTE}, 0
    for column in COLUMNS:
        top, right = 0, left
        for name in column:
            if name == NOTE:
                nodes[NOTE]["pos"] = [left, TITLE_HEIGHT]
                right, top = left + nodes[NOTE]["size"][0], nodes[NOTE]["size"][1] + TITLE_HEIGHT + COLUMN_GAP
                continue
            held = [[nodes[title] for title in titles if title in nodes] for titles in places[name]]
            held = [column for column in held if column]
            if held:
                box = _place_group(name, held, (left, top))
                placed |= {node["title"] for column in held for node in column}
                groups.append(box | {"id": len(groups) + 1})
                top = box["bounding"][1] + box["bounding"][3] + COLUMN_GAP
                right = max(right, left + box["bounding"][2])
        if right > left:
            left = right + COLUMN_GAP
    if homeless := nodes.keys() - placed:
        raise SystemExit(f"no group in make_workflows.py holds {', '.join(sorted(homeless))}.")
    return graph | {"groups": groups, "extra": {"ds": {"scale": 0.6, "offset": [120, 160]}}}


def _place_group(name, columns, corner):
    left, top = corner
    x, bottom = left + GAP, top
    for column in columns:
        y = top + TITLE_HEIGHT + GAP
        for node in column:
            node["pos"] = [x, y + TITLE_HEIGHT]
            room = FOOTER + BELOW.get(node["title"], 0)
            if node is not column[-1] and node["type"].startswith("Wan21"):
                room = max(room, SPOKEN)
            y += TITLE_HEIGHT + node["size"][1] + room + GAP
        x += max(node["size"][0] for node in column) + GAP
        bottom = max(bottom, y)
    bounding = [left, top, x - left, bottom - top]
    return {"title": name, "bounding": bounding, "color": COLOURS[name], "font_size": 24, "flags": {}}


def first_sizes(graph):
    """Return the graph with the widths and least heights of its nodes."""
    for node in graph["nodes"]:
        node["size"] = [WIDTHS.get(node["title"], WIDTH), HEIGHTS.get(node["title"], 0)]
    return graph
