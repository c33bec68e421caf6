"""domains.yaml: the held-out text that models are judged on, by the name of each kind.

domains:
  french: french/heldout.jsonl                    # a file, or what else stands for text (text/corpus.py)
  python: [a.jsonl, b/*.jsonl]
  letters: {data: letters.csv, field: body}

read_domains(Path("domains.yaml")); domains_of({"french": "french.jsonl"})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from octad.checkpoint.config_file import ConfigFile, Section, StringList, read_mapping
from octad.errors import DataError, RecipeError
from octad.text.corpus import TextFiles, resolved
from octad.text.documents import ROWS, TEXTS, kind_of

Domains = Mapping[str, Sequence[Path] | TextFiles]
RESERVED = ("mean", "every")


class DomainSpec(Section):
    """One kind of text: `data`, what it is read from, and `field`, the column that holds it."""

    old_names: ClassVar[Mapping[str, str]] = {"files": "data"}
    data: StringList = Field(min_length=1)
    field: str = "text"


def _spelt_out(value: Any) -> Any:
    """A file or a list of files, as the section that they stand for."""
    if isinstance(value, Mapping):
        return value
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not listed or not all(isinstance(v, str) and v for v in listed):
        raise ValueError("expected a file or a list of files")
    return {"data": listed}


Domain = Annotated[
    DomainSpec, BeforeValidator(_spelt_out, json_schema_input_type=str | list[str] | DomainSpec)
]


class DomainsFile(ConfigFile):
    """The whole file. The names are free, but for `mean` and `every`, which are said of all."""

    domains: dict[str, Domain]

    @field_validator("domains", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or not value:
            raise ValueError("expected a file for each domain's name")
        names = [str(name) for name in value]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two domains have the name {twice!r}; give each its own")
        if taken := next((name for name in names if name in RESERVED), None):
            raise ValueError(f"the name {taken!r} is taken for what is said of all; choose another")
        return {str(name): part for name, part in value.items()}

    def texts(self) -> Domains:
        """The files of each domain, relative paths resolved."""
        return {name: _files(spec, self.directory) for name, spec in self.domains.items()}


def read_domains(path: Path) -> Domains:
    """The domains of a YAML file; paths are relative to it. Raises DataError with one line."""
    kind = kind_of(path)[0]
    if kind in {*ROWS, *TEXTS} - {".json"} and path.is_file():
        raise DataError(
            f"{path}: is text; give a .yaml file that names it, such as  domains: {{law: {path.name}}}"
        )
    try:
        raw = read_mapping(path, f"{path}", "domains")
        if not raw.get("domains"):
            raise RecipeError(f"{path}: expected 'domains:' with a file for each domain name")
        return DomainsFile.from_dict(raw, path.parent, f"{path}").texts()
    except RecipeError as error:
        raise DataError(str(error)) from None


def inlined(value: Any, info: ValidationInfo) -> Any:
    """The name of a file of domains, as a key of another file has it, turned into what it holds."""
    if not isinstance(value, str):
        return value
    directory = (info.context or {}).get("directory", Path())
    try:
        found = read_domains(Path(resolved(value, directory)))
    except DataError as error:
        raise ValueError(str(error)) from None
    texts = {name: t if isinstance(t, TextFiles) else TextFiles(t) for name, t in found.items()}
    return {name: {"data": [str(f) for f in t.files], "field": t.field} for name, t in texts.items()}


def domains_of(data: str | Path | Mapping[str, Any]) -> Domains:
    """The domains of a file, or of a mapping such as {"french": "french.jsonl"}. Raises DataError."""
    if not isinstance(data, Mapping):
        return read_domains(Path(data))
    plain = {
        name: [str(v) for v in value] if isinstance(value, (list, tuple)) else value
        for name, value in data.items()
    }
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in plain.items()}
    try:
        return DomainsFile.from_dict({"domains": plain}, Path(), "data").texts()
    except RecipeError as error:
        raise DataError(str(error)) from None


def _files(spec: DomainSpec, directory: Path) -> Sequence[Path] | TextFiles:
    places = [resolved(part, directory) for part in spec.data]
    return [Path(place) for place in places] if spec.field == "text" else TextFiles(places, spec.field)
