"""`ChatEngine`: chat with a local model whose KV cache is compressed and kept between calls."""

from __future__ import annotations

import threading
import weakref
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from turboquant_local.config import TurboQuantConfig
from turboquant_local.engine.generation import cancelled_reply, generate_reply
from turboquant_local.engine.loading import LoadedModel, ModelSpec, acquire_model, release_model
from turboquant_local.engine.metrics import Stopwatch
from turboquant_local.engine.options import check_options, merge_options
from turboquant_local.engine.parsing import ToolParser
from turboquant_local.engine.prompt import render_prompt
from turboquant_local.engine.prompt_cache import PromptCache
from turboquant_local.engine.reply_form import offered_tools
from turboquant_local.engine.request import prepare_request
from turboquant_local.engine.streaming import Cancellation, Emit, Work, astream_events, stream_events
from turboquant_local.engine.types import (
    ChatReply,
    GenerationMetrics,
    GenerationOptions,
    Message,
    StreamEvent,
    Tool,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_POLL_SECONDS: Final = 0.05
"""How often a waiting call looks whether it was cancelled."""


class ChatEngine:
    """Chats with a model; loads it on first use and shares its weights with other engines of this process.

    One generation runs at a time; concurrent calls wait for their turn. The KV cache is kept between calls, and a
    prompt that begins like the last conversation computes only its new tokens.

    Args:
        model: A folder or a name on the Hugging Face hub.
        kv_cache: How keys and values are stored: a preset's name, a dict of fields, or a config; preset
            "auto" chooses for the model.
        device: A torch device; None takes cuda, else mps, else cpu.
        dtype: "auto" (the default), "float32", "float16" or "bfloat16".
        revision: Branch, tag or commit on the hub.
        token: Access token of the hub.
        trust_remote_code: Run code that comes with the model.
        chat_template: A Jinja template instead of the tokenizer's own.
        tool_parser: Reads tool calls in a format of its own; see `ReplyParser`.
        model_kwargs: Passed to `AutoModelForCausalLM.from_pretrained`.
        tokenizer_kwargs: Passed to `AutoTokenizer.from_pretrained`.
        options: Defaults of every call; a call overrides them field by field.

    Raises:
        ConfigError: A broken `kv_cache`, `dtype` or `device`.
        GenerationOptionError: A broken option.
    """

    def __init__(
        self,
        model: str,
        *,
        kv_cache: str | Mapping[str, Any] | TurboQuantConfig | None = None,
        device: str | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        trust_remote_code: bool = False,
        chat_template: str | None = None,
        tool_parser: ToolParser | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        options: GenerationOptions | None = None,
    ) -> None:
        self._spec = ModelSpec(
            model=model,
            device=device,
            dtype=dtype,
            revision=revision,
            token=token,
            trust_remote_code=trust_remote_code,
            model_kwargs=dict(model_kwargs or {}),
            tokenizer_kwargs=dict(tokenizer_kwargs or {}),
        )
        self._kept = PromptCache(TurboQuantConfig.parse(kv_cache))
        self._options = merge_options(None, options)
        check_options(self._options)
        self._chat_template = chat_template
        self._tool_parser = tool_parser
        self._last_metrics: GenerationMetrics | None = None
        self._loaded: LoadedModel | None = None
        self._release: weakref.finalize[..., ChatEngine] | None = None
        self._load_lock = threading.Lock()
        self._turn = threading.Lock()

    def __repr__(self) -> str:
        return f"ChatEngine({self.model_name!r}, kv_cache={self._kept.config.preset!r}, is_loaded={self.is_loaded})"

    def __enter__(self) -> ChatEngine:
        self.load()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def model_name(self) -> str:
        """The model, as it was given."""
        return self._spec.model

    @property
    def kv_cache(self) -> TurboQuantConfig:
        """How keys and values are stored; the first generation fills in "auto"."""
        return self._kept.config

    @property
    def kv_cache_explanation(self) -> str:
        """Why "auto" chose `kv_cache`, in plain sentences; "" before the first generation, or if a preset was named."""
        return self._kept.explanation

    @property
    def is_loaded(self) -> bool:
        """Whether the engine holds a model at the moment."""
        return self._loaded is not None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; loads the model."""
        return self._load().tokenizer

    @property
    def context_length(self) -> int:
        """Most tokens that prompt and reply may have together; loads the model."""
        return self._load().context_length

    @property
    def last_metrics(self) -> GenerationMetrics | None:
        """What the last finished generation cost."""
        return self._last_metrics

    def load(self) -> None:
        """Load the model, or share it if another engine has it. The first use does it too.

        Raises:
            ModelLoadError: Files are missing, unreadable or out of reach.
            BackendError: The device does not exist here.
        """
        self._load()

    def close(self) -> None:
        """Drop the cache and give the model back, whose weights are freed with its last user.

        Waits for a running generation. The engine can be used again, and loads again then.
        """
        with self._turn, self._load_lock:
            self._kept.drop()
            self._loaded = None
            if self._release is not None:
                self._release()
                self._release = None

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        options: GenerationOptions | None = None,
        cancel: threading.Event | None = None,
    ) -> ChatReply:
        """Generate a reply.

        Args:
            messages: The conversation so far.
            tools: Functions the model may call.
            options: Overrides the engine's defaults.
            cancel: When set, the reply ends after the next token.

        Raises:
            PromptError: The request cannot be served; nothing was generated.
            ModelError: The model cannot be loaded or has no chat template.
            BackendError: Constrained decoding was asked for and cannot run here.
        """
        return self._generate(messages, tools, options, Cancellation(cancel), lambda delta: None)

    def stream(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        options: GenerationOptions | None = None,
        cancel: threading.Event | None = None,
    ) -> Generator[StreamEvent, None, None]:
        """Generate a reply and yield its events as they come, `Finished` last; arguments and errors as in `chat`.

        Closing the iterator ends the generation after the next token.
        """
        return stream_events(self._work(messages, tools, options), cancel)

    def astream(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        options: GenerationOptions | None = None,
        cancel: threading.Event | None = None,
    ) -> AsyncGenerator[StreamEvent, None]:
        """As `stream`, for an event loop, which is not blocked, not even by loading.

        Cancelling the task or closing the iterator ends the generation after the next token.
        """
        return astream_events(self._work(messages, tools, options), cancel)

    def count_tokens(self, text: str) -> int:
        """Tokens of a text alone."""
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def count_message_tokens(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> int:
        """Tokens of the prompt that these messages and tools make."""
        return len(self._render(self._load(), messages, tools, self._options))

    def vram_bytes(self) -> int:
        """Bytes that the cache kept for reuse holds; 0 when there is none."""
        return self._kept.vram_bytes()

    def reset(self) -> None:
        """Drop the cache kept for reuse, once a running generation has ended."""
        with self._turn:
            self._kept.drop()

    def _load(self) -> LoadedModel:
        with self._load_lock:
            if self._loaded is None:
                self._loaded = acquire_model(self._spec)
                # An engine that is forgotten rather than closed gives its model back as well.
                self._release = weakref.finalize(self, release_model, self._spec.key)
                self._release.atexit = False
            return self._loaded

    def _work(self, messages: Sequence[Message], tools: Sequence[Tool], options: GenerationOptions | None) -> Work:
        messages, tools = tuple(messages), tuple(tools)
        return lambda cancellation, emit: self._generate(messages, tools, options, cancellation, emit)

    def _generate(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        options: GenerationOptions | None,
        cancellation: Cancellation,
        emit: Emit,
    ) -> ChatReply:
        merged = merge_options(self._options, options)
        check_options(merged)
        tools = offered_tools(merged, tools)
        loaded = self._load()
        stopwatch = Stopwatch()
        request = prepare_request(
            loaded,
            self._render(loaded, messages, tools, merged),
            options=merged,
            tools=tools,
            tool_parser=self._tool_parser,
            stopwatch=stopwatch,
            is_cancelled=cancellation.is_set,
        )
        with self._wait_for_turn(cancellation) as is_our_turn:
            if not is_our_turn:
                return cancelled_reply(loaded, request, self._kept.config)
            # The engine may have been closed meanwhile.
            reply = generate_reply(self._load(), self._kept, request, emit)
            self._last_metrics = reply.metrics
            return reply

    def _render(
        self, loaded: LoadedModel, messages: Sequence[Message], tools: Sequence[Tool], options: GenerationOptions
    ) -> list[int]:
        return render_prompt(
            loaded.tokenizer, messages, tools=tools, options=options, chat_template=self._chat_template
        )

    @contextmanager
    def _wait_for_turn(self, cancellation: Cancellation) -> Iterator[bool]:
        """Hold the engine's turn; False if the call was cancelled before its turn came."""
        while not cancellation.is_set():
            if self._turn.acquire(timeout=_POLL_SECONDS):
                try:
                    yield True
                finally:
                    self._turn.release()
                return
        yield False
