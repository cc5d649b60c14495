"""The models that an import is held against: those of an mmft config, or of an XTuner config, which is parsed, not run.

An XTuner config goes through the same translation as `mmft convert xtuner-config`, but for its model and its template
only, and what that writes as source text is made here as objects.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mmft.config import LLM, Lora, Model, TrainConfig, Vision, use
from mmft.config.foreign import is_xtuner_config
from mmft.config.load import load_config, problems_of
from mmft.convert.xtuner.data import draft_data
from mmft.convert.xtuner.model import draft_model
from mmft.convert.xtuner.report import Node, Report
from mmft.convert.xtuner.syntax import read_assignments
from mmft.convert.xtuner.write import Arg, Call, Raw
from mmft.errors import ConfigError, Problem, UnknownName
from mmft.plugins import Plugins

MAKERS: dict[str, Callable[..., Any]] = {
    "Model": Model,
    "LLM": LLM,
    "Lora": Lora,
    "Vision": Vision,
    "use": use,
    "Path": Path,
}


@dataclass(frozen=True)
class Target:
    """What the result is a model of. `config` is the run's, where it was one of mmft."""

    model: Model
    chat_template: str
    precision: str
    config: TrainConfig | None = None


def read_target(reference: str, plugins: Plugins, settings: tuple[str, ...] = ()) -> Target:
    """The target that a config of mmft (a path or a name) or of XTuner 0.1 (a path) describes.

    Raises `ConfigError` for a config that is neither, or of a model that mmft has not.
    """
    path = Path(reference)
    if path.suffix == ".py" and path.is_file() and is_xtuner_config(path):
        if settings:
            raise ConfigError([Problem("--set", "changes mmft's configs, not XTuner's", "change the file itself")])
        return _xtuner_target(path, plugins)
    try:
        config = load_config(reference, plugins, settings)
    except UnknownName as error:
        raise UnknownName(f"{error}; CONFIG may also be the .py file of an XTuner config") from None
    return target_of(config)


def target_of(config: TrainConfig) -> Target:
    """A config's models, without what they start from: that is what is imported."""
    precision = "bf16" if config.runtime.precision == "auto" else config.runtime.precision
    return Target(config.model, config.data.chat_template, precision, config)


def _xtuner_target(path: Path, plugins: Plugins) -> Target:
    report = Report()
    top = Node(read_assignments(path), "", report)
    data = draft_data(top, plugins, report)
    draft = draft_model(top, data.pad_to_square, report)
    try:
        model = _made(draft.call, draft.settings)
    except ValidationError as error:
        raise ConfigError(problems_of(error, where=f"{path}: ")) from None
    assert isinstance(model, Model)
    if model.vision is not None:  # stage 1's projector is not what this checkpoint has
        model = model.model_copy(update={"vision": model.vision.model_copy(update={"projector_weights": None})})
    return Target(model, next(iter(sorted(data.templates)), "auto"), "bf16")


def _made(value: Any, settings: dict[str, Any]) -> Any:
    """What the source text of `value` would give: calls of our own classes on plain values, nothing else."""
    if isinstance(value, Arg):
        return _made(value.value, settings)
    if isinstance(value, Raw):
        return _made(settings[value.text], settings)
    if isinstance(value, tuple | list):
        return tuple(_made(item, settings) for item in value)
    if not isinstance(value, Call):
        return value
    positional = [_made(item, settings) for item in value.arguments if not item.name]
    named = {item.name: _made(item, settings) for item in value.arguments if item.name}
    return MAKERS[value.function](*positional, **named)
