"""Every command in a block of the documents is run as it stands there: for real, but for what would change the machine.

A chapter's commands run one after the other in one folder. Docker is a stand-in that answers as the real one does;
sudo, systemctl, journalctl, ray, serve and kubectl only look at what they are given; of tests it is only looked whether
they are there. Of commands and files that a sentence names in passing it is looked whether they are there and know
their flags.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path

import pytest
from fork_server import ForkedProcess
from miniature_checkout import CHECKOUT, make_recording, make_weights
from script_project import OTHERS, ROOT, SETTINGS, environment_like_ours, free_port, hide_programs

from gpu_manager import GPUResourceManager, Sharing, SimulatedDevice
from residency.web.api.metrics import exposition
from residency.web.speech.sample_voices import VOICES
from residency.web.ui.guidance import VERIFIED

#: A page in English and its Chinese translation.
PAIRS = [
    ("README.md", "README_CN.md"),
    ("GPU_MANAGEMENT.md", "GPU_MANAGEMENT_CN.md"),
    *((f"docs/en/{page.name}", f"docs/zh/{page.name}") for page in sorted((ROOT / "docs" / "en").glob("*.md"))),
]
GUIDES = PAIRS[1:]
DOCUMENTS = [*itertools.chain(*zip(*PAIRS, strict=True)), "examples/README.md"]
COPIED = [
    "*.py",
    "*.sh",
    "*.toml",
    "*.yaml",
    "*.txt",
    "Dockerfile",
    "LICENSE",
    "README.md",
    "residency",
    "scripts",
    "examples",
    "deploy",
]
#: Starts the app in the terminal, and so does not end by itself.
FOREGROUND = re.compile(r"start_with_gpu_management\.sh( --simulate-gpu \S+)?$")

STAND_INS = {
    "docker": f'exec "{sys.executable}" -S "{ROOT}/tests/scripts/fake_docker.py" "$@"',
    "sudo": """
