"""Pickles that run no code, and would keep their reader busy for years or end the process."""

import pytest
import torch
from helpers_hostile import archive, tuples
from wan21.wan.files import read_checkpoint

CALLED = b"\x80\x02ccollections\nCounter\ncbuiltins\nbytearray\n\x8a\x05" + bytes(4) + b"\x01\x85R\x85R."
HARMFUL = {  # torch's reader had hashed the first for years, and the second had ended the process
    "a key that takes years to hash": (tuples(60, 2), False, "a tuple in it holds more than 1000 values"),
    "a key as deep as the stack": (
        b"\x80\x02})" + b"\x85" * 900_000 + b"K\x01s.",
        False,
        "holds more than 1000",
    ),
    "four billion zeros counted": (CALLED, False, r"more than plain tensors by name \(collections Counter\)"),
    "wide tuples": (tuples(4, 200), False, "a tuple in it holds more than 1000 values"),
    "packed": (b"\x80\x02" + b"N0" * 10**6 + b"}.", True, "its pickle is packed or has over 1000000 bytes"),
    "large": (b"\x80\x02" + b"N0" * 10**6 + b"}.", False, "its pickle is packed or has over 1000000 bytes"),
    "more taken than there is": (b"\x80\x02\x86.", False, "truncated or damaged"),
    "no mark": (b"\x80\x02t.", False, "truncated or damaged"),
    "what is not in the memo": (b"\x80\x02h\x07.", False, "truncated or damaged"),
    "an opcode of none": (b"\x80\x02\xff.", False, "truncated or damaged"),
    "a newer opcode": (b"\x80\x04}\x94.", False, r"more than plain tensors by name \(MEMOIZE\)"),
    "no end": (b"\x80\x02}", False, "truncated or damaged"),
}


@pytest.mark.parametrize("case", HARMFUL)
def test_a_harmful_pickle_is_not_given_to_its_reader(case, tmp_path, monkeypatch):
    raw, packed, words = HARMFUL[case]
    path = tmp_path / "Wan2.1_VAE.pth"
    path.write_bytes(archive(raw, packed))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=rf"^Wan2\.1_VAE\.pth: .*{words}.*\.$"):
        read_checkpoint(path)
