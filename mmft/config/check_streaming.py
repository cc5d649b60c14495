"""What can be known to be wrong with a streaming run before it starts."""

from collections.abc import Iterator

from mmft.config.schema import TrainConfig
from mmft.errors import Problem


def streaming_problems(config: TrainConfig) -> Iterator[Problem]:
    """What `data.streaming` cannot do: whatever needs the number, the length or the pictures of all records first."""
    data, optim, vision = config.data, config.optim, config.model.vision
    if not data.streaming:
        return
    if optim.max_steps is None:
        yield Problem("optim.max_steps", "a stream has no end of its own", "set it, in optimizer steps")
    if optim.epochs != type(optim).model_fields["epochs"].default:
        yield Problem("optim.epochs", "a stream ends by optim.max_steps, whatever pass it is in", "drop it")
    for name in ("group_by_modality", "group_by_length"):
        if getattr(data, name):
            yield Problem(f"data.{name}", "the lengths of a stream are not known beforehand", "drop it, or use packing")
    if data.on_bad_sample == "replace":
        yield Problem("data.on_bad_sample", "a stream has no other sample at hand to take instead", "use 'drop'")
    if vision and vision.feature_cache:
        where = "model.vision.feature_cache"
        yield Problem(where, "the pictures of a stream are not known beforehand", "drop it, or drop data.streaming")
    weighted = any(dataset.weight is not None for dataset in data.datasets)
    for index, dataset in enumerate(data.datasets):
        where = f"data.datasets.{index}.repeat"
        if not dataset.repeat.is_integer():
            hint = "use a whole number, or give every dataset a weight"
            yield Problem(where, f"a stream cannot take {dataset.repeat:g} of a dataset without knowing its size", hint)
        elif weighted and dataset.repeat != 1:
            yield Problem(where, "weights decide how often a streamed dataset is read", "drop it, or drop the weights")
