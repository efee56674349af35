"""Finding a Step-Audio-EditX checkout and its weights, and what is said when something of them is missing."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from miniature_checkout import CHECKOUT, run, safetensors_of

from residency.engines import checkout as checkouts
from residency.engines import step_audio
from residency.engines.step_audio_facts import ACOUSTIC_MODEL
from residency.errors import EngineUnavailable

VOCODER = "Step-Audio-EditX/CosyVoice-300M-25Hz"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CHECKOUT, tmp_path / "Step-Audio-EditX", ignore=shutil.ignore_patterns("__pycache__")))


def refused(script: str, models: Path, voice: Path, checkout: Path) -> str:
    """The sentence with which a scenario is told that there is no engine."""
    return run(
        f"""
from residency.errors import EngineUnavailable
try:
    {script}
except EngineUnavailable as error:
    print(error)
else:
    raise AssertionError("nothing was said")
""",
        models,
        voice,
        checkout,
    )


def _add_to_tts(checkout: Path, line: str) -> None:
    file = checkout / "tts.py"
    file.write_text(f"{line}\n{file.read_text()}")


# -- the checkout -----------------------------------------------------------------------------------------------


def test_the_checkout_is_found_by_name_environment_and_neighbourhood(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STEP_AUDIO_ROOT", raising=False)
    monkeypatch.setattr(checkouts, "_PROJECT", tmp_path / "elsewhere" / "ours")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EngineUnavailable, match="No Step-Audio-EditX checkout"):
        checkouts.find_checkout()
    assert checkouts.find_checkout(str(checkout)) == checkout
    monkeypatch.setattr(checkouts, "_PROJECT", tmp_path / "ours")
    assert checkouts.find_checkout() == checkout, "beside this project"
    monkeypatch.setattr(checkouts, "_PROJECT", checkout)
    assert checkouts.find_checkout() == checkout, "this project was copied into it"
    monkeypatch.setattr(checkouts, "_PROJECT", tmp_path / "elsewhere" / "ours")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert checkouts.find_checkout() == checkout, "beside the current folder"
    monkeypatch.chdir(checkout)
    assert checkouts.find_checkout() == checkout
    monkeypatch.setenv("STEP_AUDIO_ROOT", str(tmp_path / "here"))
    with pytest.raises(EngineUnavailable, match=r"No Step-Audio-EditX checkout .* found in "):
        checkouts.find_checkout()


def test_the_checkout_that_a_program_uses_already_comes_first(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("tts")
    module.__file__ = str(checkout / "tts.py")
    monkeypatch.setitem(sys.modules, "tts", module)
    monkeypatch.setenv("STEP_AUDIO_ROOT", str(tmp_path))
    assert checkouts.find_checkout() == checkout


def test_without_a_checkout_it_is_said_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("STEP_AUDIO_ROOT", raising=False)
    monkeypatch.setattr(checkouts, "_PROJECT", tmp_path / "ours")
    monkeypatch.chdir(tmp_path)
    for ask in (step_audio.build, step_audio.build_recognizer, lambda path: step_audio.shortcomings(path, None)):
        with pytest.raises(EngineUnavailable, match=r"git clone https://github\.com/stepfun-ai/Step-Audio-EditX"):
            ask("/models")


def test_the_path_is_left_as_it_was_but_for_the_checkout_at_its_end(checkout: Path, models: Path, voice: Path) -> None:
    script = """
