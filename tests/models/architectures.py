"""Which classes of transformers are language models, by the auto classes' own lists."""

from transformers.models.auto import modeling_auto

# In this order: a class that several lists name has the kind of the first.
_LISTS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "multimodal": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
}


def architectures() -> dict[str, tuple[str, str]]:
    """For each class its architecture (the model type) and its kind."""
    found: dict[str, tuple[str, str]] = {}
    for kind, name in _LISTS.items():
        for architecture, classes in getattr(modeling_auto, name).items():
            for class_name in [classes] if isinstance(classes, str) else classes:
                found.setdefault(class_name, (architecture, kind))
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))
