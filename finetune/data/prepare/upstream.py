"""The public source of a data set: its files, where they are published, and their SHA-256 sums."""

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
    """A data set and its source.

    Attributes:
        name: path of the built file, below the toolkit's data folder.
        sha256: of that file's decompressed content.
        files: the source's files by their path, and the SHA-256 sum of each. None: copies differ in details that do
            not matter, and the sum of the built file decides.
        addresses: beginning of a path -> the http(s) address that replaces it.
        bring: the commands that download the files on a machine with a network.
        beside: files that are stored unchanged beside the data set, and their names there.
        terms: licence, logged after building.
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
            place: a directory, or an http(s) address, with the files at their paths. None: where they are published.

        Raises:
            InputError: a file is missing or is not the one that the set is made from.
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
    """Return the content if its SHA-256 sum is the expected one (None: any).

    Raises:
        InputError: it is another one.
    """
    found = hashlib.sha256(content).hexdigest()
    if expected is not None and found != expected:
        raise InputError(
            f"{name} has sha256 {found[:12]}, not {expected[:12]}",
            why="it is not the file that the set is made from, so results could not be compared",
            fix="use the source at the commit that data/LICENSES.md names",
        )
    return content
