"""config/README.md, made from the schema: `python -m randopt.config_docs > config/README.md`."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from randopt.config import load_schema

HEAD = """# Configuration

*Made from `workflow/schemas/config.schema.yaml` by `python -m randopt.config_docs > config/README.md`; a test
compares the two.*

`config.yaml` is the demo. For an experiment of your own, copy it and start
`snakemake --cores all --configfile config/mine.yaml`; a config given there replaces the demo's, it is not merged with
it. Every key is checked before anything runs; unknown keys are refused. Single keys can be overridden on the command
line: `--config search='{candidates: 96}'`. The resolved config is written to `results/experiments/NAME/config.yaml`.

What may be changed without losing work, and what it costs:

| change | what runs again |
|---|---|
| `search.candidates` raised, `search.prefixes` | only the new candidates, and the members of the new selection |
| `ensemble.top_k` up to `members` | votes and metrics, no generation |
| `ensemble.members` raised | only the new members and samples |
| `statistics` | metrics |
| `scoring` | scores and what follows |
| `controls.self_consistency_temperature` | the controls |
| a task's `scorer`, or a scorer's version | scores and what follows; only experts that are new are generated |
| model, dtype, items, prompt, token limit, σ, first seed, noise law, exclude | a new run; the old one stays |
| `search.race` | a new search in a folder of its own; the old one stays |
| `search.shard_size` | refused once a run's search is planned, since it names the files |
| `search.shard_minutes` | nothing: the size that a run's search was planned with stays |

Tasks are described in `config/tasks/`; `times_table.yaml` explains every key of a task file, and
[docs/own-task.md](../docs/own-task.md) makes one from a CSV file.
"""


def render() -> str:
    """The whole page."""
    return HEAD + "\n## Keys\n\n" + "\n".join(_rows(load_schema(), "")) + "\n"


def _rows(schema: Mapping[str, Any], path: str) -> Iterator[str]:
    """A bullet per key, its children below it."""
    for name, child in schema.get("properties", {}).items():
        key = f"{path}.{name}" if path else name
        description = " ".join(child.get("description", "").split())
        facts = [_type(child)]
        if "default" in child and child["default"] != {}:
            facts.append(f"default `{json.dumps(child['default'])}`")
        if name in schema.get("required", []):
            facts.append("required")
        yield f"- **`{key}`** ({', '.join(facts)}): {description}"
        if key == "tasks":
            continue
        yield from _rows(child, key)
        yield from _rows(child.get("items", {}), f"{key}[]")


def _type(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    bounds = [
        f"{sign} {schema[key]}"
        for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("exclusiveMaximum", "<"))
        if key in schema
    ]
    kinds = schema.get("type", "text or mapping")
    named = [
        f"list of {_type(schema.get('items', {}))}" if kind == "array" else kind
        for kind in (kinds if isinstance(kinds, list) else [kinds])
    ]
    return " ".join([" or ".join(named), *bounds])


if __name__ == "__main__":
    print(render(), end="")
