"""What the tests of evaluate share: a mixture of tiny members, windows, and transformers' own losses."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from members import adapter, full_member, make_base, make_recipe, text_file

from octad.combine.build import combine
from octad.combine.preflight import preflight
from octad.text.windows import Window


class World:
    """A base, an adapter and a full member that changed feed-forward nets alone, a third that changed all, the mixture
    of the four, and text of two domains."""

    def __init__(self, directory: Path, family: str) -> None:
        self.base = make_base(directory / "base", family)
        self.models = {
            "general": self.base,
            "lora": adapter(self.base, directory / "lora", 1),
            "full": full_member(self.base, directory / "full", 2, only=".mlp."),
            "far": full_member(self.base, directory / "far", 3),
        }
        references = {name: str(path) for name, path in self.models.items()} | {"general": "base"}
        texts = {name: text_file(directory, seed) for seed, name in enumerate(references)}
        experts = [{"name": n, "model": m, "data": str(texts[n])} for n, m in references.items()]
        self.mixture = combine(preflight(make_recipe(self.base, experts)), directory / "mixture")
        self.domains = {"one": [texts["lora"]], "two": [texts["full"], texts["far"]]}


def theirs(directory: Path) -> Any:
    """The model by transformers alone, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.no_grad()
def their_nats(model: Any, windows: Sequence[Window]) -> list[float]:
    """Sums of -ln p, each window alone: by log_softmax, and by the loss that the model itself gives."""
    sums = []
    for window in windows:
        ids = torch.tensor([window.ids])
        out = model(ids, labels=ids)
        logp = F.log_softmax(out.logits[0, :-1].double(), -1)
        own = float(-logp.gather(1, ids[0, 1:, None]).sum())
        torch.testing.assert_close(own, float(out.loss) * (len(window.ids) - 1), rtol=1e-5, atol=1e-5)
        sums.append(own)
    return sums
