"""A request for an answer, from JSON to the conversation and the sampling that the model is given.

A field that would change the answer and that is not supported is refused by its name; one that would not is ignored.
Format: https://platform.openai.com/docs/api-reference/chat/create.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from mmft.chat.server.errors import Refused
from mmft.chat.server.pictures import Pictures
from mmft.errors import MmftError, did_you_mean
from mmft.generation import Generation
from mmft.inference import user_message
from mmft.specs import ChatTemplate
from mmft.types import Conversation, Image, Message, Role, Text, ToolCall

ROLES: Mapping[str, Role] = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"
}  # fmt: skip
IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
)  # fmt: skip
MAX_STOPS, MAX_STOP = 16, 1000  # strings, and characters of each; all are looked for at every token
# What is not supported, with the values that ask for nothing else than what is done anyway; null always does.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,), "response_format": ({"type": "text"},), "logprobs": (False,), "top_logprobs": (0,), "logit_bias": ({},),
    "presence_penalty": (0,), "frequency_penalty": (0,), "tool_choice": ("auto", "none"),
    "parallel_tool_calls": (True,), "modalities": (["text"],), "audio": (), "prediction": (), "web_search_options": (),
    "functions": ([],), "function_call": ("auto", "none"), "reasoning_effort": ("none",), "verbosity": ("medium",),
}  # fmt: skip


class StreamOptions(BaseModel):
    """`include_obfuscation` pads chunks against those who watch a network; it is left alone."""

    include_usage: bool = False


class Fields(BaseModel):
    """What a request may say of the answer, beside its messages."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    tools: list[dict[str, Any]] | None = None


