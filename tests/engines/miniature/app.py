"""An app in miniature, with the outward shape of the public one: what is loaded where, and what the page is made of."""

import argparse
import os

import gradio as gr
import torch
from model_loader import ModelSource
from tokenizer import StepAudioTokenizer
from tts import StepAudioTTS
from whisper_wrapper import WhisperWrapper


class EditxTab:
    def __init__(self, args):
        self.args = args

    def generate_clone(self, prompt_text, prompt_audio, target_text, state):
        audio, sample_rate = common_tts_engine.clone(prompt_audio, prompt_text, target_text)
        audio = (sample_rate, audio.numpy().squeeze())
        return audio, {"history_audio": [(*audio, target_text)]}

    def clear_history(self, state):
        return None, {"history_audio": []}

    def transcribe_audio(self, audio, text):
        return text or whisper_asr(audio)

    def register_components(self):
        with gr.Tab("Editx"):
            with gr.Row():
                with gr.Column():
                    self.prompt_text_input = gr.Textbox(label="Prompt Text")
                    self.prompt_audio_input = gr.Audio(type="filepath", label="Input Audio")
                    self.generated_text = gr.Textbox(label="Target Text")
                with gr.Column():
                    self.chat_box = gr.Audio(label="History")
            with gr.Row():
                with gr.Column():
                    self.button_tts = gr.Button("CLONE", variant="primary")
                with gr.Column():
                    self.clean_history_submit = gr.Button("Clear History", variant="primary")

            gr.Markdown("---")

    def register_events(self):
        state = gr.State({"history_audio": []})
        self.button_tts.click(
            self.generate_clone,
            inputs=[self.prompt_text_input, self.prompt_audio_input, self.generated_text, state],
            outputs=[self.chat_box, state],
        )

        self.clean_history_submit.click(self.clear_history, inputs=[state], outputs=[self.chat_box, state])
        if self.args.enable_auto_transcribe:
            self.prompt_audio_input.change(
                self.transcribe_audio,
                inputs=[self.prompt_audio_input, self.prompt_text_input],
                outputs=self.prompt_text_input,
            )


def launch_demo(args, editx_tab):
    with gr.Blocks() as demo:
        editx_tab.register_components()
        editx_tab.register_events()
    demo.queue().launch(server_name=args.server_name, server_port=args.server_port, share=args.share)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Step-Audio Edit Demo")
    parser.add_argument("--model-path", type=str, required=True)
    parser.add_argument("--server-name", type=str, default="0.0.0.0")
    parser.add_argument("--server-port", type=int, default=7860)
    parser.add_argument("--share", action="store_true")
    parser.add_argument("--enable-auto-transcribe", action="store_true")
    parser.add_argument("--device-map", type=str, default="cuda")

    args = parser.parse_args()

    try:
        encoder = StepAudioTokenizer(
            os.path.join(args.model_path, "Step-Audio-Tokenizer"),
            model_source=ModelSource.AUTO,
        )
        common_tts_engine = StepAudioTTS(
            os.path.join(args.model_path, "Step-Audio-EditX"),
            encoder,
            model_source=ModelSource.AUTO,
            tts_model_id=None,
            torch_dtype=torch.bfloat16,
            device_map=args.device_map,
        )
        if args.enable_auto_transcribe:
            whisper_asr = WhisperWrapper()
    except Exception as e:
        print(f"Error loading models: {e}")
        exit(1)

    launch_demo(args, EditxTab(args))
