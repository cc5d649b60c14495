"""Records to samples to segments: a source is read, a data map understands, image paths are resolved.

A record that cannot be read is not an exception here but its reason, so that whoever iterates can count it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

from mmft.config import Dataset
from mmft.data.image_paths import ImageFinder
from mmft.data.kinds import mapped, sound_records
from mmft.data.tokenize import Tokenizer, document_segments
from mmft.errors import ConfigError, DataError, Problem
from mmft.plugins import Plugins
from mmft.specs import ChatTemplate, DataMap
from mmft.types import BadRecord, Conversation, Document, Image, Message, RawRecord, Sample, Segment, Text

NOTHING = "nothing to train: no text to learn, such as an answer after a question"


def iterate_records(dataset: Dataset, plugins: Plugins, start: int = 0) -> Iterator[tuple[int, RawRecord | BadRecord]]:
    """(number from 1, record) of one dataset, in order, without the first `start`."""
    source = plugins.datasets.get(dataset.source.name)
    if start and source.load_from:
        records = sound_records(source.name, source.load_from(start, **dataset.source.options))
    else:
        records = islice(sound_records(source.name, source.load(**dataset.source.options)), start, None)
    left = None if dataset.limit is None else max(0, dataset.limit - start)
    return enumerate(islice(records, left), start=start + 1)


def iterate_samples(
    dataset: Dataset, plugins: Plugins, start: int = 0, *, find_images: bool = True
) -> Iterator[tuple[int, RawRecord, Sample | str]]:
    """(record number, record, sample or the reason there is none) of one dataset, in order.

    With `find_images=False` image paths stay as the record has them, and no file is looked for.
    """
    data_map = plugins.data_maps.get(dataset.data_map)
    system = plugins.system_texts.get(dataset.system_text).text if dataset.system_text else dataset.system
    images = ImageFinder(dataset.image_folder) if find_images else None
    for number, record in iterate_records(dataset, plugins, start):
        if isinstance(record, BadRecord):
            yield number, {}, record.reason
            continue
        try:
            yield number, record, _sample_of(record, data_map, system, images)
        except DataError as error:
            yield number, record, str(error)
        except Exception as error:  # a map is somebody's code: whatever it raises belongs to the record and the map
            yield number, record, f"data map {data_map.name!r} failed: {type(error).__name__}: {error}"


def _sample_of(record: RawRecord, data_map: DataMap, system: str | None, images: ImageFinder | None) -> Sample | str:
    sample = mapped(data_map, record)
    if sample is None:
        return NOTHING
    if isinstance(sample, Document):
        return sample
    messages = sample.messages
    if images and any(part.__class__ is Image for message in messages for part in message.parts):
        messages = tuple(_with_paths(message, images) for message in messages)
    if system is not None and not any(message.role == "system" for message in messages):
        messages = (Message("system", (Text(system),)), *messages)
    return sample if messages is sample.messages else replace(sample, messages=messages)


def _with_paths(message: Message, images: ImageFinder) -> Message:
    if not message.images:
        return message
    found = (Image(images.find(str(p.source))) if isinstance(p, Image) else p for p in message.parts)
    return replace(message, parts=tuple(found))


def render_sample(sample: Sample, template: ChatTemplate, tokenizer: Tokenizer) -> Sequence[Segment]:
    """The segments of a sample: a conversation through its template, a document as it is."""
    if isinstance(sample, Document):
        return document_segments(sample, tokenizer)
    return template.render(sample)


def unwritten_thoughts(sample: Sample, segments: Sequence[Segment], template: ChatTemplate) -> str:
    """The repair to list where a chat template wrote nothing of what trained answers thought; empty elsewhere."""
    if isinstance(sample, Document):
        return ""
    thoughts = [one.reasoning.strip() for one in sample.messages if one.reasoning and one.is_trained]
    if not thoughts:
        return ""
    written = "".join(segment.content for segment in segments if isinstance(segment.content, str))
    lost = sum(thought not in written for thought in thoughts)
    return f"reasoning that chat template {template.name!r} does not write is not trained: {lost}" if lost else ""


def bound_template(name: str, plugins: Plugins, tokenizer: Tokenizer) -> ChatTemplate:
    """The chat template for this tokenizer; one that cannot be had is refused when the first conversation needs it.

    Documents need none, so a base model without a template of its own is pretrained as it is. Such a template writes a
    question as a document that goes on, which is how sample chat asks a base model.
    """
    template = plugins.chat_templates.get(name)
    try:
        return replace(template.for_tokenizer(tokenizer.hf), bind=None, compare=template.compare)
    except DataError as error:
        bos = tokenizer.hf.bos_token if tokenizer.writes_bos else ""
        return replace(template, render=partial(_render_question, str(error), bos), bind=None, stop=(), compare=False)


def is_unbound(template: ChatTemplate) -> bool:
    """Whether `bound_template` could not bind it, so that only documents can be trained."""
    return isinstance(template.render, partial) and template.render.func is _render_question


def _render_question(
    reason: str, bos: str, conversation: Conversation, /, *, generation_prompt: bool = False
) -> list[Segment]:
    """A single question as the beginning of a document. Raises `ConfigError` with the reason for any conversation."""
    if generation_prompt and len(conversation.messages) == 1:
        parts = [part if isinstance(part, Image) else part.text for part in conversation.messages[0].parts]
        return [*([Segment(bos, markup=True)] if bos else []), *map(Segment, parts)]
    raise ConfigError([Problem("data.chat_template", reason)])


def history_note(template: ChatTemplate) -> str:
    """What a person should know, once a run, of a template that trains less than every answer; else empty."""
    if not template.rewrites_history:
        return ""
    return (
        f"chat template {template.name!r}: its model's own format rewrites earlier turns once a conversation goes on; "
        "where it does, only the last answer is trained"
    )
