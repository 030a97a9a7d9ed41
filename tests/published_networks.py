"""Names and shapes of the tensors in published checkpoints; `golden.filled_state` gives them their numbers."""

from __future__ import annotations

from golden import Shapes, batch_norm, layer


def _transformer(start: str, count: int) -> Shapes:
    shapes: Shapes = {}
    for name in (f"{start}.{index}" for index in range(count)):
        shapes |= layer(f"{name}.norm1", 384) | layer(f"{name}.norm2", 384)
        shapes |= layer(f"{name}.attn.qkv", 1152, 384, bias=False) | layer(f"{name}.attn.proj", 384, 384)
        shapes |= layer(f"{name}.mlp.fc1", 1536, 384) | layer(f"{name}.mlp.fc2", 384, 1536)
    return shapes


POINT_MAE_ENCODER = (
    layer("encoder.first_conv.0", 128, 3, 1)
    | batch_norm("encoder.first_conv.1", 128)
    | layer("encoder.first_conv.3", 256, 128, 1)
    | layer("encoder.second_conv.0", 512, 512, 1)
    | batch_norm("encoder.second_conv.1", 512)
    | layer("encoder.second_conv.3", 384, 512, 1)
    | layer("pos_embed.0", 128, 3)
    | layer("pos_embed.2", 384, 128)
    | _transformer("blocks.blocks", 12)
    | layer("norm", 384)
)
"""156 tensors."""

POINT_MAE = (
    {"mask_token": (1, 1, 384)}
    | {f"MAE_encoder.{name}": shape for name, shape in POINT_MAE_ENCODER.items()}
    | layer("decoder_pos_embed.0", 128, 3)
    | layer("decoder_pos_embed.2", 384, 128)
    | _transformer("MAE_decoder.blocks", 4)
    | layer("MAE_decoder.norm", 384)
    | layer("increase_dim.0", 96, 384, 1)
)
"""The whole pretraining network."""

POINT_BERT = {
    f"transformer_q.{name}": shape
    for name, shape in (
        POINT_MAE_ENCODER
        | layer("encoder.second_conv.3", 256, 512, 1)
        | layer("reduce_dim", 384, 256)
        | {"cls_token": (1, 1, 384), "cls_pos": (1, 1, 384)}
        | layer("cls_head.0", 5, 384)
        | layer("lm_head", 7, 384)
        | {"mask_token": (1, 1, 384)}
    ).items()
} | {"transformer_k.norm.weight": (384,)}
"""What is of use in Point-BERT's file, what pre-training has beside it, and one tensor of another part."""


def fusion() -> Shapes:
    """M3DM's UFF: 16 tensors."""
    shapes: Shapes = {}
    for half, channels in (("xyz", 1152), ("rgb", 768)):
        shapes |= layer(f"{half}_norm", channels) | layer(f"{half}_head", 256, channels)
        shapes |= layer(f"{half}_mlp.fc1", 4 * channels, channels) | layer(f"{half}_mlp.fc2", channels, 4 * channels)
    return shapes


def f2f_mlp(depth: int = 1) -> Shapes:
    """CMDIAD's F2F, both directions."""
    shapes: Shapes = {}
    for half in ("xyz", "rgb"):
        shapes |= layer(f"{half}_norm", 768)
        for name in (f"{half}_mlp.mlp_module.{index}" for index in range(depth)):
            shapes |= layer(f"{name}.fc1", 1920, 768) | layer(f"{name}.fc2", 1920, 1920)
            shapes |= layer(f"{name}.fc3", 768, 1920)
    return shapes


def f2f_conv(channels: int = 768) -> Shapes:
    """CMDIAD's F2F by convolutions, both directions."""
    shapes: Shapes = {}
    for half in ("xyz", "rgb"):
        for index in (0, 3, 6, 9):
            shapes |= layer(f"{half}_conv.{index}", channels, channels, 3, 3, bias=False)
        for index in (1, 4, 7):
            shapes |= batch_norm(f"{half}_conv.{index}", channels)
    return shapes


def f2i_conv() -> Shapes:
    """CMDIAD's F2I, with the norm that it never uses."""
    widths = (768, 384, 96, 32, 3)
    shapes = layer("norm", 768)
    for index in range(4):
        shapes |= layer(f"conv{index + 1}", widths[index + 1], widths[index], 3, 3)
    return shapes


def f2i_mlp() -> Shapes:
    """CMDIAD's F2I by an MLP."""
    widths = (768, 1152, 384, 96, 3)
    shapes = layer("rgb_norm", 768)
    for index in range(4):
        shapes |= layer(f"mlp.{2 * index}", widths[index + 1], widths[index])
    return shapes


