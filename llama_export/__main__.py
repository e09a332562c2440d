"""``python -m llama_export``"""

from llama_export.cli import entry_point

entry_point()
