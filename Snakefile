# The experiments of the book, run anew on one machine or on a cluster:
#
#   snakemake --cores 8 --config store=runs preset=gpu device=cuda workers=4
#
# For a plan, book/experiments/NAME.toml, so many jobs as there are `workers` do `sdecor run` on one store; for a
# chapter without a plan each executes its notebook. The locks of the store share the runs out, so a job that is killed
# or started late costs at most one epoch, and the number of jobs changes no result. When they are done, the chapter is
# executed on that store, to STORE/NAME.ipynb. What the jobs said is beside it, and so is a notebook with a failed cell.
#
# After a kill: `snakemake --unlock`, then the same command again with --rerun-incomplete. It is the store that knows
# what is done, so nothing is lost by either. book/back/howrun.md has a profile for SLURM.

import tomllib
from pathlib import Path

STORE = config.get("store", "runs")
WORKERS = range(int(config.get("workers", 2)))
PRESET = config.get("preset", "published")  # quick, or a preset of a plan; a plan that lacks it takes its cpu
DEVICE = config.get("device", "cpu")

PLANS = glob_wildcards("book/experiments/{plan}.toml").plan
CHAPTERS = glob_wildcards("book/experiments/{chapter}.ipynb").chapter


def preset(name):
    """The preset that a plan or a chapter without one is run at."""
    if name not in PLANS:
        return "quick" if PRESET == "quick" else "published"
    known = tomllib.loads(Path(f"book/experiments/{name}.toml").read_text())["presets"]
    return PRESET if PRESET in known else "cpu"


wildcard_constraints:
    plan="|".join(PLANS) or "$.",  # matches nothing
    alone="|".join(set(CHAPTERS) - set(PLANS)) or "$.",
    chapter="|".join(CHAPTERS) or "$.",
    worker=r"\d+",


rule all:
    input:
        expand("{store}/{chapter}.ipynb", store=STORE, chapter=CHAPTERS),
        expand("{store}/{plan}.{worker}.done", store=STORE, plan=PLANS, worker=WORKERS),


rule plan:
    input:
        "book/experiments/{plan}.toml",
    output:
        touch(f"{STORE}/{{plan}}.{{worker}}.done"),
    log:
        f"{STORE}/{{plan}}.{{worker}}.log",
    params:
        preset=lambda wildcards: preset(wildcards.plan),
    shell:
        "python -m sdecor run {input} --preset {params.preset} --store {STORE:q} --device {DEVICE} --threads {threads}"
        " > {log:q} 2>&1"


rule work:
    input:
        "book/experiments/{alone}.md",
    output:
        touch(f"{STORE}/{{alone}}.{{worker}}.done"),
    log:
        notebook=f"{STORE}/{{alone}}.{{worker}}.ipynb",  # as a log it is kept when a cell fails
    params:
        preset=lambda wildcards: preset(wildcards.alone),
    shell:
        "python -m sdecor_book experiments/{wildcards.alone} -p preset {params.preset} -p retrain true -p workers 1"
        " -p store {STORE:q} --out {log.notebook:q}"


rule page:
    input:
        "book/experiments/{chapter}.md",
        expand(f"{STORE}/{{{{chapter}}}}.{{worker}}.done", worker=WORKERS),
    output:
        f"{STORE}/{{chapter}}.ipynb",
    log:
        notebook=f"{STORE}/{{chapter}}.page.ipynb",  # and so here: the output of a job that failed is removed
    params:
        preset=lambda wildcards: preset(wildcards.chapter),
    shell:
        "python -m sdecor_book experiments/{wildcards.chapter} -p preset {params.preset} -p store {STORE:q}"
        " --out {log.notebook:q} && cp {log.notebook:q} {output:q}"
