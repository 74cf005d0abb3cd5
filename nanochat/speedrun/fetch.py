"""`nanochat fetch`: downloads the data of a preset, in parallel. It resumes, verifies hashes, and fetches only what is missing."""

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

ATTEMPTS = 4  # per file; within each, the hub's library repeats requests and resumes where a connection was cut off
NOT_WORTH_RETRYING = (EntryNotFoundError, RepositoryNotFoundError, GatedRepoError, OfflineModeIsEnabled)
IDENTITY_SEED = 42


def fetch(options: FetchOptions, paths: Paths) -> None:
    """Fetch the assets of a preset. Raises UserError that lists what failed; complete files are kept."""
    if options.preset in EMBEDDED:
        return say(f"preset {options.preset} generates its data: nothing to fetch")
    wanted = assets(options.preset, options.shards)
    unknown = set(options.only) - {asset.name for asset in wanted}
    if unknown:
        names = ", ".join(asset.name for asset in wanted)
        raise UserError(f"--only {', '.join(sorted(unknown))}: no such asset; there are: {names}")
    disable_progress_bars()  # one bar per file would be hundreds
    pooch.get_logger().setLevel("ERROR")
    try:
        lock = FileLock(paths.base / ".fetch.lock").acquire(timeout=0)
    except Timeout:
        raise UserError(f"another fetch is running in {paths.base}; wait for it") from None
    with lock:
        chosen = [asset for asset in wanted if not options.only or asset.name in options.only]
        _fetch(chosen, options.workers, paths)


def _fetch(wanted: list[Asset], workers: int, paths: Paths) -> None:
    missing = [asset for asset in wanted if not _complete(asset, paths)]
    needed, free = sum(asset.megabytes for asset in missing) * 1e6, shutil.disk_usage(paths.base).free
    present = sum(path.stat().st_size for asset in missing for path in asset.present(paths))
    if needed - present > free:
        raise UserError(
            f"{paths.base} has {free / 1e9:.1f} GB free, the data take {(needed - present) / 1e9:.1f} more; free space, or set "
            "NANOCHAT_BASE_DIR to a larger disk"
        )
    say(
        f"{len(wanted) - len(missing)} of {len(wanted)} assets are complete; {len(missing)} to fetch, about "
        f"{needed / 1e9:.1f} GB"
    )
    failed: dict[str, str] = {}
    started, received = time.perf_counter(), 0
    with ThreadPoolExecutor(workers) as pool, progress_bar("fetch", needed / 1e6) as advance:
        for asset in missing:
            fetched: dict[str, list] = {}
            try:
                downloads = _downloads(asset, paths)
                pending = {pool.submit(download): name for name, download in downloads.items()}
                reasons = []
                for done in as_completed(pending):
                    try:
                        for path, digest in done.result().items():
                            fetched[str(path.relative_to(paths.base))] = [path.stat().st_size, digest]
                            received += path.stat().st_size
                            advance(path.stat().st_size / 1e6)
                    except Exception as error:  # network, hub or disk: reported at the end, while the others continue
                        reasons.append(f"{pending[done]}: {_reason(error)}")
                if reasons:
                    raise UserError(f"{len(reasons)} of {len(downloads)} files failed, {min(reasons)}")
                verify(asset, paths)
                note_fetched(paths, asset, fetched)
                say(f"  {asset.name}: done")
            except Exception as error:
                failed[asset.name] = _reason(error)
                say(f"  {asset.name}: {failed[asset.name]}")
    seconds = time.perf_counter() - started
    say(f"{received / 1e6:,.1f} MB in {seconds:.1f} s ({received / 1e6 / max(seconds, 1e-9):,.1f} MB/s)")
    if failed:
        summary = "; ".join(f"{name} ({reason})" for name, reason in failed.items())
        raise UserError(
            f"{len(failed)} of {len(wanted)} assets are missing: {summary}; the same command continues from here"
        )
    shutil.rmtree(_staging(paths), ignore_errors=True)
    say(f"all {len(wanted)} assets are complete; next: nanochat preflight")


def _complete(asset: Asset, paths: Paths) -> bool:
    try:
        verify(asset, paths)
    except UserError:
        return False
    return asset.name in read_fetched(paths) or not (asset.repo or asset.url)


def _downloads(asset: Asset, paths: Paths) -> dict[str, Callable[[], dict[Path, str]]]:
    """For each file of an asset, by its name, a function that fetches it and returns the resulting files with their SHA-256."""
    if asset.url:
        return {asset.url: lambda: _from_web(asset, paths)}
    if not asset.repo:
        return {asset.name: lambda: _generated(asset, paths)}
    names = list(asset.files)
    if any("*" in name for name in names):
        listed = HfApi().list_repo_files(asset.repo, repo_type="dataset")
        names = [name for name in listed if any(fnmatch(name, pattern) for pattern in asset.files)]
        if not names:
            raise UserError(f"{asset.repo} has no file that matches {', '.join(asset.files)}")
    return {name: lambda name=name: _from_hub(asset, name, paths) for name in names}


def _from_hub(asset: Asset, name: str, paths: Paths) -> dict[Path, str]:
    """Download a file from the hub, check it against the hub's hash, and move it to the base directory."""
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
            # the etag of a large file is its SHA-256, that of a small one git's SHA-1 of the blob
            if stated.etag not in (digest, None) and (len(stated.etag) == 64 or _blob_hash(file) != stated.etag):
                file.unlink()
                raise OSError(f"its hash is not the {stated.etag} that the hub states")
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
            return {target: digest}
        except NOT_WORTH_RETRYING:
            raise
        except Exception as error:
            disk_error = isinstance(error, OSError) and error.errno is not None  # such as a full disk
            if disk_error or attempt == ATTEMPTS:
                raise
            time.sleep(min(2.0**attempt, 30))
    raise AssertionError


def _blob_hash(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _from_web(asset: Asset, paths: Paths) -> dict[Path, str]:
    """Download the file at an asset's address, and unpack it if it is an archive."""
    staging, target = _staging(paths), paths.base / asset.target
    name = f"{asset.name}.download"
    loader = pooch.create(staging, base_url="", registry={name: None}, urls={name: asset.url}, retry_if_failed=ATTEMPTS)
    (staging / name).unlink(missing_ok=True)  # its hash is not known, so that an old file cannot be trusted
    file = Path(loader.fetch(name, downloader=pooch.HTTPDownloader(timeout=30)))
    if not zipfile.is_zipfile(file):
        file.replace(target)
        return {target: sha256_of(target)}
    with zipfile.ZipFile(file) as archive:
        archive.extractall(staging)
    shutil.rmtree(target, ignore_errors=True)
    (staging / asset.target).replace(target)
    return {path: sha256_of(path) for path in asset.present(paths)}


def _generated(asset: Asset, paths: Paths) -> dict[Path, str]:
    target = paths.base / asset.target
    lines = [json.dumps(messages) for messages in identity_conversations(IDENTITY_SEED, asset.rows)]
    write_atomically(target, "\n".join(lines) + "\n")
    return {target: sha256_of(target)}


def _staging(paths: Paths) -> Path:
    directory = paths.base / ".fetch"
    directory.mkdir(exist_ok=True)
    return directory


def _reason(error: BaseException) -> str:
    """One line that says what went wrong: the operating system's message, if its error is in the chain of causes."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it"
    if isinstance(error, EntryNotFoundError | RepositoryNotFoundError):
        return f"the hub ({huggingface_hub.constants.ENDPOINT}) does not have it"
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"the server answered {error.response.status_code}"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return (str(error).strip() or repr(error)).splitlines()[0]
