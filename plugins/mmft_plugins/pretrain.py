"""Incremental pretraining: plain text of which every token is a target."""

from mmft import hookimpl
from mmft.specs import DataMap
from mmft.types import Document, RawRecord
from mmft_plugins._records import text_field


def pretrain(record: RawRecord) -> Document | None:
    """`{"text": ...}` as a document, its white space untouched; None where it has no text.

    Unlike XTuner's `pretrain_map_fn` (xtuner/dataset/map_fns/dataset_map_fns/pretrain_map_fn.py), which strips it.
    """
    text = text_field(record, "text")
    return Document(text) if text.strip() else None


@hookimpl
def mmft_data_maps() -> list[DataMap]:
    """Plain text."""
    return [
        DataMap(
            name="pretrain",
            fn=pretrain,
            summary="plain text for incremental pretraining",
            columns=("text",),
            examples=({"text": "The quick brown fox jumps over the lazy dog."},),
        )
    ]
