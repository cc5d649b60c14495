"""The name of a token store: a digest of everything the tokens depend on, so that a stale store is never used."""

import hashlib
import inspect
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmft import __version__
from mmft.config import Data
from mmft.data.files import LAYOUT
from mmft.data.tokenize import Tokenizer
from mmft.plugins import Plugins
from mmft.specs import ChatTemplate

KNOWN_HASHES = "file-hashes.json"
SETTLED = 2.0  # seconds; a file changed more recently may change again within the same clock tick, so it is not noted


def digest_of(data: Data, plugins: Plugins, tokenizer: Tokenizer, template: ChatTemplate, cache_dir: Path) -> str:
    """Of everything the token store depends on, the code of map and template included."""
    digest = hashlib.sha256()

    def add(*values: Any) -> None:
        digest.update(json.dumps([str(value) for value in values]).encode())

    add(__version__, LAYOUT, data.max_length, data.too_long, tokenizer.tokens_per_image, tokenizer.image_id)
    add(tokenizer.hf.backend_tokenizer.to_str(), tokenizer.hf.chat_template)
    add(tokenizer.hf.bos_token, tokenizer.hf.eos_token)
    add(template.name, plugins.chat_templates.owner(data.chat_template).distribution, _code_of(template.render))
    hashes = FileHashes(cache_dir / KNOWN_HASHES)
    for dataset in data.datasets:
        source, data_map = plugins.datasets.get(dataset.source.name), plugins.data_maps.get(dataset.data_map)
        add(dataset.model_dump_json(exclude={"repeat", "weight"}), _code_of(source.load), _code_of(data_map.fn))
        add(plugins.data_maps.owner(dataset.data_map).distribution)
        add(plugins.system_texts.get(dataset.system_text).text if dataset.system_text else None)
        for path in source.files(**dataset.source.options) if source.files else ():
            add(path, hashes.of(Path(path)))
    hashes.save()
    return digest.hexdigest()[:16]


class FileHashes:
    """The sha256 of files, noted with size, times and inode, so that a warm start need not read gigabytes again."""

    def __init__(self, notes: Path) -> None:
        self.notes = notes
        self.known: dict[str, list[Any]] = {}
        self.changed = False
        with suppress(OSError, ValueError):  # without notes, or with damaged ones, files are read
            known = json.loads(notes.read_text("utf-8"))
            self.known = known if isinstance(known, dict) else {}

    def of(self, path: Path) -> str:
        """The hash of a file's bytes."""
        found = path.stat()
        state = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
        name = str(path.resolve())
        noted = self.known.get(name)
        if isinstance(noted, list) and noted[:-1] == state:
            return str(noted[-1])
        with path.open("rb") as file:
            value = hashlib.file_digest(file, "sha256").hexdigest()
        if time.time() - max(found.st_mtime, found.st_ctime) > SETTLED:
            self.known[name] = [*state, value]
            self.changed = True
        return value

    def save(self) -> None:
        """Write the notes for the next start; a cache folder that cannot be written costs only time."""
        if not self.changed:
            return
        with suppress(OSError):
            self.notes.parent.mkdir(parents=True, exist_ok=True)
            aside = self.notes.with_name(f"{self.notes.name}.{os.getpid()}.tmp")
            aside.write_text(json.dumps(self.known), "utf-8")
            aside.replace(self.notes)


def _code_of(function: Any) -> str:
    """The source files a function comes from, hashed: an edited map must not meet a stale store.

    Its own module's file, and the files beside it in the same folder that this module takes names from.
    """
    while hasattr(function, "func"):
        function = function.func
    try:
        own = Path(inspect.getfile(function))
        files = {own}
        for value in list(vars(sys.modules[function.__module__]).values()):
            module = value if inspect.ismodule(value) else sys.modules.get(getattr(value, "__module__", None) or "")
            file = getattr(module, "__file__", None)
            if file and Path(file).parent == own.parent:
                files.add(Path(file))
        return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()
    except (TypeError, OSError, KeyError, AttributeError):
        return repr(function)
