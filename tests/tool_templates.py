"""Chat templates with tools in the forms of open models, and tokenizers that have their tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from twinloop.models.tokenizer import ChatTokenizer

# Calls are marked by tokens that are no special ones, and written one by one; text may come before them.
QWEN = (
    "{% if tools %}<|im_start|>system\n# Tools\n<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n"
    "</tools><|im_end|>\n{% endif %}{% for message in messages %}{% if message.role == 'tool' %}"
    "<|im_start|>user\n<tool_response>\n{{ message.content }}\n</tool_response><|im_end|>\n"
    "{% elif message.role == 'assistant' %}<|im_start|>assistant{% if message.content %}{{ '\n' + message.content }}"
    "{% endif %}{% for tool_call in message.tool_calls or [] %}{% set call = tool_call.function %}"
    '{{ \'\n<tool_call>\n{"name": "\' + call.name + \'", "arguments": \' }}{{ call.arguments | tojson }}'
    "{{ '}\n</tool_call>' }}{% endfor %}<|im_end|>\n"
    "{% else %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# One call, which is the whole of its answer, and nothing but its JSON marks it.
LLAMA = (
    "{{ bos_token }}{% if not tools is defined %}{% set tools = none %}{% endif %}{% for message in messages %}"
    "<|start_header_id|>{{ 'ipython' if message.role == 'tool' else message.role }}<|end_header_id|>\n\n"
    "{% if loop.first and tools is not none %}Answer with a call of one of these:\n\n"
    "{% for tool in tools %}{{ tool | tojson(indent=4) }}{{ '\n\n' }}{% endfor %}{% endif %}"
    "{% if 'tool_calls' in message %}{% if message.tool_calls | length != 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    "{% set call = message.tool_calls[0].function %}"
    "{{ '{\"name\": \"' + call.name + '\", \"parameters\": ' }}{{ call.arguments | tojson }}{{ '}' }}"
    "{% elif message.role == 'tool' %}{{ message.content | tojson }}{% else %}{{ message.content }}{% endif %}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

# A special token begins a list of calls, each with an id of nine characters.
MISTRAL = (
    "{{ bos_token }}{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for message in messages %}{% if message.role == 'user' %}"
    "{% if tools is not none and message == asked[-1] %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]"
    "{% endif %}[INST] {{ message.content }}[/INST]"
    "{% elif message.tool_calls is defined %}[TOOL_CALLS] [{% for call in message.tool_calls %}"
    "{% if call.id | length != 9 %}{{ raise_exception('ids have length 9') }}{% endif %}"
    "{{ (call.function | tojson)[:-1] + ', \"id\": \"' + call.id + '\"}' }}"
    "{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}"
    "{% elif message.role == 'tool' %}[TOOL_RESULTS] {\"content\": {{ message.content }}, "
    '"call_id": "{{ message.tool_call_id }}"}[/TOOL_RESULTS]'
    "{% else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"
)

# Arguments are JSON's text, between special tokens, and the prompt begins a thought.
THINKING = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}<|{{ message.role }}|>"
    "{{ message.content }}{% for call in message.tool_calls or [] %}<|call|>{{ call.function.name }}<|sep|>"
    "{{ '```json\n' + call.function.arguments + '\n```' }}<|end_call|>{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)


@dataclass(frozen=True)
class Family:
    template: str
    stop: str
    specials: tuple[str, ...]
    added: tuple[str, ...] = ()


FAMILIES = {
    "qwen": Family(QWEN, "<|im_end|>", ("<|im_start|>",), ("<tool_call>", "</tool_call>")),
    "llama": Family(LLAMA, "<|eot_id|>", ("<|begin|>", "<|start_header_id|>", "<|end_header_id|>")),
    "mistral": Family(
        MISTRAL,
        "</s>",
        ("<s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
         "[/TOOL_RESULTS]"),
    ),
    "thinking": Family(
        THINKING, "<|im_end|>", ("<|user|>", "<|assistant|>", "<|tool|>", "<|call|>", "<|sep|>", "<|end_call|>")
    ),
}  # fmt: skip


def save_tokenizer(family: Family, folder: Path) -> ChatTokenizer:
    """Write and read a tokenizer of single bytes, with a few longer tokens across which templates are divided."""
    vocabulary = {character: id for id, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("e", "n"), ('"', "n"), ('"', ":"), ("{", '"'), ("Ġ", '"'), ("}", "Ċ")]
    vocabulary |= {first + last: len(vocabulary) + index for index, (first, last) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[^\s\w]+|\w+|\s"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (family.stop, *family.specials)])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in family.added])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": family.specials[0],
        "eos_token": family.stop,
        "chat_template": family.template,
    }
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return ChatTokenizer.load(folder)
