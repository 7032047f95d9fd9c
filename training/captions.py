"""What a clip is called, in the many ways that people say it.

A caption is drawn from a small grammar: `{name}` stands for any of the phrases under that name. The
model so learns words and not templates. Case carries no meaning: the tokenizer folds it.
"""

import json
import re

from lib.pack import ROOT


def workflow_texts(title):
    """What the nodes of this title say in the graphs of `workflows/api`, but for empty texts."""
    graphs = [json.loads(path.read_text(encoding="utf-8")) for path in ROOT.glob("workflows/api/*.json")]
    nodes = [node for graph in graphs for node in graph.values() if node["_meta"]["title"] == title]
    return sorted({node["inputs"]["text"] for node in nodes} - {""})


COMMON = {
    "camera": ["the camera", "the camera", "camera", "the view", "the shot", "our view", "the frame"],
    "picture": ["the picture", "the image", "the scene", "the view", "the whole picture", "everything"],
    "slowly": [
        "", "", "", "", "slowly", "slowly", "gently", "smoothly", "steadily", "softly", "gradually", "now",
        "slightly", "then", "very slowly", "a little",
    ],
    "slow": ["", "", "slow", "smooth", "gentle", "steady", "long", "simple", "cinematic"],
    "across": [
        "", "", "", "", "across the scene", "over the scene", "through the picture", "along the landscape",
        "over the image", "past everything", "across the picture",
    ],
    "pans": [
        "pans", "pans", "moves", "moves", "glides", "slides", "travels", "drifts", "sweeps", "shifts", "goes",
        "tracks", "is panning", "is moving", "keeps panning", "turns",
    ],
    "pan": [
        "pan", "pan", "pan", "camera pan", "pan the camera", "move the camera", "move the view", "panning",
        "camera panning", "camera moving", "slide the camera", "sweep", "glide", "camera motion", "pans",
    ],
    "moves": [
        "moves", "moves", "moves", "drifts", "slides", "glides", "travels", "goes", "floats", "is moving",
        "flies", "wanders", "shifts", "is drifting", "keeps moving", "runs", "rolls",
    ],
    "moving": ["moving", "moving", "drifting", "sliding", "gliding", "travelling", "going", "floating"],
    "move": ["move", "move", "slide", "push", "shift", "let", "drag"],
    "a": ["a", "a", "the", "the", "", "", "one", "that", "this"],
    "big": [
        "", "", "", "", "", "big", "large", "bright", "little", "shiny", "simple", "nice", "colourful",
        "single",
    ],
    "closer": ["closer", "in", "nearer", "forward", "towards the subject", "into the scene"],
    "away": ["away", "out", "back", "backwards", "further away", "away from the subject"],
}  # fmt: skip

TO = {
    "left": [
        "left", "left", "to the left", "to the left", "leftwards", "leftward", "towards the left",
        "toward the left side", "to left", "from right to left",
    ],
    "right": [
        "right", "right", "to the right", "to the right", "rightwards", "rightward", "towards the right",
        "toward the right side", "to right", "from left to right",
    ],
    "up": ["up", "up", "upwards", "upward", "to the top", "towards the top", "upwards", "from bottom to top"],
    "down": ["down", "down", "downwards", "downward", "to the bottom", "towards the bottom", "downwards",
             "from top to bottom"],
}  # fmt: skip

PAN = [
    "{pan} {to}", "{pan} {to}", "{camera} {slowly} {pans} {to} {across}", "{camera} {slowly} {pans} {to}",
    "{camera} {pans} {slowly} {to} {across}", "{slowly} {pan} {to}", "{pan} {slowly} {to} {across}",
    "a {slow} pan {to}", "{slow} camera pan {to} {across}", "{direction} pan", "camera {direction}",
    "{slow} {direction} camera movement", "{to} {pans} {camera}", "camera movement {to}", "{direction}",
    "pan shot {to}", "{camera} {pans} {across} {to}",
]  # fmt: skip

