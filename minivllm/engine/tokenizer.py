"""The tokenizer: text to token ids and back, and the model's chat template.

    load_tokenizer(source) -> Tokenizer | None     from a model folder or a .gguf file; None: it has no tokenizer
    Tokenizer.encode / decode / apply_chat_template

A thin face over transformers' fast tokenizers, and their only home in engine/. It calls the Rust backend
directly, because transformers' own __call__ switches truncation and padding on the shared object for every
call, which two threads must not do at once.

A .gguf file has no tokenizer.json, so its byte-level tokenizer is built here from the file's vocabulary, merges
and token types: transformers does not know every pre-tokenizer (it takes "smollm" for GPT-2's, which changes the
ids of every "\\n\\n1."), its older versions write a decoder list that llguidance misreads, and AutoTokenizer
needs eleven seconds for it.

Special tokens in a user's text are parsed as special tokens, as in transformers and vLLM: "<|im_end|>" in a
message is one id. That can end a turn early; it cannot leave the vocabulary or raise. Nothing from a model folder
is executed: trust_remote_code is off, and templates run in transformers' immutable jinja sandbox.

Knows no request and no length limit (input_processor.py does). Called by input_processor.py, detokenizer.py,
output_processor.py. Twin in vLLM: vllm/tokenizers/.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minivllm.errors import ConfigError, InvalidRequestError, show
from minivllm.models.gguf import read_gguf

if TYPE_CHECKING:
    from minivllm.hub import ModelSource

# One of these makes a folder a tokenizer folder.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)

# `tokenizer.ggml.pre` values (llama.cpp's names) whose text is split as GPT-2 does, digits one by one or not.
GGUF_SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
GGUF_PLAIN_GPT2 = frozenset({"gpt-2", "phi-2", "olmo", "mpt", "jais"})
# A word that is one token is taken whole, whatever the merges say; and bos is added unless the file says no.
GGUF_WHOLE_WORDS = frozenset(
    {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"}
)
GGUF_NFC = frozenset({"qwen2", "qwen35"})
GGUF_CONTROL, GGUF_USER_DEFINED = 3, 4  # tokenizer.ggml.token_type

# Names that a template variable must not take: arguments of the renderer, and the model's special tokens.
RESERVED_TEMPLATE_NAMES = frozenset(
    {
        "add_generation_prompt",
        "bos_token",
        "chat_template",
        "continue_final_message",
        "conversation",
        "conversations",
        "documents",
        "eos_token",
        "max_length",
        "messages",
        "pad_token",
        "padding",
        "processor_kwargs",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
        "unk_token",
    }
)


# What transformers keeps beside the settings: where they came from, and the vocabulary itself.
HIDDEN_SETTINGS = frozenset({"backend", "is_local", "local_files_only", "name_or_path", "tokenizer_object"})


# ---------------------------------------------------------------------- the face
def _plain(value: Any) -> Any:
    """As JSON has it: a token is its text."""
    if isinstance(value, AddedToken):
        return value.content
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


class Tokenizer:
    """Text <-> token ids for one model. Safe to use from several threads.

    Attributes:
        backend: the `tokenizers` object (structured output reads the vocabulary from it).
        vocab_size: number of token ids the tokenizer knows, added tokens included. The logits may be wider.
        bos_token_id, eos_token_id, pad_token_id: or None.
        all_special_ids: everything that skip_special_tokens hides.
        is_byte_level: every token is a string of bytes (GPT-2, Llama-3, Qwen, SmolLM).
    """

    def __init__(self, hf_tokenizer: PreTrainedTokenizerFast, *, chat_template: str | None = None):
        self.hf_tokenizer = hf_tokenizer
        self.backend: Backend = hf_tokenizer.backend_tokenizer
        self.backend.no_truncation()  # a tokenizer.json may ask for either
        self.backend.no_padding()
        if chat_template is not None:
            hf_tokenizer.chat_template = chat_template
        self.vocab_size = len(hf_tokenizer)
        self.bos_token_id: int | None = hf_tokenizer.bos_token_id
        self.eos_token_id: int | None = hf_tokenizer.eos_token_id
        self.pad_token_id: int | None = hf_tokenizer.pad_token_id
        added = hf_tokenizer.added_tokens_decoder
        self.added_tokens: dict[int, str] = {token_id: token.content for token_id, token in added.items()}
        self.all_special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        steps = _decoder_types(self.backend.decoder)
        # ByteFallback beside ByteLevel has nothing to do: the vocabulary has no <0x..> tokens.
        self.is_byte_level = "ByteLevel" in steps and steps <= {"ByteLevel", "ByteFallback", "Fuse"}
        self._byte_of_token = _byte_tokens(self.backend) if "ByteFallback" in steps and not self.is_byte_level else {}
        self._byte_of_char = {char: byte for byte, char in byte_alphabet().items()} if self.is_byte_level else {}
        self._bytes_of_token: dict[int, bytes] = {}  # filled as tokens are met: at most one entry per token
        self._text_of_token: dict[int, str] = {}
        self._traits: dict[str, TemplateTraits] = {}  # of the templates that were used: one or two

    @property
    def chat_template(self) -> str | None:
        """The template that a plain conversation is rendered with; None: this is not a chat model."""
        template = self.hf_tokenizer.chat_template
        if isinstance(template, dict):  # several, by name
            return template.get("default")
        return template

    @property
    def tool_template(self) -> str | None:
        """The template of conversations with tools: the one that transformers takes where there are several."""
        template = self.hf_tokenizer.chat_template
        if isinstance(template, dict):
            return template.get("tool_use", template.get("default"))
        return template

    @cached_property
    def max_chars_per_token(self) -> int:
        """No token stands for more characters than this (a byte-level token: than it has bytes)."""
        return max((len(token) for token in self.backend.get_vocab(with_added_tokens=True)), default=1)

    # ------------------------------------------------------------------ text -> ids
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. add_special_tokens: bos and eos where this model has them.

        Special tokens spelled in the text become their ids, as in transformers. The text must be valid Unicode.
        """
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_cut(
        self, text: str, max_tokens: int, side: str, add_special_tokens: bool = True
    ) -> tuple[list[int], bool]:
        """(at most max_tokens token ids of a text, whether there were more). The `side`, left or right, is cut off.

        The special tokens around a prompt stay where they are: the text between them is what is cut.
        """
        encoding = self.backend.encode(text, add_special_tokens=False)
        room = max_tokens - (self.num_special_tokens if add_special_tokens else 0)
        was_cut = len(encoding.ids) > room
        if was_cut:
            encoding.truncate(room, direction=side)
        return self.backend.post_process(encoding, add_special_tokens=add_special_tokens).ids, was_cut

    @property
    def num_special_tokens(self) -> int:
        """How many tokens every prompt has beside its text."""
        return int(self.backend.num_special_tokens_to_add(False))

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        documents: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation. Encode it with add_special_tokens=False: the template writes bos itself.

        template_kwargs: further variables; the template ignores those that it does not know.
        Raises InvalidRequestError: no template, a reserved variable, or the template refuses the messages.
        """
        if self.hf_tokenizer.chat_template is None:
            raise InvalidRequestError(
                "This model has no chat template, so it cannot answer messages: send a prompt instead, or start the "
                "server with a chat template.",
                parameter="messages",
            )
        kwargs = template_kwargs or {}
        reserved = sorted(RESERVED_TEMPLATE_NAMES & kwargs.keys())
        if reserved:
            raise InvalidRequestError(
                f"chat_template_kwargs must not set {', '.join(reserved)}.", parameter="chat_template_kwargs"
            )
        try:
            text = self.hf_tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                documents=list(documents) if documents else None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **kwargs,
            )
        except Exception as error:  # whatever a template does with a user's messages is the user's error
            raise InvalidRequestError(_template_error(error), parameter="messages") from error
        return str(text)

    def template_traits(self, *, with_tools: bool = False) -> TemplateTraits:
        """What the template expects of its messages; with_tools: the one for conversations with tools."""
        template = (self.tool_template if with_tools else self.chat_template) or ""
        if template not in self._traits:
            self._traits[template] = read_template_traits(template)
        return self._traits[template]

    # ------------------------------------------------------------------ ids -> text
    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of token ids, all at once. Ids that no token has, up to the logits width, decode to nothing.

        No clean-up of blanks before punctuation: that would lose characters and could not be streamed.
        """
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """Text of one token as it stands inside a text: a leading blank is kept; half a character is U+FFFD."""
        text = self._text_of_token.get(token_id)
        if text is None:
            text = self._text_of_token[token_id] = self._token_text(token_id)
        return text

    def _token_text(self, token_id: int) -> str:
        if not self.has_token(token_id):
            return ""
        if self.is_byte_level or self.token_byte(token_id) is not None or self._anchor_id is None:
            return self.decode([token_id])
        return self.decode([self._anchor_id, token_id]).removeprefix(self.decode([self._anchor_id]))

    @cached_property
    def _anchor_id(self) -> int | None:
        """Any token that decodes to plain text, so that the token behind it is not the first of its text."""
        for token_id in range(self.vocab_size - 1, -1, -1):
            token = self.backend.id_to_token(token_id)
            if token and token.isalpha() and token_id not in self.added_tokens and self.decode([token_id]) == token:
                return token_id
        return None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token of a byte-level vocabulary; nothing for an id that no token has."""
        value = self._bytes_of_token.get(token_id)
        if value is None:
            token = self.backend.id_to_token(token_id) or ""
            value = self._bytes_of_token[token_id] = self._spelled_bytes(token)
        return value

    def _spelled_bytes(self, token: str) -> bytes:
        """Each byte is written as one character; a token with any other character stands for itself."""
        try:
            return bytes(self._byte_of_char[char] for char in token)
        except KeyError:
            return token.encode("utf-8", "surrogatepass")

    def token_byte(self, token_id: int) -> int | None:
        """The value of a byte-fallback token (`<0xE4>` is 0xE4); None for every other token."""
        return self._byte_of_token.get(token_id)

    def has_token(self, token_id: int) -> bool:
        """False for an id beyond the vocabulary (the logits may be wider) or in a gap of it."""
        return self.backend.id_to_token(token_id) is not None

    def convert_ids_to_tokens(self, token_ids: Sequence[int]) -> list[str | None]:
        """Vocabulary entries as they are spelled there (`Ġworld`); None for an id that no token has."""
        return [self.backend.id_to_token(token_id) for token_id in token_ids]

    def info(self) -> dict[str, Any]:
        """tokenizer_config.json as it came out, as plain JSON values. Nothing that is a path: those are ours."""
        settings: dict[str, Any] = {
            name: _plain(value)
            for name, value in self.hf_tokenizer.init_kwargs.items()
            if name not in HIDDEN_SETTINGS and not name.endswith("_file")
        }
        special = {
            f"{name}_token": getattr(self.hf_tokenizer, f"{name}_token") for name in ("bos", "eos", "unk", "pad")
        }
        name = type(self.hf_tokenizer).__name__
        return {"tokenizer_class": name, **settings, **special, "chat_template": self.chat_template}

    def get_vocab(self) -> dict[str, int]:
        """Vocabulary entry -> token id, added tokens included."""
        return self.backend.get_vocab(with_added_tokens=True)

    def __len__(self) -> int:
        return self.vocab_size


def byte_alphabet() -> dict[int, str]:
    """Byte -> the printable character that byte-level vocabularies (GPT-2's) spell it with."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in alphabet)
    return alphabet | {byte: chr(256 + index) for index, byte in enumerate(others)}


def _byte_tokens(backend: Backend) -> dict[int, int]:
    """Token id -> byte, of the tokens that stand for one byte."""
    ids = {byte: backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
    return {token_id: byte for byte, token_id in ids.items() if token_id is not None}


def _decoder_types(decoder: Any) -> frozenset[str]:
    """Names of the decoder's steps."""
    if decoder is None:
        return frozenset()
    state = json.loads(decoder.__getstate__())
    return frozenset(step["type"] for step in state.get("decoders", [state]))


def _template_error(error: Exception) -> str:
    """What the caller may know: the template's own words, or only that it failed."""
    if isinstance(error, jinja2.TemplateError | ValueError):
        words = (getattr(error, "message", None) or str(error)).strip().partition("\n")[0]
        return f"The chat template refuses these messages: {words[:300]}"
    return f"The chat template cannot render these messages ({type(error).__name__})."


# ---------------------------------------------------------------------- chat templates
@dataclass(frozen=True, slots=True)
class TemplateTraits:
    """What a chat template expects of its messages."""

    loops_over_content: bool = False  # or indexes it: content may be a list of parts
    tests_for_string: bool = False  # `content is string`: it may be a string all the same
    knows_developer: bool = False  # it mentions the role
    knows_tools: bool = False  # it reads the variable


def read_template_traits(template: str) -> TemplateTraits:
    """Look at the template's syntax tree for what it does with `content`, or with a variable set from it."""
    knows_developer = "developer" in template
    try:
        tree = _parse_template(template)
    except jinja2.TemplateError:  # reported when it is rendered
        return TemplateTraits(knows_developer=knows_developer)
    names: set[str] = set()
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and _is_content(assign.node, names):
            names.add(assign.target.name)
    loops = any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))
    indexes = any(
        isinstance(item.arg, nodes.Const) and isinstance(item.arg.value, int) and _is_content(item.node, names)
        for item in tree.find_all(nodes.Getitem)
    )
    tests = any(test.name == "string" and _is_content(test.node, names) for test in tree.find_all(nodes.Test))
    knows_tools = any(name.name == "tools" for name in tree.find_all(nodes.Name))
    return TemplateTraits(loops or indexes, tests, knows_developer, knows_tools)


