"""A prompt becomes exactly the tokens that the model was trained to see."""

import json
import logging

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from repo_fast.data import Dialogue, Prompt, PromptTemplate, encode_whole, load_tokenizer, tokenize_prompts
from repo_fast.errors import InputError
from tests.families import FAMILIES, family_tokenizer
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
    refuses = "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}"
    tokenizer.chat_template = refuses + "{{ messages[0]['content'] }}"
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
    kept, dropped = tokenize_prompts(prompts, template, max_tokens=3, option="data.most")
    assert [prompt.id for prompt, _ in kept] == [0, 2] and dropped == 1
    assert [len(encoded) for _, encoded in kept] == [3, 2]
    with pytest.raises(InputError, match="all 3 prompts are longer than the limit of 1 tokens .data.most. .* 2$"):
        tokenize_prompts(prompts, template, max_tokens=1, option="data.most")


# -------------------------------------------------------------------------------------- one rendering of a dialogue

DIALOGUES = [
    (("How?",), "Like this."),
    (("How?", "No.", "Please!"), "\nWell, so:\n\n- like this "),
    (("?",), ""),
]


def chat(turns, answer=None):
    texts = [*turns, *([] if answer is None else [answer])]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.mark.parametrize(("turns", "answer"), DIALOGUES)
def test_a_finished_dialogue_is_what_the_models_own_template_makes_of_it(family, turns, answer):
    """For a score model: from texts, as it is trained, and from the tokens that a policy drew, as it is used."""
    tokenizer = family_tokenizer(family)
    template = PromptTemplate(tokenizer)
    finished = tokenizer.apply_chat_template(chat(turns, answer), tokenize=True)["input_ids"]
    asked = tokenizer.apply_chat_template(chat(turns), add_generation_prompt=True, tokenize=True)["input_ids"]
    assert template.encode_dialogue(turns, answer) == finished
    assert template.encode_prompt(turns) == asked
    drawn = tokenizer.encode(family.before + answer, add_special_tokens=False)
    after = tokenizer.encode(family.after, add_special_tokens=False)
    for end in (family.turn_end, family.eos, None):
        # The last: a stop string ended it.
        tokens = drawn if end is None else [*drawn, *after, tokenizer.convert_tokens_to_ids(end)]
        assert template.encode_drawn(turns, tokens, finished=True) == finished
    # So is the text that it renders to.
    assert encode_whole(tokenizer, tokenizer.apply_chat_template(chat(turns, answer), tokenize=False)) == finished
    if not answer:
        return
    # One that was cut is the same up to what ends it.
    ending = tokenizer.encode(family.after + family.turn_end + family.behind, add_special_tokens=False)
    cut = template.encode_dialogue(turns, answer, finished=False)
    assert tokenizer.decode(cut + ending) == tokenizer.decode(finished)
    assert template.encode_drawn(turns, drawn, finished=False) == asked + drawn


def test_a_policy_learns_up_to_the_token_that_ends_its_turn(family):
    tokenizer = family_tokenizer(family)
    template = PromptTemplate(tokenizer)
    learned = template.encode_response("Like this.")
    end = tokenizer.convert_tokens_to_ids(family.turn_end)
    assert learned[-1] == end and learned.count(end) == 1 and end in template.end_tokens
    assert tokenizer.decode(learned) == f"{family.before}Like this.{family.after}{family.turn_end}"
    if family is not FAMILIES["r1"]:
        whole = tokenizer.apply_chat_template(chat(("How?",), "Like this."), tokenize=True)["input_ids"]
        known = template.encode_prompt("How?") + learned
        assert whole[: len(known)] == known
    if family.trims:
        assert template.encode_response(" Like this.\n") == learned


