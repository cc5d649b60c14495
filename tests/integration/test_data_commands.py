"""`mmft data check` and `mmft data show` on files with every kind of defect, through the command line."""

import base64
import io
import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from mmft.cli import cli
from mmft.errors import MmftError

CONFIG = """
from pathlib import Path
from mmft.config import LLM, Data, Dataset, Model, Optim, Runtime, TrainConfig, Vision, use

vision = Vision(encoder=use("clip", path={clip!r}), projector=use("linear"))
config = TrainConfig(
    model=Model(llm=LLM(path={llm!r}), vision=vision),
    data=Data(
        datasets=(Dataset(source=use("json", path="data.json"), data_map="llava", image_folder=Path("pictures")),),
        chat_template="chatml",
        max_length=64,
    ),
    optim=Optim(lr=1e-3),
    runtime=Runtime(output_dir=Path("runs/tiny")),
)
"""
Mmft = Callable[..., Result]


def qa(answer: str, question: str = "What?", **extra: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **extra}


def picture(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(records), "utf-8")


@pytest.fixture
def mmft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llm_path: Path, tiny_clip_path: Path) -> Mmft:
    """The command line in a folder with a config of a model that sees."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.py").write_text(CONFIG.format(llm=str(tiny_llm_path), clip=str(tiny_clip_path)), "utf-8")
    picture(Path("pictures/good.png"))

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(cli, ["data", *arguments])

    return run


def test_good_data_exits_with_0_and_the_run_starts_from_a_warm_cache(mmft: Mmft) -> None:
    write(Path("data.json"), [qa("A cat.", "<image>\nWhat?", image="good.png"), qa("Yes."), qa("No.")])
    result = mmft("check", "tiny.py")
    assert result.exit_code == 0, result.output
    assert "3 in 1 dataset(s), 3 kept" in result.output and "ok: all of it" in result.output
    assert "1 files in 1 places, 0 bad (headers read" in result.output and "400 x 300" in result.output
    stores = list(Path("runs/.cache").glob("tokens-*"))
    assert len(stores) == 1
    assert Path("runs/tiny/check/dropped.jsonl").read_text("utf-8") == ""
    assert "All of it can be trained on." in Path("runs/tiny/check/report.html").read_text("utf-8")
    assert mmft("show", "tiny.py", "--packed", "1").exit_code == 0
    assert list(Path("runs/.cache").glob("tokens-*")) == stores


def test_all_defects_are_reported_at_once_although_a_run_would_stop_at_the_first(mmft: Mmft) -> None:
    for name, content in {"empty.jpg": b"", "text.png": b"a cat"}.items():
        Path("pictures", name).write_bytes(content)
    pictures = ("good.png", "empty.jpg", "text.png", "missing.png")
    records = [qa("Cat.", "<image>\nWhat?", image=name) for name in pictures]
    records += [qa("Twice."), qa("Twice."), qa("Long. " * 60), {"id": "<b>7</b>", "conversations": "x"}]
    write(Path("data.json"), records)
    result = mmft("check", "tiny.py", "--out", "out", "--html", "pages/check.html")
    assert result.exit_code == 2
    text = result.output
    assert "1  bad: is empty (0 bytes), not an image" in text and "1  bad: not an image" in text
    assert "1  bad: image not found" in text and "1  dropped: longer than 64 tokens" in text
    assert "1 (20.0%); most often, 2 times: data.json record 5: " in text
    assert "problem: 5 of 8 records (62.5%) cannot be trained; at most 1.0% is allowed (data.max_bad_fraction)" in text
    assert "problem: 3 images cannot be read" in text
    lines = [json.loads(line) for line in Path("out/dropped.jsonl").read_text("utf-8").splitlines()]
    assert [(line["record"], line["action"]) for line in lines] == [(4, "dropped"), (7, "dropped"), (8, "dropped")]
    bad = [json.loads(line) for line in Path("out/bad_images.jsonl").read_text("utf-8").splitlines()]
    assert [Path(line["image"]).name for line in bad] == ["empty.jpg", "text.png"]
    page = Path("pages/check.html").read_text("utf-8")
    assert "&lt;b&gt;7&lt;/b&gt;" in page and "<b>7" not in page
    assert "<script" not in page and "http" not in page


def test_a_file_that_is_cut_off_is_found_by_decoding(mmft: Mmft) -> None:
    picture(Path("pictures/cut.jpg"))
    path = Path("pictures/cut.jpg")
    path.write_bytes(path.read_bytes()[:-2000])
    write(Path("data.json"), [qa("A cat.", "<image>\nWhat?", image="cut.jpg"), qa("Yes.")])
    assert mmft("check", "tiny.py").exit_code == 0
    result = mmft("check", "tiny.py", "--decode")
    assert result.exit_code == 2 and "damaged or refused image" in result.output


@pytest.mark.parametrize("setting", ["data.too_long=error", "data.on_bad_sample=error"])
def test_a_policy_that_stops_a_run_is_a_problem_and_does_not_stop_the_check(mmft: Mmft, setting: str) -> None:
    write(Path("data.json"), [qa("Yes."), qa("Long. " * 60), {"conversations": []}, qa("No.")])
    result = mmft("check", "tiny.py", "--set", setting, "--set", "data.max_bad_fraction=1")
    assert result.exit_code == 2 and "problem: " in result.output and "'error'" in result.output
    assert "4 in 1 dataset(s), 2 kept" in result.output


def test_data_of_which_nothing_is_left_is_still_reported(mmft: Mmft) -> None:
    write(Path("data.json"), [{"conversations": []}, {"conversations": 7}])
    result = mmft("check", "tiny.py")
    assert result.exit_code == 2 and "problem: nothing is left to train on" in result.output
    assert len(Path("runs/tiny/check/dropped.jsonl").read_text("utf-8").splitlines()) == 2


def test_truncation_and_packing_are_told_beforehand(mmft: Mmft) -> None:
    write(Path("data.json"), [qa("Long. " * 60), *(qa(f"Answer {k}.") for k in range(20))])
    result = mmft("check", "tiny.py", "--set", "data.too_long=truncate", "--set", "data.packing=true")
    assert result.exit_code == 0, result.output
    assert "longer than 64" in result.output and "truncated" in result.output
    assert "packed 21 samples into" in result.output and "% full" in result.output


def test_another_template_than_the_models_own_is_a_problem_unless_allowed(mmft: Mmft) -> None:
    write(Path("data.json"), [qa("Yes.")])
    vicuna = ("--set", "data.chat_template=vicuna", "--set", "data.max_length=256")
    result = mmft("check", "tiny.py", *vicuna)
    assert result.exit_code == 2 and "data.allow_template_difference=True" in result.output
    allowed = mmft("check", "tiny.py", *vicuna, "--set", "data.allow_template_difference=true")
    assert allowed.exit_code == 0, allowed.output
    assert "template differs from the model's own" in allowed.output


def test_a_file_is_recognised_and_checked_without_a_model(mmft: Mmft) -> None:
    records = [qa(f"Answer {k}.", "<image>\nWhat?", image="good.png") for k in range(3)]
    write(Path("llava.json"), [*records, records[0]])
    result = mmft("check", "llava.json")
    assert (
        "looks like llava: it has " in result.output
        and "not opened; say where they are with --image-folder" in result.output
    )
    unopened = "all records can be trained on, but none of the 1 pictures was opened: say where they are"
    assert f"ok: {unopened}" in result.output and "all of it can be trained on" not in result.output
    assert unopened[1:] in Path("work_dirs/check/llava/report.html").read_text("utf-8")
    write(Path("llava.json"), [*records, records[0], qa("Marks.", "<image> and <image>")])
    options = ("--data-map", "llava", "--image-folder", "pictures", "--max-bad-fraction")
    assert mmft("check", "llava.json", *options, "0.1").exit_code == 2
    result = mmft("check", "llava.json", *options, "0.5")
    assert result.exit_code == 0, result.output
    assert "5, 4 can be trained on" in result.output and "1 files in 4 places, 0 bad" in result.output
    assert "1 (25.0%); most often, 2 times: record 1" in result.output and "length in characters" in result.output
    assert Path("work_dirs/check/llava/report.html").is_file()


def test_an_image_folder_that_is_not_there_is_named(mmft: Mmft) -> None:
    write(Path("llava.json"), [qa("A.")])
    result = mmft("check", "llava.json", "--image-folder", "nowhere")
    assert result.exit_code != 0
    assert "--image-folder: nowhere is not a folder" in f"{result.output}{result.exception}"


def test_a_files_missing_images_are_a_failure(mmft: Mmft) -> None:
    write(Path("llava.json"), [qa("A.", "<image>\nWhat?", image="no.png"), *(qa(f"{k}") for k in range(300))])
    result = mmft("check", "llava.json", "--data-map", "llava", "--image-folder", "pictures")
    assert result.exit_code == 2 and "problem: 1 images cannot be read" in result.output


def test_lengths_of_a_file_are_counted_in_the_tokens_of_a_model(mmft: Mmft, tiny_llm_path: Path) -> None:
    Path("a.jsonl").write_text("".join(json.dumps({"instruction": "Hi", "output": "Yes"}) + "\n" for _ in range(3)))
    result = mmft("check", "a.jsonl", "--data-map", "alpaca", "--llm", str(tiny_llm_path), "--chat-template", "chatml")
    assert result.exit_code == 0, result.output
    assert "length in tokens of" in result.output


def test_a_file_broken_in_the_middle_tells_where_and_what_was_read_before(mmft: Mmft) -> None:
    Path("a.jsonl").write_text(json.dumps({"instruction": "Hi", "output": "Yes"}) + '\n{"instruction": "H')
    result = mmft("check", "a.jsonl", "--data-map", "alpaca")
    assert result.exit_code == 2
    assert "problem: reading stopped after 1 records: a.jsonl line 2" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no.jsonl"], "no.jsonl: no such file"),
        (["no.json"], "no.json: no such file; give a data file, or a config"),
        ([r"D:\no.json"], "in WSL /mnt/d/no.json"),
        ([r"D:\no.jsonl"], "in WSL /mnt/d/no.jsonl"),
        (["empty.jsonl"], "empty.jsonl: "),
        (["odd.jsonl"], "odd.jsonl: no data map knows records with the keys zzz; name one with --data-map: "),
        (["odd.jsonl", "--data-map", "alpacca"], "did you mean 'alpaca'"),
    ],
)
def test_a_file_that_cannot_be_checked_is_one_line(mmft: Mmft, arguments: list[str], said: str) -> None:
    Path("empty.jsonl").write_text("")
    Path("odd.jsonl").write_text('{"zzz": 1}\n')
    result = mmft("check", *arguments)
    assert isinstance(result.exception, MmftError) and said in str(result.exception)


def test_an_option_that_would_be_passed_over_is_refused(mmft: Mmft) -> None:
    result = mmft("check", "tiny.py", "--llm", "x")
    assert result.exit_code == 2 and "--llm is for a data file" in result.output
    result = mmft("check", "a.jsonl", "--set", "data.max_length=3")
    assert result.exit_code == 2 and "--set is for a config" in result.output


@pytest.fixture
def shown(mmft: Mmft) -> Mmft:
    records = [qa(f"Answer {k}.") for k in range(9)]
    records[4] = qa("A <script>alert(1)</script>\x1b[31m cat.", "<image>\nWhat?", image="good.png")
    records[6] = {"conversations": 7, "note": "unreadable"}
    write(Path("data.json"), records)
    return mmft


def test_a_record_is_shown_by_its_number_and_by_what_it_says(shown: Mmft) -> None:
    one = shown("show", "tiny.py", "--index", "3").output
    assert "data.json record 3: " in one and "⟦Answer 2.<|im_end|>⟧" in one and "record 4" not in one
    two = shown("show", "tiny.py", "--index", "3", "-n", "2").output
    assert "record 3: " in two and "record 4: " in two and "record 5" not in two
    found = shown("show", "tiny.py", "--search", "aNSWER 8").output
    assert "record 9: " in found and "record 1" not in found
    assert "record 7: dropped: " in shown("show", "tiny.py", "--search", "unreadable").output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--index", "99"], "no record at record 99 on; looked in data.json"),
        (["--search", "zebra"], "no record that says 'zebra' from record 1 on"),
        (["--dataset", "1"], "--dataset 1: there are 1, counted from 0"),
        (["--packed", "99", "--set", "data.max_bad_fraction=1"], "--packed 99: there are "),
    ],
)
def test_what_is_not_there_is_one_line(shown: Mmft, arguments: list[str], said: str) -> None:
    result = shown("show", "tiny.py", *arguments)
    assert isinstance(result.exception, MmftError) and said in str(result.exception)
    assert result.stdout == ""


def test_an_escape_sequence_of_the_data_does_not_reach_the_terminal(shown: Mmft) -> None:
    output = shown("show", "tiny.py", "--index", "5").output
    assert "␛[31m cat." in output and "\x1b[31m" not in output


def test_a_packed_row_is_shown_with_its_borders(shown: Mmft) -> None:
    output = shown("show", "tiny.py", "--packed", "1", "--set", "data.max_bad_fraction=1").output
    assert "row 1 of " in output and "── 1 of " in output and "· tokens 0-" in output and "% full)" in output


def test_the_page_escapes_the_data_and_carries_its_pictures(shown: Mmft) -> None:
    assert shown("show", "tiny.py", "--index", "5", "--html", "pages/show.html").exit_code == 0
    page = Path("pages/show.html").read_text("utf-8")
    assert "<script" not in page and "\x1b" not in page and "http" not in page
    assert "A <script>alert(1)</script>␛[31m cat." in unescape(re.sub(r"<[^>]*>", "", page))
    assert 'class="trained" title="' in page and 'class="context" title="' in page
    data = page.partition('src="data:image/png;base64,')[2].partition('"')[0]
    with Image.open(io.BytesIO(base64.b64decode(data))) as thumbnail:
        assert thumbnail.size == (128, 96)


def test_a_picture_that_cannot_be_shown_says_why_on_the_page(shown: Mmft) -> None:
    Path("pictures/good.png").write_bytes(b"")
    shown("show", "tiny.py", "--index", "5", "--html", "show.html")
    page = Path("show.html").read_text("utf-8")
    assert "is empty (0 bytes), not an image" in page and "<img" not in page


def test_records_the_template_cannot_render_are_counted_and_listed(mmft: Mmft, tiny_llm_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tool = {"messages": [turns[0], {"role": "assistant", "content": "", "tool_calls": [call]}]}
    Path("a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [{"messages": turns}, tool]), "utf-8")
    options = ("--llm", str(tiny_llm_path), "--chat-template", "vicuna")
    result = mmft("check", "a.jsonl", *options, "--out", "out")
    assert result.exit_code == 2 and "2, 1 can be trained on" in result.output
    assert "1  not rendered: " in result.output and "'vicuna'" in result.output
    assert "1 of them since the chat template cannot render them" in result.output
    line = json.loads(Path("out/dropped.jsonl").read_text("utf-8"))
    assert (line["record"], line["action"]) == (2, "not rendered")
    assert mmft("check", "a.jsonl", *options, "--max-bad-fraction", "0.5").exit_code == 0


def test_pictures_that_the_named_map_does_not_read_are_a_problem(mmft: Mmft) -> None:
    write(Path("llava.json"), [qa("A.", "<image>\nWhat?", image="good.png"), qa("B.")])
    result = mmft("check", "llava.json", "--data-map", "wizardlm")
    assert result.exit_code == 2
    assert "1 records have pictures (first record 1) that the data map 'wizardlm' does not read" in result.output
    assert "1 <image> marks stay as text; it looks like llava" in result.output


def test_a_config_whose_map_is_wrong_is_told_the_one_that_fits(mmft: Mmft) -> None:
    write(Path("data.json"), [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])
    result = mmft("check", "tiny.py")
    assert result.exit_code == 2 and "problem: this looks like `openai`: it has messages[].role" in result.output


def test_pictures_inside_a_table_are_checked_with_a_folder_for_them(mmft: Mmft) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    row = {"image": Path("pictures/good.png").read_bytes(), "conversations": qa("A.", "<image>\nB?")["conversations"]}
    parquet.write_table(arrow.Table.from_pylist([row]), "a.parquet")
    assert "extract_to" in str(mmft("check", "a.parquet").exception)
    for options in (("--extract-to", "out"), ("--source-option", "extract_to=out")):
        result = mmft("check", "a.parquet", *options)
        assert result.exit_code == 0, result.output
        assert "looks like llava" in result.output and "1 <image> marks, 1 images" in result.output


def test_a_folder_is_checked_as_a_file_is(mmft: Mmft) -> None:
    Path("books").mkdir()
    for name in ("a.md", "b.txt"):
        Path("books", name).write_text(f"Once upon a time, {name}.", "utf-8")
    result = mmft("check", "books")
    assert result.exit_code == 0 and "2, 2 can be trained on" in result.output
    assert Path("work_dirs/check/books/report.html").is_file()


def test_show_of_a_file_names_the_command_for_files(mmft: Mmft) -> None:
    write(Path("llava.json"), [qa("A.")])
    result = mmft("show", "llava.json")
    assert result.exit_code == 2 and "show needs a config" in result.output
    assert "mmft data check llava.json" in result.output


def test_an_option_for_files_names_the_setting_of_a_config(mmft: Mmft) -> None:
    result = mmft("check", "tiny.py", "--data-map", "alpaca")
    assert "in a config it is --set data.datasets.0.data_map=..." in result.output
