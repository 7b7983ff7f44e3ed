"""All settings of the gateway, in one model: each is a flag, an environment variable and a line of a TOML file.

`pool_size` is `--pool-size`, `HYPERCELL_POOL_SIZE` and `pool_size = 4`. Flags win over the environment, the environment
over the file. Knows nothing of what the settings do.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from gateway.auth import is_loopback
from gateway.errors import StartError
from kernels.settings import ServiceSettings

# Jupyter servers take 8888 and the numbers after it; this one stays out of their way.
DEFAULT_PORT = 8870
# Tokens are compared in full and travel in URLs; a longer one is a mistake.
MAX_TOKEN_CHARACTERS = 256


class GatewaySettings(ServiceSettings, BaseSettings):
    """What the gateway needs beside what its service does. Read with `load_settings`; every field's description is the
    help text of its flag."""

    model_config = SettingsConfigDict(env_prefix="HYPERCELL_", extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="Address to listen at.")
    port: int = Field(DEFAULT_PORT, ge=0, le=65535, description="Port to listen at; 0 takes any free one.")
    token: str | None = Field(
        None,
        max_length=MAX_TOKEN_CHARACTERS,
        description="Token that clients must show; a random one is made and printed where none is given.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="How much to log.")

    # A browser tab opens one WebSocket per notebook; a hundred tabs on one kernel is someone's loop gone wrong.
    # Each takes four of its wire's streams (kernels/channels.py, MAX_SOCKETS).
    max_connections_per_kernel: int = Field(48, ge=1, description="Most WebSockets to one kernel.")
    # Each takes a descriptor here and four streams on the wire.
    max_connections: int = Field(1000, ge=1, description="Most WebSockets altogether.")
    # ipywidgets' file upload sends whole files in one message.
    max_message_mib: int = Field(64, ge=1, le=1024, description="Largest message that a client may send, in MiB.")
    # Bodies of the HTTP API are names and environments.
    max_body_mib: int = Field(1, ge=1, le=1024, description="Largest body of an HTTP request, in MiB.")
    buffer_mib: int = Field(16, ge=0, description="Output kept per kernel while no client is connected, in MiB.")
    buffer_total_mib: int = Field(256, ge=0, description="The same for all kernels together, in MiB.")
    # A phone that changes networks is away for half a minute; proxies cut silent connections after one minute.
    ping_interval_s: float = Field(30.0, gt=0, description="Seconds between pings on a WebSocket.")
    client_timeout_s: float = Field(
        90.0,
        gt=0,
        description="A client that takes nothing and says nothing for this long is disconnected, in seconds.",
    )

    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Origins whose pages may use this gateway, separated by commas; * allows all."
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Further host names under which a gateway on loopback may be reached, separated by commas."
    )
    trust_local_user: bool = Field(
        True,
        description="Let processes of the gateway's own user open WebSockets from this machine without a token "
        "(nbclient's gateway client sends none; such a process could read the token anyway).",
    )

    @field_validator("cors_origins", "allowed_hosts", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("token")
    @classmethod
    def _usable_token(cls, value: str | None) -> str | None:
        if value is not None and (not value or not value.isascii() or not value.isprintable() or " " in value):
            raise ValueError("a token has printable ASCII characters without spaces, at least one")
        return value

    @model_validator(mode="after")
    def _no_open_door(self) -> GatewaySettings:
        if self.token is None and not is_loopback(self.host):
            raise ValueError(
                f"listening at {self.host} lets other machines in, so it takes a token you chose: give --token or "
                "HYPERCELL_TOKEN (python3 -c 'import secrets; print(secrets.token_urlsafe(32))' makes one)"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags before environment before file."""
        flags, file = {}, {}
        if isinstance(init_settings, InitSettingsSource):
            values = dict(init_settings.init_kwargs)
            file = values.pop(_FILE, {})
            flags = values
        return (
            InitSettingsSource(settings_cls, init_kwargs=flags),
            env_settings,
            InitSettingsSource(settings_cls, init_kwargs=file),
        )


# Carries the file's values into `settings_customise_sources`; no field has this name.
_FILE = "file_values"


def load_settings(*, config: Path | None = None, flags: Mapping[str, Any] | None = None) -> GatewaySettings:
    """Settings from flags, environment and the TOML file `config`. Errors: StartError with a sentence per problem."""
    file: dict[str, Any] = {}
    if config is not None:
        try:
            file = tomllib.loads(config.read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise StartError(f"The settings file {config} cannot be read: {error}") from error
    try:
        return GatewaySettings(**{**(flags or {}), _FILE: file})
    except ValidationError as error:
        raise StartError("\n".join(_sentence(problem) for problem in error.errors())) from error


def _sentence(problem: Mapping[str, Any]) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return f"There is no setting named {name}."
    return f"{name}: {message}." if name else f"{message[0].upper()}{message[1:]}."
