"""The sbatch calls word for word, site profiles, and what is refused."""

import shutil
import subprocess
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from nanochat.cluster.site import account, base_directory, load_site, mail_user
from nanochat.cluster.slurm import Job, distributed_launcher, sbatch_command, seconds_of
from nanochat.platform.environment import collective_timeout
from nanochat.platform.errors import UserError
from tests.conftest import assert_fails_with, nanochat

ROOT = Path(__file__).parents[3]
GOLDEN = """
sbatch --parsable --job-name=nanochat-speedrun --account=abc123 --partition=gpu-a100 --nodes=1 --ntasks-per-node=1
--gres=gpu:a100:8 --cpus-per-task=16 --mem=256G --time=12:00:00 --signal=B:USR1@600 --open-mode=append
--output=/scratch/ptolemy/users/ada/nanochat-cache/logs/%x-%j.log --dependency=afterok:41 --mail-user=ada@example.edu
--mail-type=BEGIN,END,FAIL --requeue
--export=ALL,NANOCHAT_SITE=ptolemy,NANOCHAT_BASE_DIR=/scratch/ptolemy/users/ada/nanochat-cache,NANOCHAT_PRESET=d20,NANOCHAT_SIGNAL_SECONDS=600
slurm/speedrun.sbatch
""".split()


@pytest.fixture(autouse=True)
def somebody(monkeypatch):
    monkeypatch.setenv("USER", "ada")
    for name in ("NANOCHAT_BASE_DIR", "NANOCHAT_ACCOUNT", "MAIL_USER", "NANOCHAT_MAIL_USER", "mail_user"):
        monkeypatch.delenv(name, raising=False)


def test_the_call_word_for_word():
    site = replace(load_site("ptolemy"), account="abc123")
    job = Job("speedrun", "d20", gpus=8, mail="ada@example.edu", after="41")
    assert sbatch_command(job, site, base_directory(site)) == GOLDEN


@pytest.mark.parametrize("gpus", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("name", ["ptolemy", "generic"])
def test_sites_and_gpus(name, gpus):
    site = load_site(name)
    call = sbatch_command(Job("speedrun", "d20", nodes=2, gpus=gpus), site, "/data")
    assert (f"--gres={site.gres}:{gpus}" in call) == (gpus > 0) and "--nodes=2" in call
    assert not any(word.startswith(("--account", "--mail", "--dependency")) or word.endswith("=") for word in call)


def test_a_dry_run_calls_nothing(tmp_path):
    shown = nanochat(
        tmp_path / "new", *"cluster submit speedrun --site ptolemy --after-gate --dry-run".split(),
        *"--account abc123 --run-name other".split(),
    )  # fmt: skip
    gate, speedrun = shown.stdout.splitlines()
    assert "slurm/gate.sbatch" in gate and "--gres=gpu:a100:1" in gate
    assert all("--account=abc123" in call and ",NANOCHAT_RUN_NAME=other" in call for call in (gate, speedrun))
    assert "afterok:<gate>" in speedrun and "--gres=gpu:a100:8" in speedrun
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("line", ["mail_user=a@b.edu", "export MAIL_USER='a@b.edu'", "Nanochat_Mail_User=a@b.edu"])
def test_the_address_is_found(tmp_path, monkeypatch, line):
    assert mail_user("", tmp_path) == ""
    (tmp_path / ".env.local").write_text(f"# mine\n{line}\nOTHER=1\n")
    assert mail_user("", tmp_path) == "a@b.edu"
    monkeypatch.setenv("mail_user", "bob@example.edu")
    assert mail_user("", tmp_path) == "bob@example.edu" and mail_user("eve@example.edu", tmp_path) == "eve@example.edu"


def test_an_account_is_personal_and_no_profile_has_one(tmp_path, monkeypatch):
    site = replace(load_site("generic"), account="of-the-site")
    assert account("", site, tmp_path) == "of-the-site"
    (tmp_path / ".env.local").write_text("NANOCHAT_ACCOUNT=mine\n")
    assert account("", site, tmp_path) == "mine"
    monkeypatch.setenv("NANOCHAT_ACCOUNT", "of-the-shell")
    assert account("", site, tmp_path) == "of-the-shell" and account("named", site, tmp_path) == "named"
    for profile in (ROOT / "slurm").glob("*.env"):
        assert not load_site(str(profile)).account, profile


def test_time_limits():
    limits = {"90": 5400, "1:30": 90, "12:00:00": 43200, "1-12": 129600, "2-01:30": 178200}
    assert {limit: seconds_of(limit) for limit in limits} == limits


def test_what_is_wrong_is_named(tmp_path):
    (tmp_path / "bad.env").write_text("PARTITION=x\n")
    (tmp_path / "unset.env").write_text("NANOCHAT_SCRATCH=/s/$NOT_SET_ANYWHERE\n")
    (tmp_path / "open.env").write_text('NANOCHAT_MODULES=\nNANOCHAT_ACCOUNT="abc\n')
    (tmp_path / "four.env").write_text("NANOCHAT_GPUS=four\n")
    cases = [
        ("open.env:2: .* cannot be read .No closing quotation", lambda: load_site(str(tmp_path / "open.env"))),
        ("NANOCHAT_GPUS must be a whole number, got 'four'", lambda: load_site(str(tmp_path / "four.env"))),
        ("existing profiles: generic, ptolemy", lambda: load_site("nowhere")),
        (
            "bad.env:1: expected NAME=value with one of .*, got 'PARTITION=x'",
            lambda: load_site(str(tmp_path / "bad.env")),
        ),
        ("refers to a variable that is not set", lambda: load_site(str(tmp_path / "unset.env"))),
        ("'nobody' is not an address", lambda: mail_user("nobody")),
        ("takes no values with a comma", lambda: sbatch_command(Job("gate", "d20"), load_site("generic"), "/a,b")),
        ("'soon' is not a time limit", lambda: seconds_of("soon")),
    ]
    for message, call in cases:
        with pytest.raises(UserError, match=message):
            call()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--time", "10"], ("queued again and again", "at least 13 minutes", "--signal-seconds")),
        # Slurm may send the signal a minute early
        (
            ["--time", "1", "--signal-seconds", "25"],
            ("leaves no time to train", "25 to 85 s before the end", "4 minutes"),
        ),
        (["--time", "12:59"], ("leaves no time to train",)),
        (
            ["--preset", "tiny", "--after-gate"],
            ("gate measures kernels on a GPU", "--gpus 1, or leave --after-gate out"),
        ),
        (["--nodes", "0"], ("must be at least 1, got 0",)),
        (["--tasks-per-node", "2"], ("one task per node serves all of its GPUs",)),
        (["--from", "bas"], ("--from bas: no such stage", "tokenizer")),
    ],
)
def test_invalid_submissions_are_rejected(tmp_path, options, parts):
    assert_fails_with(
        nanochat(tmp_path, "cluster", "submit", "speedrun", "--site", "ptolemy", "--dry-run", *options), *parts
    )


