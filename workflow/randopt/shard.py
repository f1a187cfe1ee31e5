"""generate: one shard of requests on one accelerator, resumable at every request.

The candidate loop: set the weights, stream the completions, hand them to a writer thread, go on.
The accelerator waits for neither disk nor scoring.
"""

import gc
import json
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from randopt import engines, layout, node, parts, plan, race, tables
from randopt.engines import Completion, Engine, EngineSettings, Item
from randopt.errors import UserError
from randopt.experiment import load_run
from randopt.files import give_second_name, patiently, remove_temporaries
from randopt.items import items_hash, read_items, references, to_items
from randopt.models import local_copy
from randopt.models.prepare import Manifest, check_files, read_manifest
from randopt.requests import Request
from randopt.score import judge
from randopt.tasks import scorers

log = logging.getLogger(__name__)


def generate(
    run_folder: Path,
    stage: str,
    shard: layout.Shard,
    batch_size: int,
    threads: int,
    disk_wait: float = 0.0,
    scratch: Path | None = None,
    tensor_parallel: int = 1,
    workers: int = 1,
) -> None:
    """Make a shard's completions and ledger, continuing from the parts of earlier attempts.

    Several `workers` share the job's devices, each with an engine and a slice of the requests.
    A full or read-only results folder is waited for, up to `disk_wait` seconds at each request. The weights are
    read from a copy below `scratch`, if given.
    Raises UserError for anything the user can mend; whatever was finished stays in parts.
    """
    run = load_run(run_folder)
    requests = plan.read_requests(layout.requests_file(run_folder, stage), run["run_id"])[shard[0] : shard[1]]
    if len(requests) != shard[1] - shard[0]:
        raise UserError(
            f"{layout.requests_file(run_folder, stage)} has no rows {layout.shard_name(shard)}; "
            "remove it and run snakemake again."
        )
    table = read_items(run["task_id"], layout.stage_splits(stage))
    output = layout.shard_file(run_folder, stage, "completions", shard)
    footer = {"run_id": run["run_id"], "items_hash": items_hash(table), "race": layout.stage_race(run, stage)}
    kept = parts.Parts(output, footer, table["item_id"].to_list())
    ledger = layout.shard_file(run_folder, stage, "ledger", shard)
    earlier = kept.load_progress() or parts.finished_progress(layout.kept_file(ledger), run["run_id"])
    progress = parts.begin_attempt(earlier, run["run_id"], stage, shard)
    kept.save_progress(progress)
    try:
        patiently(lambda: kept.reuse(requests, parts.siblings(run_folder, stage, output)), disk_wait)
        first = layout.race_round(run, stage, shard)
        contest = None if first is None else _race(run_folder, run, first, table)
        found = {request: rows for request in requests if (rows := kept.read(request)) is not None}
        missing = [request for request in requests if request not in found]
        progress.done = progress.done_at_attempt = len(found)
        progress.pruned = sum(map(race.pruned_items, found.values())) if contest else 0
        del found
        log.info("%d of %d requests are to be generated", len(missing), len(requests))
        manifest = read_manifest(layout.manifest_file(run["model_id"]))
        digest = manifest.content["weights_digest"]
        settings = EngineSettings(
            dtype=run["model"]["dtype"],
            max_tokens=run["decoding"]["max_tokens"],
            batch_size=batch_size,
            chat_template=run["model"]["chat_template"],
            law=run["noise"]["law"],
            exclude=tuple(run["model"]["exclude"]),
            threads=threads,
            tensor_parallel=tensor_parallel,
            ordered=contest is not None,
        )

        def work(requests: Sequence[Request], kept: parts.Parts, progress: parts.Progress, threads: int) -> None:
            own = replace(settings, threads=threads)
            _generate_missing(run, table, requests, kept, progress, own, manifest, disk_wait, scratch, contest)

        if len(missing) > 1 and workers > 1:
            node.generate(work, missing, kept, progress, workers, threads, tensor_parallel)
        elif missing:
            work(missing, kept, progress, threads)
        completions = kept.merge(requests)
        # Snakemake removes a finished output when it believes the job failed (a late network file system),
        # starts it again (a restarted driver) or misses an input; what is under another name is taken over. That name
        # comes first, so that there is no moment in which a removal loses anything.
        second = layout.kept_file(output)

        def publish() -> None:
            tables.write(completions, tables.COMPLETIONS, second, **kept.footer, **_place(stage, shard))
            give_second_name(second, output)
            _write_ledger(layout.kept_file(ledger), run, progress, completions, requests, len(missing), digest)
            give_second_name(layout.kept_file(ledger), ledger)

        patiently(publish, disk_wait)
    except BaseException as error:
        progress.state = "failed" if isinstance(error, Exception) else "interrupted"
        progress.error = str(error) or type(error).__name__
        try:
            kept.save_progress(progress)
        except UserError:
            log.warning("the state of the shard could not be saved")
        raise
    kept.remove()
    for path in (output, layout.kept_file(output), ledger, layout.kept_file(ledger)):
        remove_temporaries(path)


