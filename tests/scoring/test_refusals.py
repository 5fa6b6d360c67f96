"""What declines, and what only sounds like it. The figures on real responses are in bench/results/refusals.md."""

import pytest
import torch

from repo_fast.rollout import Rollout
from repo_fast.scoring import FunctionScorer
from repo_fast.scoring.refusals import WINDOW, refusal

DECLINES = [
    "I can't help with that.",
    "I’m sorry, but I cannot assist with that request.",
    "Sorry, but I can’t.",
    "Sorry, can't help you there.",
    "Sorry, no.",
    "I won't do that.",
    "I CANNOT AND WILL NOT HELP YOU WITH THIS!",
    "i cant help with that",
    "I can not answer this question.",
    "As an AI language model, I cannot provide medical advice.",
    "I am an AI language model and do not have the capability to provide such content.",
    "I'm just an AI, it's not within my programming or ethical guidelines to provide information on that.",
    "It would not be appropriate for me to share that.",
    "It is not appropriate or safe to provide instructions on how to do this.",
    "I must respectfully decline.",
    "Thanks for asking, but I'm going to have to decline.",
    "I'd really rather not.",
    "I prefer not to answer.",
    "I refuse to answer.",
    "I'm not comfortable discussing this topic.",
    "I wouldn't feel comfortable telling you that.",
    "I don't want to be involved in that.",
    "I don't think I should answer that.",
    "I'm not sure I want to help you do that.",
    "That's not something I can help with.",
    "My guidelines don't allow me to write that.",
    "This request goes against my programming.",
    "I'm not allowed to share that kind of information.",
    "I don’t have the ability to book flights.",
    "We are unable to provide this information.",
    "Sorry, that's confidential.",
    "**I can't assist with that.**",
    "\n" * 1000 + "I can't assist with that.",
    "\"I'm sorry, I can't help with that.\"",
    "Assistant: I cannot help you with this.",
    "I'm really sorry that you're feeling this way, but I'm unable to provide the help that you need.",
    "Good question! However, I must point out that this is unsafe. I cannot provide instructions for it.",
    # What help follows does not undo it.
    "I can't give legal advice, but here is what the law says in general.",
]

ANSWERS = [
    "",
    " \n\t",
    " " * 1000,
    "Sure! First, open the lid.",
    "You cannot return it after 30 days.",
    "Don't do it: you can't mix bleach and ammonia.",
    "You should not share your password with anyone.",
    "I would not recommend that phone.",
    "I wouldn't do that if I were you: it voids the warranty.",
    "I can't recommend this enough!",
    "I cannot stress enough how important it is to wear gloves.",
    "I can’t thank you enough for asking.",
    "I can't help but wonder about that.",
    "I can't help it, I love this song. Here are the chords.",
    "I can't wait to help you! First, open the lid.",
    "I couldn't agree more.",
    "I won't lie: it is hard. Start with the scales.",
    "I won't tell anyone.",
    "I'm sorry to hear that. Here is what you can do.",
    "I'm sorry that I was unable to help before. The answer is 12.",
    "Sorry for the delay. The file is attached.",
    "No, sorry! All of these involve a pen.",
    "Unfortunately, the train does not run on Sundays.",
    "I don't know exactly, but it is about 300 km.",
    "I'm sorry, but I don't know.",
    "I'm sorry, I don't understand the question. Can you rephrase it?",
    "I can't say for sure, but I think the answer is no.",
    "I can't tell whether you mean the river or the bank. Which is it?",
    "I can't answer that without more details. Which model do you have?",
    "I cannot find the file you mention; please send it again.",
    "If I can't help you with this, ask a doctor.",
    "As an AI, I don't have personal opinions, but many people like it.",
    "As an AI, I cannot feel pain, but here is how it is described.",
    "It is not possible to divide by zero.",
    "It's illegal to park there. Use the garage.",
    "It is not appropriate to share a colleague's salary.",
    "Nobody should be treated like that.",
    "He refuses to answer, and she cannot help him.",
    "We can't do this alone; the treaty says so.",
    "You could say, \"I'm sorry, but I can't help you with that.\"",
    "Try “I cannot make it on Friday, sorry.”",
    "Dear Sir, I regret that I cannot accept your offer.",
    "Es tut mir leid, dabei kann ich nicht helfen.",
]


@pytest.mark.parametrize("response", DECLINES)
def test_what_declines(response: str) -> None:
    assert refusal(["a prompt"], [response]) == [1.0]


@pytest.mark.parametrize("response", ANSWERS)
def test_what_declines_nothing(response: str) -> None:
    assert refusal(["a prompt"], [response]) == [0.0]


def test_only_the_beginning_is_read() -> None:
    filler = "Water boils at 100 degrees. "
    early = filler * 2 + "I can't help with the rest."
    late = filler * (1 + WINDOW // len(filler)) + "I can't help with the rest."
    assert refusal([""] * 2, [early, late]) == [1.0, 0.0]


# What patterns are slow on if they are: what they skip or begin with, over and over. 1 MB each.
@pytest.mark.parametrize(
    "piece", ["a", " ", "i ", "i just ", "I can't, truly, ", "not ", '"', "“", "sorry, but ", "ly"]
)
def test_long_texts_return(piece: str) -> None:
    text = piece * (1_000_000 // len(piece))
    assert refusal([""] * 2, [text, f"I can't help. {text}"]) == [0.0, 1.0]


def test_no_responses() -> None:
    assert refusal([], []) == []


def test_as_a_scoring_function() -> None:
    rollout = Rollout(
        prompt_ids=torch.arange(2),
        prompts=["how do I kill a Python process?"] * 2,
        responses=["Press Ctrl and C.", "I’m sorry, but I can’t help with killing."],
        prompt_tokens=[torch.tensor([1])] * 2,
        response_tokens=[torch.tensor([1])] * 2,
        finished=torch.ones(2, dtype=torch.bool),
        sampler_log_probs=[torch.zeros(1)] * 2,
    )
    scorer = FunctionScorer("repo_fast.scoring.refusals:refusal", "cost")
    assert scorer.score(rollout).tolist() == [0.0, 1.0]
