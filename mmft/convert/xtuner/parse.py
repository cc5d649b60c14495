"""The syntax tree of a config file of somebody else's, or why there is none."""

import ast
from pathlib import Path

from mmft.errors import ConfigError, Problem


def parsed(path: Path) -> ast.Module:
    """In the encoding that the file declares. Raises `ConfigError` where it is no Python."""
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError) as error:
        raise ConfigError([_unreadable(path, error)]) from None


def _unreadable(path: Path, error: Exception) -> Problem:
    """Why a file is no Python; where it is not in the encoding it declares (else UTF-8), the remedy."""
    where = f"{path}:{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else str(path)
    if "codec can't decode" not in str(error):
        return Problem(where, f"cannot be read as Python: {error}")
    data = path.read_bytes()
    is_chinese = data.decode("gb18030", "ignore").encode("gb18030") == data
    how = "its bytes are Chinese as GBK writes it: iconv -f GB18030 -t UTF-8" if is_chinese else "where it was written"
    return Problem(where, "cannot be read as Python: its text is not UTF-8", f"save the file as UTF-8; {how}")
