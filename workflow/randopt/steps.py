"""The CPU steps between scores and report: each reads tables of a run's folder and writes one."""

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import polars as pl

from randopt import blocks, layout, race, tables
from randopt import metrics as run_metrics
from randopt import select as selection_rules
from randopt.errors import UserError
from randopt.experiment import load_run
from randopt.gather import answers, gather, with_select
from randopt.items import read_items
from randopt.plan import read_requests, write_requests
from randopt.score import ScorerFailed
from randopt.tasks.scorers import get, judges
from randopt.vote import votes

log = logging.getLogger(__name__)


def gather_step(run_folder: Path, candidates: int, scorer: str) -> None:
    """candidates.parquet of the first `candidates` candidates, from the shards or from their blocks."""
    run = load_run(run_folder)
    rows = layout.gather_blocks(_shards(run_folder, "search", candidates), candidates)
    if rows:
        scores = _scores(scorer)
        files = [layout.block_file(run_folder, scores, block) for block in rows]
        requests, mark = layout.requests_file(run_folder, "search"), layout.stage_race(run, "search")
        frame = blocks.join(requests, files, run["run_id"], candidates, scores, mark)
    else:
        frame = _gather(run_folder, (0, candidates), scorer)
    tables.write(frame, tables.CANDIDATES, layout.candidates_file(run_folder, candidates), run_id=run["run_id"])


def gather_block_step(run_folder: Path, rows: layout.Shard, scorer: str) -> None:
    """The candidates of one block of shards."""
    scores = _scores(scorer)
    run = load_run(run_folder)
    footer = blocks.footer(run["run_id"], scores, rows, layout.stage_race(run, "search"))
    path = layout.block_file(run_folder, scores, rows)
    tables.write(_gather(run_folder, rows, scorer), tables.BLOCK, path, **footer)


def _gather(run_folder: Path, rows: layout.Shard, scorer: str) -> pl.DataFrame:
    begin, first = rows
    run = load_run(run_folder)
    judge = get(scorer)
    scores = layout.scores(judge.name, judge.version)
    shards = [shard for shard in _shards(run_folder, "search", first) if shard[1] > begin]
    return gather(
        layout.requests_file(run_folder, "search"),
        [layout.shard_file(run_folder, "search", scores, shard) for shard in shards],
        [layout.shard_file(run_folder, "search", "completions", shard) for shard in shards],
        run["run_id"],
        first,
        begin=begin,
        race=layout.stage_race(run, "search"),
        scorer=(judge.name, judge.version),
        items=_item_ids(run_folder, "search"),
    )


def race_step(run_folder: Path) -> None:
    """race.parquet: what the pilot of a raced search earned."""
    run = load_run(run_folder)
    rules, requests = run["race"], layout.requests_file(run_folder, "search")
    pilot = read_requests(requests, run["run_id"])[: rules["pilot"]]
    found = _search_answers(run_folder, rules["pilot"], rules["scorer"], [request.request_id for request in pilot])
    race.write_pilot(found, layout.race_file(run_folder), run)


def select_step(run_folder: Path, candidates: int, members: int) -> None:
    """members/requests.parquet: the best candidates in rank order."""
    run_id = load_run(run_folder)["run_id"]
    experts = selection_rules.select_members(_candidates(run_folder, candidates, run_id), members)
    write_requests(experts, layout.requests_file(run_folder, _members_stage(candidates)), run_id)


def vote_step(run_folder: Path, candidates: int, controls: str, scorer: str, top_k: Sequence[int]) -> None:
    """votes.parquet and selection.parquet."""
    run_id = load_run(run_folder)["run_id"]
    check_members_current(run_folder, candidates)
    frames = _answers(run_folder, candidates, controls, scorer)
    table = _candidates(run_folder, candidates, run_id)
    size = frames["members"]["request_id"].n_unique()
    chosen = selection_rules.selection(table, size, frames["members"])
    folder = _prefix(run_folder, candidates)
    tables.write(_votes(frames, top_k), tables.VOTES, folder / "votes.parquet", run_id=run_id)
    tables.write(chosen, tables.SELECTION, folder / "selection.parquet", run_id=run_id)


def metrics_step(
    run_folder: Path, candidates: int, controls: str, scorer: str, confidence: float, bootstrap: int, seed: int
) -> None:
    """metrics.parquet, after the proof that σ = 0 is the base.

    strict and lenient are told by the scorer, paper by its twin, whichever of them the task names and selected by.
    """
    run = load_run(run_folder)
    run_id = run["run_id"]
    requests = tables.read(layout.requests_file(run_folder, controls), tables.REQUESTS, run_id=run_id)
    texts = tables.read_all(
        _stage_files(run_folder, controls, "completions"),
        tables.COMPLETIONS,
        ["request_id", "item_id", "text"],
        run_id=run_id,
    )
    run_metrics.sigma_zero_reproduces_base(requests, texts)
    folder = _prefix(run_folder, candidates)
    voted = tables.read(folder / "votes.parquet", tables.VOTES, run_id=run_id)

    def judged(name: str) -> dict[str, pl.DataFrame]:
        frames = _answers(run_folder, candidates, controls, name)
        own = voted if name == scorer else _votes(frames, voted["top_k"].unique().sort().to_list())
        return {"votes": own, **frames}

    first, *twins = judges(scorer)
    paper = None
    for twin in twins:
        try:
            paper = judged(twin.name)
        except ScorerFailed as error:
            log.warning("there will be no paper verdicts: %s", error)
    frame = run_metrics.metrics(
        model=run["model"]["name"],
        task=run["task"]["label"],
        run_id=run_id,
        candidates=_candidates(run_folder, candidates, run_id),
        paper=paper,
        confidence=confidence,
        resamples=bootstrap,
        seed=seed,
        **judged(first.name if twins else scorer),
    )
    tables.write(frame, tables.METRICS, folder / "metrics.parquet", run_id=run_id)