before = list(sys.path)
build()
assert sys.path == [*before, CHECKOUT]
import utils, config
assert {m.__file__.rpartition("/Step-Audio-EditX/")[0] for m in (utils, config)} == {CHECKOUT.rpartition("/")[0]}
build()
assert sys.path == [*before, CHECKOUT]
"""
    (checkout / "config" / "__init__.py").write_text("")
    script = script.replace("import utils, config", "import utils; from config import edit_config as config")
    run(f"CHECKOUT = {str(checkout)!r}\n{script}", models, voice, checkout)


def test_a_module_of_the_same_name_is_not_taken_for_one_of_the_checkout(
    checkout: Path, models: Path, voice: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "utils.py").write_text("")
    script = f"sys.path.insert(0, {str(tmp_path / 'mine')!r}); import utils; build()"
    said = refused(script, models, voice, checkout)
    assert "'utils'" in said
    assert str(tmp_path / "mine" / "utils.py") in said
    installed = f"sys.path.insert(0, {str(tmp_path / 'mine')!r})\nbuild()\nimport utils\nassert utils.windows == {{}}"
    run(installed, models, voice, checkout)


# -- what it needs ----------------------------------------------------------------------------------------------


def test_a_missing_dependency_names_the_command_that_installs_it(checkout: Path, models: Path, voice: Path) -> None:
    _add_to_tts(checkout, "import hyperpyyaml_not_here")
    said = refused("build()", models, voice, checkout)
    assert "needs the Python module 'hyperpyyaml_not_here'" in said
    assert f"pip install -r {checkout}/requirements.txt" in said


def test_a_dependency_installed_meanwhile_is_found_without_a_restart(
    checkout: Path, models: Path, voice: Path, tmp_path: Path
) -> None:
    (checkout / "tts.py").write_text(f"import installed_later\n{(checkout / 'tts.py').read_text()}")
    script = f"""
sys.path.insert(0, {str(tmp_path / "site")!r})
tts = managed()
try:
    tts.clone(*SAY)
except Exception as error:
    assert "installed_later" in str(error)
open({str(tmp_path / "site" / "installed_later.py")!r}, "w").close()
assert tts.clone(*SAY)[1] == 24000
"""
    (tmp_path / "site").mkdir()
    run(script, models, voice, checkout)


def test_a_file_that_the_checkout_lacks_is_not_asked_of_pip(checkout: Path, models: Path, voice: Path) -> None:
    (checkout / "model_loader.py").unlink()
    said = refused("build()", models, voice, checkout)
    assert "incomplete, model_loader is missing" in said
    assert "pip" not in said


def test_a_wrong_version_is_named_with_the_one_that_is_wanted(checkout: Path, models: Path, voice: Path) -> None:
    _add_to_tts(checkout, "from torch import a_name_of_another_version")
    (checkout / "requirements.txt").write_text("torch==1.0.0\nnumpy>=1\nno-such-package==3.1 # why\n-r other.txt\n")
    said = refused("build()", models, voice, checkout)
    assert "a_name_of_another_version" in said
    assert "torch==1.0.0 (2." in said
    assert "no-such-package==3.1 (missing" in said
    assert "numpy" not in said


def test_requirements_for_other_systems_and_lines_that_are_none_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text(
        '# a comment\n\n--index-url x\nnowhere-1 ; sys_platform == "win32"\nnowhere-2\n'
    )
    assert checkouts.unmet(tmp_path) == {"nowhere-2": None}
    assert checkouts.unmet(tmp_path / "without such a file") == {}


def test_what_the_checkout_passes_over_at_its_import_is_named_when_it_is_missed(
    checkout: Path, models: Path, voice: Path
) -> None:
    (checkout / "tokenizer.py").write_text(
        "try:\n    import not_here\nexcept Exception:\n    AutoModel = None\nStepAudioTokenizer = AutoModel\n"
    )
    (checkout / "requirements.txt").write_text("torch==1.0.0\nnot-here==1.16.0\n")
    said = refused("build()", models, voice, checkout)
    assert "TypeError: 'NoneType' object is not callable" in said
    assert "not-here==1.16.0 (missing" in said
    assert "torch==1.0.0 (2." in said.split("not-here")[1], "one of another version can show like that too"
    assert f"pip install -r {checkout}/requirements.txt, and restart" in said


def test_what_was_raised_on_purpose_or_for_want_of_memory_is_not_put_down_to_packages(
    checkout: Path, models: Path, voice: Path
) -> None:
    (checkout / "requirements.txt").write_text("not-here==1.16.0\n")
    loader, original = checkout / "model_loader.py", (checkout / "model_loader.py").read_text()
    for error in ("ValueError('int3?')", "FileNotFoundError('x')", "torch.OutOfMemoryError('CUDA out of memory')",
                  "RuntimeError('CUDA error: an illegal memory access was encountered')"):  # fmt: skip
        loader.write_text(original.replace("    assert source in", f"    raise {error}\n    assert source in"))
        script = f"""
