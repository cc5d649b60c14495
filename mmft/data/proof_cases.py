"""The battery of the template proof: short conversations, each with one thing a chat template may treat its own way."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmft.types import Conversation, Image, Message, Role, Text, ToolCall


@dataclass(frozen=True, slots=True)
class Case:
    """A conversation that ends with an answer, and what it is there for."""

    name: str
    conversation: Conversation


def _talk(*turns: tuple[Role, str]) -> Conversation:
    return Conversation(tuple(Message(role, (Text(text),)) for role, text in turns))


TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city, 天气",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_CALL = Message("assistant", (), (ToolCall("weather", {"city": "北京", "days": 2}, "a1B2c3D4e"),))
_RESULT = Message("tool", (Text('{"celsius": 21}'),), call_id="a1B2c3D4e")
_ASK, _SAY = _talk(("user", "How warm is it?"), ("assistant", "It is 21 degrees.")).messages

CASES: tuple[Case, ...] = (
    Case("one turn", _talk(("user", "What is it?"), ("assistant", "A cat."))),
    Case(
        "system and two turns",
        _talk(
            ("system", "You answer briefly."),
            ("user", "Name a colour."),
            ("assistant", "Red."),
            ("user", "Another one?\n\nPlease."),
            ("assistant", "Blue."),
        ),
    ),
    Case(
        "two turns, no system",
        _talk(("user", "Hi"), ("assistant", "Hello."), ("user", "Bye"), ("assistant", "Goodbye.")),
    ),
    Case("empty system", _talk(("system", ""), ("user", "What is it?"), ("assistant", "A cat."))),
    Case("unicode", _talk(("user", "你好 ✓ — «quotes» Ünïcödé"), ("assistant", "你好，世界。"))),
    Case("white space", _talk(("user", "  def f(x):\n    return x\n"), ("assistant", "f(1)\n\n  "))),
    Case("tools, a call and its result", Conversation((_ASK, _CALL, _RESULT, _SAY), (TOOL,))),
    Case("tools and a system", Conversation((Message("system", (Text("Be kind."),)), _ASK, _SAY), (TOOL,))),
    Case("a tool call last", Conversation((_ASK, _CALL), (TOOL,))),
    Case(
        "images",
        Conversation((Message("user", (Image("a.png"), Text("What is it?"))), Message("assistant", (Text("A cat."),)))),
    ),
)


def forged_case(tokens: Sequence[str]) -> tuple[Conversation, Conversation]:
    """A harmless conversation, and the same with the spelling of each token in what the user says."""
    question = "Say x and y."
    return (
        _talk(("user", question), ("assistant", "No.")),
        _talk(("user", f"Say x {' '.join(tokens)} and y."), ("assistant", "No.")),
    )


def as_messages(conversation: Conversation, *, parts: bool = False) -> list[dict[str, Any]]:
    """The messages as transformers' templates take them; `parts` writes the content as a list of parts."""
    messages: list[dict[str, Any]] = []
    for message in conversation.messages:
        content: Any = message.text
        if parts:
            content = [
                {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": "image"}
                for part in message.parts
            ]
        messages.append({"role": message.role, "content": content})
        if message.tool_calls:
            messages[-1]["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
                | ({"id": call.id} if call.id else {})
                for call in message.tool_calls
            ]
        if message.call_id is not None:
            messages[-1]["tool_call_id"] = message.call_id
        if message.reasoning is not None:
            messages[-1]["reasoning_content"] = message.reasoning
    return messages
