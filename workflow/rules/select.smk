"""Requires: the search's scores. Produces: the candidates table and the experts, best first."""


localrules:
    gather,
    select,


rule gather:
    """Every candidate of the first N with its mean score; a missing or foreign shard fails by name."""
    input:
        scores=lambda wc: shard_files(run_of(wc), "search", "scores", int(wc.candidates)),
        completions=lambda wc: shard_files(run_of(wc), "search", "completions", int(wc.candidates)),
        requests=ancient("results/{run}/search/requests.parquet"),
    output:
        candidates="results/{run}/n{candidates}/candidates.parquet",
    log:
        "logs/gather/{run}/n{candidates}.log",
    conda:
        "../../envs/randopt.yaml"
    params:
        scorer=lambda wc: run_of(wc).task.scorer,
    shell:
        "randopt gather results/{wildcards.run:q} {wildcards.candidates} --scorer {params.scorer:q} 2> >(keep_log {log:q})"


rule select:
    """The K max best candidates, as requests in rank order."""
    input:
        candidates=rules.gather.output.candidates,
    output:
        requests="results/{run}/n{candidates}/members/requests.parquet",
    log:
        "logs/select/{run}/n{candidates}.log",
    conda:
        "../../envs/randopt.yaml"
    params:
        members=lambda wc: run_of(wc).members,
    shell:
        "randopt select results/{wildcards.run:q} {wildcards.candidates} --members {params.members}"
        " 2> >(keep_log {log:q})"
