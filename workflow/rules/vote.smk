"""Requires: scores of members and controls. Produces: selection, votes and metrics of one prefix."""


localrules:
    vote,
    metrics,


TOP_K = ",".join(map(str, EXPERIMENT.config["ensemble"]["top_k"]))


rule vote:
    """Majority votes of experts, random candidates and samples of the base, at each K."""
    input:
        candidates=rules.gather.output.candidates,
        members=rules.select.output.requests,
        scores=lambda wc: compared_files(wc, "scores"),
        completions=lambda wc: compared_files(wc, "completions"),
    output:
        selection="results/{run}/n{candidates}/selection.parquet",
        votes="results/{run}/n{candidates}/votes.parquet",
    log:
        "logs/vote/{run}/n{candidates}.log",
    conda:
        "../../envs/randopt.yaml"
    params:
        vote=lambda wc: dict(top_k=TOP_K, controls=run_of(wc).controls, scorer=run_of(wc).task.scorer),
    shell:
        "randopt vote results/{wildcards.run:q} {wildcards.candidates} --controls {params.vote[controls]}"
        " --scorer {params.vote[scorer]:q}"
        " --top-k {params.vote[top_k]} 2> >(keep_log {log:q})"


rule metrics:
    """Every method at each K on each split, with its interval and what it cost."""
    input:
        candidates=rules.gather.output.candidates,
        selection=rules.vote.output.selection,
        votes=rules.vote.output.votes,
        scores=verdict_files,
        completions=lambda wc: compared_files(wc, "completions"),
    output:
        metrics="results/{run}/n{candidates}/metrics.parquet",
    log:
        "logs/metrics/{run}/n{candidates}.log",
    conda:
        "../../envs/randopt.yaml"
    params:
        settings=lambda wc: dict(
            sorted(EXPERIMENT.config["statistics"].items()),
            controls=run_of(wc).controls,
            scorer=run_of(wc).task.scorer,
        ),
    shell:
        "randopt metrics results/{wildcards.run:q} {wildcards.candidates} --controls {params.settings[controls]}"
        " --scorer {params.settings[scorer]:q}"
        " --confidence {params.settings[confidence]}"
        " --bootstrap {params.settings[bootstrap]} --seed {params.settings[seed]} 2> >(keep_log {log:q})"
