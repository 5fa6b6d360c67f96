"""Asks a language model behind an OpenAI-compatible chat endpoint, and keeps its answers.

Identical requests are sent once, at any temperature.
"""

import asyncio
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from repo_fast.config.checks import require
from repo_fast.config.judge import JudgeConfig, check_judge
from repo_fast.errors import InputError, first_line
from repo_fast.judging.budget import Estimate, approximate_tokens, check_budget, dollars
from repo_fast.judging.cache import AnswerCache, Reply

if TYPE_CHECKING:
    from openai import AsyncOpenAI

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with the number of answered requests, and of all to be sent, whenever one is answered."""


@dataclass(frozen=True)
class Request:
    """One message to the endpoint.

    Attributes:
        key: Hash of the body, under which the cache has the answer.
        prompt: What it is about, for messages to the user.
        body: What is sent.
    """

    key: str
    prompt: str
    body: dict[str, Any]


class ChatClient:
    """A chat endpoint, and its answers so far.

    Args:
        config: Of the endpoint; with a url.
        cache: JSON-lines file of answers, made if missing, its folder too. Its last line is dropped where a kill tore
            it. A file belongs to one client at a time.
        others: Files of other clients, whose answers are taken as its own.

    Attributes:
        counts: `requests` that the endpoint answered, `input_tokens` and `output_tokens` of these; requests whose
            answer was `cached`.

    Raises:
        InputError: The configuration cannot be honoured, the package `openai` is missing, or the cache cannot be used.
    """

    def __init__(self, config: JudgeConfig, cache: Path, others: Iterable[Path] = ()) -> None:
        require(config.url is not None, "judge.url", config.url, "the base URL of an endpoint")
        check_judge("judge", config)
        self.config = config
        key = self._api_key()
        if not (key.isascii() and key.isprintable()):
            variable = f"the environment variable {config.api_key_variable}"
            raise InputError(f"{variable} has characters that no key has, expected printable ASCII or nothing")
        self._openai = _import_openai()
        self._cache = AnswerCache(cache, others)
        self.counts: Counter[str] = Counter()

    def request(self, prompt: str, message: str) -> Request:
        """What is sent to ask with a message about a prompt."""
        body: dict[str, Any] = {
            "model": self.config.model,
            # One message of the user's: some chat templates have no place for a system message.
            "messages": [{"role": "user", "content": message}],
            self.config.max_tokens_name: self.config.max_tokens,
        }
        if self.config.temperature is not None:
            body["temperature"] = self.config.temperature
        return Request(hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest(), prompt, body)

    def estimate(self, requests: Sequence[Request]) -> Estimate:
        """What these requests, all in one call, would send and cost. Sends nothing."""
        distinct = {request.key: request for request in requests}
        missing = [request for key, request in distinct.items() if key not in self._cache.replies]
        input_tokens = sum(approximate_tokens(request.body["messages"][0]["content"]) for request in missing)
        output_tokens = self.config.max_tokens * len(missing)
        return Estimate(
            requests=len(missing),
            cached=len(distinct) - len(missing),
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            dollars=dollars(self.config, input_tokens, output_tokens),
        )

    def count_cached(self, clients: int = 1) -> None:
        """Take what the files have for spent: a run that goes on is held to the budget of the whole.

        Args:
            clients: How many share a budget, and have all of the same files: each counts its part.
        """
        for name, tokens in zip(("input_tokens", "output_tokens"), self._cache.paid, strict=True):
            self.counts[name] += -(-tokens // clients)

    def spent(self) -> float | None:
        """US dollars for what was sent and answered so far; None without prices."""
        return dollars(self.config, self.counts["input_tokens"], self.counts["output_tokens"])

    def ask_anew(self, request: Request) -> None:
        """Ask once, whatever the cache has.

        Raises:
            InputError: As `ask`.
        """
        check_budget(self.config, self.estimate([request]), self.spent())
        self._cache.replies.pop(request.key, None)
        asyncio.run(self._send_all([request], None))

    def ask(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Reply]:
        """Answers to requests, in their order. Not to be called where an event loop runs in the same thread.

        Raises:
            InputError: The estimate, together with what was spent, is above the budget; or the endpoint cannot be
                reached, refuses the request, or still fails after the retries. Answers that came before are in the
                cache.
        """
        estimate = self.estimate(requests)
        check_budget(self.config, estimate, self.spent())
        self.counts["cached"] += estimate.cached
        # By key: what is asked twice is sent once.
        missing = {request.key: request for request in requests if request.key not in self._cache.replies}
        if missing:
            log.info("judge %s at %s: %s", self.config.model, self.config.url, estimate)
            asyncio.run(self._send_all(list(missing.values()), progress))
        return [self._cache.replies[request.key] for request in requests]

    async def _send_all(self, requests: Sequence[Request], progress: Progress | None) -> None:
        waiting, answered = iter(requests), 0

        async def work(client: "AsyncOpenAI") -> None:
            nonlocal answered
            for request in waiting:
                reply = await self._send(client, request)
                self._cache.add(request.key, reply)
                self.counts["requests"] += 1
                self.counts["input_tokens"] += reply.input_tokens
                self.counts["output_tokens"] += reply.output_tokens
                answered += 1
                if progress is not None:
                    progress(answered, len(requests))

        client = self._openai.AsyncOpenAI(
            base_url=self.config.url,
            api_key=self._api_key() or "none",
            timeout=self.config.timeout,
            max_retries=self.config.retries,
        )
        async with client:
            try:
                # As many workers as requests may be under way: each has one, its waits for a retry included.
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self.config.concurrency, len(requests))):
                        group.create_task(work(client))
            except BaseExceptionGroup as errors:
                # The first ended the others.
                raise errors.exceptions[0] from errors.exceptions[0].__cause__

    async def _send(self, client: "AsyncOpenAI", request: Request) -> Reply:
        who = f"the judge {self.config.model!r} at {self.config.url}"
        try:
            completion = await client.chat.completions.create(**request.body)
        except self._openai.APIStatusError as error:
            if error.code == "content_filter":
                # Some endpoints refuse a text so; others answer, with this as the reason why the answer ended.
                return Reply("", "content_filter", 0, 0)
            expected = self._expected_instead(error.status_code, request)
            message = f"{who} answered HTTP {error.status_code} ({first_line(error)[:300]}), expected {expected}"
            raise InputError(self._without_key(message)) from error
        except self._openai.APITimeoutError as error:
            raise InputError(
                f"{who} gave no answer in {self.config.retries + 1} attempts of {self.config.timeout:g} seconds, "
                "expected one: lower the concurrency or raise the timeout"
            ) from error
        except self._openai.APIConnectionError as error:
            cause = first_line(error.__cause__ or error)
            message = f"{who} cannot be reached ({cause}), expected an OpenAI-compatible server there"
            raise InputError(self._without_key(message)) from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{who} answered no JSON ({first_line(error)}), expected a chat completion") from error
        # The client takes whatever is JSON, or a page, for a completion.
        try:
            choice, usage = completion.choices[0], completion.usage
            tokens = (usage.prompt_tokens or 0, usage.completion_tokens or 0) if usage else (0, 0)
            reply = Reply(choice.message.content or "", choice.finish_reason, *tokens)
            if not isinstance(reply.answer, str):
                raise TypeError
        except (AttributeError, IndexError, TypeError):
            raise InputError(f"{who} answered {str(completion)[:200]!r}, expected a chat completion") from None
        return reply

    def _expected_instead(self, status: int, request: Request) -> str:
        retries, key = self.config.retries, f"a valid key in the environment variable {self.config.api_key_variable}"
        if not self._api_key():
            key += ", which is not set"
        return {
            400: f"a request that it takes; the prompt begins {request.prompt[:60]!r}",
            401: key,
            403: key,
            404: "a model that it has, and a url that ends before /chat/completions",
            429: f"room within its limits after {retries} retries: lower the concurrency or raise the retries",
        }.get(status, f"an answer after {retries} retries")

    def _api_key(self) -> str:
        return os.environ.get(self.config.api_key_variable, "").strip()

    def _without_key(self, message: str) -> str:
        # Endpoints, and the errors of HTTP libraries, may repeat what they were sent.
        key = self._api_key()
        return message.replace(key, "***") if key else message


def _import_openai() -> ModuleType:
    # Here, because only judges need it, and it takes a second.
    try:
        import openai
    except ImportError as error:
        raise InputError(
            f"the package openai cannot be imported ({first_line(error)}), expected it for a judge: "
            "pip install repo_fast[judge]"
        ) from error
    return openai
