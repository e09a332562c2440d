"""The measurements behind docs/architecture.md: each study measures (``measure() -> JSON``) and shows (``table(JSON)``).

``attention`` time and memory of the attention implementations, the cache; ``positions`` RoPE; ``norms`` epsilon and the
norm's place; ``mlp`` activations and tensor parallelism; ``heads`` fine-tuning. ``tiny_llama`` is what they share.
"""
