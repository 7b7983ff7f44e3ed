"""The WebSocket that reports changes of files: `/api/sandboxes/{id}/files/watch`."""

from __future__ import annotations

from gateway.file_models import ChangeFrame, WatchQuery
from gateway.sandbox_socket import SandboxSocket


class WatchSocket(SandboxSocket):
    """Sends {"type": "watching"} when every later change will be reported, then the changes. Messages of the client are
    ignored."""

    async def begin(self, **path: str) -> None:
        self._query: WatchQuery = self.parse_query(WatchQuery)
        self._files = (await self.gateway.service.files(self.sandbox_id)).as_user(self._query.user)
        await self._files.stat(self._query.path)

    async def serve(self) -> None:
        async with await self._files.watch(self._query.path, recursive=self._query.recursive) as watch:
            await self.send({"type": "watching"})
            async for change in watch.changes():
                await self.send(ChangeFrame.of(change))

    def on_message(self, message: str | bytes) -> None:
        """Nothing is expected."""
