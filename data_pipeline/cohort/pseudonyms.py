"""Pseudonyms: keyed hashes in place of participants' ids, equal for equal keys and irreversible without the key."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.cohort.scan import Scan
from infra.errors import UserError
from infra.files import read_bytes

LEAST_KEY_BYTES = 16
DIGITS = 12
LEAST_ID_LETTERS = 3  # shorter ids are not replaced inside other texts, because they occur in any text
ENDINGS = (".nii", ".gz", ".npy", ".mgz", ".mgh", ".img", ".hdr")  # kept in the reported name of a file


def read_key(path: Path) -> bytes:
    """Read the secret bytes of a key file; raises UserError if it is missing or too short to resist guessing."""
    try:
        key = read_bytes(path)
    except OSError as error:
        raise UserError(
            f"--pseudonymise={path} cannot be read ({error.strerror}); make one with `head -c 32 /dev/urandom > {path}`"
        ) from None
    if len(key) < LEAST_KEY_BYTES:
        raise UserError(f"--pseudonymise={path} holds {len(key)} bytes; at least {LEAST_KEY_BYTES} are needed")
    return key


def pseudonym(key: bytes, dataset: str, participant: str) -> str:
    """The first 12 hexadecimal digits of HMAC-SHA256 of ``dataset/participant``."""
    return hmac.new(key, f"{dataset}/{participant}".encode(), hashlib.sha256).hexdigest()[:DIGITS]


def key_fingerprint(key: bytes) -> str:
    """A fingerprint that distinguishes keys in manifests without revealing them."""
    return hmac.new(key, b"", hashlib.sha256).hexdigest()[:DIGITS]


def pseudonymise(scans: Sequence[Scan], key: bytes) -> list[Scan]:
    """Replace participants' ids by pseudonyms; the scans are sorted by their new keys, since the old order reveals ids.

    Ids inside the texts of other columns are replaced too, and numeric columns that copy the ids are dropped. ``Scan.path``
    stays, because the file must be read, but ``reported_path`` no longer shows it.

    Raises:
        UserError: two participants of a data set have the same pseudonym.
    """
    pseudonyms = {
        (scan.dataset, scan.participant_id): pseudonym(key, scan.dataset, scan.participant_id) for scan in scans
    }
    owners: dict[tuple[str, str], str] = {}
    for (dataset, participant), name in pseudonyms.items():
        if owners.setdefault((dataset, name), participant) != participant:
            raise UserError(
                f"--pseudonymise: two participants of {dataset} have the pseudonym {name}; use another key file"
            )
    copies = _columns_that_copy_ids(scans)
    hidden = [_pseudonymise_scan(scan, pseudonyms[scan.dataset, scan.participant_id], copies) for scan in scans]
    return sorted(hidden, key=lambda scan: (scan.key, scan.shown_as))


def _pseudonymise_scan(scan: Scan, name: str, dropped: set[str]) -> Scan:
    """The scan under a pseudonym, without some columns."""
    extra = {
        column: _replace_id(value, scan.participant_id, name)
        for column, value in scan.extra.items()
        if column not in dropped
    }
    session, run, unlisted = (
        _replace_id(text, scan.participant_id, name) for text in (scan.session, scan.run, scan.unlisted)
    )
    hidden = replace(scan, participant_id=name, session=session, run=run, extra=extra, unlisted=unlisted)
    endings = "".join(suffix for suffix in scan.path.suffixes[-2:] if suffix.lower() in ENDINGS)
    return replace(hidden, shown_as=f"{hidden.key}{endings}")


def _replace_id(value: Any, participant: str, name: str) -> Any:
    """A value with the participant's id replaced, if it is text that holds the id."""
    if not isinstance(value, str):
        return value
    is_id = value.strip().removeprefix("sub-") == participant
    if is_id or (len(participant) >= LEAST_ID_LETTERS and participant in value):
        return value.replace(participant, name)
    return value


def _columns_that_copy_ids(scans: Sequence[Scan]) -> set[str]:
    """The numeric columns whose every value is the participant's own id."""
    columns = {column for scan in scans for column, value in scan.extra.items() if isinstance(value, float)}
    copies = set()
    for column in columns:
        values = [(scan.extra.get(column), scan.participant_id) for scan in scans if scan.extra.get(column) is not None]
        if all(isinstance(value, float) and _is_number(participant, value) for value, participant in values):
            copies.add(column)
    return copies


def _is_number(participant: str, value: float) -> bool:
    """Whether an id is a number, apart from leading zeros, and equals ``value``."""
    digits = participant.lstrip("0") or "0"
    return digits.isdigit() and digits == f"{value:.0f}"
