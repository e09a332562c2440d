"""The whole path on the bundled checkpoint, through the command line a user would type.

    make demo        (or: python examples/demo.py)

Exports ``examples/tiny-llama``, builds a TensorRT-RTX engine, continues a prompt, validates, and prints what each
command printed. Stops with the exit code of the first command that fails.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
PROMPT = "def split(s):\n    "
TEXT = HERE / "train_tiny_llama.py"
"""Python, which is what the checkpoint was trained on, and not of the standard library it has seen."""


def llama_export(*arguments: str) -> None:
    """Runs one command, showing it first; its output goes straight to the terminal."""
    print(f"\n$ llama-export {shlex.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "llama_export", *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=HERE / "tiny-llama")
    parser.add_argument("--bundle", type=Path, default=Path("build/tiny-llama"))
    parser.add_argument("--report", type=Path, default=Path("build/report"))
    args = parser.parse_args()
    start = time.monotonic()
    bundle = str(args.bundle)
    llama_export("export", str(args.checkpoint), "-o", bundle, "--force")
    llama_export("build", bundle)
    llama_export("run", bundle, "--prompt", PROMPT, "--max-new-tokens", "64")
    llama_export("validate", bundle, "--text", str(TEXT), "--report", str(args.report))
    print(f"\ndemo: done in {time.monotonic() - start:.0f} s; open {(args.report / 'parity.html').resolve().as_uri()}")


if __name__ == "__main__":
    main()
