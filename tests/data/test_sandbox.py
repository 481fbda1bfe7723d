"""Templates that loop, grow, pry or break cost a sentence, not the session."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

import pytest

from nbkit.data import jinja_worker, sandbox
from nbkit.data.findings import RowFault
from nbkit.data.sandbox import Worker, render_here
from nbkit.data.template import Renderer
from tests.data.vocab import tokenizer

JOB: Any = ([{"role": "user", "content": "x"}], None, False)
ECHO = "{% for m in messages %}{{ m.content }}{% endfor %}"
posix = pytest.mark.skipif(sys.platform != "linux", reason="limits on memory hold on Linux only")


@pytest.fixture(scope="module")
def worker() -> Any:
    made = Worker(seconds=0.4)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def patient() -> Any:
    """One whose clock does not strike before its memory is full, however busy the machine is."""
    made = Worker(seconds=8)
    yield made
    made.stop()


def fault(worker: Worker, template: str) -> RowFault:
    before = time.monotonic()
    (found,) = worker.render(template, {}, [JOB], patience=8)
    assert time.monotonic() - before < 30
    assert isinstance(found, RowFault), found
    return found


ENDLESS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a long sort": "{{ ('xy' * 9999999) | sort | list | length }}",
}
GROWING = {
    "a long string": "{{ 'x' * 10 ** 10 }}",
    "a long list": "{{ (range(99999) | list * 9000) | length }}",
    "doubling": "{% set n = namespace(s='x' * 64) %}{% for a in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "more than is read": "{{ 'x' * (2 ** 26 + 1) }}",
}
PRYING = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "cycler": "{{ cycler.__init__.__globals__.os.environ }}",
    "joiner": "{{ joiner.__init__.__globals__ }}",
    "changing a message": "{{ messages.append(1) }}",
    "changing a dict": "{{ messages[0].update(a=1) }}",
    "import": "{% import 'os' as os %}{{ os }}",
    "include": "{% include '/etc/passwd' %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "great powers": "{% set n = namespace(a=9) %}{% for i in range(9) %}{% set n.a = n.a ** n.a %}{% endfor %}{{ n.a }}",
    "no template": "{% if %}",
    "chance": "{{ [1, 2] | random }}",
    "filler": "{{ lipsum() }}",
}


@posix
@pytest.mark.parametrize("name", ENDLESS)
def test_an_endless_template_is_stopped_by_its_own_clock(worker: Worker, name: str) -> None:
    found = fault(worker, ENDLESS[name])
    assert found.kind == "template_limit" and "more than 0.4 s" in found.sentence


@posix
@pytest.mark.parametrize("name", GROWING)
def test_a_growing_template_is_stopped(patient: Worker, name: str) -> None:
    found = fault(patient, GROWING[name])
    assert found.kind == "template_limit"
    assert "more than 512 MB" in found.sentence or "more than 67,108,864 characters" in found.sentence


@pytest.mark.parametrize("name", PRYING)
def test_a_prying_template_is_refused_in_its_own_words(worker: Worker, name: str) -> None:
    (found,) = worker.render(PRYING[name], {}, [JOB])
    text = found.sentence if isinstance(found, RowFault) else found
    assert isinstance(found, RowFault) or text.strip() in ("", "None")
    assert not any(secret in text for secret in ("PATH", "root:", "<class 'os"))


def test_rows_around_a_stopped_one_are_rendered(worker: Worker) -> None:
    slow = "{% if messages[0].content == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    jobs: Any = [([{"role": "user", "content": word}], None, False) for word in ("a", "loop", "b", "c")]
    found = worker.render(slow + "{% endif %}" + ECHO, {}, jobs, patience=8)
    assert [isinstance(one, RowFault) for one in found] == [False, True, False, False]
    assert found[0] == "a" and found[2:] == ["b", "c"]


def test_a_worker_that_dies_or_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Worker()
    try:
        assert made.render(ECHO, {}, [JOB]) == ["x"]
        first = made._process
        assert first is not None
        first.kill()
        first.wait()
        assert made.render(ECHO, {}, [JOB]) == ["x"], "a worker that ended while idle is not a fault of the row"
        loop = ENDLESS["nested loops"]
        (found,) = made.render(loop, {}, [JOB], patience=0.2)  # as where there is no clock inside
        assert isinstance(found, RowFault) and found.kind == "template_limit" and "0.2 s" in found.sentence
        assert made._process is None
        assert made.render(ECHO, {}, [JOB]) == ["x"]
    finally:
        made.stop()


def test_a_template_that_always_loops_is_given_up_after_a_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "HOPELESS", 2)
    made = Worker()
    try:
        before = time.monotonic()
        found = made.render(ENDLESS["nested loops"], {}, [JOB] * 1000, patience=0.3)
        assert len(found) == 1000 and all(isinstance(one, RowFault) and one.kind == "template_limit" for one in found)
        assert "0.3 s" in str(found[0]) and "2 times in a row and is not tried again" in str(found[2])
        assert made.render(ENDLESS["nested loops"], {}, [JOB])[0].kind == "template_limit"  # type: ignore[union-attr]
        assert time.monotonic() - before < 5
        assert made.render(ECHO, {}, [JOB]) == ["x"], "other templates go on"
    finally:
        made.stop()


def test_an_interrupt_leaves_no_answer_for_the_next_question(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Worker()
    try:
        true = made._collect

        def interrupted(*arguments: Any) -> Any:
            raise KeyboardInterrupt

        monkeypatch.setattr(made, "_collect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made.render(ECHO, {}, [([{"role": "user", "content": "old"}], None, False)])
        monkeypatch.setattr(made, "_collect", true)
        assert made.render(ECHO, {}, [JOB]) == ["x"]
    finally:
        made.stop()


def test_the_worker_knows_no_secret_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    made = Worker()
    try:
        made.render(ECHO, {}, [JOB])
        assert made._process is not None
        if sys.platform == "linux":
            with open(f"/proc/{made._process.pid}/environ", "rb") as file:
                assert b"hf_secret" not in file.read() and b"HF_TOKEN" in os.environb
    finally:
        made.stop()


def test_every_text_passes_the_pipe_unchanged(worker: Worker) -> None:
    texts = ["", "é😀\u2028\x00\r\n", "\ud800 half", "x" * 3_000_000, '"\\'] * 3
    jobs: Any = [([{"role": "user", "content": text}], None, False) for text in texts]
    assert worker.render(ECHO, {}, jobs) == texts == render_here(ECHO, {}, jobs)
    assert worker.render(ECHO, {}, []) == []


def test_threads_share_one_worker(worker: Worker) -> None:
    answers: dict[int, Any] = {}

    def ask(number: int) -> None:
        jobs: Any = [([{"role": "user", "content": f"{number} {i}"}], None, False) for i in range(50)]
        answers[number] = worker.render(ECHO, {}, jobs) == [f"{number} {i}" for i in range(50)]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == dict.fromkeys(range(6), True)


def test_known_templates_start_no_process_and_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(sandbox.worker, "render", lambda template, names, jobs: asked.append(template) or ["x"] * len(jobs))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    Renderer(tokenizer(), "chatml").render(turns)
    assert asked == []
    with pytest.raises(RowFault):
        Renderer(tokenizer(), "{{ 'unknown' }}").render(turns)
    assert asked


def test_a_row_may_take_two_seconds() -> None:
    assert sandbox.worker.seconds == jinja_worker.SECONDS == 2.0


def test_the_environment_is_the_one_of_transformers() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = (
        "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content | tojson }}\n  {% else %}\n"
        "{% generation %}{{ {'a': m.content} | tojson(indent=2) }}{% endgeneration %}\n{% continue %}{% endif %}\n{% endfor %}\n"
        "{% set n = namespace(a=1) %}{{ n.a }}{{ dict(a=1).a }}{{ missing }}{{ tools }}{{ documents }}{{ add_generation_prompt }}"
    )
    messages: Any = [{"role": "user", "content": "<é> \"'"}, {"role": "assistant", "content": "😀\n"}]
    (theirs,), _ = render_jinja_template([messages], chat_template=template, bos_token="<s>")
    assert jinja_worker.render(template, {"bos_token": "<s>"}, (messages, None, False)) == theirs
