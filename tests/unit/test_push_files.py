"""What is pushed, and what never is."""

import json

import pytest
from fake_hub import TOKEN
from push_models import (
    HOME,
    HOST,
    VERIFIED,
    be_somebody,
    converted,
    finished_run,
    invoke,
    model_folder,
    plan,
    staged,
    write,
)  # fmt: skip

from mmft.convert.push.files import PushError
from mmft.convert.push.model_card import Wishes
from mmft.convert.push.push import plan_push
from mmft.errors import CheckpointError
from mmft.modeling.checkpoint import read_manifest


@pytest.fixture(autouse=True)
def somebody(monkeypatch):
    be_somebody(monkeypatch)


@pytest.fixture
def run(tmp_path):
    return finished_run(tmp_path)


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


@pytest.mark.parametrize("quant", ["q4_0", "bf16", "Q4_K_M"])
def test_gguf_files_of_few_bits_go_only_with_their_proof_in_sixteen(tmp_path, quant):
    """An earlier gate compared q4_0 with the numbers of four bits alone; llama-quantize compares nothing."""
    write(tmp_path / "out" / f"model-{quant}.gguf", b"GGUF" + bytes(64))
    write(tmp_path / "out" / "mmproj-f16.gguf", b"GGUF" + bytes(64))
    own = VERIFIED | {"dtype": quant, "source": "work/run"}
    for parity in (own, own | {"proof": None}, own | {"proof": VERIFIED | {"verified": False}}, VERIFIED):
        write(tmp_path / "out" / "parity.json", parity)
        with pytest.raises(PushError, match=rf"proves nothing of its {quant} weights.*convert verify .*--unverified"):
            plan(tmp_path / "out")
        assert "**Not verified.**" in plan(tmp_path / "out", unverified=True).card
    write(tmp_path / "out" / "parity.json", own | {"dtype": quant, "proof": VERIFIED | {"dtype": "f16"}})
    assert "**Not verified.**" not in plan(tmp_path / "out").card


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


def test_a_dry_run_shows_files_sizes_and_card_and_needs_no_token(run):
    said = invoke(run, "ming/mine", "--dry-run", "--license", "mit")
    assert "16 B  projector.safetensors" in said and "in 6 files, to huggingface: ming/mine" in said
    assert "stays here: optimizer.pt and 4 more (state of training, or a pickle)" in said
    assert "license: mit" in said and said.endswith("nothing was uploaded (--dry-run)\n")


def test_a_base_model_known_by_its_place_alone_is_told_before_anything_is_uploaded(run):
    assert any("'base-1b' is known only by its place" in note and "--base-model" in note for note in plan(run).notes)
    named = plan(run, wishes=Wishes(bases={"llm": "acme/base-1b"}, license="mit"))
    assert named.notes == ()
