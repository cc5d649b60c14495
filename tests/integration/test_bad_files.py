"""Files that are not what their name says, or not whole: what a run and `mmft data check FILE` say of them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_bench import GOOD, Bench

from mmft.errors import DataError
from mmft.plugins import Plugins

BOM = b"\xef\xbb\xbf"


@pytest.fixture
def bench(tmp_path: Path, plugins: Plugins, tiny_llm_path: Path) -> Bench:
    """An empty folder of pictures but for `dot.png`, and a model that takes four tokens an image."""
    return Bench(tmp_path, plugins, tiny_llm_path)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_a_byte_order_mark_and_crlf_change_nothing(suffix: str, bench: Bench) -> None:
    plain = bench.write(GOOD, f"plain.{suffix}")
    strange = bench.write(BOM + plain.read_bytes().replace(b"\n", b"\r\n") + b"\r\n", f"strange.{suffix}")
    expected, found = bench.prepare(plain), bench.prepare(strange)
    assert len(found) == 2 and not len(found.drops) and not bench.check(strange).problems
    assert all(expected[item].input_ids.tolist() == found[item].input_ids.tolist() for item in range(2))


LATIN1 = b'{"conversations": [{"from": "human", "value": "caf\xe9?"}, {"from": "gpt", "value": "Yes."}]}'
# The file, and how the one line starts that ends the reading: nothing is trained of a file that is not whole.
FILES: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "truncated JSON": (
        "data.json",
        lambda whole: whole[:-60],
        "{file}: not JSON at column ",
    ),
    "JSON cut between two records": (
        "data.json",
        lambda whole: whole[: whole.index(b', {"id"')],
        "{file}: not JSON at ",
    ),
    "truncated JSON lines": (
        "data.jsonl",
        lambda whole: whole[:-60],
        "{file} line 2: the file ends inside this line, which starts at byte ",
    ),
    "latin-1 JSON": ("data.json", lambda whole: b"[" + LATIN1 + b"]", "{file} line 1: not UTF-8 at byte 51: "),
    "GBK JSON": (
        "data.json",
        lambda whole: '[{"instruction": "请介绍一下你自己。"}]'.encode("gbk"),
        "{file} line 1: not UTF-8 at byte 18: ",
    ),
    "JSON that is not a list": ("data.json", lambda whole: b"3", "{file}: a number; allowed: a list of objects"),
    "JSON lines under the name of JSON": (
        "data.json",
        lambda whole: b'{"a": 1}\n{"a": 2}\n',
        "{file}: not JSON at line 2 column 1: Extra data; a file of one object a line is 'jsonl': in a config use(",
    ),
    "JSON under the name of JSON lines": (
        "data.jsonl",
        lambda whole: b"[\n" + whole.replace(b"\n", b",\n") + b"]",
        "{file}: not one object a line: its first line is '['; a file that is one list",
    ),
    "empty": ("data.jsonl", lambda whole: b"\n \n", "{file}: the file is empty; allowed: one object a line"),
}
REMEDY = {
    "truncated": "download it again",
    "cut": "download it again",
    "latin-1": "iconv -f LATIN1 -t UTF-8",
    "under the name of JSON": "--source json",
    "GBK": "iconv -f GB18030 -t UTF-8",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_to_its_end_is_refused_with_one_line(name: str, bench: Bench) -> None:
    file_name, spoil, line = FILES[name]
    whole = bench.write(GOOD, file_name).read_bytes()
    file = bench.write(spoil(whole), file_name)
    for refuse in (lambda: bench.prepare(file), lambda: bench.prepare(file, on_bad_sample="error")):
        with pytest.raises(DataError) as refused:
            refuse()
        said = str(refused.value)
        assert said.startswith(line.format(file=file)) and "\n" not in said and len(said) < 400
        assert all(remedy in said for word, remedy in REMEDY.items() if word in name)
    assert not list((bench.folder / "cache").glob("*"))  # nothing of it is kept


def test_a_check_tells_what_it_read_of_a_file_that_is_cut_off(bench: Bench) -> None:
    file = bench.write(GOOD, "data.jsonl")
    file.write_bytes(file.read_bytes()[:-60])
    (problem,) = bench.check(file).problems
    assert problem.startswith(f"reading stopped after 1 records: {file} line 2: the file ends inside this line")


def test_a_latin_1_line_is_dropped_and_the_others_are_trained(bench: Bench) -> None:
    good = json.dumps(GOOD[0]).encode()
    file = bench.write(b"\n".join([good, LATIN1, good]), "data.jsonl")
    store = bench.prepare(file)
    (drop,) = store.drops
    assert drop.record == 2 and drop.reason == (
        f"not UTF-8: data.jsonl line 2 at byte 50 of the line, {len(good) + 51} of the file: invalid continuation byte "
        "(found 0xe9); save the file as UTF-8, for example with iconv -f LATIN1 -t UTF-8"
    )
    assert len(store) == 2 and [drop.record for drop in bench.check(file).drops] == [2]


def test_where_no_record_can_be_read_one_error_names_the_first_reasons(bench: Bench) -> None:
    file = bench.write(b"one\ntwo\nthree\nfour\n", "data.jsonl")
    with pytest.raises(DataError) as refused:
        bench.prepare(file)
    lines = str(refused.value).splitlines()
    assert (
        lines[0]
        == "dropped 4 of 4 records: 4 not JSON; at most 100.0% is allowed (data.max_bad_fraction). The first ones:"
    )
    assert [line.split(": ")[:3] for line in lines[1:]] == [
        [f"    {file} record {n}", "not JSON", f"data.jsonl line {n} column 1"] for n in (1, 2, 3)
    ]
    for data_map in ("llava", None):
        with pytest.raises(
            DataError, match=r"none of the 4 records can be read. The first ones:\n    record 1: not JSON"
        ):
            bench.check(file, data_map=data_map)


def test_a_format_is_recognised_behind_bad_records(bench: Bench) -> None:
    file = bench.write(b"oops\n" * 30 + json.dumps(GOOD[1]).encode(), "data.jsonl")
    report = bench.check(file, data_map=None)
    assert dict(report.facts)["format"].startswith("looks like llava: ")
    assert dict(report.facts)["records"] == "31, 1 can be trained on"
