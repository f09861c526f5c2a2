"""Folders of flash-linear-attention: GLA, DeltaNet, Gated DeltaNet and its transformer, hybrids included."""

import itertools
import math
import re
from collections.abc import Callable, Collection
from typing import Any, cast

from torch import nn

from zoo.convert.fields import Fields
from zoo.convert.format import Described, Format, Names, convolutions_by_channel
from zoo.errors import UserError
from zoo.layers import Attention, SequenceModel
from zoo.layers.pattern import parse_pattern

_LEFT_OUT = re.compile(r"\.rotary\.inv_freq$")  # old versions stored what rope_theta says
# How a version or a setting of the library calls what another calls otherwise.
_ALIASES = {
    "model.embed_tokens.": "model.embeddings.",
    ".attn.g_norm.": ".attn.g_norm_swish_gate.",  # without the fused norm
}


def names(output_norm: str) -> Names:
    """The library's names; its models differ only in that of the norm over each head's output."""
    return Names(
        whole={"embedding.": "model.embeddings.", "norm.": "model.norm.", "lm_head.": "lm_head."},
        layers="model.layers.{i}.",
        inside={
            "mixer_norm.": "attn_norm.",
            "mixer.": "attn.",
            "mixer.convs.0.": "attn.q_conv1d.",
            "mixer.convs.1.": "attn.k_conv1d.",
            "mixer.convs.2.": "attn.v_conv1d.",
            "mixer.o_norm.": f"attn.{output_norm}.",
            "feed_forward_norm.": "mlp_norm.",
            "feed_forward.": "mlp.",
        },
    )


def stands_for(name: str, names: Collection[str]) -> tuple[str, ...]:
    """Older spellings in the present one; a gate_proj without an up_proj beside it holds both, stacked."""
    if _LEFT_OUT.search(name):
        return ()
    for old, new in _ALIASES.items():
        name = name.replace(old, new)
    up = name.replace(".gate_proj.", ".up_proj.")
    return (name, up) if name.endswith(".mlp.gate_proj.weight") and up not in names else (name,)


# -- reading -----------------------------------------------------------------------------------------------------


