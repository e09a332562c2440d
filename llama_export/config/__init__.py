"""``config.json`` as a checked :class:`~llama_export.config.llama.LlamaConfig`, and the settings of exports and engines."""
