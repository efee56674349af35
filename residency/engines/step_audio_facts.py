"""Facts about the public Step-Audio-EditX that both generations share (see `generations`), as data.

- ``tts.StepAudioTTS(model_path, audio_tokenizer, model_source, tts_model_id, ...)``;
  ``tokenizer.StepAudioTokenizer(encoder_path, model_source, funasr_model_id)``.
- It ignores failed imports of its own parts and fails later, at their use. FunASR replaces missing weights by random
  ones. Its ``whisper_wrapper`` turns errors, also out-of-memory errors, into empty texts.
"""

REPOSITORY = "https://github.com/stepfun-ai/Step-Audio-EditX"
HUB = "stepfun-ai"
#: Arguments of ``StepAudioTTS`` in both generations.
COMMON_ARGUMENTS = ("model_path", "audio_tokenizer", "model_source", "tts_model_id")
#: Limit of a target text in the public app of both generations.
TARGET_CHARACTERS = 1000
#: A folder with all of these is a checkout.
LANDMARKS = ("tts.py", "stepvocoder")
#: Top-level modules and packages, without its app and scripts.
MODULES = (
    "config", "funasr_detach", "model_loader", "quantization", "stepvocoder", "tokenizer", "tts", "utils",
    "whisper_wrapper",
)  # fmt: skip

#: Folders of weights, also the names of their repositories on the hub.
TOKENIZER = "Step-Audio-Tokenizer"
MODEL = "Step-Audio-EditX"
MODEL_BY_QUANTIZATION = {"awq-4bit": "Step-Audio-EditX-AWQ-4bit"}
#: The FunASR model in the folder of the public tokenizer, and its files, unless its configuration names others.
ACOUSTIC_MODEL = "dengcunqin/speech_paraformer-large_asr_nat-zh-cantonese-en-16k-vocab8501-online"
ACOUSTIC_FILES = {"config": "config.yaml", "init_param": "model.pt"}
TOKENIZER_FILES = ("linguistic_tokenizer.npy", "speech_tokenizer_v1.onnx")
MODEL_FILES = ("config.json", "tokenizer_config.json")
VOCODER_FILES = tuple(
    f"CosyVoice-300M-25Hz/{name}" for name in ("cosyvoice.yaml", "flow.pt", "hift.pt", "campplus.onnx")
)
