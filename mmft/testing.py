"""Help for plugin authors and for our own tests: conformance checks, and models small enough for a unit test.

`check_plugin(module)` runs everything that applies to what a plugin offers. The tiny models are random but real
transformers models with fixed seeds; they are written to a folder and loaded through the same code as a 7B.
"""

import copy
import json
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from mmft.errors import PluginError
from mmft.specs import ChatTemplate, DataMap, Tool
from mmft.types import Conversation, Document, Image, Message, Segment, Text, ToolCall

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = (
    "A chat between a curious user and an artificial intelligence assistant. USER: What is it? ASSISTANT: A cat.",
    "def add(a, b):\n    return a + b\n\nThe quick brown fox jumps over the lazy dog 0123456789.",
    '你好，世界。今天天气怎么样？ Ünïcödé ✓ — «quotes» {"name": "search", "arguments": {"q": "x"}}',
)


def tiny_tokenizer(
    folder: Path,
    *,
    chat_template: str = CHATML,
    special: Sequence[str] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    bos: str | None = None,
    eos: str = "<|im_end|>",
    pad: str | None = None,
) -> Path:
    """Train a byte-level BPE tokenizer of about 400 tokens and save it with its chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=eos, pad_token=pad or special[0], **({"bos_token": bos} if bos else {})
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder


def tiny_llm(folder: Path, *, layers: int = 2, width: int = 32, **tokenizer_options: Any) -> Path:
    """A random Llama of about 50,000 parameters with a tokenizer of its own."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tiny_tokenizer(folder, **tokenizer_options)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tiny_vision(
    folder: Path, kind: str = "clip", *, image_size: int = 28, patch_size: int = 7, width: int = 32
) -> Path:
    """A random vision encoder of three blocks with its image processor; kind: clip, siglip, dinov2 or vit."""
    import torch
    from transformers import AutoConfig, AutoModel

    model_type, processor = {
        "clip": ("clip_vision_model", "CLIPImageProcessor"),
        "siglip": ("siglip_vision_model", "SiglipImageProcessor"),
        "dinov2": ("dinov2", "BitImageProcessor"),
        "vit": ("vit", "ViTImageProcessor"),
    }[kind]
    sizes = {"hidden_size": width, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 2 * width}
    config = AutoConfig.for_model(model_type, image_size=image_size, patch_size=patch_size, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder)
    square = {"height": image_size, "width": image_size}
    size = {"shortest_edge": image_size} if kind in ("clip", "dinov2") else square
    save_image_processor(folder, processor, size=size, crop_size=square)
    return folder


def save_image_processor(folder: Path, kind: str, *, size: Mapping[str, int], crop_size: Mapping[str, int]) -> None:
    """Write a `preprocessor_config.json` as the hub's vision models have one."""
    clip = kind in ("CLIPImageProcessor", "BitImageProcessor")
    config = {
        "image_processor_type": kind,
        "do_resize": True,
        "size": dict(size),
        "resample": 3 if clip else 2,
        "do_center_crop": clip,
        "crop_size": dict(crop_size),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073] if clip else [0.5, 0.5, 0.5],
        "image_std": [0.26862954, 0.26130258, 0.27577711] if clip else [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=2))


BATTERY: tuple[Conversation, ...] = (
    Conversation((Message("user", (Text("What is it?"),)), Message("assistant", (Text("A cat."),)))),
    Conversation(
        (
            Message("system", (Text("You answer briefly."),)),
            Message("user", (Text("Name a colour."),)),
            Message("assistant", (Text("Red."),)),
            Message("user", (Text("Another one?\n\nPlease."),)),
            Message("assistant", (Text("Blue."),)),
        )
    ),
    Conversation((Message("user", (Text("你好 ✓ — «quotes»"),)), Message("assistant", (Text("你好，世界。"),)))),
    Conversation((Message("user", (Text("def f(x):\n    return x"),)), Message("assistant", (Text("  f(1)\n"),)))),
    Conversation(
        (
            Message("user", (Image("a.png"), Text("\nWhat is it?"))),
            Message("assistant", (Text("A cat."),)),
            Message("user", (Text("And this? "), Image("b.png"), Text(" Compare."))),
            Message("assistant", (Text("A dog."),)),
        )
    ),
)


def check_plugin(module: ModuleType) -> list[str]:
    """Run every check that applies to what a plugin offers; returns the names of what was checked.

    Raises `PluginError` naming the offer and the rule it breaks.
    """
    from mmft.plugins import read_plugin

    plugin = read_plugin(module)
    if plugin.error:
        raise PluginError(f"{plugin.origin}: {plugin.error}")
    checked = []
    for spec in (spec for specs in plugin.offers.values() for spec in specs):
        if isinstance(spec, ChatTemplate) and spec.bind is None:
            check_chat_template(spec)
        elif isinstance(spec, DataMap):
            check_data_map(spec)
        elif isinstance(spec, Tool):
            check_tool(spec)
        _must_pickle(spec, getattr(spec, "name", repr(spec)))
        checked.append(getattr(spec, "name", repr(spec)))
    return checked


