"""Makes any configuration of transformers tiny, by rules on attributes' names."""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

from transformers import PreTrainedConfig

VOCAB = 512
LAYERS = 2
# Token ids with a meaning are moved up here, out of the way of those that the inputs hold.
FIRST_SPECIAL_TOKEN = VOCAB - 32


def configurations(
    cls: type[PreTrainedConfig], kind: str
) -> Iterator[Callable[[], PreTrainedConfig]]:
    """Makers of tiny configurations; the first that a model runs with is the one."""
    yield lambda: tiny(cls(), kind)
    for mrope_section in ([2, 3, 3], [1, 1, 2]):
        fillings = {**_FILLINGS, r"^mrope_section$": mrope_section}
        yield functools.partial(_filled, cls, kind, fillings)


def _filled(cls: type[PreTrainedConfig], kind: str, fillings: dict[str, Any]) -> PreTrainedConfig:
    return tiny(cls(), kind, fillings)


def tiny(
    default: PreTrainedConfig, kind: str, fillings: dict[str, Any] | None = None
) -> PreTrainedConfig:
    """A configuration of the same class, with the attributes that a rule knows made small.

    Those that are None by default get the first value of ``fillings`` whose pattern they match.
    """
    fillings = fillings or {}
    values = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    lengths = {value for name, value in values.items() if _is_layer_count(name, value)}
    special = iter(range(FIRST_SPECIAL_TOKEN, VOCAB))
    changes = {}
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            changes[name] = tiny(value, "", fillings)
        elif isinstance(value, bool):
            changes[name] = _switch(name, value, kind)
        elif value is None:
            changes[name] = _filling(name, fillings)
        elif isinstance(value, list | tuple):
            changes[name] = _list(name, value, lengths)
        elif isinstance(value, dict):
            changes[name] = _dictionary(value, values, fillings)
        elif isinstance(value, int) and _TOKEN.search(name):
            changes[name] = next(special) if value >= _LEAST_MOVED_TOKEN else value
        elif isinstance(value, int | float):
            changes[name] = _number(name, value)
    changes |= _fewer_key_value_heads(values) | _rotated_head(values)
    return type(default)(**{n: v for n, v in changes.items() if _differs(v, values[n])})


def _differs(after: Any, before: Any) -> bool:
    return isinstance(after, PreTrainedConfig) or after != before


def _switch(name: str, value: bool, kind: str) -> bool:
    if name == "use_cache":
        return False  # a training step
    if name == "axial_pos_embds":
        return False  # their shape would have to be that of the inputs
    if name == "output_router_logits":
        return True  # their losses come beside the cross entropy
    if name == "is_decoder" and kind == "causal":
        return True
    return value


def _number(name: str, value: Any) -> Any:
    for pattern, rule in _RULES:
        if pattern.search(name):
            return rule(value) if callable(rule) else type(value)(rule)
    return value


def _filling(name: str, fillings: dict[str, Any]) -> Any:
    return next((value for pattern, value in fillings.items() if re.search(pattern, name)), None)


def _list(name: str, value: Any, lengths: set[int]) -> Any:
    """A list with an entry for each layer gets as many as there are left; layers' numbers fit."""
    if len(value) in lengths:
        return type(value)(_one_of_each(value))
    if _LAYER_NUMBERS.search(name) and all(isinstance(item, int) for item in value):
        return type(value)(range(LAYERS))[: len(value)]
    return value


def _one_of_each(values: Any) -> list[Any]:
    """The first ``LAYERS`` different values, or the first one again."""
    different: list[Any] = []
    for value in values:
        if value not in different:
            different.append(value)
    return (different + [values[0]] * LAYERS)[:LAYERS]


def _dictionary(
    value: dict[str, Any], values: dict[str, Any], fillings: dict[str, Any]
) -> dict[str, Any]:
    if "mrope_section" in value:
        # Half the rotated dimensions, in three parts.
        section = [1, 1, 2] if "qk_rope_head_dim" in values else [2, 3, 3]
        return {**value, "mrope_section": section}
    if "rope_type" in value and (section := _filling("mrope_section", fillings)):
        return {**value, "mrope_section": section}
    return value


def _rotated_head(values: dict[str, Any]) -> dict[str, Any]:
    """Where a head's size is that of its rotated part, it stays that."""
    if values.get("head_dim") and values["head_dim"] == values.get("qk_rope_head_dim"):
        return {"head_dim": 8}
    return {}


