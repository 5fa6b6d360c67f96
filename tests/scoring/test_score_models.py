"""A model's score is read at the last real token, whatever surrounds the sequence."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from repo_fast.data import PromptTemplate
from repo_fast.errors import InputError
from repo_fast.models.score_checkpoint import find_output
from repo_fast.models.score_model import ScoreModel
from repo_fast.rollout import Rollout
from repo_fast.scoring import (
    ClassifierScorer,
    EncoderClassifier,
    LastOutputs,
    ModelScorer,
    load_score_model,
    score_text,
)
from repo_fast.scoring.score_models import reads_tokens_of
from tests.tiny import (
    BOS,
    EOS,
    WORDS,
    save_beaver,
    save_policy,
    save_sequence_classifier,
    word_tokenizer,
)

CPU = torch.device("cpu")
# The third was cut at the length limit; the last ended at once.
TEXTS = [("make tea", "yes you can"), ("how do i make a bomb", "no sorry"), ("please", "the the the"), ("tea", "")]
FINISHED = [True, True, False, True]


def rollout(template, texts=TEXTS, finished=FINISHED):
    prompts, responses = [list(part) for part in zip(*texts, strict=True)] if texts else ([], [])
    return Rollout(
        prompt_ids=torch.arange(len(texts)),
        prompts=prompts,
        responses=responses,
        prompt_tokens=[torch.tensor(template.encode_prompt(p)) for p in prompts],
        response_tokens=[
            torch.tensor(template.encode_response(r, finished=f)) for r, f in zip(responses, finished, strict=True)
        ],
        finished=torch.tensor(finished, dtype=torch.bool),
    )


def scorer(module, template, policy_template=None, **options):
    settings = {"name": "cost", "max_tokens": 64, "token_budget": 16, "device": CPU} | options
    return ModelScorer(module, template, policy_template or template, **settings)


def sequences(drawn):
    return [torch.cat(pair) for pair in zip(drawn.prompt_tokens, drawn.response_tokens, strict=True)]


def padded(rows, pad, side):
    longest = max(len(row) for row in rows) + 2
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


class Recorder(nn.Module):
    """Stands for a score model: keeps what it is given, and scores with the token it is asked to read."""

    def __init__(self, vocabulary=1000):
        super().__init__()
        self.trunk = nn.Module()
        self.trunk.config = LlamaConfig(vocab_size=vocabulary)
        self.rows = []

    def forward(self, input_ids, position_ids, positions, bounds):
        bounds.check(position_ids)
        self.rows.append([row.tolist() for row in torch.tensor_split(input_ids[0], bounds.own[1:-1].tolist())])
        return input_ids[0, positions].float()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return save_sequence_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.mark.parametrize("side", ["left", "right"])
def test_hugging_face_reads_the_same_scores_from_padded_batches(classifier, side):
    template = PromptTemplate(word_tokenizer())
    drawn = rollout(template)
    reference = LlamaForSequenceClassification.from_pretrained(classifier).eval()
    batch = padded(sequences(drawn), template.tokenizer.pad_token_id, side)
    with torch.no_grad():
        # Left padding shifts the positions, which HF's forward counts from the mask only when told.
        position_ids = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        expected = reference(**batch, position_ids=position_ids).logits[:, 0]
    got = scorer(load_score_model(str(classifier), dtype=torch.float32), template).score(drawn)
    assert got.dtype == torch.float32 and got.shape == (4,)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_pad_token_that_equals_eos_moves_nothing(tmp_path):
    tokenizer = word_tokenizer(chat_template=False, pad_token=EOS)
    path = save_beaver(tmp_path, tokenizer=tokenizer, bias=True)
    model = ScoreModel.from_pretrained(str(path), dtype=torch.float32).eval()
    drawn = rollout(PromptTemplate(tokenizer))
    got = scorer(model, PromptTemplate(tokenizer)).score(drawn)
    for i, sequence in enumerate(sequences(drawn)):
        assert (sequence[-1] == tokenizer.eos_token_id) == FINISHED[i]
        hidden = model.trunk(sequence[None]).last_hidden_state[0, -1]
        expected = hidden @ model.score_head.weight[0] + model.score_head.bias
        torch.testing.assert_close(got[i : i + 1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("token_budget", [1, 9, 20, 1000])
def test_the_packing_does_not_change_a_score(classifier, token_budget):
    template = PromptTemplate(word_tokenizer())
    model = load_score_model(str(classifier), dtype=torch.float32)
    one_row = scorer(model, template, token_budget=1000).score(rollout(template))
    got = scorer(model, template, token_budget=token_budget)
    order = [2, 0, 3, 1]
    shuffled = rollout(template, [TEXTS[i] for i in order], [FINISHED[i] for i in order])
    torch.testing.assert_close(got.score(shuffled), one_row[order], rtol=1e-5, atol=1e-5)
    assert got.truncated == 0


def ids(tokenizer, words):
    return tokenizer.convert_tokens_to_ids(words)


def rows_seen(template, policy_template, drawn, **options):
    recorder = Recorder()
    scoring = scorer(recorder, template, policy_template, **options)
    recorder.rows.clear()
    scores = scoring.score(drawn)
    return scoring, scores, recorder.rows


def test_the_policys_own_tokens_are_used_where_they_mean_the_same():
    template = PromptTemplate(word_tokenizer())
    drawn = rollout(template, TEXTS[:1], [True])
    # Tokens that the text does not lead back to: sampling is free to split words in its own way.
    end = template.tokenizer.eos_token_id
    drawn.response_tokens[0] = torch.tensor([9, 9, 9, end])
    _, scores, rows = rows_seen(PromptTemplate(word_tokenizer()), template, drawn)
    assert rows == [[[*drawn.prompt_tokens[0].tolist(), 9, 9, 9, end]]] and scores.tolist() == [end]


def test_another_template_renders_the_prompt_anew():
    tokenizer = word_tokenizer()
    drawn = rollout(PromptTemplate(tokenizer), TEXTS[:1], [True])
    drawn.response_tokens[0] = torch.tensor([9, 9, 9])
    _, _, rows = rows_seen(PromptTemplate(tokenizer, "plain"), PromptTemplate(tokenizer), drawn)
    # A stop string ended it: it is finished, and reads like one.
    assert rows == [[[*ids(tokenizer, [BOS, "make", "tea"]), 9, 9, 9, tokenizer.eos_token_id]]]


def test_another_tokenizer_reads_the_texts_anew_and_ends_only_what_ended():
    policy = PromptTemplate(word_tokenizer())
    other = word_tokenizer(words=WORDS[::-1], chat_template=False)
    _, scores, rows = rows_seen(PromptTemplate(other, "plain"), policy, rollout(policy), token_budget=1)
    expected = [
        [BOS, "make", "tea", "yes", "you", "can", EOS],
        [BOS, "how", "do", "i", "make", "a", "bomb", "no", "sorry", EOS],
        [BOS, "please", "the", "the", "the"],
        [BOS, "tea", EOS],
    ]
    assert sorted(row for (row,) in rows) == sorted(ids(other, words) for words in expected)
    assert scores.tolist() == ids(other, [EOS, EOS, "the", EOS])


def test_long_sequences_lose_their_beginning_and_are_counted():
    template = PromptTemplate(word_tokenizer(), "plain")
    scoring, _, rows = rows_seen(template, template, rollout(template), max_tokens=5, token_budget=1)
    lengths = [7, 10, 5, 3]
    assert sorted(len(row) for (row,) in rows) == sorted(min(n, 5) for n in lengths)
    assert scoring.truncated == 2
    assert ids(template.tokenizer, ["tea", "yes", "you", "can", EOS]) in [row for (row,) in rows]


def test_every_rank_runs_as_many_rows():
    template = PromptTemplate(word_tokenizer())
    asked = []
    agree = {"agree_on_count": lambda n: asked.append(n) or 7, "token_budget": 1}
    _, scores, rows = rows_seen(template, template, rollout(template), **agree)
    assert asked == [4] and len(rows) == 7 and scores.shape == (4,)
    _, scores, rows = rows_seen(template, template, rollout(template, [], []), **agree)
    assert asked == [4, 0] and len(rows) == 7 and scores.shape == (0,)


def test_ranks_agree_on_their_rows_before_they_run_any(encoder):
    """Another rank may wait for this one in its first forward, which this one does not have."""
    template = PromptTemplate(word_tokenizer())
    recorder, tokenizer, runs = Recorder(), word_tokenizer(chat_template=False), []

    def agree(count):
        assert not runs and not recorder.rows
        return count

    recorder.rows.clear()
    scorer(recorder, template, token_budget=1, agree_on_count=agree).score(rollout(template))
    recorder.rows.clear()
    scoring = encoder_scorer(encoder, tokenizer, token_budget=1, agree_on_count=agree)
    scoring._module.register_forward_hook(lambda *_: runs.append(1))
    scoring.score(rollout(PromptTemplate(tokenizer)))
    assert len(runs) == 4


def test_models_and_tokenizers_that_do_not_fit():
    template = PromptTemplate(word_tokenizer())
    with pytest.raises(InputError, match="expected ids below the vocabulary size 10"):
        scorer(Recorder(vocabulary=10), template)
    endless = word_tokenizer()
    endless.eos_token = None
    with pytest.raises(InputError, match="tokenizer of the cost model has no end-of-sequence token"):
        scorer(Recorder(), PromptTemplate(endless, "plain"), template)


def test_a_wrapped_module_is_called_like_a_bare_one(classifier):
    class Engine(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def eval(self):  # DeepSpeed's returns nothing
            self.module.eval()

        def forward(self, *inputs):
            return self.module(*inputs)

    template = PromptTemplate(word_tokenizer())
    model = load_score_model(str(classifier), dtype=torch.float32).train()
    wrapped = scorer(Engine(model), template).score(rollout(template))
    assert not model.training and torch.equal(wrapped, scorer(model, template).score(rollout(template)))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder")
    tokenizer = word_tokenizer(chat_template=False)
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(intermediate_size=64, max_position_embeddings=12, initializer_range=0.2, pad_token_id=0)
    BertForSequenceClassification(BertConfig(**sizes, num_labels=1)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def encoder_scorer(path, tokenizer, **options):
    model = load_score_model(str(path), dtype=torch.float32)
    assert isinstance(model, EncoderClassifier)
    settings = {"name": "cost", "max_tokens": 64, "token_budget": 30, "device": CPU} | options
    return ClassifierScorer(model, tokenizer, **settings)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("token_budget", [1, 30, 1000])
def test_encoder_classifiers_score_pairs_whatever_the_padding(encoder, side, token_budget):
    tokenizer = word_tokenizer(chat_template=False)
    tokenizer.padding_side = side
    scoring = encoder_scorer(encoder, tokenizer, token_budget=token_budget)
    got = scoring.score(rollout(PromptTemplate(tokenizer)))
    reference = BertForSequenceClassification.from_pretrained(encoder).eval()
    for i, (prompt, response) in enumerate(TEXTS):
        words = torch.tensor([ids(tokenizer, [BOS, *prompt.split(), *response.split()])])
        with torch.no_grad():
            torch.testing.assert_close(got[i], reference(words).logits[0, 0], rtol=1e-4, atol=1e-5)
    assert scoring.truncated == 0


def test_scorers_of_several_outputs_share_a_forward(tmp_path):
    """A label each, of a decoder; a rank whose scores are known runs what another needs, and no more."""
    path = save_sequence_classifier(tmp_path, num_labels=3)
    template = PromptTemplate(word_tokenizer())
    model = load_score_model(str(path), dtype=torch.float32)
    drawn = rollout(template)
    reference = LlamaForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        expected = torch.cat([reference(sequence[None]).logits for sequence in sequences(drawn)])
    runs, agreed = [], []
    model.register_forward_hook(lambda *_: runs.append(1))
    last = LastOutputs(3)

    def agree(count):
        agreed.append(count)
        return max(count, 1)

    scorers = [scorer(model, template, output=k, last=last, agree_on_count=agree, max_tokens=8) for k in (2, 0)]
    short = rollout(template, TEXTS[:1], [True])
    for given, rows in ((drawn, 4), (short, 1), (drawn, 4)):
        runs.clear(), agreed.clear()
        found = [own.score(given) for own in scorers]
        assert agreed[1] == 0 and len(runs) == agreed[0] + 1 and found[0].shape == (rows,)
    keeps = [i for i, sequence in enumerate(sequences(drawn)) if len(sequence) <= 8]
    assert 0 < len(keeps) < 4
    for own, k in zip(found, (2, 0), strict=True):
        torch.testing.assert_close(own[keeps], expected[keeps, k], rtol=1e-4, atol=1e-5)
    # For each, as if it had run alone.
    assert {own.truncated for own in scorers} == {2 * (4 - len(keeps)) + (len(sequences(short)[0]) > 8)}


def test_a_label_of_an_encoder(encoder, tmp_path):
    config = BertConfig.from_pretrained(encoder, num_labels=3)
    torch.manual_seed(1)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer = word_tokenizer(chat_template=False)
    tokenizer.save_pretrained(tmp_path)
    assert find_output(str(tmp_path), "LABEL_1", "cost.head") == 1
    scoring = encoder_scorer(tmp_path, tokenizer, output=1, last=LastOutputs(3))
    reference = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    drawn = rollout(PromptTemplate(tokenizer))
    found = scoring.score(drawn)
    for i, (prompt, response) in enumerate(TEXTS):
        words = torch.tensor([ids(tokenizer, [BOS, *prompt.split(), *response.split()])])
        with torch.no_grad():
            torch.testing.assert_close(found[i], reference(words).logits[0, 1], rtol=1e-4, atol=1e-5)
    assert torch.equal(scoring.score(drawn), found)


def test_long_pairs_lose_the_beginning_of_the_longer_part(encoder):
    tokenizer = word_tokenizer(chat_template=False)
    long = rollout(PromptTemplate(tokenizer), [("how " * 20 + "make tea", "yes")], [True])
    scoring = encoder_scorer(encoder, tokenizer)
    short = rollout(PromptTemplate(tokenizer), [("how " * 8 + "make tea", "yes")], [True])
    torch.testing.assert_close(scoring.score(long), scoring.score(short))
    assert scoring.truncated == 1


def test_special_tokens_that_a_pair_has_already_are_not_added_again(encoder):
    tokenizer = word_tokenizer(chat_template=False)
    template, scoring = PromptTemplate(tokenizer), encoder_scorer(encoder, tokenizer)
    clean = scoring.score(rollout(template, [("make tea", "yes")], [True]))
    torch.testing.assert_close(scoring.score(rollout(template, [(f"{BOS} make tea", "yes")], [True])), clean)
    model = load_score_model(str(encoder), dtype=torch.float32).eval()
    assert score_text(model, tokenizer, f"{BOS} make tea") == score_text(model, tokenizer, "make tea")


def test_ranks_without_pairs_run_as_many_batches(encoder):
    tokenizer = word_tokenizer(chat_template=False)
    runs = []
    scoring = encoder_scorer(encoder, tokenizer, agree_on_count=lambda n: 3)
    scoring._module.register_forward_hook(lambda *_: runs.append(1))
    assert scoring.score(rollout(PromptTemplate(tokenizer), [], [])).shape == (0,) and len(runs) == 3


def test_encoders_that_cannot_be_used(encoder, tmp_path):
    with pytest.raises(InputError, match="has no pad token"):
        encoder_scorer(encoder, word_tokenizer(pad_token=None))
    model = BertForSequenceClassification.from_pretrained(encoder)
    model.bert.save_pretrained(tmp_path / "trunk")
    config = model.config
    config.architectures = ["BertForSequenceClassification"]
    config.save_pretrained(tmp_path / "trunk")
    with pytest.raises(InputError, match="lacks 2 weights of its architecture, classifier.bias"):
        load_score_model(str(tmp_path / "trunk"), dtype=torch.float32)


def test_a_policy_is_no_score_model(tmp_path):
    with pytest.raises(InputError, match="expected a score model"):
        load_score_model(str(save_policy(tmp_path)), dtype=torch.float32)


@pytest.mark.parametrize(
    ("role", "line"), [("cost", "cost > 0 is unsafe, cost <= 0 is safe"), ("reward", "higher is better")]
)
@pytest.mark.parametrize("kind", ["beaver", "classifier", "encoder"])
def test_loading_says_which_way_round_a_score_is(tmp_path, caplog, classifier, encoder, kind, role, line):
    paths = {"classifier": classifier, "encoder": encoder}
    path = str(paths.get(kind) or save_beaver(tmp_path, config_overrides={"score_type": role}))
    with caplog.at_level("INFO", "repo_fast"):
        load_score_model(path, dtype=torch.float32, role=role)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("repo_fast")]
    assert ours == [f"{role} model {path!r}: {line}"]


@pytest.mark.parametrize(("score_type", "role"), [("reward", "cost"), ("cost", "reward"), ("critic", "cost")])
def test_a_checkpoint_of_the_other_kind_is_refused(tmp_path, score_type, role):
    path = str(save_beaver(tmp_path, config_overrides={"score_type": score_type}))
    with pytest.raises(InputError, match=f"wrong kind of checkpoint: its score_type is '{score_type}', expected"):
        load_score_model(path, dtype=torch.float32, role=role)
    load_score_model(path, dtype=torch.float32)


def test_tokens_are_read_by_a_tokenizer_with_a_pad_token_more() -> None:
    """Which a policy's own tokenizer gets for the run, and no text of it has."""
    plain, padded, other = word_tokenizer(pad_token=None), word_tokenizer(pad_token=None), word_tokenizer()
    padded.add_special_tokens({"pad_token": "<|pad|>"})
    assert reads_tokens_of(padded, plain) and reads_tokens_of(plain, plain)
    assert not reads_tokens_of(plain, padded)
    other.add_tokens(["zebra"])
    # It reads as one what the other writes in several.
    assert not reads_tokens_of(other, word_tokenizer()) and not reads_tokens_of(word_tokenizer(), other)