def run_requests(
    engine: Engine,
    items: Sequence[Item],
    requests: Sequence[Request],
    kept: parts.Parts,
    progress: parts.Progress,
    disk_wait: float = 0.0,
    contest: race.Race | None = None,
) -> None:
    """The candidate loop. At most one finished request waits for the disk, for up to `disk_wait` seconds.

    With a race, a candidate that is lost is not generated to its end.
    `randopt verify` will want the digest of each expert's weights, and of some candidate's; of all it would cost time.
    """
    every = layout.stage_kind(progress.stage) in ("members", "random")  # a members stage takes over from random
    with progress.bar() as bar, ThreadPoolExecutor(max_workers=1) as writer:
        pending: Future[None] | None = None
        for request in requests:
            begun = time.perf_counter()
            engine.set_weights(request.perturbation)
            set_at = time.perf_counter()
            stream = engine.generate(items, request.decoding)
            completions = contest.watch(stream) if contest else list(stream)
            progress.seconds_perturbing += set_at - begun
            progress.seconds_generating += time.perf_counter() - set_at
            if every or (layout.stage_kind(progress.stage) == "search" and request is requests[-1]):
                progress.digests[request.request_id] = engine.weights_digest()
            if pending is not None:
                pending.result()
            progress.done += 1
            progress.pruned += sum(completion.finish_reason == race.PRUNED for completion in completions)
            pending = writer.submit(_keep, kept, request, completions, progress, disk_wait)
            bar.update()
        if pending is not None:
            pending.result()


def _keep(
    kept: parts.Parts, request: Request, completions: Sequence[Any], progress: parts.Progress, disk_wait: float
) -> None:
    rows = parts.rows(request, completions, kept.item_ids)
    patiently(lambda: kept.write(request, rows), disk_wait)
    kept.save_progress(progress)


def _generate_missing(
    run: Mapping[str, Any],
    table: pl.DataFrame,
    missing: Sequence[Request],
    kept: parts.Parts,
    progress: parts.Progress,
    settings: EngineSettings,
    manifest: Manifest,
    disk_wait: float,
    scratch: Path | None,
    contest: race.Race | None,
) -> None:
    """Load the engine, run the loop, and prove that the base is still the base."""
    begun = time.perf_counter()
    spent = progress.seconds_total
    items = to_items(table, layout.task_folder(run["task_id"]))
    # items of one batch are all under way at once; in the table's order their texts are those of an unraced run
    if contest and len(items) > settings.batch_size:
        items = contest.pilot.hardest_first(items)
    engine = _load_engine(run["engine"], manifest, settings, scratch)
    progress.seconds_loading += time.perf_counter() - begun
    progress.device = engine.device
    progress.state = "running"
    kept.save_progress(progress)
    try:
        run_requests(engine, items, missing, kept, progress, disk_wait, contest)
    finally:
        progress.seconds_total = spent + time.perf_counter() - begun
    engine.set_weights(())
    try:
        _check_digest(engine, manifest, "restored after the last request")
    except UserError:
        for request in missing:  # made by weights that cannot be trusted
            kept.path(request).unlink(missing_ok=True)
        raise


