"""ReAct: tools for a model whose own format has none, as plain text in ChatML's turns.

    system     the tools, and how to call them
    assistant  Thought: ...
               Action: calculate
               Action Input: {"expression": "1 + 2"}
    user       Observation: 3
    assistant  the answer

The form of https://arxiv.org/abs/2210.03629 as agents use it. All of it is data: nothing can forge a control token.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mmft.specs import ChatTemplate
from mmft.types import Conversation, Message, Segment, Text, ToolCall
from mmft_plugins._calls import Read, decoded
from mmft_plugins._tools import as_json
from mmft_plugins.templates import CHATML, render_turns

ACTION = re.compile(r"^Action:[ \t]*(\S+)[ \t]*\nAction Input:", re.MULTILINE)
THOUGHT, FINAL = "Thought:", "Final Answer:"
HOW = (
    "To call one, end your turn with these lines:\n"
    "Thought: why it is needed\nAction: the name of the tool\nAction Input: its arguments, a JSON object\n"
    "Its result comes back after 'Observation:'. When you know the answer, write it."
)


def render_react(conversation: Conversation, /, *, generation_prompt: bool = False) -> list[Segment]:
    """ChatML, with calls, results and tools as text."""
    messages = [_as_text(message) for message in conversation.messages]
    if conversation.tools:
        has_system = bool(messages) and messages[0].role == "system"
        before = (*messages[0].parts, Text("\n\n")) if has_system else ()
        messages = [Message("system", (*before, Text(_told(conversation.tools)))), *messages[has_system:]]
    plain = replace(conversation, messages=tuple(messages), tools=())
    return render_turns(CHATML, plain, generation_prompt=generation_prompt)


def _told(tools: tuple[Mapping[str, Any], ...]) -> str:
    lines = [
        f"{tool['function']['name']}: {tool['function'].get('description', '')} Arguments: "
        f"{as_json(tool['function'].get('parameters', {}))}"
        for tool in tools
    ]
    return "\n".join(["You may call these tools:", *lines, HOW])


def _as_text(message: Message) -> Message:
    if message.role == "tool":
        return Message("user", (Text("Observation: "), *message.parts))
    if not message.tool_calls:
        return message
    thought = (Text(f"{THOUGHT} "), *message.parts, Text("\n")) if message.parts else ()
    actions = (f"Action: {call.name}\nAction Input: {as_json(dict(call.arguments))}" for call in message.tool_calls)
    return replace(message, parts=(*thought, Text("\n".join(actions))), tool_calls=())


def read_react(text: str) -> Read:
    """The thought before the first action, and the actions; or the answer, without what was thought before it."""
    calls: list[ToolCall] = []
    first = found = ACTION.search(text)
    while found:
        value, end = decoded(text, found.end())
        if isinstance(value, dict):
            calls.append(ToolCall(found[1], value))
        found = ACTION.search(text, max(end, found.end()))
    if first and calls:
        return text[: first.start()].strip().removeprefix(THOUGHT).strip(), tuple(calls)
    return (text.partition(FINAL)[2].strip() if FINAL in text else text), ()


REACT = ChatTemplate(
    name="react",
    render=render_react,
    stop=(CHATML.end, "\nObservation:"),
    supports_tools=True,
    source="https://arxiv.org/abs/2210.03629 in ChatML's turns; no model's own, so it is compared with none",
    compare=False,
    read_calls=read_react,
    call_marks=(THOUGHT, "Action:", FINAL),
)
