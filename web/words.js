// What the sampler says about its run: the classic renderer shows two lines of it and hides the rest behind a
// scroll bar. It gets the height that its words need; our graphs have the room below it. Other nodes stay as they
// are, since they would grow over the next one. Nodes 2.0 sees to it itself.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const WIDGET = "$$node-text-preview"; // the editor's name for the words below a node's inputs
const pen = document.createElement("canvas").getContext("2d"); // measures text
const LINE_PX = 16;
const LETTER_PX = 10;
const BESIDE_PX = 52; // between the node's edges and the words, as drawn by the editor
const ABOVE_AND_BELOW_PX = 42;
const MOST_PX = 200; // the editor scrolls what is higher

function nodeOf(path) {
    let graph = app.rootGraph ?? app.graph;
    let node;
    for (const id of String(path).split(":")) {
        node = graph?.getNodeById(id);
        graph = node?.subgraph;
    }
    return node;
}

// Of words that break anywhere, so that the last letter of a line may leave a gap.
function heightOf(text, width) {
    const lines = text
        .split("\n")
        .map((line) => Math.max(1, Math.ceil(pen.measureText(line).width / (width - LETTER_PX))));
    return Math.min(MOST_PX, LINE_PX * lines.reduce((a, b) => a + b) + ABOVE_AND_BELOW_PX);
}

api.addEventListener("progress_text", ({ detail: { nodeId, text } }) =>
    requestAnimationFrame(() => {
        const node = nodeOf(nodeId);
        const words = node?.widgets?.find((widget) => widget.name === WIDGET);
        if (!words?.options || node.comfyClass !== "Wan21Sampler") return;
        pen.font = `12px ${getComputedStyle(document.body).fontFamily}`;
        // Asked for at every drawing of the node, which may have been made wider or narrower.
        words.options.getMinHeight = () => heightOf(text, node.size[0] - BESIDE_PX);
        node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
    }),
);
