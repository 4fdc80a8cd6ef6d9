"""Which evaluations are compared with each other."""

from __future__ import annotations

from collections.abc import Iterator

from evaluation.comparison.evaluations import CheckpointEvaluation

ALL_PAIRS = (
    6  # evaluations of one protocol that are all compared with each other; more are compared with the first only
)


def pairs(
    evaluations: list[CheckpointEvaluation], against: str | None = None
) -> Iterator[tuple[CheckpointEvaluation, CheckpointEvaluation]]:
    """Yield the pairs to compare: each evaluation with each later one, or each one with the one named ``against``.

    Evaluations are compared if they are of one protocol. Features of others (tables, adapters) are compared with every
    checkpoint of their protocol, whatever its layer and readouts. Baselines (voxels, networks from scratch) are also compared
    with every other protocol on the same kind of folds. If a protocol has more than ALL_PAIRS evaluations, all others are
    compared with its first only.
    """
    names: dict[str, list[str]] = {}
    for evaluation in evaluations:
        names.setdefault(evaluation.protocol, []).append(evaluation.name)
    only_first = {protocol: members[0] for protocol, members in names.items() if len(members) > ALL_PAIRS}
    for number, first in enumerate(evaluations):
        for second in evaluations[number + 1 :]:
            if not _comparable(first, second):
                continue
            if against is None:
                checked = [first] if first.protocol == second.protocol else [first, second]
                if all(only_first.get(each.protocol, each.name) == each.name for each in checked):
                    yield first, second
            elif second.name == against:
                yield first, second
            elif first.name == against:
                yield second, first


def _comparable(first: CheckpointEvaluation, second: CheckpointEvaluation) -> bool:
    """Whether a difference is one of the checkpoints, not of two protocols or two kinds of folds."""
    if first.protocol == second.protocol:
        return True
    one, other = first.variant, second.variant
    baseline = one.is_baseline or other.is_baseline
    given = (one.is_given or other.is_given) and one.protocol == other.protocol
    return (baseline or given) and one.leave_site_out == other.leave_site_out
