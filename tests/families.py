"""Tokenizers with chat templates in the formats of well-known families, built small: a token a byte, and special ones.

What ends a turn is not always what ends a sequence, blanks are trimmed here and there, and a begin token may come from
the template, from the tokenizer, or from both.
"""

from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

_HEADER = "<|start_header_id|>{{ role }}<|end_header_id|>\n\n"
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A chat template and what surrounds it.

    Attributes:
        template: In the family's format.
        eos: The tokenizer's end-of-sequence token.
        turn_end: The token that ends an answer.
        behind: What the template writes after that.
        special: Other special tokens.
        bos: A begin-of-sequence token that the tokenizer puts in front; None for none.
        before, after: What the template writes between its prompt and an answer, and between that and the turn's end.
        trims: Whether blanks around an answer go.
    """

    template: str
    eos: str
    turn_end: str
    behind: str = ""
    special: tuple[str, ...] = ()
    bos: str | None = None
    before: str = ""
    after: str = ""
    trims: bool = False


FAMILIES = {
    "chatml": Family(_CHATML, "<|endoftext|>", "<|im_end|>", "\n", ("<|im_start|>",)),
    "gemma": Family(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('turns must alternate') }}{% endif %}"
        "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
        "{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        *("<eos>", "<end_of_turn>", "\n", ("<start_of_turn>",), "<bos>"),
        trims=True,
    ),
    "llama-3": Family(
        "{{ bos_token }}{% set role = 'system' %}"
        + _HEADER
        + "Today Date: {{ strftime_now('%d %b %Y') }}\n\n"
        + "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% endif %}<|eot_id|>"
        + "{% for message in messages %}{% if message.role != 'system' %}{% set role = message.role %}"
        + _HEADER
        + "{{ message.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}{% set role = 'assistant' %}"
        + _HEADER
        + "{% endif %}",
        *("<|end_of_text|>", "<|eot_id|>", "", ("<|start_header_id|>", "<|end_header_id|>"), "<|begin_of_text|>"),
        trims=True,
    ),
    "llama-2": Family(
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
        "{{ '[INST] ' + message.content.strip() + ' [/INST]' }}{% elif message.role == 'assistant' %}"
        "{{ ' ' + message.content.strip() + ' ' + eos_token }}{% else %}{{ raise_exception('who?') }}{% endif %}"
        "{% endfor %}",
        *("</s>", "</s>", "", (), "<s>"),
        before=" ",
        after=" ",
        trims=True,
    ),
    # Blanks around an answer are doubled where it has some.
    "vicuna": Family(
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}{{ message.content }} "
        "{% elif message.role == 'user' %}USER: {{ message.content }}"
        "{% else %} ASSISTANT: {{ message.content }} {{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %} ASSISTANT:{% endif %}",
        *("</s>", "</s>", "", (), "<s>"),
        before=" ",
        after=" ",
    ),
    # The tokenizer has a begin token, which the template leaves out; the roles are plain text.
    "zephyr": Family(
        "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        *("</s>", "</s>", "\n", (), "<s>"),
    ),
    # An answer's thoughts stay in the last turn alone, which gets an empty block of them.
    "qwen-3": Family(
        "{% for message in messages %}{% set content = message.content %}<|im_start|>{{ message.role }}\n"
        "{% if message.role == 'assistant' %}{% set parts = content.split('</think>') %}"
        "{% set thoughts = parts[0].split('<think>')[-1].strip() if parts | length > 1 else '' %}"
        "{% if loop.last %}<think>\n{{ thoughts }}\n</think>\n\n{% endif %}{{ parts[-1].lstrip('\n') }}"
        "{% else %}{{ content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        *("<|endoftext|>", "<|im_end|>", "\n", ("<|im_start|>",)),
        before="<think>\n\n</think>\n\n",
    ),
    # Its prompt opens the thoughts that a finished dialogue leaves out.
    "r1": Family(
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
        "<|Assistant|>{{ message.content.split('</think>')[-1] }}{{ eos_token }}"
        "{% else %}<|User|>{{ message.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}",
        *("<|end|>", "<|end|>", "", ("<|User|>", "<|Assistant|>"), "<|begin|>"),
    ),
    # The policy writes the header of its turn itself.
    "no generation prompt": Family(
        _CHATML.partition("{% if add")[0],
        *("<|endoftext|>", "<|im_end|>", "\n", ("<|im_start|>",)),
        before="<|im_start|>assistant\n",
    ),
}


def family_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """A token a byte, one for two line breaks, and the family's special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({**{letter: i for i, letter in enumerate(letters)}, "ĊĊ": 256}, [("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [*family.special, family.turn_end, *([family.bos] if family.bos else [])]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token="<pad>",
        additional_special_tokens=[token for token in dict.fromkeys(special) if token != family.eos],
        clean_up_tokenization_spaces=False,
    )
    if family.bos is not None:
        fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, fast.convert_tokens_to_ids(family.bos))]
        )
    fast.chat_template = family.template
    return fast
