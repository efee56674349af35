"""Writes the tables of flags, HTTP calls and fields into the pages in docs/, in both languages.

    python scripts/generate_docs.py            # write
    python scripts/generate_docs.py --check    # exit with 1 if a page is stale or a sentence has no translation

A table replaces the lines between ``<!-- generated: NAME -->`` and ``<!-- end -->``. Sentences come from the command
line parsers and from the OpenAPI description; docs/zh/translations.json has them in Chinese.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.pop("GPU_CONTROL_TOKEN", None)  # the default of --token would be written into the page

from gpu_manager import GPUResourceManager, SimulatedDevice  # noqa: E402
from residency.launch import command_line, options, settings  # noqa: E402
from residency.units import readable_bytes  # noqa: E402
from residency.web.api.control import build  # noqa: E402
from residency.web.server.permissions import Permissions  # noqa: E402

TRANSLATIONS = ROOT / "docs" / "zh" / "translations.json"
MARKED = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Translate = Callable[[str], str]


def app_flags(translate: Translate) -> str:
    return _flags(settings._parser({}), translate)


def launch_settings(translate: Translate) -> str:
    """Returns the start script's settings, which define their own Chinese sentences."""
    rows = [
        (f"`--{name.lower().replace('_', '-')}`", f"`GPU_TTS_{name}`", translate(setting.metadata["en"]))
        for name, setting in options.SETTINGS.items()
        if setting.metadata["en"]
    ]
    return _table(["Flag", "Variable", "Meaning"], rows, translate)


def shell_flags(translate: Translate) -> str:
    return _flags(command_line._parser(), translate)


def calls(translate: Translate) -> str:
    rows = [
        (f"`{method.upper()} {path}`", _body(call), " ".join(sorted(call["responses"])),
         translate(" ".join(call["description"].split())))
        for path, calls in _openapi()["paths"].items()
        for method, call in calls.items()
    ]  # fmt: skip
    return _table(["Call", "Body", "Status codes", "Meaning"], rows, translate)


def status_codes(translate: Translate) -> str:
    """Returns the meanings of codes other than 200."""
    meanings: dict[str, set[str]] = {}
    for calls in _openapi()["paths"].values():
        for call in calls.values():
            for code, response in call["responses"].items():
                meanings.setdefault(code, set()).add(response["description"])
    rows = [
        (code, " ".join(translate(meaning) for meaning in sorted(meanings[code])))
        for code in sorted(meanings)
        if code != "200"
    ]
    return _table(["Status code", "Meaning"], rows, translate)


def status_fields(translate: Translate) -> str:
    return _fields("Status", translate)


def event_fields(translate: Translate) -> str:
    return _fields("Event", translate)


TABLES = {
    each.__name__.replace("_", "-"): each
    for each in (app_flags, launch_settings, shell_flags, calls, status_codes, status_fields, event_fields)
}


def _flags(parser: argparse.ArgumentParser, translate: Translate) -> str:
    parts = []
    for group in parser._action_groups:
        rows = [
            (_flag(action), _default(action, translate), _meaning(action, translate))
            for action in group._group_actions
            if action.option_strings and action.help != argparse.SUPPRESS and action.dest != "help"
        ]
        if rows:
            title = "" if group.title == "options" else translate(group.title or "")
            heading = f"**{title[:1].upper()}{title[1:]}**\n\n" if title else ""
            parts.append(heading + _table(["Flag", "Default", "Meaning"], rows, translate))
    return "\n".join(parts)


def _flag(action: argparse.Action) -> str:
    values = "|".join(map(str, action.choices)) if action.choices else action.metavar or action.dest.upper()
    return f"`{action.option_strings[0]}{'' if action.nargs == 0 else f' {values}'}`"


def _default(action: argparse.Action, translate: Translate) -> str:
    match action.default:
        case None | "":
            return ""
        case False:
            return translate("off")
        case math.inf:
            return "-1"
        case int(nbytes) if action.metavar == "SIZE":
            return readable_bytes(nbytes).replace(" ", "").replace(".0", "")
        case float(number):
            return f"{number:g}"
    return f"{action.default}"


def _meaning(action: argparse.Action, translate: Translate) -> str:
    text = (action.help or "") % {"default": action.default}
    if action.default is not None:  # shown in a separate column
        text = re.sub(r"(; |^)?default: [^);]*", "", text)
        text = re.sub(r" ?\(\)", "", text)
    return translate(text) if text else ""


def _openapi() -> dict[str, Any]:
    with GPUResourceManager(SimulatedDevice(1 << 30)) as manager:
        return build(manager, Permissions(None)).openapi()


def _body(call: Mapping[str, Any]) -> str:
    """Returns an example of the request's JSON body."""
    if "requestBody" not in call:
        return ""
    properties = call["requestBody"]["content"]["application/json"]["schema"]["properties"]
    return f"`{json.dumps({name: schema['examples'][0] for name, schema in properties.items()})}`"


def _fields(schema: str, translate: Translate) -> str:
    schemas = _openapi()["components"]["schemas"]
    rows = [
        (f"`{path}`", kind, translate(" ".join(text.split())) if text else "")
        for path, kind, text in _flat(schemas[schema], schemas, "")
    ]
    return _table(["Field", "Type", "Meaning"], rows, translate)


def _flat(schema: Mapping[str, Any], schemas: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str, str]]:
    """Yields path, type and description of each field, followed by those of nested objects."""
    for name, field in schema["properties"].items():
        inner, kind = _resolve(field, schemas)
        path = f"{prefix}{name}"
        if not (inner and not field.get("description") and kind == "object"):
            yield path, kind, field.get("description", "")
        if inner:
            yield from _flat(inner, schemas, f"{path}{'.NAME' if kind == 'map' else ''}.")


def _resolve(field: Mapping[str, Any], schemas: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, str]:
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
    if isinstance(more := field.get("additionalProperties"), Mapping):
        return _resolve(more, schemas)[0], "map"
    return None, str(field.get("type", "any"))


def _table(head: list[str], rows: list[tuple[str, ...]], translate: Translate) -> str:
    lines = [[translate(cell) for cell in head], ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def generated(text: str, translate: Translate) -> str:
    return MARKED.sub(lambda match: f"{match[1]}\n{TABLES[match[2]](translate)}\n{match[3]}", text)


def stale_pages() -> tuple[dict[Path, str], list[str]]:
    """Returns new texts of stale pages, and sentences without a translation."""
    chinese: dict[str, str] = json.loads(TRANSLATIONS.read_text(encoding="utf-8"))
    chinese |= {setting.metadata["en"]: setting.metadata["zh"] for setting in options.SETTINGS.values()}
    missing: list[str] = []

    def translate(sentence: str) -> str:
        if sentence not in chinese and sentence not in missing:
            missing.append(sentence)
        return chinese.get(sentence, sentence)

    stale = {}
    for language, translated in (("en", str), ("zh", translate)):
        for path in sorted((ROOT / "docs" / language).glob("*.md")):
            text = path.read_text(encoding="utf-8")
            if (new := generated(text, translated)) != text:
                stale[path] = new
    return stale, missing


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the generated tables into the pages in docs/.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if something is stale")
    check = parser.parse_args().check
    stale, missing = stale_pages()
    for path, text in stale.items():
        print(f"{'stale' if check else 'written'}: {path.relative_to(ROOT)}")
        if not check:
            path.write_text(text, encoding="utf-8")
    for sentence in missing:
        print(f"no translation in {TRANSLATIONS.relative_to(ROOT)}: {sentence}")
    return 1 if missing or (check and stale) else 0


if __name__ == "__main__":
    sys.exit(main())
