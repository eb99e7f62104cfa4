"""Download a whole file, or raise an error."""

import hashlib
import io
from contextlib import nullcontext

__all__ = ["download", "has_checksum"]


def download(url: str) -> bytes:
    """Return the content at ``url``, or raise OSError. It stays in memory, so an interrupted download leaves no file behind."""
    import http.client
    import urllib.request

    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            total = int(response.headers.get("Content-Length") or 0)
            body = io.BytesIO()
            with _make_progress_bar(total, url.rsplit("/", 1)[-1]) as bar:
                while block := response.read(1 << 18):
                    body.write(block)
                    bar.update(len(block))
    except (http.client.HTTPException, ValueError) as error:  # ValueError: the URL or Content-Length is malformed
        raise OSError(f"{type(error).__name__}: {error}") from error
    if total and body.tell() != total:
        raise OSError(f"the connection ended after {body.tell()} of {total} bytes")
    return body.getvalue()


def _make_progress_bar(total, name):
    """Return a tqdm bar that appears after one second, or a silent one if tqdm is not installed."""
    from types import SimpleNamespace

    try:
        from tqdm import tqdm
    except ImportError:
        return nullcontext(SimpleNamespace(update=lambda n: None))
    return tqdm(total=total or None, desc=name, unit="B", unit_scale=True, leave=False, delay=1)


def has_checksum(content: bytes, digest: str) -> bool:
    """Return True if ``digest`` is the SHA-256 of ``content``, or its MD5 if ``digest`` has another length."""
    computed = hashlib.sha256(content) if len(digest) == 64 else hashlib.md5(content, usedforsecurity=False)
    return computed.hexdigest() == digest
