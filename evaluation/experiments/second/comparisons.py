"""The comparisons that docs/experiments_2.md names beforehand, and the names of methods and features in tables and plots."""

from __future__ import annotations

from typing import NamedTuple

from evaluation.experiments.second.plan import AUTO, NETWORK_METHODS, VOXEL_METHODS, WHOLE


class Method(NamedTuple):
    """A method with one kind of features."""

    method: str
    features: str = WHOLE

    @property
    def title(self) -> str:
        """What tables and plots call it."""
        name = METHOD_TITLES[self.method]
        return name if self.features == WHOLE else f"{name}, {FEATURE_TITLES[self.features]}"


METHOD_TITLES = {
    "y-aware": "y-aware", "simclr": "SimCLR", "age-regression": "age regression", "random": "random encoder",
    "y-aware-dense": "y-aware + dense", "y-aware-reconstruction": "y-aware + reconstruction", "voxels": "voxels",
    "voxels-brain-age": "voxels + brain-age score", "brain-age": "brain-age score", "fine-tuned": "y-aware, fine-tuned",
    "scratch": "from scratch",
}  # fmt: skip
FEATURE_TITLES = {
    "pooled": "pooled", "spatial": "spatial", "readout": "spatial + readout", AUTO: "chosen on inner folds",
    "default": "default of evaluate",
}  # fmt: skip
ENCODERS = ("y-aware", "simclr", "age-regression", "random", "y-aware-dense", "y-aware-reconstruction")
# Every method of the tables, in their order.
ALL = (
    Method("y-aware", "readout"), Method("y-aware", "spatial"), Method("y-aware", "pooled"), Method("y-aware", AUTO),
    Method("y-aware", "default"),
    *(Method(name, features) for name in ENCODERS[1:] for features in ("readout", "spatial", "pooled", "default")),
    *map(Method, VOXEL_METHODS), *map(Method, NETWORK_METHODS),
)  # fmt: skip
TESTED = Method("y-aware", "readout")
# TESTED minus each of these, for every disease and training size at the middle level: Holm's correction is over all rows.
# The numbers are the hopes: in how many of the four cells TESTED is above, and in how many of them that is found
# (0: nothing was said).
PRIMARY = {
    Method("voxels-brain-age"): (3, 2), Method("simclr", "readout"): (4, 2), Method("age-regression", "readout"): (4, 2),
    Method("random", "readout"): (4, 0),
}  # fmt: skip
# First minus second, at the middle level, without correction.
SECONDARY = (
    *((TESTED, other) for other in (Method("voxels"), Method("brain-age"), *map(Method, NETWORK_METHODS))),
    *((TESTED, Method(f"y-aware-{term}", "readout")) for term in ("dense", "reconstruction")),
    (TESTED, Method("y-aware", "spatial")), (Method("y-aware", "spatial"), Method("y-aware", "pooled")),
    (Method("y-aware", AUTO), Method("y-aware", "spatial")), (Method("y-aware", "default"), Method("y-aware", "pooled")),
    (Method("y-aware", "default"), TESTED), (Method("voxels-brain-age"), Method("voxels")),
    *((Method("y-aware", features), Method(name, features)) for features in ("spatial", "pooled")
      for name in ("simclr", "age-regression", "random")),
)  # fmt: skip
# Methods of the plot over the levels.
CURVES = (
    TESTED, Method("simclr", "readout"), Method("age-regression", "readout"), Method("random", "readout"),
    Method("y-aware", "pooled"), Method("voxels-brain-age"), Method("brain-age"),
)  # fmt: skip
