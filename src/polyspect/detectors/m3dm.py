"""M3DM: memory banks of points, of RGB and of both fused, joined by a decision layer learned from good parts.

Wang et al., "Multimodal Industrial Anomaly Detection via Hybrid Fusion" (CVPR 2023). For patch p of a part:

    x_p   features of the point groups, interpolated to the pixels and averaged over the patch      Eq. 1, Sec. 3.2
    r_p   tokens of the image network, repeated on the points' finer grid
    f_p = [MLP_xyz(LN x_p), MLP_rgb(LN r_p)]      trained so that the halves find each other        Eqs. 2-3, UFF
    M_b   bank of b: a coreset of the x_p ("xyz"), r_p ("rgb") or f_p ("fused") of the training parts, normalised
    d_bp = min over k of |p - M_bk|,   s_b = w_b d_b of the part's worst patch                      Eqs. 6-8
    a_b  = blur(up(d_b))
    s    = w . (lambda_b s_b),  w a linear one-class SVM on the rows (lambda_b s_b) of training parts      Eq. 4, DLF
    map  = v . (lambda_b a_b),  v another one on the rows (lambda_b a_b) of their pixels                   Eq. 5, DLF

Branch maps are the banks' shares v_b lambda_b a_b, which add up to the map. Eqs. 1 to 3 are misprinted; what is done
follows the released program (`docs/methods/m3dm.md`), whose slips are settings, all of them in the preset ``released``.
Differs from paper and program by: UFF is trained per category; patches without a point stay out of the banks, and their
pixels out of the second SVM's rows (`mask_invalid`); no part of the network is random at test time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..backbones.point_transformer import Statistics
from ..backbones.points import DEFAULT_POINT_BACKBONE
from ..errors import ShapeError
from ..layers.decision import DecisionLayer
from ..layers.feature_fusion import FeatureFusion
from ..layers.joined_banks import PAPER, Banks, Decisions, ImageScore, Patches
from ..layers.memory import MemoryBank, Reweighting
from ..layers.rgb_points import PAPER_EXTRACTOR, build_extractor, measured_patches, point_patches, rgb_patches
from ..layers.smoothing import Blur
from ..samples import Batch, Features, Prediction
from ..weights.cross_modal import feature_fusion_state
from ..weights.official import checkpoint_source, read_network
from .contract import Detector, Observe, Optimise, Stage, require, seeded

_require = partial(require, "M3DM")
Bank = Literal["xyz", "rgb", "fused"]
Grid = tuple[int, int]

RELEASED_UPDATES = 30  # of UFF in the released program: 10 per epoch, the rest of an epoch's gradients is thrown away
_RELEASED_MICRO = 166  # batches of 16 parts in its 2656 training parts, 16 of them to an update


@dataclass(frozen=True, kw_only=True)
class M3DMConfig:
    """Settings of `M3DM`; the paper's, but for backbones whose weights need no download and a bound on the banks."""

    banks: tuple[Bank, ...] = ("xyz", "rgb", "fused")  # Tab. 4; one alone needs no decision layer
    backbone: str = "efficientnet_lite0"  # timm name of the RGB network; the paper's DINO ViT-B/8: see preset `paper`
    weights: str = "auto"  # where its weights come from: see `ImageBackbone`
    reductions: tuple[int, ...] = (8, 16)  # pixels per cell of the stages that are joined; ViT-B/8: 8
    point_backbone: str = DEFAULT_POINT_BACKBONE  # network of the cloud: see `PointBackbone`
    point_weights: str = "auto"  # where its weights come from
    point_layers: tuple[int, ...] | None = None  # blocks whose outputs are joined; None: the network's own
    groups: int = 1024  # point groups per part, Tab. 5
    group_size: int = 128  # points per group, Tab. 5
    statistics: Statistics = "cloud"  # of the point network's norms: each cloud's, or the stored ones
    released_sampling: bool = False  # leave points within 3 cm of the origin out of the centres, as the CUDA sampler
    patch: int | Literal["groups"] = 4  # pixels per side of a point patch, Tab. 5 (at 224: 4 is 56x56); or whole groups
    mask_invalid: bool = True  # patches without any point: out of xyz and fused banks and rows, and scored as average
    xyz_parts: int | None = None  # only the first so many training parts fill the xyz and fused banks; None: all
    # feature fusion
    uff: bool = True  # Tab. 4; False: x_p and r_p side by side
    uff_checkpoint: str | None = None  # M3DM's trained file, used as it is; trains none
    uff_steps: int = 750  # updates
    uff_warmup: int = 250  # of them while the learning rate rises; then it falls as half a cosine
    uff_schedule: Literal["steps", "released"] = "steps"  # released: the rates of the program's 30 updates
    uff_batch: int = 16  # parts per update
    uff_contrast: int | None = None  # parts whose patches are told apart together; None: all of the batch
    uff_patches: int | None = 1024  # most patches that are told apart together, drawn at random; None: all
    uff_pairs: Literal["aligned", "released"] = "aligned"  # released: x_p with the r of another place, a slip
    uff_rate: float = 0.003  # learning rate of AdamW
    uff_betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    uff_decay: float = 0.01  # weight decay of AdamW
    # memory banks
    bank_stats: Literal["own", "released", "none"] = "own"  # normalise by: own mean and std; xyz's mean and rgb's std
    ratio_xyz: float = 0.1  # share of the patches that the bank keeps, above 0, at most 1
    ratio_rgb: float = 0.1
    ratio_fused: float = 0.1
    coreset_sizes: Literal["share", "released"] = "share"  # released: rgb, fused: their share of the finished xyz bank
    coreset_eps: float = 0.9  # distortion of the random projection in which the coreset is chosen, between 0 and 1
    bank_limit: int | None = 4_000  # most patches that a bank keeps; bounds the time per part; None: no limit
    remove_zero_rows: bool = False  # xyz bank: rows that hold a 0 go, one row of zeros comes (of normalised values)
    max_gib: float = 2.0  # most memory for collected patches, per bank, and rows; beyond it a random sample of them
    # scores
    reweight: Reweighting = "btf"  # w of the worst patch: without or with its match, or w = 1
    reweight_k: int = 3  # bank patches around the match that w looks at, the match included
    reweight_guard: float = 0.0  # added to the sum in w; the program's classes of rgb alone and xyz alone: 1e-5
    reweight_divisor: float = 1.0  # of distances in w and s; the program's class of two banks: 1000
    blur: Blur = "gaussian"  # of the maps; pil: the 8-bit blur of the program
    blur_sigma: float = 4.0  # pixels
    fusion: Literal["dlf", "sum"] = "dlf"  # of the banks, Tab. 4; sum: without factors
    dlf_solver: Literal["exact", "sgd"] = "exact"  # sgd: as the program, needs scikit-learn
    nu: float = 0.5  # share of the rows that the SVMs rest on, the lowest ones
    lambda_xyz: float | None = None  # factor before the SVMs, counts about squared; None: all banks weigh alike
    lambda_rgb: float | None = None
    lambda_fused: float | None = None
    image_score: ImageScore = "top_mean"  # Eq. 4, or of the map
    top_share: float = 0.01  # top_mean: share of the map's pixels, the largest ones, whose mean is the image score
    seed: int = 0  # of UFF's first weights, projections and samples; of random backbones

    def __post_init__(self) -> None:
        _require(len(self.banks) >= 1, "banks", "one or more names", self.banks)
        _require(set(self.banks) <= set(get_args(Bank)), "banks", f"names out of {get_args(Bank)}", self.banks)
        _require(len(set(self.banks)) == len(self.banks), "banks", "different names", self.banks)
        whole = self.patch != "groups"
        _require(not whole or cast(int, self.patch) >= 1, "patch", "at least 1 pixel, or 'groups'", self.patch)
        _require(whole or "fused" not in self.banks, "patch", "a number of pixels with a fused bank", self.patch)
        at_least_1 = ("xyz_parts", "uff_steps", "uff_batch", "uff_contrast", "bank_limit", "reweight_k")
        for field in at_least_1:
            value = getattr(self, field)
            _require(value is None or value >= 1, field, "at least 1", value)
        few = self.uff_patches is None or self.uff_patches >= 2
        _require(few, "uff_patches", "at least 2, or null", self.uff_patches)
        _require(0 <= self.uff_warmup <= self.uff_steps, "uff_warmup", "0 to `uff_steps`", self.uff_warmup)
        as_released = self.uff_schedule == "steps" or self.uff_steps == RELEASED_UPDATES
        _require(as_released, "uff_steps", f"{RELEASED_UPDATES} with `uff_schedule` 'released'", self.uff_steps)
        for field in ("uff_rate", "max_gib", "reweight_divisor"):
            _require(getattr(self, field) > 0, field, "above 0", getattr(self, field))
        betas = len(self.uff_betas) == 2 and all(0 <= beta < 1 for beta in self.uff_betas)
        _require(betas, "uff_betas", "two numbers in [0, 1)", self.uff_betas)
        for field in ("uff_decay", "reweight_guard", "blur_sigma", "lambda_xyz", "lambda_rgb", "lambda_fused"):
            value = getattr(self, field)
            _require(value is None or value >= 0, field, "0 or more", value)
        for field in ("ratio_xyz", "ratio_rgb", "ratio_fused", "nu", "top_share"):
            _require(0 < getattr(self, field) <= 1, field, "above 0 and at most 1", getattr(self, field))
        _require(0 < self.coreset_eps < 1, "coreset_eps", "between 0 and 1", self.coreset_eps)
        shared = len(self.banks) == 1 or {"xyz", "rgb"} <= set(self.banks)
        own = shared or self.bank_stats != "released"
        _require(own, "bank_stats", "'own' or 'none' with other two banks than xyz and rgb", self.bank_stats)
        sized = self.coreset_sizes == "share" or len(self.banks) == 1 or "xyz" in self.banks
        _require(sized, "coreset_sizes", "'share' for several banks without xyz", self.coreset_sizes)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The views that `banks` are made of."""
        return tuple(name for name in ("rgb", "xyz") if {name, "fused"} & set(self.banks))

    @property
    def learns_fusion(self) -> bool:
        """Whether feature fusion is trained: `uff` with a fused bank and without a checkpoint."""
        return self.uff and "fused" in self.banks and self.uff_checkpoint is None

    @property
    def decides(self) -> bool:
        """Whether a decision layer joins the banks: ``fusion`` is ``dlf`` and there is more than one."""
        return self.fusion == "dlf" and len(self.banks) > 1


class M3DM(Detector):
    """Score patches by their distance to those of good parts in up to three banks, and weigh the banks.

    Features: those of `RGBPoints`. Branch maps: each bank's share in the map.
    """

    Config = M3DMConfig
    PRESETS = {
        "paper": {
            **PAPER_EXTRACTOR,
            **PAPER,
            "lambda_fused": 1.0,
            "mask_invalid": False,
            "uff_patches": None,
        },
        "released": {
            **PAPER_EXTRACTOR,
            **PAPER,
            "lambda_fused": 1.0,
            "released_sampling": True,
            "mask_invalid": False,
            "uff_steps": RELEASED_UPDATES,
            "uff_warmup": 10,
            "uff_schedule": "released",
            "uff_batch": 256,
            "uff_contrast": 16,
            "uff_patches": None,
            "uff_pairs": "released",
            "bank_stats": "released",
            "coreset_sizes": "released",
            "remove_zero_rows": True,
            "blur": "pil",
            "dlf_solver": "sgd",
        },
        "fast": {
            "groups": 512,
            "group_size": 64,
            "patch": 8,
            "uff_steps": 150,
            "uff_warmup": 50,
            "uff_batch": 4,
            "uff_patches": 512,
            "uff_rate": 1e-4,
            "bank_limit": 1_000,
        },
    }
    PREPARATION = {"": "cloud", "fast": "cloud", "paper": "btf", "released": "btf"}
    frozen = ("extractor",)

    def __init__(self, config: M3DMConfig, *, pretrained: bool = True) -> None:
        super().__init__(config)
        c = config
        sampling = c.released_sampling
        self.extractor = build_extractor(c, c.point_layers, pretrained=pretrained, released_sampling=sampling)
        self.sources |= self.extractor.sources
        self.uff: FeatureFusion | None = None
        if c.uff and "fused" in c.banks:
            widths = self.extractor.channels
            with seeded(c.seed):
                self.uff = FeatureFusion(widths["xyz"], widths["rgb"])
            if c.uff_checkpoint is not None and pretrained:
                path = Path(c.uff_checkpoint).expanduser()
                self.uff.load_state_dict(feature_fusion_state(read_network(path, "m3dm"), self.uff, str(path)))
                self.sources["uff"] = checkpoint_source(path)
        self.banks = Banks({name: self._bank(name) for name in c.banks})
        layer = partial(DecisionLayer, nu=c.nu, solver=c.dlf_solver, max_bytes=int(c.max_gib * 2**30))
        factors: dict[str, float | None] = {name: getattr(c, f"lambda_{name}") for name in c.banks}
        self.decisions = Decisions(factors, layer if c.decides else None)
        self._parts_seen = 0

    def extract(self, batch: Batch) -> Features:
        """Tokens of RGB, features of the point groups, and which groups every pixel listens to."""
        return self.extractor(batch, self.modalities)

    def extraction_settings(self) -> dict[str, Any]:
        """Those of the extractor alone, which other methods share."""
        return self.extractor.settings(self.modalities)

    def stages(self) -> Sequence[Stage]:
        """Train feature fusion, fill the banks, measure their level on validation parts, learn how to weigh them."""
        c = self.config
        stages: list[Stage] = []
        if c.learns_fusion:
            assert self.uff is not None
            stages.append(
                Optimise(
                    name="feature_fusion",
                    parameters=self.uff.parameters,
                    loss=self.loss,
                    optimizer=partial(_adamw, c),
                    steps=c.uff_steps,
                    batch_size=c.uff_batch,
                    schedule=partial(_schedule, c),
                    schedule_every="step",
                )
            )
        stages.append(Observe(name="banks", update=self._see_parts, finish=self.build_banks))
        if c.mask_invalid and "xyz" in c.modalities:
            see, finish = self._see_levels, self._set_levels
            stages.append(Observe(name="levels", update=see, finish=finish, split="validation"))
        if c.decides:
            stages.append(Observe(name="decision", update=self._see_values, finish=self.decisions.fit))
        return stages

    def score(self, features: Features) -> Prediction:
        """Map and score of Eqs. 4-8."""
        return self.judge(self.patches(features), (features["valid"].shape[-2], features["valid"].shape[-1]))

    def named_banks(self) -> list[tuple[str, MemoryBank]]:
        """The banks by name, in the order of the setting."""
        return self.banks.named()

    # -- feature fusion ----------------------------------------------------------------------------------------------

    def loss(self, features: Features) -> dict[str, Tensor]:
        """Eq. 2: patches of the batch must find their other half, among those of `uff_contrast` parts at a time."""
        B = len(features["valid"])
        step = self.config.uff_contrast or B
        starts = range(0, B, step)
        if len(starts) == 1:
            return {"contrast": self._contrast(features)}
        terms = [checkpoint(self._contrast, _some(features, at, at + step), use_reentrant=False) for at in starts]
        return {"contrast": torch.stack(terms).mean()}

    def _contrast(self, features: Features) -> Tensor:
        assert self.uff is not None
        grid = self._grid(features)
        xyz, measured = point_patches(features, grid), measured_patches(features, grid)  # B P C, B P
        rgb = rgb_patches(features, grid)
        if self.config.uff_pairs == "released":
            rgb = released_pairs(features["rgb.grid"], grid)
        xyz, rgb = xyz[measured], rgb[measured]  # N C
        most = self.config.uff_patches
        if most is not None and len(xyz) > most:
            drawn = torch.randperm(len(xyz))[:most].to(xyz.device)  # the engine seeds the generator, in a fork
            xyz, rgb = xyz[drawn], rgb[drawn]
        return self.uff.loss(xyz[None], rgb[None], torch.ones(1, len(xyz), dtype=torch.bool, device=xyz.device))

    # -- patches -----------------------------------------------------------------------------------------------------

    def patches(self, features: Features) -> dict[str, Patches]:
        """What each bank looks at."""
        names = self.config.banks
        found: dict[str, Patches] = {}
        if "rgb" in names:
            values = features["rgb.grid"].permute(0, 2, 3, 1)  # B h w C
            found["rgb"] = Patches(values, torch.ones(values.shape[:3], dtype=torch.bool, device=values.device))
        if self.config.patch == "groups" and "xyz" in names:
            found["xyz"] = self._group_patches(features)
        elif "xyz" in names or "fused" in names:
            grid = self._grid(features)
            xyz, measured = point_patches(features, grid), measured_patches(features, grid)  # B P C, B P
            counts = (measured if self.config.mask_invalid else torch.ones_like(measured)).view(-1, *grid)
            if "xyz" in names:
                found["xyz"] = Patches(xyz.unflatten(1, grid), counts, alike=self._alike(measured, grid, (1, 1)))
            if "fused" in names:
                alike = self._alike(measured, grid, _tokens(features))
                found["fused"] = Patches(
                    self._fused(features, xyz, measured, grid).unflatten(1, grid), counts, alike=alike
                )
        return {name: found[name] for name in names}

    def _alike(self, measured: Tensor, grid: Grid, tokens: Grid) -> Tensor | None:
        """Numbers of the patches where all count: those without a point are alike within a cell of `tokens`."""
        if self.config.mask_invalid or not _repeats(tokens, grid):
            return None
        b, i, j = (torch.arange(n, device=measured.device) for n in (len(measured), *grid))
        row, column = i * tokens[0] // grid[0], j * tokens[1] // grid[1]
        cell = (b[:, None, None] * tokens[0] + row[:, None]) * tokens[1] + column  # B h w
        place = torch.arange(measured.numel(), device=measured.device).view_as(cell)
        return torch.where(measured.view_as(cell), place, -1 - cell)

    def _grid(self, features: Features) -> Grid:
        """Point patches along height and width."""
        side = cast(int, self.config.patch)
        height, width = features["valid"].shape[-2:]
        return -(-height // side), -(-width // side)

    def _group_patches(self, features: Features) -> Patches:
        near, share = features["xyz.near"].long(), features["xyz.share"]
        values = features["xyz.groups"][:, None]  # B 1 G C
        seen = (share.flatten(1) > 0).any(1) | (not self.config.mask_invalid)
        return Patches(values, seen[:, None, None].expand(values.shape[:3]), near=near, share=share)

    def _fused(self, features: Features, xyz: Tensor, measured: Tensor, grid: Grid) -> Tensor:
        """Eq. 3: (B, P, C_xyz + C_rgb), points first; every distinct patch goes through the network once."""
        if self.uff is None:
            return torch.cat([xyz, rgb_patches(features, grid)], dim=-1)
        left = self.uff.xyz(xyz[measured])  # N C_xyz
        empty = self.uff.xyz(xyz.new_zeros(1, xyz.shape[-1]))  # all patches without a point are alike
        own = _tokens(features)
        if _repeats(own, grid):
            tokens = self.uff.rgb(rgb_patches(features, own))
            right = rgb_patches({"rgb.grid": tokens.mT.unflatten(2, own)}, grid)
        else:
            right = self.uff.rgb(rgb_patches(features, grid))
        fused = torch.cat([empty.expand(*measured.shape, -1), right], dim=-1)
        fused[..., : left.shape[-1]][measured] = left
        return fused

    # -- banks -------------------------------------------------------------------------------------------------------

    def _bank(self, name: str) -> MemoryBank:
        c = self.config
        alone = len(c.banks) == 1
        normalise = name == "rgb" if alone and c.bank_stats == "released" else c.bank_stats != "none"
        return MemoryBank(
            name,
            ratio=getattr(c, f"ratio_{name}"),
            limit=c.bank_limit,
            eps=c.coreset_eps,
            seed=c.seed,
            max_bytes=int(c.max_gib * 2**30),
            normalise=normalise,
        )

    def _see_parts(self, features: Features) -> None:
        self.add_patches(self.patches(features))

    def add_patches(self, patches: Mapping[str, Patches]) -> None:
        """Give the banks the patches of training parts; beyond the first `xyz_parts` parts only those of RGB."""
        most = self.config.xyz_parts
        room = None if most is None else max(0, most - self._parts_seen)
        for name, bank in self.named_banks():
            own = patches[name]
            end = None if name == "rgb" else room
            bank.add(own.values[:end][own.counts[:end]])
        self._parts_seen += len(next(iter(patches.values())).counts)

    def build_banks(self) -> None:
        """Choose the coresets from what was added."""
        c = self.config
        banks = dict(self.named_banks())
        self._parts_seen = 0
        together = len(banks) > 1
        shared = None
        if c.bank_stats == "released" and together:
            shared = banks["xyz"].statistics()[0], banks["rgb"].statistics()[1]
        of_xyz = None
        for name in sorted(banks, key=get_args(Bank).index):  # xyz first: `coreset_sizes`
            released = c.coreset_sizes == "released" and together and name != "xyz"
            size = int(getattr(c, f"ratio_{name}") * cast(int, of_xyz)) if released else None
            banks[name].build(statistics=shared, size=size)
            if name == "xyz":
                of_xyz = len(banks[name].vectors)
        if c.remove_zero_rows and "xyz" in banks:
            rows = banks["xyz"].vectors
            kept = rows[(rows != 0).all(1)]
            banks["xyz"].vectors = torch.cat([kept, rows.new_zeros(1, rows.shape[1])])

    def _see_levels(self, features: Features) -> None:
        self.banks.observe_levels(self.patches(features), but=("rgb",))

    def _set_levels(self) -> None:
        self.banks.set_levels(but=("rgb",))

    # -- scores ------------------------------------------------------------------------------------------------------

    def judge(self, patches: Mapping[str, Patches], size: tuple[int, int]) -> Prediction:
        """Score and map (H, W) = `size` of parts from the patches that the banks look at: Eqs. 4-5."""
        return self.decisions.judge(*self.measure(patches, size), self.config.image_score, self.config.top_share)

    def measure(self, patches: Mapping[str, Patches], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Eqs. 6-8: scores (B, F) and smoothed maps (B, H, W, F), each bank's in the unit of its own distances."""
        c = self.config
        return self.banks.measure(
            patches,
            size,
            blur=c.blur,
            sigma=c.blur_sigma,
            form=c.reweight,
            n=c.reweight_k,
            guard=c.reweight_guard,
            divisor=c.reweight_divisor,
        )

    def _see_values(self, features: Features) -> None:
        """Rows of the decision layers: of parts and pixels that every bank can judge."""
        patches = self.patches(features)
        size = (features["valid"].shape[-2], features["valid"].shape[-1])
        scores, maps = self.measure(patches, size)
        parts = torch.stack([own.counts.flatten(1).any(1) for own in patches.values()]).all(0)  # B
        pixels = torch.ones_like(features["valid"])
        if self.config.mask_invalid and "xyz" in self.modalities:
            pixels = (features["xyz.share"].sum(-1) > 0).view_as(pixels)
        self.decisions.observe(scores[parts], maps[pixels])


