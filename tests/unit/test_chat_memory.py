"""What was computed once is not computed again, and never changes an answer."""

import gc
from pathlib import Path

import psutil
import pytest
import torch
from chat_models import SHORT, counted, make_assistant, pictures_encoded
from PIL import Image as PILImage

from mmft.chat.session import ChatSession
from mmft.inference import Assistant, Generation, user_message
from mmft.memory import Memory
from mmft.types import Conversation

SAMPLED = Generation(max_new_tokens=12, temperature=1.5, seed=3)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    return make_assistant(tmp_path_factory.mktemp("seeing"), sees=True)


def picture(path: Path, colour: str) -> Path:
    PILImage.new("RGB", (30, 20), colour).save(path)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    return [picture(tmp_path / f"{colour}.png", colour) for colour in ("red", "green", "blue")]


def alone(assistant: Assistant, session: ChatSession, text: str, images: list[Path]) -> str:
    """The answer without anything remembered."""
    asked = (*session.conversation.messages, user_message(text, images))
    return assistant.answer(Conversation(asked), session.generation)


@pytest.mark.parametrize("generation", [SHORT, SAMPLED])
def test_answers_with_reuse_are_those_without(seeing: Assistant, pictures: list[Path], generation: Generation) -> None:
    red, green, blue = pictures
    session = ChatSession(seeing, generation, system="Be brief.")
    turns = [("Hello", []), ("What is it?", [red, green]), ("And?", []), ("This one?", [blue]), ("Which?", [red])]
    for number, (text, images) in enumerate(turns):
        expected = alone(seeing, session, text, images)
        assert "".join(session.ask(text, images)) == expected
        assert session.usage is not None
        assert (session.usage.reused_tokens > 10) == (number > 0)


def test_only_what_follows_the_common_beginning_goes_through_the_language_model(
    seeing: Assistant, pictures: list[Path]
) -> None:
    session = ChatSession(seeing, SHORT)
    answered = 0
    for text, images in (("What is it?", pictures[:2]), ("And now?", []), ("Compare.", pictures[2:])):
        whole = len(seeing.prompt(Conversation((*session.conversation.messages, user_message(text, images)))))
        with counted(seeing) as passes:
            list(session.ask(text, images))
        assert session.usage is not None
        new = whole - session.usage.reused_tokens
        assert passes == [new] + [1] * (session.usage.answer_tokens - 1)
        assert new <= 40 + 16 * len(images) + answered  # the question, its pictures, at most the answer before it
        assert session.usage.prompt_tokens == whole
        answered = session.usage.answer_tokens


def test_the_turn_before_is_reused_up_to_its_end(seeing: Assistant) -> None:
    session = ChatSession(seeing, SHORT)
    list(session.ask("Hello"))
    first = session.usage
    list(session.ask("Again"))
    assert first and session.usage
    assert session.usage.reused_tokens >= first.prompt_tokens


def test_a_picture_is_encoded_once_a_session(seeing: Assistant, pictures: list[Path]) -> None:
    session = ChatSession(seeing, SHORT)
    with pictures_encoded(seeing) as encoded:
        for text, images in (("What is it?", pictures[:2]), ("And?", []), ("Again", pictures[:1]), ("So?", [])):
            list(session.ask(text, images))
    assert encoded == [1, 1]


def test_a_picture_whose_file_is_gone_is_still_remembered(seeing: Assistant, pictures: list[Path]) -> None:
    session = ChatSession(seeing, SHORT)
    list(session.ask("What is it?", pictures[:1]))
    expected = alone(seeing, session, "And?", [])
    pictures[0].unlink()
    assert "".join(session.ask("And?")) == expected


def test_another_picture_under_the_same_name_is_seen(seeing: Assistant, pictures: list[Path]) -> None:
    session = ChatSession(seeing, SHORT)
    list(session.ask("What is it?", pictures[:1]))
    PILImage.effect_noise((41, 23), 90).save(pictures[0])
    session.reset()
    with pictures_encoded(seeing) as encoded:
        expected = seeing.answer(Conversation((user_message("What is it?", pictures[:1]),)), SHORT)
        assert "".join(session.ask("What is it?", pictures[:1])) == expected
    assert encoded == [1, 1]


def test_two_pictures_are_never_taken_for_one_another(seeing: Assistant, pictures: list[Path]) -> None:
    memory = Memory()
    for image in pictures:
        session = ChatSession(seeing, SHORT, memory=memory)
        list(session.ask("What is it?", [image]))
        assert session.usage is not None
        assert session.usage.reused_tokens < 16  # what stands before the picture, as in every prompt


