"""Requires: metrics of every run and prefix. Produces: one table and the figures of the experiment."""


localrules:
    report,


rule report:
    """Tables (Parquet, Markdown) and figures (PNG, SVG) of all runs side by side."""
    input:
        metrics=[
            f"{run.folder}/{layout.prefix_name(n)}/metrics.parquet" for run in EXPERIMENT.runs for n in run.prefixes
        ],
    output:
        metrics="results/experiments/{experiment}/metrics.parquet",
        table="results/experiments/{experiment}/report.md",
        figures=directory("results/experiments/{experiment}/figures"),
    log:
        "logs/report/{experiment}.log",
    conda:
        "../../envs/randopt.yaml"
    shell:
        "randopt report {wildcards.experiment:q} 2> >(keep_log {log:q})"
