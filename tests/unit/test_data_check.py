"""What `mmft data check` counts: duplicates, lengths, reasons; and that its report lets nothing of the data act."""

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.progress import Progress

from mmft import hookimpl
from mmft.data import measure
from mmft.data.argument import is_data_file, report_name
from mmft.data.check_file import FileOptions, check_file
from mmft.data.check_report import CheckReport, count_outcomes, heading, html_page, terminal_lines, write_report
from mmft.data.headers import ImageReport
from mmft.data.measure import duplicates, hash_samples, hash_text, histogram
from mmft.data.store import Drop, TokenStore
from mmft.data.visible import one_line, visible
from mmft.plugins import Plugins, load_plugins
from mmft.specs import DataMap
from mmft.types import Conversation, Image, Message, RawRecord, Text

EVIL = '<script>alert(1)</script>\x1b[31m\x9b\u202e"\ud800'


def store_of(samples: list[list[int]], images: list[list[str]] | None = None) -> TokenStore:
    ids = np.array([i for sample in samples for i in sample], np.int32)
    offsets = np.cumsum([0, *map(len, samples)]).astype(np.int64)
    return TokenStore(
        ids=ids, loss=np.ones(len(ids), np.bool_), offsets=offsets, images=images or [[] for _ in samples],
        index=np.arange(len(samples)), drops=(), num_records=len(samples),
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=20), st.integers(1, 9))
def test_samples_are_duplicates_when_and_only_when_their_ids_are_equal(samples: list[list[int]], block: int) -> None:
    before, measure.BLOCK = measure.BLOCK, block
    try:
        hashes = hash_samples(store_of(samples))
    finally:
        measure.BLOCK = before
    for i, one in enumerate(samples):
        for j, other in enumerate(samples):
            assert (hashes[i] == hashes[j]) == (one == other), (one, other)
    assert duplicates(hashes).num_extra == len(samples) - len({tuple(sample) for sample in samples})


def test_the_same_words_about_another_picture_are_no_duplicate() -> None:
    same, other = store_of([[1, 2]] * 2, [["a.png"]] * 2), store_of([[1, 2]] * 2, [["a.png"], ["b.png"]])
    assert duplicates(hash_samples(same)).num_extra == 1
    assert duplicates(hash_samples(other)).num_extra == 0


def test_the_most_frequent_duplicate_comes_first_with_its_first_place() -> None:
    hashes = np.array([hash_text(text) for text in "xaybabb"], np.uint64)
    assert duplicates(hashes).most == ((3, 3), (2, 1))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 10_000), min_size=1))
def test_every_length_is_in_one_bar_and_quantiles_are_lengths_that_occur(lengths: list[int]) -> None:
    found = histogram(lengths, "tokens")
    assert found is not None
    assert sum(count for _, _, count in found.bars) == len(lengths)
    for low, high, count in found.bars:
        assert count == sum(low <= length <= high for length in lengths)
    assert set(found.quantiles.values()) <= set(lengths)
    assert (found.quantiles["min"], found.quantiles["max"]) == (min(lengths), max(lengths))
    assert len(found.bars) <= measure.MAX_BARS + 3


def test_quantiles_are_exact() -> None:
    found = histogram(range(1, 101), "tokens")
    assert found and found.quantiles == {"min": 1, "p50": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100}
    assert found.mean == 50.5 and histogram([], "tokens") is None


def test_reasons_are_counted_by_kind_with_the_first_of_each() -> None:
    drops = [Drop("a.json", k, "", f"longer than 8 tokens: {8 + k}") for k in (1, 2)]
    drops.append(Drop("a.json", 3, "x", "nothing to train"))
    drops.append(Drop("a.json", 4, "", "longer than 8 tokens: 9", "truncated"))
    assert [(o.action, o.reason, o.count) for o in count_outcomes(drops)] == [
        ("dropped", "longer than 8 tokens", 2),
        ("dropped", "nothing to train", 1),
        ("truncated", "longer than 8 tokens", 1),
    ]
    assert count_outcomes(drops)[0].first == "a.json record 1: longer than 8 tokens: 9"


def test_what_acts_on_a_screen_becomes_a_picture_of_itself() -> None:
    assert visible("a\x1b[31m\r\n\t\x7f\x9b\u202e\ud800好") == "a␛[31m␍\n\t␡\ufffd\ufffd\ufffd好"
    assert one_line("a\nb\x00" + "c" * 99, 10) == "a b␀ccccc…"


@pytest.fixture
def evil_report() -> CheckReport:
    drop = Drop(EVIL, 1, EVIL, f"bad: {EVIL}")
    return CheckReport(
        subject=EVIL, facts=((EVIL, EVIL),), outcomes=count_outcomes([drop]), lengths=histogram([1, 2], EVIL),
        images=ImageReport(1, {EVIL: EVIL}), proof=(EVIL,), problems=(EVIL,), drops=(drop,),
    )  # fmt: skip


