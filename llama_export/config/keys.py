"""The keys of ``config.json``: those that are read, those that change nothing, and those of other model families."""

from __future__ import annotations

from typing import Any

from llama_export.config.llama import REQUIRED_KEYS, ROPE_CONTEXT

READ_KEYS = frozenset(
    (
        *REQUIRED_KEYS,
        *("model_type", "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps"),
        *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", ROPE_CONTEXT),
        *("tie_word_embeddings", "attention_bias", "mlp_bias", "attention_dropout", "dtype", "torch_dtype"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "architectures", "quantization_config"),
        *("num_labels", "id2label", "problem_type", "classifier_dropout", "hidden_dropout"),
        "token_classification_bias",
    )
)

_BOOKKEEPING = "a note about the file, its origin or its tools; no model reads it"
_OUTPUT_CHOICE = "selects what a Python call returns, not what is computed"
_GENERATION = "a setting of generation, which `run` and the session take as arguments of their own"
_NOT_OF_A_DECODER = "belongs to the common base of all configurations; Llama's classes do not read it"
_ATTENTION_CHOICE = "selects among implementations of one and the same attention"
HARMLESS_KEYS: dict[str, str] = {
    "pretraining_tp": "cuts a matrix product into slices and adds them up: the sum in another order, which "
    "transformers 5 no longer does",
    "initializer_range": "spread of the random weights before training",
    "use_cache": "whether a Python call keeps its cache; the graph's cache is an input and an output",
    "label2id": "the inverse of id2label, which is read",
    "auto_map": "names code that runs only with trust_remote_code; exported is Hugging Face's own Llama",
    "is_llama_config": "a flag of nanotron, the trainer of SmolLM, that says: this is a Llama",
    "neftune_noise_alpha": "noise on the embeddings in training",
    "max_sequence_length": "tokens of the training run; the model's limit is max_position_embeddings",
    "tie_last_hidden_states": "which of two tensors a call that asks for all hidden states lists last",
    **dict.fromkeys(
        (
            *("transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "_auto_class", "torchscript"),
            *("tokenizer_class", "finetuning_task", "task_specific_params", "unsloth_version", "unsloth_fixed"),
            *("use_bfloat16", "transformers.js_config", "model_name"),
        ),
        _BOOKKEEPING,
    ),
    **dict.fromkeys(
        (
            *("output_attentions", "_output_attentions", "output_hidden_states", "output_scores"),
            *("return_dict", "return_dict_in_generate"),
        ),
        _OUTPUT_CHOICE,
    ),
    **dict.fromkeys(
        (
            *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
            *("_attn_implementation_autoset", "_flash_attn_2_enabled"),
            *("_experts_implementation", "_experts_implementation_internal"),
        ),
        _ATTENTION_CHOICE,
    ),
    **dict.fromkeys(
        (
            *("is_encoder_decoder", "is_decoder", "cross_attention_hidden_size", "add_cross_attention"),
            *("tie_encoder_decoder", "chunk_size_feed_forward", "pruned_heads", "tf_legacy_loss"),
        ),
        _NOT_OF_A_DECODER,
    ),
    **dict.fromkeys(
        (
            *("prefix", "sep_token_id", "unk_token_id", "decoder_start_token_id", "max_length", "min_length"),
            *("do_sample", "early_stopping", "num_beams", "num_beam_groups", "top_k", "top_p", "diversity_penalty"),
            *("temperature", "typical_p", "repetition_penalty", "length_penalty", "bad_words_ids", "max_new_tokens"),
            *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences"),
            *("remove_invalid_values", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens"),
            *("begin_suppress_tokens", "exponential_decay_length_penalty"),
        ),
        _GENERATION,
    ),
}
"""Key -> why nothing that Llama computes depends on it."""

_SLIDING = "limits how far back attention sees (Mistral, Qwen2, Gemma); Llama sees every earlier token"
_EXPERTS = "routes each token to some of several MLPs (Mixtral, Qwen-MoE, DeepSeek); Llama has one"
_NORMED_HEADS = "normalises queries and keys (Qwen3, OLMo2, Gemma3); Llama does not"
_BIASES = "adds biases; Llama's are named attention_bias and mlp_bias"
_SCALED = "scales activations (Granite, MiniCPM, Cohere, Gemma); Llama does not"
_CAPPED = "caps scores with a tanh (Gemma2); Llama does not"
_QUANTISED = "says that the weights are quantised; export the original float checkpoint"
FOREIGN_KEYS: dict[str, tuple[tuple[Any, ...], str]] = {
    "sliding_window": ((), _SLIDING),
    "use_sliding_window": ((False,), _SLIDING),
    "max_window_layers": ((), _SLIDING),
    "attention_chunk_size": ((), _SLIDING),
    "layer_types": ((), "gives each layer a kind of attention of its own; every layer of Llama is `full_attention`"),
    "per_layer_config": (({},), "overrides settings in single layers; all layers of Llama are alike"),
    "is_causal": ((True,), "false lets every token see the whole text; the graph's attention is causal"),
    "use_bidirectional_attention": ((False,), "lets every token see the whole text; the graph's attention is causal"),
    "rope_interleaved": ((False,), "rotates pairs (2i, 2i + 1); Llama's rotates pairs (i, i + head_dim / 2)"),
    "rope_traditional": (
        (False,),
        "rotates pairs (2i, 2i + 1), as MLX names it; Llama's rotates (i, i + head_dim / 2)",
    ),
    "use_mrope": ((False,), "gives each token several positions (Qwen2-VL); Llama has one"),
    "no_rope_layers": (([],), "leaves out RoPE in some layers (SmolLM3, Llama 4); Llama has it in all"),
    "no_rope_layer_interval": ((), "leaves out RoPE in some layers (SmolLM3, Llama 4); Llama has it in all"),
    "rotary_pct": ((1, 1.0), "rotates a part of each head (GPT-NeoX); Llama rotates all of it"),
    "attention_multiplier": ((), "replaces the softmax scale 1 / sqrt(head_dim) (Granite)"),
    "query_pre_attn_scalar": ((), "replaces the softmax scale 1 / sqrt(head_dim) (Gemma2)"),
    "embedding_multiplier": ((1, 1.0), _SCALED),
    "residual_multiplier": ((1, 1.0), _SCALED),
    "logits_scaling": ((1, 1.0), _SCALED),
    "logit_scale": ((1, 1.0), _SCALED),
    "scale_emb": ((1, 1.0), _SCALED),
    "scale_depth": ((), _SCALED),
    "dim_model_base": ((), _SCALED),
    "final_logit_softcapping": ((), _CAPPED),
    "attn_logit_softcapping": ((), _CAPPED),
    "use_qk_norm": ((False,), _NORMED_HEADS),
    "qk_norm": ((False,), _NORMED_HEADS),
    "qk_layernorm": ((False,), _NORMED_HEADS),
    "num_local_experts": ((0,), _EXPERTS),
    "num_experts": ((0,), _EXPERTS),
    "num_experts_per_tok": ((0,), _EXPERTS),
    "n_routed_experts": ((0,), _EXPERTS),
    "moe_intermediate_size": ((), _EXPERTS),
    "router_aux_loss_coef": ((), _EXPERTS),
    "bias": ((False,), _BIASES),
    "use_bias": ((False,), _BIASES),
    "use_qkv_bias": ((False,), _BIASES),
    "qkv_bias": ((False,), _BIASES),
    "parallel_attn": ((False,), "adds attention and MLP to the same residual (Falcon); Llama runs one after the other"),
    "use_parallel_residual": (
        (False,),
        "adds attention and MLP to the same residual (GPT-NeoX); Llama runs one after the other",
    ),
    "compression_config": ((), _QUANTISED),
    "quantization": ((), _QUANTISED),
}
"""Key of another family -> the values with which it changes nothing (null always), and what it does there."""

OTHER_FAMILIES = {
    "mistral": "Mistral is not supported: attention in its checkpoints may be limited to a sliding window, and without one "
    "(sliding_window: null) the arithmetic is Llama's, but this exporter does not read the type",
    "ministral": "Ministral limits attention to a sliding window in some layers",
    "mixtral": "Mixtral routes each token to some of several expert MLPs",
    "qwen2": "Qwen2 has biases on query, key and value alone",
    "qwen2_moe": "Qwen2-MoE has query, key and value biases and expert MLPs",
    "qwen3": "Qwen3 normalises queries and keys in each head",
    "gemma": "Gemma's norm weight is 1 + w, and its embeddings are scaled by sqrt(hidden_size)",
    "phi": "Phi rotates a part of each head and has LayerNorms",
    "phi3": "Phi-3 stores query, key and value (gate and up) as one fused projection",
    "llama4": "Llama 4 has expert MLPs, chunked attention and layers without RoPE",
    "mllama": "Mllama has cross-attention to an image encoder",
    "llava": "LLaVA has an image encoder in front of its language model",
    "olmo": "OLMo has other norms, clipped or at other places",
    "granite": "Granite scales embeddings, attention, residuals and logits",
    "cohere": "Cohere adds attention and MLP to the same residual and scales its logits",
    "smollm3": "SmolLM3 leaves out RoPE in every fourth layer",
    "deepseek": "DeepSeek's own model types have expert MLPs, and from V2 on latent attention",
    "minicpm": "MiniCPM scales embeddings, residuals and logits",
    "gpt": "GPT has LayerNorms and learned or partly rotated positions",
    "falcon": "Falcon has fused projections and LayerNorms",
    "stablelm": "StableLM rotates a part of each head and has LayerNorms",
    "internlm": "InternLM has attention biases or fused projections",
    "baichuan": "Baichuan has fused projections, and ALiBi in place of RoPE at 13B",
    "exaone": "EXAONE names its tensors differently, and EXAONE 4 normalises queries and keys",
    "nemotron": "Nemotron has LayerNorms with 1 + w and rotates a part of each head",
    "glm": "GLM rotates a part of each head in interleaved pairs and has fused projections",
    "chatglm": "ChatGLM rotates a part of each head in interleaved pairs and has fused projections",
}
"""Beginning of ``model_type`` -> how that family differs; the longest that fits counts."""
