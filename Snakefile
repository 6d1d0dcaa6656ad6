# The experiments of the book, run anew on one machine or on a cluster:
#
#   snakemake --cores 8 --config store=runs preset=gpu device=cuda workers=4
#
# For every plan, book/experiments/NAME.toml, so many jobs as there are `workers` do `sdecor run` on one store. The locks
# of the store share the runs out, so a job that is killed or started late costs at most an epoch (on a GPU, epochs of
# five seconds together), and the number of jobs changes no result. When they are done, the chapter is executed on that
# store, to STORE/NAME.ipynb. What the jobs said is beside it, and so is a notebook with a failed cell.
#
# After a kill: `snakemake --unlock`, then the same command again with --rerun-incomplete. It is the store that knows
# what is done, so nothing is lost by either. book/back/howrun.md has a profile for SLURM.

import tomllib
from pathlib import Path

KNOWN = {"store": "runs", "workers": 2, "preset": "cpu", "device": "cpu"}
if unknown := [name for name in config if name not in KNOWN]:
    raise ValueError(f"unknown --config '{unknown[0]}'; known: {', '.join(KNOWN)}")
STORE, workers, PRESET, DEVICE = (config.get(name, default) for name, default in KNOWN.items())
WORKERS = range(int(workers))

PLANS = glob_wildcards("book/experiments/{plan}.toml").plan
PRESETS = {plan: tomllib.loads(Path(f"book/experiments/{plan}.toml").read_text())["presets"] for plan in PLANS}
if not any(PRESET in presets for presets in PRESETS.values()):
    raise ValueError(f"no plan has the preset '{PRESET}'; known: {', '.join({p: 0 for ps in PRESETS.values() for p in ps})}")


def preset(wildcards):
    """The preset that a plan is run at; one that lacks it takes its cpu."""
    return PRESET if PRESET in PRESETS[wildcards.plan] else "cpu"


wildcard_constraints:
    plan="|".join(PLANS),
    worker=r"\d+",


rule all:
    input:
        expand("{store}/{plan}.{worker}.done", store=STORE, plan=PLANS, worker=WORKERS),
        expand("{store}/{plan}.ipynb", store=STORE, plan=[plan for plan in PLANS if Path(f"book/experiments/{plan}.md").exists()]),


rule plan:
    input:
        "book/experiments/{plan}.toml",
    output:
        touch(f"{STORE}/{{plan}}.{{worker}}.done"),
    log:
        f"{STORE}/{{plan}}.{{worker}}.log",
    params:
        preset=preset,
    shell:
        "python -m sdecor run {input} --preset {params.preset} --store {STORE:q} --device {DEVICE} --threads {threads}"
        " > {log:q} 2>&1"


rule page:
    input:
        "book/experiments/{plan}.md",
        expand(f"{STORE}/{{{{plan}}}}.{{worker}}.done", worker=WORKERS),
    output:
        f"{STORE}/{{plan}}.ipynb",
    log:
        notebook=f"{STORE}/{{plan}}.page.ipynb",  # and so here: the output of a job that failed is removed
    params:
        preset=preset,
    shell:
        "python -m sdecor_book experiments/{wildcards.plan} -p preset {params.preset} -p store {STORE:q}"
        " --out {log.notebook:q} && cp {log.notebook:q} {output:q}"
