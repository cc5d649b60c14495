"""XTuner's chat templates by their names, each as its model's own publication has it.

XTuner's strings (https://github.com/InternLM/xtuner/blob/v0.1.23/xtuner/utils/templates.py) differ from the models'
own formats in places: a new BOS before every turn, a system turn for models that have none, `[INST]` for
deepseek_moe. Here the model's format holds, and `source` says where it is written down. Where a format has no form for
a system text, XTuner's is kept or the text is merged into the first question; `source` says which. The long default
system texts of Llama 2, DeepSeek Coder, WizardLM and WizardCoder are not written: only the system text of the data is.

`chatml`, `internlm2_chat`, `llama3_chat` and `vicuna` are in `mmft_plugins.templates`.
"""

from mmft import hookimpl
from mmft.specs import ChatTemplate
from mmft_plugins._moss_template import MOSS
from mmft_plugins._turn_templates import TurnStrings, turn_template

HUB = "https://huggingface.co"
XTUNER = "https://github.com/InternLM/xtuner/blob/v0.1.23/xtuner/utils/templates.py"
DEEPSEEK_BOS, DEEPSEEK_EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


DEFAULT = TurnStrings(
    name="default",
    source=f"{XTUNER}, for base models; EOS after each answer, BOS as the tokenizer has it, once",
    begin="{bos}",
    system="<|System|>:{text}\n",
    user="<|User|>:{text}\n",
    header="<|Bot|>:",
    answer="{text}{eos}",
    after="\n",
)

ZEPHYR = TurnStrings(
    name="zephyr",
    source=f"{HUB}/HuggingFaceH4/zephyr-7b-beta/blob/main/tokenizer_config.json; it writes no BOS",
    system="<|system|>\n{text}{eos}\n",
    user="<|user|>\n{text}{eos}\n",
    header="<|assistant|>\n",
    answer="{text}{eos}",
    after="\n",
)

INTERNLM = TurnStrings(
    name="internlm_chat",
    source=f"{HUB}/internlm/internlm-chat-7b/blob/main/modeling_internlm.py, build_inputs; system as in {XTUNER}",
    begin="{bos}",
    system="<|System|>:{text}\n",
    user="<|User|>:{text}<eoh>\n",
    header="<|Bot|>:",
    answer="{text}<eoa>",
    after="\n",
    bos="<s>",
    tokens=("<eoh>", "<eoa>"),
)


def _llama2(name: str, repository: str) -> TurnStrings:
    return TurnStrings(
        name=name,
        source=f"{HUB}/{repository}/blob/main/tokenizer_config.json, which writes BOS before each question",
        system="<<SYS>>\n{text}\n<</SYS>>\n\n",
        user="{bos}[INST] {text} [/INST]",
        answer=" {text} {eos}",
        merges_system=True,
        strips=True,
        bos="<s>",
    )


CHATGLM2 = TurnStrings(
    name="chatglm2",
    source=f"{HUB}/THUDM/chatglm2-6b/blob/main/tokenization_chatglm.py, build_prompt; EOS and system text "
    f"as in {XTUNER}",
    begin="[gMASK]sop",
    system="{text}\n",
    user="[Round {round}]\n\n问：{text}\n\n",
    header="答：",
    answer="{text}{eos}",
    after="\n\n",
    tokens=("[gMASK]", "sop"),
)

CHATGLM3 = TurnStrings(
    name="chatglm3",
    source=f"{HUB}/THUDM/chatglm3-6b/blob/main/tokenizer_config.json, with the EOS after each answer",
    begin="[gMASK]sop",
    system="<|system|>\n {text}",
    user="<|user|>\n {text}",
    header="<|assistant|>",
    answer="\n {text}{eos}",
    tokens=("[gMASK]", "sop", "<|system|>", "<|user|>", "<|assistant|>"),
    also_stops=("<|user|>", "<|observation|>"),
)


def _chatml(name: str, source: str) -> TurnStrings:
    return TurnStrings(
        name=name,
        source=source,
        system="<|im_start|>system\n{text}<|im_end|>\n",
        user="<|im_start|>user\n{text}<|im_end|>\n",
        header="<|im_start|>assistant\n",
        answer="{text}<|im_end|>",
        after="\n",
        tokens=("<|im_start|>", "<|im_end|>"),
        also_stops=("<|endoftext|>",),
    )


def _baichuan(name: str, source: str, user: str, assistant: str) -> TurnStrings:
    return TurnStrings(
        name=name,
        source=source,
        system="{text}",
        user=f"{user}{{text}}",
        header=assistant,
        answer="{text}{eos}",
        tokens=(user, assistant),
    )


WIZARDLM = TurnStrings(
    name="wizardlm",
    source=f"{HUB}/WizardLM/WizardLM-13B-V1.2/blob/main/README.md, less its default system text",
    begin="{bos}",
    system="{text} ",
    user="USER: {text} ",
    header="ASSISTANT:",
    answer=" {text}{eos}",
    bos="<s>",
)

WIZARDCODER = TurnStrings(
    name="wizardcoder",
    source=f"{HUB}/WizardLM/WizardCoder-15B-V1.0/blob/main/README.md, less its default system text",
    begin="{bos}",
    system="{text}\n\n",
    user="### Instruction:\n{text}\n\n",
    header="### Response:",
    answer="{text}{eos}",
    after="\n\n",
    eos="<|endoftext|>",
)


