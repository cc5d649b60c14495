"""Chat templates as jinja: found by rendering, proved by token ids."""

import pytest
from transformers import AutoTokenizer

from mmft.convert.chat_jinja import jinja_of, prove
from mmft.data.tokenize import Tokenizer
from mmft.errors import ModelError
from mmft.testing import tiny_tokenizer

# No strings between texts: `plain` leaves questions out, `moss_sft`, `react` and `qwen3` rewrite what was said.
WITHOUT = {"plain", "moss_sft", "react", "qwen3", "auto"}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<bos>", "<start_of_turn>", "<end_of_turn>")

PLAIN_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("jinja"), special=SPECIAL, bos="<s>", eos="</s>")


def tokenizer_in(folder, tokens_per_image=0, chat_template=None):
    hf = AutoTokenizer.from_pretrained(folder)
    hf.chat_template = chat_template
    return Tokenizer.for_model(hf, tokens_per_image)


def test_every_shipped_template_has_a_jinja_that_gives_its_ids(folder, plugins):
    found = {}
    for template in plugins.chat_templates:
        tokenizer = tokenizer_in(folder, 3)
        if template.name not in WITHOUT:
            found[template.name] = jinja_of(template.for_tokenizer(tokenizer.hf), tokenizer)
    assert len(found) > 40
    assert {name for name, proved in found.items() if proved.tools} == {"chatml", "granite", "qwen2_5"}
    assert all("pictures inside" in proved.cases for proved in found.values())


@pytest.mark.parametrize("name", ["plain", "qwen3"])
def test_a_template_without_one_is_refused_with_the_first_difference(name, folder, plugins):
    tokenizer = tokenizer_in(folder)
    with pytest.raises(ModelError, match=rf"{name}.*no jinja template gives its token ids.*'auto'"):
        jinja_of(plugins.chat_templates.get(name).for_tokenizer(tokenizer.hf), tokenizer)


def test_a_jinja_that_loses_a_line_break_is_no_proof(folder, plugins):
    tokenizer = tokenizer_in(folder)
    template = plugins.chat_templates.get("chatml").for_tokenizer(tokenizer.hf)
    jinja = jinja_of(template, tokenizer).jinja
    cases, difference = prove(jinja, template, tokenizer)
    assert difference is None
    assert "tools, a call and its result" in cases
    broken = jinja.replace('<|im_start|>assistant\\n"', '<|im_start|>assistant"')
    assert broken != jinja
    assert "one turn" in str(prove(broken, template, tokenizer)[1])


def test_the_tokenizers_own_template_is_taken_where_it_gives_the_same_ids(folder, plugins):
    tokenizer = tokenizer_in(folder, 3, PLAIN_CHATML)
    proved = jinja_of(plugins.chat_templates.get("internlm3").for_tokenizer(tokenizer.hf), tokenizer)
    assert proved.origin.startswith("written")  # internlm3 has a BOS, which this one lacks
    proved = jinja_of(plugins.chat_templates.get("qwen_chat").for_tokenizer(tokenizer.hf), tokenizer)
    assert proved.origin == "the tokenizer's own"
    assert proved.jinja.endswith(PLAIN_CHATML)


def test_tools_are_written_although_the_tokenizers_own_template_knows_none(folder, plugins):
    tokenizer = tokenizer_in(folder, 3, PLAIN_CHATML)
    proved = jinja_of(plugins.chat_templates.get("chatml").for_tokenizer(tokenizer.hf), tokenizer)
    assert proved.tools
    assert proved.origin.startswith("written")


def test_a_picture_at_the_start_is_followed_by_a_line_break_whoever_writes_it(folder, plugins):
    tokenizer = tokenizer_in(folder, 3)
    jinja = jinja_of(plugins.chat_templates.get("vicuna").for_tokenizer(tokenizer.hf), tokenizer).jinja
    image, text = {"type": "image"}, {"type": "text", "text": "What is it?"}
    written = [
        tokenizer.hf.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=jinja, tokenize=False, add_generation_prompt=True
        )
        for content in ([image, text], [image, {"type": "text", "text": "\nWhat is it?"}], "<image>\nWhat is it?")
    ]
    assert len(set(written)) == 1
    assert written[0].endswith("USER: <image>\nWhat is it? ASSISTANT:")