# Beside PAN: what is said of one direction only.
PAN_ONLY = {
    "left": ["truck left", "look left", "turn left", "look to the left"],
    "right": ["truck right", "look right", "turn right", "look to the right"],
    "up": [
        "tilt up", "{camera} tilts {to}", "{camera} {slowly} rises", "look up", "crane up", "camera rising",
        "the camera climbs", "{slowly} tilt {to}",
    ],
    "down": [
        "tilt down", "{camera} tilts {to}", "{camera} {slowly} sinks", "look down", "crane down",
        "camera descending", "the camera is lowered", "{slowly} tilt {to}",
    ],
}  # fmt: skip

CLOCKWISE = [
    "clockwise",
    "clockwise",
    "clockwise",
    "in a clockwise direction",
    "to the right side, clockwise",
]
COUNTERCLOCKWISE = [
    "counterclockwise", "counterclockwise", "counter-clockwise", "counter clockwise", "anticlockwise",
    "anti-clockwise", "in a counterclockwise direction",
]  # fmt: skip

TURN = [
    "rotate {round}", "rotate {round}", "rotate the picture {round}", "turn {round}", "spin {round}",
    "{picture} {slowly} rotates {round}", "{picture} {slowly} turns {round}",
    "{picture} {slowly} spins {round}",
    "{round} rotation", "{slow} {round} rotation", "rotating {round}", "{camera} rotates {round} {slowly}",
    "{slowly} rotate {round}", "rotation {round}", "{picture} is rotating {round}", "roll {round}",
]  # fmt: skip

CAMERA = {
    "zoom in": [
        "zoom in", "zoom in", "zoom in", "zooms in", "zooming in", "{slowly} zoom in",
        "{camera} {slowly} zooms in",
        "{camera} {slowly} moves {closer}", "{camera} {slowly} comes {closer}",
        "{camera} moves {slowly} closer",
        "a {slow} zoom in", "dolly in", "push in", "{camera} pushes in", "{slow} push in", "move closer",
        "{camera} approaches", "get closer", "go {closer}", "closer and closer", "zoom into the picture",
        "{camera} flies {closer}", "zoom in on the subject", "{picture} comes {closer}",
        "{picture} gets bigger",
        "magnify the picture", "zoom",
    ],
    "zoom out": [
        "zoom out", "zoom out", "zoom out", "zooms out", "zooming out", "{slowly} zoom out",
        "{camera} {slowly} zooms out", "{camera} {slowly} moves {away}", "{camera} {slowly} pulls {away}",
        "{camera} moves {slowly} backwards", "a {slow} zoom out", "dolly out", "pull back", "pull out",
        "{slow} pull back", "move back", "{camera} retreats", "go {away}", "further and further away",
        "zoom out of the picture", "{camera} flies {away}", "zoom out from the subject",
        "{picture} gets smaller", "wider and wider view",
    ],
    "still": [
        "still", "still", "static", "static shot", "static camera", "nothing moves", "the camera stays still",
        "{camera} does not move", "{camera} is still", "{camera} stays where it is", "no movement",
        "no motion",
        "no camera movement", "fixed camera", "locked camera", "still picture", "a still image", "hold still",
        "{picture} stays still", "{picture} does not move", "motionless", "everything stays as it is",
        "freeze", "a frozen picture", "stay", "do not move", "keep still", "steady shot without movement",
        "no change", "stand still",
    ],
}  # fmt: skip

