"""A GGUF pair run by llama.cpp, through llama-cpp-python's plain bindings: what the parity gate asks."""

import ctypes
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmft.data.proof_cases import as_messages
from mmft.data.tokenize import Tokenizer
from mmft.errors import ModelError
from mmft.images import ImageTransform, open_image
from mmft.types import Conversation

INSTALL = "pip install llama-cpp-python"
MARKER = "<__media__>"  # llama.cpp's place of a picture in a text
ERROR = 4  # GGML_LOG_LEVEL_ERROR
SAFETY = 64  # positions beyond the longest prompt and answer


def is_there() -> bool:
    """Whether llama.cpp can be asked."""
    return importlib.util.find_spec("llama_cpp") is not None


@cache
def _library() -> tuple[Any, Any, list[str], Any]:
    """llama.cpp, its picture side, what they last complained of, and the function that hears it."""
    import llama_cpp
    from llama_cpp import mtmd_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
    said: list[str] = []

    def hear(level: int, text: bytes, _: Any) -> None:
        if level == ERROR:
            said.append(text.decode("utf-8", "replace").strip())

    callback = llama_cpp.llama_log_callback(hear)
    for listen in (llama_cpp.llama_log_set, mtmd_cpp.mtmd_log_set, mtmd_cpp.mtmd_helper_log_set):
        listen(callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp, mtmd_cpp, said, callback


class LlamaCppResult:
    """A text model, and its mmproj where it sees, in llama.cpp on the CPU. Use it in a `with` block.

    `tokenizer` and `transform` are those of training: the first gives the template its special tokens, the second the
    pixels of a picture. With `own_pictures` llama.cpp opens and resizes pictures itself, as its users have it.
    """

    def __init__(
        self,
        model: Path,
        mmproj: Path | None,
        tokenizer: Tokenizer,
        transform: ImageTransform | None,
        *,
        longest: int,
    ) -> None:
        self.files = (model, mmproj)
        self.tokenizer = tokenizer
        self.transform = transform
        self.own_pictures = False
        self._positions = longest + SAFETY
        self._stack = ExitStack()

    def __enter__(self) -> "LlamaCppResult":
        with ExitStack() as stack:
            self._open(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _open(self, stack: ExitStack) -> None:
        lib, mtmd, said, _ = _library()
        said.clear()
        model, mmproj = self.files
        self._model = lib.llama_model_load_from_file(str(model).encode(), lib.llama_model_default_params())
        if not self._model:
            raise ModelError(f"{model}: llama.cpp does not load it: {_reason(said)}")
        stack.callback(lib.llama_model_free, self._model)
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = -(-self._positions // 256) * 256
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise ModelError(f"{model}: llama.cpp does not run it: {_reason(said)}")
        stack.callback(lib.llama_free, self._context)
        self._vocab = lib.llama_model_get_vocab(self._model)
        self._size = lib.llama_vocab_n_tokens(self._vocab)
        self._jinja = self._metadata("tokenizer.chat_template")
        self._sight = None
        if mmproj is not None:
            options = mtmd.mtmd_context_params_default()
            options.warmup, options.print_timings, options.use_gpu = False, False, False
            options.n_threads = torch.get_num_threads()
            self._sight = mtmd.mtmd_init_from_file(str(mmproj).encode(), self._model, options)
            if not self._sight:
                raise ModelError(f"{mmproj}: llama.cpp does not load it: {_reason(said)}")
            stack.callback(mtmd.mtmd_free, self._sight)

    def _metadata(self, key: str) -> str | None:
        lib = _library()[0]
        size = lib.llama_model_meta_val_str(self._model, key.encode(), None, 0)
        if size < 0:
            return None
        buffer = ctypes.create_string_buffer(size + 1)
        lib.llama_model_meta_val_str(self._model, key.encode(), buffer, size + 1)
        return buffer.value.decode("utf-8")

    def prompt(self, conversation: Conversation) -> str:
        """The text that the file's chat template gives, pictures as llama.cpp's servers put them."""
        if self._jinja is None:  # a base model goes on from a text
            return conversation.messages[0].text
        messages = as_messages(conversation)
        for message, original in zip(messages, conversation.messages, strict=True):
            if original.images:
                # a part of text alone after a picture, as the users of an API write it, who know of no line breaks
                message["content"] = "".join(getattr(part, "text", MARKER) for part in original.parts)
                message["content"] = message["content"].replace(f"{MARKER}\n", MARKER)
        text: str = self.tokenizer.hf.apply_chat_template(
            messages, chat_template=self._jinja, tokenize=False, add_generation_prompt=True
        )
        return text

    def inputs(self, conversation: Conversation) -> tuple[list[int], Tensor | None]:
        """See `Result`."""
        pictures = [self._bytes(str(image.source)) for image in conversation.images]
        if not pictures:
            return self._tokenize(self.prompt(conversation)), None
        ids: list[int] = []
        _, mtmd, _, _ = _library()
        with self._chunks(conversation) as chunks:
            for k in range(mtmd.mtmd_input_chunks_size(chunks)):
                chunk = mtmd.mtmd_input_chunks_get(chunks, k)
                count = ctypes.c_size_t()
                if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                    found = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
                    ids += found[: count.value]
                else:
                    assert self.tokenizer.image_id is not None
                    ids += [self.tokenizer.image_id] * mtmd.mtmd_input_chunk_get_n_tokens(chunk)
        return ids, torch.stack([self._normalised(picture) for picture in pictures])

    def _tokenize(self, text: str) -> list[int]:
        lib = _library()[0]
        content = text.encode("utf-8")
        room = len(content) + 8
        found = (lib.llama_token * room)()
        count = lib.llama_tokenize(self._vocab, content, len(content), found, room, True, True)
        return list(found[:count])

    def _bytes(self, source: str) -> NDArray[np.uint8]:
        """uint8[H, W, 3]: what llama.cpp is given; the transformed picture as bytes, or the picture as it is."""
        image = open_image(source)
        if self.own_pictures or self.transform is None:
            return np.ascontiguousarray(np.asarray(image))
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.transform.mean, self.transform.std))
        pixels = (self.transform(image) * std + mean) / self.transform.scale
        return np.ascontiguousarray(pixels.round().clamp(0, 255).permute(1, 2, 0).to(torch.uint8).numpy())

    def _normalised(self, picture: NDArray[np.uint8]) -> Tensor:
        assert self.transform is not None
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.transform.mean, self.transform.std))
        return (torch.from_numpy(picture).permute(2, 0, 1).float() * self.transform.scale - mean) / std

    @contextmanager
    def _chunks(self, conversation: Conversation) -> Iterator[Any]:
        """The prompt as llama.cpp's list of token runs and pictures."""
        _, mtmd, said, _ = _library()
        with ExitStack() as stack:
            bitmaps = []
            for image in conversation.images:
                picture = self._bytes(str(image.source))
                height, width = picture.shape[:2]
                data = picture.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
                bitmaps.append(mtmd.mtmd_bitmap_init(width, height, data))
                stack.callback(mtmd.mtmd_bitmap_free, bitmaps[-1])
            content = self.prompt(conversation).encode("utf-8")
            text = mtmd.mtmd_input_text()
            text.text, text.text_len, text.add_special, text.parse_special = content, len(content), True, True
            chunks = mtmd.mtmd_input_chunks_init()
            stack.callback(mtmd.mtmd_input_chunks_free, chunks)
            array = (mtmd.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
            if mtmd.mtmd_tokenize(self._sight, chunks, ctypes.byref(text), array, len(bitmaps)) != 0:
                raise ModelError(f"{self.files[1]}: llama.cpp does not take a picture: {_reason(said)}")
            yield chunks

    def logits(self, conversation: Conversation, tokens: Sequence[int]) -> Tensor:
        """See `Result`."""
        rows = [self._begin(conversation)]
        for token in tokens:
            rows.append(self._next([token]))
        return torch.stack(rows)

    def greedy(self, conversation: Conversation, max_new_tokens: int) -> list[int]:
        """See `Result`; ends where llama.cpp itself would end."""
        lib = _library()[0]
        tokens: list[int] = []
        logits = self._begin(conversation)
        for _ in range(max_new_tokens):
            tokens.append(int(logits.argmax()))
            if lib.llama_vocab_is_eog(self._vocab, tokens[-1]) or len(tokens) == max_new_tokens:
                break
            logits = self._next(tokens[-1:])
        return tokens

    def _begin(self, conversation: Conversation) -> Tensor:
        """Forget everything, read the prompt; the logits after it."""
        lib, mtmd, said, _ = _library()
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        if not conversation.images:
            return self._next(self._tokenize(self.prompt(conversation)))
        past = lib.llama_pos(0)
        with self._chunks(conversation) as chunks:
            room = lib.llama_n_batch(self._context)
            code = mtmd.mtmd_helper_eval_chunks(
                self._sight, self._context, chunks, 0, 0, room, True, ctypes.byref(past)
            )
        if code != 0:
            raise ModelError(f"{self.files[1]}: llama.cpp does not read a picture: {_reason(said)}")
        return self._logits()

    def _next(self, tokens: Sequence[int]) -> Tensor:
        lib, _, said, _ = _library()
        array = (lib.llama_token * len(tokens))(*tokens)
        if lib.llama_decode(self._context, lib.llama_batch_get_one(array, len(tokens))) != 0:
            raise ModelError(f"{self.files[0]}: llama.cpp does not read a prompt: {_reason(said)}")
        return self._logits()

    def _logits(self) -> Tensor:
        """float32[V], a copy."""
        found = _library()[0].llama_get_logits_ith(self._context, -1)
        return torch.from_numpy(np.ctypeslib.as_array(found, shape=(self._size,)).copy())


def _reason(said: Sequence[str]) -> str:
    return "; ".join(said[-3:]) or "it does not say why"
