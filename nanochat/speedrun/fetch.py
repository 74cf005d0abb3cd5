"""`nanochat fetch`: downloads the data of a preset, in parallel. It resumes, verifies hashes, and fetches only what is missing."""

import hashlib
import json
import re
import shutil
import socket
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
import pooch
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars, logging

from nanochat.options.presets import EMBEDDED, Changed
from nanochat.options.speedrun import FetchOptions
from nanochat.platform.console import progress, say
from nanochat.platform.errors import UserError
from nanochat.platform.files import all_files, name_some, sha256_of, write_atomically
from nanochat.platform.lock import locked
from nanochat.platform.paths import Paths
from nanochat.speedrun.assets import KEPT, Asset, assets, note_fetched, read_fetched, verify
from nanochat.synthetic.identity import identity_conversations

ATTEMPTS = 4  # per file; within each, the hub's library repeats requests and resumes where a connection was cut off
IDENTITY_SEED = 42
# files, and what the record says of each besides its size: its SHA-256, and KEPT for a user's own
Noted = dict[Path, list[str]]


def fetch(options: FetchOptions, paths: Paths) -> None:
    """Fetch the assets of a preset. Raises UserError that lists what failed; complete files are kept."""
    if options.preset in EMBEDDED:
        return say(f"preset {options.preset} generates its data: nothing to fetch")
    wanted = assets(options.preset, options.shards)
    unknown = set(options.only) - {asset.name for asset in wanted}
    if unknown:
        names = ", ".join(asset.name for asset in wanted)
        raise UserError(f"--only {', '.join(sorted(unknown))}: no such asset; there are: {names}")
    with locked(paths.base / "fetch.lock", "fetch"):
        chosen = [asset for asset in wanted if not options.only or asset.name in options.only]
        _fetch(chosen, options.workers, paths, options.changed)
    say(f"next: nanochat preflight --preset {options.preset}")


def _fetch(wanted: list[Asset], workers: int, paths: Paths, changed: Changed = "refuse") -> None:
    disable_progress_bars()  # one bar per file would be hundreds
    logging.set_verbosity_error()  # of each attempt; what came of it is said below
    pooch.get_logger().setLevel("ERROR")
    missing = [asset for asset in wanted if not _complete(asset, paths, changed)]
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
    with ThreadPoolExecutor(workers) as pool, progress("fetch (MB)", needed / 1e6) as advance:
        for asset in missing:
            fetched: dict[str, list] = {}
            try:
                downloads = _downloads(asset, paths, changed)
                pending = {pool.submit(download): name for name, download in downloads.items()}
                reasons = []
                for done in as_completed(pending):
                    try:
                        for path, noted in done.result().items():
                            fetched[str(path.relative_to(paths.base))] = [path.stat().st_size, *noted]
                            received += path.stat().st_size
                            advance(path.stat().st_size / 1e6)
                    except Exception as error:  # network, hub or disk: reported at the end, while the others continue
                        reasons.append(f"{pending[done]}: {_reason(error)}")
                if reasons:
                    raise UserError(f"{len(reasons)} of {len(downloads)} files failed, {min(reasons)}")
                verify(asset, paths, fetched)
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
    say(f"all {len(wanted)} assets are complete")


def _complete(asset: Asset, paths: Paths, changed: Changed) -> bool:
    """Whether all of an asset is there; a user's own file is none of it if it is to be replaced."""
    try:
        verify(asset, paths)
    except UserError:
        return False
    record = read_fetched(paths).get(asset.name)
    if changed == "replace":
        return record is not None and not any(KEPT in file for file in record.values())
    return record is not None or not (asset.repo or asset.url)


def _downloads(asset: Asset, paths: Paths, changed: Changed) -> dict[str, Callable[[], Noted]]:
    """For each file of an asset, by its name, a function that fetches it and returns the resulting files."""
    if asset.url:
        return {asset.url: lambda: _from_web(asset, paths, changed)}
    if not asset.repo:
        return {asset.name: lambda: _generated(asset, paths, changed)}
    names = list(asset.files)
    if any("*" in name for name in names):
        listed = HfApi().list_repo_files(asset.repo, repo_type="dataset")
        names = [name for name in listed if any(fnmatch(name, pattern) for pattern in asset.files)]
        if not names:
            raise UserError(f"{asset.repo} has no file that matches {', '.join(asset.files)}")
    return {name: lambda name=name: _from_hub(asset, name, paths, changed) for name in names}


def _kept(asset: Asset, files: list[Path], arriving: dict[Path, str], paths: Paths, changed: Changed) -> Noted:
    """The files to keep of those that are where an asset's files go: none, unless some are the user's own and are to be kept.

    Our own are those that are as they were fetched, or as `arriving` has their SHA-256. Raises UserError for others if the user
    has not said what to do with them.
    """
    known, digests = read_fetched(paths).get(asset.name, {}), {path: sha256_of(path) for path in files if path.exists()}
    own = {paths.base / name: digest for name, (_, digest, *kept) in known.items() if KEPT not in kept}
    foreign = [path for path, digest in digests.items() if digest not in (own.get(path), arriving.get(path))]
    if foreign and changed == "refuse":
        raise UserError(
            f"nanochat did not fetch {name_some(foreign)} as it is now, and fetching {asset.name} would delete it; to use it as it "
            "is, add --changed keep; to replace it, add --changed replace"
        )
    return {path: [digest, KEPT] for path, digest in digests.items()} if foreign and changed == "keep" else {}


