"""What every test stands on: no network, and no cache but its own."""

import os

import pytest
from hypothesis import settings

# How long an example takes depends on the machine; no test may. The examples are the same in every
# run, so that a change is judged by what it changes; `pytest --hypothesis-profile=roaming` draws
# new ones.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.register_profile("roaming", deadline=None)
settings.load_profile("steady")

# Read when the libraries are imported, so they are set before any test is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory):
    """A cache that the tests share; it is keyed by content, so that is safe, and it is faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOLDFAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    """A cache in which nothing is yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("HOLDFAST_CACHE", str(folder))
    return folder
