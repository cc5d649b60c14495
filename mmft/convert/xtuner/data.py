"""Part 3 of an XTuner config, its `train_dataloader`, as our `Data`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmft.convert.xtuner.names import SHUFFLING_SAMPLERS, data_map
from mmft.convert.xtuner.report import Node, Report, last_name, shown
from mmft.convert.xtuner.syntax import Named
from mmft.convert.xtuner.write import Arg, Call, Raw, path_of
from mmft.errors import ConfigError, Problem
from mmft.plugins import Plugins

TEXT_DATASETS = {"process_hf_dataset", "process_ms_dataset"}
# What is always so here: only what is needed is kept, samples are shuffled before they are packed and never mixed up.
TEXT_SAME = (
    "tokenizer",
    "use_varlen_attn",
    "remove_unused_columns",
    "shuffle_before_pack",
    "do_dataset_tokenization",
    "map_num_proc",
    "input_ids_with_output",
    "with_image_token",
)
LLAVA_SAME = ("tokenizer", "image_processor", "offline_processed_text_folder")
PACKED = {  # loader inside `build_packed_dataset` (xtuner/dataset/intern_repo.py) -> what its files are
    "load_intern_repo_tokenized_dataset": "reads tokens made beforehand (.bin); train from the texts they were made of",
    "load_intern_repo_untokenized_dataset": 'reads a bare list of messages a line; write {"messages": [...]} a line '
    "into a .jsonl file, which the data map openai reads",
}
NATIVE_FORMAT = "xtuner"  # the data map of `conversation` lists
FILES = {"json": "json", "csv": "csv", "parquet": "parquet", "text": "text"}  # `path` of load_dataset -> data source


@dataclass
class DataDraft:
    """The pieces of `Data(...)`, put together when the model is known."""

    datasets: list[Call] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    templates: set[str] = field(default_factory=set)
    lengths: set[int] = field(default_factory=set)
    pads: set[bool] = field(default_factory=set)
    packs: set[bool] = field(default_factory=set)
    group_by: str = ""
    num_workers: int = 0
    batch_size: int = 1

    @property
    def pad_to_square(self) -> bool | None:
        """Whether pictures are padded; None for a text model."""
        return True in self.pads if self.pads else None


def draft_data(top: Node, plugins: Plugins, report: Report) -> DataDraft:
    """Read the training data. Raises `ConfigError` where there is none."""
    loader = top.node("train_dataloader")
    dataset = loader.node("dataset") if loader else None
    if loader is None or dataset is None:
        raise ConfigError([Problem("train_dataloader", "names no data set", "is this a whole config of XTuner 0.1?")])
    draft = DataDraft(batch_size=int(loader.number("batch_size", 1)), num_workers=int(loader.number("num_workers", 0)))
    parts = _joined(dataset) if dataset.kind == "ConcatDataset" else [dataset]
    for part in parts:
        _dataset(part, draft, plugins, report, alone=len(parts) == 1)
    if not draft.datasets:
        raise ConfigError([Problem("train_dataloader", text) for text in report.edits])
    _sampler(loader, draft, report)
    for name, found in (("pad_image_to_square", draft.pads), ("the chat template", draft.templates)):
        if len(found) > 1:
            report.edit(f"{name} is {' and '.join(map(str, sorted(found)))} in different data sets; mmft has one")
    loader.close(same=("collate_fn", "pin_memory", "persistent_workers", "prefetch_factor", "batch_sampler"))
    return draft


def _joined(dataset: Node) -> list[Node]:
    """The data sets of a `ConcatDataset`: a list, or by name in `datasets_cfg` (XTuner to 0.1.11)."""
    named = dataset.node("datasets_cfg")
    parts = [part for key in named.values if (part := named.node(key))] if named else dataset.nodes("datasets")
    dataset.close()
    return parts


def _sampler(loader: Node, draft: DataDraft, report: Report) -> None:
    sampler = loader.node("sampler")
    if sampler is None:
        return
    if sampler.kind == "LengthGroupedSampler":
        modality = sampler.take("length_property", "length") == "modality_length"
        draft.group_by = "group_by_modality" if modality else "group_by_length"
    elif sampler.kind in SHUFFLING_SAMPLERS or sampler.kind == "InternRepoSampler":
        if sampler.take("shuffle", True) is False:
            report.edit("train_dataloader.sampler.shuffle = False: mmft shuffles every epoch")
    else:
        report.edit(f"train_dataloader.sampler: {sampler.kind} has no counterpart")
    sampler.close(same=("per_device_batch_size", "seed", "round_up", "mega_batch_mult"))


def _dataset(part: Node, draft: DataDraft, plugins: Plugins, report: Report, *, alone: bool) -> None:
    if part.kind in TEXT_DATASETS:
        source = _text_source(part, draft, report, alone=alone)
        draft.packs.add(bool(part.take("pack_to_max_length", True)))
        extra: dict[str, Any] = {}
        same: tuple[str, ...] = TEXT_SAME
        maps = part.take("dataset_map_fn")
    elif part.kind == "LLaVADataset":
        source, extra = _llava_source(part, draft, report, alone=alone)
        same = LLAVA_SAME
        maps = part.take("dataset_map_fn")
    elif part.kind == "MOSSSFTDataset":
        source = _file(str(part.take("data_file", "")), draft, alone=alone)
        if (name := part.take("bot_name")) is not None:
            report.differ(f"{part.where('bot_name')} = {name!r}: the data's own name of the assistant is kept")
        extra, same, maps = {}, ("tokenizer",), "moss_sft"
        draft.templates.add("moss_sft")
        draft.packs.add(False)
    else:
        report.edit(f"{part.path}: {_no_counterpart(part)}")
        return
    if (limit := part.take("max_dataset_length")) is not None:
        extra["limit"] = limit
        report.differ(f"{part.where('max_dataset_length')} = {limit}: the first records are taken, not random ones")
    draft.lengths.add(int(part.number("max_length", 2048)))
    chosen = _map_name(part, maps, plugins, report)
    if part.kind != "MOSSSFTDataset":
        _template(part, chosen, draft, plugins, report)
    part.close(same=same)
    named = {"source": source, **{k: v for k, v in extra.items() if k == "image_folder"}, "data_map": chosen}
    draft.datasets.append(Call("Dataset", **named, limit=extra.get("limit")))


def _no_counterpart(part: Node) -> str:
    """What is to be done with the records of a data set that mmft cannot read."""
    inner = part.values.get("dataset_cfg")
    loader = last_name(inner.get("type")) if isinstance(inner, dict) else ""
    if hint := PACKED.get(loader):
        return f"{loader} {hint}"
    kind = part.kind or shown(part.values)
    return f"{kind} has no counterpart; bring its records in a format of `mmft data formats`"


def _map_name(part: Node, function: Any, plugins: Plugins, report: Report) -> str:
    """The data map of a `dataset_map_fn`; a function of the user's own is an edit."""
    if function is None:
        return NATIVE_FORMAT
    name = data_map(last_name(function))
    ours = isinstance(function, str) or (isinstance(function, Named) and function.dotted.startswith("xtuner."))
    if name not in plugins.data_maps.names() or not ours:
        report.edit(
            f"{part.where('dataset_map_fn')}: {shown(function)} is no format of XTuner's; write it as a data map "
            f"(docs/hooks.md, mmft_data_maps) of the name {name!r}"
        )
    return name


