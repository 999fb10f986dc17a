"""A sweep over the language models of transformers; see ``record`` and ``test_models``."""
