"""Downloads from a hub that is slow, cuts, lies, refuses and dies, and from the web; then nothing is missing or it is named."""

import hashlib
import socket
import time
from dataclasses import replace

import pytest

from nanochat.options.speedrun import FetchOptions
from nanochat.platform.errors import UserError
from nanochat.platform.paths import Paths
from nanochat.speedrun import fetch as fetching
from nanochat.speedrun.assets import assets, read_fetched
from nanochat.speedrun.fetch import _fetch, fetch
from tests import forked
from tests.conftest import assert_fails_with, command, environment, nanochat
from tests.nanochat.speedrun.hub import Hub
from tests.nanochat.speedrun.world_of_d20 import content, parquet

SHARDS = 5
ON_HUB = [asset for asset in assets("d20", SHARDS) if asset.repo]
ONLY = ("text", "gsm8k/train", "gsm8k/test", "arc-easy/train")


@pytest.fixture
def hub():
    files = {f"{asset.repo}/{name}": data for asset in ON_HUB for name, data in content(asset).items()}
    with Hub(files) as server:
        yield server


def shard(number: int) -> str:
    return f"karpathy/fineweb-edu-100b-shuffle/shard_{number:05d}.parquet"


def arguments(*only: str) -> list[str]:
    return ["fetch", "--shards", str(SHARDS), "--only", *(only or ONLY)]


HURRIED = (
    "import sys, time; sleep = time.sleep; time.sleep = lambda seconds: sleep(seconds / 20); sys.argv[0] = 'nanochat'; "
    "from nanochat.cli import main; main()"
)


def hurried(base, *arguments: str, **changes: str):
    """nanochat(…) which waits for a twentieth of the time between its attempts, as the library that it downloads with does."""
    return forked.run("-c", HURRIED, *arguments, env=environment(base, **changes))


HURRIED_FETCH = """
import time
time.sleep = lambda seconds: None
from nanochat.cli import _fail
from nanochat.platform.errors import UserError
from nanochat.platform.paths import base_paths
from nanochat.speedrun.assets import Asset
from nanochat.speedrun.fetch import _fetch
try:
    _fetch([%r], 1, base_paths())
except UserError as error:
    _fail(str(error), 1)
"""


def around(hub: Hub) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DOWNLOAD_TIMEOUT": "5"}


def test_a_hub_that_misbehaves(hub, tmp_path):
    """Slow, cut in the middle, wrong once, asking to wait, failing once: all of it arrives whole, in one command."""
    hub.faults = {
        shard(0): ["slow"],
        shard(1): ["cut"],
        shard(2): ["wrong"],
        shard(3): ["429"],
        shard(4): ["500", "500"],
    }
    hub.faults["openai/gsm8k/main/train-00000-of-00001.parquet"] = ["cut", "500", "wrong"]
    done = hurried(tmp_path, *arguments(), **around(hub))
    assert done.returncode == 0, done.stderr + done.stdout
    assert not any(hub.faults.values()), hub.faults
    for number in range(SHARDS):
        assert (tmp_path / "text" / f"shard_{number:05d}.parquet").read_bytes() == hub.files[shard(number)]
    record = read_fetched(Paths(tmp_path))
    assert set(record) == set(ONLY)
    data = hub.files[shard(1822)]
    assert record["text"]["text/shard_01822.parquet"] == [len(data), hashlib.sha256(data).hexdigest()]
    assert [name for name, _ in hub.gets].count(shard(1)) == 2  # cut once, and fetched once more

    count = len(hub.gets)
    again = nanochat(tmp_path, *arguments(), **around(hub))
    assert again.returncode == 0 and len(hub.gets) == count and "4 of 4 assets are complete; 0 to fetch" in again.stdout


def test_what_is_missing_is_listed(hub, tmp_path):
    del hub.files[shard(3)]
    hub.faults["openai/gsm8k/main/test-00000-of-00001.parquet"] = ["wrong"] * 20
    done = hurried(tmp_path, *arguments(), **around(hub))
    assert_fails_with(
        done, "2 of 4 assets are missing", "text (1 of 6 files failed, shard_00003.parquet: the hub", "does not have it"
    )
    assert "its hash is not the" in done.stderr and "continues from here" in done.stderr
    assert set(read_fetched(Paths(tmp_path))) == {"gsm8k/train", "arc-easy/train"}
    assert not (tmp_path / "chat" / "gsm8k" / "test-00000-of-00001.parquet").exists()


