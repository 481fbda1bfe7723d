"""Chat templates rendered: the sandbox they run in, and the loop of the worker process for templates that nobody knows.

The environment is the one that transformers renders chat templates in (`transformers.utils.chat_template_utils`): an
immutable sandbox with trimmed blocks, `raise_exception`, `tojson` without escapes, loop controls and the `generation` tag.
It differs in what would make two renderings of one row differ: `strftime_now` gives the date `TODAY`, which the makers of
Llama 3.1 wrote into their template as its default, and there is no `random` filter and no `lipsum`.

The worker reads a batch of jobs from its standard input and writes one answer a job, so that the process that waits can tell
which job takes too long. Standard library and jinja2 only: it has to start in a tenth of a second.
"""

from __future__ import annotations

import json
import signal
import struct
import sys
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import IO, Any, ClassVar

TODAY = datetime(2024, 7, 26)
SECONDS = 2.0  # of processor time that one rendering may take
MEMORY = 512 << 20  # bytes that the worker may grow by
LONGEST = 1 << 26  # characters that one rendering may have
IDLE = 60  # seconds without a job after which the worker ends
GREATEST_POWER = 1 << 16  # of bits in the result of **

Job = tuple[list[dict[str, Any]], list[Any] | None, bool]  # messages, tools, is the generation prompt wanted?


class TooMuch(BaseException):
    """Raised by the clock; no template can catch it."""


@lru_cache(maxsize=1)
def environment() -> Any:
    from jinja2 import Environment, nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks the replies for transformers; here it only passes on what stands in it."""

        tags: ClassVar[set[str]] = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

        def _inside(self, caller: Callable[[], str]) -> str:
            return caller()

    class Bounded(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["**"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if isinstance(left, int) and isinstance(right, int) and right * max(left.bit_length(), 1) > GREATEST_POWER:
                raise SecurityError("the power is too great")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made: Environment = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = TODAY.strftime
    del made.filters["random"], made.globals["lipsum"]
    return made


@lru_cache(maxsize=16)
def compiled(template: str) -> Any:
    return environment().from_string(template)


def render(template: str, names: dict[str, str], job: Job) -> str:
    """The text of one conversation; `names` are the tokenizer's special tokens (bos_token, eos_token …).

    Raises: whatever the template's own code raises.
    """
    messages, tools, prompt = job
    return compiled(template).render(messages=messages, tools=tools, documents=None, add_generation_prompt=prompt, **names)


def answer(template: str, names: dict[str, str], job: Job, seconds: float = SECONDS) -> tuple[str, str]:
    """("text", what was rendered), ("refused", the template's own words) or ("too_much", the limit it ran into)."""
    try:
        text = render(template, names, job)
    except TooMuch:
        return "too_much", f"it took more than {seconds:g} s"
    except MemoryError:
        return "too_much", f"it took more than {MEMORY >> 20} MB"
    except Exception as error:  # whatever a template's own code may raise
        return "refused", str(error).strip() or type(error).__name__
    return ("too_much", f"it wrote more than {LONGEST:,} characters") if len(text) > LONGEST else ("text", text)


# -- the worker ------------------------------------------------------------------------------------


def write_frame(stream: IO[bytes], value: Any) -> None:
    """One value as JSON, its length before it."""
    data = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    stream.write(struct.pack("<Q", len(data)) + data)
    stream.flush()


def read_frame(stream: IO[bytes]) -> Any:
    """The value that `write_frame` wrote. Raises: EOFError where the stream ends."""
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    (length,) = struct.unpack("<Q", head)
    data = stream.read(length)
    if len(data) < length:
        raise EOFError
    return json.loads(data.decode("utf-8", "surrogatepass"))


def limit() -> bool:
    """Bound memory, files and core dumps, where the system can; says whether there is a clock too."""
    if sys.platform == "win32":
        return False
    import resource

    bounds = {resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}
    if sys.platform == "linux":  # elsewhere the limit on addresses does not hold
        with open("/proc/self/statm", encoding="ascii") as file:
            bounds[resource.RLIMIT_AS] = int(file.read().split()[0]) * resource.getpagesize() + MEMORY
    for kind, most in bounds.items():
        resource.setrlimit(kind, (most, most))

    def stop(number: int, frame: Any) -> None:
        raise TooMuch

    signal.signal(signal.SIGPROF, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the notebook's stop button is not meant for this process
    return True


def serve(source: IO[bytes], sink: IO[bytes]) -> None:
    """Answer batches until the other side closes the pipe, or nothing was asked for a minute."""
    environment()
    clock = limit()
    while True:
        if clock:
            signal.alarm(IDLE)
        try:
            batch = read_frame(source)
        except EOFError:
            return
        if clock:
            signal.alarm(0)
        seconds = batch["seconds"]
        for job in batch["jobs"]:
            try:
                if clock:
                    signal.setitimer(signal.ITIMER_PROF, seconds)
                found = answer(batch["template"], batch["names"], job, seconds)
                if clock:
                    signal.setitimer(signal.ITIMER_PROF, 0)
            except TooMuch:  # between the rendering and the clock's being stopped
                found = ("too_much", f"it took more than {seconds:g} s")
            write_frame(sink, found)


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
