"""`mmft convert xtuner-config`: an XTuner 0.1 config as a short mmft config, and a word on whatever differs.

The old file is parsed, never run, and neither xtuner nor mmengine is imported. Names and defaults are those of
https://github.com/InternLM/xtuner/tree/v0.1.23.
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmft import __version__
from mmft.config.foreign import is_xtuner_config
from mmft.convert.xtuner.data import data_call, draft_data
from mmft.convert.xtuner.model import ModelDraft, draft_model
from mmft.convert.xtuner.report import Node, Report, shown
from mmft.convert.xtuner.run import draft_optim, draft_runtime
from mmft.convert.xtuner.syntax import read_assignments
from mmft.convert.xtuner.write import Arg, Call, source
from mmft.errors import ConfigError, Problem
from mmft.plugins import Plugins

# Settings of MMEngine's runner; every other name of a config is a variable that one of these uses.
RUNNER_SETTINGS = (
    "val_dataloader",
    "val_cfg",
    "val_evaluator",
    "test_dataloader",
    "test_cfg",
    "test_evaluator",
    "auto_scale_lr",
    "strategy",
    "load_from",
    "resume",
    "env_cfg",
    "randomness",
)
HEADINGS = {
    "model": "# -- 2. Model & tokenizer ------------------------------------------------------------------",
    "data": "# -- 3. Dataset & dataloader ---------------------------------------------------------------",
    "optim": "# -- 4. Scheduler & optimizer --------------------------------------------------------------",
    "runtime": "# -- 5. Runtime ----------------------------------------------------------------------------",
}
SETTINGS = "# -- 1. Settings: the few lines most people change ---------------------------------------------"
COMMENT_WIDTH = 116
WRAPPER = textwrap.TextWrapper(
    COMMENT_WIDTH, initial_indent="# - ", subsequent_indent="#   ", break_on_hyphens=False, break_long_words=False
)


@dataclass(frozen=True, slots=True)
class Translation:
    """The text of the new config, and what a person should know of it."""

    text: str
    report: Report


def translate(path: Path, plugins: Plugins) -> Translation:
    """Raises `ConfigError` for a file that is no XTuner 0.1 config, or one of a model or method mmft has not."""
    if not path.is_file():
        raise ConfigError([Problem(str(path), "no such file", "give a config file of XTuner 0.1")])
    report = Report()
    top = Node(read_assignments(path), "", report)
    if not is_xtuner_config(path) and not {"model", "train_dataloader"} <= top.values.keys():
        hint = "a config that is mmft's already needs no conversion: mmft check"
        raise ConfigError([Problem(str(path), "is no config of XTuner 0.1", hint)])
    try:
        return _translated(path, top, plugins, report)
    except ConfigError as error:
        raise ConfigError([Problem(f"{path}: {p.where}", p.what, p.hint) for p in error.problems]) from None


def _translated(path: Path, top: Node, plugins: Plugins, report: Report) -> Translation:
    if top.values.get("framework") == "huggingface":
        what = "trains with the Trainer of transformers instead of XTuner's model"
        raise ConfigError([Problem("framework", what, "write the mmft config from `mmft list-cfg`")])
    draft_model(Node(dict(top.values), "", Report()), None, Report())  # a model that mmft has not is said first
    data = draft_data(top, plugins, report)
    model = draft_model(top, data.pad_to_square, report)
    written = data_call(data, model.image_tokens, model.is_llava, report)
    optim, accumulate = draft_optim(top, data.batch_size, model, report)
    runtime = draft_runtime(top, f"work_dirs/{path.stem}", model, accumulate, report)
    _runner_settings(path, top, report)
    if accumulate > 1:
        counted = f"XTuner counts batches, mmft optimizer steps: intervals are divided by accumulate={accumulate}"
        report.differs.insert(0, counted)
    parts = {"model": model.call, "data": written, "optim": optim, "runtime": runtime}
    call = Call("TrainConfig", *(Arg(name, part, heading=HEADINGS[name]) for name, part in parts.items()))
    return Translation(_file(path, {**model.settings, **data.settings}, call, model, report), report)


def _runner_settings(path: Path, top: Node, report: Report) -> None:
    if top.take("resume"):
        report.differ("resume = True: mmft train --resume")
    if (start := top.take("load_from")) is not None:
        command = f"mmft convert pth_to_hf {path} {start} work_dirs/{path.stem}_start"
        report.edit(f"load_from = {shown(start)}: weights of XTuner's; bring them here: {command}")
    environment = top.node("env_cfg") or Node({}, "env_cfg", report)
    if environment.take("cudnn_benchmark"):
        report.lose("env_cfg.cudnn_benchmark = True")
    if (top.values.get("randomness") or {}).get("deterministic"):
        report.lose("randomness.deterministic = True")
    for name in RUNNER_SETTINGS:
        if name not in ("load_from", "resume", "env_cfg", "randomness") and (value := top.take(name)) is not None:
            report.lose(f"{name} = {shown(value)}; data.validation and runtime.evaluation measure a loss")


def _file(path: Path, settings: dict[str, Any], call: Call, model: ModelDraft, report: Report) -> str:
    kind = "LLaVA" if model.is_llava else "Text SFT"
    body = source(call)
    names = [name for name in _NAMES if f"{name}(" in body or (name == "use" and "use(" in body)]
    first = [*_settings(settings)]
    uses_path = "Path(" in body or any("Path(" in line for line in first)
    names_line = f"from mmft.config import {', '.join(names)}"
    if len(names_line) > COMMENT_WIDTH:
        names_line = "\n".join(["from mmft.config import (", *(f"    {name}," for name in names), ")"])
    lines = [
        f'"""{kind}, converted by mmft {__version__} from a config of XTuner 0.1:',
        "",
        f'{path.name}"""'.replace("\\", "/"),
        *_remarks(report),
        "",
        *(["from pathlib import Path", ""] if uses_path else []),
        names_line,
        "",
        SETTINGS,
        *first,
        "",
        f"config = {body}",
    ]
    return "\n".join(lines) + "\n"


_NAMES = (
    "LLM", "Data", "Dataset", "Lora", "Model", "Optim", "Prompt", "Runtime", "TrainConfig", "Vision", "use",
)  # fmt: skip


def _settings(settings: dict[str, Any]) -> list[str]:
    lines = []
    for name, value in settings.items():
        lines += [f"# {value.comment}"] if isinstance(value, Arg) and value.comment else []
        lines.append(f"{name} = {source(value.value if isinstance(value, Arg) else value, used=len(name) + 3)}")
    return lines


def _remarks(report: Report) -> list[str]:
    """Comment lines: what is to do by hand, what differs, what has no counterpart."""
    blocks = (
        ("To do by hand", report.edits),
        ("Done otherwise here", report.differs),
        ("No counterpart", report.lost),
    )
    lines = []
    for title, texts in blocks:
        if texts:
            lines += ["", f"# {title}:"]
            for text in texts:
                lines += WRAPPER.wrap(text)
    return lines
