"""The chat generator."""

from haystack_integrations.components.generators.turboquant_local.chat.chat_generator import (
    TurboQuantLocalChatGenerator,
)

__all__ = ["TurboQuantLocalChatGenerator"]
