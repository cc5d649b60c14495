"""What can be known to be wrong with evaluation during training before it starts."""

from collections.abc import Iterator

from mmft.config.schema import TrainConfig
from mmft.errors import Problem


def evaluation_problems(config: TrainConfig) -> Iterator[Problem]:
    """Data without an evaluation, an evaluation without data, and choices that exclude each other."""
    data, evaluation = config.data, config.runtime.evaluation
    where = "data.validation" if data.validation else "data.validation_share"
    given = bool(data.validation) or data.validation_share > 0
    if data.validation and data.validation_share:
        yield Problem("data.validation_share", "data.validation gives files of its own", "drop one of them")
    if evaluation and not given:
        hint = "give data.validation, or data.validation_share=0.01"
        yield Problem("runtime.evaluation", "there is nothing to evaluate on", hint)
    if given and not evaluation:
        yield Problem(where, "it would never be used", "set runtime.evaluation, or drop it")
    if data.validation_share and data.streaming:
        hint = "give files of their own as data.validation"
        yield Problem("data.validation_share", "the records of a stream are not known beforehand", hint)
    for index, dataset in enumerate(data.validation):
        for name, value, usual in (("repeat", dataset.repeat, 1.0), ("weight", dataset.weight, None)):
            if value != usual:
                yield Problem(f"data.validation.{index}.{name}", "every record is evaluated once", "drop it")
    if evaluation and evaluation.final == "best" and not evaluation.keep_best:
        hint = "set runtime.evaluation.keep_best"
        yield Problem("runtime.evaluation.final", "the best checkpoint may be gone by then", hint)
