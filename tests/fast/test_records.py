"""The records beside a quantised checkpoint: its own weights, mapped; ignored, with a line, where they are another's."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import byte_tokenizer, prompts
from tiny_models import TinyCheckpoint

from octad import LLM, SamplingParams
from octad.checkpoint.load import open_source
from octad.checkpoint.quantized import QuantizedSource
from octad.fast.held import packed_weight
from octad.fast.loading import dtype_note
from octad.fast.record_plan import record_layout
from octad.fast.records import FILE, open_records
from octad.fast.saved import save_quantized
from octad.kernels.packed import pack

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=1)
SIZES = {"hidden_size": 64, "intermediate_size": 128, "dtype": torch.bfloat16}


@pytest.fixture
def saved(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Any:
    """saved("mixtral", "int4") -> a quantised checkpoint with records."""
    torch.set_num_threads(1)

    def make(family: str, name: str) -> Path:
        own = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
        sizes = SIZES | (own if family == "qwen2_moe" else {})
        path = Path(shutil.copytree(tiny_checkpoint(family, **sizes), tmp_path / family))
        byte_tokenizer().save(path)
        return save_quantized(open_source(path), tmp_path / f"{family}-{name}", name)

    return make


def answers(path: Path) -> list[Any]:
    llm = LLM(path)
    return [(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in llm.generate(prompts(2), GREEDY)]


@pytest.mark.parametrize(
    ("family", "name"), [("mixtral", "int8"), ("mixtral", "int4"), ("qwen2", "int4"), ("qwen2_moe", "int8")]
)
def test_mapped_weights_are_the_checkpoints(saved: Any, family: str, name: str) -> None:
    path = saved(family, name)
    source = QuantizedSource(path)
    placed = open_records(source)
    assert placed is not None
    for tensor in [n for n in source.names() if source.scheme(n)]:
        mapped, packed = placed.weight(tensor), packed_weight(source, tensor)
        assert torch.equal(mapped.panels, packed.panels), tensor
        assert torch.equal(mapped.unpack(), source.read(tensor))
    if source.config.tie_word_embeddings:
        head = pack(source.read("model.embed_tokens.weight"), 8)
        assert torch.equal(placed.weight("lm_head.weight").panels, head.panels)
    with_records = answers(path)
    (path / FILE).unlink()
    assert answers(path) == with_records


def test_the_weights_stay_in_the_file(saved: Any) -> None:
    """Every expert's panels lie inside the mapping of the file, and none in memory of the process's own."""
    path = saved("mixtral", "int8")
    model = LLM(path).model
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if FILE in line]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    experts = model.model.layers[0].mlp.experts
    for weight in (*experts.gate.tensors, *experts.up.tensors, *experts.down.tensors):
        start = weight.data_ptr()
        assert any(low <= start and start + weight.numel() <= high for low, high in ranges)
    layout = record_layout(model.config, QuantizedSource(path).schemes)
    assert all(record.offset % 4096 == 0 for record in layout.records.values())
    assert (path / FILE).stat().st_size == layout.nbytes


def test_records_of_other_weights_are_left_alone(saved: Any, caplog: Any) -> None:
    path = saved("mixtral", "int8")
    before = answers(path)
    (path / FILE).write_bytes((path / FILE).read_bytes()[:-4096])
    with caplog.at_level(logging.WARNING, "octad"):
        assert answers(path) == before
    assert "packed again" in caplog.text
    assert "bytes in place of" in caplog.text
    caplog.clear()
    other = path / "model.safetensors"
    data = bytearray(other.read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    with caplog.at_level(logging.WARNING, "octad"):
        assert open_records(QuantizedSource(path)) is None
    assert "has other weights" in caplog.text
    assert len(caplog.records) == 1
    (path / FILE).write_bytes(b"octadrec" + (9).to_bytes(8, "little") + b"[" * 9)
    assert open_records(QuantizedSource(path)) is None


def test_another_dtype_than_the_checkpoints_is_told_in_a_line(saved: Any) -> None:
    source = QuantizedSource(saved("mixtral", "int8"))
    assert source.info("model.embed_tokens.weight").dtype == torch.bfloat16
    assert dtype_note(source, torch.bfloat16) is None
    told = dtype_note(source, torch.float32)
    assert told is not None
    assert told.startswith("computes in float32, the checkpoint is bfloat16: since this CPU")
    assert LLM(source.directory, dtype="float32").dtype_note is None
