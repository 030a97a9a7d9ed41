"""Crossmodal feature mapping (CFM): two small networks predict each modality's features from the other's.

Costanzino et al., "Multimodal Industrial Anomaly Detection by Crossmodal Feature Mapping" (CVPR 2024). f_rgb(p) and
f_xyz(p) are the frozen features of pixel p, V the pixels whose point features are not zero:

    g_xyz = M_xyz(f_rgb),  g_rgb = M_rgb(f_xyz)                three linear layers with GELU between, pixel by pixel
    loss  = 1 - mean over V of cos(g_xyz, f_xyz)  +  1 - mean over V of cos(g_rgb, f_rgb)                           (1)
    d_xyz = |g_xyz / |g_xyz| - f_xyz / |f_xyz||,  d_rgb likewise: in [0, 2]; 0 outside V                            (2)
    b     = blur(d_rgb d_xyz)                                                                                       (3)
    map   = b / sqrt(mu),  score = max b / sqrt(mu),  mu the mean of b where b is not 0                             (4)

The equations are numbered here. They were read in the method's program, since the paper's text was not at hand; the
parts of the switches `fusion`, `blur` (beside ``boxes``), `normalise` and `mask_background` that the program lacks are
ours. Features of pixels are never built for a whole image: the networks' first layers are linear and commute with
interpolation, so they see the few tokens and point groups, and only pixels in V are interpolated and mapped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones.point_transformer import Statistics
from ..backbones.points import DEFAULT_POINT_BACKBONE
from ..errors import WeightsError
from ..geometry.interpolation import LinearMap
from ..layers.feature_mapping import FeatureMapping, mapping_loss
from ..layers.maps import gaussian_smooth
from ..layers.rgb_points import PAPER_EXTRACTOR, build_extractor, measured_patches, point_pixels, rgb_pixels
from ..samples import Batch, Features, Prediction
from ..weights.cross_modal import feature_mapping_state, feature_mapping_widths
from ..weights.official import checkpoint_source, read_network
from .contract import Detector, Stage, require, require_grid, seeded
from .recipe import check_recipe, train

_require = partial(require, "CFM")
Fusion = Literal["product", "sum", "max", "d2", "d3"]
Blur = Literal["boxes", "gaussian", "none"]
Normalise = Literal["score", "aupro", "pauroc", "none"]

HIDDEN_LAYERS = {"base": 1, "big": 5}
POINT_LAYERS = {12: (3, 7, 11), 8: (1, 4, 7), 4: (1, 2, 3)}  # by blocks kept; otherwise the last one alone
_CHUNK = 4096  # pixels mapped at a time: 100 MB of intermediate values at the paper's widths


@dataclass(frozen=True, kw_only=True)
class CFMConfig:
    """Settings of `CFM`: the released program's, but for backbones whose weights need no download."""

    backbone: str = "efficientnet_lite0"  # timm name of the RGB network; the paper's DINO ViT-B/8: see preset `paper`
    weights: str = "auto"  # where its weights come from: see `ImageBackbone`
    reductions: tuple[int, ...] = (8, 16)  # pixels per cell of the stages that are joined; ViT-B/8: 8
    point_backbone: str = DEFAULT_POINT_BACKBONE  # network of the cloud: see `PointBackbone`
    point_weights: str = "auto"  # where its weights come from
    point_layers: tuple[int, ...] | None = None  # blocks whose outputs are joined; None: by `blocks_kept`, or its own
    groups: int = 1024  # point groups per part
    group_size: int = 128  # points per group
    statistics: Statistics = "cloud"  # of the point network's norms: each cloud's, or the stored ones
    released_sampling: bool = False  # leave points within 3 cm of the origin out of the centres, as the CUDA sampler
    blocks_kept: int | None = None  # first blocks of both transformers that are kept: 12, 8, 4, other; None: all
    mapper: Literal["base", "big"] = "base"  # one or five hidden layers; big: Eyecandies
    checkpoint: tuple[str, ...] | None = None  # the two trained networks' files, in any order; trains none
    epochs: int = 50  # passes over the training parts; the released weights: 250
    batch_size: int = 4  # parts per step; the program's for Eyecandies: 2
    learning_rate: float = 1e-3  # of Adam
    betas: tuple[float, float] = (0.9, 0.999)  # of Adam
    lr_decay: float = 1.0  # the learning rate is multiplied by it after each epoch; 1 is none
    pixels_per_part: int | None = 256  # pixels of V that a step learns from, per part on average; None: all
    fusion: Fusion = "product"  # of the two distances; d2: that of the RGB features alone, d3: of the point features
    blur: Blur = "boxes"  # five box means of 5x5 and three of 7x7, beyond the border 0; or a Gaussian, mirrored
    blur_sigma: float = 4.690416  # pixels, of the Gaussian; the default is as wide as the boxes
    normalise: Normalise = "score"  # the map: b / sqrt(mu); b / mu (aupro), b / root of its mean (pauroc), or b
    mask_background: bool = True  # only pixels in V are learned and scored; False: all
    seed: int = 0  # of the mapping networks' first weights and the drawn pixels; of random backbones

    def __post_init__(self) -> None:
        check_recipe("CFM", self)
        for field in ("blocks_kept", "pixels_per_part"):
            value = getattr(self, field)
            _require(value is None or value >= 1, field, "at least 1, or null", value)
        _require(self.blur_sigma >= 0, "blur_sigma", "0 or more pixels", self.blur_sigma)
        cut = self.blocks_kept is None or self.point_layers is None or max(self.point_layers) < self.blocks_kept
        _require(cut, "point_layers", f"below `blocks_kept`, {self.blocks_kept}", self.point_layers)
        pair = self.checkpoint is None or len(self.checkpoint) == 2
        _require(pair, "checkpoint", "two files, one per direction, or null", self.checkpoint)
        choices = {"mapper": tuple(HIDDEN_LAYERS), "fusion": get_args(Fusion), "blur": get_args(Blur)}
        choices |= {"normalise": get_args(Normalise), "statistics": get_args(Statistics)}
        for field, known in choices.items():
            _require(getattr(self, field) in known, field, f"one of {', '.join(known)}", getattr(self, field))

    @property
    def modalities(self) -> tuple[str, ...]:
        """The views, both of them needed."""
        return ("rgb", "xyz")

    @property
    def layers(self) -> tuple[int, ...] | None:
        """Blocks of the point network whose outputs are joined; None: the network's own."""
        if self.point_layers is not None or self.blocks_kept is None:
            return self.point_layers
        return POINT_LAYERS.get(self.blocks_kept, (self.blocks_kept - 1,))


