"""What a client is told about the live server."""

from __future__ import annotations

from tests.sdk.test_sdk import Server

KEY = "clients-key"
EMBEDDER = "tiny-embedder"
EMBEDDING_SIZE = 64  # of golden/tiny.py's bert


class LiveServer(Server):
    """Server's url, model and pid, and what was asked of it at its start."""

    key = KEY
    embedder = EMBEDDER
    embedding_size = EMBEDDING_SIZE
