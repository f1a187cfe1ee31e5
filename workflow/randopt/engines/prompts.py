"""From chat messages to token ids and back, the same in every engine, and the order in which prompts are batched."""

from collections.abc import Sequence
from typing import Any

from randopt.engines import Completion, Item
from randopt.errors import UserError


def token_ids(tokenizer: Any, item: Item, chat_template: str) -> list[int]:
    """Token ids of the item's prompt, ready for the answer to follow.

    `chat_template` auto applies the tokenizer's template exactly when it has one: a property of
    the tokenizer, never of the model's name. Without one the contents are joined by blank lines.
    UserError for an item with pictures, which a language model does not see.
    """
    if item.images:
        raise UserError(
            f"item {item.item_id} asks about a picture, which a language model does not see; use a vision-language "
            "model, whose config.json has a vision_config, or another task."
        )
    if chat_template == "always" and not tokenizer.chat_template:
        raise UserError(
            "models.chat_template: 'always' was given, but the tokenizer has no chat template; use auto or never."
        )
    if tokenizer.chat_template and chat_template != "never":
        messages = [{"role": role, "content": content} for role, content in item.messages]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    text = "\n\n".join(str(content) for _, content in item.messages)
    return tokenizer(text)["input_ids"]


def end_tokens(generation_config: Any, tokenizer: Any) -> list[int]:
    """Ids that end a completion: the generation config's (None without one) and the tokenizer's."""
    declared = generation_config.eos_token_id if generation_config else None
    found = declared if isinstance(declared, list) else [declared]
    ends = list(dict.fromkeys(t for t in [*found, tokenizer.eos_token_id] if t is not None))
    if not ends:
        raise UserError("the model declares no end-of-text token (eos_token_id); add it to generation_config.json.")
    return ends


def completion(tokenizer: Any, item: Item, prompt_tokens: int, tokens: Sequence[int], reason: str) -> Completion:
    """The completion of generated `tokens`. The last one is counted, but its text not kept, unless it is a word of the
    answer (`reason` length): the end token (stop), or what broken weights came up with (nan).
    """
    text = str(tokenizer.decode(tokens if reason == "length" else tokens[:-1], skip_special_tokens=True))
    return Completion(item.item_id, text, reason, prompt_tokens, len(tokens))


def shared_prefix(prompts: Sequence[list[int]]) -> int:
    """Number of leading tokens that all prompts share, at least one token of each left over."""
    first, last = min(prompts), max(prompts)  # the extremes of the lexicographic order differ first
    limit = min(len(prompt) for prompt in prompts) - 1
    for position in range(limit):
        if first[position] != last[position]:
            return position
    return max(limit, 0)


def batches(lengths: Sequence[int], size: int, ordered: bool = False) -> list[list[int]]:
    """Indices of the prompts in batches of `size`, longest first, so that little is padded.

    The longest come first so that memory runs out at the start or never. `ordered`: which prompts are batched together
    follows the order given, longest first only inside each batch.
    """

    def longest_first(indices: Sequence[int]) -> list[int]:
        return sorted(indices, key=lambda index: (-lengths[index], index))

    order = range(len(lengths)) if ordered else longest_first(range(len(lengths)))
    return [longest_first(order[start : start + size]) for start in range(0, len(order), size)]
