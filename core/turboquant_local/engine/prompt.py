"""From messages and tools to the token ids of a prompt, through the model's chat template."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, cast, get_args

from turboquant_local.engine.control_tokens import control_tokens, encode_marked, mark
from turboquant_local.engine.tool_schema import tool_dicts
from turboquant_local.engine.types import GenerationOptions, Message, Role, Tool, ToolCall
from turboquant_local.errors import ChatTemplateError, EmptyConversationError, GenerationOptionError, PromptError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Arguments of `apply_chat_template` that are no variables of a template: rendering decides them.
_RESERVED: Final = frozenset(
    {
        "conversation",
        "messages",
        "tools",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
)
_ROLES: Final = get_args(Role)
_SHORT_ID: Final = re.compile(r"[a-zA-Z0-9]{9}")
_WANTS_SHORT_IDS: Final = re.compile(r"length (of )?9\b")
_THINK_TAIL_TOKENS: Final = 16

THINK: Final = "<think>"
THINK_END: Final = "</think>"
"""What thinking stands between."""


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] = (),
    options: GenerationOptions,
    chat_template: str | None = None,
) -> list[int]:
    """Renders a conversation, with the opening of the assistant's turn at its end.

    The ids come straight from the template: no BOS is added to the one that a template may write. A control token that
    stands in the messages or tools themselves is text.

    Args:
        tokenizer: The model's tokenizer, with its chat template.
        messages: The conversation, oldest first.
        tools: What the model may call.
        options: `enable_thinking` and `template_kwargs` reach the template, each only when given.
        chat_template: A Jinja template, or the name of one of the tokenizer's, in place of its default.

    Returns:
        The prompt's token ids.

    Raises:
        EmptyConversationError: There is no message.
        ToolSchemaError: A tool's name or schema is broken.
        PromptError: Something that is no message, a tool result that answers no earlier call, or half a character.
        GenerationOptionError: A name in `template_kwargs` is no template variable.
        ChatTemplateError: There is no template, it refuses the messages, writes nothing, or leaves the tools out.
    """
    if not messages:
        raise EmptyConversationError("messages: expected at least one message, got none; add a user message to answer")
    functions = tool_dicts(tools)
    conversation = _conversation(messages)
    variables = _variables(options, chat_template)
    if functions:
        _require_tools_shown(tokenizer, conversation, functions, variables)
    own = getattr(tokenizer, "chat_template", None)
    is_name = isinstance(own, dict) and chat_template in own
    if chat_template is not None and not is_name and "{" not in str(chat_template):
        raise ChatTemplateError(
            f"chat_template={chat_template!r}: expected the text of a Jinja template, which prints the messages; read "
            "it first if this is a file's name"
        )
    token_ids = _token_ids(tokenizer, conversation, functions, variables)
    if not token_ids:
        raise ChatTemplateError("the chat template writes nothing for these messages; pass chat_template=... that does")
    return token_ids


def opens_reasoning(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> bool:
    """Whether the prompt ends inside a thinking block that the template opened, so that the reply starts in it."""
    return prompt_end(tokenizer, prompt_ids).endswith(THINK)


def prompt_end(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> str:
    """The last words of a prompt, without the white space after them."""
    return str(tokenizer.decode(list(prompt_ids[-_THINK_TAIL_TOKENS:]), skip_special_tokens=False)).rstrip()


def opens_reasoning_when_asked(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether `enable_thinking` makes the template open the block, so that a reply without it never thinks."""
    try:
        text = _apply(tokenizer, [{"role": "user", "content": "?"}], [], {"enable_thinking": True}, tokenize=False)
    except ChatTemplateError:
        return False
    return str(text).rstrip().endswith(THINK)