try:
    build()
except Exception as error:
    assert repr(error) == repr({error}), error
else:
    raise AssertionError
"""
        run(script, models, voice, checkout)


def test_weights_that_are_missing_are_named_and_not_the_module_for_another_way_to_them(
    checkout: Path, models: Path, voice: Path
) -> None:
    tokenizer = checkout / "tokenizer.py"
    tokenizer.write_text(
        tokenizer.read_text().replace(
            "        self.funasr_model = AutoModel(",
            "        if FAILS:\n            try:\n                raise FAILS('no route to the hub')\n"
            "            except Exception:\n                import modelscope_not_here\n"
            "        self.funasr_model = AutoModel(",
        )
    )
    tokenizer.write_text(f"{tokenizer.read_text()}\nFAILS = OSError\n")
    said = refused("build()", models, voice, checkout)
    assert "OSError: no route to the hub" in said
    assert "modelscope_not_here" in said
    assert "--model-source and the connection" in said
    (models / "Step-Audio-Tokenizer" / "linguistic_tokenizer.npy").unlink()
    said = refused("build()", models, voice, checkout)
    assert "hf download stepfun-ai/Step-Audio-Tokenizer" in said
    assert "modelscope" not in said


def test_where_all_that_is_asked_for_is_there_a_reinstallation_of_everything_is_not_advised(
    checkout: Path, models: Path, voice: Path
) -> None:
    _add_to_tts(checkout, "from torch import a_name_of_another_version")
    said = refused("build()", models, voice, checkout)
    assert "pip install --force-reinstall --no-deps with the package" in said
    assert "-r " not in said


def test_a_drop_in_tells_at_the_start_what_is_not_as_it_should_be(checkout: Path, models: Path, voice: Path) -> None:
    (checkout / "requirements.txt").write_text("not-here==1.16.0\n")
    script = """
import logging
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger().addHandler(handler)
manager = GPUResourceManager(SimulatedDevice(1 << 30))
GPUManagedTTS(f"{MODELS}/nowhere", lambda: None, manager=manager)
assert "torch" in sys.modules and not {"tts", "tokenizer"} & set(sys.modules), "nothing is imported for that"
print(*said, sep="\\n")
"""
    said = run(script, models, voice, checkout)
    assert "not-here==1.16.0 (missing" in said
    assert "hf download stepfun-ai/Step-Audio-EditX --local-dir" in said


# -- the weights ------------------------------------------------------------------------------------------------


def test_the_engine_is_built_with_the_arguments_of_the_public_app(checkout: Path, models: Path, voice: Path) -> None:
    script = """
def built(**arguments):
    engine = step_audio.build(MODELS, **arguments)
    return engine.arguments, engine.audio_tokenizer.arguments

tts, tokenizer = built()
assert tts == {
    "model_path": f"{MODELS}/Step-Audio-EditX", "model_source": "auto", "tts_model_id": None,
    "quantization_config": None, "torch_dtype": torch.bfloat16, "device_map": "cuda",
}, tts
assert tokenizer["encoder_path"] == f"{MODELS}/Step-Audio-Tokenizer" and tokenizer["model_source"] == "auto"
tts, tokenizer = built(model_source="local", tokenizer_model_id="funasr", tts_model_id=f"{MODELS}/Step-Audio-EditX",
                       quantization="awq-4bit", torch_dtype="float16", device_map="cpu")