def test_nothing_of_the_data_acts_in_the_terminal(evil_report: CheckReport) -> None:
    text = "\n".join(line.plain for line in terminal_lines(evil_report))
    assert "␛[31m" in text and not set(text) & set("\x1b\x9b\u202e\ud800")


def test_nothing_of_the_data_acts_on_the_page(evil_report: CheckReport) -> None:
    page = html_page(evil_report)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;␛[31m" in page
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert not set(page) & set("\x1b\x9b\u202e\ud800")


def test_a_lone_surrogate_stops_no_report(tmp_path: Path, evil_report: CheckReport) -> None:
    write_report(evil_report, tmp_path / "out", tmp_path / "pages" / "a.html")
    line = json.loads((tmp_path / "out" / "dropped.jsonl").read_text("utf-8"))
    assert line["record"] == 1 and line["action"] == "dropped" and line["reason"].startswith("bad: <script>")
    assert (tmp_path / "pages" / "a.html").read_text("utf-8").startswith("<!doctype html>")
    assert len((tmp_path / "out" / "bad_images.jsonl").read_text("utf-8").splitlines()) == 1


def test_a_report_without_problems_exits_with_0(evil_report: CheckReport) -> None:
    assert evil_report.exit_code == 2
    fine = replace(evil_report, problems=())
    assert fine.exit_code == 0 and "All of it can be trained on." in html_page(fine)


@pytest.mark.parametrize(
    ("name", "text", "data"),
    [
        ("a.jsonl", "", True),
        ("a.csv", "", True),
        ("a.py", "", False),
        ("a.json", '[{"instruction": "x"}]', True),
        ("a.json", '{"version": 1, "data": [{"x": 1}]}', True),
        ("a.json", '\ufeff  {"model": {}, "data": {}, "optim": {}, "runtime": {}}', False),
    ],
)
def test_data_and_config_are_told_apart(plugins: Plugins, tmp_path: Path, name: str, text: str, data: bool) -> None:
    (tmp_path / name).write_text(text, "utf-8")
    assert is_data_file(str(tmp_path / name), plugins) is data
    assert not is_data_file("llava_pretrain", plugins)


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("'a' is missing; keys found: 'b'", "'a' is missing"),
        ("messages[3]: the arguments are not JSON (Expecting value: line 1)", "messages[]: the arguments are not JSON"),
        ("'x' is no role; allowed: user", "'x' is no role"),
        ("nothing to train: no text", "nothing to train"),
        ("no place for tools; use another", "no place for tools; use another"),
    ],
)
def test_the_heading_of_a_reason_is_a_whole_sentence(reason: str, said: str) -> None:
    assert heading(reason) == said


def test_a_folder_is_data_unless_it_is_a_run_or_called_as_a_config(
    plugins: Plugins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("books", "run", "llava_pretrain", "empty"):
        Path(name).mkdir()
    for file in ("books/a.md", "run/dropped.jsonl", "run/config.json", "llava_pretrain/a.json"):
        Path(file).touch()
    assert [is_data_file(name, plugins) for name in ("books", "*.jsonl")] == [True, True]
    assert not any(is_data_file(name, plugins) for name in ("run", "llava_pretrain", "empty", "nothing"))


@pytest.mark.parametrize(("glob", "name"), [("a/b.jsonl", "b"), ("a/b/*.jsonl", "b"), ("*.jsonl", "files")])
def test_the_report_of_a_glob_is_called_as_its_folder(glob: str, name: str) -> None:
    assert report_name(Path(glob)) == name


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("What?", "2 images, placed by the data map: no record has <image> marks"),
        ("<image> What?", "2 <image> marks, 2 images"),
        ("<image> <image>?", "4 <image> marks, 2 images; they differ in 2 records, first record 1"),
    ],
)
def test_marks_are_held_against_images_only_where_the_format_has_marks(
    tmp_path: Path, question: str, said: str
) -> None:
    """A format of a plugin may say in a column that a picture comes first."""
    module = ModuleType("acme")

    def seen(record: RawRecord) -> Conversation:
        asked = Message("user", (Image(record["pic"]), Text(record["q"])))
        return Conversation((asked, Message("assistant", (Text("a"),))))

    def mmft_data_maps() -> list[DataMap]:
        return [DataMap(name="acme_vqa", fn=seen)]

    vars(module)["mmft_data_maps"] = hookimpl(mmft_data_maps)
    (tmp_path / "a.json").write_text(json.dumps([{"pic": "1.png", "q": question}] * 2), "utf-8")
    options = FileOptions(data_map="acme_vqa")
    report = check_file(tmp_path / "a.json", load_plugins([module]), options, Progress(disable=True))
    assert dict(report.facts)["image marks"] == said