def _from_hub(asset: Asset, name: str, paths: Paths, changed: Changed) -> Noted:
    """Download a file from the hub, check it against the hub's hash, and move it to the base directory."""
    target = paths.base / asset.target / name.rpartition("/")[2]
    known = read_fetched(paths).get(asset.name, {}).get(str(target.relative_to(paths.base)))
    reusable = known and target.exists() and not (KEPT in known and changed == "replace")
    if reusable and [target.stat().st_size, sha256_of(target)] == known[:2]:
        return {target: known[1:]}
    staging = _staging(paths) / asset.repo.replace("/", "--")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            stated = get_hf_file_metadata(hf_hub_url(asset.repo, name, repo_type="dataset")).etag
            if target.exists():  # as the fetch left it that was interrupted, or the user
                if _is_stated(target, stated):
                    return {target: [sha256_of(target)]}
                if kept := _kept(asset, [target], {}, paths, changed):
                    return kept
            file = Path(hf_hub_download(asset.repo, name, repo_type="dataset", local_dir=staging))
            if stated is not None and not _is_stated(file, stated):
                file.unlink()
                raise OSError(f"its hash is not the {stated} that the hub states")
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
            return {target: [sha256_of(target)]}
        except Exception as error:
            if attempt == ATTEMPTS or not _worth_retrying(error):
                raise
            time.sleep(min(2.0**attempt, 30))
    raise AssertionError


def _is_stated(path: Path, etag: str | None) -> bool:
    """Whether a file has the hash that the hub states: of a large file its SHA-256, of a small one git's SHA-1 of the blob."""
    if etag is None or len(etag) == 64:
        return sha256_of(path) == etag
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == etag


def _from_web(asset: Asset, paths: Paths, changed: Changed) -> Noted:
    """Download the file at an asset's address, and unpack it if it is an archive."""
    staging, target = _staging(paths), paths.base / asset.target
    if changed == "keep" and (kept := _kept(asset, asset.present(paths), {}, paths, changed)):
        return kept
    name = f"{asset.name}.download"
    loader = pooch.create(staging, base_url="", registry={name: None}, urls={name: asset.url}, retry_if_failed=ATTEMPTS)
    (staging / name).unlink(missing_ok=True)  # its hash is not known, so that an old file cannot be trusted
    file = Path(loader.fetch(name, downloader=pooch.HTTPDownloader(timeout=30)))
    if not zipfile.is_zipfile(file):
        _kept(asset, asset.present(paths), {target: sha256_of(file)}, paths, changed)
        file.replace(target)
        return {target: [sha256_of(target)]}
    with zipfile.ZipFile(file) as archive:
        archive.extractall(staging)
    unpacked = staging / asset.target
    arriving = {target / path.relative_to(unpacked): sha256_of(path) for path in all_files(unpacked)}
    _kept(asset, asset.present(paths), arriving, paths, changed)
    shutil.rmtree(target, ignore_errors=True)
    unpacked.replace(target)
    return {path: [digest] for path, digest in arriving.items()}


def _generated(asset: Asset, paths: Paths, changed: Changed) -> Noted:
    target = paths.base / asset.target
    lines = [json.dumps(messages) for messages in identity_conversations(IDENTITY_SEED, asset.rows)]
    content = ("\n".join(lines) + "\n").encode()
    digest = hashlib.sha256(content).hexdigest()
    if kept := _kept(asset, asset.present(paths), {target: digest}, paths, changed):
        return kept
    write_atomically(target, content)
    return {target: [digest]}


def _staging(paths: Paths) -> Path:
    directory = paths.base / ".fetch"
    directory.mkdir(exist_ok=True)
    return directory


def _reason(error: BaseException) -> str:
    """One line that says what happened, and where it is not plain what to do about it."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(cause, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set; unset it"
        if response is not None:
            return _meaning(response.status_code, str(response.url))
        # asked for a connection, a proxy gives no response to keep
        if type(cause).__name__ == "ProxyError" and (answer := re.search(r"\b([45]\d\d) [A-Za-z ]+", str(cause))):
            refused = f"the proxy does not connect to the server ({answer[0]}); ask for access, or use another network"
            return _meaning(407, "") if answer[1] == "407" else refused
        if isinstance(cause, ConnectionError | TimeoutError | socket.gaierror):
            happened = cause.strerror or str(cause) or "no answer in time"
            return f"the server cannot be reached ({happened}); use a machine with internet, or set HTTPS_PROXY if a proxy leads to it"
        if isinstance(cause, OSError) and cause.errno is not None and cause.strerror:
            return cause.strerror
    return (str(error).strip() or repr(error)).splitlines()[0]


def _meaning(status: int, url: str) -> str:
    """What the status of an answer means."""
    hub = huggingface_hub.constants.ENDPOINT
    server = f"the hub ({hub})" if url.startswith(hub) else f"the server {urlsplit(url).netloc}"
    meanings = {
        401: f"{server} needs a token for it (401); set HF_TOKEN",
        403: f"{server} does not let you have it (403); accept its terms there and set HF_TOKEN, or ask for access from this network",
        404: f"{server} does not have it",
        407: "the proxy wants a user and password (407); set HTTPS_PROXY=http://user:password@host:port",
        429: f"{server} has had too many requests (429); try again later",
    }
    later = "; it has a fault of its own, try again later" if status >= 500 else ""
    return meanings.get(status, f"{server} answers {status}{later}")


def _worth_retrying(error: BaseException) -> bool:
    """Not where the answer would be the same: of this program, of the disk, and of a server that refuses."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(cause, UserError | OfflineModeIsEnabled):
            return False
        if response is not None:
            return response.status_code not in (401, 403, 404, 407)
        if isinstance(cause, OSError) and cause.errno is not None:
            return isinstance(cause, ConnectionError | TimeoutError | socket.gaierror)
    return True


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
