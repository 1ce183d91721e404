"""Chats to text: messages by a template, one after the other."""

import string
from typing import Any

from lazyattn.errors import bad_value

_FIELDS = {"role", "content"}


def check_template(template: str) -> None:
    """Checks a template, such as "<|{role}|>\\n{content}\\n".

    Raises:
      InputError: if it isn't text with {content} and perhaps {role}.
    """
    try:
        fields = {
            name if not (spec or conversion) else None
            for _, name, spec, conversion in string.Formatter().parse(template)
            if name is not None
        }
    except ValueError:
        fields = {None}
    if "content" not in fields or not fields <= _FIELDS:
        raise bad_value(
            "--chat_template", template, "text with {content} in it, and {role} if it is wanted"
        )


def chat_text(messages: Any, template: str) -> str | None:
    """Returns the text of a chat; None if it is none.

    Args:
      messages: what was found: a list of objects with `role` and `content`, both text.
      template: of each message; `check_template` has seen it.
    """
    if not isinstance(messages, list) or not messages:
        return None
    parts = []
    for message in messages:
        if not isinstance(message, dict):
            return None
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        parts.append(template.format(role=role, content=content))
    return "".join(parts)