def _deepseek_coder(name: str) -> TurnStrings:
    return TurnStrings(
        name=name,
        source=f"{HUB}/deepseek-ai/deepseek-coder-6.7b-instruct/blob/main/tokenizer_config.json, less its default "
        "system text; a line break ends the system text, as it ends that one",
        begin="{bos}",
        system="{text}\n",
        user="### Instruction:\n{text}\n",
        header="### Response:",
        answer="\n{text}\n<|EOT|>",
        after="\n",
        bos=DEEPSEEK_BOS,
        eos="<|EOT|>",
        tokens=("<|EOT|>",),
    )


def _deepseek(name: str, repository: str) -> TurnStrings:
    return TurnStrings(
        name=name,
        source=f"{HUB}/deepseek-ai/{repository}/blob/main/tokenizer_config.json",
        begin="{bos}",
        system="{text}\n\n",
        user="User: {text}\n\n",
        header="Assistant:",
        answer=" {text}{eos}",
        bos=DEEPSEEK_BOS,
        eos=DEEPSEEK_EOS,
    )


def _mistral(name: str, repository: str) -> TurnStrings:
    return TurnStrings(
        name=name,
        source=f"{HUB}/mistralai/{repository}/blob/main/tokenizer_config.json; the system text opens the next question",
        begin="{bos}",
        system="{text}\n\n",
        user=" [INST] {text} [/INST]",
        answer=" {text}{eos}",
        merges_system=True,
        bos="<s>",
    )


MINICPM = TurnStrings(
    name="minicpm",
    source=f"{HUB}/openbmb/MiniCPM-2B-sft-bf16/blob/main/tokenizer_config.json, with the EOS after each answer",
    begin="{bos}",
    system="{text}",
    user="<用户>{text}",
    header="<AI>",
    answer="{text}{eos}",
    strips=True,
    bos="<s>",
)

GEMMA = TurnStrings(
    name="gemma",
    source=f"{HUB}/google/gemma-7b-it/blob/main/tokenizer_config.json; it has no system role: the text opens the "
    "next question, as in gemma-3",
    begin="{bos}",
    system="{text}\n\n",
    user="<start_of_turn>user\n{text}<end_of_turn>\n",
    header="<start_of_turn>model\n",
    answer="{text}<end_of_turn>",
    after="\n",
    merges_system=True,
    strips=True,
    bos="<bos>",
    eos="<eos>",
    tokens=("<start_of_turn>", "<end_of_turn>"),
)

COHERE_START, COHERE_END = "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"
COHERE = TurnStrings(
    name="cohere_chat",
    source=f"{HUB}/CohereForAI/c4ai-command-r-v01/blob/main/tokenizer_config.json, template 'default'",
    begin="{bos}",
    system=f"{COHERE_START}<|SYSTEM_TOKEN|>{{text}}{COHERE_END}",
    user=f"{COHERE_START}<|USER_TOKEN|>{{text}}{COHERE_END}",
    header=f"{COHERE_START}<|CHATBOT_TOKEN|>",
    answer=f"{{text}}{COHERE_END}",
    strips=True,
    bos="<BOS_TOKEN>",
    eos=COHERE_END,
    tokens=(COHERE_START, COHERE_END, "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
)

PHI3 = TurnStrings(
    name="phi3_chat",
    source=f"{HUB}/microsoft/Phi-3-mini-4k-instruct/blob/main/tokenizer_config.json; it writes no BOS",
    system="<|system|>\n{text}<|end|>\n",
    user="<|user|>\n{text}<|end|>\n",
    header="<|assistant|>\n",
    answer="{text}<|end|>",
    after="\n",
    tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    also_stops=("<|endoftext|>",),
)


def formats() -> list[TurnStrings]:
    """Every format that strings describe, in XTuner's order."""
    qwen = f"{HUB}/Qwen/Qwen-7B-Chat/blob/main/qwen_generation_utils.py, make_context, less its default system text"
    baichuan = f"{HUB}/baichuan-inc/Baichuan-13B-Chat/blob/main/modeling_baichuan.py, _build_chat_input"
    baichuan2 = f"{HUB}/baichuan-inc/Baichuan2-7B-Chat/blob/main/generation_utils.py, with the EOS after each answer"
    return [
        DEFAULT,
        ZEPHYR,
        INTERNLM,
        _llama2("llama2_chat", "meta-llama/Llama-2-7b-chat-hf"),
        _llama2("code_llama_chat", "codellama/CodeLlama-7b-Instruct-hf"),
        CHATGLM2,
        CHATGLM3,
        _chatml("qwen_chat", qwen),
        _baichuan("baichuan_chat", baichuan, "<reserved_102>", "<reserved_103>"),
        _baichuan("baichuan2_chat", baichuan2, "<reserved_106>", "<reserved_107>"),
        WIZARDLM,
        WIZARDCODER,
        _deepseek_coder("deepseek_coder"),
        _deepseek_coder("deepseekcoder"),  # the older of XTuner's two names for it
        _deepseek("deepseek_moe", "deepseek-moe-16b-chat"),
        _deepseek("deepseek_v2", "DeepSeek-V2-Chat"),
        _mistral("mistral", "Mistral-7B-Instruct-v0.2"),
        _mistral("mixtral", "Mixtral-8x7B-Instruct-v0.1"),
        MINICPM,
        _chatml("minicpm3", f"{HUB}/openbmb/MiniCPM3-4B/blob/main/tokenizer_config.json"),
        GEMMA,
        COHERE,
        PHI3,
    ]


@hookimpl
def mmft_chat_templates() -> list[ChatTemplate]:
    """XTuner's names, less the four that `mmft_plugins.templates` offers."""
    return [MOSS, *(turn_template(form) for form in formats())]
