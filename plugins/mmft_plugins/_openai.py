"""Messages in OpenAI's form, shared by `messages`, `openai` and `agent`.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "loss": true}]}

`content` is a string, None, or a list of parts; `loss` (or `weight`, as OpenAI's fine-tuning files call it) turns the
training of one message off or on. Format: https://platform.openai.com/docs/api-reference/chat/create.
"""

import json
from collections.abc import Mapping
from itertools import dropwhile
from typing import Any

from mmft.errors import DataError
from mmft.types import Conversation, Image, Message, RawRecord, Role, Text, ToolCall
from mmft_plugins._records import keys_found, object_list, one_of, shown, text_field

TEXT_ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",  # the name of the system role since OpenAI's o1
    "user": "user",
    "assistant": "assistant",
}
AGENT_ROLES: Mapping[str, Role] = {**TEXT_ROLES, "tool": "tool"}
SWITCH: Mapping[Any, bool] = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}


def conversation(record: RawRecord, *, agent: bool = False) -> Conversation | None:
    """The conversation of a record; None where no message is left to train.

    Answers before the first question are dropped, as LLaVA and XTuner do. With `agent`, tools and calls are read;
    without, a record that has any is a `DataError`, because a text format would lose them.
    """
    tools = _tools(record.get("tools"))
    if tools and not agent:
        raise DataError("the record has 'tools', which this data map does not read; use the data map 'agent'")
    roles = AGENT_ROLES if agent else TEXT_ROLES
    messages = [_message(message, number, roles) for number, message in enumerate(object_list(record, "messages"))]
    kept = drop_leading_answers(messages)
    return Conversation(kept, tools) if has_answer(kept) else None


def drop_leading_answers(messages: list[Message]) -> tuple[Message, ...]:
    """The messages without the answers that precede the first question; system messages stay."""
    rest = list(dropwhile(lambda message: message.role != "user", messages))
    head = messages[: len(messages) - len(rest)]
    return (*(message for message in head if message.role == "system"), *rest)


def has_answer(messages: tuple[Message, ...]) -> bool:
    """Whether some message is trained and says something."""
    return any(message.is_trained and (message.text.strip() or message.tool_calls) for message in messages)


def _message(message: Mapping[str, Any], number: int, roles: Mapping[str, Role]) -> Message:
    try:
        name = text_field(message, "role")
        if name not in roles:
            hint = "; use the data map 'agent'" if name in AGENT_ROLES else ""
            raise DataError(f"role {name!r}; allowed: {one_of(roles)}{hint}")
        calls = message.get("tool_calls")
        if message.get("function_call"):
            raise DataError("'function_call' is OpenAI's form before 2023-11; rewrite it as 'tool_calls'")
        if calls and "tool" not in roles:
            raise DataError("'tool_calls', which this data map does not read; use the data map 'agent'")
        if calls and name != "assistant":
            raise DataError(f"'tool_calls' in a message of role {name!r}; only an assistant calls tools")
        loss = _loss(message)
        if loss and name == "tool":
            raise DataError("a tool message asks to be trained; tool output is never a target")
        tool_calls = tuple(map(_tool_call, object_list(message, "tool_calls"))) if calls else ()
        return Message(roles[name], _parts(message), tool_calls, loss)
    except DataError as error:
        raise DataError(f"messages[{number}]: {error}") from error


def _loss(message: Mapping[str, Any]) -> bool | None:
    for key in ("loss", "weight"):
        value = message.get(key)
        if value is None:
            continue
        switch = value.strip().lower() if isinstance(value, str) else value
        if not isinstance(switch, str | int | float) or switch not in SWITCH:
            raise DataError(f"{key!r} must be true, false, 1 or 0, found {shown(value)}")
        return SWITCH[switch]
    return None


def _parts(message: Mapping[str, Any]) -> tuple[Text | Image, ...]:
    content = message.get("content")
    if content is None:
        if "content" not in message and not message.get("tool_calls"):
            raise DataError(f"'content' is missing; keys found: {keys_found(message)}")
        return ()
    if isinstance(content, str):
        return (Text(content),) if content else ()
    if not isinstance(content, list | tuple):
        raise DataError(f"'content' must be a string or a list of parts, found {type(content).__name__}")
    return tuple(_part(part) for part in object_list(message, "content"))


def _part(part: Mapping[str, Any]) -> Text | Image:
    """One part of a content list; images by path or URL, as OpenAI (`image_url`) or transformers (`image`) has them."""
    kind = text_field(part, "type")
    if kind == "text":
        return Text(text_field(part, "text"))
    if kind == "image_url":
        url = part.get("image_url")
        return Image(text_field(url, "url") if isinstance(url, Mapping) else text_field(part, "image_url"))
    if kind == "image":
        key = next((key for key in ("image", "path", "url") if part.get(key) is not None), "image")
        return Image(text_field(part, key))
    raise DataError(f"a part of type {kind!r}; allowed: 'text', 'image', 'image_url'")


def _tool_call(call: Mapping[str, Any]) -> ToolCall:
    """`{"type": "function", "function": {"name", "arguments"}}`, or the inner object alone."""
    function = call.get("function", call)
    if not isinstance(function, Mapping):
        raise DataError(f"a tool call's 'function' must be an object, found {shown(function)}")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise DataError(f"the arguments of a tool call are not JSON ({error}): {shown(arguments)}") from error
    arguments = {} if arguments in (None, "") else arguments
    if not isinstance(arguments, Mapping):
        raise DataError(f"the arguments of a tool call must be an object, found {shown(arguments)}")
    return ToolCall(text_field(function, "name"), arguments)


def _tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    """Tool schemas as OpenAI writes them; a bare function schema is wrapped, a JSON string is read."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(f"'tools' is a string but not JSON ({error}): {shown(tools)}") from error
    if not tools:
        return ()
    schemas = object_list({"tools": tools}, "tools")
    for schema in schemas:
        if "function" not in schema and "name" not in schema:
            raise DataError(f"a tool needs 'function' or 'name'; keys found: {keys_found(schema)}")
    return tuple(schema if "function" in schema else {"type": "function", "function": schema} for schema in schemas)
