"""What is said of a file that is not UTF-8: a remedy that is followed must not destroy the text."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mmft.errors import DataError
from mmft.types import BadRecord
from mmft_plugins.sources import load_json, load_jsonl
from mmft_plugins.tables import load_csv
from mmft_plugins.text_files import load_text

CHINESE = "请你介绍一下你自己。我是一个私人助手，很高兴为您服务！"
FRENCH = "Le café est fermé: la fenêtre à côté n'était pas à nous."
RUSSIAN = "Привет! Как у тебя дела сегодня?"
GBK, LATIN1 = "iconv -f GB18030 -t UTF-8", "iconv -f LATIN1 -t UTF-8"
FILES: dict[str, tuple[Callable[..., Iterator[Any]], str]] = {
    "a.json": (load_json, '[{{"a": "{}"}}]'),
    "a.jsonl": (load_jsonl, '{{"a": "{}"}}\n'),
    "a.csv": (load_csv, "a,b\n1,{}\n"),
    "b.csv": (load_csv, "a,{}\n1,2\n"),
    "a.txt": (load_text, "{}"),
}


def said_of(name: str, content: bytes, folder: Path) -> str:
    path = folder / name
    path.write_bytes(content)
    try:
        return "".join(one.reason for one in FILES[name][0](path) if isinstance(one, BadRecord))
    except DataError as error:
        return str(error)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("encoding", ["gbk", "gb18030"])
def test_a_chinese_file_is_never_said_to_be_latin_1(name: str, encoding: str, tmp_path: Path) -> None:
    said = said_of(name, FILES[name][1].format(CHINESE).encode(encoding), tmp_path)
    assert "not UTF-8" in said and GBK in said and "LATIN1" not in said and "\n" not in said


@pytest.mark.parametrize("name", FILES)
def test_a_latin_1_file_is_said_to_be_that(name: str, tmp_path: Path) -> None:
    said = said_of(name, FILES[name][1].format(FRENCH).encode("latin-1"), tmp_path)
    assert LATIN1 in said and "GB18030" not in said


@pytest.mark.parametrize("name", FILES)
def test_where_no_encoding_is_sure_none_is_named(name: str, tmp_path: Path) -> None:
    said = said_of(name, FILES[name][1].format(RUSSIAN).encode("cp1251"), tmp_path)
    assert "find out its encoding" in said and "iconv -f" not in said


@pytest.mark.parametrize("name", FILES)
def test_a_byte_lost_from_utf8_is_damage_and_no_encoding(name: str, tmp_path: Path) -> None:
    whole = FILES[name][1].format(CHINESE).encode()
    place = whole.index("下".encode())
    said = said_of(name, whole[:place] + whole[place + 1 :], tmp_path)
    assert "mend or delete it there" in said and "iconv" not in said


def test_the_second_block_of_a_large_file_is_told_as_the_first_would_be(tmp_path: Path) -> None:
    content = '[{"a": "' + "x" * 1_100_000 + '"},\n{"a": "' + CHINESE + '"}]'
    assert GBK in said_of("a.json", content.encode("gbk"), tmp_path)
