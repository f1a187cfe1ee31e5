"""Names of files and shards. Every path of results/ is made here or in the rules that mirror it.

results/models/MODEL_ID/manifest.json          the prepared model
results/tasks/TASK_ID/{select,confirm,test}.parquet
results/tasks/TASK_ID/images/                  pictures that the items ask about, each named by its content
results/MODEL/TASK/RUN_ID/                     one run; RUN_ID-lossless-1a2b3c/ with a raced search
    run.yaml                                   its identity, readable
    probe.json                                 its speed, if it was probed
    search|search-probe|controls-t0.7|random|n00048/members/     one stage each:
        requests.parquet
        completions|scores/number-v1|ledger/00000-00063.parquet     scores/NAME_paper-v1 too if there is a twin
        blocks/number-v1/00000-63999.parquet   candidates of 1,000 shards, in a search of more than that
        race.parquet                           what a raced search learnt from its pilot
    n00048/                                    what follows for the first 48 candidates:
        candidates, selection, votes, metrics .parquet
results/experiments/EXPERIMENT/                resolved config, tables and figures; rescore/OLD--NEW/ differences
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from randopt.canonical import short_hash

RESULTS = Path("results")
SPLITS = ("select", "confirm", "test")
PROBE = "search-probe"  # a stage of a few candidates that tells the speed; the search takes its answers over
PROBE_CANDIDATES = 4
GATHER_BLOCK = 1000  # shards that are gathered at once; more make a job of minutes that starts again from nothing

# Which items each stage answers: candidates are scored on select; whoever may be reported also
# answers confirm and test. Random candidates have their select scores from the search already.
STAGE_SPLITS = {
    "search": ("select",),
    "controls": SPLITS,
    "random": ("confirm", "test"),
    "members": ("confirm", "test"),
}

Shard = tuple[int, int]  # rows [start, stop) of the stage's requests


def task_folder(task_id: str) -> Path:
    """Where a task's items are."""
    return RESULTS / "tasks" / task_id


def images_folder(task: Path) -> Path:
    """Where the pictures of a task's items are, below its folder."""
    return Path(task) / "images"


def race_mark(run: Mapping[str, Any]) -> str | None:
    """What names a run's race, as in lossless-1a2b3c; None without one. `run` is the content of run.yaml."""
    race = run.get("race")
    return f"{race['mode']}-{short_hash(race, 6)}" if race else None


def run_folder_name(run: Mapping[str, Any]) -> str:
    """RUN_ID, or RUN_ID-lossless-1a2b3c with a race, which leaves out some of the run's completions."""
    return "-".join(filter(None, (run["run_id"], race_mark(run))))


def stage_race(run: Mapping[str, Any], stage: str) -> str | None:
    """The race's mark in the footers of a stage's files: only a search is raced, its probe included."""
    return race_mark(run) if stage_kind(stage) == "search" else None


def race_rounds(run: Mapping[str, Any], total: int) -> list[int]:
    """First rows of a race's rounds below `total`: where the pilot ends, then wherever the plan has doubled."""
    rounds, row = [], run["race"]["pilot"] if "race" in run else total
    while row < total:
        rounds.append(row)
        row *= 2
    return rounds


def race_round(run: Mapping[str, Any], stage: str, shard: "Shard") -> int | None:
    """First row of the round that a shard belongs to: all rows before it give its bound. None: nobody is pruned."""
    rounds = race_rounds(run, shard[0] + 1) if stage == "search" else []
    return rounds[-1] if rounds else None


def prefix_name(candidates: int) -> str:
    """Folder of what follows for the first `candidates` candidates, as in n00048."""
    return f"n{candidates:05d}"


def controls_stage(temperature: float) -> str:
    """Stage of the controls; another self-consistency temperature is another stage of the same run."""
    return f"controls-t{temperature:g}"


def controls_temperature(stage: str) -> float:
    """The temperature that a controls stage's name carries."""
    return float(stage.removeprefix("controls-t"))


