"""What the page says, in English and Chinese: as the browser prefers, or one of them for everybody."""

from collections.abc import Mapping
from typing import Any

import gradio as gr

LANGUAGES = ("en", "zh")
CHINESE_LOCALES = ("zh", "zh-CN", "zh-TW", "zh-HK", "zh-SG")
Texts = Mapping[str, tuple[str, str]]  # English, Chinese


class Words:
    """The texts of all tabs."""

    def __init__(self, texts: Texts, language: str | None = None) -> None:
        """Args:
        language: "en" or "zh" for everybody; None leaves it to each browser.
        """
        self.texts, self.language = texts, language
        english, chinese = ({key: pair[index] for key, pair in texts.items()} for index in range(2))
        self.i18n = gr.I18n(en=english, **dict.fromkeys(CHINESE_LOCALES, chinese))

    def label(self, key: str) -> Any:
        """Return a text for a component, which the browser translates."""
        assert key in self.texts, key
        return self.i18n(key) if self.language is None else self.say(key, None)

    def say(self, key: str, request: gr.Request | None, **values: object) -> str:
        """Return a text for whoever sent `request`, with `values` in its places."""
        return self.texts[key][LANGUAGES.index(self.choose(request))].format(**values)

    def choose(self, request: gr.Request | None) -> str:
        """Return the language of whoever sent `request`."""
        if self.language is not None:
            return self.language
        accepted = "" if request is None else request.headers.get("accept-language", "")
        return "zh" if accepted.strip().lower().startswith("zh") else "en"
