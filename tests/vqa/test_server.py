"""The client of OpenAI-compatible servers: against `transformers serve`, and against one that misbehaves."""

from __future__ import annotations

import json
import logging
import socket
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vqa.conftest import KEY
from vqa.fake_server import FakeServer, Reply, completion, error, serving

from lethebench.errors import LetheError, RunError, UserError
from lethebench.metrics.vqa.judges import make_judges
from lethebench.metrics.vqa.local import TransformersJudge
from lethebench.metrics.vqa.server import ServerJudge
from lethebench.metrics.vqa_mini import GENERAL, SPECIFIC

QUESTIONS = [GENERAL] * 3 + [SPECIFIC.replace("<CONCEPT>", "quorvex")] * 3


def judge(url: str, **settings: Any) -> ServerJudge:
    given = {"judge": "openai:tiny", "base_url": url, "key_variable": "TEST_KEY", "retries": 0, **settings}
    (made,) = make_judges([given])
    assert isinstance(made, ServerJudge)
    return made


def yes(number: int, body: dict[str, Any]) -> Reply:
    return completion("Yes.")


# --- a real server --------------------------------------------------------------------------------


def test_a_real_server_says_what_the_same_model_says_in_process(
    real_server: str, tiny: Path, images: np.ndarray
) -> None:
    remote = judge(real_server, max_tokens=8, retries=1)
    remote = ServerJudge(**{**vars(remote), "model": str(tiny)})
    remote.check()
    there, here = (
        remote.answer(images, QUESTIONS),
        TransformersJudge(model=str(tiny)).answer(images, QUESTIONS),
    )
    assert [a.text for a in there] == [a.text for a in here]
    assert [a.verdict for a in there] == [a.verdict for a in here]
    assert len({a.text for a in there}) > 2
    assert all(a.tokens is not None and a.tokens[0] > 20 and 0 < a.tokens[1] <= 8 for a in there)
    assert all(a.model.startswith(str(tiny)) for a in there)


def test_a_real_server_refuses_another_model(real_server: str, images: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"the request is refused \(.*pinned"):
        judge(real_server).answer(images[:1], [GENERAL])


# --- what is sent ---------------------------------------------------------------------------------


def test_image_question_and_parameters_arrive(images: np.ndarray) -> None:
    with serving(FakeServer(yes)) as server:
        asked = judge(server.url, concurrency=1, price_in=2.5, price_out=10.0)
        answers = asked.answer(images, QUESTIONS)
    assert {a.verdict for a in answers} == {"yes"}
    for number in range(6):
        np.testing.assert_array_equal(server.image(number), images[number])
        assert server.question(number) == QUESTIONS[number]
        sent = {k: v for k, v in server.requests[number].items() if k != "messages"}
        assert sent == {"model": "tiny", "max_tokens": 16, "temperature": 0.0}
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert answers[0].tokens == (100, 2) and answers[0].model == "tiny-2026-01-01"
    assert asked.cost(answers[0]) == pytest.approx((100 * 2.5 + 2 * 10) / 1e6)
    assert np.isnan(judge(server.url).cost(answers[0]))


def test_parameters_of_newer_models(images: np.ndarray) -> None:
    with serving(FakeServer(yes)) as server:
        judge(server.url, limit_name="max_completion_tokens", temperature=None).answer(images[:1], [GENERAL])
    assert {k for k in server.requests[0] if k != "messages"} == {"model", "max_completion_tokens"}


def test_probability_comes_from_the_first_tokens(images: np.ndarray) -> None:
    top = [
        {"token": t, "logprob": float(np.log(p)), "bytes": None}
        for t, p in (("Yes", 0.6), (" no", 0.2), ("yes", 0.15))
    ]
    first = {"token": "Yes", "logprob": float(np.log(0.6)), "bytes": None, "top_logprobs": top}
    reply = completion("Yes", choice={"logprobs": {"content": [first], "refusal": None}})
    with serving(FakeServer(lambda n, b: reply)) as server:
        (answer,) = judge(server.url, logprobs=True).answer(images[:1], [GENERAL])
    assert answer.probability == pytest.approx(0.75 / 0.95)
    assert server.requests[0]["top_logprobs"] == 20


