"""Scores from models: decoders with a scalar head, packed, and encoder-type classifiers, padded.

What a decoder reads of a response is what `repo_fast.data.templates` makes of the dialogue, the same as where score
models are trained and checked, and the score is read at its last token. So a response that ended by itself is
followed by all that the template writes there; to one that was cut at the length limit nothing is appended, which
would claim it had ended. Sequences are never padded before a decoder sees them, so neither the side of the padding
nor a pad token that equals another one can move that place.

The response's own tokens are kept where the model's tokenizer is the policy's, unless the policy's template alone has
it write something around its answers; else its text is tokenised anew. A sequence above the limit loses its beginning,
and is counted: the response is what is to be judged.
"""

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from repo_fast.data.templates import PromptTemplate, without_added
from repo_fast.errors import InputError
from repo_fast.models.attention import MASKED
from repo_fast.models.model_config import load_config
from repo_fast.models.on_paper import position_limit
from repo_fast.models.policy import check_vocabulary
from repo_fast.models.score_checkpoint import LAYOUTS
from repo_fast.models.score_model import ScoreModel
from repo_fast.models.trunk import load_transformer
from repo_fast.models.weight_files import Checkpoint
from repo_fast.packing.balance import split_by_tokens
from repo_fast.packing.rows import pack_whole
from repo_fast.rollout import Rollout
from repo_fast.speed.flops import Shape, forward_work

Role = Literal["reward", "cost"]

_log = logging.getLogger(__name__)


def _alone(count: int) -> int:
    return count


def _unwrapped(module: nn.Module) -> Any:
    """The model inside an engine."""
    return getattr(module, "module", module)


class LastOutputs:
    """All outputs of a model for the last rollout, so that further scorers need no forward for theirs.

    Args:
        count: K, how many the model has.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self._of: weakref.ref[Rollout] | None = None
        self._outputs = torch.zeros(0, count)
        self.truncated = 0

    def known(self, rollout: Rollout) -> bool:
        """Whether they are this rollout's, the very same object."""
        return self._of is not None and self._of() is rollout

    def keep(self, rollout: Rollout, outputs: torch.Tensor, truncated: int) -> None:
        """Take them, float32 [S, K] on the CPU, in place of the last, and how many texts were cut for them."""
        self._of, self._outputs, self.truncated = weakref.ref(rollout), outputs, truncated

    def read(self, output: int) -> torch.Tensor:
        """One of them: float32 [S]."""
        return self._outputs[:, output].clone()


