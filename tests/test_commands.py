"""Every command that a page names exists with these options and is run somewhere, and so is every target of make."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from stores import ONE, copied

from sdecor.__main__ import app
from sdecor.store import Store

ROOT = Path(__file__).resolve().parents[1]
BOOK = [p for p in sorted((ROOT / "book").rglob("*.md")) if "_static" not in p.parts]
PAGES = [ROOT / "README.md", ROOT / "data/README.md", *BOOK, ROOT / "Snakefile", ROOT / "environment.yml"]
PROGRAMS = "make sdecor python papermill snakemake pip conda jupyter-book git sbatch sh tar torchrun".split()
COMMAND = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:{'|'.join(map(re.escape, PROGRAMS))}) .*|pytest|\.ci/run")
TARGETS = re.findall(r"^([a-z]+):.*?## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)

# Where a command is run, by how it starts: a test, or another command. The longest start counts.
RUN = {
    "git clone": "test_install_cell.py::test_a_chapter_runs_where_there_is_nothing",
    "pip install -e .": "test_install_cell.py::test_a_chapter_runs_where_there_is_nothing",
    "python -m sdecor_book": "test_tools.py::test_as_a_module_from_anywhere",
    "python -m sdecor_book experiments/mnist -p preset quick": "make quick",
    "python -m sdecor_book CHAPTER -p retrain": "test_tools.py::test_a_planned_chapter_trains_where_it_may",
    "python -m sdecor_book experiments/mnist -p retrain": "test_tools.py::test_a_planned_chapter_trains_where_it_may",
    "python -m sdecor_book NAME --publish": "test_tools.py::test_publishing_notes_time_place_and_versions",
    "python tests/benchmarks/gpu.py": "test_benchmarks.py::test_a_benchmark_runs",
    "papermill": "test_install_cell.py::test_a_chapter_runs_where_there_is_nothing",
    "jupyter-book build .": "make book",
    "pytest": "make test",
    "sdecor": "test_cli.py::test_help",
    "sdecor --use": "test_readme.py::test_what_one_adds_is_known_to_all_commands",
    "sdecor --use mine.py bundle": "test_bundle.py::test_a_bundle_holds_what_git_tracks_and_what_it_is_told",
    "sdecor bundle": "test_bundle.py::test_it_runs_without_checkout_and_network",
    "sdecor data": "test_cli.py::test_data_list",
    "sdecor data check": "test_cli.py::test_data_check",
    "sdecor data fetch": "test_cli.py::test_data_fetch",
    "sdecor grid": "test_cli.py::test_grid_goes_on_where_it_was",
    "sdecor list": "test_cli.py::test_list_everything_that_has_a_name",
    "sdecor measure": "test_commands.py::test_finished_runs_are_measured_again",
    "sdecor merge": "test_parcels.py::test_the_command_says_what_it_did",
    "sdecor pace": "test_pace.py::test_the_command",
    "sdecor plan": "test_cli_plan.py::test_from_the_plan_to_its_end",
    "sdecor run": "test_cli_plan.py::test_from_the_plan_to_its_end",
    "sdecor show": "test_cli.py::test_show_all",
    "sdecor train": "test_cli.py::test_train_once",
    "sh carry/run.sh": "test_bundle.py::test_it_runs_without_checkout_and_network",
    "snakemake": "test_snakefile.py::test_a_job_for_every_plan_and_worker_and_a_page_for_its_chapter",
    "snakemake --unlock": "test_snakefile.py::test_it_goes_on_after_a_kill",
    "torchrun": "test_processes.py::test_a_grid_and_a_plan",
    "torchrun --nproc-per-node 8 -m sdecor train": "test_processes.py::test_a_record_of_two_processes",
    "tar -xf carry.tar": "test_bundle.py::test_a_tar_file_has_the_same_files",
    "make chapters": "test_setup.py::test_targets_that_ci_leaves_alone",
    "make clean": "test_setup.py::test_targets_that_ci_leaves_alone",
    # No machine of ours has these; their files are compared with what is run, in the tests named.
    "PIP_EXTRA_INDEX_URL": "test_setup.py::test_binder_gets_the_module_at_the_pins_with_torch_for_the_cpu",
    "make PYTHON": "test_setup.py::test_make_sets_up_once_and_takes_nothing_half_done_for_done",
    "conda": "test_setup.py::test_environment_yml_names_the_same_packages_and_versions",
    "sbatch": "test_cli_plan.py::test_what_is_given_reaches_the_work",
    "pip download": "test_bundle.py::test_data_that_no_archive_brings_is_named",
}


def commands(text: str) -> list[tuple[str, bool]]:
    """Commands of a page, one a line of a block or in running text, and whether they stand in a block."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    running = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line.split("  #")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"^#   (.*)$", running, re.MULTILINE)
    found = [(line, True) for line in lines] + [(code, False) for code in re.findall(r"`([^`\n]+)`", running)]
    parts = [(part.strip(), block) for line, block in found for part in line.split(" && ")]
    return [(part, block) for part, block in dict.fromkeys(parts) if COMMAND.fullmatch(part)]


NAMED = {name: block for page in PAGES for name, block in commands(page.read_text(encoding="utf-8"))}