def test_requests_run_at_the_same_time_and_no_more_than_allowed(images: np.ndarray) -> None:
    meet = threading.Barrier(3, timeout=10)

    def together(number: int, body: dict[str, Any]) -> Reply:
        meet.wait()  # passes only when three are there at once
        return completion("No.")

    with serving(FakeServer(together)) as server:
        answers = judge(server.url, concurrency=3).answer(images, QUESTIONS)
    assert [a.verdict for a in answers] == ["no"] * 6
    assert server.most_busy == 3


def test_the_same_image_and_question_are_asked_once(images: np.ndarray) -> None:
    with serving(FakeServer(yes)) as server:
        assert len(judge(server.url).answer(images[[0, 1, 0, 0]], [GENERAL] * 4)) == 4
    assert len(server.requests) == 2


# --- the cache ------------------------------------------------------------------------------------


def test_a_killed_run_pays_nothing_twice(images: np.ndarray, tmp_path: Path) -> None:
    def breaks(number: int, body: dict[str, Any]) -> Reply:
        return completion("Yes.") if number < 4 else error(500, "out of order")

    with serving(FakeServer(breaks)) as server:
        with pytest.raises(RunError, match="answers so far are kept"):
            judge(server.url, concurrency=1).answer(images, QUESTIONS)
        assert len(server.requests) == 5
        server.reply = lambda n, b: completion("No.")
        answers = judge(server.url, concurrency=1).answer(images, QUESTIONS)
        assert len(server.requests) == 7
    assert [a.verdict for a in answers] == ["yes"] * 4 + ["no"] * 2
    # The server is gone: all is known.
    assert judge(server.url).answer(images, QUESTIONS) == answers


def test_what_determines_an_answer_is_its_key(images: np.ndarray) -> None:
    with serving(FakeServer(yes)) as server:
        ask: Callable[..., Any] = lambda **s: judge(server.url, **s).answer(images[:1], [GENERAL])  # noqa: E731
        ask()
        ask(timeout=3.0, concurrency=2, price_in=1.0, name="other", retries=2)
        assert len(server.requests) == 1
        for changed in (
            {"max_tokens": 8},
            {"temperature": 0.5},
            {"limit_name": "max_completion_tokens"},
            {"logprobs": True},
        ):
            ask(**changed)
        judge(server.url).answer(images[1:2], [GENERAL])
        judge(server.url).answer(images[:1], [QUESTIONS[-1]])
        judge(server.url).answer(images[:1].reshape(1, 32, 128, 3), [GENERAL])  # the same bytes, another size
        judge(server.url + "/").answer(images[:1], [GENERAL])  # the same address
        assert len(server.requests) == 8
        make_judges([{"judge": "openai:other", "base_url": server.url, "key_variable": ""}])[0].answer(
            images[:1], [GENERAL]
        )
    assert len(server.requests) == 9 and server.requests[-1]["model"] == "other"


