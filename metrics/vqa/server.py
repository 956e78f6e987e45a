"""Any server that speaks OpenAI's chat completions: GPT-4o, vLLM, `transformers serve`, ...

The key is read from the environment at the moment of asking and kept nowhere: it is in no setting, record,
cache entry, error or log of Lethe's, also where a server sends it back.
"""

from __future__ import annotations

import base64
import io
import os
import re
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from lethebench.errors import LetheError, RunError, UserError
from lethebench.metrics._common import Images

from .cache import Cache, default_folder, image_sha256
from .judges import Answer, Judge, positive, verdict

HIDDEN = "[key]"
_LIMITS = ("max_tokens", "max_completion_tokens")
_DENIED = (401, 403)
_KEPT = "answers so far are kept: run again to go on"


@dataclass(frozen=True)
class ServerJudge(Judge):
    """One chat completion an image and question: the image as PNG, then the question.

    The paper's Acc_g is GPT-4o on Azure, API version 2024-05-01-preview. Refused and too many requests,
    server errors and lost connections are tried again ``retries`` times, after 0.5, 1, 2, ... up to 8 seconds
    or what the server's Retry-After says (up to two minutes): the `openai` package's rule. A content filter's
    refusal is an unusable answer. Every answer is cached at once under the SHA-256 of image, question, model,
    server and parameters.
    """

    kind: ClassVar[str] = "openai"
    counts: ClassVar[bool] = True
    base_url: str = "https://api.openai.com/v1"
    key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; empty for a server that needs none."""
    max_tokens: int = 16
    limit_name: str = "max_tokens"
    """The request's name for ``max_tokens``: newer models want ``max_completion_tokens``."""
    temperature: float | None = 0.0
    """None leaves it out, for models that refuse it."""
    logprobs: bool = False
    """Ask for token probabilities: not every server gives them."""
    concurrency: int = 8
    retries: int = 6
    timeout: float = 60.0
    """Seconds to wait for each try."""
    price_in: float | None = None
    price_out: float | None = None
    """US dollars per million tokens of prompts and of answers."""
    cache: str = ""
    """The folder of answers; by default ``vqa`` in Lethe's data folder."""

    def _answer(self, images: Images, questions: list[str]) -> list[Answer]:
        cache = self._cache()
        asked = [(image_sha256(image), text) for image, text in zip(images, questions, strict=True)]
        known = {pair: cache.find(self._key(*pair)) for pair in dict.fromkeys(asked)}
        answers = {pair: _read(found) for pair, found in known.items() if found is not None}
        missing = {pair: image for pair, image in zip(asked, images, strict=True) if pair not in answers}
        if missing:
            answers |= self._ask_all(missing, cache)
        return [answers[pair] for pair in asked]

    def cost(self, answer: Answer) -> float:
        """The answer's tokens at the given prices; NaN where prices or counts are missing."""
        if answer.tokens is None or self.price_in is None or self.price_out is None:
            return float("nan")
        return (answer.tokens[0] * self.price_in + answer.tokens[1] * self.price_out) / 1e6

    def check(self) -> None:
        """Raise UserError for bad settings, a missing package or key, or a server that isn't there.

        Asks the server for its list of models, which costs nothing, once.
        """
        super().check()
        positive(self, "max_tokens", "concurrency", whole=True)
        positive(self, "timeout")
        if self.limit_name not in _LIMITS:
            raise UserError(
                f"vqa judge {self.spec}: limit_name={self.limit_name!r} must be {' or '.join(_LIMITS)}"
            )
        if isinstance(self.retries, bool) or not isinstance(self.retries, int) or self.retries < 0:
            raise UserError(f"vqa judge {self.spec}: retries={self.retries!r} must be a whole number from 0")
        for name in ("price_in", "price_out"):
            price = getattr(self, name)
            if price is not None and (not isinstance(price, (int, float)) or not price >= 0):
                raise UserError(f"vqa judge {self.spec}: {name} must be dollars per million tokens, from 0")
        _check_url(self.base_url, self.spec)
        self._cache().check()
        problem = self._reach()
        if problem is not None:
            raise UserError(problem)

    def facts(self) -> dict[str, Any]:
        """Kind, model and settings. The cache's place is the machine's own and left out."""
        facts = super().facts()
        del facts["cache"]
        return facts

    # --- asking -----------------------------------------------------------------------------------

    def _cache(self) -> Cache:
        return Cache(Path(self.cache).expanduser() if self.cache else default_folder())

    def _key(self, image: str, question: str) -> dict[str, Any]:
        """All that determines an answer."""
        return {
            "image": image,
            "question": question,
            "model": self.model,
            "server": self.base_url.rstrip("/"),
            "parameters": self._parameters(),
        }

    def _parameters(self) -> dict[str, Any]:
        found: dict[str, Any] = {self.limit_name: self.max_tokens}
        if self.temperature is not None:
            found["temperature"] = self.temperature
        if self.logprobs:
            found |= {"logprobs": True, "top_logprobs": 20}
        return found

    def _ask_all(
        self, missing: Mapping[tuple[str, str], NDArray[np.uint8]], cache: Cache
    ) -> dict[tuple[str, str], Answer]:
        """Ask for what the cache lacks; after a failure nothing more is begun, and the failure is raised."""
        stop = threading.Event()

        def ask(pair: tuple[str, str]) -> Answer | None:
            if stop.is_set():
                return None
            try:
                stored = self._ask(client, missing[pair], pair[1])
                cache.put(self._key(*pair), stored)
            except BaseException:
                stop.set()
                raise
            return _read(stored)

        with self._client(self.retries) as client, ThreadPoolExecutor(self.concurrency) as pool:
            futures = {pair: pool.submit(ask, pair) for pair in missing}
            try:
                wait(futures.values())
            finally:
                stop.set()  # also where the user interrupts
        answers = {pair: future.result() for pair, future in futures.items()}  # raises the first failure
        return {pair: answer for pair, answer in answers.items() if answer is not None}

    def _ask(self, client: Any, image: NDArray[np.uint8], question: str) -> dict[str, Any]:
        """One completion, as it is cached: text, tokens, probability and the model that answered.

        Raises one line for whatever goes wrong, outside the handler: nothing of the client's error, which
        holds the request and what the server sent, hangs on to it.
        """
        api = _openai()
        content = [
            {"type": "image_url", "image_url": {"url": _data_url(image)}},
            {"type": "text", "text": question},
        ]
        problem: LetheError
        try:
            made = client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": content}], **self._parameters()
            )
            stored = _content(made)
            if stored is not None:
                return {name: self._hide(v) if isinstance(v, str) else v for name, v in stored.items()}
            problem = RunError(self._no_api())
        except api.APIStatusError as error:
            if error.code == "content_filter":
                return _stored("[content filter]", None, None, self.model)
            problem = self._refused(error)
        except api.APIConnectionError as error:
            problem = RunError(f"{self._lost(error)}; {_KEPT}")
        except (api.OpenAIError, ValueError):  # a body that is no JSON is a ValueError
            problem = RunError(self._no_api())
        raise problem

    def _reach(self) -> str | None:
        """What is wrong with the server or the key, None if nothing: asks for its models, which is free."""
        api = _openai()
        try:
            with self._client(retries=min(1, self.retries)) as client:
                models = client.models.list()
            return None if hasattr(models, "data") else self._no_api()
        except api.APIStatusError as error:
            # A server without a list of models is a server all the same.
            return str(self._refused(error)) if error.status_code in _DENIED else None
        except api.APIConnectionError as error:
            return self._lost(error)
        except (api.OpenAIError, AttributeError, ValueError):  # a text in place of a list: AttributeError
            return self._no_api()

    def _client(self, retries: int) -> Any:
        return _openai().OpenAI(
            api_key=_read_key(self.key_variable, self.spec) or "none",
            base_url=self.base_url,
            timeout=self.timeout,
            max_retries=retries,
        )

    def _lost(self, error: Exception) -> str:
        """One line on a server that gives no answer."""
        if isinstance(error, _openai().APITimeoutError):
            why = f"{self.base_url} gave no answer within {self.timeout:g} s: raise `timeout` or lower"
            return f"vqa judge {self.spec}: {why} `concurrency`"
        why = f"can't reach {self.base_url} ({self._line(error.__cause__ or error)})"
        return f"vqa judge {self.spec}: {why}: start the server, or mend `base_url`"

    def _refused(self, error: Any) -> LetheError:
        """One line on a status that says no, with the server's own words."""
        who, status = f"vqa judge {self.spec}", error.status_code
        told = f"status {status}: {self._line(error.response.text)}"
        if status == 429 or status >= 500:
            return RunError(f"{who}: no success in {self.retries + 1} tries ({told}); wait; {_KEPT}")
        if status in _DENIED:
            return UserError(f"{who}: the key in {self.key_variable or 'no variable'} is refused: {told}")
        hint = {404: "is `base_url` right, and the model known there?"}.get(
            status, "see `limit_name`, `temperature` and `logprobs`"
        )
        return UserError(f"{who}: the request is refused ({told}): {hint}")

    def _no_api(self) -> str:
        return (
            f"vqa judge {self.spec}: {self.base_url} answers, but not as an OpenAI-compatible server: "
            "is `base_url` the address of its API (it often ends in /v1)?"
        )

    def _line(self, told: object) -> str:
        """A text or an error in one short line, without the key."""
        return " ".join(self._hide(str(told) or type(told).__name__).split())[:300]

    def _hide(self, text: str) -> str:
        key = _find_key(self.key_variable)
        return text.replace(key, HIDDEN) if key else text


