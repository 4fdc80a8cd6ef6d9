"""Encoders at the Hugging Face hub by name: ``hf://owner/name@revision``. The only module that imports huggingface_hub.

The files of an encoder come into the hub's local cache (``HF_HUB_CACHE``) and are used from there; without a connection the
cache is enough. All files are of one commit, and nothing else of the repository is fetched. huggingface_hub reads its own
variables, such as HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from infra.errors import UserError, storage_line
from infra.files import read_object

CHECKSUMS = "checksums.json"
SHAPE = "hf://owner/name, or hf://owner/name@revision with a branch, tag or commit"
# The path of a file with this name has one slash less.
ADDRESS = re.compile(r"hf:/{1,2}(?P<owner>\w[\w.-]*)/(?P<name>\w[\w.-]*?)(?:@(?P<revision>\w[\w./+-]*))?")

_fetched: dict[tuple[str, str, str], Path] = {}  # of this process: (address, endpoint, cache) -> folder


class Address(NamedTuple):
    """The name of a repository and a revision of it; empty for its main branch."""

    repository: str
    revision: str

    def __str__(self) -> str:
        return f"hf://{self.repository}" + (f"@{self.revision}" if self.revision else "")


def is_address(path: str | os.PathLike[str]) -> bool:
    """Return whether a path stands for a repository of the hub."""
    return isinstance(path, (str, os.PathLike)) and str(os.fspath(path)).startswith("hf:/")


def shown(path: str | os.PathLike[str]) -> str:
    """Return a path as messages name it: an address with both of its slashes."""
    return str(parse_address(path)) if is_address(path) else os.fspath(path)


def parse_address(path: str | os.PathLike[str]) -> Address:
    """Return the repository and the revision of an address. Raises UserError if it is none."""
    text = os.fspath(path)
    match = ADDRESS.fullmatch(text)
    if match is None or ".." in text:
        raise UserError(f"{text!r:.200} is no address of an encoder at the hub; give {SHAPE}")
    return Address(f"{match['owner']}/{match['name']}", match["revision"] or "")


def fetch_encoder(
    path: str | os.PathLike[str], weights: str, optional: Sequence[str], allowed: Collection[str]
) -> Path:
    """Return the folder of the local cache with the encoder at an address; what the cache lacks of it is fetched.

    checksums.json is read first, and of the files beside it only those that it lists and the optional ones are fetched. In one
    process an address stands for one commit.

    Args:
        path: an address, such as ``hf://owner/name@v1``.
        weights: the name of the file of the weights, which is fetched last.
        optional: names of files that an encoder may have beside those in checksums.json.
        allowed: names that checksums.json may list.

    Raises:
        UserError: if the address is wrong, the repository, the revision or a file is missing or may not be read, or something
            is not in the cache and the hub cannot be reached.
    """
    address = parse_address(path)
    hub = _library(address)
    key = (str(address), hub.constants.ENDPOINT, hub.constants.HF_HUB_CACHE)
    if key not in _fetched or not (_fetched[key] / weights).exists():
        checksums = _file(hub, address, address.revision or None, CHECKSUMS)
        folder = checksums.parent
        listed = _listed(checksums, address, allowed)
        _optional_files(hub, address, folder, optional, weights)
        for name in sorted(listed, key=lambda name: name == weights):
            _file(hub, address, folder.name, name)
        _fetched[key] = folder
    return _fetched[key]


def _listed(checksums: Path, address: Address, allowed: Collection[str]) -> list[str]:
    """Return the names in checksums.json, before any of them is fetched. Raises UserError if one is not allowed."""
    names = list(read_object(checksums, f"{address} holds no encoder that `yaware export` wrote"))
    wrong = [name for name in names if name not in allowed]
    if wrong:
        found = f"names {wrong[0]!r:.80}, which is no file of a published encoder"
        raise UserError(f"{CHECKSUMS} of {address} {found}; its publisher must export the encoder again")
    return names


def _library(address: Address) -> Any:
    """Return huggingface_hub. Raises UserError if it is not installed, as in an environment of an earlier version."""
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise UserError(
            f"{address} needs huggingface_hub ({error}); run `make setup`, or pip install huggingface_hub"
        ) from None
    return huggingface_hub


def _file(hub: Any, address: Address, revision: str | None, name: str) -> Path:
    """Return a file of a repository in the cache. Raises UserError if it cannot be had."""
    with _refusals(hub, address, name):
        return Path(hub.hf_hub_download(address.repository, name, revision=revision))


def _optional_files(hub: Any, address: Address, folder: Path, names: Sequence[str], weights: str) -> None:
    """Fetch the files that an encoder may lack; the cache notes which of them the repository lacks.

    The weights come last: where they are in the cache and the hub cannot be reached, what is not there is taken as missing.
    """
    for name in names:
        if hub.try_to_load_from_cache(address.repository, name, revision=folder.name) is not None:
            continue
        with _refusals(hub, address, name):
            try:
                hub.hf_hub_download(address.repository, name, revision=folder.name)
            except hub.errors.LocalEntryNotFoundError:
                if not (folder / weights).exists():
                    raise
                return
            except hub.errors.EntryNotFoundError:
                continue


@contextmanager
def _refusals(hub: Any, address: Address, name: str) -> Iterator[None]:
    """Raise a UserError in place of what huggingface_hub raises about a repository; errors of the file system pass."""
    try:
        yield
    except OSError as error:
        if storage_line(error):
            raise
        raise UserError(_reason(hub, address, name, error)) from None
    except (hub.errors.EntryNotFoundError, hub.errors.HFValidationError, hub.errors.HTTPError, RuntimeError) as error:
        # RuntimeError: of the library that transfers large files
        raise UserError(_reason(hub, address, name, error)) from None


def _reason(hub: Any, address: Address, name: str, error: Exception) -> str:
    """Return in one line why a file cannot be had, and what to do."""
    errors, place = hub.errors, hub.constants.ENDPOINT
    reasons: list[tuple[type[Exception], str]] = [
        (
            errors.GatedRepoError,
            f"is gated: accept its terms at {place}/{address.repository}, and log in with hf auth login",
        ),
        (
            errors.RepositoryNotFoundError,
            f"is no model that you may read at {place}; check the name, or log in with hf auth login if it is private",
        ),
        (errors.RevisionNotFoundError, f"has no such revision; give a branch, tag or commit of {address.repository}"),
        (errors.LocalEntryNotFoundError, _not_cached(hub, name, error)),
        (
            errors.EntryNotFoundError,
            f"has no {name}, so it holds no encoder that `yaware export` wrote; give another repository or revision",
        ),
        (errors.HFValidationError, f"is no address of an encoder at the hub; give {SHAPE}"),
    ]
    for kind, reason in reasons:
        if isinstance(error, kind):
            return f"{address} {reason}"
    return f"{address}: {name} cannot be fetched from {place} ({_short(error)}); try again later"


def _not_cached(hub: Any, name: str, error: Exception) -> str:
    constants, cause = hub.constants, error.__cause__
    answered = getattr(cause, "response", None) is not None
    failed = f"{constants.ENDPOINT} {'answered with an error' if answered else 'cannot be reached'}"
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else failed
    if cause is not None and not constants.HF_HUB_OFFLINE:
        reason += f" ({_short(cause)})"
    return (
        f"cannot be loaded: its {name} is not in {constants.HF_HUB_CACHE}, and {reason}; load it once with a connection, or "
        "set HF_HUB_CACHE to a cache that holds it"
    )


def _short(error: Any) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
