"""Requires: the search's scores. Produces: a race's pilot, the candidates table and the experts, best first."""


localrules:
    race,
    gather_block,
    gather,
    select,


rule race:
    """What the pilot of a raced search earned: later candidates are held against it."""
    input:
        scores=lambda wc: pilot_files(wc, "scores"),
        completions=lambda wc: pilot_files(wc, "completions"),
        requests=ancient("results/{run}/search/requests.parquet"),
    output:
        race="results/{run}/search/race.parquet",
    log:
        "logs/race/{run}.log",
    conda:
        "../../envs/randopt.yaml"
    shell:
        "randopt race results/{wildcards.run:q} 2> >(keep_log {log:q})"


rule gather_block:
    """The candidates of a thousand shards of a large search."""
    input:
        scores=lambda wc: block_shards(wc, "scores"),
        completions=lambda wc: block_shards(wc, "completions"),
        requests=ancient("results/{run}/search/requests.parquet"),
    output:
        block="results/{run}/search/blocks/{scorer}-v{version}/{shard}.parquet",
    log:
        "logs/gather_block/{run}/{scorer}-v{version}/{shard}.log",
    conda:
        "../../envs/randopt.yaml"
    params:
        scorer=lambda wc: run_of(wc).task.scorer,
    shell:
        "randopt gather-block results/{wildcards.run:q} {wildcards.shard} --scorer {params.scorer:q}"
        " 2> >(keep_log {log:q})"


rule gather:
    """Every candidate of the first N with its mean score; a missing or foreign shard fails by name."""
    input:
        unpack(gather_inputs),
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