SCENE = {
    "night": [
        "night falls", "night falls", "day to night", "day turns to night", "day turns into night",
        "it gets dark", "it {slowly} gets dark", "it is getting dark", "night comes", "nightfall",
        "the light {slowly} fades", "the sky {slowly} darkens", "dusk turns into night",
        "the sun goes down and it gets dark", "from day to night", "a time lapse from day to night",
        "the day ends and night begins", "it becomes night", "{slowly} it becomes dark", "darkness falls",
    ],
    "snow": [
        "it snows", "it snows", "snow falls", "snow falls {slowly}", "it is snowing", "snowfall",
        "it begins to snow", "it starts snowing", "snowflakes fall", "snowflakes drift down",
        "snow is falling", "heavy snow falls", "snow falls from the sky", "falling snow", "snowing",
        "winter comes and it snows", "{slowly} snow begins to fall", "large snowflakes", "let it snow",
    ],
    "waves": [
        "waves on the water", "waves on the water", "the water ripples", "the water {slowly} ripples",
        "waves run over the water", "the water moves in waves", "ripples on the water", "gentle waves",
        "the water is moving", "the sea moves", "rippling water", "the lake ripples", "small waves",
        "waves roll in", "the water sways", "waves run through the lower part", "moving water",
    ],
}  # fmt: skip

MOVE = [
    "{a} {thing} {slowly} {moves} {to}", "{a} {thing} {moves} {slowly} {to}", "{a} {thing} {moves} {to}",
    "{a} {thing} {moves} {to} {across}", "{a} {thing} {moving} {to}", "{thing} {to}",
    "{move} the {thing} {to}",
    "{to} {moves} {a} {thing}", "there is a {thing} that {moves} {to}", "{a} {thing} is {moving} {to}",
    "{thing}, {moving} {to}", "we see a {thing} {moving} {to}", "{moving} {to}: {a} {thing}",
]  # fmt: skip

# Beside MOVE: what is said of one direction only.
MOVE_ONLY = {
    "left": [],
    "right": [],
    "up": ["{a} {thing} rises", "{a} {thing} {slowly} climbs {to}", "{a} {thing} flies up into the sky"],
    "down": ["{a} {thing} falls", "{a} {thing} {slowly} sinks", "{a} {thing} drops {to}"],
}

ACTION = {
    "grow": [
        "{a} {thing} {slowly} grows", "{a} {thing} grows", "{a} {thing} gets bigger", "{thing} growing",
        "{a} {thing} becomes larger and larger", "{a} {thing} is getting bigger", "grow the {thing}",
        "{a} {thing} {slowly} swells", "{a} {thing} expands", "a growing {thing}",
    ],
    "shrink": [
        "{a} {thing} {slowly} shrinks", "{a} {thing} shrinks", "{a} {thing} gets smaller",
        "{thing} shrinking",
        "{a} {thing} becomes smaller and smaller", "{a} {thing} is getting smaller", "shrink the {thing}",
        "{a} {thing} {slowly} dwindles", "{a} {thing} contracts", "a shrinking {thing}",
    ],
    "bounce": [
        "{a} {thing} bounces", "{a} {thing} {slowly} bounces", "{a} {thing} is bouncing", "{thing} bouncing",
        "{a} {thing} bounces up and down", "{a} {thing} jumps up and down", "a bouncing {thing}",
        "{a} {thing} hops", "{a} {thing} keeps bouncing", "bounce the {thing}", "{a} {thing} jumps",
    ],
}  # fmt: skip

SHAPE_WORDS = {
    "circle": ["circle", "circle", "ball", "ball", "disc", "sphere", "dot"],
    "square": ["square", "square", "box", "block", "cube"],
    "triangle": ["triangle"],
}
COLOUR_WORDS = {"purple": ["purple", "purple", "violet"]}

