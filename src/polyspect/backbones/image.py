"""Frozen image backbones of timm as multi-stage feature extractors.

For every wanted reduction r (pixels per feature cell) the features come from the network's last stage with that
reduction; stages behind the deepest wanted one are cut off, so that neither their parameters nor their time are paid.
The backbone is always in eval mode and takes no gradient. Its batch-norm statistics are ordinary buffers of
`ImageBackbone.network` and may be edited by methods that adapt them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..samples import check_shapes
from ..weights.convert import efficientnet_lite_to_timm, fit_state, is_efficientnet_lite, load_state
from ..weights.known import KNOWN, describe
from ..weights.resolve import resolve
from .folding import fold_batch_norm
from .padding import fix_same_padding

DEFAULT_BACKBONE = "efficientnet_lite0"
"""The backbone whose ImageNet weights come with the installation, so that nothing needs a model hub."""

_PROBE_SIZE = 96  # pixels; a multiple of 32


class Stage(NamedTuple):
    """One stage that timm can tap: its number, pixels per feature cell, and channels."""

    number: int
    reduction: int
    channels: int


class ImageBackbone(nn.Module):
    """Multi-stage features of a frozen image network.

    Attributes:
        name: Backbone name.
        network: timm's feature network, cut off after the deepest wanted stage, under timm's own tensor names.
        reductions: Pixels per feature cell of each output, ascending.
        channels: Channels of each output.
        mean: (1, 3, 1, 1) buffer, mean of 0..1 images that the weights expect.
        std: (1, 3, 1, 1) buffer, likewise.
        nonneg: Whether all outputs are >= 0 (they end in a ReLU). A network that must imitate them may then end in one.
        weights_source: ``name``, ``source`` (file, folder, package, hub, random, or none: to be loaded) and ``sha256``
            of the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str = DEFAULT_BACKBONE,
        reductions: Sequence[int] = (4, 8, 16),
        weights: str = "auto",
        pretrained: bool = True,
        seed: int = 0,
        fold_bn: bool = False,
        final_norm: bool = False,
        blocks: int | None = None,
        padded_for: int | None = None,
    ) -> None:
        """Build the network and load its weights.

        Args:
            name: timm model name, with its tag (``wide_resnet50_2.tv_in1k``), or a name of `polyspect.weights.known`.
            reductions: Wanted pixels per feature cell.
            weights: ``"auto"`` (weight folder, package, hub), a file or folder, or ``"random"``: untrained.
            pretrained: False builds only, because all tensors are about to be loaded from a model file.
            seed: Seeds the random initialisation, inside a fork of torch's RNG.
            fold_bn: Fold batch norm into the convolutions: faster, but the statistics can no longer be adapted.
            final_norm: For transformers on one grid (ViT): apply the network's final LayerNorm to the patch tokens, as
                M3DM and CMDIAD do with DINO. Without it they are the last block's raw output.
            blocks: Keep the first so many blocks: of transformers on one grid, for less time and memory (CFM's layer
                pruning), or of EfficientNets, whose blocks are stages (AST ends B5 behind the sixth of seven); the
                deepest output is then that of the last block kept. None keeps all.
            padded_for: For networks with TensorFlow's "same" padding, which depends on the size of the image: keep
                the one of an image with this side, pixels, whatever comes (`fix_same_padding`).

        Raises:
            ConfigError: unknown backbone, a reduction that it does not have (lists what it has), batch norms that
                cannot be folded, no final norm, `blocks` that it does not have, or no "same" padding to fix.
            WeightsError: the weights cannot be had (lists the places looked at) or do not fit.
        """
        super().__init__()
        architecture = KNOWN[name].network or name if name in KNOWN else name
        stages = last_stages(name, reductions)
        staged = blocks is not None and _is_staged(architecture)
        if blocks is not None and not staged:
            stages = _first_blocks(name, architecture, stages, blocks)
        self.name = name
        self.reductions = tuple(stage.reduction for stage in stages)
        self.channels = tuple(stage.channels for stage in stages)
        with _seeded(seed):
            self.network = _build(architecture, [stage.number for stage in stages], final_norm)
        if blocks is not None and staged:
            self.channels = (*self.channels[:-1], _end_behind(name, self.network, blocks))
        if padded_for is not None:
            fix_same_padding(self.network, padded_for)
        self.weights_source = {"name": name, "source": "none", "sha256": ""}
        if weights == "random":
            self.weights_source["source"] = "random"
        elif pretrained:
            self._load(architecture, weights)
        mean, std = _normalisation(name, architecture)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.eval()
        self._channels_last = str(getattr(self.network, "output_fmt", "NCHW")).endswith("NHWC")
        probe = _probe_image(architecture, seed)
        if fold_bn:
            fold_batch_norm(self.network, probe)
        self.nonneg = self._check_outputs(probe)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features of images (B, 3, H, W) in 0..1, shallow first: (B, C_i, H / r_i, W / r_i), rounded up.

        Raises:
            ShapeError: `images` is not (B, 3, H, W).
        """
        check_shapes(images=(images, "B 3 H W"))
        return self.features((images - self.mean) / self.std)

    def features(self, x: Tensor) -> list[Tensor]:
        """As `forward`, for images that are normalised already."""
        if x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last)  # the convolutions' faster path, to the same result
        outputs: list[Tensor] = self.network(x)
        if self._channels_last:
            outputs = [output.permute(0, 3, 1, 2) for output in outputs]  # B h w C -> B C h w
        return [output.contiguous() for output in outputs]

    def train(self, mode: bool = True) -> ImageBackbone:
        """Stay in eval mode whatever `mode` says: the statistics of a frozen network do not follow the batch."""
        super().train(False)
        return self

    def extra_repr(self) -> str:
        """Name, reductions and origin of the weights, for printing."""
        return f"'{self.name}', reductions={self.reductions}, weights={self.weights_source['source']}"

    def _load(self, architecture: str, weights: str) -> None:
        file = resolve(self.name, weights)
        state = load_state(file.path)
        if is_efficientnet_lite(state):
            state = efficientnet_lite_to_timm(state, _whole(architecture))
        self.network.load_state_dict(fit_state(state, self.network, f"weights of '{self.name}': {file.path}"))
        self.weights_source |= {"source": file.source, "sha256": file.sha256}

    @torch.inference_mode()
    def _check_outputs(self, probe: Tensor) -> bool:
        """Check on a normalised image that the outputs are grids as promised; whether all of them are >= 0."""
        outputs, size = self.features(probe), probe.shape[-1]
        for output, channels, reduction in zip(outputs, self.channels, self.reductions):
            expected = (1, channels, size // reduction, size // reduction)
            if tuple(output.shape) != expected:
                raise ConfigError(
                    f"backbone '{self.name}': features at reduction {reduction} have shape {tuple(output.shape)} for a "
                    f"{size}x{size} image, expected {expected}; this network has no regular grid, choose another"
                )
        return all(bool((output >= 0).all()) for output in outputs)


def default_backbone(
    reductions: Sequence[int] = (4, 8, 16), weights: str = "auto", pretrained: bool = True, seed: int = 0
) -> ImageBackbone:
    """`ImageBackbone` of `DEFAULT_BACKBONE`: EfficientNet-Lite0 trained on ImageNet-1k, at hand without a hub."""
    return ImageBackbone(DEFAULT_BACKBONE, reductions, weights, pretrained, seed)


def trainable_network(name: str, reductions: Sequence[int] = (4, 8, 16), seed: int = 0) -> nn.Module:
    """An untrained copy of a backbone's architecture that learns: the student of forward distillation.

    Returns:
        timm's feature network under its own tensor names, in train mode: normalised images (B, 3, H, W) -> features
        (B, C_i, H / r_i, W / r_i), shallow first.

    Raises:
        ConfigError: unknown backbone, a reduction that it does not have, or features that are not (B, C, h, w).
    """
    architecture = KNOWN[name].network or name if name in KNOWN else name
    with _seeded(seed):
        network = _build(architecture, [stage.number for stage in last_stages(name, reductions)], False)
    if str(getattr(network, "output_fmt", "NCHW")).endswith("NHWC"):
        raise ConfigError(
            f"backbone '{name}' returns channels last and cannot be a student: choose a convolutional one"
        )
    return network.train()


def last_stages(name: str, reductions: Sequence[int]) -> list[Stage]:
    """For each wanted reduction the last stage of backbone `name` that has it, shallow first.

    Raises:
        ConfigError: unknown backbone; no reduction wanted, one wanted twice, or one that the network does not have.
    """
    architecture = KNOWN[name].network or name if name in KNOWN else name
    kind = describe(name).kind  # raises for what timm does not know, naming the nearest
    if kind == "points":
        raise ConfigError(f"backbone '{name}' is a network of points and takes no images: see `load_point_transformer`")
    if kind == "patches":
        raise ConfigError(f"backbone '{name}' is a network of patches with one output: see `load_patch_description`")
    stages = {stage.reduction: stage for stage in _stages(architecture)}  # later ones replace earlier ones
    if not reductions or len(set(reductions)) != len(reductions) or not set(reductions) <= set(stages):
        raise ConfigError(
            f"backbone '{name}' has features at reductions {sorted(stages)}, asked for {list(reductions)}: "
            f"name one or more of them, each once"
        )
    return sorted(stages[reduction] for reduction in reductions)


def _first_blocks(name: str, architecture: str, stages: Sequence[Stage], blocks: int) -> list[Stage]:
    """The stage behind the first `blocks` blocks of a transformer on one grid."""
    known = len(getattr(_whole(architecture), "blocks", ()))
    if not known or len({stage.reduction for stage in _stages(architecture)}) > 1:
        raise ConfigError(
            f"`blocks` is for transformers on one grid (vit_...) and EfficientNets, '{name}' is neither: leave it None"
        )
    if not 1 <= blocks <= known:
        raise ConfigError(f"`blocks` of backbone '{name}' must be in 1..{known}, got {blocks}")
    return [stage._replace(number=blocks - 1) for stage in stages]


def _is_staged(architecture: str) -> bool:
    """Whether the network's blocks are stages that can be cut anywhere, as those of EfficientNets."""
    return hasattr(_whole(architecture), "conv_stem") and len({s.reduction for s in _stages(architecture)}) > 1


