"""Rollouts by Hugging Face `generate`: the embedded default, which needs no other engine.

Each rank generates its own responses with the whole weights gathered once (`engine.Engine.gathered`), without any
collective inside, so ranks that finish at different times only meet afterwards. Prompts are batched by length to keep
padding small. Every generation setting of the model folder is set aside, except which tokens end a response: a
repetition penalty or a top-k from there would sample from another distribution than the one being trained.

The tokens are drawn here (`_Draw`): `torch.multinomial` has one random state for all rows of a batch, and makes a
random number for every token of the vocabulary, which took two fifths of all of `generate` on two CPU cores, for 32
responses at a vocabulary of 32,001. A static cache, without compilation, was measured no faster than one that grows.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from repo_fast.collectives import Ranks
from repo_fast.config import SamplingConfig
from repo_fast.data.chat import end_of_turn
from repo_fast.errors import InputError, first_line
from repo_fast.models.model_config import load_config
from repo_fast.models.vocabulary import never_drawn
from repo_fast.models.weight_files import find_file
from repo_fast.rollout import Finished, Request, Rollout
from repo_fast.rollout.hand_over import TOLERANCE

if TYPE_CHECKING:
    from repo_fast.engine import Engine


# Set on a model that was found to generate from what it is trained to give.
_CHECKED = "generation_checked"


class HfSampler:
    """A `Sampler` that is the policy itself.

    Args:
        tokenizer: The policy's.
        config: Temperature, top-p, lengths, stop strings, batch size.
        ranks: This process among all.
        pad_is_new: Whether the pad token was added for this run, and must not be drawn.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: SamplingConfig, ranks: Ranks, *, pad_is_new: bool
    ) -> None:
        self._tokenizer, self._config, self._ranks, self._pad_is_new = tokenizer, config, ranks, pad_is_new

    def draw(
        self, policy: "Engine", requests: Sequence[Request], seeds: Sequence[int], finished: Finished | None = None
    ) -> Rollout:
        with policy.gathered() as module, self._ranks.together("generation"):
            model = module.model
            ends = end_tokens(model.generation_config, self._tokenizer)
            never = never_drawn(model.config.vocab_size, self._tokenizer, ends, pad=self._pad_is_new)
            return generate(model, self._tokenizer, requests, seeds, self._config, self._ranks.device, never, finished)

    def close(self) -> None:
        """Nothing to do."""


class _Draw(LogitsProcessor):
    """Draws each row's token from the final scores, and gives it the largest: `generate` then takes that one.

    By inversion: one uniform number a row, against the running sum of the probabilities. In float64, in which neither
    the sum nor the number rounds away what the rarest token has.

    Args:
        uniform: Of each row's tokens in turn, float64 [B, tokens at most] in [0, 1).

    Attributes:
        log_probs: Of the drawn tokens, float32 [B] each.
    """

    def __init__(self, uniform: torch.Tensor) -> None:
        self._uniform = uniform
        self.log_probs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        log_probs = scores.log_softmax(-1)
        token = draw(log_probs.exp(), self._uniform[:, len(self.log_probs), None])
        self.log_probs.append(log_probs.gather(1, token)[:, 0])
        return scores.scatter(1, token, torch.inf)


def uniform_numbers(seeds: Sequence[int], count: int) -> torch.Tensor:
    """Random numbers in [0, 1), a row for each seed, float64 [seeds, count]: on the CPU, so the same on any device."""
    numbers = torch.empty(len(seeds), count, dtype=torch.float64)
    generator = torch.Generator()
    for row, seed in zip(numbers, seeds, strict=True):
        row.uniform_(generator=generator.manual_seed(seed))
    return numbers


