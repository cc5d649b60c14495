"""What a chat template must keep, and the conversations it is tried on."""

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import TypeAlias

from mmft.errors import PluginError
from mmft.specs import ChatTemplate
from mmft.testing.blame import blamed
from mmft.types import Conversation, Image, Message, Segment, Text, ToolCall

Flat: TypeAlias = list[tuple[str | Image, bool]]  # one entry a character or image: what it is, whether it is trained
BATTERY: tuple[Conversation, ...] = (
    Conversation((Message("user", (Text("What is it?"),)), Message("assistant", (Text("A cat."),)))),
    Conversation(
        (
            Message("system", (Text("You answer briefly."),)),
            Message("user", (Text("Name a colour."),)),
            Message("assistant", (Text("Red."),)),
            Message("user", (Text("Another one?\n\nPlease."),)),
            Message("assistant", (Text("Blue."),)),
        )
    ),
    Conversation((Message("user", (Text("你好 ✓ — «quotes»"),)), Message("assistant", (Text("你好，世界。"),)))),
    Conversation((Message("user", (Text("def f(x):\n    return x"),)), Message("assistant", (Text("  f(1)\n"),)))),
    Conversation(
        (
            Message("user", (Image("a.png"), Text("\nWhat is it?"))),
            Message("assistant", (Text("A cat."),)),
            Message("user", (Text("And this? "), Image("b.png"), Text(" Compare."))),
            Message("assistant", (Text("A dog."),)),
        )
    ),
)


def check_chat_template(template: ChatTemplate, conversations: Iterable[Conversation] = BATTERY) -> None:
    """A prompt is a prefix of the training sequence, ends in no space, and each answer is trained with its end.

    Of a template that rewrites history only the last answer is asked about. A template with `read_calls` reads the call
    that it writes. Raises `PluginError`, whatever the template raises.
    """
    where = f"chat template {template.name!r}"
    with blamed(where, template.render):
        for conversation in conversations:
            segments = template.render(conversation)
            for k in _answers(conversation, template):
                prompt = template.render(Conversation(conversation.messages[:k]), generation_prompt=True)
                _check_answer(where, template, conversation.messages[k], k, _flat(prompt), _flat(segments))
            if conversation.images != tuple(s.content for s in segments if isinstance(s.content, Image)):
                raise PluginError(f"{where}: it loses or reorders images")
        if template.read_calls:
            _check_calls(template)


def _answers(conversation: Conversation, template: ChatTemplate) -> list[int]:
    answers = [k for k, message in enumerate(conversation.messages) if message.role == "assistant"]
    return answers[-1:] if template.rewrites_history else answers


def _check_answer(where: str, template: ChatTemplate, answer: Message, k: int, prompt: Flat, whole: Flat) -> None:
    """One answer: where its prompt ends, and what is trained from there on."""
    if whole[: len(prompt)] != prompt:
        raise PluginError(
            f"{where}: the prompt of turn {k} is not a prefix of the training sequence: {_shown(prompt)!r} against "
            f"{_shown(whole[: len(prompt)])!r}"
        )
    if any(loss for _, loss in prompt[len(prompt) - 1 :]):
        raise PluginError(f"{where}: the prompt of turn {k} ends in a trained segment")
    if _shown(prompt).endswith(" "):
        raise PluginError(
            f"{where}: the prompt of turn {k} ends in a space, which tokenizes differently from the same space before "
            "the answer; let the answer begin with it"
        )
    trained = _shown(list(takewhile(lambda pair: pair[1], whole[len(prompt) :])))
    if not trained:
        raise PluginError(f"{where}: the answer of turn {k} is not trained")
    if not template.stop:
        raise PluginError(f"{where}: it has no stop; give the strings that end an answer")
    end = trained.rpartition(answer.text.strip())[2]
    if not any(stop in end for stop in template.stop):
        raise PluginError(
            f"{where}: the answer of turn {k} is not trained with its end, so the model would not stop: what is "
            f"trained is {trained!r}, without {' or '.join(map(repr, template.stop))} behind the answer"
        )


def _check_calls(template: ChatTemplate) -> None:
    assert template.read_calls is not None
    call = ToolCall("search", {"query": "x"}, "abcdefghi")
    schema = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}
    messages = (Message("user", (Text("Q"),)), Message("assistant", (), (call,)))
    segments = template.render(Conversation(messages, (schema,)))
    text = "".join(segment.content for segment in segments if segment.loss and isinstance(segment.content, str))
    text = min((text.removesuffix(stop) for stop in template.stop), key=len, default=text)
    found = [(one.name, dict(one.arguments)) for one in template.read_calls(text)[1]]
    if found != [(call.name, dict(call.arguments))]:
        raise PluginError(f"chat template {template.name!r}: of the call it wrote as {text!r} it reads back {found}")
    if not any(mark in text for mark in template.call_marks):
        raise PluginError(f"chat template {template.name!r}: none of its call_marks is in a call: {text!r}")


def _flat(segments: Sequence[Segment]) -> Flat:
    """One entry a character or image, so that sequences can be compared whatever their segmentation."""
    flat: Flat = []
    for segment in segments:
        if isinstance(segment.content, Image):
            flat.append((segment.content, False))
        else:
            flat.extend((character, segment.loss) for character in segment.content)
    return flat


def _shown(flat: Flat) -> str:
    return "".join("<image>" if isinstance(content, Image) else content for content, _ in flat)
