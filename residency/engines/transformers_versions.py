"""Versions of transformers with which a generation of Step-Audio-EditX is known to fail, and the remedies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from packaging.version import Version

from ..errors import EngineUnavailable, pip_install
from ..sentences import Sentence
from .checkout import Unmet, installed_version, requirements
from .generations import VLLM, Generation


def check_head(engine: Any) -> None:
    """Raises `EngineUnavailable` if the output layer of the language model lacks the weights that it should share."""
    llm: Any = getattr(engine, "llm", None)
    if not getattr(getattr(llm, "config", None), "tie_word_embeddings", False):
        return
    words, head = llm.get_input_embeddings(), llm.get_output_embeddings()
    if head is not None and head.weight.data_ptr() != words.weight.data_ptr():
        version = installed_version("transformers")
        raise EngineUnavailable(
            f"transformers {version} does not tie the output layer of this language model to its "
            f"embeddings; it would hum or stay silent. Run {_older_transformers()}",
            f"transformers {version} 没有将该语言模型的输出层与词嵌入绑定，合成结果会是噪声或静音。"
            f"请运行 {_older_transformers()}",
        )


def _older_transformers() -> str:
    return f"{pip_install()} transformers==4.53.3"


def unsuitable_transformers(checkout: Path, generation: Generation, packages: Unmet) -> list[Sentence]:
    """Warns of versions of transformers with which the code of the checkout is known to fail."""
    if generation is VLLM:  # no upper limit in its pyproject.toml; its uv.lock has 4.57.6
        version = installed_version("transformers") or "0"
        used = any(requirement.name == "transformers" for requirement in requirements(checkout))
        return [_other_templates(version)] if used and Version(version) >= Version("5") else []
    # Only where the checkout requires another version.
    version = next((found for name, found in packages.items() if found and name.startswith("transformers")), "0")
    if Version(version) < Version("4.54"):
        return []
    return [
        Sentence(
            f"With transformers {version} this Step-Audio-EditX is known to hum or stay silent. "
            f"Run {_older_transformers()}",
            f"已知此版 Step-Audio-EditX 在 transformers {version} 下只输出噪声或静音。请运行 {_older_transformers()}",
        )
    ]


def _other_templates(version: str) -> Sentence:
    install = f"{pip_install()} 'transformers>=4.57.3,<5'"
    return Sentence(
        f"With transformers {version} each request of this Step-Audio-EditX fails: from version 5 its chat template "
        f"returns a dictionary instead of tokens. Run {install}",
        f"此版 Step-Audio-EditX 在 transformers {version} 下每个请求都会失败：从第 5 版起，其对话模板返回字典而不是 "
        f"token。请运行 {install}",
    )
