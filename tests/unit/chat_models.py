"""Random but real models to talk to, and a count of what goes through them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mmft.config import LLM, Model, Vision, use
from mmft.data.shape import describe_model
from mmft.inference import Assistant, Generation
from mmft.modeling.build import build_model
from mmft.plugins import load_plugins
from mmft.testing import tiny_llm, tiny_vision

SHORT = Generation(max_new_tokens=12)


def make_assistant(folder: Path, *, sees: bool, llm: Path | None = None) -> Assistant:
    """A tiny Llama, or the language model of a folder, with a tiny CLIP where it sees, and the template `chatml`."""
    vision = None
    if sees:
        clip = str(tiny_vision(folder / "clip"))
        vision = Vision(encoder=use("clip", path=clip, select_layer=-2), projector=use("mlp2x_gelu"))
    model, plugins = Model(llm=LLM(path=str(llm or tiny_llm(folder / "llm"))), vision=vision), load_plugins()
    shape = describe_model(model, plugins)
    torch.manual_seed(0)
    built = build_model(
        model, plugins, info=shape.vision, image_id=shape.tokenizer.image_id, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    template = plugins.chat_templates.get("chatml").for_tokenizer(shape.tokenizer.hf)
    return Assistant(built.eval(), shape, template)


@contextmanager
def counted(assistant: Assistant) -> Iterator[list[int]]:
    """The tokens of each forward pass of the language model's layers, while inside."""
    passes: list[int] = []

    def count(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        passes.append(output.last_hidden_state.shape[1])

    handle = assistant.model.causal_lm.model.register_forward_hook(count, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()


@contextmanager
def pictures_encoded(assistant: Assistant) -> Iterator[list[int]]:
    """The pictures of each pass of the vision encoder, while inside."""
    passes: list[int] = []
    assert assistant.model.vision is not None
    handle = assistant.model.vision.register_forward_hook(lambda module, args, output: passes.append(len(output)))
    try:
        yield passes
    finally:
        handle.remove()
