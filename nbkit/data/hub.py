"""Data sets of the Hugging Face hub, through the `datasets` library.

A set is written `org/name`, `org/name:config`, `org/name#split` or `org/name:config#split`, where the split may have a slice as
the library writes it: `org/name#train[:10000]`, `org/name:en#train[5%:10%]`, `org/name#train[:100]+validation[:100]`.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from nbkit.data.rows import Source
from nbkit.data.tables import read_dataset
from nbkit.deadline import within
from nbkit.errors import DataError, nearest

SECONDS = 6.0  # without an answer in this time the hub counts as out of reach
NAME = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<config>[^#:\[\]/\\]+))?(#(?P<split>.*))?", re.DOTALL)
PAGE = re.compile(r"https://(www\.)?(huggingface\.co|hf\.co)/datasets/([\w.-]+/[\w.-]+)/?")


class HubName(NamedTuple):
    id: str
    config: str | None
    split: str | None


class Unreachable(Exception):
    """The hub gave no answer in time."""


def parse(name: str) -> HubName | None:
    """The parts of a hub name, or None where it is none."""
    page = PAGE.fullmatch(name)
    found = NAME.fullmatch(page[3] if page else name)
    return HubName(found["id"], found["config"], found["split"]) if found else None


def read_hub(name: HubName, split: str) -> Source:
    """The rows of a hub set, kept on disk by the library and mapped, not loaded.

    Args:
        split: taken where the name has none.
    Raises: DataError if there is no such set, config or split, if it is gated, or if the hub cannot be reached.
    """
    import datasets

    wanted = _split(name, split)
    try:
        _ask(name.id)
        data = _load(name, wanted)
    except Unreachable as silent:
        data = _cached(name, wanted, silent)
    shown = f"{name.id}{f':{name.config}' if name.config else ''}#{wanted}"
    if isinstance(data, (datasets.Dataset, datasets.IterableDataset)):
        return read_dataset(data, wanted, shown)
    raise DataError(f"{shown} gave a {type(data).__name__}, not one split; name one split, such as {name.id}#train.")


def _split(name: HubName, split: str) -> str:
    import datasets

    wanted = name.split if name.split is not None else split
    try:
        datasets.ReadInstruction.from_spec(wanted)
    except (ValueError, AssertionError, TypeError) as error:
        raise DataError(
            f"{wanted[:80]!r} is no split of {name.id}; write train, train[:10000], train[5%:10%] or train+test, "
            f"as in {name.id}#train[:10000]."
        ) from error
    return wanted


def _ask(repository: str) -> None:
    """One question with a short time limit, before the library's own, which tries for half a minute.

    Raises: Unreachable, or DataError where the hub says no.
    """
    from huggingface_hub import HfApi, errors

    try:
        within(SECONDS, lambda: HfApi().dataset_info(repository, timeout=SECONDS))
    except errors.GatedRepoError as error:
        raise DataError(
            f"The data set {repository!r} is gated: accept its terms on its page of the hub and log in with "
            "huggingface_hub.login(), then read it again."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DataError(
            f"{repository!r} is no file here, and the hub has no data set of that name, or it is private (then log in with "
            "huggingface_hub.login()); check the name."
        ) from error
    except errors.HFValidationError as error:
        raise DataError(f"{repository!r} is no file here and no valid hub id ({str(error)[:120]}); write org/name.") from error
    except Exception as error:  # the HTTP library differs between hub versions, and so do its errors
        reason = str(error).strip().split("\n")[0][:120]
        raise Unreachable(f"{type(error).__name__}: {reason}") from error


def _load(name: HubName, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name.id, name.config, split=split)
    except Exception as error:  # the library raises many kinds: an unknown config or split, no known file, no network
        reason = str(error).strip().split("\n")[0][:200]
        raise DataError(
            f"The data set {name.id!r} could not be loaded from the hub ({type(error).__name__}: {reason}); "
            f"{_remedy(name, split, str(error))}"
        ) from error


def _remedy(name: HubName, split: str, reason: str) -> str:
    if "onfig" in reason and ("pick one" in reason or "not found" in reason):
        return f"name its config: {name.id}:CONFIG#{split}."
    if "plit" in reason:
        known = re.findall(r"'([\w.-]+)'", reason)
        return f"name one of its splits: {name.id}#SPLIT.{nearest(split, known)}"
    return "check the name and the network, or download its file and give that."


def _cached(name: HubName, split: str, silent: Unreachable) -> Any:
    """The set as it was kept by an earlier download. Raises: DataError where there is none."""
    import datasets.config

    # Told that it is offline, the library looks into its cache at once; else it would ask the hub for half a minute first.
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        return datasets.load_dataset(name.id, name.config, split=split)
    except Exception as error:
        raise DataError(
            f"{name.id!r} is no file here, and the hub cannot be reached ({silent}) nor is the set in its cache; check the "
            "network and the name, or give a file."
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before
