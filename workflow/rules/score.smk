"""Requires: completions. Produces: scores. Runs again when the scorer's version changes, without a GPU."""


rule score:
    """Verdicts of one shard."""
    input:
        completions=rules.generate.output.completions,
        splits=lambda wc: [
            str(layout.RESULTS / "tasks" / run_of(wc).task_id / f"{split}.parquet")
            for split in layout.stage_splits(wc.stage)
        ],
    output:
        scores="results/{run}/{stage}/scores/{shard}.parquet",
    log:
        "logs/score/{run}/{stage}/{shard}.log",
    conda:
        "../../envs/randopt.yaml"
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        scorer=lambda wc: run_of(wc).scorer,
    shell:
        "randopt score results/{wildcards.run:q} {wildcards.stage:q} {wildcards.shard}"
        " --scorer {params.scorer[name]:q} 2> >(keep_log {log:q})"
