"""Compare `nanochat fetch` with curl, from a hub on this machine: python -m bench.fetch --json build/fetch.json"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from nanochat.platform.files import write_json
from tests.nanochat.speedrun.hub import Hub

REPO = "karpathy/fineweb-edu-100b-shuffle"


@dataclass(frozen=True)
class FetchBenchConfig:
    """Fetch shards of random text, which do not compress, with nanochat and curl in turns."""

    shards: int = 15
    """shards besides the one for validation"""
    megabytes: int = 64
    """size of a shard"""
    rounds: int = 3
    """samples of each variant"""
    json: Path | None = None
    """file for every sample"""


def main(config: FetchBenchConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "shard.parquet"
        pq.write_table(pa.table({"text": [os.urandom(2**19).hex() for _ in range(config.megabytes)]}), file)
        content = file.read_bytes()
        names = [f"shard_{number:05d}.parquet" for number in (*range(config.shards), 1822)]
        samples: dict[str, list[float]] = {"nanochat fetch": [], "curl, 8 at once": [], "curl, one after the other": []}
        with Hub({f"{REPO}/{name}": content for name in names}) as hub:
            urls = [f"{hub.url}/datasets/{REPO}/resolve/main/{name}" for name in names]
            for number in range(config.rounds):
                target = Path(folder) / str(number)
                outputs = [word for url in urls for word in ("-O", url)]
                calls = {
                    "nanochat fetch": [sys.executable, "-m", "nanochat", "fetch", "--shards", str(config.shards), "--only", "text"],
                    "curl, 8 at once": ["curl", "-s", "--parallel", "--parallel-max", "8", *outputs],
                    "curl, one after the other": ["curl", "-s", *outputs],
                }  # fmt: skip
                for name, call in calls.items():
                    own = target / name.replace(" ", "_")
                    own.mkdir(parents=True)
                    env = os.environ | {
                        "HF_ENDPOINT": hub.url,
                        "NANOCHAT_BASE_DIR": str(own),
                        "PYTHONPATH": str(Path.cwd()),
                    }
                    started = time.perf_counter()
                    subprocess.run(call, cwd=own, env=env, check=True, stdout=subprocess.DEVNULL)
                    samples[name].append(time.perf_counter() - started)
    size = len(names) * len(content) / 1e6
    found = {
        "command": f"python -m bench.fetch {' '.join(sys.argv[1:])}".strip(),
        "megabytes": size,
        "seconds": samples,
    }
    for name, seconds in samples.items():
        median = statistics.median(seconds)
        print(f"{name:26} {median:6.2f} s ({min(seconds):.2f} to {max(seconds):.2f}), {size / median:7.0f} MB/s")
    if config.json:
        write_json(config.json, found)


if __name__ == "__main__":
    main(tyro.cli(FetchBenchConfig))
