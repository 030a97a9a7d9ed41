"""Names and shapes of published checkpoints, written out from their tables, and the numbers that golden files use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from golden import filled
from polyspect.layers.blocks import BlockPlan

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Network:
    """A ResNet teacher as the published code builds students for it."""

    widths: tuple[int, int, int]  # at strides 4, 8, 16
    kind: str
    shrink: int  # output over inner width
    embedding_blocks: int
    decoder_blocks: tuple[int, int, int]

    @property
    def plan(self) -> BlockPlan:
        """The same for our students."""
        return BlockPlan(self.kind, self.shrink, self.embedding_blocks, self.decoder_blocks)


WIDE_RESNET50 = Network((256, 512, 1024), "bottleneck", 2, 3, (3, 4, 6))
RESNET50 = Network((256, 512, 1024), "bottleneck", 4, 3, (3, 4, 6))
RESNET18 = Network((64, 128, 256), "basic", 1, 2, (2, 2, 2))
LITE0 = Network((24, 40, 112), "basic", 1, 2, (2, 2, 2))  # nobody published one: the same names at other widths
TINY = Network((4, 8, 16), "bottleneck", 2, 2, (1, 2, 3))


def rd4ad_shapes(network: Network) -> dict[str, Shapes]:
    """``{"bn", "decoder"}`` of plain reverse distillation."""
    return {"bn": _embedding(network, sources=1), "decoder": _decoder(network)}


def crd_shapes(network: Network, *, filtered: bool = True, mixed: bool = True) -> Shapes:
    """One CRD student."""
    shapes = _under("bn", _embedding(network, sources=2 if filtered else 1)) | _under("decoder", _decoder(network))
    if mixed:
        shapes |= {f"decoder.w_{letter}": (2,) for letter in "abc"}
    for letter, width, halvings in zip("abc", network.widths, (3, 2, 1)):
        if filtered:
            shapes |= _under(f"projector_filter.conv_{letter}", _hourglass(width, halvings))
        if mixed:
            wide = ((width, width, 3, 3), (2 * width, width, 1, 1), (width, 2 * width, 1, 1))
            numbered = [_unit(str(3 * at), str(3 * at + 1), shape, shape[0]) for at, shape in enumerate(wide)]
            shapes |= _under(f"projector_amply.conv_{letter}", {k: v for part in numbered for k, v in part.items()})
    return shapes


def anomalib_shapes(network: Network) -> Shapes:
    """The state dict of anomalib's Lightning module, with a piece of its teacher."""
    parts = rd4ad_shapes(network)
    shapes = _under("model.encoder.feature_extractor", _unit("conv1", "bn1", (64, 3, 7, 7), 64))
    shapes |= _under("model.bottleneck", parts["bn"]) | _under("model.decoder", parts["decoder"])
    return shapes | {"post_processor._image_threshold": (), "post_processor.pixel_max": ()}


def stfpm_shapes(widths: Sequence[int] = (64, 128, 256, 512)) -> Shapes:
    """The state dict of the official STFPM student: ResNet-18 without its head, layers numbered."""
    shapes = _under("model", _unit("0", "1", (widths[0], 3, 7, 7), widths[0]))
    inputs = widths[0]
    for number, outputs in enumerate(widths, start=4):
        plan = Network((0, 0, 0), "basic", 1, 2, (2, 2, 2))
        change = "same" if number == 4 else "down"
        shapes |= _under(f"model.{number}", _stage(plan, 2, inputs, outputs, change))
        inputs = outputs
    return shapes


def filled_state(shapes: Mapping[str, tuple[int, ...]], root: str = "") -> dict[str, torch.Tensor]:
    """The golden weights of every tensor."""
    return {name: filled(root + name, *shape) for name, shape in shapes.items()}


def meta_state(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Names and shapes without numbers."""
    return {
        name: torch.empty(shape, device="meta", dtype=torch.int64 if name.endswith("tracked") else torch.float32)
        for name, shape in shapes.items()
    }


def _embedding(network: Network, sources: int) -> Shapes:
    c3 = network.widths[2]
    wide1, wide2, wide3 = (sources * width for width in network.widths)
    shapes = _unit("conv1", "bn1", (wide2, wide1, 3, 3), wide2)
    shapes |= _unit("conv2", "bn2", (c3, wide2, 3, 3), c3)
    shapes |= _unit("conv3", "bn3", (c3, wide2, 3, 3), c3)
    if sources == 1:
        shapes |= _unit("conv4", "bn4", (2 * c3, 4 * c3, 1, 1), 2 * c3)  # dead weight
    else:
        shapes |= _unit("conv4", "bn4", (c3, wide3, 3, 3), c3)
    return shapes | _under("bn_layer", _stage(network, network.embedding_blocks, 3 * c3, 2 * c3, "down"))


def _decoder(network: Network) -> Shapes:
    c1, c2, c3 = network.widths
    shapes: Shapes = {}
    for number, (inputs, outputs) in enumerate(((2 * c3, c3), (c3, c2), (c2, c1)), start=1):
        blocks = network.decoder_blocks[number - 1]
        shapes |= _under(f"layer{number}", _stage(network, blocks, inputs, outputs, "up"))
    return shapes


def _hourglass(width: int, halvings: int) -> Shapes:
    shapes: Shapes = {}
    widths = [width * 2**at for at in range(halvings + 1)]
    pairs = [*pairwise(widths), *pairwise(widths[::-1])]
    for at, (inputs, outputs) in enumerate(pairs):
        kernel = (outputs, inputs, 2, 2) if at < halvings else (inputs, outputs, 2, 2)
        shapes |= _unit(str(3 * at), str(3 * at + 1), kernel, outputs)
    return shapes


def _stage(network: Network, blocks: int, inputs: int, outputs: int, change: str) -> Shapes:
    shapes: Shapes = {}
    for at in range(blocks):
        shapes |= _under(
            str(at), _block(network, inputs if at == 0 else outputs, outputs, change if at == 0 else "same")
        )
    return shapes


def _block(network: Network, inputs: int, outputs: int, change: str) -> Shapes:
    inner = outputs // network.shrink
    spatial = (2, 2) if change == "up" else (3, 3)
    if network.kind == "basic":
        first = (inputs, outputs, 2, 2) if change == "up" else (outputs, inputs, 3, 3)
        shapes = _unit("conv1", "bn1", first, outputs) | _unit("conv2", "bn2", (outputs, outputs, 3, 3), outputs)
    else:
        shapes = _unit("conv1", "bn1", (inner, inputs, 1, 1), inner)
        shapes |= _unit("conv2", "bn2", (inner, inner, *spatial), inner)
        shapes |= _unit("conv3", "bn3", (outputs, inner, 1, 1), outputs)
    if change == "up":
        shapes |= _under("upsample", _unit("0", "1", (inputs, outputs, 2, 2), outputs))
    elif change == "down":
        shapes |= _under("downsample", _unit("0", "1", (outputs, inputs, 1, 1), outputs))
    return shapes


def _unit(conv: str, norm: str, kernel: tuple[int, ...], width: int) -> Shapes:
    shapes: Shapes = {f"{conv}.weight": kernel}
    shapes |= {f"{norm}.{leaf}": (width,) for leaf in ("weight", "bias", "running_mean", "running_var")}
    return shapes | {f"{norm}.num_batches_tracked": ()}


def _under(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}
