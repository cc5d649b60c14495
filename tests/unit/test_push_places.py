"""No place of this machine is uploaded, and nothing that only looks like one is changed or refused."""

import json
from pathlib import Path

import pytest
from push_models import VERIFIED, be_somebody, converted, finished_run, manifest, plan, staged, write

from mmft.convert.push.files import PushError
from mmft.convert.push.places import places_in, without_places

TEMPLATES = sorted((Path(__file__).parents[1] / "oracle" / "jinja").glob("*.jinja"))


@pytest.fixture(autouse=True)
def somebody(monkeypatch):
    be_somebody(monkeypatch)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/ming/models/base", "base"), ("~/models/base/", "base"), ("../secret/base", "base"),
        ("C:\\Users\\ming\\base", "base"), ("/home/m/hub/models--acme--b-1.5/snapshots/ff00", "acme/b-1.5"),
        ("/data/acme corp/secret clients.jsonl", "secret clients.jsonl"), ("/mnt/team share/base", "base"),
        ("C:/Users/jane/x.json", "x.json"), ("\\\\server\\share\\jane doe\\x.json", "x.json"),
        ("file:///srv/a/b", "b"), ("~jane/x/y", "y"), (["/a/b/c", 1, None], ["c", 1, None]),
        ({"/a/b/c": {"d": "/e/f/g"}}, {"c": {"d": "g"}}),
        ("mmft convert verify out --run /srv/jobs/acme/run/final", "mmft convert verify out --run final"),
        ("not in /data/acme corp/new/x.json.", "not in x.json."), ("--run=/srv/a b/c now", "--run=c now"),
        ("see C:/Users/jane/x.json and C:\\Users\\jane b\\y", "see x.json and y"),
        ("on \\\\server\\share\\jane\\x", "on x"), ("gpu1:/srv/a/b", "gpu1:b"), ("“/数据/客户/表.json”", "“表.json”"),
    ],
)  # fmt: skip
def test_a_place_on_a_disk_becomes_its_last_part(value, expected):
    assert without_places(value) == expected
    assert not list(places_in(without_places(value)))


@pytest.mark.parametrize(
    "value",
    [
        "acme/base", "work_dirs/a/final", "./llm", "/no_think", "Answer /a or /b please.", "https://example.org/a/b",
        "/think or /no_think: choose", "</think>", "<a><b></b></a>", "{{ text }}</s>", "[/INST]", "and/or/either",
        "12/3/2026", "1 / 2 / 3", "s3://bucket/a/b", "\\n\\n### Human", "^(?:.*\\.layers\\.\\d+\\.q_proj)$",
        {"target_modules": "(/a/b/c|x)"}, {"chat_template": "/think/more/no_think"},
    ],
)  # fmt: skip
def test_what_is_no_place_stays_as_it_is(value):
    assert without_places(value) == value
    assert not list(places_in(value))


def test_no_chat_template_is_taken_for_places(tmp_path):
    assert len(TEMPLATES) > 20
    for path in TEMPLATES:
        text = path.read_text("utf-8")
        assert without_places(text) == text, path.name  # even where it stands under another key
        folder = converted(tmp_path / path.stem, VERIFIED)
        write(folder / "chat_template.jinja", text)
        named = [{"name": "default", "template": text}]
        write(folder / "tokenizer_config.json", {"chat_template": named if "qwen" in path.name else text})
        uploads = {upload.name: upload for upload in plan(folder).uploads}
        assert uploads["chat_template.jinja"].content is None and uploads["tokenizer_config.json"].content is None


def test_places_with_spaces_of_windows_and_of_shares_are_not_uploaded(tmp_path):
    run = finished_run(tmp_path)
    content = json.loads((run / "final" / "mmft.json").read_text("utf-8"))
    content["config"]["data"]["datasets"][0] |= {"image_folder": "C:/Users/jane/pictures"}
    content["config"]["data"]["datasets"][0]["source"]["path"] = "/data/acme corp/secret clients.jsonl"
    content["config"]["data"]["datasets"][1]["source"] = {"use": "json", "path": "\\\\filer\\acme team\\x.json"}
    for tree in (content, content["config"]):
        tree["model"]["llm"]["path"] = "/mnt/team share/base"
    write(run / "final" / "mmft.json", content)
    with (run / "run.log").open("a", encoding="utf-8") as log:
        log.write("2026-01-01 10:00:00,000 INFO 9 samples, 90 tokens (9 trained), 9 images; longest 10 tokens\n")
        log.write("dropped 1 of 9 records: 1 no answer in /data/acme corp/secret clients.jsonl\n")
    folder = staged(plan(run), tmp_path)
    for name in ("mmft.json", "README.md"):
        text = (folder / name).read_text("utf-8")
        for mark in ("acme corp", "team share", "jane", "C:/", "filer", "acme team", "/data", "/mnt"):
            assert mark not in text, (name, mark)
    card = (folder / "README.md").read_text("utf-8")
    assert "| secret clients.jsonl |" in card and "| x.json |" in card and "1 no answer in secret clients.jsonl" in card


def test_a_comparison_is_uploaded_without_its_command_and_its_source(tmp_path):
    parity = VERIFIED | {
        "verified": False, "note": "no back end for /srv/jobs/acme/run/final",
        "command": "mmft convert verify out --run /srv/jobs/acme/run/final", "source": "work_dirs/acme/final",
    }  # fmt: skip
    folder = staged(plan(converted(tmp_path / "out", parity), unverified=True), tmp_path)
    assert json.loads((folder / "parity.json").read_text("utf-8")) == VERIFIED | {
        "verified": False, "note": "no back end for final"
    }  # fmt: skip
    assert not any("acme" in path.read_text("utf-8") for path in folder.rglob("*.[jm]*") if path.is_file())


@pytest.mark.parametrize("text", ["/data/acme corp/x.json", "at D:\\work\\x", "\\\\filer\\share\\x", "`/srv/a/b`"])
@pytest.mark.parametrize("name", ["README.md", "Modelfile"])
def test_a_place_that_is_left_in_a_text_is_refused(tmp_path, name, text):
    folder = converted(tmp_path / "out", VERIFIED)
    write(folder / name, f"# Mine\nmade from {text}, see https://example.org/a/b\n</s>\nRun it with /path/to/model.\n")
    with pytest.raises(PushError, match=rf"{name} has a place of this machine \([^h]"):
        plan(folder)
    write(folder / name, "# Mine\nsee https://example.org/a/b or [this](docs/a/b)\n</s>\nRun it with /path/to/model.\n")
    assert plan(folder).uploads


def test_the_vocabulary_and_a_regular_expression_stay_byte_for_byte(tmp_path):
    run = finished_run(tmp_path)
    tokenizer = {"pre_tokenizer": {"pattern": {"Regex": "\\s+/[a-z]/b/c"}}, "model": {"vocab": {"/usr/share/x": 1}}}
    write(run / "final" / "tokenizer" / "tokenizer.json", tokenizer)
    settings = {"r": 8, "target_modules": "/layers/\\d+/q_proj", "base_model_name_or_path": "acme/base"}
    write(run / "final" / "llm_adapter" / "adapter_config.json", settings)
    (run / "final" / "mmft.json").unlink()
    for other in (run / "final").glob("*state*"):
        other.unlink()
    manifest(run / "final")
    uploads = {upload.name: upload for upload in plan(run).uploads}
    assert uploads["tokenizer/tokenizer.json"].content is None
    assert uploads["llm_adapter/adapter_config.json"].content is None
