"""Scores of a judge: a model behind an OpenAI-compatible server."""

import asyncio
import collections
import hashlib
import json
import logging
import math
import os
import random
import re
import sqlite3
import threading
from contextlib import suppress
from typing import Any

import aiohttp

from megatron_espo.config import Judge
from megatron_espo.errors import InputError, log_first
from megatron_espo.rewards.answers import final_text
from megatron_espo.types import Prompt

BACKOFF_S, MOST_BACKOFF_S = 0.5, 8.0
MOST_PAUSE_S = 60.0  # that a server may ask for with Retry-After
_COUNTS = "requests", "retries", "cache_hits", "failed", "prompt_tokens", "completion_tokens"

logger = logging.getLogger(__name__)


class _Failure(Exception):
    """One request gave no score. ``args``: the cause, which names a metric, and a message."""


class JudgeClient:
    """Asks the judge. Coroutines of one event loop.

    A request that failed is repeated with back-off. ``Retry-After`` pauses all requests. From its
    first request on, a response takes at most ``(retries + 1) * (timeout_s + MOST_PAUSE_S)``
    seconds and the back-off, plus what ``requests_per_minute`` adds.

    Args:
        config: the ``judge`` section of the configuration.
        folder: of the cache, if the configuration names no file.

    Attributes:
        counts: of requests and of their outcomes; see ``docs/metrics.md``.
        last_failure: message of the latest response without a score.

    Raises:
        InputError: the cache is not usable.
    """

    def __init__(self, config: Judge, folder: str) -> None:
        self._config, self._pattern = config, re.compile(config.pattern)
        self._key = os.environ.get(config.key or "", "").strip()
        self._templates = {name: config.template(name) for name in config.prompts}
        self._slots, self._next_start = asyncio.Semaphore(config.max_concurrent), 0.0
        self._session: Any = None  # opened by start
        self._running: dict[str, asyncio.Task[float | None]] = {}
        self.counts: collections.Counter[str] = collections.Counter()
        self.last_failure, self._warned = "", collections.Counter[str]()
        path = config.cache or os.path.join(folder, "judge.sqlite")
        self._cache_lock = threading.Lock()  # threads must not share a running statement
        try:
            self._cache = sqlite3.connect(path, 1.0, isolation_level=None, check_same_thread=False)
            self._cache.execute("PRAGMA synchronous = OFF")  # a lost entry costs one request
            self._cache.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply)")
        except sqlite3.Error as error:
            expected = f"expected a writable SQLite file, got {path!r} ({error})"
            raise InputError(f"judge.cache: {expected}") from None

    async def start(self) -> None:
        """Open the session and send one request.

        Raises:
            InputError: no server answers there, or it refuses the model or the key.
        """
        # vLLM closes idle connections after 5 s. This side must close them earlier.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0),
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=aiohttp.ClientTimeout(total=self._config.timeout_s),
            trust_env=True,  # proxies
        )
        if await self._ask(self._body("Reply with OK."), scored=False) is None:
            expected = f"expected a chat model {self._config.model} at {self._config.url}"
            raise InputError(f"judge.url: {expected}, got a failure: {self.last_failure}")

    async def close(self) -> None:
        """Cancel the requests and close the connections."""
        for task in list(self._running.values()):
            task.cancel()
        if self._session:
            await self._session.close()

    async def pop_metrics(self) -> dict[str, float]:
        """Return ``judge/<count>`` since the last call."""
        counts, self.counts = self.counts, collections.Counter()
        return {f"judge/{name}": float(counts[name]) for name in (*_COUNTS, *counts)}

    async def score(self, name: str, prompt: Prompt, response: str) -> float | None:
        """Score one response. Equal requests at the same time are sent once.

        Args:
            name: of the template.

        Returns:
            0 to 1, or ``None`` if the judge failed.
        """
        own = {"prompt": prompt.text, "response": response, "answer": prompt.answer}
        values = prompt.metadata | own
        # In one pass: braces in the response are text.
        text = re.sub(r"{(\w+)}", lambda m: str(values.get(m[1], m[0])), self._templates[name])
        body = self._body(text)
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        if task := self._running.get(key):
            self.counts["cache_hits"] += 1
        else:
            task = self._running[key] = asyncio.ensure_future(self._score_once(key, body))
            task.add_done_callback(lambda _: self._running.pop(key))
        return await asyncio.shield(task)

    def _body(self, text: str) -> dict[str, Any]:
        messages = [{"role": "user", "content": text}]
        return {"model": self._config.model, "messages": messages} | self._config.sampling

    async def _score_once(self, key: str, body: dict[str, Any]) -> float | None:
        row = await asyncio.to_thread(self._query, "SELECT reply FROM replies WHERE key = ?", key)
        if row and (score := self._read(row[0])) is not None:
            self.counts["cache_hits"] += 1
            return score
        async with self._slots:
            reply = await self._ask(body)
        if reply is None:
            return None
        await asyncio.to_thread(self._query, "REPLACE INTO replies VALUES (?, ?)", key, reply)
        return self._read(reply)

    def _query(self, statement: str, *values: str) -> Any:
        """The first row, if any. A broken cache costs requests, not the run."""
        try:
            with self._cache_lock:
                return self._cache.execute(statement, values).fetchone()
        except (sqlite3.Error, UnicodeError) as error:
            log_first(logger, self._warned, "cache", f"judge.cache: {error}")
            return None

    def _read(self, reply: str) -> float | None:
        """The score in a reply, after the judge's reasoning."""
        low, high = self._config.min_score, self._config.max_score
        try:
            score = float(self._pattern.findall(final_text(reply) or "")[-1])
        except (IndexError, ValueError):
            return None
        return (min(max(score, low), high) - low) / (high - low) if math.isfinite(score) else None

    async def _ask(self, body: dict[str, Any], scored: bool = True) -> str | None:
        """Return the reply, or ``None`` after the last attempt.

        Args:
            scored: whether the reply must have a score.
        """
        for attempt in range(self._config.retries + 1):
            if attempt:
                self.counts["retries"] += 1
                most = min(BACKOFF_S * 2 ** (attempt - 1), MOST_BACKOFF_S)
                await asyncio.sleep(random.uniform(most / 2, most))
            await self._wait_turn()
            self.counts["requests"] += 1
            try:
                return await self._post(body, scored)
            except TimeoutError:
                limit = self._config.timeout_s
                cause, message = "timeout", f"no answer in {limit:g} s (judge.timeout_s)"
            except (aiohttp.ClientError, OSError) as error:
                cause, message = "no_connection", f"{type(error).__name__}: {error}"
            except _Failure as error:
                cause, message = error.args
            self.counts[cause] += 1
            if cause.startswith("status_4") and cause[7:] not in ("408", "409", "425", "429"):
                break
        self.counts["failed"] += 1
        self.last_failure = message.replace(self._key, "***") if self._key else message
        message = f"response not judged: {self.last_failure}"
        log_first(logger, self._warned, cause, message)
        return None

    async def _wait_turn(self) -> None:
        """Wait for the rate limit and for a pause that the server asked for."""
        now, limit = asyncio.get_running_loop().time(), self._config.requests_per_minute
        start = max(now, self._next_start)
        self._next_start = start + (60 / limit if limit else 0)
        await asyncio.sleep(start - now)

    async def _post(self, body: dict[str, Any], scored: bool) -> str:
        url = f"{self._config.url}".rstrip("/") + "/chat/completions"
        async with self._session.post(url, json=body) as response:
            text = await response.text(errors="replace")
            if (status := response.status) != 200:
                with suppress(KeyError, ValueError):
                    pause = min(float(response.headers["Retry-After"]), MOST_PAUSE_S)
                    now = asyncio.get_running_loop().time()
                    self._next_start = max(self._next_start, now + pause)
                raise _Failure(f"status_{status}", f"status {status}: {text[:300]}")
        try:
            found = json.loads(text)
            usage, choice = found.get("usage") or {}, found["choices"][0]
            reply = choice["message"]["content"] or ""
            for name in ("prompt_tokens", "completion_tokens"):
                self.counts[name] += usage.get(name) or 0
            is_cut = choice.get("finish_reason") == "length"
            if not scored or (self._read(reply) is not None and not is_cut):
                return reply
        except (ValueError, LookupError, TypeError, AttributeError):
            raise _Failure("no_score", f"not a chat completion: {text[:300]!r}") from None
        problem = "the reply reached its limit of tokens" if is_cut else "no score in the reply"
        raise _Failure("no_score", f"{problem}: {reply[-300:]!r}")
