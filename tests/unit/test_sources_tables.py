"""The `csv`, `tsv` and `parquet` sources."""

import re
import subprocess
import sys
import tracemalloc
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmft.errors import DataError
from mmft.plugins import load_plugins
from mmft.types import BadRecord
from mmft_plugins.tables import load_csv, load_parquet, load_parquet_from, load_tsv, parquet_files


def write(folder: Path, content: str | bytes, name: str = "a.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_every_value_of_a_csv_is_a_string(tmp_path: Path) -> None:
    path = write(tmp_path, 'id,flag,text\n007,true,"a, ""b""\nc"\n1e3,,NaN\n')
    assert list(load_csv(path)) == [
        {"id": "007", "flag": "true", "text": 'a, "b"\nc'},
        {"id": "1e3", "flag": "", "text": "NaN"},
    ]


def test_byte_order_mark_crlf_and_blank_lines_change_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, '\ufeff"a",b\r\n\r\n1,ä\r\n')
    assert list(load_csv(path)) == [{"a": "1", "b": "ä"}]


def test_tsv_is_separated_by_tabs_and_csv_takes_another_delimiter(tmp_path: Path) -> None:
    assert list(load_tsv(write(tmp_path, "a\tb\n1,5\t2\n"))) == [{"a": "1,5", "b": "2"}]
    assert list(load_csv(write(tmp_path, "a;b\n1,5;2\n"), delimiter=";")) == [{"a": "1,5", "b": "2"}]


@pytest.mark.parametrize("row", ["1", "1,2,3"])
def test_a_ragged_row_is_a_bad_record_and_the_rows_behind_it_are_read(row: str, tmp_path: Path) -> None:
    first, bad, last = load_csv(write(tmp_path, f'a,b\n"x\ny",2\n\n{row}\n3,"4\n5"\n'))
    assert (first, last) == ({"a": "x\ny", "b": "2"}, {"a": "3", "b": "4\n5"})
    assert isinstance(bad, BadRecord)
    assert re.match(
        rf"wrong number of fields: a.csv line [45] has {row.count(',') + 1}, the header 2 \('a', 'b'\)", bad.reason
    )


def test_a_row_that_is_not_utf8_is_a_bad_record_and_the_rows_behind_it_are_read(tmp_path: Path) -> None:
    first, bad, last = load_csv(write(tmp_path, b'\xef\xbb\xbfa,b\n1,\xc3\xa9\n"1\n",caf\xe9\n2,3\n'))
    assert (first, last) == ({"a": "1", "b": "é"}, {"a": "2", "b": "3"})
    assert isinstance(bad, BadRecord)
    assert re.match(r"not UTF-8: a.csv line 3 holds the byte 0xe9; .*iconv", bad.reason)


def test_columns_get_other_names(tmp_path: Path) -> None:
    path = write(tmp_path, "question,answer,n\n1\n1,2,3\n4,5,6\n")
    bad, *rows = load_csv(path, rename={"question": "instruction", "answer": "output"})
    assert isinstance(bad, BadRecord)
    assert rows == [{"instruction": a, "output": b, "n": c} for a, b, c in ("123", "456")]
    with pytest.raises(
        DataError, match=r"a.csv: rename: no column 'qestion'; columns found: 'question', 'answer', 'n'"
    ):
        list(load_csv(path, rename={"qestion": "instruction"}))
    with pytest.raises(DataError, match=r"a.csv: rename gives two columns the name 'n'; columns found: "):
        list(load_csv(path, rename={"question": "n"}))
    swapped = list(load_csv(path, rename={"question": "answer", "answer": "question"}))
    assert swapped[1] == {"answer": "1", "question": "2", "n": "3"}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "the file is empty; its first line must name the columns"),
        ("a,b,a\n1,2,3\n", "line 1: the column 'a' is there twice"),
        ("a,,c\n1,2,3\n", "line 1: a column has no name"),
        ('a,b\n1,"2\n3,4\n', "line 2: unexpected end of data; the usual cause is a quote that is not closed"),
        ('a,b\n1,"2"x\n', "line 2: ',' expected after '\"'"),
        (b"a,caf\xe9\n1,2\n", "line 1: not UTF-8: it holds the byte 0xe9; .*iconv"),
        ("a,b\n1,2\n".encode("utf-16"), "line 1: not UTF-8: it holds the byte 0xff"),
    ],
)
def test_a_bad_csv_is_refused_with_the_line(content: str | bytes, problem: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"a.csv:? {problem}"):
        list(load_csv(write(tmp_path, content)))


