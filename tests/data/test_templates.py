"""A prompt becomes exactly the tokens that the model was trained to see."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from repo_fast.data import Prompt, PromptTemplate, tokenize_prompts
from repo_fast.errors import InputError
from tests.tiny import BOS, EOS, SAFE_RLHF_WORDS, word_tokenizer


def tokens(tokenizer, words):
    return tokenizer.convert_tokens_to_ids(words)


def byte_tokenizer():
    """One token a character but for the merge of the template's last colon with a following space."""
    vocabulary = {chr(i): i for i in range(32, 127)} | {": ": 127, BOS: 128, EOS: 129}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(":", " ")]))
    # Both ends are marked, as some tokenizers do by themselves.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, 128), (EOS, 129)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


def test_auto_is_the_chat_template_where_there_is_one():
    tokenizer = word_tokenizer(chat_template=True)
    template = PromptTemplate(tokenizer)
    assert template.name == "chat"
    # One bos, and the answer starts behind the assistant's mark.
    assert template.encode_prompt("make tea") == tokens(tokenizer, [BOS, "<user>", "make", "tea", EOS, "<assistant>"])


def test_auto_is_safe_rlhf_otherwise():
    tokenizer = word_tokenizer(chat_template=False)
    template = PromptTemplate(tokenizer)
    assert template.name == "safe-rlhf"
    assert template.render("{input} x") == "BEGINNING OF CONVERSATION: USER: {input} x ASSISTANT:"
    expected = [BOS, *SAFE_RLHF_WORDS[:-1], "make", "tea", "ASSISTANT:"]
    assert template.encode_prompt("make tea") == tokens(tokenizer, expected)


def test_plain_and_a_tokenizer_without_bos():
    tokenizer = word_tokenizer(bos_token=None)
    template = PromptTemplate(tokenizer, "plain")
    assert template.encode_prompt("make tea") == tokens(tokenizer, ["make", "tea"])


def test_dialogues():
    dialogue = ("make tea", "yes {} you can", "bread please")
    chat = PromptTemplate(word_tokenizer())
    words = [BOS, "<user>", *"make tea".split(), EOS, "<assistant>", *"yes you can".split(), EOS]
    words += ["<user>", *"bread please".split(), EOS, "<assistant>"]
    assert chat.encode_prompt([*dialogue[:1], "yes you can", *dialogue[2:]]) == tokens(chat.tokenizer, words)
    # Safe RLHF's `format_prompt` of several turns.
    safe_rlhf = PromptTemplate(word_tokenizer(), "safe-rlhf")
    assert safe_rlhf.render(dialogue) == (
        "BEGINNING OF CONVERSATION: USER: make tea ASSISTANT:yes {} you can</s>USER: bread please ASSISTANT:"
    )
    # As hh-rlhf writes it.
    plain = PromptTemplate(word_tokenizer(), "plain")
    assert plain.render(dialogue) == (
        "\n\nHuman: make tea\n\nAssistant: yes {} you can\n\nHuman: bread please\n\nAssistant:"
    )
    for template in (chat, safe_rlhf, plain):
        assert template.render(["make tea"]) == template.render("make tea")
        for turns in ((), ("make tea", "yes")):
            with pytest.raises(InputError, match=f"a prompt of {len(turns)} turns, expected an odd number"):
                template.encode_prompt(turns)


def test_the_end_of_an_earlier_answer_is_one_token():
    template = PromptTemplate(byte_tokenizer(), "safe-rlhf")
    encoded = template.encode_prompt(("hi", "yes", "no"))
    assert encoded.count(template.tokenizer.eos_token_id) == 1
    assert encoded[0] == template.tokenizer.bos_token_id and encoded[-1] == ord(":")


def test_tokenizers_that_cannot_write_a_dialogue():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}text"
    with pytest.raises(InputError, match="chat template cannot render a dialogue of 3 turns: one turn only"):
        PromptTemplate(tokenizer).render(("a", "b", "c"))
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end-of-sequence token"):
        PromptTemplate(tokenizer, "safe-rlhf").render(("a", "b", "c"))


@pytest.mark.parametrize("name", ["chat", "safe-rlhf", "plain"])
def test_responses_end_only_when_they_did(name):
    tokenizer = word_tokenizer()
    template = PromptTemplate(tokenizer, name)
    assert template.encode_response("yes you can") == tokens(tokenizer, ["yes", "you", "can", EOS])
    assert template.encode_response("yes you can", finished=False) == tokens(tokenizer, ["yes", "you", "can"])
    assert template.encode_response("", finished=False) == []


def test_a_response_is_encoded_as_it_follows_the_prompt():
    tokenizer = byte_tokenizer()
    template = PromptTemplate(tokenizer, "safe-rlhf")
    prompt, eos = template.encode_prompt("hi"), tokenizer.eos_token_id
    assert prompt[0] == tokenizer.bos_token_id and prompt[-1] == ord(":")
    assert template.encode_response("yes") == [*map(ord, "yes"), eos]
    # " yes" would merge with the template's colon; the prompt's tokens are given, so it is encoded alone.
    assert template.encode_response(" yes") == [*map(ord, " yes"), eos]


def test_a_tokenizer_that_marks_words_by_their_leading_space():
    # As Llama's: a word at the start of a text, or after a space, is another token than the same letters elsewhere.
    pieces = ["▁USER:", "▁x", "▁ASSISTANT:", "▁OF", "▁BEGINNING", "▁CONVERSATION:", "yes", "▁yes", "<unk>", EOS]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=8))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)
    template = PromptTemplate(fast, "safe-rlhf")
    assert template.encode_response("yes", finished=False) == [6]
    assert template.encode_response(" yes", finished=False) == [7]


def test_same_rendering():
    chat, bare = word_tokenizer(), word_tokenizer(chat_template=False)
    other = word_tokenizer()
    other.chat_template = "{{ messages[0]['content'] }}"
    assert PromptTemplate(chat).renders_like(PromptTemplate(word_tokenizer()))
    assert not PromptTemplate(chat).renders_like(PromptTemplate(other))
    assert not PromptTemplate(chat).renders_like(PromptTemplate(bare))
    assert PromptTemplate(other, "plain").renders_like(PromptTemplate(bare, "plain"))


def test_bad_templates():
    with pytest.raises(InputError, match="'alpaca' is unknown, expected one of auto, chat"):
        PromptTemplate(word_tokenizer(), "alpaca")
    with pytest.raises(InputError, match="has none"):
        PromptTemplate(word_tokenizer(chat_template=False), "chat")
    broken = word_tokenizer()
    broken.chat_template = "{{ raise_exception('system turn needed') }}"
    with pytest.raises(InputError, match="system turn needed"):
        PromptTemplate(broken)
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end-of-sequence token"):
        PromptTemplate(tokenizer, "plain").encode_response("yes")


def test_long_prompts_are_dropped_and_counted():
    template = PromptTemplate(word_tokenizer(), "plain")
    prompts = [Prompt(0, "make tea"), Prompt(1, "make tea please now"), Prompt(2, "how")]
    kept, dropped = tokenize_prompts(prompts, template, max_tokens=3)
    assert [prompt.id for prompt, _ in kept] == [0, 2] and dropped == 1
    assert [len(encoded) for _, encoded in kept] == [3, 2]
    with pytest.raises(InputError, match="all 3 prompts are longer than the limit of 1 tokens.*shortest has 2"):
        tokenize_prompts(prompts, template, max_tokens=1)