assert tts == {
    "model_path": f"{MODELS}/Step-Audio-EditX-AWQ-4bit", "model_source": "local",
    "tts_model_id": f"{MODELS}/Step-Audio-EditX", "quantization_config": "awq-4bit", "torch_dtype": torch.float16,
    "device_map": "cpu",
}, tts
assert tokenizer["funasr_model_id"] == "funasr"
"""
    shutil.copytree(models / "Step-Audio-EditX", models / "Step-Audio-EditX-AWQ-4bit")
    run(script, models, voice, checkout)


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (
            "Step-Audio-Tokenizer",
            "hf download stepfun-ai/Step-Audio-Tokenizer --local-dir {models}/Step-Audio-Tokenizer",
        ),
        ("Step-Audio-EditX", "hf download stepfun-ai/Step-Audio-EditX --local-dir {models}/Step-Audio-EditX"),
        (f"{VOCODER}/flow.pt", "(CosyVoice-300M-25Hz/flow.pt)"),
        ("Step-Audio-EditX/model.safetensors", "(model.safetensors)"),
        ("Step-Audio-EditX/tokenizer_config.json", "(tokenizer_config.json)"),
        (f"Step-Audio-Tokenizer/{ACOUSTIC_MODEL}/model.pt", f"({ACOUSTIC_MODEL}/model.pt)"),
        (f"Step-Audio-Tokenizer/{ACOUSTIC_MODEL}", f"({ACOUSTIC_MODEL}/config.yaml, {ACOUSTIC_MODEL}/model.pt)"),
        ("Step-Audio-Tokenizer/linguistic_tokenizer.npy", "(linguistic_tokenizer.npy)"),
    ],
)
def test_missing_weights_are_named_with_the_command_that_gets_them(models: Path, gone: str, said: str) -> None:
    step_audio.check_weights(str(models))
    path = models / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(EngineUnavailable) as raised:
        step_audio.check_weights(str(models))
    assert said.format(models=models) in str(raised.value)


def test_every_shard_of_the_language_model_and_what_funasr_names_itself_are_wanted(models: Path) -> None:
    llm, acoustic = models / "Step-Audio-EditX", models / "Step-Audio-Tokenizer" / ACOUSTIC_MODEL
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}
    (llm / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (llm / "model.safetensors").rename(llm / "model-1.safetensors")
    with pytest.raises(EngineUnavailable, match=r"incomplete \(model-2\.safetensors\)"):
        step_audio.check_weights(str(models))
    shutil.copy(llm / "model-1.safetensors", llm / "model-2.safetensors")
    step_audio.check_weights(str(models))
    (acoustic / "configuration.json").write_text(json.dumps({"file_path_metas": {"init_param": "other.pt"}}))
    with pytest.raises(EngineUnavailable, match=r"/other\.pt\)"):
        step_audio.check_weights(str(models))
    (acoustic / "configuration.json").write_text("{")
    with pytest.raises(EngineUnavailable, match=r"configuration\.json is damaged .*download it again"):
        step_audio.check_weights(str(models))


def test_files_that_were_not_downloaded_to_their_end_are_recognised(models: Path) -> None:
    weights, flow = models / "Step-Audio-EditX" / "model.safetensors", models / VOCODER / "flow.pt"
    torch.save({"t": torch.ones(1000)}, flow)
    weights.write_bytes(safetensors_of(1000))
    step_audio.check_weights(str(models))
    for file, name in ((weights, "model.safetensors"), (flow, "CosyVoice-300M-25Hz/flow.pt")):
        whole = file.read_bytes()
        for kept in (5, 40, len(whole) - 100):
            file.write_bytes(whole[:kept])
            with pytest.raises(
                EngineUnavailable, match=r"not downloaded completely.*remove.* and hf download"
            ) as raised:
                step_audio.check_weights(str(models))
            assert f"({name})" in str(raised.value)
        file.write_bytes(whole)
    step_audio.check_weights(str(models))


def test_commands_can_be_pasted_and_name_repositories_that_exist(models: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match=r"stepfun-ai/Step-Audio-EditX --local-dir /x/my-editx"):
        step_audio.check_weights(str(models), tts_model_id="/x/my-editx")
    with pytest.raises(EngineUnavailable, match=r"stepfun-ai/Step-Audio-EditX-AWQ-4bit --local-dir /x/my-editx"):
        step_audio.check_weights(str(models), tts_model_id="/x/my-editx", quantization="awq-4bit")
    mine = models.rename(tmp_path / "my models")
    (mine / "Step-Audio-Tokenizer" / "linguistic_tokenizer.npy").unlink()
    with pytest.raises(EngineUnavailable, match=r"--local-dir '.*/my models/Step-Audio-Tokenizer'"):
        step_audio.check_weights(str(mine))


def test_an_acoustic_model_of_ones_own_is_not_looked_for_in_the_public_repository(models: Path) -> None:
    (models / "Step-Audio-Tokenizer" / "mine").mkdir()
    with pytest.raises(EngineUnavailable, match=r"mine/model\.pt.*leave --tokenizer-model-id out") as raised:
        step_audio.check_weights(str(models), tokenizer_model_id="mine")
    assert "hf download" not in str(raised.value)


def test_where_the_checkout_looks_is_where_weights_are_missed(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    step_audio.check_weights("stepfun-ai")
    step_audio.check_weights("stepfun-ai", model_source="huggingface")
    with pytest.raises(EngineUnavailable, match="stepfun-ai/Step-Audio-Tokenizer are missing"):
        step_audio.check_weights("stepfun-ai", model_source="local")
    step_audio.check_weights("models", model_source="local")
    for source in ("huggingface", "modelscope"):
        with pytest.raises(EngineUnavailable, match="takes the id of a repository: leave --model-source out"):
            step_audio.check_weights(str(models), model_source=source)


def test_a_path_that_is_taken_for_the_id_of_a_hub_is_told_at_the_start(
    models: Path, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ["come from Hugging Face" in each for each in step_audio.shortcomings("stepfun-ai", str(checkout))] == [True]
    assert step_audio.shortcomings("models", str(checkout)) == []
    assert step_audio.shortcomings("stepfun-ai", str(checkout), model_source="modelscope") == []


def test_weights_cloned_without_git_lfs_are_recognised(models: Path) -> None:
    (models / "Step-Audio-EditX" / "model-00001.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(EngineUnavailable, match=r"model-00001\.safetensors.*git -C .*/Step-Audio-EditX lfs pull"):
        step_audio.check_weights(str(models))


def test_quantized_weights_and_weights_elsewhere_have_folders_of_their_own(models: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match="hf download stepfun-ai/Step-Audio-EditX-AWQ-4bit"):
        step_audio.check_weights(str(models), quantization="awq-4bit")
    (models / "Step-Audio-EditX").rename(tmp_path / "other")
    step_audio.check_weights(str(models), tts_model_id=str(tmp_path / "other"))
    step_audio.check_weights(str(models), tts_model_id="someone/on-a-hub")


def test_a_load_that_fails_for_want_of_weights_says_so_and_the_next_one_succeeds(
    checkout: Path, models: Path, voice: Path
) -> None:
    file = models / "Step-Audio-Tokenizer" / "linguistic_tokenizer.npy"
    script = f"""
