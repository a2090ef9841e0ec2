"""Every promise, met by real files, processes and sockets in a temporary home; `-m bench -s` measures."""

import contextlib
import http.server
import importlib.util
import itertools
import json
import logging
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import socketserver
import ssl
import stat
import statistics
import subprocess
import sys
import textwrap
import threading
import time
import tomllib
import urllib.parse
import zipfile

import pytest

import trix_telemetry

HERE = pathlib.Path(__file__).resolve().parent
MODULE = HERE / "trix_telemetry.py"
SOURCE = MODULE.read_text(encoding="utf-8")
FINGERPRINT = "0123456789abcdef" * 4
# Seconds that a test waits at most. It is no budget: a busy machine may need them.
LONG = 60
NEW_CONFIG = """\
[telemetry]
enabled = true
timeout_ms = 2000
# otlp_endpoint = "https://collector.example.com"

# [telemetry.otlp_headers]
"""
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX has it, Windows has not")
root = pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="it is about root")
NOBODY_ID = 65534
packages = pytest.mark.packages


class Collector:
    """A real OTLP/HTTP collector on loopback: keeps each request, answers as it is told."""

    def __init__(self, tls=None):
        self.requests = []
        self.answer = (200, {"Content-Type": "application/json"}, b"{}")
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.requests.append((self.requestline, dict(self.headers), body))
                status, headers, answer = collector.answer
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(answer))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args):
                pass

        self.server = serve(http.server.ThreadingHTTPServer, Handler, tls)
        self.port = self.server.server_address[1]
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.port}"

    @property
    def points(self):
        return [Point(body) for _, _, body in self.requests]

    @property
    def commands(self):
        return [point.command for point in self.points]

    @property
    def users(self):
        return {point.resource["user.fingerprint"] for point in self.points}

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class Point:
    """The one data point of a body."""

    def __init__(self, body):
        resource = json.loads(body)["resourceMetrics"][0]
        attributes = resource["resource"]["attributes"]
        self.resource = {a["key"]: a["value"]["stringValue"] for a in attributes}
        self.metric = resource["scopeMetrics"][0]["metrics"][0]
        self.data = self.metric["sum"]["dataPoints"][0]
        self.command = self.data["attributes"][0]["value"]["stringValue"]
        self.start = int(self.data["startTimeUnixNano"])
        self.end = int(self.data["timeUnixNano"])


def serve(kind, handler, tls=None):
    """Start a server on loopback that has a thread for each connection."""

    class Server(kind):
        request_queue_size = 256
        daemon_threads = True
        block_on_close = False
        accepted = 0

        def get_request(self):
            connection, address = super().get_request()
            self.accepted += 1
            return tls.wrap_socket(connection, server_side=True) if tls else connection, address

        def handle_error(self, request, address):
            pass

    server = Server(("127.0.0.1", 0), handler)
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home, an environment and a handle of its own for each test."""
    own = ("TRIX_", "ACME_", "SSL_CERT_", "OTEL_", "XDG_", "PYTHOND", "PYTHONU", "PYTHONW", "CI", "DO_NOT_TRACK")
    for name in list(os.environ):
        if name.upper().endswith("_PROXY") or name.startswith(own):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    # Windows keeps a tool's files below APPDATA: here, in the place that they have elsewhere.
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("APPDATA", str(tmp_path / ".config"))
    monkeypatch.setattr(trix_telemetry, "current_settings", trix_telemetry.Settings())
    monkeypatch.setattr(trix_telemetry, "current_session", None)
    return tmp_path


@pytest.fixture
def state(home):
    return home / ".tx3" / "trix"


@pytest.fixture
def collector():
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture
def here(collector, monkeypatch):
    """The collector, as the environment's endpoint."""
    monkeypatch.setenv("TRIX_TELEMETRY_ENDPOINT", collector.url)
    return collector


@pytest.fixture
def hostile():
    """Starts servers that speak with each connection by a function."""
    servers = []

    def start(speak):
        kind = type("Handler", (socketserver.BaseRequestHandler,), {"handle": lambda self: speak(self.request)})
        servers.append(serve(socketserver.ThreadingTCPServer, kind))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def config(state):
    """Writes config.toml: its text, or the settings of its table beside `enabled = true`."""

    def write(text=None, **settings):
        if text is None:
            settings = {"enabled": True, **settings}
            lines = [f"{key} = {json.dumps(value)}\n" for key, value in settings.items()]
            text = "".join(["[telemetry]\n", *lines])
        state.mkdir(parents=True, exist_ok=True)
        path = state / "config.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def track(name="build"):
    """Track in this process, and wait for the thread as the end of the process would."""
    thread = trix_telemetry.track_command_execution(name)
    if thread is not None:
        thread.join(LONG)
        assert not thread.is_alive()
    return thread


TRACK = "trix_telemetry.track_command_execution('build')\n"


def script(code=TRACK, module="trix_telemetry", path=HERE):
    return f"import sys; sys.path.insert(0, {str(path)!r}); import {module}\n" + textwrap.dedent(code)


def run(command, **options):
    """Run a process to its end. Of `env`, None removes a variable."""
    env = {**os.environ, **options.pop("env", {})}
    env = {name: value for name, value in env.items() if value is not None}
    if not {"stdout", "stderr"} & set(options):
        options["capture_output"] = True
    options = {"timeout": LONG, "text": True, "stdin": subprocess.DEVNULL} | options
    return subprocess.run([str(part) for part in command], env=env, check=False, **options)


def tool(code=TRACK, *flags, **options):
    """Run a tool: a process that imports the module and ends right after its code."""
    return run([sys.executable, *flags, "-c", script(code)], **options)


def cli(*arguments, **options):
    """Run the command line as a person would."""
    return run([sys.executable, MODULE, *arguments], **options)


def is_silent(done):
    """Tell whether a tool ended as it would have without telemetry."""
    return (done.returncode, done.stdout, done.stderr) == (0, "", "")


def names(path):
    return sorted(each.name for each in path.iterdir())


# The shape of the file


def test_importing_or_off_loads_no_module_starts_no_thread_and_makes_nothing(config, state, here):
    config("[telemetry]\nenabled = false\n")
    code = f"import os, sys, time; before = set(sys.modules)\n{script(f'assert {TRACK.strip()} is None')}\n"
    done = run([sys.executable, "-I", "-S", "-c", f"{code}print(sorted(set(sys.modules) - before))"])
    assert (done.stdout, names(state), here.requests) == ("['trix_telemetry']\n", ["config.toml"], [])


# Settings: a tool is itself


