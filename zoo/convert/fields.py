"""The fields of a foreign config.json, every one of which is read, demanded, excused or refused; none is ignored."""

from collections.abc import Mapping
from typing import Any

from zoo.errors import UserError

# What transformers writes into every config and what does not change the numbers that a model computes.
EXCUSED = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path add_cross_attention architectures
    attn_implementation bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task fla_version
    forced_bos_token_id forced_eos_token_id id2label initializer_range is_decoder is_encoder_decoder label2id
    length_penalty max_length max_position_embeddings min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp
    problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype
    torchscript transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()  # noqa: SIM905
)
REQUIRED: Any = object()


class Fields:
    """One config.json: each reader takes its fields out, and what is left at the end is refused.

    Args:
        values: its content.
        source: the file, for the refusals.
    """

    def __init__(self, values: Mapping[str, Any], source: str):
        self._left, self.source = dict(values), source

    def take(self, name: str, kind: type, default: Any = REQUIRED) -> Any:
        """A field's value; the default when it is absent or null.

        Raises:
            UserError: the value has another type, or is absent and there is no default.
        """
        value = self._left.pop(name, None)
        if value is None and default is not REQUIRED:
            return default
        if value is None:
            raise UserError(f"{self.source} must say {name!r}, and does not; take another copy of this checkpoint")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise UserError(f"{name!r} in {self.source} must be {kind.__name__}, got {value!r}; take another copy")
        return value

    def has(self, name: str) -> bool:
        """Whether the file says anything of a field, be it null."""
        return name in self._left

    def size(self, name: str, default: Any = REQUIRED) -> Any:
        """A whole number of at least one."""
        value = self.take(name, int, default)
        if isinstance(value, int) and value < 1:
            raise UserError(f"{name!r} in {self.source} must be at least 1, got {value}; take another copy")
        return value

    def demand(self, name: str, *implemented: Any) -> None:
        """Take out a field that zoo implements at these values only; absent or null is fine.

        Raises:
            UserError: it has another value.
        """
        value = self._left.pop(name, None)
        if value is not None and not any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in implemented
        ):
            known = " or ".join(repr(one) for one in implemented)
            raise UserError(
                f"{self.source} says {name} = {value!r}, which zoo does not implement (only {known}); "
                "loading it would give a model that computes something else"
            )

    def excuse(self, *names: str) -> None:
        """Take out fields that do not change what the model computes."""
        for name in names:
            self._left.pop(name, None)

    def rename(self, old: str, new: str) -> None:
        """Read an older spelling as the present one."""
        if old in self._left:
            self._left.setdefault(new, self._left.pop(old))

    def finish(self) -> None:
        """Refuse what nobody took, besides what is null and what transformers writes into every config."""
        unknown = sorted(name for name, value in self._left.items() if value is not None and name not in EXCUSED)
        if unknown:
            said = ", ".join(f"{name} = {self._left[name]!r}" for name in unknown)
            raise UserError(
                f"{self.source} has fields that zoo does not know for this kind of model ({said}); "
                "none is ignored: if they change nothing in the numbers, take them out of the file"
            )