def test_without_slurm_it_says_so(tmp_path):
    result = nanochat(tmp_path, "cluster", "submit", "gate", PATH=str(tmp_path))
    assert_fails_with(result, "sbatch is not on the PATH", "--dry-run")


def test_launchers(monkeypatch):
    assert distributed_launcher(1)[1:] == []
    assert "--nproc_per_node=4" in distributed_launcher(4)
    values = {
        "SLURM_NTASKS": "3",
        "SLURM_JOB_ID": "1234",
        "SLURM_JOB_NODELIST": "gpu[07-09]",
        "SLURM_RESTART_COUNT": "2",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    call = distributed_launcher(8)
    assert call[0] == "srun" and {"--nnodes=3", "--nproc_per_node=8", "--rdzv_endpoint=gpu07:21234"} <= set(call)
    assert "--rdzv_id=1234.2" in call
    monkeypatch.setenv("NANOCHAT_TIMEOUT", "30")
    assert collective_timeout() == timedelta(seconds=30)
    monkeypatch.setenv("NANOCHAT_TIMEOUT", "soon")
    with pytest.raises(UserError, match="whole number of seconds, got 'soon'"):
        collective_timeout()


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.s*")), ids=lambda path: path.name)
def test_scripts_are_strict_and_thin(script):
    text = script.read_text()
    assert subprocess.run(["bash", "-n", script]).returncode == 0 and len(text.splitlines()) < 60
    if script.name != "environment.sh":
        assert text.startswith("#!/usr/bin/env bash\n") and "\nset -Eeuo pipefail\n" in text


def test_a_job_without_an_installation_fails_with_the_remedy(tmp_path):
    env = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "NANOCHAT_VENV": str(tmp_path),
    }
    for name in ("speedrun", "gate", "bench", "profile"):
        done = subprocess.run(["bash", ROOT / "slurm" / f"{name}.sbatch"], capture_output=True, text=True, env=env)
        assert done.returncode == 1 and "run slurm/setup.sh first" in done.stderr and "all" not in done.stdout


def test_the_scripts_take_the_account_of_the_user(tmp_path):
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    (tmp_path / ".env.local").write_text("MAIL_USER=a@b.edu\nexport NANOCHAT_ACCOUNT='mine'\n")
    call = ["bash", "-c", "set -Eeuo pipefail; source slurm/environment.sh; echo account $NANOCHAT_ACCOUNT"]
    for env, told in (({}, "account mine"), ({"NANOCHAT_ACCOUNT": "of-the-shell"}, "account of-the-shell")):
        env |= {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, env=env)
        assert told in done.stdout, done.stdout + done.stderr


def test_modules_are_loaded_or_missed(tmp_path):
    (tmp_path / "site.env").write_text('NANOCHAT_MODULES="python/3.12.5 cuda"\nNANOCHAT_SCRATCH=\n')
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "NANOCHAT_SITE": str(tmp_path / "site.env")}
    script = 'module() { echo "modules: $*"; }; '
    for before, status, told in (
        (script, 0, "modules: load python/3.12.5 cuda"),
        ("", 1, "there is no module command"),
    ):
        call = ["bash", "-c", f"{before}source slurm/environment.sh; status=$?; echo the shell continues; exit $status"]
        done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, env=env)
        assert done.returncode == status and told in done.stdout + done.stderr
        assert "the shell continues" in done.stdout  # which may be one that a person works in
