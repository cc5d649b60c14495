"""Every sentence of the page, in English and Chinese. Errors of Python stay English.

What stands on the page is translated by gradio, in the visitor's browser; what Python writes into a conversation by
the header that the browser sends.
"""

WORDS = {  # key: English, Chinese
    "ask": ("Ask something", "输入问题"),
    "ask_picture": ("Ask; paste or drop pictures", "输入问题，可粘贴或拖入图片"),
    "new": ("New chat", "新对话"),
    "save": ("Download", "下载对话"),
    "settings": ("Settings", "设置"),
    "system": ("System prompt", "系统提示词"),
    "max_new_tokens": ("Most new tokens", "最多生成的 token 数"),
    "temperature": ("Temperature (0: always the likeliest)", "温度（0：总取最可能的）"),
    "top_p": ("Top-p", "Top-p"),
    "top_k": ("Top-k (0: off)", "Top-k（0：关闭）"),
    "repetition_penalty": ("Repetition penalty (1: none)", "重复惩罚（1：无）"),
    "seed": ("Seed (empty: random)", "随机种子（留空：随机）"),
    "example_1": ("What is in this picture?", "这张图片里有什么？"),
    "example_2": ("Describe this picture in one sentence.", "用一句话描述这张图片。"),
    "example_3": ("What colours do you see?", "你看到了哪些颜色？"),
    "example_text_1": ("Who are you?", "你是谁？"),
    "example_text_2": ("Explain in two sentences what a language model is.", "用两句话解释什么是语言模型。"),
    "example_text_3": ("Write a short poem about autumn.", "写一首关于秋天的短诗。"),
    "not_answered": ("not answered", "未能回答"),
    "never_began": (
        "it did not begin: it was stopped, or {most} questions are waiting already; ask again in a while",
        "尚未开始：已被停止，或已有 {most} 个问题在排队；请稍后再试",
    ),
    "long": (
        "the text has {found:,} characters, at most {most:,} are taken; make it shorter",
        "文本有 {found:,} 个字符，最多允许 {most:,} 个，请缩短",
    ),
    "busy": ("One question at a time: stop the answer first.", "一次只能问一个问题：请先停止当前回答。"),
    "bug": ("{error}; see the terminal of mmft web", "{error}；详见 mmft web 的终端"),
}
LANGUAGES = ("en", "zh")


def say(language: str, key: str, **values: object) -> str:
    """A sentence in a language, its places filled."""
    return WORDS[key][LANGUAGES.index(language)].format(**values)


def tables() -> dict[str, dict[str, str]]:
    """The words by the names that gradio has for the languages."""
    english, chinese = ({key: pair[n] for key, pair in WORDS.items()} for n in range(2))
    return {"en": english, "zh-CN": chinese, "zh-TW": chinese}


def language_of(accepted: str | None, fixed: str = "auto") -> str:
    """`en` or `zh`: what is fixed, else the first language of a browser's Accept-Language header.

    gradio 6.31 has zh-CN and zh-TW and shows English to every other Chinese; `--lang zh` is for those.
    """
    if fixed != "auto":
        return fixed
    return "zh" if (accepted or "").strip().lower().startswith(("zh-cn", "zh-tw")) else "en"