def _conversation(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as transformers' chat templates read them."""
    made: dict[str, str] = {}  # id of an earlier call -> name of its tool
    conversation: list[dict[str, Any]] = []
    for position, message in enumerate(messages):
        _check_message(message, f"messages[{position}]")
        entry: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.name is not None:
            entry["name"] = message.name
        if message.reasoning:
            entry["reasoning_content"] = message.reasoning
        if message.role == "tool":
            # Some templates label a result by its tool's name, which the call knows even when the result does not.
            entry["name"] = _answered_tool(message, position, made)
            entry["tool_call_id"] = message.tool_call_id or ""
        elif message.tool_calls:
            made.update({call.id: call.name for call in message.tool_calls})
            entry["tool_calls"] = [
                {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": dict(call.arguments)}}
                for call in message.tool_calls
            ]
        conversation.append(entry)
    return conversation


def _check_message(message: object, where: str) -> None:
    # Templates leave out what they do not know, without a word.
    if not isinstance(message, Message):
        raise PromptError(f"{where}={message!r}: expected a Message, such as Message('user', 'Hello')")
    if message.role not in _ROLES:
        raise PromptError(f"{where}.role={message.role!r}: expected one of {', '.join(_ROLES)}")
    if not isinstance(message.content, str):
        raise PromptError(f"{where}.content={message.content!r}: expected a string; join the texts of several parts")
    for call in message.tool_calls:
        if not isinstance(call, ToolCall) or not isinstance(call.arguments, Mapping):
            raise PromptError(f"{where}.tool_calls: expected ToolCall(name, {{argument: value}}, id), got {call!r}")


def _answered_tool(message: Message, position: int, made: Mapping[str, str]) -> str:
    call_id = message.tool_call_id or ""
    if call_id in made:
        return message.name or made[call_id]
    raise PromptError(
        f"messages[{position}].tool_call_id={message.tool_call_id!r}: no earlier assistant message made this call "
        f"(calls made: {', '.join(map(repr, made)) or 'none'}); keep the assistant message with its tool_calls before "
        "the result"
    )


def _variables(options: GenerationOptions, chat_template: str | None) -> dict[str, Any]:
    """The keyword arguments of `apply_chat_template`, with nothing in them that was not asked for."""
    for name in options.template_kwargs:
        if name in _RESERVED:
            raise GenerationOptionError(
                f"chat_template_kwargs[{name!r}] (GenerationOptions: template_kwargs): expected a variable of the chat "
                "template, got an argument that rendering sets itself; leave it out"
            )
    variables = dict(options.template_kwargs)
    if options.enable_thinking is not None:
        variables["enable_thinking"] = options.enable_thinking
    if chat_template is not None:
        variables["chat_template"] = chat_template
    return variables


def _token_ids(
    tokenizer: PreTrainedTokenizerBase,
    conversation: list[dict[str, Any]],
    functions: list[dict[str, Any]],
    variables: Mapping[str, Any],
) -> list[int]:
    template = variables.get("chat_template", "")
    own = getattr(tokenizer, "chat_template", None) or ""
    if own or template:
        tokens = control_tokens(tokenizer, f"{template}{own}")
        named = {name: mark(variables[name], tokens) for name in variables if name != "chat_template"}
        text = _apply(
            tokenizer, mark(conversation, tokens), mark(functions, tokens), {**variables, **named}, tokenize=False
        )
        _check_unicode(cast(str, text))
        return encode_marked(tokenizer, cast(str, text), tokens)
    return cast(list[int], _apply(tokenizer, conversation, functions, variables, tokenize=True))


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"messages or tools: {text[max(0, error.start - 20) : error.end]!r} ends in half a character, which no "
            "tokenizer can read; replace it by text.encode(errors='replace').decode()"
        ) from None


def _require_tools_shown(
    tokenizer: PreTrainedTokenizerBase,
    conversation: list[dict[str, Any]],
    functions: list[dict[str, Any]],
    variables: Mapping[str, Any],
) -> None:
    """Many templates ignore tools without a word; then the model would never learn of them."""
    text = cast(str, _apply(tokenizer, conversation, functions, variables, tokenize=False))
    missing = [function["function"]["name"] for function in functions if function["function"]["name"] not in text]
    if not missing:
        try:
            bare = _apply(tokenizer, conversation, [], variables, tokenize=False)
        except ChatTemplateError:
            return
        if bare != text:
            return
        # The names stand in the messages only.
        missing = [function["function"]["name"] for function in functions]
    raise ChatTemplateError(
        f"tools: the chat template leaves out {', '.join(missing)}, so the model would not know of them; "
        "use a model whose template supports tools, or pass chat_template=..."
    )


def _apply(
    tokenizer: PreTrainedTokenizerBase,
    conversation: list[dict[str, Any]],
    functions: list[dict[str, Any]],
    variables: Mapping[str, Any],
    *,
    tokenize: bool,
    short_ids: bool = False,
) -> str | list[int]:
    try:
        rendered = tokenizer.apply_chat_template(
            _with_short_ids(conversation) if short_ids else conversation,
            tools=cast(Any, functions) or None,
            add_generation_prompt=True,
            tokenize=tokenize,
            return_dict=False,
            **variables,
        )
    except Exception as error:
        # A template runs code of its own, so that anything can come out of it.
        if not short_ids and _WANTS_SHORT_IDS.search(str(error)):
            return _apply(tokenizer, conversation, functions, variables, tokenize=tokenize, short_ids=True)
        raise ChatTemplateError(_refusal(tokenizer, conversation, variables, error)) from error
    return cast("str | list[int]", rendered)


def _with_short_ids(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mistral's templates insist on call ids of nine letters or digits; the same id always gives the same nine."""

    def short(call_id: str) -> str:
        return call_id if _SHORT_ID.fullmatch(call_id) else hashlib.sha256(call_id.encode()).hexdigest()[:9]

    shortened = []
    for message in conversation:
        entry = dict(message)
        if "tool_call_id" in entry:
            entry["tool_call_id"] = short(entry["tool_call_id"])
        if "tool_calls" in entry:
            entry["tool_calls"] = [call | {"id": short(call["id"])} for call in entry["tool_calls"]]
        shortened.append(entry)
    return shortened


def _refusal(
    tokenizer: PreTrainedTokenizerBase,
    conversation: list[dict[str, Any]],
    variables: Mapping[str, Any],
    error: Exception,
) -> str:
    if "chat_template" not in variables and not getattr(tokenizer, "chat_template", None):
        return (
            f"{getattr(tokenizer, 'name_or_path', '') or 'the model'} has no chat template, so it is probably a base "
            "model; use its instruct or chat version, or pass chat_template='<a Jinja template>'"
        )
    reason = str(error) or type(error).__name__
    if any(message["role"] == "system" for message in conversation) and "system" in reason.lower():
        way_out = "this model takes no system message there: put its text into the first user message"
    else:
        way_out = (
            "change the messages, set a missing variable with chat_template_kwargs (GenerationOptions: "
            "template_kwargs), or pass chat_template=..."
        )
    roles = ", ".join(message["role"] for message in conversation[:8]) + (", ..." if len(conversation) > 8 else "")
    return f"the chat template refuses the messages (roles: {roles}): {reason!r}; {way_out}"
