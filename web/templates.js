// The template browser shows a pack's graphs in the order in which the server's folder happens to list them,
// which on most Linux systems is none. Ours come by name: the quick start first. Other packs' stay as they are.
import { api } from "../../scripts/api.js";

const PACK = decodeURIComponent(new URL(import.meta.url).pathname).split("/").at(-2);
const listed = api.getWorkflowTemplates;

if (listed) {
    api.getWorkflowTemplates = async function () {
        const templates = await listed.call(this);
        templates[PACK]?.sort();
        return templates;
    };
}
