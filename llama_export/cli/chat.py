"""``llama-export chat``: a conversation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from llama_export._system.interrupt import interrupts_expected
from llama_export._system.text import terminal_text
from llama_export.cli.console import log, print_data, write
from llama_export.cli.options import PATH, ignore_hashes_flag, json_flag, session_options
from llama_export.cli.sampling_options import sampling_options


@click.command(short_help="Have a conversation.")
@click.argument("bundle", type=PATH)
@click.option("--system", metavar="TEXT", help="The system message.")
@sampling_options("chat")
@session_options
@ignore_hashes_flag
@json_flag
def chat(
    bundle: Path, system: str | None, session: dict[str, Any], ignore_hashes: bool, as_json: bool, **sampling: Any
) -> None:
    """Have a conversation with BUNDLE, worded as the checkpoint's own chat template says.

    Without a terminal each line of stdin is a message, and each answer goes to stdout.
    """
    from llama_export.cli import terminal_chat
    from llama_export.runtime.conversation import Conversation, default_sampling, open_chat_model

    llm = open_chat_model(bundle, ignore_hashes=ignore_hashes, **session)
    given = {name: value for name, value in sampling.items() if value is not None}
    conversation = Conversation(llm, system=system, sampling={**default_sampling(llm.bundle.folder), **given})
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if hasattr(stream, "reconfigure"):  # bytes that are no text are refused in words; what cannot be shown is a `?`
            stream.reconfigure(errors=errors)
    if sys.stdin.isatty() and sys.stdout.isatty() and not as_json:
        with interrupts_expected():
            terminal_chat.TerminalChat(conversation, out=sys.stdout, color=terminal_chat.wants_color(sys.stdout)).run()
        return
    if llm.session.note:
        log(f"chat: {llm.session.note}")
    shown = terminal_text if sys.stdout.isatty() else str
    replies = terminal_chat.answer_lines(
        conversation,
        iter(sys.stdin),
        write=(lambda text: None) if as_json else lambda text: write(shown(text)),
        log=log,
    )
    if as_json:
        print_data(terminal_chat.document(conversation, replies), True, "")
