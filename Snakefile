"""RandOpt: search N Gaussian perturbations of a model, select the best K, vote, and compare with controls."""

import sys

from snakemake.utils import min_version

min_version("9.20")

# A config given on the command line replaces the demo's; merging the two would mix their models and tasks.
if not workflow.overwrite_configfiles:

    configfile: "config/config.yaml"


# \d{5}\d*, not \d{5,}: Snakemake takes an open repetition for the end of the wildcard.
wildcard_constraints:
    run=r"[^/]+/[^/]+/[0-9a-f]{10}(-(lossless|confident)-[0-9a-f]{6})?",
    stage=r"search(-probe)?|random|controls-t[0-9.e+-]+|n\d{5}\d*/members",
    candidates=r"\d{5}\d*",
    shard=r"\d{5}\d*-\d{5}\d*",
    scorer=r"[^/]+",
    version=r"\d+",
    model_id=r"[^/]+",
    task_id=r"[^/]+",
    experiment=r"[^/]+",


include: "workflow/rules/common.smk"
include: "workflow/rules/prepare.smk"
include: "workflow/rules/generate.smk"
include: "workflow/rules/score.smk"
include: "workflow/rules/select.smk"
include: "workflow/rules/vote.smk"
include: "workflow/rules/report.smk"


rule all:
    """Table and figures of the experiment, and every table behind them."""
    default_target: True
    input:
        expand(rules.report.output.table, experiment=EXPERIMENT.config["experiment"]),
        list(every_table()),


rule scores:
    """Every score of the search, without selection and controls."""
    input:
        [path for run in EXPERIMENT.runs for path in shard_files(run, "search", "scores")],


rule probe:
    """The speed of every run from a few of its candidates, for `randopt cost` and search.shard_minutes."""
    input:
        [str(speed.probe_file(run.folder)) for run in EXPERIMENT.runs],


onstart:
    start_experiment()


onsuccess:
    show_result()


onerror:
    show_failures(log)
