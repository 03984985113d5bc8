"""Reading a config.json field by field; whatever nobody read is refused by name at the end."""

from collections.abc import Mapping, Sequence
from typing import Any

from moe_builders.attention.rope import SCALING_KEYS
from moe_builders.errors import InputError

# Fields that change nothing a trainer computes: bookkeeping, generation, other programs' switches.
_INERT = frozenset({
    "_attn_implementation_autoset", "_name_or_path", "architectures", "auto_map", "bos_token_id",
    "dtype", "eos_token_id", "initializer_range", "model_type", "output_router_logits",
    "pad_token_id", "pretraining_tp", "quantization_config", "router_aux_loss_coef", "torch_dtype",
    "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache",
    # what transformers 4 wrote into every file that was saved whole
    "bad_words_ids", "begin_suppress_tokens", "chunk_size_feed_forward", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "id2label", "label2id", "length_penalty", "max_length", "min_length",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
    "output_attentions", "output_hidden_states", "output_scores", "prefix", "problem_type",
    "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate",
    "sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss",
    "tokenizer_class", "top_k", "top_p", "torchscript", "typical_p", "use_bfloat16",
})  # fmt: skip
# honoured at these values alone, which such files hold
_USUAL = {
    "add_cross_attention": False, "cross_attention_hidden_size": None, "is_decoder": False,
    "is_encoder_decoder": False, "pruned_heads": {}, "tie_encoder_decoder": False,
}  # fmt: skip
REQUIRED: Any = object()


