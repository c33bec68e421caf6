"""SafetensorsSource against the safetensors library and transformers, and against files that are damaged or lie."""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, MOE, TinyCheckpoint, TinyModel

from octad.checkpoint.extent import empty_bytes
from octad.checkpoint.hf import INDEX, SINGLE, SafetensorsSource
from octad.checkpoint.shard import DTYPES, read_header
from octad.errors import CheckpointError, ConfigError


def tensors_on_disk(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.fixture
def copy(tmp_path: Path, tiny_checkpoint: TinyCheckpoint) -> Callable[..., Path]:
    def make(*args: Any, **kwargs: Any) -> Path:
        return Path(shutil.copytree(tiny_checkpoint(*args, **kwargs), tmp_path / "model"))

    return make


def raw_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


# ---- reading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_reads_what_safetensors_reads(family: str, shards: bool, tiny_checkpoint: TinyCheckpoint) -> None:
    directory = tiny_checkpoint(family, shards=shards, dtype=torch.bfloat16)
    assert (directory / INDEX).exists() == shards
    source, expected = SafetensorsSource(directory), tensors_on_disk(directory)
    assert set(source.names()) == set(expected)
    for name, tensor in expected.items():
        info, found = source.info(name), source.read(name)
        assert (info.shape, info.dtype) == (tuple(tensor.shape), torch.bfloat16)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
        found.zero_()  # memory of its own: the file is untouched
        assert torch.equal(source.read(name), tensor)


@pytest.mark.parametrize("family", MOE)
def test_fused_experts_read_one_by_one(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    hub, fused = (SafetensorsSource(tiny_checkpoint(family, layout)) for layout in ("hub", "fused"))
    assert not any("experts.0" in name for name in load_file(fused.directory / SINGLE))
    assert set(hub.names()) == set(fused.names())
    for name in hub.names():
        assert hub.info(name) == fused.info(name)
        assert torch.equal(hub.read(name), fused.read(name))


def test_every_dtype_and_odd_shapes(tmp_path: Path) -> None:
    data = {name: torch.arange(6).to(torch.float32).to(dtype).view(2, 3) for name, dtype in DTYPES.items()}
    data |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "ünï": torch.ones(1)}
    save_file(data, tmp_path / SINGLE, metadata={"format": "pt"})
    extents = read_header(tmp_path / SINGLE)
    assert set(extents) == set(data)
    for name, tensor in data.items():
        found = extents[name].read()
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))


def test_large_memory_is_plain_writable_memory() -> None:
    data = empty_bytes(5 << 20)
    assert data.fill_(7).sum() == 7 * (5 << 20)


def test_tied_head_present_or_absent(copy: Callable[..., Path]) -> None:
    directory = copy("qwen3")
    assert "lm_head.weight" not in SafetensorsSource(directory).names()
    data = load_file(directory / SINGLE)
    save_file(data | {"lm_head.weight": data["model.embed_tokens.weight"].clone()}, directory / SINGLE)
    assert "lm_head.weight" in SafetensorsSource(directory).names()
    save_file(data | {"lm_head.weight": data["model.embed_tokens.weight"] + 1}, directory / SINGLE)
    with pytest.raises(CheckpointError, match=r"ties the head .* set tie_word_embeddings to false"):
        SafetensorsSource(directory)
    data["lm_head.weight"] = data.pop("model.embed_tokens.weight")
    save_file(data, directory / SINGLE)
    assert torch.equal(SafetensorsSource(directory).read("model.embed_tokens.weight"), data["lm_head.weight"])


