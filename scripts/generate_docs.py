"""Writes the tables of flags, HTTP calls and fields into the pages in docs/, in both languages.

    python scripts/generate_docs.py            # write
    python scripts/generate_docs.py --check    # exit with 1 if a page is stale or a translation is missing or unused

A table replaces the lines between ``<!-- generated: NAME -->`` and ``<!-- end -->``. Sentences come from the command
line parsers and from the OpenAPI description; docs/zh/translations.json has them in Chinese.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
for secret in ("GPU_CONTROL_TOKEN", "GPU_TTS_API_KEY"):  # the default of a flag would be written into the page
    os.environ.pop(secret, None)

from gpu_manager import GPUResourceManager, SimulatedDevice  # noqa: E402
from residency.devices.checkpoint_transitions import ROWS, Operation, Remedy, Row  # noqa: E402
from residency.launch import command_line, infer, options, settings, speak  # noqa: E402
from residency.web.api import openai_schema  # noqa: E402
from residency.web.api.control import build  # noqa: E402
from residency.web.api.slots import Slots  # noqa: E402
from residency.web.api.speech_calls import SpeechCalls  # noqa: E402
from residency.web.server.api_keys import ApiKeys  # noqa: E402
from residency.web.server.permissions import Permissions  # noqa: E402
from residency.web.speech.queue import SpeechQueue  # noqa: E402
from residency.web.speech.recordings import Recordings  # noqa: E402
from residency.web.speech.service import SpeechService  # noqa: E402
from residency.web.speech.speaking import Speaker  # noqa: E402
from residency.web.speech.voices import VoiceStore  # noqa: E402

TRANSLATIONS = ROOT / "docs" / "zh" / "translations.json"
MARKED = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
DEFAULT = re.compile(r"(; | ?\(|^)default: ([^);,]*)[^);]*\)?")


Rows = list[tuple[Any, ...]]
"""The last cell is a list of sentences, which are translated; of the other cells, only "off" is."""


def flags(parser: argparse.ArgumentParser) -> list[tuple[str, Rows]]:
    """Returns the title and the rows of each group."""
    groups = {
        (group.title or "").replace("options", ""): [
            _flag(action)
            for action in group._group_actions
            if action.option_strings and argparse.SUPPRESS not in (action.help, action.default)
        ]
        for group in parser._action_groups
    }
    return [(title, rows) for title, rows in groups.items() if rows]


def _flag(action: argparse.Action) -> tuple[str, str, list[str]]:
    values = "|".join(map(str, action.choices or [])) or action.metavar or action.dest.upper()
    flag = f"`{action.option_strings[0]}{'' if action.nargs == 0 else f' {values}'}`"
    help = (action.help or "") % {"default": action.default}
    if action.default in (None, ""):
        return flag, "", [help]
    stated = DEFAULT.search(help)
    default = "off" if action.default is False else stated[2] if stated else str(action.default)
    return flag, default, [DEFAULT.sub(lambda found: ")" * (found[0][0] == ";" and found[0][-1] == ")"), help)]


def calls(paths: dict[str, Any]) -> Rows:
    return [
        (f"`{method.upper()} {path}`", _body(call), " ".join(sorted(call["responses"])), [_text(call)])
        for path, calls in paths.items()
        for method, call in calls.items()
    ]


def _body(call: dict[str, Any]) -> str:
    """Returns an example of the request's body: JSON, or the fields of a form."""
    if "requestBody" not in call:
        return ""
    (kind, content), *_ = call["requestBody"]["content"].items()
    properties = content["schema"]["properties"]
    if kind == "multipart/form-data":
        return " ".join(f"`{name}`" for name in properties)
    examples = {name: schema["examples"][0] for name, schema in properties.items() if "examples" in schema}
    return f"`{json.dumps(examples)}`"


def _text(described: dict[str, Any]) -> str:
    return " ".join(described.get("description", "").split())


def status_codes(paths: dict[str, Any]) -> Rows:
    """Returns the meanings of codes other than 200."""
    answers = [answer for calls in paths.values() for call in calls.values() for answer in call["responses"].items()]
    codes = sorted({code for code, _ in answers} - {"200"})
    return [(code, sorted({response["description"] for each, response in answers if each == code})) for code in codes]


def _rows(schema: dict[str, Any], schemas: dict[str, Any], prefix: str) -> Iterator[tuple[str, str, list[str]]]:
    """Yields path, type and description of each field, followed by those of nested objects."""
    for name, field in schema["properties"].items():
        inner, kind = _resolve(field, schemas)
        path = f"{prefix}{name}"
        if not (inner and not field.get("description") and kind == "object"):
            yield f"`{path}`", kind, [_text(field)]
        if inner:
            yield from _rows(inner, schemas, f"{path}{'.NAME' if kind == 'map' else ''}.")


