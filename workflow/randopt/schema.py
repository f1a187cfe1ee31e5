"""JSON schemas that are documentation, defaults and checks at once: of configurations, tasks and scorers' options.

Imported whenever the Snakefile is parsed, so nothing heavy may be imported here.
"""

import copy
import difflib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from randopt.errors import Mistake

FOLDER = Path(__file__).resolve().parents[1] / "schemas"


def load(name: str) -> dict[str, Any]:
    """The schema in workflow/schemas/NAME.schema.yaml. Beside JSON schema's keywords it may say what is `expected`."""
    return yaml.safe_load((FOLDER / f"{name}.schema.yaml").read_text(encoding="utf-8"))


def fill_defaults(value: Any, schema: Mapping[str, Any]) -> None:
    """Fill in the defaults of `schema`, in place, at every depth."""
    if isinstance(value, dict):
        for key, child in schema.get("properties", {}).items():
            if "default" in child:
                value.setdefault(key, copy.deepcopy(child["default"]))
            if key in value:
                fill_defaults(value[key], child)
    elif isinstance(value, list) and "items" in schema:
        for element in value:
            fill_defaults(element, schema["items"])


def mistakes(value: Any, schema: Mapping[str, Any], name: str) -> list[Mistake]:
    """Where `value`, called `name` in messages, is not what `schema` says."""
    import jsonschema  # 0.1 s: only where something is really checked

    validator = _validator()(schema, format_checker=jsonschema.FormatChecker(["regex"]))
    errors = sorted(validator.iter_errors(value), key=lambda error: list(map(str, error.absolute_path)))
    return [mistake for error in errors for mistake in _explain(error, name)]


def line_of(text: str, path: tuple[str | int, ...]) -> int | None:
    """The line, from 1, of the deepest key of `path` that the YAML `text` has; None when it has not even the first."""
    node, line = yaml.compose(text), None
    for key in path:
        pairs: list = []
        if isinstance(node, yaml.MappingNode):
            pairs = [pair for pair in node.value if pair[0].value == str(key)]
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int):
            pairs = [(element, element) for element in node.value[key : key + 1]]
        if not pairs:
            break
        line, node = pairs[0][0].start_mark.line + 1, pairs[0][1]
    return line


@cache
def _validator() -> Any:
    import jsonschema

    # JSON knows one kind of number, and 1.0 is an integer there; in YAML it is a slip of the pen
    types = jsonschema.Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
    return jsonschema.validators.extend(jsonschema.Draft202012Validator, type_checker=types)


def _explain(error: Any, name: str) -> list[Mistake]:
    """Schema errors in a user's words: the key, what was given, what is expected."""
    path = tuple(error.absolute_path)
    key = ".".join(map(str, path)) or name
    if error.validator == "additionalProperties":
        known = sorted(error.schema["properties"])
        unknown = [given for given in error.instance if given not in known]
        found = []
        for given in unknown:
            full = ".".join(map(str, (*path, given)))
            close = difflib.get_close_matches(str(given), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}."
            found.append(Mistake(f"unknown key {full!r} (value {error.instance[given]!r}): {hint}", (*path, given)))
        return found
    if error.validator == "required":
        missing = [needed for needed in error.validator_value if needed not in error.instance]
        where = f"{key}: " if path else ""
        return [Mistake(f"{where}the key {needed!r} is missing; add it.", path) for needed in missing]
    expected = {
        "enum": lambda: f"one of {', '.join(map(str, error.validator_value))}",
        "type": lambda: f"of type {error.validator_value}",
        "minimum": lambda: f"at least {error.validator_value}",
        "exclusiveMinimum": lambda: f"greater than {error.validator_value}",
        "exclusiveMaximum": lambda: f"less than {error.validator_value}",
        "minItems": lambda: f"a list with at least {error.validator_value} element(s)",
        "pattern": lambda: f"text of the form {error.validator_value}",
    }.get(error.validator, lambda: error.message)
    about = error.schema.get("description", "")
    words = error.schema["expected"] if "expected" in error.schema else expected()
    return [Mistake(f"{key}: {error.instance!r} was given, expected {words}. {about}".strip(), path)]
