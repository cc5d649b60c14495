"""What a file that is not UTF-8 may be instead. It is only named, never read so: a wrong guess trains on rubbish.

A remedy that is followed must not destroy a text, so an encoding is named only where all bytes at hand agree with it.
"""

import codecs
import re

DAMAGED = 4  # times as many characters in good UTF-8 as places that are not: the file is UTF-8, and those are damage
_HIGH = re.compile(rb"[\x80-\xff]+")
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_LE: "UTF-16",
    codecs.BOM_BE: "UTF-16",
}


def encoding_of(start: bytes) -> str | None:
    """The Unicode encoding other than UTF-8 whose byte-order mark a file begins with, as iconv calls it."""
    return next((name for mark, name in _MARKS.items() if start.startswith(mark)), None)


def remedy_of(data: bytes) -> str:
    """What to do with a file of which these bytes are a part: some whole lines, as far as they can be had."""
    if marked := encoding_of(data):
        return _iconv(marked)
    text = data.decode("utf-8", "replace")
    bad = text.count("\ufffd")
    good = sum(not character.isascii() for character in text) - bad
    if good > DAMAGED * bad:
        return "the text around it is UTF-8, so mend or delete it there; no other encoding reads the file"
    if _is_chinese(data):
        return f"{_iconv('GB18030')} (its bytes are Chinese as GBK writes it; read the result)"
    if all(len(run) == 1 for run in _HIGH.findall(data)):
        return _iconv("LATIN1")
    return "save the file as UTF-8 in the program that wrote it, or find out its encoding before iconv -t UTF-8"


def _iconv(encoding: str) -> str:
    return f"save the file as UTF-8, for example with iconv -f {encoding} -t UTF-8"


def _is_chinese(data: bytes) -> bool:
    """Whether all of it is GB18030, GBK and GB2312 included, and most of what is not ASCII stands in pairs there.

    A Latin letter with an accent and the plain one behind it are a pair of GBK too, but a rare one in Chinese.
    """
    try:
        codecs.getincrementaldecoder("gb18030")().decode(data)  # the last character may be cut off
    except UnicodeDecodeError:
        return False
    runs = [len(run) for run in _HIGH.findall(data)]
    return 2 * sum(length for length in runs if length > 1) > sum(runs)
