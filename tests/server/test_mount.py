"""A host on which the API cannot be served still gets the nodes, and a reason in its log."""

import asyncio
import importlib
import logging
import sys

import pytest
import wan21.server
from aiohttp.test_utils import TestClient, TestServer


def test_the_log_says_why(monkeypatch, caplog):
    monkeypatch.delitem(sys.modules, "wan21.host.queue", raising=False)
    monkeypatch.setitem(sys.modules, "execution", None)  # as on a host without this module
    with caplog.at_level(logging.WARNING):
        wan21.server.mount()
    assert "the API is not served: ModuleNotFoundError: " in caplog.text and "execution" in caplog.text


@pytest.mark.parametrize("proxy, said", [(None, "WAN21_STATIONS is 'two'"), ("1.2.3.4", "its log says why")])
def test_a_wrong_setting_is_told_to_who_asks(monkeypatch, caplog, proxy, said):
    mounted = {}

    class Host:
        weight_formats = None

        def mount(self, prefix, app):
            mounted[prefix] = app

    monkeypatch.setenv("WAN21_STATIONS", "two")
    # By its name alone one may get what another test has taken out of sys.modules.
    monkeypatch.setattr(importlib.import_module("wan21.host.queue"), "Host", Host)
    wan21.server.mount()
    assert "the API is not served: ValueError: WAN21_STATIONS is 'two'" in caplog.text

    async def ask():
        async with TestClient(TestServer(mounted["/wan21"])) as client:
            headers = {"X-Forwarded-For": proxy} if proxy else {}
            answers = [
                await client.get("/tasks/x", headers=headers),
                await client.post("/apps/run", headers=headers),
            ]
            return [(one.status, (await one.json())["detail"]) for one in answers]

    for status, detail in asyncio.run(ask()):
        assert status == 503 and said in detail
