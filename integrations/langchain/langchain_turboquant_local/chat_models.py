"""`ChatTurboQuantLocal`: chat models with a compressed KV cache; the package's docstring is the guide to it."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass
from typing import Any, Self, cast

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, BaseRunManager, CallbackManagerForLLMRun
from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.chat_models import agenerate_from_stream, generate_from_stream
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableSerializable, run_in_executor
from langchain_core.runnables.utils import AnyConfigurableField
from langchain_core.utils.utils import LC_ID_PREFIX
from pydantic import PrivateAttr

from langchain_turboquant_local.engines import ConfigurableModel, EnginePool
from langchain_turboquant_local.messages import to_engine_messages, with_calls_of_lone_results
from langchain_turboquant_local.options import check_call, check_options, generation_options
from langchain_turboquant_local.settings import ChatSettings
from langchain_turboquant_local.streaming import ChunkWriter
from langchain_turboquant_local.structured_output import Method, Schema, structured_model
from langchain_turboquant_local.tools import ToolLike, to_engine_tool_choice, to_engine_tools, to_openai_tools
from turboquant_local import TurboQuantConfig
from turboquant_local.engine import ChatEngine, GenerationOptions, Message, Tool
from turboquant_local.engine.options import merge_options
from turboquant_local.engine.prompt import render_prompt


@dataclass(frozen=True)
class _Call:
    """One call, checked and converted."""

    engine: ChatEngine
    model: str
    messages: list[Message]
    tools: tuple[Tool, ...]
    options: GenerationOptions

    @property
    def request(self) -> dict[str, Any]:
        """Arguments of the engine's `stream` and `astream`."""
        return {"messages": self.messages, "tools": self.tools, "options": self.options}


