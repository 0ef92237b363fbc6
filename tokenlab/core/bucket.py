"""Folders in Google Cloud Storage (`gs://BUCKET/FOLDER`): their objects, read, written and removed one at a time.

An object is replaced in one piece or not at all; there is no renaming, and no appending. A bucket has no folders
either: a folder is what the names of some objects begin with.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tokenlab.core.errors import ConfigError, StorageError

SCHEME = "gs://"

PATIENCE = 120.0
"""Seconds for which a request is made again that failed for a reason that may pass: no network, a busy server."""

EMULATOR = "STORAGE_EMULATOR_HOST"
"""The variable that names a server other than Google's, as the libraries of Google Cloud read it."""

_AT_ONCE = 16  # objects removed or copied side by side


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether a workdir is an address (`gs://bucket/folder`) instead of a path."""
    return re.match(r"[a-z][a-z0-9+.-]*://", os.fspath(path)) is not None


@dataclass(frozen=True)
class Object:
    """What a listing tells of an object.

    Attributes:
        size: in bytes.
        generation: a number that no other content of the same name has.
        md5: of its content, in hexadecimal; None where the bucket does not know it (of an object made of several).
    """

    size: int
    generation: int
    md5: str | None


class Changed(Exception):
    """An object is not of the generation that was expected."""


class Bucket:
    """A folder of a bucket.

    Args:
        address: `gs://BUCKET/FOLDER`.

    Attributes:
        address: without a slash at its end.

    Raises:
        ConfigError: that is no such address, or google-cloud-storage is not installed.
        StorageError: there are no credentials. Every method raises it, with the address and what to do, when the bucket
            does not exist, refuses, or cannot be reached.
    """

    def __init__(self, address: str | os.PathLike[str]) -> None:
        text = os.fspath(address).rstrip("/")
        name, _, folder = text.removeprefix(SCHEME).partition("/")
        if not text.startswith(SCHEME) or not name or not all(folder.split("/")):
            raise ConfigError(f"{text} is no folder of a bucket: expected {SCHEME}BUCKET/FOLDER.")
        self.address, self._prefix = text, f"{folder}/"
        with self._told():
            self._client = _client()
        self._bucket = self._client.bucket(name)

    def __truediv__(self, name: str) -> Bucket:
        return Bucket(f"{self.address}/{name}")

    def __str__(self) -> str:
        return self.address

    def objects(self, prefix: str = "") -> dict[str, Object]:
        """All objects in the folder and in those below it whose names begin with `prefix`, by name, in order."""
        with self._told():
            found = {}
            for blob in self._list(prefix, ""):
                digest = blob.md5_hash and base64.b64decode(blob.md5_hash).hex()
                name = blob.name.removeprefix(self._prefix)
                found[name] = Object(blob.size, blob.generation, digest or None)
            return found

    def is_empty(self) -> bool:
        """Whether there is no object in the folder, nor in those below it."""
        with self._told():
            return not any(True for _ in self._list("", "", max_results=1))

    def entries(self) -> tuple[list[str], list[str]]:
        """Names of the objects, and of the folders, right in the folder."""
        with self._told():
            listing = self._list("", "/")
            names = [blob.name.removeprefix(self._prefix) for blob in listing]
            folders = sorted(prefix.removeprefix(self._prefix).rstrip("/") for prefix in listing.prefixes)
            return [name for name in names if name], folders

    def read(self, name: str) -> bytes | None:
        """The content of an object; None where there is none of that name."""
        with self._told():
            return self._again(self._bucket.blob(self._prefix + name).download_as_bytes)

    def generation(self, name: str) -> int | None:
        """The generation of an object; None where there is none of that name."""
        with self._told():
            blob = self._bucket.blob(self._prefix + name)
            self._again(blob.reload)
            return blob.generation

    def write(self, name: str, content: bytes, *, generation: int | None = None) -> int:
        """Writes an object; when this returns it is there.

        Args:
            generation: it is written only where the object is of this one, 0 meaning that there is none. None: always.

        Returns:
            Its new generation.

        Raises:
            Changed: the object is of another generation.
        """
        with self._told():
            blob = self._bucket.blob(self._prefix + name)
            blob.upload_from_string(
                content,
                content_type="application/octet-stream",
                if_generation_match=generation,
                retry=_retry(),
                timeout=_TIMEOUT,
            )
            return blob.generation

    def delete(self, *names: str, generation: int | None = None) -> None:
        """Removes objects, in any order; one that is not there is no error. `generation` as for `write`."""

        def one(name: str) -> None:
            with self._told():
                delete = self._bucket.blob(self._prefix + name).delete
                self._again(delete, **({} if generation is None else {"if_generation_match": generation}))

        self._each(one, names)

    def copy(self, name: str, to: str) -> None:
        """Copies an object within the bucket."""
        with self._told():
            source = self._bucket.blob(self._prefix + name)
            copied, token = self._bucket.blob(self._prefix + to), None
            while True:
                token, _, _ = copied.rewrite(source, token=token, retry=_retry(), timeout=_TIMEOUT)
                if token is None:
                    return

    def copy_each(self, names: dict[str, str]) -> None:
        """Copies objects, in any order: each to the name that stands beside it."""
        self._each(lambda name: self.copy(name, names[name]), names)

    def _each(self, action: Any, names: Iterable[str]) -> None:
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="bucket") as pool:
            for _ in pool.map(action, names):
                pass

    def _list(self, prefix: str, delimiter: str, **options: Any) -> Any:
        return self._client.list_blobs(
            self._bucket,
            prefix=self._prefix + prefix,
            delimiter=delimiter or None,
            fields="items(name,size,generation,md5Hash),prefixes,nextPageToken",
            retry=_retry(),
            timeout=_TIMEOUT,
            **options,
        )

    def _again(self, call: Any, **options: Any) -> Any:
        """Calls with our patience; None where there is no such object."""
        from google.api_core.exceptions import NotFound

        try:
            return call(retry=_retry(), timeout=_TIMEOUT, **options)
        except NotFound:
            return None

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turns what Google's libraries raise into errors of ours."""
        try:
            yield
        except (ConfigError, StorageError, Changed):
            raise
        except Exception as error:
            raise _error(self.address, error) from error


