"""Names that a person almost wrote: what is suggested, and how much is listed."""

import pytest

from mmft.errors import UnknownName, did_you_mean
from mmft.plugins import Plugins


def suggested(name: str, known: list[str]) -> str | None:
    text = did_you_mean(name, known)
    return text.split("'")[1] if text else None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("alpaca_map_fn", "alpaca"),  # XTuner's function
        ("alpaca_zh_map_fn", "alpaca_zh"),
        ("xtuner.dataset.map_fns.alpaca_map_fn", "alpaca"),
        ("llava_map_fn", "llava"),
        ("llava_image_only_map_fn", "llava_image_only"),
        ("alpaka", "alpaca"),
        ("alpaca-zh", "alpaca_zh"),
        ("LLaVA", "llava"),
        ("nope", None),
        ("zzz", None),
    ],
)
def test_the_data_map_that_a_name_holds_comes_before_the_one_spelled_like_it(
    plugins: Plugins, name: str, expected: str | None
) -> None:
    assert suggested(name, plugins.data_maps.names()) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama3", "llama3_chat"),  # a name that goes on is nearer than another version
        ("llama3.1", "llama3_1"),
        ("internlm2", "internlm2_chat"),
        ("qwen", "qwen_chat"),
        ("vicunna", "vicuna"),
        ("PROMPT_TEMPLATE.internlm2_chat", "internlm2_chat"),
        ("llama3_chatt", "llama3_chat"),
    ],
)
def test_the_chat_template_that_goes_on_with_a_name_comes_before_the_one_spelled_like_it(
    plugins: Plugins, name: str, expected: str
) -> None:
    assert suggested(name, plugins.chat_templates.names()) == expected


def test_of_many_names_only_the_closest_are_listed_and_where_all_are(plugins: Plugins) -> None:
    number = len(plugins.chat_templates.names())
    with pytest.raises(UnknownName) as caught:
        plugins.chat_templates.get("llama3")
    said = str(caught.value)
    assert said.startswith("no chat template named 'llama3'; did you mean 'llama3_chat'?; close: ")
    assert "llama3_1" in said and "zephyr" not in said and said.count(",") < 6
    assert said.endswith(f"; mmft plugins lists all {number}")


def test_a_name_like_no_other_is_told_where_all_names_are(plugins: Plugins) -> None:
    with pytest.raises(UnknownName) as caught:
        plugins.data_maps.get("zzz")
    assert str(caught.value) == f"no data map named 'zzz'; mmft plugins lists all {len(plugins.data_maps.names())}"


def test_a_few_names_are_all_listed(plugins: Plugins) -> None:
    with pytest.raises(
        UnknownName, match=r"named 'clipp'; did you mean 'clip'\?; available: clip, dinov2, siglip, vit$"
    ):
        plugins.vision_encoders.get("clipp")