class ConfigReader:
    """Collects what is wrong with a config.json while a family reads it, to say it all at once.

    Each method takes one field, under one or several spellings, and remembers that it was read.
    A bad value is noted and a harmless one returned, so that reading can go on to ``finish``.

    Args:
        config: config.json.
        model_type: for the message.
    """

    def __init__(self, config: Mapping[str, Any], model_type: str) -> None:
        self.config, self.model_type = config, model_type
        self._known = set(_INERT)
        self._refused: list[str] = []
        self._missing: list[str] = []
        self._wrong: list[str] = []

    def whole(
        self, *names: str, default: Any = REQUIRED, least: int = 1, null: Any = REQUIRED
    ) -> Any:
        """A whole number of at least ``least``.

        Args:
            names: spellings of one field; the first that is there and not null counts.
            default: where none is; REQUIRED: that is an error. May be None.
            least: smallest number allowed.
            null: what null stands for; REQUIRED: it counts as left out.
        """
        if null is not REQUIRED and names[0] in self.config and self.config[names[0]] is None:
            self._known.update(names)
            return null
        name, value = self._find(names, default)
        if value is default:
            return 1 if default is REQUIRED else default
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            if least == 1:
                self._wrong.append(f"{name}={value!r}")
            elif least == 0:
                self.refuse(name, "a whole number that is not negative")
            else:
                self.refuse(name, f"a whole number of at least {least}")
            return 1
        return value

    def number(self, *names: str, default: Any = REQUIRED) -> Any:
        """A number above 0; arguments as ``whole``'s."""
        name, value = self._find(names, default)
        if value is default:
            return 1.0 if default is REQUIRED else default
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            self._wrong.append(f"{name}={value!r}")
            return 1.0
        return value

    def share(self, name: str, *, default: float = 0.0) -> float:
        """A number from 0 to below 1, as a dropout is."""
        name, value = self._find((name,), default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            self.refuse(name, "a number from 0 to below 1")
            return default
        return value

    def per_layer(self, *names: str, num_layers: int, least: int = 1) -> tuple[int, ...]:
        """A whole number of at least ``least`` for each layer: a list of them, or one for all."""
        name, value = self._find(names, REQUIRED)
        if value is REQUIRED:
            return (least,) * num_layers
        numbers = value if isinstance(value, list | tuple) else [value] * num_layers
        if len(numbers) != num_layers or not all(type(n) is int and n >= least for n in numbers):
            self.refuse(name, f"a whole number of at least {least}, or {num_layers} of them")
            return (least,) * num_layers
        return tuple(numbers)

    def flag(self, *names: str, default: Any = REQUIRED) -> Any:
        """true or false."""
        name, value = self._find(names, default)
        if value is default:
            return False if default is REQUIRED else default
        if not isinstance(value, bool):
            self.refuse(name, "true or false")
            return False
        return value

    def layers(self, name: str, *, num_layers: int, default: Sequence[int] = ()) -> tuple[int, ...]:
        """A list of layer numbers; those past the last layer mean nothing."""
        _, value = self._find((name,), None)
        if value is None:
            return tuple(default)
        if not isinstance(value, list | tuple) or not all(type(n) is int for n in value):
            self.refuse(name, "a list of layer numbers")
            return ()
        return tuple(sorted(n for n in set(value) if 0 <= n < num_layers))

    def words(
        self, name: str, *, num_layers: int, allowed: Sequence[Any], default: Sequence[Any]
    ) -> tuple[Any, ...]:
        """One of some words (or numbers) for each layer, as ``layer_types`` is.

        Args:
            name: of the field.
            num_layers: how many words there must be.
            allowed: words that are honoured.
            default: where the field is not there.
        """
        _, value = self._find((name,), None)
        if value is None:
            return tuple(default)
        fits = isinstance(value, list | tuple) and len(value) == num_layers
        if not fits or not all(word in allowed for word in value):
            self.refuse(name, f"{num_layers} of {', '.join(map(repr, allowed))}")
            return tuple(default)
        return tuple(value)

    def part(self, name: str) -> Mapping[str, Any]:
        """A mapping to be read on its own, as the ``text_config`` of a model that sees, too."""
        _, value = self._find((name,), REQUIRED)
        if isinstance(value, dict):
            return value
        if value is not REQUIRED:
            self.refuse(name, "a mapping")
        return {}

    def top_k(self, *names: str, normalised: bool) -> Any:
        """Experts per token; 1 of them with normalised weights is refused: each would weigh 1."""
        value = self.whole(*names)
        if value == 1 and normalised and not self._missing and not self._wrong:
            self._refused.append(
                f"{names[0]}=1 with normalised weights (its router would never learn: set it to 2 "
                "or more, or normalisation to false)"
            )
        return value

    def only(self, name: str, *allowed: Any) -> None:
        """A field that is honoured at these values alone; leaving it out means the first."""
        self._known.add(name)
        value = self.config.get(name, allowed[0])
        same = (
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed
        )
        if not any(same):
            self.refuse(name, f"only {allowed[0]!r}")

    def not_null(self, *names: str) -> None:
        """Fields that may be left out, but where null is no value that transformers can read."""
        for name in names:
            if name in self.config and self.config[name] is None:
                self.refuse(name, "leave it out, or give a value")

    def ignore(self, *names: str) -> None:
        """Fields of this family that change nothing a trainer computes."""
        self._known.update(names)

    def refuse(self, name: str, wanted: str) -> None:
        """Note that a field's value is not honoured."""
        self._known.add(name)
        self._refused.append(f"{name}={self.config.get(name)!r} ({wanted})")

    def rope(
        self,
        *,
        default_base: Any = REQUIRED,
        default_fraction: float | None = None,
        default_scaling: Mapping[str, Any] | None = None,
        fixed_alpha: bool = False,
    ) -> dict[str, Any]:
        """Rotary embedding in any of its spellings.

        Hub files have ``rope_theta``, ``rope_scaling`` and ``partial_rotary_factor``, transformers
        5 writes all of it into ``rope_parameters``.

        Args:
            default_base: where there is no rope_theta; REQUIRED: that is an error.
            default_fraction: where there is no partial_rotary_factor; None: the family turns
                whole heads, another factor than 1 is refused.
            default_scaling: where there is neither rope_scaling nor rope_parameters.
            fixed_alpha: dynamic scaling may have an alpha, which other families' code in
                transformers reads past.

        Returns:
            rope_base, rope_scaling (a mapping or None) and, unless default_fraction is None,
            rope_fraction.
        """
        self._known |= {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}
        # as transformers decides where a file holds both
        name = "rope_scaling" if self.config.get("rope_scaling") else "rope_parameters"
        value = self.config.get(name)
        if value is not None and not isinstance(value, dict):
            self.refuse(name, "a mapping or null")
            value = {}
        value = (default_scaling or {}) if value is None else value
        found = dict(value)
        for name in ("rope_theta", "partial_rotary_factor"):
            if found.get(name) is None and name in self.config:
                found[name] = self.config[name]
        scaling = {k: v for k, v in found.items() if k not in ("rope_theta", "type")}
        # null is not left out here: whole heads, whatever the family's default
        turned = scaling.pop("partial_rotary_factor", default_fraction)
        turned = 1.0 if turned is None else turned
        kind = scaling.setdefault("rope_type", found.get("type", "default"))
        self._check_scaling(kind, scaling)
        if not fixed_alpha and scaling.get("alpha") is not None:
            self._refused.append(f"rope_parameters.alpha={scaling['alpha']!r} (leave it out)")
        base = default_base if found.get("rope_theta") is None else found["rope_theta"]
        if base is REQUIRED:
            self._missing.append("rope_theta")
        elif isinstance(base, bool) or not isinstance(base, int | float) or base <= 0:
            self._wrong.append(f"rope_theta={base!r}")
        read = {"rope_base": base, "rope_scaling": None if kind == "default" else scaling}
        if default_fraction is not None:
            return read | {"rope_fraction": turned}
        if turned != 1:
            self._refused.append(f"partial_rotary_factor={turned!r} (only 1)")
        return read

    def _check_scaling(self, kind: Any, scaling: Mapping[str, Any]) -> None:
        if not isinstance(kind, str) or kind not in SCALING_KEYS:
            self._refused.append(f"rope_type={kind!r} (only {', '.join(SCALING_KEYS)})")
            return
        needed, optional = SCALING_KEYS[kind]
        present = {name for name in scaling if name != "rope_type"}
        self._missing += [f"rope_parameters.{name}" for name in sorted(needed - present)]
        self._refused += [
            f"rope_parameters.{name}={scaling[name]!r}"
            for name in sorted(present - needed - optional)
        ]

    def finish(self) -> None:
        """Raise what was noted, and every field that nobody read.

        Raises:
            InputError: one sentence with all of it.
        """
        for name, usual in _USUAL.items():
            if name not in self._known:
                self.only(name, usual)
        unread = sorted(set(self.config) - self._known)
        refused = [f"{name}={self.config[name]!r}" for name in unread] + self._refused
        kinds = {
            "holds what is not supported:": refused,
            "lacks": self._missing,
            "holds what must be a number above 0:": self._wrong,
        }
        found = [f"{kind} {', '.join(names)}" for kind, names in kinds.items() if names]
        if found:
            raise InputError(f"config.json of a {self.model_type} {'; '.join(found)}")

    def _find(self, names: Sequence[str], default: Any) -> tuple[str, Any]:
        self._known.update(names)
        for name in names:
            if self.config.get(name) is not None:
                return name, self.config[name]
        if default is REQUIRED:
            self._missing.append(names[0])
        return names[0], default
