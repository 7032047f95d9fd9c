"""A host on which the API cannot be served still gets the nodes, and a reason in its log."""

import logging
import sys

import wan21.server


def test_the_log_says_why(monkeypatch, caplog):
    monkeypatch.delitem(sys.modules, "wan21.host.queue", raising=False)
    monkeypatch.setitem(sys.modules, "execution", None)  # as on a host without this module
    with caplog.at_level(logging.WARNING):
        wan21.server.mount()
    assert "the API is not served: ModuleNotFoundError: " in caplog.text and "execution" in caplog.text
