"""The generated stubs are current, and the contract breaks nobody who holds an older copy of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from google.protobuf import descriptor_pb2

from tools import protos

Files = descriptor_pb2.FileDescriptorSet
Field = descriptor_pb2.FieldDescriptorProto


def test_stubs_are_current() -> None:
    python = protos.generator_python(protos.ROOT / ".venv" / "protos")
    assert protos.stale_stubs(python) == [], "run python tools/protos.py"


def test_nothing_of_the_baseline_was_broken() -> None:
    broken = protos.breaking_changes(protos.baseline_contract(), protos.current_contract())
    assert broken == [], "deliberate? then run python tools/protos.py --accept"


def example() -> Files:
    files = Files()
    file = files.file.add(name="x.proto", package="x")
    message = file.message_type.add(name="M")
    message.oneof_decl.add(name="choice")
    message.field.add(name="a", number=1, type=Field.TYPE_STRING, label=Field.LABEL_OPTIONAL)
    message.field.add(name="b", number=2, type=Field.TYPE_UINT32, label=Field.LABEL_OPTIONAL, oneof_index=0)
    message.nested_type.add(name="N").field.add(name="c", number=1, type=Field.TYPE_BOOL, label=Field.LABEL_OPTIONAL)
    file.enum_type.add(name="E").value.add(name="E_ZERO", number=0)
    service = file.service.add(name="S")
    service.method.add(name="Call", input_type=".x.M", output_type=".x.M", server_streaming=True)
    return files


def message(files: Files) -> descriptor_pb2.DescriptorProto:
    return files.file[0].message_type[0]


BREAKING: dict[str, Callable[[Files], object]] = {
    "x.M.a (LABEL_OPTIONAL TYPE_STRING number 1) was removed": lambda f: message(f).field.pop(0),
    "x.M.a was LABEL_OPTIONAL TYPE_STRING number 1, and is": lambda f: setattr(message(f).field[0], "number", 7),
    "and is now LABEL_OPTIONAL TYPE_BYTES": lambda f: setattr(message(f).field[0], "type", Field.TYPE_BYTES),
    "and is now LABEL_REPEATED": lambda f: setattr(message(f).field[0], "label", Field.LABEL_REPEATED),
    "number 1 optional": lambda f: setattr(message(f).field[0], "proto3_optional", True),
    "number 2 in oneof choice, and": lambda f: message(f).field[1].ClearField("oneof_index"),
    "x.M.N (message) was removed": lambda f: message(f).nested_type.pop(),
    "x.M (message) was removed": lambda f: f.file[0].message_type.pop(),
    "x.E.E_ZERO (number 0) was removed": lambda f: f.file[0].enum_type[0].value.pop(),
    "x.E.E_ZERO was number 0": lambda f: setattr(f.file[0].enum_type[0].value[0], "number", 3),
    "x.S.Call (rpc .x.M to stream .x.M) was removed": lambda f: f.file[0].service[0].method.pop(),
    "now rpc .x.M to .x.M": lambda f: setattr(f.file[0].service[0].method[0], "server_streaming", False),
    "now rpc .x.O to": lambda f: setattr(f.file[0].service[0].method[0], "input_type", ".x.O"),
}


@pytest.mark.parametrize("sentence", BREAKING)
def test_a_breaking_change_is_found(sentence: str) -> None:
    changed = example()
    BREAKING[sentence](changed)
    assert any(sentence in line for line in protos.breaking_changes(example(), changed))


def test_additions_break_nobody() -> None:
    changed = example()
    message(changed).field.add(name="new", number=9, type=Field.TYPE_STRING)
    changed.file[0].message_type.add(name="New")
    changed.file[0].service[0].method.add(name="New", input_type=".x.M", output_type=".x.M")
    assert protos.breaking_changes(example(), changed) == []


def test_a_breaking_change_of_this_contract_is_found() -> None:
    changed = protos.current_contract()
    router = next(file for file in changed.file if file.name.endswith("router.proto"))
    next(m for m in router.message_type if m.name == "GenerateRequest").field[0].number = 99
    assert any("headway.v1.GenerateRequest" in s for s in protos.breaking_changes(protos.baseline_contract(), changed))
