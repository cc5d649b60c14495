"""Where a conversion may write: never over what it reads, and with --overwrite only over what a conversion wrote."""

import json
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest

from mmft.cli.convert import convert
from mmft.convert.parity import ParityError, Report, proved, settle
from mmft.convert.place import refuse_out
from mmft.errors import CheckpointError


def written(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("{}", "utf-8")
    return folder


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_result_is_never_written_over_into_or_around_what_is_read(tmp_path, overwrite):
    source = written(tmp_path / "run" / "final", "mmft.json", "weights")
    (tmp_path / "link").symlink_to(source)
    for out, words in (
        (source, "final is"),
        (tmp_path / "link", "link is"),
        (source.parent, "run holds"),
        (source / "in", "in lies in"),
    ):
        with pytest.raises(CheckpointError, match=rf"{words} .*final, which is read; choose another place"):
            refuse_out(out, ("a/name-on-a-hub", None, source), overwrite=overwrite)
        with pytest.raises(CheckpointError), proved(out, sources=(source,), overwrite=overwrite):
            pytest.fail("begun")
    assert (source / "weights").is_file()
    refuse_out(source.parent / "merged", (source,), overwrite=overwrite)


def test_a_source_that_is_a_file_keeps_its_folder(tmp_path):
    source = written(tmp_path / "s2", "projector.safetensors", "mine") / "projector.safetensors"
    with pytest.raises(CheckpointError, match=r"s2 holds .*which is read"):
        refuse_out(tmp_path / "s2", (source,), overwrite=True)


def test_overwrite_replaces_what_a_conversion_wrote_and_nothing_else(tmp_path):
    for number, names in enumerate((("parity.json", "model.gguf"), ("mmft.json",), ("projector.safetensors",), ())):
        out = written(tmp_path / f"ours-{number}", *names)
        refuse_out(out, overwrite=True)
        if names:
            with pytest.raises(CheckpointError, match="exists already; choose another place, or give --overwrite"):
                refuse_out(out, overwrite=False)
    run = written(tmp_path / "run", "metrics.jsonl", "mmft.json")
    others = (
        written(tmp_path / "photos", "a.png"),
        written(tmp_path / "mixed", "projector.safetensors", "a.png"),
        written(tmp_path / "file", "f") / "f",
        run,
        written(run / "final", "mmft.json"),
        written(run / "checkpoint-2", "mmft.json"),
        written(tmp_path / "other" / "checkpoint-5", "mmft.json").parent,
    )
    for out in others:
        with pytest.raises(CheckpointError, match=r"--overwrite replaces only what `mmft convert` wrote"):
            refuse_out(out, overwrite=True)
        with pytest.raises(CheckpointError, match=r"exists already; choose another place$"):
            refuse_out(out, overwrite=False)


def test_a_place_that_cannot_be_one_is_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file is no folder; choose another place"):
        refuse_out(tmp_path / "file" / "below" / "out", overwrite=False)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for out in (".", "..", "../../" + tmp_path.name):
        with pytest.raises(CheckpointError, match="is or holds the folder this was started in"):
            refuse_out(Path(out), overwrite=True)
    monkeypatch.chdir(tmp_path)
    with proved(Path("empty/../empty"), overwrite=False) as temporary:  # an empty folder is free
        (temporary / "new").touch()
    assert (tmp_path / "empty" / "new").is_file()


@contextmanager
def largest_file(size: int):
    """As on a full disk: what is written beyond `size` bytes of a file fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(tmp_path):
    import torch
    from safetensors.torch import save_file

    kept = written(tmp_path / "out", "parity.json", "old")
    writers = (
        lambda path: path.write_bytes(b"x" * 9000),
        lambda path: save_file({"a": torch.zeros(9000)}, path),
    )
    for write in writers:
        with (
            pytest.raises(
                CheckpointError, match=r"out cannot be written: .*; make room on the disk, or choose another"
            ),
            largest_file(4000),
            proved(kept, overwrite=True) as temporary,
        ):
            write(temporary / "a")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert (kept / "old").is_file()


def test_an_error_of_reading_is_not_called_one_of_writing(tmp_path):
    with pytest.raises(OSError, match="not on the hub"), proved(tmp_path / "out", overwrite=False):
        raise OSError("not on the hub")
    with pytest.raises(KeyboardInterrupt), proved(tmp_path / "out", overwrite=False):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_parity_json_names_the_model_folder_that_was_converted(tmp_path):
    run = written(tmp_path / "run" / "final", "mmft.json")
    base = written(tmp_path / "base", "config.json")
    for source, named in ((run, str(run)), (base, None)):
        with proved(tmp_path / "out", overwrite=True, sources=(source,)) as temporary:
            settle(Report(True, "float32", 0.0, ()), temporary, tmp_path / "out")
        assert json.loads((tmp_path / "out" / "parity.json").read_text("utf-8")).get("source") == named
    with pytest.raises(ParityError), proved(tmp_path / "bad", overwrite=False, sources=(run,)) as temporary:
        settle(Report(False, "float32", 0.0, (), "the logits differ"), temporary, tmp_path / "bad")
    assert (tmp_path / ".bad.unproved" / "parity.json").is_file()


@pytest.mark.parametrize("size", ["banana", "0", "0GB", "5", "-1GB", "2GiBs", ""])
@pytest.mark.parametrize("command", [("merge", "a", "b"), ("hf", "a", "b"), ("split", ".", "b")])
def test_a_size_that_is_none_is_refused_before_anything_is_read(size, command):
    from click.testing import CliRunner

    done = CliRunner().invoke(convert, [*command, "--max-shard-size", size])
    assert done.exit_code == 2
    assert f"{size!r} is no size; give a number and KB, MB, GB or TB, such as 2GB" in done.output
