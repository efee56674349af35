"""Tasks and sub-tasks of Step-Audio-EditX, for engines that do not list their own. Pure data."""

from __future__ import annotations

# fmt: off
STEP_AUDIO_EDIT_TYPES: dict[str, list[str]] = {
    "clone": [],
    "emotion": [
        "happy", "angry", "sad", "humour", "confusion", "disgusted", "empathy", "embarrass", "fear", "surprised",
        "excited", "depressed", "coldness", "admiration", "remove",
    ],
    "style": [
        "serious", "arrogant", "child", "older", "girl", "pure", "sister", "sweet", "ethereal", "whisper", "gentle",
        "recite", "generous", "act_coy", "warm", "shy", "comfort", "authority", "chat", "radio", "soulful", "story",
        "vivid", "program", "news", "advertising", "roar", "murmur", "shout", "deeply", "loudly", "remove",
        "exaggerated",
    ],
    "vad": [],
    "denoise": [],
    "paralinguistic": [],
    "speed": ["faster", "slower", "more faster", "more slower"],
}
# fmt: on
