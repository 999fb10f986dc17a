"""Makes the inputs of a training step, by rules on the names of forward's parameters."""

import inspect
from collections.abc import Container, Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .configurations import FIRST_SPECIAL_TOKEN

_BATCH, _LENGTH = 2, 12
# More tokens than hidden features: a head's weight that is computed is smaller than the logits.
_LENGTH_OF_MASKED = 40
# Tokens below have a meaning in many models: padding, separators, masks.
_FIRST_PLAIN_TOKEN = 16


def inputs_for(model: PreTrainedModel, kind: str) -> Iterator[dict[str, Any]]:
    """Inputs with labels, the plainest first; the first that the model accepts are its inputs."""
    parameters = inspect.signature(model.forward).parameters
    text = _text(kind)
    labels = {"labels": text["labels"]}
    decoder = {"decoder_input_ids": text["input_ids"]}
    types = torch.zeros_like(text["input_ids"])
    yield _only(parameters, text)
    yield _only(parameters, text | {"token_type_ids": types, "mm_token_type_ids": types})
    for more in _other_modalities(model):
        if more.keys() & parameters:
            for inputs in (text | more, more | labels, more | labels | decoder):
                yield _only(parameters, inputs)
    yield _only(parameters, text | decoder)


def _only(names: Container[str], inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name in names}


def _text(kind: str) -> dict[str, Any]:
    """Two rows of tokens, the second padded on the right, and labels for some of them."""
    generator = torch.Generator().manual_seed(1)
    shape = (_BATCH, _LENGTH_OF_MASKED if kind == "masked" else _LENGTH)
    tokens = torch.randint(_FIRST_PLAIN_TOKEN, FIRST_SPECIAL_TOKEN, shape, generator=generator)
    mask = torch.ones(shape, dtype=torch.long)
    mask[1, -3:] = 0
    if kind == "masked":
        chosen = torch.zeros(shape, dtype=torch.bool)
        chosen[:, 1::3] = True
    else:
        chosen = torch.ones(shape, dtype=torch.bool)
        chosen[0, :4] = False
    labels = tokens.masked_fill(~chosen | (mask == 0), -100)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def _other_modalities(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Images, spectrograms and sound, in the layouts that models take them in."""
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(_BATCH, *shape, generator=generator)

    side = _find(model.config, "image_size", 32)
    size = (side, side) if isinstance(side, int) else tuple(side)
    channels = _find(model.config, "num_channels", 3)
    frames = 2 * _find(model.config, "max_source_positions", 32)
    yield {"pixel_values": random(channels, *size)}
    yield {"pixel_values": random(1, channels, *size)}
    for name in ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim"):
        if features := _find(model.config, name, None):
            yield {"input_features": random(features, frames)}
            yield {"input_features": random(frames, features)}
    yield {"input_values": random(4000)}
    yield {
        "flattened_patches": random(16, 2 + channels * _find(model.config, "patch_size", 8) ** 2)
    }


def _find(config: PreTrainedConfig, name: str, default: Any) -> Any:
    """The first value of attribute ``name`` in ``config`` or the configurations inside it."""
    value = getattr(config, name, None)
    if value is not None:
        return value
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            value = _find(part, name, None)
            if value is not None:
                return value
    return default
