"""randopt fetch: everything an experiment needs from the Hugging Face Hub, for nodes that do not see it."""

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from randopt.errors import Mistake, Mistakes, UserError
from randopt.experiment import Experiment
from randopt.models import source as model_source
from randopt.models.prepare import hub_snapshot
from randopt.tasks import hub


class Fetched(NamedTuple):
    """One repository in the Hub's cache."""

    what: str  # model or data set, its name and commit
    fetched: int  # bytes that were not there before
    size: int  # bytes of the repository's files in the cache


def fetch(experiment: Experiment) -> Iterator[Fetched]:
    """Fetch what is missing of every model and data set, one after the other.

    Raises Mistakes at the end, for all that could not be fetched; the rest is there then.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, so that nothing can be fetched; unset it for this command.")
    failed = []
    for what, kind, name, get in _wanted(experiment):
        before = _size(kind, name)
        try:
            get()
        except Exception as error:  # the Hub's client has no common base class for its errors
            text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {str(error).strip()}"
            failed.append(Mistake(f"{what}: {text.splitlines()[0]}"))
            continue
        size = _size(kind, name)
        yield Fetched(what, size - before, size)
    if failed:
        raise Mistakes("what could not be fetched", failed)


def cache_folder() -> Path:
    """The Hub's cache, which every node has to see."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _wanted(experiment: Experiment) -> Iterator[tuple[str, str, str, Callable[[], object]]]:
    """(what it is, kind of repository, its name, how to get it) of each model and data set, each once."""
    for text in dict.fromkeys(model["source"] for model in experiment.models.values()):
        source = model_source.parse(text, Path())
        if source.kind == "hf":
            what = f"model {source.location}@{source.revision[:12]}"
            yield what, "model", source.location, partial(hub_snapshot, source)
    wanted = {place: None for task in experiment.tasks.values() for place in _places(task.source)}
    for name, config, revision in wanted:
        what = f"data set {name}{f' ({config})' if config else ''}@{revision[:12]}"
        yield what, "dataset", name, partial(hub.fetch, name, config, revision)


def _places(source: Mapping[str, Any]) -> list[tuple[str, str | None, str]]:
    """(data set, configuration, commit) of all that a task's source reads on the Hub."""
    if "hub" not in source:
        return []
    given = [source["config"], *([source["join"]["config"]] if "join" in source else [])]
    configs = [config for one in given for config in (one.values() if isinstance(one, Mapping) else [one])]
    return [(source["hub"], config, source["revision"]) for config in configs]


def _size(kind: str, name: str) -> int:
    """Bytes of a repository's files in the cache."""
    folder = cache_folder() / f"{kind}s--{name.replace('/', '--')}"
    total = 0
    for path, _, files in os.walk(folder):
        for file in files:
            status = os.lstat(os.path.join(path, file))
            total += status.st_size if not os.path.islink(os.path.join(path, file)) else 0
    return total
