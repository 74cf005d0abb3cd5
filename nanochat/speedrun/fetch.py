"""Fetch what a run reads, on a node with internet: in parallel, resumed, verified. Repeating it fetches what is missing."""

import hashlib
import json
import shutil
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pooch
import requests
from filelock import FileLock, Timeout
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars

from nanochat.options.presets import EMBEDDED
from nanochat.options.speedrun import FetchOptions
from nanochat.platform.console import progress_bar, say
from nanochat.platform.errors import UserError
from nanochat.platform.files import sha256_of, write_atomically
from nanochat.platform.paths import Paths
from nanochat.speedrun.assets import Asset, assets, note_fetched, read_fetched, verify
from nanochat.synthetic.identity import identity_conversations

ATTEMPTS = 4  # of a file; each also repeats its requests, and goes on where the last one was cut off
FINAL = (EntryNotFoundError, RepositoryNotFoundError, GatedRepoError, OfflineModeIsEnabled)
IDENTITY_SEED = 42


def fetch(options: FetchOptions, paths: Paths) -> None:
    """Raises UserError listing what is missing when anything failed; what is whole stays."""
    if options.preset in EMBEDDED:
        return say(f"preset {options.preset} makes its data itself: nothing to fetch")
    wanted = assets(options.preset, options.shards)
    unknown = set(options.only) - {asset.name for asset in wanted}
    if unknown:
        names = ", ".join(asset.name for asset in wanted)
        raise UserError(f"--only {', '.join(sorted(unknown))}: no such asset; there are: {names}")
    disable_progress_bars()  # a bar a file would be hundreds
    pooch.get_logger().setLevel("ERROR")
    try:
        lock = FileLock(paths.base / ".fetch.lock").acquire(timeout=0)
    except Timeout:
        raise UserError(f"another fetch is running in {paths.base}; wait for it") from None
    with lock:
        chosen = [asset for asset in wanted if not options.only or asset.name in options.only]
        _fetch(chosen, options.workers, paths)


def _fetch(wanted: list[Asset], workers: int, paths: Paths) -> None:
    missing = [asset for asset in wanted if not _whole(asset, paths)]
    need, free = sum(asset.megabytes for asset in missing) * 1e6, shutil.disk_usage(paths.base).free
    already = sum(path.stat().st_size for asset in missing for path in asset.present(paths))
    if need - already > free:
        raise UserError(
            f"{paths.base} has {free / 1e9:.1f} GB free, the data take {(need - already) / 1e9:.1f} more; free space, or set "
            "NANOCHAT_BASE_DIR to a larger disk"
        )
    say(
        f"{len(wanted) - len(missing)} of {len(wanted)} assets are there; {len(missing)} to fetch, about {need / 1e9:.1f} GB"
    )
    failed: dict[str, str] = {}
    started, received = time.perf_counter(), 0
    with ThreadPoolExecutor(workers) as pool, progress_bar("fetch", need / 1e6) as advance:
        for asset in missing:
            got: dict[str, list] = {}
            try:
                works = _works(asset, paths)
                pending = {pool.submit(work): name for name, work in works.items()}
                reasons = []
                for done in as_completed(pending):
                    try:
                        for path, digest in done.result().items():
                            got[str(path.relative_to(paths.base))] = [path.stat().st_size, digest]
                            received += path.stat().st_size
                            advance(path.stat().st_size / 1e6)
                    except Exception as error:  # of the network, the hub, the disk: told at the end, the others go on
                        reasons.append(f"{pending[done]}: {_reason(error)}")
                if reasons:
                    raise UserError(f"{len(reasons)} of {len(works)} files failed, {min(reasons)}")
                verify(asset, paths)
                note_fetched(paths, asset, got)
                say(f"  {asset.name}: done")
            except Exception as error:
                failed[asset.name] = _reason(error)
                say(f"  {asset.name}: {failed[asset.name]}")
    seconds = time.perf_counter() - started
    say(f"{received / 1e6:,.1f} MB in {seconds:.1f} s ({received / 1e6 / max(seconds, 1e-9):,.1f} MB/s)")
    if failed:
        told = "; ".join(f"{name} ({reason})" for name, reason in failed.items())
        raise UserError(
            f"{len(failed)} of {len(wanted)} assets are missing: {told}; the same command goes on from here"
        )
    shutil.rmtree(_staging(paths), ignore_errors=True)
    say(f"all {len(wanted)} assets are whole; next: nanochat preflight")