LOADERS = {
    "exec with nothing": "space = {}\nexec(source, space)\nmodule = types.SimpleNamespace(**space)",
    "a new module": "module = types.ModuleType('usage')\nexec(source, module.__dict__)",
    "an importer of its own": """
class Finder:
    def find_spec(name, path, target=None):
        if name == "usage":
            return importlib.machinery.ModuleSpec(name, Finder)
    def create_module(spec):
        return None
    def exec_module(module):
        exec(source, module.__dict__)
sys.meta_path.insert(0, Finder)
import usage as module
""",
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_copy_that_is_loaded_from_memory_sends_and_has_its_commands(here, name):
    load = f"import importlib.machinery, sys, types\nsource = open({str(MODULE)!r}).read()\n{LOADERS[name]}\n"
    done = run([sys.executable, "-c", f"{load}module.track_command_execution('build')"])
    assert (done.returncode, done.stdout, here.commands) == (0, "", ["build"])
    inspect = "python -m usage status" if "importer" in name else "set TRIX_TELEMETRY_DEBUG=1"
    assert f"  Inspect:   {inspect}\n" in done.stderr
    for command in ("status", "preview", "disable"):
        done = run([sys.executable, "-c", f"{load}sys.exit(module.main([{command!r}]))"])
        assert (done.returncode, done.stderr) == (0, "")
    done = run([sys.executable, "-c", f"{load}sys.exit(module.main(['selftest']))"])
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch("trix-cli: error: selftest starts Python with this file.*\n", done.stderr)


VENDORED = """
from acme._vendor import usage
usage.initialize_telemetry(service_name="acme", service_version="3", endpoint={url!r}{more})
usage.track_command_execution("build")
"""


@pytest.fixture
def acme(home):
    """A tool that copied the file, beside a home in which Trix is on, for a collector of its own."""
    vendor = home / "lib" / "acme" / "_vendor"
    vendor.mkdir(parents=True)
    (vendor / "usage.py").write_text(SOURCE, encoding="utf-8")
    for package in (vendor, vendor.parent):
        (package / "__init__.py").touch()
    trix = home / ".tx3" / "trix"
    trix.mkdir(parents=True)
    (trix / "config.toml").write_text(
        '[telemetry]\nenabled = true\ntimeout_ms = 2000\notlp_endpoint = "http://127.0.0.1:9"\n'
    )
    (trix / "fingerprint").write_text("0123456789abcdef")

    def call(url, more="", code="", **options):
        text = script(VENDORED.format(url=url, more=more) + code, "acme", home / "lib")
        return run([sys.executable, "-c", text], **options)

    return call


def test_a_tool_leaves_nothing_of_trix_anywhere_and_its_texts_name_what_works(acme, collector, home, state):
    def read(directory):
        return {str(path): path.read_bytes() for path in directory.rglob("*.*")}

    before, own = read(state), home / ".config" / "acme" / "telemetry"
    more = ", docs_url='https://acme.example/usage'"
    done = acme(collector.url, more, code="print(usage.main(['status']), usage.main(['--help']))")
    ((_, headers, body),) = collector.requests
    assert (done.returncode, names(own), read(state)) == (0, ["config.toml", "fingerprint"], before)
    assert headers.pop("User-Agent") == "trix-telemetry/3.0.0"
    assert "trix" not in f"{done.stdout}{done.stderr}{headers}{body}{read(own)}".replace(str(home), "").lower()
    assert "ACME_TELEMETRY=0 or DO_NOT_TRACK=1" in done.stderr
    assert str(own / "config.toml") in done.stderr
    assert done.stdout.startswith("Telemetry of acme is on\n")
    assert "https://acme.example/usage\n" in done.stdout
    assert "https://acme.example/usage\n" in done.stderr
    assert "python -m" not in done.stdout + done.stderr
    assert max(map(len, done.stdout.partition("usage:")[2].splitlines())) <= 80
    done = acme(collector.url, code="usage.main(['--version']), usage.main([], prog='acme usage')")
    assert done.stdout.startswith("telemetry 3.0.0\nTelemetry of acme is on\n")
    assert "acme usage enable, acme usage disable\n" in done.stdout


def test_each_argument_can_be_given(acme, collector, home):
    more = f", metric_name='runs', directory={str(home / 'own')!r}, environment='MY_USAGE', commands=['test']"
    code = (
        "for name in ('test', 'newcmd'): usage.track_command_execution(name)\nsys.exit(usage.main(['track', 'newcmd']))"
    )
    done = acme(collector.url, more, code)
    assert [(p.command, p.metric["name"]) for p in collector.points] == [("test", "runs")]
    assert names(home / "own") == ["config.toml", "fingerprint"]
    assert done.stderr.endswith("acme: error: newcmd is not among the tool's commands\n")
    done = acme(collector.url, more, code, env={"MY_USAGE_DEBUG": "1", "ACME_TELEMETRY": "0"})
    assert "acme: telemetry is off: newcmd is not among the tool's commands\n" in done.stderr
    acme(collector.url, more, code, env={"MY_USAGE": "0"})
    assert len(collector.requests) == 1


def test_two_copies_in_one_process_do_not_know_of_each_other(acme, collector, home):
    shutil.copytree(home / "lib" / "acme", home / "lib" / "other")
    other = Collector()
    code = VENDORED.replace("acme", "other").format(url=other.url, more="")
    join = "import threading\nfor thread in threading.enumerate()[1:]: thread.join()\n"
    acme(collector.url, code=f"{code}{join}from acme._vendor import usage\nusage.main(['disable'])\n")
    assert [p.resource["service.name"] for p in collector.points] == ["acme"]
    assert [p.resource["service.name"] for p in other.points] == ["other"]
    assert collector.users.isdisjoint(other.users)
    acme(collector.url, code=code)
    other.close()
    assert (len(collector.requests), len(other.requests)) == (1, 2)


def test_headers_go_to_the_endpoint_of_the_tool_alone(acme, collector, home):
    more = ", headers={'Authorization': 'secret', 'Bad Name': 'x', 'Host': 'x'}"
    acme("http://127.0.0.1:9", more, env={"ACME_TELEMETRY_ENDPOINT": collector.url})
    path = home / ".config" / "acme" / "telemetry" / "config.toml"
    path.write_text(f'[telemetry]\nenabled = true\notlp_endpoint = "{collector.url}"\n')
    acme("http://127.0.0.1:9", more)
    assert ["Authorization" in headers for _, headers, _ in collector.requests] == [False, False]
    path.write_text("[telemetry]\nenabled = true\n")
    acme(collector.url, more)
    headers = collector.requests[2][1]
    assert (headers["Authorization"], "Bad Name" in headers) == ("secret", False)
    code = "usage.main(['preview']); usage.main(['status']); usage.main(['status', '--json'])"
    done = acme(collector.url, more, code)
    assert "Authorization: (hidden)" in done.stdout
    assert "secret" not in done.stdout + done.stderr
    assert "secret" not in acme(collector.url, more, env={"ACME_TELEMETRY_DEBUG": "1"}).stderr


def test_opt_in_makes_and_says_nothing_until_enable(acme, collector, home):
    assert is_silent(acme(collector.url, ", opt_in=True"))
    assert not (home / ".config").exists()
    done = acme(collector.url, ", opt_in=True", "usage.main(['status']); usage.main(['enable'])")
    assert done.stdout.startswith("Telemetry of acme is off: it is opt-in, and ")
    assert is_silent(acme(collector.url, ", opt_in=True"))
    assert collector.commands == ["build"]


def test_a_service_name_becomes_one_safe_slug_and_xdg_config_home_is_honoured(here, home, monkeypatch):
    slugs = {"My Tool/2.0": "my_tool_2_0", "\u00fcml\u00e4ut": "_ml_ut", "../../etc": "______etc", "x" * 200: "x" * 200}
    monkeypatch.chdir(home)
    for base in ("relative", str(home / "xdg")):
        monkeypatch.setenv("XDG_CONFIG_HOME", base)
        for name, slug in slugs.items():
            trix_telemetry.initialize_telemetry(service_name=name, service_version="1", endpoint=here.url)
            track()
            assert here.points[-1].metric["name"] == f"{slug}_command_invocation"
            with monkeypatch.context() as patch:
                patch.setenv(f"{slug.upper()}_TELEMETRY", "0")
                assert track() is None
    assert names(home / ".config") == names(home / "xdg") == sorted(slugs.values())
    assert names(home) == [".config", "xdg"]


def test_the_directory_of_a_tool_that_names_none(here, home, monkeypatch):
    monkeypatch.setenv("APPDATA", str(home / "Roaming"))
    trix_telemetry.initialize_telemetry(service_name="acme", service_version="1", endpoint=here.url)
    track()
    base = "Roaming" if os.name == "nt" else ".config"
    assert names(home / base / "acme" / "telemetry") == ["config.toml", "fingerprint"]


def test_a_copy_with_its_values_edited(acme, collector, home):
    values = {
        "service_name": "acme", "service_version": "3", "endpoint": collector.url,
        "metric_name": "acme_runs", "directory": "~/.acme", "environment": "ACME_USAGE",
    }  # fmt: skip
    text = SOURCE
    for name, value in values.items():
        text, count = re.subn(rf'(?m)^    {name} = ".*"', f'    {name} = "{value}"', text)
        assert count == 1
    vendor = home / "lib" / "acme" / "_vendor" / "usage.py"
    vendor.write_text(text, encoding="utf-8")
    code = "from acme._vendor import usage\nusage.track_command_execution('build')\n"
    done = run([sys.executable, "-c", script(code, "acme", home / "lib")])
    assert "python -m acme._vendor.usage disable" in done.stderr
    env = {"PYTHONPATH": str(home / "lib")}
    for command in ("status", "disable", "selftest"):
        done = run([sys.executable, "-m", "acme._vendor.usage", command], env=env)
        assert (done.returncode, done.stderr) == (0, "")
    assert names(home / ".acme") == ["config.toml", "fingerprint"]
    assert b"enabled = false" in (home / ".acme" / "config.toml").read_bytes()
    (point,) = collector.points
    assert (point.metric["name"], point.resource["service.name"]) == ("acme_runs", "acme")


WRONG = [
    ("endpoint", 5), ("service_name", b"x"), ("service_name", ""), ("service_name", None),
    ("service_version", 1.0), ("service_version", None), ("metric_name", []), ("directory", 7),
    ("directory", "relative"), ("directory", ""), ("directory", object()),
    ("environment", ""), ("prog", "a\nb"), ("commands", "build"), ("commands", 5),
    ("commands", ["a", 1]), ("commands", (name for name in ["build"])), ("endpoint", "\ud800"),
    ("service_name", "a\0"), ("headers", ["a"]), ("headers", {"a": 1}), ("docs_url", 3),
    ("opt_in", "no"), ("endpoint", "ftp://me:secret@h"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_value_of_the_wrong_type_sends_nothing_and_status_names_it(collector, home, capfd, name, value):
    given = {"service_name": "acme", "service_version": "1", "endpoint": collector.url}
    trix_telemetry.initialize_telemetry(**{**given, name: value})
    assert track() is None
    assert (collector.requests, capfd.readouterr(), names(home)) == ([], ("", ""), [])
    assert trix_telemetry.main(["status"]) == 1
    out = capfd.readouterr().out
    assert re.match(rf"Telemetry of .* is off: {name} of the tool must be ", out), out
    assert "secret" not in out
    assert trix_telemetry.main(["status", "--json"]) == 1
    for command in (["enable"], ["preview"], ["track", "a"], ["reset"], ["selftest"]):
        assert trix_telemetry.main(command) in (0, 1)
    assert "Traceback" not in capfd.readouterr().err


# Command names, endpoints and headers


def test_what_is_no_command_name_is_dropped_whole(here, home, capfd):
    pattern, found = re.compile("[A-Za-z][A-Za-z0-9_-]{0,63}"), []
    odd = [None, 7, b"build", ["build"], object(), "me@example.com", "/etc/passwd", "b\u0443ild", "\uff42uild", "a\0"]
    for seed in range(3000):
        dice = random.Random(seed)
        found.append("".join(dice.choices("aZ09_-. \u00e9\n/", k=dice.choice([0, 1, 2, 5, 64, 65]))))
    for name in found + odd:
        is_name = isinstance(name, str) and bool(pattern.fullmatch(name))
        with contextlib.nullcontext() if is_name else pytest.raises(trix_telemetry.NotSent):
            trix_telemetry.check_command(name, None)
    assert [track(name) for name in odd] == [None] * len(odd)
    assert (here.requests, names(home), capfd.readouterr()) == ([], [], ("", ""))


def test_the_path_is_appended_once():
    for base, url in (
        ("http://h", "http://h/v1/metrics"),
        ("https://h:8443/otlp/", "https://h:8443/otlp/v1/metrics"),
        ("http://h//", "http://h/v1/metrics"),
        ("http://h/a/v1/metrics/", "http://h/a/v1/metrics"),
        ("http://v1/metrics", "http://v1/metrics/v1/metrics"),
        ("http://[::1]:4318", "http://[::1]:4318/v1/metrics"),
        ("HTTP://H", "http://H/v1/metrics"),
    ):
        assert trix_telemetry.parse_endpoint(base, "x") == url


def test_generated_urls_never_name_another_host():
    parts = ["http", "https", "://", "h", "@", ":", "80", "/", "?", "#", "[", "::1", "]", ".", "\\"]
    for seed in range(5000):
        dice = random.Random(seed)
        base = dice.choice(["", "http://", "https://h"]) + "".join(dice.choices(parts, k=4))
        with contextlib.suppress(trix_telemetry.InvalidSetting):
            url = urllib.parse.urlsplit(trix_telemetry.parse_endpoint(base, "x"))
            assert (url.username, url.query, url.fragment) == (None, "", "")


BAD_URLS = [
    "file:///etc/passwd", "ftp://example.com", "example.com:4318", "http://", "//example.com",
    "http:///v1/metrics", "https://me:secret@example.com", "http://@example.com", " http://h",
    "http://exam ple.com", "http://h/\n", "http://h:99999", "http://h:http", "http://h:0", "http://[::1",
    "http://h/?token=1", "http://h/#a", "http://h?", "http://\u00fcber.example", "http://h\n",
    "http://[::1]abc:80", "http://a[::1]:80", "http://*", "https://u:SE?CRET@h", "http://h/\u00e4",
    "https://u:SECRET//x@h", "http://h:", "http://h:\u0661",
]  # fmt: skip


@pytest.mark.parametrize("base", BAD_URLS)
def test_a_bad_url_is_off_and_its_value_is_not_shown(config, collector, capfd, monkeypatch, base):
    config(otlp_endpoint=base)
    track()
    assert trix_telemetry.main(["status"]) == 1
    told = capfd.readouterr()
    assert "telemetry.otlp_endpoint must be an http or https base URL" in told.out
    config()
    monkeypatch.setenv("TRIX_TELEMETRY_ENDPOINT", base)
    track()
    assert trix_telemetry.main(["status"]) == 1
    told += capfd.readouterr()
    assert "TRIX_TELEMETRY_ENDPOINT must be an http or https base URL" in told[2]
    assert (base.strip() in "".join(told), collector.requests) == (False, [])


def test_configured_headers_are_added_by_the_rules(here, config):
    bad = ["X-Caf\u00e9", "X Space", "X:Colon", "X\\nLine", "", "content-TYPE", "Content-Length", "user-agent", "host",
           "connection", "Transfer-Encoding"]  # fmt: skip
    lines = [f'"{name}" = "1"' for name in bad]
    lines += ['X-Break = "a\\r\\nX-Injected: b"', 'X-Control = "\\u0001"', 'X-Wide = "\u0416"']
    lines += ['Authorization = "Bearer abc"', 'X-Latin = "caf\u00e9"']
    config("[telemetry]\nenabled = true\n[telemetry.otlp_headers]\n" + "\n".join(lines))
    track()
    ((_, headers, body),) = here.requests
    assert headers == {
        "Accept-Encoding": "identity",
        "Authorization": "Bearer abc",
        "X-Latin": "caf\u00e9",
        "User-Agent": "trix-telemetry/3.0.0",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Host": here.url.removeprefix("http://"),
        "Connection": "close",
    }


# The data point


def test_the_body_is_the_one_of_the_contract_to_the_byte():
    start = 1640995200000000000
    metric = trix_telemetry.CommandMetric("trix_command_invocation", "build", start, start + 250000000)
    resource = {"service.name": "trix-cli", "service.version": "0.19.3"}
    assert metric.encode({**resource, "user.fingerprint": FINGERPRINT}).decode() == (
        '{"resourceMetrics":[{"resource":{"attributes":['
        '{"key":"service.name","value":{"stringValue":"trix-cli"}},'
        '{"key":"service.version","value":{"stringValue":"0.19.3"}},'
        f'{{"key":"user.fingerprint","value":{{"stringValue":"{FINGERPRINT}"}}}}]}},'
        '"scopeMetrics":[{"scope":{},"metrics":[{"name":"trix_command_invocation","sum":{'
        '"dataPoints":[{"attributes":[{"key":"command_name","value":{"stringValue":"build"}}],'
        '"startTimeUnixNano":"1640995200000000000","timeUnixNano":"1640995200250000000",'
        '"asInt":"1"}],"aggregationTemporality":2,"isMonotonic":true}}]}]}]}'
    )


def test_an_interval_begins_at_the_call_takes_a_millisecond_and_overlaps_none(here, config):
    config()
    before = time.time_ns()
    for _ in range(6):
        threads = [trix_telemetry.track_command_execution("build") for _ in range(4)]
        for thread in filter(None, threads):
            thread.join(LONG)
    intervals = sorted((point.start, point.end) for point in here.points)
    assert len(intervals) == 24
    assert before <= intervals[0][0] < intervals[-1][1] <= time.time_ns() + 24_000_000
    assert all(end - start >= 1_000_000 for start, end in intervals)
    assert all(one[1] <= two[0] for one, two in itertools.pairwise(intervals))


# Opt-out, standard streams and _DEBUG


SWITCHES = {
    "DO_NOT_TRACK": (["1", "true", "yes", "anything", " "], ["", "0", "false", "No", "OFF"]),
    "TRIX_TELEMETRY": (["0", "off", "no", "n", "disabled", " 1"], ["", "1", "true", "Yes", "ON"]),
}


@pytest.mark.parametrize("variable", SWITCHES)
def test_a_variable_turns_off_whatever_the_file_says(here, config, monkeypatch, variable):
    config()
    for value in itertools.chain(*SWITCHES[variable]):
        monkeypatch.setenv(variable, value)
        before = len(here.requests)
        track()
        assert len(here.requests) - before == (value in SWITCHES[variable][1])


CLOSE = ["{}<&-", "{}>&-", "{} 2>&-", "{} <&- >&- 2>&-"]


@posix
@pytest.mark.parametrize("redirect", CLOSE)
@pytest.mark.parametrize("is_there", [True, False])
def test_with_a_closed_stream_nothing_is_sent_and_no_number_is_taken(here, config, state, redirect, is_there):
    if is_there:
        config()
    code = script(f"{TRACK}sys.exit(5)")
    done = run(["sh", "-c", f'exec {sys.executable} -c "$0" {redirect.format("")}', code])
    assert (done.returncode, done.stdout, done.stderr) == (5, "", "")
    assert (here.requests, state.exists()) == ([], is_there)


def test_debug_shows_the_request_and_sends_nothing(here, config, state):
    path = config('[telemetry]\nenabled = true\n[telemetry.otlp_headers]\nX-Key = "secret"\n')
    debug = {"TRIX_TELEMETRY_DEBUG": "1"}
    done = tool(f"assert {TRACK.strip()} is None", env=debug)
    assert (done.returncode, done.stdout, here.requests) == (0, "", [])
    head, _, body = done.stderr.partition("\n\n")
    assert head.splitlines()[:2] == ["trix-cli: telemetry would send", "POST /v1/metrics HTTP/1.1"]
    assert "X-Key: (hidden)" in head
    assert Point(body).command == "build"
    assert "secret" not in done.stderr
    path.unlink()
    assert "POST" in tool(env=debug).stderr
    assert names(state) == []


REASONS = [
    ({"DO_NOT_TRACK": "1", "TRIX_TELEMETRY": "0"}, "", "DO_NOT_TRACK is set"),
    ({"TRIX_TELEMETRY": "0", "TRIX_TELEMETRY_ENDPOINT": ""}, "", "TRIX_TELEMETRY is set"),
    ({}, "[telemetry]\nenabled = false\n", "config.toml says enabled = false"),
    ({}, "[telemetry]\nenable = false\n", "config.toml has no telemetry.enabled"),
    ({}, "true = true\n", "config.toml has no telemetry.enabled"),
    ({"TRIX_TELEMETRY_ENDPOINT": ""}, "[telemetry]\nenabled = false\n", "says enabled = false"),
    ({}, "[telemetry]\ntimeout_ms = 0\n", "telemetry.timeout_ms must be an integer, 1 to 60000"),
    ({}, "not toml", "config.toml must be TOML"),
    ({"TRIX_TELEMETRY_ENDPOINT": ""}, "", "there is no endpoint: TRIX_TELEMETRY_ENDPOINT is empty"),
    ({"TRIX_TELEMETRY_ENDPOINT": None}, "", "there is no endpoint: endpoint of the tool is empty"),
    ({}, '[telemetry]\nenabled = true\notlp_endpoint = ""\n', None),
    ({"CI": "true"}, "", "CI is set, and "),
]


@pytest.mark.parametrize(("env", "text", "reason"), REASONS)
def test_the_first_reason_is_told_by_debug_status_preview_and_track(here, config, state, env, text, reason):
    if text:
        config(text)
    debug = tool(env={**env, "TRIX_TELEMETRY_DEBUG": "yes"}).stderr
    before = names(state.parent.parent)
    done = cli("preview", env={**env, "TRIX_TELEMETRY_DEBUG": "1"})
    assert (done.returncode, Point(done.stdout.partition("\n\n")[2]).command) == (0, "build")
    assert names(state.parent.parent) == before
    assert reason is None or "This is not sent. Telemetry is off: " in done.stderr
    status = cli("status", env=env).stdout.splitlines()[0]
    done = cli("track", "build", env=env)
    if reason is None:
        assert (done.returncode, status) == (0, "Telemetry of trix-cli is on")
        return
    assert debug.startswith("trix-cli: telemetry is off: ")
    assert reason in debug
    assert status.startswith("Telemetry of trix-cli is off: ")
    assert reason in status
    assert re.fullmatch(f"Not sent. Telemetry is off: .*{re.escape(reason)}.*\n", done.stdout)
    assert here.requests == []


# The first run


def test_a_first_run_makes_the_config_tells_and_counts(here, state, capfd):
    track()
    out, notice = capfd.readouterr()
    assert (state / "config.toml").read_text() == NEW_CONFIG
    assert (out, notice.count("trix-cli")) == ("", 1)
    assert f"  Sent to:   {here.url}/v1/metrics\n" in notice
    assert "python -m trix_telemetry disable" in notice
    assert "TRIX_TELEMETRY=0 or DO_NOT_TRACK=1" in notice
    assert max(map(len, notice.splitlines())) <= 80
    assert here.commands == ["build"]
    track()
    assert capfd.readouterr() == ("", "")
    assert here.commands == ["build", "build"]


def test_a_first_run_in_ci_makes_and_sends_nothing(here, config, home, monkeypatch):
    for value in ("true", "1", "anything"):
        monkeypatch.setenv("CI", value)
        assert track() is None
    assert names(home) == []
    config()
    track()
    (home / ".tx3" / "trix" / "config.toml").unlink()
    for value in ("", "0", "false", "no", "Off"):
        monkeypatch.setenv("CI", value)
        track()
    assert len(here.requests) == 6


@posix
@pytest.mark.parametrize("umask", [0o022, 0o777, 0o000])
def test_what_is_made_is_for_the_user_alone_under_any_umask(here, home, state, umask):
    tool(f"import os; os.umask({umask}); {TRACK}")
    paths = [home / ".tx3", state, *state.iterdir()]
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in paths}
    assert modes == {".tx3": 0o700, "trix": 0o700, "config.toml": 0o600, "fingerprint": 0o600}
    assert here.commands == ["build"]


def test_without_an_endpoint_nothing_is_made_told_or_imported(home, capfd, config):
    code = f"before = set(sys.modules); assert {TRACK.strip()} is None; assert set(sys.modules) == before"
    assert is_silent(tool(code, "-S"))
    assert names(home) == []
    config(NEW_CONFIG.replace("2000", "3000"))
    assert track() is None


NO_NOTICE = {
    "full": "", "closed pipe": "", "full pipe": "", "None": "sys.stderr = None", "closed": "sys.stderr.close()",
    "a stream of the host": "sys.stderr = open('/dev/full', 'w')",
    "Ctrl-C": "class Stream:\n    def fileno(self): raise KeyboardInterrupt\nsys.stderr = Stream()",
}  # fmt: skip


@posix
@pytest.mark.parametrize("stream", NO_NOTICE)
def test_a_notice_that_cannot_be_shown_takes_the_file_back(here, state, stream):
    read, write = os.pipe()
    if stream == "closed pipe":
        os.close(read)
    elif stream == "full pipe":
        os.set_blocking(write, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(write, b"x" * 4096)
        os.set_blocking(write, True)
    with open("/dev/full", "wb") as full:
        code = f"import os, signal; signal.signal(signal.SIGPIPE, signal.SIG_DFL)\n{NO_NOTICE[stream]}\n"
        code += f"try: ({TRACK.strip()} or sys.exit(0)).join()\nexcept (KeyboardInterrupt, SystemExit): os._exit(0)"
        done = tool(code, stdout=subprocess.PIPE, stderr=full if stream == "full" else write)
    assert (done.returncode, done.stdout, here.requests) == (0, "", [])
    assert not (state / "config.toml").exists()
    assert "trix-cli" in tool().stderr
    assert here.commands == ["build"]


def at_one_moment(count, code):
    """Start processes that wait for each other before their code. Return what each said."""
    go = time.time() + 1 + count / 10
    code = f"import time\ntrix_telemetry.DEFAULT_TIMEOUT_MS = 60_000\ntime.sleep(max(0, {go} - time.time()))\n{code}"
    options = {"stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", script(code)], **options) for _ in range(count)]
    return [process.communicate(timeout=LONG)[1] for process in processes]


def test_of_many_first_runs_one_tells_and_all_are_one_user(here, state):
    # A tool that ends by an exception: the interpreter imports while the thread does.
    said = at_one_moment(20, f"{TRACK}raise ValueError('of the tool')")
    assert {text.splitlines()[-1] for text in said} == {"ValueError: of the tool"}
    assert sum("trix-cli" in text for text in said) == 1
    assert (len(here.requests), len(here.users)) == (20, 1)
    assert names(state) == ["config.toml", "fingerprint"]


def test_without_hard_links_everything_still_works(here, state):
    code = "import os\ndef link(*a, **k): raise PermissionError(1, 'no links')\nos.link = link\n"
    assert "trix-cli" in tool(code + TRACK).stderr
    assert is_silent(tool(f"import os; del os.link\n{TRACK}"))
    assert (len(here.requests), len(here.users)) == (2, 1)
    assert names(state) == ["config.toml", "fingerprint"]


MISSING = ["tomllib", "urllib", "urllib.request", "threading", "json", "http", "http.client", "hashlib", "socket",
           "atexit", "stat", "signal", "select", "re"]  # fmt: skip


@pytest.mark.parametrize("module", MISSING)
def test_a_python_without_a_module_is_silent_and_status_says_so(here, config, module):
    code = f"sys.modules[{module!r}] = None\n"
    config("# edited\n" + NEW_CONFIG)
    if module in ("http", "tomllib"):
        done = tool(f"{code}sys.exit(trix_telemetry.main(['status']))")
        assert (done.returncode, f"this Python has no module {module}" in done.stdout.splitlines()[0]) == (0, True)
    assert is_silent(tool(f"{code}thread = {TRACK}if thread: thread.join()\ndel sys.modules[{module!r}]"))


# Root in somebody else's home


@pytest.fixture
def foreign(home, monkeypatch):
    """Makes a home of another user's: as it is first, with a config, or with a directory of root's."""

    def make(kind):
        theirs = home / "theirs"
        directory = theirs / ".tx3" / "trix"
        if kind == "a link to their directory":
            directory.mkdir(parents=True)
            monkeypatch.setenv("HOME", str(home))
            (home / ".tx3").symlink_to(theirs / ".tx3")
            config = home / ".tx3" / "trix" / "config.toml"
        elif kind == "a config that is a link to their file":
            (home / ".tx3" / "trix").mkdir(parents=True)
            theirs.mkdir()
            monkeypatch.setenv("HOME", str(home))
            config = home / ".tx3" / "trix" / "config.toml"
            config.symlink_to(theirs / "config.toml")
        elif kind == "a link of theirs to a directory of root's":
            own = home / "own"
            own.mkdir()
            (theirs / ".tx3").mkdir(parents=True)
            directory.symlink_to(own)
            monkeypatch.setenv("HOME", str(theirs))
            config = directory / "config.toml"
        else:
            monkeypatch.setenv("HOME", str(theirs))
            theirs.mkdir() if kind == "their new home" else directory.mkdir(parents=True)
            config = directory / "config.toml"
        if kind != "their new home":
            config.write_text("[telemetry]\nenabled = true\n")
        for path in (theirs, *theirs.rglob("*")):
            os.lchown(path, NOBODY_ID, NOBODY_ID)
        if kind == "a directory of root's in their home":
            os.chown(directory, 0, 0)
        return theirs

    return make


def read_tree(directory):
    """Return each path below directory with its owner, mode and content."""
    tree = {}
    for path in (directory, *directory.rglob("*")):
        found = path.lstat()
        tree[str(path)] = (found.st_uid, found.st_mode, path.read_bytes() if path.is_file() else b"")
    return tree


FOREIGN = [
    "their new home",
    "their home",
    "a directory of root's in their home",
    "a link to their directory",
    "a config that is a link to their file",
    "a link of theirs to a directory of root's",
]


@root
@pytest.mark.parametrize("kind", FOREIGN)
def test_root_makes_and_sends_nothing_in_a_directory_of_another_user(here, home, foreign, kind):
    foreign(kind)
    before = read_tree(home)

    done = tool(f"assert {TRACK.strip()} is None")

    assert is_silent(done)
    assert here.requests == []
    assert read_tree(home) == before


@root
@pytest.mark.parametrize("kind", FOREIGN)
def test_status_tells_root_whose_directory_it_is(here, home, foreign, kind):
    foreign(kind)
    before = read_tree(home)

    done = cli("status")

    assert done.returncode == 0
    first = done.stdout.splitlines()[0]
    assert re.fullmatch("Telemetry of trix-cli is off: .* belongs to user 65534, and this is root", first)
    assert read_tree(home) == before


@root
@pytest.mark.parametrize("command", ["enable", "disable", "reset"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_root_changes_nothing_in_a_directory_of_another_user_and_is_told(here, home, foreign, kind, command):
    foreign(kind)
    before = read_tree(home)

    done = cli(command)

    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch("trix-cli: error: .* belongs to user 65534, and this is root.*\n", done.stderr)
    assert read_tree(home) == before


@root
@pytest.mark.parametrize("command", ["preview", "selftest"])
def test_preview_and_selftest_work_for_root_in_the_home_of_another_user(here, home, foreign, command):
    foreign("their home")
    before = read_tree(home)

    done = cli(command)

    assert done.returncode == 0
    assert read_tree(home) == before


@root
def test_root_in_a_home_of_its_own_sends(here, config):
    config()

    track()

    assert here.commands == ["build"]


COUNT_LOOKS = """
import os
looks = []
lstat = os.lstat
def count(path, **options):
    looks.append(path)
    return lstat(path, **options)
os.lstat = count
"""


@root
def test_the_owner_costs_no_system_call_where_telemetry_is_off_or_the_user_is_not_root(config, here):
    path = config("[telemetry]\nenabled = false\n")
    off = tool(f"{COUNT_LOOKS}{TRACK}print(len(looks))")
    path.write_text("[telemetry]\nenabled = true\n")
    on = tool(f"{COUNT_LOOKS}{TRACK}print(len(looks))")
    user = tool(f"{COUNT_LOOKS}os.geteuid = lambda: 1000\n{TRACK}print(len(looks))")

    assert off.stdout == "0\n"
    assert int(on.stdout) > 0
    assert user.stdout == "0\n"


ATTACKER = """
import os
import sys

directory, secret = sys.argv[1:]
config = os.path.join(directory, "config.toml")
os.setgid(65534)
os.setuid(65534)
print("ready", flush=True)
while True:
    for entry in os.scandir(directory):
        try:
            if entry.name.endswith(".tmp"):
                os.unlink(entry.path)
                os.symlink(secret, entry.path)
            elif entry.is_symlink():
                os.unlink(config)
                with open(config, "w") as file:
                    file.write("[telemetry]\\nenabled = true\\n")
        except OSError:
            pass
"""


WATCH_MODES = """
import os, sys
os.umask(0o777)
def watch(event, arguments):
    if event in ("os.chmod", "os.chown") and not isinstance(arguments[0], int):
        print(event, arguments)
sys.addaudithook(watch)
"""


@posix
def test_modes_and_owners_are_set_on_open_files_never_by_path(here, config):
    code = f"{WATCH_MODES}thread = {TRACK}if thread: thread.join()\nos.write(1, b'done')"
    assert tool(code).stdout == "done"
    config()
    assert tool(f"{WATCH_MODES}trix_telemetry.main(['disable'])").stdout.startswith("Telemetry disabled")


@root
def test_a_user_who_puts_links_in_the_way_of_root_gets_no_file_of_root(home, foreign):
    theirs = foreign("their home")
    for parent in [path for path in theirs.parents if "pytest" in str(path)]:
        parent.chmod(0o755)
    secret = home / "secret"
    secret.write_text("of root")
    secret.chmod(0o600)
    command = [sys.executable, "-c", ATTACKER, str(theirs / ".tx3" / "trix"), str(secret)]
    attacker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert attacker.stdout.readline() == "ready\n"

    for _ in range(20):
        cli("disable")
        cli("enable")

    is_running = attacker.poll() is None
    attacker.kill()
    attacker.communicate()
    assert is_running
    assert (secret.stat().st_uid, stat.S_IMODE(secret.stat().st_mode)) == (0, 0o600)
    assert secret.read_text() == "of root"


# config.toml


OFF = [
    "[telemetry]\nenabled = false\n", "telemetry.enabled = false\nx = true\n",
    "telemetry = { enabled = false, x = true }\n",
    '["telemetry"]\n"\\u0065nabled" = false # true\n', "[telemetry]\n# enabled = true\n", "enabled = true\n", "",
    '[telemetry]\nnote = "enabled = true"\n', "[other]\nenabled = true\n", "[telemetry.more]\nenabled = true\n",
    "[telemetry]\nenable = false\n", "[telemetry]\ntimeout_ms = 2000 # true\n",
]  # fmt: skip


@pytest.mark.parametrize("text", OFF)
def test_whatever_does_not_say_true_is_off_and_left_alone(here, config, state, capfd, text):
    path = config(text)
    track()
    assert (here.requests, capfd.readouterr()) == ([], ("", ""))
    assert (path.read_text(), names(state)) == (text, ["config.toml"])
    assert trix_telemetry.main(["status"]) == 0
    assert capfd.readouterr().out.startswith("Telemetry of trix-cli is off: ")


ON = [
    "telemetry.enabled = true\n", 'telemetry = { timeout_ms = 30000, "enabled" = true }\n',
    '["telemetry"]\n"\\u0065nabled" = true\n', "# x\n" * 60_000 + "[telemetry]\nenabled = true\n",
    "[other]\nenabled = false\n[telemetry]\r\n\tenabled=true#\r\ncolour = 'blue'\r\n",
    "\ufeff[telemetry]\nenabled = true\n",
    # Of version 1.0, and of the Rust tool.
    NEW_CONFIG.replace("\n\n", "\n").replace("# [", "# x"),
    '[telemetry]\nenabled = true\ntimeout_ms = 2000\notlp_endpoint = "http://127.0.0.1:9"\n\n[telemetry.otlp_headers]\n',
]  # fmt: skip


@pytest.mark.parametrize("text", ON)
@pytest.mark.parametrize("fingerprint", ["0123456789abcdef", "A"])
def test_any_spelling_of_on_is_on_and_what_others_wrote_is_kept(here, config, state, text, fingerprint):
    path = config(text)
    (state / "fingerprint").write_text(fingerprint)
    track()
    assert here.users == {fingerprint} == {(state / "fingerprint").read_text()}
    assert path.read_bytes() == text.encode()


def test_generated_configs_are_never_off_early_where_a_parser_finds_them_on(config, here):
    lines = [
        "[telemetry]", "[other]", " [telemetry]", "[[list]]", "enabled = false", "enabled = true", "enabled=true # so",
        "# enabled = true", "x = [\n[1],\n]", 'y = """', '"""', "t = 'true'", '"enabled" = true',
        "telemetry.enabled = true", "telemetry = { enabled = true }",
    ]  # fmt: skip
    found = 0
    for seed in range(4000):
        text = "\n".join(random.Random(seed).choices(lines, k=seed % 6 + 1))
        with contextlib.suppress(tomllib.TOMLDecodeError, AttributeError):
            if tomllib.loads(text).get("telemetry", {}).get("enabled") is True:
                path = config(text)
                trix_telemetry.check_text(trix_telemetry.Settings(), path.read_bytes())
                found += 1
    assert found > 200


BAD_CONFIGS = [
    ("not toml, true", "config.toml must be TOML"),
    ("[telemetry]\nenabled = true\nenabled = true\n", "config.toml must be TOML"),
    ("[telemetry]\nenabled = true \0\n", "config.toml must be TOML"),
    (b"[telemetry]\nenabled = true # \xff\n", "config.toml must be TOML in UTF-8"),
    ("x = true\ny = " + "[" * 5000, "config.toml must be TOML"),
    ("# true" + " " * (1 << 20), "config.toml must not be larger than 1 MiB"),
    ("telemetry = true\n", "telemetry must be a table"),
    ("[[telemetry]]\nenabled = true\n", "telemetry must be a table"),
    ('[telemetry]\nenabled = "true"\n', "telemetry.enabled must be true or false"),
    ("[telemetry]\nenabled = 1 # true\n", "telemetry.enabled must be true or false"),
    *(
        (f"[telemetry]\nenabled = true\ntimeout_ms = {value}\n", "telemetry.timeout_ms must be")
        for value in ("0", "-1", '"5"', "true", "2.5", "1_000_000_000_000", "nan", "60001", "[]")
    ),
    (f"[telemetry]\nenabled = true\ntimeout_ms = 0x{'f' * 9000}\n", "telemetry.timeout_ms must be"),
    ("[telemetry]\nenabled = true\notlp_endpoint = 7\n", "telemetry.otlp_endpoint must be"),
    ("[telemetry]\nenabled = true\notlp_headers = []\n", "telemetry.otlp_headers must be"),
    ("[telemetry]\nenabled = true\n[telemetry.otlp_headers]\nA = 1\n", "telemetry.otlp_headers must"),
    ("[telemetry]\nenabled = true\notlp_headers = 'Authorization=SECRET'\n", "telemetry.otlp_headers"),
    ("[telemetry]\nenabled = true\notlp_headers = { A = ['SECRET'] }\n", "telemetry.otlp_headers"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "says"), BAD_CONFIGS)
def test_a_damaged_config_is_off_left_alone_and_named(here, config, state, caplog, capfd, text, says):
    path = config(text)
    before = path.read_bytes()
    track()
    track()
    assert (capfd.readouterr(), here.requests) == (("", ""), [])
    assert (path.read_bytes(), names(state)) == (before, ["config.toml"])
    ((name, level, message),) = caplog.record_tuples
    assert (name, level) == ("trix_telemetry", logging.WARNING)
    assert says in message
    assert trix_telemetry.main(["status"]) == 1
    out = capfd.readouterr().out
    assert out.startswith(f"Telemetry of trix-cli is off: {says}")
    assert trix_telemetry.main(["status", "--json"]) == 1
    for command in ("preview", "enable", "disable"):
        trix_telemetry.main([command])
    assert "SECRET" not in out + message + "".join(capfd.readouterr())


@posix
@pytest.mark.parametrize("place", ["fifo", "directory", "/dev/null", "/dev/zero", "loop"])
def test_what_is_no_file_is_off_and_left_alone(here, state, capfd, place):
    state.mkdir(parents=True)
    path = state / "config.toml"
    if place == "fifo":
        os.mkfifo(path)
    elif place == "directory":
        path.mkdir()
    else:
        path.symlink_to(path if place == "loop" else place)
    track()
    assert (here.requests, capfd.readouterr().err) == ([], "")
    assert names(state) == ["config.toml"]
    assert trix_telemetry.main(["status"]) == 0
    assert place == "loop" or capfd.readouterr().out.startswith("Telemetry of trix-cli is off: ")


@posix
def test_a_named_pipe_that_has_just_taken_the_place_of_the_config_holds_nothing_up(here, config):
    path = config()
    path.unlink()
    os.mkfifo(path)
    code = f"""
        import os
        look = os.stat
        os.stat = lambda path, **options: look({str(MODULE)!r} if path == {str(path)!r} else path, **options)
        assert {TRACK.strip()} is None
    """
    assert is_silent(tool(code, timeout=LONG / 2))


@posix
@pytest.mark.parametrize("place", ["the config", "the directory"])
def test_a_link_that_leads_nowhere_is_off_and_named_and_nothing_is_made(here, home, state, place):
    link = state / "config.toml" if place == "the config" else home / ".tx3"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(home / "away" / "nowhere")
    before = sorted(home.rglob("*"))

    assert is_silent(tool(f"assert {TRACK.strip()} is None"))
    status = cli("status")
    switches = [cli("enable"), cli("disable")]

    first = status.stdout.splitlines()[0]
    assert (status.returncode, first) == (
        0,
        f"Telemetry of trix-cli is off: {link} is a link that leads nowhere",
    )
    for done in switches:
        assert done.returncode == 1
        assert re.fullmatch("trix-cli: error: .* is a link that leads nowhere; nothing was changed\n", done.stderr)
    assert (sorted(home.rglob("*")), here.requests) == (before, [])


def test_the_environment_goes_before_the_file_and_the_file_before_the_tool(collector, config, monkeypatch):
    monkeypatch.setattr(trix_telemetry.Settings, "endpoint", f"{collector.url}/tool")
    config(otlp_endpoint=f"{collector.url}/file")
    track()
    monkeypatch.setenv("TRIX_TELEMETRY_ENDPOINT", f"{collector.url}/environment/")
    track()
    monkeypatch.delenv("TRIX_TELEMETRY_ENDPOINT")
    config()
    track()
    paths = [line.split()[1].removesuffix("/v1/metrics") for line, _, _ in collector.requests]
    assert paths == ["/file", "/environment", "/tool"]
    config(otlp_endpoint="")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    track()
    monkeypatch.setenv("TRIX_TELEMETRY_ENDPOINT", "")
    assert track() is None
    assert len(collector.requests) == 3


# The fingerprint


def test_the_fingerprint_is_made_once_and_kept(here, state):
    proposed = trix_telemetry.get_user_fingerprint()
    assert not state.exists()
    track()
    assert (state / "fingerprint").read_bytes().decode() == proposed
    track()
    assert re.fullmatch("[0-9a-f]{64}", proposed)
    assert here.users == {proposed} == {trix_telemetry.get_user_fingerprint()}


@pytest.mark.parametrize("junk", [b"", b"xyz", b"0" * 65, b"ab cd", b"\xff" * 16, b"0" * (4 << 20), None])
def test_junk_in_place_of_the_fingerprint_is_replaced_or_serves_this_process(here, config, state, junk):
    config()
    if junk is None:
        (state / "fingerprint").mkdir()
    else:
        (state / "fingerprint").write_bytes(junk)
    track()
    track()
    (stored,) = here.users
    assert re.fullmatch("[0-9a-f]{64}", stored)
    assert trix_telemetry.get_user_fingerprint() == stored
    assert junk is None or (state / "fingerprint").read_text() == stored


@posix
@pytest.mark.parametrize("target", ["good", "bad", "none"])
def test_a_fingerprint_that_is_a_link_leaves_its_target_alone(here, home, config, state, target):
    config()
    (home / "good").write_text(FINGERPRINT)
    (home / "bad").write_text("not hex")
    (state / "fingerprint").symlink_to(home / target)
    track()
    assert (FINGERPRINT in here.users) == (target == "good")
    assert ((home / "good").read_text(), (home / "bad").read_text()) == (FINGERPRINT, "not hex")


def test_without_a_home_no_file_of_the_working_directory_counts(here, home, monkeypatch, capsys):
    (home / "fingerprint").write_text("deadbeef")
    monkeypatch.chdir(home)
    for name in ("HOME", "USERPROFILE", "HOMEPATH", "HOMEDRIVE"):
        monkeypatch.delenv(name, raising=False)
    assert re.fullmatch("[0-9a-f]{64}", trix_telemetry.get_user_fingerprint())
    assert track() is None
    for command in ("status", "preview"):
        assert trix_telemetry.main([command]) == 0
    assert "deadbeef" not in "".join(capsys.readouterr())
    assert names(home) == ["fingerprint"]


# The back-off


def silence(connection):
    time.sleep(LONG)


def answer_late(connection):
    connection.recv(65536)
    time.sleep(1.4)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
    connection.recv(65536)


# The modules are there, so that the network phase begins at once, on a busy machine, too.
READY = "import json, hashlib, tomllib, ssl, urllib.request, encodings.idna\n"


@pytest.mark.parametrize("speak", [silence, answer_late, "look-up"])
def test_a_wait_for_the_network_is_not_paid_again(hostile, config, state, speak):
    code, server = READY + TRACK, hostile(silence if speak == "look-up" else speak)
    if speak == "look-up":
        code = f"{READY}import socket, time\nsocket.getaddrinfo = lambda *a, **k: time.sleep({LONG})\n{TRACK}"
    config(otlp_endpoint=server.url, timeout_ms=2000)
    assert is_silent(tool(code))
    url, reason = (state / "backoff").read_text().splitlines()
    assert url == f"{server.url}/v1/metrics"
    assert re.fullmatch(r"a command waited [12]\.\d s for the network", reason)
    assert is_silent(tool(READY + TRACK))
    assert server.accepted == (speak != "look-up")
    assert os.name == "nt" or stat.S_IMODE((state / "backoff").stat().st_mode) == 0o600
    status = cli("status").stdout
    assert status.startswith("Telemetry of trix-cli is on\n")
    assert re.search(r"  Back-off     (600|59\d) s more: a command waited", status)
    assert "back-off for " in tool(env={"TRIX_TELEMETRY_DEBUG": "1"}).stderr
    assert cli("enable").returncode == 0
    assert not (state / "backoff").exists()


def test_what_fails_by_itself_starts_no_back_off(here, hostile, config, state):
    config()
    for status in (400, 401, 404, 413, 500, 502):
        here.answer = (status, {}, b"go away")
        track()
    assert len(here.requests) == 6
    with socket.create_server(("127.0.0.1", 0)) as closed:
        refused = f"http://127.0.0.1:{closed.getsockname()[1]}"
    unknown = "import socket\ndef fail(*a, **k): raise socket.gaierror(-2, 'unknown')\nsocket.getaddrinfo = fail\n"
    held = hostile(silence).url
    for before, url, after in ((unknown, "http://h", ""), ("", refused, ""), ("", held, "time.sleep(1)")):
        config(timeout_ms=500 if after else 60_000)
        code = f"import time\n{before}{TRACK}{after}"
        assert is_silent(tool(code, env={"TRIX_TELEMETRY_ENDPOINT": url}, timeout=LONG / 2))
    assert names(state) == ["config.toml", "fingerprint"]
    for status in (429, 503):
        here.answer = (status, {}, b"")
        track()
        track()
        assert f"HTTP {status}" in (state / "backoff").read_text()
        (state / "backoff").unlink()
    assert len(here.requests) == 8


@pytest.mark.parametrize(
    "load",
    [
        "def load():\n    while True: pass",
        "def load():\n    import builtins\n    while True: pow(7, 10**5, 10**40000)",
    ],
)
def test_a_delay_of_the_hosts_own_making_starts_none(here, config, state, load):
    config()
    code = f"{load}\nimport threading\nthreading.Thread(target=load, daemon=True).start()\n{TRACK}"
    tool(code)
    assert "backoff" not in names(state)


@pytest.mark.parametrize(
    "text",
    ["", "junk", "http://other/v1/metrics\nr\n", "\x1b[31m\n{url}\n", b"\xff\xfe\x00", "{url}/\nr", "\n{url}"],
)
def test_a_damaged_or_foreign_file_means_none(here, config, state, capfd, text):
    config()
    data = text if isinstance(text, bytes) else text.format(url=f"{here.url}/v1/metrics").encode()
    (state / "backoff").write_bytes(data)
    track()
    assert here.commands == ["build"]
    assert trix_telemetry.main(["status"]) == 0
    out = capfd.readouterr().out
    assert ("Back-off" in out, "\x1b" in out) == (False, False)


@pytest.mark.parametrize(("age", "is_sent"), [(0, False), (590, False), (610, True), (-60, True)])
def test_it_takes_ten_minutes_from_the_modification_time(here, config, state, age, is_sent):
    config()
    path = state / "backoff"
    path.write_bytes(f"{here.url}/v1/metrics\nslow \x1b[31m\n".encode())
    os.utime(path, (time.time() - age, time.time() - age))
    track()
    assert bool(here.requests) == is_sent


# Sending, and a hostile network


def test_a_proxy_of_the_environment_is_honoured(here, monkeypatch):
    proxy = Collector()
    monkeypatch.setenv("http_proxy", proxy.url)
    track()
    assert proxy.requests[0][0] == f"POST {here.url}/v1/metrics HTTP/1.1"
    assert proxy.requests[0][1]["Host"] == here.url.removeprefix("http://")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    track()
    assert (len(proxy.requests), len(here.requests)) == (1, 1)
    proxy.close()


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS keeps to the environment")
def test_the_proxies_are_those_that_the_standard_library_finds(collector, config):
    config()
    code = f"import urllib.request\nurllib.request.getproxies = lambda: {{'http': {collector.url!r}}}\n{TRACK}"
    assert is_silent(tool(code, env={"TRIX_TELEMETRY_ENDPOINT": "http://collector.invalid"}))
    assert collector.requests[0][0] == "POST http://collector.invalid/v1/metrics HTTP/1.1"


ODD_PROXIES = [
    "https://me:secret@{}",
    "socks5://{}",
    "http://127.0.0.1:1/no",
    "http:/me:secret@{}",
    "http://me:secret@h:x",
]


@pytest.mark.parametrize("proxy", ODD_PROXIES)
def test_odd_proxies_get_nothing_and_show_nothing(here, collector, config, proxy):
    config()
    env = {"http_proxy": proxy.format(collector.url.removeprefix("http://"))}
    env |= {"TRIX_TELEMETRY_ENDPOINT": "http://127.0.0.2:1"}
    assert is_silent(tool(env=env))
    done = cli("track", "build", env=env)
    assert (done.returncode, done.stderr.count("\n"), "secret" in done.stderr) == (1, 1, False)
    assert collector.requests == []


@pytest.mark.parametrize("target", ["{url}/elsewhere", "file:///etc/passwd", "//other.invalid/"])
def test_redirects_are_not_followed(here, config, target):
    config()
    for status in (301, 302, 303, 307, 308):
        here.answer = (status, {"Location": target.format(url=here.url)}, b"")
        track()
    assert len(here.requests) == 5
    done = cli("track", "build")
    assert f"HTTP 308: it redirects to {target.format(url=here.url)}, which" in done.stderr
    assert (done.returncode, len(here.requests)) == (1, 6)


def drip(first, more, pause):
    def speak(connection):
        connection.recv(65536)
        connection.sendall(first)
        for _ in range(int(LONG / pause)):
            connection.sendall(more)
            time.sleep(pause)

    return speak


def say(*parts):
    def speak(connection):
        connection.recv(65536)
        for part in parts:
            connection.sendall(part)

    return speak


def reset(connection):
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def flood(connection):
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n")
    while True:
        connection.sendall(b"x" * 65536)


OK = b"HTTP/1.1 200 OK\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
HOLDS = {
    "says nothing": silence,
    "a handshake that never ends": silence,
    "a header every 300 ms": drip(OK, b"X-A: b\r\n", 0.3),
    "endless 100 Continue": drip(b"", CONTINUE, 0.05),
    "a flood of 100 Continue": drip(b"", CONTINUE * 40_000, 0.05),
    "a byte of the status every 100 ms": drip(b"", b"H", 0.1),
    "a body that never comes": drip(OK + b"Content-Length: 5\r\n\r\n", b"", 1),
}
DONE_AT_ONCE = {
    "noise": say(random.Random(1).randbytes(4096)),
    "a reset": reset,
    "a close": say(),
    "an endless header": drip(OK, b"x" * 65536, 0.001),
    "a body of 10 GB": flood,
    "a body that drips": drip(OK + b"Content-Length: 1000\r\n\r\n", b"x", 0.2),
    "chunks that are none": say(OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"),
}


@pytest.mark.parametrize("name", HOLDS)
def test_whatever_holds_the_line_the_process_ends_at_the_deadline(hostile, config, name):
    url = hostile(HOLDS[name]).url.replace("http", "https" if "handshake" in name else "http")
    config(otlp_endpoint=url, timeout_ms=700)
    done = tool(f"import os, time\nos.write(1, str(time.monotonic()).encode())\n{READY}{TRACK}")
    elapsed = time.monotonic() - float(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert elapsed < LONG / 4


@pytest.mark.parametrize("name", DONE_AT_ONCE)
def test_what_fails_or_succeeds_at_once_costs_no_time(hostile, config, state, name):
    config(otlp_endpoint=hostile(DONE_AT_ONCE[name]).url, timeout_ms=60_000)
    assert is_silent(tool(timeout=LONG / 2))
    assert "backoff" not in names(state)


# TLS

# An authority, and a certificate of it for localhost and 127.0.0.1, both until the year 2126.
AUTHORITY = """\
-----BEGIN CERTIFICATE-----
MIIBlTCCATygAwIBAgIUNmiDwmVQp4DOI6eNi+cvnAChRdgwCgYIKoZIzj0EAwIwKDENMAsGA1UECgwEVGVzdDEXMBUGA1UEAwwOVGVzdCBBdXRo
b3JpdHkwIBcNMjYxMTIzMDE1NDQyWhgPMjEyNjEwMzAwMTU0NDJaMCgxDTALBgNVBAoMBFRlc3QxFzAVBgNVBAMMDlRlc3QgQXV0aG9yaXR5MFkw
EwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEzGG7nRvl1M7P/c64uxxLKIaz1zv8MsDJax1WwYn0DDVHrZURlVTu9ZnUJPCz69VEueeOkCxmjvIchcW0
m1/4fqNCMEAwDwYDVR0TAQH/BAUwAwEB/zAOBgNVHQ8BAf8EBAMCAQYwHQYDVR0OBBYEFD83MH5DVjGULqRGNYKJt108Bf3VMAoGCCqGSM49BAMC
A0cAMEQCIDqexsFabE6sYXney5hDSCYxgKMvlR5dTckPbKgvPKanAiAgBWPX+h/uc3Ss5cVyatiLuVLqi4JKnGMIhxRnvtYhOw==
-----END CERTIFICATE-----
"""
AUTHORITY_HASH = "00ad8108.0"  # openssl x509 -subject_hash
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBwTCCAWagAwIBAgIBAjAKBggqhkjOPQQDAjAoMQ0wCwYDVQQKDARUZXN0MRcwFQYDVQQDDA5UZXN0IEF1dGhvcml0eTAgFw0yNjExMjMwMTU0
NDJaGA8yMTI2MTAzMDAxNTQ0MlowFDESMBAGA1UEAwwJY29sbGVjdG9yMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEr58ALSsGFGAza+DLXibB
csz+sXRlht6RX/kl28Hy/o0hsdU6Y/I0+bNjmz8se0V21uD6zAJdTSAkuvIsjEaL6qOBkjCBjzAMBgNVHRMBAf8EAjAAMA4GA1UdDwEB/wQEAwIH
gDATBgNVHSUEDDAKBggrBgEFBQcDATAdBgNVHQ4EFgQUKuWjIlFNeZN5E2gAQbDGyGY+fM8wHwYDVR0jBBgwFoAUPzcwfkNWMZQupEY1gom3XTwF
/dUwGgYDVR0RBBMwEYIJbG9jYWxob3N0hwR/AAABMAoGCCqGSM49BAMCA0kAMEYCIQD5Z7dqOKVrye+/VjdPi8r9CYsx7nXf9tdGLnmJQ/5qKgIh
ALg4L0nYPNpN8OS9qSLRNdzDFSfJP2diXJacN4cfPjE4
-----END CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg0qEYYzJms2jYWjLIv3JGa+BTBXS1D7z9oeOqAtGJZnWhRANCAASvnwAtKwYUYDNr
4MteJsFyzP6xdGWG3pFf+SXbwfL+jSGx1Tpj8jT5s2ObPyx7RXbW4PrMAl1NICS68iyMRovq
-----END PRIVATE KEY-----
"""


@pytest.fixture
def secure(home, monkeypatch):
    """A collector with a certificate, and no authority that anybody knows."""
    (home / "certificate.pem").write_text(CERTIFICATE)
    (home / "authority.pem").write_text(AUTHORITY)
    (home / "empty").mkdir()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(home / "certificate.pem")
    collector = Collector(context)
    monkeypatch.setenv("SSL_CERT_DIR", str(home / "empty"))
    monkeypatch.setenv("TRIX_TELEMETRY_ENDPOINT", collector.url)
    yield collector
    collector.close()


@posix
@pytest.mark.parametrize(
    ("name", "bundle", "loaded"),
    [
        ("01234567.0", False, "capath\n\n"),
        (AUTHORITY_HASH, False, "capath\n"),
        ("none", False, "\n"),
        ("none", True, "\n"),
    ],
)
def test_tls_is_verified_with_a_hashed_directory_first_then_with_the_bundle(secure, home, config, name, bundle, loaded):
    (home / "empty" / name).write_text(AUTHORITY)
    config()
    code = f"""
import ssl
original = ssl.create_default_context
def create(**options):  # tells what is loaded, and puts the authority into the bundle of the system
    print(*options)
    return original(**options) if options or {bundle} else original(cafile={str(home / "authority.pem")!r})
ssl.create_default_context = create
"""
    env = {"SSL_CERT_FILE": str(home / "authority.pem")} if bundle else {}
    done = tool(code + TRACK, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, loaded, "")
    assert secure.commands == ["build"]


def test_tls_with_an_unknown_authority_another_host_or_plain_http(secure, home, config, state):
    config()
    assert is_silent(tool())
    done = cli("track", "build")
    assert (done.returncode, secure.requests) == (1, [])
    assert "CERTIFICATE_VERIFY_FAILED" in done.stderr
    env = {"SSL_CERT_FILE": str(home / "authority.pem")}
    other = {**env, "TRIX_TELEMETRY_ENDPOINT": f"https://127.0.0.2:{secure.port}"}
    code = "import socket; found = socket.getaddrinfo\n"
    code += "socket.getaddrinfo = lambda host, *a, **k: found('127.0.0.1', *a, **k)\n"
    assert is_silent(tool(code + TRACK, env=other))
    keys = {**env, "SSLKEYLOGFILE": "/nowhere/keys"}
    assert is_silent(tool(env=keys))
    done = cli("track", "build", env=keys)
    assert (done.returncode, "No such file or directory" in done.stderr, done.stderr.count("\n")) == (1, True, 1)
    plain = {"TRIX_TELEMETRY_ENDPOINT": f"http://127.0.0.1:{secure.port}"}
    assert is_silent(tool(env=plain))
    assert cli("track", "build", env=plain).returncode == 1
    assert (secure.requests, "backoff" in names(state)) == ([], False)


# The thread, and the end of the process


HOSTS = {
    "it ends at once": TRACK,
    "its exit code and its streams are its own": f"{TRACK}print('out')\nsys.stdout = None",
    "an event loop": f"import asyncio\nasync def main():\n    {TRACK}    await asyncio.sleep(0)\nasyncio.run(main())",
    "a second thread": f"import threading\nthread = threading.Thread(target=lambda: {TRACK.strip()})\n"
    "thread.start(); thread.join()",
    "a debug level": f"import http.client; http.client.HTTPConnection.debuglevel = 1\n{TRACK}",
    "no ssl": f"sys.modules['ssl'] = sys.modules['_ssl'] = None\n{TRACK}",
    "threads that cannot start": "import contextlib, threading\n"
    "with contextlib.suppress(ValueError): threading.stack_size(1 << 46)\n"
    f"assert sys.platform == 'win32' or {TRACK.strip()} is None",
    "logging without a handler": f"import logging\n{TRACK}",
    "a destructor at the end": f"import builtins\nclass Last:\n"
    "    def __del__(self, track=trix_telemetry.track_command_execution): track('gone')\n"
    f"last = builtins.last = sys.last = trix_telemetry.last = Last()\n{TRACK}",
    "an exit hook": f"import atexit; atexit.register(trix_telemetry.track_command_execution, 'late')\n{TRACK}",
    "a destructor that imports": "import contextlib\nclass Last:\n    def __del__(self):\n"
    "        with contextlib.suppress(ImportError): import tomllib, json, urllib.request, ssl\n"
    f"last = Last()\n{TRACK}",
}


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("flags", [[], ["-I", "-S"], ["-OO"], ["-X", "dev", "-W", "error"]])
def test_a_host_is_unharmed_and_its_point_arrives(here, config, name, flags):
    config("# edited\n" + NEW_CONFIG)
    done = tool(HOSTS[name], *flags)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout == ("out\n" if "print" in HOSTS[name] else "")
    assert here.commands.count("build") == (name != "threads that cannot start") or os.name == "nt"


GREEN = {
    "gevent": "from gevent import monkey; monkey.patch_all()",
    "eventlet": "import eventlet; eventlet.monkey_patch()",
}


@packages
@posix
@pytest.mark.parametrize("library", GREEN)
def test_a_host_with_green_threads_is_told_counted_and_keeps_its_signals(here, library):
    pytest.importorskip(library)
    code = """
import signal
def end(number, frame): raise SystemExit(7)
signal.signal(signal.SIGTERM, end)
thread = trix_telemetry.track_command_execution("build")
thread.join()
assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
"""
    first = tool(f"{GREEN[library]}\n{code}", "-W", "ignore")
    assert (first.returncode, first.stdout, first.stderr.count("trix-cli")) == (0, "", 1), first.stderr
    assert is_silent(tool(f"{GREEN[library]}\n{code}", "-W", "ignore"))
    assert here.commands == ["build", "build"]


@posix
def test_signals_files_threads_and_settings_of_the_host_are_as_they_were(here, config):
    config()
    done = tool(f"""
        import logging, os, signal, socket, ssl, tempfile, threading, tomllib, urllib.request, warnings
        def settle():
            for thread in threading.enumerate():
                if thread is not threading.main_thread():
                    thread.join()
            return (
                list(warnings.filters), logging.getLogger().handlers, socket.getdefaulttimeout(), dict(os.environ),
                signal.getsignal(signal.SIGINT), sys.getswitchinterval(), threading.excepthook, sys.stdout, sys.stderr,
                signal.pthread_sigmask(signal.SIG_BLOCK, []), os.listdir("/proc/self/fd"), threading.active_count(),
            )
        trix_telemetry.get_session()
        before = settle()
        signal.signal(signal.SIGALRM, lambda *_: trix_telemetry.track_command_execution("alarm"))
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        for _ in range(3000):
            {TRACK}
        signal.setitimer(signal.ITIMER_REAL, 0)
        after = settle()
        assert after == before, [pair for pair in zip(before, after) if pair[0] != pair[1]]
        assert len(trix_telemetry.get_session().deliveries) <= 4
    """)
    assert is_silent(done), done.stderr
    assert len(here.users) == 1


def test_100_of_100_processes_that_end_at_once_deliver(here, config):
    config(timeout_ms=60_000)
    running = []
    for _ in range(100):
        if len(running) == 8:
            assert running.pop(0).wait(LONG) == 0
        running.append(subprocess.Popen([sys.executable, "-c", script()]))
    assert [process.wait(LONG) for process in running] == [0] * 8
    assert (len(here.requests), len(here.users)) == (100, 1)


def test_output_arrives_before_the_wait(hostile, config):
    config(otlp_endpoint=hostile(silence).url, timeout_ms=60_000)
    code = script(f"{TRACK}print('done'); print('told', end='', file=sys.stderr)")
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], **options)
    late = threading.Timer(LONG / 2, process.kill)
    late.start()
    assert (process.stdout.readline(), process.stderr.read(4)) == ("done\n", "told")
    late.cancel()
    assert process.poll() is None
    process.kill()
    process.communicate()


@posix
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 7), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_ends_the_wait_at_once(hostile, config, sent, code):
    config(otlp_endpoint=hostile(silence).url, timeout_ms=60_000)
    # The exit hooks run in reverse order: this one tells that the wait is next.
    text = f"""
        import atexit, os, signal
        signal.signal(signal.SIGINT, signal.default_int_handler)
        class Last:
            def __del__(self):
                import tomllib, json, http.client, ssl, urllib.request
        last = Last()
        {TRACK}
        atexit.register(os.write, 1, b"waiting")
        sys.exit(7)
    """
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    for delay in (0, 0.005, 0.01, 0.02, 0.03, 0.3):
        process = subprocess.Popen([sys.executable, "-c", script(text)], **options)
        assert process.stdout.read(7) == "waiting"
        time.sleep(delay)
        process.send_signal(sent)
        assert process.communicate(timeout=LONG / 2)[0] == ""
        assert process.returncode == code


@posix
def test_a_reader_that_is_gone_changes_nothing(hostile, config):
    config(otlp_endpoint=hostile(silence).url, timeout_ms=300)
    results = []
    for code in ("", TRACK):
        read, write = os.pipe()
        os.close(read)
        done = tool(f"print('x' * 10)\n{code}", stdout=write, stderr=subprocess.PIPE)
        os.close(write)
        results.append((done.returncode, done.stderr))
    assert results[0] == results[1]
    assert results[0][0] == 120


@posix
def test_the_signals_of_the_host_are_left_to_the_host(hostile, config):
    config(otlp_endpoint=hostile(silence).url, timeout_ms=60_000)
    done = tool(f"""
        import os, signal, time
        {TRACK}
        trix_telemetry.get_session().deliveries[0].is_prepared.wait()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGCHLD])
        for number in (signal.SIGUSR1, signal.SIGCHLD):
            os.kill(os.getpid(), number)
            assert signal.sigwait([number]) == number
        os._exit(0)
    """)
    assert is_silent(done), done.stderr
    for scheme in ("http", "https"):
        config(otlp_endpoint=hostile(lambda connection: None).url.replace("http", scheme))
        assert is_silent(tool(f"import signal; signal.signal(signal.SIGPIPE, signal.SIG_DFL)\n{TRACK}"))


FORK = """
import os
def forked(work):
    child = os.fork()
    if child == 0:
        work()
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@posix
def test_a_fork_at_any_moment_leaves_a_child_that_can_import_and_track(here, hostile, config):
    config("# edited\n" + NEW_CONFIG.replace("2000", "60000"))
    code = """
        import time
        def work():
            import tomllib, json, urllib.request, ssl
            trix_telemetry.track_command_execution("child").join()
        trix_telemetry.track_command_execution("parent")
        time.sleep({delay})
        forked(work)
    """
    for step in range(8):
        done = tool(FORK + textwrap.dedent(code.format(delay=step * 0.009)), "-W", "ignore")
        assert is_silent(done), done.stderr
    assert sorted(here.commands) == ["child"] * 8 + ["parent"] * 8
    held = {"TRIX_TELEMETRY_ENDPOINT": hostile(silence).url}
    code = f"{FORK}import time\n{TRACK}time.sleep(0.3)\nforked(lambda: None)\nos._exit(3)"
    assert tool(code, "-W", "ignore", env=held, timeout=LONG / 2).returncode == 3
    # Python 3.12 starts no threads here.
    code = f"""{FORK}
import atexit, threading
def late():
    thread = threading.Thread(target=forked, args=(lambda: os._exit(0),), daemon=True)
    try: thread.start()
    except RuntimeError: return
    thread.join()
atexit.register(late)
{TRACK}"""
    assert is_silent(tool(code, "-W", "ignore"))


@posix
def test_a_forked_child_has_a_session_of_its_own(hostile, config):
    config(otlp_endpoint=hostile(silence).url, timeout_ms=60_000)
    done = tool(
        f"""{FORK}
assert all([{TRACK.strip()} for _ in range(4)])
def work():
    assert {TRACK.strip()} is not None
    os._exit(0)
forked(work)
os._exit(0)
""",
        "-W",
        "ignore",
    )
    assert is_silent(done), done.stderr


@posix
@pytest.mark.parametrize("delay", [0, 0.01, 0.03, 0.06, 0.3])
def test_daemonizing_at_any_moment_holds_nothing_up(here, config, delay):
    config("# edited\n" + NEW_CONFIG.replace("2000", "60000"))
    code = f"""
        import os, time
        {TRACK}
        time.sleep({delay})
        if os.fork():
            os._exit(0)
        os.setsid()
        for descriptor in (0, 1, 2):
            os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
        while os.path.exists("held"):
            time.sleep(0.1)
    """
    held = pathlib.Path(os.environ["HOME"]) / "held"
    held.touch()
    assert is_silent(run([sys.executable, "-W", "ignore", "-c", script(code)], cwd=held.parent))
    assert is_silent(tool("trix_telemetry.track_command_execution('next')", timeout=LONG / 2))
    assert cli("disable", timeout=LONG / 2).returncode == 0
    held.unlink()
    assert "next" in here.commands


@pytest.mark.parametrize("method", ["spawn", pytest.param("fork", marks=posix)])
def test_multiprocessing(here, config, home, method):
    config(timeout_ms=60_000)
    code = script(f"""
        import multiprocessing
        def work(n):
            trix_telemetry.track_command_execution("child").join()
            return n
        if __name__ == "__main__":
            trix_telemetry.track_command_execution("parent")
            with multiprocessing.get_context({method!r}).Pool(2) as pool:
                assert pool.map(work, range(3)) == [0, 1, 2]
                pool.close()
                pool.join()
    """)
    (home / "pool.py").write_text(code)
    done = run([sys.executable, "-W", "ignore", home / "pool.py"])
    assert is_silent(done), done.stderr
    assert sorted(here.commands) == ["child"] * 3 + ["parent"]


def test_at_most_four_sends_are_under_way_and_a_fifth_is_dropped(hostile, config):
    server = hostile(silence)
    config(otlp_endpoint=server.url, timeout_ms=1500)
    threads = [trix_telemetry.track_command_execution("build") for _ in range(10)]
    assert [thread is not None for thread in threads] == [True] * 4 + [False] * 6
    for thread in threads[:4]:
        thread.join(LONG)
    assert server.accepted <= 4


@pytest.fixture
def locked(home, state):
    """A home of which nothing can be changed, by us neither."""
    state.mkdir(parents=True)
    paths = [state, state.parent, home]
    parents = [path for path in home.parents if "pytest" in path.name]

    def lock():
        for path in (*paths, *state.iterdir()):
            path.chmod(0o555)
        for path in parents:
            path.chmod(path.stat().st_mode | 0o055)

    yield lock
    for path in paths:
        path.chmod(0o755)


NOBODY = f"""
import os, argparse, gettext, importlib.util, locale, re, select, signal, tempfile, threading, http.server
{READY}
if os.geteuid() == 0:  # to whom no permission is denied
    os.setuid(65534)
"""


@posix
@pytest.mark.parametrize(("text", "mode"), [(None, 0), (NEW_CONFIG, 0o444), (NEW_CONFIG, 0)])
def test_a_disk_that_cannot_be_written_or_read(here, config, locked, state, text, mode):
    if text:
        config(text)
    locked()
    for path in state.iterdir():
        path.chmod(mode)
    done = tool(f"{NOBODY}for _ in (1, 2):\n    thread = {TRACK}    if thread: thread.join()")
    assert is_silent(done), done.stderr
    assert (len(here.requests), len(here.users)) == ((2, 1) if mode else (0, 0))
    done = tool(f"{NOBODY}sys.exit(trix_telemetry.main(['status']))")
    word = {None: "is not writable"}.get(text, "is on" if mode else "Permission denied")
    assert (done.returncode, word in done.stdout.splitlines()[0]) == (0, True)


@posix
@pytest.mark.parametrize("is_there", [True, False])
def test_a_full_disk_and_a_home_that_is_none(here, home, config, state, is_there):
    if is_there:
        config()
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
    assert is_silent(tool(full + TRACK))
    assert here.commands == ["build"] * is_there
    assert not state.exists() or names(state) == ["config.toml"] * is_there
    for value in (None, "", "relative", "/dev/null", "/proc"):
        code = f"assert {TRACK.strip()} is None\nassert len(trix_telemetry.get_user_fingerprint()) == 64"
        assert is_silent(tool(code, env={"HOME": value}, cwd=home))


def test_a_zipapp(collector, acme, home):
    archive = home / "acme.pyz"
    with zipfile.ZipFile(archive, "w") as file:
        for path in (home / "lib").rglob("*.py"):
            file.write(path, path.relative_to(home / "lib"))
        main = "\nimport sys\nif sys.argv[1:]:\n    sys.exit(usage.main(sys.argv[1:]))\n"
        file.writestr("__main__.py", VENDORED.format(url=collector.url, more="") + main)
    done = run([sys.executable, archive])
    assert (done.returncode, done.stdout, collector.commands) == (0, "", ["build"])
    done = run([sys.executable, archive, "selftest"])
    assert done.returncode == 0, done.stdout + done.stderr


# The command line


def test_status_creates_nothing_and_shows_all(here, home, capsys, monkeypatch):
    assert trix_telemetry.main([]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "Telemetry of trix-cli is on",
        f"  Endpoint     {here.url}/v1/metrics (not encrypted)",
        "  Fingerprint  none",
        f"  Config       {home / '.tx3' / 'trix' / 'config.toml'}",
        "  Change       python -m trix_telemetry enable, python -m trix_telemetry disable",
        "  Variables    DO_NOT_TRACK=1, TRIX_TELEMETRY=0, TRIX_TELEMETRY_DEBUG=1",
    ]
    monkeypatch.setenv("TRIX_TELEMETRY_ENDPOINT", "https://collector.example.com")
    trix_telemetry.main(["status", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts == {
        "tool": "trix-cli",
        "enabled": True,
        "reason": None,
        "endpoint": "https://collector.example.com/v1/metrics",
        "encrypted": True,
        "fingerprint": None,
        "backoff": None,
        "config": str(home / ".tx3" / "trix" / "config.toml"),
        "docs_url": None,
    }
    assert names(home) == []


def test_the_command_line_waits_for_the_imports_of_a_delivery(here, config):
    config("# edited\n" + NEW_CONFIG)
    done = tool(f"""
class Watch:
    def find_spec(name, path, target=None):
        if name == "argparse":
            print([each.is_prepared.is_set() for each in deliveries])
sys.meta_path.insert(0, Watch)
{TRACK}
deliveries = list(trix_telemetry.get_session().deliveries)
trix_telemetry.main(["status"])
""")
    assert done.stdout.startswith("[True]\nTelemetry of trix-cli is on\n"), done.stdout + done.stderr


def test_status_takes_no_notice_of_a_name_in_the_closed_set_that_cannot_be_counted(here, capsys):
    trix_telemetry.initialize_telemetry(
        service_name="acme", service_version="1", endpoint=here.url, commands=["a name", "build"]
    )
    trix_telemetry.main(["status"])
    assert capsys.readouterr().out.startswith("Telemetry of acme is on\n")


def test_status_of_a_home_on_a_drive_that_is_not_there_ends(here):
    nowhere = "Q:\\nowhere" if os.name == "nt" else "/nowhere/at/all"
    for command in ("status", "preview"):
        done = cli(command, env={"HOME": nowhere, "USERPROFILE": nowhere}, timeout=LONG / 2)
        assert (done.returncode, "Traceback" in done.stderr) == (0, False)


EDITS = [
    "telemetry.enabled = true\n",
    "telemetry = { enabled = true }\n",
    '[telemetry]\n"enabled" = true\n',
    '["telemetry"]\nenabled = true\n',
    '["telemetry"]\n"\\u0065nabled" = true\n',
    '[telemetry]\nnote = """\nenabled = true\n"""\nenabled = true\n',
    "\ufeff[telemetry]\nenabled = true\n",
    "[telemetry]\nenabled = true\n",
    "[telemetry]\r\n  enabled=true# yes\r\ntimeout_ms = 5\r\n",
    "[telemetry]\nenabled = true",
    "[other]\nenabled = true\n[ telemetry ] # x\nenabled = true\n[third]\nenabled = true\n",
    "[telemetry.otlp_headers]\na = 'b'\n[telemetry]\n# enabled = false\nenabled\t=\ttrue\n",
    "s = '''\n[telemetry]\n'''\n[telemetry]\nenabled = true # enabled = true\n",
    "[[list]]\nenabled = true\n[[list]]\nenabled = true\n[telemetry]\nenabled = true\n",
    "x = nan\ny = inf\nz = 1979-05-27\n[telemetry]\nenabled = true\nnot_enabled = true\n",
    "# \u00fc\u00a0\n" + "".join(f"[t{n}]\nenabled = true\n" for n in range(3000)) + "[telemetry]\nenabled = true\n",
]  # fmt: skip


@pytest.mark.parametrize("text", EDITS)
def test_disable_changes_the_one_value_and_enable_gives_the_first_bytes_back(config, text):
    path = config(text)
    assert trix_telemetry.main(["disable"]) == 0
    once = path.read_bytes().decode()
    assert len(once) == len(text) + 1
    assert tomllib.loads(once.lstrip("\ufeff"))["telemetry"]["enabled"] is False
    assert trix_telemetry.main(["enable"]) == 0
    assert path.read_bytes().decode() == text


HEADERS = "[telemetry.otlp_headers]\nA = 'b'\n"
ADDED = [
    ("", "\n[telemetry]\nenabled = false\n"),
    ("a = 1", "a = 1\n\n[telemetry]\nenabled = false\n"),
    ("# only words\r\n", "# only words\r\n\r\n[telemetry]\r\nenabled = false\r\n"),
    ("[telemetry]", "[telemetry]\nenabled = false\n"),
    ("[telemetry] # x\nenable = 1\n", "[telemetry] # x\nenabled = false\nenable = 1\n"),
    (HEADERS, f"{HEADERS}\n[telemetry]\nenabled = false\n"),
]


@pytest.mark.parametrize(("text", "after"), ADDED)
def test_disable_adds_the_key_where_it_is_missing(config, text, after):
    path = config(text)
    assert trix_telemetry.main(["off"]) == 0
    assert path.read_bytes().decode() == after
    assert trix_telemetry.main(["on"]) == 0
    assert path.read_bytes().decode() == after.replace("false", "true")


UNUSUAL = ["telemetry = { timeout_ms = 5 }\n", "telemetry.timeout_ms = 5\n"]


@pytest.mark.parametrize("text", UNUSUAL)
def test_what_is_too_unusual_is_refused_with_what_to_write(config, capsys, text):
    path = config(text)
    assert trix_telemetry.main(["disable"]) == 1
    err = capsys.readouterr().err
    assert re.fullmatch(".* write enabled = false for telemetry by hand; nothing was changed\n", err)
    assert path.read_text() == text


def test_generated_documents_are_edited_exactly_or_refused(config, capsys):
    keys = ["enabled", '"enabled"', "telemetry.enabled", '"\\u0065nabled"', "other"]
    values = ["true", "false", "1", '"true"', "nan", "[true, [false]]", "{ enabled = true }", '"a#b"']
    values += ['"""\nenabled = true\n"""', "'''enabled = false'''", "1979-05-27 07:32:00"]
    others = ["[telemetry]", "[other]", "[[list]]", "[ telemetry . deep ]", "  [telemetry]", "# enabled = true"]
    edited = 0
    for seed in range(500):
        dice = random.Random(seed)
        lines = dice.choices(others, k=dice.randint(1, 4))
        lines += [f"{dice.choice(keys)}{dice.choice(['=', ' = '])}{dice.choice(values)}" for _ in range(2)]
        dice.shuffle(lines)
        text = dice.choice(["\n", "\r\n"]).join(lines) + dice.choice(["", "\n"])
        path = config(text)
        first = path.read_bytes()
        code = trix_telemetry.main(["disable"])
        err = capsys.readouterr().err
        if path.read_bytes() == first:
            assert code == 0 or re.fullmatch("trix-cli: error: .*; nothing was changed\n", err), err
            continue
        before = tomllib.loads(text, parse_float=str)
        table = before.get("telemetry", {})
        after = tomllib.loads(path.read_bytes().decode(), parse_float=str)
        assert after == {**before, "telemetry": {**table, "enabled": False}}, text
        edited += 1
        if "enabled" in table:
            assert trix_telemetry.main(["enable"]) == 0
            assert path.read_bytes() == first
    assert edited > 60


@pytest.mark.parametrize(("text", "says"), BAD_CONFIGS)
def test_a_bad_config_is_switched_off_or_said_to_be_off(config, capsys, text, says):
    path = config(text)
    before = path.read_bytes()
    assert trix_telemetry.main(["disable"]) == 0
    out = capsys.readouterr().out
    if path.read_bytes() == before:
        assert out.startswith("Telemetry is off already, but ")
        assert says in out
        assert trix_telemetry.main(["enable"]) == 1
        assert re.fullmatch("trix-cli: error: .*; nothing was changed\n", capsys.readouterr().err)
        assert path.read_bytes() == before
    else:
        assert tomllib.loads(path.read_text())["telemetry"]["enabled"] is False
        assert trix_telemetry.main(["enable"]) == 0
        assert f"It stays off: {says}" in capsys.readouterr().out
        assert path.read_bytes() == before
    assert names(path.parent) == ["config.toml"]


@pytest.mark.parametrize("command", ["enable", "disable", "on", "off"])
def test_a_config_is_made_where_there_is_none(here, state, capfd, command):
    assert trix_telemetry.main([command]) == 0
    word = "enabled" if command in ("enable", "on") else "disabled"
    assert capfd.readouterr().out == f"Telemetry {word} (saved in {state / 'config.toml'})\n"
    value = "true" if word == "enabled" else "false"
    assert (state / "config.toml").read_text() == NEW_CONFIG.replace("true", value)
    track()
    assert (len(here.requests), capfd.readouterr().err) == (word == "enabled", "")


@posix
@pytest.mark.parametrize("umask", [0o022, 0o777])
def test_an_edit_follows_a_link_and_keeps_the_mode_under_any_umask(home, state, umask):
    target = home / "dotfiles.toml"
    target.write_text("[telemetry]\nenabled = true\n")
    target.chmod(0o644)
    state.mkdir(parents=True)
    (state / "config.toml").symlink_to(target)
    tool(f"import os; os.umask({umask}); trix_telemetry.main(['disable'])")
    assert (state / "config.toml").is_symlink()
    assert target.read_text() == "[telemetry]\nenabled = false\n"
    assert stat.S_IMODE(target.stat().st_mode) == 0o644


def test_a_config_that_is_read_only_is_named_and_leaves_no_litter(config, state):
    path = config("[telemetry]\nenabled = true\n")
    path.chmod(0o444)
    code = "" if os.name == "nt" else NOBODY
    if code:
        for each in (state.parent.parent, state.parent, state):
            each.chmod(0o777)
        for parent in [each for each in state.parents if "pytest" in each.name]:
            parent.chmod(parent.stat().st_mode | 0o055)
    done = tool(f"{code}sys.exit(trix_telemetry.main(['disable']))")
    assert (done.returncode, names(state)) == (1, ["config.toml"])
    assert "the file is read-only; nothing was changed" in done.stderr


def test_edits_while_tools_run_and_read_leave_a_whole_file(here, config):
    path = config("[telemetry]\nenabled = true\n")
    code = f"""
import os, time
while not os.path.exists("stop"):
    {TRACK}
    try: text = open({str(path)!r}).read()
    except OSError: continue
    assert text in ("[telemetry]\\nenabled = true\\n", "[telemetry]\\nenabled = false\\n")
"""
    reader = subprocess.Popen([sys.executable, "-c", script(code)], cwd=path.parent)
    for command in ["disable", "enable"] * 10:
        assert trix_telemetry.main([command]) == 0
    (path.parent / "stop").touch()
    assert reader.wait(LONG) == 0


def test_preview_is_what_track_sends(here, config, state, capsys):
    config('[telemetry]\nenabled = true\n[telemetry.otlp_headers]\nX-Key = "secret"\n')
    (state / "fingerprint").write_text(FINGERPRINT)
    assert trix_telemetry.main(["preview", "test"]) == 0
    out, err = capsys.readouterr()
    head, _, body = out.partition("\n\n")
    assert (here.requests, err) == ([], "")
    track("test")
    ((line, headers, sent),) = here.requests
    shown = [tuple(row.split(": ", 1)) for row in head.splitlines()[1:]]
    assert head.splitlines()[0] == line
    assert shown == list({**headers, "X-Key": "(hidden)"}.items())
    times = r'UnixNano":"\d{19}'
    assert re.sub(times, "", body.rstrip("\n")) == re.sub(times, "", sent.decode())


@pytest.mark.parametrize(
    ("answer", "code", "says"),
    [
        ({"rejectedDataPoints": 1, "errorMessage": "too old"}, 1, "1 data point rejected: too old"),
        ({"rejectedDataPoints": "1", "errorMessage": "too\nold"}, 1, "1 data point rejected: too?old"),
        ({"rejectedDataPoints": "0", "errorMessage": "a warning"}, 0, "HTTP 200: a warning"),
        ({"rejectedDataPoints": "1", "errorMessage": "x" * 3000}, 1, "1 data point rejected: xxx"),
        ({"rejectedDataPoints": 10**300}, 1, "data point rejected"),
        ({"rejectedDataPoints": "many"}, 0, "HTTP 200\n"),
        ({"rejectedDataPoints": float("inf")}, 0, "HTTP 200\n"),
        ({"errorMessage": ["odd"]}, 0, "HTTP 200"),
        (None, 0, "HTTP 200\n"),
        ([], 0, "HTTP 200\n"),
    ],
)
def test_track_tells_rejected_points_apart(here, config, answer, code, says):
    config()
    here.answer = (200, {}, json.dumps({"partialSuccess": answer}).encode())
    done = cli("track", "build")
    told = done.stdout + done.stderr
    assert (done.returncode, told.count("\n")) == (code, 1)
    assert says in told
    assert len(told) < 500


def test_track_says_what_came_of_it_in_the_librarys_words(hostile, here, config, state):
    config(timeout_ms=1000)
    (state / "backoff").write_text(f"{here.url}/v1/metrics\nslow\n")
    here.answer = (404, {}, b"no such path\x1b[2J")
    done = cli("track", "build")
    assert (done.returncode, done.stdout, (state / "backoff").exists()) == (1, "", True)
    wanted = r"trix-cli: error: http://.*/v1/metrics after \d+ ms: HTTP 404: no such path\?\[2J\n"
    assert re.fullmatch(wanted, done.stderr)
    assert "refused" in cli("track", "build", "--endpoint", "http://127.0.0.1:1").stderr
    done = cli("track", "build", "--endpoint", hostile(silence).url)
    assert (done.returncode, "timed out" in done.stderr) == (1, True)
    for status, answer in ((200, b""), (202, b"{"), (200, b"\xff\0"), (200, b"[" * 4000), (204, b""), (200, b"null")):
        here.answer = (status, {}, answer)
        done = cli("track", "build", "--endpoint", f"{here.url}/x")
        assert (done.returncode, done.stderr, (state / "backoff").exists()) == (0, "", False)
        assert re.fullmatch(rf"Sent to {here.url}/x/v1/metrics in \d+ ms: HTTP {status}\n", done.stdout)
    assert here.requests[-1][0].split()[1] == "/x/v1/metrics"


def test_track_tells_a_web_page_from_a_collector(here, config):
    config()
    here.answer = (200, {"Content-Type": "text/html; charset=utf-8"}, b"<html>Welcome</html>")
    done = cli("track", "build")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("HTTP 200, but the answer is a web page: is this the URL of a collector?\n")


WRONG_CALLS = {
    "track ../x": 1, "track a --endpoint ftp://me:secret@h": 1, "track a --endpoint ": 1, "preview a.b": 1,
}  # fmt: skip


@pytest.mark.parametrize("call", WRONG_CALLS)
def test_a_wrong_value_is_told_in_one_line(here, call):
    done = cli(*call.split(" "))
    assert (done.returncode, done.stdout, here.requests) == (WRONG_CALLS[call], "", [])
    assert re.fullmatch("trix-cli: error: [^\n\x1b]*\n", done.stderr)
    assert "secret" not in done.stderr


@pytest.mark.parametrize("call", ["nonsense", "track", "status --yaml", "status a"])
def test_a_wrong_usage_is_what_argparse_says(here, call):
    done = cli(*call.split(" "))
    assert (done.returncode, done.stdout, here.requests) == (2, "", [])
    assert done.stderr.startswith("usage: python -m trix_telemetry ")


def test_reset_deletes_the_fingerprint(here, home, capsys):
    assert trix_telemetry.main(["reset"]) == 0
    assert (capsys.readouterr().out, names(home)) == ("No fingerprint stored.\n", [])
    track()
    capsys.readouterr()
    assert trix_telemetry.main(["reset"]) == 0
    assert capsys.readouterr().out == "Fingerprint deleted; the next command makes a new one.\n"
    track()
    assert len(here.users) == 2


@posix
def test_a_full_disk_closed_streams_and_a_reader_that_is_gone_are_no_traceback(here):
    read, gone = os.pipe()
    os.close(read)
    for arguments in (["status"], ["preview"], ["--help"], ["track", "build"]):
        for code in ("", "print('of the tool')\n"):
            text = f"{code}sys.exit(trix_telemetry.main({arguments}))"
            done = tool(text, env={"DO_NOT_TRACK": "1"}, stdout=gone, stderr=subprocess.PIPE)
            assert done.stderr in ("", "This is not sent. Telemetry is off: DO_NOT_TRACK is set\n")
    os.close(gone)
    with open("/dev/full", "w") as full:
        done = tool("print('x'); sys.exit(trix_telemetry.main(['status']))", stdout=full, stderr=-1)
    assert done.returncode == 1
    assert re.fullmatch("trix-cli: error: .*No space left on device\n", done.stderr)
    for redirect in CLOSE:
        for arguments in ("status", "preview", "disable", "--help", "track build", "nonsense"):
            done = run(["sh", "-c", f"exec {sys.executable} {MODULE} {arguments} {redirect.format('')}"])
            assert ("Traceback" in done.stderr, "error:" in done.stdout) == (False, False)
            assert done.returncode == (2 if arguments == "nonsense" else 0)
    code = "sys.stdout = open('/dev/full', 'w'); trix_telemetry.main([]); sys.stdout = sys.__stdout__; print('kept')"
    assert tool(code).stdout == "kept\n"
    done = tool("sys.stdout.close(); sys.exit(trix_telemetry.main(['status']))")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp437"])
def test_the_stdout_of_the_host_keeps_its_error_handler(here, encoding):
    code = "trix_telemetry.main(['status']); print(sys.stdout.errors, sys.stdout.encoding)"
    given = f"service_name='\u0416', service_version='1', endpoint={here.url!r}"
    code = f"trix_telemetry.initialize_telemetry({given})\n{code}"
    done = tool(code, "-X", "utf8=0", env={"PYTHONIOENCODING": encoding})
    assert done.stdout.startswith("Telemetry of \\u0416 is on\n")
    assert done.stdout.splitlines()[-1].startswith("strict ")


@pytest.mark.parametrize("flags", [[], ["-I"], ["-OO"], ["-S"]])
def test_selftest_passes_where_everything_speaks_against_it(home, flags):
    home.chmod(0o555)
    env = {"DO_NOT_TRACK": "1", "http_proxy": "http://127.0.0.1:1", "TRIX_TELEMETRY": "0", "CI": "true"}
    done = run([sys.executable, *flags, MODULE, "selftest"], env=env, cwd=home)
    home.chmod(0o755)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert done.stdout.splitlines()[-1] == "All passed."
    assert names(home) == []


def test_selftest_shows_the_notice_and_the_request(home):
    done = cli("selftest")
    assert "trix-cli sends anonymous usage telemetry: the name of each command,\n" in done.stdout
    assert "POST /v1/metrics HTTP/1.1\n" in done.stdout
    body = done.stdout.partition("\n\n{")[2].partition("\n}\n")[0]
    assert '\n  "resourceMetrics": [\n' in body
    assert Point(f"{{{body}}}").command == "build"
    assert done.stdout.splitlines()[-5:] == [
        "ok  the first run shows the notice and sends",
        "ok  the second run sends",
        "ok  DO_NOT_TRACK=1 turns it off",
        "ok  TRIX_TELEMETRY=0 turns it off",
        "All passed.",
    ]


def test_selftest_passes_with_any_settings(acme):
    more = ", prog='acme telemetry', commands=['x'], opt_in=True, docs_url='http://d', headers={'A': 'b'}"
    done = acme("http://127.0.0.1:9", more, "sys.exit(usage.main(['selftest']))", env={"CI": "1"})
    assert done.stdout.splitlines()[-1] == "All passed."


def test_selftest_fails_when_something_is_broken(home):
    (home / "broken.py").write_text(SOURCE.replace('"asInt": "1"', '"asInt": 1 / 0'))
    (home / "my.tool.py").write_text(SOURCE)
    for name in ("broken.py", "my.tool.py"):
        done = run([sys.executable, home / name, "selftest"])
        assert (done.returncode, done.stderr) == (1, "")
        assert "FAILED  the first run" in done.stdout
        assert done.stdout.endswith("Failed.\n")


# README.md

README = (HERE / "README.md").read_text(encoding="utf-8")


def blocks(language):
    """Return the blocks of the README in this language."""
    return re.findall(rf"(?m)^```{language}\n(.*?)^```", README, re.S)


USAGE, ARGPARSE, CLICK, TYPER, CONFTEST = blocks("python")
programs = pytest.mark.parametrize(
    "program",
    [
        pytest.param(ARGPARSE, id="argparse"),
        pytest.param(CLICK, id="click", marks=packages),
        pytest.param(TYPER, id="typer", marks=packages),
    ],
)
groups = pytest.mark.parametrize(
    "program",
    [
        pytest.param(CLICK, id="click", marks=packages),
        pytest.param(TYPER, id="typer", marks=packages),
    ],
)


@pytest.fixture
def readme(home, collector):
    """Run a program of the README, with the collector in place of its endpoint."""
    (home / "trix_telemetry.py").write_text(SOURCE, encoding="utf-8")
    (home / "usage.py").write_text(USAGE.replace("https://otlp.example.com", collector.url))

    def run_program(program, *arguments, **options):
        for library in ("click", "typer"):
            if f"import {library}" in program:
                pytest.importorskip(library)
        (home / "acme.py").write_text(program)
        return run([sys.executable, home / "acme.py", *arguments], **options)

    return run_program


def test_the_first_block_is_two_commands_and_ci_runs_them():
    lines = blocks("sh")[0].splitlines()

    assert len(lines) == 2
    assert lines[0] == "python3 trix_telemetry.py selftest"
    assert lines[1].startswith("python3 -m venv .venv && ")
    assert lines[1].endswith(" && .venv/bin/python -m pytest")


@pytest.mark.parametrize("language", ["sh", "yaml", "sql", "python", "promql", "toml", "http", "text"])
def test_no_line_of_a_block_is_longer_than_a_screen(language):
    shown = blocks(language)

    longest = max(len(line) for block in shown for line in block.splitlines())
    assert longest <= 100


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(#([^)]+)\)", README))), ids=lambda link: link)
def test_each_link_leads_to_a_heading(link):
    headings = re.findall(r"(?m)^#+ (.+)$", README)

    assert link in [heading.lower().replace(" ", "-") for heading in headings]


@programs
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], id="nothing"),
        pytest.param(["--help"], id="help"),
        pytest.param(["build", "--help"], id="help-of-a-command"),
        pytest.param(["build", "--wrong"], id="wrong-option"),
        pytest.param(["telemetry"], id="telemetry"),
    ],
)
def test_a_program_counts_nothing_that_does_not_run(readme, collector, program, arguments):
    readme(program, *arguments)

    assert collector.requests == []


@programs
def test_a_program_counts_a_command_and_shows_the_notice(readme, collector, program):
    notice = blocks("text")[0].replace("https://otlp.example.com", collector.url)

    done = readme(program, "build")

    assert (done.returncode, done.stdout, done.stderr) == (0, "", notice)
    assert collector.commands == ["build"]


@groups
def test_a_program_counts_a_command_of_a_nested_group(readme, collector, program):
    done = readme(program, "remote", "add")

    assert (done.returncode, done.stdout) == (0, "")
    assert collector.commands == ["remote-add"]


@programs
def test_a_program_shows_the_status(readme, collector, home, program):
    readme(program, "build")
    directory = home / ".config" / "acme" / "telemetry"
    shown = blocks("text")[1]
    for example, value in {
        "https://otlp.example.com/v1/metrics": f"{collector.url}/v1/metrics (not encrypted)",
        FINGERPRINT_OF_README: (directory / "fingerprint").read_text(),
        "/home/me/.config/acme/telemetry/config.toml": str(directory / "config.toml"),
    }.items():
        shown = shown.replace(example, value)

    done = readme(program, "telemetry")

    assert done.stdout == shown


@programs
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--help"], id="help"),
        pytest.param(["status", "--json"], id="status"),
        pytest.param(["preview"], id="preview"),
        pytest.param(["selftest"], id="selftest"),
        pytest.param(["disable"], id="disable"),
    ],
)
def test_a_program_says_nothing_of_trix(readme, home, program, arguments):
    done = readme(program, "telemetry", *arguments)

    assert (done.returncode, done.stderr) == (0, "")
    said = done.stdout.replace("User-Agent: trix-telemetry/3.0.0", "").replace(str(home), "")
    assert "trix" not in said.lower()
    assert not (home / ".tx3").exists()