def test_a_field_of_two_megabytes_and_a_nul_are_passed_on(tmp_path: Path) -> None:
    text = "x" * 2_000_000 + "\0"
    assert list(load_csv(write(tmp_path, f"a,b\n{text},1\n"))) == [{"a": text, "b": "1"}]


def test_a_missing_csv_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.csv: cannot be read: No such file"):
        list(load_csv(tmp_path / "nowhere.csv"))


def parquet(path: Path, first: int, count: int, group: int = 7) -> Path:
    numbers = range(first, first + count)
    table = pa.table({"n": list(numbers), "turns": [[{"role": "user", "content": str(n)}] for n in numbers]})
    pq.write_table(table, path, row_group_size=group)
    return path


def test_parquet_rows_keep_their_types(tmp_path: Path) -> None:
    table = pa.table({"id": ["1", None], "image": [b"\x89PNG", b""], "turns": [[{"role": "user"}], []]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert list(load_parquet(tmp_path / "a.parquet")) == [
        {"id": "1", "image": b"\x89PNG", "turns": [{"role": "user"}]},
        {"id": None, "image": b"", "turns": []},
    ]


def test_parquet_random_access_gives_what_reading_on_gives(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", 0, 20)
    parquet(tmp_path / "b.parquet", 20, 0)
    parquet(tmp_path / "c.parquet", 20, 2500, group=1200)
    assert [record["n"] for record in load_parquet(tmp_path)] == list(range(2520))
    for start in (0, 1, 6, 7, 13, 19, 20, 21, 1100, 1219, 1220, 1221, 2519, 2520, 3000):
        found = list(load_parquet_from(start, tmp_path))
        assert found == list(islice(load_parquet(tmp_path), start, None))


def test_parquet_reads_only_the_columns_named(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", 0, 2)
    assert list(load_parquet(path, columns=["n"])) == [{"n": 0}, {"n": 1}]
    with pytest.raises(DataError, match=r"a.parquet: no column 'm'; columns found: 'n', 'turns'"):
        list(load_parquet(path, columns=["n", "m"]))


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", 0, 50)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a.parquet: not a parquet file, or damaged: "):
        list(load_parquet(path))
    with pytest.raises(DataError, match=r"nowhere.parquet: cannot be read: No such file"):
        list(load_parquet(tmp_path / "nowhere.parquet"))


@pytest.mark.parametrize("load", [load_csv, load_parquet])
def test_memory_does_not_grow_with_the_file(load: Any, tmp_path: Path) -> None:
    path = tmp_path / "a"
    if load is load_csv:
        path.write_text("a,b\n" + f"{'word ' * 100},1\n" * 40_000)
    else:
        table = pa.table({"a": [f"{n} {'word ' * 100}" for n in range(40_000)]})
        pq.write_table(table, path, use_dictionary=False, compression="none")
        del table
    assert path.stat().st_size > 20e6
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    arrow = 0
    for number, _ in enumerate(load(path)):
        if number % 1000 == 0:
            arrow = max(arrow, pa.total_allocated_bytes() - before)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert number == 39_999
    assert peak < 6e6 and arrow < 6e6


BLOCKED = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "pyarrow":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from mmft.errors import DataError
from mmft_plugins.tables import load_csv, load_parquet, parquet_files
assert list(load_csv(sys.argv[1])) == [{"a": "1"}]
for call in (lambda: parquet_files(sys.argv[1]), lambda: next(load_parquet(sys.argv[1]))):
    try:
        call()
    except DataError as error:
        print(error)
"""


def test_without_pyarrow_the_error_names_what_to_install(tmp_path: Path) -> None:
    path = write(tmp_path, "a\n1\n")
    ran = subprocess.run([sys.executable, "-c", BLOCKED, path], check=False, capture_output=True, text=True)
    assert (
        ran.stdout.splitlines()
        == ["source 'parquet' needs the package 'pyarrow', which is missing: pip install 'mmft[parquet]'"] * 2
    ), ran.stderr


def test_the_tables_are_offered() -> None:
    datasets = load_plugins().datasets
    assert datasets.get("csv").load is load_csv and datasets.get("tsv").load is load_tsv
    assert datasets.get("parquet").load_from is load_parquet_from and datasets.get("parquet").files is parquet_files
