import pytest

from data_pipeline.curate import chat
from tests.data_pipeline.curate.chat_server import KEY, Server


@pytest.fixture
def serve(monkeypatch):
    """Starts a local model server; the key is set, proxies are not in the way, and first waits are short."""
    monkeypatch.setenv("TEST_MODEL_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(chat, "FIRST_WAIT_SECONDS", 0.01)
    servers = []

    def start(fault=lambda body, attempt: None) -> Server:
        servers.append(Server(fault))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
