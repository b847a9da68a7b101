"""Small tokenizers of every kind, built in memory: no download, no file.

byte_level     GPT-2's kind (SmolLM2, Llama-3, Qwen): tokens are strings of bytes, many of them half characters
byte_fallback  Llama-2's kind: pieces with a blank mark, and one token per byte for everything else
metaspace      T5's kind: the decoder takes the blank marks off, those of the first token entirely
word_piece     BERT's kind: "##" joins, blanks between all other tokens
plain          whole words and no decoder at all
"""

from functools import lru_cache

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from minivllm.engine.tokenizer import Tokenizer, byte_alphabet

TEXT = [
    "The quick brown fox jumps over the lazy dog, and then it doesn't stop. Hello world! 12345",
    "été à Zürich, naïve café, Ünï, señor; crème brûlée",
    "你好，世界。你好吗？ 日本語のテキスト 한국어 텍스트",
    "Emoji: 😀 😁 👍🏽 👩‍👩‍👧‍👦 🇺🇸 ❤️ the end",
    'def f(x):\n    return {"a": [1, 2, 3]}\n\n\n1. one\n2. two',
]
SPECIAL = ["<unk>", "<s>", "</s>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
KINDS = ("byte_level", "byte_fallback", "metaspace", "word_piece", "plain")


def wrap(backend: Backend, chat_template: str | None = None) -> Tokenizer:
    names = {"unk_token": SPECIAL[0], "bos_token": SPECIAL[1], "eos_token": SPECIAL[2]}
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template, **names))


def _special(backend: Backend) -> Backend:
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return backend


def _byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=list(byte_alphabet().values()), show_progress=False
    )
    backend.train_from_iterator(TEXT * 3, trainer)
    return _special(backend)


def _byte_fallback() -> Backend:
    learner = Backend(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=250, show_progress=False)
    words = [line.encode("ascii", "ignore").decode().replace(" ", "▁") for line in TEXT]
    learner.train_from_iterator(words * 3, trainer)
    learned = sorted(learner.get_vocab(), key=learner.get_vocab().get)
    entries = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁", "é", "�", *learned]
    vocab = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
    merges = [tuple(m) for m in _merges(learner)]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _special(backend)


def _merges(backend: Backend) -> list[tuple[str, str]]:
    import json

    return json.loads(backend.to_str())["model"]["merges"]


def _metaspace() -> Backend:
    pieces = ["<unk>", "▁", "▁▁", "▁the", "▁quick", "fox", "é", "你", "😀", "▁Hello", ",", "s", "▁a"]
    backend = Backend(models.Unigram([(piece, -float(index)) for index, piece in enumerate(pieces)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return _special(backend)


def _word_piece() -> Backend:
    words = ["<unk>", "<s>", "</s>", "the", "quick", "##s", "##ing", "don", "'", "t", ".", ",", "你", "é", "fox", "n't"]
    backend = Backend(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return _special(backend)


def _plain() -> Backend:
    words = ["<unk>", "<s>", "</s>", "the", "quick", "fox", "é", "你", "😀", "."]
    backend = Backend(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return _special(backend)


@lru_cache
def tiny_tokenizer(kind: str, chat_template: str | None = None) -> Tokenizer:
    builders = {
        "byte_level": _byte_level,
        "byte_fallback": _byte_fallback,
        "metaspace": _metaspace,
        "word_piece": _word_piece,
        "plain": _plain,
    }
    return wrap(builders[kind](), chat_template)