def test_sessions_that_share_a_memory_do_not_change_each_others_answers(seeing: Assistant) -> None:
    memory = Memory()
    sessions = [ChatSession(seeing, SHORT, memory=memory), ChatSession(seeing, SHORT, memory=memory)]
    for text in ("Hello", "Say more", "And then?"):
        for number, session in enumerate(sessions):
            asked = f"{text} {number}"
            expected = alone(seeing, session, asked, [])
            assert "".join(session.ask(asked)) == expected


def test_a_cancelled_answer_and_an_error_leave_a_memory_that_still_tells_the_truth(
    seeing: Assistant, tmp_path: Path
) -> None:
    session = ChatSession(seeing, Generation(max_new_tokens=200))
    pieces = session.ask("Hello")
    next(pieces)
    pieces.close()
    broken = session.ask("What is it?", [picture(tmp_path / "gone.png", "red")])
    (tmp_path / "gone.png").unlink()
    with pytest.raises(Exception, match="no such image file"):
        list(broken)
    session.generation = SHORT
    expected = alone(seeing, session, "Go on", [])
    assert "".join(session.ask("Go on")) == expected


def test_a_new_system_text_counts_from_the_next_question_on(seeing: Assistant) -> None:
    session = ChatSession(seeing, SHORT, system="Be brief.")
    list(session.ask("Hello"))
    session.system = "Be long."
    expected = alone(seeing, session, "Again", [])
    assert "".join(session.ask("Again")) == expected


def test_the_same_seed_gives_the_same_answer_and_another_another(seeing: Assistant) -> None:
    def answers(seed: int) -> list[str]:
        session = ChatSession(seeing, Generation(max_new_tokens=12, temperature=1.5, seed=seed))
        return ["".join(session.ask(text)) for text in ("Hello", "Again")]

    assert answers(1) == answers(1) != answers(2)


def test_a_thousand_turns_hold_no_more_than_the_context(seeing: Assistant, pictures: list[Path]) -> None:
    """Cache and process stop growing once the context is full. A turn takes about 15 ms here."""
    memory, notices = Memory(), list[str]()
    two = Generation(max_new_tokens=2)
    session = ChatSession(seeing, two, memory=memory, max_context=400, notify=notices.append)
    process, sizes = psutil.Process(), []
    for turn in range(1000):
        list(session.ask(f"Turn {turn}", pictures[turn % 3 : turn % 3 + 1] if turn % 10 == 0 else []))
        assert memory.tokens <= 400
        assert len(memory._pictures) <= 3
        if turn in (300, 999):
            gc.collect()
            sizes.append(process.memory_info().rss)
    assert len(session.conversation.messages) < 60
    assert 20 < len(notices) < 350  # several turns at a time, not one with each question
    assert sizes[1] - sizes[0] < 15_000_000, f"700 turns took {(sizes[1] - sizes[0]) / 1e6:.1f} MB"
    expected = alone(seeing, session, "End", [])
    assert "".join(session.ask("End")) == expected


def test_a_cache_that_cannot_go_back_is_run_again(seeing: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the layers of a sliding window are, once it is full."""
    from transformers import DynamicCache

    def refuse(self: DynamicCache, tokens: int) -> None:
        raise RuntimeError("`crop` was called, but the current layer does not track past states")

    session = ChatSession(seeing, SHORT)
    list(session.ask("Hello"))
    session.reset()
    monkeypatch.setattr(DynamicCache, "crop", refuse)
    expected = alone(seeing, session, "Hallo", [])
    assert "".join(session.ask("Hallo")) == expected
    assert session.usage is not None
    assert session.usage.reused_tokens == 0


def test_a_real_sliding_window_answers_as_without_memory(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

    from mmft.config import LLM, Model
    from mmft.data.shape import describe_model
    from mmft.modeling.build import build_model
    from mmft.plugins import load_plugins
    from mmft.testing import tiny_tokenizer

    tiny_tokenizer(tmp_path)
    config = MistralConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(tmp_path)), hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, sliding_window=16, head_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    MistralForCausalLM(config).save_pretrained(tmp_path)
    model, plugins = Model(llm=LLM(path=str(tmp_path))), load_plugins()
    shape = describe_model(model, plugins)
    built = build_model(
        model, plugins, info=None, image_id=None, dtype=torch.float32, device=torch.device("cpu")
    )  # fmt: skip
    template = plugins.chat_templates.get("chatml").for_tokenizer(shape.tokenizer.hf)
    assistant = Assistant(built.eval(), shape, template)
    session = ChatSession(assistant, SHORT)
    for text in ("Hello there, how are you?", "And now?", "Once more"):
        expected = alone(assistant, session, text, [])
        assert "".join(session.ask(text)) == expected
    session.reset()
    expected = alone(assistant, session, "Hello there", [])
    assert "".join(session.ask("Hello there")) == expected
