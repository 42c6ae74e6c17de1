"""Where an adapter's files lie: a folder, or a repository of the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ..errors import AdapterMismatchError
from .untrusted import MAX_BYTES


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter's folder or repository, as PEFT was told of it.

    Args:
        location: folder or Hub id.
        subfolder: of either.
        download: further arguments of `hf_hub_download`, such as `revision`.
        layer_factors: what its `adapter_config.json` says.
    """

    location: str
    subfolder: str | None = None
    download: Mapping[str, Any] = field(default_factory=dict, repr=False)  # may hold a token
    layer_factors: tuple[float, ...] | None = None

    @property
    def folder(self) -> Path:
        """The local folder, which need not exist."""
        return Path(self.location, self.subfolder or "")

    def find(self, name: str, limit: int | None = MAX_BYTES) -> Path:
        """Returns the local path of a file, fetched from the Hub if need be.

        Args:
            name: such as `adapter_model.safetensors`.
            limit: nothing larger is fetched, in bytes; None: whatever its size.

        Raises:
            AdapterMismatchError: there is no such file, or it is too large. The Hub client's own errors (no network,
                no such repository) come through.
        """
        path = self.folder / name
        if path.is_file():
            return path
        if self.folder.is_dir():
            raise AdapterMismatchError(self._lacks(name))
        where = {"subfolder": self.subfolder, **self.download}
        try:
            if limit is not None:
                size = hf_hub_download(self.location, name, dry_run=True, **where).file_size
                if size > limit:
                    raise AdapterMismatchError(
                        f"cannot load adapter {self.location!r}: {name} has {size} bytes, expected {limit} at most."
                    )
            return Path(hf_hub_download(self.location, name, **where))
        except LocalEntryNotFoundError:  # no network
            raise
        except EntryNotFoundError as error:
            raise AdapterMismatchError(self._lacks(name)) from error

    def _lacks(self, name: str) -> str:
        return f"cannot load adapter {self.location!r}: it has no {name}, expected that file and no other format."
