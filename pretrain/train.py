"""The program of every rank: ``deepspeed --num_accelerators 2 --module pretrain.train --config demo-cpu``.

Starting the same command again continues the run from its last checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.lean_imports import is_own_process, own_process

if __name__ == "__main__":
    own_process()

import torch

from infra import distributed, watchdog
from infra.cli import print_any_text
from infra.errors import STORAGE_ERRORS, LoaderError, UserError
from infra.processes.limits import raise_open_files
from infra.processes.unchanged import unchanged_process
from infra.processes.with_parent import end_with_parent
from infra.watchdog.exit_note import tell_problem
from pretrain.config import Recipe, load_recipe
from pretrain.engine import engine
from pretrain.engine.ema import Average
from pretrain.engine.engine import NotFinite
from pretrain.model import build_model
from pretrain.run import checkpoint, folder
from pretrain.run.agreement import plan_together
from pretrain.run.checkpoint import CheckpointFailed
from pretrain.run.final_readouts import fit_final_readouts
from pretrain.run.log import RunLog
from pretrain.run.loop import TrainingLoop
from pretrain.run.plan import Plan, make_plan
from pretrain.run.step import lr_factor


def train(recipe: Recipe | Plan) -> None:
    """Pretrain from the last checkpoint to the last step. Collective: every rank calls it.

    ``recipe`` is a recipe, or its plan for this number of ranks.

    Any process can call it as a single rank, and call it again. On return, also after an error, the engine is freed, the
    process group is closed, and ``os.environ``, the signal handlers, ``sys.excepthook``, ``warnings.filters``, the state of
    ``random`` and torch's number of threads are as before. SIGTERM, SIGINT and SIGUSR1 stop the run after a checkpoint if it
    was started in the main thread; elsewhere they have no effect on it.

    Raises:
        UserError: if the recipe, the shards or the run folder do not fit.
        NotFinite: if the loss or the gradient is not finite.
        CheckpointFailed: if a checkpoint cannot be written.
    """
    if isinstance(recipe, Recipe) and distributed.world_size() == 1:
        recipe = make_plan(recipe, 1)  # several ranks make their plans together, below
    output = (recipe.recipe if isinstance(recipe, Plan) else recipe).run.output
    with _process_group() as device:
        plan = plan_together(recipe)
        with watchdog.note_exit(Path(output)):
            _train(plan, device)


@contextmanager
def _process_group() -> Iterator[torch.device]:
    """Start the process group and give this rank's device; afterwards the process is as before."""
    threads = torch.get_num_threads()
    with unchanged_process():
        try:
            yield engine.start_ranks()
        finally:
            engine.stop_ranks()
            torch.set_num_threads(threads)


def _load_recipe(arguments: Sequence[str]) -> Recipe:
    """Read the recipe of the command line. A rank that cannot tells the others, which would wait for it."""
    try:
        return load_recipe(*parse_arguments(arguments))
    except UserError as error:
        if distributed.world_size() > 1:
            with _process_group():
                plan_together(None, str(error))
        raise


def _train(plan: Plan, device: torch.device) -> None:
    recipe = plan.recipe
    watchdog.connect()
    watchdog.phase("the building of the engine")
    model = build_model(recipe).to(device)
    factor = lr_factor(recipe.optimizer, plan.total_steps, plan.steps_per_epoch)
    trained = engine.build_engine(recipe, model, factor, plan.deepspeed)
    done = False
    try:
        _train_engine(plan, trained, device)
        done = True
    finally:
        # DeepSpeed's hooks hold the engine. A rank's own process ends now; and if one rank of several has failed, this would
        # wait for the others.
        if not is_own_process() and (done or distributed.world_size() == 1):
            engine.close_engine(trained)


def _train_engine(plan: Plan, trained: Any, device: torch.device) -> None:
    """Load the checkpoint to continue from, and train to the last step."""
    recipe = plan.recipe
    watchdog.phase("the loading of the checkpoint", slow=True)
    checkpoints = Path(recipe.run.output) / "checkpoints"
    state = checkpoint.resume(
        checkpoints, trained, recipe.run.resume, lambda other: folder.check_same_network(recipe, other.get("recipe")),
        trust=recipe.run.trust,
    )  # fmt: skip
    average = None if recipe.train.ema_decay is None else Average(trained, recipe.train.ema_decay)
    if average and state:
        average.load(Path(state["folder"]))
    if distributed.is_main():
        checkpoint.clean_checkpoints(checkpoints, recipe.checkpoint.keep)
    log = RunLog(plan, state) if distributed.is_main() else None
    try:
        stopped_by = TrainingLoop(plan, trained, average, device, log, state).run()
        if not stopped_by:
            fit_final_readouts(plan, device, log)
    except BaseException:
        if log:
            log.close("FAILED")
        raise
    if log:
        log.close("KILLED" if stopped_by else "FINISHED", stopped_by)


def main(arguments: Sequence[str]) -> int:
    """Train under the watchdog and return the exit status.

    Wrong input is one line from each host and status 2; a run or a file system that failed is one line and status 1.
    """
    raise_open_files()
    if any(argument.startswith("--local_rank") for argument in arguments):
        end_with_parent()  # a launcher; a shell may end before a rank that it has started in the background
    try:
        distributed.adopt_slurm()
        recipe = _load_recipe(arguments)
        with watchdog.Watchdog(recipe.train.watchdog_seconds):
            train(recipe)
    except UserError as error:
        # One rank of each host; unreadable data may concern one rank only.
        if distributed.is_main() or distributed.local_rank() == 0 or isinstance(error, LoaderError):
            print(f"yaware: error: {error}", file=sys.stderr, flush=True)
            tell_problem(error)
        return 2
    except (NotFinite, CheckpointFailed) as error:
        if distributed.is_main():
            print(f"yaware: error: {error}", file=sys.stderr, flush=True)
        return 1
    except OSError as error:
        if error.errno not in STORAGE_ERRORS:
            raise
        print(f"yaware: error: rank {distributed.rank()}: {error}; make room or repair the file system, then the same command "
              "continues from the last checkpoint", file=sys.stderr, flush=True)  # fmt: skip
        return 1
    return 0


def parse_arguments(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Return the recipe's name or path (``--config NAME`` or ``--config=NAME``) and the overrides.

    The launcher's ``--local_rank`` is dropped. Raises UserError if ``--config`` is missing.
    """
    rest = [argument for argument in arguments if not argument.startswith(("--local_rank", "--local-rank"))]
    for index, argument in enumerate(rest):
        if argument.startswith("--config="):
            return argument.removeprefix("--config="), rest[:index] + rest[index + 1 :]
        if argument == "--config" and index + 1 < len(rest):
            return rest[index + 1], rest[:index] + rest[index + 2 :]
    raise UserError("--config is missing; give a shipped recipe's name or a YAML file: --config demo-cpu")


if __name__ == "__main__":
    print_any_text()
    sys.exit(main(sys.argv[1:]))
