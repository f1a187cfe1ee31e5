"""Requires: requests, items, a model. Produces: completions. The only rule that needs an accelerator."""


localrules:
    measure_speed,


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
    conda:
        "../../envs/randopt.yaml"
    # All cores of a laptop, so that shards do not share its device; the SLURM profile sets its own number.
    threads: workflow.resource_settings.cores or 8
    resources:
        gpu=EXPERIMENT.config["engine"]["tensor_parallel"],
        # Not a param: another batch size must not rerun every shard. A profile may set it for its machine.
        batch_size=EXPERIMENT.config["engine"]["batch_size"],
        tensor_parallel=EXPERIMENT.config["engine"]["tensor_parallel"],
        # Engines side by side in one job; its GPUs and threads are shared out.
        workers_per_job=1,
        mem_mb=lambda wc, input, attempt: needs.generate_mem_mb(run_of(wc), attempt, ranks_per_job()),
        runtime=lambda wc, attempt: needs.generate_runtime(run_of(wc), wc.stage, wc.shard, attempt, workers_per_job()),
        # Seconds to wait for a full disk; a laptop's user is told at once instead.
        disk_wait=0,
        # Node-local folder for a copy of the weights; empty: they are read where they were prepared. The command
        # expands $VARIABLES, so that an unset one costs a warning and not the job (bash would refuse it).
        scratch="",
        slurm_extra=slurm_options,
    shell:
        "randopt generate results/{wildcards.run:q} {wildcards.stage:q} {wildcards.shard}"
        " --batch-size {resources.batch_size} --threads {threads}"
        " --tensor-parallel {resources.tensor_parallel} --workers {resources.workers_per_job}"
        " --disk-wait {resources.disk_wait} --scratch={resources.scratch:q} 2> >(keep_log -a {log:q})"


rule measure_speed:
    """What a probe, a shard of a few candidates, says about the speed of a run."""
    input:
        lambda wc: shard_files(run_of(wc), layout.PROBE, "completions"),
    output:
        probe="results/{run}/probe.json",
    log:
        "logs/measure_speed/{run}.log",
    conda:
        "../../envs/randopt.yaml"
    shell:
        "randopt measure-speed results/{wildcards.run:q} 2> >(keep_log {log:q})"