def _template(part: Node, chosen: str, draft: DataDraft, plugins: Plugins, report: Report) -> None:
    """The chat template of `template_map_fn`; documents have none."""
    value = part.take("template_map_fn")
    template = value.get("template") if isinstance(value, dict) else value
    if template is None:
        if chosen == NATIVE_FORMAT:
            where = part.where("template_map_fn")
            report.differ(f"{where}: none; documents need none, questions get the model's own (data.chat_template)")
        elif chosen != "pretrain":
            report.edit(f"{part.where('template_map_fn')}: none; choose data.chat_template, 'auto' is the model's own")
        return
    name = last_name(template)
    if isinstance(template, dict) or name not in plugins.chat_templates.names():
        where = part.where("template_map_fn.template")
        report.edit(f"{where}: {shown(template)} is no shipped template; `mmft plugins` lists them")
        return
    draft.templates.add(name)


def _llava_source(part: Node, draft: DataDraft, report: Report, *, alone: bool) -> tuple[Call, dict[str, Any]]:
    data_path, folder = part.take("data_path"), part.take("image_folder")
    draft.pads.add(bool(part.take("pad_image_to_square", False)))
    if not isinstance(data_path, str):
        report.edit(f"{part.where('data_path')}: {shown(data_path)}; records tokenised beforehand cannot be read back")
        data_path = "data/train.json"
    source = _file(data_path, draft, alone=alone)
    if alone and isinstance(folder, str):
        draft.settings["IMAGES"] = path_of(folder)
        return source, {"image_folder": Raw("IMAGES")}
    return source, {"image_folder": path_of(folder) if isinstance(folder, str) else None}


