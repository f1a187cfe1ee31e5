"""Data sets of the Hugging Face Hub, read from the Hub's cache at one commit.

The files are fetched as they are, and read from the folder of their commit. `datasets.load_dataset("owner/name")`
would, without a network, take the version that was used last, whatever the revision.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from randopt.errors import UserError

CARD = "README.md"
DATA = ("*.parquet", "*.json", "*.jsonl", "*.csv", "*.jsonl.gz", "*.json.gz", "*.csv.gz", "*.arrow", "*.zip")


def load(name: str, config: str | None, revision: str, part: str) -> Any:
    """One part of a configuration as a datasets.Dataset; fetches what is not in the cache.

    Raises whatever the Hub's client or datasets raise.
    """
    import datasets  # 1 s: not for the Snakefile

    return datasets.load_dataset(str(fetch(name, config, revision)), config, split=part)


def fetch(name: str, config: str | None, revision: str) -> Path:
    """The folder that holds the files of a configuration at a commit; only missing files are fetched.

    Nobody is asked where the cache has all of them. Raises UserError for a shortened commit that is none, or several,
    and what the Hub's client raises.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    revision = _whole_commit(name, revision)
    try:
        return _snapshot(name, config, revision, cached=True)
    except LocalEntryNotFoundError:
        return _snapshot(name, config, revision, cached=False)


def _whole_commit(name: str, revision: str) -> str:
    """All 40 digits of a shortened commit, which the Hub does not take: from the cache, else from the history."""
    if not re.fullmatch("[0-9a-f]{7,39}", revision):
        return revision
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    cached = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="dataset") / "snapshots"
    found = {folder.name for folder in cached.glob(f"{revision}*")}
    if not found:
        commits = HfApi().list_repo_commits(name, repo_type="dataset")
        found = {commit.commit_id for commit in commits if commit.commit_id.startswith(revision)}
    if len(found) != 1:
        raise UserError(
            f"source.revision: {revision!r} was given for {name}, and {len(found)} of its commits begin so; "
            "give all 40 digits, from the data set's page."
        )
    return found.pop()


def _snapshot(name: str, config: str | None, revision: str, cached: bool) -> Path:
    from huggingface_hub import hf_hub_download, metadata_load, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    where: dict[str, Any] = {"repo_type": "dataset", "revision": revision, "local_files_only": cached}
    try:
        card = metadata_load(hf_hub_download(name, CARD, **where)) or {}
    except LocalEntryNotFoundError:  # also without a network, after a minute of trying
        if not cached:
            raise
        card = {}
    except EntryNotFoundError:  # a data set without a card
        card = {}
    return Path(snapshot_download(name, allow_patterns=[CARD, *(_patterns(card, config) or DATA)], **where))


def _patterns(card: Mapping[str, Any], config: str | None) -> list[str]:
    """Where the files of a configuration lie, by the card's `configs`; empty when it does not say."""
    for found in card.get("configs") or []:
        if found.get("config_name", "default") == (config or "default"):
            files, folder = found.get("data_files") or [], found.get("data_dir")
            listed = files if isinstance(files, list) else [files]
            paths = [one["path"] if isinstance(one, Mapping) else one for one in listed]
            flat = [path for one in paths for path in (one if isinstance(one, list) else [one])]
            return [f"{folder}/{path}" if folder else path for path in flat or (["*"] if folder else [])]
    return []