def draw(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """One token a row.

    Args:
        probabilities: [B, V], or what is proportional to them.
        uniform: Random numbers in [0, 1), float64 [B, 1].

    Returns:
        int64 [B, 1]; never a token of probability 0.
    """
    sums = probabilities.cumsum(-1, dtype=torch.float64)
    total = sums[:, -1:]
    # A product that rounds up to the total would be above every sum.
    where = (uniform * total).minimum(total.nextafter(torch.zeros_like(total)))
    # Beyond the last only where there is a NaN, which the log-probability will be too.
    return torch.searchsorted(sums, where, right=True).clamp(max=sums.shape[-1] - 1)


class _StopStrings(StoppingCriteria):
    """Ends a row with the token that completes one of the strings, and keeps where that was.

    transformers has one too, which fails for some tokenizers, and does not say where it stopped: looking that up
    afterwards can give another answer. The text looked at has special tokens in it, since they may be meant.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], prompt_length: int, rows: int
    ) -> None:
        self.tokenizer, self.strings, self.prompt_length = tokenizer, strings, prompt_length
        self.lengths: list[int | None] = [None] * rows
        # A token is at least a byte; a few more, as decoders may trim the first.
        self._window = max(len(string.encode()) for string in strings) + 4

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        length = input_ids.shape[1] - self.prompt_length
        for row, tail in enumerate(input_ids[:, self.prompt_length :][:, -self._window :].tolist()):
            if self.lengths[row] is None:
                text = self.tokenizer.decode(tail, skip_special_tokens=False)
                if any(string in text for string in self.strings):
                    self.lengths[row] = length
        return torch.tensor([ended is not None for ended in self.lengths], device=input_ids.device)


def end_tokens(settings: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response: the model folder's, the tokenizer's, and the one that ends a turn of its chat
    template, which fine-tuning teaches.

    Raises:
        InputError: There is none.
    """
    tokens = _listed(settings) | {tokenizer.eos_token_id, end_of_turn(tokenizer)} - {None}
    if not tokens:
        raise InputError(
            "the policy's tokenizer has no eos_token and its generation_config no eos_token_id, expected one"
        )
    return sorted(tokens)


def generation_settings(path: str) -> GenerationConfig:
    """Those of a model's folder or hub name; without a file of them, what its configuration says."""
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError as error:
        # One that cannot be read is no other than one that is not there, to transformers.
        if find_file(path, "generation_config.json") is not None:
            raise InputError(f"{path!r} has a generation_config.json that cannot be: {first_line(error)}") from error
        return GenerationConfig.from_model_config(load_config(path))
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path!r} has a generation_config.json that cannot be: {first_line(error)}") from error


def stop_alike(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let plain transformers stop where rollouts do: in this model's own settings, which are saved with it."""
    settings = model.generation_config
    tokens = end_tokens(settings, tokenizer)
    if _listed(settings) != set(tokens):
        settings.eos_token_id = tokens if len(tokens) > 1 else tokens[0]


def _listed(settings: GenerationConfig) -> set[int]:
    listed = settings.eos_token_id
    tokens = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if not all(type(token) is int for token in tokens):
        raise InputError(f"the policy's eos_token_id is {listed!r}, expected a token's id, or a list of them")
    # -1 stands for none.
    return {token for token in tokens if token >= 0}


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    seeds: Sequence[int],
    config: SamplingConfig,
    device: torch.device,
    never_drawn: Sequence[int] = (),
    announce: Finished | None = None,
) -> Rollout:
    """Draw one response for each request.

    Args:
        model: A Hugging Face causal language model with whole parameters.
        tokenizer: Its tokenizer.
        requests: In the order wanted; may be empty.
        seeds: Of each response, below 2^32.
        config: Temperature, top-p, lengths, stop strings, batch size.
        device: Where the model is.
        never_drawn: Ids that a response must not contain, such as rows of a padded vocabulary.
        announce: Called with the responses of each batch.
    """
    ends = end_tokens(model.generation_config, tokenizer)
    # Fills up finished rows of a batch; the response is cut before it, so any token will do, also an end token.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    settings = GenerationConfig(
        # `_Draw` does.
        do_sample=False,
        max_new_tokens=config.max_new_tokens,
        eos_token_id=ends,
        pad_token_id=pad,
        suppress_tokens=list(never_drawn) or None,
    )
    order = sorted(range(len(requests)), key=lambda index: requests[index].tokens.numel())
    responses: dict[int, torch.Tensor] = {}
    texts: dict[int, str] = {}
    log_probs: dict[int, torch.Tensor] = {}
    finished: dict[int, bool] = {}
    computed_positions = 0
    own_settings, was_training = model.generation_config, model.training
    model.generation_config = settings
    model.eval()
    try:
        if requests:
            check_generation(model, pad, device, config.batch_size)
        for start in range(0, len(order), config.batch_size):
            indices = order[start : start + config.batch_size]
            uniform = uniform_numbers([seeds[i] for i in indices], config.max_new_tokens).to(device)
            drawn, recorded, stopped = _generate_batch(
                model, tokenizer, [requests[i].tokens for i in indices], uniform, config, device, pad
            )
            computed_positions += len(indices) * (max(requests[i].tokens.numel() for i in indices) + drawn.shape[1])
            for row, index in enumerate(indices):
                length, finished[index] = _response_length(drawn[row], ends, stopped[row])
                responses[index], log_probs[index] = drawn[row, :length], recorded[row, :length]
                texts[index] = tokenizer.decode(responses[index], skip_special_tokens=True)
            if announce is not None:
                announce(indices, [texts[index] for index in indices])
    finally:
        model.generation_config = own_settings
        model.train(was_training)
    return Rollout(
        prompt_ids=torch.tensor([request.prompt.id for request in requests], dtype=torch.int64),
        prompts=[request.prompt.text for request in requests],
        responses=[texts[i] for i in range(len(requests))],
        prompt_tokens=[request.tokens for request in requests],
        response_tokens=[responses[i] for i in range(len(requests))],
        finished=torch.tensor([finished[i] for i in range(len(requests))], dtype=torch.bool),
        sampler_log_probs=[log_probs[i] for i in range(len(requests))],
        dialogues=[request.prompt.asked for request in requests],
        computed_positions=computed_positions,
    )