def released_pairs(tokens: Tensor, grid: Grid) -> Tensor:
    """RGB patches (B, h*w, C) as the released program pairs them with point patches when it trains UFF.

    Patch j gets token (4 (j mod n) + floor(j / n)) mod n of the n, not the one at its place: 8 pairs of 3136 are right.

    Raises:
        ShapeError: the tokens (B, C, h/2, w/2) are not half as fine as `grid`; the program knows no other case.
    """
    own = tuple(tokens.shape[-2:])
    if (2 * own[0], 2 * own[1]) != grid:
        raise ShapeError(
            f"`uff_pairs` 'released' of M3DM needs RGB tokens half as fine as the {grid[0]}x{grid[1]} point patches, "
            f"got {own[0]}x{own[1]}: use 'aligned', or the backbone, size and `patch` of preset 'released'"
        )
    n = own[0] * own[1]
    j = torch.arange(grid[0] * grid[1], device=tokens.device)
    return tokens.flatten(2).mT[:, (4 * (j % n) + j // n) % n]


def warmup_cosine(step: int, warmup: int, steps: int) -> float:
    """Share of the learning rate at an update: a rise over `warmup` updates, then half a cosine to 0 at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def released_rate(step: int) -> float:
    """Share of the learning rate at an update of the released program: a rise over 1 epoch, half a cosine over 2."""
    epoch, within = divmod(step, RELEASED_UPDATES // 3)
    progress = epoch + 16 * within / _RELEASED_MICRO
    return progress if progress < 1 else 0.5 * (1 + math.cos(math.pi * (progress - 1) / 2))


def _adamw(c: M3DMConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW in one kernel for all parameters."""
    return torch.optim.AdamW(parameters, lr=c.uff_rate, betas=c.uff_betas, weight_decay=c.uff_decay, fused=True)


def _schedule(c: M3DMConfig, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    released = c.uff_schedule == "released"
    rate = released_rate if released else partial(warmup_cosine, warmup=c.uff_warmup, steps=c.uff_steps)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def _some(features: Features, start: int, end: int) -> dict[str, Tensor]:
    return {name: tensor[start:end] for name, tensor in features.items()}


def _tokens(features: Features) -> Grid:
    return features["rgb.grid"].shape[-2], features["rgb.grid"].shape[-1]


def _repeats(tokens: Grid, grid: Grid) -> bool:
    """Whether every token is repeated over whole patches of `grid`."""
    return grid[0] % tokens[0] == 0 and grid[1] % tokens[1] == 0
