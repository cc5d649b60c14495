"""The tokenizer of a GGUF file. llama.cpp has its own tokenizers, so what a tokenizer.json does must be recognised.

Two kinds are: byte-level BPE (its way of cutting a text into words is told from what it does to a probe, not from a
name), and sentencepiece's BPE. Whether the ids are the same is asked of llama.cpp itself, by the parity gate.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmft.errors import ModelError

# Runs of letters, digits, signs, white space and line ends of several scripts, in all the orders that the patterns
# below tell apart.
PROBE = (
    "Hello  World's it's IT'S we'LL\tx 1234567 3.14 a1b22c333  \n\n  \r\n end ... !!! ?!\n (a)[b]{c} snake_case "
    "camelCase HTTPServer naïve façade Ünïcödé ÀÉ 你好，世界。 さようなら 안녕 Привет мир שלום كيف हिन्दी नमस्ते ١٢٣ Ⅷ ½ "
    "€5 #tag @me "
    'a/b\\c //\n//  `code` "quoted"\n\t\tindent   \n   x=-1;\u3000y 😀👍🏽 \u00a0z'
)
LETTERS = r"'s|'t|'re|'ve|'m|'ll|'d"
GPT2 = rf"{LETTERS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
WORDS = (
    rf"(?i:{LETTERS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MARKED = (
    rf"(?i:{LETTERS})|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASES = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s"
ENDS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's name (src/llama-vocab.cpp), the patterns one after another, whether a whole word in the vocabulary needs
# no merges there.
CUTS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("gpt-2", (GPT2,), False),
    ("smollm", (r"\p{N}", GPT2), False),
    ("llama-bpe", (WORDS % "{1,3}",), True),
    ("smaug-bpe", (WORDS % "{1,3}",), False),
    ("qwen2", (WORDS % "",), False),
    ("qwen35", (MARKED,), False),
    ("gpt-4o", (CASES % (rf"(?i:{LETTERS})?", rf"(?i:{LETTERS})?") + r"|\p{N}{1,3}" + ENDS,), False),
    ("tekken", (CASES % ("", "") + r"|\p{N}" + ENDS,), True),
)
METASPACE = "▁"


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says about a tokenizer; one entry of each list for a row of the embedding."""

    model: str
    cut: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[str, ...]
    space_prefix: bool