def _parse_template(template: str) -> nodes.Template:
    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)  # transformers' own tag
    return jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)


def read_chat_template(value: str | Path) -> str:
    """The text of a chat template: what a file holds, or the value itself when it is a template and no file's name.

    Raises ConfigError, at start-up and not at the first message: no such file, no text, or no valid jinja.
    """
    is_text = isinstance(value, str) and ("{{" in value or "{%" in value)
    try:
        template = str(value) if is_text else Path(value).read_text(encoding="utf-8")
        _parse_template(template)
    except OSError as error:
        reason = f"cannot read {show(str(value))}: {error.strerror}"
    except UnicodeDecodeError:
        reason = f"{show(str(value))} is not UTF-8 text"
    except jinja2.TemplateSyntaxError as error:
        reason = f"line {error.lineno}: {error.message}"
    else:
        return template
    raise ConfigError(
        f"chat_template must be a jinja template or a file with one: {reason}.", parameter="chat_template"
    )


def _is_content(node: nodes.Node | None, names: set[str]) -> bool:
    """message.content, message["content"], a variable in `names`, or one of these through a filter."""
    if isinstance(node, nodes.Filter):
        return _is_content(node.node, names)
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, nodes.Name) and node.name in names


# ---------------------------------------------------------------------- loading
def load_tokenizer(source: ModelSource, *, chat_template: str | None = None) -> Tokenizer | None:
    """The tokenizer of a model folder or .gguf file; None when it has none (prompts must then be token ids).

    chat_template: jinja text to use in place of the model's own.
    Raises ConfigError: files that cannot be read, or that would need code from the model folder.
    """
    path = Path(source.path)
    try:
        if source.kind == "gguf":
            hf_tokenizer = _from_gguf(path if path.is_file() else path / source.name)
        else:
            hf_tokenizer = _from_folder(path)
    except ConfigError:
        raise
    except Exception as error:  # transformers and tokenizers raise anything, from OSError to a bare Exception
        reason = str(error).strip().partition("\n")[0][:300]
        raise ConfigError(
            f"The tokenizer of {source.name} cannot be read ({type(error).__name__}: {reason}).", parameter="tokenizer"
        ) from error
    if hf_tokenizer is None:
        return None
    return Tokenizer(hf_tokenizer, chat_template=chat_template)


