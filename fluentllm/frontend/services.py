"""What HTTP routes find at `request.app.state.fluent`: everything the front-end process has to offer them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import CheckpointError, ConfigError
from ..core.plugins.observers import Ledger
from .generation import Generation
from .templates import ChatTemplate
from .tokenizer import Tokenizer, bytes_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from ..core.plugins.registry import Registry
    from ..core.protocols import AnswerFormat
    from ..core.settings import Settings
    from .client import EngineClient


class Services:
    """Made once by the front-end process; routes read it."""

    def __init__(
        self,
        settings: Settings,
        client: EngineClient,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        model: str,
        answers: AnswerFormat | None = None,
    ) -> None:
        self.settings = settings
        self.client = client
        self.tokenizer = tokenizer
        self.generation = Generation(client, tokenizer, template, threads=settings.server.tokenizer_threads)
        self.model = model
        """Name at the API."""
        self.answers = answers
        """How the model writes tool calls and reasoning, if that is known."""
        self.markers = frozenset() if answers is None else tokenizer.special_tokens(answers.markers)
        """Special tokens that tell them apart."""
        self.ledger = Ledger()
        """What plugins cost in this process; the front end puts the plugin manager's here."""
        self.created = int(time.time())
        """Unix time, as `/v1/models` reports it."""

    @classmethod
    def load(cls, settings: Settings, client: EngineClient, path: Path, name: str, formats: Registry | None = None) -> Services:
        """`path` and `name` of the model's files, as the hub resolved them. `formats`: the answer formats of plugins. Raises
        `CheckpointError`, `ConfigError`."""
        tokenizer = load_model_tokenizer(settings, path)
        template = load_template(settings, tokenizer)
        answers = None if formats is None else load_answer_format(settings, template, formats)
        return cls(settings, client, tokenizer, template, settings.model.served_name or name, answers)

    def close(self) -> None:
        self.generation.close()


def load_model_tokenizer(settings: Settings, path: Path) -> Tokenizer:
    """The checkpoint's tokenizer; for dummy weights made from a config.json alone, one of plain bytes."""
    try:
        return load_tokenizer(path)
    except CheckpointError:
        if settings.model.load_format != "dummy" or (path / "tokenizer.json").is_file():
            raise
        return bytes_tokenizer()


def load_template(settings: Settings, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template of the settings, or else of the checkpoint. Raises `ConfigError`, `CheckpointError`."""
    source = tokenizer.chat_template
    if settings.model.chat_template is not None:
        file = Path(settings.model.chat_template).expanduser()
        try:
            source = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"model.chat_template is {settings.model.chat_template!r}, which cannot be read: {error}.",
                fix="Name a Jinja file.",
                param="model.chat_template",
            ) from error
    return None if source is None else ChatTemplate(source, tokenizer.special.names)


def load_answer_format(settings: Settings, template: ChatTemplate | None, formats: Registry) -> AnswerFormat | None:
    """The format that `model.answer_format` names; for `auto` the first, by name, that knows the chat template. Raises
    `ConfigError` for a name that no plugin offers."""
    name, source = settings.model.answer_format, "" if template is None else template.source
    if name == "none":
        return None
    entries = formats.supported(source) if name == "auto" else [formats.get(name)]
    return entries[0].factory(source) if entries else None
