"""The configuration: schema, defaults, and the rules that span several keys.

Imported whenever the Snakefile is parsed, so nothing heavy may be imported here.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from randopt import layout, schema
from randopt.errors import UserError

SHARD_SIZE = 64  # where neither search.shard_size nor search.shard_minutes is given


def load_schema() -> dict[str, Any]:
    """The JSON schema, which is also the documentation of every key."""
    return schema.load("config")


def load_file(path: Path) -> dict[str, Any]:
    """A configuration file as a mapping; UserError when it is missing or no YAML mapping."""
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds {type(found).__name__}, expected a mapping of configuration keys.")
    return found


def resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` checked against the schema and the cross-field rules, with every default filled in.

    Raises UserError that lists every mistake, each with its key, its value and the remedy.
    """
    rules = load_schema()
    resolved = _plain(config)
    _read_off(resolved)
    mistakes = [str(mistake) for mistake in schema.mistakes(resolved, rules, "the configuration")]
    if not mistakes:
        schema.fill_defaults(resolved, rules)
        search = resolved["search"]
        if "shard_minutes" not in search:
            search.setdefault("shard_size", SHARD_SIZE)
        ensemble = resolved["ensemble"]
        ensemble["members"] = ensemble["members"] or max(ensemble["top_k"])
        search["race"]["keep"] = search["race"]["keep"] or ensemble["members"]
        mistakes = _cross_field_mistakes(resolved)
    if mistakes:
        listing = "\n".join(f"  - {mistake}" for mistake in mistakes)
        raise UserError(f"the configuration cannot be used:\n{listing}\nEvery key is explained in config/README.md.")
    return resolved


def _plain(value: Any) -> Any:
    """A copy in plain dicts and lists: Snakemake hands over ordered ones, which YAML cannot write."""
    if isinstance(value, Mapping):
        return {key: _plain(element) for key, element in value.items()}
    return [_plain(element) for element in value] if isinstance(value, (list, tuple)) else value


def _read_off(config: Any) -> None:
    """Mend, in place, what YAML 1.1 makes of `mode: off`: false."""
    race = config.get("search", {}).get("race") if isinstance(config.get("search"), dict) else None
    if isinstance(race, dict) and race.get("mode") is False:
        race["mode"] = "off"


def _cross_field_mistakes(config: dict[str, Any]) -> list[str]:
    """Rules that no schema can say."""
    search, ensemble = config["search"], config["ensemble"]
    total, members = search["candidates"], ensemble["members"]
    mistakes = []
    for sigma in search["sigmas"]:
        if not (math.isfinite(sigma) and sigma > 0):
            mistakes.append(
                f"search.sigmas: {sigma} was given, expected finite numbers above 0 (the base itself is a control)."
            )
    engine = config["engine"]
    if engine["tensor_parallel"] > 1 and engine["name"] != "vllm":
        mistakes.append(
            f"engine.tensor_parallel: {engine['tensor_parallel']} was given, but engine.name: {engine['name']} uses "
            "one device; set it to 1 or use vllm."
        )
    repeated = sorted({sigma for sigma in search["sigmas"] if search["sigmas"].count(sigma) > 1})
    if repeated:
        mistakes.append(f"search.sigmas: {repeated} stands more than once; give each σ once.")
    if "shard_size" in search and "shard_minutes" in search:
        mistakes.append(
            f"search.shard_size: {search['shard_size']} and search.shard_minutes: {search['shard_minutes']} were both "
            "given; remove one."
        )
    if search.get("shard_size", 1) > total:
        mistakes.append(
            f"search.shard_size: {search['shard_size']} is more than search.candidates = {total}; use {total} or less."
        )
    too_large = [prefix for prefix in search["prefixes"] if prefix > total]
    if too_large:
        mistakes.append(
            f"search.prefixes: {too_large} exceed search.candidates = {total}; a prefix is a part of the plan."
        )
    too_large = [top_k for top_k in ensemble["top_k"] if top_k > members]
    if too_large:
        mistakes.append(
            f"ensemble.top_k: {too_large} exceed ensemble.members = {members}; raise members to {max(too_large)} "
            "(its new members then answer the confirm and test items)."
        )
    smallest = min([total, *search["prefixes"]])
    if members > smallest:
        mistakes.append(
            f"ensemble.top_k / ensemble.members: K = {members} is more than N = {smallest} candidates; "
            "lower K or raise search.candidates (and drop smaller search.prefixes)."
        )
    if search["race"]["mode"] != "off":
        mistakes += _race_mistakes(search["race"], total, members)
    if search["first_seed"] + total > 2**64:
        mistakes.append(f"search.first_seed: {search['first_seed']} + N passes 2**64; choose a smaller one.")
    for field, names in (
        ("models", [model["name"] for model in config["models"]]),
        ("tasks", [task if isinstance(task, str) else task["name"] for task in config["tasks"]]),
    ):
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated and field == "models":
            mistakes.append(f"{field}: the name(s) {repeated} stand more than once; names label folders.")
    return mistakes


def _race_mistakes(race: Mapping[str, Any], total: int, members: int) -> list[str]:
    """What a race needs: a pilot that knows the bound, and holds the random candidates and the probe in full."""
    pilot, keep = race["pilot"], race["keep"]
    mistakes = []
    if keep < members:
        mistakes.append(
            f"search.race.keep: {keep} is less than ensemble.members = {members}: experts could be lost; give "
            f"{members} or more, or 0."
        )
    least = max(keep, layout.PROBE_CANDIDATES)
    if not least <= pilot <= total:
        mistakes.append(
            f"search.race.pilot: {pilot} was given, expected {least} (what is kept, and the probe) to {total} "
            "(search.candidates); about five times what is kept is a good choice."
        )
    if race["mode"] == "confident" and pilot and race["delta"] > keep / pilot / 2:
        mistakes.append(
            f"search.race.delta: {race['delta']} was given, expected at most half of keep / pilot = "
            f"{keep / pilot:.3g}: so large a share of all candidates reaches the bound anyway."
        )
    return mistakes