def ci() -> set[str]:
    """Targets that .ci/run calls."""
    text = (ROOT / ".ci/run").read_text(encoding="utf-8")
    loops = [word for listed in re.findall(r"^for target in (.*?);", text, re.MULTILINE) for word in listed.split()]
    return {
        *loops,
        *re.findall(r"^step (\w+)", text, re.MULTILINE),
        *re.findall(r"^make \S+ (\w+)", text, re.MULTILINE),
    }


def where(command: str) -> str:
    """Where a command is run: a test, a target that .ci/run calls, or nowhere."""
    starts = [s for s in RUN if command == s or command.startswith((f"{s} ", f"{s}="))]
    if starts:
        return RUN[max(starts, key=len)]
    if (found := re.match(r"make (\w+)$", command)) and found[1] in ci():
        return command
    return ".ci/run" if command == ".ci/run" else ""


def test_every_target_of_make_is_run() -> None:
    assert {"help", "quick", "bench", "clean"} <= {*TARGETS}
    assert ci() <= {*TARGETS}
    assert [target for target in TARGETS if not where(f"make {target}")] == []


@pytest.mark.parametrize("command", NAMED)
def test_every_command_is_run(command: str) -> None:
    place = where(command)
    assert place, "no test runs it: add one, and name it in RUN"
    if "::" in place:
        file, test = place.split("::")
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")
    elif place != ".ci/run":
        assert place.removeprefix("make ") in ci()


def test_nothing_is_said_to_be_run_that_no_page_names() -> None:
    assert {RUN[start] for start in RUN} - {where(c) for c in [*NAMED, *(f"make {t}" for t in TARGETS)]} == set()


def parse(command: click.Command, words: list[str], parent: click.Context | None = None) -> None:
    """Read words as `command` would, without doing anything."""
    context = command.make_context(words[0], words[1:], parent=parent)
    if isinstance(command, click.Group) and (context._protected_args or context.args):
        name, inner, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert inner is not None
        parse(inner, [str(name), *rest], context)


OURS = [name for name in NAMED if re.match(r"(torchrun .* -m )?sdecor ", name) and "COMMAND" not in name]


@pytest.mark.parametrize("command", OURS)
def test_a_command_of_the_module_has_these_options(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine.py", "FILE.py"):
        (tmp_path / name).touch()
    try:
        parse(app, shlex.split(re.sub("^torchrun .* -m ", "", command.removesuffix(" ..."))))
    except click.exceptions.NoArgsIsHelpError:
        assert not NAMED[command]
    except click.UsageError as error:  # running text may name a command without what it needs
        assert "Missing" in error.format_message() and not NAMED[command], error.format_message()


def test_a_wrong_option_would_be_noticed(tmp_path: Path) -> None:
    for words in ("sdecor run cifar10 --worker 2", "sdecor trian", "sdecor merge", "sdecor data chekc mnist"):
        with pytest.raises(click.UsageError):
            parse(app, words.split())


@pytest.mark.parametrize("command", [name for name in NAMED if "sdecor_book" in name or "papermill" in name])
def test_a_chapter_has_these_parameters(command: str) -> None:
    if not (found := re.search(r"(?:sdecor_book|papermill) (?:book/)?([a-z]+/\w+)", command)):
        return
    declared = (ROOT / "book" / f"{found[1]}.md").read_text(encoding="utf-8")
    for name, _ in re.findall(r" -p (\w+) (\S+)", command):
        assert f"\n{name}: " in declared


@pytest.mark.parametrize("command", [name for name in NAMED if name.startswith("snakemake ")])
def test_the_snakefile_has_these_settings(command: str) -> None:
    (known,) = re.findall(r"^KNOWN = \{(.*)\}$", (ROOT / "Snakefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {*re.findall(r" (\w+)=", command)} <= {*re.findall(r'"(\w+)":', known)}


@pytest.mark.parametrize("command", [name for name in NAMED if re.match(r"python \S+\.py", name)])
def test_a_script_is_there(command: str) -> None:
    _, file, *options = command.split()
    text = (ROOT / file).read_text(encoding="utf-8")
    assert [option for option in options if option.startswith("--") and f'"{option}"' not in text] == []


def test_finished_runs_are_measured_again(done: Store, tmp_path: Path) -> None:
    store = copied(done, tmp_path)
    before = store.record(ONE)
    assert before is not None and before.metrics
    store.write(dataclasses.replace(before, metrics={"accuracy": -1.0}))
    said = CliRunner().invoke(app, ["measure", "--store", str(store.root)])
    lines = [f"{ONE.method} on digits, seed 0: {ONE.key}", "1 runs measured, 0 without weights left as they were"]
    assert (said.exit_code, said.output.splitlines()) == (0, lines)
    after = store.record(ONE)
    assert after is not None and after.metrics == pytest.approx(before.metrics, rel=1e-4)
    store.path("weights", ONE, ".safetensors").unlink()
    said = CliRunner().invoke(app, ["measure", "--store", str(store.root)])
    assert said.exit_code == 2
    assert said.output == f"error: no weights in {store.root}; name another folder with --store\n"
