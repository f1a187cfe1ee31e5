"""The experiment of this config, and the helpers that the rules call. Real code lives in randopt."""

from pathlib import Path

sys.path.insert(0, str(Path(workflow.basedir) / "workflow"))

from snakemake.exceptions import WorkflowError

from randopt import config as randopt_config, experiment as randopt_experiment, layout, resources as needs
from randopt.errors import UserError

# Jobs find the command of the environment that runs Snakemake, activated or not.
shell.prefix(f"export PATH={sys.prefix}/bin:$PATH; ")


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


def shard_files(run, stage, table, rows=None):
    """Paths of a stage's shards, or of those that hold its first `rows` requests."""
    return [str(layout.shard_file(run.folder, stage, table, s)) for s in run.shards(stage, rows)]


def start_experiment():
    """Write down what is run, and say what it will take."""
    try:
        randopt_experiment.describe(EXPERIMENT)
    except UserError as error:
        raise WorkflowError(str(error)) from None
    for run in EXPERIMENT.runs:
        counts = ", ".join(f"{stage} {len(run.shards(stage))}" for stage in run.stages())
        logger.info(f"run {run.name}: N = {run.candidates}, shards: {counts}")
    logger.info(f"watch it with: randopt status {EXPERIMENT.config['experiment']}")


def show_result():
    """The table, once it is there."""
    if (EXPERIMENT.folder / "report.md").is_file():
        shell("randopt show {EXPERIMENT.config[experiment]:q}")


def show_failures(snakemake_log):
    """Where to look, and the last words of failed shards."""
    logger.error(f"Logs: this run {snakemake_log}; rules logs/RULE/...; SLURM jobs .snakemake/slurm_logs/")
    shell("randopt status {EXPERIMENT.config[experiment]:q} --once || true")
    logger.error("Everything finished is kept: run the same command again and only what is missing runs.")
