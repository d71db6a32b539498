"""Files from the network, up to a limit in bytes and in seconds."""

import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import requests
import urllib3
from tqdm import tqdm

from system.errors import UserError

SILENCE_SECONDS = 60.0  # before a server's first byte and between two
MAX_DOWNLOAD_SECONDS = 24 * 3600.0


def download(
    url: str,
    path: Path,
    max_bytes: int,
    max_seconds: float = MAX_DOWNLOAD_SECONDS,
    advice: str = "no more is fetched",
) -> None:
    """Fetch `url` into `path` with a progress bar; `advice` is for who meets the limit in bytes.

    Raises:
        UserError: The URL is not http or https, or has more than `max_bytes`; or the server cannot be reached, stops sending,
            answers with an error, or takes more than `max_seconds`.
    """
    ends = time.monotonic() + max_seconds
    if urlsplit(url).scheme not in ("http", "https"):
        raise UserError(f"{url} is not a http or https address")
    with _get(url, min(SILENCE_SECONDS, max_seconds)) as response:
        length = int(response.headers.get("Content-Length", 0)) or None
        with open(path, "wb") as file, tqdm(total=length, unit="B", unit_scale=True, desc="Downloading") as progress:
            for chunk in _as_it_comes(response):
                file.write(chunk)
                progress.update(len(chunk))
                if time.monotonic() > ends:
                    raise UserError(f"{url} takes more than {max_seconds:g} seconds to come")
                # Counted here, because a server may say nothing about the length, or lie.
                if file.tell() > max_bytes:
                    raise UserError(f"{url} is larger than {max_bytes / 2**20:,.0f} MiB: {advice}")


def _as_it_comes(response: requests.Response) -> Iterator[bytes]:
    # Not iter_content(), which waits until a piece is full: a server that sends a byte now and then would hold it forever.
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
        raise UserError(f"{url} cannot be fetched: {error}") from error
    return response
