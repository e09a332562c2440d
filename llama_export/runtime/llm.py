"""A bundle as a language model: text in, text out.

>>> import llama_export
>>> llm = llama_export.load("build/tiny-llama")  # a folder that `llama-export export` made
>>> for piece in llm.generate("import ", temperature=0.8, top_p=0.95, seed=1, stop=["\\n\\n"]):
...     print(piece, end="", flush=True)
>>> first, second = llm.complete(["def ", "class "], max_new_tokens=16)
>>> first.text, first.finish_reason, first.decode_tokens_per_second
>>> reply = llm.chat([{"role": "user", "content": "Hello!"}]).result  # where the checkpoint has a chat template
"""

from __future__ import annotations

import dataclasses
import inspect
import threading
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack

from llama_export.bundle.bundle import Bundle
from llama_export.config.checks import whole_number, wrong_argument
from llama_export.config.settings import RuntimeBackend
from llama_export.errors import ConfigError
from llama_export.runtime.generation import FinishReason, TokenEvent, check_request, generate_steps, rows_at_once
from llama_export.runtime.opening import codec_of, open_session, opened_bundle
from llama_export.runtime.protocol import CacheSession
from llama_export.runtime.sampling import TokenLogprobs
from llama_export.runtime.sampling_params import SamplingOptions, SamplingParams, sampling_with
from llama_export.runtime.text import TextCodec

if TYPE_CHECKING:
    from llama_export.runtime.chat_template import ChatTemplate

