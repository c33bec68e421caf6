"""A SentencePiece model file, its protocol buffer put together by hand (field numbers of sentencepiece_model.proto)."""

import struct


def model_of(texts: list[str]) -> bytes:
    """ModelProto: pieces (1: text, 2: score, 3: type), then a trainer_spec (2) to be passed over."""
    pieces = [
        field(1, text.encode()) + b"\x15" + struct.pack("<f", -float(i)) + b"\x18\x01"
        for i, text in enumerate(texts)
    ]
    return b"".join(field(1, piece) for piece in pieces) + field(2, b"\x18\x02" + b"\x20" + varint(32000))


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])