class ModelScorer:
    """Scores with a `ScoreModel`, in packed rows.

    Args:
        module: A `ScoreModel`, or an engine around one. It is put into evaluation mode.
        template: The score model's tokenizer and template.
        policy_template: The policy's, which the rollouts' tokens are of.
        name: `reward` or `cost`, for messages.
        max_tokens: Longest sequence the model is given (tokens), where it has positions for as many.
        token_budget: Largest row (tokens). A longer sequence gets one of its own.
        device: Where the rows go.
        agree_on_count: Maps this rank's number of rows to the largest of all ranks, each of which then runs as many:
            under ZeRO-3 a forward is a collective. The default is right for a single rank.
        output: Which of the model's outputs is the score.
        last: Shared by the scorers that read outputs of the same model in the same way; None: the model has one output.

    Attributes:
        truncated: Sequences that lost their beginning so far.

    Raises:
        InputError: The tokenizer does not fit the model.
    """

    def __init__(
        self,
        module: nn.Module,
        template: PromptTemplate,
        policy_template: PromptTemplate,
        *,
        name: str,
        max_tokens: int,
        token_budget: int,
        device: torch.device,
        agree_on_count: Callable[[int], int] = _alone,
        output: int = 0,
        last: LastOutputs | None = None,
    ) -> None:
        self.name, self.truncated = name, 0
        self._output, self._last = output, last or LastOutputs()
        module.eval()
        self._module, self._template, self._device = module, template, device
        self._max_tokens = min(max_tokens, position_limit(_unwrapped(module).trunk) or max_tokens)
        self._token_budget, self._agree_on_count = token_budget, agree_on_count
        self._shape = Shape.of(_unwrapped(module).trunk)
        reads_alike = reads_tokens_of(template.tokenizer, policy_template.tokenizer)
        self._keeps_prompt = reads_alike and template.renders_like(policy_template)
        self._keeps_response = reads_alike and (self._keeps_prompt or not policy_template.surrounds_answers)
        self._policy_template = policy_template
        tokenizer = template.tokenizer
        # Checked here rather than when it is first needed: a rank that failed alone would leave the others waiting.
        if template.name != "chat" and tokenizer.eos_token_id is None:
            raise InputError(f"the tokenizer of the {name} model has no end-of-sequence token")
        template.check_finished()
        check_vocabulary(tokenizer.name_or_path, _unwrapped(module).trunk.config.vocab_size, tokenizer)

    @torch.no_grad()
    def score(self, rollout: Rollout) -> torch.Tensor:
        """The model's score of each response.

        Every rank must call it, a rank without responses too.

        Args:
            rollout: A rank's S responses.

        Returns:
            float32 [S], CPU. What the model says, also when that is not finite.
        """
        known = self._last.known(rollout)
        sequences = [] if known else list(self._sequences(rollout))
        truncated = sum(len(sequence) > self._max_tokens for sequence in sequences)
        sequences = [sequence[-self._max_tokens :] for sequence in sequences]
        outputs = torch.zeros(len(sequences), self._last.count)
        lengths = [len(sequence) for sequence in sequences]
        rows = split_by_tokens(lengths, self._token_budget, [forward_work(self._shape, [length]) for length in lengths])
        # First, or a rank with fewer would wait here while another waits for it in a forward. Also where all is known:
        # another rank may have been given a part of its rollout, of which nothing is.
        count = self._agree_on_count(len(rows))
        for row in rows:
            outputs[row] = self._forward([sequences[i] for i in row])
        for _ in range(count - len(rows)):
            self._forward([torch.zeros(1, dtype=torch.int64)])
        if not known:
            self._last.keep(rollout, outputs, truncated)
        self.truncated += self._last.truncated
        return self._last.read(self._output)

    def _sequences(self, rollout: Rollout) -> Iterator[torch.Tensor]:
        for i in range(len(rollout.prompts)):
            asked, finished = rollout.asked(i), bool(rollout.finished[i])
            if self._keeps_response:
                tokens = self._template.encode_drawn(
                    asked,
                    rollout.response_tokens[i].tolist(),
                    finished=finished,
                    end_tokens=self._policy_template.end_tokens,
                    prompt_tokens=rollout.prompt_tokens[i].tolist() if self._keeps_prompt else None,
                )
            else:
                answer = self._policy_template.answer_of(rollout.responses[i], finished=finished)
                tokens = self._template.encode_dialogue(asked, answer, finished=finished)
            yield torch.tensor(tokens, dtype=torch.int64)

    def _forward(self, row: Sequence[torch.Tensor]) -> torch.Tensor:
        return self._module(*pack_whole(row, self._device)).cpu().reshape(len(row), -1)


class EncoderClassifier(nn.Module):
    """An encoder-type Hugging Face classifier (BERT and the like), of which a logit is the score.

    Args:
        classifier: As `AutoModelForSequenceClassification` loads it.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    @classmethod
    def from_pretrained(cls, path: str, *, dtype: torch.dtype, quantize: str | None = None) -> "EncoderClassifier":
        """Loads a classifier.

        Args:
            path: Folder or hub name.
            dtype: Of weights and activations. The score is float32 in any case.
            quantize: As for `load_transformer`.

        Raises:
            InputError: The folder cannot be read, or lacks a weight.
        """
        kind = AutoModelForSequenceClassification
        return cls(load_transformer(kind, path, "a classifier", dtype=dtype, quantize=quantize))

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """The scores, float32 [B], with several labels [B, K], of a padded batch as the tokenizer makes it."""
        logits = self.classifier(**inputs).logits.float()
        return logits[:, 0] if logits.shape[1] == 1 else logits


class ClassifierScorer:
    """Scores with an encoder-type classifier, in padded batches.

    The classifier reads the pair (prompt, response) as its own tokenizer joins them, without a template, which is how
    such reward models are trained. A pair above the limit loses the beginning of its longer part, and is counted.

    Args:
        module: An `EncoderClassifier`, or an engine around one. It is put into evaluation mode.
        tokenizer: The classifier's.
        name: `reward` or `cost`, for messages.
        max_tokens: Longest pair the classifier is given (tokens).
        token_budget: Largest batch, padding included (tokens).
        device: Where the batches go.
        agree_on_count, output, last: As for `ModelScorer`.

    Attributes:
        truncated: Pairs that lost a beginning so far.

    Raises:
        InputError: The tokenizer has no pad token, or does not fit the model.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        max_tokens: int,
        token_budget: int,
        device: torch.device,
        agree_on_count: Callable[[int], int] = _alone,
        output: int = 0,
        last: LastOutputs | None = None,
    ) -> None:
        if tokenizer.pad_token_id is None:
            raise InputError(f"the tokenizer of the {name} model has no pad token")
        self.name, self.truncated = name, 0
        self._output, self._last = output, last or LastOutputs()
        module.eval()
        self._module, self._tokenizer, self._device = module, tokenizer, device
        config = _unwrapped(module).classifier.config
        model_limit = position_limit(_unwrapped(module).classifier) or max_tokens
        self._max_tokens = min(max_tokens, tokenizer.model_max_length, model_limit)
        self._token_budget, self._agree_on_count = token_budget, agree_on_count
        tokenizer.truncation_side = "left"
        check_vocabulary(tokenizer.name_or_path, config.vocab_size, tokenizer)

    @torch.no_grad()
    def score(self, rollout: Rollout) -> torch.Tensor:
        """The classifier's score of each response, as `ModelScorer.score`."""
        known = self._last.known(rollout)
        texts = () if known else zip(rollout.prompts, rollout.responses, strict=True)
        pairs = [without_added(self._tokenizer, prompt, response) for prompt, response in texts]
        lengths = [len(self._tokenizer(*pair)["input_ids"]) for pair in pairs]
        truncated = sum(length > self._max_tokens for length in lengths)
        # Neighbours in length share a batch, so that little of it is padding.
        order = sorted(range(len(pairs)), key=lambda i: lengths[i])
        batches: list[list[int]] = []
        for i in order:
            length = min(lengths[i], self._max_tokens)
            if not batches or (len(batches[-1]) + 1) * length > self._token_budget:
                batches.append([])
            batches[-1].append(i)
        outputs = torch.zeros(len(pairs), self._last.count)
        # First, as there.
        count = self._agree_on_count(len(batches))
        for batch in batches:
            outputs[batch] = self._forward([pairs[i] for i in batch])
        for _ in range(count - len(batches)):
            self._forward([("", "")])
        if not known:
            self._last.keep(rollout, outputs, truncated)
        self.truncated += self._last.truncated
        return self._last.read(self._output)

    def _forward(self, pairs: Sequence[tuple[str, str]]) -> torch.Tensor:
        prompts, responses = (list(texts) for texts in zip(*pairs, strict=True))
        # On the right whatever the tokenizer prefers: encoders count positions from the first token, pad or not.
        inputs = self._tokenizer(
            prompts,
            responses,
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=self._max_tokens,
            return_tensors="pt",
        )
        return self._module(**inputs.to(self._device)).cpu().reshape(len(pairs), -1)


