"""`make demo` but for starting and stopping a server of its own."""

import sys

import demo
from lib.contact_sheet import contact_sheet, read_frames


def test_the_demo_makes_a_video_and_its_contact_sheet(client, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    monkeypatch.setenv("STEPS", "2")
    options = demo.arguments()
    assert options.steps == 2 and options.image.is_file()
    video = tmp_path / "demo.mp4"
    video.write_bytes(demo.make_video(client, options))
    frames = read_frames(video)
    assert [frame.size for frame in frames] == [(96, 96)] * 17
    sheet = contact_sheet(frames)
    assert sheet.size == (4 * 96 + 3 * 4, 3 * 96 + 2 * 4)
    assert sheet.getpixel((5, 5)) == frames[0].getpixel((5, 5))
