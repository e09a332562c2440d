"""Layout and names of the static KV cache. One place, so that trace, graph, engine and session agree.

Shapes: B batch, G key/value heads, C ``kv_cache_capacity``, D head_dim. Layout [B, G, C, D], granularity *linear*:
row ``b`` holds ``past_length[b]`` valid tokens, the new ones are written from there on, and nothing is ever moved.
``kv_cache_capacity`` is what the buffer can hold; ``past_length`` is what it holds.
"""

from __future__ import annotations

from collections.abc import Iterator

from llama_export.config.llama import LlamaConfig

LAYOUT = "BGCD"
GRANULARITY = "linear"
CAPACITY = "kv_cache_capacity"


def past_name(layer: int, part: str) -> str:
    """Graph input; ``part`` is ``key`` or ``value``."""
    return f"past_key_values.{layer}.{part}"


def present_name(layer: int, part: str) -> str:
    """Graph output that aliases :func:`past_name` when both are bound to one buffer."""
    return f"present.{layer}.{part}"


def cache_names(num_hidden_layers: int) -> Iterator[tuple[str, str]]:
    """(past, present) in graph order: layer by layer, key before value."""
    for layer in range(num_hidden_layers):
        for part in ("key", "value"):
            yield past_name(layer, part), present_name(layer, part)


def cache_shape(config: LlamaConfig, batch_size: int, capacity: int) -> tuple[int, int, int, int]:
    """[B, G, C, D] of every cache tensor."""
    return batch_size, config.num_key_value_heads, capacity, config.head_dim
