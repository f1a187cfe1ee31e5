"""Prompts with pictures: from an item to what a vision-language model is given.

Pictures are prepared with Pillow and NumPy everywhere. Transformers would take torchvision where it is installed,
which resizes to other pixels, and a seed would mean something else there.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from randopt.engines import Item
from randopt.errors import UserError
from randopt.images import Image

KEPT_BYTES = 1 << 30  # of prepared pictures; those beyond are prepared again for each candidate

Inputs = dict[str, torch.Tensor]


def load_processor(folder: Path) -> Any:
    """The processor of a checkpoint; UserError when it has none that Transformers can read."""
    kind = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).model_type
    name = PROCESSOR_MAPPING_NAMES.get(kind)
    if name is None:
        raise UserError(f"{folder} is a vision-language model of the kind {kind!r}, for which Transformers has none.")
    try:
        return images_only(getattr(transformers, name)).from_pretrained(folder, backend="pil", local_files_only=True)
    except Exception as error:
        raise UserError(f"{folder} has no processor of pictures that Transformers can read: {error}") from error


def images_only(processor_class: Any) -> Any:
    """`processor_class` without its half for videos, which Transformers has in torchvision alone."""

    class ImagesOnly(processor_class):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in processor_class.get_attributes() if "video" not in name]

    ImagesOnly.__name__ = processor_class.__name__  # what it is saved under
    return ImagesOnly


def prompt_text(processor: Any, item: Item, chat_template: str) -> str:
    """The item's prompt, with the processor's mark where each picture goes.

    `chat_template`: as for language models (randopt.engines.prompts.token_ids), with the processor's template.
    """
    if chat_template == "always" and not processor.chat_template:
        raise UserError(
            "models.chat_template: 'always' was given, but the processor has no chat template; use auto or never."
        )
    contents = [(role, (content,) if isinstance(content, str) else content) for role, content in item.messages]
    if processor.chat_template and chat_template != "never":
        messages = [{"role": role, "content": [_part(part) for part in content]} for role, content in contents]
        return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    mark = getattr(processor, "image_token", None)
    if mark is None and item.images:
        raise UserError("the model's processor has neither a chat template nor a mark for pictures; use another model.")
    texts = ["".join(part if isinstance(part, str) else str(mark) for part in content) for _, content in contents]
    return "\n\n".join(texts)


def _part(part: str | Image) -> dict[str, str]:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}


class Prompts:
    """What a vision-language model is given for each item, prepared once as far as memory allows."""

    def __init__(self, processor: Any, chat_template: str) -> None:
        self.processor = processor
        self._chat_template = chat_template
        self._kept: dict[Item, Inputs] = {}
        self._kept_bytes = 0

    def tokens(self, item: Item) -> list[int]:
        """Token ids of the prompt, a picture's mark repeated for each of its features."""
        return self._inputs(item)["input_ids"][0].tolist()

    def unexpanded(self, item: Item) -> list[int]:
        """Token ids of the prompt with one mark for each picture."""
        text = prompt_text(self.processor, item, self._chat_template)
        return self.processor.tokenizer(text, add_special_tokens=not self._begun(text))["input_ids"]

    def alike(self, items: Sequence[Item]) -> list[list[int]]:
        """Indices of the items in groups whose pictures were prepared to the same shapes."""
        groups: dict[Any, list[int]] = {}
        for index, item in enumerate(items):
            shapes = {name: tensor.shape[1:] for name, tensor in self._pictures(item).items()}
            groups.setdefault(tuple(sorted(shapes.items())), []).append(index)
        return list(groups.values())

    def batch(self, items: Sequence[Item], width: int) -> Inputs:
        """What a batch of items that are `alike` is given beside its token ids [B, width], which are padded left."""
        inputs = [self._inputs(item) for item in items]
        found = {name: torch.cat([own[name] for own in inputs]) for name in self._pictures(items[0])}
        if found:
            for name in _per_token(inputs[0]):
                rows = [torch.nn.functional.pad(own[name], (width - own[name].shape[1], 0)) for own in inputs]
                found[name] = torch.cat(rows)
        return found

    def _pictures(self, item: Item) -> Inputs:
        inputs = self._inputs(item) if item.images else {}
        return {name: tensor for name, tensor in inputs.items() if name not in ("input_ids", *_per_token(inputs))}

    def _inputs(self, item: Item) -> Inputs:
        if item not in self._kept:
            made = self._made(item)
            size = sum(tensor.nbytes for tensor in made.values())
            if self._kept_bytes + size > KEPT_BYTES:
                return made
            self._kept[item], self._kept_bytes = made, self._kept_bytes + size
        return self._kept[item]

    def _begun(self, text: str) -> bool:
        """Whether the template has put the token in front that the tokenizer would."""
        begin = self.processor.tokenizer.bos_token
        return bool(begin) and text.startswith(begin)

    def _made(self, item: Item) -> Inputs:
        text = prompt_text(self.processor, item, self._chat_template)
        try:
            made = self.processor(
                text=[text],
                images=[image.decoded() for image in item.images] or None,
                add_special_tokens=not self._begun(text),
                return_tensors="pt",
            )
        except Exception as error:
            raise UserError(
                f"item {item.item_id}: the model's processor refuses it ({error}). Does its text hold a mark that "
                "stands for pictures? Then mend or leave out this row."
            ) from error
        return {name: tensor for name, tensor in made.items() if name != "attention_mask"}


def positions(model: Any, ids: torch.Tensor, mask: torch.Tensor, inputs: Inputs) -> torch.Tensor | None:
    """Positions [3, B, S] of a model whose rotary embedding is of time, height and width; None for other models."""
    indexer = getattr(getattr(model, "model", None), "get_rope_index", None)
    if indexer is None or not inputs:
        return None
    known = inspect.signature(indexer).parameters
    return indexer(ids, attention_mask=mask, **{name: tensor for name, tensor in inputs.items() if name in known})[0]


def _per_token(inputs: Inputs) -> list[str]:
    """What is there for each token, the ids aside: its kind, say."""
    shape = inputs["input_ids"].shape if inputs else None
    return [name for name, tensor in inputs.items() if name != "input_ids" and tensor.shape == shape]
