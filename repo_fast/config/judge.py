"""The section of a judge: a language model that compares or rates responses (`repo_fast/judging`)."""

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from repo_fast.config.checks import check_unused, require, require_at_least

Criterion = Literal["helpfulness", "harmlessness"]


@dataclass(frozen=True)
class EndpointConfig:
    """A language model behind an OpenAI-compatible chat endpoint (vLLM, llama.cpp, OpenAI, ...)."""

    url: str | None = None
    """Base URL of the endpoint, such as http://127.0.0.1:8000/v1. Null: no judge."""
    api_key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key. Where it is not set a placeholder is sent: local servers want none."""
    concurrency: int = 8
    """Most requests under way at once, of each rank."""
    retries: int = 4
    """Times a request is sent again after a lost connection, a time-out, or HTTP 408, 409, 429 or 5xx; the waits grow
    from half a second to eight, or are what the server asks for, up to two minutes."""
    timeout: float = 60.0
    """Longest wait for one answer (seconds)."""
    max_tokens: int = 16
    """Longest answer (tokens). An answer is one word; a model that reasons first needs thousands."""
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the request calls this limit: OpenAI's newer models take only `max_completion_tokens`, which some other
    servers ignore."""
    temperature: float | None = 0.0
    """Of the judge's sampling. Null leaves it to the endpoint: some reasoning models refuse any value."""
    input_price: float | None = None
    """US dollars per million tokens sent, for the estimate of the cost."""
    output_price: float | None = None
    """US dollars per million tokens answered."""
    budget: float | None = None
    """US dollars: an estimate above it is an error before the request. Needs both prices."""


@dataclass(frozen=True)
class JudgeConfig(EndpointConfig):
    """A language model behind an OpenAI-compatible chat endpoint (vLLM, llama.cpp, OpenAI, ...) judges responses."""

    model: str = ""
    """Name of the model as the endpoint knows it; required with a url."""
    mode: Literal["pairwise", "single"] = "pairwise"
    """`pairwise`: two responses to a prompt are compared, in both orders. `single`: each is rated from 1 to 10."""
    criterion: Criterion = "helpfulness"
    """What is judged. The two are kept apart, as in Safe RLHF: a refusal is harmless, however unhelpful."""
    samples_per_prompt: int = 1
    """Responses judged for each prompt and policy."""


@dataclass(frozen=True)
class RubricConfig(EndpointConfig):
    """A judge's number as a score (`path judge:MODEL`), also while training."""

    rubric: str = ""
    """What it rates, from 1 to 10, and what these mean, in words: "10: gives a dose, 1: none at all". The score is the
    number; a threshold is in its units."""


def check_judge(key: str, config: JudgeConfig) -> None:
    """Raise `InputError` for a value of this section that cannot be, or that would have no effect."""
    if config.url is None:
        check_unused(key, config, f"{key}.url as well: without one there is no judge")
        return
    require(config.model.strip() != "", f"{key}.model", config.model, "the name of the judge's model")
    require_at_least(1, {f"{key}.samples_per_prompt": config.samples_per_prompt})
    check_endpoint(key, config)


def check_endpoint(key: str, config: EndpointConfig) -> None:
    """Raise `InputError` for a value of this section that cannot be."""
    require(config.url is not None, f"{key}.url", config.url, "a base URL such as http://127.0.0.1:8000/v1")
    _check_url(f"{key}.url", str(config.url))
    variable = config.api_key_variable
    require(variable != "" and "=" not in variable, f"{key}.api_key_variable", variable, "an environment variable")
    require_at_least(1, {f"{key}.{name}": getattr(config, name) for name in ("concurrency", "max_tokens")})
    numbers = ("retries", "temperature", "input_price", "output_price", "budget")
    require_at_least(0, {f"{key}.{name}": getattr(config, name) for name in numbers})
    require(config.timeout > 0, f"{key}.timeout", config.timeout, "a number of seconds above 0")
    for one, other in (("input_price", "output_price"), ("output_price", "input_price")):
        given = getattr(config, one) is not None
        require(not given or getattr(config, other) is not None, f"{key}.{other}", None, f"a price, as {key}.{one} is")
    priced = config.input_price is not None
    require(config.budget is None or priced, f"{key}.budget", config.budget, f"{key}.input_price and output_price too")


def _check_url(key: str, url: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    require(usable, key, url, "a base URL such as http://127.0.0.1:8000/v1")
    # Messages and logs show the url.
    require("@" not in parts.netloc, key, f"{parts.scheme}://...@{parts.hostname}", "a URL without user and password")
    path = parts.path.rstrip("/")
    require(not path.endswith("/completions"), key, url, "a base URL, which ends before /chat/completions")
    require(not parts.query and not parts.fragment, key, url, "a base URL without ? and #")