def _resolve(field: dict[str, Any], schemas: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """Returns the schema of the objects in a field, if any, and its type in words."""
    if "$ref" in field:
        return schemas[field["$ref"].rpartition("/")[2]], "object"
    if "anyOf" in field:
        resolved = [_resolve(option, schemas) for option in field["anyOf"]]
        return next((inner for inner, _ in resolved if inner), None), " or ".join(kind for _, kind in resolved)
    if "enum" in field or "const" in field:
        return None, " ".join(f"`{json.dumps(value)}`" for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        inner, kind = _resolve(field.get("items", {}), schemas)
        return inner, f"list of {kind}"
    if isinstance(more := field.get("additionalProperties"), dict):
        return _resolve(more, schemas)[0], "map"
    return None, str(field.get("type", "any"))


def transitions(operation: Operation) -> Rows:
    return [
        (
            f"`{row.before}`",
            f"`{row.call}`",
            "`done`" if row.outcome == "done" else "`error`",
            f"`{row.after}`",
            [_then(row)],
        )
        for row in ROWS
        if row.operation == operation
    ]


def _then(row: Row) -> str:
    if isinstance(row.then, Remedy):
        return f"Raises an error: {row.then.value.en}."
    return f"Calls `{row.then}`." if row.then else "Returns."


def tables() -> dict[str, tuple[list[str], list[tuple[str, Rows]]]]:
    """Returns the head of each table, and the title and the rows of its groups."""
    with GPUResourceManager(SimulatedDevice(1 << 30)) as manager:
        api = build(manager, Permissions(None), speech=speech_calls()).openapi()
    schemas = api["components"]["schemas"]
    speech = {path: calls for path, calls in api["paths"].items() if path.startswith("/v1/")}
    paths = {path: calls for path, calls in api["paths"].items() if path not in speech}
    fields = openai_schema.Speech.model_json_schema()
    launch = [
        (f"`--{name.lower().replace('_', '-')}`", f"`GPU_TTS_{name}`", [setting.metadata["en"]])
        for name, setting in options.SETTINGS.items()
        if setting.metadata["en"]
    ]
    checkpoints = [("checkpoint", transitions("checkpoint")), ("restore", transitions("restore"))]
    flag, field = ["Flag", "Default", "Meaning"], ["Field", "Type", "Meaning"]
    return {
        "app-flags": (flag, flags(settings._parser({}))),
        "launch-settings": (["Flag", "Variable", "Meaning"], [("", launch)]),
        "shell-flags": (flag, flags(command_line._parser())),
        "speak-flags": (flag, flags(speak._parser())),
        "infer-flags": (flag, flags(infer._parser())),
        "calls": (["Call", "Body", "Status codes", "Meaning"], [("", calls(paths))]),
        "speech-calls": (["Call", "Body", "Status codes", "Meaning"], [("", calls(speech))]),
        "speech-fields": (field, [("", list(_rows(fields, fields["$defs"], "")))]),
        "speech-status-codes": (["Status code", "Meaning"], [("", status_codes(speech))]),
        "status-codes": (["Status code", "Meaning"], [("", status_codes(paths))]),
        "status-fields": (field, [("", list(_rows(schemas["Status"], schemas, "")))]),
        "checkpoint-transitions": (["State", "Call", "Outcome", "State after", "What follows"], checkpoints),
        "event-fields": (field, [("", list(_rows(schemas["Event"], schemas, "")))]),
    }


def speech_calls() -> SpeechCalls:
    """Returns the calls under ``/v1`` without an engine, for their descriptions."""
    recordings = Recordings(ROOT)
    service = SpeechService(None, {}, recordings)
    keys = ApiKeys((), Permissions(None))
    speaker = Speaker(service, VoiceStore(ROOT))
    return SpeechCalls(service, speaker, recordings, keys, "builtin", Slots(1), SpeechQueue("tts").watching, float)


def formatted(head: list[str], groups: list[tuple[str, Rows]], translate: Callable[[str], str]) -> str:
    """Formats tables in Markdown."""
    parts = []
    for title, rows in groups:
        lines = [map(translate, head), ["---"] * len(head)]
        lines += [
            [*(translate(cell) if cell == "off" else cell for cell in row[:-1]), " ".join(map(translate, row[-1]))]
            for row in rows
        ]
        title = translate(title)
        heading = f"**{title[:1].upper()}{title[1:]}**\n\n" if title else ""
        parts.append(
            heading
            + "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
        )
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the generated tables into the pages in docs/.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if something is stale")
    check = parser.parse_args().check
    translations = json.loads(TRANSLATIONS.read_text(encoding="utf-8"))
    chinese = translations | {"": ""}
    chinese |= {setting.metadata["en"]: setting.metadata["zh"] for setting in options.SETTINGS.values()}
    chinese |= {f"Raises an error: {each.value.en}.": f"报错：{each.value.zh}。" for each in Remedy}
    found, missing, unused, stale = tables(), set[str](), set(translations), False

    def in_chinese(sentence: str) -> str:
        unused.discard(sentence)
        if sentence not in chinese:
            missing.add(sentence)
        return chinese.get(sentence, sentence)

    for language, translate in (("en", str), ("zh", in_chinese)):
        texts = {name: formatted(*found[name], translate) for name in found}
        for path in sorted((ROOT / "docs" / language).glob("*.md")):
            text = path.read_text(encoding="utf-8")
            new = MARKED.sub(lambda match, texts=texts: f"{match[1]}\n{texts[match[2]]}\n{match[3]}", text)
            if new != text:
                stale = True
                print(f"{'stale' if check else 'written'}: {path.relative_to(ROOT)}")
                if not check:
                    path.write_text(new, encoding="utf-8")
    for sentence in sorted(missing):
        print(f"no translation in {TRANSLATIONS.relative_to(ROOT)}: {sentence}")
    for sentence in sorted(unused):
        print(f"not used in {TRANSLATIONS.relative_to(ROOT)}: {sentence}")
    return 1 if missing or (check and (stale or unused)) else 0


if __name__ == "__main__":
    sys.exit(main())
