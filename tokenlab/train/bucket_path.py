"""A folder of a bucket as a path that Orbax can write to.

Orbax writes arrays through TensorStore, which speaks to buckets itself, and the files beside them through `epath`. For
`gs://` that takes TensorFlow where it is installed, else gcsfs: other libraries with other credentials and other
errors. This class goes through `tokenlab.core.bucket` like everything else here.
"""

from __future__ import annotations

import fnmatch
import io
from collections.abc import Iterator
from typing import Any

from etils import epath

from tokenlab.core.bucket import SCHEME, Bucket


@epath.register_path_cls
class BucketPath(epath.Path):
    """`gs://BUCKET/FOLDER/...`, with the part of pathlib's methods that Orbax uses.

    A bucket has no folders: making one does nothing, and one is there as long as something is in it.
    """

    def __str__(self) -> str:
        return super().__str__().replace("gs:/", SCHEME, 1)

    def __fspath__(self) -> str:
        return str(self)

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        return self._folder().generation(self.name) is not None

    def is_dir(self) -> bool:
        return not self._inside().is_empty()

    def iterdir(self) -> Iterator[BucketPath]:
        names, folders = self._inside().entries()
        return (self / name for name in sorted([*names, *folders]))

    def glob(self, pattern: str) -> Iterator[BucketPath]:
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        pass

    def rmtree(self, missing_ok: bool = False) -> None:
        self._inside().delete(*self._inside().objects())

    def unlink(self, missing_ok: bool = False) -> None:
        self._folder().delete(self.name)

    def read_bytes(self) -> bytes:
        found = self._folder().read(self.name)
        if found is None:
            raise FileNotFoundError(f"there is no {self}")
        return found

    def read_text(self, encoding: str | None = None) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, data: bytes) -> int:
        self._folder().write(self.name, data)
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, errors: str | None = None) -> int:
        return self.write_bytes(data.encode())

    def open(self, mode: str = "r", **options: Any) -> Any:
        if mode in ("r", "rt", "rb"):
            data = self.read_bytes()
            return io.BytesIO(data) if mode == "rb" else io.StringIO(data.decode())
        raise ValueError(f"{self} cannot be opened with mode {mode!r}: expected 'r' or 'rb'")

    def _folder(self) -> Bucket:
        return Bucket(str(self.parent))

    def _inside(self) -> Bucket:
        return Bucket(str(self))
