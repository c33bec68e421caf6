"""A small report as the verdict hands it over, and what a strict reader of HTML says of a page."""

import json
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "link", "br", "hr", "img", "input", "col", "wbr", "source"}
EVIL = '<script>alert("x")</script>'


def sample(**changes: Any) -> dict[str, Any]:
    """Two domains, two members and their mixture; every part is filled. `changes` replace whole parts."""
    bits = {
        "python": ("member", 0.7123, 1.2345, 10),
        "french": ("member", 0.9877, 1.0101, 10),
        "soup": ("soup", 0.8011, 1.1022, 10),
        "oracle": ("oracle", 0.7123, 1.0101, 10),
        "mixture top-2": ("mixture", 0.7099, 1.0202, 17),
    }
    contestants = [
        {
            "name": name,
            "kind": kind,
            "note": "moved" if name == "french" else None,
            "bits_per_byte": {"python": a, "french": b},
            "nats_per_token": {"python": 2 * a, "french": 2 * b},
            "mean": (a + b) / 2,
            "price": {
                "total_parameters": 30_000_000,
                "active_parameters": m * 1_000_000,
                "flops_per_token": None,
            },
        }
        for name, (kind, a, b, m) in bits.items()
    ]
    report: dict[str, Any] = {
        "octad": "0.1.0",
        "made": "2026-11-26",
        "model": "mixture/",
        "command": "octad evaluate mixture/ --data domains.yaml --report report/",
        "settings": {
            "tokens": 4096,
            "window": 512,
            "dtype": "bfloat16",
            "seed": 0,
            "resamples": 1000,
            "level": 0.95,
        },
        "machine": {"cpu": "a processor", "cores": 2, "gpu": None, "memory_gb": 15.5},
        "domains": [
            {"name": d, "documents": 3, "windows": 8, "tokens": 4000, "bytes": 12345}
            for d in ("python", "french")
        ],
        "contestants": contestants,
        "differences": [
            _difference("soup", "mean", -0.0866, -0.0911),
            _difference("soup", "python", -0.0912, -0.0955),
            _difference("oracle", "mean", 0.0038, -0.0011),
            _difference("oracle", "french", 0.0101, 0.0055),
            _difference("python", "mean", -0.1083, -0.1201),
            _difference("python", "french", -0.2143, -0.2301),
        ],
        "routing": routing(),
        "tasks": [
            {
                "name": "HumanEval",
                "kind": "code",
                "metric": "pass@1",
                "examples": 164,
                "scores": {
                    "python": {"value": 0.1219, "low": 0.0777, "high": 0.1811},
                    "mixture top-2": {"value": 0.1341, "low": 0.0888, "high": 0.1952},
                },
            }
        ],
        "verdict": {
            "headline": "Worth making",
            "sentences": ["It beats every member.", "It does not reach the oracle."],
            "questions": [
                _question("better than every member?", "yes", -0.1083),
                _question("the oracle?", "unclear", 0.0038),
            ],
            "worse_on": [
                {"domain": "french", "against": "oracle", "difference": 0.0101, "low": 0.0055, "high": 0.0149}
            ],
            "advice": ["Retrain the router on french."],
        },
        "requirements": [
            {
                "text": "mean<=oracle",
                "holds": False,
                "cases": [
                    {
                        "left": "mixture",
                        "left_value": 0.86505,
                        "right": "oracle",
                        "right_value": 0.8612,
                        "holds": False,
                    }
                ],
            }
        ],
    }
    return report | changes


def _difference(against: str, domain: str, value: float, low: float) -> dict[str, Any]:
    spread = {"difference": value, "low": low, "high": 2 * value - low, "relative": value / 2}
    return {"of": "mixture top-2", "against": against, "domain": domain} | spread


def _question(text: str, answer: str, value: float) -> dict[str, Any]:
    spread = {"difference": value, "low": value - 0.0047, "high": value + 0.0053}
    return {"question": text, "answer": answer, "against": "french"} | spread


def routing(names: tuple[str, ...] = ("python", "french")) -> dict[str, Any]:
    """Two layers with routers, of which the second always takes the first expert."""
    a, b = names
    words = [("def", 0), (" été", 1), ("s", 1), ("\n    ", 0), ("return", 0)]
    return {
        "experts": list(names),
        "layers": [1, 2],
        "share": {"python": [[0.75, 0.25], [1.0, 0.0]], "french": [[0.125, 0.875], [1.0, 0.0]]},
        "entropy": {"python": [0.5, 0.25], "french": [0.125, 0.0625]},
        "confidence": {"python": [0.8, 0.9], "french": [0.7, 1.0]},
        "own_first": {"python": [0.75, 1.0], "french": [0.875, 0.0]},
        "dead": [{"layer": 2, "expert": b}],
        "twins": [{"a": a, "b": b, "cosine": 0.953}],
        "top_tokens": {a: [{"text": "\n  def", "count": 12, "lift": 1.75}], b: []},
        "examples": [
            {"domain": "python", "tokens": [{"text": t, "speaker": s, "weight": 0.7} for t, s in words]}
        ],
    }


class StrictReader(HTMLParser):
    """Fails where a tag is not closed in its turn; collects tags with attributes, text, and rows of tables by caption."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.values: dict[str, list[float]] = {}
        self._caption = ""
        self.feed(html)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert len(given) == len(attrs), f"<{tag}> has an attribute twice"
        self.tags.append((tag, given))
        if given.get("role") == "region":
            self._caption = str(given["aria-label"])
        if (value := given.get("data-value")) is not None:
            self.values.setdefault(self._caption, []).append(float(value))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)


def numbers(value: Any) -> Iterator[float]:
    """Every number in a JSON value."""
    if isinstance(value, dict):
        for item in value.values():
            yield from numbers(item)
    elif isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


def read(path: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
