"""What is pushed, what never is, and the way it goes: the real client of the hub against a server on this machine."""

import hashlib
import importlib.util
import json
import platform
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from click.testing import CliRunner
from fake_hub import TOKEN, FakeHub

from mmft.cli import cli
from mmft.convert.push.files import PushError, without_places
from mmft.convert.push.model_card import Wishes
from mmft.convert.push.push import plan_push, send
from mmft.errors import CheckpointError, MmftError
from mmft.modeling.checkpoint import read_manifest

HOME, HOST = "/home/ming-the-person", "mings-laptop.local"
LLM, ENCODER = f"{HOME}/models/base-1b", f"{HOME}/.cache/huggingface/hub/models--acme--clip/snapshots/0123abc"


@pytest.fixture(autouse=True)
def somebody(monkeypatch):
    """The machine of somebody with a home folder and a name, who is not logged in anywhere."""
    monkeypatch.setenv("HOME", HOME)
    monkeypatch.setattr(platform, "node", lambda: HOST)
    monkeypatch.delenv("MODELSCOPE_API_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def manifest(folder: Path, **more) -> None:
    """`mmft.json` over what is in the folder, as training writes it."""
    lora = {"r": 8, "alpha": 16.0}
    model = {
        "llm": {"path": LLM, "quantization": "nf4", "lora": lora, "revision": None},
        "vision": {"encoder": {"use": "clip", "path": ENCODER}, "projector": {"use": "mlp2x_gelu"}},
    }
    datasets = [
        {
            "source": {"use": "json", "path": f"{HOME}/data/mine.json"},
            "data_map": "llava",
            "image_folder": "/mnt/d/img",
        },
        {"source": {"use": "hf", "path": "acme/chats"}, "data_map": "messages", "limit": 100},
    ]
    content = {
        "format": 1, "mmft": "0.1.0", "model": model, "chat_template": "chatml", "precision": "bf16", "plugins": {},
        "config": {
            "model": model, "data": {"datasets": datasets, "chat_template": "chatml", "max_length": 64},
            "optim": {"lr": 1e-4}, "runtime": {"seed": 42, "precision": "bf16"},
        },
    }  # fmt: skip
    files = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }
    write(folder / "mmft.json", content | {"files": files} | more)


