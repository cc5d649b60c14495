"""Data source: `text`, any text files, for incremental pretraining.

A file is a record `{"text", "path"}`, or each of its pieces where `split` says what stands between them: a blank line
with "\n\n", each line with "\n". Line ends are "\n", however the file spells them.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from mmft import hookimpl
from mmft.errors import DataError
from mmft.specs import DatasetSpec
from mmft.types import BadRecord, RawRecord
from mmft_plugins._files import NOT_UTF8, Paths, find_files, read_all, text_blocks

SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst", ".tex")


def text_files(path: Paths, split: str | None = None, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The files `text` reads, in order: of a folder those with one of the suffixes; see `find_files`."""
    if split == "":
        raise DataError("split: an empty string; give what stands between two records, or leave it out")
    return find_files(path, tuple(suffixes))


def load_text(
    path: Paths, split: str | None = None, suffixes: Sequence[str] = SUFFIXES
) -> Iterator[RawRecord | BadRecord]:
    """A record for each file, or for each piece of a file that is not blank.

    Without `split` an empty file is an empty record, so that it is counted, and one that is not UTF-8 a bad one. Raises
    `DataError` with the file and place: of a file in pieces nobody knows how many are lost.
    """
    return read_all(text_files(path, split, suffixes), partial(_read_text, split=split))


def load_text_from(
    start: int, path: Paths, split: str | None = None, suffixes: Sequence[str] = SUFFIXES
) -> Iterator[RawRecord | BadRecord]:
    """What `load_text` yields after the first `start` records; whole files among those are not read."""
    if split is not None:
        return islice(load_text(path, split, suffixes), start, None)
    return read_all(text_files(path, split, suffixes)[start:], partial(_read_text, split=split))


def _read_text(file: Path, split: str | None) -> Iterator[tuple[str, RawRecord | BadRecord]]:
    blocks = _same_line_ends(text_blocks(file))
    if split is None:
        try:
            yield "text", {"text": "".join(blocks), "path": str(file)}
        except DataError as error:
            said = str(error).replace(f": {NOT_UTF8} at", " at", 1)
            yield "text", BadRecord(f"{NOT_UTF8 if said != str(error) else 'not text'}: {said}")
        return
    for number, piece in enumerate(_pieces(blocks, split), 1):
        yield f"piece {number}", {"text": piece, "path": str(file)}


def _same_line_ends(blocks: Iterable[str]) -> Iterator[str]:
    decoder = io.IncrementalNewlineDecoder(None, translate=True)
    for block in blocks:
        yield decoder.decode(block)
    yield decoder.decode("", final=True)


def _pieces(blocks: Iterable[str], split: str) -> Iterator[str]:
    held: list[str] = []  # a piece that goes on in the next block; its blocks are joined once, not at each block
    tail = ""
    for block in blocks:
        *whole, last = (tail + block).split(split)
        if whole:
            whole[0] = "".join(held) + whole[0]
            held = []
            yield from (piece for piece in whole if piece.strip())
        cut = max(0, len(last) - len(split) + 1)  # the separator itself may be cut in two by the end of the block
        held.append(last[:cut])
        tail = last[cut:]
    piece = "".join(held) + tail
    if piece.strip():
        yield piece


@hookimpl
def mmft_datasets() -> list[DatasetSpec]:
    """Plain text."""
    return [
        DatasetSpec(
            name="text",
            load=load_text,
            files=text_files,
            load_from=load_text_from,
            summary="text and markdown files, a record for each file or each of its pieces",
            suffixes=SUFFIXES,
        )
    ]
