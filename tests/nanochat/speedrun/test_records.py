"""A record is valid while command, inputs and outputs are those it was written for."""

from contextlib import suppress
from dataclasses import replace

import pytest

from nanochat.options.speedrun import PreflightOptions
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths
from nanochat.report.sections import write_section
from nanochat.speedrun.preflight import preflight
from nanochat.speedrun.records import changed_files, count_start, record_path, valid_record, write_record
from nanochat.speedrun.stages import STAGES, Stage

COMMAND = ["tokenizer", "train"]


@pytest.fixture
def finished(tmp_path):
    """Paths, and a stage that is recorded as finished."""
    paths = Paths(tmp_path)
    stage = Stage("thing", tuple(COMMAND), lambda p: [p.run / "file", p.run / "folder"])
    (paths.run / "folder").mkdir(parents=True)
    (paths.run / "file").write_text("a"), (paths.run / "folder" / "part").write_text("b")
    write_record(paths, stage, COMMAND, "inputs", 1.5)
    return paths, stage


def test_an_unchanged_record_is_valid(finished):
    assert valid_record(*finished, COMMAND, "inputs")["seconds"] == 1.5


def test_a_stage_that_was_resumed_took_as_long_as_all_of_its_starts(finished):
    paths, stage = finished
    for seconds in (500.0, 0.5):
        write_section(paths, stage.name, {}, {}, seconds, 1)
        assert write_record(paths, stage, COMMAND, "inputs", 1.5)["seconds"] == max(seconds, 1.5)


@pytest.mark.parametrize(("command", "made_from"), [([*COMMAND, "--preset", "d20"], "inputs"), (COMMAND, "others")])
def test_another_command_or_other_inputs_make_a_record_invalid(finished, command, made_from):
    assert valid_record(*finished, command, made_from) is None


@pytest.mark.parametrize("change", ["content", "missing", "more", "no record", "damaged record"])
def test_changed_outputs_make_a_record_invalid(finished, change):
    paths, stage = finished
    if change == "content":
        (paths.run / "folder" / "part").write_text("c")
    elif change == "missing":
        (paths.run / "file").unlink()
    elif change == "more":
        (paths.run / "folder" / "more").touch()
    elif change == "no record":
        record_path(paths, stage).unlink()
    else:
        record_path(paths, stage).write_text('{"stage": "thi')
    assert valid_record(paths, stage, COMMAND, "inputs") is None


def test_a_job_that_makes_no_progress_is_not_started_for_ever(tmp_path, monkeypatch):
    paths, restarts = Paths(tmp_path, "tiny"), iter(range(1, 100))
    checkpoint = paths.checkpoints("base") / "step_000020"

    def start(job: str = "41") -> None:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(next(restarts)))
        preflight(PreflightOptions("tiny"), paths)

    for _ in range(3):
        start()
    checkpoint.mkdir(parents=True)
    (checkpoint / "meta.json").touch()  # a step
    for _ in range(3):
        start()
    write_record(paths, STAGES[0], COMMAND, "", 1.0)  # a finished stage
    for _ in range(3):
        start()
        with suppress(UserError):  # of missing data
            preflight(PreflightOptions("d20", data_only=True), paths)  # which starts nothing
    for _ in range(2):
        with pytest.raises(
            UserError, match="job 41 .* started 3 times in a row without training a step .* raise --time"
        ):
            start()
    start("42")  # submitted again


def test_only_a_job_that_was_queued_again_counts_its_starts(tmp_path, monkeypatch):
    paths = Paths(tmp_path)
    for job, restarts in (("", "7"), ("41", ""), ("41", "0")):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        count_start(paths)
    assert not paths.run.exists()


@pytest.mark.parametrize(("may_be_replaced", "asks"), [(True, ["file"]), (False, [])])
def test_only_files_that_a_user_may_replace_are_asked_about(finished, may_be_replaced, asks):
    """A section of the report, which the command run by hand writes too, is made again without a question."""
    paths, stage = finished
    (paths.run / "file").write_text("c")
    stage = replace(stage, may_be_replaced=may_be_replaced)
    assert [path.name for path in changed_files(paths, stage)] == asks and valid_record(
        paths, stage, COMMAND, "inputs"
    ) is None
    wanted = {"data", "tokenizer"}
    assert {stage.name for stage in STAGES if stage.may_be_replaced} == wanted