# Said around the motion, and not to be obeyed. Movements of things that are not there are among them.
SCENES = [
    "a house by the sea", "mountains under a cloudy sky", "a quiet street", "the old harbour",
    "a girl with a hat", "a cat on a wooden table", "a lighthouse on a rocky coast", "a green meadow",
    "coloured shapes on a smooth background", "an abstract painting", "a city full of people",
    "a forest path",
    "the desert in the morning light", "flowers in a garden", "a cup of coffee beside a book",
    "a dog in the park",
    "a bridge over the river", "an astronaut in front of a rocket", "soft evening light",
    "a table with fruit",
    "a portrait of a woman", "a man walks through the rain", "clouds drift across the sky", "a landscape",
    "the wind blows over the rocks", "the girl waves and smiles", "gulls circle the tower",
    "a boat on the lake",
    "a train passes by", "leaves fall from the trees", "the sun behind the hills",
    "children play outside",
    "a red car in front of a blue door", "a white bird above the yellow fields",
    "the same scene as an oil painting",
    "a cat walks through the grass", "the beam sweeps over the water", "a photograph",
    "a drawing with bright colours",
    "an example picture", "a room with a window", "people in the park", "a mountain lake", "a portrait",
]  # fmt: skip
QUALITY = [
    "high quality", "4k", "8k, highly detailed", "cinematic", "masterpiece", "sharp focus", "realistic",
    "beautiful", "natural light", "wan2.1", "a video", "best quality", "smooth motion", "film grain",
    "professional photography", "warm colours", "calm mood", "16 fps", "short clip", "animation",
]  # fmt: skip

# Only the tokenizer sees these: words of other prompts, so that they do not fall into letters.
ENGLISH = [
    "a young woman with long dark hair turns around and looks at the viewer with a warm smile",
    "an old man with a white beard sits in his chair near the fireplace and reads a newspaper",
    "the little dog runs along the beach, jumps into the water and brings the stick back to its owner",
    "snow falls slowly on the roofs of the village while smoke comes out of every chimney",
    "a spaceship takes off from the surface of a distant planet, dust rising behind its engines",
    "the dancer spins around, her dress flowing in the wind, and then stands perfectly still",
    "cars and buses drive through the crowded city at night, their lights reflected in the wet street",
    "a close up of a hand that pours hot tea from a pot into a glass cup, steam in the air",
    "the horse gallops over the field, its mane blowing, with a thunderstorm in the background",
    "a robot opens its eyes, lifts its head and waves at the children in the room",
    "fireworks explode above the river and the crowd on the bridge is cheering",
    "time lapse of a flower that opens its petals, with bees flying from one blossom to another",
    "the fire burns brightly, sparks fly into the dark sky, and people dance around it",
    "aerial view of an island with palm trees, clear turquoise water and a small fishing boat",
    "a knight in silver armour draws his sword and walks towards the dragon in the cave",
    "the baby laughs, claps its hands and falls asleep in the arms of its mother",
    "a chef cuts vegetables in a modern kitchen, then puts them into a frying pan with oil",
    "the eagle spreads its wings and lands on top of a tall tree at the edge of the cliff",
    "two friends are talking and laughing at a table outside a restaurant in summer",
    "an animated character with huge green glasses is typing on a computer keyboard",
    "the moon shines through the window onto the bed, curtains move slightly in the breeze",
    "make this picture come alive, please: what happens next in this photo?",
    "camera follows the runner from behind, shallow depth of field, handheld, dramatic lighting, slow motion",
    "low angle wide shot, ultra realistic, vivid colors, golden hour, bokeh, depth, dynamic, epic",
    "black and white portrait, vintage style, watercolor painting, cartoon, anime, pixel art, oil on canvas",
]

# What people write as negative prompt, in our own graphs and elsewhere; to the model it says nothing.
NEGATIVES = [
    *workflow_texts("Negative prompt"),
    "blurry, low quality, deformed, overexposed, cluttered background, watermark, text",
    "worst quality, low quality, jpeg artifacts, ugly, bad hands, extra fingers, bad anatomy, distorted",
    "noise, artifacts, glitch, blur, bad quality, deformed hands, watermark, subtitles, grainy",
    "static, shaky camera, low quality, blurry details, subtitles, worst quality, still picture",
    "low quality",
    "blurry",
]


