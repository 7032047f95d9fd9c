// The editor shows the tooltips of a group's settings (`cache.multiplier`) as the server sends them, in English.
// Here they get the sentence of the user's language, from `locales/<code>/nodeDefs.json`, where there is one.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const PACK = decodeURIComponent(new URL(import.meta.url).pathname).split("/").at(-2);
let translations; // {language: {nodeDefs: {node: {inputs: {group_setting: {tooltip}}}}}}

async function inputsInTheUsersLanguage(node) {
    translations ??= api.getCustomNodesI18n();
    return (await translations)[app.ui.settings.getSettingValue("Comfy.Locale")]?.nodeDefs?.[node]?.inputs;
}

app.registerExtension({
    name: `${PACK}.tooltips`,
    async beforeRegisterNodeDef(_, { name, python_module, input }) {
        if (python_module !== `custom_nodes.${PACK}`) return;
        const translated = await inputsInTheUsersLanguage(name);
        for (const [group, [, { options } = {}]] of Object.entries(translated ? (input.optional ?? {}) : {}))
            for (const { inputs } of options ?? [])
                for (const [setting, [, about]] of Object.entries(inputs?.optional ?? {}))
                    about.tooltip = translated[`${group}_${setting}`]?.tooltip ?? about.tooltip;
    },
});