def check_chat_template(template: ChatTemplate, conversations: Iterable[Conversation] = BATTERY) -> None:
    """A prompt is a prefix of the training sequence, ends in no space, and each answer is trained with its end.

    Of a template that rewrites history only the last answer is asked about. A template with `read_calls` reads the call
    that it writes.
    """
    if template.read_calls:
        _check_calls(template)
    for conversation in conversations:
        whole = _flat(template.render(conversation))
        answers = [k for k, message in enumerate(conversation.messages) if message.role == "assistant"]
        for k in answers[-1:] if template.rewrites_history else answers:
            prompt = _flat(template.render(Conversation(conversation.messages[:k]), generation_prompt=True))
            if whole[: len(prompt)] != prompt:
                raise PluginError(
                    f"chat template {template.name!r}: the prompt of turn {k} is not a prefix of the training sequence:"
                    f" {_shown(prompt)!r} against {_shown(whole[: len(prompt)])!r}"
                )
            if any(loss for _, loss in prompt[len(prompt) - 1 :]):
                raise PluginError(f"chat template {template.name!r}: the prompt of turn {k} ends in a trained segment")
            if _shown(prompt).endswith(" "):
                raise PluginError(
                    f"chat template {template.name!r}: the prompt of turn {k} ends in a space, which tokenizes "
                    "differently from the same space before the answer; let the answer begin with it"
                )
            if len(whole) <= len(prompt) or not whole[len(prompt)][1]:
                raise PluginError(f"chat template {template.name!r}: the answer of turn {k} is not trained")
        if conversation.images != tuple(
            s.content for s in template.render(conversation) if isinstance(s.content, Image)
        ):
            raise PluginError(f"chat template {template.name!r}: it loses or reorders images")


def _check_calls(template: ChatTemplate) -> None:
    assert template.read_calls is not None
    call = ToolCall("search", {"query": "x"}, "abcdefghi")
    schema = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}
    messages = (Message("user", (Text("Q"),)), Message("assistant", (), (call,)))
    segments = template.render(Conversation(messages, (schema,)))
    text = "".join(segment.content for segment in segments if segment.loss and isinstance(segment.content, str))
    text = min((text.removesuffix(stop) for stop in template.stop), key=len, default=text)
    found = [(one.name, dict(one.arguments)) for one in template.read_calls(text)[1]]
    if found != [(call.name, dict(call.arguments))]:
        raise PluginError(f"chat template {template.name!r}: of the call it wrote as {text!r} it reads back {found}")
    if not any(mark in text for mark in template.call_marks):
        raise PluginError(f"chat template {template.name!r}: none of its call_marks is in a call: {text!r}")


def check_data_map(data_map: DataMap) -> None:
    """Each example becomes a sample, and the record is left as it was."""
    if not data_map.examples:
        raise PluginError(f"data map {data_map.name!r}: give at least one example record")
    for record in data_map.examples:
        before = copy.deepcopy(record)
        sample = data_map.fn(record)
        if not isinstance(sample, Conversation | Document):
            raise PluginError(f"data map {data_map.name!r}: the example {record!r} gave {sample!r}, not a sample")
        if record != before:
            raise PluginError(f"data map {data_map.name!r} modifies the record it is given")


def check_tool(tool: Tool) -> None:
    """The schema is JSON, an object whose required names are among its properties, and `unavailable` tells or is None.

    The tool is not run.
    """
    where = f"tool {tool.name!r}"
    try:
        schema = json.loads(json.dumps(tool.schema))["function"]["parameters"]
    except (TypeError, ValueError) as error:
        raise PluginError(f"{where}: its parameters are no JSON: {error}") from error
    properties = schema.get("properties", {})
    if schema.get("type") != "object" or not isinstance(properties, dict):
        raise PluginError(f"{where}: its parameters must be the schema of an object, with 'properties'")
    if unknown := [name for name in schema.get("required", ()) if name not in properties]:
        raise PluginError(f"{where}: required, but not among its properties: {', '.join(unknown)}")
    if not tool.description.strip():
        raise PluginError(f"{where}: it has no description, by which a model chooses it")
    if not isinstance(reason := tool.unavailable(), str | None):
        raise PluginError(f"{where}: unavailable() gave {reason!r}; it gives a text or None")


def _must_pickle(value: Any, name: str) -> None:
    try:
        pickle.loads(pickle.dumps(value))
    except Exception as error:
        raise PluginError(f"{name}: must pickle (use module-level functions): {error}") from error


def _flat(segments: Sequence[Segment]) -> list[tuple[str | Image, bool]]:
    """One entry a character or image, so that sequences can be compared whatever their segmentation."""
    flat: list[tuple[str | Image, bool]] = []
    for segment in segments:
        if isinstance(segment.content, Image):
            flat.append((segment.content, False))
        else:
            flat.extend((character, segment.loss) for character in segment.content)
    return flat


def _shown(flat: Sequence[tuple[str | Image, bool]]) -> str:
    return "".join("<image>" if isinstance(content, Image) else content for content, _ in flat)
