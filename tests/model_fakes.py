"""Places that a model can come from, small and on this machine: a .gguf file, a package index, a hub."""

from __future__ import annotations

import hashlib
import json
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_gguf(model: Path, path: Path, *, kind: str = "F32", split: str = "gpt-2") -> dict[str, np.ndarray]:
    """Write a llama folder as llama.cpp would; return the weights, by their own names, that it then stands for."""
    config = json.loads((model / "config.json").read_text("utf-8"))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("a fake")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, model, config, split)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    stands_for = {}
    for name, value in load_file(model / "model.safetensors").items():
        count = next((number for part, number in heads.items() if part in name), 0)
        stored = _rope_order(value, count) if count else value
        number = gguf.GGMLQuantizationType[kind if value.ndim > 1 else "F32"]
        packed = gguf.quantize(stored, number)
        writer.add_tensor(_gguf_name(name), packed, raw_dtype=number)
        meant = gguf.dequantize(packed, number).astype(np.float32)
        stands_for[name] = _rope_order(meant, count, back=True) if count else meant
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stands_for


def _add_tokenizer(writer: gguf.GGUFWriter, model: Path, config: dict, split: str) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text("utf-8"))
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template((model / "chat_template.jinja").read_text("utf-8"))


def _gguf_name(name: str) -> str:
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in top:
        return top[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def _rope_order(weight: np.ndarray, heads: int, *, back: bool = False) -> np.ndarray:
    """llama.cpp interleaves the two halves of each head that transformers keeps apart."""
    rows, columns = weight.shape
    shape = (heads, rows // heads // 2, 2, columns) if back else (heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(weight.reshape(shape).swapaxes(1, 2).reshape(rows, columns))


def write_wheel(folder: Path, distribution: str, version: str, members: Mapping[str, bytes]) -> tuple[Path, str]:
    """Write a wheel that pip takes for one, and return it with its SHA-256."""
    stem = f"{distribution.replace('-', '_')}-{version}"
    path = folder / f"{stem}-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr(
            f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        archive.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{stem}.dist-info/RECORD", "")
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


class Hub(ThreadingHTTPServer):
    """Enough of a hub for one repository: its files, what it says about itself, and a list of what was asked."""

    def __init__(self, repository: str, files: Mapping[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.repository, self.files, self.asked = repository, dict(files), list[str]()
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class _HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        place = self.path.split("?")[0]
        self.server.asked.append(place)
        about = f"/api/models/{self.server.repository}"
        names = sorted(self.server.files)
        if place in (about, f"{about}/revision/main", f"{about}/revision/{COMMIT}"):
            told = {"id": self.server.repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            self._send(json.dumps(told).encode())
        elif place.startswith(f"{about}/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(self.server.files[name]), "oid": self._digest(name)}
                for name in names
            ]
            self._send(json.dumps(tree).encode())
        elif place.startswith(f"/{self.server.repository}/resolve/{COMMIT}/"):
            name = place.rsplit("/", 1)[1]
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{self._digest(name)}"'}
            self._send(self.server.files[name], "application/octet-stream", headers)
        else:
            self._send(b"{}", headers={"X-Error-Code": "RepoNotFound"}, status=404)

    def _digest(self, name: str) -> str:
        return hashlib.sha1(self.server.files[name]).hexdigest()

    def _send(
        self,
        body: bytes,
        kind: str = "application/json",
        headers: Mapping[str, str] | None = None,
        status: int = 200,
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *about: object) -> None:
        """Say nothing."""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Answer requests while the block runs; afterwards nobody listens."""
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
