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
import operator
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from llama_export._text import printable
from llama_export.bundle import Bundle, load_bundle
from llama_export.config import BACKENDS, RUNTIME_BACKENDS, RuntimeBackend
from llama_export.errors import ConfigError
from llama_export.runtime.generation import FinishReason, TokenEvent, generate_steps
from llama_export.runtime.graph import Device
from llama_export.runtime.protocol import CacheSession, HeadSession
from llama_export.runtime.sampling import SamplingParams, TokenLogprobs
from llama_export.runtime.session import OnnxRuntimeHeadSession, OnnxRuntimeSession
from llama_export.runtime.text import TextCodec

if TYPE_CHECKING:
    from llama_export.runtime.chat_template import ChatTemplate

__all__ = [
    "LLM", "Completion", "Prompt", "SamplingParams", "TextGeneration", "load", "open_head_session", "open_session",
]  # fmt: skip

DEFAULT_MAX_SEQ_LEN = 4096
"""Capacity of the cache where none is asked for and the model has more positions, tokens."""
Prompt = str | Sequence[int]
"""Text, or token ids."""
ONNXRUNTIME_BACKENDS = ("onnxruntime", "onnxruntime-cuda")


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What a prompt was continued with."""

    text: str
    """Without the stop text or token that ended it; empty without a tokenizer."""
    tokens: list[int]
    """All new ones, those of the stop included."""
    finish_reason: FinishReason | None
    """None: closed before its end."""
    stop: str | int | None
    """The stop text or the token that ended it."""
    logprobs: list[TokenLogprobs] | None
    """Of each token, if they were asked for."""
    prompt_tokens: int
    """Length of the prompt."""
    reused_tokens: int
    """How many of them the cache still held from the request before."""
    prefill_seconds: float
    """Of computing, to the first token."""
    decode_seconds: float
    """Of computing, from the first token to the last."""

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Of this row; None for one token."""
        return (len(self.tokens) - 1) / self.decode_seconds if len(self.tokens) > 1 else None


