"""A protocol together with its options, as MLflow tags and as a label for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# As a layer: own features and spatial ones, the default of linear models. It was "joint" while the spatial ones came from
# another block; evaluations of then and now are not paired.
JOINT = "own+spatial"
BY_DEFAULT = "default"  # of readouts that nobody asked for: free, but none in multiclass tasks

GIVEN = ("table", "adapter")  # what else than the protocol's own kind is evaluated: features of others


@dataclass(frozen=True)
class ProtocolVariant:
    """The protocol of one evaluation run: two runs with equal variants were evaluated in the same way.

    ``model`` names what is fitted; protocols that fit the same model share it (``paper`` and ``linear``).
    ``evaluates`` is ``checkpoint``, ``architecture`` or ``shards`` (see ``protocols.Protocol``); for features of others it is
    ``table`` or ``adapter``. ``layer`` is the block whose output was pooled by ``pooling``: empty for the encoder's own
    features, ``own+spatial`` for these and spatial ones, ``end`` for its last map, ``auto`` if block, pooling and scale were
    chosen on inner folds. ``scale`` is ``all`` if all features have one scale, and empty otherwise.
    ``readouts`` is ``default``, ``free`` or ``penalised`` if predicted proxies were given to the model, and empty otherwise.
    """

    protocol: str = ""
    model: str = ""
    evaluates: str = "checkpoint"
    leave_site_out: bool = False
    layer: str = ""
    pooling: tuple[str, ...] = ()
    scale: str = ""
    readouts: str = ""

    def to_tags(self) -> dict[str, str]:
        """Return the MLflow tags of the variant; ``from_tags`` reads them."""
        return {
            "yaware.protocol": self.protocol, "yaware.model": self.model, "yaware.evaluates": self.evaluates,
            "yaware.leave_site_out": str(self.leave_site_out), "yaware.layer": self.layer,
            "yaware.pooling": ",".join(self.pooling), "yaware.scale": self.scale,
            "yaware.readouts": self.readouts,
        }  # fmt: skip

    @classmethod
    def from_tags(cls, tags: Mapping[str, str]) -> ProtocolVariant:
        """Read a variant from the tags of an MLflow run; missing tags take the defaults."""
        return cls(
            tags.get("yaware.protocol", ""), tags.get("yaware.model", ""), tags.get("yaware.evaluates", "checkpoint"),
            tags.get("yaware.leave_site_out") == "True", tags.get("yaware.layer", ""),
            tuple(name for name in tags.get("yaware.pooling", "").split(",") if name), scale=tags.get("yaware.scale", ""),
            readouts=tags.get("yaware.readouts", ""),
        )  # fmt: skip

    @property
    def is_baseline(self) -> bool:
        """Whether it is a baseline by its protocol: voxels, or a network trained from random weights."""
        return self.evaluates in ("architecture", "shards")

    @property
    def is_given(self) -> bool:
        """Whether features of others were evaluated: a table, or an adapter of an encoder."""
        return self.evaluates in GIVEN

    @property
    def fitted(self) -> tuple[str, str, tuple[str, ...], str, str]:
        """Model, layer, pooling, scale, readouts: equal if the same model was fitted to the same input; folds may differ."""
        return self.model or self.protocol, self.layer, self.pooling, self.scale, self.readouts

    @property
    def options(self) -> list[str]:
        """Return the options that differ from the defaults, as text for people."""
        layer = [f"{self.layer} {'+'.join(self.pooling)}".strip()] if self.layer not in ("", JOINT) else []
        if not self.layer and self.model == "linear" and self.evaluates == "checkpoint":
            layer = ["own features"]
        readouts = [f"{self.readouts} readouts".removeprefix(f"{BY_DEFAULT} ")] if self.readouts else []
        return layer + ["one scale"] * (self.scale == "all") + readouts + ["sites left out"] * self.leave_site_out

    def beyond_paper(self, beside: Sequence[str] | None) -> list[str]:
        """Return what this evaluation of a task does and that of the y-Aware paper did not, as text; empty: nothing.

        The paper fits a linear model to the encoder's own features alone, with all sites in training and test folds.

        Args:
            beside: columns of the task's covariates and confounds; None: unknown, since an earlier version wrote it.
        """
        kinds = {"checkpoint": "", "table": "features of others", "adapter": "features of others"}
        is_linear = self.fitted[0] in ("linear", "paper")
        parts = [kinds.get(self.evaluates, "no pretrained encoder"), "" if is_linear else self.protocol]
        if self.layer:
            named = {JOINT: "spatial features", "auto": "features chosen on inner folds"}
            parts.append(named.get(self.layer, f"{self.layer} {'+'.join(self.pooling)}"))
        parts += ["one scale"] * (self.scale == "all") + ["readouts"] * bool(self.readouts)
        parts += ["sites left out"] * self.leave_site_out
        parts += ["unknown covariates"] if beside is None else beside
        return [part for part in parts if part]

    @property
    def label(self) -> str:
        """Return the protocol's name and its options, for example ``knn, layer2 mean+std, sites left out``."""
        return ", ".join([self.protocol, *self.options]) if self.protocol else ""


def unlike_published(evaluations: Sequence[Sequence[str]]) -> str:
    """Return what sets evaluations apart from that of the paper, as text; empty if one of them is made in the paper's way.

    ``evaluations`` holds what `ProtocolVariant.beyond_paper` returns for each; the text is that of the least different one.
    """
    by_size = sorted(evaluations, key=len)
    return ", ".join(by_size[0]) if by_size else "no pretrained encoder"
