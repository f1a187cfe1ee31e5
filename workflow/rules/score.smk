"""Requires: completions. Produces: scores. Runs again when the scorer's version changes, without a GPU."""

# A shard is judged in a second where the scorer is plain Python; a cluster job would wait and start for longer.
# Scorers that run other people's code in processes of their own do that on a compute node.
if not any(run.scorer.sandboxed for run in EXPERIMENT.runs):

    localrules:
        score,


TWINNED = "|".join(name for name in SCORERS if len(judges(name)) > 1)


rule score:
    """Verdicts of one shard."""
    input:
        completions=rules.generate.output.completions,
        splits=answered_items,
    output:
        scores="results/{run}/{stage}/scores/{scorer}-v{version}/{shard}.parquet",
    log:
        "logs/score/{run}/{stage}/{scorer}-v{version}/{shard}.log",
    wildcard_constraints:
        scorer=rf"(?!({TWINNED})-v)[^/]+",
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


# A scorer and its paper-compatible twin judge in one job. A rule for each such pair: their versions are independent,
# and the outputs of one rule must have the same wildcards.
for pair in sorted({judges(run.task.scorer) for run in EXPERIMENT.runs if len(run.verdicts) > 1}):

    rule:
        name:
            f"score_{pair[0].name}"
        input:
            completions=rules.generate.output.completions,
            splits=answered_items,
        output:
            scores=[
                f"results/{{run}}/{{stage}}/{layout.scores(scorer.name, scorer.version)}/{{shard}}.parquet"
                for scorer in pair
            ],
        log:
            f"logs/score/{{run}}/{{stage}}/{pair[0].name}/{{shard}}.log",
        localrule: not any(scorer.sandboxed for scorer in pair)
        conda:
            "../../envs/randopt.yaml"
        threads: 8 if any(scorer.runs_programs or scorer.batch for scorer in pair) else 1
        resources:
            mem_mb=lambda wc, threads: 3500 + 500 * threads,  # a model's program may take 512 MiB
            runtime=240 if any(scorer.runs_programs for scorer in pair) else 60,  # those that never end take 8 s each
        params:
            scorer=pair[0].name,
            sandbox=EXPERIMENT.config["scoring"]["sandbox"],
        shell:
            "randopt score results/{wildcards.run:q} {wildcards.stage:q} {wildcards.shard}"
            " --scorer {params.scorer:q} --threads {threads} --sandbox {params.sandbox}"
            " 2> >(keep_log {log:q})"