Prompt = str | Iterable[int]
"""Text, or token ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What a prompt was continued with."""

    text: str
    """Without the stop text or token that ended it; empty without a tokenizer."""
    tokens: list[int]
    """All new tokens, a token that ended the text included."""
    finish_reason: FinishReason | None
    """None: closed before its end."""
    stop: str | int | None
    """The stop text or the token that ended it."""
    logprobs: list[TokenLogprobs] | None
    """One entry per token, if log-probabilities were asked for."""
    prompt_tokens: int
    """Length of the prompt."""
    reused_tokens: int
    """How many of them the cache still held from the request before."""
    prefill_seconds: float
    """Seconds of computing from the start of its batch to its first token."""
    decode_seconds: float
    """Seconds of computing from its first token to its last."""

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Tokens per second of this row; None for one token."""
        return (len(self.tokens) - 1) / self.decode_seconds if len(self.tokens) > 1 else None


def load(
    bundle: str | Path | Bundle,
    *,
    backend: RuntimeBackend = "auto",
    engine: str | Path | None = None,
    quantize: str | None = None,
    max_seq_len: int | None = None,
    threads: int | None = None,
    read_weights: bool = False,
    ignore_hashes: bool = False,
) -> LLM:
    """Opens a bundle for generation.

    Args:
        bundle: folder that ``llama-export export`` made, of the task causal-lm; or an opened bundle.
        backend: ``auto``, ``onnxruntime``, ``onnxruntime-cuda``, ``tensorrt-rtx`` or ``tensorrt``. ``auto`` takes the
            engine that is named; else one of the bundle's own, if this machine can run it and nothing is asked for that
            only onnxruntime has; else onnxruntime on the CPU. Loading an engine runs its code on the GPU: the session's
            ``note`` names the engine that ``auto`` chose.
        engine: path of an engine. Default: of the bundle's engines of the backend, those for this GPU first, the one that
            holds the most tokens; of equals the one with the largest batch; of these the first by name.
        quantize: ``int8`` or ``int4``: weights made by ``llama-export quantize``; onnxruntime only.
        max_seq_len: tokens that a row of the cache can hold; onnxruntime only. Default: the model's longest sequence, at
            most 4096.
        threads: CPU threads of onnxruntime; default: one per core.
        read_weights: onnxruntime: read the weights into memory instead of mapping their files, for a folder that others may
            write to: a mapped file that becomes shorter ends this process with a signal (SIGBUS).
        ignore_hashes: open the bundle although a file differs from its manifest.

    Raises:
        ConfigError: not a bundle, a bundle of another task, or an argument of a wrong type or value.
        ArtifactMismatchError: a file is not the one that the manifest describes.
        MissingDependencyError: onnxruntime or TensorRT is not installed.
        ShapeError: ``max_seq_len`` is beyond the model's longest sequence.
        ToolchainError: this machine cannot run the engine, or the backend cannot open the graph.
    """
    opened = opened_bundle(bundle, ignore_hashes=ignore_hashes)
    session = open_session(
        opened, backend=backend, engine=engine, quantize=quantize, max_seq_len=max_seq_len, threads=threads,
        read_weights=read_weights,
    )  # fmt: skip
    return LLM(opened, session, codec_of(opened))


class LLM:
    """A causal LM with its tokenizer and one cache; :func:`llama_export.load` makes it.

    It computes one request at a time, and may be used by several threads. :meth:`complete` waits until another thread's
    call has ended. While a stream of :meth:`generate` or :meth:`chat` is open in one thread, a request of another thread is
    refused by a ConfigError. A stream is open until it has ended, is closed or is garbage-collected, or its thread ends. In one
    thread, a later request ends an open stream.

    Args:
        bundle: from :func:`llama_export.load_bundle`.
        session: over this bundle.
        codec: its tokenizer; None: token ids only.
    """

    def __init__(self, bundle: Bundle, session: CacheSession, codec: TextCodec | None) -> None:
        self.bundle = bundle
        self.session = session
        self.codec = codec
        self._lock = threading.RLock()
        """Held by each step of a stream, and by a whole :meth:`complete`."""
        self._held: _Draft | None = None
        """The last request, if it was of one row: the cache holds the first ``past_length`` tokens of prompt and output."""
        self._latest: weakref.ref[TextGeneration] | None = None

    def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, **sampling: Unpack[SamplingOptions]
    ) -> TextGeneration:
        """Continues a prompt, piece by piece. What the cache still holds of its beginning is not computed again.

        Args:
            prompt: text, or token ids.
            params: the settings; default: greedy, 64 tokens.
            **sampling: fields of :class:`SamplingParams`, which replace those of ``params``.

        Raises:
            ConfigError: a setting that does not exist or is out of range, a prompt of a wrong type, a text without a
                tokenizer, or an open stream of another thread.
            ShapeError: an empty prompt, a token id outside the vocabulary, or more tokens than the cache holds.
        """
        return self._generate(self._tokens(prompt), params, sampling)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        template: Mapping[str, Any] | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> TextGeneration:
        """The next message of a conversation, in the format of the checkpoint's chat template.

        Args:
            messages: ``{"role": ..., "content": ...}``, oldest first.
            params, **sampling: see :meth:`generate`.
            template: further arguments of the template: ``tools``, ``documents``, and any that it defines itself.

        Raises:
            ConfigError: no chat template, or one that refuses the conversation; and see :meth:`generate`.
            ShapeError: see :meth:`generate`.
        """
        text = self.chat_template.render(messages, **{"add_generation_prompt": True, **(template or {})})
        return self._generate(self._codec().encode(text, add_special_tokens=False), params, sampling)

    def complete(
        self,
        prompts: Iterable[Prompt],
        params: SamplingParams | Iterable[SamplingParams] | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> list[Completion]:
        """Continues several prompts, each to its own end. They are computed in batches of at most 256 rows that fit into a
        quarter of the available memory (an engine: of its ``max_batch``). Rows are independent of their batch.

        Args:
            prompts: texts or lists of token ids; any iterable of them.
            params: for all, or one per prompt; default: greedy, 64 tokens.
            **sampling: see :meth:`generate`.

        Raises:
            ConfigError, ShapeError: see :meth:`generate`; all prompts are checked before the first is computed.
        """
        if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Iterable):
            raise ConfigError(
                "prompts are a list",
                details={"got": repr(prompts)[:200], "expected": "an iterable of texts or of lists of token ids"},
                hint="complete([prompt]), or generate(prompt)",
            )
        rows = [self._tokens(prompt) for prompt in prompts]
        if params is None or isinstance(params, SamplingParams):
            wanted = [sampling_with(params, sampling)] * len(rows)
        elif isinstance(params, Iterable):
            wanted = [sampling_with(one, sampling) for one in params]
        else:
            raise wrong_argument("params", params, "SamplingParams, or one per prompt")
        check_request(self.session, rows, wanted, self.codec)
        size = rows_at_once(self.session, rows, wanted)
        found: list[Completion] = []
        with self._lock:
            for begin in range(0, len(rows), size):
                events, drafts = self._start(rows[begin : begin + size], wanted[begin : begin + size])
                for event in events:
                    drafts[event.row].events.append(event)
                found += [draft.completion() for draft in drafts]
        return found

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The bundle's.

        Raises:
            ConfigError: it has none.
        """
        from llama_export.runtime.chat_template import ChatTemplate

        return ChatTemplate.from_folder(self.bundle.folder)

    def _generate(
        self, tokens: list[int], params: SamplingParams | None, sampling: Mapping[str, Any]
    ) -> TextGeneration:
        wanted = sampling_with(params, sampling)
        with self._lock:
            events, (draft,) = self._start([tokens], [wanted])
            generation = TextGeneration(events, draft, self._lock)
            self._latest = weakref.ref(generation)  # a stream that nobody holds any more is not open
        return generation

    def _start(
        self, prompts: list[list[int]], params: list[SamplingParams]
    ) -> tuple[Generator[TokenEvent], list[_Draft]]:
        """The events of a batch, and a draft of the completion of each row. The caller holds the lock."""
        latest = None if self._latest is None else self._latest()
        if latest is not None and latest.is_open_elsewhere:
            raise ConfigError(
                "one caller at a time: a stream of another thread is open on this model",
                details={"thread": latest.thread.name, "tokens so far": len(latest.events)},
                hint="let it end or close it first (a `with` block closes it), call complete(), which waits for other calls of "
                "complete(), or load the model once per thread",
            )
        alone = len(prompts) == 1
        reused = self._reusable(prompts[0]) if alone else 0
        events = generate_steps(
            self.session, prompts, params,
            eos_token_ids=self.bundle.manifest.eos_token_ids, codec=self.codec, reused_tokens=reused,
        )  # fmt: skip
        if latest is not None:
            latest.give_way()
        self._latest = None
        drafts = [_Draft(prompt, reused, wanted) for prompt, wanted in zip(prompts, params, strict=True)]
        self._held = drafts[0] if alone else None
        return events, drafts

    def _reusable(self, prompt: Sequence[int]) -> int:
        """Tokens at the beginning of a prompt that the cache holds, the last one left out: its logits are needed.

        None where RoPE follows the length: the keys of a shorter text were turned by other frequencies.
        """
        if self._held is None or self.session.config.rope.follows_length:
            return 0
        held = [*self._held.prompt, *self._held.tokens][: int(self.session.past_length[0])]
        most = min(len(held), len(prompt) - 1)
        return next((at for at in range(most) if held[at] != prompt[at]), max(most, 0))

    def _tokens(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self._codec().encode(prompt)
        is_list = isinstance(prompt, Iterable) and not isinstance(prompt, (bytes, Mapping))
        tokens = [whole_number(token) for token in prompt] if is_list else [None]
        if None in tokens:
            raise wrong_argument(
                "a prompt", prompt, "text, or a list of token ids (integers)",
                "decode bytes first; complete() takes a list of prompts, generate() takes one",
            )  # fmt: skip
        return [token for token in tokens if token is not None]

    def _codec(self) -> TextCodec:
        return self.codec if self.codec is not None else TextCodec(self.bundle.folder)  # which says what is missing


class TextGeneration(Iterator[str]):
    """The output of one request as it is made: one piece of text per token, empty while a character or a possible stop text
    is incomplete. Computing happens in ``next``; leaving the ``with`` block, or :meth:`close`, ends it early.

    A later request of the same thread on the same model ends it, too, and ``next`` says so.
    """

    def __init__(self, steps: Generator[TokenEvent], draft: _Draft, lock: threading.RLock) -> None:
        self._steps = steps
        self._draft = draft
        self._lock = lock
        self._gave_way = False
        self.thread = threading.current_thread()
        """The thread that made it, or took its last piece."""

    def __next__(self) -> str:
        with self._lock:
            if self._gave_way:
                raise ConfigError(
                    "this generation was ended by a later request on the same model",
                    details={"tokens so far": len(self.events)},
                    hint="take the result first, run several prompts as one batch: complete(), or load the model twice",
                )
            self.thread = threading.current_thread()
            event = next(self._steps)
            self.events.append(event)
            return event.text

    @property
    def is_open_elsewhere(self) -> bool:
        """Another thread, which still runs, has begun it and neither ended nor closed it."""
        is_open = (
            inspect.getgeneratorstate(self._steps) != inspect.GEN_CLOSED
            and self._draft.completion().finish_reason is None
        )
        return is_open and self.thread is not threading.current_thread() and self.thread.is_alive()

    @property
    def events(self) -> list[TokenEvent]:
        """One for each piece so far: the token, its log-probabilities, and why the text ended there, if it did."""
        return self._draft.events

    @property
    def result(self) -> Completion:
        """All of it; runs to the end first, unless it was closed."""
        for _ in self:
            pass
        return self._draft.completion()

    def close(self) -> None:
        """Ends it here. The model may be used again, and still knows what it has read."""
        with self._lock:
            self._steps.close()

    def give_way(self) -> None:
        """Ends it for a later request."""
        self._gave_way = self._draft.completion().finish_reason is None
        self.close()

    def __enter__(self) -> TextGeneration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(slots=True)
class _Draft:
    """A completion that is growing."""

    prompt: list[int]
    reused_tokens: int
    params: SamplingParams
    events: list[TokenEvent] = dataclasses.field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [event.token for event in self.events]

    def completion(self) -> Completion:
        events = self.events
        first, last = (events[0], events[-1]) if events else (None, None)
        logprobs = [event.logprobs for event in events if event.logprobs is not None]
        return Completion(
            text="".join(event.text for event in events),
            tokens=self.tokens,
            finish_reason=last.finish_reason if last else None,
            stop=last.stop if last else None,
            logprobs=None if self.params.logprobs is None else logprobs,
            prompt_tokens=len(self.prompt),
            reused_tokens=self.reused_tokens,
            prefill_seconds=first.seconds if first else 0.0,
            decode_seconds=last.seconds - first.seconds if first and last else 0.0,
        )
