"""The sbatch calls word for word, site profiles, and what is refused."""

import math
import re
import shutil
import subprocess
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from nanochat.cluster.site import base_directory, load_site
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


@pytest.mark.parametrize(("preset", "gres"), [("cpu", None), ("tiny", None), ("gpu", "--gres=gpu:a100:8")])
def test_presets_with_embedded_data_ask_for_what_they_train_on(tmp_path, preset, gres):
    call = nanochat(tmp_path, *f"cluster submit --site ptolemy --account a --preset {preset} --dry-run".split()).stdout
    assert (gres is None) == ("--gres" not in call) and (gres or "--cpus-per-task=2 ") in call


def test_a_dry_run_calls_nothing(tmp_path):
    shown = nanochat(
        tmp_path / "new", *"cluster submit speedrun --site ptolemy --after-gate --dry-run".split(),
        *"--account abc123 --run-name other --to rl --rl".split(),
    )  # fmt: skip
    gate, speedrun = shown.stdout.splitlines()
    assert "slurm/gate.sbatch" in gate and "--gres=gpu:a100:1" in gate
    assert "--time=1:00:00" in gate and "--mem=64G" in gate and "--time=12:00:00" in speedrun  # the gate takes minutes
    assert all("--account=abc123" in call and ",NANOCHAT_RUN_NAME=other" in call for call in (gate, speedrun))
    assert "NANOCHAT_STAGES=--to rl --rl" in speedrun and "--rl" not in gate
    assert "afterok:<gate>" in speedrun and "--gres=gpu:a100:8" in speedrun
    assert not (tmp_path / "new").exists()


@pytest.fixture
def repository(tmp_path):
    """A folder with the scripts and the profiles."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    return tmp_path


@pytest.mark.parametrize(
    "line", ["mail_user=a@b.edu", "export MAIL_USER='a@b.edu'", "Nanochat_Mail_User=a@b.edu  # me"]
)
def test_the_address_is_found(repository, monkeypatch, line):
    assert load_site("generic", repository).mail_user == ""
    (repository / ".env.local").write_text(f"# mine\n{line}\nOTHER=$(date)\n")
    assert load_site("generic", repository).mail_user == "a@b.edu"
    monkeypatch.setenv("mail_user", "bob@example.edu")
    assert load_site("generic", repository).mail_user == "bob@example.edu"
    assert load_site("generic", repository, mail_user="eve@example.edu").mail_user == "eve@example.edu"


def test_an_account_is_personal_and_no_profile_has_one(repository, monkeypatch):
    for profile in (ROOT / "slurm").glob("*.env"):
        assert not load_site(str(profile)).account, profile
    with (repository / "slurm" / "generic.env").open("a") as profile:
        profile.write("NANOCHAT_ACCOUNT=of-the-site\n")
    assert load_site("generic", repository).account == "of-the-site"
    (repository / ".env.local").write_text("NANOCHAT_ACCOUNT=mine\n")
    assert load_site("generic", repository).account == "mine"
    monkeypatch.setenv("NANOCHAT_ACCOUNT", "of-the-shell")
    assert load_site("generic", repository).account == "of-the-shell"
    assert load_site("generic", repository, account="named").account == "named"


def test_time_limits():
    limits = {"90": 5400, "1:30": 90, "12:00:00": 43200, "1-12": 129600, "2-01:30": 178200}
    assert {limit: seconds_of(limit) for limit in limits} == limits
    assert seconds_of("0") == math.inf, "which is how Slurm writes that there is none"


def in_scripts(profile: Path, names: list[str], **variables: str) -> subprocess.CompletedProcess:
    """What the scripts in slurm/ make of a profile: the values of these names, or their message."""
    env = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "USER": "ada", "NANOCHAT_SITE": str(profile), **variables}
    shown = "; ".join(f'echo "$NANOCHAT_{name.upper()}"' for name in names) or "true"
    script = f"set -Eeuo pipefail; module() {{ true; }}; source slurm/environment.sh; {shown}"
    return subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, env=env)


def test_scripts_and_submit_read_the_same_values(tmp_path, monkeypatch):
    profile = tmp_path / "site.env"
    profile.write_text(
        """# a site
  NANOCHAT_MODULES="python/3.12.5 cuda"   # two