def load(
    bundle: str | Path,
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
        bundle: folder that ``llama-export export`` made.
        backend, engine, quantize, max_seq_len, threads, read_weights: see :func:`open_session`.
        ignore_hashes: open the bundle although a file differs from its manifest.

    Raises:
        ConfigError: no bundle, not one of a causal LM, or see :func:`open_session`.
        ArtifactMismatchError, MissingDependencyError, ShapeError, ToolchainError: see
            :func:`llama_export.bundle.load_bundle` and the sessions.
    """
    opened = load_bundle(Path(bundle), ignore_hashes=ignore_hashes)
    session = open_session(
        opened, backend=backend, engine=engine, quantize=quantize, max_seq_len=max_seq_len, threads=threads,
        read_weights=read_weights,
    )  # fmt: skip
    return LLM(opened, session, TextCodec(opened.folder) if (opened.folder / "tokenizer.json").is_file() else None)


def open_session(
    bundle: Bundle,
    *,
    backend: RuntimeBackend = "auto",
    engine: str | Path | None = None,
    quantize: str | None = None,
    max_seq_len: int | None = None,
    threads: int | None = None,
    read_weights: bool = False,
    request_tokens: int = 1,
) -> CacheSession:
    """A session of one row, on the CPU or a GPU.

    Args:
        bundle: from :func:`llama_export.bundle.load_bundle`.
        backend: ``auto``: the named engine; else one of the bundle's own, if this machine can run it, it holds
            ``request_tokens`` and nothing is asked for that only onnxruntime has; else onnxruntime on the CPU. The
            session's ``note`` names the engine that ``auto`` chose: loading an engine runs its code on the GPU.
        engine: file; default: of the bundle's engines of the backend, those for this GPU first, the one that holds the
            most tokens; of equals the one with the largest batch; of these the first by name.
        quantize: onnxruntime: ``int8`` or ``int4`` weights, made by ``llama-export quantize``.
        max_seq_len: onnxruntime: tokens that a row can hold; default the model's, at most 4096, or ``request_tokens`` if
            that is more. An engine's is built in.
        threads: onnxruntime: CPU threads; default one per core.
        read_weights: onnxruntime: read the weights into memory instead of mapping their files, for a folder that others may
            write to: a mapped file that becomes shorter ends this process with a signal (SIGBUS).
        request_tokens: what the caller is going to ask for, if that is known.

    Raises:
        ConfigError: an unknown backend, no engine of the backend, quantised weights that were not made, or a setting that
            the backend does not have.
        ArtifactMismatchError, MissingDependencyError, ShapeError, ToolchainError: see the sessions.
    """
    path, note = _chosen_engine(
        bundle, backend, engine, request_tokens, quantize=quantize, max_seq_len=max_seq_len, threads=threads,
        read_weights=read_weights or None,
    )  # fmt: skip
    if path is not None:
        from llama_export.engine_session import EngineSession

        return EngineSession(bundle, path, note=note)
    default = min(bundle.config.max_length, max(DEFAULT_MAX_SEQ_LEN, request_tokens))
    session = OnnxRuntimeSession(
        bundle, max_seq_len=default if max_seq_len is None else max_seq_len, threads=threads, variant=quantize,
        device=_device_of(backend), read_weights=read_weights,
    )  # fmt: skip
    session.note = "; ".join(filter(None, (note, session.note))) or None
    return session


def open_head_session(
    bundle: Bundle,
    *,
    backend: RuntimeBackend = "auto",
    engine: str | Path | None = None,
    threads: int | None = None,
    read_weights: bool = False,
) -> HeadSession:
    """A session of a head without a cache: classification, question answering, features.

    Args:
        bundle, backend, engine, threads, read_weights: see :func:`open_session`.

    Raises:
        ConfigError, ArtifactMismatchError, MissingDependencyError, ToolchainError: see :func:`open_session`.
    """
    path, note = _chosen_engine(bundle, backend, engine, 1, threads=threads, read_weights=read_weights or None)
    if path is not None:
        from llama_export.engine_session import EngineHeadSession

        return EngineHeadSession(bundle, path, note=note)
    session = OnnxRuntimeHeadSession(bundle, threads=threads, device=_device_of(backend), read_weights=read_weights)
    session.note = "; ".join(filter(None, (note, session.note))) or None
    return session


def _device_of(backend: RuntimeBackend) -> Device:
    return "cuda" if backend == "onnxruntime-cuda" else "cpu"


def _chosen_engine(
    bundle: Bundle, backend: RuntimeBackend, engine: str | Path | None, request_tokens: int, **of_onnxruntime: Any
) -> tuple[Path | None, str | None]:
    """The engine that these settings mean, or None for onnxruntime; and what to tell the user of the choice."""
    asked = {name: value for name, value in of_onnxruntime.items() if value is not None}
    if backend not in RUNTIME_BACKENDS:
        raise ConfigError(
            f"unknown backend: {backend}",
            details={"got": backend, "expected": " | ".join(RUNTIME_BACKENDS)},
            hint="choose one of these",
        )
    if engine is not None and backend in ONNXRUNTIME_BACKENDS:
        raise ConfigError(
            "onnxruntime runs no engines",
            details={"engine": engine, "got": f"backend {backend}"},
            hint="leave the engine out, or choose the backend `auto`",
        )
    path, note = Path(engine) if engine is not None else None, None
    if path is None and backend not in ONNXRUNTIME_BACKENDS and not (backend == "auto" and asked):
        path, note = _engine_of(bundle, backend, request_tokens)
    if path is not None and asked:
        raise ConfigError(
            f"an engine has no {', '.join(asked)}",
            details={"engine": path, "got": ", ".join(f"{name}={value!r}" for name, value in asked.items())},
            hint="capacity and precision are chosen by `llama-export build`; for a CPU choose the backend `onnxruntime`",
        )
    return path, note


def _engine_of(bundle: Bundle, backend: RuntimeBackend, request_tokens: int) -> tuple[Path | None, str | None]:
    """As :func:`_chosen_engine`, by the rule that :func:`open_session` documents."""
    from llama_export._tensorrt import gpu_compute_capability
    from llama_export.engine_session import execution_blocker
    from llama_export.engine_sidecar import read_sidecar

    is_auto = backend == "auto"
    able = {name for name in BACKENDS if execution_blocker(name) is None}
    if is_auto and not able:
        return None, None
    wanted = able if is_auto else {backend}
    built = [(path, sidecar) for path in bundle.engines if (sidecar := read_sidecar(path)).backend in wanted]
    gpu = gpu_compute_capability() if able else None
    if is_auto:
        fitting = [item for item in built if item[1].max_seq_len >= request_tokens and item[1].serves(str(gpu))]
        if not fitting:
            why = f"auto: none of the {len(built)} engines serves {request_tokens} tokens on this GPU; using the CPU"
            return None, why if built else None
        built = fitting
    if not built:
        raise ConfigError(
            f"this bundle has no {backend} engine",
            details={"bundle": bundle.folder, "got": ", ".join(path.name for path in bundle.engines) or "none"},
            hint=f"make one: llama-export build {bundle.folder} --backend {backend}",
        )
    # bundle.engines is sorted by name, and max() gives the first of equals.
    path, sidecar = max(
        built, key=lambda item: (gpu is not None and item[1].serves(gpu), item[1].max_seq_len, item[1].max_batch)
    )
    note = (
        f"auto: using engine {printable(path.name)}, built by llama_export {sidecar.created_by.llama_export} with {sidecar.backend} "
        f"{sidecar.backend_version}; loading an engine runs its code on the GPU, --backend onnxruntime does not"
    )
    return path, note if is_auto else None


class LLM:
    """A causal LM with its tokenizer and one cache. One request at a time; :meth:`complete` runs several as one batch.

    Args:
        bundle: from :func:`llama_export.bundle.load_bundle`.
        session: over this bundle.
        codec: its tokenizer; None: token ids only.
    """

    def __init__(self, bundle: Bundle, session: CacheSession, codec: TextCodec | None) -> None:
        self.bundle = bundle
        self.session = session
        self.codec = codec
        self._held: _Draft | None = None
        """The last request, if it was of one row: the cache holds the first ``past_length`` tokens of prompt and output."""
        self._latest: TextGeneration | None = None

    def generate(self, prompt: Prompt, params: SamplingParams | None = None, **sampling: Any) -> TextGeneration:
        """Continues a prompt, piece by piece. What the cache still holds of its beginning is not computed again.

        Args:
            prompt: text, or token ids.
            params: how; default greedy.
            **sampling: fields of :class:`SamplingParams` that replace those of ``params``.

        Raises:
            ConfigError, ShapeError: see :class:`SamplingParams` and
                :func:`llama_export.runtime.generation.generate_steps`; no tokenizer for a text.
        """
        return self._generate(self._tokens(prompt), params, sampling)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        template: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> TextGeneration:
        """The next message of a conversation, worded as the checkpoint's chat template says.

        Args:
            messages: ``{"role": ..., "content": ...}``, oldest first.
            params, **sampling: see :meth:`generate`.
            template: further arguments of :meth:`~llama_export.runtime.chat_template.ChatTemplate.render`: ``tools``,
                ``documents``, and what the template itself knows.

        Raises:
            ConfigError: no chat template, or one that refuses the conversation; and see :meth:`generate`.
        """
        text = self.chat_template.render(messages, **{"add_generation_prompt": True, **(template or {})})
        return self._generate(self._codec().encode(text, add_special_tokens=False), params, sampling)

    def complete(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **sampling: Any,
    ) -> list[Completion]:
        """Continues several prompts as one batch, each to its own end.

        Args:
            prompts: texts or lists of token ids.
            params: for all, or one per prompt; default greedy.
            **sampling: see :meth:`generate`.

        Raises:
            ConfigError, ShapeError: see :meth:`generate`; more prompts than an engine's ``max_batch``.
        """
        if isinstance(prompts, str):
            raise ConfigError(
                "prompts are a list",
                details={"got": repr(prompts)[:200]},
                hint="complete([prompt]), or generate(prompt)",
            )
        if params is None or isinstance(params, SamplingParams):
            wanted = [_settings(params, sampling)] * len(prompts)
        else:
            wanted = [_settings(one, sampling) for one in params]
        events, drafts = self._start([self._tokens(prompt) for prompt in prompts], wanted)
        for event in events:
            drafts[event.row].events.append(event)
        return [draft.completion() for draft in drafts]

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
        events, (draft,) = self._start([tokens], [_settings(params, sampling)])
        self._latest = TextGeneration(events, draft)
        return self._latest

    def _start(
        self, prompts: list[list[int]], params: list[SamplingParams]
    ) -> tuple[Generator[TokenEvent], list[_Draft]]:
        """The events of a batch, and a draft of the completion of each row."""
        alone = len(prompts) == 1
        reused = self._reusable(prompts[0]) if alone else 0
        events = generate_steps(
            self.session, prompts, params,
            eos_token_ids=self.bundle.manifest.eos_token_ids, codec=self.codec, reused_tokens=reused,
        )  # fmt: skip
        if self._latest is not None:
            self._latest.give_way()
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
        return self._codec().encode(prompt) if isinstance(prompt, str) else [operator.index(token) for token in prompt]

    def _codec(self) -> TextCodec:
        return self.codec if self.codec is not None else TextCodec(self.bundle.folder)  # which says what is missing


class TextGeneration(Iterator[str]):
    """The output of one request as it is made: one piece of text per token, empty while a character or a possible stop text
    is incomplete. Computing happens in ``next``; leaving the ``with`` block, or :meth:`close`, ends it early.

    A later request on the same model ends it, too, and ``next`` says so.
    """

    def __init__(self, steps: Generator[TokenEvent], draft: _Draft) -> None:
        self._steps = steps
        self._draft = draft
        self._gave_way = False

    def __next__(self) -> str:
        if self._gave_way:
            raise ConfigError(
                "this generation was ended by a later request on the same model",
                details={"tokens so far": len(self.events)},
                hint="take the result first, run several prompts as one batch: complete(), or load the model twice",
            )
        event = next(self._steps)
        self.events.append(event)
        return event.text

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


def _settings(params: SamplingParams | None, changes: Mapping[str, Any]) -> SamplingParams:
    return dataclasses.replace(params or SamplingParams(), **changes)
