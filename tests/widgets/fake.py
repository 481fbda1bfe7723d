"""A session without a model: the engine's door, with the calls kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nbkit.config import ALL_LINEAR, DataConfig, DataRecipe, LoraConfig, ModelConfig, TrainConfig
from nbkit.data.findings import Finding
from nbkit.errors import ConfigError, DataError, ModelError, TrainingError
from nbkit.events import EvalEvent, Event, MemoryEvent, RunFailed, RunFinished, RunStarted, StepEvent


@dataclass
class Entry:
    """What panels read of a catalog entry."""

    name: str
    parameters: int = 134_515_008
    needed_bytes: int = 1_300_000_000
    fits: bool = True
    reason: str = "Most of it: weights 0.5 GiB."
    free_bytes: int = 22 * 2**30
    family: str = "Llama"


@dataclass
class Loaded:
    name: str
    message: str
    folder: str = "cache"
    source: str = "cache"


@dataclass
class Preview:
    raw: dict[str, Any]
    pieces: list[tuple[str, bool]]


class Words:
    """A tokenizer of one id a word; id 0 is the stop token and the padding."""

    def __init__(self) -> None:
        self.words = ["<|im_end|>", "<|im_start|>user\n", "<|im_start|>assistant\n"]
        self.all_special_ids, self.pad_token_id, self.eos_token_id, self.bos_token_id = [0, 1, 2], 0, 0, None
        self.added_tokens_decoder: dict[int, Any] = {}
        self.chat_template = ""

    def ids(self, said: str) -> list[int]:
        words = [word + " " for word in said.split(" ")]
        self.words += dict.fromkeys(word for word in words if word not in self.words)
        return [self.words.index(word) for word in words]

    def convert_ids_to_tokens(self, index: int) -> str:
        return self.words[index]

    def decode(self, ids: list[int], skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False) -> str:
        return "".join(self.words[index] for index in ids)


@dataclass
class Report:
    rows: list[dict[str, Any]]
    recipe: DataRecipe
    source: str = "sample:ships-log"
    reason: str = "every row has a list of messages with role and content"
    confidence: float = 1.0
    rows_in: int = 0
    used: int = 0
    dropped: int = 0
    refused: int = 0
    trained_tokens: int = 40
    total_tokens: int = 100
    max_seq_length: int = 512
    findings: list[Any] = field(default_factory=list)
    repairs: list[Any] = field(default_factory=list)
    examples: list[Any] = field(default_factory=list)
    row_numbers: list[int] = field(default_factory=list)
    held_out_rows: list[Any] = field(default_factory=list)
    tokenizer: Any = None

    def __post_init__(self) -> None:
        self.rows_in = self.used = len(self.rows)
        self.row_numbers = [3 + i for i in range(len(self.rows))]
        self.tokenizer = Words()
        for row in self.rows:
            prompt, reply = [1, *self.tokenizer.ids(row["user"]), 0, 2], [*self.tokenizer.ids(row["reply"]), 0]
            self.examples.append({"input_ids": prompt + reply, "labels": [-100] * len(prompt) + reply})

    def preview(self, index: int) -> Preview:
        row = self.rows[index]
        return Preview(row, [(f"<|im_start|>user\n{row['user']}<|im_end|>\n", False), (f"{row['reply']}<|im_end|>", True)])


class FakeRun:
    """Steps every few milliseconds on the loop of whoever awaits it, like the supervisor does."""

    def __init__(self, folder: Path, steps: int, config: Any, failure: Exception | None = None) -> None:
        self.dir, self.total_steps, self.failure, self.config = folder, steps, failure, config
        self.status, self.events, self.result, self.error = "running", [], None, None
        self.subscribers: list[tuple[Callable[[list[Event]], None], list[int]]] = []

    def stop(self) -> None:
        self.status = "stopping"

    def subscribe(self, callback: Callable[[list[Event]], None]) -> None:
        self.subscribers.append((callback, [0]))

    def __await__(self) -> Generator[Any, None, Any]:
        return self._supervise().__await__()

    def deliver(self, *events: Event) -> None:
        self.events += events
        for callback, seen in self.subscribers:
            fresh, seen[0] = self.events[seen[0] :], len(self.events)
            if fresh:
                callback(fresh)

    async def _supervise(self) -> Any:
        self.deliver(RunStarted(total_steps=self.total_steps, device="cpu", trainable_parameters=10))
        self.deliver(EvalEvent(loss=3.2, rows=4))
        step = 0
        while step < self.total_steps and self.status == "running":
            await asyncio.sleep(0.01)
            step += 1
            loss = StepEvent(step=step, loss=3 / step, learning_rate=1e-3, total_tokens=200, seconds=0.5)
            rss = MemoryEvent(step=step, memory="RSS", used_bytes=10**9, peak_bytes=2 * 10**9, total_bytes=8 * 10**9)
            self.deliver(loss, rss)
            if self.failure is not None:
                self.status, self.error = "failed", self.failure
                self.deliver(RunFailed(step=step, error=str(self.failure)))
                raise self.failure
        self.result = RunFinished(step=step, stopped=self.status == "stopping", seconds=1.0, adapter_path="runs/one/adapter")
        self.status = "stopped" if self.result.stopped else "finished"
        self.deliver(self.result)
        return self.result


class Stream:
    def __init__(self, said: str, pause: float = 0.0) -> None:
        self.said, self.pause, self.stopped = said, pause, False

    def stop(self) -> None:
        self.stopped = True

    def __iter__(self) -> Iterator[str]:
        for piece in (self.said[i : i + 7] for i in range(0, len(self.said), 7)):
            time.sleep(self.pause)
            if self.stopped:
                return
            yield piece

    @property
    def text(self) -> str:
        return self.said


class FakeSession:
    """What panels ask of a `Session`. `said` is put wherever the outside world could speak; `calls` keeps what was called."""

    def __init__(self, folder: Path = Path("run"), said: str = "plain", steps: int = 3, failure: Exception | None = None) -> None:
        self.folder, self.said, self.steps, self.failure = folder, said, steps, failure
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.loaded: Loaded | None = None
        self.model_config: ModelConfig | None = None
        self.data_config: DataConfig | None = None
        self.lora: LoraConfig | None = None
        self.data: Report | None = None
        self.run: FakeRun | None = None
        self.pause, self.chunks = 0.0, 0
        self._listeners: list[Callable[[str], None]] = []

    def subscribe(self, callback: Callable[[str], None]) -> None:
        self._listeners.append(callback)

    def _changed(self, topic: str) -> None:
        for callback in list(self._listeners):
            callback(topic)

    def catalog(self, load_in_4bit: bool | None = None) -> list[Entry]:
        big = Entry("llama-3.1-8b-instruct", 8_030_261_248, 40 * 2**30, fits=False, reason="load_in_4bit=True would do.")
        return [big, Entry("smollm2-135m-instruct"), Entry("named " + self.said, fits=False, reason=self.said)]

    def load(self, name: str, load_in_4bit: bool = False, dtype: str = "auto", max_seq_length: int = 2048) -> Loaded:
        self.calls.append(("load", (name,), {"load_in_4bit": load_in_4bit, "dtype": dtype, "max_seq_length": max_seq_length}))
        if name.startswith("no-such"):
            raise ModelError(f"There is no model {name!r}; did you mean smollm2-135m-instruct?")
        self.model_config = ModelConfig(name=name, load_in_4bit=load_in_4bit, dtype=dtype, max_seq_length=max_seq_length)
        self.loaded = Loaded(name, f"{name} was loaded from the cache. {self.said}")
        self._changed("model")
        return self.loaded

    def lora_size(self, name: str | None = None, rank: int = 16, targets: Any = ALL_LINEAR) -> tuple[int, int, int]:
        if name is not None and "/" in name:
            raise ModelError(f"The shape of {name} is known once it is loaded.")
        return rank * 2_621_440, 8_030_261_248, rank * 2_621_440 * 4

    def add_lora(
        self,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        targets: Any = ALL_LINEAR,
        bias: str = "none",
        use_rslora: bool = False,
        seed: int = 3407,
    ) -> None:
        self.lora = LoraConfig(
            rank=rank, alpha=alpha, dropout=dropout, targets=tuple(targets), bias=bias, use_rslora=use_rslora, seed=seed
        )
        self.calls.append(("add_lora", (), {"lora": self.lora}))
        if self.loaded is None:
            raise ModelError('No model is loaded; call session.load("smollm2-135m-instruct") before you add LoRA.')
        self._changed("lora")

    def use_data(self, source: Any, recipe: DataRecipe | None = None, held_out: Any = None) -> Report:
        return self.take_data(*self.read_data(source, recipe, held_out))

    def read_data(
        self, source: Any, recipe: DataRecipe | None = None, held_out: Any = None, seed: int = 3407, progress: Any = None
    ) -> tuple[Report, DataConfig]:
        recipe = recipe or DataRecipe()
        self.calls.append(("read_data", (source,), {"recipe": recipe, "held_out": held_out}))
        if self.loaded is None:
            raise ModelError('No model is loaded; call session.load("smollm2-135m-instruct") before you map data.')
        if source == "missing.jsonl":
            raise DataError("There is no file missing.jsonl; give the path of a JSONL, JSON or CSV file.")
        for done in range(1, 1 + self.chunks):
            time.sleep(self.pause)
            if progress is not None:
                progress("Rows to tokens", done * 100, 100 * self.chunks)
        rows = [{"user": f"{self.said} {i}", "reply": self.said, self.said[:50]: self.said} for i in range(1, 5)]
        report = Report(rows, replace(recipe, format="messages", columns={"messages": "messages"}), source=source)
        report.findings = [Finding(30 + i, "null_reply", self.said) for i in range(20)]
        drop = replace(report.recipe, faulty="drop")
        report.repairs = (
            [SimpleNamespace(sentence=f"Drop rows: {self.said}", setting=("faulty", "drop"), recipe=drop)]
            if recipe.faulty != "drop"
            else []
        )
        report.reason = self.said
        report.held_out_rows = [[{"role": "user", "content": "held " + self.said}, {"role": "assistant", "content": self.said}]]
        return report, DataConfig(source=source, recipe=report.recipe, held_out=held_out)

    def take_data(self, report: Report, config: DataConfig) -> Report:
        self.data, self.data_config = report, config
        self._changed("data")
        return report

    def inspect(self, row: int | None = None, batch: int = 0, train: TrainConfig | None = None) -> Any:
        from nbkit.inspection import inspect

        return inspect(self, row=row, batch=batch, train=train)

    def train(self, train: TrainConfig | None = None) -> FakeRun:
        self.calls.append(("train", (train,), {}))
        if self.loaded is None:
            raise ModelError('No model is loaded; call session.load("smollm2-135m-instruct") before you make a run.')
        if self.lora is None:
            raise ConfigError("The model has no adapter yet; call session.add_lora(rank=16) first.")
        if self.data is not None and self.data.trained_tokens == 0:
            raise TrainingError("No token of the 4 rows would be trained: every label is masked.")
        self.run = FakeRun(self.folder, self.steps, SimpleNamespace(train=train or TrainConfig()), self.failure)
        self._changed("run")
        return self.run

    def chat(
        self, prompt: str, max_new_tokens: int = 128, temperature: float = 0.0, adapter: bool = True, seed: int | None = None
    ) -> Stream:
        keywords = {"max_new_tokens": max_new_tokens, "temperature": temperature, "adapter": adapter, "seed": seed}
        self.calls.append(("chat", (prompt,), keywords))
        if self.loaded is None:
            raise ModelError('No model is loaded; call session.load("smollm2-135m-instruct") before you chat.')
        return Stream(f"{'tuned' if adapter else 'base'} {self.said}", self.pause)
