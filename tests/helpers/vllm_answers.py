"""What vLLM says of several models, as JSON: run with the Python of its own environment, which has no octad.

VLLM_PYTHON vllm_answers.py < '{"models": ["a/"], "prompts": [[1, 2]], "tokens": 8}'
> '{"a/": [{"ids": [...], "logprobs": [...]}]}'                     # or, of a model that does not load, its error's text
"""

import json
import os
import sys
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def answers(model: str, prompts: list[list[int]], tokens: int) -> list[dict[str, Any]] | str:
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    try:
        llm = LLM(model=model, dtype="float32", enforce_eager=True, max_model_len=128)
        params = SamplingParams(temperature=0, max_tokens=tokens, logprobs=1, ignore_eos=True)
        found = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        del llm
    except Exception as error:  # the caller shows it
        return f"{type(error).__name__}: {error}"
    finally:
        cleanup_dist_env_and_memory()
    said = [request.outputs[0] for request in found]
    return [
        {
            "ids": list(one.token_ids),
            "logprobs": [row[i].logprob for row, i in zip(one.logprobs, one.token_ids, strict=True)],
        }
        for one in said
    ]


if __name__ == "__main__":
    asked, stdout = json.load(sys.stdin), os.dup(1)
    os.dup2(2, 1)  # what the engine prints goes to stderr
    found = {model: answers(model, asked["prompts"], asked["tokens"]) for model in asked["models"]}
    os.write(stdout, json.dumps(found).encode())
    os._exit(0)  # without waiting for its threads
