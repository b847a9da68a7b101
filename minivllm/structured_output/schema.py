"""A caller's JSON schema -> one that llguidance takes, with the same meaning or a narrower one.

llguidance refuses much that SDKs send and that changes nothing: $schema, unknown formats, unknown keywords,
propertyNames of plain records. Here annotations are dropped, what can be said in another way is said so, and what
would change the meaning is refused, all of it in one message.

Three things are narrower than the schema: an object that lists its properties and says nothing of others has no others
(a small model would invent them until its budget is gone; additionalProperties: true asks for them); a schema without
`type` that speaks of properties means an object (SDK 5 sends its tools so; JSON schema would allow any other value as
well), likewise for arrays, strings and numbers; and oneOf is anyOf where its branches may overlap.

Sizes are checked by sampling_params.py. Called by grammar.py. Twin in vLLM: has_guidance_unsupported_json_features in
vllm/v1/structured_output/backend_guidance.py.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

from minivllm.errors import InvalidRequestError

Schema = dict[str, Any] | bool

MAX_MULTIPLE = 20_000  # a multipleOf of n needs n states: a million takes five seconds and 260 MB
MAX_MET_PATTERNS = 8  # that may meet in one string: llguidance needs 2 ** n steps for n of them
FORMATS = frozenset(
    {"date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"}
)  # that llguidance knows

# Keywords by what their value is; all the others are annotations.
ONE_SCHEMA = frozenset({"additionalProperties", "additionalItems"})
SCHEMA_LIST = frozenset({"prefixItems", "anyOf", "oneOf", "allOf"})
SCHEMA_MAP = frozenset({"properties", "patternProperties", "$defs", "definitions"})
PLAIN = frozenset(
    {"type", "enum", "const", "$ref", "required", "minProperties", "maxProperties", "minItems", "maxItems"}
    | {"minLength", "maxLength", "pattern", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
)
UNSUPPORTED = frozenset(
    {"not", "if", "contains", "dependencies", "dependentRequired", "dependentSchemas", "unevaluatedItems"}
    | {"unevaluatedProperties", "$dynamicRef", "$recursiveRef"}
)
IMPLIED_TYPES = {
    "object": {"properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties"},
    "array": {"items", "prefixItems", "additionalItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
}
SAYS_ITS_TYPE = frozenset({"type", "enum", "const", "$ref", "anyOf", "oneOf", "allOf"})
LOOK_AROUND = re.compile(r"\(\?<?[=!]")


def prepare_schema(schema: Schema) -> Schema:
    """The schema as llguidance takes it. Raises InvalidRequestError listing every keyword that cannot be honoured."""
    preparation = _Preparation()
    prepared = preparation.schema(schema, "#")
    if preparation.unsupported:
        listed = ", ".join(sorted(preparation.unsupported)[:10])
        raise InvalidRequestError(
            f"structured_outputs.json uses JSON schema keywords that cannot be honoured: {listed}.",
            parameter="structured_outputs",
        )
    preparation.check_multiples()
    preparation.check_patterns()
    if not preparation.patterns_meet:  # closed parts of an allOf would forbid each other's properties
        _close_objects(prepared)
    return prepared


def _close_objects(schema: Any) -> None:
    """additionalProperties: false for objects that list theirs, wherever the listed ones can satisfy them."""
    if isinstance(schema, list):
        for member in schema:
            _close_objects(member)
    if not isinstance(schema, dict):
        return
    for keyword, value in schema.items():
        if keyword in SCHEMA_MAP and isinstance(value, dict):
            _close_objects(list(value.values()))
        elif keyword in ONE_SCHEMA | {"items"} or (keyword in SCHEMA_LIST and isinstance(value, list)):
            _close_objects(value)
    listed, required, least = (schema.get(name) for name in ("properties", "required", "minProperties"))
    if not isinstance(listed, dict) or schema.keys() & {"additionalProperties", "patternProperties"}:
        return
    is_enough = not isinstance(least, int) or least <= len(listed)
    if listed and is_enough and (not isinstance(required, list) or all(name in listed for name in required)):
        schema["additionalProperties"] = False


class _Preparation:
    """One walk over one schema."""

    def __init__(self) -> None:
        self.unsupported: set[str] = set()
        self.multiples: list[int] = []
        self.patterns: set[str] = set()  # and formats
        self.patterns_meet = False

    def schema(self, schema: Any, path: str, *, infer_type: bool = True) -> Any:
        if not isinstance(schema, dict):  # true, false, or something that llguidance refuses in its own words
            return schema
        if schema.get("not") in ({}, True) and "not" in schema:  # zod's never
            return False
        prepared: dict[str, Any] = {}
        for keyword, value in schema.items():
            self._keyword(prepared, keyword, value, f"{path}/{keyword}")
        self._property_names(prepared, schema, path)
        if infer_type and not SAYS_ITS_TYPE & prepared.keys():
            implied = [name for name, keywords in IMPLIED_TYPES.items() if keywords & prepared.keys()]
            if len(implied) == 1:
                prepared["type"] = implied[0]
        if "format" in prepared and LOOK_AROUND.search(str(prepared.get("pattern", ""))):
            del prepared["pattern"]  # zod's e-mail: the format says the same
        self.patterns |= {f"{name} {prepared[name]}" for name in ("pattern", "format") if name in prepared}
        others = prepared.keys() - {"type", "$defs", "definitions"}
        names = prepared.get("patternProperties")
        if isinstance(names, dict) and len(names) > MAX_MET_PATTERNS:  # each of them is compared with all others
            self.unsupported.add(f"{path}/patternProperties (more than {MAX_MET_PATTERNS})")
        self.patterns_meet |= "allOf" in others or (len(others) > 1 and bool(others & {"$ref", "anyOf", "oneOf"}))
        return prepared

    def _keyword(self, prepared: dict[str, Any], keyword: str, value: Any, path: str) -> None:
        if keyword in ONE_SCHEMA or (keyword == "items" and not isinstance(value, list)):
            prepared[keyword] = self.schema(value, path)
        elif (keyword in SCHEMA_LIST or keyword == "items") and isinstance(value, list):
            infer = keyword != "allOf"  # a member only adds to its siblings
            prepared[keyword] = [self.schema(one, f"{path}/{i}", infer_type=infer) for i, one in enumerate(value)]
        elif keyword in SCHEMA_MAP and isinstance(value, dict):
            prepared[keyword] = {name: self.schema(one, f"{path}/{name}") for name, one in value.items()}
        elif keyword in PLAIN or keyword in SCHEMA_LIST or keyword in SCHEMA_MAP:  # a wrong value: llguidance says so
            prepared[keyword] = value
        elif keyword == "format":
            if isinstance(value, str) and value in FORMATS:
                prepared[keyword] = value
        elif keyword == "multipleOf":
            prepared[keyword] = value
            self._multiple(value)
        elif (keyword in UNSUPPORTED and value is not True) or (keyword == "uniqueItems" and value is not False):
            self.unsupported.add(path)

    def _property_names(self, prepared: dict[str, Any], schema: dict[str, Any], path: str) -> None:
        """Records: names from a list become properties, names of a pattern become patternProperties."""
        names = schema.get("propertyNames", True)
        if isinstance(names, dict):
            names = self.schema(names, f"{path}/propertyNames", infer_type=False)
        if names is True or names in ({}, {"type": "string"}):
            return
        is_plain = not (prepared.keys() & {"properties", "patternProperties"}) and isinstance(names, dict)
        constraint = {key: value for key, value in names.items() if key != "type"} if is_plain else {}
        values = prepared.pop("additionalProperties", True)
        if set(constraint) == {"enum"} and isinstance(constraint["enum"], list):
            prepared["properties"] = {name: values for name in constraint["enum"] if isinstance(name, str)}
        elif set(constraint) == {"const"} and isinstance(constraint["const"], str):
            prepared["properties"] = {constraint["const"]: values}
        elif set(constraint) == {"pattern"}:
            prepared["patternProperties"] = {constraint["pattern"]: values}
        else:
            self.unsupported.add(f"{path}/propertyNames")
        prepared["additionalProperties"] = False

    def _multiple(self, value: Any) -> None:
        """Note the states it needs: powers of ten are free."""
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 and math.isfinite(value):
            digits = "".join(map(str, Decimal(str(value)).as_tuple().digits)).rstrip("0")
            self.multiples.append(int(digits[:20]))

    def check_patterns(self) -> None:
        """Raises InvalidRequestError when too many patterns may have to hold for one string."""
        if self.patterns_meet and len(self.patterns) > MAX_MET_PATTERNS:
            raise InvalidRequestError(
                f"structured_outputs.json: at most {MAX_MET_PATTERNS} different patterns and formats where allOf, or "
                "$ref, anyOf or oneOf beside other keywords, can make several hold at once.",
                parameter="structured_outputs",
            )

    def check_multiples(self) -> None:
        """Raises InvalidRequestError when they need too many states, one by one or where they meet."""
        if max(sum(self.multiples), math.lcm(*self.multiples)) > MAX_MULTIPLE:
            raise InvalidRequestError(
                f"structured_outputs.json: the multipleOf values must be small: their sum and their least common "
                f"multiple (powers of ten not counted) at most {MAX_MULTIPLE}.",
                parameter="structured_outputs",
            )
