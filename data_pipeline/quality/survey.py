"""Survey a cohort: measure every scan as a build does, and tabulate the participants, the scans and the exclusions."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from data_pipeline.cohort.grid import common_grid
from data_pipeline.cohort.read import is_simulated, name_of, read_with_changes
from data_pipeline.cohort.scan import Scan, bytes_of
from data_pipeline.cohort.split import SPLIT
from data_pipeline.quality.columns import Table, column_tables
from data_pipeline.quality.outliers import Verdict, coarse_path, find_outliers, save_coarse
from data_pipeline.quality.rules import COLUMNS, Quality, Removal, check_quality, read_scan, unlisted_removals
from data_pipeline.volume.errors import BadScan
from data_pipeline.volume.grid import Grid
from data_pipeline.volume.preparation import Preparation, check_preparation, check_scaling
from infra import ray_cluster
from infra.progress import Progress

MOST_ROWS = 30  # of a table; quarantine.tsv holds all
WORST = 12  # scans of lowest correlation that are shown
PART_SCANS = (4, 256)  # the smallest and the largest number of scans that a Ray task measures


@dataclass(frozen=True)
class Survey:
    """The result of ``survey_cohort``.

    Attributes:
        root: the cohort.
        dataset: its name.
        preparation: how scans are brought to the grid.
        quality: the rules.
        scans: one row per scan, excluded scans included: ``key``, ``path`` (as the quarantine may name it), the
            participant's values, the statistics, ``robust_z``, and ``rule`` (empty if the scan is kept).
        files: each key's scan.
        removals: the excluded scans, sorted by key.
        verdict: the result of comparing the scans.
        columns: how the columns of the cohort's tables were read, see ``data_pipeline.quality.columns``.
        simulated: whether the cohort is simulated.
    """

    root: Path
    dataset: str
    preparation: Preparation
    quality: Quality
    scans: pd.DataFrame
    files: dict[str, Scan]
    removals: list[Removal]
    verdict: Verdict
    columns: list[Table]
    simulated: bool

    @property
    def grid(self) -> Grid:
        """The grid to which scans are brought."""
        return self.preparation.grid

    @property
    def threshold(self) -> float | None:
        """The correlation below which a scan is an outlier; None if outliers were not judged."""
        location, scale = self.verdict.location, self.verdict.scale
        if location is None or scale is None or not self.quality.outlier.use:
            return None
        return location - max(-self.quality.outlier.robust_z * scale, self.quality.outlier.least_drop)

    def worst(self, count: int = WORST) -> pd.DataFrame:
        """The ``count`` scans of lowest correlation, the lowest first."""
        return self.scans.dropna(subset=["quality_correlation"]).sort_values(["quality_correlation", "key"])[:count]


def survey_cohort(
    cohort: str | Path,
    *,
    parts: Path,
    dataset: str | None = None,
    modality: str = "vbm",
    grid: Grid | None = None,
    scaling: str = "none",
    quality: Quality | None = None,
    workers: int | None = None,
    layout: str | None = None,
    columns: str | Path | None = None,
    key_file: str | Path | None = None,
    crop: str = "world",
    intensity: str | None = None,
) -> Survey:
    """Measure and judge every scan in Ray tasks, with the code of ``build_shards``.

    Args:
        cohort: see ``data_pipeline.cohort.read.read_cohort``.
        parts: a folder that all Ray workers can reach; coarse volumes are kept in a temporary folder in it.
        dataset, modality, grid, scaling, quality, workers, layout, columns, key_file, crop, intensity: as for
            ``data_pipeline.shards.build.build_shards``.

    Raises:
        UserError: the cohort or an option is wrong.
    """
    root = Path(cohort).resolve()
    check_scaling(scaling)
    intensity, quality = check_preparation(modality, crop, intensity), quality or Quality()
    scans, unlisted, changes, without_scan = read_with_changes(
        root, dataset, modality, layout=layout, columns=columns, key_file=key_file
    )
    check_quality(quality, scans)
    preparation = Preparation(grid or common_grid(scans), scaling, crop, intensity)
    parts.mkdir(parents=True, exist_ok=True)
    participants = pd.DataFrame(
        {"key": s.key, "path": s.reported_path, "dataset": s.dataset, "participant_id": s.participant_id,
         "session": s.session, "split": s.extra.get(SPLIT), "site": s.site, "age": s.age, "sex": s.sex}
        for s in (*scans, *unlisted)
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=parts, prefix=".survey-") as folder, ray_cluster.session_on_demand(workers):
        small = ray_cluster.is_small(bytes_of(scans), workers)
        rows, removals, coarse = _measure(scans, preparation, quality, Path(folder), in_process=small)
        measured = pd.DataFrame(rows, columns=["key", *(c for c in COLUMNS if c != "quality_correlation")])
        table = measured.merge(participants.drop_duplicates("key"), on="key", how="left", validate="one_to_one")
        verdict = find_outliers(table, coarse, quality, {scan.key: scan.reported_path for scan in scans})
    removals = [*removals, *verdict.removals, *unlisted_removals(unlisted)]
    measured = measured.assign(quality_correlation=verdict.correlation, robust_z=verdict.z)
    surveyed = participants.merge(measured, on="key", how="left")
    surveyed["rule"] = surveyed["key"].map({removal.key: removal.rule for removal in removals}).fillna("")
    return Survey(
        root=root, dataset=name_of(scans, root), preparation=preparation, quality=quality, scans=surveyed,
        files={scan.key: scan for scan in (*unlisted, *scans)},
        removals=sorted(removals, key=lambda removal: (removal.key, removal.path)), verdict=verdict,
        columns=column_tables(scans, changes, without_scan, len(unlisted)), simulated=is_simulated(root),
    )  # fmt: skip


def _measure(
    scans: list[Scan], preparation: Preparation, quality: Quality, folder: Path, *, in_process: bool
) -> tuple[list[dict[str, Any]], list[Removal], list[Path]]:
    """``measure_part`` of all scans in Ray tasks, or ``here``; also the coarse files of the parts that have a usable scan."""
    smallest, largest = PART_SCANS
    step = min(largest, max(smallest, len(scans) // 64))
    parts = [scans[first : first + step] for first in range(0, len(scans), step)]
    files = [coarse_path(folder, f"{number:06d}") for number in range(len(parts))]
    tasks = [(part, preparation, quality, file) for part, file in zip(parts, files, strict=True)]
    results: list[Any] = [None] * len(tasks)
    excluded = 0
    with Progress(len(scans), "scans", "inspecting") as progress:
        for index, result in ray_cluster.map_unordered(measure_part, tasks, in_flight=64, in_process=in_process):
            results[index] = result
            excluded += len(result[1])
            progress.advance(len(parts[index]), excluded=excluded)
    rows = [row for part_rows, _ in results for row in part_rows]
    removals = [removal for _, part_removals in results for removal in part_removals]
    return rows, removals, [file for file, (part_rows, _) in zip(files, results, strict=True) if part_rows]


def measure_part(
    scans: list[Scan], preparation: Preparation, quality: Quality, file: Path
) -> tuple[list[dict[str, Any]], list[Removal]]:
    """Measure some scans and write their coarse volumes to ``file``; runs in a Ray worker.

    Returns:
        The statistics of each usable scan with its ``key``, and the scans that the rules for single scans exclude.
    """
    rows: list[dict[str, Any]] = []
    removals: list[Removal] = []
    coarse_volumes: list[Any] = []
    for scan in scans:
        try:
            _, statistics, coarse = read_scan(scan, preparation, quality)
        except BadScan as error:
            removals.append(Removal.of(scan, error))
            continue
        rows.append({"key": scan.key, **statistics})
        coarse_volumes.append(coarse)
    if coarse_volumes:
        save_coarse(file, coarse_volumes)
    return rows, removals


def tables(survey: Survey) -> list[Table]:
    """The tables of a survey without those of its columns: cohort, sites, rules, least typical scans, excluded scans."""
    return [_overview(survey), _sites(survey), _rules(survey), _worst(survey), _excluded(survey)]


def _overview(survey: Survey) -> Table:
    scans, grid = survey.scans, survey.grid
    age, kept = scans["age"].dropna(), int((scans["rule"] == "").sum())
    rows = [
        ["data set", survey.dataset + (" (simulated)" if survey.simulated else "")],
        ["scans", f"{len(scans)} of {_count_participants(scans)} participants"],
        *([["data sets", _counts(scans["dataset"])]] if scans["dataset"].nunique() > 1 else []),
        ["kept by the rules", f"{kept}; {len(scans) - kept} excluded"],
        ["age", f"{age.mean():.1f} ± {age.std(ddof=min(1, len(age) - 1)):.1f} years ({age.min():.0f} to {age.max():.0f}), "
                f"{int(scans['age'].isna().sum())} missing" if len(age) else "missing in all scans"],
        ["sex", _counts(scans["sex"])],
        ["sites", str(scans["site"].replace("", None).nunique())],
        ["grid", str(grid)],
    ]  # fmt: skip
    return Table("Cohort", ["", ""], rows)


def _count_participants(scans: pd.DataFrame) -> int:
    """The number of participants; the same id in two data sets counts twice."""
    return len(scans[["dataset", "participant_id"]].drop_duplicates())


def _counts(column: pd.Series[str]) -> str:
    return ", ".join(f"{name or 'missing'} {count}" for name, count in column.value_counts().items())


def _sites(survey: Survey) -> Table:
    rows = []
    for site, scans in survey.scans.groupby("site", sort=False):
        female = (scans["sex"] == "F").sum() / max(1, int((scans["sex"] != "").sum()))
        rows.append((
            len(scans), [str(site) or "missing", str(len(scans)), str(_count_participants(scans)),
            f"{scans['age'].mean():.1f}", f"{female:.0%}", str(int((scans["rule"] != "").sum()))],
        ))  # fmt: skip
    rows.sort(key=lambda row: (-row[0], row[1]))
    title = "Sites" if len(rows) <= MOST_ROWS else f"Sites: the {MOST_ROWS} largest of {len(rows)}"
    head = ["site", "scans", "participants", "mean age", "female", "excluded"]
    return Table(title, head, [row for _, row in rows[:MOST_ROWS]])


# The setting of each rule as text. The rules of ``limits`` are listed after these; all other rules have no setting.
SETTINGS: dict[str, Callable[[Quality], str]] = {
    "nonfinite": lambda quality: quality.nonfinite,
    "constant": lambda quality: quality.constant,
    "grid": lambda quality: quality.grid,
    "cat12": lambda quality: f"{quality.cat12.column} > {quality.cat12.worst:g}" if quality.cat12.use else "off",
    "duplicate": lambda quality: quality.duplicate,
    "outlier": lambda quality: (
        f"robust z < {quality.outlier.robust_z:g}, {quality.outlier.least_drop:g} below"
        if quality.outlier.use
        else "off"
    ),
}


def _rules(survey: Survey) -> Table:
    quality = survey.quality
    count = pd.Series([removal.rule for removal in survey.removals], dtype=object).value_counts()
    always = sorted(name for name in count.index if name not in SETTINGS and not name.startswith("limits."))
    rows = [[name, "always", str(count[name])] for name in always]
    for name, setting in SETTINGS.items():
        text = setting(quality)
        if name == "outlier" and quality.outlier.use and survey.verdict.location is None:
            text += f"; not judged, fewer than {quality.outlier.least_scans} scans"
        rows.append([name, text, str(count.get(name, 0))])
    for name, limits in quality.limits.items():
        bounds = [
            f"{word} {value:g}" for word, value in (("min", limits.min), ("max", limits.max)) if value is not None
        ]
        rows.append([f"limits.{name}", ", ".join(bounds), str(count.get(f"limits.{name}", 0))])
    return Table("Rules", ["rule", "setting", "excluded scans"], rows)


def _worst(survey: Survey) -> Table:
    rows = [
        [str(row.key), str(row.site), _number(row.age, ".0f"), _number(row.quality_correlation, ".4f"),
         _number(row.robust_z, ".1f"), str(row.rule) or "kept"]
        for row in survey.worst().itertuples()
    ]  # fmt: skip
    head = ["scan", "site", "age", "correlation", "robust z", "verdict"]
    return Table("Lowest correlation with the median scan", head, rows)


def _excluded(survey: Survey) -> Table:
    rows = [
        [removal.key, removal.rule, _number(removal.measured, ".4g"), _number(removal.threshold, ".4g"), removal.reason]
        for removal in survey.removals[:MOST_ROWS]
    ]
    hidden = len(survey.removals) - len(rows)
    title = f"Excluded: {len(rows)} of {len(survey.removals)}, all in quarantine.tsv" if hidden else "Excluded"
    return Table(title, ["scan", "rule", "value", "threshold", "reason"], rows)


def _number(value: Any, form: str) -> str:
    """A formatted number; empty for None and NaN."""
    return "" if value is None or value != value else format(float(value), form)