def _text_source(part: Node, draft: DataDraft, report: Report, *, alone: bool) -> Call:
    """`load_dataset`, `MsDataset.load` or `load_from_disk` as a data source."""
    inner = part.node("dataset")
    split = part.take("split", "train")
    if inner is None:
        report.edit(f"{part.where('dataset')}: names no data")
        return Call("use", "json", path="data/train.json")
    if inner.kind == "MsDataset" or part.kind == "process_ms_dataset":
        name = str(inner.take("dataset_name") or inner.take("path") or "")
        options = {"name": inner.take("subset_name"), "split": inner.take("split")}
        inner.close(same=("use_streaming",))
        return Call("use", "modelscope", path=_setting(name, draft, alone=alone), **options)
    if inner.kind == "load_from_disk":
        name = str(inner.take("dataset_path") or inner.take("path") or "")
        return Call("use", "hf", path=_setting(name, draft, alone=alone))
    if inner.kind != "load_dataset":
        report.edit(f"{inner.path}: {inner.kind or shown(inner.values)} has no counterpart")
        return Call("use", "json", path="data/train.json")
    name = str(inner.take("path", ""))
    files = inner.take("data_files")
    folder = inner.take("data_dir")
    own_split = inner.take("split")
    config = inner.take("name")
    inner.close(same=("ignore_verifications", "verification_mode", "cache_dir", "trust_remote_code"))
    if name in FILES:
        return _files(inner, name, files, folder, draft, report, alone=alone)
    if files is not None or folder is not None:
        report.edit(f"{inner.path}: takes {shown(files or folder)} of {name}; download it and name the file")
    chosen = own_split or split
    return Call(
        "use", "hf", path=_setting(name, draft, alone=alone), name=config, split=chosen if chosen != "train" else None
    )


def _files(inner: Node, kind: str, files: Any, folder: Any, draft: DataDraft, report: Report, *, alone: bool) -> Call:
    """The files of `load_dataset("json", data_files=...)`: one, several, or those of the train split."""
    if isinstance(files, dict):
        others = [key for key in files if key != "train"]
        if others:
            report.lose(f"{inner.where('data_files')}: {', '.join(others)}; data.validation takes such data")
        files = files.get("train", next(iter(files.values()), None))
    listed = [files] if isinstance(files, str) else list(files or [])
    if folder is not None:
        listed = [str(Path(folder) / str(item)) for item in listed] or [str(folder)]
    if not listed or not all(isinstance(item, str) for item in listed):
        report.edit(f"{inner.where('data_files')}: {shown(files)} names no file")
        return Call("use", kind, path="data/train.json")
    if len(listed) == 1:
        return _file(listed[0], draft, alone=alone, kind=FILES[kind])
    name = _source_name(listed[0], FILES[kind])
    return Call("use", name, path=tuple(path_of(item) for item in listed))


def _file(name: str, draft: DataDraft, *, alone: bool, kind: str = "json") -> Call:
    value: Any = path_of(name)
    if alone:
        draft.settings["DATA"] = value
        value = Raw("DATA")
    return Call("use", _source_name(name, kind), path=value)


def _source_name(name: str, kind: str) -> str:
    """XTuner's `json` reads both a list and a record a line; here the file's suffix tells."""
    if kind == "csv" and name.endswith(".tsv"):
        return "tsv"
    return "jsonl" if kind == "json" and name.endswith((".jsonl", ".ndjson")) else kind


def _setting(name: str, draft: DataDraft, *, alone: bool) -> Any:
    if not alone:
        return name
    draft.settings["DATA"] = name
    return Raw("DATA")


def data_call(draft: DataDraft, llava_tokens: int | None, is_llava: bool, report: Report) -> Call:
    """The `Data(...)` to write. `llava_tokens` are those of a picture, which `max_length` counts here."""
    length, comment = max(draft.lengths, default=2048), "tokens"
    if len(draft.lengths) > 1:
        report.differ(f"max_length is {sorted(draft.lengths)} in different data sets: {length} is taken for all")
    if is_llava:
        length, comment = _with_image(length, llava_tokens, report)
    packing = True in draft.packs
    if packing and False in draft.packs:
        report.differ("pack_to_max_length differs between data sets: all are packed")
    if packing:
        report.differ(
            "packing: XTuner cuts samples where a row is full, and without varlen attention they see each other; mmft "
            "packs whole samples, which do not, and splits those longer than max_length"
        )
    template = next(iter(sorted(draft.templates)), None)
    if template == "vicuna":
        report.differ("vicuna: XTuner leaves out the preamble 'A chat between a curious user ...'; mmft trains with it")
    grouped = Arg(draft.group_by, True) if draft.group_by and not packing else None
    arguments = [
        Arg("datasets", tuple(draft.datasets)),
        Arg("chat_template", template),
        # XTuner trains with the template it is given whatever the model's own is
        Arg("allow_template_difference", True if template else None, "as XTuner; leave out to be told of differences"),
        Arg("max_length", length, comment),
        Arg("too_long", "split" if packing else "truncate"),
        Arg("packing", packing or None),
        *([grouped] if grouped else []),
        Arg("num_workers", draft.num_workers or None),
    ]
    return Call("Data", *arguments)


def _with_image(length: int, tokens: int | None, report: Report) -> tuple[int, str]:
    """XTuner counts a picture as one token, and the person subtracts the others by hand."""
    if tokens is None:
        report.edit(
            f"max_length = {length} counts text only; add the encoder's tokens of one picture to data.max_length"
        )
        return length, "tokens, image tokens included"
    return length + tokens, f"tokens, image tokens included ({length} of text and {tokens} of a picture)"
