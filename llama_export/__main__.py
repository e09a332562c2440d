"""``python -m llama_export``"""

from llama_export.cli.main import entry_point

entry_point()