def _end_behind(name: str, network: Any, blocks: int) -> int:
    """End an EfficientNet behind its block number `blocks` (from 1), which becomes the deepest output; its channels."""
    taps = dict(sorted(network._stage_out_idx.items()))  # timm's: number of a block -> number of an output
    last, before = list(taps)[-1], list(taps)[-2:-1]
    known = int(network.feature_info.info[-1]["stage"])
    first = _first_at_same_grid(network, last)
    if not max([first, *(end + 1 for end in before)]) <= blocks <= last:
        raise ConfigError(
            f"`blocks` of backbone '{name}' must be in {first}..{last} for this reduction (it has {known}), got "
            f"{blocks}"
        )
    taps[blocks] = taps.pop(last)
    network._stage_out_idx = taps
    network.blocks = network.blocks[:blocks]
    norms = [module for module in network.blocks[-1].modules() if isinstance(module, nn.BatchNorm2d)]
    return int(norms[-1].num_features)


def _first_at_same_grid(network: Any, last: int) -> int:
    """The first block (from 1) whose output has the grid of block `last`'s."""
    first = last
    while first > 1 and all(max(m.stride) == 1 for m in network.blocks[first - 1].modules() if _is_conv(m)):
        first -= 1
    return first


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d)


@lru_cache
def _stages(architecture: str) -> tuple[Stage, ...]:
    with torch.device("meta"):  # names and shapes only: no memory, no random numbers
        info = _create(architecture, features_only=True).feature_info
    return tuple(Stage(*row) for row in zip(info.out_indices, info.reduction(), info.channels()))