NANOCHAT_PARTITION='gpu-a100'
NANOCHAT_GRES=gpu:a100\r
NANOCHAT_GPUS=4# 8 is too many

export NANOCHAT_MEMORY="${MEMORY_OF_A_NODE}G"
NANOCHAT_TIME=1-12:00:00
NANOCHAT_SCRATCH="/scratch/$USER/the data; touch marker & more"
NANOCHAT_VENV=$NANOCHAT_SCRATCH/venv
NANOCHAT_CPUS=""
NANOCHAT_ACCOUNT=class.of_2026""".replace("4#", "4 #")
    )
    wanted = {
        "modules": "python/3.12.5 cuda",
        "partition": "gpu-a100",
        "gres": "gpu:a100",
        "gpus": "4",
        "memory": "256G",
        "time": "1-12:00:00",
        "scratch": "/scratch/ada/the data; touch marker & more",
        "venv": "/scratch/ada/the data; touch marker & more/venv",
        "base_dir": "/scratch/ada/the data; touch marker & more/nanochat-cache",
        "cpus": "",
        "account": "class.of_2026",
    }
    monkeypatch.setenv("MEMORY_OF_A_NODE", "256")
    site = load_site(str(profile))
    assert {name: getattr(site, name) for name in wanted} == wanted and site.name == str(profile)
    done = in_scripts(profile, list(wanted), MEMORY_OF_A_NODE="256")
    assert done.stdout.splitlines() == list(wanted.values()), done.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("PARTITION=x", "expected NAME=value with one of .*NANOCHAT_GPUS.*, got 'PARTITION=x'"),
        ("NANOCHAT_NODES=4", "expected NAME=value"),
        ("module load cuda", "expected NAME=value"),
        ("NANOCHAT_ACCOUNT=a; touch marker", "cannot read a; touch marker; wanted a value, in quotation marks"),
        ("NANOCHAT_ACCOUNT=a touch marker", "cannot read"),
        ("NANOCHAT_ACCOUNT=$(touch marker)", "cannot read"),
        ('NANOCHAT_ACCOUNT="$(touch marker)"', "commands are not run"),
        ("NANOCHAT_ACCOUNT=`touch marker`", "cannot read"),
        ('NANOCHAT_ACCOUNT="abc', "cannot read"),
        ("NANOCHAT_ACCOUNT='abc\"", "cannot read"),
        ("NANOCHAT_SCRATCH=~/data", "cannot read ~/data"),
        ("NANOCHAT_SCRATCH=data", "NANOCHAT_SCRATCH must be a path that begins with /, got 'data'"),
        ("NANOCHAT_SCRATCH=/s/$NOT_SET_ANYWHERE", "NOT_SET_ANYWHERE refers to a variable that is not set"),
        *(
            (f"NANOCHAT_SCRATCH=/s/${name}", f"{name} refers to a variable that is not set")
            for name in ("name", "line", "value", "place", "names", "own")
        ),
        ("NANOCHAT_SCRATCH=/s/${USER:-me}", "cannot read"),
        ("NANOCHAT_GPUS=four", "NANOCHAT_GPUS must be a whole number, got 'four'"),
        ("NANOCHAT_GPUS=-3", "NANOCHAT_GPUS must be a whole number, got '-3'"),
        ("NANOCHAT_CPUS=few", "must be a whole number, got 'few'"),
        ("NANOCHAT_MEMORY=much", "NANOCHAT_MEMORY must be a number of megabytes"),
        ("NANOCHAT_TIME=soon", "NANOCHAT_TIME must be a time limit"),
        ('NANOCHAT_ACCOUNT="a b"', "NANOCHAT_ACCOUNT must be one word, got 'a b'"),
        ('NANOCHAT_MODULES="a; touch marker"', "NANOCHAT_MODULES must be names with blanks between them"),
        ("NANOCHAT_MAIL_USER=ada", "NANOCHAT_MAIL_USER must be an address, name@host, got 'ada'"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path, line, message):
    profile = tmp_path / "site.env"
    profile.write_text(f"NANOCHAT_MODULES=\n{line}\n")
    with pytest.raises(UserError, match=f"^{profile}:2: .*{message}"):
        load_site(str(profile))
    done = in_scripts(profile, [])
    assert (
        done.returncode == 1 and re.search(f"^{profile}:2: .*{message}", done.stderr) and not (ROOT / "marker").exists()
    )


def test_a_base_directory_of_any_characters(monkeypatch):
    """A separator of lines, and a byte that is no UTF-8; in this locale profile.sh takes both."""
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "/a\u2028b\udcff")
    assert base_directory(load_site("generic")) == "/a\u2028b\udcff"


def test_what_is_wrong_is_named(repository, monkeypatch):
    (repository / ".env.local").write_text("OTHER='\nNANOCHAT_ACCOUNT=a; touch marker\n")
    cases = [
        ("existing profiles: slurm/generic.env slurm/ptolemy.env", lambda: load_site("nowhere")),
        (".env.local:2: cannot read a; touch marker", lambda: load_site("generic", repository)),
        (
            "--mail-user: .* must be an address, name@host, got 'nobody'",
            lambda: load_site("generic", mail_user="nobody"),
        ),
        ("--account: .* must be one word, got 'a b'", lambda: load_site("generic", account="a b")),
        ("takes no values with a comma", lambda: sbatch_command(Job("gate", "d20"), load_site("generic"), "/a,b")),
        ("'soon' is not a time limit", lambda: seconds_of("soon")),
    ]
    for message, call in cases:
        with pytest.raises(UserError, match=message):
            call()
    monkeypatch.setenv("MAIL_USER", "nobody")
    with pytest.raises(UserError, match="^MAIL_USER: .* must be an address"):
        load_site("generic")


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
        (["--preset", "tiny", "--signal-seconds", "3500"], ("--time 1:00:00 leaves no time to train",)),
        (
            ["--preset", "tiny", "--after-gate"],
            ("gate measures kernels on a GPU", "--gpus 1, or leave --after-gate out"),
        ),
        (["--nodes", "0"], ("must be at least 1, got 0",)),
        (["--tasks-per-node", "2"], ("one task per node serves all of its GPUs",)),
        (["--from", "bas"], ("--from bas: no such stage", "tokenizer")),
        (["--from", "sft", "--to", "mid"], ("--from sft comes after --to mid; the order is: data, tokenizer",)),
        (["--to", "rl-eval"], ("--to rl-eval: this stage runs only with --rl",)),
    ],
)
def test_invalid_submissions_are_rejected(tmp_path, options, parts):
    assert_fails_with(
        nanochat(tmp_path, "cluster", "submit", "speedrun", "--site", "ptolemy", "--dry-run", *options), *parts
    )


def test_options_of_the_speedrun_are_no_options_of_other_jobs(tmp_path):
    result = nanochat(tmp_path, *"cluster submit gate --site ptolemy --dry-run --from mid --rl --nodes 2".split())
    assert_fails_with(result, "--from, --rl, --nodes belong to the job speedrun; leave them out")


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


def test_the_scripts_take_the_account_of_the_user(repository):
    (repository / ".env.local").write_text("MAIL_USER=a@b.edu\nexport NANOCHAT_ACCOUNT='mine'\n")
    call = ["bash", "-c", "set -Eeuo pipefail; source slurm/environment.sh; echo account $NANOCHAT_ACCOUNT"]
    for env, told in (({}, "account mine"), ({"NANOCHAT_ACCOUNT": "of-the-shell"}, "account of-the-shell")):
        env |= {"PATH": "/usr/bin:/bin", "HOME": str(repository)}
        done = subprocess.run(call, cwd=repository, capture_output=True, text=True, env=env)
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
