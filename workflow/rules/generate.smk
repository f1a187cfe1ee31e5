"""Requires: requests, items, a model. Produces: completions. The only rule that needs an accelerator."""


# Not a param: another batch size must not rerun every shard.
BATCH_SIZE = EXPERIMENT.config["engine"]["batch_size"]


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
    named["splits"] = [
        ancient(str(layout.RESULTS / "tasks" / run.task_id / f"{split}.parquet"))
        for split in layout.stage_splits(wildcards.stage)
    ]
    # A smaller prefix comes first, so that experts it shares with a larger one are generated once.
    named["earlier"] = [
        ancient(path)
        for stage in run.stages_before(wildcards.stage)
        for path in shard_files(run, stage, "completions")
    ]
    return named


rule generate:
    """Set each request's weights and keep its completions; resumes at the first missing request."""
    input:
        unpack(generate_inputs),
    output:
        completions="results/{run}/{stage}/completions/{shard}.parquet",
        ledger="results/{run}/{stage}/ledger/{shard}.parquet",
    log:
        "logs/generate/{run}/{stage}/{shard}.log",
    benchmark:
        "logs/generate/{run}/{stage}/{shard}.benchmark.tsv"
    # All cores here, so that shards do not share a device; the SLURM profile sets its own number.
    threads: workflow.cores or 8
    resources:
        gpu=1,
        mem_mb=lambda wc, input, attempt: needs.generate_mem_mb(run_of(wc), attempt),
        runtime=lambda wc, attempt: needs.generate_runtime(run_of(wc), wc.stage, wc.shard, attempt),
    shell:
        "randopt generate results/{wildcards.run:q} {wildcards.stage:q} {wildcards.shard}"
        " --batch-size {BATCH_SIZE} --threads {threads} 2> >(tee -a {log:q} >&2)"