def _from_folder(path: Path) -> PreTrainedTokenizerFast | None:
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        return None
    tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(
            f"{path.name} holds a tokenizer without a fast version ({type(tokenizer).__name__}): "
            "a tokenizer.json is needed.",
            parameter="tokenizer",
        )
    return tokenizer


def _from_gguf(path: Path) -> PreTrainedTokenizerFast | None:
    metadata = read_gguf(path).metadata
    kind = metadata.get("tokenizer.ggml.model")
    if kind in (None, "none", "no_vocab") or not metadata.get("tokenizer.ggml.tokens"):
        return None
    if kind == "gpt2":
        backend = _byte_level_backend(metadata)
        add_bos = metadata.get("tokenizer.ggml.pre") in GGUF_WHOLE_WORDS
    else:
        backend = _converted_backend(metadata, kind)
        add_bos = kind == "llama"  # llama.cpp's default for files without the flag
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {name: _special_token(metadata, tokens, key) for name, key in names.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos)) and special["bos_token"] is not None,
        add_eos_token=bool(metadata.get("tokenizer.ggml.add_eos_token", False)) and special["eos_token"] is not None,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )
    _check_special_ids(metadata, tokenizer)
    return tokenizer


def _special_token(metadata: dict[str, Any], tokens: list[str], key: str) -> str | None:
    token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
    if token_id is None:
        return None
    if not 0 <= token_id < len(tokens):
        raise ConfigError(
            f"tokenizer.ggml.{key}_token_id must be below the vocabulary's {len(tokens)} tokens, got {token_id}.",
            parameter="tokenizer",
        )
    return tokens[token_id]


