"""The chat format of a GGUF pair: the jinja inside the file, and the Modelfile by which Ollama knows it.

Programs around llama.cpp put a mark into the text where a picture is, right before what the user wrote; training had a
line break there. Both forms here put it in.
"""

import json
from collections.abc import Iterator, Sequence

from mmft.convert.chat_jinja import SAID, Proved
from mmft.convert.grammar import NUMBER, Grammar, read_grammar
from mmft.specs import ChatTemplate

# As `chat_jinja.SAID`, for pictures that come as parts and for marks that are in the text already: `<__media__>`, and
# `<__media_x__>` in llama-server, where x is drawn anew for each start.
MARKED = """{%- macro said(content) -%}
{%- set all = namespace(text='', start=true, marked=false) -%}
{%- if content is string -%}{%- set all.text = content -%}
{%- elif content -%}
{%- for part in content -%}
{%- if part.type == 'image' -%}{%- set all.text = all.text ~ '<__media__>' -%}
{%- else -%}{%- set all.text = all.text ~ part.text -%}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- for piece in all.text.split('__>') -%}
{%- if all.marked and not piece.startswith('\\n') -%}{{- '\\n' -}}{%- endif -%}
{{- piece -}}
{%- if not loop.last -%}{{- '__>' -}}{%- endif -%}
{%- set media = piece.startswith('<__media') or piece.startswith('\\n<__media') -%}
{%- set all.start = all.start and media -%}
{%- set all.marked = all.start and not loop.last -%}
{%- endfor -%}
{%- endmacro -%}
"""


def jinja_for_llama_cpp(found: Proved) -> str:
    """The proved template with the other head."""
    return found.jinja.replace(SAID, MARKED)


def modelfile(
    model: str, mmproj: str | None, template: ChatTemplate | None, context: int, notes: Sequence[str] = ()
) -> str:
    """Ollama's recipe. Where the format is none of strings between turns it has no TEMPLATE, and says so."""
    lines = [f"# {note}" for note in notes]
    lines += [f"FROM ./{model}"]
    if mmproj:
        lines += [f"FROM ./{mmproj}"]
    grammar = read_grammar(template) if template else None
    go = go_template(grammar, pictures=mmproj is not None) if grammar else None
    if go is None or template is None:
        lines += ["# this chat format has no Go template; Ollama's API with raw prompts, or llama.cpp, can be used"]
    else:
        lines += [f'TEMPLATE """{go}"""']
        lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in _stops(template)]
    lines += ["PARAMETER temperature 0", f"PARAMETER num_ctx {min(context, 4096)}"]
    return "\n".join(lines) + "\n"


def _stops(template: ChatTemplate) -> list[str]:
    return [text for text in template.stop if text.strip()]


def go_template(grammar: Grammar, *, pictures: bool) -> str | None:
    """A grammar in Go's template language; None for one with numbered rounds or a system text in the last question.

    Every string is a quoted literal inside an action, because Go's templates strip white space around actions.
    """
    strings = [grammar.opening, *grammar.system, *grammar.between.values(), *grammar.prompts.values()]
    if grammar.system_last or any(NUMBER in text or '"""' in text for text in strings):
        return None
    return "".join(_go(grammar, pictures=pictures))


def _go(grammar: Grammar, *, pictures: bool) -> Iterator[str]:
    before, after = grammar.system
    yield '{{- $system := "" }}{{- $told := false }}{{- $previous := "" }}'
    yield "{{- range .Messages }}"
    yield '{{- if eq .Role "system" }}{{- $system = .Content }}{{- $told = true }}'
    yield "{{- else }}"
    yield '{{- if eq $previous "" }}'
    yield f"{{{{- if $told }}}}{_say(before)}{{{{- $system }}}}{_say(after)}"
    yield f"{{{{- else }}}}{_say(grammar.opening)}{{{{- end }}}}"
    for (a, b), gap in grammar.between.items():
        yield f'{{{{- else if and (eq $previous "{a}") (eq .Role "{b}") }}}}{_say(gap)}'
    yield "{{- end }}"
    yield _content(pictures=pictures)
    yield "{{- $previous = .Role }}"
    yield "{{- end }}"
    yield "{{- end }}"
    word = "if"
    for role, text in grammar.prompts.items():
        yield f'{{{{- {word} eq $previous "{role}" }}}}{_say(text)}'
        word = "else if"
    yield "{{- end }}"


def _say(text: str) -> str:
    return f"{{{{- {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def _content(*, pictures: bool) -> str:
    """What was said; Ollama writes `[img-0]` in front of it for a picture, and nothing between."""
    if not pictures:
        return "{{- .Content }}"
    return (
        '{{- $marked := false }}{{- if ge (len .Content) 8 }}{{- if and (eq (slice .Content 0 5) "[img-") '
        '(eq (slice .Content 6 7) "]") (ne (slice .Content 7 8) "\\n") }}{{- $marked = true }}{{- end }}{{- end }}'
        '{{- if $marked }}{{- slice .Content 0 7 }}{{- "\\n" }}{{- slice .Content 7 }}'
        "{{- else }}{{- .Content }}{{- end }}"
    )
