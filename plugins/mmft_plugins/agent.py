"""Conversations in which the assistant calls tools.

What the assistant writes is trained, its calls included; what a tool answers never is. A format for the calls is the
chat template's affair: choose one that supports tools.
"""

from mmft import hookimpl
from mmft.specs import DataMap
from mmft.types import Conversation, RawRecord
from mmft_plugins import _openai

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def agent(record: RawRecord) -> Conversation | None:
    """OpenAI messages with `tools`, `tool_calls` (several at once too) and messages of role `tool`."""
    return _openai.conversation(record, agent=True)


@hookimpl
def mmft_data_maps() -> list[DataMap]:
    """Tool use."""
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    examples = (
        {
            "tools": [WEATHER],
            "messages": [
                {"role": "user", "content": "How is the weather in Paris?"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "1", "content": '{"celsius": 21}'},
                {"role": "assistant", "content": "It is 21 °C in Paris."},
            ],
        },
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
    )
    return [
        DataMap(
            name="agent",
            fn=agent,
            summary="OpenAI messages with tools, tool calls and tool results",
            columns=("messages", "tools"),
            examples=examples,
        )
    ]