@programs
def test_a_program_whose_telemetry_is_disabled_is_silent(readme, collector, program):
    readme(program, "telemetry", "disable")

    done = readme(program, "build")

    assert is_silent(done)
    assert collector.requests == []


def test_the_keys_of_the_status_are_named():
    done = cli("status", "--json")

    for key in json.loads(done.stdout):
        assert f"`{key}`" in README


FINGERPRINT_OF_README = "a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f90"


def test_the_request_is_shown_to_the_byte(readme, home):
    head, _, pretty = blocks("http")[0].partition("\n\n")
    body = json.dumps(json.loads(pretty), separators=(",", ":"))
    directory = home / ".config" / "acme" / "telemetry"
    directory.mkdir(parents=True)
    (directory / "fingerprint").write_text(FINGERPRINT_OF_README)
    env = {"ACME_TELEMETRY_ENDPOINT": "https://otlp.example.com", "DO_NOT_TRACK": "1"}

    done = readme(ARGPARSE, "telemetry", "preview", env=env)

    shown_head, _, shown_body = done.stdout.partition("\n\n")
    assert shown_head == head
    assert f"Content-Length: {len(body)}" in head
    time_digits = r'(?<=Nano":")\d{19}'
    assert re.sub(time_digits, "", shown_body) == re.sub(time_digits, "", body) + "\n"


