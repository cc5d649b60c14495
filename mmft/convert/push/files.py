"""What of a model folder goes to a hub: a list of files, and their content without the places of this machine.

Files are taken by what they are, not by what they are not: whatever is no part of a model stays here, with the reason.
"""

import hashlib
import json
import platform
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mmft.convert.push.places import places_in, without_places
from mmft.errors import MmftError

CARD = "README.md"
WEIGHTS = (".safetensors", ".gguf")
MODEL_FILES = (*WEIGHTS, ".json", ".jinja", ".model", ".tiktoken", ".txt", ".py", ".md")
NAMED_FILES = ("Modelfile", "LICENSE", "NOTICE", "COPYING")
TRAINING = re.compile(r"(optimizer|scheduler|rng_state|trainer_state|training_args|train_state|scaler|bad_samples)\b.*")
STATES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".npy", ".npz")
LOGS = (".log", ".jsonl", ".html", ".csv", ".tsv", ".parquet", ".arrow")
LOG_FOLDERS = {"samples", "tensorboard", "runs", "wandb", "swanlab", "mlruns", "logs"}
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".mp4")
# They spell all kinds of things, of nobody.
VOCABULARY = {"tokenizer.json", "vocab.json", "added_tokens.json", "merges.txt", "vocab.txt"}
PRIVATE_KEYS = {"parity.json": {"command", "source"}}  # how to go on here, and from which folder
HEADER = 1 << 20  # bytes of a weight file in which metadata stand
SECRETS = re.compile(r"hf_[A-Za-z0-9]{30,}|ms-[0-9a-f]{8}-[0-9a-f-]{20,}|sk-[A-Za-z0-9]{30,}")


class PushError(MmftError):
    """Something is not to be, or cannot be, uploaded."""


@dataclass(frozen=True)
class Upload:
    """A file of the repository: as it lies at `source`, or with `content` of its own."""

    name: str
    source: Path
    content: bytes | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return self.source.stat().st_size if self.content is None else len(self.content)


def sort_out(folder: Path, listed: Collection[str] | None = None) -> tuple[list[Upload], dict[str, str]]:
    """The files to upload, and why each of the others is not. `listed` are those a manifest names: no others go."""
    taken, left = [], {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        name = path.relative_to(folder).as_posix()
        reason = _reason_to_leave(PurePosixPath(name), path)
        if not reason and listed is not None and name not in listed and not _beside_manifest(name):
            reason = "not of this model: mmft.json does not name it"
        if reason:
            left[name] = reason
        else:
            taken.append(Upload(name, path))
    return taken, left


def _beside_manifest(name: str) -> bool:
    return name in ("mmft.json", "parity.json", CARD) or name.startswith(NAMED_FILES)


def _reason_to_leave(name: PurePosixPath, path: Path) -> str:
    """Why a file is no part of a model that others are to have; empty where it is one."""
    folders, suffix = set(name.parts[:-1]), name.suffix.lower()
    if any(part.startswith(".") or part.endswith((".unproved", ".tmp", ".old")) for part in name.parts):
        return "hidden or unfinished"
    if any(re.fullmatch(r"(checkpoint-|global_step)\d+", part) for part in name.parts):
        return "a checkpoint of training"
    if TRAINING.fullmatch(name.name) or suffix in STATES:
        return "state of training, or a pickle"
    if folders & LOG_FOLDERS or suffix in LOGS:
        return "a log, samples or data"
    if suffix in PICTURES:
        return "a picture"
    if name.name == CARD and (path.parent / "adapter_config.json").is_file() and folders:
        return "peft's blank card"
    return "" if suffix in MODEL_FILES or name.name.startswith(NAMED_FILES) else "no part of a model"


def cleaned(uploads: list[Upload], names: Mapping[str, str]) -> list[Upload]:
    """The same files, their JSON without places; `mmft.json` names exactly what is uploaded, with its sha256."""
    changed = [_cleaned(upload, lambda tree: without_places(tree, names)) for upload in map(_without_keys, uploads)]
    contents = {upload.name: upload for upload in changed}

    def manifest(tree: Any) -> Any:
        files = {name: sha for name, sha in tree["files"].items() if name in contents}
        new = {name: contents[name].content for name in files}
        shas = {name: hashlib.sha256(data).hexdigest() for name, data in new.items() if data is not None}
        return tree | {"files": files | shas}

    return [_cleaned(upload, manifest) if upload.name == "mmft.json" else upload for upload in changed]


def _without_keys(upload: Upload) -> Upload:
    if not (private := PRIVATE_KEYS.get(upload.name)):
        return upload
    return _cleaned(upload, lambda tree: {key: item for key, item in tree.items() if key not in private})


def _cleaned(upload: Upload, change: Callable[[Any], Any]) -> Upload:
    path = PurePosixPath(upload.name)
    if path.suffix != ".json" or path.name in VOCABULARY:
        return upload
    try:
        tree = json.loads(upload.source.read_bytes() if upload.content is None else upload.content)
    except ValueError as error:
        raise PushError(f"{upload.source}: is not JSON: {error}; mend it, or take it out of the folder") from error
    new = change(tree)
    if new == tree:
        return upload
    return Upload(upload.name, upload.source, json.dumps(new, indent=2, ensure_ascii=False).encode("utf-8"))


def refuse_private(uploads: list[Upload]) -> None:
    """Raise `PushError` where a file still has a place of this machine, its name, or an access token in it."""
    found = [f"{upload.name} has {what}" for upload in uploads for what in private_marks(upload)]
    if found:
        raise PushError(
            f"not uploaded, because {'; '.join(found)}; take that out of the file, or the file out of the folder"
        )


def private_marks(upload: Upload) -> Iterator[str]:
    """What of this person a file tells."""
    name = PurePosixPath(upload.name).name
    home = str(Path.home())
    weights = name.endswith(WEIGHTS)
    if name in VOCABULARY:
        return
    if upload.content is not None:
        data = upload.content
    else:
        with upload.source.open("rb") as file:
            data = file.read(HEADER if weights else -1)
    text = data.decode("utf-8", "replace")
    end = r"[/\\]" if weights else r"(?![\w.-])"  # a vocabulary among the metadata may spell /root
    if len(home) > 3 and re.search(re.escape(home) + end, text):
        yield f"the path of your home folder ({home})"
    if weights:
        return
    host = platform.node()
    if re.search(r"[\d.-]", host) and len(host) > 4 and re.search(rf"(?<![\w-]){re.escape(host)}(?![\w-])", text):
        yield f"the name of this machine ({host})"  # a plain word such as `server` would be found everywhere
    if places := [place for place in _places(name, text) if len(home) <= 3 or home not in place]:
        more = f", and {len(places) - 1} more" if len(places) > 1 else ""
        yield f"a place of this machine ({places[0]}{more})"
    if secret := SECRETS.search(text):
        yield f"what looks like an access token ({secret[0][:6]}...)"


def _places(name: str, text: str) -> dict[str, None]:
    """Paths in what is read by people or has been cleaned. Code and chat templates are full of slashes, and exempt."""
    path = PurePosixPath(name)
    if path.suffix == ".json":
        return dict.fromkeys(places_in(json.loads(text)))
    return dict.fromkeys(places_in(text) if path.suffix == ".md" or name.startswith("Modelfile") else ())


def stage(uploads: list[Upload], folder: Path) -> None:
    """Lay the files out in an empty folder as the repository will have them; unchanged ones are links."""
    for upload in uploads:
        target = folder / upload.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if upload.content is None:
            target.symlink_to(upload.source.resolve())
        else:
            target.write_bytes(upload.content)