def camera_rules(name):
    """Phrases of one camera motion, and the table of their slots."""
    if name in CAMERA:
        return CAMERA[name], COMMON
    if name.startswith("pan "):
        direction = name.removeprefix("pan ")
        return PAN + 2 * PAN_ONLY[direction], COMMON | {"to": TO[direction], "direction": [direction]}
    turn = CLOCKWISE if name == "rotate clockwise" else COUNTERCLOCKWISE
    return TURN, COMMON | {"round": turn}


def object_rules(motion):
    """Phrases of what one shape does, and the table of their slots."""
    shapes = SHAPE_WORDS[motion.shape]
    colours = COLOUR_WORDS.get(motion.colour, [motion.colour])
    things = [f"{{big}} {colour} {shape}" for colour in colours for shape in shapes]
    if motion.name != "move":
        return ACTION[motion.name], COMMON | {"thing": things}
    slots = COMMON | {"to": TO[motion.direction], "thing": things}
    return MOVE + MOVE_ONLY[motion.direction], slots


def scene_rules(name):
    """Phrases of one change of a scene, and the table of their slots."""
    return SCENE[name], COMMON


def rules_of(motion):
    """Phrases of any motion, and the table of their slots."""
    if motion.kind == "object":
        return object_rules(motion)
    return (scene_rules if motion.kind == "scene" else camera_rules)(motion.name)


def expand(rules, slots, rng):
    """Draw a phrase and fill its slots until none is left."""
    text = rng.choice(rules)
    while "{" in text:
        text = re.sub(r"\{(\w+)\}", lambda match: rng.choice(slots[match[1]]), text)
    return re.sub(r"\s+([,:.])", r"\1", re.sub(r"\s+", " ", text)).strip()


def caption(motion, rng):
    """A way to ask for `motion`. `rng` is a `random.Random`."""
    text = expand(*rules_of(motion), rng)
    if motion.kind == "object" and rng.random() < 0.15:
        text = rng.choice(["{}. The camera stays still", "{}, static camera", "static shot: {}"]).format(text)
    return styled(decorated(text, rng), rng)


def decorated(text, rng):
    """Half of the prompts say more than the motion: a scene before it, wishes after it, or both."""
    before, after = rng.random(), rng.random()
    if before < 0.25:
        text = f"{rng.choice(SCENES)}{rng.choice([', ', '. ', ' and ', ', while ', ' | ', '; '])}{text}"
    elif before < 0.35:
        text = f"{rng.choice(QUALITY)}, {text}"
    if after < 0.15:
        text = f"{text}{rng.choice([', ', '. ', ' over ', ' in front of ', ' with '])}{rng.choice(SCENES)}"
    elif after < 0.3:
        text = f"{text}, {', '.join(rng.sample(QUALITY, rng.randint(1, 3)))}"
    return text


def styled(text, rng):
    """Full stops, exclamation marks, capitals."""
    text += rng.choice(["", "", "", "", ".", ".", ".", "!", " ...", ","])
    case = rng.random()
    if case < 0.4:
        return text[:1].upper() + text[1:]
    if case < 0.45:
        return text.upper()
    return text


def unconditional(rng):
    """A prompt that asks for nothing: mostly the empty one, else a negative prompt or a bare scene."""
    draw = rng.random()
    if draw < 0.6:
        return ""
    if draw < 0.9:
        return rng.choice(NEGATIVES)
    return styled(", ".join(rng.sample(SCENES + QUALITY, rng.randint(1, 3))), rng)


def canonical(motion):
    """The plain way to ask for `motion`, for evaluation and demonstrations."""
    if motion.kind == "scene":
        return SCENE[motion.name][0]
    if motion.kind == "camera":
        return {"still": "static shot, nothing moves"}.get(motion.name, motion.name)
    action = f"moves {motion.direction}" if motion.name == "move" else f"{motion.name}s"
    return f"a {motion.colour} {motion.shape} {action}"
