"""``python -m llama_export``"""

import sys

from llama_export.cli import main

sys.exit(main())