@dataclass
class Ask:
    """A request that can be answered.

    `held` are the files of its pictures, to be released; `places` say where in the request each of them stands.
    """

    conversation: Conversation
    generation: Generation
    stream: bool
    include_usage: bool
    held: list[Path] = field(default_factory=list)
    places: dict[Path, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Reader:
    """Reads requests for one model. `defaults` hold where a request says nothing."""

    name: str
    template: ChatTemplate
    sees: bool
    defaults: Generation
    pictures: Pictures

    def read(self, body: bytes) -> Ask:
        """What is asked. Its pictures are held until they are released.

        Raises `MmftError` for what cannot be answered; then nothing is held.
        """
        given = _object(body)
        messages = given.pop("messages", None)
        choice = given.get("tool_choice")
        fields = _fields(given)
        if fields.model not in (None, self.name):
            there = f"there is no model {fields.model!r} here, but {self.name!r}"
            raise Refused(there, status=404, param="model", code="model_not_found")
        tools = self._tools(fields.tools or ()) if choice != "none" else ()
        ask = Ask(
            Conversation(()), _generation(fields, self.defaults), bool(fields.stream),
            bool(fields.stream_options and fields.stream_options.include_usage),
        )  # fmt: skip
        if not isinstance(messages, list) or not messages:
            raise Refused("messages: a list of at least one message is needed", param="messages")
        with self._released(ask.held):
            read = tuple(self._message(one, f"messages[{n}]", ask) for n, one in enumerate(messages))
            if read[-1].role == "assistant":
                raise Refused("messages: the last one is the assistant's, so nothing is asked", param="messages")
            ask.conversation = Conversation(read, tools)
        return ask

    @contextmanager
    def _released(self, held: list[Path]) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.pictures.release(held)
            raise

    def _tools(self, tools: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
        if tools and self.template.read_calls is None:
            lacks = "no form for tools" if not self.template.supports_tools else "a form of calls that is not read back"
            raise Refused(f"tools: the model's chat template, {self.template.name!r}, has {lacks}", param="tools")
        for number, tool in enumerate(tools):
            function = tool.get("function")
            named = isinstance(function, Mapping) and isinstance(function.get("name"), str) and function["name"]
            if tool.get("type") != "function" or not named:
                allowed = '{"type": "function", "function": {"name": ..., "parameters": ...}}'
                raise Refused(f"tools[{number}]: allowed is {allowed}", param="tools")
        return tuple(tools)

    def _message(self, given: Any, where: str, ask: Ask) -> Message:
        name = given.get("role") if isinstance(given, dict) else None
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise Refused(f"{where}: role is {name!r}; allowed are {', '.join(ROLES)}", param=where)
        parts = [self._part(part, f"{where}.content[{n}]", ask) for n, part in enumerate(_parts(given, where))]
        calls = (given.get("tool_calls") or []) if role == "assistant" else []
        if not isinstance(calls, list):
            raise Refused(f"{where}.tool_calls: a list is needed", param=f"{where}.tool_calls")
        if role != "user":
            if any(isinstance(part, Image) for part in parts):
                raise Refused(f"{where}: pictures belong to the user's messages", param=where)
            read = tuple(_call(call, f"{where}.tool_calls[{n}]") for n, call in enumerate(calls))
            call_id = given.get("tool_call_id") if role == "tool" else None
            return Message(role, tuple(parts), read, call_id=call_id if isinstance(call_id, str) else None)
        texts = [part.text for part in parts if isinstance(part, Text)]
        if len(texts) > 1 and _between(parts):
            return Message(role, tuple(parts))
        try:  # as every question here: the pictures first
            return user_message("".join(texts), [part.source for part in parts if isinstance(part, Image)])
        except MmftError as error:
            raise Refused(f"{where}: {error}", param=where) from error

    def _part(self, part: Any, where: str, ask: Ask) -> Text | Image:
        kind = part.get("type") if isinstance(part, dict) else None
        value = part.get(kind) if isinstance(kind, str) else None
        if kind == "text" and isinstance(value, str):
            return Text(value)
        key = {"image_url": "url", "file": "file_id"}.get(kind) if isinstance(kind, str) else None
        url = value.get(key) if key and isinstance(value, dict) else value
        if key is None or not isinstance(url, str):
            allowed = "a text, an image_url with its url, a file with its file_id"
            raise Refused(f"{where}: part of type {kind!r}; allowed are {allowed}", param=where)
        if not self.sees:
            raise Refused(f"{where}: this is a text model, it takes no pictures", param=where)
        path = self.pictures.hold(url, where)
        ask.held.append(path)
        ask.places[path] = where
        return Image(path)


def _object(body: bytes) -> dict[str, Any]:
    try:
        given = from_json(body)
    except ValueError as error:
        raise Refused(f"the request is no JSON: {error}", code="invalid_json") from error
    if not isinstance(given, dict):
        raise Refused(f"the request is no JSON object: it begins with {body[:20]!r}", code="invalid_json")
    return given


def _fields(given: dict[str, Any]) -> Fields:
    """Raises `Refused` for the first field that is unknown, not supported, or of a wrong type."""
    known = Fields.model_fields.keys()
    for name, value in given.items():
        if name in NEUTRAL and value is not None and value not in NEUTRAL[name]:
            allowed = " or ".join(json.dumps(value) for value in NEUTRAL[name])
            hint = f"allowed is {allowed}" if allowed else "leave it out"
            raise Refused(f"{name} is not supported here; {hint}", param=name, code="unsupported_parameter")
        if name not in known and name not in NEUTRAL and name not in IGNORED:
            hint = did_you_mean(name, [*known, "messages"])
            raise Refused(f"unknown field {name!r}{hint}", param=name, code="unknown_parameter")
    try:
        return Fields(**{name: value for name, value in given.items() if name in known})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise Refused(f"{name}: {first['msg']}, found {json.dumps(first['input'])[:80]}", param=name) from error


def _generation(fields: Fields, defaults: Generation) -> Generation:
    limits = {fields.max_tokens, fields.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise Refused("max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
    given: dict[str, Any] = {
        name: getattr(fields, name)
        for name in ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
        if getattr(fields, name) is not None
    }
    if limits:
        given["max_new_tokens"] = limits.pop()
    if fields.stop is not None:
        given["stop"] = (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop)
        if len(given["stop"]) > MAX_STOPS or any(len(text) > MAX_STOP for text in given["stop"]):
            raise Refused(f"stop: at most {MAX_STOPS} strings of {MAX_STOP:,} characters are allowed", param="stop")
    try:
        return replace(defaults, **given)
    except MmftError as error:
        text = str(error).replace("max_new_tokens", "max_tokens")
        raise Refused(text, param=text.partition("=")[0]) from error


def _parts(message: Mapping[str, Any], where: str) -> list[Any]:
    content = message.get("content")
    if content is None and message.get("role") == "assistant":
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    if not isinstance(content, list):
        raise Refused(f"{where}: content is neither a text nor a list of parts", param=where)
    return content


def _between(parts: Sequence[Text | Image]) -> bool:
    """Whether a picture stands between two texts, where its place says something."""
    kinds = [isinstance(part, Text) for part in parts]
    first, last = kinds.index(True), len(kinds) - 1 - kinds[::-1].index(True)
    return not all(kinds[first:last])


def _call(given: Any, where: str) -> ToolCall:
    function = given.get("function") if isinstance(given, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    try:
        arguments = from_json(function.get("arguments") or "{}") if isinstance(function, dict) else None
    except (TypeError, ValueError):
        arguments = None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        allowed = '{"id": ..., "type": "function", "function": {"name": ..., "arguments": "{...}"}}'
        raise Refused(f"{where}: allowed is {allowed}, with the arguments as JSON in a string", param=where)
    number = given.get("id")
    return ToolCall(name, arguments, number if isinstance(number, str) else None)