def _check_special_ids(metadata: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    """A stop token under another id than the file's would never stop anything."""
    for name, key in (("bos_token_id", "bos"), ("eos_token_id", "eos")):
        wanted, got = metadata.get(f"tokenizer.ggml.{key}_token_id"), getattr(tokenizer, name)
        if wanted is not None and wanted != got:
            raise ConfigError(f"The file says {name} {wanted}, but its token has id {got}.", parameter="tokenizer")
    num_tokens = len(metadata["tokenizer.ggml.tokens"])
    if len(tokenizer) > num_tokens:
        raise ConfigError(
            f"The file's vocabulary has {num_tokens} tokens, but {len(tokenizer)} were built from it.",
            parameter="tokenizer",
        )


def _byte_level_backend(metadata: dict[str, Any]) -> Backend:
    """GPT-2's kind: byte-level BPE. The decoder is a plain ByteLevel, which llguidance reads right."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    pre: str = metadata.get("tokenizer.ggml.pre", "gpt-2")
    vocab: dict[str, int] = {}
    for token_id, token in enumerate(tokens):
        vocab.setdefault(token, token_id)
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", [])]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in GGUF_WHOLE_WORDS))
    backend.pre_tokenizer = _pre_tokenizer(pre)
    if pre in GGUF_NFC:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    types = metadata.get("tokenizer.ggml.token_type", [])
    kinds = list(zip(tokens, types, strict=False))
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in kinds if k == GGUF_CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t, k in kinds if k == GGUF_USER_DEFINED])
    return backend


def _pre_tokenizer(pre: str) -> Any:
    """How text is cut before merges apply, by llama.cpp's name of it."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in GGUF_PLAIN_GPT2:
        return gpt2
    if pre in GGUF_SINGLE_DIGITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    try:  # not in every version of transformers
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as SPLITS
    except ImportError:
        SPLITS = {}
    if pre not in SPLITS:
        raise ConfigError(
            f"The file's pre-tokenizer {pre!r} is not known here, so its token ids would be wrong: use the model's "
            "Hugging Face folder as the tokenizer, or a newer transformers.",
            parameter="tokenizer",
        )
    split = pre_tokenizers.Split(Regex(SPLITS[pre]), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _converted_backend(metadata: dict[str, Any], kind: str) -> Backend:
    """Every other kind (sentencepiece, unigram) is built well by transformers, from the same metadata."""
    try:
        from transformers.integrations.gguf import convert_gguf_tokenizer
    except ImportError as error:
        raise ConfigError(
            f"A GGUF tokenizer of kind {kind!r} needs transformers 5.23 or newer.", parameter="tokenizer"
        ) from error
    names = {
        "tokenizer_type": "model",
        "pre_tokenizer_type": "pre",
        "tokens": "tokens",
        "scores": "scores",
        "token_type": "token_type",
        "merges": "merges",
        "add_prefix_space": "add_space_prefix",
    }
    fields = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in names.items()}
    present = {name: value for name, value in fields.items() if value is not None}
    backend, _ = convert_gguf_tokenizer(metadata.get("general.architecture", "llama"), present)
    return backend
