"""A .gguf file becomes an ordinary model folder: float32 weights, `config.json`, `tokenizer.json`, chat template.

Float32, because nothing smaller is exact: a 4-bit block stores `scale * q + offset` with 11-bit scales, which needs
more than the 8 bits of bfloat16 (it would change three of four weights of SmolLM2) or the 11 of float16. Training and
evaluation cast once, when they load.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from luthier import store
from luthier.errors import ModelError, StorageError
from luthier.model.quiet import quiet

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerBase

CONVERSION = 1  # raise it when `convert` writes something else: folders made before are then made anew
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
# `tokenizer.ggml.pre`: rules by which text is split before byte pairs are merged. transformers knows some by their
# regular expression and takes GPT-2's for all others, which is wrong for those that first cut at every digit.
GPT2_RULE = {"gpt-2", "phi-2", "mpt", "olmo", "jina-es", "jina-de", "roberta-bpe", "gigachat", "trillion"}
DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}


def convert(path: Path, folder: Path) -> dict[str, Any]:
    """Write the model folder of a .gguf file; return `{"architecture", "quantisation"}` as the file tells them.

    A `tokenizer.json` beside the file is used in place of the one inside. Raise ModelError for a file that cannot be
    read, or whose tokenizer or architecture is not known here.
    """
    reader = _open(path)
    facts = _facts(reader)
    _require_room(folder, facts["values"])
    try:
        with quiet(), redirect_stderr(StringIO()), _read_once(reader):  # a bar of the library's has no other switch
            _tokenizer(path, folder, facts)
            _weights(path, folder)
    except (ValueError, KeyError, NotImplementedError, RuntimeError, TypeError) as error:
        remedy = "use the model's safetensors folder or hub id"
        raise ModelError(
            f"a GGUF file of architecture '{facts['architecture']}' that cannot be converted ({error})",
            where=str(path),
            remedy=remedy,
        ) from error
    return {"architecture": facts["architecture"], "quantisation": facts["quantisation"]}


def _open(path: Path) -> GGUFReader:
    """Read a .gguf file's header; raise ModelError when it is not one."""
    import numpy
    from gguf import GGUFReader

    class Reader(GGUFReader):
        """The library's reader over a plain array: a memmap makes each of a vocabulary's slices twice as dear."""

        def _get(self, *args: Any, **kwargs: Any) -> Any:
            self.data: Any = numpy.asarray(self.data)
            return super()._get(*args, **kwargs)

    try:
        return Reader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ModelError(f"is not a readable GGUF file ({error})", where=str(path)) from error


@contextmanager
def _read_once(reader: GGUFReader) -> Iterator[None]:
    """Let transformers use a header that is read already; by itself it reads it anew for each thing it makes of it."""
    import gguf

    with mock.patch.object(gguf, "GGUFReader", lambda path: reader):
        yield


def _facts(reader: GGUFReader) -> dict[str, Any]:
    """Architecture, kind of quantisation, size and tokenizer rule, as the file tells them."""

    def told(key: str) -> str:
        found = reader.fields.get(key)
        return str(found.contents()) if found else ""

    matrices = [tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1]
    return {
        "architecture": told("general.architecture"),
        "quantisation": _file_type(told("general.file_type")) or Counter(matrices).most_common(1)[0][0],
        "values": sum(int(tensor.n_elements) for tensor in reader.tensors),
        "tokenizer": told("tokenizer.ggml.model"),
        "split": told("tokenizer.ggml.pre"),
    }


def _file_type(number: str) -> str:
    """The name of llama.cpp's recipe, such as Q4_K_M; empty when the file does not tell one that is known."""
    from gguf import LlamaFileType

    try:
        return LlamaFileType(int(number)).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return ""


def _require_room(folder: Path, values: int) -> None:
    """Refuse before the work, not after it, when the float32 weights will not fit on the disk."""
    need, free = 4 * values + 2**26, store.free_bytes(folder)
    if free < need:
        raise StorageError(
            f"needs {need / 1e9:.1f} GB of disk and has {free / 1e9:.1f} GB",
            where=str(folder.parent),
            remedy="free some space, or set LUTHIER_CACHE to a folder on a larger disk",
        )


def _weights(path: Path, folder: Path) -> None:
    import torch
    import transformers

    exact: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions would keep some architectures in their blocks
        exact["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True, **exact
    )
    model.save_pretrained(folder)


def _tokenizer(path: Path, folder: Path, facts: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    if (path.parent / TOKENIZER_FILES[0]).is_file():
        for name in TOKENIZER_FILES:
            if (path.parent / name).is_file():
                shutil.copyfile(path.parent / name, folder / name)
        return
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    if facts["tokenizer"] == "gpt2":
        _mend_split(tokenizer, facts["split"], path)
    tokenizer.save_pretrained(folder)


def _mend_split(tokenizer: PreTrainedTokenizerBase, rule: str, path: Path) -> None:
    """Give a byte-level tokenizer the split that its merges were learned with; raise ModelError for an unknown one."""
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    if rule in DIGITS_APART:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif rule not in GPT2_RULE and isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        raise ModelError(
            f"splits text by a rule that is not known here ('{rule}'), and a guess would give wrong tokens",
            where=str(path),
            remedy="put the model's own tokenizer.json and tokenizer_config.json beside the file",
        )