def _openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise UserError(
            "vqa: judges behind a server need the openai package: pip install 'lethebench[vlm]'"
        ) from error
    return openai


def _find_key(variable: str) -> str:
    return os.environ.get(variable, "").strip() if variable else ""


def _read_key(variable: str, spec: str) -> str:
    if variable and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        raise UserError(f"vqa judge {spec}: key_variable must be the name of an environment variable")
    key = _find_key(variable)
    if not all("!" <= c <= "~" for c in key):
        raise UserError(f"vqa judge {spec}: what {variable} holds is no key: it has blanks or line ends")
    if variable and not key:
        raise UserError(
            f"vqa judge {spec}: the environment has no {variable}: set it to the server's key, "
            "or name another variable by `key_variable` (empty: the server needs none)"
        )
    return key


def _check_url(url: str, spec: str) -> None:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise UserError(f"vqa judge {spec}: base_url must be an http address, as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        raise UserError(
            f"vqa judge {spec}: base_url is recorded and must hold no user, password or query: "
            "put the key into the environment"
        )


def _data_url(image: NDArray[np.uint8]) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _stored(
    text: str, probability: float | None, tokens: tuple[int, int] | None, model: str
) -> dict[str, Any]:
    return {"text": text, "probability": probability, "tokens": tokens, "model": model}


