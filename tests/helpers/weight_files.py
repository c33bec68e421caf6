"""Which files of a directory other engines take for weights, by their own patterns."""

from pathlib import Path

from octad.checkpoint.shard import read_header

# vLLM's and SGLang's default loaders, transformers' names, llama.cpp's converter: all of the directory itself, none below
PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.ckpt", "*.npz")
TRAINER_STATE = {"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt"}


def taken_for_weights(directory: Path) -> set[str]:
    """Names of the files that some engine would load."""
    return {path.name for pattern in PATTERNS for path in directory.glob(pattern)} - TRAINER_STATE


def tensors_found(directory: Path) -> set[str]:
    """Names of all tensors in what vLLM and SGLang read: every *.safetensors of the directory."""
    return {name for path in directory.glob("*.safetensors") for name in read_header(path)}
