"""Model folders: encoding, chat templates, and what is said when a file is missing or broken."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from headway.text.tokenizer import ByteTokenizer, TextError, load_tokenizer
from tests.text import models

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def folder(tmp_path: Path, tokenizer: Tokenizer, **config: Any) -> str:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return str(tmp_path)


def chat(tmp_path: Path, template: Any, content: str = "hi") -> str:
    path = folder(tmp_path, models.byte_level(), chat_template=template, bos_token={"content": "<s>"})
    return models.byte_level().decode(load_tokenizer(path).encode_chat([("user", content)]), skip_special_tokens=False)


def test_text_round_trip(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder(tmp_path, models.byte_level()))
    assert tokenizer.decode(tokenizer.encode("the café 😀")) == "the café 😀"
    detokenizer = tokenizer.detokenizer()
    assert "".join(map(detokenizer.push, tokenizer.encode("the café"))) == "the café"


def test_truncation_of_the_file_is_ignored(tmp_path: Path) -> None:
    raw = models.byte_level()
    raw.enable_truncation(4)
    raw.enable_padding(length=9)
    assert len(load_tokenizer(folder(tmp_path, raw)).encode("abcdefg")) == 7


def test_bos_is_added_once(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder(tmp_path, models.with_bos(models.byte_level()), bos_token="<s>"))
    bos = models.byte_level().token_to_id("<s>")
    assert tokenizer.encode("a")[0] == bos
    assert tokenizer.encode("<s>a") == tokenizer.encode("a")


def test_chat_has_one_bos_and_asks_for_the_assistant(tmp_path: Path) -> None:
    path = folder(tmp_path, models.with_bos(models.byte_level()), bos_token="<s>", chat_template=TEMPLATE)
    ids = load_tokenizer(path).encode_chat([("system", "be brief"), ("user", "hi")])
    text = models.byte_level().decode(ids, skip_special_tokens=False)
    assert text == "<s>[system]be brief[user]hi[assistant]"


def test_template_file_wins_and_special_tokens_map_counts(tmp_path: Path) -> None:
    path = folder(tmp_path, models.byte_level(), chat_template="from the config")
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}from the file")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    ids = load_tokenizer(path).encode_chat([("user", "hi")])
    assert models.byte_level().decode(ids, skip_special_tokens=False) == "</s>from the file"


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    assert chat(tmp_path, named) == "yes"


def test_helpers_of_templates(tmp_path: Path) -> None:
    template = "{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}{% break %}{% endfor %}"
    assert chat(tmp_path, template, "<é>") == '{"role": "user", "content": "<é>"}'
    assert chat(tmp_path, "{{ strftime_now('%Y') }}") == str(datetime.now().year)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles must alternate') }}", "{{ ''.__class__.__mro__ }}", "{{ messages[3].content.x }}"],
)
def test_a_template_may_refuse_but_never_escape(tmp_path: Path, template: str) -> None:
    with pytest.raises(TextError, match="chat template refuses"):
        chat(tmp_path, template)


def test_messages_cannot_be_changed_by_a_template(tmp_path: Path) -> None:
    with pytest.raises(TextError):
        chat(tmp_path, "{{ messages.append(1) }}")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("tokenizer.json", "{", "cannot be read as a tokenizer"),
        ("tokenizer.json", '{"version": "1.0"}', "cannot be read as a tokenizer"),
        ("tokenizer_config.json", "{", "is not valid JSON"),
        ("chat_template.jinja", "{% if %}", "chat template is not valid"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: str, sentence: str) -> None:
    path = folder(tmp_path, models.byte_level())
    (tmp_path / name).write_text(content)
    with pytest.raises(TextError, match=sentence):
        load_tokenizer(path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"no tokenizer\.json"):
        load_tokenizer(str(tmp_path / "nowhere"))
    tokenizer = load_tokenizer(folder(tmp_path, models.byte_level()))
    with pytest.raises(TextError, match="no chat template"):
        tokenizer.encode_chat([("user", "hi")])


def test_bad_text(tmp_path: Path) -> None:
    path = folder(tmp_path, models.byte_level(), chat_template=TEMPLATE)
    for tokenizer in (load_tokenizer(path), ByteTokenizer()):
        with pytest.raises(TextError, match="not valid Unicode"):
            tokenizer.encode("\ud800")
        with pytest.raises(TextError, match="no messages"):
            tokenizer.encode_chat([])


def test_byte_tokenizer() -> None:
    tokenizer = load_tokenizer("")
    assert tokenizer.encode("é") == [0xC3, 0xA9]
    assert tokenizer.decode([0xC3, 0xA9, 300]) == "é"
    first = tokenizer.encode_chat([("user", "hi")])
    assert bytes(first) == b"user: hi\nassistant: "
    second = tokenizer.encode_chat([("user", "hi"), ("assistant", "yes"), ("user", "why?")])
    assert second[: len(first)] == first
