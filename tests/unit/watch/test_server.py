"""The server reads and nothing else: methods, hosts, users, paths outside the study, and a disk that stays as it was."""

import gzip
import hashlib
import http.client
import json
import os

import pytest

from tadistill.errors import ConfigError, StoreError
from tadistill.watch import server as module
from tadistill.watch.server import make_server

from .folder import D1, NASTY, PLAN, S1, XL


def ask(server, path, method="GET", **headers):
    """Send a request without any change of its path; return (status, headers, text)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    connection.putrequest(method, path, skip_host=bool(headers))
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    reply = connection.getresponse()
    text = reply.read().decode()
    connection.close()
    return reply.status, reply.headers, text


def test_the_page_and_its_parts(folder, server):
    folder.finish(XL)
    folder.log(S1, 1, 30)
    folder.run(S1)
    status, headers, text = ask(server, "/")
    assert status == 200
    assert headers["Content-Type"].startswith("text/html")
    assert "1 of 6" in text
    content = json.loads(ask(server, "/state")[2])
    assert content["title"] == "1/6 running · small"
    assert "sft s, seed 1" in content["parts"]["now"]
    curves = content["parts"]["curves"]
    assert 'class="line"' in curves
    assert curves.index("ROUGE-L on dev<") < curves.index("ROUGE-L on dev: my chat<") < curves.index("Entropy of sampled text<")
    assert "4 min" in content["parts"]["head"]


def test_only_changed_parts_are_sent(folder, server):
    folder.log(S1, 1, 3)
    first = json.loads(ask(server, "/state")[2])
    query = "&".join(f"have={digest}" for digest in first["digests"].values())
    folder.log(S1, 4, 4)
    second = json.loads(ask(server, f"/state?{query}")[2])
    assert set(first["parts"]) == set(second["digests"])
    assert set(second["parts"]) - {"machine"} == {"graph", "curves", "stages"}  # the load of the machine may change


def test_replies_are_compressed_for_browsers(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    connection.request("GET", "/", headers={"Accept-Encoding": "gzip, br"})
    reply = connection.getresponse()
    assert reply.headers["Content-Encoding"] == "gzip"
    assert b"<!doctype html>" in gzip.decompress(reply.read())


def test_text_of_strangers_is_text(folder, server):
    folder.sampled(D1, f"{NASTY}\x1b[2J")
    folder.run(ended="failed", failed={S1: NASTY})
    parts = json.loads(ask(server, "/state")[2])["parts"]
    assert "&lt;script&gt;window.hacked" in parts["samples"]
    assert "\\x1b[2J" in parts["samples"]
    assert "&lt;script&gt;window.hacked" in parts["alerts"]
    assert NASTY not in "".join(parts.values())


OUTSIDE = [
    "/../secret", "/files/../secret", "/files/../../etc/passwd", "/files/%2e%2e/secret", "/files/..%2fsecret", "/%2e%2e/%2e%2e/etc/passwd",
    "/files//etc/passwd", "//etc/passwd", "/etc/passwd", "/files/run.log/../../secret", "/files/report.html%00", "/files/%00", "/files/",
    "/files/local", "/files/report.md", "/files/plan.json/", "/store/", "/state/", "/files/..\\secret", "/files/secret", "/favicon.ico",
]  # fmt: skip


@pytest.mark.parametrize("path", OUTSIDE)
def test_every_other_path_is_404(folder, server, path):
    (folder.runs / "secret").write_text("secret")
    (folder.study / "report.md").symlink_to(folder.runs / "secret")
    (folder.study / "secret").write_text("secret")  # in the folder, but no file that the page offers
    status, _, text = ask(server, path)
    assert status == 404
    assert "secret" not in text
    assert "root:" not in text


def test_the_files_of_the_study(folder, server):
    (folder.study / "report.html").write_text("<p>report</p>")
    os.mkfifo(folder.study / "run.log")  # would block a reader
    status, headers, text = ask(server, "/files/report.html")
    assert (status, text) == (200, "<p>report</p>")
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert ask(server, "/files/run.log")[0] == 404
    assert "files/report.html" in json.loads(ask(server, "/state")[2])["parts"]["head"]


@pytest.mark.parametrize("method", ["POST", "DELETE", "OPTIONS"])
def test_other_methods_do_nothing(server, method):
    status, _, text = ask(server, "/", method)
    assert (status, "small" in text) == (501, False)


def test_head_has_no_body(server):
    status, headers, text = ask(server, "/", "HEAD")
    assert (status, text) == (200, "")
    assert int(headers["Content-Length"]) > 1000


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:9000", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("evil.example", 403), ("evil.example:8765", 403), ("", 403),
     ("localhost.evil.example", 403)],
)  # fmt: skip
def test_only_names_of_this_machine_are_answered(server, host, status):
    assert ask(server, "/state", Host=host)[0] == status


def test_the_server_listens_on_this_machine_only(server):
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="only Linux says whose connection it is")
def test_other_users_of_the_machine_are_refused(server, monkeypatch):
    assert ask(server, "/state")[0] == 200
    real = os.getuid()
    monkeypatch.setattr(module.os, "getuid", lambda: real + 1)
    # the tests may run as root, who sees everything anyway
    assert ask(server, "/state")[0] == (200 if real == 0 else 403)


def test_the_owner_of_a_connection(tmp_path, monkeypatch):
    table = tmp_path / "tcp"
    row = "   1: 0100007F:{client} 0100007F:223D 01 00000000:00000000 00:00000000 00000000  {uid}        0 42 1 0 20 0 0 10 -1\n"
    table.write_text("header\n" + row.format(client="A001", uid=1007) + row.format(client="A002", uid=1000))
    monkeypatch.setattr(module, "_TABLE", table)
    monkeypatch.setattr(module.os, "getuid", lambda: 1000)
    assert not module.same_user("127.0.0.1", 0xA001, port=8765)
    assert module.same_user("127.0.0.1", 0xA002, port=8765)
    assert module.same_user("127.0.0.1", 0xA003, port=8765)  # not in the table
    monkeypatch.setattr(module, "_TABLE", tmp_path / "none")
    assert module.same_user("127.0.0.1", 0xA001, port=8765)


def snapshot(runs):
    found = {}
    for path in sorted(runs.rglob("*")):
        stat = path.stat()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path)] = (digest, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino, stat.st_mode)
    return found


def test_readers_change_nothing_on_the_disk(folder, server):
    folder.finish(XL)
    folder.log(S1, 1, 30)
    folder.sampled(D1, "text")
    folder.run(S1)
    (folder.study / "report.html").write_text("report")
    before = snapshot(folder.runs)
    second = make_server(folder.study, folder.store, port=0)
    second.state()
    second.server_close()
    for path in ("/", "/state", f"/state?node={S1}", "/files/report.html", "/files/plan.json", "/nothing"):
        ask(server, path)
    assert snapshot(folder.runs) == before


def test_a_plan_that_is_damaged_later_is_said(folder, server):
    (folder.study / "plan.json").write_text("{")
    status, _, text = ask(server, "/state")
    assert status == 503
    assert "plan.json cannot be read" in text


def test_a_port_in_use_and_a_plan_that_cannot_be_read(folder, server):
    with pytest.raises(ConfigError, match="choose another one with --port"):
        make_server(folder.study, folder.store, port=server.server_address[1])
    (folder.study / "plan.json").write_text("[]")
    with pytest.raises(StoreError, match=r"plan\.json"):
        make_server(folder.study, folder.store, port=0)


def test_an_unknown_node_changes_nothing(folder, server):
    folder.log(S1, 1, 3)
    curves = [json.loads(ask(server, path)[2])["parts"]["curves"] for path in ("/state?node=x&node=%00&other=1", "/state")]
    assert curves[0] == curves[1]


def test_a_finished_study_is_asked_for_less_often(folder, server):
    folder.finish(*(key for key, *_ in PLAN.values()))
    assert json.loads(ask(server, "/state")[2])["pause"] == 10
