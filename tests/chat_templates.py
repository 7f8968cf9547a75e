"""Chat templates as models of ten families have them, each with its special tokens and a tokenizer."""

from __future__ import annotations

from typing import NamedTuple

from encoding_kinds import KINDS
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

USER, ASSISTANT, END_OF_SENTENCE = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<\uff5cend▁of▁sentence\uff5c>"


class Family(NamedTuple):
    template: str
    special: tuple[str, ...]
    end: str  # of a turn of the assistant
    eos: str  # the tokenizer's end token
    turn: str = "{text}"  # what the assistant's turn has besides the end


def _loop(body: str, prompt: str, start: str = "") -> str:
    return (
        start + "{% for m in messages %}" + body + "{% endfor %}{% if add_generation_prompt %}" + prompt + "{% endif %}"
    )


_CHATML = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
_LLAMA = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
_GEMMA = "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
_KIMI = (
    "{% if m.role == 'user' %}<|im_user|>user<|im_middle|>{% else %}<|im_assistant|>assistant<|im_middle|>{% endif %}"
    "{{ m.content }}<|im_end|>"
)
_MARKED = (
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}\n    {%- generation -%}{{ m.content }}<|im_end|>"
    "{%- endgeneration %}\n{% else %}{{ m.content }}<|im_end|>{% endif %}"
)
# the reasoning of an answer is left out once a user has answered it, as Qwen3's and DeepSeek-R1's templates do
_REASONING = (
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
)
# messages of one role that follow one another are one turn
_MERGING = (
    "{% if loop.first or m.role != loop.previtem.role %}<|im_start|>{{ m.role }}\n{% endif %}{{ m.content }}"
    "{% if loop.last or m.role != loop.nextitem.role %}<|im_end|>\n{% else %} {% endif %}"
)
_PROMPT = "<|im_start|>assistant\n"

FAMILIES = {
    "ChatML": Family(_loop(_CHATML, _PROMPT), ("<|im_start|>", "<|im_end|>"), "<|im_end|>", "<|im_end|>"),
    "ChatML, another end of text": Family(
        _loop(_CHATML, _PROMPT), ("<|im_start|>", "<|im_end|>"), "<|im_end|>", "</s>"
    ),
    "ChatML that marks generation": Family(
        _loop(_MARKED, _PROMPT), ("<|im_start|>", "<|im_end|>"), "<|im_end|>", "<|im_end|>"
    ),
    "Llama-3": Family(
        _loop(_LLAMA, "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|begin_of_text|>"),
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>", "<|eot_id|>",
    ),
    "DeepSeek-V3": Family(
        _loop(
            f"{{% if m.role == 'user' %}}{USER}{{{{ m.content }}}}{{% else %}}{ASSISTANT}{{{{ m.content }}}}"
            f"{END_OF_SENTENCE}{{% endif %}}",
            ASSISTANT, "{{ bos_token }}",
        ),
        (USER, ASSISTANT, END_OF_SENTENCE), END_OF_SENTENCE, END_OF_SENTENCE,
    ),
    "DeepSeek-R1": Family(  # the prompt has the beginning of reasoning, which a turn leaves out
        _loop(
            f"{{% if m.role == 'user' %}}{USER}{{{{ m.content }}}}{{% else %}}{ASSISTANT}"
            f"{{{{ m.content.split('</think>')[-1] }}}}{END_OF_SENTENCE}{{% endif %}}",
            f"{ASSISTANT}<think>\n",
        ),
        (USER, ASSISTANT, END_OF_SENTENCE), END_OF_SENTENCE, END_OF_SENTENCE,
    ),
    "Kimi": Family(
        _loop(_KIMI, "<|im_assistant|>assistant<|im_middle|>"),
        ("<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>"), "<|im_end|>", "<|im_end|>",
    ),
    "GLM": Family(  # an answer has no end of its own
        _loop("<|{{ m.role }}|>\n{{ m.content }}", "<|assistant|>", "[gMASK]<sop>"),
        ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|endoftext|>"), "", "<|endoftext|>", "\n{text}",
    ),
    "Gemma": Family(
        _loop(_GEMMA, "<start_of_turn>model\n", "{{ bos_token }}"),
        ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", "</s>",
    ),
    "plain words": Family(  # without any control token
        _loop("{{ m.role | capitalize }}: {{ m.content }}\n", "Assistant:"), (), "", "</s>", " {text}\n"
    ),
    "drops earlier reasoning": Family(
        _loop(_REASONING, _PROMPT), ("<|im_start|>", "<|im_end|>"), "<|im_end|>", "<|im_end|>"
    ),
    "merges turns": Family(_loop(_MERGING, _PROMPT), ("<|im_start|>", "<|im_end|>"), "<|im_end|>", "<|im_end|>"),
}  # fmt: skip


def tokenizer_of(family: Family, kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a kind of `encoding_kinds` with the chat template of a family and its tokens."""
    made = Tokenizer.from_str(KINDS[kind]().to_str())
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in family.special])
    made.add_tokens([AddedToken(token, special=False) for token in ("<think>", "</think>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token=family.eos, unk_token="<unk>")
    tokenizer.chat_template = family.template
    return tokenizer
