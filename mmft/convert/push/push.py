"""`mmft convert push`: a trained or converted model to Hugging Face or ModelScope, with a card of what the run wrote.

Read `plan_push` first: it finds the files and writes the card, without network and token. `send` uploads them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mmft.convert.push.bases import renamed
from mmft.convert.push.files import CARD, PushError, Upload, cleaned, refuse_private, sort_out, stage
from mmft.convert.push.hubs import Target, check_repo, find_token, push
from mmft.convert.push.model_card import Facts, Kind, Wishes, gather, write_card
from mmft.errors import MmftError

PARITY = "parity.json"
FLAGS = {"llm": "--base-model OWNER/NAME", "vision": "--base-vision OWNER/NAME"}


@dataclass(frozen=True)
class Plan:
    """What would be uploaded. `left_out` says of each other file why; `notes` are what a person should know first."""

    repo: str
    hub: str
    uploads: tuple[Upload, ...]
    left_out: Mapping[str, str]
    card: str
    notes: tuple[str, ...]
    license: str | None = None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(upload.size for upload in self.uploads)


@dataclass(frozen=True)
class Found:
    """The folder behind MODEL, what it is, its manifest (or that of the run it was made from), and that run."""

    folder: Path
    kind: Kind
    manifest: Mapping[str, Any]
    run: Path | None


def plan_push(
    model: str,
    repo: str,
    hub: str,
    *,
    wishes: Wishes,
    run: str | None = None,
    unverified: bool = False,
    overwrite_card: bool = False,
) -> Plan:
    """Find what MODEL is, which files of it go, and write its card. Nothing on disk changes.

    Raises `PushError` for what is no finished model, was not verified, or would tell of this machine;
    `CheckpointError` for a damaged one.
    """
    check_repo(repo, hub)
    found = find(model, run)
    parity = _read(found.folder / PARITY) if (found.folder / PARITY).is_file() else None
    why = "" if found.kind == "run" else _not_proved(found, parity)
    if why and not unverified:
        raise PushError(
            f"{found.folder} was not pushed: {why}; or push it as it is with --unverified, and its card says so"
        )
    listed = found.manifest["files"] if found.kind in ("run", "merged") else None
    taken, left = sort_out(found.folder, listed)
    uploads = cleaned(taken, renamed(found.manifest, wishes.bases))
    facts = gather(
        found.kind, found.folder, found.manifest, found.run, parity, wishes, [upload.name for upload in uploads]
    )
    own = found.folder / CARD
    notes = []
    if own.is_file() and not overwrite_card:
        card = own.read_text("utf-8")
        notes.append(f"{own} is your own and is kept; --overwrite-card writes a new one")
    else:
        card = write_card(facts, wishes, repo, hub, unverified=bool(why))
        uploads = [one for one in uploads if one.name != CARD] + [Upload(CARD, own, card.encode("utf-8"))]
        notes += _notes(found, facts, wishes)
    refuse_private(uploads)
    return Plan(repo, hub, tuple(sorted(uploads, key=lambda one: one.name)), left, card, tuple(notes), wishes.license)


def send(plan: Plan, *, private: bool = False, branch: str | None = None, message: str | None = None) -> str:
    """Upload what was planned, and return the address. Raises `PushError`."""
    target = Target(
        repo=plan.repo, token=find_token(plan.hub), message=message or "mmft convert push", private=private,
        branch=branch, license=plan.license,
    )  # fmt: skip
    with TemporaryDirectory(prefix="mmft-push-") as temporary:
        folder = Path(temporary) / plan.repo.rpartition("/")[2]
        folder.mkdir()
        stage(list(plan.uploads), folder)
        return push(folder, plan.hub, target)


def find(model: str, run: str | None) -> Found:
    """The folder behind MODEL: a converted one as it stands, else a model folder of ours, or the `final/` of a run."""
    folder = Path(model)
    if folder.name.endswith(".unproved"):
        raise PushError(f"{folder} is what a conversion left that did not hold; see {PARITY} in it, and convert again")
    if any(folder.glob("*.gguf")):
        return _converted(folder, "gguf", run)
    config = _read(folder / "config.json")
    if "model_type" in config and not (folder / "mmft.json").is_file():
        return _converted(folder, "vision" if _only_sees(config) else "hf", run)
    ours, manifest = _our_folder(model)
    where = _run_folder(Path(run)) if run else _run_behind(ours)
    return Found(ours, "merged" if "merged" in manifest else "run", manifest, where)


def _only_sees(config: Mapping[str, Any]) -> bool:
    """Whether a config of transformers is a vision encoder's: it knows pictures and no words."""
    return bool({"image_size", "patch_size"} & config.keys()) and not {"vocab_size", "text_config"} & config.keys()