def stage_kind(stage: str) -> str:
    """search, controls, random or members."""
    return stage.rsplit("/", 1)[-1].split("-", 1)[0]


def stage_splits(stage: str) -> tuple[str, ...]:
    """The splits whose items a stage answers."""
    return STAGE_SPLITS[stage_kind(stage)]


def stage_shard_size(run: Mapping[str, Any], stage: str) -> int:
    """Requests per shard of a stage: as many generations as a search shard has, whatever the items.

    `run` is the content of run.yaml.
    """
    items = {split: part["size"] for split, part in run["task"]["splits"].items()}
    work = run["shard_size"] * items["select"]
    return max(1, work // sum(items[split] for split in stage_splits(stage)))


def shards(total: int, size: int, cuts: Sequence[int] = ()) -> list[Shard]:
    """Rows 0 .. total-1 in ranges of `size`, none across a row of `cuts`: the last before each is shorter."""
    ends = [0, *(cut for cut in cuts if 0 < cut < total), total]
    return [(start, min(start + size, end)) for begin, end in pairwise(ends) for start in range(begin, end, size)]


def stage_shards(run: Mapping[str, Any], stage: str, total: int) -> list[Shard]:
    """The shards of a stage of `total` requests. A raced search is cut where its rounds begin."""
    cuts = race_rounds(run, total) if stage == "search" else ()
    return shards(total, stage_shard_size(run, stage), cuts)


def gather_blocks(shards: Sequence[Shard], first: int) -> list[Shard]:
    """The rows of each block in which the first `first` requests are gathered; none where one gather does it all."""
    if len(shards) <= GATHER_BLOCK:
        return []
    groups = [shards[at : at + GATHER_BLOCK] for at in range(0, len(shards), GATHER_BLOCK)]
    return [(group[0][0], min(group[-1][1], first)) for group in groups]


def shard_name(shard: Shard) -> str:
    """Inclusive row range, as in 00000-00063."""
    return f"{shard[0]:05d}-{shard[1] - 1:05d}"


def parse_shard(name: str) -> Shard:
    """The rows [start, stop) that a shard's name carries."""
    first, last = name.split("-")
    return int(first), int(last) + 1


def scores(name: str, version: int) -> str:
    """Folder of one scorer version's scores in a stage, as in scores/number-v1 or scores/regex-1a2b3c-v1.

    The version is in the path, so that a new one is a missing file (Snakemake overlooks a changed param behind
    an ancient input) and old verdicts stay for comparison.
    """
    return f"scores/{name}-v{version}"


def shard_file(run: Path, stage: str, table: str, shard: Shard) -> Path:
    """A shard's completions, ledger, or scores (whose folder `scores` names)."""
    return Path(run) / stage / table / f"{shard_name(shard)}.parquet"


def block_file(run: Path, scorer: str, rows: Shard) -> Path:
    """The candidates of a block of search shards; `scorer` is the folder of its scores, as in scores/number-v1."""
    return Path(run) / "search" / "blocks" / Path(scorer).name / f"{shard_name(rows)}.parquet"


def race_file(run: Path) -> Path:
    """What a raced search learnt from its pilot."""
    return Path(run) / "search" / "race.parquet"


def candidates_file(run: Path, first: int) -> Path:
    """Every candidate of the first `first`."""
    return Path(run) / prefix_name(first) / "candidates.parquet"


def requests_file(run: Path, stage: str) -> Path:
    """The requests of a stage."""
    return Path(run) / stage / "requests.parquet"


def manifest_file(model_id: str) -> Path:
    """What is recorded of a prepared model."""
    return RESULTS / "models" / model_id / "manifest.json"


def kept_file(output: Path) -> Path:
    """A second name of a shard's completions or ledger that Snakemake does not know, and so never removes."""
    return Path(output).with_suffix(".kept")


def parts_folder(completions: Path) -> Path:
    """Where a shard's finished requests wait to be merged."""
    return Path(completions).with_suffix(".parts")
