"""From a part as it was read to the part as networks see it: one square grid, a foreground, heights and normals.

    read ──▶ frame (pad, squash or crop) ──▶ resample ──▶ plane ──▶ foreground ──▶ depth, normals ──▶ prepared Sample

The cloud and masks are sampled, never interpolated; RGB is filtered with Pillow's antialiased kernel. Resampling comes
first (as in CRD: 3D steps then cost a tenth) or last (`geometry_at="input"`, as in BTF and M3DM). Depth stays in metres
here; `collate` standardises it, because that needs the category's `DepthScale`.

Flags a part can get (``sample.meta["flags"]``, a list, after those that the reader gave):

    no_valid_points    the 3D sensor measured nothing
    no_plane           a plane was needed and none was found: nothing is removed (background "corners": all is, as in
                       CRD), heights are the median z minus z, normals stay in the camera's frame
    no_cloud           heights were asked for and there is only a depth image: median z minus z as well
    empty_corner       a corner that the background rests on has no measured point: CRD's plane is wrong then, AST's
                       surface rests on the nearest points instead
    all_background     nothing is left of the part once the background is removed
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from ..errors import ConfigError, DataError, nearest_names
from ..geometry.components import close_mask, keep_components
from ..geometry.filling import fill_rounds
from ..geometry.height import height_above, to_plane_frame
from ..geometry.normals import sobel_normals, surface_normals
from ..geometry.plane import Plane, corner_plane, corner_surface, empty_corners, fit_plane
from ..samples import MODALITIES, Array, Sample, is_geometric
from .frame import Aspect, Filter, Frame, Nearest


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Everything that decides how a part is prepared. Defaults are ours; see `PREPARATIONS` for the papers'."""

    # the grid
    size: int = 256  # pixels, side of the prepared square (CRD, MMRD, MDSS 256; BTF, M3DM 224)
    aspect: Aspect = "pad"  # non-square parts: zero-pad (BTF), squash (CRD), or keep the middle square
    pad_multiple: int = 0  # pixels; with "pad", the square's side is a multiple of this (BTF 100); 0 for none
    pad_rgb: Literal["zero", "edge"] = "zero"  # what RGB is padded with: black (BTF, M3DM), edge pixels (CFM)
    rgb_filter: Filter = "bilinear"  # Pillow, antialiased (CRD bilinear; BTF, M3DM bicubic)
    nearest: Nearest = "centre"  # pixel taken for 3D and masks: "centre" agrees with RGB, "corner" is the papers' floor
    geometry_at: Literal["prepared", "input"] = "prepared"  # grid of plane, pieces, normals (CRD prepared, BTF input)
    # the background
    # remove nothing, the RANSAC plane (BTF), CRD's three corners, AST's four corners (for depth "relative")
    background: Literal["keep", "plane", "corners", "four_corners"] = "keep"
    plane_candidates: Literal["border", "grid"] = "border"  # points that vote on the plane (BTF: border)
    plane_fit_mm: float = 5.0  # mm, distance of an inlier of the fit (BTF 4)
    plane_tolerance_mm: float = 5.0  # mm, points nearer to the plane than this are background (CRD, BTF 5, AST 7)
    plane_behind_weight: float = 1.0  # how strongly a plane with points behind it is rejected; 0 is plain RANSAC (BTF)
    plane_seed: int = 0  # which triples of points RANSAC tries
    remove_from: tuple[str, ...] = ("xyz", "depth", "normals")  # blanked in the background (CRD depth; BTF rgb, xyz)
    closing: int = 3  # rounds of 3x3 closing of the foreground (CRD 3, BTF 0)
    keep_components: int = 0  # how many connected pieces stay, largest first (BTF 1); 0 keeps all
    component_jump_mm: float = 6.0  # mm, neighbours this far apart are not connected (DBSCAN radius of BTF and M3DM: 6)
    min_component_px: int = 0  # pixels, smaller pieces are removed; 0 keeps all
    # depth
    # along the optical axis (CRD), above the fitted plane, or z minus its mean on the part (AST)
    depth: Literal["z", "height", "relative"] = "height"
    depth_range: Literal["category", "image", "none"] = (
        "category"  # scale of the depth image: see `DepthScale`; CRD image
    )
    # holes: growing 3x3 means (CRD), nearest measured, stay 0; "early": means of z before anything else (AST)
    depth_fill: Literal["rounds", "full", "none", "early"] = "full"
    depth_fill_rounds: int = 2  # with "rounds" (CRD 2) and "early" (AST 3)
    depth_step: int = 1  # prepared pixels to one pixel of depth and foreground, with "relative" (AST: 768 to 192)
    # normals
    normals: Literal["auto", "camera", "plane", "none"] = "auto"  # frame; "auto": the plane's if depth is "height"
    normals_method: Literal["surface", "sobel"] = "surface"  # for parts without a normals file; "sobel" after TRD
    normals_window: int = 5  # pixels, odd: window of "surface", kernel of "sobel" (TRD 3, 5 or 7 by category)
    normals_jump_mm: float = 20.0  # mm, neighbours this far apart are not one surface

    def __post_init__(self) -> None:
        at_least = {
            "size": 8, "pad_multiple": 0, "plane_behind_weight": 0, "closing": 0, "keep_components": 0,
            "min_component_px": 0, "depth_fill_rounds": 0, "depth_step": 1, "normals_window": 3,
        }  # fmt: skip
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ConfigError(f"preparation: `{name}` must be at least {least}, got {getattr(self, name)}")
        for name in ("plane_fit_mm", "plane_tolerance_mm", "component_jump_mm", "normals_jump_mm"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"preparation: `{name}` must be above 0, got {getattr(self, name)}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"preparation: `{name}` is '{getattr(self, name)}', expected one of {choices}")
        if self.normals_window % 2 == 0:
            raise ConfigError(f"preparation: `normals_window` must be odd, got {self.normals_window}")
        self._check_relative()
        object.__setattr__(self, "remove_from", tuple(self.remove_from))  # a list, if it came from JSON or YAML

    def _check_relative(self) -> None:
        """AST's steps belong together: z is filled, cut and centred on the part's own grid, then resized."""
        relative = self.depth == "relative"
        for name, value in (("background", "four_corners"), ("depth_fill", "early")):
            if getattr(self, name) == value and not relative:
                raise ConfigError(f"preparation: `{name}` '{value}' is for depth='relative', got depth='{self.depth}'")
        if not relative:
            return
        needs = {
            "geometry_at": ("input",),
            "background": ("keep", "four_corners"),
            "depth_range": ("none",),
            "depth_fill": ("early", "none"),
        }
        for name, allowed in needs.items():
            if getattr(self, name) not in allowed:
                expected = " or ".join(f"'{value}'" for value in allowed)
                raise ConfigError(
                    f"preparation: depth='relative' needs `{name}` {expected}, got '{getattr(self, name)}'"
                )
        if self.size % self.depth_step:
            raise ConfigError(
                f"preparation: `size` must be a multiple of `depth_step`, got {self.size} and {self.depth_step}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON keeps them."""
        return {**asdict(self), "remove_from": list(self.remove_from)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preparation:
        """The inverse of `to_dict`; absent fields take their default.

        Raises:
            ConfigError: unknown field (names the nearest), or a value out of range.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(f"unknown setting '{name}' of the preparation: {nearest_names(name, known)}")
        return cls(**values)

    @property
    def needs_plane(self) -> bool:
        """Whether any output depends on the support plane."""
        return self.background in ("plane", "corners") or self.depth == "height" or self.normals == "plane"

    @property
    def normals_frame(self) -> Literal["camera", "plane"]:
        """The frame of the normals, "auto" resolved."""
        return "plane" if self.normals == "plane" or (self.normals == "auto" and self.depth == "height") else "camera"


_FARTHEST_M = 50.0  # a part that seems farther away is measured in millimetres

_CHOICES: dict[str, tuple[str, ...]] = {
    "aspect": ("pad", "squash", "crop"),
    "pad_rgb": ("zero", "edge"),
    "rgb_filter": ("bilinear", "bicubic"),
    "nearest": ("centre", "corner"),
    "geometry_at": ("prepared", "input"),
    "background": ("keep", "plane", "corners", "four_corners"),
    "plane_candidates": ("border", "grid"),
    "depth": ("z", "height", "relative"),
    "depth_range": ("category", "image", "none"),
    "depth_fill": ("rounds", "full", "none", "early"),
    "normals": ("auto", "camera", "plane", "none"),
    "normals_method": ("surface", "sobel"),
}

_BTF = Preparation(
    size=224,
    pad_multiple=100,
    rgb_filter="bicubic",
    nearest="corner",
    geometry_at="input",
    background="plane",
    plane_fit_mm=4.0,
    plane_behind_weight=0.0,
    remove_from=("rgb", "xyz", "depth", "normals"),
    closing=0,
    keep_components=1,
    depth="z",
    depth_range="none",
    depth_fill="none",
    normals="none",  # none of these methods reads a normal map, and at full size one costs 0.1 s
)

PREPARATIONS: dict[str, Preparation] = {
    "default": Preparation(),
    "crd_paper": Preparation(
        aspect="squash",
        nearest="corner",
        background="corners",
        remove_from=("depth",),
        depth="z",
        depth_range="image",
        depth_fill="rounds",
    ),
    "cloud": Preparation(background="plane"),
    "btf": _BTF,
    "cfm": replace(_BTF, pad_rgb="edge", remove_from=("xyz", "depth", "normals")),
    "ast": Preparation(background="plane", depth_range="none"),
    "ast_paper": Preparation(
        size=768,
        aspect="squash",
        geometry_at="input",
        background="four_corners",
        plane_tolerance_mm=7.0,
        remove_from=("depth",),
        depth="relative",
        depth_range="none",
        depth_fill="early",
        depth_fill_rounds=3,
        depth_step=4,
        normals="none",
    ),
    "mdss": replace(_BTF, size=256),
}
"""Named preparations: ours, CRD's (also depth of RD, MMRD), ours with the background removed from the 3D views (for
methods that see the cloud), BTF's (also M3DM's, CMDIAD's, Shape-Guided's), CFM's, `cloud` with heights in metres for
AST, AST's own, and MDSS's."""


def prepare(sample: Sample, preparation: Preparation) -> Sample:
    """The part on the prepared grid, with foreground, depth and normals. The input is left alone.

    Args:
        sample: As a reader gives it.
        preparation: How.

    Returns:
        All images and masks size x size. ``rgb`` and extra modalities float32 in 0..1; ``xyz`` metres; ``depth``
        (H, W) metres, along z, above the plane or from the mean of the part; ``normals`` unit vectors, 0 where
        invalid. `meta` gains ``frame`` (a `Frame`), ``plane`` (a report: found, normal, offset_mm, tilt_deg,
        inlier_share, removed_share, rms_mm; None if no plane was needed) and ``flags`` (see the module).

    Raises:
        DataError: images of different size, a background to remove without a cloud (AST's: without any depth), or z
            that is not in metres where AST's steps measure it.
    """
    sample.check()
    cut_by_depth = preparation.background == "four_corners" and "depth" in sample.images
    if preparation.background != "keep" and "xyz" not in sample.images and not cut_by_depth:
        raise DataError(
            f"sample '{sample.id}': removing the background ('{preparation.background}') needs 'xyz', but the part has "
            f"{', '.join(sample.images) or 'nothing'}: supply the cloud, or prepare with background='keep'"
        )
    frame = Frame.fit(
        *sample.size,
        preparation.size,
        aspect=preparation.aspect,
        pad_multiple=preparation.pad_multiple,
        nearest=preparation.nearest,
    )
    if preparation.geometry_at == "input":
        return _resample(_add_geometry(sample, preparation), frame, preparation)
    return _add_geometry(_resample(sample, frame, preparation), preparation)


def without_cloud(preparation: Preparation) -> Preparation:
    """How a part without any 3D view is prepared where others have it: alike, but for the background, which stays.

    Raises:
        ConfigError: the preparation blanks the background of RGB, which nobody can do without 3D.
    """
    if preparation.background == "keep":
        return preparation
    if "rgb" in preparation.remove_from:
        raise ConfigError(
            f"a part without 3D cannot be prepared like the others: `background={preparation.background}` with "
            f"`remove_from` {list(preparation.remove_from)} blanks RGB where the 3D view sees background; fit with "
            f"--preparation cloud, or --prepare remove_from=[xyz,depth,normals], to serve such parts"
        )
    return replace(preparation, background="keep")


def only_views(sample: Sample, names: Sequence[str]) -> Sample:
    """A prepared part as if it had come with the views in `names` only.

    Without a geometric one nothing tells where the part is: all that is not padding is valid and foreground.
    """
    images = {name: image for name, image in sample.images.items() if name in names}
    if any(is_geometric(name) for name in images):
        return sample.with_(images=images)
    frame: Frame = sample.meta["frame"]
    return sample.with_(images=images, valid=frame.inside(), foreground=frame.inside())


def _resample(sample: Sample, frame: Frame, preparation: Preparation) -> Sample:
    """All views on the prepared grid; the foreground is the given one, or all that is not padding."""
    images: dict[str, Array] = {}
    for name, image in sample.images.items():
        if name in MODALITIES and MODALITIES[name].geometric:
            bilinear = name == "depth" and preparation.depth == "relative"
            take = partial(_coarse, frame, preparation) if bilinear else frame.take_nearest
            images[name] = take(np.asarray(image, dtype=np.float32))
        else:
            image = image if image.dtype == np.uint8 else _unit_range(image)  # Pillow filters 8 bits as the papers do
            edge = preparation.pad_rgb == "edge"
            images[name] = _unit_range(frame.take_filtered(image, preparation.rgb_filter, edge=edge))
    foreground = frame.inside()
    if sample.foreground is not None and preparation.depth == "relative":
        foreground = _coarse(frame, preparation, sample.foreground.astype(np.float32)) > 0
    elif sample.foreground is not None:
        foreground = frame.take_nearest(sample.foreground)
    return sample.with_(
        images=images,
        valid=frame.take_nearest(sample.valid),
        foreground=foreground,
        mask=None if sample.mask is None else frame.take_nearest(sample.mask),
        meta={**sample.meta, "frame": frame},
    )


def _coarse(frame: Frame, preparation: Preparation, image: Array) -> Array:
    """An (H, W) image at size / depth_step, bilinear without antialias (AST), each pixel then a square of the grid."""
    step = preparation.depth_step
    return frame.take_bilinear(image, preparation.size // step).repeat(step, axis=0).repeat(step, axis=1)


def _unit_range(image: Array) -> Array:
    """Image as float32 in 0..1: integers by their type's range, floats as they are."""
    if np.issubdtype(image.dtype, np.integer):
        return image.astype(np.float32) / np.float32(np.iinfo(image.dtype).max)
    return image.astype(np.float32)


def _add_geometry(sample: Sample, preparation: Preparation) -> Sample:
    """Foreground, depth and normals on the sample's own grid; then the background is blanked."""
    valid, images = sample.valid, dict(sample.images)
    allowed = np.ones_like(valid) if sample.foreground is None else sample.foreground
    flags: list[str] = []
    geometric = any(name in MODALITIES and MODALITIES[name].geometric for name in images)
    if geometric and not valid.any():
        flags.append("no_valid_points")
    plane = _find_plane(sample, preparation, flags)
    if geometric and preparation.depth == "relative":
        images["depth"], foreground = _relative_depth(sample, preparation, allowed, flags)
    else:
        foreground = _foreground(sample, preparation, plane, allowed, flags)
    if geometric:
        images.update(_depth_image(sample, preparation, plane, flags))
        images.update(_normals_image(sample, preparation, plane, foreground))
    if preparation.background != "keep":
        images = _blank(images, valid, foreground, preparation.remove_from)
        if "xyz" in preparation.remove_from:
            valid = valid & foreground
    measured = int(np.count_nonzero(sample.valid))
    removed = int(np.count_nonzero(sample.valid & ~foreground)) / measured if measured else 0.0
    report = _report(plane, removed) if preparation.needs_plane and "xyz" in images else None
    meta = {**sample.meta, "plane": report, "flags": list(dict.fromkeys([*sample.meta.get("flags", ()), *flags]))}
    return sample.with_(images=images, valid=valid, foreground=foreground, meta=meta)


def _find_plane(sample: Sample, preparation: Preparation, flags: list[str]) -> Plane | None:
    if not preparation.needs_plane or "xyz" not in sample.images:
        return None
    xyz = sample.images["xyz"]
    if preparation.background == "corners":
        if empty_corners(sample.valid):
            flags.append("empty_corner")
        plane = corner_plane(xyz)
    else:
        plane = fit_plane(
            xyz,
            sample.valid,
            preparation.plane_candidates,
            tolerance_m=preparation.plane_fit_mm / 1000,
            seed=preparation.plane_seed,
            behind_weight=preparation.plane_behind_weight,
        )
    if plane is None:
        flags.append("no_plane")
    return plane


def _foreground(
    sample: Sample, preparation: Preparation, plane: Plane | None, allowed: Array, flags: list[str]
) -> Array:
    """(H, W) bool, True on the part: all of the frame if the background is kept."""
    if preparation.background == "keep" or (plane is None and preparation.background == "plane"):
        return allowed
    if plane is None:  # CRD: the distance to no plane is NaN, so nothing exceeds the tolerance
        foreground = np.zeros_like(allowed)
    else:
        xyz = sample.images["xyz"]
        off_plane = np.abs(plane.distance(xyz)) > preparation.plane_tolerance_mm / 1000
        foreground = close_mask(off_plane & sample.valid & allowed, preparation.closing) & allowed
        foreground = keep_components(
            xyz,
            sample.valid,
            foreground,
            jump_m=preparation.component_jump_mm / 1000,
            keep=preparation.keep_components,
            min_pixels=preparation.min_component_px,
        )
    if not foreground.any():
        flags.append("all_background")
    return foreground


def _relative_depth(sample: Sample, preparation: Preparation, allowed: Array, flags: list[str]) -> tuple[Array, Array]:
    """AST's depth, z minus its mean on the part in metres and 0 off it, and the part, both (H, W).

    Only z counts; what the early filling made up counts as measured.
    """
    z, known = _along_axis(sample), sample.valid
    if z is None:
        return np.zeros(sample.size, np.float32), allowed
    if known.any() and (middle := float(np.median(z[known]))) > _FARTHEST_M:
        raise DataError(
            f"sample '{sample.id}': the median depth is {middle:g} m, so its unit is hardly metres; "
            f"{preparation.plane_tolerance_mm:g} mm could not tell the part from its background: set the unit of the "
            f"data (unit=mm), or prepare with depth='height'"
        )
    rounds = preparation.depth_fill_rounds if preparation.depth_fill == "early" else 0
    z, known = fill_rounds(z, known, rounds, spare_first=True)
    foreground = known & allowed
    if preparation.background == "four_corners" and known.any():
        surface, widened = corner_surface(z, known)
        if widened:
            flags.append("empty_corner")
        foreground &= np.abs(surface - z) > preparation.plane_tolerance_mm / 1000
    if not foreground.any():
        flags.append("all_background")
        return np.zeros(sample.size, np.float32), foreground
    return np.where(foreground, z - z[foreground].mean(), 0).astype(np.float32), foreground


def _along_axis(sample: Sample) -> Array | None:
    """z of a part, (H, W) metres, from its depth image or else its cloud; None if it has neither."""
    if "depth" in sample.images:
        z = sample.images["depth"]
        return z if z.ndim == 2 else z[..., 0]
    return sample.images["xyz"][..., 2] if "xyz" in sample.images else None


def _depth_image(sample: Sample, preparation: Preparation, plane: Plane | None, flags: list[str]) -> dict[str, Array]:
    xyz, valid, z = sample.images.get("xyz"), sample.valid, _along_axis(sample)
    if z is None or preparation.depth == "relative":
        return {}
    if preparation.depth == "z":
        depth = z
    elif plane is not None and xyz is not None:
        return {"depth": height_above(xyz, valid, plane)}
    else:
        if xyz is None:
            flags.append("no_cloud")
        depth = np.median(z[valid]) - z if valid.any() else z
    return {"depth": np.where(valid, depth, 0).astype(np.float32)}


def _normals_image(
    sample: Sample, preparation: Preparation, plane: Plane | None, foreground: Array
) -> dict[str, Array]:
    if "normals" in sample.images:
        normals = np.where(sample.valid[..., None], sample.images["normals"], 0).astype(np.float32)
    elif preparation.normals == "none" or "xyz" not in sample.images:
        return {}
    elif preparation.normals_method == "sobel":
        return {"normals": _sobel(sample, preparation, foreground)}
    else:
        normals = surface_normals(
            sample.images["xyz"],
            sample.valid,
            window=preparation.normals_window,
            jump_m=preparation.normals_jump_mm / 1000,
        )
    if preparation.normals_frame == "plane" and plane is not None:
        normals = to_plane_frame(normals, plane)
    return {"normals": normals}


def _sobel(sample: Sample, preparation: Preparation, foreground: Array) -> Array:
    """TRD's normals: of the part's z, scaled to 0..1, holes filled."""
    z, on = sample.images["xyz"][..., 2].astype(np.float64), sample.valid & foreground
    if not on.any():
        return np.zeros_like(sample.images["xyz"])
    low, high = z[on].min(), z[on].max()
    filled, _ = fill_rounds((z - low) / max(high - low, 1e-12), on, preparation.depth_fill_rounds)
    return sobel_normals(filled, on, kernel=preparation.normals_window)


def _blank(images: Mapping[str, Array], valid: Array, foreground: Array, names: tuple[str, ...]) -> dict[str, Array]:
    """Images with the background of those named set to 0. Where nothing was measured, RGB stays (as in BTF)."""
    blanked = dict(images)
    for name in names:
        if name in blanked:
            geometric = name in MODALITIES and MODALITIES[name].geometric
            image = blanked[name].copy()
            image[~foreground if geometric else valid & ~foreground] = 0
            blanked[name] = image
    return blanked


def _report(plane: Plane | None, removed_share: float) -> dict[str, Any]:
    if plane is None:
        return {"found": False, "removed_share": removed_share}
    return {
        "found": True,
        "normal": list(plane.normal),
        "offset_mm": plane.offset * 1000,
        "tilt_deg": plane.tilt_deg,
        "inlier_share": plane.inlier_share,
        "removed_share": removed_share,
        "rms_mm": plane.rms * 1000,
    }