def _read(stored: Mapping[str, Any]) -> Answer:
    """A stored answer; its text is read anew, so a cache outlives a change of the rule."""
    tokens = stored["tokens"]
    return Answer(
        verdict(stored["text"]),
        stored["text"],
        stored["probability"],
        (int(tokens[0]), int(tokens[1])) if tokens is not None else None,
        stored["model"],
    )


def _content(made: Any) -> dict[str, Any] | None:
    """What a completion says, None where it is none. A refusal's own text stands for a missing answer."""
    try:
        choice, usage = made.choices[0], made.usage
        text = choice.message.content or getattr(choice.message, "refusal", None) or ""
        tokens = None if usage is None else (int(usage.prompt_tokens), int(usage.completion_tokens))
        return _stored(str(text), _probability(choice), tokens, str(made.model or ""))
    except (AttributeError, IndexError, TypeError):
        return None


def _probability(choice: Any) -> float | None:
    """Yes against yes or no at the first token, from the most likely tokens that the server lists."""
    listed = getattr(getattr(choice, "logprobs", None), "content", None)
    if not listed:
        return None
    found = {"yes": 0.0, "no": 0.0}
    for token in listed[0].top_logprobs or []:
        word = token.token.strip().lower()
        if word in found:
            found[word] += float(np.exp(token.logprob))
    total = found["yes"] + found["no"]
    return found["yes"] / total if total > 0 else None
