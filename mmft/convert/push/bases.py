"""What a model was made from, as its manifest says: names on a hub, places on this disk, or parts in its own folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmft.convert.push.places import HUB_CACHE, last_part
from mmft.hub import looks_like_path

Part = Literal["llm", "vision"]
PARTS: tuple[Part, ...] = ("llm", "vision")


@dataclass(frozen=True)
class Base:
    """A model that this one was made from. `hub_id` is None where only a place on a disk is known.

    `inside` means that its weights, as trained, lie in the folder: nobody needs it to load this one.
    """

    part: Part
    name: str
    hub_id: str | None
    revision: str | None = None
    inside: bool = False


def bases_of(manifest: Mapping[str, Any], names: Mapping[str, str], folder: Path) -> tuple[Base, ...]:
    """The base models; `names` has those that the person gave. A part that came with the folder has none of its own."""
    model, now = trained_model(manifest), paths(manifest.get("model") or {})
    known, found = paths(model), []
    for part in PARTS:
        path, own = known.get(part), names.get(part)
        if own is None and (path is None or lies_inside(path, manifest)):
            continue
        cached = HUB_CACHE.fullmatch(str(path))
        hub_id = own or (f"{cached[1]}/{cached[2]}" if cached else hub_name(str(path), folder))
        revision = (_said(model)[part] or {}).get("revision") or (cached[3] if cached else None)
        inside = lies_inside(now.get(part), manifest)
        found.append(Base(part, hub_id or last_part(str(path)), hub_id, revision, inside))
    return tuple(found)


def trained_model(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The model as the run's config named it; without one as the manifest does, and the base of what was merged."""
    model = dict((manifest.get("config") or {}).get("model") or manifest.get("model") or {})
    base = (manifest.get("merged") or {}).get("llm")
    if base and lies_inside(paths(model).get("llm"), manifest):
        model["llm"] = model["llm"] | {"path": base}
    return model


def paths(model: Mapping[str, Any]) -> dict[str, str]:
    """Part -> where its base model is: a path or a name on a hub. Parts without one are not there."""
    return {part: str(one["path"]) for part, one in _said(model).items() if one and one.get("path")}


def _said(model: Mapping[str, Any]) -> dict[str, Any]:
    return {"llm": model.get("llm"), "vision": (model.get("vision") or {}).get("encoder")}


def lies_inside(path: str | None, manifest: Mapping[str, Any]) -> bool:
    """Whether a part lies beside the manifest: `./llm`, with files there. Training may have been told `./llm` too."""
    if path is None or not path.startswith("./"):
        return False
    return any(name.startswith(f"{path[2:].rstrip('/')}/") for name in manifest.get("files") or ())


def hub_name(path: str, folder: Path) -> str | None:
    """A name that can only be one on a hub: `owner/name`, and no folder here or above the model's."""
    places = (Path(path), *(parent / path for parent in folder.absolute().parents))
    return None if looks_like_path(path) or path.count("/") != 1 or any(p.exists() for p in places) else path


def renamed(manifest: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    """Path of a base model -> the name on the hub that the person gave for it."""
    known = (paths(trained_model(manifest)), paths(manifest.get("model") or {}))
    return {
        one[part]: name
        for part, name in names.items()
        for one in known
        if part in one and not lies_inside(one[part], manifest)
    }