def test_the_config_is_valid(home):
    directory = home / ".config" / "acme" / "telemetry"
    directory.mkdir(parents=True)
    (directory / "config.toml").write_text(blocks("toml")[0])

    settings = "service_name='acme', service_version='1', endpoint='https://otlp.example.com'"
    done = tool(f"""
        trix_telemetry.initialize_telemetry({settings})
        trix_telemetry.main(["status"])
    """)

    first, endpoint, *_ = done.stdout.splitlines()
    assert first == "Telemetry of acme is on"
    assert endpoint == "  Endpoint     https://collector.example.com/v1/metrics"


def test_the_conftest_keeps_a_test_run_silent(readme, collector, home):
    (home / "conftest.py").write_text(CONFTEST)
    (home / "test_acme.py").write_text(f"""
{USAGE}

def test():
    track_command_execution("build")
""")
    env = {"ACME_TELEMETRY_ENDPOINT": collector.url}

    done = run([sys.executable, "-m", "pytest", "-s", "-q", home], env=env, cwd=home)

    assert (done.returncode, done.stderr) == (0, "")
    assert "telemetry" not in done.stdout
    assert collector.requests == []


@pytest.fixture
def ten_runs(collector, home):
    """Six runs of build and four of test, by two users: the bodies of their requests."""
    for user in ("one", "two"):
        env = {"HOME": str(home / user), "ACME_TELEMETRY_ENDPOINT": collector.url}
        for command in ("build", "test", "build", "test", "build"):
            settings = "service_name='acme', service_version='1', endpoint=''"
            tool(
                f"""
                trix_telemetry.initialize_telemetry({settings})
                trix_telemetry.track_command_execution({command!r})
                """,
                env=env,
            )
    return [body for _, _, body in collector.requests]


