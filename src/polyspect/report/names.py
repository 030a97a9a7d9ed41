"""How metrics are called, grouped, ordered and rounded wherever people read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

MISSING = "–"

_TITLES = {
    "i_auroc": ("image", "AUROC"),
    "i_ap": ("image", "AP"),
    "f1_max": ("image", "F1-max"),
    "p_auroc": ("pixel", "AUROC"),
    "p_ap": ("pixel", "AP"),
    "p_f1_max": ("pixel", "F1-max"),
}
_AUPRO = {"aupro": "exact", "aupro_sampled": "sampled"}
GROUPS = ("image", "pixel", "exact", "sampled", "other")
GROUP_TITLES = {
    "image": "Image level",
    "pixel": "Pixel level",
    "exact": "AUPRO, exact",
    "sampled": "AUPRO, sampled",
    "other": "Other",
}


@dataclass(frozen=True)
class Metric:
    """A metric as people read it.

    Attributes:
        key: Its name in `results.json`.
        group: One of `GROUPS`; exact and sampled AUPRO are different groups and never share a column.
        title: Name within the group: ``AUROC``, or the false-positive limit of an AUPRO.
    """

    key: str
    group: str
    title: str

    @property
    def full(self) -> str:
        """The name outside its group, for example ``I-AUROC`` or ``AUPRO exact, FPR to 0.3``."""
        if self.group in ("image", "pixel"):
            return self.title if self.key == "f1_max" else f"{self.group[0].upper()}-{self.title}"
        if self.group in _AUPRO.values():
            return f"AUPRO {self.group}, FPR to {self.title}"
        return self.title


def metric(key: str) -> Metric:
    """The metric stored under `key`; an unknown key is a metric of the group ``other`` under its own name."""
    name, _, limit = key.partition("@")
    if key in _TITLES:
        return Metric(key, *_TITLES[key])
    if name in _AUPRO and limit:
        return Metric(key, _AUPRO[name], limit)
    return Metric(key, "other", key)


def ordered(keys: Iterable[str]) -> list[Metric]:
    """The metrics of `keys`, each once: by group, AUPRO from the widest limit to the narrowest."""
    known = list(_TITLES)

    def place(item: Metric) -> tuple[int, float, str]:
        group = GROUPS.index(item.group)
        if item.key in known:
            return group, known.index(item.key), ""
        try:
            return group, -float(item.title), item.key
        except ValueError:
            return group, 0.0, item.key

    return sorted((metric(key) for key in set(keys)), key=place)


def number(value: float | None, digits: int = 3) -> str:
    """A metric with a fixed number of decimals, a dash where it is not defined."""
    return MISSING if value is None else f"{value:.{digits}f}"


def interval(bounds: Sequence[float] | None) -> str:
    """``0.912 to 0.987``, a dash where there is none."""
    if bounds is None or any(bound is None for bound in bounds):
        return MISSING
    return f"{bounds[0]:.3f} to {bounds[1]:.3f}"


def short(value: float | None) -> str:
    """A raw score or threshold in four significant digits, without needless zeros."""
    return MISSING if value is None else f"{value:.4g}"


def percent(value: float) -> str:
    """A share in per cent, as many decimals as it needs: ``1 %``, ``0.5 %``."""
    return f"{100 * value:.3g} %"


def count(many: int, one: str, several: str | None = None) -> str:
    """``1 part``, ``2 parts``."""
    return f"{many} {one if many == 1 else several or one + 's'}"


def defined(metrics: Mapping[str, float | None]) -> bool:
    """Whether any of the metrics has a value."""
    return any(value is not None for value in metrics.values())