def test_a_prompt_that_finished_dialogues_do_not_begin_with(caplog):
    """It opens the thoughts; the response is learned as it is, and that is said once."""
    template = PromptTemplate(family_tokenizer(FAMILIES["r1"]))
    with caplog.at_level(logging.WARNING, "repo_fast"):
        for _ in range(2):
            learned = template.encode_response("Hm.</think>So.")
    assert template.tokenizer.decode(learned) == "Hm.</think>So.<|end|>"
    (said,) = [record.getMessage() for record in caplog.records]
    assert "<|Assistant|><think>\\n'" in said and "responses are learned as they are" in said


def test_an_end_of_turn_that_is_no_token(caplog):
    """Responses have to end: by the end-of-sequence token, which the template does not write."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }} says {{ message.content }} \n{% endfor %}"
    )
    template = PromptTemplate(tokenizer)
    with caplog.at_level(logging.WARNING, "repo_fast"):
        learned = [template.encode_response("yes you can") for _ in range(2)][0]
    assert learned[-4:] == tokens(tokenizer, ["yes", "you", "can", EOS])
    assert template.encode_dialogue("make tea", "yes")[-1:] == tokens(tokenizer, ["yes"])
    assert [record.getMessage().count("no token ends a response") for record in caplog.records] == [1]


def test_a_line_break_ends_no_turn():
    """Also where its token is named as a byte, <0x0A>, which looks like a mark."""
    letters = {f"<0x{byte:02X}>": byte for byte in range(256)} | {EOS: 256, "<end>": 257}
    backend = Tokenizer(models.BPE(letters, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)
    turn = "{% for message in messages %}{{ message.role }}: {{ message.content }}END\n{% endfor %}"
    tokenizer.chat_template = turn.replace("END", "")
    assert PromptTemplate(tokenizer).end_tokens == {256}
    # A token of the vocabulary that the tokenizer does not call special.
    words = word_tokenizer(["<end>", "yes"])
    words.chat_template = turn.replace("END", " <end>").replace("}}:", "}} :")
    assert words.convert_tokens_to_ids("<end>") in PromptTemplate(words).end_tokens


def test_tokens_that_a_text_is_not_split_into_are_kept_unless_the_template_changes_the_text():
    # The last lacks the space that its template puts there.
    for name, before, kept in (("chatml", "", True), ("llama-2", " ", True), ("llama-2", "", False)):
        tokenizer = family_tokenizer(FAMILIES[name])
        template = PromptTemplate(tokenizer)
        # Two line breaks as two tokens, where the tokenizer has one for them.
        breaks = tokenizer.encode("\n", add_special_tokens=False) * 2
        drawn = tokenizer.encode(f"{before}a", add_special_tokens=False) + breaks + [ord("b") - 33]
        assert tokenizer.decode(drawn) == f"{before}a\n\nb"
        anew = template.encode_dialogue("How?", "a\n\nb")
        own = template.encode_drawn("How?", [*drawn, tokenizer.eos_token_id], finished=True)
        assert len(own) == len(anew) + kept and tokenizer.decode(own) == tokenizer.decode(anew)


def test_a_finished_dialogue_without_its_answer_is_refused():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }} {{ eos_token }}"
    template = PromptTemplate(tokenizer)
    with pytest.raises(InputError, match="writes a finished dialogue without its answer"):
        template.encode_dialogue("make tea", "yes")


def test_a_drawn_response_that_its_template_refuses_is_read_as_it_was_drawn(caplog):
    tokenizer = family_tokenizer(FAMILIES["chatml"])
    expected = PromptTemplate(tokenizer).encode_dialogue("How?", "a forbidden word")
    refuse = "{% if 'forbidden' in messages[-1].content %}{{ raise_exception('no such word') }}{% endif %}"
    tokenizer.chat_template = refuse + tokenizer.chat_template
    drawn = tokenizer.encode("a forbidden word") + [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    with caplog.at_level(logging.WARNING, "repo_fast"):
        assert PromptTemplate(tokenizer).encode_drawn("How?", drawn, finished=True) == expected
    assert caplog.text.count("no such word") == 1


# ------------------------------------------------------------------------------------ tokens that a text already has


@pytest.mark.parametrize("name", ["plain", "safe-rlhf", "chat"])
def test_begin_and_end_tokens_stand_once(name):
    template = PromptTemplate(word_tokenizer(), name)
    clean = template.encode_prompt("make tea")
    for text in (f"{BOS} make tea", f"{BOS}make tea", f" {BOS} {BOS} make tea"):
        assert template.encode_prompt(text) == clean
    assert clean.count(template.tokenizer.bos_token_id) == 1
    response = template.encode_response("yes you can")
    for text in (f"yes you can {EOS}", f"yes you can{EOS}\n", f"yes you can {EOS} {EOS}"):
        assert template.encode_response(text) == response
        assert template.encode_dialogue("make tea", text) == template.encode_dialogue("make tea", "yes you can")
    if name != "plain":
        turns = ("make tea", "yes", "bread")
        assert template.encode_prompt(("make tea", f"yes {EOS}", "bread")) == template.encode_prompt(turns)


def test_begin_and_end_tokens_of_families(family):
    tokenizer = family_tokenizer(family)
    template = PromptTemplate(tokenizer)
    assert template.encode_response(f"Yes.{family.turn_end}{family.behind}") == template.encode_response("Yes.")
    assert template.encode_dialogue("How?", f"Yes.{family.turn_end}") == template.encode_dialogue("How?", "Yes.")
    turns = ("How?", "No.", "Please!")
    assert template.encode_prompt(("How?", f"No.{family.turn_end}", "Please!")) == template.encode_prompt(turns)
    if family.bos and "bos_token" in family.template:
        assert template.encode_prompt(f"{family.bos}How?") == template.encode_prompt("How?")
        assert template.encode_prompt("How?").count(tokenizer.bos_token_id) == 1


def test_a_begin_token_stays_where_nothing_adds_one():
    # A tokenizer that puts none in front, for a template that writes none.
    template = PromptTemplate(family_tokenizer(FAMILIES["zephyr"]))
    assert template.tokenizer.decode(template.encode_prompt("<s>How?")).startswith("<|user|>\n<s>How?")
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    assert PromptTemplate(tokenizer, "plain").encode_prompt(f"{BOS} make tea") == tokens(
        tokenizer, [BOS, "make", "tea"]
    )


def test_special_tokens_elsewhere_stay_and_are_named_once(caplog):
    tokenizer = word_tokenizer()
    template = PromptTemplate(tokenizer, "plain")
    with caplog.at_level(logging.WARNING, "repo_fast"):
        for _ in range(2):
            assert template.encode_prompt(f"make {EOS} tea") == tokens(tokenizer, [BOS, "make", EOS, "tea"])
            assert template.encode_response(f"yes {BOS} you")[:3] == tokens(tokenizer, ["yes", BOS, "you"])
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert (
        f"a prompt has the special token '{EOS}'" in said[0] and f"a response has the special token '{BOS}'" in said[1]
    )


def test_a_whole_text_gets_the_tokens_that_it_has_not_got():
    tokenizer = byte_tokenizer()
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    expected = [begin, *map(ord, "hi"), end]
    for text in ("hi", f"{BOS}hi", f"hi{EOS}", f"{BOS}hi{EOS}"):
        assert encode_whole(tokenizer, text) == expected


# --------------------------------------------------------------------------------------------- templates that fail


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content + 1 }}", "cannot render a single user turn: TypeError: "),
        ("{{ nothing.at_all }}", "cannot render a single user turn: 'nothing' is undefined"),
        ("{{ messages | no_such_filter }}", "cannot render a single user turn: No filter named 'no_such_filter'"),
        ("{% if %}", "cannot render a single user turn: Expected an expression"),
        ("{{ messages[0].content[0:1] / 0 }}", "cannot render a single user turn: TypeError"),
        ("{{ 1 // 0 }}{{ messages[0].content }}", "cannot render a single user turn: ZeroDivisionError"),
        ("{{ messages[0].content.no() }}", "cannot render a single user turn: 'str object' has no attribute 'no'"),
        ("{# nothing #}", "renders an empty text"),
        ("{{ bos_token }}{{ messages[0].role }}", r"leaves out turn 1 \(user\) of a single user turn"),
        ({"tool_use": "{{ messages[0].content }}"}, "multiple chat templates with no default specified"),
        ([{"name": "tool_use"}], "cannot render a single user turn"),
    ],
)
def test_a_chat_template_that_fails_is_one_line(template, message):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=message) as caught:
        PromptTemplate(tokenizer)
    assert "\n" not in str(caught.value)
    assert PromptTemplate(tokenizer, "plain").encode_prompt("make tea") == tokens(tokenizer, [BOS, "make", "tea"])


def test_a_dict_of_templates_with_a_default():
    tokenizer = word_tokenizer()
    expected = PromptTemplate(tokenizer).encode_prompt("make tea")
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ 1 / 0 }}"}
    assert PromptTemplate(tokenizer).encode_prompt("make tea") == expected


def test_a_template_that_leaves_something_out_is_refused_for_the_dialogues_that_have_it():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages if message.role == 'user' %}{{ message.content }} {{ eos_token }}{% endfor %}"
    )
    template = PromptTemplate(tokenizer)
    assert template.encode_prompt("make tea") == tokens(tokenizer, ["make", "tea", EOS])
    with pytest.raises(InputError, match=r"leaves out turn 2 \(assistant\) of a dialogue of 3 turns"):
        template.encode_prompt(("make tea", "yes", "bread"))
    with pytest.raises(InputError, match="leaves out the system text of a single user turn with a system text"):
        template.encode_prompt(Dialogue(("make tea",), "please"))


def test_a_system_text_that_a_template_refuses():
    template = PromptTemplate(family_tokenizer(FAMILIES["gemma"]))
    with pytest.raises(InputError, match="cannot render a single user turn with a system text: no system turn"):
        template.encode_prompt(Dialogue(("How?",), "Be brief."))


# --------------------------------------------------------------------------------------------------------- the date


def test_the_date_that_a_template_writes_is_the_one_given():
    tokenizer = family_tokenizer(FAMILIES["llama-3"])
    one, other = PromptTemplate(tokenizer, date="2024-07-26"), PromptTemplate(tokenizer, date="2025-01-02")
    assert "Today Date: 26 Jul 2024\n" in one.render("How?") and "Today Date: 02 Jan 2025\n" in other.render("How?")
    assert "26 Jul 2024" in tokenizer.decode(one.encode_dialogue("How?", "So."))
    assert one.depends_on_date and not one.renders_like(other) and one.renders_like(one)
    assert not any(
        PromptTemplate(family_tokenizer(entry)).depends_on_date for name, entry in FAMILIES.items() if name != "llama-3"
    )
    assert not PromptTemplate(tokenizer, "plain").depends_on_date


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_max_length": []}, "TypeError|not supported between"),
        # An unknown word would be looked up for ever.
        ({"unk_token": ""}, "recursion"),
    ],
)
def test_settings_of_a_tokenizer_that_show_only_where_it_is_used(tmp_path, settings, message):
    word_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(InputError, match=f"has no tokenizer that transformers can load: .*({message})"):
        load_tokenizer(str(tmp_path))


def test_a_template_that_cannot_be_used_is_named_by_its_folder(tmp_path):
    word_tokenizer(chat_template=False).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"that of '{tmp_path}' has none"):
        PromptTemplate(load_tokenizer(str(tmp_path)), "chat")
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(InputError, match=f"the chat template of '{tmp_path}' cannot render"):
        PromptTemplate(load_tokenizer(str(tmp_path)), "chat")


def test_a_tokenizer_that_panics_is_one_line(tmp_path):
    """Rust's panics are no `Exception`."""
    word_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["post_processor"]["special_tokens"] = {}
    path.write_text(json.dumps(settings))
    with pytest.raises(InputError, match="has no tokenizer that transformers can load: no entry found for key"):
        load_tokenizer(str(tmp_path))
