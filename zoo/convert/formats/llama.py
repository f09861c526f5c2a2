"""Llama and Mistral folders of `transformers`: the transformer under other names."""

import re
from collections.abc import Collection
from typing import Any, cast

from torch import nn

from zoo.convert.fields import Fields
from zoo.convert.format import Described, Format, Names
from zoo.errors import UserError
from zoo.layers import Attention, SequenceModel

NAMES = Names(
    whole={"embedding.": "model.embed_tokens.", "norm.": "model.norm.", "lm_head.": "lm_head."},
    layers="model.layers.{i}.",
    inside={
        "mixer_norm.": "input_layernorm.",
        "mixer.": "self_attn.",
        "feed_forward_norm.": "post_attention_layernorm.",
        "feed_forward.": "mlp.",
    },
)
_TABLES = re.compile(r"\.rotary_emb\.inv_freq$")  # old versions stored what rope_theta says


def describe(fields: Fields) -> Described:
    """The transformer that a Llama's or Mistral's config means."""
    kind = fields.take("model_type", str)
    config = decoder_of(fields)
    d_model, n_heads = config["d_model"], config["n_heads"]
    window = None
    if kind == "mistral":  # whose window is 4096 when the file does not say otherwise
        window = fields.size("sliding_window", None) if fields.has("sliding_window") else 4096
    config |= {
        "n_kv_heads": fields.size("num_key_value_heads", 8 if kind == "mistral" else n_heads),
        "head_dim": fields.size("head_dim", d_model // n_heads),
        "window": window,
    }
    fields.demand("mlp_bias", False)
    fields.finish()
    return Described("transformer", config)


def decoder_of(fields: Fields) -> dict[str, Any]:
    """What all decoders of Llama's family say in the same words."""
    fields.demand("hidden_act", "silu", "swish")
    fields.demand("attention_bias", False)
    fields.excuse("attention_dropout")  # only while training
    return {
        "d_model": fields.size("hidden_size"),
        "n_layers": fields.size("num_hidden_layers"),
        "vocab_size": fields.size("vocab_size"),
        "hidden_size": fields.size("intermediate_size"),
        "n_heads": fields.size("num_attention_heads"),
        "rope_base": rope_base_of(fields),
        "norm_eps": fields.take("rms_norm_eps", float, 1e-6),
        "tie_embeddings": fields.take("tie_word_embeddings", bool, False),
    }


def rope_base_of(fields: Fields) -> float:
    """The base of the rotary frequencies, wherever the version that wrote the file put it."""
    theta = fields.take("rope_theta", float, None)
    for place in ("rope_scaling", "rope_parameters"):
        inner = Fields(fields.take(place, dict, {}), f"{place} in {fields.source}")
        for name in ("rope_type", "type"):
            inner.demand(name, "default")
        inner.demand("partial_rotary_factor", 1.0)
        theta = inner.take("rope_theta", float, theta)
        inner.finish()
    fields.demand("partial_rotary_factor", 1.0)
    return 10000.0 if theta is None else theta


def stands_for(name: str, names: Collection[str]) -> tuple[str, ...]:
    """Tables of rotary frequencies are left out."""
    return () if _TABLES.search(name) else (name,)


def undescribe(model: nn.Module) -> dict[str, Any]:
    """The config of a Llama, or of a Mistral when the attention has a window."""
    blocks: list[Any] = list(cast(SequenceModel, model).blocks)
    c: Any = model.config
    first = blocks[0].mixer
    if any(not isinstance(block.mixer, Attention) or block.mixer.extra_repr() != first.extra_repr()
           for block in blocks):  # fmt: skip
        raise UserError(f"transformers' Llama has the same attention in every layer; this pattern is {c.pattern!r}")
    if first.q_norm is not None or first.rope_base is None or blocks[0].feed_forward is None:
        raise UserError(
            "transformers' Llama has rotary positions, a feed-forward and no norm of queries and keys; "
            f"this model has qk_norm={c.qk_norm}, rope_base={first.rope_base}, hidden_size={c.hidden_size}"
        )
    kind = "llama" if first.window is None else "mistral"
    config = {
        "architectures": ["MistralForCausalLM" if kind == "mistral" else "LlamaForCausalLM"],
        "model_type": kind,
        **config_of(model),
    }
    own = {"sliding_window": first.window} if kind == "mistral" else {"attention_bias": False, "mlp_bias": False}
    return config | own


def config_of(model: nn.Module) -> dict[str, Any]:
    """What all decoders of Llama's family say in the same words, of a model whose layers are alike."""
    blocks: list[Any] = list(cast(SequenceModel, model).blocks)
    c: Any = model.config
    first = blocks[0].mixer
    return {
        "hidden_size": c.d_model,
        "num_hidden_layers": c.n_layers,
        "vocab_size": c.vocab_size,
        "intermediate_size": blocks[0].feed_forward.up_proj.out_features,
        "num_attention_heads": first.n_heads,
        "num_key_value_heads": first.n_kv_heads,
        "head_dim": first.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": first.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": first.rope_base},
        "tie_word_embeddings": c.tie_embeddings,
        "initializer_range": c.init_std,
    }


LLAMA = Format(
    kind="a Llama or Mistral of transformers",
    types=("llama", "mistral"),
    describe=describe,
    names=NAMES,
    stands_for=stands_for,
    models=("transformer",),
    undescribe=undescribe,
)

FORMATS = (LLAMA,)
