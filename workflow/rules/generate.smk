"""Requires: requests, items, a model. Produces: completions. The only rule that needs an accelerator."""


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
    # All cores here, so that shards do not share a device; the SLURM profile sets its own number.
    threads: workflow.cores or 8
    resources:
        gpu=1,
        # Not a param: another batch size must not rerun every shard. A profile may set it for its machine.
        batch_size=EXPERIMENT.config["engine"]["batch_size"],
        mem_mb=lambda wc, input, attempt: needs.generate_mem_mb(run_of(wc), attempt),
        runtime=lambda wc, attempt: needs.generate_runtime(run_of(wc), wc.stage, wc.shard, attempt),
    shell:
        "randopt generate results/{wildcards.run:q} {wildcards.stage:q} {wildcards.shard}"
        " --batch-size {resources.batch_size} --threads {threads} 2> >(keep_log -a {log:q})"
