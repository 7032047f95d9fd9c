"""Run the quick start in the real editor and write what is seen: `docs/editor.png`, `docs/app.png`.

python scripts/make_editor_picture.py    # needs a Chromium
"""

import json
import sys
import tempfile
from pathlib import Path

from lib import pack

pack.load_pack()
pack.load_host()

from lib.editor import NODES_2, load_graph, open_editor  # noqa: E402
from lib.host_server import HostServer  # noqa: E402
from lib.scenes import SCENES, small  # noqa: E402

GRAPHS = {"editor": "Wan2.1 - quick start", "app": "Wan2.1 - quick start.app"}
SCENE, SIDE = "bay", 512
SCREEN = {"width": 1600, "height": 900}
SETTLED_MS = 3000
RUN = """async () => {
    const ended = new Promise(done => {
        for (const end of ["execution_success", "execution_error"])
            app.api.addEventListener(end, event => done([end, event.detail.exception_message]))
    })
    await app.queuePrompt(0)
    return await ended
}"""


def main():
    """Write both pictures."""
    with tempfile.TemporaryDirectory() as folder, HostServer(folder) as server:
        picture = Path(folder) / f"{SCENE}.png"
        small(SCENES[SCENE](), SIDE).save(picture)
        image = server.client.upload_image(picture)
        for name, source in GRAPHS.items():
            graph = json.loads((pack.ROOT / "workflows" / f"{source}.json").read_text(encoding="utf-8"))
            [start] = [node for node in graph["nodes"] if node["title"] == "Start image"]
            start["widgets_values"][0] = image
            with open_editor(server.url, settings=NODES_2) as page:
                page.set_viewport_size(SCREEN)
                load_graph(page, graph, source)
                page.wait_for_timeout(SETTLED_MS)
                end, message = page.evaluate(RUN)
                if end != "execution_success":
                    sys.exit(f"{source}: {message}")
                if name == "editor":
                    page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
                page.wait_for_timeout(SETTLED_MS)
                page.screenshot(path=str(pack.ROOT / "docs" / f"{name}.png"))


if __name__ == "__main__":
    main()
