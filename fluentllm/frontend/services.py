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
    from ..core.settings import Settings
    from .client import EngineClient


class Services:
    """Made once by the front-end process; routes read it."""

    def __init__(
        self, settings: Settings, client: EngineClient, tokenizer: Tokenizer, template: ChatTemplate | None, model: str
    ) -> None:
        self.settings = settings
        self.client = client
        self.tokenizer = tokenizer
        self.generation = Generation(client, tokenizer, template, threads=settings.server.tokenizer_threads)
        self.model = model
        """Name at the API."""
        self.ledger = Ledger()
        """What plugins cost in this process; the front end puts the plugin manager's here."""
        self.created = int(time.time())
        """Unix time, as `/v1/models` reports it."""

    @classmethod
    def load(cls, settings: Settings, client: EngineClient, path: Path, name: str) -> Services:
        """`path` and `name` of the model's files, as the hub resolved them. Raises `CheckpointError`, `ConfigError`."""
        tokenizer = load_model_tokenizer(settings, path)
        return cls(settings, client, tokenizer, load_template(settings, tokenizer), settings.model.served_name or name)

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
