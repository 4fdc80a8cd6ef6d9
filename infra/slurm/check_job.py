"""Refuse a batch job of SLURM that would do the same work several times; ``compare.sbatch`` starts this module."""

from __future__ import annotations

import os
import sys

from infra.errors import UserError
from infra.slurm.requeue import check_job


def main() -> int:
    """Check this job; return the exit status, 2 for a job array or a heterogeneous job."""
    try:
        check_job(os.environ)
    except UserError as error:
        print(f"yaware: error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
