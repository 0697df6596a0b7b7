"""Chat templates: those of checkpoints, and those that have a name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from m3jax.checkpoints.errors import CheckpointError
from m3jax.checkpoints.formats.json_text import load_json
from m3jax.checkpoints.places.files import Location
from m3jax.checkpoints.side_files import read_side_file
from m3jax.checkpoints.tokens.vocabulary import SETTINGS, read_settings

JINJA, OF_PROCESSOR = "chat_template.jinja", "chat_template.json"

# What mergekit's names of them render; `end` is the token that ends a turn.
NAMED: dict[str, tuple[str, str | None]] = {
    "alpaca": (
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ '\n\n### Instruction:\n' }}"
        "{% elif message['role'] == 'assistant' %}{{ '\n\n### Response:\n' }}"
        "{% endif %}"
        "{{ message['content'] | trim }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}",
        None,
    ),
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
    ),
    "exaone": (
        "{% for message in messages %}"
        "{% if loop.first and message['role'] != 'system' %}"
        "{{ '[|system|][|endofturn|]\n' }}{% endif %}"
        "{{ '[|' + message['role'] + '|]' + message['content'] }}"
        "{% if message['role'] != 'user' %}{{ '[|endofturn|]' }}{% endif %}"
        "{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}",
        "[|endofturn|]",
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
        "{{ message['content'] | trim }}{{ '<|eot_id|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|eot_id|>",
    ),
    "mistral": (
        "{{ bos_token }}{% set first = namespace(system='') %}"
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{% set first.system = message['content'] + '\n\n' %}"
        "{% elif message['role'] == 'user' %}"
        "{{ ' [INST] ' + first.system + message['content'] + ' [/INST]' }}"
        "{% set first.system = '' %}"
        "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}",
        None,
    ),
}


def read_template(folder: Location) -> str | None:
    """The chat template in a folder; None where there is none."""
    text = read_side_file(folder, JINJA)
    if text is not None:
        return text.decode(errors="replace")
    found: Any = read_settings(folder).get("chat_template")
    if found is None and (text := read_side_file(folder, OF_PROCESSOR)) is not None:
        found = load_json(text, str(folder / OF_PROCESSOR)).get("chat_template")
    if isinstance(found, list):  # several, by name
        of_name = {
            own.get("name"): own.get("template")
            for own in found
            if isinstance(own, dict)
        }
        found = of_name.get("default")
    return found if isinstance(found, str) else None


def is_literal(text: str) -> bool:
    """Whether it is a template rather than the name of one."""
    return "{{" in text or "{%" in text


def check_template(text: str) -> None:
    """Raises CheckpointError for what is no Jinja template; nothing of it is run."""
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(
            text.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        )
    except (TemplateSyntaxError, RecursionError) as error:
        raise CheckpointError(
            f"chat_template: not a Jinja template ({error}), in line "
            f"{getattr(error, 'lineno', 1)}"
        ) from None


def with_template(
    folder: Location, text: str, files: Mapping[str, bytes | None]
) -> dict[str, bytes | None]:
    """Changes to the files of a tokenizer, with those that give it that template."""
    changed: dict[str, bytes | None] = {**files, JINJA: text.encode()}
    if read_side_file(folder, OF_PROCESSOR) is not None:
        changed[OF_PROCESSOR] = None
    own = files.get(SETTINGS)
    settings = read_settings(folder) if own is None else json.loads(own)
    if settings.pop("chat_template", None) is not None:
        written = json.dumps(settings, ensure_ascii=False, indent=2) + "\n"
        changed[SETTINGS] = written.encode()
    return changed
