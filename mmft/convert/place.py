"""Where the result of a conversion may go: never over what is read, and over nothing that no conversion wrote."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from mmft.errors import CheckpointError, MmftError
from mmft.hub import encoder_path
from mmft.modeling.build import ADAPTER, PROJECTOR
from mmft.modeling.checkpoint import MANIFEST, checkpoints, read_manifest

PARITY = "parity.json"
METRICS = "metrics.jsonl"


def refuse_out(out: Path, sources: Iterable[Path | str | None] = (), *, overwrite: bool) -> None:
    """Raise `CheckpointError` where `out` is not free.

    It must not be, hold or lie in one of `sources` or what their manifests name, nor hold the current folder. An empty
    folder is free; with `overwrite` so is what a conversion wrote.
    """
    place = out.resolve()
    for source in _read_too(sources):
        theirs = source.expanduser().resolve()
        if place == theirs or place in theirs.parents or theirs in place.parents:
            relation = "is" if place == theirs else "holds" if place in theirs.parents else "lies in"
            raise CheckpointError(f"{out} {relation} {source}, which is read; choose another place for the result")
    if place == Path.cwd() or place in Path.cwd().parents:
        raise CheckpointError(f"{out} is or holds the folder this was started in; choose another place for the result")
    above = next((folder for folder in place.parents if folder.exists()), None)
    if above is not None and not above.is_dir():
        raise CheckpointError(f"{out}: {above} is no folder; choose another place for the result")
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    ours = place.is_dir() and is_result(place)
    if not overwrite:
        raise CheckpointError(f"{out} exists already; choose another place{', or give --overwrite' if ours else ''}")
    if not ours:
        raise CheckpointError(
            f"{out} exists already, and --overwrite replaces only what `mmft convert` wrote; choose another place, or "
            "remove it yourself"
        )


def _read_too(sources: Iterable[Path | str | None]) -> Iterator[Path]:
    """The sources that are on this disk, and the parts that model folders of ours among them name."""
    for source in sources:
        if source is None or not Path(source).expanduser().exists():
            continue  # a name on a hub
        yield Path(source)
        if not (Path(source) / MANIFEST).is_file():
            continue
        try:
            model = read_manifest(Path(source), verify=False).model
        except MmftError:
            continue  # whoever reads it says what is wrong
        parts = (Path(part) for part in (model.llm.path, encoder_path(model)) if part)
        yield from (part for part in parts if part.expanduser().exists() and part.resolve() != Path(source).resolve())


def is_result(folder: Path) -> bool:
    """Whether a conversion wrote the folder: it holds `parity.json` or `mmft.json`, or imported parts and nothing else.

    A run is none, nor is what training left in it.
    """
    if is_trained(folder) or (folder / METRICS).exists() or checkpoints(folder):
        return False
    names = {path.name for path in folder.iterdir()}
    return bool({PARITY, MANIFEST} & names) or names <= {PROJECTOR, ADAPTER}


def is_trained(folder: Path) -> bool:
    """Whether it is a run's `final` or a checkpoint of it."""
    place = folder.resolve()
    return place in checkpoints(place.parent) or (place.name == "final" and (place.parent / METRICS).exists())