class CFM(Detector):
    """Score a pixel by how badly each modality's features predict the other's.

    Features: those of `RGBPoints`. Branch maps are the blurred distances d_rgb and d_xyz (Eq. 2), not normalised. A
    part without any point has a map of 0 and the score 0, if `mask_background`.
    """

    Config = CFMConfig
    PRESETS = {
        "paper": {
            **PAPER_EXTRACTOR,
            "released_sampling": True,
            "blocks_kept": 12,
            "pixels_per_part": None,
        },
        "fast": {"groups": 512, "group_size": 64, "epochs": 20},
    }
    PREPARATION = {"": "cloud", "fast": "cloud", "paper": "cfm"}
    frozen = ("extractor",)

    def __init__(self, config: CFMConfig, *, pretrained: bool = True) -> None:
        super().__init__(config)
        c = config
        sampling = c.released_sampling
        self.extractor = build_extractor(
            c, c.layers, pretrained=pretrained, blocks=c.blocks_kept, released_sampling=sampling
        )
        self.sources |= self.extractor.sources
        rgb, xyz = (self.extractor.channels[name] for name in ("rgb", "xyz"))
        hidden = HIDDEN_LAYERS[c.mapper]
        with seeded(c.seed):
            self.mapping = nn.ModuleDict(  # by the modality that is predicted
                {"xyz": FeatureMapping(rgb, xyz, hidden), "rgb": FeatureMapping(xyz, rgb, hidden)}
            )
        if c.checkpoint is not None and pretrained:
            self._load_mapping(c.checkpoint)

    # -- the contract ------------------------------------------------------------------------------------------------

    def extract(self, batch: Batch) -> Features:
        """Tokens of RGB, features of point groups, and which groups each pixel listens to.

        Raises:
            ShapeError: height or width is not a multiple of the coarsest grid cell, or smaller than two of them.
        """
        require_grid("CFM", batch, max(self.config.reductions))
        return self.extractor(batch)

    def extraction_settings(self) -> dict[str, Any]:
        """Those of the extractor alone, which other methods share."""
        return self.extractor.settings(self.modalities)

    def stages(self) -> Sequence[Stage]:
        """Train both mapping networks; none with a `checkpoint`."""
        if self.config.checkpoint is not None:
            return []
        return [train("mapping", self.config, self.mapping.parameters, self.loss)]

    def loss(self, features: Features) -> dict[str, Tensor]:
        """The two terms of Eq. 1 over the pixels that are drawn from all of the batch's.

        Raises:
            DataError: no part of the batch has a point.
        """
        pairs: dict[str, list[tuple[Tensor, Tensor]]] = {"xyz": [], "rgb": []}
        for part, pixels in self._drawn(features):
            for name, (mapped, observed) in next(self._mapped(features, part, [pixels])).items():
                pairs[name].append((mapped, observed))
        terms = {}
        for name, found in pairs.items():
            empty = features["xyz.groups"].new_zeros(0, 1)
            mapped, observed = (torch.cat(side) for side in zip(*found)) if found else (empty, empty)
            terms[name] = mapping_loss(mapped, observed)
        return terms

    def score(self, features: Features) -> Prediction:
        """Distances of the pixels in V, then Eqs. 3 and 4."""
        valid = features["valid"]
        distances = {name: features["xyz.share"].new_zeros(valid.shape).flatten(1) for name in ("rgb", "xyz")}
        inside = self._inside(features)
        for part in range(len(valid)):
            chunks = inside[part].nonzero()[:, 0].split(_CHUNK)
            for pixels, pairs in zip(chunks, self._mapped(features, part, chunks)):
                for name, (mapped, observed) in pairs.items():
                    distances[name][part, pixels] = direction_distance(mapped, observed)
        return self.judge(distances["rgb"].view(valid.shape), distances["xyz"].view(valid.shape))

    def judge(self, d_rgb: Tensor, d_xyz: Tensor) -> Prediction:
        """Map and score (Eqs. 3 and 4) of distances (B, H, W).

        The score is max b / sqrt(mu) whatever map `normalise` chooses, but max b with ``"none"``.
        """
        c = self.config
        blurred = self._blur(fuse(d_rgb, d_xyz, c.fusion))
        scored = normalise_maps(blurred, "none" if c.normalise == "none" else "score")
        maps = scored if c.normalise == "score" else normalise_maps(blurred, c.normalise)
        branches = {"rgb": self._blur(d_rgb), "xyz": self._blur(d_xyz)}
        return Prediction(score=scored.flatten(1).amax(1), map=maps, branch_maps=branches)

    # -- pixels ------------------------------------------------------------------------------------------------------

    def _inside(self, features: Features) -> Tensor:
        """V, (B, H*W) bool: pixels with a point in a window around them; all pixels without `mask_background`."""
        height, width = features["valid"].shape[-2:]
        inside = measured_patches(features, (height, width))
        return inside if self.config.mask_background else torch.ones_like(inside)

    def _drawn(self, features: Features) -> Iterator[tuple[int, Tensor]]:
        """The parts of a batch that have pixels to learn from, and these pixels (P,).

        They are drawn from the pixels of the whole batch, so that every pixel weighs the same, as in Eq. 1. Seeded by
        the detector, the epoch (the engine's seed of it) and the parts, in place of a state that would have to be kept.
        """
        rows = self._inside(features).nonzero()  # (M, 2): part, pixel
        if self.config.pixels_per_part is not None:
            wanted = self.config.pixels_per_part * len(features["valid"])
            parts = int(features["xyz.near"].sum())
            digest = hashlib.sha256(f"{self.config.seed} {torch.initial_seed()} {parts}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            chosen = torch.randperm(len(rows), generator=generator)[:wanted].sort().values
            rows = rows[chosen.to(rows.device)]
        for part in range(len(features["valid"])):
            pixels = rows[rows[:, 0] == part, 1]
            if len(pixels):
                yield part, pixels

    def _mapped(
        self, features: Features, part: int, chunks: Sequence[Tensor]
    ) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """For each chunk of one part's pixels (P,) and each modality the mapped and the observed features (P, C)."""
        cells = {"rgb": features["rgb.grid"][part].flatten(1).T, "xyz": features["xyz.groups"][part]}
        many = sum(len(pixels) for pixels in chunks)
        sources = {"xyz": "rgb", "rgb": "xyz"}
        lifted = {  # with few pixels it is less work to interpolate first
            name: self._network(name).lift(cells[source])
            for name, source in sources.items()
            if many > len(cells[source])
        }
        for pixels in chunks:
            to_pixels = {"rgb": rgb_pixels(features, pixels), "xyz": point_pixels(features, part, pixels)}
            observed = {name: _apply(to_pixels[name], own) for name, own in cells.items()}
            pairs = {}
            for name, source in sources.items():
                network = self._network(name)
                if name in lifted:
                    mapped = network.finish(_apply(to_pixels[source], lifted[name]))
                else:
                    mapped = network(observed[source])
                pairs[name] = mapped, observed[name]
            yield pairs

    def _network(self, name: str) -> FeatureMapping:
        """The network that predicts the features of modality `name`."""
        network = self.mapping[name]
        assert isinstance(network, FeatureMapping)
        return network

    def _blur(self, maps: Tensor) -> Tensor:
        if self.config.blur == "boxes":
            return blur_boxes(maps)
        return gaussian_smooth(maps, self.config.blur_sigma) if self.config.blur == "gaussian" else maps

    def _load_mapping(self, files: Sequence[str]) -> None:
        """Take trained networks from two files, whichever direction each is of; 2Dto3D first where shapes are equal."""
        widths = {}
        for name in self.mapping:
            network = self._network(name)
            widths[name] = network.input.in_features, network.output.out_features
        loaded: dict[str, str] = {}
        for file in files:
            content, origin = read_network(file, "cfm"), f"checkpoint '{file}'"
            found = feature_mapping_widths(content, origin)
            fitting = [name for name in widths if widths[name] == found]
            if not fitting:
                expected = " and ".join(f"{a} to {b}" for a, b in widths.values())
                raise WeightsError(
                    f"{origin} maps {found[0]} channels to {found[1]}, this detector's networks {expected}: choose the "
                    f"backbones, `point_layers` and `blocks_kept` that it was trained with"
                )
            name = next((name for name in fitting if name not in loaded), "")
            if not name:
                raise WeightsError(f"{origin} and '{loaded[fitting[0]]}' map in the same direction: give one of each")
            state = feature_mapping_state(content, self.mapping[name], f"{origin} (for `mapper` {self.config.mapper})")
            self.mapping[name].load_state_dict(state)
            self.sources[f"mapping.{name}"] = checkpoint_source(file)
            loaded[name] = file


def direction_distance(mapped: Tensor, observed: Tensor) -> Tensor:
    """Euclidean distance of the directions of features (..., C), Eq. 2: (...), sqrt(2 - 2 cos), from 0 to 2."""
    return (F.normalize(mapped.float(), dim=-1) - F.normalize(observed.float(), dim=-1)).norm(dim=-1)


def fuse(d_rgb: Tensor, d_xyz: Tensor, rule: Fusion) -> Tensor:
    """One distance from two, of any equal shape: their product (0..4), sum (0..4), maximum, or one of them (0..2)."""
    if rule == "product":
        return d_rgb * d_xyz
    if rule == "sum":
        return d_rgb + d_xyz
    if rule == "max":
        return torch.maximum(d_rgb, d_xyz)
    return d_rgb if rule == "d2" else d_xyz


def blur_boxes(maps: Tensor) -> Tensor:
    """Five means over 5 x 5 and three over 7 x 7 pixels, with zeros around the map each time: (..., H, W).

    In the interior a bell of standard deviation sqrt(22) = 4.69 pixels over 39 x 39 pixels. All eight are one banded
    matrix per axis, their cuts at the border included.
    """
    rows, columns = (_box_matrix(n).to(maps) for n in maps.shape[-2:])
    return rows @ maps @ columns.T


@lru_cache(maxsize=8)
def _box_matrix(n: int) -> Tensor:
    """(n, n) float64: what the eight means do along an axis."""
    apart = (torch.arange(n)[:, None] - torch.arange(n)).abs()
    five, seven = ((apart <= side // 2).double() / side for side in (5, 7))
    return torch.linalg.matrix_power(seven, 3) @ torch.linalg.matrix_power(five, 5)


def normalise_maps(blurred: Tensor, how: Normalise) -> Tensor:
    """Divide each map (B, H, W), nonnegative, by what the released program does for one of its figures.

    ``"score"``: the root of the mean of its values that are not 0 (image score); ``"aupro"``: that mean;
    ``"pauroc"``: the root of the mean of all values; ``"none"``: nothing. A map of zeros stays one.
    """
    if how == "none":
        return blurred
    total = blurred.sum((1, 2), dtype=torch.float64)
    count = blurred[0].numel() if how == "pauroc" else (blurred != 0).sum((1, 2)).clamp(min=1)
    mean = total / count
    divisor = torch.where(total > 0, mean if how == "aupro" else mean.sqrt(), torch.ones_like(mean))
    return blurred / divisor.to(blurred.dtype)[:, None, None]


def _apply(linear: LinearMap, cells: Tensor) -> Tensor:
    """Map the features (G, C) of one part's cells to pixels (P, C)."""
    return linear.apply(cells.contiguous()[None])[0]
