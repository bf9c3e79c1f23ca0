"""The public source of a data set: which files it takes, where they are published, and their sha256 sums."""

from __future__ import annotations

import hashlib
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from finetune import log
from finetune.errors import InputError, MachineError

TIMEOUT_SECONDS = 30


@dataclass(frozen=True)
class Upstream:
    """A data set and what it is built from.

    Attributes:
        name: the file that it becomes, below the toolkit's data folder.
        sha256: of that file's decompressed content.
        files: the source's files by their path, and the sha256 sum of each. None: copies differ in what does not
            matter, and what is built decides.
        addresses: what a path begins with, and the http(s) address that this beginning stands for.
        bring: the commands that get the files where there is a network.
        beside: files that are kept beside the data set as they are, and their names there.
        terms: said once it is built.
    """

    name: str
    sha256: str
    files: Mapping[str, str | None]
    addresses: dict[str, str]
    bring: str
    terms: str
    beside: dict[str, str] = field(default_factory=dict)

    def read(self, place: str | None) -> dict[str, bytes]:
        """Read and check every file.

        Args:
            place: a directory, or an http(s) address, that holds them at their paths. None: where they are published.

        Raises:
            InputError: a file is missing or is not the one that the set was made from.
            MachineError: it cannot be reached.
        """
        return {path: checked(path, self._read(place, path), expected) for path, expected in self.files.items()}

    def _read(self, place: str | None, path: str) -> bytes:
        if place is not None and "://" not in place:
            file = Path(place).expanduser() / path
            if not file.is_file():
                raise InputError(f"there is no file {file}", fix=f"give a directory made by: {self.bring}")
            return file.read_bytes()
        address = f"{place.rstrip('/')}/{path}" if place else self._published(path)
        if not address.startswith(("http://", "https://")):
            raise InputError(f"{place} is neither a directory nor an http(s) address")
        log.info(f"reading {address}")
        try:
            with urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as answer:
                content: bytes = answer.read()
        except (OSError, urllib.error.URLError) as error:
            raise MachineError(
                f"{address} cannot be read: {getattr(error, 'reason', error)}",
                fix=f"where there is a network: {self.bring}; bring the directory and give it with --from DIR",
            ) from None
        return content

    def _published(self, path: str) -> str:
        beginning = next(beginning for beginning in self.addresses if path.startswith(beginning))
        return f"{self.addresses[beginning]}/{path.removeprefix(beginning)}"


def checked(name: str, content: bytes, expected: str | None) -> bytes:
    """The content, if its sha256 sum is the expected one (None: whatever it is).

    Raises:
        InputError: it is not.
    """
    found = hashlib.sha256(content).hexdigest()
    if expected is not None and found != expected:
        raise InputError(
            f"{name} has sha256 {found[:12]}, not {expected[:12]}",
            why="it is not the file that the set was made from, so figures could not be compared",
            fix="use the source at the commit that data/LICENSES.md names",
        )
    return content
