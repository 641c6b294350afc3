"""`kv_cache: {preset: auto}` in a pipeline's YAML."""

from haystack import Pipeline
from haystack.dataclasses import ChatMessage

YAML = """
components:
  llm:
    type: haystack_integrations.components.generators.turboquant_local.chat.chat_generator.TurboQuantLocalChatGenerator
    init_parameters:
      model: {model}
      kv_cache: {{preset: auto}}
      generation_kwargs: {{max_new_tokens: 2}}
connections: []
"""


def test_it_is_saved_as_written_and_reported_as_chosen(tiny_model: str, weights: None) -> None:
    pipeline = Pipeline.loads(YAML.format(model=tiny_model))
    pipeline = Pipeline.loads(pipeline.dumps())
    assert pipeline.to_dict()["components"]["llm"]["init_parameters"]["kv_cache"] == {"preset": "auto"}
    reply = pipeline.run({"llm": {"messages": [ChatMessage.from_user("Hello")]}})["llm"]["replies"][0]
    assert reply.meta["turboquant"]["kv_cache"]["preset"] == "balanced"
    pipeline.get_component("llm").close()
