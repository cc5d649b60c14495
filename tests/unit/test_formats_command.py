"""`mmft data formats`: the list, one format, and the format of a file, a folder or a glob."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mmft.cli import cli
from mmft.data.formats import (
    format_of,
    source_use,
)
from mmft.errors import AmbiguousName, DataError
from mmft.plugins import Plugins, load_plugins

# mmft data formats


def test_formats_lists_them_all_and_shows_one(plugins: Plugins) -> None:
    listed = CliRunner().invoke(cli, ["data", "formats"]).output
    assert all(name in listed for name in plugins.data_maps.names()) and "messages[].role" in listed
    shown = CliRunner().invoke(cli, ["data", "formats", "alpaca"]).output
    assert json.loads(shown[shown.index("{") :]) == plugins.data_maps.get("alpaca").examples[0]


@pytest.mark.parametrize(
    ("suffix", "text"), [("json", '[{"query": "a", "response": "b"}]'), ("csv", "query,response\na,b\n")]
)
def test_formats_says_which_format_a_file_is_in(suffix: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / f"data.{suffix}"
    file.write_text(text, "utf-8")
    result = CliRunner().invoke(cli, ["data", "formats", "--file", str(file)])
    assert result.exit_code == 0 and "query_response: it has query, response" in result.output


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("a.jsonl", '{"x": 1}\n', "in no known format (keys of the first record: 'x')"),
        ("a.xyz", "", "no data source reads '.xyz'; allowed: .csv, .json, .jsonl"),
        ("README", "", "no data source reads 'README'; allowed: .csv"),
    ],
)
def test_a_file_in_no_known_format_is_one_clear_line(name: str, text: str, error: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(text, "utf-8")
    result = CliRunner().invoke(cli, ["data", "formats", "--file", str(file)])
    assert isinstance(result.exception, DataError) and error in str(result.exception)


# folders, globs and options of a source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    for name in ("a.jsonl", "deep/b.jsonl"):
        (tmp_path / name).write_text('{"query": "a", "response": "b"}\n', "utf-8")
    (tmp_path / "1.png").touch()
    return tmp_path


@pytest.mark.parametrize("inside", ["", "*.jsonl", "**/*.jsonl"])
def test_a_folder_and_a_glob_are_in_a_format_as_a_file_is(inside: str, folder: Path) -> None:
    result = CliRunner().invoke(cli, ["data", "formats", "--file", str(folder / inside)])
    assert result.exit_code == 0 and "query_response: it has query, response" in result.output


def test_files_of_several_sources_are_an_error_that_counts_them(folder: Path, plugins: Plugins) -> None:
    (folder / "README.md").touch()
    with pytest.raises(AmbiguousName, match=r"several data sources: jsonl \(2\), text \(1\); name one with --source"):
        source_use(folder, plugins)
    assert source_use(folder, plugins, "jsonl").options == {"path": str(folder)}


def test_an_option_the_source_does_not_have_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("query;response\na;b\n", "utf-8")
    options = ("--source-option", "delimter=;")
    result = CliRunner().invoke(cli, ["data", "formats", "--file", str(tmp_path / "a.csv"), *options])
    assert isinstance(result.exception, DataError) and "options: delimiter, rename" in str(result.exception)
    options = ("--source-option", "delimiter=;")
    result = CliRunner().invoke(cli, ["data", "formats", "--file", str(tmp_path / "a.csv"), *options])
    assert "query_response" in result.output
    with pytest.raises(DataError, match=r'one column, .query;response.*delimiter=";"'):
        format_of(tmp_path / "a.csv", load_plugins())


def test_a_name_beside_a_file_is_refused(folder: Path) -> None:
    result = CliRunner().invoke(cli, ["data", "formats", "llava", "--file", str(folder / "a.jsonl")])
    assert result.exit_code == 2 and "give llava or --file, not both" in result.output


# files that are not what their name says


@pytest.mark.parametrize(
    ("name", "content", "remedy"),
    [
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
        ("a.json", b"\xff\xfe" + '[{"a": 1}]'.encode("utf-16-le"), "iconv -f UTF-16 -t UTF-8"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
        ("c.jsonl", b'[{"a": 1}, {"a": 2}]', "--source json"),
        ("c.json", b'{"a": 1}\n{"a": 2}\n', "is 'jsonl'"),
    ],
)
def test_the_remedy_fits_the_file(name: str, content: bytes, remedy: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=remedy):
        format_of(tmp_path / name, load_plugins())
