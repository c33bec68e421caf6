"""octad's engine as a model of lm-eval (EleutherAI's evaluation harness), under the name `octad`.

    python -m octad.evaluate.lm_eval_adapter run --model octad --model_args pretrained=mixture/ --tasks arc_easy
    lm_eval.simple_evaluate(OctadLM(LLM("mixture/")), tasks=["arc_easy"])

The first is lm-eval's own command line with one model more: by itself it finds no models outside of its package. Texts
are cut into tokens as its HF model does it, so that log-likelihoods agree with that to rounding.

model_args: pretrained (what `LLM` takes), dtype, device, quantize, only (send every token to this expert).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from octad.engine.llm import LLM
from octad.engine.params import SamplingParams
from octad.errors import OctadError
from octad.evaluate.tasks.answers import write
from octad.evaluate.tasks.entrants import alone
from octad.evaluate.tasks.likelihood import Pair, begin_ids, log_likelihoods

MARK = "\ue000 "  # a private character, where a message ends


@register_model("octad")
class OctadLM(TemplateLM):  # type: ignore[misc]
    """A model of lm-eval; `pretrained` is a path, or an LLM that is open already."""

    def __init__(
        self,
        pretrained: str | LLM,
        dtype: str = "auto",
        device: str | None = None,
        quantize: str | None = None,
        only: str | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, LLM):
            self.llm = pretrained
        else:
            place = "auto" if device in (None, "cuda", "cuda:0") else device  # lm-eval's default, GPU or not
            self.llm = LLM(pretrained, dtype=dtype, device=place, quantize=quantize)
        self._alone = ExitStack()  # for as long as this model is there
        if only is not None:
            self._alone.enter_context(alone(self.llm, self.llm.expert_number(only)))
        self.max_gen_toks = 256  # lm-eval's default, where a task does not say

    @property
    def max_length(self) -> int:
        """Tokens of context."""
        return self.llm.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        token = self.llm.tokenizer.eos_id
        return self.prefix_token_id if token is None else token

    @property
    def prefix_token_id(self) -> int:
        """The token before an empty context."""
        return begin_ids(self.llm.tokenizer)[0]

    @property
    def tokenizer_name(self) -> str:
        """What a cache of requests is told apart by."""
        return self.llm.tokenizer.label.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, with what the model wants around it unless the text or the caller says otherwise."""
        tokenizer = self.llm.tokenizer
        begins = string.startswith(tokenizer.decode([self.prefix_token_id], skip_special_tokens=False))
        special = not begins if add_special_tokens is None else add_special_tokens
        return tokenizer.encode(string, add_special_tokens=special)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A chat as text; without a generation prompt its last message is left open, to be continued."""
        if add_generation_prompt:
            return self.llm.tokenizer.apply_chat_template(chat_history)
        *before, last = chat_history
        marked = last | {"content": last["content"] + MARK}
        rendered = self.llm.tokenizer.apply_chat_template([*before, marked], add_generation_prompt=False)
        opened = rendered[: rendered.rindex(MARK.strip())]
        return opened if MARK in rendered else opened.rstrip()  # the template strips its messages

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template, which lm-eval keeps with the results."""
        return self.llm.tokenizer.chat_template if chat_template else None

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs: list[Pair] = [(context, continuation) for _, context, continuation in requests]
        answers = [(-found.nats, found.greedy) for found in log_likelihoods(self.llm.model, pairs)]
        for (key, _, _), answer in zip(requests, answers, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows that do not share predictions."""
        windows: list[tuple[int, tuple[list[int], list[int]]]] = []
        for number, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
            windows += [(number, make_disjoint_window(window)) for window in rolling]
        sums = [0.0] * len(requests)
        found = log_likelihoods(self.llm.model, [window for _, window in windows])
        for (number, _), likelihood in zip(windows, found, strict=True):
            sums[number] -= likelihood.nats
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop string, all of them in one batch of the engine."""
        params = [self._params(request.args[1]) for request in requests]
        prompts = [
            self.tok_encode(request.args[0]) for request in requests
        ]  # a chat's control tokens are tokens
        texts = [text for (text,) in write(self.llm, prompts, params)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _params(self, asked: dict[str, Any]) -> SamplingParams:
        """lm-eval's generation_kwargs (transformers' names) as ours; those that have no counterpart are left out."""
        settings = normalize_gen_kwargs(asked, self.max_gen_toks)
        known = {name: settings[name] for name in ("top_p", "top_k", "min_p") if name in settings}
        return SamplingParams(
            temperature=settings["temperature"] if settings.get("do_sample") else 0.0,
            max_tokens=settings["max_gen_toks"],
            stop=[text for text in handle_stop_sequences(settings.get("until"), None) if text],
            **known,
        )


def main() -> None:
    """lm-eval's command line. A mistake that octad knows is one line and exit code 2."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except OctadError as error:
        print(f"octad: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
