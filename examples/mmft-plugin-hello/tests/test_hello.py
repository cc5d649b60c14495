"""The plugin keeps mmft's rules, and reads and writes what it says it does."""

import mmft_plugin_hello as hello
import pytest

from mmft import Conversation, DataError, Message, Text
from mmft.testing import check_plugin


def test_plugin_conforms():
    assert sorted(check_plugin(hello)) == ["question_answer", "zephyr"]


def test_answer_is_trained_with_its_end_and_nothing_else():
    conversation = Conversation((Message("user", (Text("Hi"),)), Message("assistant", (Text("Hello."),))))
    segments = hello.render_zephyr(conversation)
    assert "".join(s.content for s in segments) == "<|user|>\nHi</s>\n<|assistant|>\nHello.</s>\n"
    assert [s.content for s in segments if s.loss] == ["Hello.", "</s>"]


def test_empty_answer_is_dropped_and_a_missing_one_is_an_error():
    assert hello.question_answer({"question": "Hi", "answer": " "}) is None
    with pytest.raises(DataError, match="'answer' must be a string; keys found: question"):
        hello.question_answer({"question": "Hi"})
