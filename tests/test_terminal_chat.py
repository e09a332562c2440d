"""Conversations and their terminal, with a model that says what the test wants; and once with a real one."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import heed_ctrl_c
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llama_export._system.text import terminal_text
from llama_export.bundle.bundle import Bundle
from llama_export.cli.main import main
from llama_export.cli.terminal_chat import TerminalChat, answer_lines, document, wants_color
from llama_export.config.huggingface import config_from_dict
from llama_export.config.llama import LlamaConfig
from llama_export.errors import ConfigError, ShapeError, ToolchainError
from llama_export.export.export import export_checkpoint
from llama_export.runtime.conversation import Conversation, default_sampling, messages_from_file
from llama_export.runtime.llm import Completion
from llama_export.runtime.sampling_params import SamplingParams

Messages = list[dict[str, str]]
Script = Callable[[Messages, SamplingParams], Sequence[str]]


def small_config() -> LlamaConfig:
    return config_from_dict({
        "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
        "vocab_size": 16, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    })  # fmt: skip


class FakeGeneration:
    """Pieces, one token each, and a result that knows whether they were all taken."""

    def __init__(self, pieces: Sequence[str], prompt_tokens: int, params: SamplingParams) -> None:
        self._pieces = list(pieces)[: params.max_new_tokens]
        self._is_cut = len(self._pieces) < len(pieces)
        self._taken: list[str] = []
        self._prompt_tokens = prompt_tokens
        self._is_closed = False

    def __iter__(self) -> FakeGeneration:
        return self

    def __next__(self) -> str:
        if self._is_closed or len(self._taken) == len(self._pieces):
            raise StopIteration
        piece = self._pieces[len(self._taken)]
        if piece == "<fails>":
            raise ToolchainError("onnxruntime cannot run this bundle", hint="export again")
        if piece.startswith("<wait"):
            time.sleep(float(piece[6:-1]))
            piece = ""
        if piece == "<Ctrl-C>":
            os.kill(os.getpid(), signal.SIGINT)
            piece = ""
        self._taken.append(piece)
        return piece

    def close(self) -> None:
        self._is_closed = True

    @property
    def result(self) -> Completion:
        is_done = len(self._taken) == len(self._pieces)
        return Completion(
            text="".join(self._taken), tokens=[1] * len(self._taken),
            finish_reason=("length" if self._is_cut else "eos") if is_done else None, stop=None, logprobs=None,  # type: ignore[arg-type]
            prompt_tokens=self._prompt_tokens, reused_tokens=3, prefill_seconds=0.5, decode_seconds=2.0,
        )  # fmt: skip

    def __enter__(self) -> FakeGeneration:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FakeTemplate:
    """Two tokens per message, and one per word."""

    def render(self, messages: Messages) -> str:
        if any(message["content"] == "refuse" for message in messages):
            raise ConfigError("the chat template refuses this conversation: so it is", hint="change it")
        return " ".join(f"< {message['role']} {message['content']}" for message in messages)


class FakeLLM:
    """Counts words; says what ``script`` makes of the conversation."""

    def __init__(self, script: Script, capacity: int = 1000, folder: Path = Path("fake\x1b[31m")) -> None:
        self.bundle = SimpleNamespace(folder=folder, config=small_config(), dtype="float32")
        self.session = SimpleNamespace(capacity=capacity, backend="fake-backend", note=None)
        self.codec = SimpleNamespace(encode=lambda text, add_special_tokens: text.split())
        self.chat_template = FakeTemplate()
        self.seen: list[tuple[Messages, SamplingParams]] = []
        self._script = script

    def chat(self, messages: Messages, params: SamplingParams) -> FakeGeneration:
        prompt = len(self.chat_template.render(messages).split())
        assert prompt + params.max_new_tokens - 1 <= self.session.capacity, "a real one would refuse this"
        self.seen.append(([dict(message) for message in messages], params))
        return FakeGeneration(self._script(messages, params), prompt, params)


def echo(messages: Messages, _: SamplingParams) -> list[str]:
    return ["You said: ", messages[-1]["content"], "."]


def talk(script: Script = echo, *, capacity: int = 1000, system: str | None = None, **sampling: Any) -> Conversation:
    return Conversation(FakeLLM(script, capacity), system=system, sampling=sampling)  # type: ignore[arg-type]


def seen(conversation: Conversation) -> list[tuple[Messages, SamplingParams]]:
    found: list[tuple[Messages, SamplingParams]] = conversation.llm.seen  # type: ignore[attr-defined]
    return found


def contents(messages: Messages) -> list[str]:
    return [message["content"] for message in messages]


def run(conversation: Conversation, *lines: str | BaseException, color: bool = False) -> str:
    """What a terminal shows when somebody types these lines, and then Ctrl-D; prompts and typed lines included."""
    out = StringIO()
    typed = iter(lines)

    def read(prompt: str) -> str:
        line = next(typed, EOFError())
        out.write(prompt)
        if isinstance(line, BaseException):
            raise line
        out.write(line + "\n")
        return line

    TerminalChat(conversation, out=out, color=color, read=read).run()
    return out.getvalue()


# ---- the conversation -------------------------------------------------------------------------------------------


def test_turns_are_kept() -> None:
    conversation = talk(system="be kind")
    assert conversation.ask("one").text == "You said: one."
    conversation.ask("two")
    assert contents(conversation.messages) == ["be kind", "one", "You said: one.", "two", "You said: two."]
    assert [message["role"] for message in conversation.messages] == ["system", *("user", "assistant") * 2]
    assert contents(seen(conversation)[1][0]) == ["be kind", "one", "You said: one.", "two"]
    conversation.reset()
    assert contents(conversation.messages) == ["be kind"]


def test_the_system_message_may_change() -> None:
    conversation = talk()
    assert conversation.system is None
    conversation.ask("one")
    for text in ("be kind", "be brief", None):
        conversation.set_system(text)
        assert conversation.system == text
        assert contents(conversation.messages)[-2:] == ["one", "You said: one."]
    assert len(conversation.messages) == 2


def test_settings_reach_the_model() -> None:
    conversation = talk(temperature=0.3, seed=5)
    conversation.set("top_k", "40")
    conversation.set("temperature", 1)
    conversation.ask("x")
    params = seen(conversation)[0][1]
    assert (params.temperature, params.top_k, params.seed) == (1, 40, 5)
    conversation.set("seed", "none")
    conversation.ask("x")
    assert seen(conversation)[1][1].seed is None


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("temperature", "hot", "bad value for temperature: 'hot'"),
        ("temperature", "-1", "bad value for temperature: -1.0"),
        ("temperature", "nan", "bad value for temperature: nan"),
        ("top_k", "1.5", "bad value for top_k: '1.5'"),
        ("max_new_tokens", "none", "bad value for max_new_tokens: None"),
        ("stop", "x", "there is no setting 'stop'"),
        ("warmth", "1", "there is no setting 'warmth'"),
    ],
)
def test_bad_settings_change_nothing(name: str, value: str, says: str) -> None:
    conversation = talk()
    before = dict(conversation.sampling)
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        conversation.set(name, value)
    assert caught.value.hint == "for instance: /set temperature 0.7"
    assert conversation.sampling == before
    with pytest.raises(ConfigError, match="bad value for top_p"):
        talk(top_p=7)


def test_retry_answers_the_last_message_anew() -> None:
    conversation = talk(lambda messages, params: [f"seed {params.seed}"], seed=2**64 - 1)
    with pytest.raises(ConfigError, match="nothing to answer anew"):
        conversation.retry()
    conversation.ask("x")
    conversation.retry()
    assert conversation.retry().text == "seed 1"
    assert contents(conversation.messages) == ["x", "seed 1"]
    assert conversation.ask("y").text == f"seed {2**64 - 1}"


@pytest.mark.parametrize("text", ["refuse", "x"])
def test_after_an_error_nothing_was_said(text: str) -> None:
    conversation = talk(lambda messages, params: ["some", "<fails>"] if len(messages) > 2 else ["ok"])
    conversation.ask("first")
    with pytest.raises((ConfigError, ToolchainError)):
        conversation.ask(text)
    assert contents(conversation.messages) == ["first", "ok"]


def test_a_stopped_answer_stays_as_far_as_it_came() -> None:
    conversation = talk(lambda messages, params: ["a", "b", "c"])
    taken: list[str] = []
    reply = conversation.ask("x", on_piece=taken.append, is_stopped=lambda: len(taken) == 2)
    assert reply.was_stopped
    assert contents(conversation.messages) == ["x", "ab"]
    reply = conversation.ask("y", is_stopped=lambda: True)
    assert contents(conversation.messages)[2:] == ["y", "a"]


def test_a_question_without_any_answer_was_not_asked() -> None:
    conversation = talk(lambda messages, params: ["", "late"])
    assert conversation.ask("x", is_stopped=lambda: True).text == ""
    assert conversation.messages == []
    silent = talk(lambda messages, params: [""])  # the model itself ends at once
    silent.ask("x")
    assert contents(silent.messages) == ["x", ""]


def test_the_oldest_turns_are_forgotten_when_the_cache_is_full() -> None:
    conversation = talk(capacity=40, system="be kind")
    told: list[int] = []
    for index in range(6):
        conversation.ask(f"{index} " + "word " * 5, on_forgotten=told.append)
    assert told
    assert conversation.forgotten == sum(told)
    assert conversation.system == "be kind"
    assert conversation.messages[1]["role"] == "user"
    assert contents(conversation.messages)[-2].startswith("5 ")
    for messages, params in seen(conversation):
        used = conversation.count_tokens(messages)
        assert used + params.max_new_tokens - 1 == 40
        assert params.max_new_tokens >= 10, "a quarter is kept for the answer"


def test_a_message_that_can_never_fit_says_so() -> None:
    conversation = talk(capacity=20)
    conversation.ask("short")
    before = list(conversation.messages)
    with pytest.raises(ShapeError, match=r"this message is 32 tokens .* the cache holds 20") as caught:
        conversation.ask("word " * 30)
    assert "--max-seq-len" in str(caught.value.hint)
    assert conversation.messages == before
    assert conversation.forgotten == 0
    conversation.ask("word " * 18)  # one token of an answer
    assert seen(conversation)[-1][1].max_new_tokens == 1


def test_why_an_answer_is_cut() -> None:
    long = ["w "] * 100
    assert talk(lambda messages, params: long, capacity=30).ask("x").was_full
    reply = talk(lambda messages, params: long, max_new_tokens=5).ask("x")
    assert reply.completion.finish_reason == "length"
    assert not reply.was_full


def test_the_checkpoints_own_sampling(tmp_path: Path) -> None:
    assert default_sampling(tmp_path) == {"temperature": 0.7}
    file = tmp_path / "generation_config.json"
    for stated, expected in (
        ({"eos_token_id": 2}, {"temperature": 0.7}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}),
        ({"do_sample": True, "top_k": None}, {"temperature": 1.0}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"repetition_penalty": 1.1, "min_p": 0.1}, {"temperature": 0.7, "repetition_penalty": 1.1, "min_p": 0.1}),
    ):
        file.write_text(json.dumps(stated))
        assert default_sampling(tmp_path) == expected
    file.write_text('{"top_p": "much"}')
    with pytest.raises(ConfigError, match="top_p"):
        default_sampling(tmp_path)


def test_lines_without_a_terminal() -> None:
    conversation = talk(capacity=30)
    out: list[str] = []
    log: list[str] = []
    lines = iter(["one\r\n", "\n", "  \n", "/reset\n", "a b c d e f g h i j"])
    replies = answer_lines(conversation, lines, write=out.append, log=log.append)
    assert "".join(out) == "You said: one.\nYou said: /reset.\nYou said: a b c d e f g h i j.\n"
    assert any("forgot the oldest" in line for line in log)
    assert log[0] == "chat: 3 tokens, 1.0 tokens/s, first after 0.00 s, context 20% full, 3 reused"
    data = json.loads(json.dumps(document(conversation, replies)))
    assert data["forgotten_messages"] == conversation.forgotten > 0
    assert [answer["text"] for answer in data["answers"]] == [reply.text for reply in replies]
    assert data["answers"][0]["finish_reason"] == "eos"
    assert data["kv_cache_capacity"] == 30


# ---- the terminal -----------------------------------------------------------------------------------------------


def test_a_session_from_greeting_to_end() -> None:
    text = run(talk(system="be kind"), "hello", "", "bye")
    assert text == (
        "fake\\x1b[31m: 728 parameters, float32, fake-backend, 1000 tokens of context\n"
        "/help lists the commands. Ctrl-C stops an answer, Ctrl-D leaves.\nsystem: be kind\n\n"
        "> hello\n...\r   \rYou said: hello.\n"
        "3 tokens, 1.0 tokens/s, first after 0.00 s, context 1% full, 3 reused\n\n"
        "> \n> bye\n...\r   \rYou said: bye.\n"
        "3 tokens, 1.0 tokens/s, first after 0.00 s, context 1% full, 3 reused\n\n"
        "> \n"
    )


def test_colours_are_marked_and_always_end() -> None:
    text = run(talk(), "hello", "/set top_p 9", color=True)
    assert "\x1b[2m3 tokens" in text
    assert len(re.findall(r"\x1b\[[0-9]+m", text.replace("\x1b[0m", ""))) >= text.count("\x1b[0m") > 3
    assert text.rindex("\x1b[0m") > max(text.rindex(style) for style in ("\x1b[1m", "\x1b[2m", "\x1b[31m"))


@pytest.mark.parametrize("value", ["1", "", None])
def test_no_color(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if value is not None:
        monkeypatch.setenv("NO_COLOR", value)
    terminal = StringIO()
    assert not wants_color(terminal)
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    assert wants_color(terminal) == (not value)


def test_nothing_the_model_says_steers_the_terminal() -> None:
    hostile = ["\n\n \x1b]0;title\x07", "\x1b[2J", "\x9b1m\x7f", "a\r\nb\tc\x00\x08", "é世👩🏽‍🚀"]
    text = run(talk(lambda messages, params: hostile), "x")
    shown = text.partition("\r   \r")[2].partition("\n5 tokens")[0]
    assert shown == "\\x1b]0;title\\x07\\x1b[2J\\x9b1m\\x7fa\nb\tc\\x00\\x08é世👩🏽‍🚀"
    everything = terminal_text("".join(map(chr, range(0x110000 - 0x800 - 1))))
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", everything)


def test_what_the_model_says_is_kept_as_it_is() -> None:
    conversation = talk(lambda messages, params: ["\n \x1b[31m", "red\n"])
    text = run(conversation, "x")
    assert conversation.messages[1]["content"] == "\n \x1b[31mred\n"
    assert "red\n2 tokens" in text, "no empty line below an answer that ends its line"


def test_several_lines_are_one_message() -> None:
    conversation = talk()
    text = run(conversation, "one\\", "two\\", "", '"""', "three", '  four"""  ', '"""five"""', "six\\\\", "a\nb")
    asked = [message["content"] for message in conversation.messages if message["role"] == "user"]
    assert asked == ["one\ntwo\n", "three\n  four", "five", "six\\\\", "a\nb"]
    assert "> one\\\n... two\\\n... \n" in text


def test_commands() -> None:
    conversation = talk()
    text = run(
        conversation,
        *("/help", "one", "/set", "/set temperature 0.5", "/set top-k=3", "/set seed", "/set warmth 1", "/system"),
        *(
            "/system be kind",
            "/system",
            "//slash",
            "/retry",
            "/unknown thing",
            "/RESET",
            "/reset",
            "/system -",
            "/retry",
        ),
    )
    for said in (
        *(
            "/system TEXT     set the system message",
            "/exit            leave, like Ctrl-D",
            "  temperature        0.5\n",
        ),
        *("  top_k              3\n", "no system message\n", "system: be kind\n", "You said: /slash."),
        "there is no command /unknown; /help lists them, and //unknown says it to the model\n",
        *("there is no command /RESET", "forgotten\n", "error: there is nothing to answer anew"),
        *("error: bad value for seed: ''", "error: there is no setting 'warmth'"),
    ):
        assert said in text, said
    assert conversation.messages == []
    assert conversation.sampling["temperature"] == 0.5
    assert conversation.sampling["top_k"] == 3


def test_exit_ends_and_says_nothing() -> None:
    conversation = talk()
    assert run(conversation, " /exit ", "never read").endswith(">  /exit \n")
    assert conversation.messages == []


def test_save_and_load(tmp_path: Path) -> None:
    conversation = talk(system="be kind")
    file = tmp_path / "with space.json"
    text = run(conversation, "Grüße", f"/save {file}", "/reset", "/system -", f"/load {file}", f"/save {file}")
    assert f"saved 3 messages to {file}\n" in text
    assert "\n3 messages\n" in text
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert saved["messages"] == conversation.messages
    assert contents(conversation.messages) == ["be kind", "Grüße", "You said: Grüße."]
    assert saved["backend"] == "fake-backend"
    assert [path.name for path in tmp_path.iterdir()] == [file.name], "no partial file is left"


def test_files_that_cannot_be_saved_or_loaded(tmp_path: Path) -> None:
    conversation = talk()
    conversation.ask("kept")
    before = list(conversation.messages)
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "other.json").write_text('{"messages": [{"role": "user"}]}')
    (tmp_path / "refused.json").write_text('[{"role": "user", "content": "refuse"}]')
    text = run(
        conversation,
        *(
            "/save",
            "/load",
            "/save .",
            "/save /",
            "/save a\0b",
            "/save ~nobody-of-this-name/x",
            f"/save {tmp_path}/no/x",
        ),
        *(f"/load {tmp_path}/{name}.json" for name in ("missing", "bad", "other", "refused")),
        f"/load {tmp_path}",
    )
    for said in (
        *("/save needs a file: /save chat.json", "/load needs a file: /load chat.json", "error: '.' is not the name"),
        *("error: '/' is not the name", "error: 'a\\x00b' is not the name", "error: '~nobody-of-this-name/x' is not"),
        *("`missing.json` cannot be read as JSON", "`bad.json` cannot be read as JSON", "`other.json` holds no conv"),
        *("the chat template refuses this conversation", f"`{tmp_path.name}` cannot be read as JSON", "No such file"),
    ):
        assert said in text, said
    assert conversation.messages == before
    assert messages_from_file_text(tmp_path, '[{"role": "a", "content": "b", "more": 1}]') == [
        {"role": "a", "content": "b"}
    ]


def messages_from_file_text(folder: Path, text: str) -> Messages:
    (folder / "file.json").write_text(text)
    return messages_from_file(folder / "file.json")


def test_errors_are_told_and_the_conversation_goes_on() -> None:
    conversation = talk(lambda messages, params: ["<fails>"] if messages[-1]["content"] == "fail" else ["fine"])
    text = run(conversation, "refuse", "fail", "go on")
    assert "error: the chat template refuses this conversation: so it is\n\nhint: change it\n" in text
    assert "...\r   \rerror: onnxruntime cannot run this bundle" in text
    assert contents(conversation.messages) == ["go on", "fine"]


def test_forgetting_is_told_before_the_answer() -> None:
    text = run(talk(capacity=30), *(f"{index} a b c d e f" for index in range(4)))
    told = "the conversation no longer fits 30 tokens: forgot the oldest 2 messages\nYou said: "
    assert told in text


def test_why_an_answer_ended_is_told() -> None:
    long = ["w "] * 100
    assert ", cut off: the context is full\n" in run(talk(lambda messages, params: long, capacity=30), "x")
    assert ", cut off at max_new_tokens\n" in run(talk(lambda messages, params: long, max_new_tokens=5), "x")


def test_ctrl_c_stops_the_answer_and_not_the_session() -> None:
    before = signal.getsignal(signal.SIGINT)
    conversation = talk(
        lambda messages, params: (
            ["<Ctrl-C>", "x"] if messages[-1]["content"] == "at once" else ["part", "<Ctrl-C>", "x"]
        )
    )
    text = run(conversation, "hello", "at once", "bye")
    assert text.count(", stopped\n") == 2
    assert ", stopped before it began: nothing was said\n" in text
    assert contents(conversation.messages) == ["hello", "part", "bye", "part"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_does_not_wait_for_the_step() -> None:
    class Stuck(FakeGeneration):
        def __next__(self) -> str:
            if self._taken:
                for _ in range(2):
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(0.01)
                pytest.fail("not interrupted")
            return super().__next__()

    conversation = talk()
    conversation.llm.chat = lambda messages, params: Stuck(["part", "x"], 5, params)  # type: ignore[assignment, method-assign, misc]
    assert ", stopped\n" in run(conversation, "hello")
    assert contents(conversation.messages) == ["hello", "part"]


def test_ctrl_c_at_the_prompt_leaves() -> None:
    conversation = talk()
    assert run(conversation, KeyboardInterrupt(), "never read").endswith("> \n")
    assert conversation.messages == []


# ---- a real terminal, a real model ------------------------------------------------------------------------------

PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
from test_terminal_chat import FakeLLM, Conversation, TerminalChat, wants_color
script = lambda messages, params: ["slow "] + ["<wait 0.05>", "word "] * 200 if messages[-1]["content"] == "slow" else ["fast"]
conversation = Conversation(FakeLLM(script))
TerminalChat(conversation, out=sys.stdout, color=wants_color(sys.stdout)).run()
print([message["content"][:14] for message in conversation.messages])
"""


