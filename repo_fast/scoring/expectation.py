"""Checks a score model against a score that somebody knows: the cheapest proof that it is read the right way round."""

import math
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from repo_fast.data import encode_whole, load_tokenizer
from repo_fast.errors import InputError
from repo_fast.models.adapters import is_adapter, read_adapter
from repo_fast.models.model_config import load_config
from repo_fast.models.score_checkpoint import find_output, output_names
from repo_fast.scoring.score_models import EncoderClassifier, Role, load_line, load_score_model

# Of the expected score, or of 1 where that is smaller: room for another precision, not for another template.
TOLERANCE = 0.05


@torch.no_grad()
def score_text(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, text: str, device: torch.device | str = "cpu", output: int = 0
) -> float:
    """The score of one text at its last token.

    Args:
        model: A `ScoreModel` or an `EncoderClassifier`, or an engine around one; in evaluation mode.
        tokenizer: The model's. It adds the special tokens that it adds by itself and the text has not got yet.
        text: Prompt and response, rendered as the model wants them, such as `apply_chat_template` does.
        device: Where the model is.
        output: Which of the model's outputs is the score.

    Raises:
        InputError: The text has no tokens, or more than the model reads.
    """
    inner: Any = getattr(model, "module", model)
    ids = torch.tensor([encode_whole(tokenizer, text)], dtype=torch.int64, device=device)
    length = ids.shape[1]
    is_encoder = isinstance(inner, EncoderClassifier)
    config = (inner.classifier if is_encoder else inner.trunk).config
    limit = getattr(config, "max_position_embeddings", None) or length
    if not 0 < length <= limit:
        raise InputError(f"the text {text[:60]!r} has {length} tokens, expected 1 to {limit}")
    if is_encoder:
        outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    else:
        last = torch.tensor([length - 1], device=device)
        outputs = model(ids, torch.arange(length, device=device)[None], last)
    return float(outputs.flatten()[output])


def check_expected_score(score_of: Callable[[str], float], text: str, expected: float, name: str) -> None:
    """Compare a score with the one it should be, within 5 % of it, or 0.05 where it is below 1.

    Args:
        score_of: Scores a text.
        text: The text whose score is known.
        expected: Its score.
        name: Of the model, for the message.

    Raises:
        InputError: It is another one; the message says so where the sign alone is.
    """
    if not math.isfinite(expected):
        raise InputError(f"the expected score is {expected}, expected a finite number")
    score = score_of(text)
    tolerance = TOLERANCE * max(1.0, abs(expected))
    # Not the other way round: NaN compares false.
    if abs(score - expected) <= tolerance:
        return
    inverted = abs(score + expected) <= tolerance
    raise InputError(
        f"{name} gives the text {text[:60]!r} the score {score:.6g}, expected {expected:.6g} within {tolerance:.3g}"
        + (": its sign looks inverted" if inverted else "")
    )


def check_folder(path: str, role: Role | None, expect: tuple[str, float] | None, head: str | None = None) -> str:
    """Load a score model, on the CPU in float32, and check it; adapters beside their base in 4 bits, if trained so.

    Args:
        path: Folder or hub name.
        role: What its score is used as; None: what the folder says.
        expect: A whole text, template included, and its known score; None: loading is the check.
        head: Of a model with several outputs, the name of the one that is the score.

    Returns:
        What it is and, with `expect`, its score, for the user.

    Raises:
        InputError: It cannot be loaded, is of another kind, has no such head, or gives another score.
    """
    role = role or getattr(load_config(path), "score_type", None)
    if role not in get_args(Role):
        raise InputError(f"{path!r} does not say what its score means, expected --kind reward or --kind cost")
    names = output_names(path)
    # Several without a word on one of them are fine where nothing is compared.
    output = 0 if head is None and expect is None else find_output(path, head, "--head")
    quantize = read_adapter(path).quantize if is_adapter(path) else None
    model = load_score_model(path, dtype=torch.float32, quantize=quantize).eval()
    said = load_line(path, role) + (f"; its base in 4 bits ({quantize})" if quantize is not None else "")
    if len(names) > 1:
        said += f"; heads {', '.join(names)}"
    if expect is None:
        return said
    tokenizer = load_tokenizer(path, must_end=not isinstance(model, EncoderClassifier))
    scores: list[float] = []

    def score_of(text: str) -> float:
        scores.append(score_text(model, tokenizer, text, output=output))
        return scores[-1]

    check_expected_score(score_of, *expect, name=role)
    return f"{said}\nscore {scores[0]:.4f}, as expected ({expect[1]:g})"
