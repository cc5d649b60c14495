"""The configs mmft ships, offered through the hook any plugin has for its own."""

from importlib.resources import files
from pathlib import Path

from mmft import ConfigDir, hookimpl


@hookimpl
def mmft_config_dirs() -> list[ConfigDir]:
    """The folder of the `mmft_configs` package."""
    return [ConfigDir(path=Path(str(files("mmft_configs"))))]
