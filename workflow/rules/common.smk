"""The experiment of this config, and the helpers that the rules call. Real code lives in randopt."""

from pathlib import Path

sys.path.insert(0, str(Path(workflow.basedir) / "workflow"))

from snakemake.exceptions import WorkflowError
from snakemake.settings.types import DeploymentMethod

from randopt import (
    config as randopt_config,
    engines,
    experiment as randopt_experiment,
    layout,
    resources as needs,
    sandbox,
    speed,
)
from randopt.cluster import leftovers, lock as driver_lock
from randopt.errors import UserError
from randopt.tasks.scorers import SCORERS, judges

# Jobs find the command of the environment that runs Snakemake, activated or not; in a conda environment of the rules
# it is taken from this checkout. keep_log outlives the Ctrl-C or scancel that ends its command, whose last words
# belong in the log.
COMMAND = (
    f'export PYTHONPATH={workflow.basedir}/workflow; randopt() (exec python -m randopt.cli "$@"); '
    if DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method
    else f"export PATH={sys.prefix}/bin:$PATH; "
)
shell.prefix(f"{COMMAND}keep_log() (trap '' INT TERM; tee \"$@\" >&2); ")


def load_experiment(raw):
    """Check the configuration before anything runs; a mistake is a message, not a traceback."""
    try:
        return randopt_experiment.build(randopt_config.resolve(raw), Path(workflow.basedir))
    except UserError as error:
        raise WorkflowError(str(error)) from None


EXPERIMENT = load_experiment(config)
RUNS = {run.name: run for run in EXPERIMENT.runs}


def run_of(wildcards):
    """The run whose folder the wildcards name."""
    return RUNS[wildcards.run]


def runs_programs():
    """Whether a scorer of this experiment runs models' programs."""
    return any(run.scorer.runs_programs for run in EXPERIMENT.runs)


def shard_files(run, stage, table, rows=None):
    """Paths of a stage's shards, or of those that hold its first `rows` requests."""
    table = run.scores if table == "scores" else table
    return [str(layout.shard_file(run.folder, stage, table, s)) for s in run.shards(stage, rows)]


def answered_items(wildcards):
    """Paths of the items that a stage answers."""
    folder = layout.RESULTS / "tasks" / run_of(wildcards).task_id
    return [str(folder / f"{split}.parquet") for split in layout.stage_splits(wildcards.stage)]


def generate_inputs(wildcards):
    """What a shard reads.

    All of it is ancient: whatever changes a completion is in the run's identity and so in the path;
    a file that was merely made again must not cost a night of GPU time. The command itself refuses
    weights, items or requests whose content changed.
    """
    run = run_of(wildcards)
    paths = {
        "requests": layout.requests_file(run.folder, wildcards.stage),
        "manifest": layout.RESULTS / "models" / run.model_id / "manifest.json",
    }
    named = {name: ancient(str(path)) for name, path in paths.items()}
    named["splits"] = [ancient(path) for path in answered_items(wildcards)]
    if first := layout.race_round(run.description, wildcards.stage, layout.parse_shard(wildcards.shard)):
        named["race"] = ancient(str(layout.race_file(run.folder)))
        named["before"] = ancient(str(layout.candidates_file(run.folder, first)))
    # A smaller prefix comes first, so that experts it shares with a larger one are generated once.
    named["earlier"] = [
        ancient(path) for stage in run.stages_before(wildcards.stage) for path in shard_files(run, stage, "completions")
    ]
    return named


def pilot_files(wildcards, table):
    """Shards of the candidates that a raced search begins with."""
    run = run_of(wildcards)
    return shard_files(run, "search", table, run.description["race"]["pilot"])


def workers_per_job():
    """Engines side by side in a generate job, as a profile or the command line sets it.

    One resource cannot ask for another, and memory and runtime depend on this one.
    """
    chosen = workflow.resource_settings.overwrite_resources.get("generate", {})
    # `in`, since Snakemake's get() makes up a resource of value None
    return chosen["workers_per_job"].value if "workers_per_job" in chosen else 1


def ranks_per_job():
    """Processes that hold the weights in a generate job: the ranks of every worker."""
    return workers_per_job() * EXPERIMENT.config["engine"]["tensor_parallel"]


def block_files(run, n):
    """Paths of the blocks in which the first n candidates are gathered; none where one gather reads their shards."""
    rows = layout.gather_blocks(run.shards("search", n), n)
    return [str(layout.block_file(run.folder, run.scores, block)) for block in rows]


def gather_inputs(wildcards):
    """Shards of the first N candidates, or their blocks where there are more than a thousand shards."""
    run, n = run_of(wildcards), int(wildcards.candidates)
    found = {"requests": ancient(str(layout.requests_file(run.folder, "search")))}
    if blocks := block_files(run, n):
        return found | {"blocks": blocks}
    return found | {table: shard_files(run, "search", table, n) for table in ("scores", "completions")}


