"""Uploading an output folder to a hub on the loopback, through the ordinary client."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils._http import default_client_factory
from safetensors import safe_open
from safetensors.torch import load_file

from simpletuner.helpers.errors import ConfigError, PublishError
from simpletuner.helpers.io.faults import StorageError
from simpletuner.helpers.io.lock import run_lock
from simpletuner.helpers.models.registry import specs
from simpletuner.helpers.publishing import hub as client
from simpletuner.helpers.publishing.publish import Published, publish
from simpletuner.helpers.publishing.uploads import Uploads
from tests.hub_server import TOKEN, HubServer
from tests.unit.publishing.conftest import write_adapter, write_run

NAME = "somebody/simpletuner"
ADAPTER = "pytorch_lora_weights.safetensors"
EMA = "pytorch_lora_weights.ema.safetensors"


def upload(run: Path, *, repository: str | None = None, public: bool = False) -> Published:
    return publish(run, families=specs(), repository=repository, public=public)


def checkpoint(run: Path, step: int) -> Uploads:
    """A checkpoint that waits for its upload."""
    write_adapter(run / f"checkpoint-{step}" / ADAPTER, value=step, steps=step)
    uploads = Uploads(output_dir=run, is_enabled=True, with_checkpoints=True)
    uploads.add_checkpoint(step)
    return uploads


def test_a_finished_run_is_uploaded_whole_and_once(run: Path, server: HubServer) -> None:
    published = upload(run)
    repo = server.repos[NAME]
    assert repo.private
    assert set(published.files) == repo.files.keys()
    assert repo.files.keys() == {
        "README.md",
        "config.resolved.json",
        "grids/step-2.png",
        "grids/step-4.png",
        "images/00.png",
        "images/01.png",
        "images/grid.png",
        "lycoris_config.json",
        ADAPTER,
    }
    assert repo.files["README.md"] == (run / "model-card" / "README.md").read_bytes()
    assert upload(run).files == ()
    assert len(repo.commits) == 1
    assert not [path for path in (run / "hub").iterdir() if path.is_dir()]


def test_files_of_an_average_are_uploaded_with_those_beside_them(tmp_path: Path, server: HubServer) -> None:
    run = write_run(tmp_path / "run", use_ema=True)
    exports = [name.replace("weights", "weights_comfyui") for name in (ADAPTER, EMA)]
    for value, name in enumerate([EMA, *exports], start=2):
        write_adapter(run / name, value=value)
    write_adapter(run / "checkpoint-2" / EMA, value=7)
    checkpoint(run, 2)
    sent = set(upload(run).files)
    assert {ADAPTER, EMA, *exports, f"checkpoint-2/{ADAPTER}", f"checkpoint-2/{EMA}"} <= sent
    assert not (run / "hub" / "checkpoint-2").exists()


def test_average_that_a_run_no_longer_keeps_is_not_uploaded(tmp_path: Path, server: HubServer) -> None:
    run = write_run(tmp_path / "run", use_ema=False)
    write_adapter(run / EMA)
    assert EMA not in upload(run).files


def test_only_what_changed_is_uploaded_again(run: Path, server: HubServer) -> None:
    upload(run)
    write_adapter(run / ADAPTER, value=2.0, steps=8)
    (run / "pytorch_lora_weights_comfyui.safetensors").write_bytes((run / ADAPTER).read_bytes())
    assert set(upload(run).files) == {ADAPTER, "pytorch_lora_weights_comfyui.safetensors", "README.md"}
    assert len(server.repos[NAME].commits) == 2


def test_nothing_of_this_machine_is_in_what_is_sent(run: Path, server: HubServer, tmp_path: Path) -> None:
    checkpoint(run, 2)
    upload(run)
    sent = b"".join([*server.bodies, *server.repos[NAME].files.values()])
    for private in (str(tmp_path), "/private", TOKEN, f"{Path.home()}/"):
        assert private.encode() not in sent, private
    for name in ("README.md", "config.resolved.json"):
        text = server.repos[NAME].files[name].decode()
        assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", text)
    config = json.loads(server.repos[NAME].files["config.resolved.json"])
    assert config["cache_dir_vae"] == "vae"
    assert config["data_backend_config"][0]["instance_data_dir"] == "photos"
    assert config["learning_rate"] == 1e-4


def test_an_adapter_without_paths_is_uploaded_as_it_is_and_another_keeps_its_tensors(
    run: Path, server: HubServer, tmp_path: Path
) -> None:
    upload(run)
    sent = tmp_path / "sent.safetensors"
    sent.write_bytes(server.repos[NAME].files[ADAPTER])
    with safe_open(sent, framework="pt") as file:
        assert file.metadata()["base_model"] == "model"
        assert json.loads(file.metadata()["tlora_config"])["max_rank"] == 8
    stored, own = load_file(sent), load_file(run / ADAPTER)
    assert {key: value.tolist() for key, value in stored.items()} == {
        key: value.tolist() for key, value in own.items()
    }
    write_adapter(run / ADAPTER, base_model="somebody/model")
    upload(run)
    assert server.repos[NAME].files[ADAPTER] == (run / ADAPTER).read_bytes()


def test_checkpoints_are_uploaded_by_step_though_they_were_removed(run: Path, server: HubServer) -> None:
    for step in (2, 4):
        checkpoint(run, step)
        (run / f"checkpoint-{step}" / ADAPTER).unlink()
    (run / ADAPTER).unlink()
    upload(run)
    files = server.repos[NAME].files
    assert {name for name in files if name.endswith(".safetensors")} == {
        f"checkpoint-2/{ADAPTER}",
        f"checkpoint-4/{ADAPTER}",
    }
    assert b"checkpoint-4/" in files["README.md"]
    assert not list((run / "hub").glob("checkpoint-*"))


def test_the_repository_is_that_of_the_command_of_the_run_or_of_the_last_upload(
    tmp_path: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", hub_model_id="my-cat")
    upload(run)
    upload(run, repository="https://huggingface.co/somebody/other")
    assert server.repos.keys() == {"somebody/my-cat", "somebody/other"}
    write_run(run, hub_model_id=None)
    assert upload(run).address.endswith("somebody/other")
    write_run(run, hub_model_id="somebody/{env:HUB_CAT}")
    with pytest.raises(ConfigError, match="HUB_CAT"):
        upload(run)
    monkeypatch.setenv("HUB_CAT", "grey-cat")
    assert upload(run).address.endswith("somebody/grey-cat")
    with pytest.raises(ConfigError):
        upload(run, repository="a//b")


def test_a_repository_that_was_removed_is_filled_anew(run: Path, server: HubServer) -> None:
    first = upload(run)
    del server.repos[NAME]
    assert set(upload(run).files) == set(first.files)


def test_a_lost_or_damaged_state_uploads_again_what_the_hub_lacks(run: Path, server: HubServer) -> None:
    upload(run)
    (run / "hub" / "uploaded.json").write_text("{")
    sent = len([each for each in server.requests if each.startswith("PUT")])
    assert upload(run).files
    assert len([each for each in server.requests if each.startswith("PUT")]) == sent


@pytest.mark.parametrize(("public", "configured"), [(False, False), (True, True)])
def test_a_public_repository_is_made_where_that_is_wanted(
    public: bool, configured: bool, tmp_path: Path, server: HubServer
) -> None:
    upload(write_run(tmp_path / "run", model_card_private=configured), public=public)
    assert not server.repos[NAME].private


def test_nothing_private_goes_to_a_public_repository(run: Path, server: HubServer) -> None:
    repo = server.add(NAME, private=False)
    with pytest.raises(ConfigError, match="public"):
        upload(run)
    assert not repo.files
    upload(run, public=True)
    assert repo.files


def test_files_of_others_stay_in_a_repository_that_exists(
    run: Path, server: HubServer, caplog: pytest.LogCaptureFixture
) -> None:
    repo = server.add(NAME, private=True)
    repo.files["theirs.txt"] = b"theirs"
    upload(run)
    upload(run)
    assert repo.files["theirs.txt"] == b"theirs"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.parametrize("token", ["", "hf_anotheranotheranother"])
def test_without_a_valid_login_nothing_is_tried_again(
    token: str, run: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    with pytest.raises(ConfigError, match="hf auth login") as caught:
        upload(run)
    assert caught.value.exit_code == 2
    assert "/api/repos/create" not in " ".join(server.requests)
    assert len(server.requests) <= 1


def test_a_namespace_of_others_is_refused(run: Path, server: HubServer) -> None:
    with pytest.raises(ConfigError, match="may not write"):
        upload(run, repository="others/model")


def test_a_token_that_may_write_and_not_create_uploads_to_a_repository_that_exists(
    run: Path, server: HubServer
) -> None:
    server.add("others/model", private=True)
    upload(run, repository="others/model")
    assert ADAPTER in server.repos["others/model"].files


@pytest.mark.parametrize(
    ("request_pattern", "failures"),
    [
        ("GET /api/whoami", [503]),
        ("GET /api/whoami", ["broken"]),
        ("POST /api/repos/create", [429]),
        ("POST /api/models/.*/preupload", ["broken"]),
        ("POST .*/info/lfs/objects/batch", [502]),
        ("PUT /storage/", ["broken"]),
        ("POST /api/models/.*/commit", [429, 500]),
        ("POST /api/models/.*/commit", ["broken"]),
        ("POST /api/models/.*/commit", [412]),
    ],
)
def test_what_passes_by_is_tried_again(
    request_pattern: str, failures: list[int | str], run: Path, server: HubServer
) -> None:
    server.failures[request_pattern] = list(failures)
    upload(run)
    assert ADAPTER in server.repos[NAME].files
    assert not server.failures[request_pattern]
    assert len(server.repos[NAME].commits) == 1


@pytest.mark.parametrize(("status", "attempts"), [(500, 3), (400, 1), (404, 1)])
def test_what_stays_is_reported_and_the_next_call_goes_on(
    status: int, attempts: int, run: Path, server: HubServer
) -> None:
    server.failures["commit"] = [status] * 9
    with pytest.raises(PublishError):
        upload(run)
    assert len([each for each in server.requests if "/commit/" in each]) == attempts
    server.failures.clear()
    server.requests.clear()
    upload(run)
    assert ADAPTER in server.repos[NAME].files
    assert not [each for each in server.requests if each.startswith("PUT")], "large files are sent once"


def test_the_address_of_a_storage_is_reported_without_its_signature(run: Path, server: HubServer) -> None:
    server.failures["PUT /storage/"] = [410] * 9
    with pytest.raises(PublishError) as caught:
        upload(run)
    assert "/storage/" in str(caught.value)
    assert "signature" not in str(caught.value)


@pytest.mark.parametrize(("wanted", "pause_s"), [("7", 7.0), ("9999", 120.0), ("soon", 0.01)])
def test_a_pause_that_the_hub_asks_for_is_kept_within_a_bound(
    wanted: str, pause_s: float, server: HubServer
) -> None:
    server.failures["whoami"], server.retry_after = [429], wanted
    pauses: list[float] = []
    client.with_retries(lambda: client.open_repository("cat", private=True), sleep=pauses.append)
    assert pauses == [pause_s]


def test_offline_nothing_is_asked(run: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PublishError, match="HF_HUB_OFFLINE"):
        upload(run)
    assert not server.requests


def test_one_process_uploads_a_folder_at_a_time(run: Path, server: HubServer) -> None:
    with run_lock(run / "hub"), pytest.raises(StorageError, match="in use"):
        upload(run)


def test_the_leftovers_of_a_killed_upload_are_removed(run: Path, server: HubServer) -> None:
    (run / "hub" / "upload-killed").mkdir(parents=True)
    upload(run)
    assert not list((run / "hub").glob("upload-*"))


def test_an_edited_card_is_uploaded_as_it_is(run: Path, server: HubServer) -> None:
    upload(run)
    (run / "model-card" / "README.md").write_text("Mine.")
    assert upload(run).files == ("README.md",)
    assert server.repos[NAME].files["README.md"] == b"Mine."


def run_command(
    server: HubServer, *arguments: str, token: str = TOKEN, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "simpletuner", "publish", *arguments],
        env=os.environ | server.environment | {"HF_TOKEN": token} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_the_command_uploads_and_says_what(run: Path, server: HubServer) -> None:
    first = run_command(server, str(run), "--repo", "my-cat", "--public")
    assert (first.returncode, first.stderr) == (0, "")
    assert f"{server.address}/somebody/my-cat" in first.stdout
    assert not server.repos["somebody/my-cat"].private
    digest = hashlib.sha256(server.repos["somebody/my-cat"].files[ADAPTER]).hexdigest()
    stored = json.loads((run / "hub" / "uploaded.json").read_text())
    assert stored["repositories"]["somebody/my-cat"][ADAPTER] == digest
    second = run_command(server, str(run), "--public")
    assert second.stdout.startswith("Nothing to upload")
    refused = run_command(server, str(run), token="hf_anotheranotheranother")
    assert refused.returncode == 2
    assert "hf_another" not in refused.stdout + refused.stderr


def test_the_client_uploads_by_its_newer_protocol_too_and_sends_no_telemetry(
    run: Path, server: HubServer, tmp_path: Path
) -> None:
    done = run_command(server, str(run), HF_HUB_DISABLE_XET="0", HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert server.has_chunks
    files = server.repos[NAME].files
    grid = (run / "validation" / "step-4" / "grid.png").read_bytes()
    assert files["images/grid.png"].decode() == hashlib.sha256(grid).hexdigest()
    stored = json.loads((run / "hub" / "uploaded.json").read_text())["repositories"][NAME]
    assert files[ADAPTER].decode() == stored[ADAPTER]
    known = re.compile(r"/(api/(whoami-v2|repos/create|validate-yaml|models/)|cas/)")
    assert not [each for each in server.requests if not known.search(each)]
    assert str(tmp_path).encode() not in b"".join(server.bodies)


def test_a_hub_that_never_answers_is_given_up(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.hangs = "whoami"
    monkeypatch.setattr(client, "ANSWER_WAIT_S", 0.2)
    try:
        client.bound_waits()
        with pytest.raises(PublishError, match="ReadTimeout"):
            client.open_repository("cat", private=True)
    finally:
        set_client_factory(default_client_factory)
