"""The tree of settings as data: which keys there are, of which type, and whether a value fits.

Built from the Structs of `core/settings.py` and of plugins; read by `core/config/loading.py` (to fill in values) and
`core/config/describe.py` (to explain them).
"""

from __future__ import annotations

import difflib
import re
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import fields

from ..settings import Settings
from .sources import Given, parse_scalar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

UNSET: Any = object()

_PATTERN = re.compile(r" matching regex '.*'")
"""What users need not read: `type_name` gives examples."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One leaf of the tree."""

    key: str
    """Dotted."""
    type: Any
    """As annotated, with bounds."""
    help: str
    unit: str | None
    default: Any
    """`UNSET` if a value must be given."""

    @property
    def name(self) -> str:
        return self.key.rpartition(".")[2]

    def type_name(self) -> str:
        return type_name(self.type)

    def convert(self, given: Given) -> Any:
        """The value as the setting's type. Raises `ValueError` that says what was expected."""
        value = self._from_text(given.value) if given.text else given.value
        try:
            return msgspec.convert(value, self.type)
        except msgspec.ValidationError as error:
            if given.text and given.value in _words(self.type):  # `off` as a word, where YAML reads a bool
                return given.value
            raise ValueError(_PATTERN.sub(" of another form", str(error))) from error

    def _from_text(self, text: str) -> Any:
        null = _accepts(self.type, type(None))
        if _accepts(self.type, str) and not (null and text in ("null", "~", "")):
            return text
        value = parse_scalar(text)
        if isinstance(value, str) and _accepts(self.type, list):
            return [part.strip() for part in value.split(",") if part.strip()]
        return [] if text == "" and _accepts(self.type, list) else value


@dataclass(frozen=True, slots=True)
class Section:
    """An inner node: a Struct and what lies in it. `struct` is None for `plugins.<name>` where it is not known."""

    key: str
    struct: type[Struct] | None
    children: dict[str, Section | Setting]
    help: str = ""

    def leaves(self) -> Iterator[Setting]:
        for child in self.children.values():
            if isinstance(child, Section):
                yield from child.leaves()
            else:
                yield child

    def find(self, key: str) -> Section | Setting | None:
        node: Section | Setting = self
        for part in key.split(".") if key else []:
            child = node.children.get(part) if isinstance(node, Section) else None
            if child is None:
                return None
            node = child
        return node


def settings_tree(plugins: Mapping[str, type[Struct] | None]) -> Section:
    """The whole tree. `plugins`: name → Struct of its settings, or None for a plugin that has none or is not imported."""
    root = _section("", Settings)
    del root.children["plugin"]  # where the plugins' Structs land; in files they lie at `plugins.<name>`
    beside = root.children["plugins"]
    assert isinstance(beside, Section)
    for name, struct in plugins.items():
        key = f"plugins.{name}"
        beside.children[name] = _section(key, struct) if struct is not None else Section(key, None, {})
    return root


def _section(key: str, struct: type[Struct]) -> Section:
    children: dict[str, Section | Setting] = {}
    for info in fields(struct):
        path = f"{key}.{info.encode_name}" if key else info.encode_name
        plain, metas = _unwrap(info.type)
        if isinstance(plain, type) and issubclass(plain, Struct):
            children[info.encode_name] = _section(path, plain)
            continue
        default = info.default if info.default is not msgspec.NODEFAULT else UNSET
        if info.default_factory is not msgspec.NODEFAULT:
            default = info.default_factory()
        help_text = next((meta.description for meta in metas if meta.description), "")
        units = [(meta.extra_json_schema or {}).get("unit") for meta in metas]
        unit = next((name for name in units if name), None)
        children[info.encode_name] = Setting(path, info.type, help_text, unit, default)
    document = (struct.__doc__ or "").strip()
    return Section(key, struct, children, "" if document.startswith(f"{struct.__name__}(") else document)


def nearest(wrong: str, keys: Iterable[str]) -> str | None:
    """The valid key that was probably meant: like `wrong` in its last part, or, where its section is unknown, as a whole."""
    keys = list(keys)
    parent, _, leaf = wrong.rpartition(".")
    siblings = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == parent}
    close = difflib.get_close_matches(leaf, siblings, n=1)
    if close:
        return siblings[close[0]]
    namesakes = [key for key in keys if key.rpartition(".")[2] == leaf]
    if namesakes:
        return max(namesakes, key=lambda key: difflib.SequenceMatcher(None, wrong, key).ratio())
    whole = difflib.get_close_matches(wrong, keys, n=1)
    if whole and not siblings:
        return whole[0]
    leaves = {key.rpartition(".")[2]: key for key in keys}
    close = difflib.get_close_matches(leaf, leaves, n=1)
    return leaves[close[0]] if close else None


def _unwrap(annotation: Any) -> tuple[Any, list[Meta]]:
    """The type without `Annotated`, and what was annotated."""
    if get_origin(annotation) is Annotated:
        plain, *metas = get_args(annotation)
        return plain, [meta for meta in metas if isinstance(meta, Meta)]
    return annotation, []


def _options(annotation: Any) -> tuple[Any, ...]:
    plain, _ = _unwrap(annotation)
    return get_args(plain) if get_origin(plain) in (Union, types.UnionType) else (plain,)


def _accepts(annotation: Any, kind: type) -> bool:
    plain = [_unwrap(option)[0] for option in _options(annotation)]
    return any(option is kind or get_origin(option) is kind or (option is None and kind is type(None)) for option in plain)


def _words(annotation: Any) -> set[Any]:
    """The values of its `Literal`s."""
    plain = [_unwrap(option)[0] for option in _options(annotation)]
    return {word for option in plain if get_origin(option) is Literal for word in get_args(option)}


def type_name(annotation: Any) -> str:
    """For people: `int ≥ 8 or null`, `one of auto, float32`, `list of str`."""
    plain, metas = _unwrap(annotation)
    if get_origin(plain) in (Union, types.UnionType):
        options = [option for option in get_args(plain) if option is not type(None)]
        names = [type_name(Annotated[option, *metas] if metas else option) for option in options]
        return " or ".join(names + (["null"] if len(options) < len(get_args(plain)) else []))
    if get_origin(plain) is Literal:
        return "one of " + ", ".join(str(value) for value in get_args(plain))
    arguments = get_args(plain)
    if get_origin(plain) in (list, tuple, set, frozenset):
        name = "list" + (f" of {type_name(arguments[0])}" if arguments else "")
    elif get_origin(plain) is dict:
        name = f"mapping of {type_name(arguments[0])} to {type_name(arguments[1])}"
    else:
        name = getattr(plain, "__name__", str(plain))
    examples = [str(example) for meta in metas for example in meta.examples or ()]
    if examples:
        name += f" such as {', '.join(examples)}"
    signs = (("≥", "ge"), (">", "gt"), ("≤", "le"), ("<", "lt"))
    bounds = [f"{sign} {getattr(meta, field)}" for meta in metas for sign, field in signs if getattr(meta, field) is not None]
    return " ".join([name, ", ".join(bounds)]).strip()
