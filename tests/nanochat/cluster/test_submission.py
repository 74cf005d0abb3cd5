"""A submission asks for what its run needs, and its job is named whatever sbatch and the disk do."""

import json
import shlex
from pathlib import Path

import pytest

from nanochat.cluster.site import load_site
from nanochat.cluster.slurm import Job, distributed_launcher, megabytes_of, sbatch_command
from nanochat.platform.errors import UserError
from tests.conftest import assert_fails_with, nanochat


def dry_run(*options: str, **env: str) -> str:
    done = nanochat(None, *"cluster submit speedrun --dry-run".split(), *options, NANOCHAT_BASE_DIR="/base", **env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_site_is_that_of_the_environment():
    assert "NANOCHAT_SITE=ptolemy" in dry_run(NANOCHAT_SITE="ptolemy")
    assert "NANOCHAT_SITE=generic" in dry_run("--site", "generic", NANOCHAT_SITE="ptolemy")
    assert "NANOCHAT_SITE=generic" in dry_run(NANOCHAT_SITE="")


@pytest.mark.parametrize("preset", ["tiny", "cpu"])
def test_a_run_with_embedded_data_asks_for_what_it_needs(preset, tmp_path):
    """Of a site with GPU nodes; a site with less is asked for no more than it has."""
    call = dry_run("--site", "ptolemy", "--preset", preset)
    assert " --cpus-per-task=2 --mem=8G --time=1:00:00 " in call
    assert "--partition" not in call and "--gres" not in call, "Slurm's default partition, not that of the GPUs"
    assert "--partition=gpu-a100" in dry_run("--site", "ptolemy", "--preset", preset, "--gpus", "1")
    assert "--time=30 " in dry_run("--site", "ptolemy", "--preset", preset, "--time", "30")
    small = tmp_path / "small.env"
    values = {"CPUS": "1", "MEMORY": "2000", "TIME": "20", "PARTITION": "gpu", "CPU_PARTITION": "cpu"}
    small.write_text("".join(f"NANOCHAT_{name}={value}\n" for name, value in values.items()))
    call = dry_run("--site", str(small), "--preset", preset)
    assert "--partition=cpu --nodes=1 --ntasks-per-node=1 --cpus-per-task=1 --mem=2000 --time=20 " in call
    small.write_text("")
    assert "--mem" not in dry_run("--site", str(small), "--preset", preset), "an empty value leaves Slurm's default"


def test_files_of_conversations_are_read_and_named_for_the_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "about me & you.jsonl"
    path.write_text(json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]) + "\n")
    [_, *words] = shlex.split(dry_run("--custom-json", path.name, "--rl"))
    [exported] = [word for word in words if word.startswith("--export=")]
    assert shlex.split(exported.partition("NANOCHAT_STAGES=")[2]) == ["--rl", "--custom-json", str(path)]
    content = path.read_text()
    path.write_text("hello\n")
    submit = ["cluster", "submit", "speedrun", "--dry-run", "--custom-json"]
    assert_fails_with(nanochat(tmp_path, *submit, path.name), f"{path.name}")
    path.rename(tmp_path / "a,b.jsonl").write_text(content)
    assert_fails_with(
        nanochat(tmp_path, *submit, "a,b.jsonl"), "a comma or a backslash", "rename the directory or the file"
    )


def test_sizes():
    assert {size: megabytes_of(size) for size in ("2000", "512m", "128G", "1T")} == {
        "2000": 2000,
        "512m": 512,
        "128G": 131072,
        "1T": 1048576,
    }
    assert megabytes_of("0") > megabytes_of("1T"), "0 is all that the node has"
    with pytest.raises(UserError, match="memory '8 GB' is not a size"):
        megabytes_of("8 GB")


@pytest.fixture
def sbatch(tmp_path):
    """A directory for PATH with an sbatch that prints the content of a file, and the base directory of its jobs."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(f"#!/bin/sh\nexec cat {shlex.quote(str(tmp_path / 'printed'))}\n")
    (tmp_path / "bin" / "sbatch").chmod(0o755)

    def submit(printed: str, base: Path = tmp_path / "base"):
        (tmp_path / "printed").write_text(printed)
        path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
        return nanochat(base, *"cluster submit speedrun --preset tiny --run-name mine".split(), PATH=path)

    return submit


def test_the_id_of_the_job_is_found_among_other_lines(sbatch, tmp_path):
    for printed in ("41\n", "Welcome to cluster 7!\n\n41;ptolemy\n", "41\nYou have used 90 % of 2000 hours.\n"):
        assert "submitted speedrun: job 41\n" in sbatch(printed).stdout
    jobs = [json.loads(line) for line in (tmp_path / "base" / "jobs.jsonl").read_text().splitlines()]
    assert [(job["id"], job["run"]) for job in jobs] == 3 * [("41", "mine")]
    assert_fails_with(
        sbatch("Welcome to cluster 7!\n"), "did not say which job", "Welcome to cluster 7!", "squeue --me"
    )


def test_a_job_whose_record_cannot_be_written_is_named(sbatch, tmp_path):
    (tmp_path / "base" / "jobs.jsonl").mkdir(parents=True)
    done = sbatch("41\n")
    assert done.returncode == 0 and "submitted speedrun: job 41\n" in done.stdout
    assert "jobs.jsonl cannot be written (Is a directory" in done.stdout and "squeue --job 41" in done.stdout


def test_printed_commands_can_be_pasted(sbatch, tmp_path):
    base = tmp_path / "of mine; $(touch x) 'a' 100%"
    shown = sbatch("41\n", base).stdout
    tail, status = (next(line for line in shown.splitlines() if word in line) for word in ("tail", "cluster status"))
    assert shlex.split(tail) == ["tail", "-F", str(base / "logs" / "nanochat-speedrun-41.log")]
    assert shlex.split(status)[0] == f"NANOCHAT_BASE_DIR={base}"


def test_the_log_is_where_the_base_directory_is_whatever_its_name():
    """Slurm replaces %u in the path of a log by the user, and so on; %% is a percent sign."""
    call = sbatch_command(Job("gate", "d20"), load_site("generic"), "/data/100%u")
    with pytest.raises(UserError, match=r"or a backslash, got '/a"):
        sbatch_command(Job("gate", "d20"), load_site("generic"), "/a\\b")
    assert "--output=/data/100%%u/logs/%x-%j.log" in call and any("NANOCHAT_BASE_DIR=/data/100%u" in w for w in call)


def test_a_time_limit_that_leaves_time_to_train_is_taken():
    assert "--time=13 " in dry_run("--time", "13") and "--time=4 " in dry_run("--time", "4", "--signal-seconds", "25")
    assert "--time=0 " in dry_run("--time", "0"), "no limit"
    assert nanochat(None, *"cluster submit bench --time 10 --dry-run".split()).returncode == 0, "no signal, no queue"


def test_variables_of_a_job_that_has_ended_start_no_tasks(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert distributed_launcher(1)[1:] == []
