"""What users get wrong: one clear line each, on stderr, exit code 2, no traceback."""

import json
import sys
from pathlib import Path

import pytest

from mmft import cli

CONFIG = """
from mmft.config import LLM, Data, Dataset, Model, Optim, Runtime, TrainConfig, Vision, use

config = TrainConfig(
    model=Model(
        llm=LLM(path={llm!r}),
        vision=Vision(encoder=use("clip", path={clip!r}), projector=use("mlp2x_gelu")),
    ),
    data=Data(
        datasets=(Dataset(source=use("json", path={data!r}), data_map="llava", image_folder={images!r}),),
        chat_template="chatml",
        max_length=128,
    ),
    optim=Optim(lr=1e-3, max_steps=1),
    runtime=Runtime(output_dir={out!r}, device="cpu"),
)
"""


@pytest.fixture
def config(tmp_path, tiny_llm_path, tiny_clip_path) -> Path:
    """A config that trains; each test spoils one thing."""
    from PIL import Image as PILImage

    PILImage.new("RGB", (30, 30), "red").save(tmp_path / "a.png")
    (tmp_path / "corrupt.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    (tmp_path / "text.png").write_text("this is text")
    write(tmp_path, record())
    values = {"llm": str(tiny_llm_path), "clip": str(tiny_clip_path), "data": str(tmp_path / "data.json")}
    path = tmp_path / "c.py"
    path.write_text(CONFIG.format(**values, images=str(tmp_path), out=str(tmp_path / "run")))
    return path


def record(image="a.png", asked="<image>\nWhat?", answer="It."):
    turns = [{"from": "human", "value": asked}, *([{"from": "gpt", "value": answer}] if answer else [])]
    return {"id": "r1", "image": image, "conversations": turns}


def write(folder: Path, *records) -> None:
    (folder / "data.json").write_text(json.dumps(records))


def error_of(monkeypatch, capsys, *arguments: str) -> str:
    """Run the command line; its exit code must be 2, and what it says a single message without a traceback."""
    monkeypatch.setattr(sys, "argv", ["mmft", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2, said
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if line.startswith("mmft: error: ")]
    assert len(errors) == 1, said
    return said[said.index("mmft: error: ") :]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("optim.learning_rate=1", "Optim has no field 'learning_rate'"),
        ("data.chat_template=chatmll", "no chat template named 'chatmll'; did you mean 'chatml'?"),
        ("data.datasets.0.data_map=lava", "no data map named 'lava'; did you mean 'llava'?"),
        ("model.vision.encoder.selct_layer=-2", "unexpected keyword argument 'selct_layer'"),
        ("model.llm.path=./no/such/model", "./no/such/model does not exist"),
        ("data.datasets.0.source.path=nowhere.json", "nowhere.json does not exist"),
        ("data.datasets.0.image_folder=nowhere", "nowhere is not a folder"),
        ("model.vision.projector_weights=nowhere", "nowhere does not exist; run the pretrain stage first"),
        ("data.max_length=16", "16 tokens leave no room beside an image of 16 tokens"),
        ("model.llm.quantization=int4", "'int4' is not one of 'none', 'nf4', 'fp4', 'int8'"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(setting, expected, config, monkeypatch, capsys):
    assert expected in error_of(monkeypatch, capsys, "train", str(config), "--set", setting)


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (record(image="missing.png"), "image not found"),
        (record(image="../a.png"), "image path leaves the image folder: ../a.png"),
        (record(image="https://x.example/a.png"), "remote address"),
        (record(asked="<image> and <image>"), "2 <image> marks, 1 image"),
        (record(answer=None), "nothing to train"),
        ({"id": "r1", "picture": "a.png"}, "conversations"),
    ],
)
def test_a_bad_record_is_named_with_file_number_id_and_reason(bad, expected, config, monkeypatch, capsys):
    write(config.parent, record(), bad)
    said = error_of(monkeypatch, capsys, "train", str(config))
    assert expected in said
    assert 'data.json record 2 (id "r1")' in said
    assert "max_bad_fraction" in said


@pytest.mark.parametrize("name", ["corrupt.png", "text.png"])
def test_a_picture_that_cannot_be_read_is_named(name, config, monkeypatch, capsys):
    write(config.parent, record(image=name))
    assert name in error_of(monkeypatch, capsys, "train", str(config))


def test_a_source_that_is_not_json_is_named_with_the_place(config, monkeypatch, capsys):
    (config.parent / "data.json").write_text('[{"id": 1},\n {"id": }]')
    said = error_of(monkeypatch, capsys, "train", str(config))
    assert "data.json" in said
    assert "line 2" in said


def test_a_config_that_is_not_there_and_one_that_is_misspelt(monkeypatch, capsys):
    assert "no such file" in error_of(monkeypatch, capsys, "train", "nowhere.py")
    assert "did you mean 'llava_finetune'?" in error_of(monkeypatch, capsys, "train", "llava_finetun")


def test_a_python_error_in_a_config_names_file_and_line(config, monkeypatch, capsys):
    config.write_text("a = 1\nb = missing\n")
    assert "c.py:2: NameError: name 'missing' is not defined" in error_of(monkeypatch, capsys, "check", str(config))


def test_chat_with_no_model_says_where_it_looked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "no finished run under work_dirs" in error_of(monkeypatch, capsys, "chat")
    assert "'nowhere' is no folder and was not found" in error_of(monkeypatch, capsys, "chat", "nowhere")


def test_every_problem_of_a_config_is_told_at_once(config, monkeypatch, capsys):
    said = error_of(
        monkeypatch, capsys, "check", str(config), "--set", "data.chat_template=x", "--set", "model.llm.path=./x",
        "--set", "optim.optimizer=adamx",
    )  # fmt: skip
    assert "3 problems" in said
    assert all(where in said for where in ("data.chat_template", "model.llm.path", "optim.optimizer"))
