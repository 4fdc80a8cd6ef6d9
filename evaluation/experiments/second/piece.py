"""Evaluates one piece in a process of its own: ``python -m evaluation.experiments.second.piece OUT RESULTS PIECE``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from evaluation.experiments.answers import log_answers
from evaluation.experiments.processes import Command
from evaluation.experiments.second.evaluate import evaluate_piece
from evaluation.experiments.second.plan import EXPERIMENT, Piece, SecondPlan, piece_digest, pieces_of
from evaluation.experiments.second.store import save_piece, stored_digest
from infra.errors import UserError
from infra.files import read_text
from infra.tracking.tracker import default_uri


def is_done(results: Path, plan: SecondPlan, piece: Piece) -> bool:
    """Return whether the answers of a piece are stored, and belong to this plan."""
    return stored_digest(piece.file(results)) == piece_digest(plan, piece)


def piece_command(out: Path, results: Path, plan: SecondPlan, piece: Piece) -> Command:
    """Return the command that evaluates a piece; the plan is read from OUT/plan.json."""
    words = [sys.executable, "-m", "evaluation.experiments.second.piece", str(out), str(results), piece.name]
    log = out / "logs" / f"{piece.file(results).stem}.log"
    return Command(f"evaluation of {piece.name}", words, log, is_done=lambda: is_done(results, plan, piece))


def read_plan(out: Path) -> SecondPlan:
    """Return the plan of a folder."""
    stored: dict[str, Any] = json.loads(read_text(out / "plan.json"))
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()
    }
    return SecondPlan(**values)


def main(out: Path, results: Path, name: str) -> int:
    """Evaluate a piece, store its answers and log them to MLflow; return the exit status."""
    plan = read_plan(out)
    piece = next(piece for piece in pieces_of(plan) if piece.name == name)
    try:
        answers = evaluate_piece(out, plan, piece)
        save_piece(piece.file(results), piece_digest(plan, piece), answers)
        log_answers(default_uri(), piece.level, answers, EXPERIMENT)
    except UserError as error:
        print(f"yaware: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
