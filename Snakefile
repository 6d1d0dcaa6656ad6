# The published chapters, trained anew on a cluster:  snakemake --cores 8 --config store=runs workers=8
#
# Each of the `workers` jobs of a chapter executes the same notebook on the same store. The locks of the store share the runs
# out, so a job that is killed or started late costs at most one epoch, and the number of jobs changes no result.

STORE = config.get("store", "runs")
WORKERS = int(config.get("workers", 2))
PRESET = config.get("preset", "published")
CHAPTERS = glob_wildcards("book/experiments/{chapter}.ipynb").chapter


rule all:
    input:
        expand("{store}/{chapter}.ipynb", store=STORE, chapter=CHAPTERS),


rule work:
    input:
        "book/experiments/{chapter}.md",
    output:
        touch(f"{STORE}/{{chapter}}.{{worker}}.done"),
    log:
        notebook=f"{STORE}/{{chapter}}.{{worker}}.ipynb",  # as a log it is kept when a cell fails
    shell:
        "python -m sdecor_book experiments/{wildcards.chapter} -p preset {PRESET} -p retrain true -p workers 1"
        " -p store {STORE} --out {log.notebook}"


rule page:
    input:
        expand(f"{STORE}/{{{{chapter}}}}.{{worker}}.done", worker=range(WORKERS)),
    output:
        f"{STORE}/{{chapter}}.ipynb",
    shell:
        "python -m sdecor_book experiments/{wildcards.chapter} -p preset {PRESET} -p store {STORE} --out {output}"
