"""Set-up unpacks nothing but ComfyUI and leaves what a user has in custom_nodes alone."""

import io
import tarfile

import pytest
import setup_host
from lib import pack
from lib.pack import ROOT


def test_unpack_writes_comfyui_only(tmp_path):
    archive = tmp_path / "archive.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in (
            "p-1/vendor/ComfyUI/comfy/ops.py",
            "p-1/setup.py",
            "p-1/vendor/ComfyUI/../../../evil.py",
        ):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
        link = tarfile.TarInfo("p-1/vendor/ComfyUI/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    setup_host._unpack(archive, tmp_path / "out" / "ComfyUI")
    files = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if not p.is_dir()]
    assert sorted(files) == ["archive.tar.gz", "out/ComfyUI/comfy/ops.py"]


def test_link_is_made_once(tmp_path):
    link = pack.link_pack(tmp_path)
    assert link.name == pack.LINK_NAME
    assert pack.link_pack(tmp_path) == link
    assert [entry.resolve() for entry in tmp_path.iterdir()] == [ROOT]


def test_pack_under_another_name_is_left(tmp_path):
    own = tmp_path / "my-wan"
    own.symlink_to(ROOT)
    assert pack.link_pack(tmp_path) == own
    assert list(tmp_path.iterdir()) == [own]


def test_dead_link_is_replaced(tmp_path):
    (tmp_path / pack.LINK_NAME).symlink_to(tmp_path / "gone")
    assert pack.link_pack(tmp_path).resolve() == ROOT


def test_another_copy_is_refused(tmp_path):
    (tmp_path / pack.LINK_NAME).mkdir()
    with pytest.raises(SystemExit, match="another copy"):
        pack.link_pack(tmp_path)
