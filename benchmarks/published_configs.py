"""``config.json`` of published checkpoints, bookkeeping and all, with the exact number of parameters of each.

The facts are those of the files on the Hugging Face hub, typed in; nothing is downloaded. The numbers follow from the
shapes: ``test_published_configs.py`` works them out again, by the textbook sum and by Hugging Face's own model.
"""

from __future__ import annotations

from typing import Any

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "initializer_range": 0.02, "model_type": "llama",
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "use_cache": True,
}  # fmt: skip
_LLAMA_2: dict[str, Any] = {
    **_LLAMA, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 4096, "intermediate_size": 11008,
    "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "rope_scaling": None, "vocab_size": 32000,
}  # fmt: skip
_LLAMA_3: dict[str, Any] = {
    **_LLAMA, "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001,
    "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 8192, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "rope_scaling": None, "rope_theta": 500000.0,
    "torch_dtype": "bfloat16", "transformers_version": "4.40.0.dev0", "vocab_size": 128256,
}  # fmt: skip
_LLAMA_31: dict[str, Any] = {
    **_LLAMA_3, "max_position_embeddings": 131072, "mlp_bias": False, "transformers_version": "4.43.0.dev0",
    "rope_scaling": {
        "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}  # fmt: skip
_LLAMA_32: dict[str, Any] = {
    **_LLAMA_31, "rope_scaling": {**_LLAMA_31["rope_scaling"], "factor": 32.0}, "tie_word_embeddings": True,
    "transformers_version": "4.45.0.dev0",
}  # fmt: skip
_SMOLLM2: dict[str, Any] = {
    **_LLAMA, "attention_bias": False, "attention_dropout": 0.0, "max_position_embeddings": 8192,
    "rope_scaling": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 49152,
}  # fmt: skip

PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "huggyllama/llama-7b": (
        {
            **_LLAMA_2, "max_position_embeddings": 2048, "max_sequence_length": 2048, "pad_token_id": 0,
            "rms_norm_eps": 1e-06, "torch_dtype": "float16", "transformers_version": "4.28.0.dev0",
        },
        6_738_415_616,
    ),
    "meta-llama/Llama-2-7b-hf": (
        {
            **_LLAMA_2, "_name_or_path": "meta-llama/Llama-2-7b-hf", "torch_dtype": "float16",
            "transformers_version": "4.31.0.dev0",
        },
        6_738_415_616,
    ),
    "lmsys/vicuna-7b-v1.5-16k": (
        {
            **_LLAMA_2, "_name_or_path": "meta-llama/Llama-2-7b-hf", "max_sequence_length": 16384, "pad_token_id": 0,
            "rope_scaling": {"factor": 4.0, "type": "linear"}, "torch_dtype": "float16",
            "transformers_version": "4.31.0",
        },
        6_738_415_616,
    ),
    "codellama/CodeLlama-7b-hf": (
        {
            **_LLAMA_2, "max_position_embeddings": 16384, "rope_theta": 1000000, "torch_dtype": "bfloat16",
            "transformers_version": "4.33.0.dev0", "vocab_size": 32016,
        },
        6_738_546_688,
    ),
    "deepseek-ai/deepseek-coder-6.7b-base": (
        {
            **_LLAMA_2, "bos_token_id": 32013, "eos_token_id": 32014, "max_position_embeddings": 16384,
            "rms_norm_eps": 1e-06, "rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 100000,
            "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "vocab_size": 32256,
        },
        6_740_512_768,
    ),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": (
        {
            **_LLAMA_2, "attention_bias": False, "hidden_size": 2048, "intermediate_size": 5632,
            "max_position_embeddings": 2048, "num_hidden_layers": 22, "num_key_value_heads": 4, "rope_theta": 10000.0,
            "torch_dtype": "bfloat16", "transformers_version": "4.35.0",
        },
        1_100_048_384,
    ),
    "meta-llama/Meta-Llama-3-8B": (_LLAMA_3, 8_030_261_248),
    "meta-llama/Llama-3.1-8B-Instruct": (
        {**_LLAMA_31, "eos_token_id": [128001, 128008, 128009], "transformers_version": "4.42.3"},
        8_030_261_248,
    ),
    "meta-llama/Llama-3.1-70B": (
        {
            **_LLAMA_31, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
            "num_hidden_layers": 80,
        },
        70_553_706_496,
    ),
    "meta-llama/Llama-3.1-405B": (
        {
            **_LLAMA_31, "hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128,
            "num_hidden_layers": 126,
        },
        405_853_388_800,
    ),
    "meta-llama/Llama-3.2-1B": (
        {
            **_LLAMA_32, "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        },
        1_235_814_400,
    ),
    "meta-llama/Llama-3.2-3B": (
        {
            **_LLAMA_32, "head_dim": 128, "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24,
            "num_hidden_layers": 28,
        },
        3_212_749_824,
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": (_LLAMA_31, 8_030_261_248),
    "HuggingFaceTB/SmolLM2-135M": (
        {
            **_SMOLLM2, "bos_token_id": 0, "eos_token_id": 0, "hidden_size": 576,
            "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": True,
            "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "rope_interleaved": False,
            "rope_theta": 100000, "transformers_version": "4.40.1",
        },
        134_515_008,
    ),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": (
        {
            **_SMOLLM2, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 2048, "intermediate_size": 8192,
            "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 24, "num_key_value_heads": 32,
            "pad_token_id": 2, "rope_theta": 130000, "transformers_version": "4.42.3",
            "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16", "q4f16": "float16"}},
        },
        1_711_376_384,
    ),
}  # fmt: skip
"""Hub id -> (config.json, number of parameters)."""