def check_members_current(run_folder: Path, candidates: int) -> None:
    """Retire members that a corrected scorer no longer selects, and say what to do.

    Members' completions do not follow a new selection by themselves, so that rescoring costs no GPU
    job as long as the experts stay the same. Where they do not, the old shards are set aside (the
    experts that stayed are taken over from them) and the next start generates the missing ones.
    """
    stage = _members_stage(candidates)
    run_id = load_run(run_folder)["run_id"]
    requests = read_requests(layout.requests_file(run_folder, stage), run_id)
    stale = []
    for path in _stage_files(run_folder, stage, "completions"):
        start, stop = layout.parse_shard(path.stem)
        held = tables.read(path, tables.COMPLETIONS, ["request_id"], run_id=run_id)["request_id"]
        if held.unique(maintain_order=True).to_list() != [r.request_id for r in requests[start:stop]]:
            stale.append(path)
    for path in stale:
        path.rename(path.with_suffix(".retired"))
    if stale:
        raise UserError(
            f"the scores select other experts than those that answered {', '.join(map(str, stale))}. These files "
            "were set aside (.retired); run the same command again: only the new experts are generated."
        )


def _answers(run_folder: Path, candidates: int, controls: str, scorer: str) -> dict[str, pl.DataFrame]:
    """Answers on all splits of the members, the random candidates and the controls."""
    run_id = load_run(run_folder)["run_id"]
    frames = {
        name: answers(
            layout.requests_file(run_folder, stage),
            _stage_files(run_folder, stage, _scores(scorer)),
            _stage_files(run_folder, stage, "completions"),
            run_id,
            stage,
            items=_item_ids(run_folder, stage),
        )
        for name, stage in (
            ("controls", controls),
            ("random", "random"),
            ("members", _members_stage(candidates)),
        )
    }
    reported = {*frames["members"]["request_id"], *frames["random"]["request_id"]}
    search = _search_answers(run_folder, candidates, scorer, reported)
    return {
        "controls": frames["controls"],
        "random": with_select(frames["random"], search),
        "members": with_select(frames["members"], search),
    }


def _votes(frames: Mapping[str, pl.DataFrame], top_k: Sequence[int]) -> pl.DataFrame:
    """VOTES of every method that votes; `frames` as `_answers` gives them."""
    samples = frames["controls"].filter(pl.col("position") >= run_metrics.SAMPLES)
    voters = {"randopt": frames["members"], "random": frames["random"], "self_consistency": samples}
    return pl.concat([votes(answered, top_k, method) for method, answered in voters.items()])


def _search_answers(run_folder: Path, candidates: int, scorer: str, only: Collection[str]) -> pl.DataFrame:
    """Answers of some of the first `candidates` requests of the search."""
    run = load_run(run_folder)
    return answers(
        layout.requests_file(run_folder, "search"),
        _stage_files(run_folder, "search", _scores(scorer), candidates),
        _stage_files(run_folder, "search", "completions", candidates),
        run["run_id"],
        "search",
        only=only,
        items=_item_ids(run_folder, "search"),
        race=layout.stage_race(run, "search"),
    )


def _stage_files(run_folder: Path, stage: str, table: str, first: int | None = None) -> list[Path]:
    """Paths of a stage's shards, or of those that hold its first `first` requests."""
    return [layout.shard_file(run_folder, stage, table, shard) for shard in _shards(run_folder, stage, first)]


def _shards(run_folder: Path, stage: str, first: int | None = None) -> list[layout.Shard]:
    found = layout.stage_shards(load_run(run_folder), stage, _rows(run_folder, stage))
    return [shard for shard in found if first is None or shard[0] < first]


def _scores(scorer: str) -> str:
    found = get(scorer)
    return layout.scores(found.name, found.version)


def _item_ids(run_folder: Path, stage: str) -> list[str]:
    return read_items(load_run(run_folder)["task_id"], layout.stage_splits(stage))["item_id"].to_list()


def _rows(run_folder: Path, stage: str) -> int:
    path = layout.requests_file(run_folder, stage)
    return tables.read(path, tables.REQUESTS, ["request_id"]).height


def _members_stage(candidates: int) -> str:
    return f"{layout.prefix_name(candidates)}/members"


def _prefix(run_folder: Path, candidates: int) -> Path:
    return Path(run_folder) / layout.prefix_name(candidates)


def _candidates(run_folder: Path, candidates: int, run_id: str) -> pl.DataFrame:
    path = layout.candidates_file(run_folder, candidates)
    return tables.read(path, tables.CANDIDATES, run_id=run_id)
