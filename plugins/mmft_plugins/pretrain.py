"""Incremental pretraining: plain text of which every token is a target."""

from mmft import hookimpl
from mmft.errors import DataError
from mmft.specs import DataMap
from mmft.types import Document, RawRecord, Sample
from mmft_plugins._records import text_field


def pretrain(record: RawRecord) -> Document | None:
    """`{"text": ...}` as a document, its white space untouched; None where it has no text.

    Unlike XTuner's `pretrain_map_fn` (xtuner/dataset/map_fns/dataset_map_fns/pretrain_map_fn.py), which strips it.
    """
    text = text_field(record, "text")
    return Document(text) if text.strip() else None


def write_pretrain(sample: Sample) -> RawRecord:
    """`{"text": ...}`. Raises `DataError` for a conversation, whose text depends on a chat template."""
    if isinstance(sample, Document):
        return {"text": sample.text}
    raise DataError(
        "'pretrain' has no place for a conversation, whose text is a chat template's affair; use 'messages'"
    )


@hookimpl
def mmft_data_maps() -> list[DataMap]:
    """Plain text."""
    return [
        DataMap(
            name="pretrain",
            fn=pretrain,
            summary="plain text for incremental pretraining",
            columns=("text",),
            examples=({"text": "The quick brown fox jumps over the lazy dog."}, {"text": "# A title\n\nA paragraph."}),
            write=write_pretrain,
        )
    ]
