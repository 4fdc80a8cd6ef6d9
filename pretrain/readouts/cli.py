"""The command ``yaware readouts``."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def readouts(arguments: list[str]) -> int:
    """Fit ridge regressions of the proxies (age, ...) to an encoder's features, and store them beside the encoder.

    `yaware embed --readouts` and `yaware evaluate --readouts` use them. The same command continues a killed one.
    """
    options = _parser().parse_args(arguments)
    from pretrain.readouts.add import add_readouts

    fitted = add_readouts(
        options.encoder, options.shards, columns=options.columns, split=options.split, query=options.query,
        calibration=options.calibration, layer=options.layer, pooling=tuple(options.pooling), seed=options.seed,
        batch_size=options.batch_size, device=options.device, workers=options.workers, replace=options.replace,
    )  # fmt: skip
    for line in fitted.lines():
        print(f"readouts: {line}")
    errors = fitted.errors()
    if len(errors):
        print(errors.to_string(index=False, float_format=lambda value: f"{value:.3g}"))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="yaware readouts", description=readouts.__doc__)
    add = parser.add_argument
    add("encoder", help="a run folder (its latest checkpoint), a checkpoint or an exported encoder")
    add(
        "--shards",
        required=True,
        help="folder or URL of shards; the people to fit to, as a rule those of the pretraining",
    )
    add(
        "--columns",
        nargs="+",
        help="columns to predict: numbers, or texts with two values (default: the run's proxies)",
    )
    add("--split", nargs="+", help="splits of the shards to fit to (default: those of the pretraining)")
    add("--query", help="use only scans that fulfil this pandas query")
    add(
        "--calibration",
        default="auto",
        metavar="SPLIT",
        help="split whose people choose the penalty and give errors and intervals; none: the people of the fit, out of fold; "
        "auto (default): the split of the monitor, if it has 50 people and the encoder was trained on people of the fit",
    )
    add("--layer", help="a block inside the network; default: its end")
    add("--pooling", nargs="+", default=["mean"], help="of a block (default: mean)")
    add("--seed", type=int, default=0, help="seed of the folds of people (default: 0)")
    add("--replace", action="store_true", help="replace readouts that are there")
    add("--batch-size", type=int, help="scans per forward pass (default: 8, on a CPU fewer if they are large)")
    add("--device", help="cpu or cuda (default: the GPU if there is one)")
    add("--workers", type=int, help="threads that read ahead (default: one per core, at most 8)")
    return parser


COMMANDS: dict[str, Callable[[list[str]], int]] = {"readouts": readouts}