def _common(fields: Fields) -> dict[str, Any]:
    """Fields of every model of the library."""
    fields.excuse("model_type", "attn_mode")
    fields.excuse("fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy")  # ways, not results
    fields.excuse("use_l2warp", "norm_first")  # a term of the loss; how an old version named and fused its norms
    fields.demand("hidden_act", "swish", "silu")
    fields.demand("elementwise_affine", True)
    fields.demand("conv_bias", False)
    fields.demand("attnres_block_size")
    fields.rename("rms_norm_eps", "norm_eps")
    d_model, ratio = fields.size("hidden_size"), fields.take("hidden_ratio", float, 4.0)
    return {
        "d_model": d_model,
        "n_layers": fields.size("num_hidden_layers"),
        "vocab_size": fields.size("vocab_size", 32000),
        "hidden_size": fields.size("intermediate_size", 256 * -(-int(d_model * ratio * 2 / 3) // 256)),
        "n_heads": fields.size("num_heads"),
        "norm_eps": fields.take("norm_eps", float, 1e-6),
        "tie_embeddings": fields.take("tie_word_embeddings", bool, False),
    }


def _linear(fields: Fields, mixer: str, *, convolution: bool) -> dict[str, Any]:
    """Fields of the models with a linear mixer; `convolution`: whether they have one when the file does not say."""
    config = _common(fields)
    width = fields.size("conv_size", 4)
    convolution = fields.take("use_short_conv", bool, convolution)
    if convolution:
        fields.demand("share_conv_kernel", False)
    fields.excuse("share_conv_kernel")
    pattern = _pattern(fields, mixer, config["n_layers"])
    own = {"conv_size": width if convolution else None, "output_norm_eps": config["norm_eps"], "pattern": pattern}
    return config | own


def _pattern(fields: Fields, mixer: str, n_layers: int) -> str:
    """The pattern of a hybrid, whose `attn` says which layers are attention; empty for a model of one kind."""
    value = fields.take("attn", object, None)
    specs = value if isinstance(value, list) else [value] if value is not None else []
    layers = [mixer] * n_layers
    for spec in specs:
        if not isinstance(spec, dict):
            raise UserError(f"'attn' in {fields.source} must be a dict or a list of them, got {spec!r}")
        inner = Fields(spec, f"attn in {fields.source}")
        inner.demand("qkv_bias", False)
        inner.demand("qk_norm", False)
        n_heads = inner.size("num_heads")
        options = {
            "n_heads": n_heads,
            "n_kv_heads": inner.size("num_kv_heads", n_heads),
            "window": inner.size("window_size", None),
            "rope_base": inner.take("rope_theta", float, 10000.0),
        }
        written = ", ".join(f"{key}={value}" for key, value in options.items() if value is not None)
        for i in inner.take("layers", list):
            if not isinstance(i, int) or not 0 <= i < n_layers:
                raise UserError(f"attn in {fields.source} names layer {i!r}, and there are {n_layers}; mend the file")
            layers[i] = f"attention({written})"
        inner.finish()
    return _shortest(layers) if set(layers) != {mixer} else ""


def _shortest(layers: list[str]) -> str:
    """A pattern for a list of layers: its period, runs counted."""
    n = len(layers)
    period = next(p for p in range(1, n + 1) if n % p == 0 and layers == layers[:p] * (n // p))
    runs = [(name, len(list(group))) for name, group in itertools.groupby(layers[:period])]
    return ", ".join(name if count == 1 else f"{name}*{count}" for name, count in runs)


def describe_gla(fields: Fields) -> Described:
    """The config of zoo's gla that says the same as the library's fields."""
    config = _linear(fields, "gla", convolution=False)
    config |= {
        "n_kv_heads": fields.size("num_kv_heads", None),
        "expand_k": fields.take("expand_k", float, 0.5),
        "expand_v": fields.take("expand_v", float, 1.0),
        "gate_floor": fields.take("clamp_min", float, None),
        "gate_rank": 16,
        "temperature": 16.0,
    }
    fields.demand("use_output_gate", True)
    fields.demand("use_gk", True)
    fields.demand("use_gv", False)
    fields.demand("feature_map")
    fields.finish()
    return Described("gla", config)


def describe_delta_net(fields: Fields) -> Described:
    """The config of zoo's deltanet that says the same as the library's fields."""
    config = _linear(fields, "deltanet", convolution=True)
    config |= {
        "expand_k": fields.take("expand_k", float, 1.0),
        "expand_v": fields.take("expand_v", float, 1.0),
        "qk_activation": fields.take("qk_activation", str, "silu"),
        "qk_norm": fields.take("qk_norm", str, "l2"),
        "use_beta": fields.take("use_beta", bool, True),
        "allow_neg_eigval": fields.take("allow_neg_eigval", bool, False),
        "use_gate": fields.take("use_gate", bool, False),
    }
    if config["qk_norm"] == "sum" and config["qk_activation"] not in ("elu", "relu"):
        raise UserError(
            f"{fields.source} says qk_norm = 'sum' with qk_activation = {config['qk_activation']!r}, whose numbers can "
            "be negative: the library divides by the sum of their absolute values, which zoo does not implement"
        )
    fields.demand("use_output_norm", True)
    fields.finish()
    return Described("deltanet", config)


def describe_gated_deltanet(fields: Fields) -> Described:
    """The config of zoo's gated_deltanet that says the same as the library's fields."""
    config = _linear(fields, "gated_deltanet", convolution=True)
    config |= {
        "n_v_heads": fields.size("num_v_heads", None),
        "head_dim": fields.size("head_dim", 256),
        "expand_v": fields.take("expand_v", float, 2.0),
        "allow_neg_eigval": fields.take("allow_neg_eigval", bool, False),
        "use_gate": fields.take("use_gate", bool, True),
    }
    fields.demand("output_gate_activation", "swish", "silu")
    fields.finish()
    return Described("gated_deltanet", config)


def describe_transformer(fields: Fields) -> Described:
    """The config of zoo's transformer that says the same as the library's fields."""
    config = _common(fields)
    config |= {
        "n_kv_heads": fields.size("num_kv_heads", None),
        "window": fields.size("window_size", None),
        "rope_base": fields.take("rope_theta", float, 10000.0),
        "qk_norm": fields.take("qk_norm", bool, False),
        "qk_norm_eps": 1e-5,  # the library's own constant
    }
    fields.demand("qkv_bias", False)
    fields.demand("attn")
    fields.finish()
    return Described("transformer", config)


# -- writing -----------------------------------------------------------------------------------------------------


def _undescribe_common(model: SequenceModel, mixer: str, model_type: str, architecture: str) -> dict[str, Any]:
    """What the library's linear models have in common; of two norms' eps the file holds one, see `scales`."""
    c: Any = model.config
    feed_forward: Any = model.blocks[0].feed_forward
    if feed_forward is None:
        raise UserError("flash-linear-attention has a feed-forward in every block; this model has hidden_size=0")
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.n_layers,
        "vocab_size": c.vocab_size,
        "hidden_ratio": 4,
        "intermediate_size": feed_forward.up_proj.out_features,
        "hidden_act": "swish",
        "num_heads": c.n_heads,
        "norm_eps": c.output_norm_eps,
        "use_short_conv": c.conv_size is not None,
        "conv_size": c.conv_size or 4,
        "tie_word_embeddings": c.tie_embeddings,
        "initializer_range": c.init_std,
        "attn": _attention_layers(model, mixer),
    }


def _attention_layers(model: SequenceModel, mixer: str) -> list[dict[str, Any]] | None:
    """The `attn` of a hybrid: one entry for each kind of attention."""
    c: Any = model.config
    if c.pattern == "":
        return None
    layers = parse_pattern(c.pattern)
    entries: dict[str, dict[str, Any]] = {}
    for i, block in enumerate(model.blocks):
        (item, *others), attention = layers[i % len(layers)], block.mixer
        if others:
            raise UserError(f"flash-linear-attention has no mixers side by side as in {c.pattern!r}")
        if item.name == mixer and not item.options:
            continue
        if not isinstance(attention, Attention):
            raise UserError(f"flash-linear-attention has no stack of {mixer} and {item.name} as in {c.pattern!r}")
        if attention.q_norm is not None or attention.rope_base is None:
            raise UserError("attention in flash-linear-attention's hybrids has rotary positions and no norm of q and k")
        if attention.n_heads * attention.head_dim != c.d_model:
            raise UserError(f"attention in flash-linear-attention fills d_model = {c.d_model} with its heads")
        entry = {
            "num_heads": attention.n_heads,
            "num_kv_heads": attention.n_kv_heads,
            "qkv_bias": False,
            "window_size": attention.window,
            "rope_theta": attention.rope_base,
        }
        entries.setdefault(repr(entry), {"layers": [], **entry})["layers"].append(i)
    return list(entries.values()) or None


def undescribe_gla(model: nn.Module) -> dict[str, Any]:
    """The library's config.json for a gla of zoo; a UserError where the library has no such model."""
    c: Any = model.config
    if (c.gate_rank, c.temperature) != (16, 16.0):
        raise UserError(
            "flash-linear-attention fixes GLA's gate_rank and temperature at 16; "
            f"this model has {c.gate_rank} and {c.temperature}"
        )
    config = _undescribe_common(cast(SequenceModel, model), "gla", "gla", "GLAForCausalLM")
    own = {"num_kv_heads": c.n_kv_heads, "expand_k": c.expand_k, "expand_v": c.expand_v, "clamp_min": c.gate_floor}
    return config | own | {"use_output_gate": True, "feature_map": None}


def undescribe_delta_net(model: nn.Module) -> dict[str, Any]:
    """The library's config.json for a deltanet of zoo; a UserError where the library has no such model."""
    c: Any = model.config
    if not (c.use_output_norm or c.use_gate) or c.qk_norm == "none":
        raise UserError(
            "flash-linear-attention's DeltaNet has an output norm and a norm of queries and keys; "
            f"this model has use_output_norm={c.use_output_norm}, qk_norm={c.qk_norm!r}"
        )
    if c.qk_norm == "sum" and c.qk_activation not in ("elu", "relu"):
        raise UserError(f"flash-linear-attention sums absolute values where qk_activation is {c.qk_activation!r}")
    config = _undescribe_common(cast(SequenceModel, model), "deltanet", "delta_net", "DeltaNetForCausalLM")
    same = ("expand_k", "expand_v", "qk_activation", "qk_norm", "use_beta", "allow_neg_eigval", "use_gate")
    return config | {name: getattr(c, name) for name in same} | {"use_output_norm": True}


def undescribe_gated_deltanet(model: nn.Module) -> dict[str, Any]:
    """The library's Gated DeltaNet."""
    c: Any = model.config
    config = _undescribe_common(
        cast(SequenceModel, model), "gated_deltanet", "gated_deltanet", "GatedDeltaNetForCausalLM"
    )
    same = ("head_dim", "expand_v", "allow_neg_eigval", "use_gate")
    return config | {name: getattr(c, name) for name in same} | {"num_v_heads": c.n_v_heads}


def scales(model: nn.Module) -> dict[str, float]:
    """Factors that let one eps stand for two.

    The library knows one eps for the block's norms and the output norm, and the export writes the latter. A norm
    of s * x with s**2 * eps is the norm of x with eps, so where the block's eps is another, all that is written into
    the residual stream is multiplied by s: the model's outputs stay what they are.
    """
    c: Any = model.config
    s = math.sqrt(c.output_norm_eps / c.norm_eps)
    if s == 1.0:
        return {}
    into_stream = re.compile(r"blocks\.\d+\.(mixer\.o_proj|feed_forward\.down_proj)\.weight|embedding\.weight")
    scales = {name: s for name in model.state_dict() if into_stream.fullmatch(name)}
    return scales | {"lm_head.weight": s, "norm.weight": 1 / s} if c.tie_embeddings else scales


# -- the formats -------------------------------------------------------------------------------------------------


def _format(
    kind: str,
    model_type: str,
    describe: Callable[[Fields], Described],
    *,
    output_norm: str,
    model: str | None = None,
    undescribe: Callable[[nn.Module], dict[str, Any]] | None = None,
) -> Format:
    return Format(
        kind=f"a {kind} of flash-linear-attention",
        types=(model_type,),
        describe=describe,
        names=names(output_norm),
        stands_for=stands_for,
        stored_shape=convolutions_by_channel,
        models=() if model is None else (model,),
        undescribe=undescribe,
        scales=scales,
    )


GLA = _format(
    "GLA", "gla", describe_gla, output_norm="g_norm_swish_gate", model="gla", undescribe=undescribe_gla
)  # fmt: skip
DELTA_NET = _format(
    "DeltaNet", "delta_net", describe_delta_net, output_norm="o_norm", model="deltanet", undescribe=undescribe_delta_net
)
GATED_DELTANET = _format(
    "Gated DeltaNet", "gated_deltanet", describe_gated_deltanet, output_norm="o_norm", model="gated_deltanet",
    undescribe=undescribe_gated_deltanet,
)  # fmt: skip
TRANSFORMER = _format("transformer", "transformer", describe_transformer, output_norm="o_norm")

FORMATS = (GLA, DELTA_NET, GATED_DELTANET, TRANSFORMER)
