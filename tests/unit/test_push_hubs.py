"""The way it goes: the real client of the hub against a server on this machine."""

import importlib.util
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from fake_hub import TOKEN, FakeHub
from push_models import HOME, be_somebody, finished_run, invoke, plan

from mmft.convert.push.files import PushError
from mmft.convert.push.model_card import Wishes
from mmft.convert.push.push import plan_push, send


@pytest.fixture(autouse=True)
def somebody(monkeypatch):
    be_somebody(monkeypatch)


@pytest.fixture
def run(tmp_path):
    return finished_run(tmp_path)


@pytest.mark.parametrize(
    ("hub", "said"),
    [
        ("huggingface", "https://huggingface.co/settings/tokens, then export HF_TOKEN=..."),
        ("modelscope", "https://modelscope.cn/my/myaccesstoken, then export MODELSCOPE_API_TOKEN=..."),
    ],
)
def test_without_a_token_one_line_says_where_to_get_it(run, hub, said):
    told = invoke(run, "ming/mine", "--hub", hub)
    assert told.startswith(f"error: no access token for {hub}") and said in told and "\n" not in told


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine, and a login for it."""
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_everything_that_was_planned_arrives_and_nothing_else(run, hub):
    planned = plan(run)
    address = send(planned, private=True, branch="lora-8", message="first try")
    assert set(hub.files) == {upload.name for upload in planned.uploads}
    assert hub.files["projector.safetensors"] == (run / "final" / "projector.safetensors").read_bytes()
    assert hub.files["README.md"].decode() == planned.card
    assert not any(HOME.encode() in data for name, data in hub.files.items() if name != "tokenizer/tokenizer.json")
    assert hub.repos == {"ming/mine": {"private": True}} and address == f"{hub.url}/ming/mine"
    assert [(one["branch"], one["summary"]) for one in hub.commits] == [("lora-8", "first try")]
    assert hub.branches == ["lora-8"]


def test_a_second_push_goes_into_the_same_repository(run, hub):
    send(plan(run))
    said = invoke(run, "ming/mine", "--license", "mit")
    assert f"uploaded: {hub.url}/ming/mine\n" in said
    assert len(hub.commits) == 2 and b"license: mit" in hub.files["README.md"]


def test_private_is_never_taken_for_granted(run, hub):
    hub.repos["ming/mine"] = {"private": False}
    with pytest.raises(PushError, match="is there already and public"):
        send(plan(run), private=True)
    assert not hub.commits


def test_a_token_that_is_not_valid_is_one_line(run, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_wrong")
    with pytest.raises(PushError, match=r"^ming/mine was not uploaded to huggingface: .*; the token is not valid") as e:
        send(plan(run))
    assert "\n" not in str(e.value)


def test_a_hub_that_cannot_be_reached_is_one_line(run, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(PushError, match=r"^ming/mine was not uploaded to huggingface: .*run the command again$"):
        send(plan(run))


def test_offline_mode_is_named(run, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="offline mode is on"):
        send(plan(run))


@pytest.mark.skipif(importlib.util.find_spec("modelscope") is not None, reason="modelscope is installed")
def test_modelscope_that_is_not_installed_is_one_line_with_the_command(run, hub, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-token")
    told = invoke(run, "ming/mine", "--hub", "modelscope")
    assert told.startswith("error: --hub modelscope needs modelscope") and "pip install 'mmft[modelscope]'" in told


@pytest.mark.parametrize("there", [False, True])
def test_modelscope_gets_the_same_files(run, hub, monkeypatch, there):
    calls = []

    class HubApi:
        """modelscope is large and not installed for tests; this much of its HubApi is used (checked with 1.40.2)."""

        def repo_exists(self, repo_id, *, repo_type=None, token=None):
            return there

        def create_repo(self, repo_id, *, token=None, visibility=None, license=None, repo_type="model"):
            calls.append(("create", repo_id, visibility, license, token))

        def upload_folder(self, repo_id, folder_path=None, *, commit_message, token, repo_type, revision):
            names = {
                path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()
            }
            calls.append(("upload", repo_id, revision, names))

    monkeypatch.setitem(sys.modules, "modelscope", ModuleType("modelscope"))
    monkeypatch.setitem(sys.modules, "modelscope.hub", ModuleType("modelscope.hub"))
    monkeypatch.setitem(sys.modules, "modelscope.hub.api", SimpleNamespace(HubApi=HubApi))
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-token")
    refusal = "stays as visible as it is" if there else "give --license"  # the client would claim Apache-2.0
    with pytest.raises(PushError, match=refusal):
        send(plan_push(str(run), "ming/mine", "modelscope", wishes=Wishes()), private=True)
    planned = plan_push(str(run), "ming/mine", "modelscope", wishes=Wishes(license="mit"))
    assert send(planned, private=not there) == "https://modelscope.cn/models/ming/mine"
    uploaded = ("upload", "ming/mine", "master", {upload.name for upload in planned.uploads})
    assert calls == ([] if there else [("create", "ming/mine", "private", "mit", "ms-token")]) + [uploaded]
