"""Prompts and demonstrations: reading them, rendering them into tokens, drawing batches of them."""

from repo_fast.data.readers import Demonstration, Prompt, load_demonstrations, load_prompts
from repo_fast.data.sampler import PromptSampler
from repo_fast.data.templates import PromptTemplate, tokenize_prompts

__all__ = [
    "Demonstration",
    "Prompt",
    "PromptSampler",
    "PromptTemplate",
    "load_demonstrations",
    "load_prompts",
    "tokenize_prompts",
]
