"""What the engine's tests share: a byte tokenizer, engines around tiny checkpoints, and running them dry."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch

from octad.checkpoint.load import load_model, open_source
from octad.engine.engine import Engine, EngineConfig
from octad.engine.outputs import RequestOutput
from octad.engine.params import SamplingParams
from octad.model.transformer import Transformer
from octad.text.tokenizer import Tokenizer

END = 95  # in a vocabulary of 96
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


def byte_tokenizer(size: int = 96) -> Tokenizer:
    """`size` - 1 single characters (the printable ASCII first, then others of a byte alphabet) and one end token."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[: size - 1]
    core = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens(["<|end|>"])
    return Tokenizer(core, {"eos_token": "<|end|>"}, [size - 1])


def load(directory: Path) -> Transformer:
    return load_model(open_source(directory), torch.float32)


def make_engine(model: Transformer, **config: Any) -> Engine:
    """Small blocks, so that a short text has several."""
    settings = {"block_size": 4, "num_blocks": 256} | config
    return Engine(model, byte_tokenizer(model.config.vocab_size), EngineConfig(**settings))


def prompts(count: int, shortest: int = 1, longest: int = 60, vocabulary: int = 95) -> list[list[int]]:
    """Random prompts of mixed lengths."""
    draw = torch.Generator().manual_seed(7)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=draw).tolist()
    return [torch.randint(0, vocabulary, (length,), generator=draw).tolist() for length in lengths]


def run(
    engine: Engine, batch: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams] = GREEDY
) -> list[RequestOutput]:
    """All prompts at once; outputs in their order."""
    each = [params] * len(batch) if isinstance(params, SamplingParams) else params
    for number, (prompt, own) in enumerate(zip(batch, each, strict=True)):
        engine.add_request(str(number), prompt, own)
    finish(engine)
    return [engine.output(str(number)) for number in range(len(batch))]


def finish(engine: Engine, most_steps: int = 5000) -> None:
    """Step until nothing is left, and see that all blocks came back."""
    for _ in range(most_steps):
        if not engine.has_unfinished():
            break
        engine.step()
    assert not engine.has_unfinished()
    assert engine.stats.free_blocks == engine.stats.num_blocks


def ids(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    """The first answers' token ids."""
    return [output.outputs[0].token_ids for output in outputs]