def test_provenance_is_hashed_once(tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tiny_checkpoint("llama", shards=True)
    source = SafetensorsSource(directory, "org/tiny")
    found = source.provenance()
    assert (found["kind"], found["label"]) == ("safetensors", "org/tiny")
    assert {f["name"] for f in found["files"]} == {p.name for p in directory.iterdir()} - {
        "generation_config.json"
    }
    for file in found["files"]:
        data = (directory / file["name"]).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert source.provenance() == found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    ("count", "values", "limit"),
    [(64, 1 << 20, 40), pytest.param(12, 32 << 20, 300, marks=pytest.mark.slow)],  # 256 MiB and 1.5 GiB
)
def test_peak_memory_does_not_grow_with_the_model(
    tmp_path: Path, count: int, values: int, limit: int
) -> None:
    """A sparse file of many tensors: reading them one by one costs one or two of them (limit in MiB)."""
    header = {f"t{i}": entry([values], i * values * 4, (i + 1) * values * 4) for i in range(count)}
    path = raw_file(tmp_path / "large.safetensors", header)
    os.truncate(path, path.stat().st_size + count * values * 4)
    script = f"""
from pathlib import Path
import torch
from octad.checkpoint.shard import read_header

def peak():  # KiB; unlike ru_maxrss, not inherited from the process that started this one
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

start, extents = peak(), read_header(Path({str(path)!r}))
assert [extent.read()[-1].item() for extent in extents.values()] == [0.0] * {count}
print((peak() - start) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert values * 4 >> 20 <= int(done.stdout) < limit


# ---- directories that are wrong -----------------------------------------------------------------------------


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        SafetensorsSource(tmp_path)


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is an adapter"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", CheckpointError, "not valid JSON"),
        ("[]", CheckpointError, "should hold one JSON object, found list"),
        ('{"model_type": "gpt2"}', ConfigError, "mine: config.json: model_type 'gpt2'"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}', CheckpointError, "gptq"),
    ],
)
def test_bad_config(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(error, match=message):
        SafetensorsSource(tmp_path, "mine")


def test_only_pickle_weights_are_refused(copy: Callable[..., Path], tiny_model: TinyModel) -> None:
    directory = copy("llama")
    (directory / SINGLE).unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        SafetensorsSource(directory)
    torch.save(tiny_model("llama").state_dict(), directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*convert them to safetensors"):
        SafetensorsSource(directory)


def test_missing_tensor_wrong_shape_and_dtype(copy: Callable[..., Path]) -> None:
    directory, name = copy("llama"), "model.layers.1.mlp.up_proj.weight"
    data = load_file(directory / SINGLE)
    save_file({k: v for k, v in data.items() if k != name}, directory / SINGLE)
    with pytest.raises(CheckpointError, match=rf"{name} \[48, 32\] is missing"):
        SafetensorsSource(directory)
    save_file(data | {name: data[name].T.contiguous()}, directory / SINGLE)
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[32, 48\], .* asks for \[48, 32\]"):
        SafetensorsSource(directory)
    save_file(data | {name: data[name].to(torch.float8_e4m3fn)}, directory / SINGLE)
    with pytest.raises(CheckpointError, match=rf"{name} is F8_E4M3"):
        SafetensorsSource(directory)


def test_unknown_name(tiny_checkpoint: TinyCheckpoint) -> None:
    with pytest.raises(CheckpointError, match="mine: has no tensor nope"):
        SafetensorsSource(tiny_checkpoint("llama"), "mine").read("nope")


def change_index(directory: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def test_missing_shard(copy: Callable[..., Path]) -> None:
    directory = copy("llama", shards=True)
    shard = min(directory.glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"names {shard.name}, which is missing"):
        SafetensorsSource(directory)


def test_index_that_lies(copy: Callable[..., Path]) -> None:
    directory = copy("llama", shards=True)
    last = max(p.name for p in directory.glob("*.safetensors"))
    change_index(directory, lambda weights: weights.update({"model.embed_tokens.weight": last}))
    with pytest.raises(CheckpointError, match=f"embed_tokens.weight is in {last}, which does not hold it"):
        SafetensorsSource(directory)
    (directory / INDEX).write_text('{"weight_map": {"a": 3}}')
    with pytest.raises(CheckpointError, match="no usable 'weight_map'"):
        SafetensorsSource(directory)


@pytest.mark.parametrize("where", ["../outside.safetensors", "/tmp/outside.safetensors", "a/../../outside"])
def test_path_traversal(copy: Callable[..., Path], where: str) -> None:
    directory = copy("llama", shards=True)
    shutil.copy(min(directory.glob("*.safetensors")), directory.parent / "outside.safetensors")
    change_index(directory, lambda weights: weights.update({"model.embed_tokens.weight": where}))
    with pytest.raises(CheckpointError, match="lies outside the directory"):
        SafetensorsSource(directory)


def test_link_out_only_in_the_hub_cache(copy: Callable[..., Path], tmp_path: Path) -> None:
    directory = copy("llama")
    outside = tmp_path / "weights.safetensors"
    (directory / SINGLE).rename(outside)
    (directory / SINGLE).symlink_to(outside)
    with pytest.raises(CheckpointError, match="lies outside the directory"):
        SafetensorsSource(directory)
    cached = tmp_path / "models--org--tiny"
    (cached / "blobs").mkdir(parents=True)
    snapshot = Path(shutil.copytree(directory, cached / "snapshots" / "abc", symlinks=True))
    outside.rename(cached / "blobs" / "0123")
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to("../../blobs/0123")
    assert SafetensorsSource(snapshot).read("model.norm.weight").shape == (32,)


# ---- files that are damaged or lie --------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -5000])
def test_truncated(copy: Callable[..., Path], keep: int) -> None:
    directory = copy("llama")
    size = (directory / SINGLE).stat().st_size
    os.truncate(directory / SINGLE, keep if keep >= 0 else size + keep)
    with pytest.raises(CheckpointError, match=r"truncated|not a safetensors file"):
        SafetensorsSource(directory)


def test_shrinks_after_opening(copy: Callable[..., Path]) -> None:
    source = SafetensorsSource(copy("llama"))
    os.truncate(source.directory / SINGLE, 4000)
    with pytest.raises(CheckpointError, match="became shorter"):
        source.read(source.names()[-1])
    (source.directory / SINGLE).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        source.read(source.names()[0])


LIES = {
    "size is not shape x dtype": ({"a": entry([3], 0, 16)}, b"x" * 16, "takes 12"),
    "overlap": ({"a": entry([4], 0, 16), "b": entry([4], 8, 24)}, b"x" * 24, "overlaps"),
    "same bytes twice": ({"a": entry([4], 0, 16), "b": entry([4], 0, 16)}, b"x" * 16, "overlaps"),
    "gap": ({"a": entry([4], 0, 16), "b": entry([4], 20, 36)}, b"x" * 36, "leaves a gap"),
    "past the end": ({"a": entry([1000], 0, 4000)}, b"x" * 16, "truncated"),
    "trailing bytes": ({"a": entry([4], 0, 16)}, b"x" * 17, "1 bytes follow"),
    "negative": ({"a": entry([4], -16, 0)}, b"", "malformed"),
    "negative size": ({"a": entry([-4], 0, 16)}, b"x" * 16, "malformed"),
    "reversed": ({"a": entry([4], 16, 0)}, b"x" * 16, "-16 bytes"),
    "huge": ({"a": entry([1 << 62, 1 << 62], 0, 16)}, b"x" * 16, "takes"),
    "too many dimensions": ({"a": entry([1] * 1000, 0, 4)}, b"x" * 4, "malformed"),
    "truth as size": ({"a": entry([True], 0, 4)}, b"x" * 4, "malformed"),
    "unknown dtype": ({"a": entry([4], 0, 16, "F31")}, b"x" * 16, "dtype 'F31'"),
    "no dtype": ({"a": {}}, b"", "dtype None"),
    "no object": ({"a": 3}, b"", "dtype None"),
    "key twice": (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}', b"", "twice"),
    "no JSON": (b"hello there", b"", "not valid JSON"),
    "no UTF-8": (b'{"\xff": 1}', b"", "not valid JSON"),
    "a list": ([1, 2], b"", "not a JSON object"),
    "deeply nested": (b"[" * 200_000, b"", "not valid JSON"),
}


@pytest.mark.parametrize("case", LIES)
def test_lying_header(tmp_path: Path, case: str) -> None:
    header, data, message = LIES[case]
    path = raw_file(tmp_path / SINGLE, header, data)
    with pytest.raises(CheckpointError, match=message) as found:
        read_header(path)
    assert "\n" not in str(found.value)
    assert str(path) in str(found.value)


@pytest.mark.parametrize("length", [0, 1, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_lying_header_length(tmp_path: Path, length: int) -> None:
    path = raw_file(tmp_path / SINGLE, {"a": entry([4], 0, 16)}, b"x" * 16, length)
    with pytest.raises(CheckpointError, match=r"truncated|not a safetensors file"):
        read_header(path)


def test_git_lfs_pointer(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read_header(tmp_path / SINGLE)


def test_large_files_are_hashed_by_samples(tmp_path, monkeypatch):
    from octad import fingerprint as hf

    data = bytes(range(256)) * 1000
    path = tmp_path / "weights"
    path.write_bytes(data)
    monkeypatch.setattr(hf, "SAMPLE_STRIDE", 10_000)
    monkeypatch.setattr(hf, "SAMPLE_BYTES", 100)
    expected = hashlib.sha256(b"".join(data[i : i + 100] for i in range(0, len(data), 10_000))).hexdigest()
    assert hf.fingerprint(path, whole=1000) == {
        "name": "weights",
        "bytes": len(data),
        "sha256_sampled": expected,
    }
