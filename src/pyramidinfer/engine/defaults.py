"""A model's default sampling parameters, from its ``generation_config.json``."""

from __future__ import annotations

from typing import Any

from pyramidinfer.types import SamplingParams

__all__ = ["sampling_defaults"]

#: Keys that are used, and their names in ``SamplingParams``.
TAKEN = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
#: Unsupported keys that would change answers, and their values without effect.
REFUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "bad_words_ids": ([],),
    "force_words_ids": ([],),
    "constraints": ([],),
    "sequence_bias": ({}, []),
    "stop_strings": ([],),
    "exponential_decay_length_penalty": (),
    "watermarking_config": (),
    "token_healing": (False,),
    "dola_layers": (),
}


def sampling_defaults(generation_config: Any, name: str) -> dict[str, Any]:
    """Fields of ``SamplingParams`` from a generation config (None: there is none).

    ``do_sample: false`` is greedy; ``true`` without a temperature is temperature 1.  ``name``: of
    the model, for errors.  ``ValueError`` for an unsupported key that would change answers, and for
    an invalid value.
    """
    said = {
        key: value
        for key in ("do_sample", *TAKEN, *REFUSED)
        if (value := getattr(generation_config, key, None)) is not None
    }
    where = f"generation_config.json of {name!r}"
    way_out = "use --generation-config none, or give SamplingParams"
    for key, neutral in REFUSED.items():
        if key in said and said[key] not in neutral:
            raise ValueError(
                f"{where}: {key}={said[key]!r:.60} is not supported, and answers would not be what "
                f"the model's makers mean; {way_out}"
            )
    found = {ours: said[key] for key, ours in TAKEN.items() if key in said}
    if said.get("do_sample") is False:
        found = {key: found[key] for key in ("repetition_penalty", "max_tokens") if key in found}
        found["temperature"] = 0.0
    elif said.get("do_sample"):
        found.setdefault("temperature", 1.0)
    try:
        SamplingParams(**found)
    except ValueError as error:
        raise ValueError(f"{where}: {error}; {way_out}") from None
    return found
