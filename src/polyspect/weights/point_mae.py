"""The official Point-MAE and Point-BERT checkpoints for `polyspect.backbones.point_transformer.PointTransformer`.

The file (``pretrain.pth``, also called ``pointmae_pretrain.pth``) holds ``base_model``, the whole pretraining network,
beside records of the training. Only its encoder, ``MAE_encoder.``, is of use; its 1x1 convolutions are matrices here.
Of Point-BERT's file ``transformer_q.`` is of use, without its ``cls_head``: the same names, and the class token's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..errors import WeightsError
from .convert import State
from .renaming import LAYER, Tensors, rename, unwrap

if TYPE_CHECKING:
    from torch import nn

SHA256 = "27ded932bb0a2625d5a8eb006df199b2578598c774aee6d86b985300b6a5fd20"
"""Of the released file, as anomalib's port of CFM pins it."""

ENCODER = "MAE_encoder."
_QUERY = "transformer_q."
_BLOCKS = 12  # in the published encoder
PRETRAINING = ("mask_token", "decoder_pos_embed.", "MAE_decoder.", "increase_dim.")  # reconstruct masked groups
_COUNTERS = tuple(f"encoder.{part}_conv.1.num_batches_tracked" for part in ("first", "second"))

_NAMES = {
    "encoder.first_conv.0.": "encoder.local1.",
    "encoder.first_conv.1.running_mean": "encoder.norm1.mean",
    "encoder.first_conv.1.running_var": "encoder.norm1.var",
    "encoder.first_conv.1.": "encoder.norm1.",
    "encoder.first_conv.3.": "encoder.local2.",
    "encoder.second_conv.0.": "encoder.joint1.",
    "encoder.second_conv.1.running_mean": "encoder.norm2.mean",
    "encoder.second_conv.1.running_var": "encoder.norm2.var",
    "encoder.second_conv.1.": "encoder.norm2.",
    "encoder.second_conv.3.": "encoder.joint2.",
    "pos_embed.": "position.",
    "norm.": "norm.",
}
_BLOCK_NAMES = {
    "norm1.": "attention_norm.",
    "attn.qkv.": "qkv.",
    "attn.proj.": "projection.",
    "norm2.": "mlp_norm.",
    "mlp.fc1.": "mlp.0.",
    "mlp.fc2.": "mlp.2.",
}


def point_mae_state(content: Any, network: nn.Module, origin: str = "the Point-MAE checkpoint") -> State:
    """The state dict of a `PointTransformer` from what the official file holds.

    Dropped: the decoder and the other parts that only pretraining uses, the counters of batch norm, and the blocks that
    `network` was built without. Everything else must fit.

    Args:
        content: The file's content, its ``base_model``, or the encoder alone (names without ``MAE_encoder.``); a
            leading ``module.`` is dropped.
        network: The `PointTransformer`; only names, shapes and kinds are read.
        origin: Names the file in errors.

    Raises:
        WeightsError: a tensor is unknown, missing, of another shape or kind, or not finite (names it).
    """
    state = unwrap(content, "base_model", origin)
    if any(name.startswith(ENCODER) for name in state):
        rest = [name for name in state if not name.startswith((ENCODER, *PRETRAINING))]
        if rest:
            raise WeightsError(f"{origin} has '{rest[0]}', which is no part of Point-MAE: it is of another network")
        state = {name.removeprefix(ENCODER): x for name, x in state.items() if name.startswith(ENCODER)}
    return _encoder(state, network, _NAMES, _COUNTERS, origin)


def point_bert_state(content: Any, network: nn.Module, origin: str = "the Point-BERT checkpoint") -> State:
    """The state dict of a `PointTransformer` of size ``bert`` from Point-BERT's file.

    Dropped: all that is not under ``transformer_q.``, what pre-training has beside the encoder there (``cls_head``,
    ``lm_head``, ``mask_token``), and what `point_mae_state` drops.

    Args:
        content: The file's content, or its ``base_model``; a leading ``module.`` is dropped.
        network: As in `point_mae_state`.
        origin: Names the file in errors.

    Raises:
        WeightsError: nothing is under ``transformer_q.``, or a tensor there is unknown, missing, of another shape or
            kind, or not finite (names it).
    """
    state = unwrap(content, "base_model", origin)
    own = {name.removeprefix(_QUERY): x for name, x in state.items() if name.startswith(_QUERY)}
    if not own:
        raise WeightsError(f"{origin} has no tensor under '{_QUERY}', where Point-BERT's encoder lies")
    names = _NAMES | {"cls_token": "class_token", "cls_pos": "class_position", "reduce_dim.": "reduce."}
    return _encoder(own, network, names, (*_COUNTERS, "cls_head.", "lm_head.", "mask_token"), origin)


def _encoder(state: State, network: nn.Module, names: Tensors, drop: Iterable[str], origin: str) -> State:
    depth = len({name.split(".")[1] for name in network.state_dict() if name.startswith("blocks.")})
    names = dict(names)
    for index in range(depth):
        names |= {f"blocks.blocks.{index}.{old}": f"blocks.{index}.{new}" for old, new in _BLOCK_NAMES.items()}
    unused = [f"blocks.blocks.{index}.{old}" for index in range(depth, _BLOCKS) for old in _BLOCK_NAMES]
    return rename(state, network, names, [*drop, *unused], origin)


def point_mae_tensors(names: Iterable[str]) -> Tensors:
    """Published name -> ours of every tensor of the encoder, as the names show it: in the whole file or alone."""
    start = ENCODER if any(name.startswith(ENCODER) for name in names) else ""
    found: Tensors = {}
    for old, new in _NAMES.items():
        if not old.endswith("."):
            found[old] = new
        elif old == "pos_embed.":
            found |= {f"{old}{index}.{leaf}": f"{new}{index}.{leaf}" for index in (0, 2) for leaf in LAYER}
        else:
            found |= {old + leaf: new + leaf for leaf in LAYER}
    for index in range(_BLOCKS):
        for old, new in _BLOCK_NAMES.items():
            leaves = ("weight",) if old == "attn.qkv." else LAYER
            found |= {f"blocks.blocks.{index}.{old}{leaf}": f"blocks.{index}.{new}{leaf}" for leaf in leaves}
    return {start + old: new for old, new in found.items()}
