"""Download files, up to a limit in bytes and in seconds."""

import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import requests
import urllib3
from tqdm import tqdm

from system.errors import UserError

READ_TIMEOUT_SECONDS = 60.0  # before a server's first byte and between two
MAX_DOWNLOAD_SECONDS = 24 * 3600.0


def download(
    url: str,
    path: Path,
    max_bytes: int,
    max_seconds: float = MAX_DOWNLOAD_SECONDS,
    advice: str = "download it yourself and give the file",
) -> None:
    """Download `url` to `path` with a progress bar.

    Args:
        url: http or https, also after redirects.
        path: File to write.
        max_bytes: Maximum size, counted as received.
        max_seconds: Maximum time for the whole download.
        advice: What to do about a file over `max_bytes`, for the message.

    Raises:
        UserError: The URL is not http or https or exceeds a limit, or the server cannot be reached, stops sending or
            answers with an error.
    """
    ends = time.monotonic() + max_seconds
    if urlsplit(url).scheme not in ("http", "https"):
        raise UserError(f"{url} is not an http or https URL")
    with _get(url, min(READ_TIMEOUT_SECONDS, max_seconds)) as response:
        length = int(response.headers.get("Content-Length", 0)) or None
        with open(path, "wb") as file, tqdm(total=length, unit="B", unit_scale=True, desc="Downloading") as progress:
            for chunk in _stream(response):
                file.write(chunk)
                progress.update(len(chunk))
                if time.monotonic() > ends:
                    raise UserError(f"{url} takes more than {max_seconds:g} seconds to download")
                # Counted here, because Content-Length may be missing or wrong.
                if file.tell() > max_bytes:
                    raise UserError(f"{url} is larger than {max_bytes / 2**20:,.0f} MiB: {advice}")


def _stream(response: requests.Response) -> Iterator[bytes]:
    # Not iter_content(), which waits for a full chunk: a server that sends a byte now and then would block it forever.
    try:
        while chunk := response.raw.read1(2**20, decode_content=True):
            yield chunk
    except urllib3.exceptions.HTTPError as error:
        raise UserError(f"{response.url} stopped sending: {error}") from error


def _get(url: str, timeout: float) -> requests.Response:
    try:
        response = requests.get(url, stream=True, timeout=timeout)
        response.raise_for_status()
    except requests.RequestException as error:
        raise UserError(f"{url} cannot be downloaded: {error}") from error
    return response