class _NormedTokens(nn.Module):
    """Patch tokens of a transformer behind its final norm, as grids."""

    def __init__(self, model: Any, numbers: Sequence[int]) -> None:
        super().__init__()
        model.prune_intermediate_layers(list(numbers), prune_norm=False, prune_head=True)
        self.model = model
        self.numbers = list(numbers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Tokens (B, C, h, w) of each block in `numbers`."""
        tokens: list[Tensor] = self.model.forward_intermediates(
            x, indices=self.numbers, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        return tokens


def _build(architecture: str, numbers: Sequence[int], final_norm: bool) -> nn.Module:
    """timm's feature network that returns the stages `numbers` and ends behind the last of them."""
    if final_norm:
        whole = _create(architecture)
        if not isinstance(getattr(whole, "norm", None), nn.LayerNorm) or not hasattr(whole, "blocks"):
            raise ConfigError(f"backbone '{architecture}' has no final norm over patch tokens: leave final_norm False")
        return _NormedTokens(whole, numbers)
    network = _create(architecture, features_only=True, out_indices=tuple(numbers))
    stages = getattr(network, "_stage_out_idx", None)
    if stages is not None and getattr(network, "feature_hooks", None) is None:
        network.blocks = network.blocks[: max(stages)]  # EfficientNet and MobileNet families keep all their blocks
    return network


def _whole(architecture: str) -> Any:
    """The whole network on the meta device: names and shapes."""
    with torch.device("meta"):
        return _create(architecture)


def _create(architecture: str, **options: Any) -> Any:
    """`timm.create_model` without weights; networks of fixed input size are opened for any size where timm can."""
    import timm

    flexible = {"dynamic_img_size": True} if timm.get_pretrained_cfg(architecture).fixed_input_size else {}
    try:
        return timm.create_model(architecture, pretrained=False, **options, **flexible)
    except TypeError:
        if not flexible:
            raise
        return timm.create_model(architecture, pretrained=False, **options)


def _probe_image(architecture: str, seed: int) -> Tensor:
    """A normalised random image (1, 3, S, S) of a size that the network takes."""
    import timm

    entry = timm.get_pretrained_cfg(architecture)
    size = int(entry.input_size[1]) if entry.fixed_input_size else _PROBE_SIZE
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(seed))


def _normalisation(name: str, architecture: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of 0..1 images that the weights expect."""
    known = KNOWN.get(name)
    if known is not None and known.mean is not None and known.std is not None:
        return known.mean, known.std
    import timm

    entry = timm.get_pretrained_cfg(architecture)
    return entry.mean, entry.std


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's global RNG inside the block and put its state back afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