@torch.no_grad()
def check_generation(model: nn.Module, pad: int, device: torch.device, batch_size: int) -> None:
    """Make sure, once for a model, that it gives its tokens the same probabilities as it generates, in a batch behind
    padding and with a cache, as alone and without, which is how it is trained. Draws nothing at random.

    Args:
        model: In evaluation mode, with whole parameters.
        pad: The token that stands before shorter prompts.
        device: Where it is.
        batch_size: How many responses are drawn at once; 1 needs no padding.

    Raises:
        InputError: They differ by more than rounding does. Some recurrent states take padding in, or those of others.
            Or transformers has an error there of its own.
    """
    if getattr(model, _CHECKED, False):
        return
    input_ids = torch.tensor([[pad, pad, pad, 1, 0], [0, 1, 2, 3, 1]], device=device)
    if batch_size == 1:
        input_ids[0, :3] = 2
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :3] = batch_size == 1
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=3, pad_token_id=pad, output_logits=True, return_dict_in_generate=True
    )
    gaps = []
    for batch in ([0], [1]) if batch_size == 1 else ([0, 1],):
        try:
            rows = model.generate(
                input_ids=input_ids[batch], attention_mask=attention_mask[batch], generation_config=settings
            )
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise InputError(
                f"the policy ({type(model).__name__}) cannot generate by transformers {transformers.__version__}: "
                f"{first_line(error)}; choose another architecture, or another version"
            ) from error
        starts = (attention_mask[batch] == 0).sum(1).tolist()
        gaps += [gap for row, start in enumerate(starts) for gap in _gaps_to_alone(model, rows, row, start)]
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    tolerance, gap = TOLERANCE.get(dtype, max(TOLERANCE.values())), sum(gaps) / len(gaps)
    if not math.isfinite(gap):
        raise InputError(
            f"the policy ({type(model).__name__} of {model.config.name_or_path!r}) gives logits that are not finite, "
            "expected numbers: look at its weights"
        )
    if gap > tolerance:
        how, instead = ("alone", "another architecture") if batch_size == 1 else ("in a batch", "a batch size of 1")
        raise InputError(
            f"the policy ({type(model).__name__}) generates {how} from other probabilities than it is trained to give: "
            f"they differ by {gap:.3g} nats on average, expected at most {tolerance:g}; choose {instead}"
        )
    setattr(model, _CHECKED, True)


def _gaps_to_alone(model: nn.Module, rows: Any, row: int, start: int) -> list[float]:
    """Of each token that was generated in a row, which begins at `start`: between its two log-probabilities (nats)."""
    sequence, together = rows.sequences[row, start:], [logits[row] for logits in rows.logits]
    alone = model(input_ids=sequence[None], use_cache=False).logits[0, -len(together) - 1 : -1]
    pairs = zip(sequence[-len(together) :], together, alone, strict=True)
    return [abs(float(a.float().log_softmax(-1)[t] - b.float().log_softmax(-1)[t])) for t, a, b in pairs]


def _generate_batch(
    model, tokenizer, prompts: list[torch.Tensor], uniform: torch.Tensor, config: SamplingConfig, device, pad: int
):
    """Left-padded generation.

    Returns:
        New tokens and their log-probabilities, int64 and float32 [B, new], CPU; and for each row the tokens up to the
        end of a stop string, None without one.
    """
    longest = max(prompt.numel() for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), pad)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - prompt.numel() :] = prompt
        attention_mask[row, longest - prompt.numel() :] = 1
    sampling = _Draw(uniform)
    warpers = LogitsProcessorList()
    if config.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(config.temperature))
    if config.top_p < 1.0:
        warpers.append(TopPLogitsWarper(config.top_p))
    stops = [_StopStrings(tokenizer, config.stop, longest, len(prompts))] if config.stop else []
    with torch.no_grad():
        output = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            generation_config=model.generation_config,
            logits_processor=LogitsProcessorList([*warpers, sampling]),
            stopping_criteria=StoppingCriteriaList(stops),
            synced_gpus=False,
        )
    log_probs = torch.stack(sampling.log_probs, dim=1).cpu()
    if not log_probs.isfinite().all():
        raise RuntimeError("the policy gives scores that are not finite: no token can be drawn from them")
    stopped = stops[0].lengths if stops else [None] * len(prompts)
    return output[:, longest:].cpu(), log_probs, stopped


def _response_length(tokens: torch.Tensor, ends: list[int], stopped: int | None) -> tuple[int, bool]:
    """Tokens up to and with the first end token or the end of a stop string, and whether there is either."""
    at_end = torch.isin(tokens, torch.tensor(ends)).nonzero()
    found = [int(at_end[0]) + 1] if at_end.numel() else []
    if stopped is not None:
        found.append(stopped)
    return (min(found), True) if found else (tokens.numel(), False)
