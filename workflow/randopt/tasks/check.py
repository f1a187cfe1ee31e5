"""randopt task check: what a task asks and how it judges, and everything that is wrong with it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from randopt.errors import Mistake, Mistakes, UserError
from randopt.tasks import scorers, tabular
from randopt.tasks.items import check_disjoint, item_id, messages, reference_mistakes, rows
from randopt.tasks.judge import tasks_folder
from randopt.tasks.row import Row
from randopt.tasks.spec import SPLITS, Draft, TaskSpec, is_tabular, read, with_lines
from randopt.tasks.spec import check as check_keys

_MEANWHILE: dict[str, Any] = {"label": "task", "version": 1, "max_tokens": 1, "scorer": "exact"}
TRIED = 20  # rows of each split whose prompt is made
CHARACTERS_PER_TOKEN = 8  # at most, on average, in texts of words
MOST_TOKENS = 131_072  # what the longest contexts hold


def check(task: str, answers: Sequence[str], file: Path | None, item: str, console: Console) -> None:
    """Print a prompt of each split, the splits, and the verdicts on `answers` and on those of `file` (JSON lines).

    Raises Mistakes with all that is wrong with the task, and UserError for an answer or item that is none.
    """
    draft = read(task, tasks_folder())
    spec, mistakes = _spec(draft)
    if spec is None:
        raise Mistakes(draft.where, mistakes)
    wrong = {mistake.path[:1] for mistake in mistakes}
    made, found = _rows(spec)
    scorer = scorers.get(spec.scorer)
    unasked = list(_rendered(spec, made))
    found += unasked
    if ("scorer",) not in wrong and () not in wrong:
        found += islice(reference_mistakes(scorer, made), 1)  # the first is enough
    found += _tokens(spec, made) if ("max_tokens",) not in wrong and () not in wrong else ()
    if made and not unasked:
        console.print(_prompts(spec, made))
    if mistakes or found:
        raise Mistakes(draft.where, [*mistakes, *with_lines(found, draft)])
    console.print(_splits(spec))
    console.print(f"no problem stands twice; scorer {scorer.name}, version {scorer.version}; all is well.")
    judged = [(item, answer) for answer in answers]
    if file is not None:
        judged += _answers(file, item)
    if judged:
        console.print(_verdicts(scorer, judged, made))


def _spec(draft: Draft) -> tuple[TaskSpec | None, list[Mistake]]:
    """The task and the mistakes in its keys; keys that make no row are replaced meanwhile where they are wrong."""
    try:
        return check_keys(draft), []
    except Mistakes as error:
        mistakes = error.mistakes
    wrong = {mistake.path[0] for mistake in mistakes if mistake.path}
    rows_need = ("source", "prompt", "reference", "splits")
    sound = {key: draft.keys[key] for key in _MEANWHILE.keys() & draft.keys.keys() - wrong}
    kept = {**sound, **{key: draft.keys[key] for key in rows_need if key in draft.keys}}
    try:
        return check_keys(replace(draft, keys={**_MEANWHILE, **kept})), mistakes
    except Mistakes:
        return None, mistakes


def _rows(spec: TaskSpec) -> tuple[dict[str, list[Row]], list[Mistake]]:
    """The rows as far as they can be made, and what is wrong with them."""
    try:
        made, mistakes = tabular.collect(spec, Path()) if is_tabular(spec.source) else (rows(spec, Path()), [])
    except UserError as error:
        return {}, [Mistake(str(error), ("splits",))]
    try:
        check_disjoint(spec.name, made)
    except UserError as error:
        mistakes.append(Mistake(str(error), ("splits",)))
    return made, mistakes


def _rendered(spec: TaskSpec, made: Mapping[str, list[Row]]) -> Iterator[Mistake]:
    """Rows that the prompt cannot be made for; the first is enough."""
    for split, found in made.items():
        for index, row in enumerate(found[:TRIED]):
            if not row.fields:
                continue
            try:
                messages(spec, row)
            except UserError as error:
                yield Mistake(f"{item_id(split, index)}: {error}", ("prompt",))
                return


def _tokens(spec: TaskSpec, made: Mapping[str, list[Row]]) -> Iterator[Mistake]:
    texts = [row.reference for found in made.values() for row in found if isinstance(row.reference, str)]
    longest = max(map(len, texts), default=0)
    if longest > CHARACTERS_PER_TOKEN * spec.max_tokens:
        text = (
            f"max_tokens: {spec.max_tokens} was given, but a right answer has {longest} characters and would be cut "
            f"off; give {-(-longest // 2)} or more."
        )
        yield Mistake(text, ("max_tokens",))
    if spec.max_tokens > MOST_TOKENS:
        text = f"max_tokens: {spec.max_tokens} was given, more than any model's context; 1024 is usual."
        yield Mistake(text, ("max_tokens",))


def _prompts(spec: TaskSpec, made: Mapping[str, list[Row]]) -> Group:
    """The first prompt of each split, with its reference."""
    panels = []
    for split, found in made.items():
        if not found or not found[0].fields:
            continue
        text = Text()
        for message in messages(spec, found[0]):
            text.append(f"{message['role']}\n", style="bold").append(f"{_shown(message['content'])}\n\n")
        text.append("reference\n", style="bold").append(json.dumps(found[0].reference, ensure_ascii=False))
        panels.append(Panel(text, title=item_id(split, 0), title_align="left"))
    return Group(*panels)


def _shown(content: str | list[dict[str, str]]) -> str:
    """A message's content, where it holds pictures with their names in brackets."""
    if isinstance(content, str):
        return content
    return "".join(f"[picture {part['value']}]\n" if part["type"] == "image" else part["value"] for part in content)


def _splits(spec: TaskSpec) -> Table:
    table = Table("split", "items", "from", title=f"{spec.label}: {spec.max_tokens} new tokens at most")
    for split in SPLITS:
        asked = spec.splits[split]
        where = str(next(iter(spec.source.values())))
        if "part" in asked:
            where += f", part {asked['part']}, rows {asked['start']} to {asked['start'] + asked['size'] - 1}"
        table.add_row(split, f"{asked['size']:,}", where)
    return table


def _answers(file: Path, item: str) -> list[tuple[str, str]]:
    """(item, response) of each line of a file; UserError naming the line that is none."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the answers {file}: {error}.") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            given: Any = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            raise UserError(f'{file}, line {number} is no JSON ({error}); write {{"response": "..."}}.') from error
        if given is not None:
            if not isinstance(given, dict) or not isinstance(given.get("response"), str):
                raise UserError(f'{file}, line {number}: {line[:100]!r} was given, expected {{"response": "..."}}.')
            found.append((given.get("item", item), given["response"]))
    return found


def _verdicts(scorer: scorers.Scorer, judged: Sequence[tuple[str, str]], made: Mapping[str, list[Row]]) -> Table:
    references = {item_id(split, index): row.reference for split in made for index, row in enumerate(made[split])}
    table = Table("item", "answer", "reference", "reward", "strict", "lenient", "vote")
    for item, response in judged:
        if item not in references:
            raise UserError(f"the item {item!r} is unknown; give one from select-00000 to {list(references)[-1]}.")
        verdict = scorer.score(response, references[item])
        shown = (item, response[-300:], json.dumps(references[item], ensure_ascii=False)[:300])
        told = (f"{verdict.reward:g}", _yes(verdict.strict), _yes(verdict.lenient), verdict.vote_key or "abstains")
        table.add_row(*map(Text, (*shown, *told)))
    return table


def _yes(value: bool) -> str:
    return "yes" if value else "no"
