// What a node says about its run: the classic renderer shows two lines of it and hides the rest behind a scroll
// bar. Nodes of this pack get the height that their words need. Nodes 2.0 sees to it itself.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const PACK = decodeURIComponent(new URL(import.meta.url).pathname).split("/").at(-2);
const WIDGET = "$$node-text-preview"; // the editor's name for the words below a node's inputs
const LINE_PX = 16;
const BESIDE_PX = 52; // between the node's edges and the words, as drawn by the editor
const ABOVE_AND_BELOW_PX = 36;
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

function heightOf(text, width) {
    const pen = document.createElement("canvas").getContext("2d");
    pen.font = `12px ${getComputedStyle(document.body).fontFamily}`;
    const lines = text.split("\n").map((line) => Math.max(1, Math.ceil(pen.measureText(line).width / width)));
    return Math.min(MOST_PX, LINE_PX * lines.reduce((a, b) => a + b) + ABOVE_AND_BELOW_PX);
}

api.addEventListener("progress_text", ({ detail: { nodeId, text } }) =>
    requestAnimationFrame(() => {
        const node = nodeOf(nodeId);
        const words = node?.widgets?.find((widget) => widget.name === WIDGET);
        if (!words?.options || node.constructor.nodeData?.python_module !== `custom_nodes.${PACK}`) return;
        words.options.getMinHeight = () => heightOf(text, node.size[0] - BESIDE_PX);
        node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
    }),
);
