"""Prompts, demonstrations and preferences: reading them, rendering them into tokens, drawing batches of them."""

from repo_fast.data.columns import Columns
from repo_fast.data.dialogue import Dialogue
from repo_fast.data.heads import HeadTarget
from repo_fast.data.preferences import Candidate, Preference, load_preferences
from repo_fast.data.readers import Demonstration, Prompt, load_demonstrations, load_prompts
from repo_fast.data.sampler import PromptSampler
from repo_fast.data.templates import PromptTemplate, encode_whole, load_tokenizer, tokenize_prompts

__all__ = [
    "Candidate",
    "Columns",
    "Demonstration",
    "Dialogue",
    "HeadTarget",
    "Preference",
    "Prompt",
    "PromptSampler",
    "PromptTemplate",
    "encode_whole",
    "load_demonstrations",
    "load_preferences",
    "load_prompts",
    "load_tokenizer",
    "tokenize_prompts",
]