def test_a_damaged_answer_is_reported_and_asked_again(
    images: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(FakeServer(yes)) as server:
        asked = judge(server.url, cache=str(tmp_path / "answers"))
        asked.answer(images[:1], [GENERAL])
        (path,) = (tmp_path / "answers").rglob("*.json")
        path.write_text("{")
        assert asked.answer(images[:1], [GENERAL])[0].verdict == "yes"
    assert len(server.requests) == 2
    assert "damaged answer" in capsys.readouterr().err


# --- a server that fails --------------------------------------------------------------------------


def test_it_waits_as_long_as_the_server_says(images: np.ndarray) -> None:
    def busy(number: int, body: dict[str, Any]) -> Reply:
        return error(429, "slow down", **{"Retry-After": "0.9"}) if number == 0 else completion("Yes.")

    with serving(FakeServer(busy)) as server:
        assert judge(server.url, retries=2).answer(images[:1], [GENERAL])[0].verdict == "yes"
    assert 0.85 < server.times[1] - server.times[0] < 5


def test_it_backs_off(images: np.ndarray) -> None:
    def ill(number: int, body: dict[str, Any]) -> Reply:
        return error(503, "ill") if number < 2 else completion("Yes.")

    with serving(FakeServer(ill)) as server:
        assert judge(server.url, retries=2).answer(images[:1], [GENERAL])[0].verdict == "yes"
    gaps = np.diff(server.times)
    assert gaps[0] > 0.35 and gaps[1] > 0.7  # 0.5 and 1 second, less up to a quarter


FAILURES: dict[str, tuple[Reply, type[LetheError], str]] = {
    "rate": (error(429, "quota"), RunError, r"no success in 1 tries \(.*quota.*\); wait; answers so far are kept"),
    "broken": (error(500, "oops"), RunError, "no success in 1 tries .*oops"),
    "key": (error(401, "bad key"), UserError, "the key in TEST_KEY is refused: .*bad key"),
    "model": (error(404, "no such model"), UserError, r"no such model.*: is `base_url` right, and the model known"),
    "parameter": (error(400, "use max_completion_tokens"), UserError, "refused .*use max_completion_tokens.*limit_name"),
    "late": (Reply({}, wait=0.6), RunError, r"gave no answer within 0.2 s: raise `timeout`"),
    "html": (Reply(b"<html>hello</html>"), RunError, "not as an OpenAI-compatible server: is `base_url`"),
    "empty": (Reply({}), RunError, "not as an OpenAI-compatible server"),
    "no choice": (Reply({"choices": [], "model": "x"}), RunError, "not as an OpenAI-compatible server"),
    "no json": (Reply(b"{", headers={"Content-Type": "application/json"}), RunError, "not as an OpenAI-compatible"),
    "list": (Reply([1]), RunError, "not as an OpenAI-compatible server"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_failures_are_one_clear_line(name: str, images: np.ndarray) -> None:
    reply, kind, told = FAILURES[name]
    with serving(FakeServer(lambda n, b: reply)) as server, pytest.raises(kind, match=told) as caught:
        judge(server.url, timeout=0.2 if name == "late" else 30.0).answer(images[:2], [GENERAL] * 2)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("vqa judge openai:tiny: ")


def test_refusals_and_filters_are_unusable_answers(images: np.ndarray) -> None:
    replies = [
        completion(None, message={"refusal": "I can't help with that."}),
        completion(""),
        error(400, "filtered", code="content_filter"),
        completion("I think so"),
    ]
    with serving(FakeServer(lambda n, b: replies[n])) as server:
        answers = judge(server.url, concurrency=1).answer(images[:4], [GENERAL] * 4)
    assert [a.verdict for a in answers] == ["unusable"] * 4
    assert [a.text for a in answers] == ["I can't help with that.", "", "[content filter]", "I think so"]


def unused_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_an_unreachable_server_is_one_clear_line(images: np.ndarray) -> None:
    url = f"http://127.0.0.1:{unused_port()}/v1"
    with pytest.raises(
        RunError, match=rf"can't reach {url} \(.*refused.*\): start the server, or mend `base_url`"
    ):
        judge(url, retries=1).answer(images[:1], [GENERAL])
    with pytest.raises(UserError, match=f"can't reach {url}"):
        judge(url).check()


# --- before any work ------------------------------------------------------------------------------


def refused(url: str = "http://127.0.0.1:1/v1", **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        judge(url, **settings).check()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_wrong_is_found_before_any_work(tmp_path: Path) -> None:
    assert "the environment has no OPENAI_API_KEY: set it" in refused(key_variable="OPENAI_API_KEY")
    assert "base_url must be an http address" in refused("localhost:8000")
    assert "base_url must be an http address" in refused("http://[::1")
    assert "base_url is recorded and must hold no user" in refused("https://me:secret@host/v1")
    assert "base_url is recorded" in refused("https://host/v1?key=secret")
    assert "concurrency=0 must be a whole number above 0" in refused(concurrency=0)
    assert "timeout=True must be a number above 0" in refused(timeout=True)
    assert "retries=-1 must be a whole number" in refused(retries=-1)
    assert "limit_name='tokens' must be max_tokens or" in refused(limit_name="tokens")
    assert "price_in must be dollars" in refused(price_in=-1.0)
    assert "price_out must be dollars" in refused(price_out="2")
    (tmp_path / "file").write_text("")
    assert "can't write to" in refused(cache=str(tmp_path / "file"))


@pytest.mark.parametrize(("variable", "value"), [("TEST_KEY", "sk-a\nsk-b"), ("sk-secret-1", "")])
def test_what_is_no_key_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    if value:
        monkeypatch.setenv(variable, value)
    assert "sk-" not in refused(key_variable=variable)


def test_check_asks_the_server_without_paying() -> None:
    with serving(FakeServer(yes)) as server:
        judge(server.url).check()
        server.models = error(404, "no list here")
        judge(server.url).check()
        server.models = error(401, "who are you")
        assert "the key in TEST_KEY is refused: " in refused(server.url)
        server.models = Reply(b"<html>")
        assert "not as an OpenAI-compatible server" in refused(server.url)
    assert not server.requests


def test_a_server_that_needs_no_key(images: np.ndarray) -> None:
    with serving(FakeServer(yes)) as server:
        open_server = judge(server.url, key_variable="")
        open_server.check()
        open_server.answer(images[:1], [GENERAL])
    assert KEY not in server.keys[0]


# --- the key --------------------------------------------------------------------------------------

ECHOES: dict[str, Reply] = {
    "401": error(401, f"Incorrect API key provided: {KEY}."),
    "400": error(400, f"bad header {KEY}"),
    "500": error(500, f"crash with {KEY}"),
    "429": error(429, KEY),
    "html": Reply(f"<html>{KEY}</html>".encode(), 502),
    "page": Reply(f"<html>{KEY}</html>".encode()),
}


def everything(caught: BaseException) -> str:
    """The exception with all that hangs on it, as a traceback prints it."""
    linked = [caught.__cause__, caught.__context__]
    return "".join(traceback.format_exception(caught)) + repr(caught) + repr(vars(caught)) + repr(linked)


@pytest.mark.parametrize("name", ECHOES)
def test_the_key_is_in_no_error_and_no_log(
    name: str,
    images: np.ndarray,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(FakeServer(lambda n, b: ECHOES[name], models=ECHOES[name])) as server:
        asked = judge(server.url, cache=str(tmp_path / "answers"))
        with pytest.raises(LetheError) as caught:
            asked.answer(images[:1], [GENERAL])
        told = everything(caught.value)
        try:
            asked.check()
        except UserError as problem:
            told += everything(problem)
    assert server.keys == [f"Bearer {KEY}"]
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    out = capfd.readouterr()
    for text in (told, caplog.text, out.out, out.err, repr(asked), json.dumps(asked.facts())):
        assert KEY not in text
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]


def test_the_key_is_in_no_answer_and_no_cache(images: np.ndarray, tmp_path: Path) -> None:
    with serving(FakeServer(lambda n, b: completion(f"Yes, {KEY}", model=KEY))) as server:
        asked = judge(server.url, cache=str(tmp_path / "answers"))
        answers = [*asked.answer(images[:1], [GENERAL]), *asked.answer(images[:1], [GENERAL])]
    assert {a.text for a in answers} == {"Yes, [key]"} and {a.model for a in answers} == {"[key]"}
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert files and not any(KEY.encode() in p.read_bytes() for p in files)