def _converted(folder: Path, kind: Kind, run: str | None) -> Found:
    found = _our_folder(run) if run else _source(folder)
    if found is None:
        return Found(folder, kind, {}, None)
    return Found(folder, kind, found[1], _run_behind(found[0]))


def _source(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The model folder of ours that a conversion says it was made from, where that is still there, and whole."""
    said = _read(folder / PARITY).get("source")
    if not isinstance(said, str) or not said:
        return None
    places = (Path(said).expanduser(), *(parent / said for parent in folder.absolute().parents))
    try:
        return next((_our_folder(str(place)) for place in places if place.is_dir()), None)
    except MmftError:  # another's model, such as an import starts from
        return None


def _run_behind(ours: Path) -> Path | None:
    """The run that wrote a model folder, or the one that its source came from."""
    seen: set[Path] = set()
    while ours.resolve() not in seen:
        seen.add(ours.resolve())
        if run := _run_folder(ours.parent):
            return run
        if (source := _source(ours)) is None:
            return None
        ours = source[0]
    return None


def _our_folder(reference: str) -> tuple[Path, dict[str, Any]]:
    """A whole model folder of ours and its manifest. A checkpoint is one only where it is named itself."""
    from mmft.inference import find_model
    from mmft.modeling.checkpoint import MANIFEST, read_manifest

    folder = find_model(reference)
    if folder.resolve() != Path(reference).resolve() and folder.name.startswith("checkpoint-"):
        raise PushError(f"{reference} is not finished: it has no final/; let it end, or name {folder} to push that")
    read_manifest(folder)  # every file is whole
    return folder, _read(folder / MANIFEST)


def _run_folder(folder: Path) -> Path | None:
    return folder if (folder / "metrics.jsonl").is_file() else None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _not_proved(found: Found, parity: Mapping[str, Any] | None) -> str:
    """Why a conversion does not count as verified, with what to do; empty where it does."""
    if parity is None:
        return f"it has no {PARITY}: nobody compared it with the model it was made from; make it with `mmft convert`"
    if parity.get("verified") is not True:
        reason = parity.get("refusal") or parity.get("note") or "no reason is given"
        how = f"; to verify it: {parity['command']}" if parity.get("command") else ""
        return f"{PARITY} says that it is not verified: {reason}{how}"
    return _rounded_unproved(found.folder, parity) if found.kind == "gguf" else ""


def _rounded_unproved(folder: Path, parity: Mapping[str, Any]) -> str:
    """The same for GGUF files of few bits, whose own numbers let any mistake through: their proof in 16 bits counts."""
    from mmft.convert.gguf.file import PROVED_ALONE

    proof = parity.get("proof")
    proved = str(parity.get("dtype")).lower() if isinstance(proof, dict) and proof.get("verified") is True else ""
    models = sorted(path.stem.removeprefix("model-") for path in folder.glob("*.gguf") if "mmproj" not in path.name)
    rounded = next((quant for quant in models if quant.lower() not in (*PROVED_ALONE, proved)), None)
    if rounded is None:
        return ""
    source = parity.get("source")
    return (
        f"{PARITY} proves nothing of its {rounded} weights: it has no comparison of the same parts in 16 bits "
        f"(`proof`), as an earlier version wrote it; to verify it: mmft convert verify {folder} {source or 'MODEL'}"
    )


def _notes(found: Found, facts: Facts, wishes: Wishes) -> list[str]:
    """What would make the card better."""
    notes = []
    if not found.manifest and found.kind != "vision":
        notes.append("the card does not know the training; name the run with --run")
    elif found.run is None and facts.trained and found.manifest:
        notes.append("the card has no metrics: no metrics.jsonl beside the model; name the run with --run")
    converted = found.kind not in ("run", "merged")
    notes += [
        f"{base.name!r} is known only by its place on this disk, so "
        f"{'the card has no link to it' if converted or base.inside else 'others cannot load it'}; "
        f"its name on the hub: {FLAGS[base.part]}"
        for base in facts.bases
        if base.hub_id is None
    ]
    if not facts.bases and (facts.whole or found.kind == "vision"):
        flag = FLAGS["vision" if found.kind == "vision" else "llm"]
        notes.append(f"the card does not say which model this was made from; its name on the hub: {flag}")
    if wishes.license is None:
        notes.append("the card names no licence; choose one that the base models allow with --license, as apache-2.0")
    return notes
