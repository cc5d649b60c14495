"""Text of data as it may reach a screen: no escape sequence acts, nothing turns the reading direction."""

import re

# C0 and C1 controls except newline and tab, marks that reorder text, and lone surrogates, which no stream can encode.
_ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with each character that acts instead of being seen replaced by a picture of it, or by U+FFFD."""
    return _ACTS.sub(_picture, text)


def one_line(text: str, width: int = 200) -> str:
    """The same without line breaks, and cut at `width` characters."""
    line = " ".join(visible(text[: 2 * width]).split())
    return line if len(text) <= width and len(line) <= width else line[: width - 1] + "…"


def _picture(found: re.Match[str]) -> str:
    code = ord(found.group())
    return "\u2421" if code == 127 else chr(0x2400 + code) if code < 32 else "\ufffd"
