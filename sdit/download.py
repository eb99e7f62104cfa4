"""Download a whole file, or raise an error."""

import hashlib
import io
from contextlib import contextmanager, suppress

__all__ = ["download", "has_checksum"]


def download(url: str) -> bytes:
    """Return the content at ``url``, or raise OSError. It stays in memory, so an interrupted download leaves no file behind."""
    import http.client
    import urllib.request

    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            total = int(answer.headers.get("Content-Length") or 0)
            body = io.BytesIO()
            with _progress(total, url.rsplit("/", 1)[-1]) as bar:
                while block := answer.read(1 << 18):
                    body.write(block)
                    bar.update(len(block))
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
    if total and body.tell() != total:
        raise OSError(f"the connection ended after {body.tell()} of {total} bytes")
    return body.getvalue()


def _progress(total, name):
    """Return a tqdm bar that appears after one second, or a silent one if tqdm is not installed."""
    from types import SimpleNamespace

    with suppress(ImportError):
        from tqdm import tqdm

        return tqdm(total=total or None, desc=name, unit="B", unit_scale=True, leave=False, delay=1)

    @contextmanager
    def silent():
        yield SimpleNamespace(update=lambda n: None)

    return silent()


def has_checksum(content: bytes, digest: str) -> bool:
    """Return True if ``digest`` is the SHA-256 of ``content``, or its MD5 if ``digest`` is not 64 digits long."""
    found = hashlib.sha256(content) if len(digest) == 64 else hashlib.md5(content, usedforsecurity=False)
    return found.hexdigest() == digest
