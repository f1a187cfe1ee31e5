"""Requires: a source of weights and a task file. Produces: a model manifest, items, and requests."""


localrules:
    prepare_model,
    prepare_items,
    plan,


rule prepare_model:
    """Fetch or convert the weights once, and record what they are."""
    output:
        manifest="results/models/{model_id}/manifest.json",
    log:
        "logs/prepare_model/{model_id}.log",
    conda:
        "../../envs/randopt.yaml"
    params:
        model=lambda wc: EXPERIMENT.models[wc.model_id],
    shell:
        "randopt prepare-model {params.model[source]:q} --dtype {params.model[dtype]} --output {output.manifest:q}"
        " 2> >(keep_log {log:q})"


rule prepare_items:
    """The three disjoint splits of a task."""
    output:
        expand("results/tasks/{{task_id}}/{split}.parquet", split=layout.SPLITS),
    log:
        "logs/prepare_items/{task_id}.log",
    conda:
        "../../envs/randopt.yaml"
    params:
        task=lambda wc: wc.task_id,
    shell:
        "randopt prepare-items {params.task:q} 2> >(keep_log {log:q})"


rule plan:
    """The requests of a stage that is known before anything is scored."""
    output:
        requests="results/{run}/{stage}/requests.parquet",
    log:
        "logs/plan/{run}/{stage}.log",
    wildcard_constraints:
        stage=r"search(-probe)?|random|controls-t[0-9.e+-]+",
    conda:
        "../../envs/randopt.yaml"
    params:
        rows=lambda wc: run_of(wc).rows(wc.stage),
    shell:
        "randopt plan results/{wildcards.run:q} {wildcards.stage:q} --rows {params.rows} 2> >(keep_log {log:q})"