def load_score_model(
    path: str,
    *,
    dtype: torch.dtype,
    attention: str | Sequence[str] = MASKED,
    role: Role | None = None,
    quantize: str | None = None,
    merge: bool = True,
) -> ScoreModel | EncoderClassifier:
    """Loads a score model of either type: a classifier without `score.weight` is an encoder's.

    Args:
        path: Folder or hub name.
        dtype: Of weights and activations.
        attention: Name of a transformers attention implementation, or several, for decoders: the first that can run.
        role: What the score is used as; a line then says which way round it is. None for a model that is only a start,
            such as a critic's.
        quantize, merge: As for `ScoreModel.from_pretrained`.

    Raises:
        InputError: As `ScoreModel.from_pretrained`, or the checkpoint says that it is of another kind.
    """
    if role is not None:
        _log.info(load_line(path, role))
    if is_encoder(path):
        return EncoderClassifier.from_pretrained(path, dtype=dtype, quantize=quantize)
    return ScoreModel.from_pretrained(path, dtype=dtype, attention=attention, quantize=quantize, merge=merge)


def is_encoder(path: str) -> bool:
    """Whether a folder holds a classifier of an encoder: its head has other names than a decoder's."""
    config = load_config(path)
    is_classifier = (config.architectures or [""])[0].endswith("ForSequenceClassification")
    # What a language model can be made of is a decoder, unless it says that it is none.
    is_decoder = type(config) in AutoModelForCausalLM._model_mapping and getattr(config, "is_decoder", True)
    head = f"{LAYOUTS['sequence-classification'].head}.weight"
    return is_classifier and not is_decoder and head not in Checkpoint(path).files


def load_line(path: str, role: Role) -> str:
    """Which way round a score model is read, in one line for the user.

    Args:
        path: Folder or hub name.
        role: What its score is used as.

    Raises:
        InputError: The checkpoint says that it is of another kind.
    """
    score_type = getattr(load_config(path), "score_type", None)
    if score_type not in (None, role):
        raise InputError(
            f"{path!r} is the wrong kind of checkpoint: its score_type is {score_type!r}, expected {role!r} for the "
            f"{role} model"
        )
    meaning = {"cost": "cost > 0 is unsafe, cost <= 0 is safe", "reward": "higher is better"}[role]
    return f"{role} model {path!r}: {meaning}"


def reads_tokens_of(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether token ids mean the same to both; but `one` may have a pad token more, which no text has.

    Any other token more would be read in texts that `other` writes in several. Which of them ends a response is left to
    each one's template.
    """
    theirs = other.get_vocab()
    return theirs == {token: i for token, i in one.get_vocab().items() if token in theirs or token != one.pad_token}
