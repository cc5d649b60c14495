"""The mask view: what a person sees is what the model learns."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text as Styled
from transformers import AutoTokenizer

from mmft.config import LLM, Data, Dataset, Model, Optim, Runtime, TrainConfig, Vision, use
from mmft.data.inspect import (
    CONTEXT,
    PICTURE,
    TRAINED,
    View,
    borders,
    describe_sample,
    show_sample,
    show_samples,
)
from mmft.data.inspect_html import MAX_TOKENS, html_page, spans
from mmft.data.tokenize import Tokenizer, tokenize
from mmft.plugins import Plugins
from mmft.types import Image, Segment


@pytest.fixture(scope="module")
def tokenizer(tiny_llm_path: Path) -> Tokenizer:
    return Tokenizer.for_model(AutoTokenizer.from_pretrained(tiny_llm_path), 4)


def styles(shown: Styled) -> list[tuple[str, str]]:
    return [(shown.plain[span.start : span.end], str(span.style)) for span in shown.spans]


def test_trained_runs_stand_in_brackets_and_pictures_by_name(tokenizer: Tokenizer) -> None:
    segments = [
        Segment("<|im_start|>user\n", markup=True),
        Segment(Image("a.png")),
        Segment(Image("b.png")),
        Segment("Which? 你好"),
        Segment(" The first.", loss=True),
        Segment("<|im_end|>", loss=True, markup=True),
        Segment("\n", markup=True),
    ]
    assert styles(show_sample(tokenize(segments, tokenizer), tokenizer)) == [
        ("<|im_start|>user\n", CONTEXT),
        ("[a.png: 4 tokens]", PICTURE),
        ("[b.png: 4 tokens]", PICTURE),
        ("Which? 你好", CONTEXT),
        ("⟦ The first.<|im_end|>⟧", TRAINED),
        ("\n", CONTEXT),
    ]


def test_text_that_looks_like_console_markup_is_shown_as_it_is(tokenizer: Tokenizer) -> None:
    shown = show_sample(tokenize([Segment("[bold]x[/bold] [/]")], tokenizer), tokenizer)
    assert shown.plain == "[bold]x[/bold] [/]"


@pytest.mark.parametrize(
    ("segments", "text"),
    [
        ([Segment("ab"), Segment("c", loss=True)], "3 tokens, 1 trained"),
        ([Segment(Image("a.png")), Segment("c", loss=True)], "5 tokens, 1 trained, 1 image"),
        ([Segment(Image("a.png")), Segment(Image("b.png"))], "8 tokens, 0 trained, 2 images"),
        ([Segment("c", loss=True)], "1 tokens, 0 trained"),
    ],
)
def test_a_sample_is_described_in_one_line(tokenizer: Tokenizer, segments: list[Segment], text: str) -> None:
    assert describe_sample(tokenize(segments, tokenizer)) == text


def test_show_samples_shows_each_data_set_with_what_would_be_dropped_and_why(
    tmp_path: Path, plugins: Plugins, tiny_llm_path: Path, tiny_clip_path: Path
) -> None:
    (tmp_path / "cat.png").write_bytes(b"")

    def qa(answer: str, **extra: Any) -> dict[str, Any]:
        return {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": answer}], **extra}

    first, second = tmp_path / "a.json", tmp_path / "b.json"
    first.write_text(json.dumps([qa("A cat.", image="cat.png"), qa("x", image="no.png"), qa("unseen")]), "utf-8")
    second.write_text(json.dumps([{"text": "A long document. " * 9}]), "utf-8")
    vision = Vision(encoder=use("clip", path=str(tiny_clip_path)), projector=use("linear"))
    config = TrainConfig(
        model=Model(llm=LLM(path=str(tiny_llm_path)), vision=vision),
        data=Data(
            datasets=(
                Dataset(source=use("json", path=str(first)), data_map="llava", image_folder=tmp_path),
                Dataset(source=use("json", path=str(second)), data_map="pretrain"),
            ),
            chat_template="chatml",
            max_length=64,
        ),
        optim=Optim(lr=1e-3),
        runtime=Runtime(output_dir=tmp_path / "run"),
    )
    text = "\n".join(line.plain for line in show_samples(config, plugins, 2))
    assert f"{first} record 1: " in text and "1 image" in text
    assert f"[{tmp_path / 'cat.png'}: 16 tokens]" in text and "⟦A cat.<|im_end|>⟧" in text
    assert f"{first} record 2: dropped: image not found: {tmp_path / 'no.png'}" in text
    assert "unseen" not in text
    assert f"{second} record 1: " in text and ", longer than max_length 64" in text


def test_what_the_tokens_decode_to_cannot_act_on_the_screen(tokenizer: Tokenizer) -> None:
    shown = show_sample(tokenize([Segment("a\x1b[31m\x9bb\r"), Segment(Image("x\x1b.png"))], tokenizer), tokenizer)
    assert shown.plain == "a␛[31m\ufffdb␍[x␛.png: 4 tokens]"


@pytest.mark.parametrize(
    "text", ["What is it? A cat.", "你好，世界。 ✓👩🏽‍🚀 Ünïcödé", "  two\n\n spaces ", "\ufffd\ufffd broken \ufffd"]
)
def test_the_spans_of_a_page_join_to_the_text_and_name_each_token_once(tokenizer: Tokenizer, text: str) -> None:
    sample = tokenize([Segment("<|im_start|>", markup=True), Segment(text), Segment(text, loss=True)], tokenizer)
    found = list(spans(sample, tokenizer))
    assert "".join(span.text for span in found) == f"<|im_start|>{text}{text}"
    assert [int(i) for span in found for i in span.ids.split()] == sample.input_ids.tolist()
    assert "".join(span.text for span in found if span.kind == "trained") == text


def test_a_very_long_sample_is_cut_on_the_page_and_the_page_says_so(tokenizer: Tokenizer) -> None:
    sample = tokenize([Segment("zq" * MAX_TOKENS)], tokenizer)
    page = html_page("long", [View("one", (sample,))], tokenizer)
    assert page.count('<span class="context" title=') <= MAX_TOKENS
    assert f"{len(sample) - MAX_TOKENS:,} more tokens are not shown" in page


def test_the_borders_of_a_packed_row_name_the_tokens_between_them(tokenizer: Tokenizer) -> None:
    one, two = (tokenize([Segment(text, loss=True)], tokenizer) for text in ("zqzq", "zqz"))
    assert borders(View("row", (one, two), packed=True)) == [
        f"── 1 of 2 · tokens 0-{len(one) - 1} · {describe_sample(one)} ──",
        f"── 2 of 2 · tokens {len(one)}-{len(one) + len(two) - 1} · {describe_sample(two)} ──",
    ]
