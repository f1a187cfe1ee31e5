"""Requires: completions. Produces: scores. Runs again when the scorer's version changes, without a GPU."""

# A shard is judged in a second where the scorer is plain Python; a cluster job would wait and start for longer.
# Scorers that run other people's code in processes of their own do that on a compute node.
if not any(run.scorer.sandboxed for run in EXPERIMENT.runs):

    localrules:
        score,


rule score:
    """Verdicts of one shard."""
    input:
        completions=rules.generate.output.completions,
        splits=lambda wc: [
            str(layout.RESULTS / "tasks" / run_of(wc).task_id / f"{split}.parquet")
            for split in layout.stage_splits(wc.stage)
        ],
    output:
        scores="results/{run}/{stage}/scores/{scorer}-v{version}/{shard}.parquet",
    log:
        "logs/score/{run}/{stage}/{scorer}-v{version}/{shard}.log",
    conda:
        "../../envs/randopt.yaml"
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        scorer=lambda wc: run_of(wc).task.scorer,
    shell:
        "randopt score results/{wildcards.run:q} {wildcards.stage:q} {wildcards.shard}"
        " --scorer {params.scorer:q} 2> >(keep_log {log:q})"