def model_folder(folder: Path, **more) -> Path:
    write(folder / "projector.safetensors", b"\x08\0\0\0\0\0\0\0{}      ")
    write(folder / "llm_adapter" / "adapter_model.safetensors", b"weights")
    write(folder / "llm_adapter" / "adapter_config.json", {"base_model_name_or_path": LLM, "r": 8})
    write(folder / "llm_adapter" / "README.md", f"base_model: {LLM}")
    write(folder / "tokenizer" / "tokenizer.json", {"model": {"vocab": {HOME: 1}}})
    manifest(folder, **more)
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished run with everything that a run leaves behind."""
    folder = tmp_path / "work_dirs" / "run"
    model_folder(folder / "final")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "train_state.json"):
        write(folder / "final" / name, "{}")  # nobody puts them there; they would not go even then
    write(folder / "checkpoint-2" / "optimizer.pt", b"x")
    write(folder / "samples" / "step-2.json", {"images": [f"{HOME}/me.png"]})
    write(folder / "run.log", f"2026-01-01 10:00:00,000 INFO reading {HOME}/data\n")
    write(folder / "metrics.jsonl", '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0, "seconds": 7200}\n{"ste')
    return folder


def plan(model, *, wishes: Wishes | None = None, **options):
    return plan_push(str(model), "ming/mine", "huggingface", wishes=wishes or Wishes(), **options)


def converted(folder: Path, parity: dict | None) -> Path:
    write(folder / "config.json", {"model_type": "llava", "vision_config": {}})
    write(folder / "model.safetensors", b"weights")
    if parity is not None:
        write(folder / "parity.json", parity)
    return folder


VERIFIED = {
    "verified": True,
    "dtype": "float32",
    "tolerance": 1e-4,
    "outcomes": [{"relative": 1e-6, "same_answer": True}],
}


def test_of_a_run_only_the_model_goes(run):
    planned = plan(run)
    assert {upload.name for upload in planned.uploads} == {
        "README.md", "mmft.json", "projector.safetensors", "llm_adapter/adapter_config.json",
        "llm_adapter/adapter_model.safetensors", "tokenizer/tokenizer.json",
    }  # fmt: skip
    assert planned.left_out["optimizer.pt"] == "state of training, or a pickle"
    assert planned.left_out["llm_adapter/README.md"] == "peft's blank card"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("checkpoint-8/model.safetensors", "a checkpoint of training"),
        ("global_step8/model.safetensors", "a checkpoint of training"),
        ("pytorch_model.bin", "state of training, or a pickle"),
        ("trainer_state.json", "state of training, or a pickle"),
        ("me.jpg", "a picture"),
        ("samples/step-1.json", "a log, samples or data"),
        ("metrics.jsonl", "a log, samples or data"),
        ("report.html", "a log, samples or data"),
        (".out.unproved/model.safetensors", "hidden or unfinished"),
        ("next.unproved/model.safetensors", "hidden or unfinished"),
        (".env", "hidden or unfinished"),
        ("notes.docx", "no part of a model"),
    ],
)
def test_what_is_no_part_of_a_model_stays_here(tmp_path, name, reason):
    folder = converted(tmp_path / "out", VERIFIED)
    write(folder / name, b"x")
    planned = plan(folder)
    assert planned.left_out == {name: reason}
    assert {upload.name for upload in planned.uploads} == {
        "README.md", "config.json", "model.safetensors", "parity.json"
    }  # fmt: skip


def test_a_file_that_the_manifest_does_not_name_stays_here(run):
    write(run / "final" / "other.safetensors", b"x")
    assert plan(run).left_out["other.safetensors"].startswith("not of this model")


def staged(planned, tmp_path) -> Path:
    from mmft.convert.push.files import stage

    (tmp_path / "staged").mkdir()
    stage(list(planned.uploads), tmp_path / "staged")
    return tmp_path / "staged"


def test_nothing_that_is_uploaded_names_this_person_or_this_machine(run, tmp_path):
    folder = staged(plan(run), tmp_path)
    texts = {path: path.read_text("utf-8") for path in folder.rglob("*") if path.suffix in (".json", ".md")}
    for path, text in texts.items():
        if path.name != "tokenizer.json":
            for mark in (HOME, HOST, "/mnt/d", str(tmp_path), "ming-the-person"):
                assert mark not in text, (path.name, mark)


def test_what_is_uploaded_is_a_whole_model_folder_again(run, tmp_path):
    folder = staged(plan(run, wishes=Wishes(bases={"llm": "acme/base-1b"})), tmp_path)
    model = read_manifest(folder).model  # compares every sha256
    assert model.llm.path == "acme/base-1b"
    assert model.vision is not None and model.vision.encoder.options["path"] == "acme/clip"
    config = json.loads((folder / "llm_adapter" / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == "acme/base-1b"
    assert (folder / "projector.safetensors").read_bytes() == (run / "final" / "projector.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/ming/models/base", "base"), ("~/models/base/", "base"), ("../secret/base", "base"),
        ("C:\\Users\\ming\\base", "base"), ("acme/base", "acme/base"), ("work_dirs/a/final", "work_dirs/a/final"),
        ("/home/m/hub/models--acme--b-1.5/snapshots/ff00", "acme/b-1.5"), ("/no_think", "/no_think"),
        ("Answer /a or /b please.", "Answer /a or /b please."), (["/a/b/c", 1, None], ["c", 1, None]),
        ({"/a/b/c": {"d": "/e/f/g"}}, {"c": {"d": "g"}}), ("https://example.org/a/b", "https://example.org/a/b"),
    ],
)  # fmt: skip
def test_a_place_on_a_disk_becomes_its_last_part_and_nothing_else_changes(value, expected):
    assert without_places(value) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"trained in {HOME}/work", "README.md has the path of your home folder"),
        (f"trained on {HOST}", "README.md has the name of this machine"),
        (f"use {TOKEN}", r"README.md has what looks like an access token \(hf_xxx\.\.\.\)"),
    ],
)
def test_a_card_of_ones_own_that_tells_of_this_person_is_not_uploaded(run, text, said):
    write(run / "final" / "README.md", f"# Mine\n{text}\n")
    with pytest.raises(PushError, match=f"^not uploaded, because {said}"):
        plan(run)


def test_metadata_of_weights_are_looked_at_too(tmp_path):
    write(tmp_path / "out" / "model-f16.gguf", b"GGUF" + f"{HOME}/models/base".encode() + bytes(64))
    with pytest.raises(PushError, match=r"model-f16\.gguf has the path of your home folder"):
        plan(tmp_path / "out", unverified=True)


def test_a_card_of_ones_own_is_kept_unless_told(run):
    write(run / "final" / "README.md", "# Mine\n")
    kept = plan(run)
    assert kept.card == "# Mine\n" and "--overwrite-card" in kept.notes[0]
    assert plan(run, overwrite_card=True).card.startswith("---\n")


@pytest.mark.parametrize(
    ("parity", "said"),
    [
        (None, "has no parity.json"),
        ({"verified": False, "refusal": "a question: other logits"}, "not verified: a question: other logits"),
        ({"verified": False, "note": "no back end", "command": "mmft x"}, "no back end; to verify it: mmft x"),
        ({"verified": "yes"}, "not verified: no reason is given"),
    ],
)  # fmt: skip
def test_a_conversion_that_was_not_verified_goes_only_when_told_and_its_card_says_so(tmp_path, parity, said):
    folder = converted(tmp_path / "out", parity)
    with pytest.raises(PushError, match=f"{said}.*--unverified"):
        plan(folder)
    assert "**Not verified.**" in plan(folder, unverified=True).card
    assert "**Not verified.**" not in plan(converted(tmp_path / "good", VERIFIED), unverified=True).card


def test_a_merged_model_needs_its_comparison_and_a_run_none(tmp_path, run):
    merged = model_folder(tmp_path / "merged", merged={"quantization": "nf4"})
    with pytest.raises(PushError, match=r"has no parity\.json"):
        plan(merged)
    write(merged / "parity.json", VERIFIED)
    assert "parity.json" in {upload.name for upload in plan(merged).uploads}
    assert "Not verified" not in plan(run).card


def test_what_a_refused_conversion_left_is_never_pushed(tmp_path):
    folder = converted(tmp_path / ".out.unproved", {"verified": False})
    with pytest.raises(PushError, match="did not hold"):
        plan(folder, unverified=True)


def test_an_unfinished_run_is_refused_and_its_checkpoint_goes_when_it_is_named(tmp_path):
    model_folder(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(PushError, match=r"is not finished.*checkpoint-2"):
        plan(tmp_path / "run")
    assert plan(tmp_path / "run" / "checkpoint-2").uploads


def test_a_damaged_model_is_not_pushed(run):
    (run / "final" / "projector.safetensors").write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"projector\.safetensors is damaged"):
        plan(run)


@pytest.mark.parametrize("repo", ["mine", "a/b/c", "../a", "ming/a--b", "https://huggingface.co/a/b", "ming/"])
def test_what_is_no_repository_name_is_refused(run, repo):
    with pytest.raises(PushError, match="write owner/name"):
        plan_push(str(run), repo, "huggingface", wishes=Wishes())


def invoke(*arguments) -> str:
    result = CliRunner().invoke(cli, ["convert", "push", *map(str, arguments)], standalone_mode=False)
    if isinstance(result.exception, MmftError):
        return f"error: {result.exception}"
    assert result.exception is None, result.output
    return result.output


def test_a_dry_run_shows_files_sizes_and_card_and_needs_no_token(run):
    said = invoke(run, "ming/mine", "--dry-run", "--license", "mit")
    assert "16 B  projector.safetensors" in said and "in 6 files, to huggingface: ming/mine" in said
    assert "stays here: optimizer.pt and 4 more (state of training, or a pickle)" in said
    assert "license: mit" in said and said.endswith("nothing was uploaded (--dry-run)\n")


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


def test_a_base_model_known_by_its_place_alone_is_told_before_anything_is_uploaded(run):
    assert any("'base-1b' is known only by its place" in note and "--base-model" in note for note in plan(run).notes)
    named = plan(run, wishes=Wishes(bases={"llm": "acme/base-1b"}, license="mit"))
    assert named.notes == ()
