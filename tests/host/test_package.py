"""What the registry gets: `comfy node validate` and `comfy node pack`, and a host with the package."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from lib.host_server import HostServer
from lib.pack import LINK_NAME, ROOT, comfyui_path
from PIL import Image

NEEDED = {"nodes", "host", "wan", "server", "workers", "frames", "net", "web", "models", "workflows", "docs"}
OPTIONAL = {"locales", "subgraphs"}
FILES = {"__init__.py", "extension.py", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"}
SCRIPTS = {"calibrate_teacache.py", "lib/__init__.py", "lib/local_job.py", "lib/pack.py"}
NODE_IDS = {path.stem for path in (ROOT / "web" / "docs").glob("*.md")}
MOST_BYTES = 40 * 2**20
LINK = re.compile(r"(?:\]\(|`)((?:docs|workflows|web)/[\w./-]+)")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A git checkout of the pack as it is now; comfy-cli packs what git knows."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout, so what is packed is not known")
    folder = tmp_path_factory.mktemp("checkout")
    names = _run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    _run("git", "init", "-q", cwd=folder)
    _run("git", "add", "-A", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def comfy(checkout, tmp_path_factory):
    """Runs comfy-cli in the checkout, with no folder of the user's and nothing sent. -> what it says"""
    pytest.importorskip("comfy_cli", reason="comfy-cli is not installed")
    program = Path(sys.executable).with_name("comfy")
    home = tmp_path_factory.mktemp("home")
    quiet = {"HOME": str(home), "USERPROFILE": str(home), "XDG_CONFIG_HOME": str(home), "DO_NOT_TRACK": "1"}

    def run(*args):
        options = ("--skip-prompt", "--no-enable-telemetry")
        return _run(str(program), *options, *args, cwd=checkout, env=os.environ | quiet)

    return run


@pytest.fixture(scope="module")
def package(comfy, checkout, tmp_path_factory):
    """The package, unpacked into a folder named as the registry installs it."""
    comfy("node", "pack")
    folder = tmp_path_factory.mktemp("base") / "custom_nodes" / project_name()
    assert (checkout / "node.zip").stat().st_size < MOST_BYTES
    with zipfile.ZipFile(checkout / "node.zip") as archive:
        archive.extractall(folder)
    return folder


def test_it_is_valid(comfy):
    said = comfy("node", "validate")
    assert "All validation checks passed" in said
    assert "Warning" not in said, said


def test_the_package_holds_what_a_user_needs_and_nothing_else(package):
    found = {path.name for path in package.iterdir()}
    assert found >= NEEDED | FILES
    assert found - NEEDED - FILES - OPTIONAL == {"scripts"}
    scripts = package / "scripts"
    packed = {path.relative_to(scripts).as_posix() for path in scripts.rglob("*") if path.is_file()}
    assert packed == SCRIPTS
    for folder in NEEDED | OPTIONAL:
        here = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if _is_source(path)}
        there = {path.relative_to(package) for path in (package / folder).rglob("*") if path.is_file()}
        assert here - there <= {Path("docs/icon.png"), Path("docs/banner.png")}
        assert there <= here


def test_what_the_pages_name_is_in_the_package(package):
    pages = [package / "README.md", *(package / "docs").glob("*.md"), *(package / "web").rglob("*.md")]
    named = {name for page in pages for name in LINK.findall(page.read_text(encoding="utf-8"))}
    assert "docs/job-api.md" in named
    assert [name for name in sorted(named) if not (package / name.rstrip("./")).exists()] == []


def test_the_script_for_users_starts(package):
    environment = os.environ | {"COMFYUI_PATH": str(comfyui_path())}
    script = package / "scripts" / "calibrate_teacache.py"
    assert "--text-encoder" in _run(sys.executable, str(script), "--help", cwd=package, env=environment)


def test_a_host_with_the_package_knows_its_nodes(package):
    with HostServer(package.parents[1], link=False) as server:
        nodes = server.client.object_info()
        assert nodes.keys() >= NODE_IDS
        assert {nodes[name]["python_module"] for name in NODE_IDS} == {f"custom_nodes.{LINK_NAME}"}
        models = nodes["Wan21ModelLoader"]["input"]["required"]["model_name"][1]["options"]
        assert "wan21-tiny-i2v.safetensors" in models
        assert set(server.client.get("/api/workflow_templates")[LINK_NAME])


def test_the_publishers_place_gives_all_that_the_registry_shows(checkout, tmp_path, monkeypatch):
    """Filled in as its first line says."""
    parser = pytest.importorskip("comfy_cli.registry.config_parser")
    text = (checkout / "pyproject.toml").read_text(encoding="utf-8")
    before, _, rest = text.partition("# --- For who publishes")
    _, place, after = re.split(r"(?<=\n)(?=PublisherId)|(?<=\n)# --- ---\n", rest)
    filled = place.replace("\n# ", "\n").replace("OWNER/REPO", "someone/pack")
    path = tmp_path / "pyproject.toml"
    path.write_text(f"{before}{filled}{after}", encoding="utf-8")
    config = parser.extract_node_configuration(str(path))
    assert "OWNER" not in filled and after
    assert config.project.urls.repository == "https://github.com/someone/pack"
    assert all((config.project.urls.documentation, config.project.urls.issues))
    assert config.project.supported_os == ["OS Independent"]
    assert config.project.supported_accelerators == ["GPU :: NVIDIA CUDA"]
    for address, size in ((config.tool_comfy.icon, (400, 400)), (config.tool_comfy.banner_url, (1260, 540))):
        name = address.removeprefix("https://raw.githubusercontent.com/someone/pack/main/")
        assert Image.open(ROOT / name).size == size
        assert (ROOT / name).stat().st_size < 100_000


def test_the_folder_of_a_checkout_has_the_name_of_the_package():
    """Graphs shared from either then ask for the same pack."""
    assert project_name() == LINK_NAME


def project_name():
    """The id of the pack at the registry."""
    return re.search(r'^name = "(.+?)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[
        1
    ]


def _is_source(path):
    return path.is_file() and path.suffix != ".pyc"


def _run(*command, cwd, env=None):
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{command} says:\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr
