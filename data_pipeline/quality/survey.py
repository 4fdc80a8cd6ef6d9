"""``yaware cohort inspect``: measures every scan as a build would, and says who is there and what would be left out."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from data_pipeline.cohort.grid import common_grid
from data_pipeline.cohort.read import is_simulated, name_of, read_cohort
from data_pipeline.cohort.scan import Scan
from data_pipeline.quality.outliers import Verdict, coarse_path, judge, save_coarse
from data_pipeline.quality.rules import COLUMNS, Quality, Removal, check_quality, read_scan, unlisted_removals
from data_pipeline.volume.load import BadScan, Grid, Preparation, check_preparation, check_scaling
from infra import ray_cluster
from infra.progress import Progress

MOST_LINES = 30  # rows of a table that are shown; quarantine.tsv holds all
WORST = 12


@dataclass(frozen=True)
class Survey:
    """What was found. ``scans``: a row per scan, those removed included, with ``path`` (as the quarantine may name it), the
    participant's values, figures, ``robust_z`` and ``rule`` (empty where the scan would stay). ``files``: each key's scan."""

    root: Path
    dataset: str
    preparation: Preparation
    quality: Quality
    scans: pd.DataFrame
    files: dict[str, Scan]
    removals: list[Removal]
    verdict: Verdict
    simulated: bool

    @property
    def grid(self) -> Grid:
        """The grid to which scans are brought."""
        return self.preparation.grid

    @property
    def threshold(self) -> float | None:
        """The correlation below which a scan is an outlier, None where outliers were not judged."""
        middle, scale = self.verdict.middle, self.verdict.scale
        if middle is None or scale is None or not self.quality.outlier.use:
            return None
        return middle - max(-self.quality.outlier.robust_z * scale, self.quality.outlier.least_drop)

    def worst(self, count: int = WORST) -> pd.DataFrame:
        """The scans of lowest correlation, the lowest first."""
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
    """Measure and judge every scan by the very code of ``build_shards``, with the same arguments, in Ray tasks.

    Coarse volumes lie in a temporary folder in ``parts``, which all workers must reach, until the survey is done.
    """
    root = Path(cohort).resolve()
    check_scaling(scaling)
    intensity, quality = check_preparation(modality, crop, intensity), quality or Quality()
    scans, unknown = read_cohort(root, dataset, modality, layout=layout, columns=columns, key_file=key_file)
    check_quality(quality, scans)
    grid = grid or common_grid(scans)
    preparation = Preparation(grid, scaling, crop, intensity)
    parts.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parts, prefix=".survey-") as folder, ray_cluster.session(workers):
        measured, removals, coarse = _measure(scans, preparation, quality, Path(folder))
        table = pd.DataFrame(measured, columns=["key", *(c for c in COLUMNS if c != "quality_correlation")])
        people = pd.DataFrame(
            {"key": s.key, "path": s.place, "dataset": s.dataset, "participant_id": s.participant_id,
             "session": s.session, "site": s.site, "age": s.age, "sex": s.sex} for s in (*scans, *unknown)
        )  # fmt: skip
        table = table.merge(people.drop_duplicates("key"), on="key", how="left", validate="one_to_one")
        verdict = judge(table, coarse, quality, {scan.key: scan.place for scan in scans})
    removals += verdict.removals
    removals += unlisted_removals(unknown)
    figures = table[["key", *(c for c in table.columns if c not in people.columns)]]
    figures = figures.assign(quality_correlation=verdict.correlation, robust_z=verdict.z)
    found = people.merge(figures, on="key", how="left")
    found["rule"] = found["key"].map({removal.key: removal.rule for removal in removals}).fillna("")
    ordered = sorted(removals, key=lambda each: (each.key, each.path))
    files = {scan.key: scan for scan in (*unknown, *scans)}
    name = name_of(scans, root)
    return Survey(
        root=root, dataset=name, preparation=preparation, quality=quality, scans=found, files=files, removals=ordered,
        verdict=verdict, simulated=is_simulated(root),
    )  # fmt: skip


def _measure(
    scans: list[Scan], preparation: Preparation, quality: Quality, folder: Path
) -> tuple[list[dict[str, Any]], list[Removal], list[Path]]:
    step = min(256, max(4, len(scans) // 64))
    parts = [scans[first : first + step] for first in range(0, len(scans), step)]
    files = [coarse_path(folder, f"{number:06d}") for number in range(len(parts))]
    tasks = [(part, preparation, quality, file) for part, file in zip(parts, files, strict=True)]
    results: list[Any] = [None] * len(tasks)
    refused = 0
    with Progress(len(scans), "scans", "inspecting") as progress:
        for index, result in ray_cluster.map_unordered(survey_part, tasks, in_flight=64):
            results[index] = result
            refused += len(result[1])
            progress.advance(len(parts[index]), refused=refused)
    rows = [row for part, _ in results for row in part]
    removals = [removal for _, part in results for removal in part]
    return rows, removals, [file for file, (part, _) in zip(files, results, strict=True) if part]


def survey_part(
    scans: list[Scan], preparation: Preparation, quality: Quality, file: Path
) -> tuple[list[dict[str, Any]], list[Removal]]:
    """Measure some scans, in a Ray worker: their figures, and what the rules that look at one scan refuse."""
    rows: list[dict[str, Any]] = []
    removals: list[Removal] = []
    coarse: list[Any] = []
    for scan in scans:
        try:
            _, figures, small = read_scan(scan, preparation, quality)
        except BadScan as error:
            removals.append(Removal.of(scan, error))
            continue
        rows.append({"key": scan.key, **figures})
        coarse.append(small)
    if coarse:
        save_coarse(file, coarse)
    return rows, removals


class Table(NamedTuple):
    """A table of the report: on the terminal and on the page."""

    title: str
    head: list[str]
    rows: list[list[str]]


def tables(survey: Survey) -> list[Table]:
    """All tables of the report."""
    return [_overview(survey), _sites(survey), _rules(survey), _worst(survey), _removed(survey)]


def _overview(survey: Survey) -> Table:
    scans, grid = survey.scans, survey.grid
    age, kept = scans["age"].dropna(), int((scans["rule"] == "").sum())
    rows = [
        ["data set", survey.dataset + (" (simulated)" if survey.simulated else "")],
        ["scans", f"{len(scans)} of {_people(scans)} participants"],
        *([["data sets", _counts(scans["dataset"])]] if scans["dataset"].nunique() > 1 else []),
        ["kept by the rules", f"{kept}; {len(scans) - kept} left out"],
        ["age", f"{age.mean():.1f} ± {age.std(ddof=min(1, len(age) - 1)):.1f} years ({age.min():.0f} to {age.max():.0f}), "
                f"{int(scans['age'].isna().sum())} missing" if len(age) else "missing everywhere"],
        ["sex", _counts(scans["sex"])],
        ["sites", str(scans["site"].replace("", None).nunique())],
        ["grid", f"{' x '.join(map(str, grid.shape))} voxels of {' x '.join(f'{v:g}' for v in grid.spacing)} mm"],
    ]  # fmt: skip
    return Table("Cohort", ["", ""], rows)


def _people(scans: pd.DataFrame) -> int:
    """How many participants: two data sets may both have a sub-01."""
    return len(scans[["dataset", "participant_id"]].drop_duplicates())


def _counts(column: pd.Series[str]) -> str:
    return ", ".join(f"{name or 'missing'} {count}" for name, count in column.value_counts().items())


def _sites(survey: Survey) -> Table:
    rows = []
    for site, part in survey.scans.groupby("site", sort=False):
        women = (part["sex"] == "F").sum() / max(1, int((part["sex"] != "").sum()))
        rows.append((
            len(part), [str(site) or "missing", str(len(part)), str(_people(part)),
            f"{part['age'].mean():.1f}", f"{women:.0%}", str(int((part["rule"] != "").sum()))],
        ))  # fmt: skip
    rows.sort(key=lambda row: (-row[0], row[1]))
    title = "Sites" if len(rows) <= MOST_LINES else f"Sites: the {MOST_LINES} largest of {len(rows)}"
    head = ["site", "scans", "participants", "mean age", "female", "left out"]
    return Table(title, head, [row for _, row in rows[:MOST_LINES]])


# How each rule is set; those of `limits` follow; the others have no setting and always act.
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
        if name == "outlier" and quality.outlier.use and survey.verdict.middle is None:
            text += f"; not judged, fewer than {quality.outlier.least_scans} scans"
        rows.append([name, text, str(count.get(name, 0))])
    for name, limits in quality.limits.items():
        bounds = [
            f"{word} {value:g}" for word, value in (("min", limits.min), ("max", limits.max)) if value is not None
        ]
        rows.append([f"limits.{name}", ", ".join(bounds), str(count.get(f"limits.{name}", 0))])
    return Table("Rules", ["rule", "setting", "scans left out"], rows)


def _worst(survey: Survey) -> Table:
    rows = [
        [str(row.key), str(row.site), _number(row.age, ".0f"), _number(row.quality_correlation, ".4f"),
         _number(row.robust_z, ".1f"), str(row.rule) or "stays"]
        for row in survey.worst().itertuples()
    ]  # fmt: skip
    return Table(
        "Lowest correlation with the median scan", ["scan", "site", "age", "correlation", "robust z", "verdict"], rows
    )


def _removed(survey: Survey) -> Table:
    rows = [
        [each.key, each.rule, _number(each.figure, ".4g"), _number(each.threshold, ".4g"), each.reason]
        for each in survey.removals[:MOST_LINES]
    ]
    more = len(survey.removals) - len(rows)
    title = "Left out" if not more else f"Left out: {len(rows)} of {len(survey.removals)}, all in quarantine.tsv"
    return Table(title, ["scan", "rule", "figure", "threshold", "reason"], rows)


def _number(value: Any, form: str) -> str:
    return "" if value is None or value != value else format(float(value), form)
