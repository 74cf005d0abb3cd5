"""The scripts in slurm/: what they take from a site, and how a job ends that cannot begin."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("begun", [False, True])
def test_a_signal_before_the_run_could_begin_ends_the_job(tmp_path, begun):
    """A job that is always stopped there would be queued again without end. During the run it is queued again."""
    (tmp_path / "bin").mkdir()
    programs = {
        "nanochat": f"""echo "$1"; printf '<%s>' "$@"; echo; [ $1 = speedrun ] || [ {begun} = True ] || kill -USR1 $PPID
            [ $1 = preflight ] || {{ kill -USR1 $PPID; trap 'exit 138' USR1; for _ in $(seq 100); do sleep 0.1; done; }}""",
        "scontrol": "echo scontrol $*",
        "sleep": "[ $1 != 60 ] || set 0.1; exec /bin/sleep $1",  # not until Slurm ends the job
    }
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    env = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "NANOCHAT_VENV": str(tmp_path),
    }
    env |= {
        "NANOCHAT_PRESET": "tiny",
        "SLURM_JOB_ID": "41",
        "SLURM_JOB_NODELIST": "here",
        "NANOCHAT_SIGNAL_SECONDS": "30",
        "NANOCHAT_STAGES": "--rl --custom-json '/data/a $b/me.jsonl'" if begun else "",
    }
    done = subprocess.run(["bash", ROOT / "slurm" / "speedrun.sbatch"], capture_output=True, text=True, env=env)
    assert ("scontrol requeue 41" in done.stdout) == ("speedrun" in done.stdout.split()) == begun
    rl = "<--rl>" if begun else ""
    assert f"<preflight><--preset><tiny>{rl}\n" in done.stdout
    assert not begun or f"<speedrun><--preset><tiny>{rl}<--custom-json></data/a $b/me.jsonl>\n" in done.stdout
    assert ("raise --time and submit again" in done.stderr) == (not begun) and done.returncode == (138 if begun else 1)


def sourced(tmp_path, profile: str, before: str = ":", **env: str) -> subprocess.CompletedProcess:
    """A strict script that does something, sources environment.sh and shows the variables that it then has."""
    (tmp_path / "site.env").write_text(profile)
    call = ["bash", "-c", f"set -Eeuo pipefail; {before}; source slurm/environment.sh; echo $-; env"]
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "NANOCHAT_SITE": str(tmp_path / "site.env"), **env}
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, env=env)


def test_a_module_command_may_be_careless(tmp_path):
    """It reads a variable that is not set, and a command in it fails; afterwards the script is as strict as before."""
    careless = 'module() { [ -n "$LMOD_NOT_SET" ]; false; export LOADED="$*"; }'
    done = sourced(tmp_path, "NANOCHAT_MODULES=python", careless)
    assert done.returncode == 0 and "LOADED=load python\n" in done.stdout, done.stderr
    assert {"e", "u"} <= set(done.stdout.splitlines()[0])
    done = sourced(tmp_path, 'NANOCHAT_MODULES="python cuda"', "module() { return 1; }")
    assert done.returncode == 1 and "module load python cuda failed with status 1; module avail" in done.stderr


def test_caches_are_on_scratch_where_the_site_has_one(tmp_path):
    wanted = ("PIP_CACHE_DIR", "HF_HUB_CACHE", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "MPLCONFIGDIR")
    done = sourced(tmp_path, "NANOCHAT_SCRATCH=/scratch/of-mine", HF_HUB_CACHE="/of/mine")
    shown = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    assert shown.pop("HF_HUB_CACHE") == "/of/mine", "what the user has set stays"
    assert all(shown[name].startswith("/scratch/of-mine/.cache/") for name in wanted if name != "HF_HUB_CACHE")
    assert not any(name in sourced(tmp_path, "NANOCHAT_SCRATCH=\n").stdout for name in wanted)
