"""The model card of what is pushed: written from the files that the run left, and from nothing else.

What no file says is left out. No line of it names a place of this machine.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from mmft.config import TrainConfig
from mmft.convert.push.bases import Base, bases_of, hub_name, lies_inside, paths, renamed, trained_model
from mmft.convert.push.places import last_part, plain_text, without_places
from mmft.hub import MODELSCOPE

Kind = Literal["run", "merged", "hf", "vision", "gguf"]  # vision: an encoder alone, as transformers opens it
LIBRARIES: Mapping[Kind, str] = {
    "run": "mmft", "merged": "mmft", "hf": "transformers", "vision": "transformers", "gguf": "gguf"
}  # fmt: skip
LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
openrail++ afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0
cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0
openrail-m osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license llama2 llama3 llama3.1
llama3.2 llama3.3 llama4 grok2-community gemma unknown other
"""  # identifiers of https://huggingface.co/docs/hub/repositories-licenses
TIMED = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ \w+ ")
DATA_LINE = re.compile(r"[\d,]+ samples, [\d,]+ tokens .*|(dropped|repaired|cut|mended) [\d,]+ of [\d,]+ records: .*")


@dataclass(frozen=True)
class Facts:
    """What the files say. Everything may be missing."""

    kind: Kind
    sees: bool
    bases: tuple[Base, ...] = ()
    method: str = ""
    chat_template: str = ""
    datasets: tuple[dict[str, str], ...] = ()
    data_lines: tuple[str, ...] = ()
    metrics: tuple[tuple[str, str], ...] = ()
    parity: Mapping[str, Any] | None = None
    config: str = ""
    versions: str = ""
    files: tuple[str, ...] = ()
    adapters: bool = False
    whole: bool = False  # every part lies in the folder
    trained: bool = True  # by mmft, as far as the files know; not so for a model that was imported


@dataclass(frozen=True)
class Wishes:
    """What only the person who pushes can say."""

    license: str | None = None
    languages: tuple[str, ...] = ()
    bases: Mapping[str, str] = field(default_factory=dict)  # part -> name on the hub
    card_language: Literal["en", "zh"] = "en"


def gather(
    kind: Kind,
    folder: Path,
    manifest: Mapping[str, Any],
    run: Path | None,
    parity: Mapping[str, Any] | None,
    wishes: Wishes,
    names: Sequence[str],
) -> Facts:
    """The facts of a folder: its manifest (or its source's), the run's metrics and log, the comparison's numbers."""
    model = manifest.get("model") or {}
    trained = trained_model(manifest)
    return Facts(
        kind=kind,
        sees=_sees(folder, model, names),
        bases=bases_of(manifest, wishes.bases, folder),
        method=_method(trained),
        chat_template=str(manifest.get("chat_template") or "").removeprefix("auto"),
        datasets=tuple(_dataset(one, folder) for one in _datasets(manifest)),
        data_lines=tuple(_data_lines(run)),
        metrics=tuple(_metrics(run)),
        parity=_numbers(parity),
        config=_config(manifest, wishes),
        versions=f"mmft {manifest['mmft']}" if manifest.get("mmft") else "",
        files=tuple(names),
        adapters=any(name.startswith(("llm_adapter/", "vision_adapter/")) for name in names),
        whole=bool(model) and all(lies_inside(path, manifest) for path in paths(model).values()),
        trained=bool(manifest.get("config", True)),
    )


def _sees(folder: Path, model: Mapping[str, Any], names: Sequence[str]) -> bool:
    if model:
        return bool(model.get("vision"))
    if any("mmproj" in name for name in names):
        return True
    return "vision_config" in _json(folder / "config.json")