needs_setsid = pytest.mark.skipif(
    shutil.which("setsid") is None, reason="util-linux' setsid gives a program its terminal"
)


class Terminal:
    """A program on a pseudo-terminal, which is the controlling one: Ctrl-C is a signal to its foreground group."""

    def __init__(self, argv: list[str], **environment: str) -> None:
        self._end, theirs = pty.openpty()
        env = {**os.environ, "TERM": "xterm", **environment}
        self.process = subprocess.Popen(
            ["setsid", "--wait", "--ctty", *argv],
            stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True, preexec_fn=heed_ctrl_c,
        )  # fmt: skip
        os.close(theirs)
        self.text = ""
        self._at = 0

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._end)  # hangs up: the program ends, and with it `setsid`
        try:
            self.process.wait(timeout=20)
        finally:
            self.process.kill()
            self.process.wait()

    def type(self, keys: str) -> None:
        os.write(self._end, keys.encode())

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Reads until ``text`` has appeared in what was not waited for before."""
        assert self._appears(text, seconds), f"waited for {text!r}, got {self.text[-500:]!r}"

    def interrupt_until(self, text: str) -> None:
        """Ctrl-C at a prompt, again where it was lost: CPython's ``input`` notices a signal only while it waits for a
        key, not between the prompt and that wait (``readline_until_enter_or_signal`` in Modules/readline.c)."""
        for _ in range(6):
            self.type("\x03")
            if self._appears(text, 5):
                return
        pytest.fail(f"Ctrl-C six times, and no {text!r}: got {self.text[-500:]!r}")

    def result(self) -> int:
        """The exit status of a program that ends."""
        return self.process.wait(timeout=60)

    def _appears(self, text: str, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while (found := self.text.find(text, self._at)) < 0:
            ready, _, _ = select.select([self._end], [], [], max(0, end - time.monotonic()))
            if not ready:
                return False
            try:
                data = os.read(self._end, 4096).decode("utf-8", "replace")
            except OSError:
                data = ""
            assert data, f"ended before {text!r}, got {self.text[-500:]!r}"
            self.text += data
        self._at = found + len(text)
        return True


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(tests=str(Path(__file__).parent)))
    with Terminal([sys.executable, str(program)]) as opened:
        yield opened


@needs_setsid
def test_keys_of_a_real_terminal(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    terminal.type("half typed")
    terminal.wait_for("typed")
    terminal.interrupt_until("> ")
    terminal.type("slow\r")
    terminal.wait_for("word word")
    terminal.type("\x03")
    terminal.wait_for("stopped")
    terminal.wait_for("> ")
    terminal.type("/he\t\r")
    terminal.wait_for("forget the conversation")
    terminal.wait_for("> ")
    terminal.type("\x1b[200~two\nlines\x1b[201~\r")
    terminal.wait_for("context")
    terminal.wait_for("> ")
    terminal.type("\x04")
    terminal.wait_for("'fast']")
    assert terminal.result() == 0
    assert "['slow', 'slow word word', 'two\\nlines', 'fast']" in terminal.text
    assert "\x1b[2m" in terminal.text


WORDS = ("<s>", "</s>", *(f"w{index}" for index in range(95)))


@pytest.fixture(scope="module")
def chat_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with 97 words and a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "bundle"
    export_checkpoint(tiny_checkpoint, folder)
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ 'w1 ' if message.role == 'user' else 'w2 ' }}{{ message.content + ' ' }}{% endfor %}w3"
    )
    return folder


def chat(monkeypatch: pytest.MonkeyPatch, stdin: str, *argv: object) -> int:
    monkeypatch.setattr(sys, "stdin", StringIO(stdin))
    return main(["chat", *map(str, argv)])


def test_command_answers_each_line(
    chat_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, "w5 w6\n\nw7\n", chat_bundle, "--temperature", 0, "--max-new-tokens", 4) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert err.count("chat: 4 tokens, ") == 2
    assert "reused" in err.splitlines()[1], "the second turn continues the first one's cache"
    assert "\x1b" not in out + err


def test_command_prints_one_document(
    chat_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = (
        chat_bundle,
        "--json",
        "--system",
        "w9",
        "--seed",
        1,
        "--max-new-tokens",
        5,
        "--top-k",
        9,
        "--max-seq-len",
        32,
    )
    documents = []
    for _ in range(2):
        assert chat(monkeypatch, "w5\nw6\nw7\nw8\n", *argv) == 0
        documents.append(json.loads(capsys.readouterr().out))
    first, second = documents
    assert [answer["text"] for answer in first["answers"]] == [answer["text"] for answer in second["answers"]]
    assert len(first["answers"]) == 4
    assert first["messages"][0] == {"role": "system", "content": "w9"}
    assert first["kv_cache_capacity"] == 32
    assert first["forgotten_messages"] > 0
    assert first["sampling"] == {"max_new_tokens": 5, "temperature": 0.7, "seed": 1, "top_k": 9}


@pytest.mark.parametrize(
    ("stdin", "argv", "says"),
    [
        ("w5\n", ["--top-p", "2"], "bad value for top_p"),
        ("w5\n", ["--max-seq-len", "1000"], "is not possible"),
        ("w5 " * 200, [], "and the cache holds 128"),
        ("bad \udcff\n", [], "is not Unicode text"),
    ],
)
def test_command_refuses(
    chat_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stdin: str, argv: list[str],
    says: str,
) -> None:  # fmt: skip
    assert chat(monkeypatch, stdin, chat_bundle, *argv, "--json") == 2
    out, err = capsys.readouterr()
    assert says in err
    assert "hint: " in err
    assert json.loads(out)["error"]["exit_code"] == 2


def test_command_without_a_template_points_to_run(
    tiny_bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, "x\n", tiny_bundles["float32"].folder) == 2
    assert "hint: a base model continues text: llama-export run BUNDLE --prompt TEXT" in capsys.readouterr().err


@needs_setsid
def test_command_in_a_terminal(chat_bundle: Path) -> None:
    entry = "import sys; from llama_export.cli.main import main; code = main(); print('left'); sys.exit(code)"
    argv = [sys.executable, "-c", entry, "chat", str(chat_bundle), "--max-new-tokens", "3"]
    with Terminal(argv, NO_COLOR="1") as terminal:
        terminal.wait_for("> ")
        terminal.type("w5 w6\r")
        terminal.wait_for("% full")
        terminal.wait_for("> ")
        terminal.interrupt_until("left")
        assert terminal.result() == 0
        assert "tokens of context" in terminal.text
        assert not re.search(r"\x1b\[[0-9]*m", terminal.text)