@packages
@posix
def test_the_query_for_duckdb_counts_what_was_sent(ten_runs, home, monkeypatch):
    duckdb = pytest.importorskip("duckdb")
    (home / "points.jsonl").write_bytes(b"\n".join(ten_runs) + b"\n")
    monkeypatch.chdir(home)

    rows = duckdb.sql(blocks("sql")[0]).fetchall()

    assert rows == [("build", 6, 2), ("test", 4, 2)]


# The columns that the query uses, of the table that the Collector's exporter makes.
CLICKHOUSE_TABLE = """
CREATE DATABASE acme;
USE acme;
CREATE TABLE otel_metrics_sum (
    ResourceAttributes Map(LowCardinality(String), String),
    MetricName LowCardinality(String),
    Attributes Map(LowCardinality(String), String),
    TimeUnix DateTime,
    Value Float64
) ENGINE = MergeTree ORDER BY (MetricName, TimeUnix);
INSERT INTO otel_metrics_sum SELECT * FROM file('rows.jsonl', 'JSONEachRow')
"""


@packages
@posix
def test_the_query_for_clickhouse_counts_what_was_sent(ten_runs, home, monkeypatch):
    sessions = pytest.importorskip("chdb.session")
    monkeypatch.chdir(home)
    with open("rows.jsonl", "w") as file:
        for point in map(Point, ten_runs):
            row = {
                "ResourceAttributes": point.resource,
                "MetricName": point.metric["name"],
                "Attributes": {"command_name": point.command},
                "TimeUnix": point.end // 1_000_000_000,
                "Value": int(point.data["asInt"]),
            }
            print(json.dumps(row), file=file)
    engine = sessions.Session(str(home / "clickhouse"))
    for statement in CLICKHOUSE_TABLE.split(";"):
        engine.query(statement)

    rows = str(engine.query(blocks("sql")[1].rstrip(";\n"), "CSV"))

    engine.close()
    assert rows == '"build",6,2,0.2\n"test",4,2,0.1\n'


