"""Where the images of a dataset are: inside its image folder, in truth and not only by name, and on this disk.

A look at each of millions of images: os.path and not pathlib, which takes twice as long.
"""

# ruff: noqa: PTH100, PTH116, PTH117, PTH113, PTH118, PTH120

import os
import stat
from pathlib import Path

from mmft.errors import DataError
from mmft.foreign_paths import windows_hint

NOT_FOUND, WINDOWS = "image not found: ", "image not found, its path is in Windows' form: "
BEHIND_LINK, LEADS_TO, REMEDY = "image behind a link out of the image folder: ", " -> ", "; only what is really in "
FOLDERS_KEPT = 10_000  # of which it is known where they are; memory must not grow with the records
LONGEST_PATH = 1024  # characters shown of a path that may be one
SPELLED = 160  # characters of one that is none


class ImageFinder:
    """Finds the images of one dataset: they may not lie outside the image folder, and the files must exist.

    Asks the disk once an image, for there may be millions: a plain file is where the folder it is in is, and where that
    is in truth is kept. Only a link is followed for itself.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        base = os.path.normpath(folder or ".")
        self._base = "" if base == "." else os.path.join(base, "")
        self._absolute = os.path.join(os.path.abspath(base), "")  # ends in a slash
        self._real = os.path.join(os.path.realpath(base), "")
        self._checked: set[str] = set()  # folders inside, in truth

    def find(self, source: str) -> str:
        """The path of an image. Raises `DataError` where it is not there, or not inside, or no path of a file."""
        if source.startswith("data:"):
            raise DataError(f"image is inside the record: {_cut(source)}; only files are read: save it as one")
        if "://" in source:
            raise DataError(f"image is a remote address: {_cut(source)}; only local files are read")
        if "\0" in source:
            raise DataError(
                f"image path holds a NUL character: {_cut(source)}; no file has such a name: mend the record"
            )
        path = source if self.folder is None else self._inside(source)
        try:
            status = os.stat(path) if self.folder is None else os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                self._refuse_outside(path)
                status = os.stat(path)
        except (OSError, ValueError):  # ValueError: half a character
            status = None
        if status is None or not stat.S_ISREG(status.st_mode):
            hint = windows_hint(source)
            raise DataError(f"{WINDOWS}{_cut(path)}; {_cut(hint)}" if hint else f"{NOT_FOUND}{_cut(path)}")
        if self.folder is not None and (folder := os.path.dirname(path)) not in self._checked:
            self._refuse_outside(path)
            if len(self._checked) >= FOLDERS_KEPT:
                self._checked.clear()
            self._checked.add(folder)
        return path

    def _inside(self, source: str) -> str:
        path = os.path.normpath(source)
        if os.path.isabs(path):
            inside, whole = path.startswith(self._absolute), path
        else:
            inside, whole = path.partition("/")[0] != "..", self._base + path
        if not inside:
            raise DataError(f"image path leaves the image folder: {_cut(source)}")
        return whole

    def _refuse_outside(self, path: str) -> None:
        real = os.path.realpath(path)
        if not real.startswith(self._real):
            raise DataError(
                f"{BEHIND_LINK}{_cut(path)}{LEADS_TO}{_cut(real)}{REMEDY}{self.folder} is read: "
                "put the files themselves there, or choose a folder that holds both"
            )


def is_mended(reason: str) -> bool:
    """Whether an image that was the reason for dropping a record could be read by now."""
    if reason.startswith(NOT_FOUND):
        return os.path.isfile(reason.removeprefix(NOT_FOUND))
    if reason.startswith(WINDOWS):
        return os.path.isfile(reason.removeprefix(WINDOWS).rpartition("; ")[0])
    if reason.startswith(BEHIND_LINK):
        path, _, rest = reason.removeprefix(BEHIND_LINK).partition(LEADS_TO)
        return os.path.realpath(path) != rest.partition(REMEDY)[0]
    return False


def _cut(path: str) -> str:
    """A path in a message: as it is where it could be one, else spelled out and cut."""
    if len(path) <= LONGEST_PATH and path.isprintable():
        return path
    return repr(path if len(path) <= SPELLED else f"{path[:40]}...{path[-100:]}")
