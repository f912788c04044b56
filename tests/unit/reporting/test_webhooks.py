"""Messages to addresses: what arrives, what never ends a run, and that no address is shown."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from simpletuner.helpers.configuration.schema.tracking import WebhookConfig
from simpletuner.helpers.reporting import webhooks as module
from simpletuner.helpers.reporting.trackers import Trackers
from simpletuner.helpers.reporting.webhooks import Message, Webhook
from tests.receiver import TOKEN, Receiver, receiving


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


def webhook(url: str, **keys: object) -> Webhook:
    values = {"webhook_type": "raw", "webhook_url": url, **keys}
    return Webhook(WebhookConfig(**values), name="my run")


def test_raw_gets_a_json_object(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(module.JOB_VARIABLE, "job 7")
    webhook(receiver.url).send(Message(kind="checkpoint", text="Saved", step=5))
    ((path, headers, _),) = receiver.requests
    assert path == f"/{TOKEN}"
    assert headers["Content-Type"] == "application/json"
    assert headers["User-Agent"].startswith("simpletuner/")
    (sent,) = receiver.objects()
    assert "T" in str(sent.pop("timestamp"))
    assert sent == {
        "message_type": "checkpoint",
        "severity": "info",
        "message": "Saved",
        "prefix": "my run",
        "step": 5,
        "images": {},
        "job_id": "job 7",
    }


def test_discord_gets_a_text_and_its_images(receiver: Receiver, tmp_path: Path) -> None:
    images = {}
    for index, name in enumerate(("grid", "cat")):
        images[name] = tmp_path / f"{name}.png"
        images[name].write_bytes(bytes([index, 13, 10]) * 50)
    webhook(receiver.url, webhook_type="discord", message_prefix="cats").log_images(20, images)
    ((_, headers, body),) = receiver.requests
    kind, _, boundary = headers["Content-Type"].partition("; boundary=")
    assert kind == "multipart/form-data"
    start, *parts, end = body.split(f"--{boundary}".encode())
    assert (start, end) == (b"", b"--\r\n")
    content = json.loads(parts[0].split(b"\r\n\r\n")[1])
    assert content["content"] == "`(cats)` Validation of step 20"
    assert content["allowed_mentions"] == {"parse": []}
    for index, (part, name) in enumerate(zip(parts[1:], images, strict=True)):
        head, _, data = part.partition(b"\r\n\r\n")
        assert f'name="files[{index}]"; filename="{name}.png"'.encode() in head
        assert data == images[name].read_bytes() + b"\r\n"


def test_discord_gets_no_more_than_it_takes(receiver: Receiver, tmp_path: Path) -> None:
    images = {f"{index}": tmp_path / f"{index}.png" for index in range(12)}
    for file in images.values():
        file.write_bytes(b"x")
    images["3"].write_bytes(bytes(module.MOST_FILE_BYTES))
    hook = webhook(receiver.url, webhook_type="discord")
    hook.log_images(1, images)
    assert receiver.requests[0][2].count(b"filename=") == 10
    hook.send(Message(kind="error", text="x" * 3000, step=1, level="error"))
    assert len(json.loads(receiver.requests[1][2])["content"]) == module.LONGEST_CONTENT


@pytest.mark.parametrize(
    ("log_level", "sent"),
    [("debug", ["start", "error"]), ("info", ["start", "error"]), ("error", ["error"]), ("critical", [])],
)
def test_the_level_selects_the_messages(receiver: Receiver, log_level: str, sent: list[str]) -> None:
    hook = webhook(receiver.url, log_level=log_level)
    hook.send(Message(kind="start", text="x", step=0))
    hook.send(Message(kind="error", text="x", step=0, level="error"))
    assert [each["message_type"] for each in receiver.objects()] == sent


@pytest.mark.parametrize("status", [400, 404, 429, 500, 302])
def test_a_refusal_is_one_warning_without_the_address(
    receiver: Receiver, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.status, receiver.location = status, receiver.url
    hook = webhook(receiver.url)
    for step in range(3):
        hook.send(Message(kind="checkpoint", text="x", step=step))
    assert len(receiver.requests) == 3, "a redirect is not followed, and the next message is tried"
    assert len(caplog.messages) == 1
    assert str(status) in caplog.text
    assert TOKEN not in caplog.text


@pytest.mark.parametrize("url", [f"http://127.0.0.1:9/{TOKEN}", f"https://a b/{TOKEN}", f"http://[x/{TOKEN}"])
def test_an_address_that_cannot_be_reached_is_one_warning(url: str, caplog: pytest.LogCaptureFixture) -> None:
    config = WebhookConfig.model_construct(
        webhook_type="raw", webhook_url=url, log_level="info", message_prefix=None
    )
    Webhook(config, name="run").send(Message(kind="start", text="x", step=0))
    assert len(caplog.messages) == 1
    assert TOKEN not in caplog.text
    assert TOKEN not in repr(config)


def test_a_missing_image_costs_its_message_alone(receiver: Receiver, tmp_path: Path) -> None:
    hook = webhook(receiver.url, webhook_type="discord")
    hook.log_images(1, {"grid": tmp_path / "gone.png"})
    hook.send(Message(kind="end", text="x", step=2))
    assert len(receiver.requests) == 1


def test_trackers_hand_messages_and_images_to_webhooks_and_steps_to_none(
    receiver: Receiver, tmp_path: Path
) -> None:
    (tmp_path / "grid.png").write_bytes(b"png")
    with Trackers(None, webhooks=[webhook(receiver.url)]) as trackers:
        trackers.notify(Message(kind="start", text="x", step=0))
        trackers.log_images(2, {"grid": tmp_path / "grid.png"})
        trackers.notify(Message(kind="end", text="x", step=4))
    sent = [(each["message_type"], each["step"], each["images"]) for each in receiver.objects()]
    assert sent == [
        ("start", 0, {}),
        ("validation", 2, {"grid": str(tmp_path / "grid.png")}),
        ("end", 4, {}),
    ]


def test_a_webhook_that_hangs_holds_no_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()
    hook = webhook("http://127.0.0.1:9/x")
    monkeypatch.setattr(Webhook, "send", lambda *_: released.wait())
    with Trackers(None, webhooks=[hook], timeout_s=0.05) as trackers:
        for step in range(3):
            trackers.notify(Message(kind="checkpoint", text="x", step=step))
    released.set()
    assert "3 messages" in caplog.text
