"""Reads webhook_config: one webhook or a list of them."""

from __future__ import annotations

from dataclasses import replace

from pydantic import JsonValue

from simpletuner.helpers.configuration.loading.building import Source, build
from simpletuner.helpers.configuration.schema.tracking import WebhookConfig
from simpletuner.helpers.configuration.text.problems import unknown_key
from simpletuner.helpers.io.redaction import SHORTEST_SECRET, hide

_URL, _CALLBACK = "webhook_url", "callback_url"


def read_webhooks(content: JsonValue, source: Source) -> tuple[WebhookConfig, ...]:
    """Check webhooks; notes every problem, and shows no address."""
    entries = content if isinstance(content, list) else [content]
    webhooks = []
    for index, entry in enumerate(entries):
        own = replace(source, prefix=f"[{index}]." if isinstance(content, list) else "")
        if not isinstance(entry, dict):
            hide_address(entry)
            own.add("", "must be an object, {...}, with webhook_type and webhook_url.")
            continue
        for key in (_URL, _CALLBACK):
            hide_address(entry.get(key), surely=True)
        values = {_URL if key == _CALLBACK else key: value for key, value in entry.items()}
        if _URL in entry and _CALLBACK in entry:
            own.add(_CALLBACK, "is another name of webhook_url. Keep one.")
        for key in values.keys() - WebhookConfig.model_fields.keys():
            own.add(key, unknown_key(key, WebhookConfig.model_fields))
        known = {key: value for key, value in values.items() if key in WebhookConfig.model_fields}
        if webhook := build(WebhookConfig, known, own).section:
            webhooks.append(webhook)
    return tuple(webhooks)


def hide_address(value: JsonValue, *, surely: bool = False) -> None:
    """Keep an address out of messages: a text with ://, or any that is surely meant as one."""
    for each in value if isinstance(value, list) else ():
        hide_address(each, surely=surely)
    if isinstance(value, str) and ("://" in value or (surely and len(value) >= SHORTEST_SECRET)):
        hide(value, "{webhook_url}")
