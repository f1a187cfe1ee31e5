"""Requires: completions. Produces: scores. Runs again when the scorer's version changes, without a GPU."""

# A shard is judged in a second where the scorer is plain Python; a cluster job would wait and start for longer.
# Scorers that run other people's code in processes of their own do that on a compute node.
if not any(SCORERS[run.task.scorer].sandboxed for run in EXPERIMENT.runs):

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
    threads: 8 if runs_programs() else 1
    resources:
        mem_mb=lambda wc, threads: 3500 + 500 * threads,  # a model's program may take 512 MiB
        runtime=240 if runs_programs() else 60,  # programs that never end take 8 s each
    params:
        sandbox=EXPERIMENT.config["scoring"]["sandbox"],
    shell:
        "randopt score results/{wildcards.run:q} {wildcards.stage:q} {wildcards.shard}"
        " --scorer {wildcards.scorer:q} --threads {threads} --sandbox {params.sandbox}"
        " 2> >(keep_log {log:q})"
