"""Finds weights; the language model is one of vLLM."""

from vllm import LLM


class ModelSource:
    MODELSCOPE = "modelscope"
    HUGGINGFACE = "huggingface"
    LOCAL = "local"
    AUTO = "auto"


class Bytes:
    """A tokenizer that needs no vocabulary."""

    def encode(self, text):
        return list(text.encode())


class UnifiedModelLoader:
    def load_model(self, model_path, source=ModelSource.AUTO, quantization=None, max_num_seqs=None, **kwargs):
        assert source in vars(ModelSource).values(), source
        if quantization:
            kwargs["quantization"] = quantization
        return LLM(model=model_path, **kwargs), Bytes(), model_path


model_loader = UnifiedModelLoader()