import os
from residency.errors import EngineUnavailable
os.rename({str(file)!r}, {str(file) + ".away"!r})
tts = managed()
try:
    tts.clone(*SAY)
except EngineUnavailable as error:
    assert "linguistic_tokenizer.npy" in str(error) and type(error.__cause__) is FileNotFoundError
else:
    raise AssertionError
assert state(tts) == "released" and "linguistic_tokenizer.npy" in tts.get_gpu_status()["models"]["tts"]["last_error"]
os.rename({str(file) + ".away"!r}, {str(file)!r})
assert tts.clone(*SAY)[1] == 24000
"""
    run(script, models, voice, checkout)


def test_an_error_of_the_checkout_that_has_another_reason_is_left_as_it_is(
    checkout: Path, models: Path, voice: Path
) -> None:
    (models / "Step-Audio-EditX" / "config.json").write_text('{"vocab_size": 256}')
    script = """
try:
    build()
except Exception as error:
    print(type(error).__name__)
"""
    assert run(script, models, voice, checkout) == "TypeError\n"


@pytest.mark.skipif(bool(shutil.which("nvidia-smi")), reason="is about machines without a GPU")
def test_without_a_gpu_it_is_said_that_one_is_needed(checkout: Path, models: Path, voice: Path) -> None:
    loader = checkout / "model_loader.py"
    loader.write_text(loader.read_text().replace(".to(device_map)", "._apply(lambda t: torch._C._cuda_init() or t)"))
    said = refused("build()", models, voice, checkout)
    assert "an NVIDIA GPU" in said
    assert "nvidia-smi" in said
