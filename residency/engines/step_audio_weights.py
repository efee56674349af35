"""Checks that local weights of Step-Audio-EditX are complete; errors contain the download command."""

from __future__ import annotations

import json
import shlex
import zipfile
from collections.abc import Sequence
from pathlib import Path

from ..errors import EngineUnavailable, InvalidInput
from ..sentences import Sentence
from . import step_audio_facts as facts
from .generations import TRANSFORMERS, Generation

_GIT_LFS_POINTER = b"version https://git-lfs"


def check_weights(
    model_path: str,
    *,
    generation: Generation = TRANSFORMERS,
    model_source: str = "auto",
    tts_model_id: str | None = None,
    **flags: str | None,
) -> None:
    """Raises `EngineUnavailable` if local weights are missing, truncated, or git-lfs pointers.

    ``flags``: ``quantization``, ``tokenizer_model_id`` and ``tokenizer_path`` of the app; None: not given.
    """
    tokenizer, model = generation.folders(model_path, model_source, flags)
    if _is_local(flags.get("tokenizer_path") or model_path, model_source):
        _check_tokenizer(Path(tokenizer), flags.get("tokenizer_model_id") or facts.ACOUSTIC_MODEL)
    check_model(tts_model_id or model, model_source=model_source, quantization=flags.get("quantization"))


def check_model(model: str, *, model_source: str = "auto", quantization: str | None = None) -> None:
    """Does the same for the folder with the language model and the vocoder only."""
    if _is_local(model, model_source):
        folder = Path(model)
        wanted = [*facts.MODEL_FILES, *_shards(folder), *facts.VOCODER_FILES]
        repository = facts.MODEL_BY_QUANTIZATION.get(quantization or "", facts.MODEL)
        _check_files(folder, wanted, _download(repository, folder))


def from_a_hub(model_path: str, model_source: str, generation: Generation) -> Sentence | None:
    """Returns a notice if ``model_source="auto"`` takes a path as a hub id, because no such folder exists.

    Raises `InvalidInput` if a hub has no such ids for this generation.
    """
    path = Path(model_path)
    if model_source == "local" or path.is_absolute() or (model_source == "auto" and path.exists()):
        return None
    if model_path.count("/") != generation.hub_id.count("/"):
        raise InvalidInput(
            f"--model-path {model_path} is no folder here ({Path.cwd()}), and no id like {generation.hub_id}, which "
            f"{generation.name} takes: give one of these",
            f"--model-path {model_path} 在此处（{Path.cwd()}）不是目录，也不是 {generation.name_zh}所用的 "
            f"{generation.hub_id} 之类的 ID：请指定其中之一",
        )
    if model_source != "auto":
        return None
    return Sentence(
        f"{model_path} is not a folder here ({Path.cwd()}): the weights come from Hugging Face, {model_path}/..., with "
        f"the first request",
        f"此处（{Path.cwd()}）没有目录 {model_path}：首次请求时将从 Hugging Face 下载权重 {model_path}/...",
    )


def _is_local(path: str, source: str) -> bool:
    """Returns whether the checkout loads from this machine, by the checkout's own rule."""
    absolute = Path(path).is_absolute()
    if source in ("huggingface", "modelscope") and absolute:
        raise EngineUnavailable(
            f"{path} is a folder, and --model-source {source} takes the id of a repository: leave --model-source out, "
            f"or give an id such as stepfun-ai",
            f"{path} 是目录，而 --model-source {source} 需要模型仓库 ID：请去掉 --model-source，"
            f"或给出 stepfun-ai 之类的 ID",
        )
    return source == "local" or (source == "auto" and (absolute or Path(path).exists()))


def _check_tokenizer(folder: Path, acoustic_model: str) -> None:
    get = _download(facts.TOKENIZER, folder)
    _check_files(folder, facts.TOKENIZER_FILES, get)
    names = dict(facts.ACOUSTIC_FILES)
    configuration = folder / acoustic_model / "configuration.json"
    if configuration.is_file():
        named = _read(configuration).get("file_path_metas", {})
        names.update({key: name for key, name in named.items() if key in names})
    if acoustic_model != facts.ACOUSTIC_MODEL:
        get = Sentence("put it there, or leave --tokenizer-model-id out", "放到该处，或去掉 --tokenizer-model-id")
    _check_files(folder, [f"{acoustic_model}/{name}" for name in names.values()], get)


def _shards(folder: Path) -> list[str]:
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            return sorted(set(_read(folder / index).get("weight_map", {}).values()))
    whole = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    return [] if whole else ["model.safetensors"]


def _read(file: Path) -> dict[str, dict[str, str]]:
    try:
        content: dict[str, dict[str, str]] = json.loads(file.read_bytes())
    except ValueError as error:
        raise EngineUnavailable(
            f"{file} is damaged ({error}): remove it and download it again",
            f"{file} 已损坏（{error}）：请删除后重新下载",
        ) from error
    return content


def _check_files(folder: Path, wanted: Sequence[str], get: Sentence) -> None:
    if missing := ", ".join(name for name in wanted if not (folder / name).exists()):
        what = Sentence.of(missing) if folder.is_dir() else Sentence("the whole folder", "整个目录")
        raise EngineUnavailable(
            f"The weights in {folder} are missing or incomplete ({what.en}): {get.en}",
            f"{folder} 中的权重缺失或不完整（{what.zh}）：请 {get.zh}",
        )
    files = [file for file in [*(folder / name for name in wanted), *folder.glob("*.safetensors")] if file.is_file()]
    if pointers := _names(folder, [file for file in files if _begins_with(file, _GIT_LFS_POINTER)]):
        pull = f"git lfs install && git -C {shlex.quote(str(folder))} lfs pull"
        raise EngineUnavailable(
            f"The weights in {folder} were cloned without git-lfs ({pointers} contain only a reference): {pull}",
            f"{folder} 中的权重是在没有 git-lfs 的情况下克隆的（{pointers} 只是引用）：请 {pull}",
        )
    if truncated := _names(folder, list(filter(_is_truncated, files))):
        raise EngineUnavailable(
            f"The weights in {folder} were not downloaded completely ({truncated}): remove these files, and {get.en}",
            f"{folder} 中的权重没有下载完整（{truncated}）：请删除这些文件，然后 {get.zh}",
        )


def _names(folder: Path, files: Sequence[Path]) -> str:
    return ", ".join(dict.fromkeys(str(file.relative_to(folder)) for file in files))


def _download(repository: str, folder: Path) -> Sentence:
    return Sentence.of(f"hf download {facts.HUB}/{repository} --local-dir {shlex.quote(str(folder))}")


def _begins_with(file: Path, beginning: bytes) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(beginning)) == beginning


def _is_truncated(file: Path) -> bool:
    """Detects truncation: by the length in a safetensors header, or a missing end of torch's zip files."""
    if file.suffix == ".pt":
        return _begins_with(file, b"PK") and not zipfile.is_zipfile(file)
    if file.suffix != ".safetensors":
        return False
    with file.open("rb") as opened:
        header_bytes = int.from_bytes(opened.read(8), "little")
        header = opened.read(header_bytes) if header_bytes < 1 << 27 else b""
    try:
        ends = [tensor["data_offsets"][1] for name, tensor in json.loads(header).items() if name != "__metadata__"]
    except ValueError:
        return True
    return file.stat().st_size < 8 + header_bytes + max(ends, default=0)
