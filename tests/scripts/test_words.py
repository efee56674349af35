"""What the scripts say: in the language of the locale, and during an install that goes on silently."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from script_project import ROOT, SETTINGS, Project, free_port, ready_project

CHINESE = re.compile("[\u4e00-\u9fff]")

#: Runs a command as an install, in an environment.
WATCH = """
import sys
from pathlib import Path
from residency.launch import environment
environment.REPORT_EVERY_S = environment.REWRITE_EVERY_S = 0.3
sys.exit(environment.watched("torch", Path(sys.argv[1]), ["bash", "-c", sys.argv[2]]))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return ready_project(tmp_path_factory.mktemp("words"))


@pytest.mark.parametrize(
    ("environ", "chinese"),
    [
        ({"LANG": "en_US.UTF-8"}, False),
        ({"LANG": "de_DE.UTF-8"}, False),
        ({"LANG": ""}, False),
        ({"LANG": "zh_CN.UTF-8"}, True),
        ({"LANG": "zh_TW"}, True),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "zh_CN.UTF-8"}, True),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, False),
    ],
    ids=str,
)
def test_lines_are_in_one_language(project: Project, environ: dict[str, str], chinese: bool) -> None:
    for arguments, code in ((["--check"], 0), (["--port", "http"], 1), (["status"], 3), (["--help"], 0)):
        got, said = project.run(*arguments, **environ)
        assert got == code, said
        lines = [line for line in said.splitlines() if "setlocale" not in line]
        assert lines
        if chinese:
            assert CHINESE.search(said)
            assert not re.search(r"would|is not a valid port|Nothing|address to listen", said, re.IGNORECASE), said
            assert " / " not in said
        else:
            assert not CHINESE.search(said), said


def test_a_whole_life_in_chinese(project: Project, tmp_path: Path) -> None:
    environ = {"LANG": "zh_CN.UTF-8", "PORT": str(free_port()), "RUN_DIR": str(tmp_path / "run")}
    said = [project.run(*words, **environ) for words in (["--detach", "--serve"], ["status"], ["restart"], ["stop"])]
    assert [code for code, _ in said] == [0, 0, 0, 0], said
    assert "已就绪：" in said[0][1]
    assert not re.search("Ready|Stopping|Runs|Starting", "".join(words for _, words in said))


@pytest.mark.parametrize(("lang", "words"), [("C.UTF-8", "is not a valid size"), ("zh_CN.UTF-8", "不是有效的大小")])
def test_what_the_app_would_refuse_is_told_in_one_language(tmp_path: Path, lang: str, words: str) -> None:
    project = Project(tmp_path / "project", tmp_path / "bin")
    project.take_the_real_parser()
    said = project.refuse("--check", "--simulate-gpu", "abc", LANG=lang)
    assert words in said
    assert ("is not a valid size" in said) != ("不是有效的大小" in said)


@pytest.mark.parametrize("lang", ["C.UTF-8", "zh_CN.UTF-8"])
def test_the_help_tells_every_setting_with_its_variable(project: Project, lang: str) -> None:
    said = project.run("--help", LANG=lang)[1]
    for name in SETTINGS - {"FOLLOW", "TORCH_INDEX_URL"}:
        assert f"--{name.lower().replace('_', '-')} " in said
        assert f" GPU_TTS_{name} " in said
    assert "TORCH_INDEX_URL" in said


#: Says something, then fetches and unpacks for a while without a word, as pip does.
SILENT = 'echo Collecting; head -c 9000000 /dev/zero >"$TMPDIR/fetched"; printf half; sleep 1; echo " line" >&2; exit 7'


def watched(tmp_path: Path, stdout: int) -> subprocess.Popen[bytes]:
    (tmp_path / "venv").mkdir()
    (tmp_path / "tmp").mkdir()
    return subprocess.Popen(
        [sys.executable, "-c", WATCH, tmp_path / "venv", SILENT], cwd=ROOT,
        env=os.environ | {"LC_ALL": "C", "TMPDIR": str(tmp_path / "tmp")}, stdout=stdout, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_a_log_gets_a_line_now_and_then(tmp_path: Path) -> None:
    process = watched(tmp_path, stdout=subprocess.PIPE)
    lines = process.communicate(timeout=30)[0].decode().splitlines()
    assert process.returncode == 7, "of what was run"
    assert (lines[0], lines[-1]) == ("Collecting", "half line"), lines
    assert 2 <= len(lines[1:-1]) <= 4
    assert all(re.fullmatch(r"Installing torch: \d+ s, (9|10) MB on the disk", line) for line in lines[1:-1]), lines
    assert not list((tmp_path / "tmp").iterdir()), "what was fetched is gone"


def test_in_a_terminal_one_line_is_rewritten(tmp_path: Path) -> None:
    ours, its = pty.openpty()
    process = watched(tmp_path, stdout=its)
    os.close(its)
    said = b""
    while part := _read(ours):
        said += part
    os.close(ours)
    assert process.wait(30) == 7
    rewritten = said.decode().split("\r\x1b[K")
    assert sum(re.fullmatch(r"Installing torch: .* on the disk", line) is not None for line in rewritten) >= 2, said
    assert said.decode().count("\n") == 2, "the install's own two lines"
    assert rewritten[-1] == "", "and nothing of it stays"


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # its other end is closed
        return b""


def test_an_install_is_watched(tmp_path: Path) -> None:
    """pip unpacks without a word, here because it is held up."""
    project = Project(tmp_path / "project", tmp_path / "bin")
    module = project.package / "launch" / "environment.py"
    module.write_text(module.read_text().replace("REPORT_EVERY_S = 10.0", "REPORT_EVERY_S = 0.3"))
    late = tmp_path / "late"
    late.mkdir()
    (late / "sitecustomize.py").write_text(
        "import sys, time\nif 'install' in sys.orig_argv and '-r' in sys.orig_argv: time.sleep(1)\n"
    )
    code, said = project.run(PYTHONPATH=str(late))
    assert code == 0, said
    assert re.search(rf"^Installing {project.requirements}: \d+ s, \d+ MB on the disk$", said, re.MULTILINE), said
    shutil.rmtree(late)