[[ $1 != mkdir ]] || exit 0
[[ $1 != tar ]] || exec tar -tf - >/dev/null  # it is unpacked nowhere, but must be something
[[ $1 == cp ]] || exec "$@"
shift
for file in "${@:1:$#-1}"; do  # a copy goes nowhere, but must be of something
    [[ $file == -r || -e ${file/#\\/opt\\/gpu-managed-tts/$PWD} ]] || exit 1
done""",
    "systemctl": "[[ $* == daemon-reload || ($* == *gpu-managed-tts && -e examples/gpu-managed-tts.service) ]]",
    "ffplay": "[[ $(head --bytes 4) == RIFF ]] && cat >/dev/null",
    "journalctl": "[[ $* == *'--unit gpu-managed-tts'* ]]",
    "ray": "[[ $1 == start ]]",
    "serve": "[[ $1 == status || ($1 == deploy && -e $2) ]]",
    "kubectl": '[[ $1 == get || "$1 $2" == "create secret" || ($1 == apply && -e ${@: -1}) ]]',
}


#: Looks whether it could be done.
PIP = f"""#!/bin/sh
[ "$1" != uninstall ] || exec {sys.executable} -m pip show -q pip
exec {sys.executable} -m pip "$@" --dry-run --no-deps --no-build-isolation --no-index
"""


def chapters(document: str) -> Iterator[tuple[str, list[str]]]:
    """The headings of the second level that have commands, and these."""
    text = (ROOT / document).read_text(encoding="utf-8")
    for chapter in re.split(r"^## ", text, flags=re.MULTILINE):
        blocks = re.findall(r"^( *)```bash\n(.*?)^ *```", chapter, re.MULTILINE | re.DOTALL)
        commands = [
            line.removeprefix(indent) for indent, block in blocks for line in block.splitlines() if line.strip()
        ]
        if commands:
            yield chapter.partition("\n")[0], commands


def to_be_typed() -> dict[str, list[str]]:
    """The commands by chapter. Of chapters in Chinese only those that are not in the English ones."""
    found: dict[str, list[str]] = {}
    for document in DOCUMENTS:
        for heading, commands in chapters(document):
            if not heading.isascii():
                commands = [command for command in commands if command not in itertools.chain(*found.values())]
            if commands:
                found[f"{document}: {heading}"] = commands
    return found


CHAPTERS = to_be_typed()


class Shell:
    """A folder with a copy of the project, in which a reader types what is written."""

    def __init__(self, folder: Path) -> None:
        self.project = folder / "project"
        self.project.mkdir()
        for path in itertools.chain.from_iterable(map(ROOT.glob, COPIED)):
            if path.is_dir():
                shutil.copytree(path, self.project / path.name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, self.project)
        environment_like_ours(self.project / ".venv")
        (self.project / "scripts" / "test").write_text("#!/bin/sh\nexec .venv/bin/python -m pytest --version\n")
        self.models, self.checkout = folder / "models", folder / "Step-Audio-EditX"
        make_weights(self.models)
        shutil.copytree(CHECKOUT, self.checkout)
        (self.checkout / "Dockerfile").touch()
        environment_like_ours(self.checkout / ".venv")
        pip = self.checkout / ".venv" / "bin" / "pip"
        pip.write_text(PIP)
        pip.chmod(0o755)
        stand_ins = folder / "bin"
        stand_ins.mkdir()
        for name, script in STAND_INS.items():
            (stand_ins / name).write_text(f"#!/bin/bash\n{script}\n")
            (stand_ins / name).chmod(0o755)
        (folder / "docker").mkdir()
        self.repository = folder / "repository"
        subprocess.run(["git", "init", "--quiet", "--bare", self.repository], check=True)
        self.port, self.other_port = str(free_port()), str(free_port())
        self.environ = {name: value for name, value in os.environ.items() if name not in SETTINGS | OTHERS} | {
            "PATH": f"{stand_ins}:{hide_programs({'nvidia-smi'}, stand_ins)}",
            "PORT": self.port,
            "FAKE_DOCKER": str(folder / "docker"),
        }

    def type(self, command: str) -> str:
        """What is written, with the places of this machine, until it ends, or serves."""
        for written, here in {
            "REPOSITORY-URL": str(self.repository),
            "/models": str(self.models),
            "/opt/Step-Audio-EditX": str(self.checkout),
            ":7860": f":{self.port}",
            "--port 7861": f"--port {self.other_port}",
            "python test_gpu_management.py": "python -m pytest --collect-only -q test_gpu_management.py",
            "curl -s": "curl -fs",  # an error is a failure
            "curl -fsN": "timeout 1 curl -fsN",  # of events, which do not end
        }.items():
            command = command.replace(written, here)
        if "-m gpu_manager" in command:
            command += f" --url http://127.0.0.1:{self.port}"
        if FOREGROUND.search(command):
            return self._serve(command)
        done = self.run(command)
        assert done.returncode == 0 or ("timeout" in command and done.returncode == 124), done.stdout
        return done.stdout

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", command], cwd=self.project, env=self.environ, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False,
        )  # fmt: skip

    def _serve(self, command: str) -> str:
        process = subprocess.Popen(
            ["bash", "-c", f"exec env {command}"], cwd=self.project, env=self.environ, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert process.stdout
        said = ""
        for line in process.stdout:
            said += line
            if "Ready: " in line:
                break
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=60)
        assert "Ready: " in said, said + rest
        assert process.returncode == 0, said + rest
        return said

    def close(self) -> None:
        for port in (self.port, self.other_port):
            self.run(f"./start_with_gpu_management.sh stop --port {port}")
        for state in (self.project.parent / "docker").glob("state.json"):
            for pid in re.findall(r'"pid": (\d+)', state.read_text()):
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    with closing(Shell(tmp_path)) as shell:
        yield shell


@pytest.fixture(scope="module")
def shell_with_an_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    with closing(Shell(tmp_path_factory.mktemp("shell"))) as shell:
        shell.type("./start_with_gpu_management.sh --detach --simulate-gpu 48GB")
        yield shell


@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="needs this project's packages in a virtual environment")
@pytest.mark.parametrize("commands", CHAPTERS.values(), ids=CHAPTERS)
def test_what_is_written_can_be_typed(request: pytest.FixtureRequest, commands: list[str]) -> None:
    asks_an_app = "curl" in commands[0] or "-m gpu_manager" in commands[0]
    shell: Shell = request.getfixturevalue("shell_with_an_app" if asks_an_app else "shell")
    for command in commands:
        shell.type(command)


def test_the_documents_have_commands() -> None:
    assert {name.partition(":")[0] for name in CHAPTERS} >= {
        "README.md",
        "GPU_MANAGEMENT.md",
        "docs/en/deployment.md",
        "docs/en/http-api.md",
    }
    assert len(CHAPTERS) >= 8


def named_in_passing() -> set[str]:
    """Commands of this project, and its files, in the sentences of the documents; not those of others (docker, pip)."""
    found = set()
    for document in [*DOCUMENTS, "CONTRIBUTING.md"]:
        text = re.sub(r"^ *```.*?^ *```", "", (ROOT / document).read_text(encoding="utf-8"), flags=re.M | re.S)
        for words in re.findall(r"`([^`]+)`", text):
            command = " ".join(word for word in words.split() if not re.match(r"[A-Z_]+=", word))
            if re.match(r"(\.venv/bin/)?python \S|(\./)?(start_with\S+|(scripts|tests|benchmarks|\.ci)/\S+)", command):
                found.add(command)
    return found


#: Runs what is given as to ``python``: ``-m`` and a module, or a file, and its arguments.
PROGRAM = """
import os, runpy, sys
if sys.argv[1] == "-m":
    del sys.argv[:2]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def forked(
    script: str, *arguments: str, cwd: Path = ROOT, paths: Sequence[Path] = (), **environ: str
) -> tuple[int, str]:
    """The exit code and the output of a program in a process of its own."""
    process = ForkedProcess(script, arguments, {**os.environ, **environ}, cwd, paths)
    with process.stdout:
        output = process.stdout.read()
    return process.wait(timeout=120), output


@pytest.mark.parametrize("command", sorted(named_in_passing()))
def test_what_is_named_in_passing_is_there(command: str) -> None:
    program, *arguments = shlex.split(command)
    if "python" not in program:
        assert (ROOT / program).exists()
        assert "scripts/" not in program or os.access(ROOT / program, os.X_OK)
        return
    start = 2 if arguments[0] == "-m" else 1
    start += arguments[start : start + 1] == ["speak"]  # has flags and help of its own
    if arguments[:2] == ["-m", "pytest"]:
        asked = [*arguments, "--collect-only", "-q"]
    elif arguments == ["test_gpu_management.py"]:
        asked = ["-m", "pytest", "--collect-only", "-q", *arguments]
    else:
        asked = [*arguments[:start], "--help"]
    code, output = forked(PROGRAM, *asked)
    assert code == 0, output
    if "--help" in asked:
        known = set(re.findall(r"[\w-]+", output))
        named = re.findall(r"--[\w-]+|\w+(?=\|)|(?<=\|)\w+", " ".join(arguments[start:]))
        assert set(named) <= known


@pytest.mark.parametrize("document", [*DOCUMENTS, "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"])
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (ROOT / document).parent / path if path else ROOT / document
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def anchors(file: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(text: str, *kinds: str) -> list[str]:
    return re.findall(rf"^ *```(?:{'|'.join(kinds)})\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)


def readme_snippets() -> dict[str, str]:
    return {
        f"{name} {number}": code
        for name in ("README.md", "README_CN.md")
        for number, code in enumerate(blocks((ROOT / name).read_text(encoding="utf-8"), "python"), 1)
    }


@pytest.mark.parametrize("code", readme_snippets().values(), ids=readme_snippets())
def test_python_in_the_readme_runs_as_printed(code: str, tmp_path: Path) -> None:
    """In this folder; what is of Step-Audio-EditX, with a checkout and weights in miniature."""
    if real := "/models" in code:
        make_weights(tmp_path)
        make_recording(tmp_path / "prompt.wav")
        code = code.replace("/models", str(tmp_path))
        code = "from cuda_on_cpu import pretend_cuda\npretend_cuda()\n" + code
    code += "\nif 'audio' in globals(): assert audio.shape[1] > sample_rate / 4"
    exit_code, output = forked(
        code, cwd=tmp_path if real else ROOT, paths=(ROOT, ROOT / "tests" / "support"), STEP_AUDIO_ROOT=str(CHECKOUT)
    )
    assert exit_code == 0, output


@pytest.mark.parametrize("document", ["docs/en/engines.md", "docs/zh/engines.md"])
def test_the_example_of_objects_that_move_themselves_runs(document: str) -> None:
    (code,) = blocks((ROOT / document).read_text(encoding="utf-8"), "python")
    exit_code, output = forked(code, paths=(ROOT,))
    assert exit_code == 0, output
    assert "['main memory', 'main memory']\nnowhere\n" in output


def test_the_readme_gives_the_words_that_its_recording_says() -> None:
    for document in ("README.md", "README_CN.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        for sample in re.findall(r"residency/web/static/samples/(\w+)\.flac", text):
            assert f'said = "{VOICES[sample].says}"' in text


@pytest.mark.parametrize("document", ["README.md", "README_CN.md"])
def test_the_readme_says_how_to_start_without_management_and_for_this_machine_only(document: str) -> None:
    start, use = re.split(r"^## ", (ROOT / document).read_text(encoding="utf-8"), flags=re.MULTILINE)[1:3]
    assert "`.venv/bin/python app.py`" in start
    assert "`.venv/bin/python app.py --server-name 127.0.0.1`" in start
    assert "--url http://127.0.0.1:7861" in use
    assert "2.08" in use


def test_what_was_verified_is_said_near_the_top_of_the_readme_as_in_the_help() -> None:
    for document, sentence in zip(("README_CN.md", "README.md"), VERIFIED, strict=True):
        top = (ROOT / document).read_text(encoding="utf-8").partition("\n## ")[0]
        assert sentence in top.splitlines()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_in_the_documents_is_python(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for code in re.findall(r"^ *```python\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        compile(code, document, "exec")


def shape(text: str) -> list[str]:
    """Levels of headings, rows of tables with their columns, items of lists."""
    plain = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL).replace("\\|", "")
    return [
        match[1] + str(line.count("|"))
        for line in plain.splitlines()
        if (match := re.match(r"(#+ |\||- |\d+\. )", line)) and not line.startswith("- [")
    ]


def test_pages_of_both_languages_have_the_same_names() -> None:
    english, chinese = ({path.name for path in (ROOT / "docs" / language).glob("*.md")} for language in ("en", "zh"))
    assert english == chinese
    assert len(english) >= 10


@pytest.mark.parametrize("pair", GUIDES, ids=[english for english, _ in GUIDES])
def test_both_languages_of_a_page_have_the_same_chapters_tables_and_commands(pair: tuple[str, str]) -> None:
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in pair)
    assert shape(english) == shape(chinese)
    assert blocks(english, "bash", "diff", "json") == blocks(chinese, "bash", "diff", "json")
    assert len(blocks(english, "python")) == len(blocks(chinese, "python"))
    plain = re.sub(r"^ *```.*?^ *```", "", chinese, flags=re.MULTILINE | re.DOTALL)
    assert all(re.search(r"[\u4e00-\u9fff]", heading) for heading in re.findall(r"^#+ (.*)$", plain, re.MULTILINE))


def links(document: str) -> set[Path]:
    """The files to which a document links."""
    text = (ROOT / document).read_text(encoding="utf-8")
    found = (target.partition("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target)
    return {((ROOT / document).parent / path).resolve() for path in found if path}


@pytest.mark.parametrize("pair", PAIRS, ids=[english for english, _ in PAIRS])
def test_both_languages_of_a_page_link_to_each_other(pair: tuple[str, str]) -> None:
    english, chinese = pair
    assert ROOT / chinese in links(english)
    assert ROOT / english in links(chinese)


def test_the_guides_link_to_every_page_of_their_language() -> None:
    for guide, language in (("GPU_MANAGEMENT.md", "en"), ("GPU_MANAGEMENT_CN.md", "zh")):
        assert set((ROOT / "docs" / language).glob("*.md")) <= links(guide)


def test_the_guides_are_short() -> None:
    for guide in ("GPU_MANAGEMENT.md", "GPU_MANAGEMENT_CN.md"):
        assert len((ROOT / guide).read_text(encoding="utf-8").splitlines()) <= 300


@pytest.mark.parametrize("document", DOCUMENTS)
def test_tests_that_a_document_names_exist(document: str) -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / document).read_text(encoding="utf-8")))
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert not {name for name in named if f"def {name}(" not in tests and not (ROOT / f"{name}.py").exists()}


def test_generated_tables_are_up_to_date() -> None:
    code, output = forked(PROGRAM, "scripts/generate_docs.py", "--check")
    assert code == 0, f"run python scripts/generate_docs.py:\n{output}"
    for name in re.findall(r"<!-- generated: (.*) -->", (ROOT / "docs/en/configuration.md").read_text()):
        assert f"<!-- generated: {name} -->\n\n" in (ROOT / "docs/zh/configuration.md").read_text(encoding="utf-8")


def test_a_stale_table_and_a_missing_translation_are_found(tmp_path: Path) -> None:
    for name in ("scripts", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    page = tmp_path / "docs" / "zh" / "http-api.md"
    page.write_text(page.read_text(encoding="utf-8").replace("`GET /readyz`", "`GET /ready`"), encoding="utf-8")
    translations = tmp_path / "docs" / "zh" / "translations.json"
    translations.write_text(translations.read_text(encoding="utf-8").replace('"Flag":', '"Flags":'), encoding="utf-8")
    code, output = forked(PROGRAM, "scripts/generate_docs.py", "--check", cwd=tmp_path, paths=[ROOT])
    assert code == 1
    assert "stale: docs/zh/http-api.md" in output
    assert "no translation in docs/zh/translations.json: Flag" in output
    assert "not used in docs/zh/translations.json: Flags" in output


def test_the_metrics_page_lists_what_the_app_exposes() -> None:
    with GPUResourceManager(SimulatedDevice(1 << 20), sharing=Sharing(1)) as manager:
        manager.register("tts", load=object)
        with manager.lease("tts"):
            text = exposition(manager).decode()
    exposed = {
        f"{name}_total" if kind == "counter" and not name.endswith("_total") else name
        for name, kind in re.findall(r"^# TYPE (\S+) (\S+)", text, re.MULTILINE)
    }
    listed = set(re.findall(r"`(gpu_manager_\w+)`", (ROOT / "docs/en/metrics.md").read_text(encoding="utf-8")))
    assert exposed <= listed
    drawn = {"gpu_manager_gpu_power_watts", "gpu_manager_gpu_watt_hours_total"}
    assert listed - exposed <= drawn, "a simulated card draws no power"


def test_what_the_english_readme_lets_people_type_the_chinese_one_does_too() -> None:
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_CN.md"))
    assert set(blocks(english, "bash")) <= set(blocks(chinese, "bash"))
