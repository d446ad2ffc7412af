"""What makes an annotated document invalid, and the normal form in which a valid one is stored.

Offsets count characters (code points) of ``text``, as PubAnnotation's do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import count, islice
from typing import Any, TypeGuard

from examples.annotations.documents import canonical_divid

MAX_PROBLEMS = 20
ANNOTATIONS = ("denotations", "attributes", "relations")

Document = dict[str, Any]


def validate(document: Mapping[str, Any]) -> list[str]:
    """The first `MAX_PROBLEMS` problems of a document; none: it is valid."""
    return list(islice(_problems(document), MAX_PROBLEMS))


def normalise(document: Document) -> Document:
    """The stored form of a valid document: denotations in order of text, every annotation with an id,
    numeric ``divid`` as a number. Text and spans stay as they are. Normalising twice changes nothing.
    """
    normal = dict(document)
    if isinstance(normal.get("divid"), str):
        normal["divid"] = canonical_divid(normal["divid"])
    denotations = sorted(document.get("denotations", ()), key=_text_order)
    taken = set().union(*(_ids(document.get(kind, ())) for kind in ANNOTATIONS))
    normal["denotations"] = _with_ids(denotations, "T", taken)
    for kind, prefix in (("attributes", "A"), ("relations", "R")):
        if kind in document:
            normal[kind] = _with_ids(document[kind], prefix, taken)
    return normal


def count_objects(document: Mapping[str, Any]) -> int:
    """Denotations, attributes and relations of a valid document."""
    return sum(len(document.get(kind, ())) for kind in ANNOTATIONS)


def _problems(document: Mapping[str, Any]) -> Iterator[str]:
    text = document.get("text")
    if not isinstance(text, str):
        yield "text is missing" if text is None else "text is not a string"
        return
    annotations: dict[str, list[Any]] = {}
    for kind in ANNOTATIONS:
        value = document.get(kind, [])
        if not isinstance(value, list):
            yield f"{kind} is not a list"
            value = []
        annotations[kind] = value
    blocks = document.get("blocks")
    annotations["blocks"] = blocks if isinstance(blocks, list) else []
    yield from _denotation_problems(annotations["denotations"], len(text))
    yield from _id_problems(annotations)
    yield from _reference_problems(annotations)


def _denotation_problems(denotations: list[Any], length: int) -> Iterator[str]:
    for index, denotation in enumerate(denotations):
        label = f"denotation {index}"
        if not isinstance(denotation, dict):
            yield f"{label} is not an object"
            continue
        if not isinstance(denotation.get("obj"), str) or not denotation["obj"]:
            yield f"{label} has no obj"
        spans = _spans(denotation)
        if not spans:
            yield f"{label} has no span"
        for span in spans:
            yield from _span_problems(label, span, length)


def _span_problems(label: str, span: Any, length: int) -> Iterator[str]:
    begin, end = (span.get("begin"), span.get("end")) if isinstance(span, dict) else (None, None)
    if not _is_integer(begin) or not _is_integer(end):
        yield f"{label}: begin and end of a span are not both integers"
    elif begin > end:
        yield f"{label}: the span begins at {_shown(begin)}, after its end at {_shown(end)}"
    elif begin < 0 or end > length:
        yield f"{label}: the span {_shown(begin)}-{_shown(end)} is outside the text of {length} characters"


def _id_problems(annotations: dict[str, list[Any]]) -> Iterator[str]:
    seen: set[str] = set()
    for kind, members in annotations.items():
        for index, annotation in enumerate(members):
            if not isinstance(annotation, dict) or annotation.get("id") is None:
                continue
            name = _name(annotation["id"])
            if name is None:
                yield f"the id of {kind} {index} is neither a string nor an integer"
            elif name in seen:
                yield f"the id {name[:40]!a} occurs twice"
            else:
                seen.add(name)


def _reference_problems(annotations: dict[str, list[Any]]) -> Iterator[str]:
    known = set().union(*(_ids(annotations[kind]) for kind in ("denotations", "blocks", "relations")))
    for kind, roles in (("attributes", ("subj",)), ("relations", ("subj", "obj"))):
        for index, annotation in enumerate(annotations[kind]):
            label = f"{kind[:-1]} {index}"
            if not isinstance(annotation, dict):
                yield f"{label} is not an object"
                continue
            for role in ("subj", "pred", "obj"):
                if role not in annotation:
                    yield f"{label} has no {role}"
            for role in roles:
                if role in annotation and _name(annotation[role]) not in known:
                    yield f"{label}: its {role} is no annotation of this document"


def _spans(denotation: Mapping[str, Any]) -> list[Any]:
    """A denotation has one span, or a list of them when its mention is discontinuous."""
    span = denotation.get("span")
    if span is None:
        return []
    return span if isinstance(span, list) else [span]


def _ids(annotations: Iterable[Any]) -> set[str]:
    names = (_name(annotation.get("id")) for annotation in annotations if isinstance(annotation, dict))
    return {name for name in names if name is not None}


def _name(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    return _shown(value) if _is_integer(value) else None


def _is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(number: int) -> str:
    """An integer of thousands of digits has no decimal form in Python: it is shown as hexadecimal."""
    return str(number) if number.bit_length() < 4096 else hex(number)


def _text_order(denotation: Mapping[str, Any]) -> tuple[int, int, str]:
    first = _spans(denotation)[0]
    return first["begin"], first["end"], _name(denotation.get("id")) or ""


def _with_ids(annotations: list[Document], prefix: str, taken: set[str]) -> list[Document]:
    candidates = (f"{prefix}{number}" for number in count(1))
    free = (candidate for candidate in candidates if candidate not in taken)
    return [a if a.get("id") is not None else {**a, "id": next(free)} for a in annotations]