def test_killed_and_resumed(hub, tmp_path):
    hub.faults = {shard(2): ["hold"]}
    process = forked.start(*command(*arguments("text"), "--workers", "1")[1:], env=environment(tmp_path, **around(hub)))
    while not any(name == shard(2) for name, _ in hub.gets):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    before = len(hub.gets)
    assert read_fetched(Paths(tmp_path)) == {} and not nothing_half(tmp_path)
    hub.release.set()
    done = nanochat(tmp_path, *arguments("text"), **around(hub))
    assert done.returncode == 0, done.stderr
    fetched = [name for name, _ in hub.gets[before:]]
    assert fetched.count(shard(2)) == 1 and len(list((tmp_path / "text").glob("*.parquet"))) == SHARDS + 1


def nothing_half(base) -> list:
    """Shards in their place that are not whole."""
    whole = len(next(iter(content(ON_HUB[0]).values())))
    return [path for path in (base / "text").glob("*") if path.stat().st_size != whole]


def test_two_at_once(hub, tmp_path):
    hub.faults = {shard(2): ["hold"]}
    first = forked.start(*command(*arguments("text"))[1:], env=environment(tmp_path, **around(hub)))
    while not hub.gets:
        assert first.poll() is None
        time.sleep(0.05)
    assert_fails_with(nanochat(tmp_path, *arguments("text"), **around(hub)), "another fetch is running")
    hub.release.set()
    assert first.wait(60) == 0


def test_the_lock_is_held_as_long_as_files_are_fetched(tmp_path, monkeypatch):
    options, seen = FetchOptions("d20"), []

    def during(*_):
        with pytest.raises(UserError, match="another fetch is running in .*; wait for it"):
            fetch(options, Paths(tmp_path))
        seen.append("once")

    monkeypatch.setattr(fetching, "_fetch", during)
    for _ in range(2):  # it was released
        fetch(options, Paths(tmp_path))
    assert len(seen) == 2


def test_a_full_disk(hub, tmp_path):
    """A limit on file sizes stands in for it: the operating system refuses the write in the same place."""
    hub.files[shard(1)] = b"x" * 3_000_000
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)); "
        "sys.argv[0] = 'nanochat'; from nanochat.cli import main; main()"
    )
    done = forked.run("-c", limited, *arguments("text", "gsm8k/test"), env=environment(tmp_path, **around(hub)))
    assert_fails_with(done, "1 of 2 assets are missing", "File too large")
    assert not nothing_half(tmp_path) and set(read_fetched(Paths(tmp_path))) == {"gsm8k/test"}
    with pytest.raises(UserError, match=r"GB free, the data take .* more"):
        _fetch([replace(ON_HUB[0], megabytes=1e9)], 1, Paths(tmp_path))


def test_the_web_and_what_is_made(tmp_path, monkeypatch):
    # pooch waits between its attempts too; in other tests the hub and the tests themselves have to wait
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    wanted = {asset.name: asset for asset in assets("d20", SHARDS) if not asset.repo}
    words, archive = (next(iter(content(wanted[name]).values())) for name in ("words", "eval_bundle"))
    with Hub({"web/words": words, "web/bundle": archive}) as server:
        server.faults = {"web/words": ["500", "cut"], "web/bundle": ["429"]}
        at = {"words": f"{server.url}/web/words", "eval_bundle": f"{server.url}/web/bundle", "identity": ""}
        paths = Paths(tmp_path)
        _fetch([replace(asset, url=at[name]) for name, asset in wanted.items()], 4, paths)
        assert set(read_fetched(paths)) == set(wanted) and paths.words.read_bytes() == words
        assert not (tmp_path / ".fetch").exists()
        server.faults = {"web/words": ["404"] * 20}
        paths.words.unlink()
        with pytest.raises(UserError, match="words .*the server 127.0.0.1:.* does not have it"):
            _fetch([replace(wanted["words"], url=at["words"])], 1, paths)


def test_a_users_own_files_are_not_overwritten(hub, tmp_path):
    """A shard, of an asset that was fetched, and one that was there before: refused, kept, and replaced on demand."""
    [changed, early] = [tmp_path / "text" / "shard_00001.parquet", tmp_path / "chat/gsm8k/test-00000-of-00001.parquet"]
    early.parent.mkdir(parents=True)
    early.write_bytes(parquet(7, ("question", "answer")))
    only = ("text", "gsm8k/test")
    refused = nanochat(tmp_path, *arguments(*only), **around(hub))
    assert_fails_with(
        refused, "1 of 2 assets are missing: gsm8k/test", str(early), "--changed keep", "--changed replace"
    )
    changed.write_bytes(own := parquet(3, ("text",)))
    before = {path: path.read_bytes() for path in (changed, early)}
    refused = nanochat(tmp_path, *arguments(*only), **around(hub))
    assert_fails_with(refused, "2 of 2 assets are missing", f"did not fetch {changed} as it is now", str(early))
    assert {path: path.read_bytes() for path in before} == before

    kept = nanochat(tmp_path, *arguments(*only), "--changed", "keep", **around(hub))
    assert kept.returncode == 0 and {path: path.read_bytes() for path in before} == before, kept.stderr
    again = nanochat(tmp_path, *arguments(*only), **around(hub))
    assert "2 of 2 assets are complete; 0 to fetch" in again.stdout and changed.read_bytes() == own
    replaced = nanochat(tmp_path, *arguments(*only), "--changed", "replace", **around(hub))
    assert replaced.returncode == 0 and changed.read_bytes() == hub.files[shard(1)], replaced.stderr
    assert early.read_bytes() == hub.files["openai/gsm8k/main/test-00000-of-00001.parquet"]