# The benchmark: python -m pytest -m bench -s

BENCH_RUNS = int(os.environ.get("BENCH_RUNS", "21"))
BENCH_FLOOR = """
import atexit
import json
import os
import threading
import urllib.request


def send():
    value = {"stringValue": "x" * 64}
    body = json.dumps({"resourceMetrics": [{"a": {"key": "k", "value": value}} for _ in range(4)]})
    opener = urllib.request.OpenerDirector()
    opener.add_handler(getattr(urllib.request, os.environ["BENCH_HANDLER"])())
    url = os.environ["TRIX_TELEMETRY_ENDPOINT"] + "/v1/metrics"
    headers = {"Content-Type": "application/json"}
    opener.open(urllib.request.Request(url, body.encode(), headers), timeout=2).close()


thread = threading.Thread(target=send, daemon=True)
thread.start()
atexit.register(thread.join, 2)
"""
# What a tool would take instead, each as its documentation shows it.
BENCH_PEERS = {
    "opentelemetry.sdk": """
import os
from opentelemetry.exporter.otlp.json.http.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

exporter = OTLPMetricExporter(endpoint=os.environ["TRIX_TELEMETRY_ENDPOINT"] + "/v1/metrics")
provider = MeterProvider([PeriodicExportingMetricReader(exporter)])
counter = provider.get_meter("acme").create_counter("acme_command_invocation")
counter.add(1, {"command_name": "build"})
""",
    "otelmini": """
import os
from otelmini.metric import HttpMetricExporter, MeterProvider, PeriodicExportingMetricReader

exporter = HttpMetricExporter(endpoint=os.environ["TRIX_TELEMETRY_ENDPOINT"] + "/v1/metrics")
provider = MeterProvider([PeriodicExportingMetricReader(exporter)])
counter = provider.get_meter("acme").create_counter("acme_command_invocation")
counter.add(1, {"command_name": "build"})
""",
    "posthog": """
import os
from posthog import Posthog

client = Posthog("key", host=os.environ["TRIX_TELEMETRY_ENDPOINT"])
client.capture("build", distinct_id="a1b2c3")
""",
    # It does not wait at exit, so that its request would be lost here: the last line waits.
    "huggingface_hub": """
import os

os.environ["HF_ENDPOINT"] = os.environ["TRIX_TELEMETRY_ENDPOINT"]
from huggingface_hub.utils import _telemetry, send_telemetry

send_telemetry("acme/build", library_name="acme", library_version="1.4.0")
_telemetry._TELEMETRY_QUEUE.join()
""",
}
BENCH_CALLER = """
import threading
import time


def time_call(function, *args):
    began = time.perf_counter()
    thread = function(*args)
    took = time.perf_counter() - began
    thread.join()
    return took * 1000


def start():
    thread = threading.Thread(target=int, daemon=True)
    thread.start()
    return thread


bare = [time_call(start) for _ in range(31)]
call = [time_call(trix_telemetry.track_command_execution, "build") for _ in range(31)]
print(call[0], bare[0], sorted(call)[15], sorted(bare)[15])
"""
BENCH_FIRST_CALL = """
import time

began = time.perf_counter()
trix_telemetry.track_command_execution("build")
print((time.perf_counter() - began) * 1000)
"""
BENCH_IMPORT = """
import sys
import time

sys.path.insert(0, {path!r})
began = time.perf_counter()
import trix_telemetry
trix_telemetry.track_command_execution("build")
middle = time.perf_counter()
import json
print((middle - began) * 1000, (time.perf_counter() - middle) * 1000)
"""


