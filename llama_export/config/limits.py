"""Limits for files that somebody else made, far above every published model, so that a damaged file cannot fill the memory."""

from __future__ import annotations

MAX_JSON_BYTES = 16_000_000
"""Largest config, index, manifest or sidecar: the largest known are below 1 MB, and parsing takes up to 25 times the size
in memory."""
MAX_TOKENIZER_BYTES = 128_000_000
"""Largest ``tokenizer.json``. The largest published one, of Gemma 3, has 33 MB; that of Llama 4 has 28 MB."""
MAX_LAYERS = 4_096
"""Most decoder layers. The deepest published Llama, of 405B parameters, has 126."""
MAX_SIZE = 1 << 24
"""Largest vocabulary, width, number of heads or of labels. The largest published vocabularies have 262,144 entries, and
the MLP of the Llama of 405B parameters is 53,248 wide."""
MAX_WEIGHT_FILES = 10_000
"""Most files in an index. The Llama of 405B parameters has 191."""
MAX_TENSORS = 100_000
"""Most tensors in one checkpoint: 4,096 layers of 12 are 49,152."""
MAX_NAMES = 1_000
"""Most end-of-sequence tokens, and most architectures. Published Llamas have three, and one."""
MAX_ROPE = 1e15
"""Largest number in the RoPE settings. The largest published ``rope_theta`` is 4.6e10 (Llama 3 with 4M tokens of context)."""
