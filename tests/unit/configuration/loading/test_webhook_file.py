"""webhook_config: a file or the object itself; an address is shown nowhere."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Workspace

URL = "https://discord.example/api/webhooks/1/a-token-that-nobody-may-see"
DISCORD = {"webhook_type": "discord", "webhook_url": URL, "message_prefix": "cats", "log_level": "error"}
RAW = {"webhook_type": "raw", "callback_url": "http://127.0.0.1:8000/x"}


def test_a_file_may_hold_one_or_several(workspace: Workspace) -> None:
    workspace.text("one.json", json.dumps(DISCORD))
    workspace.text("two.json", json.dumps([DISCORD, RAW]))
    (only,) = workspace.load(webhook_config="one.json").tracking.webhooks
    assert (only.webhook_type, only.webhook_url) == ("discord", URL)
    assert (only.message_prefix, only.log_level) == ("cats", "error")
    first, second = workspace.load(webhook_config="two.json").tracking.webhooks
    assert first == only
    assert (second.webhook_type, second.webhook_url) == ("raw", RAW["callback_url"])
    assert (second.message_prefix, second.log_level) == (None, "info")
    assert workspace.load(webhook_config=None).tracking.webhooks == ()


def test_the_object_itself_is_used_and_written_nowhere(workspace: Workspace) -> None:
    config = workspace.load(webhook_config=DISCORD)
    assert config.tracking.webhooks[0].webhook_url == URL
    resolved = config.resolved()
    assert URL not in json.dumps(resolved)
    assert (resolved["webhook_config"], "webhooks" in resolved) == (None, False)
    assert URL not in repr(config)


def test_a_file_is_named_in_the_resolved_configuration(workspace: Workspace) -> None:
    path = workspace.text("one.json", json.dumps(DISCORD))
    resolved = workspace.load(webhook_config="one.json").resolved()
    assert resolved["webhook_config"] == str(path)
    assert URL not in json.dumps(resolved)


def test_an_address_may_come_from_the_environment(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_HOOK", URL)
    workspace.text("one.json", json.dumps(DISCORD | {"webhook_url": "{env:TOY_HOOK}"}))
    assert workspace.load(webhook_config="one.json").tracking.webhooks[0].webhook_url == URL


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (DISCORD | {"webhook_type": "slack"}, "webhook_type"),
        ({"webhook_url": URL}, "webhook_type"),
        ({"webhook_type": "raw"}, "webhook_url"),
        (DISCORD | {"webhook_url": "discord.example/1/a-token-that-nobody-may-see"}, "webhook_url"),
        (DISCORD | {"webhook_url": "ftp://discord.example/a-token-that-nobody-may-see"}, "webhook_url"),
        (DISCORD | {"webhook_url": ["a-token-that-nobody-may-see"]}, "webhook_url"),
        (DISCORD | {"callback_url": URL}, "callback_url"),
        (DISCORD | {"log_level": "loud"}, "log_level"),
        (DISCORD | {"log_levle": "info"}, "log_levle"),
        ([DISCORD, DISCORD | {"log_level": "loud"}], "[1].log_level"),
        ([URL], "{...}"),
    ],
)
def test_a_mistake_is_named_without_the_address(
    workspace: Workspace, content: dict[str, object], key: str
) -> None:
    workspace.text("hook.json", json.dumps(content))
    for value in ("hook.json", content):
        message = workspace.problems(webhook_config=value)
        assert key in message
        assert "a-token" not in message


def test_an_address_as_the_key_is_refused_and_not_shown(workspace: Workspace) -> None:
    message = workspace.problems(webhook_config=URL)
    assert "webhook_config  " in message
    assert "a-token" not in message