def _method(model: Mapping[str, Any]) -> str:
    """`QLoRA on 4-bit weights (nf4), r=16, alpha=32; projector; ...`: what was trained, and how."""
    llm, vision = model.get("llm") or {}, model.get("vision") or {}
    said = []
    if lora := llm.get("lora"):
        quantized = llm.get("quantization", "none") != "none"
        name = f"QLoRA ({llm['quantization']})" if quantized else "LoRA"
        said.append(f"{name} r={lora['r']} alpha={lora['alpha']:g}" + (", DoRA" if lora.get("dora") else ""))
    elif llm.get("trainable"):
        said.append("all weights of the language model")
    if vision and vision.get("projector_trainable", True):
        said.append(f"projector {vision['projector']['use']}")
    if lora := vision.get("lora"):
        said.append(f"LoRA r={lora['r']} on the vision encoder")
    elif vision.get("trainable"):
        said.append("all weights of the vision encoder")
    return "; ".join(said)


def _datasets(manifest: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return ((manifest.get("config") or {}).get("data") or {}).get("datasets") or ()


def _dataset(dataset: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Name, id on the hub (or empty), format, and what of it was taken."""
    source = dataset["source"]
    path = source.get("path") or source.get("paths") or source.get("data_files") or ""
    places = path if isinstance(path, list) else [path]
    on_hub = source["use"].rpartition("/")[2] in ("hf", "modelscope") and hub_name(str(places[0]), folder)
    said = {key: dataset.get(key) for key in ("limit", "weight", "repeat")}
    taken = [f"{key} {value:g}" for key, value in said.items() if value not in (None, 1.0)]
    return {
        "name": ", ".join(str(item) if on_hub else last_part(str(item)) for item in places) or source["use"],
        "hub_id": str(places[0]) if on_hub else "",
        "format": dataset["data_map"],
        "taken": ", ".join(taken),
    }


def _data_lines(run: Path | None) -> list[str]:
    """Counts and drops as run.log has them: those of the last start, since a resumed run says them again."""
    log = run / "run.log" if run else None
    if log is None or not log.is_file():
        return []
    found: list[str] = []
    for line in log.read_text("utf-8", "replace").splitlines():
        text = TIMED.sub("", line)
        if match := DATA_LINE.fullmatch(text):
            found = ([] if match[1] is None else found) + [plain_text(text)]
    return found


def _metrics(run: Path | None) -> list[tuple[str, str]]:
    """(key, value) of the table, from metrics.jsonl."""
    lines = [_line(text) for text in _text(run / "metrics.jsonl").splitlines()] if run else []
    steps = [line for line in lines if line.get("loss") is not None]
    evaluated = [line for line in lines if line.get("validation_loss") is not None]
    if not steps:
        return []
    last = steps[-1]
    found = [("steps", f"{last['step']:,}")]
    found += [("epochs", f"{last['epoch']:g}")] if "epoch" in last else []
    found += [("loss", f"{steps[0]['loss']:.4f} → {last['loss']:.4f}")]
    if evaluated:
        best = min(evaluated, key=lambda line: float(line["validation_loss"]))
        found += [("validation_loss", f"{best['validation_loss']:.4f}")]
        found += [("perplexity", f"{best['perplexity']:,.2f}")] if best.get("perplexity") else []
    seconds = last.get("seconds")
    if seconds:
        found += [("time", f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min")]
    if last.get("memory_gb"):
        found += [("memory", f"{max(line.get('memory_gb') or 0 for line in steps):.1f} GB")]
    return found


def _line(text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except ValueError:  # a run that was killed leaves half a line
        return {}
    return line if isinstance(line, dict) else {}


def _numbers(parity: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Of parity.json what a reader wants to know."""
    if parity is None:
        return None
    outcomes = parity.get("outcomes") or []
    relative = [item["relative"] for item in outcomes if isinstance(item.get("relative"), int | float)]
    return {
        "verified": parity.get("verified") is True,
        "dtype": parity.get("dtype"),
        "tolerance": parity.get("tolerance"),
        "probes": len(outcomes),
        "same_answer": sum(bool(item.get("same_answer")) for item in outcomes),
        "relative": max(relative, default=None),
        "refusal": plain_text(str(parity.get("refusal") or parity.get("note") or "")).rstrip("."),
    }


def _config(manifest: Mapping[str, Any], wishes: Wishes) -> str:
    """The run's config as YAML, without what is at its default; empty for one of another version."""
    import yaml  # type: ignore[import-untyped]
    from pydantic import ValidationError

    tree = dict(manifest.get("config") or {})
    try:
        tree["runtime"] = (tree.get("runtime") or {}) | {"output_dir": "."}
        config = TrainConfig.model_validate(tree)
    except (ValidationError, TypeError, ValueError):
        return ""
    short = config.model_dump(mode="json", exclude_defaults=True)
    del short["runtime"]["output_dir"]
    short = {key: value for key, value in short.items() if value}
    text: str = yaml.safe_dump(
        without_places(short, renamed(manifest, wishes.bases)), sort_keys=False, allow_unicode=True
    )
    return text.rstrip()


def _json(path: Path) -> dict[str, Any]:
    return _line(_text(path).replace("\n", " "))


def _text(path: Path) -> str:
    return path.read_text("utf-8", "replace") if path.is_file() else ""


def write_card(facts: Facts, wishes: Wishes, repo: str, hub: str, *, unverified: bool) -> str:
    """The card: YAML for the hub, and the text of `card.LANGUAGE.md.jinja`."""
    import jinja2

    template = files("mmft.convert.push").joinpath(f"card.{wishes.card_language}.md.jinja").read_text("utf-8")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    llm = next((base for base in facts.bases if base.part == "llm"), None)
    llm_inside = llm is None or llm.inside
    body = environment.from_string(template).render(
        facts=facts,
        bases={base.part: base for base in facts.bases},
        llm_inside=llm_inside,
        lacking=llm.name if facts.kind == "run" and llm and not llm_inside and llm.hub_id is None else None,
        repo=repo,
        name=repo.rpartition("/")[2],
        from_modelscope=hub == MODELSCOPE,
        license=wishes.license,
        unverified=unverified,
        weights=[name for name in facts.files if name.endswith(".gguf") and "mmproj" not in name],
        mmproj=next((name for name in facts.files if "mmproj" in name), None),
        modelfile="Modelfile" in facts.files,
    )
    body = re.sub(r"\n{3,}", "\n\n", body).strip()
    return f"---\n{front_matter(facts, wishes)}\n---\n\n{body}\n"


def front_matter(facts: Facts, wishes: Wishes) -> str:
    """The metadata that hubs read. What is not known is not there; a licence the hub does not know is `other`."""
    from huggingface_hub import ModelCardData

    own = wishes.license
    known = own is None or own.lower() in LICENSES.split()
    ids = [base.hub_id for base in facts.bases if base.hub_id]
    relation = "adapter" if facts.adapters else "finetune"
    if facts.kind == "gguf" and any(re.search(r"(?i)[-_.]i?q\d", name) for name in facts.files):
        relation = "quantized"
    pipeline = "image-text-to-text" if facts.sees else "text-generation"
    tags = ["mmft", *(["llava"] if facts.sees else []), *(["lora"] if "LoRA" in facts.method else [])]
    data = ModelCardData(
        base_model=ids or None,
        base_model_relation=relation if ids else None,
        datasets=[one["hub_id"] for one in facts.datasets if one["hub_id"]] or None,
        language=list(wishes.languages) or None,
        library_name=LIBRARIES[facts.kind],
        license=own.lower() if own and known else ("other" if own else None),
        license_name=None if known or own is None else re.sub(r"[^a-z0-9.-]+", "-", own.lower()).strip("-"),
        pipeline_tag="image-feature-extraction" if facts.kind == "vision" else pipeline,
        tags=tags,
    )
    return str(data.to_yaml()).strip()
