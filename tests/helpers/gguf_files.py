"""GGUF files of tiny Llama models with their tokenizers, written with the `gguf` package as the converter does it."""

import json
from pathlib import Path

import gguf
import numpy as np
import tokenizers
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file

PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd",
    "model.norm.weight": "output_norm",
    "lm_head.weight": "output",
}


def gguf_of(
    directory: Path,
    path: Path,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    *,
    template: str | None = None,
    rows: int | None = None,
) -> dict[str, np.ndarray]:
    """Write a Llama checkpoint and its byte-level tokenizer as one file; rows without a token are called [PADn].

    Returns the float32 values that each stored tensor stands for."""
    raw = json.loads((directory / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(raw["num_attention_heads"])
    writer.add_head_count_kv(raw["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    add_tokenizer(writer, directory, rows or raw["vocab_size"], template)
    values = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        stored, array = stored_name(name), tensor.float().numpy()
        heads = {"attn_q": raw["num_attention_heads"], "attn_k": raw["num_key_value_heads"]}
        if count := heads.get(stored.split(".")[-2]):
            array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        kept = kind if array.ndim > 1 else gguf.GGMLQuantizationType.F32
        data = quantize(np.ascontiguousarray(array), kept)
        writer.add_tensor(stored, data, raw_dtype=kept)
        values[stored] = dequantize(data, kept).reshape(array.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def stored_name(name: str) -> str:
    if name in WHOLE:
        return f"{WHOLE[name]}.weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{PARTS[rest.removesuffix('.weight')]}.weight"


def add_tokenizer(writer: gguf.GGUFWriter, directory: Path, rows: int, template: str | None) -> None:
    core = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    names = {i: text for text, i in core.get_vocab(with_added_tokens=True).items()}
    added = core.get_added_tokens_decoder()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([names.get(i, f"[PAD{i}]") for i in range(rows)])
    writer.add_token_types([5 if i not in names else 3 if i in added else 1 for i in range(rows)])
    writer.add_token_merges([" ".join(m) for m in json.loads(core.to_str())["model"]["merges"]])
    writer.add_eos_token_id(core.token_to_id("<|end|>"))
    if template:
        writer.add_chat_template(template)
