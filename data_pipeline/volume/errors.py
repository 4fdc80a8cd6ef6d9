"""The error of a scan that cannot be used."""

from __future__ import annotations


class BadScan(Exception):
    """A scan that cannot be used. The text is the reason that quarantine.tsv gives.

    Attributes:
        rule: the violated rule, a name of ``data_pipeline.quality.rules`` or for example ``unreadable``.
        measured: the measured value, if there is one.
        threshold: the limit that the value violates, if there is one.
    """

    def __init__(
        self, reason: str, rule: str = "unreadable", measured: float | None = None, threshold: float | None = None
    ) -> None:
        super().__init__(reason)
        self.rule, self.measured, self.threshold = rule, measured, threshold
