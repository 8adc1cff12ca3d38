"""A study's folder, and a server of its page."""

import threading

import pytest

from tadistill.watch import state
from tadistill.watch.server import make_server

from .folder import make_folder


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


@pytest.fixture
def server(folder, monkeypatch):
    """A server that looks at the study at every request."""
    monkeypatch.setattr(state, "_PAUSE", 0.0)
    found = make_server(folder.study, folder.store, port=0)
    threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()