def measure(code, env):
    """Return CPU and wall milliseconds of a whole process."""
    import resource

    env = {name: value for name, value in {**os.environ, **env}.items() if value is not None}
    null = subprocess.DEVNULL
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    # Without a time limit, for which Python would look at the process now and then.
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stdin=null, stdout=null, stderr=null)
    assert process.wait() == 0
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (sum(after[:2]) - sum(before[:2])) * 1000, wall * 1000


def repeat(code, env, runs=BENCH_RUNS, before=None):
    """Return the medians of the figures that a process prints, and of the first by the last."""
    rows = []
    for _ in range(runs):
        if before is not None:
            before()
        said = run([sys.executable, "-c", code], env=env).stdout
        rows.append([float(figure) for figure in said.split()])
    medians = [statistics.median(figures) for figures in zip(*rows, strict=True)]
    ratio = statistics.median(row[0] / row[-1] for row in rows)
    return *medians, ratio


@pytest.mark.bench
def test_bench(collector, secure, home, state, config, capsys):
    """Print the tables of the README; each ratio is the median over pairs of one run."""
    (home / "empty" / AUTHORITY_HASH).write_text(AUTHORITY)
    (home / "copy").mkdir()
    (home / "copy" / "trix_telemetry.py").write_text(SOURCE, encoding="utf-8")
    path = state / "config.toml"
    http = {
        "TRIX_TELEMETRY_ENDPOINT": collector.url,
        "BENCH_HANDLER": "HTTPHandler",
        "PYTHONDONTWRITEBYTECODE": None,
    }
    tls = {**http, "TRIX_TELEMETRY_ENDPOINT": secure.url, "BENCH_HANDLER": "HTTPSHandler"}
    edited = NEW_CONFIG.replace("2000", "30000")
    off = NEW_CONFIG.replace("true", "false")
    rows = {
        "bare interpreter": ("", http, off, "bare interpreter"),
        "off": (script(), http, off, "bare interpreter"),
        "floor": (BENCH_FLOOR, http, off, "floor"),
        "on": (script(), http, NEW_CONFIG, "floor"),
        "on, edited config": (script(), http, edited, "floor"),
        "on, first run": (script(), http, "", "floor"),
        "floor, TLS": (BENCH_FLOOR, tls, off, "floor, TLS"),
        "on, TLS": (script(), tls, NEW_CONFIG, "floor, TLS"),
    }
    for package, code in BENCH_PEERS.items():
        if importlib.util.find_spec(package.partition(".")[0]):
            rows[package] = (code, http, off, "floor")
    results = {name: [] for name in rows}
    for number in range(BENCH_RUNS + 1):
        for name, (code, env, text, _) in rows.items():
            config(text)
            if not text:
                path.unlink()
            result = measure(code, env)
            # The first round fills the caches.
            if number > 0:
                results[name].append(result)
    python = sys.version.split()[0]
    lines = [f"Python {python}, {os.cpu_count()} cores, medians of {BENCH_RUNS} runs"]
    for name, runs in results.items():
        cpu, wall = (statistics.median(figures) for figures in zip(*runs, strict=True))
        floor = rows[name][3]
        pairs = zip(runs, results[floor], strict=True)
        ratio = statistics.median(run[0] / of_floor[0] for run, of_floor in pairs)
        lines.append(f"| {name} | {cpu:.1f} ms | {wall:.1f} ms | {ratio:.2f} of {floor} |")
    config(NEW_CONFIG)
    first, first_start, later, start, _ = repeat(script(BENCH_CALLER), http, 15)
    lines.append(f"first call {first:.2f} ms, a first thread start {first_start:.2f} ms")
    lines.append(f"later call {later:.2f} ms, a later thread start {start:.2f} ms")
    bare = repeat(script(BENCH_FIRST_CALL), http, 15)[0]
    lines.append(f"first call without threading loaded: {bare:.1f} ms")
    told = repeat(script(BENCH_FIRST_CALL), http, 15, path.unlink)[0]
    lines.append(f"call of the first run, with the notice: {told:.1f} ms")
    config(off)
    for name, where, more in (
        ("off", HERE, {}),
        ("off, no bytecode", home / "copy", {"PYTHONDONTWRITEBYTECODE": "1"}),
    ):
        took, _, ratio = repeat(BENCH_IMPORT.format(path=str(where)), {**http, **more})
        lines.append(f"{name}: import and call {took:.2f} ms, {ratio:.2f} of import json")
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    assert len(collector.requests) >= 4 * BENCH_RUNS
    assert len(secure.requests) >= 2 * BENCH_RUNS
