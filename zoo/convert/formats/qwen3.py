"""Qwen3 and SDAR folders of `transformers`: SDAR has Qwen3's weights, and a block size and a mask in its config."""

from typing import Any, cast

from torch import nn

from zoo.convert.fields import Fields
from zoo.convert.format import Described, Format
from zoo.convert.formats.llama import NAMES, config_of, decoder_of, stands_for
from zoo.errors import UserError
from zoo.layers import SequenceModel


def describe(fields: Fields) -> Described:
    """The sdar that a Qwen3's or SDAR's config means."""
    kind = fields.take("model_type", str)
    config = {
        **decoder_of(fields),
        "n_kv_heads": fields.size("num_key_value_heads", 32),
        "head_dim": fields.size("head_dim", 128),
    }
    if kind == "sdar":
        config["block_size"] = fields.size("block_size")
        config["mask_token_id"] = fields.take("mask_token_id", int, 151669)
        fields.excuse("fuse_cross_entropy")  # how its own code trains
    fields.demand("use_sliding_window", False)
    fields.excuse("sliding_window")  # not used, as demanded above
    fields.excuse("max_window_layers")
    fields.excuse("layer_types")
    fields.finish()
    return Described("sdar", config)


def undescribe(model: nn.Module) -> dict[str, Any]:
    """The config of an SDAR."""
    blocks: list[Any] = list(cast(SequenceModel, model).blocks)
    c: Any = model.config
    first = blocks[0].mixer
    if first.q_norm is None or blocks[0].feed_forward is None or c.residual_scale:
        raise UserError(
            "transformers' Qwen3 has norms of queries and keys, a feed-forward and a plain residual; this model has "
            f"qk_norm={c.qk_norm}, hidden_size={c.hidden_size}, residual_scale={c.residual_scale}"
        )
    return {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "attention_bias": False,
        **config_of(model),
        "block_size": c.block_size,
        "mask_token_id": c.vocab_size - 1 if c.mask_token_id is None else c.mask_token_id,
    }


QWEN3 = Format(
    kind="a Qwen3 or SDAR of transformers",
    types=("qwen3", "sdar"),
    describe=describe,
    names=NAMES,
    stands_for=stands_for,
    models=("sdar",),
    undescribe=undescribe,
)

FORMATS = (QWEN3,)