def block_shards(wildcards, table):
    """The shards that a block of a large search gathers."""
    run, (start, stop) = run_of(wildcards), layout.parse_shard(wildcards.shard)
    table = f"scores/{wildcards.scorer}-v{wildcards.version}" if table == "scores" else table
    shards = [shard for shard in run.shards("search", stop) if shard[1] > start]
    return [str(layout.shard_file(run.folder, "search", table, shard)) for shard in shards]


def compared_files(wildcards, table):
    """Shards that a prefix's votes and metrics rest on, beside the search's, which stand behind candidates."""
    run = run_of(wildcards)
    stages = [run.controls, "random", f"n{wildcards.candidates}/members"]
    return [path for stage in stages for path in shard_files(run, stage, table)]


def verdict_files(wildcards):
    """Scores that a prefix's metrics rest on, a twin's of the search included: they do not stand behind candidates."""
    run = run_of(wildcards)
    found = [path for table in run.verdicts for path in compared_files(wildcards, table)]
    twins = [table for table in run.verdicts if table != run.scores]
    return found + [p for table in twins for p in shard_files(run, "search", table, int(wildcards.candidates))]


def every_table():
    """All that the runs consist of, but for the ledgers.

    Listed in `all`, because Snakemake does not miss a file that only finished steps have read: whoever
    removes a damaged table, as the message about it says, gets a new one from the same command.
    """
    for run in EXPERIMENT.runs:
        for stage in run.stages():
            yield str(layout.requests_file(run.folder, stage))
            for table in ("completions", *run.verdicts):
                yield from shard_files(run, stage, table)
        for n in run.prefixes:
            for name in ("candidates", "selection", "votes", "metrics"):
                yield str(run.folder / layout.prefix_name(n) / f"{name}.parquet")
        yield from {block: None for n in run.prefixes for block in block_files(run, n)}  # prefixes share them


ADOPTED = {}  # comment of a shard's job -> id of the job that an earlier driver left running for it


def on_slurm():
    """Whether this process submits jobs to SLURM: a driver, no dry run, no job."""
    return workflow.is_main_process and workflow.executor_plugin.name == "slurm"


def slurm_options(wildcards, attempt):
    """What a shard's sbatch is told beside its resources. Evaluated when the job is submitted, after onstart."""
    if not on_slurm():
        return ""
    comment = leftovers.shard_comment(run_of(wildcards), wildcards.stage, layout.parse_shard(wildcards.shard))
    return leftovers.submit_options(comment, attempt, ADOPTED, Path.cwd())


def start_experiment():
    """Become the only driver of these runs, write down what is run, and say what it will take."""
    from randopt import cost  # only here: whoever parses the Snakefile needs no tables

    try:
        if DeploymentMethod.CONDA not in workflow.deployment_settings.deployment_method:
            engines.require(EXPERIMENT.config["engine"]["name"])
        if runs_programs():
            sandbox.require(EXPERIMENT.config["scoring"]["sandbox"])
        driver_lock.hold(run.folder for run in EXPERIMENT.runs)
        if on_slurm():
            from randopt.cluster import plugin

            # a profile's own slurm_extra takes the place of ours, and with it of the dependency
            own = "slurm_extra" in workflow.resource_settings.overwrite_resources.get("generate", {})
            ADOPTED.update(leftovers.settle(EXPERIMENT.runs, Path.cwd(), adopt=not own))
            if ADOPTED:
                logger.info(f"jobs of an earlier driver go on and are waited for: {', '.join(ADOPTED.values())}")
            plugin.install(EXPERIMENT.stop_file, logger.warning)
        EXPERIMENT.stop_file.unlink(missing_ok=True)
        randopt_experiment.describe(EXPERIMENT)
    except UserError as error:
        raise WorkflowError(str(error)) from None
    for run in EXPERIMENT.runs:
        counts = ", ".join(f"{stage} {len(run.shards(stage))}" for stage in run.stages())
        logger.info(f"run {run.name}: N = {run.candidates}, shards: {counts}")
    logger.info(cost.in_short(EXPERIMENT))
    logger.info(f"watch it with: randopt status {EXPERIMENT.config['experiment']}")


def show_result():
    """The table, once it is there."""
    if (EXPERIMENT.folder / "report.md").is_file():
        shell("randopt show {EXPERIMENT.config[experiment]:q}")


def show_failures(snakemake_log):
    """Where to look, and the last words of failed shards."""
    logger.error(f"Logs: this run {' '.join(snakemake_log)}; rules logs/RULE/...; SLURM jobs logs/slurm/")
    shell("randopt status {EXPERIMENT.config[experiment]:q} --once >&2 || true")
    logger.error("Everything finished is kept: run the same command again and only what is missing runs.")
