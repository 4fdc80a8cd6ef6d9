"""The rows of the comparison and the data that they read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.benchmarks.cases.preset import operators
from tests.benchmarks.harness.row import ROUND, Row, Side

DATA = "{data}"  # in an argument: the folder of the prepared data
FULL = [121, 145, 121]
COARSE = [41, 49, 41]  # 4.5 mm


@dataclass(frozen=True)
class Sizes:
    """How much each row does."""

    full: tuple[int, float] = (32, 1.5)  # people and mm of the scans that are read
    coarse: tuple[int, float] = (64, 4.5)  # of the scans that are trained on
    tables: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    views: int = 32  # two of each scan; which operators are drawn decides the cost
    losses: tuple[int, ...] = (256, 2048, 8192, 32_768, 65_536)  # 2N
    sides: tuple[int, ...] = tuple(COARSE)
    stage_sides: tuple[int, ...] = tuple(FULL)
    batch: int = 8
    steps: int = 6
    loaded: int = 24
    seconds: float = 100.0  # of a round of the end-to-end row
    run_steps: int = 100_000
    gathered: int = 2048
    worlds: tuple[int, ...] = (1, 2, 4)
    searched: int | None = None
    further: int = 12  # several batches of ours; the start varies by a tenth of a second
    product: int = 4096
    rounds: int = 3


QUICK = Sizes(
    full=(2, 6.0), coarse=(8, 6.0), tables=(1000,), views=2, losses=(32,), sides=(33, 33, 33), stage_sides=(33, 33, 33),
    batch=4, steps=1, loaded=1, seconds=1.0, run_steps=8, gathered=64, worlds=(1, 2), searched=120, further=1, product=64,
    rounds=2,
)  # fmt: skip


@dataclass(frozen=True)
class Data:
    """Files that are prepared once, before the first row that reads them, by a case in a process of its own."""

    case: str
    arguments: dict[str, Any] = field(default_factory=dict)
    folders: tuple[str, ...] = ()  # below the data folder; removed if the preparation was cut off
    after: tuple[str, ...] = ()
    peer: bool = False


def data_of(sizes: Sizes) -> dict[str, Data]:
    """Return what can be prepared, by name."""
    scans = {
        name: Data("cases.data:scans", {"data": DATA, "name": name, "scans": people, "spacing": mm}, (name,))
        for name, (people, mm) in (("full", sizes.full), ("coarse", sizes.coarse))
    }
    tables = {
        f"{kind}-{n}": Data(case, {"data": DATA, "scans": n}, (f"index/{kind}-{n}",), peer=kind == "mds")
        for n in sizes.tables
        for kind, case in (("ours", "cases.data:table"), ("mds", "peers.reading:write_index"))
    }
    return scans | tables | {
        "raw": Data(
            "cases.data:raw", {"data": DATA, "spacing": sizes.full[1]},
            ("full/shards-npy", "full/unpacked", "full/npy-float16"), ("full",),
        ),
        "litdata": Data("peers.reading:write_litdata", {"data": DATA}, ("full/litdata",), ("full",), peer=True),
        "mds": Data("peers.reading:write_streaming", {"data": DATA}, ("full/mds", "full/mds-zstd"), ("full",), peer=True),
        "startup": Data("cases.data:small_run", {"data": DATA}, ("startup",)),
    }  # fmt: skip


def _packed(sizes: Sizes, cold: bool) -> Row:
    """Read scans that are stored packed."""
    own = {"data": DATA, "cold": cold}
    sides = (
        Side("ours", "cases.reading:shards", own, note="zstd, CRC-32C checked, float16"),
        Side("nibabel", "cases.reading:nifti", own, note=".nii.gz, float32"),
        Side("webdataset", "peers.reading:webdataset", own, True, "our shards, nothing checked"),
        Side("streaming, unpacking", "peers.reading:streaming", {**own, "form": "unpacking"}, True, "zstd, first read",
             ("mds",)),
    )  # fmt: skip
    return _read_row(sizes, "read", "read, check and unpack a scan", sides, cold)


def _raw(sizes: Sizes, cold: bool) -> list[Row]:
    """Read scans that are stored raw. From the page cache a row for scans kept beside their shards, and one for raw shards."""
    own, bare = {"data": DATA, "cold": cold}, "nothing checked"
    kept = Side("ours", "cases.reading:unpacked", own, note="`data.cache_unpacked`, CRC-32C checked", needs=("raw",))
    shards = Side("ours", "cases.reading:raw_shards", own, note="`--codec npy`, CRC-32C checked", needs=("raw",))
    wide = Side("npy", "cases.reading:npy", own, note=f"float32, {bare}")
    npy = Side("npy, float16", "cases.reading:npy", {**own, "folder": "npy-float16"}, note=bare, needs=("raw",))
    litdata = Side("litdata", "peers.reading:litdata", own, True, bare, ("litdata",))
    raw = Side("streaming, raw", "peers.reading:streaming", {**own, "form": "raw"}, True, bare, ("mds",))
    unpacked = Side("streaming, unpacked", "peers.reading:streaming", {**own, "form": "unpacked"}, True,
                    "zstd, unpacked before, nothing checked", ("mds",))  # fmt: skip
    title = "read a scan that is kept unpacked"
    if cold:  # the disk decides how long it takes; raw shards would show the same as the kept scans
        return [_read_row(sizes, "read-raw", title, (kept, wide, npy, litdata, raw, unpacked), cold)]
    return [
        _read_row(sizes, "read-raw", title, (kept, wide, npy, unpacked), cold),
        _read_row(sizes, "read-raw-shards", "read a scan of raw shards", (shards, npy, litdata, raw), cold),
    ]


def _read_row(sizes: Sizes, name: str, title: str, sides: tuple[Side, ...], cold: bool) -> Row:
    note = "Only the files leave the page cache; the disk's own cache stays." if cold else ""
    return Row(
        name + "-cold" * cold, "Reading", f"{title}, from the {'disk' if cold else 'page cache'}", "ms", sides,
        (9 if cold else 10) * len(sides), metric="wall" if cold else "cpu", rounds=sizes.rounds + cold, repeats=int(not cold),
        needs=("full",), note=note,
    )  # fmt: skip


def reading(sizes: Sizes) -> list[Row]:
    """Read scans, from the page cache and from the disk; open tables."""
    rows = [row for cold in (False, True) for row in (_packed(sizes, cold), *_raw(sizes, cold))]
    for n in sizes.tables:
        own, needed = {"data": DATA, "scans": n}, (f"ours-{n}",)
        sides = (
            Side("ours", "cases.reading:open_table", own, note="table of the scans, checked", needs=needed),
            Side("streaming", "peers.reading:open_streaming", own, True,
                 "index of the shards only: no key, age or split of a scan", (f"mds-{n}",)),
            Side("pandas", "cases.reading:open_with_pandas", own, note="the same table, nothing checked", needs=needed),
        )  # fmt: skip
        rows.append(Row(f"open-{n}", "Reading", f"open {n:,} scans", "s", sides, 28, rounds=sizes.rounds))
    largest = sizes.tables[-1]
    listed = tuple(
        Side(name, f"cases.reading:{case}", {"data": DATA, "scans": largest}, needs=(f"ours-{largest}",))
        for name, case in (("ours", "rows_of_a_split"), ("pandas", "rows_by_pandas"))
    )
    return [
        *rows,
        Row("rows", "Reading", f"list a split of {largest:,} scans", "s", listed, 7, rounds=sizes.rounds),
    ]


def augmenting(sizes: Sizes) -> list[Row]:
    """Two views, and the loader with augmentation."""
    drawn = {"scans": sizes.views, "seed": ROUND}
    default = {"settings": operators("default"), **drawn}
    views = (
        Side(
            "ours",
            "cases.network:augmentation",
            {"preset": "default", **drawn},
            note="its noise comes from a bank that is drawn once a run",
        ),
        Side("MONAI", "peers.transforms:cost", {"kind": "monai", **default}, True),
        Side("TorchIO", "peers.transforms:cost", {"kind": "torchio", **default}, True, "has no cutout: without it"),
    )
    ours = {"data": DATA, "batch": sizes.batch, "steps": sizes.loaded}
    nidl = {
        "folder": f"{DATA}/coarse/npy",
        "batch": sizes.batch,
        "steps": sizes.loaded,
        "paper": operators("paper-all"),
    }
    loader = (
        Side("ours", "cases.network:loading", ours, note="shards"),
        Side("nidl", "peers.nidl_training:loading", nidl, True, "torch's DataLoader on .npy files"),
    )
    return [
        Row("views", "Augmentation", "a view of 121 x 145 x 121, preset default, z-score included", "ms", views, 70,
            rounds=sizes.rounds, repeats=0),  # another attempt has the same draws
        Row("loader", "Augmentation", "read a scan and augment two views, preset paper-all, 4.5 mm", "ms", loader, 18,
            rounds=sizes.rounds, needs=("coarse",)),
    ]  # fmt: skip


def losing(sizes: Sizes) -> list[Row]:
    """The loss in one process and on several ranks."""
    rows = []
    for pairs in sizes.losses:
        repeats = max(1, min(50, (8192 // pairs) ** 2))
        scans = {"scans": pairs // 2, "repeats": repeats}
        nidl = {"scans": pairs // 2, "repeats": min(repeats, 10)}
        sides = (Side("ours", "cases.network:loss", scans), Side("nidl", "peers.losses:nidl", nidl, True))
        large = pairs > 8192
        rows.append(
            Row(f"loss-{pairs}", "Loss", f"forward and backward pass, 2N = {pairs:,}, D = 128", "ms", sides,
                {8192: 45, 32_768: 60, 65_536: 110}.get(pairs, 20), rounds=2 if large else sizes.rounds,
                repeats=0 if large else 1)
        )  # fmt: skip
    for ranks in (n for n in sizes.worlds if n > 1):
        shared = {"ranks": ranks, "total": sizes.gathered, "steps": min(sizes.steps, 8 - ranks)}
        sides = (
            Side("ours", "cases.ranks:loss", {"kind": "gathered", **shared}, note="a rank computes its own rows"),
            Side("whole on every rank", "cases.ranks:loss", {"kind": "whole", **shared}, note="our loss"),
            Side("nidl", "peers.losses:nidl_ranks", {**shared, "steps": min(3, sizes.steps)}, True, "whole on every rank"),
        )  # fmt: skip
        title = f"loss of {sizes.gathered:,} scans on {ranks} ranks, CPU time of all ranks"
        rows.append(Row(f"loss-ranks-{ranks}", "Loss", title, "ms", sides, 14 * ranks, rounds=2))
    return rows


def training(sizes: Sizes) -> list[Row]:
    """A step, whole commands, and training end to end."""
    shape = {"sides": list(sizes.sides), "batch": sizes.batch, "steps": sizes.steps}
    step = (
        Side("ours", "cases.network:step", {"kind": "engine", **shape, "channels_last": True},
             note="recipe, DeepSpeed, train_step, `channels_last: true`"),
        Side("bare torch", "cases.network:step", {"kind": "bare", **shape, "channels_last": True},
             note="MONAI's network, Adam, the same malloc and layout, kernels in it, too"),
        Side("bare, torch's layout", "cases.network:step", {"kind": "bare", **shape}, note="the same malloc"),
        Side("nidl", "peers.nidl_training:step", shape, True, "Lightning, torch's layout and malloc"),
        Side("nidl, channels-last", "peers.nidl_training:step", {**shape, "channels_last": True}, True,
             "the same otherwise, kernels in it, too"),
    )  # fmt: skip
    paper, folder = operators("paper-all"), f"{DATA}/coarse/npy"
    run = {"batch": sizes.batch, "workers": 1}
    whole = (
        Side("ours", "cases.network:whole", {"data": DATA, **run, "steps": 2},
             note="`channels_last: true`, with a checkpoint and MLflow"),
        Side("nidl", "peers.nidl_training:whole", {"folder": folder, **run, "steps": 2, "paper": paper}, True,
             "torch's layout, without a checkpoint"),
    )  # fmt: skip
    timed = {**run, "seconds": sizes.seconds, "steps": sizes.run_steps}
    end = (
        Side("ours", "cases.network:end_to_end", {"data": DATA, **timed}, note="`channels_last: true`"),
        Side("nidl", "peers.nidl_training:end_to_end", {"folder": folder, **timed, "paper": paper}, True,
             "torch's layout and malloc, as in its examples"),
    )  # fmt: skip
    network = "DenseNet121, " + " x ".join(map(str, sizes.sides))
    minutes = sizes.rounds * sizes.seconds / 60
    return [
        Row("step", "Training", f"step of {sizes.batch} scans, {network}", "s", step, 125, rounds=2, threads=2),
        Row("command", "Training", "whole command, two steps, with its start", "s", whole, 54, rounds=2,
            threads=2, needs=("coarse",)),
        Row("end-to-end", "Training", "a scan, end to end: the same scans, encoder, batch and reader process", "s", end,
            2 * sizes.rounds * (sizes.seconds + 10), metric="wall", rounds=sizes.rounds, repeats=0, threads=2,
            needs=("coarse",), note=f"{minutes:.0f} minutes of training each, in turns; the start is shown apart."),
    ]  # fmt: skip


def training_on_ranks(sizes: Sizes) -> list[Row]:
    """Training steps on several ranks, with as many scans for each."""
    rows = []
    for ranks in sizes.worlds:
        steps = min(sizes.steps, 8 - ranks)
        sides = tuple(
            Side(name, "cases.ranks:weak", {"kind": kind, "ranks": ranks, "steps": steps}, note=note)
            for name, kind, note in (
                ("ours", "ours", "recipe, DeepSpeed, train_step; a rank computes its own rows of the loss"),
                (
                    "torch DDP",
                    "ddp",
                    "same network, layout and malloc, Adam; every rank computes the whole loss; no DDP on one rank",
                ),
            )
        )
        title = f"step of DenseNet121 with 4 scans a rank, {ranks} rank{'s' * (ranks > 1)}, CPU time of all ranks"
        rows.append(
            Row(f"weak-{ranks}", "Training", title, "ms", sides, 35 + 16 * ranks, rounds=max(2, sizes.rounds - 1))
        )
    return rows


def commands(sizes: Sizes) -> list[Row]:
    """Start-up of commands, and features of a scan."""
    coarse = {"folder": f"{DATA}/coarse/npy", "batch": 4, "paper": operators("paper-all")}
    bare = {name: Side("bare script", "peers.scripts:run_script", {"data": DATA, "name": name}, True, note) for name, note in (
        ("export", "MONAI's ResNet18, as wide, safetensors"),
        ("embed", "nibabel, MONAI's ResNet18, as wide, pandas"),
        ("evaluate", "torch, MONAI, nibabel, pandas, scikit-learn, the table of the scans"),
    )}  # fmt: skip
    estimate = (
        "DeepSpeed's estimate of ZeRO's memory, MONAI's ResNet18, as wide; MONAI imports MLflow if it is there, as here"
    )
    bare["plan"] = Side("bare script", "cases.bare:plan", note=estimate)
    names = {
        "plan": ("plan", "yaware plan", "ResNet18 of a quarter of its width"),
        "export": ("export", "yaware export", "ResNet18 of a quarter of its width"),
        "embed": ("embed, one scan", "yaware embed of one scan", "ResNet18 of a quarter of its width"),
        "evaluate": ("evaluate, first line", "first line of evaluate", ""),
    }
    rows = [
        Row(name, "Commands", title, "s",
            (Side("ours", "cases.startup:command", {"data": DATA, "name": command}, note=note), bare[name]), 24,
            rounds=sizes.rounds, needs=("startup",))
        for name, (command, title, note) in names.items()
    ]  # fmt: skip
    start = (
        Side("ours", "cases.network:whole", {"data": DATA, "batch": 4, "workers": 1, "steps": 0},
             note="with a checkpoint and MLflow"),
        Side("nidl", "peers.nidl_training:start", coarse, True, "without checkpoint and records"),
    )  # fmt: skip
    rows.append(
        Row("pretrain-0", "Commands", "a pretraining of 0 steps, DenseNet121", "s", start, 46, rounds=2,
            needs=("coarse",))
    )  # fmt: skip
    scans = {"data": DATA, "scans": sizes.further}
    further = (
        Side("ours", "cases.embedding:further_scans", scans, note="channels-last, read and checked in the background"),
        Side("bare torch", "cases.bare:further_scans", scans, note="MONAI's network, nibabel, the same malloc"),
        Side("bare, channels-last", "cases.bare:further_scans", {**scans, "channels_last": True}, note="the same otherwise"),
    )  # fmt: skip
    title = "embed: each further scan, DenseNet121, 121 x 145 x 121"
    rows.append(Row("embed-further", "Commands", title, "s", further, 95, rounds=2, needs=("full",)))
    return rows


def searching(sizes: Sizes) -> list[Row]:
    """The nested search."""

    def row(name: str, size: str, seconds: float, rounds: int, **more: Any) -> Row:
        case = {"size": size, "scans": sizes.searched}
        sides = tuple(
            Side(name, "cases.search:run_case", {"who": who, **case})
            for name, who in (("ours", "ours"), ("scikit-learn", "theirs"))
        )
        return Row(name, "Commands", f"nested tuned probe, {size}", "s", sides, seconds, rounds=rounds, **more)

    large = row("search-large", "10,000 x 2,560", 770, 2, repeats=0, optional=True)
    return [row("search", "2,000 x 512", 30, sizes.rounds), large]


def stages(sizes: Sizes) -> list[Row]:
    """The stages of the main recipe, for the roofline."""
    sides = list(sizes.stage_sides)
    cases = (
        Side("augmentation", "cases.stages:augmentation", {"scans": sizes.views}),
        Side("transfer", "cases.stages:transfer", {"sides": sides, "scans": 4}),
        Side("network", "cases.stages:network_passes", {"sides": sides, "repeats": 2}),
        Side("loss", "cases.stages:loss", {"repeats": 20}),
        Side("exchange", "cases.stages:exchange", {"numbers": 11_831_040, "ranks": 2}),
        Side("products", "cases.stages:products", {"side": sizes.product}),
        Side("copies", "cases.stages:copies", {"megabytes": 512 if sizes.product > 64 else 8}),
    )
    title = "a scan in each stage of paper-bhb10k"
    return [Row("stages", "Roofline", title, "ms", cases, 66, rounds=2, repeats=0, threads=2)]


SECTIONS: tuple[Callable[[Sizes], list[Row]], ...] = (
    reading, augmenting, losing, training, training_on_ranks, commands, searching, stages,
)  # fmt: skip


def rows_of(sizes: Sizes) -> list[Row]:
    """Return all rows in the order of the page."""
    return [row for section in SECTIONS for row in section(sizes)]
