"""Scores of responses: reward (higher is better) and cost (above the threshold is unsafe).

A score comes from a Python callable (`FunctionScorer`), from a decoder with a scalar head scored packed
(`ModelScorer`), from an encoder-type classifier scored in padded batches (`ClassifierScorer`), from what a guard model
is about to say (`GuardScorer`), or from a judge behind an endpoint (`JudgedScorer`).
"""

from repo_fast.scoring.base import Scorer, ScorerSpec, finite_scores, load_scorer_spec
from repo_fast.scoring.early import EarlyScores
from repo_fast.scoring.expectation import check_expected_score, score_text
from repo_fast.scoring.function_texts import function_texts
from repo_fast.scoring.functions import FunctionScorer
from repo_fast.scoring.guards import Guard, GuardScorer
from repo_fast.scoring.judged import JudgedScorer
from repo_fast.scoring.score_models import (
    ClassifierScorer,
    EncoderClassifier,
    LastOutputs,
    ModelScorer,
    load_line,
    load_score_model,
)

__all__ = [
    "ClassifierScorer",
    "EarlyScores",
    "EncoderClassifier",
    "FunctionScorer",
    "Guard",
    "GuardScorer",
    "JudgedScorer",
    "LastOutputs",
    "ModelScorer",
    "Scorer",
    "ScorerSpec",
    "check_expected_score",
    "finite_scores",
    "function_texts",
    "load_line",
    "load_score_model",
    "load_scorer_spec",
    "score_text",
]