def _whole(asset: Asset, paths: Paths) -> bool:
    try:
        verify(asset, paths)
    except UserError:
        return False
    return asset.name in read_fetched(paths) or not (asset.repo or asset.url)


def _works(asset: Asset, paths: Paths) -> dict[str, Callable[[], dict[Path, str]]]:
    """What is to be done for each file of an asset: it returns the files with their SHA-256."""
    if asset.url:
        return {asset.url: lambda: _from_web(asset, paths)}
    if not asset.repo:
        return {asset.name: lambda: _made(asset, paths)}
    names = list(asset.files)
    if any("*" in name for name in names):
        listed = HfApi().list_repo_files(asset.repo, repo_type="dataset")
        names = [name for name in listed if any(fnmatch(name, pattern) for pattern in asset.files)]
        if not names:
            raise UserError(f"{asset.repo} has no file like {', '.join(asset.files)}")
    return {name: lambda name=name: _from_hub(asset, name, paths) for name in names}


def _from_hub(asset: Asset, name: str, paths: Paths) -> dict[Path, str]:
    """One file: whole by the hash that the hub states, then moved to its place."""
    target = paths.base / asset.target / name.rpartition("/")[2]
    known = read_fetched(paths).get(asset.name, {}).get(str(target.relative_to(paths.base)))
    if known and target.exists() and [target.stat().st_size, sha256_of(target)] == known:
        return {target: known[1]}
    staging = _staging(paths) / asset.repo.replace("/", "--")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            file = Path(hf_hub_download(asset.repo, name, repo_type="dataset", local_dir=staging))
            stated = get_hf_file_metadata(hf_hub_url(asset.repo, name, repo_type="dataset"))
            digest = sha256_of(file)
            # large files have their SHA-256 as etag, small ones git's SHA-1 of a blob
            if stated.etag not in (digest, None) and (len(stated.etag) == 64 or _blob_hash(file) != stated.etag):
                file.unlink()
                raise OSError(f"its hash is not the {stated.etag} that the hub states")
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
            return {target: digest}
        except FINAL:
            raise
        except Exception as error:
            full = isinstance(error, OSError) and error.errno is not None
            if full or attempt == ATTEMPTS:
                raise
            time.sleep(min(2.0**attempt, 30))
    raise AssertionError


def _blob_hash(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _from_web(asset: Asset, paths: Paths) -> dict[Path, str]:
    staging, target = _staging(paths), paths.base / asset.target
    name = f"{asset.name}.download"
    loader = pooch.create(staging, base_url="", registry={name: None}, urls={name: asset.url}, retry_if_failed=ATTEMPTS)
    (staging / name).unlink(missing_ok=True)  # its hash is not known: never take an older one
    file = Path(loader.fetch(name, downloader=pooch.HTTPDownloader(timeout=30)))
    if not zipfile.is_zipfile(file):
        file.replace(target)
        return {target: sha256_of(target)}
    with zipfile.ZipFile(file) as archive:
        archive.extractall(staging)
    shutil.rmtree(target, ignore_errors=True)
    (staging / asset.target).replace(target)
    return {path: sha256_of(path) for path in asset.present(paths)}


def _made(asset: Asset, paths: Paths) -> dict[Path, str]:
    target = paths.base / asset.target
    lines = [json.dumps(messages) for messages in identity_conversations(IDENTITY_SEED, asset.rows)]
    write_atomically(target, "\n".join(lines) + "\n")
    return {target: sha256_of(target)}


def _staging(paths: Paths) -> Path:
    directory = paths.base / ".fetch"
    directory.mkdir(exist_ok=True)
    return directory


def _reason(error: BaseException) -> str:
    """One line; of the operating system's error inside, when there is one."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it"
    if isinstance(error, EntryNotFoundError | RepositoryNotFoundError):
        return f"the hub ({huggingface_hub.constants.ENDPOINT}) does not have it"
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"the server answered {error.response.status_code}"
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.errno is not None and inner.strerror:
            return inner.strerror
        inner = inner.__cause__ or inner.__context__
    return (str(error).strip() or repr(error)).splitlines()[0]
