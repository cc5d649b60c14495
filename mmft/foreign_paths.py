"""Paths of another system that a person may type here: known at sight, with what to write instead."""

import os
import re


def windows_hint(path: str) -> str:
    r"""What to write for a path in Windows' form (`C:\data`, `D:/data`, `sub\0.png`); an empty string for another."""
    drive = re.match(r"([A-Za-z]):[\\/]", path)
    if os.name == "nt" or not (drive or "\\" in path) or "://" in path:
        return ""
    rest = path[2:] if drive else path
    written = rest.replace("\\", "/")
    if drive is None:
        return rf"write / for \: {written}"
    wsl = f"/mnt/{drive[1].lower()}{written}"
    return rf"write / for \, and in WSL {wsl}" if "\\" in path else f"in WSL write {wsl}"