def _race(run_folder: Path, run: Mapping[str, Any], first: int, table: pl.DataFrame) -> race.Race:
    """The race of the round that begins at row `first`."""
    rules = run["race"]
    scorer = scorers.get(rules["scorer"])
    if scorer.version != rules["scorer_version"]:
        raise UserError(
            f"this race was planned with version {rules['scorer_version']} of the scorer {scorer.name}, installed is "
            f"version {scorer.version}; start snakemake again, which plans it anew."
        )
    expected = references(table)

    def reward(completion: Completion) -> float:
        return judge(scorer, completion.item_id, completion.text, expected[completion.item_id]).reward

    pilot = race.read_pilot(layout.race_file(run_folder), run, table["item_id"].to_list())
    before = tables.read(layout.candidates_file(run_folder, first), tables.CANDIDATES, run_id=run["run_id"])
    contest = race.Race(pilot, race.bound(before, rules["keep"], table.height), scorer.max_reward, reward)
    if rules["mode"] == "confident":
        contest.model = race.Abilities(pilot.rewards, scorer.max_reward)
        contest.likely = race.likely_bound(before, rules["keep"], table.height, rules["pilot"])
        contest.delta = rules["delta"]
    return contest


def _load_engine(name: str, manifest: Manifest, settings: EngineSettings, scratch: Path | None) -> Engine:
    """The engine with the recorded base in place, read from the node's copy where that is wanted and sound."""
    if scratch is None:
        check_files(manifest)
        return _load_from(name, manifest, settings)
    local = local_copy.local_manifest(manifest, scratch)
    try:
        return _load_from(name, local, settings)
    except Exception as error:
        if local is manifest or not local_copy.discard_damaged(local):
            raise
        log.warning(
            "this node's copy was damaged (%s); the weights are read from the shared folder %s", error, manifest.folder
        )
    gc.collect()  # what is left of the first attempt holds memory that the second needs
    check_files(manifest)
    return _load_from(name, manifest, settings)


def _load_from(name: str, manifest: Manifest, settings: EngineSettings) -> Engine:
    engine = engines.load(name, manifest, settings)
    _check_digest(engine, manifest, "loaded")
    return engine


def _check_digest(engine: Engine, manifest: Manifest, when: str) -> None:
    found, expected = engine.weights_digest(), manifest.content["weights_digest"]
    if found != expected:
        raise UserError(
            f"the base weights as {when} have the digest {found}, the manifest says {expected}. Either memory is "
            "faulty or this model is held in memory in another layout than its checkpoint; no score of this attempt "
            "is kept."
        )


def _place(stage: str, shard: layout.Shard) -> dict[str, str | int]:
    return {"stage": stage, "start": shard[0], "stop": shard[1]}


def _write_ledger(
    path: Path,
    run: Mapping[str, Any],
    progress: parts.Progress,
    completions: pl.DataFrame,
    requests: Sequence[Request],
    requests_here: int,
    digest: str,
) -> None:
    """One row: what the shard took, over all attempts."""
    shard = (progress.start, progress.stop)
    row = {
        "run_id": run["run_id"],
        **_place(progress.stage, shard),
        "host": progress.host,
        "device": progress.device or "none needed",
        "workers": progress.workers,
        "scheduler_job_id": progress.scheduler_job_id,
        "attempts": progress.attempts,
        "requests_here": requests_here,
        "seconds_loading": progress.seconds_loading,
        "seconds_perturbing": progress.seconds_perturbing,
        "seconds_generating": progress.seconds_generating,
        "seconds_total": progress.seconds_total,
        "prompt_tokens": completions["prompt_tokens"].cast(pl.UInt64).sum(),
        "completion_tokens": completions["completion_tokens"].cast(pl.UInt64).sum(),
        "weights_digest": digest,
        "digests": [
            {"request_id": request.request_id, "digest": progress.digests[request.request_id]}
            for request in requests  # what was set aside since an earlier attempt is left out
            if request.request_id in progress.digests
        ],
        "versions": json.dumps(engines.versions(run["engine"])),
    }
    frame = pl.DataFrame([row], schema=tables.LEDGER.schema)
    tables.write(frame, tables.LEDGER, path, run_id=run["run_id"])