def test_a_users_own_files_of_the_web_and_of_what_is_made_are_not_overwritten(tmp_path):
    wanted = {asset.name: asset for asset in assets("d20", SHARDS) if not asset.repo}
    archive = next(iter(content(wanted["eval_bundle"]).values()))
    paths = Paths(tmp_path)
    mine = [tmp_path / wanted["identity"].target, tmp_path / "eval_bundle" / "eval_data" / "mine.jsonl", paths.words]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('["mine"]\n')
    with Hub({"web/words": b"word\n" * wanted["words"].rows, "web/bundle": archive}) as server:
        at = {"words": f"{server.url}/web/words", "eval_bundle": f"{server.url}/web/bundle", "identity": ""}
        chosen = [replace(asset, url=at[name]) for name, asset in wanted.items()]
        # identity conversations of any number are whole, and need no permission
        with pytest.raises(UserError, match="2 of 3 assets are missing: .*--changed keep") as error:
            _fetch(chosen, 4, paths)
        assert all(str(path) in str(error.value) for path in mine[1:])
        assert all(path.read_text() == '["mine"]\n' for path in mine)
        with pytest.raises(UserError, match="1 of 3 assets are missing: eval_bundle"):  # kept, it is no whole bundle
            _fetch(chosen, 4, paths, "keep")
        assert all(path.read_text() == '["mine"]\n' for path in mine)
        _fetch(chosen, 4, paths, "replace")
        assert mine[2].read_bytes() == b"word\n" * wanted["words"].rows and not mine[1].exists()
        assert len(mine[0].read_text().splitlines()) == wanted["identity"].rows


def test_mistakes_are_named(tmp_path):
    assert_fails_with(nanochat(tmp_path, "fetch", "--only", "mmlu"), "--only mmlu: no such asset", "mmlu/test")
    offline = nanochat(tmp_path, "fetch", "--only", "gsm8k/test", HF_HUB_OFFLINE="1")
    assert_fails_with(offline, "HF_HUB_OFFLINE is set; unset it")


def nobody() -> str:
    """An address on this machine at which nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


# what happens → what is said of it, and what to do
ANSWERS = {
    401: ("needs a token", "HF_TOKEN"),
    403: ("does not let you have it", "HF_TOKEN"),
    404: ("does not have it",),
    407: ("proxy", "user and password", "HTTPS_PROXY"),
    429: ("too many requests", "later"),
    503: ("answers 503", "later"),
    "offline": ("HF_HUB_OFFLINE is set", "unset it"),
    "nobody": ("cannot be reached", "internet"),
    "proxy": ("proxy", "user and password", "HTTPS_PROXY"),
    "closed proxy": ("the proxy does not connect to the server (403 Forbidden)",),
}


@pytest.mark.parametrize("asset", ["text", "gsm8k/test", "words"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_what_happens_is_what_is_said(hub, tmp_path, answer, asset):
    """Of a file whose name is known, of one that has to be looked up, and of one of the web: only 404 says that it is not there."""
    [wanted] = [found for found in assets("d20", 1) if found.name == asset]
    if asset == "words":
        proxied = "https://example.invalid"
        at = {"offline": "", "nobody": nobody(), "proxy": proxied, "closed proxy": proxied}.get(answer, hub.url)
        wanted = replace(wanted, url=f"{at}/words.txt")
        if answer == "offline":
            pytest.skip("HF_HUB_OFFLINE is for the hub; the words come from another address")
    changes = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "NANOCHAT_BASE_DIR": str(tmp_path)}
    if isinstance(answer, int):
        hub.status = answer
    elif answer == "offline":
        changes["HF_HUB_OFFLINE"] = "1"
    elif answer == "nobody":
        changes["HF_ENDPOINT"] = nobody()
    else:
        hub.status = 403 if answer == "closed proxy" else 407
        changes |= {"HTTPS_PROXY": hub.url, "HF_ENDPOINT": "https://example.invalid"}
    done = forked.run("-c", HURRIED_FETCH % wanted, env=environment(tmp_path, **changes))
    assert_fails_with(done, f"1 of 1 assets are missing: {asset}", *ANSWERS[answer])
    assert ("does not have it" in done.stderr) == (answer == 404), done.stderr
