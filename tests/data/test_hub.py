"""Names of hub sets, and what is said where one cannot be read. The hub itself is played."""

from __future__ import annotations

import time
from typing import Any

import pytest

from nbkit.data import hub
from nbkit.data.sources import read
from nbkit.errors import DataError

datasets = pytest.importorskip("datasets")
huggingface_hub = pytest.importorskip("huggingface_hub")
ROWS = [{"instruction": f"Say {i}.", "output": "x"} for i in range(100)]


class Hub:
    """What the hub answers, and what was asked of it."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.error: Exception | None = None
        self.silent: Exception | None = None

    def dataset_info(self, repository: str, timeout: float) -> None:
        assert timeout <= 10
        if self.silent:
            raise self.silent

    def load_dataset(self, name: str, config: str | None = None, *, split: str) -> Any:
        self.asked.append((name, config, split, datasets.config.HF_HUB_OFFLINE))
        if self.error:
            raise self.error
        return datasets.Dataset.from_list(ROWS)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.setattr(datasets, "load_dataset", made.load_dataset)
    return made


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("org/name", ("org/name", None, None)),
        ("org/na-me.v1_x", ("org/na-me.v1_x", None, None)),
        ("org/name:config", ("org/name", "config", None)),
        ("org/name:con fig-2", ("org/name", "con fig-2", None)),
        ("org/name#train[:10000]", ("org/name", None, "train[:10000]")),
        ("org/name:en#train[5%:10%]+test", ("org/name", "en", "train[5%:10%]+test")),
        ("https://huggingface.co/datasets/org/name", ("org/name", None, None)),
        ("name", None),
        ("../name", None),
        ("org/name/more", None),
        ("org/name:", None),
    ],
)
def test_names(name: str, parts: tuple[str | None, ...] | None) -> None:
    assert hub.parse(name) == parts


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("org/name", ("org/name", None, "train", False)),
        ("org/name:en", ("org/name", "en", "train", False)),
        ("org/name:en#test[:10%]", ("org/name", "en", "test[:10%]", False)),
        ("https://huggingface.co/datasets/org/name", ("org/name", None, "train", False)),
    ],
)
def test_config_split_and_slice_go_to_the_library(played: Hub, name: str, asked: tuple[Any, ...]) -> None:
    found = read(name)
    assert played.asked == [asked]
    assert found.name == f"org/name{':en' if asked[1] else ''}#{asked[2]}"
    assert [row.value for row in found.rows] == ROWS
    assert found.count == 100 and found.fingerprint
    read("org/name", split="validation")
    assert played.asked[1] == ("org/name", None, "validation", False)


@pytest.mark.parametrize("split", ["", "train[", "train[a:b]", "tr ain", "train[:10"])
def test_splits_that_cannot_be(played: Hub, split: str) -> None:
    with pytest.raises(DataError, match=r"is no split of org/name; write train, train\[:10000\]"):
        read(f"org/name#{split}")
    assert played.asked == []


def http_error(kind: str, status: int = 404) -> Exception:
    error = getattr(huggingface_hub.errors, kind)
    made = error.__new__(error)
    Exception.__init__(made, f"{status} of the hub\nand much more")
    return made


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http_error("RepositoryNotFoundError"), "'org/name' is no file here, and the hub has no data set of that name"),
        (http_error("GatedRepoError"), r"is gated: accept its terms .* log in with huggingface_hub.login\(\)"),
        (http_error("HFValidationError"), "no valid hub id"),
    ],
)
def test_what_the_hub_refuses(played: Hub, error: Exception, message: str) -> None:
    played.silent = error
    with pytest.raises(DataError, match=message):
        read("org/name")
    assert played.asked == []


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        (
            "Config name is missing.\nPlease pick one among the available configs: ['en', 'de']",
            r"name its config: org/name:CONFIG#train",
        ),
        ("BuilderConfig 'x' not found. Available: ['en', 'de']", r"name its config: org/name:CONFIG#train"),
        ("Unknown split \"train\". Should be one of ['training', 'test'].", r"org/name#SPLIT. Did you mean training\?"),
        ("No (supported) data files found", "download its file and give that"),
    ],
)
def test_what_the_library_refuses(played: Hub, reason: str, message: str) -> None:
    played.error = ValueError(reason)
    with pytest.raises(DataError, match=message) as caught:
        read("org/name")
    assert "\n" not in str(caught.value)


def test_without_a_network_the_cache_is_read_at_once(played: Hub) -> None:
    played.silent = ConnectionError("no route\nand more")
    assert [row.value for row in read("org/name").rows] == ROWS
    assert played.asked == [("org/name", None, "train", True)]
    assert datasets.config.HF_HUB_OFFLINE is False
    played.error = ConnectionError("not cached")
    with pytest.raises(
        DataError, match=r"hub cannot be reached \(ConnectionError: no route\) nor is the set in its cache; check the"
    ):
        read("org/name")
    assert datasets.config.HF_HUB_OFFLINE is False


def test_a_hub_that_hangs_is_given_up_after_seconds(played: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "SECONDS", 0.1)
    played.dataset_info = lambda *_, **__: time.sleep(2)  # type: ignore[method-assign]
    played.error = ConnectionError("not cached")
    began = time.monotonic()
    with pytest.raises(DataError, match=r"cannot be reached \(TimeoutError: no answer within 0 s\)"):
        read("org/name")
    assert time.monotonic() - began < 1.5
