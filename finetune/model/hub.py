"""Directory of a base: a path as it is, a hub name downloaded once into the hub's own cache.

huggingface_hub does the transfer: finished files are kept, so an interrupted download resumes with the file it stopped
in. It reads HF_TOKEN, HF_HOME, HF_HUB_OFFLINE and HF_ENDPOINT from the environment when it is first imported.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.config.suggest import PUBLISHED_BASES, TINY_HINT, looks_like_directory, suggest_base
from finetune.errors import ConfigError, FinetuneError, InputError, MachineError

# The published repositories also have the same weights as original/* and metal/*: three times the bytes.
WANTED_FILES = ("*.safetensors", "*.json", "chat_template.jinja", "LICENSE", "USAGE_POLICY")
UNWANTED_FILES = ("*/*",)


@dataclass(frozen=True)
class BaseLocation:
    """A base on this machine.

    Attributes:
        directory: of its files.
        name: the path or hub name that was asked for.
        revision: the commit that a hub name resolved to; None for a directory.
    """

    directory: Path
    name: str
    revision: str | None


def locate_base(path: str, revision: str | None = None) -> BaseLocation:
    """Directory of `model.path`; a hub name is downloaded if it is not in the cache yet.

    Only the top-level safetensors, JSON, template and licence files are downloaded.

    Args:
        path: a directory, or a hub name such as `openai/gpt-oss-20b`. A directory of that name takes precedence.
        revision: branch, tag or commit of a hub name. None: its default branch.

    Raises:
        ConfigError: a revision was given for a directory.
        InputError: no such directory, repository or revision, or no access to it.
        MachineError: no network, offline with nothing in the cache, or a full disk.
    """
    directory = Path(path).expanduser()
    if directory.exists():
        if revision is not None:
            raise ConfigError(
                f"model.revision={revision} was given, but model.path={path} is on this machine",
                why="only a hub name has revisions",
                fix="remove model.revision, or give the hub name",
            )
        return BaseLocation(directory, path, None)
    if looks_like_directory(path):
        raise InputError(f"there is no directory {path}", fix=suggest_base(path))
    snapshot = _download(path, revision)
    return BaseLocation(snapshot, path, snapshot.name)


def check_reachable(path: str, revision: str | None) -> None:
    """Fetch config.json of a hub name, so that a wrong name or a missing network shows before hours of other work.

    Raises:
        FinetuneError: as `locate_base`.
    """
    if not Path(path).expanduser().exists() and not looks_like_directory(path):
        _download(path, revision, ("config.json",))


def _download(name: str, revision: str | None, files: Sequence[str] = tuple(WANTED_FILES)) -> Path:
    """Directory of the snapshot, which the hub's cache names after its commit."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=list(files), ignore_patterns=list(UNWANTED_FILES))
        )
    except errors.HFValidationError as error:
        raise ConfigError(f"{name!r} is neither a directory nor a hub name: {error}") from error
    except errors.GatedRepoError as error:
        raise InputError(
            f"{name} is gated: the hub wants its terms accepted (HTTP {_status(error)})",
            fix=f"accept them at https://huggingface.co/{name}, then set HF_TOKEN to a token of that account",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise _not_found(name, _status(error)) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(
            f"{name} has no revision {revision!r}", fix="give a branch, tag or full commit hash in model.revision"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise _unreachable(name, error) from error
    except errors.HfHubHTTPError as error:
        raise _refused(name, error) from error
    except OSError as error:
        raise _transfer_failed(name, error) from error
    except Exception as error:
        # The hub's HTTP library has changed before (requests, httpx, httpx2), so errors are recognised by its name.
        if type(error).__module__.split(".")[0] in ("requests", "httpx", "httpx2", "httpcore", "hf_xet"):
            raise _transfer_failed(name, error) from error
        raise


def _not_found(name: str, status: int | None) -> FinetuneError:
    close = difflib.get_close_matches(name, PUBLISHED_BASES, n=1)
    meant = f"did you mean {close[0]}? " if close and close[0] != name else ""
    if status == 401:  # the hub's answer for a private repository and for a missing one alike
        return InputError(
            f"the hub does not show {name} without a valid token (HTTP 401)",
            why="it does not exist, or it is private",
            fix=f"{meant}Check the name; for a private repository set HF_TOKEN",
        )
    return InputError(
        f"the hub has no repository {name} (HTTP {status})",
        fix=f"{meant}Check the name at https://huggingface.co, or give a checkpoint directory; {TINY_HINT}",
    )


def _unreachable(name: str, error: Exception) -> FinetuneError:
    """The error where the cache is incomplete and the hub could not be asked."""
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        return MachineError(
            f"{name} is not, or not completely, in the cache at {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set",
            fix="unset HF_HUB_OFFLINE once to download it, or copy the checkpoint here and give its directory",
        )
    if isinstance(error.__cause__, errors.HfHubHTTPError):
        return _refused(name, error.__cause__)
    return MachineError(
        f"the hub at {constants.ENDPOINT} could not be reached to download {name}",
        why=f"{type(error.__cause__ or error).__name__}: {str(error.__cause__ or error).splitlines()[0]}",
        fix="check the network, a proxy or HF_ENDPOINT, and run the same command again: files already here are kept",
    )


def _refused(name: str, error: Exception) -> FinetuneError:
    from huggingface_hub import constants

    status = _status(error)
    if status in (401, 403):
        return InputError(
            f"the hub refused {name} (HTTP {status})",
            why="HF_TOKEN is missing, expired or has no right to read it",
            fix="set HF_TOKEN to a token with read access, or unset it: the published models need none",
        )
    return MachineError(
        f"the hub at {constants.ENDPOINT} answered HTTP {status} for {name}",
        fix="run the same command later: files already here are kept",
    )


def _transfer_failed(name: str, error: Exception) -> FinetuneError:
    from huggingface_hub import constants

    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return MachineError(
            f"the disk is full while downloading {name} to {constants.HF_HUB_CACHE}",
            fix="free space there, or set HF_HOME to a larger disk, and run the same command again",
        )
    reason = str(error).splitlines()[0] if str(error) else "no reason given"
    return MachineError(
        f"the download of {name} broke off",
        why=f"{type(error).__name__}: {reason}",
        fix="run the same command again: files already here are kept",
    )


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