def i2f() -> Shapes:
    """CMDIAD's I2F, with the fourth stage that it never uses."""
    shapes = layer("conv1", 64, 3, 3, 3, bias=False) | batch_norm("bn1", 64)
    shapes |= layer("conv2", 128, 64, 3, 3, bias=False) | batch_norm("bn2", 128)
    for stage in (1, 2, 3, 4):
        for index in range(4):
            name, inputs = f"layer{stage}.{index}", 128 if (stage, index) == (1, 0) else 512
            shapes |= layer(f"{name}.conv1", 128, inputs, 1, 1, bias=False) | batch_norm(f"{name}.bn1", 128)
            shapes |= layer(f"{name}.conv2", 128, 128, 3, 3, bias=False) | batch_norm(f"{name}.bn2", 128)
            shapes |= layer(f"{name}.conv3", 512, 128, 1, 1, bias=False) | batch_norm(f"{name}.bn3", 512)
            if inputs == 128:
                shapes |= layer(f"{name}.downsample.0", 512, 128, 1, 1, bias=False)
                shapes |= batch_norm(f"{name}.downsample.1", 512)
    return shapes | layer("final_layer", 768, 512, 1, 1)


def mapping(inputs: int, outputs: int, big: bool = False) -> Shapes:
    """CFM's MLP."""
    width = (inputs + outputs) // 2
    shapes = layer("input", width, inputs) | layer("output", outputs, width)
    for name in [f"projection_{letter}" for letter in "abcde"] if big else ["projection"]:
        shapes |= layer(name, width, width)
    return shapes


def pdn(size: str, outputs: int = 384) -> Shapes:
    """EfficientAD's patch description network, with anomalib's names."""
    widths, kernels = (3, 128, 256, 256, outputs), (4, 4, 3, 4)
    if size == "medium":
        widths, kernels = (3, 256, 512, 512, 512, outputs, outputs), (4, 4, 1, 3, 4, 1)
    shapes: Shapes = {}
    for index, kernel in enumerate(kernels):
        shapes |= layer(f"conv{index + 1}", widths[index + 1], widths[index], kernel, kernel)
    return shapes


def signed_distance(width: int = 512) -> Shapes:
    """Shape-Guided's SDF model, with weight norm in its old names."""
    shapes: Shapes = {}
    for index, (a, b) in enumerate(((3, 64), (64, 128), (128, 1024)), start=1):
        shapes |= layer(f"encoder.conv{index}", b, a, 1)
    shapes |= layer("encoder.fc1", 512, 1024) | layer("encoder.fc2", 128, 512)
    for index, channels in enumerate((64, 128, 1024, 512, 128), start=1):
        shapes |= batch_norm(f"encoder.bn{index}", channels)
    shapes |= layer("NIF.fc1", width, 128) | layer("NIF.fc2", width, 3) | layer("NIF.fc3", width, 2 * width)
    for index in range(7):
        name = f"NIF.fc4{index}"
        shapes |= {f"{name}.bias": (width,), f"{name}.weight_g": (width, 1), f"{name}.weight_v": (width, width)}
    return shapes | layer("NIF.fc5", 1, width)


def ast_teacher(channels: int, hidden: int = 64, position: int = 32, kernels: tuple[int, ...] = (3, 3, 3, 5)) -> Shapes:
    """AST's flow, an even number of channels."""
    shapes: Shapes = {}
    for index, kernel in enumerate(kernels):
        for half in ("s1", "s2"):
            name = f"module_list.{2 * index + (3 if position else 2)}.{half}"
            shapes |= {f"{name}.gamma": (1,)}
            shapes |= layer(f"{name}.conv1", hidden, channels // 2 + position, kernel, kernel)
            shapes |= layer(f"{name}.conv2", channels, hidden, kernel, kernel)
    return shapes


def ast_student(channels: int, hidden: int = 1024, position: int = 32, blocks: int = 4) -> Shapes:
    """AST's student, with the factor that it never uses."""
    shapes = layer("conv1", hidden, channels + position, 3, 3) | layer("conv2", channels, hidden, 3, 3)
    for name in (f"res.{index}" for index in range(blocks)):
        shapes |= layer(f"{name}.l1", hidden, hidden, 3, 3) | layer(f"{name}.l2", hidden, hidden, 3, 3)
        shapes |= batch_norm(f"{name}.bn1", hidden) | batch_norm(f"{name}.bn2", hidden)
    return shapes | {"gamma": (1,)}