def read_vocabulary(hf: Any, rows: int, *, hidden: int | None = None) -> Vocabulary:
    """What llama.cpp needs of a fast tokenizer. `hidden` is a token that no text may become: the image token.

    Raises `ModelError` for a tokenizer that none of llama.cpp's is known to equal.
    """
    content = json.loads(hf.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ModelError(
            f"GGUF: a tokenizer of the kind {model['type']}; written here are byte-level BPE (GPT-2, Llama 3, Qwen, "
            "SmolLM) and sentencepiece's BPE (Llama 2, Mistral, Phi-3, Gemma)"
        )
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    spaced = _is_sentencepiece(content)
    tokens, types = _tokens(hf, content, rows, hidden, bytes_too=spaced)
    if spaced:
        scores = _scores(tokens, model["merges"])
        return Vocabulary("llama", "default", tokens, types, scores, (), _writes_a_space(hf))
    return Vocabulary("gpt2", find_cut(hf, content), tokens, types, (), tuple(merges), False)


def _is_sentencepiece(content: dict[str, Any]) -> bool:
    if not content["model"].get("byte_fallback"):
        return False
    told = json.dumps([content.get("normalizer"), content.get("pre_tokenizer"), content.get("decoder")])
    return METASPACE in json.loads(f"[{told}]").__str__()


def _writes_a_space(hf: Any) -> bool:
    """Whether a text gets a space in front, as llama.cpp puts one there: after a control token too."""
    before = hf.bos_token or hf.eos_token or ""
    pieces = hf.backend_tokenizer.encode(f"{before}x", add_special_tokens=False).tokens
    return bool(pieces[1 if before else 0].startswith(METASPACE))


def _tokens(
    hf: Any, content: dict[str, Any], rows: int, hidden: int | None, *, bytes_too: bool
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Every row's spelling and type. Rows without a token are filled up; tokens beyond the rows are left out."""
    from gguf import TokenType

    tokens = [f"[PAD{row}]" for row in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    for token, row in content["model"]["vocab"].items():
        if row < rows:
            is_byte = bytes_too and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            tokens[row], types[row] = token, int(TokenType.BYTE if is_byte else TokenType.NORMAL)
    for added in content["added_tokens"]:
        row = added["id"]
        if row < rows:
            kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
            tokens[row], types[row] = added["content"], int(TokenType.UNUSED if row == hidden else kind)
    unknown = hf.unk_token_id
    if bytes_too and unknown is not None and unknown < rows:
        types[unknown] = int(TokenType.UNKNOWN)
    return tuple(tokens), tuple(types)


def _scores(tokens: Sequence[str], merges: Sequence[Any]) -> tuple[float, ...]:
    """Sentencepiece joins the pair of the highest score first: minus the rank of the merge that makes a piece."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair.split(" ") if isinstance(pair, str) else pair), rank)
    last = len(merges)
    return tuple(float(-ranks.get(token, last + row)) for row, token in enumerate(tokens))


def find_cut(hf: Any, content: dict[str, Any]) -> str:
    """llama.cpp's name for the way a byte-level tokenizer cuts a text before it merges.

    Raises `ModelError` where it cuts the probe as none of them does, or changes the text before.
    """
    normalizer = content.get("normalizer")
    kinds = [one["type"] for one in normalizer["normalizers"]] if normalizer and "normalizers" in normalizer else []
    kinds = kinds or ([normalizer["type"]] if normalizer else [])
    if set(kinds) - {"NFC"}:
        raise ModelError(f"GGUF: the tokenizer changes texts ({', '.join(kinds)}), which llama.cpp's does not")
    core = hf.backend_tokenizer
    cut = core.pre_tokenizer.pre_tokenize_str(PROBE) if core.pre_tokenizer else None
    whole_words = bool(content["model"].get("ignore_merges"))
    for name, patterns, whole in CUTS:
        if whole == whole_words and cut == _cutter(patterns).pre_tokenize_str(PROBE):
            return name
    raise ModelError(
        f"GGUF: the tokenizer cuts texts ({json.dumps(content.get('pre_tokenizer'), ensure_ascii=False)[:200]}) as "
        f"none known here ({', '.join(name for name, _, _ in CUTS)}); use `mmft convert hf` and llama.cpp's "
        "convert_hf_to_gguf.py"
    )


def _cutter(patterns: Sequence[str]) -> Any:
    from tokenizers import Regex, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def add_vocabulary(writer: Any, vocabulary: Vocabulary, hf: Any, stop: Sequence[int], jinja: str | None) -> None:
    """Write a vocabulary, the special tokens and the chat template into a `gguf.GGUFWriter`.

    `add_bos_token` is false whatever the tokenizer says: the template writes BOS where training had one.

    Raises `ModelError` where more tokens end an answer than a file can name.
    """
    rows = len(vocabulary.tokens)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.cut)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.model == "gpt2":
        writer.add_token_merges(list(vocabulary.merges))
    else:
        writer.add_token_scores(list(vocabulary.scores))
        writer.add_add_space_prefix(vocabulary.space_prefix)
    eos = hf.eos_token_id
    ends = sorted({token for token in stop if token < rows}, key=lambda token: (token != eos, token))
    if len(ends) > 3:
        raise ModelError(f"GGUF: {len(ends)} tokens end an answer, and a file names three at most; give fewer")
    for token, add in zip(
        ends, (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), strict=False
    ):
        add(token)
    for named, add in (
        (hf.bos_token_id, writer.add_bos_token_id),
        (hf.unk_token_id, writer.add_unk_token_id),
        (hf.pad_token_id, writer.add_pad_token_id),
    ):
        if named is not None and named < rows:
            add(named)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    if jinja:
        writer.add_chat_template(jinja)