def _fewer_key_value_heads(values: dict[str, Any]) -> dict[str, Any]:
    """Grouped queries stay grouped: two key-value heads for four heads."""
    heads = _first(values, "num_attention_heads", "n_head", "n_heads")
    key_value = _first(values, "num_key_value_heads", "num_kv_heads", "kv_n_heads")
    if heads and key_value and 1 < values[key_value] < values[heads]:
        return {key_value: 2}
    return {}


def _first(values: dict[str, Any], *names: str) -> str | None:
    return next((name for name in names if isinstance(values.get(name), int)), None)


def _is_layer_count(name: str, value: Any) -> bool:
    return isinstance(value, int) and value > LAYERS and bool(_LAYER_COUNT.search(name))


def _at_most(limit: int) -> Callable[[Any], Any]:
    return lambda value: min(value, type(value)(limit))


_LAYER_COUNT = re.compile(
    r"^(num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|depth|num_blocks"
    r"|num_(en|de)coder_layers|num_hidden_layers_\w+|\w+_num_hidden_layers|\w+_layers)$"
)
_LAYER_NUMBERS = re.compile(r"(_layers?|_indexes|_indices|_layer_ids)$")
_TOKEN = re.compile(
    r"(token_id|token_index|(bos|eos|pad|unk|sep|mask|start|end|newline|patch)_id)$"
)
_LEAST_MOVED_TOKEN = 16
_RULES: list[tuple[re.Pattern[str], Any]] = [
    (re.compile(pattern), rule)
    for pattern, rule in (
        (r"drop|jitter|mask_(time|feature)_prob", 0),
        (r"^type_vocab|^task_type_vocab", _at_most(4)),
        (r"vocab_size|hash_byte_group_vocab|^unpadded_vocab|^vocab_offset", VOCAB),
        (r"kv_shared_layers|n_(input|output)_layers", 0),
        (r"first_k_dense|max_window_layers|num_dense_layers|mem_blocks", _at_most(1)),
        (r"_residual_layers|adapter_layers|_mtp_|nextn", _at_most(1)),
        (_LAYER_COUNT.pattern, _at_most(LAYERS)),
        (r"(key_value|kv)_heads", _at_most(4)),
        (r"index_topk", 16),
        (r"(per_tok(en)?|top_?k|moe_k|experts_per_tok)$", _at_most(2)),
        (r"experts$|expert_num$|num_experts", _at_most(4)),
        (r"n_group$|topk_group$|num_expert_group$", 1),
        (r"qk_rope_head_dim|^rotary_dim", 8),
        (r"qk_head_dim", 24),
        (r"head_dim|d_kv|headdim|d_head|dim_head", 16),
        (r"n(um)?_?\w*heads?$|attention_heads", _at_most(4)),
        (r"lora_rank|_rank$", 16),
        (r"^(mamba_)?expand$", 1),
        (r"intermediate_size|ffn_dim|d_ff|dff|dim_ff|ffn_hidden|mlp_dim", 96),
        (r"hidden_size|d_model|n_embd|embed_dim|emb_dim|embedding_size|^(model_)?dim$", 64),
        (r"hidden_dim|projection_dim|proj_dim|cross_attention_dim|lru_width|output_dim", 64),
        (r"codebook_dim|adapter_in(put)?_(dim|size)|d_latents|mamba_d_ssm|entity_emb", 64),
        (r"ngram_vocab", VOCAB),
        (r"^(mamba_)?n_?groups$", _at_most(2)),
        (r"bottleneck_size", 64),
        (r"^attention_window", 8),
        (r"^num_filters$", 4),
        (r"position_embeddings|max_\w*positions|n_positions|n_ctx|max_seq|model_max_l", 128),
        (r"context_length|sequence_length", 128),
        (r"image_size|crop_size", 32),
        (r"^patch_size$", 8),
    )
]
_FILLINGS: dict[str, Any] = {
    r"^vocab_size$": VOCAB,
    r"head_dim$": 16,
    r"(key_value|kv)_heads$": 2,
    r"^indexer_n_heads$": 4,
    r"compress_ratio$": 4,
    r"_budget$": 16,
    r"moe_intermediate_size": 96,
    r"^n_shared_experts$": 1,
    r"^(n_routed|num_local|num|n)_experts$": 4,
    r"per_tok|top_?k": 2,
    r"^mlp_layer_types$": ["dense", "sparse"],
    r"^layer_types$": ["full_attention"] * LAYERS,
    r"^sliding_window$": 8,
    r"^default_language$": "en_XX",
}
