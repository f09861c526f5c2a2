"""Hydra's BERT as its authors' code names it, bare or inside their trainer's wrapper. Read only.

The authors' masked-token head scores no token of id 0, and pads a batch with zeros around the mixer, which then reads
them; here padding is taken out.
"""

from collections.abc import Collection

from zoo.convert.fields import Fields
from zoo.convert.format import Described, Format, Names, convolutions_by_channel
from zoo.errors import UserError

_HEAD = "cls.predictions."
NAMES = Names(
    whole={
        "embeddings.word.": "bert.embeddings.word_embeddings.",
        "embeddings.token_type.": "bert.embeddings.token_type_embeddings.",
        "embeddings.norm.": "bert.embeddings.LayerNorm.",
        "norm.": "bert.encoder.norm_f.",
        "lm_head.dense.": f"{_HEAD}transform.dense.",
        "lm_head.norm.": f"{_HEAD}transform.LayerNorm.",
        "lm_head.decoder.": f"{_HEAD}decoder.",
    },
    layers="bert.encoder.layer.{i}.layer.",
    inside={"mixer.": "mixer.", "norm.": "norm."},
)
# Of the BERT that the authors' config extends: attention's fields, and those of mixers other than Hydra.
_EXCUSED = """
    alibi_starting_size attention_probs_dropout_prob chunk_size classifier_dropout gradient_checkpointing
    intermediate_size is_data_dependent num_attention_heads pool_all position_embedding_type qk_dim
""".split()  # noqa: SIM905


def stands_for(name: str, names: Collection[str]) -> tuple[str, ...]:
    """The trainer's wrapper puts "model." before every name."""
    return (name.removeprefix("model."),)


def describe(fields: Fields) -> Described:
    """zoo's hydra with a head for tokens."""
    kind, mixer = fields.take("model_type", str), fields.take("matrix_mixer_type", str, "none")
    if mixer != "hydra":
        raise UserError(
            f"{fields.source} says model_type {kind!r} with matrix_mixer_type {mixer!r}, and the only BERT that zoo "
            "reads is Hydra's, matrix_mixer_type 'hydra'"
        )
    config = {
        "d_model": fields.size("hidden_size", 768),
        "n_layers": fields.size("num_hidden_layers", 12),
        "vocab_size": fields.size("vocab_size", 30522),
        "n_token_types": fields.size("type_vocab_size", 2),
        "prenorm": fields.take("is_prenorm", bool, False),
        "dropout": fields.take("hidden_dropout_prob", float, 0.1),
        "outer_norm_eps": fields.take("layer_norm_eps", float, 1e-12),
        "d_state": fields.size("d_state", 64),
        "expand": fields.size("expand", 2),
        "head_dim": fields.size("headdim", 64),
        "d_conv": fields.size("d_conv", 7),
    }
    if config["outer_norm_eps"] != 1e-12:  # the head's is a constant there, and ours has one for both
        raise UserError(f"{fields.source} says layer_norm_eps = {config['outer_norm_eps']}, and zoo reads 1e-12 only")
    fields.demand("use_position_embeddings", False)
    fields.demand("hidden_act", "gelu")
    fields.demand("tie_word_embeddings", True)
    fields.excuse(*_EXCUSED)
    fields.finish()
    return Described("hydra", config)


HYDRA = Format(
    kind="a Hydra of its authors",
    types=("bert",),
    describe=describe,
    names=NAMES,
    stands_for=stands_for,
    stored_shape=convolutions_by_channel,
)

FORMATS = (HYDRA,)