_TIMEOUT = (10.0, 60.0)  # seconds: to connect, and between two bytes

_lock = threading.Lock()
_clients: dict[str | None, Any] = {}


def _client() -> Any:
    """The client of this process, for a server."""
    server = os.environ.get(EMULATOR)
    if server:  # TensorStore, which writes the arrays, has variables of its own
        os.environ["TENSORSTORE_GCS_HTTP_URL"] = server
        os.environ.setdefault("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    with _lock:
        if server not in _clients:
            try:
                from google.cloud import storage
            except ImportError as error:
                raise ConfigError(
                    f"{SCHEME} addresses need the package google-cloud-storage ({error}): install the extra gcs, "
                    "`pip install 'tokenlab-jax[gcs]'`."
                ) from None
            client = storage.Client(project=None)
            client._http.hooks["response"].append(_read_what_was_refused)
            _clients[server] = client
        return _clients[server]


def _read_what_was_refused(response: Any, *args: Any, **options: Any) -> None:
    """Google's downloads leave the body of an error unread, and its connection open until it is collected."""
    if response.status_code >= 400:
        _ = response.content


def _retry() -> Any:
    from google.cloud.storage.retry import DEFAULT_RETRY

    return DEFAULT_RETRY.with_timeout(PATIENCE)


def _error(address: str, error: Exception) -> Exception:
    from google.api_core import exceptions
    from google.auth import exceptions as auth

    said = " ".join(str(getattr(error, "message", "") or error).split())
    said = re.sub(r"^[A-Z]+ https?://\S+: ", "", said.split(": ('Request failed")[0])[:300]
    if isinstance(error, exceptions.PreconditionFailed):
        return Changed(said)
    if isinstance(error, exceptions.NotFound):
        bucket = address.removeprefix(SCHEME).partition("/")[0]
        return StorageError(f"{address}: there is no bucket {bucket!r}; make it, or give another address.")
    if isinstance(error, exceptions.Forbidden):
        return StorageError(
            f"{address}: access is denied ({said}); give the account the role Storage Object Admin on the bucket."
        )
    if isinstance(error, exceptions.Unauthorized | auth.RefreshError | auth.DefaultCredentialsError):
        return StorageError(
            f"{address}: there are no valid credentials ({said}); log in with `gcloud auth application-default login`, "
            "or name a service account's file in GOOGLE_APPLICATION_CREDENTIALS."
        )
    cause = error.cause if isinstance(error, exceptions.RetryError) and error.cause else error
    said = " ".join(str(cause).split())[:300] or type(cause).__name__
    return StorageError(
        f"{address} cannot be reached: {said}; look at the network, and run the command again."
    )
