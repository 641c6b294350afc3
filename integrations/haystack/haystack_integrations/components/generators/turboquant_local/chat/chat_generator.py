"""The Haystack component. Saved pipelines contain this module's path: it must stay here."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from haystack import component, default_from_dict, default_to_dict
from haystack.components.generators.utils import _normalize_messages
from haystack.dataclasses import ChatMessage, ComponentInfo, StreamingCallbackT, select_streaming_callback
from haystack.tools import ToolsType, flatten_tools_or_toolsets
from haystack.tools.tool import _check_duplicate_tool_names
from haystack.utils import ComponentDevice, Secret

from haystack_integrations.components.generators.turboquant_local.chat.messages import (
    ToolParser,
    ready_tools,
    ready_tools_async,
    to_chat_message,
    to_engine_messages,
    to_engine_parser,
    to_engine_tools,
)
from haystack_integrations.components.generators.turboquant_local.chat.meta import now, reply_meta, tag_current_span
from haystack_integrations.components.generators.turboquant_local.chat.serialization import (
    live_parameters,
    plain_parameters,
)
from haystack_integrations.components.generators.turboquant_local.chat.settings import (
    check_kinds,
    generation_options,
    model_spec,
)
from haystack_integrations.components.generators.turboquant_local.chat.streaming import (
    ChunkWriter,
    deliver,
    deliver_async,
)
from turboquant_local.config import TurboQuantConfig, plain_settings
from turboquant_local.engine import ChatEngine
from turboquant_local.engine.options import check_options
from turboquant_local.engine.types import ChatReply


@component
class TurboQuantLocalChatGenerator:
    """Chats with a Hugging Face model on this machine, with a KV cache compressed by TurboQuant.

    It takes the words of `TransformersChatGenerator` and stands in its place. What it adds: `kv_cache`; live
    streaming, sync and async, with tools too; thinking apart from the text; several tool calls a reply; exact token
    counts; and reuse of the cache for the part of a conversation that was already seen.

    ```python
    from haystack_integrations.components.generators.turboquant_local import TurboQuantLocalChatGenerator

    generator = TurboQuantLocalChatGenerator(model="Qwen/Qwen3-0.6B", kv_cache={"preset": "compact"})
    reply = generator.run("What is the capital of France?")["replies"][0]
    print(reply.text, reply.meta["usage"], reply.meta["turboquant"]["compression_ratio"])
    ```

    One component answers one request at a time; others wait their turn. Components with the same model share its
    weights, each with a cache of its own. The constructor checks and keeps its settings; `warm_up` loads the model.

    Args:
        model: Name on the Hugging Face hub, or a folder. A relative folder counts from the working directory.
        task: "text-generation" or None, which mean the same.
        device: Where the model runs; None takes an accelerator if there is one.
        token: Token for the hub, resolved when the model is loaded.
        chat_template: A Jinja template instead of the tokenizer's own.
        generation_kwargs: How replies are generated: `max_new_tokens` (512, or what the model says), `temperature`,
            `top_k`, `top_p`, `min_p`, `repetition_penalty`, `do_sample`, `seed`, `stop`, `enable_thinking`,
            `chat_template_kwargs`, `response_format` (a dict as in OpenAI's API, or a pydantic model),
            `tool_choice` ("auto", "none", "required" or a tool's name), `parallel_tool_calls`, and fields of
            transformers' `GenerationConfig`.
        huggingface_pipeline_kwargs: `model`, `task`, `device`, `device_map`, `token`, `dtype`, `revision`,
            `trust_remote_code` and `model_kwargs`; they win over the arguments of the same name.
        stop_words: Strings that end a reply; they are left out of it. Those of `generation_kwargs` come on top.
        streaming_callback: Called with every chunk, in the thread or task that runs the component.
        tools: Tools that the model may call.
        tool_parsing_function: Finds the tool calls in a reply's text; None takes the model family's own format.
        async_executor: Where `warm_up_async` loads the model; None takes the event loop's. Tokens are generated
            in a thread of the engine's own.
        enable_thinking: Let a model think that can; the thoughts are in the reply's `reasoning`.
        kv_cache: How keys and values are stored: a preset's name or a dict of fields, such as
            `{"preset": "compact"}` or `{"k_bits": 4, "v_bits": 3}`; preset "auto" is chosen for the model. See
            `turboquant_local.TurboQuantConfig`.
        dtype: Such as "bfloat16"; None means the model's own.

    Raises:
        ConfigError: A setting that does not exist or does not fit.
        GenerationOptionError: A generation option that is unknown or cannot be honoured.
        ValueError: Two tools of one name.
    """

    def __init__(
        self,
        model: str = "Qwen/Qwen3-0.6B",
        task: str | None = None,
        device: ComponentDevice | None = None,
        token: Secret | None = Secret.from_env_var(["HF_API_TOKEN", "HF_TOKEN"], strict=False),  # noqa: B008
        chat_template: str | None = None,
        generation_kwargs: dict[str, Any] | None = None,
        huggingface_pipeline_kwargs: dict[str, Any] | None = None,
        stop_words: list[str] | None = None,
        streaming_callback: StreamingCallbackT | None = None,
        tools: ToolsType | None = None,
        tool_parsing_function: ToolParser | None = None,
        async_executor: ThreadPoolExecutor | None = None,
        *,
        enable_thinking: bool = False,
        kv_cache: dict[str, Any] | str | TurboQuantConfig | None = None,
        dtype: str | None = None,
    ) -> None:
        _check_duplicate_tool_names(flatten_tools_or_toolsets(tools))
        check_kinds(token=token, streaming_callback=streaming_callback, tool_parsing_function=tool_parsing_function)
        self.model = model
        self.task = task
        self.device = device
        self.token = token
        self.chat_template = chat_template
        self.generation_kwargs = generation_kwargs or {}
        self.huggingface_pipeline_kwargs = huggingface_pipeline_kwargs or {}
        self.stop_words = stop_words
        self.streaming_callback = streaming_callback
        self.tools = tools
        self.tool_parsing_function = tool_parsing_function
        self.async_executor = async_executor
        self.enable_thinking = enable_thinking
        self.kv_cache = plain_settings(kv_cache)
        self.dtype = dtype

        self._kv_config = TurboQuantConfig.parse(kv_cache)
        self._spec = model_spec(model, task, device, dtype, self.huggingface_pipeline_kwargs)
        self._stop_words = generation_options({}, stop_words=stop_words).stop
        self._options = generation_options(
            self.generation_kwargs, stop_words=stop_words, enable_thinking=enable_thinking
        )
        check_options(self._options)
        self._engine: ChatEngine | None = None
        self._lock = threading.Lock()

    def warm_up(self) -> None:
        """Load model and tokenizer, if that has not been done; `run` does it too.

        Raises:
            ModelLoadError: The model cannot be loaded.
        """
        ready_tools(self.tools, None)
        self._ready()

    async def warm_up_async(self) -> None:
        """Load the model without blocking the event loop."""
        await ready_tools_async(self.tools, None)
        await self._ready_async()

    def close(self) -> None:
        """Free the cache and, if no other component uses them, the weights. A later run loads again."""
        with self._lock:
            if self._engine is not None:
                self._engine.close()
                self._engine = None

    def vram_bytes(self) -> int:
        """Bytes of all tensors that the KV cache keeps alive now; 0 before the first run and after `close`."""
        return self._engine.vram_bytes() if self._engine is not None else 0

    def to_dict(self) -> dict[str, Any]:
        """Settings as plain values, for YAML.

        Raises:
            SerializationError: A callback or parser that cannot be imported by name, such as a lambda.
        """
        return default_to_dict(self, **plain_parameters(self._init_parameters()))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TurboQuantLocalChatGenerator:
        """Read back what `to_dict` wrote; `data` is left as it is.

        Raises:
            ConfigError: A key that is no parameter, or a setting that does not fit.
            DeserializationError: A callable from a module that Haystack was not told to trust.
        """
        parameters = live_parameters(data.get("init_parameters"), _parameter_names(cls))
        generator: TurboQuantLocalChatGenerator = default_from_dict(cls, {**data, "init_parameters": parameters})
        return generator

    def __deepcopy__(self, memo: dict[int, Any]) -> TurboQuantLocalChatGenerator:
        """A component with the same settings that has loaded nothing; weights are never copied."""
        return type(self)(**self._init_parameters())

    @component.output_types(replies=list[ChatMessage])
    def run(
        self,
        messages: list[ChatMessage] | str,
        streaming_callback: StreamingCallbackT | None = None,
        generation_kwargs: dict[str, Any] | None = None,
        *,
        tools: ToolsType | None = None,
    ) -> dict[str, list[ChatMessage]]:
        """Answer a conversation.

        Args:
            messages: The conversation, or one user's text.
            streaming_callback: Called with every chunk, in this thread; it wins over the constructor's.
            generation_kwargs: Merged with the constructor's key by key; these win.
            tools: Tools for this run instead of the constructor's.

        Returns:
            `{"replies": [message]}`, or `{"replies": []}` if there are no messages.

        Raises:
            PromptError: A conversation, tool or option that cannot be served.
            ModelError: A model that cannot be loaded or has no chat template.
        """
        check_kinds(streaming_callback=streaming_callback)
        callback = select_streaming_callback(self.streaming_callback, streaming_callback, requires_async=False)
        request = self._request(messages, generation_kwargs, ready_tools(self.tools, tools))
        if not request["messages"]:
            return {"replies": []}
        engine, requested_at = self._ready(), now()
        if callback is None:
            return self._answer(engine.chat(**request), requested_at)
        return self._answer(deliver(engine.stream(**request), self._writer(requested_at), callback), requested_at)

    @component.output_types(replies=list[ChatMessage])
    async def run_async(
        self,
        messages: list[ChatMessage] | str,
        streaming_callback: StreamingCallbackT | None = None,
        generation_kwargs: dict[str, Any] | None = None,
        *,
        tools: ToolsType | None = None,
    ) -> dict[str, list[ChatMessage]]:
        """Answer a conversation without blocking the event loop; cancelling the task stops the generation.

        Args:
            messages: The conversation, or one user's text.
            streaming_callback: Called with every chunk, in this task, and awaited if it is async; it wins over the
                constructor's.
            generation_kwargs: Merged with the constructor's key by key; these win.
            tools: Tools for this run instead of the constructor's.

        Returns:
            What `run` returns; it raises what `run` raises.
        """
        check_kinds(streaming_callback=streaming_callback)
        callback = select_streaming_callback(self.streaming_callback, streaming_callback, requires_async=True)
        request = self._request(messages, generation_kwargs, await ready_tools_async(self.tools, tools))
        if not request["messages"]:
            return {"replies": []}
        engine, requested_at = await self._ready_async(), now()
        reply = await deliver_async(engine.astream(**request), self._writer(requested_at), callback)
        return self._answer(reply, requested_at)

    def _ready(self) -> ChatEngine:
        with self._lock:
            if self._engine is None:
                token = self.token.resolve_value() if self.token is not None else None
                spec = dataclasses.replace(self._spec, token=self._spec.token or token)
                parser = self.tool_parsing_function
                engine = ChatEngine(
                    **vars(spec),
                    kv_cache=self._kv_config,
                    chat_template=self.chat_template,
                    tool_parser=to_engine_parser(parser) if parser is not None else None,
                    options=self._options,
                )
                engine.load()
                self._engine = engine
            return self._engine

    async def _ready_async(self) -> ChatEngine:
        if self._engine is not None:
            return self._engine
        return await asyncio.get_running_loop().run_in_executor(self.async_executor, self._ready)

    def _request(
        self, messages: list[ChatMessage] | str, generation_kwargs: Mapping[str, Any] | None, tools: ToolsType | None
    ) -> dict[str, Any]:
        flat_tools = flatten_tools_or_toolsets(tools)
        _check_duplicate_tool_names(flat_tools)
        options = generation_options(generation_kwargs or {})
        if options.stop:
            # The engine lets a run's stop strings replace its own; the constructor's stop_words always hold.
            options = dataclasses.replace(options, stop=(*self._stop_words, *options.stop))
        return {
            "messages": to_engine_messages(_normalize_messages(messages)),
            "tools": to_engine_tools(flat_tools),
            "options": options,
        }

    def _writer(self, requested_at: str) -> ChunkWriter:
        return ChunkWriter(self._spec.model, ComponentInfo.from_component(self), requested_at)

    def _answer(self, reply: ChatReply, requested_at: str) -> dict[str, list[ChatMessage]]:
        tag_current_span(reply.metrics)
        return {"replies": [to_chat_message(reply, reply_meta(reply, self._spec.model, requested_at))]}

    def _init_parameters(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _parameter_names(type(self))}


def _parameter_names(cls: type[TurboQuantLocalChatGenerator]) -> list[str]:
    # A component's metaclass hides the signature of the class itself.
    return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
