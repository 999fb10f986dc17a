"""Real text that every machine has: the running Python's own standard library, as tokens."""

import sysconfig
from array import array
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer

VOCAB = 16_384
MAX_BYTES = 6_000_000
SKIPPED = {"site-packages", "dist-packages", "test", "tests"}


def read_stdlib() -> list[str]:
    """The library's .py files in order of path, up to MAX_BYTES of them."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts, size = [], 0
    for path in sorted(root.rglob("*.py")):
        if SKIPPED.isdisjoint(path.relative_to(root).parts):
            size += path.stat().st_size
            if size > MAX_BYTES:
                break
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
    return texts


def write_tokens(path: Path) -> int:
    """Tokenise the library into `path`, a flat file of int32, and return the number of tokens.

    The vocabulary is a byte-level BPE trained on the same text, of exactly VOCAB entries.
    """
    texts = read_stdlib()
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=VOCAB, show_progress=False)
    if tokenizer.get_vocab_size() != VOCAB:
        raise SystemExit(f"{tokenizer.get_vocab_size()} of {VOCAB} tokens: too little text")
    tokens = array("i")
    for encoding in tokenizer.encode_batch(texts):
        tokens.extend(encoding.ids)
    path.write_bytes(tokens.tobytes())
    return len(tokens)
