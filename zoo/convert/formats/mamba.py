"""Mamba and Mamba-2: the authors' pickled folders, and the folders of `transformers`. Both name tensors as zoo does."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from zoo.convert.fields import Fields
from zoo.convert.format import Described, Format, Names, convolutions_by_channel
from zoo.errors import UserError

NAMES = Names(
    whole={"embedding.": "backbone.embeddings.", "norm.": "backbone.norm_f.", "lm_head.": "lm_head."},
    layers="backbone.layers.{i}.",
    inside={"mixer_norm.": "norm.", "mixer.": "mixer."},
)
# How weights start, and ways to the same result; transformers never reads norm_before_gate.
_EXCUSED = """
    residual_in_fp32 fused_add_norm pad_vocab_size_multiple rescale_prenorm_residual chunk_size norm_before_gate
    time_step_min time_step_max time_step_floor time_step_scale time_step_init_scheme use_mambapy use_associative_scan
""".split()  # noqa: SIM905
_STARTS = ("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "A_init_range", "conv_init", "use_fast_path")
_NO_LIMIT = [0.0, float("inf")]


def stands_for(name: str, names: Collection[str]) -> tuple[str, ...]:
    """The authors call the embedding backbone.embedding."""
    return (name.replace("backbone.embedding.", "backbone.embeddings."),)


def recognises(values: Mapping[str, Any]) -> bool:
    """The authors' config has no model_type."""
    return {"d_model", "n_layer", "ssm_cfg"} <= values.keys()


def describe(fields: Fields) -> Described:
    """zoo's mamba or mamba2."""
    kind = fields.take("model_type", str, None)
    if kind is None:
        return _of_the_authors(fields)
    return _of_transformers(fields, kind)


def _of_the_authors(fields: Fields) -> Described:
    vocab_size, multiple = fields.size("vocab_size"), fields.size("pad_vocab_size_multiple", 1)
    config = {
        "d_model": fields.size("d_model"),
        "n_layers": fields.size("n_layer"),
        "vocab_size": -(-vocab_size // multiple) * multiple,
        "tie_embeddings": fields.take("tie_embeddings", bool, True),
        "norm_eps": 1e-5,  # the authors' constant
        "hidden_size": 0,
    }
    fields.demand("d_intermediate", 0)
    fields.demand("attn_layer_idx", [])
    fields.demand("attn_cfg", {})
    fields.demand("rms_norm", True)
    fields.excuse(*_EXCUSED)
    inner = Fields(fields.take("ssm_cfg", dict), f"ssm_cfg in {fields.source}")
    fields.finish()
    kind = inner.take("layer", str, "Mamba1")
    if kind not in ("Mamba1", "Mamba2"):
        raise UserError(f"ssm_cfg in {fields.source} says layer {kind!r}, and zoo reads 'Mamba1' and 'Mamba2'")
    config |= {"expand": inner.size("expand", 2), "d_conv": inner.size("d_conv", 4)}
    inner.demand("bias", False)
    inner.demand("conv_bias", True)
    inner.excuse(*_STARTS)
    if kind == "Mamba1":
        config |= {"d_state": inner.size("d_state", 16), "dt_rank": _rank(inner, "dt_rank")}
    else:
        config |= {
            "d_state": inner.size("d_state", 128),
            "head_dim": inner.size("headdim", 64),
            "n_groups": inner.size("ngroups", 1),
        }
        inner.demand("D_has_hdim", False)
        inner.demand("rmsnorm", True)
        inner.demand("norm_before_gate", False)
        inner.demand("dt_limit", _NO_LIMIT)
        inner.demand("d_ssm", config["expand"] * config["d_model"])
        inner.excuse("chunk_size", "use_mem_eff_path")
    inner.finish()
    return Described("mamba" if kind == "Mamba1" else "mamba2", config)


def _rank(fields: Fields, name: str) -> int | None:
    """The rank of the step sizes; "auto" is zoo's own rule."""
    rank = fields.take(name, object, "auto")
    if rank == "auto":
        return None
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise UserError(f"{name!r} in {fields.source} must be 'auto' or at least 1, got {rank!r}; take another copy")
    return rank


def _of_transformers(fields: Fields, kind: str) -> Described:
    d_model, n_layers, expand = fields.size("hidden_size"), fields.size("num_hidden_layers"), fields.size("expand", 2)
    second = kind == "mamba2"
    config = {
        "d_model": d_model,
        "n_layers": n_layers,
        "vocab_size": fields.size("vocab_size"),
        "tie_embeddings": fields.take("tie_word_embeddings", bool, not second),
        "norm_eps": fields.take("layer_norm_epsilon", float, 1e-5),
        "hidden_size": 0,
        "expand": expand,
        "d_state": fields.size("state_size", 128 if second else 16),
        "d_conv": fields.size("conv_kernel", 4),
    }
    if second:
        config |= {"head_dim": fields.size("head_dim", 64), "n_groups": fields.size("n_groups", 8)}
        fields.demand("num_heads", expand * d_model // config["head_dim"])
        fields.demand("time_step_limit", _NO_LIMIT)
        fields.excuse("time_step_rank")  # of the first Mamba; the second has none
    else:
        config["dt_rank"] = _rank(fields, "time_step_rank")
    fields.demand("intermediate_size", expand * d_model)
    fields.demand("hidden_act", "silu", "swish")
    fields.demand("use_bias", False)
    fields.demand("use_conv_bias", True)
    # The converted folders of the first Mamba repeat the authors' fields.
    for name, value in {"d_inner": expand * d_model, "d_model": d_model, "n_layer": n_layers}.items():
        fields.demand(name, value)
    fields.demand("ssm_cfg", {})
    fields.demand("rms_norm", True)
    fields.excuse(*_EXCUSED)
    fields.finish()
    return Described(kind, config)


def undescribe(model: nn.Module) -> dict[str, Any]:
    """The config of transformers' Mamba or Mamba-2."""
    c: Any = model.config
    second = model.name == "mamba2"
    if c.hidden_size != 0 or c.pattern or not getattr(c, "selective", True):
        raise UserError(
            "transformers' Mamba is a stack of selective mixers alone; this model has "
            f"hidden_size={c.hidden_size}, pattern={c.pattern!r}, selective={getattr(c, 'selective', True)}"
        )
    config = {
        "architectures": ["Mamba2ForCausalLM" if second else "MambaForCausalLM"],
        "model_type": "mamba2" if second else "mamba",
        "hidden_size": c.d_model,
        "num_hidden_layers": c.n_layers,
        "vocab_size": c.vocab_size,
        "state_size": c.d_state,
        "expand": c.expand,
        "conv_kernel": c.d_conv,
        "hidden_act": "silu",
        "layer_norm_epsilon": c.norm_eps,
        "use_bias": False,
        "use_conv_bias": True,
        "residual_in_fp32": True,
        "tie_word_embeddings": c.tie_embeddings,
    }
    if second:
        heads = {"head_dim": c.head_dim, "num_heads": c.expand * c.d_model // c.head_dim, "n_groups": c.n_groups}
        return config | heads
    rank = -(-c.d_model // 16) if c.dt_rank is None else c.dt_rank
    return config | {"intermediate_size": c.expand * c.d_model, "time_step_rank": rank}


MAMBA = Format(
    kind="a Mamba of transformers",
    types=("mamba", "mamba2"),
    describe=describe,
    names=NAMES,
    stands_for=stands_for,
    stored_shape=convolutions_by_channel,
    recognises=recognises,
    models=("mamba", "mamba2"),
    undescribe=undescribe,
)

FORMATS = (MAMBA,)
