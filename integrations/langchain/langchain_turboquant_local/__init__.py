"""Chat models on your own machine, with a compressed KV cache, in LangChain.

The outputs below were printed from a checkout with the embedded model, on a CPU.

Setup
    From a checkout, ``pip install -e ".[langchain]"``. Models come from the Hugging Face hub or a folder; set
    ``HF_TOKEN`` for those that ask for one.

Key init args, generation
    model: Name on the hub, or a folder.
    temperature: Above 0 samples; 0 is greedy; None means what the model says, as in the others.
    max_tokens, top_p, top_k, min_p, repetition_penalty, seed, stop: As everywhere in LangChain.
    reasoning: Let a model think that can.

Key init args, this machine
    kv_cache: How keys and values are stored: ``"balanced"`` (the default), ``"compact"``, ``"extreme"``,
        ``"uncompressed"``, ``"auto"`` (chosen for the model), or a dict such as ``{"k_bits": 4, "v_bits": 3}``; see
        `turboquant_local.TurboQuantConfig`.
    device, dtype, revision, token, trust_remote_code, model_kwargs, tokenizer_kwargs: How the model is loaded.

`langchain_turboquant_local.settings.ChatSettings` has them all. A call may give its own:
``model.invoke(..., temperature=0.7)``.

Instantiate
    .. code-block:: python

        from langchain_turboquant_local import ChatTurboQuantLocal

        model = ChatTurboQuantLocal(model="examples/tiny-model", kv_cache="balanced", temperature=0)

    This checks the settings. The first call loads the model; ``model.load()`` does it at once.

Invoke
    .. code-block:: python

        messages = [("system", "You are a helpful assistant."), ("human", "What is the capital of France?")]
        print(model.invoke(messages).content)

    .. code-block:: text

        The capital of France is Paris.

Stream
    .. code-block:: python

        for chunk in model.stream("What is the capital of Italy?"):
            print(chunk.text, end="|")

    .. code-block:: text

        The| capital| of| Italy| is| Rome|.||

    Chunks come while the model runs; closing the stream stops it after the next token.

Async
    .. code-block:: python

        import asyncio

        async def answer():
            async for chunk in model.astream("What day comes after Monday?"):
                print(chunk.text, end="|")
            print((await model.ainvoke("What is the opposite of hot?")).content)

        asyncio.run(answer())

    .. code-block:: text

        The| day| after| M|ond|ay| is| T|ues|day|.||The opposite of hot is cold.

Tool calling
    .. code-block:: python

        def get_weather(city: str) -> str:
            '''Get the current weather in a city.'''
            return "sunny"

        for call in model.bind_tools([get_weather]).invoke("What is the weather in Paris?").tool_calls:
            print(call["name"], call["args"])

    .. code-block:: text

        get_weather {'city': 'Paris'}

    ``tool_choice`` takes "auto", "none", "any" and a tool's name; a forced call always fits the tool's schema.

Structured output
    .. code-block:: python

        from pydantic import BaseModel

        class Person(BaseModel):
            name: str
            age: int

        text = "Maria Reed is 42 years old. Extract name, age as JSON."
        print(repr(model.with_structured_output(Person).invoke(text)))

    .. code-block:: text

        Person(name='Maria Reed', age=42)

    A grammar holds every token to the schema; a reply that ``max_tokens`` or ``stop`` cuts off raises
    ``OutputParserException``. ``method`` is "json_schema", "function_calling" or "json_mode".

Token usage
    .. code-block:: python

        message = model.invoke("What is the capital of Japan?", reasoning=True)
        print(message.additional_kwargs["reasoning_content"])
        print(message.usage_metadata)

    .. code-block:: text

        The user asks: What is the capital of Japan?
        {'input_tokens': 17, 'output_tokens': 27, 'total_tokens': 44, 'input_token_details': {'cache_read': 0},
        'output_token_details': {'reasoning': 14}}

Response metadata
    .. code-block:: python

        from pathlib import Path

        story = Path("examples/alice.txt").read_text()
        message = model.invoke(f"{story[:4000]} The pass key is 48213. {story[4000:]} What is the pass key?")
        cost = message.response_metadata["turboquant"]
        print(message.content, message.response_metadata["finish_reason"])
        print(f"{cost['vram_bytes']:,} bytes for the KV cache instead of {cost['uncompressed_bytes']:,}")

    .. code-block:: text

        The pass key is 48213. stop
        7,276,280 bytes for the KV cache instead of 27,074,560

    There too: ``ttft``, ``tokens_per_second``, ``compression_ratio``, ``cached_tokens`` and more.
    `get_turboquant_callback` gathers them over chains and agents, per run and in sum.
"""

from langchain_turboquant_local.callbacks import (
    RunMetrics,
    TotalMetrics,
    TurboQuantMetricsCallbackHandler,
    get_turboquant_callback,
)
from langchain_turboquant_local.chat_models import ChatTurboQuantLocal

__all__ = [
    "ChatTurboQuantLocal",
    "RunMetrics",
    "TotalMetrics",
    "TurboQuantMetricsCallbackHandler",
    "get_turboquant_callback",
]