class ChatTurboQuantLocal(ChatSettings):
    """Chats with a Hugging Face model on this machine, with a KV cache compressed by TurboQuant.

    `help(langchain_turboquant_local)` shows its use. The constructor checks and keeps settings; the first call loads
    the model. Objects with the same model share its weights, each with a cache of its own, and one object answers one
    request at a time; others wait their turn. Copies made by `configurable_fields` share the original's cache too.

    Raises:
        ValidationError: A setting that does not exist or does not fit; the message names it.
    """

    # Weights, caches and locks: never pickled or copied, see EnginePool.
    _engines: EnginePool = PrivateAttr(default_factory=EnginePool)

    def load(self) -> Self:
        """Load the model now rather than with the first call.

        Raises:
            ModelLoadError: The model cannot be loaded.
        """
        self._engine(self.model).load()
        return self

    def close(self) -> None:
        """Free the caches and, if nobody else uses them, the weights. A later call loads again."""
        self._engines.close()

    def vram_bytes(self) -> int:
        """Bytes of all tensors that the KV cache keeps alive now; 0 before the first call and after `close`."""
        return self._engines.vram_bytes()

    def get_token_ids(self, text: str) -> list[int]:
        """Ids of a text alone, by the model's tokenizer, which is loaded with the model."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        tokenizer = self._engine(self.model).tokenizer
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[ToolLike] | None = None) -> int:
        """Tokens of the prompt that messages and tools make, as the chat template writes it.

        A tool result without its call, as in a slice of a conversation, is counted together with one.
        """
        if not messages:
            return 0
        prompt = render_prompt(
            self._engine(self.model).tokenizer,
            with_calls_of_lone_results(to_engine_messages(messages)),
            tools=to_engine_tools(tools or ()),
            options=self._default_options(),
            chat_template=self.chat_template,
        )
        return len(prompt)

    def bind_tools(
        self,
        tools: Sequence[ToolLike],
        *,
        tool_choice: str | bool | Mapping[str, Any] | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Let the model call tools.

        Args:
            tools: Tools, functions, pydantic classes, TypedDicts, or dicts in OpenAI's or Anthropic's form.
            tool_choice: None or "auto": the model decides; "none": no call; "any", "required" or True: at least one
                call; a tool's name, or OpenAI's dict with it: a call of that tool. A forced call always fits the
                tool's schema.
            strict: Written into the schemas as OpenAI has it: no properties but those named.
            kwargs: Options of each call, such as `parallel_tool_calls` or `response_format`.

        Raises:
            ToolSchemaError: Something that is no tool, or a tool of a provider.
            GenerationOptionError: A tool choice that does not fit the tools.
        """
        bound = to_openai_tools(tools, strict=strict)
        names = [tool["function"]["name"] for tool in bound]
        choice = to_engine_tool_choice(tool_choice, names)
        if choice is not None:
            kwargs["tool_choice"] = choice
        return self.bind(tools=bound, **kwargs)

    def with_structured_output(
        self,
        schema: Schema | None = None,
        *,
        method: Method = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Answer with an object that fits a schema; every token is chosen so that it does.

        Args:
            schema: A pydantic class (v2 or v1), a TypedDict, a JSON schema, or a function or tool in OpenAI's form.
                The answer is an object of the pydantic class, else a dict.
            method: "json_schema": the reply is the object; "function_calling": the object is the arguments of a tool,
                whose schema the model reads in its prompt; "json_mode": as "json_schema", or any JSON object if there
                is no schema. With the first and the last, say in the prompt what you want: the model does not see
                the schema.
            include_raw: Answer with `{"raw": message, "parsed": object, "parsing_error": error or None}`.
            strict: As in `bind_tools`, for "function_calling".
            kwargs: Options of each call, such as `temperature`.

        Raises:
            ConfigError: An unknown method, or no schema where there must be one.
            GenerationOptionError: An unknown option.
            OutputParserException: With the answer: it ended before its object was whole, by `max_tokens` or `stop`.
        """
        check_call(kwargs)
        return structured_model(self, schema, method=method, include_raw=include_raw, strict=strict, **kwargs)

    def configurable_fields(
        self, **kwargs: AnyConfigurableField
    ) -> RunnableSerializable[LanguageModelInput, AIMessage]:
        """As in LangChain, with weights and cache kept from call to call."""
        plain = cast(Any, super().configurable_fields(**kwargs))
        return ConfigurableModel(default=plain.default, fields=plain.fields)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return generate_from_stream(self._stream(messages, stop, run_manager, **kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return await agenerate_from_stream(self._astream(messages, stop, run_manager, **kwargs))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        call = self._call(messages, stop, kwargs)
        writer = self._writer(call, run_manager)
        with closing(call.engine.stream(**call.request)) as events:
            for event in events:
                chunk = writer.write(event)
                if run_manager is not None:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        # Finding the engine looks at files, which must not block an event loop.
        call = await run_in_executor(None, self._call, messages, stop, kwargs)
        writer = self._writer(call, run_manager)
        async with aclosing(call.engine.astream(**call.request)) as events:
            async for event in events:
                chunk = writer.write(event)
                if run_manager is not None:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def _call(self, messages: list[BaseMessage], stop: list[str] | None, kwargs: Mapping[str, Any]) -> _Call:
        """Check and convert a call; nothing is loaded."""
        check_call(kwargs)
        model = kwargs.get("model") or self.model
        tools = to_engine_tools(kwargs.get("tools") or (), strict=kwargs.get("strict"))
        options = dataclasses.replace(
            generation_options(kwargs, stop=stop),
            tool_choice=to_engine_tool_choice(kwargs.get("tool_choice"), [tool.name for tool in tools]),
        )
        check_options(options)
        return _Call(
            engine=self._engine(model),
            model=model,
            messages=to_engine_messages(messages),
            tools=tools,
            options=merge_options(self._default_options(), options),
        )

    def _engine(self, model: str) -> ChatEngine:
        return self._engines.get(self._spec(model), TurboQuantConfig.parse(self.kv_cache), self.chat_template)

    def _writer(self, call: _Call, run_manager: BaseRunManager | None) -> ChunkWriter:
        # The id that LangChain gives to streamed messages, so that no consumer takes chunks and message for two.
        message_id = f"{LC_ID_PREFIX}-{run_manager.run_id}" if run_manager is not None else None
        return ChunkWriter(call.model, blocks=self.output_version == "v1", message_id=message_id)
