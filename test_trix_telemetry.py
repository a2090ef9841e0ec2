"""The contract of trix_telemetry, each promise once, in the order of the file's sections: with real
files in a temporary home, processes, and servers on loopback. `-m bench -s` measures."""

import http.server
import importlib.util
import itertools
import json
import logging
import os
import pathlib
import random
import re
import shlex
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
import zipfile

import pytest

import trix_telemetry

HERE = pathlib.Path(__file__).resolve().parent
MODULE = HERE / "trix_telemetry.py"
SOURCE = MODULE.read_text(encoding="utf-8")
FINGERPRINT = "0123456789abcdef" * 4
ENDPOINT = "TRIX_TELEMETRY_ENDPOINT"
# Seconds that a test waits at most. It is no budget: a busy machine may need them.
LONG = 60
NEW_CONFIG = """\
[telemetry]
enabled = true
timeout_ms = 2000
# otlp_endpoint = "https://collector.example.com"

# [telemetry.otlp_headers]
"""
EDITED_CONFIG = "# edited\n" + NEW_CONFIG.replace("2000", "60000")
ON = "[telemetry]\nenabled = true\n"
OFF = "[telemetry]\nenabled = false\n"
NOBODY_ID = 65534

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX has it, Windows has not")
root = pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="it is about root")
packages = pytest.mark.packages


def cases(arguments, table):
    """Run a test for each case of a table: its name, and its value or the tuple of its values."""
    parameters = []
    for name, values in table.items():
        values = values if isinstance(values, tuple) else (values,)
        parameters.append(pytest.param(*values, id=name))
    return pytest.mark.parametrize(arguments, parameters)


# Helpers: a home, a collector, a tool


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home, an environment and a session of its own for each test."""
    prefixes = ("TRIX_", "ACME_", "OTEL_", "SSL_CERT_", "XDG_")
    others = ("CI", "DO_NOT_TRACK", "PYTHONDEVMODE", "PYTHONUNBUFFERED", "PYTHONWARNINGS")
    for name in list(os.environ):
        is_proxy = name.upper().endswith("_PROXY")
        if is_proxy or name.startswith(prefixes) or name in others:
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
    """The directory of Trix, which may not exist yet."""
    return home / ".tx3" / "trix"


@pytest.fixture
def config(state):
    """Writes config.toml: its text, or settings beside `enabled = true` and a long timeout."""

    def write(text=None, **settings):
        if text is None:
            settings = {"timeout_ms": 60_000, **settings}
            lines = [f"{key} = {json.dumps(value)}\n" for key, value in settings.items()]
            text = "".join([ON, *lines])
        state.mkdir(parents=True, exist_ok=True)
        path = state / "config.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


servers = []


@pytest.fixture(autouse=True)
def ended_servers():
    """Each test ends its servers."""
    yield
    while servers:
        server = servers.pop()
        server.shutdown()
        server.server_close()


def serve(handler, tls=None):
    """Start a server on loopback that has a thread for each connection."""

    class Server(socketserver.ThreadingTCPServer):
        request_queue_size = 256
        daemon_threads = True
        accepted = 0

        def get_request(self):
            connection, address = super().get_request()
            self.accepted += 1
            if tls:
                connection = tls.wrap_socket(connection, server_side=True)
            return connection, address

        def handle_error(self, request, address):
            pass

    server = Server(("127.0.0.1", 0), handler)
    scheme = "https" if tls else "http"
    server.url = f"{scheme}://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.005,), daemon=True).start()
    servers.append(server)
    return server


class Collector:
    """A real OTLP/HTTP collector on loopback: keeps each request, answers as it is told."""

    def __init__(self, tls=None):
        self.requests = []
        self.answer = (200, {"Content-Type": "application/json"}, b"{}")
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.requests.append((self.path, dict(self.headers), body))
                status, headers, answer = collector.answer
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args):
                pass

        self.url = serve(Handler, tls).url

    @property
    def points(self):
        return [Point(body) for _, _, body in self.requests]

    @property
    def commands(self):
        return [point.command for point in self.points]

    @property
    def users(self):
        return {point.resource["user.fingerprint"] for point in self.points}


class Point:
    """The one data point of a body."""

    def __init__(self, body):
        resource = json.loads(body)["resourceMetrics"][0]
        attributes = resource["resource"]["attributes"]
        self.resource = {each["key"]: each["value"]["stringValue"] for each in attributes}
        self.metric = resource["scopeMetrics"][0]["metrics"][0]
        self.data = self.metric["sum"]["dataPoints"][0]
        self.command = self.data["attributes"][0]["value"]["stringValue"]
        self.start = int(self.data["startTimeUnixNano"])
        self.end = int(self.data["timeUnixNano"])


@pytest.fixture
def collector(monkeypatch):
    """The collector that the environment names as the endpoint of Trix."""
    collector = Collector()
    monkeypatch.setenv(ENDPOINT, collector.url)
    return collector


def track(name="build"):
    """Track in this process, and wait for the thread as the end of the process would."""
    thread = trix_telemetry.track_command_execution(name)
    if thread is not None:
        thread.join(LONG)
        assert not thread.is_alive()
    return thread


def initialize(endpoint="http://127.0.0.1:9", **settings):
    """Make this process the tool acme."""
    settings = {"service_name": "acme", "service_version": "1", "endpoint": endpoint, **settings}
    trix_telemetry.initialize_telemetry(**settings)


@pytest.fixture
def command(capfd):
    """Runs the command line in this process."""

    def run_here(*arguments):
        capfd.readouterr()
        code = trix_telemetry.main(list(arguments))
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, code, out, err)

    return run_here


TRACK = 'trix_telemetry.track_command_execution("build")'


def script(*parts, module="trix_telemetry", path=HERE):
    """Return a program of these parts that has imported sys and the module."""
    start = f"import sys\nsys.path.insert(0, {str(path)!r})\nimport {module}"
    return "\n".join([start, *(textwrap.dedent(part) for part in parts)])


def run(arguments, env=None, **options):
    """Run a process to its end. Of `env`, None removes a variable."""
    variables = {**os.environ, **(env or {})}
    pipe = subprocess.PIPE
    options = {"stdin": subprocess.DEVNULL, "stdout": pipe, "stderr": pipe, **options}
    options["env"] = {name: value for name, value in variables.items() if value is not None}
    options.setdefault("timeout", LONG)
    return subprocess.run([str(each) for each in arguments], text=True, check=False, **options)


def run_tool(*parts, flags=(), arguments=(), **options):
    """Run a tool: a process that has imported the module, and ends right after its parts."""
    return run([sys.executable, *flags, "-c", script(*parts), *arguments], **options)


def start_tool(*parts, cwd=None):
    """Start a tool, and do not wait for its end."""
    pipe = subprocess.PIPE
    program = [sys.executable, "-c", script(*parts)]
    return subprocess.Popen(program, cwd=cwd, stdout=pipe, stderr=pipe, text=True)


def run_command(*arguments, **options):
    """Run the command line as a person would."""
    return run([sys.executable, MODULE, *arguments], **options)


def assert_silent(done):
    """A tool ended as it would have without telemetry."""
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def assert_error(done, pattern, tool="trix-cli"):
    """A command failed, and said why in one line."""
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(f"{tool}: error: {pattern}\n", done.stderr), done.stderr


def first_line(done):
    return done.stdout.splitlines()[0]


def names(path):
    return sorted(each.name for each in path.iterdir())


def read_tree(directory):
    """Return each path below directory with its owner, mode and content."""
    tree = {}
    for path in (directory, *directory.rglob("*")):
        found = path.lstat()
        data = path.read_bytes() if path.is_file() else b""
        tree[str(path)] = (found.st_uid, found.st_mode, data)
    return tree


# Loading the file


OFF_COSTS = """
import os
import sys
import time

opened = []


def watch(event, arguments):
    if event == "open" and "trix_telemetry" not in arguments[0]:
        opened.append(arguments[0])


sys.path.insert(0, sys.argv[1])
before = set(sys.modules)
sys.addaudithook(watch)
import trix_telemetry

assert trix_telemetry.track_command_execution("build") is None
print(sorted(set(sys.modules) - before), *opened)
"""


def test_off_costs_one_file_that_is_opened_and_no_import(config, collector):
    path = config(OFF)

    done = run([sys.executable, "-I", "-S", "-B", "-c", OFF_COSTS, HERE])

    assert (done.stdout, done.stderr) == (f"['trix_telemetry'] {path}\n", "")


def test_all_names_what_a_tool_may_import():
    assert trix_telemetry.__all__ == [
        "get_user_fingerprint",
        "initialize_telemetry",
        "main",
        "track_command_execution",
    ]


@cases(
    "flags",
    {"isolated": ["-I", "-S"], "optimized": ["-OO"], "strict": ["-X", "dev", "-W", "error"]},
)
def test_any_way_to_run_python_counts(collector, config, flags):
    config(EDITED_CONFIG)

    done = run_tool(TRACK, flags=flags)

    assert_silent(done)
    assert collector.commands == ["build"]


@cases(
    "load",
    {
        "exec-with-nothing": """
            space = {}
            exec(source, space)
            track = space["track_command_execution"]
        """,
        "a-new-module": """
            module = types.ModuleType("usage")
            exec(source, module.__dict__)
            track = module.track_command_execution
        """,
        "an-importer-of-its-own": """
            class Finder:
                def find_spec(name, path, target=None):
                    if name == "usage":
                        return importlib.machinery.ModuleSpec(name, Finder)

                def create_module(spec):
                    return None

                def exec_module(module):
                    exec(source, module.__dict__)


            sys.meta_path.insert(0, Finder)
            from usage import track_command_execution as track
        """,
    },
)
def test_a_copy_in_memory_counts(collector, config, load):
    config()
    program = f"""
import importlib.machinery
import sys
import types

source = open(sys.argv[1]).read()
{textwrap.dedent(load)}
track("build")
"""

    done = run([sys.executable, "-c", program, MODULE])

    assert_silent(done)
    assert collector.commands == ["build"]


# Checks: settings of the vendor, command names, endpoints, headers


WRONG_SETTINGS = {
    "service_name-empty": ("service_name", ""),
    "service_name-a-zero": ("service_name", "a\0"),
    "service_version-none": ("service_version", None),
    "metric_name-a-list": ("metric_name", []),
    "environment-empty": ("environment", ""),
    "endpoint-a-number": ("endpoint", 5),
    "endpoint-no-text": ("endpoint", "\ud800"),
    "endpoint-ftp": ("endpoint", "ftp://me:secret@h"),
    "prog-two-lines": ("prog", "a\nb"),
    "docs_url-a-number": ("docs_url", 3),
    "directory-a-number": ("directory", 7),
    "directory-bytes": ("directory", b"/a"),
    "directory-relative": ("directory", "relative"),
    "directory-a-zero": ("directory", "/a\0"),
    "commands-a-text": ("commands", "build"),
    "commands-without-a-name": ("commands", ["db:migrate", 1]),
    "headers-a-list": ("headers", ["a"]),
    "headers-with-a-number": ("headers", {"a": 1}),
    "opt_in-a-text": ("opt_in", "no"),
}


@cases(("name", "value"), WRONG_SETTINGS)
def test_a_setting_that_cannot_be_used_is_named_by_status(command, name, value):
    initialize(**{name: value})

    done = command("status")

    assert (done.returncode, done.stderr) == (1, "")
    assert re.match(f"Telemetry of .* is off: {name} of the tool must be ", done.stdout)
    assert "secret" not in done.stdout


def test_a_setting_that_cannot_be_used_is_the_first_reason(command, monkeypatch):
    initialize(service_version=None)
    monkeypatch.setenv("DO_NOT_TRACK", "1")

    done = command("status")

    wanted = "Telemetry of acme is off: service_version of the tool must be one line of text"
    assert first_line(done) == wanted


@cases(
    ("name", "value"),
    {"text": ("service_version", None), "path": ("directory", object()), "set": ("commands", 5)},
)
def test_a_setting_that_cannot_be_used_sends_makes_and_says_nothing(home, capfd, name, value):
    initialize(**{name: value})

    thread = track()

    assert thread is None
    assert capfd.readouterr() == ("", "")
    assert names(home) == []


@pytest.mark.parametrize("arguments", [["preview"], ["track", "build"], ["selftest"]])
def test_a_setting_that_cannot_be_used_is_an_error_of_a_command(command, arguments):
    initialize(service_version=None)

    done = command(*arguments)

    assert_error(done, "service_version of the tool must be one line of text", "acme")


@cases(
    ("name", "says"),
    {
        "enable": ("enable", "Telemetry enabled (saved in "),
        "disable": ("disable", "Telemetry disabled (saved in "),
        "reset": ("reset", "No fingerprint stored."),
    },
)
def test_a_person_decides_whatever_else_the_vendor_got_wrong(home, command, name, says):
    initialize(endpoint=5, service_version=None, commands="build", directory=home / "own")

    done = command(name)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(says)


@pytest.mark.parametrize("name", ["a", "Remote-add_2", "x" * 64])
def test_a_command_name_is_a_letter_and_63_more(collector, config, name):
    config()

    track(name)

    assert collector.commands == [name]


@cases(
    "name",
    {
        "none": None,
        "bytes": b"build",
        "empty": "",
        "an-address": "me@example.com",
        "a-line-break": "build\n",
        "begins-with-a-digit": "1a",
        "begins-with-a-dash": "-a",
        "65-letters": "a" * 65,
        "a-cyrillic-letter": "b\u0443ild",
    },
)
def test_what_is_no_command_name_is_dropped_whole(collector, home, capfd, name):
    thread = track(name)

    assert thread is None
    assert capfd.readouterr() == ("", "")
    assert names(home) == []


@cases(
    ("base", "url"),
    {
        "host": ("http://h", "http://h/v1/metrics"),
        "port-and-path": ("https://h:8443/otlp//", "https://h:8443/otlp/v1/metrics"),
        "there-already": ("http://h/a/v1/metrics/", "http://h/a/v1/metrics"),
        "a-host-named-v1": ("http://v1/metrics", "http://v1/metrics/v1/metrics"),
        "ipv6": ("http://[::1]:4318", "http://[::1]:4318/v1/metrics"),
    },
)
def test_the_path_is_appended_once(base, url):
    assert trix_telemetry.parse_endpoint(base, "x") == url


@cases(
    "base",
    {
        "ftp": "ftp://example.com",
        "no-scheme": "example.com:4318",
        "no-host": "http:///v1/metrics",
        "user-info": "https://me:secret@example.com",
        "empty-user-info": "http://@example.com",
        "user-info-with-a-query": "https://u:SE?CRET@h",
        "user-info-with-slashes": "https://u:SECRET//x@h",
        "space-before": " http://h",
        "line-break": "http://h\n",
        "port-too-large": "http://h:99999",
        "port-zero": "http://h:0",
        "open-bracket": "http://[::1",
        "empty-query": "http://h?",
        "fragment": "http://h/#a",
        "umlaut": "http://\u00fcber.example",
        "star": "http://*",
    },
)
def test_a_bad_endpoint_is_off_and_named(config, command, monkeypatch, base):
    config()
    monkeypatch.setenv(ENDPOINT, base)

    done = command("status")

    says = "TRIX_TELEMETRY_ENDPOINT must be an http or https base URL with a host"
    assert done.returncode == 1
    assert done.stdout.startswith(f"Telemetry of trix-cli is off: {says}")
    assert base.strip() not in done.stdout


HEADERS = """
[telemetry.otlp_headers]
Authorization = "Bearer abc"
content-TYPE = "1"
Content-Length = "1"
user-agent = "1"
host = "1"
connection = "1"
"""


def test_the_headers_of_the_request(collector, config, monkeypatch):
    config(ON + HEADERS)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "X-Other=secret")

    track()

    ((_, headers, body),) = collector.requests
    assert headers == {
        "Accept-Encoding": "identity",
        "Authorization": "Bearer abc",
        "User-Agent": "trix-telemetry/4.0.0",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Host": collector.url.removeprefix("http://"),
        "Connection": "close",
    }


# The config


@cases(
    "text",
    {
        "false": OFF,
        "dotted": "telemetry.enabled = false\nx = true\n",
        "escaped": '["telemetry"]\n"\\u0065nabled" = false # true\n',
        "empty": "",
        "a-comment": "[telemetry]\n# enabled = true\n",
        "in-a-table-below": "[telemetry.more]\nenabled = true\n",
        "a-typo": "[telemetry]\nenable = false # true\n",
    },
)
def test_a_config_that_does_not_say_true_is_off_and_left_alone(collector, config, capfd, text):
    path = config(text)

    track()

    assert collector.requests == []
    assert capfd.readouterr() == ("", "")
    assert path.read_text() == text


@cases(
    "text",
    {
        "dotted": "telemetry.enabled = true\n",
        "inline": 'telemetry = { timeout_ms = 30000, "enabled" = true }\n',
        "dos-lines": "[other]\nenabled = false\n[telemetry]\r\n\tenabled=true#\r\nx = 'blue'\r\n",
        "byte-order-mark": "\ufeff" + ON,
        "rust-tool": f'{ON}otlp_endpoint = "http://127.0.0.1:9"\n\n[telemetry.otlp_headers]\n',
    },
)
def test_a_config_that_says_true_is_on_and_left_alone(collector, config, text):
    path = config(text)

    track()

    assert collector.commands == ["build"]
    assert path.read_bytes() == text.encode()


def bad_header(line):
    text = f"{ON}[telemetry.otlp_headers]\n{line}\n"
    return text, "telemetry.otlp_headers must be a table of names and values in printable ASCII"


NOT_TOML = "config.toml must be TOML in UTF-8: "
BAD_TIMEOUT = "telemetry.timeout_ms must be an integer, 1 to 60000"
# Nothing can be read from these.
DAMAGED = {
    "not-toml": ("not toml, true", NOT_TOML),
    "not-utf-8": (b"[telemetry]\nenabled = true # \xff\n", NOT_TOML),
    "5000-brackets": ("x = true\ny = " + "[" * 5000, NOT_TOML),
    "too-large": ("# true" + " " * (1 << 20), "config.toml must not be larger than 1 MiB"),
    "telemetry-a-list": ("[[telemetry]]\nenabled = true\n", "telemetry must be a table"),
    "enabled-a-text": ('[telemetry]\nenabled = "true"\n', "telemetry.enabled must be true or"),
    "enabled-a-number": ("[telemetry]\nenabled = 1 # true\n", "telemetry.enabled must be true or"),
}
# In these a switch can still be set.
DAMAGED_ELSEWHERE = {
    "timeout-zero": (f"{ON}timeout_ms = 0\n", BAD_TIMEOUT),
    "timeout-large": (f"{ON}timeout_ms = 60001\n", BAD_TIMEOUT),
    "beside-enabled-false": (f"{OFF}timeout_ms = 0\n", BAD_TIMEOUT),
    "timeout-a-bool": (f"{ON}timeout_ms = true\n", BAD_TIMEOUT),
    "endpoint-a-number": (f"{ON}otlp_endpoint = 7\n", "telemetry.otlp_endpoint must be"),
    "endpoint-ftp": (f"{ON}otlp_endpoint = 'ftp://SECRET@h'\n", "telemetry.otlp_endpoint must be"),
    "headers-a-list": (f"{ON}otlp_headers = []\n", "telemetry.otlp_headers must be"),
    "header-a-number": (f"{ON}otlp_headers = {{ A = 1 }}\n", "telemetry.otlp_headers must be"),
    "header-name-not-ascii": bad_header('"X-Caf\u00e9" = "1"'),
    "header-name-with-a-space": bad_header('"X Space" = "1"'),
    "header-name-with-a-colon": bad_header('"X:Colon" = "1"'),
    "header-name-empty": bad_header('"" = "1"'),
    "header-transfer-encoding": bad_header('transfer-Encoding = "chunked"'),
    "header-value-with-a-line-break": bad_header('X-Break = "a\\r\\nX-Injected: SECRET"'),
}


@cases(("text", "says"), DAMAGED | DAMAGED_ELSEWHERE)
def test_status_names_what_is_damaged(collector, config, command, text, says):
    config(text)

    done = command("status")

    assert done.returncode == 1
    assert done.stdout.startswith(f"Telemetry of trix-cli is off: {says}")
    assert "SECRET" not in done.stdout


@cases("text", {"not-toml": "not toml, true", "out-of-range": f"{ON}timeout_ms = 0\n"})
def test_a_damaged_config_is_off_and_left_alone(collector, config, state, capfd, text):
    path = config(text)

    track()

    assert capfd.readouterr() == ("", "")
    assert collector.requests == []
    assert path.read_text() == text
    assert names(state) == ["config.toml"]


def test_a_damaged_config_is_logged_once(collector, config, caplog):
    config(f"{ON}timeout_ms = 0\n")

    track()
    track()

    text = f"telemetry is off: {BAD_TIMEOUT}"
    assert caplog.record_tuples == [("trix_telemetry", logging.WARNING, text)]


@cases("code", {"as-it-comes": "import logging", "broken": "sys.modules['logging'] = sys"})
def test_a_logging_that_nobody_set_up_is_silent(collector, config, code):
    config(f"{ON}timeout_ms = 0\n")

    done = run_tool(code, TRACK)

    assert_silent(done)


@posix
@cases(
    ("kind", "says"),
    {
        "a-named-pipe": ("pipe", "cannot be read: it is not a regular file"),
        "a-device": ("device", "cannot be read: it is not a regular file"),
        "a-loop": ("loop", "(cannot be read: Too many levels of|is a link that leads nowhere).*"),
    },
)
def test_what_is_no_file_is_off_and_left_alone(collector, state, command, kind, says):
    state.mkdir(parents=True)
    path = state / "config.toml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to(path)

    track()
    done = command("status")

    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(f"Telemetry of trix-cli is off: {path} {says}", first_line(done))
    assert names(state) == ["config.toml"]
    assert collector.requests == []


@posix
@cases("place", {"the-config": ".tx3/trix/config.toml", "the-directory": ".tx3"})
def test_a_link_that_leads_nowhere_is_off_and_named(collector, home, command, monkeypatch, place):
    # Root is told so by the check of the owner.
    monkeypatch.setattr(os, "geteuid", os.getpid)
    link = home / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(home / "away" / "nowhere")
    before = read_tree(home)

    track()
    done = command("status")

    assert read_tree(home) == before
    assert first_line(done) == f"Telemetry of trix-cli is off: {link} is a link that leads nowhere"


# Opt-out: variables, standard streams, debug


@cases(
    ("variable", "value"),
    {
        "do-not-track-1": ("DO_NOT_TRACK", "1"),
        "do-not-track-a-word": ("DO_NOT_TRACK", "anything"),
        "own-0": ("TRIX_TELEMETRY", "0"),
        "own-a-word": ("TRIX_TELEMETRY", "disabled"),
        "own-space-1": ("TRIX_TELEMETRY", " 1"),
    },
)
def test_a_variable_turns_off_before_a_file_is_made(collector, home, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)

    thread = track()

    assert thread is None
    assert names(home) == []


@cases(
    ("variable", "value"),
    {
        "do-not-track-empty": ("DO_NOT_TRACK", ""),
        "do-not-track-0": ("DO_NOT_TRACK", "0"),
        "do-not-track-false": ("DO_NOT_TRACK", "False"),
        "do-not-track-no": ("DO_NOT_TRACK", "no"),
        "do-not-track-off": ("DO_NOT_TRACK", "OFF"),
        "own-empty": ("TRIX_TELEMETRY", ""),
        "own-1": ("TRIX_TELEMETRY", "1"),
        "own-true": ("TRIX_TELEMETRY", "True"),
        "own-yes": ("TRIX_TELEMETRY", "yes"),
        "own-on": ("TRIX_TELEMETRY", "ON"),
        "debug-0": ("TRIX_TELEMETRY_DEBUG", "0"),
    },
)
def test_a_variable_that_says_nothing_against_it_leaves_it_on(
    collector, config, monkeypatch, variable, value
):
    config()
    monkeypatch.setenv(variable, value)

    track()

    assert collector.commands == ["build"]


def test_a_variable_never_turns_on_what_the_config_turns_off(collector, config, monkeypatch):
    config("[telemetry]\nenabled = false # true\n")
    monkeypatch.setenv("TRIX_TELEMETRY", "1")

    track()

    assert collector.requests == []


def run_with_closed(redirect, *command):
    """Run a command with standard streams that the shell has closed."""
    quoted = " ".join(["exec", '"$@"', redirect])
    return run(["sh", "-c", quoted, "sh", *command])


@posix
@cases("redirect", {"input": "<&-", "output": ">&-", "error": "2>&-"})
@cases("text", {"first-run": None, "config": ON})
def test_with_a_closed_stream_nothing_is_made_or_sent(collector, config, home, redirect, text):
    if text:
        config(text)
    before = read_tree(home)

    done = run_with_closed(redirect, sys.executable, "-c", script(TRACK, "sys.exit(5)"))

    assert (done.returncode, done.stdout, done.stderr) == (5, "", "")
    assert collector.requests == []
    assert read_tree(home) == before


@posix
def test_status_tells_a_closed_stream_before_the_config(config):
    config(OFF)

    done = run_with_closed("<&-", sys.executable, MODULE, "status")

    assert first_line(done) == "Telemetry of trix-cli is off: standard input is closed"


@posix
def test_a_stream_that_is_closed_after_the_call_sends_nothing(collector, config):
    config()
    code = """
        import os
        import threading

        is_closed = threading.Event()


        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name == "json":
                    is_closed.wait()


        sys.meta_path.insert(0, Finder())
        trix_telemetry.track_command_execution("build")
        os.close(0)
        is_closed.set()
    """

    done = run_tool(code)

    assert_silent(done)
    assert collector.requests == []


def test_debug_shows_the_request(collector, config):
    config(f'{ON}[telemetry.otlp_headers]\nX-Key = "secret"\n')

    done = run_tool(TRACK, env={"TRIX_TELEMETRY_DEBUG": "1"})

    head, _, body = done.stderr.partition("\n\n")
    assert head.startswith("trix-cli: telemetry would send\nPOST /v1/metrics HTTP/1.1\n")
    assert "X-Key: (hidden)" in head
    assert Point(body).command == "build"


def test_debug_sends_and_makes_nothing(collector, home):
    code = "assert trix_telemetry.track_command_execution('build') is None"

    done = run_tool(code, env={"TRIX_TELEMETRY_DEBUG": "1"})

    assert (done.returncode, done.stdout) == (0, "")
    assert "sends anonymous usage telemetry" not in done.stderr
    assert collector.requests == []
    assert names(home) == []


@cases(
    ("env", "text", "reason"),
    {
        "do-not-track": (
            {"DO_NOT_TRACK": "1", "TRIX_TELEMETRY": "0"},
            None,
            "DO_NOT_TRACK is set",
        ),
        "own-variable": (
            {"TRIX_TELEMETRY": "0", ENDPOINT: ""},
            None,
            "TRIX_TELEMETRY is set, and not to 1, true, yes or on",
        ),
        "false": ({ENDPOINT: ""}, OFF, "config.toml says enabled = false"),
        "no-key": ({}, "[telemetry]\nenable = false\n", "config.toml has no telemetry.enabled"),
        "no-table": ({}, "true = true\n", "config.toml has no telemetry.enabled"),
        "no-endpoint": (
            {ENDPOINT: ""},
            None,
            "there is no endpoint: TRIX_TELEMETRY_ENDPOINT is empty",
        ),
        "no-endpoint-of-the-tool": (
            {},
            None,
            "there is no endpoint: endpoint of the tool is empty",
        ),
        "ci": (
            {"CI": "true", ENDPOINT: ""},
            None,
            "CI is set, and {state}/config.toml does not exist",
        ),
    },
)
def test_status_tells_the_first_reason(config, state, command, monkeypatch, env, text, reason):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    if text is not None:
        config(text)

    done = command("status")

    reason = reason.replace("{state}", str(state)).replace("/", os.sep)
    assert first_line(done) == f"Telemetry of trix-cli is off: {reason}"


def test_debug_tells_the_reason(collector, config, monkeypatch, capfd):
    config(OFF)
    monkeypatch.setenv("TRIX_TELEMETRY_DEBUG", "yes")

    track()

    text = "trix-cli: telemetry is off: config.toml says enabled = false\n"
    assert capfd.readouterr() == ("", text)


def test_the_command_line_does_not_heed_debug(collector, config, command, monkeypatch):
    config()
    monkeypatch.setenv("TRIX_TELEMETRY_DEBUG", "1")

    command("track", "build")

    assert collector.commands == ["build"]


# The data point


def test_the_body_is_that_of_the_contract_to_the_byte():
    start = 1640995200000000000
    metric = trix_telemetry.CommandMetric(
        "trix_command_invocation", "build", start, start + 250000000
    )

    body = metric.encode(
        {
            "service.name": "trix-cli",
            "service.version": "0.19.3",
            "user.fingerprint": FINGERPRINT,
        }
    )

    assert body.decode() == (
        '{"resourceMetrics":[{"resource":{"attributes":['
        '{"key":"service.name","value":{"stringValue":"trix-cli"}},'
        '{"key":"service.version","value":{"stringValue":"0.19.3"}},'
        f'{{"key":"user.fingerprint","value":{{"stringValue":"{FINGERPRINT}"}}}}]}},'
        '"scopeMetrics":[{"scope":{},"metrics":[{"name":"trix_command_invocation","sum":{'
        '"dataPoints":[{"attributes":[{"key":"command_name","value":{"stringValue":"build"}}],'
        '"startTimeUnixNano":"1640995200000000000","timeUnixNano":"1640995200250000000",'
        '"asInt":"1"}],"aggregationTemporality":2,"isMonotonic":true}}]}]}]}'
    )


def test_an_interval_is_from_the_call_to_the_encoding(collector, config):
    config()
    code = """
        import time


        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name == "tomllib":
                    time.sleep(0.1)


        sys.meta_path.insert(0, Finder())
        print(time.time_ns())
        trix_telemetry.track_command_execution("build")
        print(time.time_ns())
    """

    done = run_tool(code)

    before, after = map(int, done.stdout.split())
    (point,) = collector.points
    assert before <= point.start <= after
    assert point.end >= point.start + 100_000_000


@pytest.fixture
def intervals(collector, config):
    """The start and the end of 24 points of this process, in the order of time."""
    config()
    for _ in range(6):
        threads = [trix_telemetry.track_command_execution("build") for _ in range(4)]
        for thread in filter(None, threads):
            thread.join(LONG)
    return sorted((point.start, point.end) for point in collector.points)


def test_an_interval_takes_a_millisecond_at_least(intervals):
    assert len(intervals) == 24
    assert all(end - start >= 1_000_000 for start, end in intervals)


def test_no_interval_overlaps_another_one(intervals):
    assert len(intervals) == 24
    assert all(one[1] <= two[0] for one, two in itertools.pairwise(intervals))


# Files: modes, the fingerprint, the back-off, disks


@posix
def test_what_is_made_is_for_the_user_alone_under_any_umask(collector, home, state):
    collector.answer = (503, {}, b"")

    run_tool("import os\nos.umask(0)", TRACK)

    paths = [home / ".tx3", state, *state.iterdir()]
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in paths} == {
        ".tx3": 0o700,
        "trix": 0o700,
        "backoff": 0o600,
        "config.toml": 0o600,
        "fingerprint": 0o600,
    }


@posix
def test_modes_are_set_on_open_files_that_nobody_else_could_open(collector):
    code = """
        import os


        def watch(event, arguments):
            if event in ("os.chmod", "os.chown"):
                assert isinstance(arguments[0], int), arguments
                assert os.fstat(arguments[0]).st_mode & 0o077 == 0


        os.umask(0)
        sys.addaudithook(watch)
        trix_telemetry.track_command_execution("build").join()
        trix_telemetry.main(["disable"])
    """

    done = run_tool(code)

    assert done.stdout.startswith("Telemetry disabled (saved in ")


def test_without_hard_links_a_first_run_counts(collector, state):
    code = """
        import os


        def refuse(source, target):
            raise PermissionError(1, "no links")


        os.link = refuse
        trix_telemetry.track_command_execution("build")
    """

    done = run_tool(code)

    assert "trix-cli" in done.stderr
    assert collector.commands == ["build"]
    assert names(state) == ["config.toml", "fingerprint"]


def test_the_fingerprint_is_64_hex_digits(collector, state):
    track()

    assert re.fullmatch("[0-9a-f]{64}", (state / "fingerprint").read_bytes().decode())


def test_the_fingerprint_is_kept(collector, state):
    track()
    track()

    assert collector.users == {(state / "fingerprint").read_text()}


def test_get_user_fingerprint_makes_nothing(collector, home):
    fingerprint = trix_telemetry.get_user_fingerprint()

    assert re.fullmatch("[0-9a-f]{64}", fingerprint)
    assert names(home) == []


def test_get_user_fingerprint_returns_what_the_next_send_stores(collector, state):
    fingerprint = trix_telemetry.get_user_fingerprint()

    track()

    assert (state / "fingerprint").read_text() == fingerprint
    assert trix_telemetry.get_user_fingerprint() == fingerprint


@cases("stored", {"rust-tool": "0123456789abcdef", "one-digit": "A", "64-digits": FINGERPRINT})
def test_a_fingerprint_that_is_there_is_used_and_kept(collector, config, state, stored):
    config()
    (state / "fingerprint").write_text(stored)

    track()

    assert collector.users == {stored}
    assert (state / "fingerprint").read_text() == stored


@cases("junk", {"empty": b"", "no-hex": b"xyz", "65-digits": b"0" * 65, "not-utf-8": b"\xff" * 16})
def test_junk_in_place_of_a_fingerprint_is_replaced(collector, config, state, junk):
    config()
    (state / "fingerprint").write_bytes(junk)

    track()
    track()

    (user,) = collector.users
    assert re.fullmatch("[0-9a-f]{64}", user)
    assert (state / "fingerprint").read_text() == user


def test_a_fingerprint_that_cannot_be_stored_serves_this_process(collector, config, state):
    config()
    (state / "fingerprint").mkdir()

    track()
    track()

    assert collector.users == {trix_telemetry.get_user_fingerprint()}


def write_backoff(collector, state, age=0, reason="slow"):
    path = state / "backoff"
    path.write_bytes(f"{collector.url}/v1/metrics\n{reason}\n".encode())
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_within_ten_minutes_of_a_back_off_nothing_is_sent(collector, config, state):
    config()
    write_backoff(collector, state, age=590)

    track()

    assert collector.requests == []


def test_within_a_back_off_a_process_that_ends_at_once_waits_for_nothing(collector, config, state):
    config()
    write_backoff(collector, state)

    done = run_tool(TRACK, timeout=LONG / 2)

    assert_silent(done)


@cases("age", {"610-seconds": 610, "in-the-future": -60})
def test_a_back_off_of_another_time_does_not_count(collector, config, state, age):
    config()
    write_backoff(collector, state, age)

    track()

    assert collector.commands == ["build"]


@cases(
    "text",
    {"empty": b"", "another-url": b"http://other/v1/metrics\nslow\n", "not-utf-8": b"\xff\xfe\0"},
)
def test_a_damaged_back_off_does_not_count(collector, config, state, text):
    config()
    (state / "backoff").write_bytes(text)

    track()

    assert collector.commands == ["build"]


def test_status_shows_how_long_a_back_off_takes_and_why(collector, config, state, command):
    config()
    write_backoff(collector, state, age=100, reason="slow \x1b[31m")

    done = command("status")

    assert first_line(done) == "Telemetry of trix-cli is on"
    assert re.search(r"(?m)^  Back-off     (500|49\d) s more: slow \?\[31m$", done.stdout)


def let_others_in(directory):
    """Let another user reach a directory below that of this test run."""
    for parent in directory.parents:
        if "pytest" in str(parent):
            parent.chmod(parent.stat().st_mode | 0o055)


@pytest.fixture
def locked(home, state):
    """Makes a home of which nothing can be changed; a tool of root's becomes another user in it."""
    state.mkdir(parents=True)
    paths = [state, state.parent, home]

    def lock(mode):
        for path in state.iterdir():
            path.chmod(mode)
        for path in paths:
            path.chmod(0o555)
        let_others_in(home)

    yield lock
    for path in paths:
        path.chmod(0o755)


# The modules are there, so that the network phase begins at once, on a busy machine, too.
READY = """
import encodings.idna
import hashlib
import json
import ssl
import tomllib
import urllib.request
"""


# What the command line imports, for a user who may not read the directories of this Python.
BECOME_NOBODY = f"""{READY}
import argparse
import gettext
import http.server
import importlib.util
import locale
import os
import re
import select
import signal
import tempfile
import threading

if os.geteuid() == 0:
    os.setuid({NOBODY_ID})
"""


@posix
@cases(
    ("text", "mode", "runs", "says"),
    {
        "nothing-can-be-made": (None, 0, 0, "off: .*config.toml cannot be created: .* writable"),
        "the-config-can-be-read": (NEW_CONFIG, 0o444, 2, "on"),
        "the-config-cannot-be-read": (NEW_CONFIG, 0, 0, "off: .* cannot be read: Permission .*"),
    },
)
def test_in_a_home_that_cannot_be_written_a_config_that_can_be_read_counts(
    collector, config, locked, text, mode, runs, says
):
    if text:
        config(text)
    locked(mode)
    code = """
        for _ in range(2):
            thread = trix_telemetry.track_command_execution("build")
            if thread is not None:
                thread.join()
        trix_telemetry.main(["status"])
    """

    done = run_tool(BECOME_NOBODY, code)

    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(f"Telemetry of trix-cli is {says}", first_line(done))
    assert collector.commands == ["build"] * runs
    assert len(collector.users) == min(runs, 1)


@posix
def test_a_first_run_on_a_full_disk_makes_and_sends_nothing(collector, state):
    code = """
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        trix_telemetry.track_command_execution("build")
    """

    done = run_tool(code)

    assert_silent(done)
    assert collector.requests == []
    assert names(state) == []


def test_a_home_that_cannot_be_made_is_told_in_one_line(home):
    (home / "file").touch()
    # On Windows a drive that is not there, whose root is its own parent.
    place = "Q:\\nobody" if os.name == "nt" else str(home / "file" / "nobody")

    done = run_command("enable", env={"HOME": place, "USERPROFILE": place})

    assert_error(done, ".+")


@posix
def test_without_a_home_that_of_the_password_database_counts(collector, home):
    code = """
        import pwd
        import types

        entry = types.SimpleNamespace(pw_dir=sys.argv[1])
        pwd.getpwuid = lambda user_id: entry
        trix_telemetry.track_command_execution("build")
    """

    run_tool(code, arguments=[home], env={"HOME": None})

    assert names(home / ".tx3" / "trix") == ["config.toml", "fingerprint"]
    assert collector.commands == ["build"]


@posix
@cases("place", {"relative": "here", "a-device": "/dev/null"})
def test_without_a_home_nothing_is_sent(collector, home, place):
    config = home / "here" / ".tx3" / "trix" / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text(ON)

    done = run_tool(TRACK, env={"HOME": place}, cwd=home)

    assert_silent(done)
    assert collector.requests == []


# Files: root in the home of another user


@pytest.fixture
def foreign(home, monkeypatch):
    """Makes a home of another user's, with a config or with links."""

    def make(kind):
        theirs = home / "theirs"
        directory = theirs / ".tx3" / "trix"
        own = home / ".tx3" / "trix"
        monkeypatch.setenv("HOME", str(theirs))
        theirs.mkdir()
        if kind == "their-new-home":
            pass
        elif kind == "a-link-of-theirs-to-a-directory-of-roots":
            (home / "own").mkdir()
            (home / "own" / "config.toml").write_text(ON)
            directory.parent.mkdir()
            directory.symlink_to(home / "own")
        else:
            directory.mkdir(parents=True)
            (directory / "config.toml").write_text(ON)
        for path in (theirs, *theirs.rglob("*")):
            os.lchown(path, NOBODY_ID, NOBODY_ID)
        if kind == "a-directory-of-roots-in-their-home":
            os.chown(directory, 0, 0)
        elif kind == "a-config-that-is-a-link-to-their-file":
            own.mkdir(parents=True)
            (own / "config.toml").symlink_to(directory / "config.toml")
            monkeypatch.setenv("HOME", str(home))
        return theirs

    return make


@root
@pytest.mark.parametrize(
    "kind",
    [
        "their-new-home",
        "their-home",
        "a-directory-of-roots-in-their-home",
        "a-config-that-is-a-link-to-their-file",
        "a-link-of-theirs-to-a-directory-of-roots",
    ],
)
def test_root_makes_and_sends_nothing_in_the_home_of_another_user(
    collector, home, foreign, command, kind
):
    foreign(kind)
    before = read_tree(home)

    thread = track()
    done = command("status")

    wanted = "Telemetry of trix-cli is off: .* belongs to user 65534, and this is root"
    assert thread is None
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(wanted, first_line(done))
    assert read_tree(home) == before


@root
@cases(
    "code",
    {"a-call": TRACK, "get-user-fingerprint": "trix_telemetry.get_user_fingerprint()"},
)
def test_root_opens_no_file_in_the_home_of_another_user(collector, foreign, code):
    theirs = foreign("their-home")
    watch = f"""
        opened = []


        def watch(event, arguments):
            if event == "open" and str(arguments[0]).startswith({str(theirs)!r}):
                opened.append(arguments[0])


        sys.addaudithook(watch)
    """

    done = run_tool(watch, code, "assert opened == [], opened")

    assert_silent(done)


@root
@pytest.mark.parametrize("name", ["enable", "disable", "reset"])
def test_root_changes_nothing_in_the_home_of_another_user(home, foreign, command, name):
    foreign("their-home")
    before = read_tree(home)

    done = command(name)

    assert_error(done, ".* belongs to user 65534, and this is root.*")
    assert read_tree(home) == before


# The client: endpoints, proxies, redirects, TLS


@cases(
    ("in_environment", "in_config", "paths"),
    {
        "of-the-tool": (None, None, ["/tool/v1/metrics"]),
        "of-the-config": (None, "{url}/file", ["/file/v1/metrics"]),
        "of-the-environment": ("{url}/environment/", "{url}/file", ["/environment/v1/metrics"]),
        "empty-in-the-config": (None, "", []),
        "empty-in-the-environment": ("", "{url}/file", []),
    },
)
def test_the_endpoint_that_counts(config, monkeypatch, in_environment, in_config, paths):
    collector = Collector()
    monkeypatch.setattr(trix_telemetry.Settings, "endpoint", f"{collector.url}/tool")
    if in_environment is not None:
        monkeypatch.setenv(ENDPOINT, in_environment.format(url=collector.url))
    if in_config is None:
        config()
    else:
        config(otlp_endpoint=in_config.format(url=collector.url))

    track()

    assert [path for path, _, _ in collector.requests] == paths


def test_the_variables_of_opentelemetry_are_not_read(config, monkeypatch):
    collector = Collector()
    config()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)

    track()

    assert collector.requests == []


def test_a_proxy_of_the_environment_is_used(collector, monkeypatch):
    proxy = Collector()
    monkeypatch.setenv("http_proxy", proxy.url)

    track()

    ((path, headers, _),) = proxy.requests
    assert path == f"{collector.url}/v1/metrics"
    assert headers["Host"] == collector.url.removeprefix("http://")


def test_no_proxy_is_honoured(collector, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    track()

    assert collector.commands == ["build"]


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS keeps to the environment")
def test_the_proxies_are_those_that_the_standard_library_finds(collector, config):
    config()
    code = f"""
        import urllib.request


        def find():
            return {{"http": {collector.url!r}}}


        urllib.request.getproxies = find
        trix_telemetry.track_command_execution("build")
    """

    done = run_tool(code, env={ENDPOINT: "http://collector.invalid"})

    assert_silent(done)
    assert [path for path, _, _ in collector.requests] == ["http://collector.invalid/v1/metrics"]


@cases(
    "proxy",
    {
        "socks": "socks5://{host}",
        "refuses": "http://127.0.0.1:1/no",
        "one-slash": "http:/me:secret@h",
    },
)
def test_an_odd_proxy_gets_nothing_and_is_told_without_its_password(collector, config, proxy):
    config()
    proxy = proxy.format(host=collector.url.removeprefix("http://"))
    env = {"http_proxy": proxy, ENDPOINT: "http://127.0.0.2:1"}

    done = run_command("track", "build", env=env)

    assert_error(done, r"http://127.0.0.2:1/v1/metrics after \d+ ms: .+")
    assert "secret" not in done.stderr
    assert collector.requests == []


@cases(
    ("status", "target"),
    {"on-the-same-host": (301, "/elsewhere"), "a-file": (307, "file:///dev/null")},
)
def test_a_redirect_is_not_followed(collector, config, status, target):
    config()
    collector.answer = (status, {"Location": target}, b"")

    track()

    assert [path for path, _, _ in collector.requests] == ["/v1/metrics"]


# An authority, and a certificate of it for localhost and 127.0.0.1, both until the year 2126.
AUTHORITY = """\
-----BEGIN CERTIFICATE-----
MIIBlTCCATygAwIBAgIUNmiDwmVQp4DOI6eNi+cvnAChRdgwCgYIKoZIzj0EAwIw
KDENMAsGA1UECgwEVGVzdDEXMBUGA1UEAwwOVGVzdCBBdXRob3JpdHkwIBcNMjYx
MTIzMDE1NDQyWhgPMjEyNjEwMzAwMTU0NDJaMCgxDTALBgNVBAoMBFRlc3QxFzAV
BgNVBAMMDlRlc3QgQXV0aG9yaXR5MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE
zGG7nRvl1M7P/c64uxxLKIaz1zv8MsDJax1WwYn0DDVHrZURlVTu9ZnUJPCz69VE
ueeOkCxmjvIchcW0m1/4fqNCMEAwDwYDVR0TAQH/BAUwAwEB/zAOBgNVHQ8BAf8E
BAMCAQYwHQYDVR0OBBYEFD83MH5DVjGULqRGNYKJt108Bf3VMAoGCCqGSM49BAMC
A0cAMEQCIDqexsFabE6sYXney5hDSCYxgKMvlR5dTckPbKgvPKanAiAgBWPX+h/u
c3Ss5cVyatiLuVLqi4JKnGMIhxRnvtYhOw==
-----END CERTIFICATE-----
"""


AUTHORITY_HASH = "00ad8108.0"  # openssl x509 -subject_hash


CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBwTCCAWagAwIBAgIBAjAKBggqhkjOPQQDAjAoMQ0wCwYDVQQKDARUZXN0MRcw
FQYDVQQDDA5UZXN0IEF1dGhvcml0eTAgFw0yNjExMjMwMTU0NDJaGA8yMTI2MTAz
MDAxNTQ0MlowFDESMBAGA1UEAwwJY29sbGVjdG9yMFkwEwYHKoZIzj0CAQYIKoZI
zj0DAQcDQgAEr58ALSsGFGAza+DLXibBcsz+sXRlht6RX/kl28Hy/o0hsdU6Y/I0
+bNjmz8se0V21uD6zAJdTSAkuvIsjEaL6qOBkjCBjzAMBgNVHRMBAf8EAjAAMA4G
A1UdDwEB/wQEAwIHgDATBgNVHSUEDDAKBggrBgEFBQcDATAdBgNVHQ4EFgQUKuWj
IlFNeZN5E2gAQbDGyGY+fM8wHwYDVR0jBBgwFoAUPzcwfkNWMZQupEY1gom3XTwF
/dUwGgYDVR0RBBMwEYIJbG9jYWxob3N0hwR/AAABMAoGCCqGSM49BAMCA0kAMEYC
IQD5Z7dqOKVrye+/VjdPi8r9CYsx7nXf9tdGLnmJQ/5qKgIhALg4L0nYPNpN8OS9
qSLRNdzDFSfJP2diXJacN4cfPjE4
-----END CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg0qEYYzJms2jYWjLI
v3JGa+BTBXS1D7z9oeOqAtGJZnWhRANCAASvnwAtKwYUYDNr4MteJsFyzP6xdGWG
3pFf+SXbwfL+jSGx1Tpj8jT5s2ObPyx7RXbW4PrMAl1NICS68iyMRovq
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
    monkeypatch.setenv(ENDPOINT, collector.url)
    return collector


# Tells what each context is made of, and puts the authority into the bundle of the system.
WATCH_CONTEXTS = """
import os
import ssl

make = ssl.create_default_context


def watch(**options):
    print(*options)
    if options or "SSL_CERT_FILE" in os.environ:
        return make(**options)
    return make(cafile=os.path.join(os.environ["HOME"], "authority.pem"))


ssl.create_default_context = watch
trix_telemetry.track_command_execution("build")
"""


@posix
@cases(
    ("name", "contexts"),
    {
        "a-hashed-directory": (AUTHORITY_HASH, "capath\n"),
        "the-bundle-where-no-directory-is-hashed": ("authority.pem", "\n"),
    },
)
def test_tls_is_verified_with_the_authorities_of_the_system(secure, home, config, name, contexts):
    (home / "empty" / name).write_text(AUTHORITY)
    config()

    done = run_tool(WATCH_CONTEXTS)

    assert (done.returncode, done.stdout, done.stderr) == (0, contexts, "")
    assert secure.commands == ["build"]


@posix
def test_the_bundle_of_ssl_cert_file_goes_first(secure, home, config):
    (home / "empty" / "01234567.0").write_text(AUTHORITY)
    config()

    done = run_tool(WATCH_CONTEXTS, env={"SSL_CERT_FILE": str(home / "authority.pem")})

    assert done.stdout == "\n"
    assert secure.commands == ["build"]


def test_an_unknown_authority_gets_nothing_and_is_told(secure, config):
    config()

    done = run_command("track", "build")

    assert_error(done, ".*CERTIFICATE_VERIFY_FAILED.*")
    assert secure.requests == []


def test_a_certificate_of_another_host_gets_nothing(secure, home, config):
    config()
    code = """
        import socket

        find = socket.getaddrinfo


        def find_collector(host, *rest, **options):
            return find("127.0.0.1", *rest, **options)


        socket.getaddrinfo = find_collector
        sys.exit(trix_telemetry.main(["track", "build"]))
    """
    port = secure.url.rpartition(":")[2]
    env = {"SSL_CERT_FILE": str(home / "authority.pem"), ENDPOINT: f"https://127.0.0.2:{port}"}

    done = run_tool(code, env=env)

    assert_error(done, ".*CERTIFICATE_VERIFY_FAILED.*")
    assert secure.requests == []


# Reads the bundle until the deadline is over.
READ_LATE = """
import ssl
import time

make = ssl.create_default_context
began = time.monotonic()


def make_late(**options):
    time.sleep(max(0, began + 0.7 - time.monotonic()))
    print("read")
    return make(**options)


ssl.create_default_context = make_late
trix_telemetry.MAX_IMPORT_SECONDS = 60
trix_telemetry.track_command_execution("build")
"""


@posix
def test_the_end_waits_while_a_bundle_of_authorities_is_read(secure, config):
    config(timeout_ms=500)

    done = run_tool(READ_LATE)

    assert (done.returncode, done.stdout, done.stderr) == (0, "read\n", "")


# The first run


def test_a_first_run_makes_the_config_of_the_contract(collector, state):
    track()

    assert (state / "config.toml").read_text() == NEW_CONFIG


def test_a_first_run_shows_the_notice(collector, capfd):
    track()

    out, err = capfd.readouterr()
    assert out == ""
    assert (
        err
        == f"""\
trix-cli sends anonymous usage telemetry: the name of each command,
the version and a random fingerprint, never arguments, paths or file contents.
This command is the first to be counted. This notice is shown once.
  Sent to:   {collector.url}/v1/metrics
  Inspect:   python -m trix_telemetry status
  Turn off:  set TRIX_TELEMETRY=0 or DO_NOT_TRACK=1,
             or python -m trix_telemetry disable
"""
    )


def test_the_notice_is_complete_before_the_call_returns(collector, capfd):
    thread = trix_telemetry.track_command_execution("build")
    said = capfd.readouterr().err

    thread.join(LONG)

    assert said.endswith("python -m trix_telemetry disable\n")


def test_a_second_run_is_silent_and_counts(collector, capfd):
    track()
    capfd.readouterr()

    track()

    assert capfd.readouterr() == ("", "")
    assert collector.commands == ["build", "build"]


def test_a_first_run_in_ci_makes_and_sends_nothing(collector, home, monkeypatch):
    monkeypatch.setenv("CI", "anything")

    thread = track()

    assert thread is None
    assert names(home) == []


def test_a_first_run_where_ci_is_denied_counts(collector, monkeypatch):
    monkeypatch.setenv("CI", "false")

    track()

    assert collector.commands == ["build"]


def test_in_ci_a_config_that_is_there_counts(collector, config, monkeypatch):
    config()
    monkeypatch.setenv("CI", "true")

    track()

    assert collector.commands == ["build"]


def test_a_first_run_without_an_endpoint_makes_imports_and_says_nothing(home):
    code = """
        before = set(sys.modules)
        assert trix_telemetry.track_command_execution("build") is None
        assert set(sys.modules) == before
    """

    done = run_tool(code, flags=["-S"])

    assert_silent(done)
    assert names(home) == []


def test_a_standard_error_of_a_hosts_own_class_is_told(collector):
    code = """
        class Stream:
            write = sys.stderr.write
            flush = sys.stderr.flush
            fileno = sys.stderr.fileno


        sys.stderr = Stream()
        trix_telemetry.track_command_execution("build")
    """

    done = run_tool(code)

    assert done.stderr.startswith("trix-cli sends anonymous usage telemetry")
    assert collector.commands == ["build"]


# Each ends before its exit hooks run, and before Python flushes what cannot be written.
LOST_STDERR = {
    "none": "sys.stderr = None",
    "a-closed-pipe": """
read, write = os.pipe()
os.close(read)
sys.stderr = open(write, "w", closefd=False)
""",
    "a-full-disk": "sys.stderr = open('/dev/full', 'w')",
    "interrupted": """
class Stream:
    def fileno(self):
        raise KeyboardInterrupt


sys.stderr = Stream()
""",
}


@posix
@cases("code", LOST_STDERR)
def test_a_notice_that_cannot_be_shown_takes_the_config_back(collector, state, code):
    end = """
try:
    assert trix_telemetry.track_command_execution("build") is None
except KeyboardInterrupt:
    pass
os._exit(0)
"""

    done = run_tool("import os", code, end)

    assert (done.returncode, done.stdout) == (0, "")
    assert collector.requests == []
    assert names(state) == []


def test_a_notice_that_was_not_shown_is_shown_by_the_next_run(collector):
    run_tool("sys.stderr = None", TRACK)

    done = run_tool(TRACK)

    assert done.stderr.startswith("trix-cli sends anonymous usage telemetry")
    assert collector.commands == ["build"]


def test_a_notice_that_failed_leaves_what_a_person_has_written_since(collector, state):
    code = """
        class Stream:
            def write(self, text):
                trix_telemetry.main(["disable"])
                raise OSError


        sys.stderr = Stream()
        trix_telemetry.track_command_execution("build")
    """

    done = run_tool(code)

    assert done.stdout.startswith("Telemetry disabled (saved in ")
    assert tomllib.loads((state / "config.toml").read_text())["telemetry"]["enabled"] is False
    assert collector.requests == []


@cases(
    "code",
    {
        "beside-the-notice": """
            class Stream:
                def write(self, text):
                    trix_telemetry.main(["disable"])


            sys.stderr = Stream()
        """,
        "before-the-file-is-made": """
            make = trix_telemetry.make_directory


            def make_late(path):
                trix_telemetry.make_directory = make
                trix_telemetry.main(["disable"])


            trix_telemetry.make_directory = make_late
        """,
    },
)
def test_a_first_run_sends_nothing_where_a_disable_is_quicker(collector, code):
    done = run_tool(code, TRACK)

    assert done.stdout.startswith("Telemetry disabled (saved in ")
    assert collector.requests == []


def test_of_many_first_runs_one_tells_and_all_are_one_user(collector, state):
    # They wait for each other, and end by an exception: the interpreter imports while they do.
    code = f"""
        import time

        trix_telemetry.DEFAULT_TIMEOUT_MS = 60_000
        time.sleep(max(0, {time.time() + 0.6} - time.time()))
        trix_telemetry.track_command_execution("build")
        raise ValueError("of the tool")
    """

    tools = [start_tool(code) for _ in range(8)]
    said = [tool.communicate(timeout=LONG)[1] for tool in tools]

    assert {text.splitlines()[-1] for text in said} == {"ValueError: of the tool"}
    assert sum("trix-cli" in text for text in said) == 1
    assert len(collector.requests) == 8
    assert len(collector.users) == 1
    assert names(state) == ["config.toml", "fingerprint"]


# The session: the end of the process, signals, forks


def hostile(speak):
    """Start a server that speaks with each connection by a function."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            speak(self.request)

    return serve(Handler)


def silence(connection):
    """Accept a connection, and never answer."""
    time.sleep(LONG)


def say(*parts):
    """Return a function that sends these parts, and closes the connection."""

    def speak(connection):
        connection.recv(65536)
        for part in parts:
            connection.sendall(part)

    return speak


def test_each_process_that_ends_at_once_delivers(collector, config):
    config(timeout_ms=60_000)

    for _ in range(4):
        tools = [start_tool(TRACK) for _ in range(4)]
        for tool in tools:
            tool.communicate(timeout=LONG)

    assert len(collector.requests) == 16
    assert len(collector.users) == 1


def test_an_import_that_fails_beside_another_thread_is_tried_again(collector, config):
    config(EDITED_CONFIG)
    code = """
        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name == "tomllib":
                    sys.meta_path.remove(self)
                    raise ImportError("half-made")


        sys.meta_path.insert(0, Finder())
        trix_telemetry.track_command_execution("build")
    """

    done = run_tool(code)

    assert_silent(done)
    assert collector.commands == ["build"]


def test_output_arrives_before_the_wait(config):
    config(otlp_endpoint=hostile(silence).url, timeout_ms=60_000)
    code = f"{TRACK}\nprint('done')\nprint('told', end='', file=sys.stderr)"

    process = start_tool(code)
    late = threading.Timer(LONG / 2, process.kill)
    late.start()
    out = process.stdout.readline()
    err = process.stderr.read(4)
    late.cancel()
    is_waiting = process.poll() is None
    process.kill()
    process.communicate()

    assert (out, err) == ("done\n", "told")
    assert is_waiting


# Its output arrives right before the wait.
END_SOON = f"""
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
{TRACK}
print("waiting")
sys.exit(7)
"""


@posix
@pytest.mark.parametrize("delay", [0, 0.02, 0.3])
@cases(
    ("number", "code"),
    {"ctrl-c": (signal.SIGINT, 7), "terminate": (signal.SIGTERM, -signal.SIGTERM)},
)
def test_a_signal_ends_the_wait(config, number, code, delay):
    config(otlp_endpoint=hostile(silence).url, timeout_ms=60_000)

    process = start_tool(END_SOON)
    said = process.stdout.readline()
    time.sleep(delay)
    process.send_signal(number)
    out, err = process.communicate(timeout=LONG / 2)

    assert (said, out, err) == ("waiting\n", "", "")
    assert process.returncode == code


FORK = """
import os


def do_nothing():
    pass


def fork(work):
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@posix
@pytest.mark.parametrize("delay", [0, 0.018, 0.036])
def test_a_fork_at_any_moment_leaves_a_child_that_can_import_and_track(collector, config, delay):
    config(EDITED_CONFIG)
    code = f"""
        import time


        def work():
            import tomllib, json, urllib.request, ssl

            trix_telemetry.track_command_execution("child").join()


        trix_telemetry.track_command_execution("parent")
        time.sleep({delay})
        fork(work)
    """

    done = run_tool(FORK, code, flags=["-W", "ignore"], timeout=LONG / 2)

    assert_silent(done)
    assert sorted(collector.commands) == ["child", "parent"]


@posix
def test_a_fork_waits_until_nothing_is_imported_any_more(config):
    config(otlp_endpoint=hostile(silence).url)
    code = """
        import os

        trix_telemetry.MAX_IMPORT_SECONDS = 60
        trix_telemetry.track_command_execution("build")
        (delivery,) = trix_telemetry.get_session().deliveries
        if os.fork() == 0:
            os._exit(0)
        print(delivery.is_prepared.is_set(), flush=True)
        os._exit(0)
    """

    done = run_tool(code, flags=["-W", "ignore"])

    assert done.stdout == "True\n"


@posix
def test_a_forked_child_has_a_session_of_its_own(config):
    config(otlp_endpoint=hostile(silence).url, timeout_ms=60_000)
    code = """
        def work():
            assert trix_telemetry.track_command_execution("child") is not None


        for _ in range(4):
            assert trix_telemetry.track_command_execution("parent") is not None
        fork(work)
        os._exit(0)
    """

    done = run_tool(FORK, code, flags=["-W", "ignore"], timeout=LONG / 2)

    assert_silent(done)


@posix
@pytest.mark.parametrize("delay", [0, 0.02, 0.3])
def test_a_daemon_holds_no_later_command_up(collector, config, home, delay):
    config(EDITED_CONFIG)
    (home / "held").touch()
    code = f"""
        import os
        import time

        trix_telemetry.track_command_execution("build")
        time.sleep({delay})
        if os.fork():
            os._exit(0)
        os.setsid()
        for descriptor in (0, 1, 2):
            os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
        while os.path.exists("held"):
            time.sleep(0.1)
    """

    done = run_tool(code, flags=["-W", "ignore"], cwd=home)
    later = run_tool("trix_telemetry.track_command_execution('next')", timeout=LONG / 2)
    (home / "held").unlink()

    assert_silent(done)
    assert_silent(later)
    assert "next" in collector.commands


@posix
def test_neither_a_fork_nor_the_end_waits_for_an_import_that_is_stuck(collector, config, home):
    config(EDITED_CONFIG)
    (home / "tomllib.py").write_text(f"import time\ntime.sleep({LONG})\n")
    code = """
        import os

        sys.path.insert(0, sys.argv[1])
        trix_telemetry.DEFAULT_TIMEOUT_MS = 100
        trix_telemetry.track_command_execution("build")
        if os.fork() == 0:
            os._exit(0)
    """

    done = run_tool(code, flags=["-W", "ignore"], arguments=[home], timeout=LONG / 2)

    assert_silent(done)


@posix
def test_ctrl_c_while_an_import_is_stuck_is_silent(collector, config, home):
    config(EDITED_CONFIG)
    (home / "tomllib.py").write_text(f"import time\ntime.sleep({LONG})\n")
    code = """
        import signal

        sys.path.insert(0, sys.argv[1])
        trix_telemetry.DEFAULT_TIMEOUT_MS = 100
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        trix_telemetry.track_command_execution("build")
        signal.setitimer(signal.ITIMER_REAL, 0.35)
    """

    done = run_tool(code, arguments=[home], timeout=LONG / 2)

    assert_silent(done)


POOL = """
import multiprocessing


def work(number):
    trix_telemetry.track_command_execution("child").join()
    return number


if __name__ == "__main__":
    trix_telemetry.track_command_execution("parent")
    with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
        assert pool.map(work, range(3)) == [0, 1, 2]
        pool.close()
        pool.join()
"""


@pytest.mark.parametrize("method", ["spawn", pytest.param("fork", marks=posix)])
def test_a_pool_of_processes_counts_each_call_once(collector, config, home, method):
    config(timeout_ms=60_000)
    (home / "pool.py").write_text(script(POOL))

    done = run([sys.executable, "-W", "ignore", home / "pool.py", method])

    assert_silent(done)
    assert sorted(collector.commands) == ["child", "child", "child", "parent"]


# A delivery: a host is unharmed, whatever it does


HOSTS = {
    "an-event-loop": """
        import asyncio


        async def main():
            trix_telemetry.track_command_execution("build")
            await asyncio.sleep(0)


        asyncio.run(main())
    """,
    "a-second-thread": """
        import threading

        track = trix_telemetry.track_command_execution
        thread = threading.Thread(target=track, args=["build"])
        thread.start()
        thread.join()
    """,
    "a-debug-level": f"""
import http.client

http.client.HTTPConnection.debuglevel = 1
{TRACK}
""",
    "no-ssl": f"sys.modules['ssl'] = sys.modules['_ssl'] = None\n{TRACK}",
    "no-stdout": f"{TRACK}\nsys.stdout = None",
    "a-stdout-of-its-own": f"""
class Stream:
    def flush(self):
        sys.stdout = sys.__stdout__
        raise ZeroDivisionError


{TRACK}
sys.stdout = Stream()
""",
    "a-destructor-that-tracks": """
        import builtins


        class Last:
            def __del__(self, track=trix_telemetry.track_command_execution):
                track("gone")


        last = builtins.last = sys.last = trix_telemetry.last = Last()
        trix_telemetry.track_command_execution("build")
    """,
    "an-exit-hook": f"""
import atexit

atexit.register(trix_telemetry.track_command_execution, "late")
{TRACK}
""",
}


@cases("code", HOSTS)
def test_a_host_is_unharmed_and_its_point_arrives(collector, config, code):
    config(EDITED_CONFIG)

    done = run_tool(code, flags=["-X", "dev", "-W", "error"])

    assert_silent(done)
    assert collector.commands.count("build") == 1


# The frame of the exception is kept until Python clears its modules.
LATE_DESTRUCTORS = {
    "in-a-frame-of-an-exception": """
import logging


class Last:
    def __del__(self):
        trix_telemetry.track_command_execution("late")


def fail():
    last = Last()
    raise ZeroDivisionError


fail()
""",
    # Of the modules that are still there, Python clears first what was imported last.
    "where-the-module-is-cleared": """
import os


class Last:
    def __init__(self, track):
        self.track = track

    def __del__(self):
        self.track("late")


os.last = Last(trix_telemetry.track_command_execution)
sys.kept = [trix_telemetry, os]
raise ZeroDivisionError
""",
}


@cases("code", LATE_DESTRUCTORS)
def test_a_late_destructor_that_tracks_is_silent(collector, config, code):
    config()

    done = run_tool(code, timeout=LONG / 2)

    assert done.returncode == 1
    assert done.stderr.startswith("Traceback ")
    assert done.stderr.endswith("\nZeroDivisionError\n")


def test_a_host_whose_threads_cannot_start_is_unharmed(collector, config):
    config(timeout_ms=60_000)
    code = """
        import threading


        def fail(thread):
            raise RuntimeError("can't start new thread")


        threading.Thread.start = fail
        trix_telemetry.DEFAULT_TIMEOUT_MS = 60_000
        assert trix_telemetry.track_command_execution("build") is None
    """

    done = run_tool(code, timeout=LONG / 2)

    assert_silent(done)


def test_the_output_of_a_host_is_its_own(collector, config):
    config()

    done = run_tool(TRACK, "print('out')\nprint('err', file=sys.stderr)\nsys.exit(5)")

    assert (done.returncode, done.stdout, done.stderr) == (5, "out\n", "err\n")


def test_status_names_a_module_that_is_missing(collector, config):
    config(EDITED_CONFIG)

    done = run_tool("sys.modules['tomllib'] = None\ntrix_telemetry.main(['status'])")

    assert first_line(done) == "Telemetry of trix-cli is off: this Python has no module tomllib"


@packages
@posix
@cases(
    ("library", "patch"),
    {
        "gevent": ("gevent", "from gevent import monkey\nmonkey.patch_all()\n"),
        "eventlet": ("eventlet", "import eventlet\neventlet.monkey_patch()\n"),
    },
)
def test_a_host_with_green_threads_counts_and_keeps_its_signals(collector, library, patch):
    pytest.importorskip(library)
    code = """
        import signal

        trix_telemetry.track_command_execution("build").join()
        print(signal.pthread_sigmask(signal.SIG_BLOCK, []))
    """

    done = run_tool(patch, code, flags=["-W", "ignore"])

    assert done.stdout == "set()\n"
    assert done.stderr.count("trix-cli") == 1
    assert collector.commands == ["build"]


# A signal handler that tracks, while the host tracks.
TRACK_OFTEN = """
import logging
import os
import signal
import socket
import ssl
import tempfile
import threading
import tomllib
import urllib.request
import warnings


def track_alarm(number, frame):
    trix_telemetry.track_command_execution("alarm")


def describe():
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            thread.join()
    umask = os.umask(0o022)
    os.umask(umask)
    return {
        "umask": umask,
        "warnings": list(warnings.filters),
        "logging": logging.getLogger().handlers,
        "timeout": socket.getdefaulttimeout(),
        "environment": dict(os.environ),
        "handler": signal.getsignal(signal.SIGINT),
        "mask": signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "switch interval": sys.getswitchinterval(),
        "hook": threading.excepthook,
        "streams": (sys.stdout, sys.stderr),
        "descriptors": os.listdir("/proc/self/fd"),
        "threads": threading.active_count(),
    }


trix_telemetry.get_session()
before = describe()
signal.signal(signal.SIGALRM, track_alarm)
for _ in range(300):
    signal.setitimer(signal.ITIMER_REAL, 0.0002)
    trix_telemetry.track_command_execution("build")
signal.setitimer(signal.ITIMER_REAL, 0)
after = describe()
for name in before:
    assert after[name] == before[name], (name, before[name], after[name])
"""


@posix
@pytest.mark.skipif(sys.platform == "darwin", reason="it reads /proc")
def test_a_host_that_tracks_often_keeps_its_settings_threads_and_files(collector, config):
    config()

    done = run_tool(TRACK_OFTEN)

    assert_silent(done)
    assert len(collector.users) == 1


@posix
def test_the_signals_of_a_host_are_left_to_the_host(config):
    config(otlp_endpoint=hostile(silence).url, timeout_ms=60_000)
    code = """
        import os
        import signal

        trix_telemetry.track_command_execution("build")
        trix_telemetry.get_session().deliveries.pop().is_prepared.wait()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signal.sigwait([signal.SIGUSR1]) == signal.SIGUSR1
        os._exit(0)
    """

    done = run_tool(code, timeout=LONG / 2)

    assert_silent(done)


def test_four_deliveries_are_under_way_at_most(config):
    is_over = threading.Event()

    def hold(connection):
        is_over.wait(LONG)

    server = hostile(hold)
    config(otlp_endpoint=server.url)

    threads = [trix_telemetry.track_command_execution("build") for _ in range(10)]
    is_over.set()

    assert [thread is not None for thread in threads] == [True] * 4 + [False] * 6
    for thread in threads[:4]:
        thread.join(LONG)
    assert server.accepted == 4


def test_the_call_leaves_what_takes_long_to_the_thread(collector, config):
    config(EDITED_CONFIG)
    code = """
        import threading


        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name in ("tomllib", "hashlib", "json", "urllib.request", "socket"):
                    print(name, threading.current_thread() is threading.main_thread())


        sys.meta_path.insert(0, Finder())
        trix_telemetry.track_command_execution("build").join()
    """

    done = run_tool(code)

    assert "tomllib False\n" in done.stdout
    assert "True" not in done.stdout


# A delivery: a host is unharmed, whatever the network does


def drip(first, more, pause):
    """Return a function that sends `first`, and then `more` again and again."""

    def speak(connection):
        connection.recv(65536)
        connection.sendall(first)
        for _ in range(int(LONG / pause)):
            connection.sendall(more)
            time.sleep(pause)

    return speak


def reset(connection):
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


STATUS_LINE = b"HTTP/1.1 200 OK\r\n"
LENGTH = b"Content-Length: 10000000000\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@cases(
    ("scheme", "speak"),
    {
        "silence": ("http", silence),
        "a-handshake-that-never-ends": ("https", silence),
        "a-header-every-100-ms": ("http", drip(STATUS_LINE, b"X-A: b\r\n", 0.1)),
        "a-flood-of-100-continue": ("http", drip(b"", CONTINUE * 40_000, 0.05)),
    },
)
def test_whatever_holds_the_line_the_process_ends_at_its_deadline(config, scheme, speak):
    config(otlp_endpoint=hostile(speak).url.replace("http", scheme), timeout_ms=400)

    done = run_tool(READY, TRACK, timeout=LONG / 4)

    assert_silent(done)


@cases(
    "speak",
    {
        "noise": say(random.Random(1).randbytes(4096)),
        "a-reset": reset,
        "an-endless-header": drip(STATUS_LINE, b"x" * 65536, 0.001),
        "a-body-of-10-gb": drip(STATUS_LINE + LENGTH, b"x" * 65536, 0.001),
        "a-body-that-drips": drip(STATUS_LINE + LENGTH, b"x", 0.2),
    },
)
def test_what_fails_or_succeeds_at_once_costs_no_time(config, state, speak):
    config(otlp_endpoint=hostile(speak).url, timeout_ms=60_000)

    done = run_tool(TRACK, timeout=LONG / 2)

    assert_silent(done)
    assert names(state) == ["config.toml", "fingerprint"]


def test_a_collector_that_never_answers_holds_no_thread(config):
    config(otlp_endpoint=hostile(silence).url, timeout_ms=200)

    thread = trix_telemetry.track_command_execution("build")

    thread.join(LONG / 2)
    assert not thread.is_alive()


def answer_late(connection):
    connection.recv(65536)
    time.sleep(0.6)
    connection.sendall(STATUS_LINE + b"Content-Length: 2\r\n\r\n{}")
    connection.recv(65536)


LOOK_UP_NEVER_ENDS = f"""
import socket
import time


def wait(*arguments, **options):
    time.sleep({LONG})


socket.getaddrinfo = wait
"""


@cases(
    ("code", "speak"),
    {
        "a-late-answer": ("", answer_late),
        "a-look-up-that-never-ends": (LOOK_UP_NEVER_ENDS, silence),
    },
)
def test_a_wait_for_the_network_begins_a_back_off(config, state, code, speak):
    server = hostile(speak)
    config(otlp_endpoint=server.url, timeout_ms=800)

    done = run_tool(READY, code, TRACK)

    assert_silent(done)
    url, reason = (state / "backoff").read_text().splitlines()
    assert url == f"{server.url}/v1/metrics"
    assert re.fullmatch(r"a command waited [012]\.\d s for the network", reason)


@posix
def test_a_long_wait_that_ctrl_c_has_ended_begins_a_back_off(config, state):
    config(otlp_endpoint=hostile(silence).url, timeout_ms=1600)
    code = """
        import signal

        signal.signal(signal.SIGALRM, signal.default_int_handler)
        trix_telemetry.track_command_execution("build")
        signal.setitimer(signal.ITIMER_REAL, 1.3)
    """

    done = run_tool(READY, code)

    assert_silent(done)
    assert (state / "backoff").exists()


def test_a_command_that_outlasts_its_request_begins_no_back_off(config, state):
    config(otlp_endpoint=hostile(silence).url, timeout_ms=100)

    done = run_tool(TRACK, "import time\ntime.sleep(0.3)")

    assert_silent(done)
    assert "backoff" not in names(state)


def test_imports_that_take_long_begin_no_back_off(collector, config, state):
    config(timeout_ms=1000)
    code = """
        import time


        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name == "tomllib":
                    time.sleep(0.6)


        sys.meta_path.insert(0, Finder())
        trix_telemetry.track_command_execution("build")
    """

    done = run_tool(code)

    assert_silent(done)
    assert "backoff" not in names(state)


@pytest.mark.parametrize("status", [400, 500])
def test_an_answer_that_refuses_the_point_begins_no_back_off(collector, config, state, status):
    config()
    collector.answer = (status, {}, b"go away")

    track()

    assert len(collector.requests) == 1
    assert "backoff" not in names(state)


@pytest.mark.parametrize("status", [429, 503])
def test_an_answer_that_asks_for_it_begins_a_back_off(collector, config, state, status):
    config()
    collector.answer = (status, {}, b"")

    track()
    track()

    assert len(collector.requests) == 1
    assert (state / "backoff").read_text() == (
        f"{collector.url}/v1/metrics\nthe collector answered HTTP {status}\n"
    )


UNKNOWN_HOST = """
import socket


def fail(*arguments, **options):
    raise socket.gaierror(-2, "unknown")


socket.getaddrinfo = fail
"""


@cases("code", {"an-unknown-host": UNKNOWN_HOST, "a-refused-connection": ""})
def test_what_fails_at_once_begins_no_back_off(config, state, code):
    config(otlp_endpoint="http://127.0.0.1:1", timeout_ms=60_000)

    done = run_tool(code, TRACK, timeout=LONG / 2)

    assert_silent(done)
    assert "backoff" not in names(state)


# What a tool calls: signals during the call, a vendored copy, copies beside each other


@posix
def test_an_exception_of_a_signal_handler_during_a_call_reaches_the_host(collector, config):
    config()
    code = """
        import os
        import signal


        def stop(number, frame):
            raise TimeoutError


        def alarm(event, arguments):
            if event == "open" and str(arguments[0]).endswith("config.toml"):
                os.kill(os.getpid(), signal.SIGALRM)


        signal.signal(signal.SIGALRM, stop)
        sys.addaudithook(alarm)
        try:
            trix_telemetry.track_command_execution("build")
        except TimeoutError:
            print("caught", signal.pthread_sigmask(signal.SIG_BLOCK, []))
    """

    done = run_tool(code)

    assert (done.stdout, done.stderr) == ("caught set()\n", "")
    assert collector.commands == ["build"]


VENDORED = """
import json

from acme._vendor import usage

settings = {"service_name": "acme", "service_version": "3", "endpoint": sys.argv[1]}
usage.initialize_telemetry(**settings, **json.loads(sys.argv[2]))
usage.track_command_execution("build")
"""


@pytest.fixture
def acme(home):
    """A tool that copied the file, in a home in which Trix is on, with a collector of its own."""
    vendor = home / "lib" / "acme" / "_vendor"
    vendor.mkdir(parents=True)
    (vendor / "usage.py").write_text(SOURCE, encoding="utf-8")
    for package in (vendor, vendor.parent):
        (package / "__init__.py").touch()
    trix = home / ".tx3" / "trix"
    trix.mkdir(parents=True)
    (trix / "config.toml").write_text(f'{ON}otlp_endpoint = "http://127.0.0.1:9"\n')
    (trix / "fingerprint").write_text("0123456789abcdef")
    return Acme(home, Collector())


class Acme:
    def __init__(self, home, collector):
        self.library = home / "lib"
        self.directory = home / ".config" / "acme" / "telemetry"
        self.collector = collector

    def run(self, code="", settings=None, url=None, **options):
        """Run the tool, which counts build, with more code and more settings."""
        program = script(VENDORED, code, module="acme", path=self.library)
        url = self.collector.url if url is None else url
        return run([sys.executable, "-c", program, url, json.dumps(settings or {})], **options)


def test_a_tool_leaves_the_files_of_trix_alone_and_makes_its_own(acme, state):
    before = read_tree(state)

    done = acme.run()

    assert done.returncode == 0
    assert read_tree(state) == before
    assert names(acme.directory) == ["config.toml", "fingerprint"]


def test_a_tool_neither_sends_nor_writes_nor_says_a_word_of_trix(acme, home):
    done = acme.run("print(usage.main(['status']), usage.main(['--help']))")

    ((_, headers, body),) = acme.collector.requests
    assert headers.pop("User-Agent") == "trix-telemetry/4.0.0"
    shown = f"{done.stdout}{done.stderr}{headers}{body}{read_tree(acme.directory)}"
    assert "trix" not in shown.replace(str(home), "").lower()


def test_without_prog_the_texts_name_the_variables_and_the_file(acme):
    done = acme.run("usage.main(['status'])")

    assert "ACME_TELEMETRY=0 or DO_NOT_TRACK=1" in done.stderr
    assert str(acme.directory / "config.toml") in done.stderr
    assert "  Change       `enabled` in the config\n" in done.stdout
    assert "python -m" not in done.stdout + done.stderr


def test_docs_url_is_shown_in_the_notice_and_in_status(acme):
    done = acme.run("usage.main(['status'])", {"docs_url": "https://acme.example/usage"})

    assert done.stderr.endswith("  Read more: https://acme.example/usage\n")
    assert done.stdout.endswith("  Read more    https://acme.example/usage\n")


def test_prog_of_main_is_shown(acme):
    done = acme.run("usage.main([], prog='acme usage')")

    assert "  Change       acme usage enable, acme usage disable\n" in done.stdout


def test_metric_name_can_be_given(collector, home):
    initialize(collector.url, metric_name="runs")

    track()

    assert collector.points[0].metric["name"] == "runs"


@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_a_directory_can_be_text_or_a_path(collector, home, kind):
    initialize(collector.url, directory=kind(home / "own"))

    track()

    assert names(home / "own") == ["config.toml", "fingerprint"]


@cases(
    ("variable", "value"),
    {
        "off": ("MY_USAGE", "0"),
        "endpoint": ("MY_USAGE_ENDPOINT", ""),
        "debug": ("MY_USAGE_DEBUG", "1"),
    },
)
def test_environment_can_be_given(collector, home, monkeypatch, variable, value):
    initialize(collector.url, environment="MY_USAGE")
    monkeypatch.setenv(variable, value)

    track()

    assert names(home) == []


@pytest.mark.parametrize("kind", [list, tuple, set, dict.fromkeys])
def test_a_name_outside_of_commands_is_not_counted(collector, home, kind):
    initialize(collector.url, commands=kind(["test"]))

    track("build")
    track("test")

    assert collector.commands == ["test"]


def test_the_last_call_before_a_track_decides(collector, home):
    initialize(service_name="other")
    initialize(collector.url)

    track()

    assert names(home / ".config") == ["acme"]


def test_opt_in_makes_and_says_nothing(collector, home, capfd):
    initialize(collector.url, opt_in=True)

    track()

    assert capfd.readouterr() == ("", "")
    assert names(home) == []


def test_opt_in_is_on_after_enable(collector, command):
    initialize(collector.url, opt_in=True)
    before = command("status")

    command("enable")
    track()

    assert first_line(before).startswith("Telemetry of acme is off: it is opt-in, and ")
    assert collector.commands == ["build"]


@cases(
    ("of_whom", "is_sent"),
    {
        "the-tool": (None, True),
        "the-environment": ("environment", False),
        "the-config": ("config", False),
        "a-person-who-tracks": ("option", False),
    },
)
def test_headers_of_the_tool_go_to_its_own_endpoint_alone(
    collector, config, state, monkeypatch, of_whom, is_sent
):
    endpoint = "http://127.0.0.1:9" if of_whom else collector.url
    initialize(endpoint, headers={"Authorization": "secret", "Host": "x"}, directory=state)
    text = ON
    arguments = ["track", "build"]
    if of_whom == "environment":
        monkeypatch.setenv("ACME_TELEMETRY_ENDPOINT", collector.url)
    elif of_whom == "config":
        text += f'otlp_endpoint = "{collector.url}"\n'
    elif of_whom == "option":
        arguments += ["--endpoint", collector.url]
    config(f'{text}[telemetry.otlp_headers]\nX-Own = "own"\n')

    trix_telemetry.main(arguments)

    ((_, headers, _),) = collector.requests
    assert headers["X-Own"] == "own"
    assert headers["Host"] == collector.url.removeprefix("http://")
    assert ("Authorization" in headers) is is_sent


@cases(
    ("service_name", "slug"),
    {"words": ("My Tool/2.0", "my_tool_2_0"), "umlauts": ("\u00fcml\u00e4ut", "_ml_ut")},
)
def test_metric_directory_and_variable_follow_from_the_name(
    collector, home, monkeypatch, service_name, slug
):
    initialize(collector.url, service_name=service_name)

    track()
    monkeypatch.setenv(f"{slug.upper()}_TELEMETRY", "0")
    track()

    (point,) = collector.points
    assert point.metric["name"] == f"{slug}_command_invocation"
    assert names(home / ".config" / slug / "telemetry") == ["config.toml", "fingerprint"]


@cases(("base", "made"), {"absolute": ("{home}/xdg", "xdg"), "relative": ("xdg", ".config")})
def test_xdg_config_home_counts_where_it_is_absolute(collector, home, monkeypatch, base, made):
    monkeypatch.chdir(home)
    monkeypatch.setenv("XDG_CONFIG_HOME", base.format(home=home))
    initialize(collector.url)

    track()

    assert names(home) == [made]


def test_a_tool_that_names_no_directory_has_the_one_of_the_system(collector, home, monkeypatch):
    monkeypatch.setenv("APPDATA", str(home / "Roaming"))
    initialize(collector.url)

    track()

    base = "Roaming" if os.name == "nt" else ".config"
    assert names(home) == [base]


@pytest.fixture
def edited_copy(acme):
    """The copy of acme, with the values at its top edited."""
    values = {
        "service_name": "acme",
        "service_version": "3",
        "endpoint": acme.collector.url,
        "metric_name": "acme_runs",
        "directory": "~/.acme",
        "environment": "ACME_USAGE",
        "prog": "python -m acme._vendor.usage",
    }
    text = SOURCE
    for name, value in values.items():
        pattern = rf'(?m)^    {name}(: ".*")? = ".*"'
        text, count = re.subn(pattern, f'    {name} = "{value}"', text)
        assert count == 1
    path = acme.library / "acme" / "_vendor" / "usage.py"
    path.write_text(text, encoding="utf-8")
    return acme


def test_a_copy_with_its_values_edited_counts(edited_copy, home):
    code = """
        from acme._vendor import usage

        usage.track_command_execution("build")
    """

    done = run([sys.executable, "-c", script(code, module="acme", path=edited_copy.library)])

    (point,) = edited_copy.collector.points
    assert point.metric["name"] == "acme_runs"
    assert point.resource["service.name"] == "acme"
    assert names(home / ".acme") == ["config.toml", "fingerprint"]
    assert "python -m acme._vendor.usage disable" in done.stderr


def test_a_copy_with_its_values_edited_has_its_commands(edited_copy):
    env = {"PYTHONPATH": str(edited_copy.library)}

    done = run([sys.executable, "-m", "acme._vendor.usage", "status"], env=env)

    assert (done.returncode, done.stderr) == (0, "")
    assert first_line(done) == "Telemetry of acme is on"


def test_two_copies_in_one_process_do_not_know_of_each_other(acme, home):
    shutil.copytree(home / "lib" / "acme", home / "lib" / "other")
    other = Collector()
    code = """
        from other._vendor import usage

        usage.initialize_telemetry(service_name="other", service_version="3", endpoint=sys.argv[3])
        usage.track_command_execution("test")
    """
    program = script(VENDORED, code, module="acme", path=acme.library)

    run([sys.executable, "-c", program, acme.collector.url, "{}", other.url])

    (of_acme,) = acme.collector.points
    (of_other,) = other.points
    assert (of_acme.command, of_acme.resource["service.name"]) == ("build", "acme")
    assert (of_other.command, of_other.resource["service.name"]) == ("test", "other")
    assert acme.collector.users.isdisjoint(other.users)


def test_a_zipapp_counts(acme, home):
    archive = home / "acme.pyz"
    with zipfile.ZipFile(archive, "w") as file:
        for path in acme.library.rglob("*.py"):
            file.write(path, path.relative_to(acme.library))
        file.writestr("__main__.py", f"import sys\n{VENDORED}")

    done = run([sys.executable, archive, acme.collector.url, "{}"])

    assert (done.returncode, done.stdout) == (0, "")
    assert acme.collector.commands == ["build"]


# The command line: status


def test_status_shows_all(collector, state, command):
    path = state / "config.toml"

    done = command("status")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "Telemetry of trix-cli is on",
        f"  Endpoint     {collector.url}/v1/metrics (not encrypted)",
        "  Fingerprint  none",
        f"  Config       {path} (the first command creates it)",
        "  Change       python -m trix_telemetry enable, python -m trix_telemetry disable",
        "  Variables    DO_NOT_TRACK=1, TRIX_TELEMETRY=0, TRIX_TELEMETRY_DEBUG=1",
    ]


def test_no_command_is_status(collector, command):
    assert command().stdout == command("status").stdout


def test_status_makes_nothing(collector, home, command):
    command("status")

    assert names(home) == []
    assert collector.requests == []


def test_status_as_json(home, monkeypatch, command):
    monkeypatch.setenv(ENDPOINT, "https://collector.example.com")

    done = command("status", "--json")

    assert json.loads(done.stdout) == {
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


def test_status_as_json_of_what_is_off(collector, config, command):
    config("[telemetry]\nenabled = 1\n")

    done = command("status", "--json")

    facts = json.loads(done.stdout)
    assert done.returncode == 1
    assert facts["enabled"] is False
    assert facts["reason"] == "telemetry.enabled must be true or false"


def test_status_as_json_says_what_is_not_encrypted(collector, config, command):
    config(OFF)

    facts = json.loads(command("status", "--json").stdout)

    assert facts["encrypted"] is False


# The command line: enable, disable


EDITS = {
    "plain": ON,
    "dotted": "telemetry.enabled = true\n",
    "inline": "telemetry = { enabled = true }\n",
    "quoted": "['telemetry']\n\"enabled\" = true\n",
    "escaped": '["telemetry"]\n"\\u0065nabled" = true\n',
    "spaces-and-tabs": "[ telemetry ] # x\nenabled\t=\ttrue# yes\n",
    "also-within-a-text": '[telemetry]\nnote = """\nenabled = true\n"""\nenabled = true\n',
    "a-header-within-a-text": "s = '''\n[telemetry]\n'''\n[telemetry]\nenabled = true # so\n",
    "after-a-comment": "[telemetry]\n# enabled = true\nenabled = true\n",
    "between-tables": f"[other]\nenabled = true\n{ON}[third]\nenabled = true\n",
    "before-a-similar-key": f"{ON}not_enabled = true\n",
    "byte-order-mark": "\ufeff[telemetry]\nenabled = true\n",
    "dos-lines": "[telemetry]\r\n  enabled=true\r\ntimeout_ms = 5\r\n",
    "no-line-break-at-the-end": "[telemetry]\nenabled = true",
    "3000-tables": "".join(f"[t{n}]\nenabled = true\n" for n in range(3000)) + ON,
}


@cases("text", EDITS)
def test_disable_changes_the_one_value_and_enable_changes_it_back(config, command, text):
    path = config(text)

    command("disable")
    edited = path.read_bytes().decode()
    command("enable")

    assert len(edited) == len(text) + 1
    assert tomllib.loads(edited.lstrip("\ufeff"))["telemetry"]["enabled"] is False
    assert path.read_bytes().decode() == text


@cases(
    ("text", "after"),
    {
        "empty": ("", "\n[telemetry]\nenabled = false\n"),
        "no-line-break-at-the-end": ("a = 1", "a = 1\n\n[telemetry]\nenabled = false\n"),
        "dos-lines": ("# x\r\n", "# x\r\n\r\n[telemetry]\r\nenabled = false\r\n"),
        "a-header-alone": ("[telemetry]", "[telemetry]\nenabled = false\n"),
        "a-typo": (
            "[telemetry] # x\nenable = 1\n",
            "[telemetry] # x\nenabled = false\nenable = 1\n",
        ),
        "a-table-below": (
            "[telemetry.otlp_headers]\nA = 'b'\n",
            "[telemetry.otlp_headers]\nA = 'b'\n\n[telemetry]\nenabled = false\n",
        ),
    },
)
def test_disable_adds_the_key_where_it_is_missing(config, command, text, after):
    path = config(text)

    done = command("disable")

    assert done.returncode == 0
    assert path.read_bytes().decode() == after


def test_what_is_too_unusual_is_refused_with_what_to_write(config, command):
    path = config("telemetry = { timeout_ms = 5 }\n")

    done = command("disable")

    assert_error(done, ".* write enabled = false for telemetry by hand; nothing was changed")
    assert path.read_text() == "telemetry = { timeout_ms = 5 }\n"


def generate_document(dice):
    """Return a document that may have telemetry.enabled, in some spelling, or be no TOML."""
    keys = ["enabled", '"enabled"', "telemetry.enabled", '"\\u0065nabled"', "other"]
    values = ["true", "false", "1", '"true"', "nan", "[true, [false]]", "{ enabled = true }"]
    values += ['"a#b"', '"""\nenabled = true\n"""', "'''enabled = false'''", "1979-05-27 07:32:00"]
    others = ["[telemetry]", "  [telemetry]", "[ telemetry . deep ]", "[other]", "[[list]]"]
    others += ["# enabled = true"]
    lines = dice.choices(others, k=dice.randint(1, 4))
    for _ in range(2):
        lines.append(dice.choice(keys) + dice.choice(["=", " = "]) + dice.choice(values))
    dice.shuffle(lines)
    return dice.choice(["\n", "\r\n"]).join(lines) + dice.choice(["", "\n"])


def test_a_generated_document_is_edited_exactly_or_refused(config, command):
    dice = random.Random(4)

    for _ in range(300):
        text = generate_document(dice)
        path = config(text)
        done = command("disable")
        edited = path.read_bytes().decode()
        if edited == text:
            refused = "trix-cli: error: .*; nothing was changed\n"
            assert done.returncode == 0 or re.fullmatch(refused, done.stderr), text
            continue
        # Floats as text, for nan is not equal to itself.
        before = tomllib.loads(text, parse_float=str)
        table = before.get("telemetry", {})
        wanted = {**before, "telemetry": {**table, "enabled": False}}
        assert tomllib.loads(edited, parse_float=str) == wanted, text


@cases(("text", "says"), DAMAGED)
def test_disable_says_that_a_damaged_config_is_off_already(config, command, text, says):
    path = config(text)
    before = path.read_bytes()

    done = command("disable")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Telemetry is off already, but {path} needs mending: {says}")
    assert path.read_bytes() == before


def test_enable_refuses_a_damaged_config(config, command):
    path = config("not toml")

    done = command("enable")

    assert_error(done, f"{re.escape(str(path))}: {NOT_TOML}.*; nothing was changed")
    assert path.read_text() == "not toml"
    assert names(path.parent) == ["config.toml"]


def test_disable_writes_false_where_another_key_is_damaged(config, command):
    path = config(f"{ON}timeout_ms = 0\n")

    done = command("disable")

    assert (done.returncode, done.stderr) == (0, "")
    assert path.read_text() == f"{OFF}timeout_ms = 0\n"


@cases(
    ("text", "env", "says"),
    {
        "a-damaged-key": (f"{OFF}timeout_ms = 0\n", {}, BAD_TIMEOUT),
        "a-variable": (OFF, {"DO_NOT_TRACK": "1"}, "DO_NOT_TRACK is set"),
    },
)
def test_enable_says_what_keeps_it_off(config, command, monkeypatch, text, env, says):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    path = config(text)

    done = command("enable")

    assert done.returncode == 0
    assert done.stdout == f"Telemetry enabled (saved in {path})\nIt stays off: {says}\n"
    assert path.read_text() == text.replace("false", "true")


@cases(
    ("name", "word", "value"),
    {
        "enable": ("enable", "enabled", "true"),
        "on": ("on", "enabled", "true"),
        "disable": ("disable", "disabled", "false"),
        "off": ("off", "disabled", "false"),
    },
)
def test_a_config_is_made_where_there_is_none(collector, state, command, name, word, value):
    done = command(name)

    path = state / "config.toml"
    assert done.stdout == f"Telemetry {word} (saved in {path})\n"
    assert path.read_text() == NEW_CONFIG.replace("true", value)


def test_disable_keeps_a_config_that_has_just_been_made(state):
    code = """
        write = trix_telemetry.write_file


        def write_late(path, *rest):
            with open(path, "w") as file:
                file.write("# mine\\n[telemetry]\\nenabled = true\\n")
            trix_telemetry.write_file = write
            write(path, *rest)


        trix_telemetry.write_file = write_late
        sys.exit(trix_telemetry.main(["disable"]))
    """

    done = run_tool(code)

    assert (done.returncode, done.stderr) == (0, "")
    assert (state / "config.toml").read_text() == "# mine\n[telemetry]\nenabled = false\n"


def test_after_enable_there_is_no_notice(collector, command, capfd):
    command("enable")

    track()

    assert capfd.readouterr() == ("", "")
    assert collector.commands == ["build"]


def test_enable_ends_a_back_off(collector, config, state, command):
    config()
    write_backoff(collector, state)

    command("enable")

    assert names(state) == ["config.toml"]


@posix
def test_an_edit_keeps_the_mode(config, command):
    path = config(ON)
    path.chmod(0o644)

    command("disable")

    assert path.read_text() == OFF
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@posix
def test_an_edit_follows_a_link(home, state, command):
    target = home / "dotfiles.toml"
    target.write_text(ON)
    state.mkdir(parents=True)
    (state / "config.toml").symlink_to(target)

    command("disable")

    assert (state / "config.toml").is_symlink()
    assert target.read_text() == OFF


@posix
def test_a_link_that_leads_nowhere_is_not_edited(home, state, command):
    state.mkdir(parents=True)
    link = state / "config.toml"
    link.symlink_to(home / "nowhere")

    done = command("disable")

    assert_error(done, f".*{link} is a link that leads nowhere.*")
    assert not (home / "nowhere").exists()


READ_OFTEN = """
import os

while not os.path.exists("stop"):
    trix_telemetry.track_command_execution("build")
    try:
        with open("config.toml") as file:
            text = file.read()
    except OSError:
        continue
    assert text in ("[telemetry]\\nenabled = true\\n", "[telemetry]\\nenabled = false\\n")
"""


def test_edits_beside_readers_leave_a_whole_file(collector, config, state, command):
    config(ON)
    reader = start_tool(READ_OFTEN, cwd=state)

    codes = [command(name).returncode for name in ["disable", "enable"] * 10]
    (state / "stop").touch()
    out, err = reader.communicate(timeout=LONG)

    assert codes == [0] * 20
    assert (reader.returncode, out, err) == (0, "", "")


# The command line: preview, track, reset, selftest


def test_preview_shows_what_is_sent(collector, config, state, command):
    config(f'{ON}[telemetry.otlp_headers]\nX-Key = "secret"\n')
    (state / "fingerprint").write_text(FINGERPRINT)

    text = command("preview", "test").stdout.removeprefix("trix-cli: telemetry would send\n")
    head, _, body = text.partition("\n\n")
    track("test")

    ((path, headers, sent),) = collector.requests
    headers["X-Key"] = "(hidden)"
    lines = [f"{name}: {value}" for name, value in headers.items()]
    assert head.splitlines() == [f"POST {path} HTTP/1.1", *lines]
    times = r'(?<=UnixNano":")\d{19}'
    assert re.sub(times, "", body) == re.sub(times, "", sent.decode()) + "\n"


def test_preview_sends_and_makes_nothing(collector, home, command):
    done = command("preview")

    assert (done.returncode, done.stderr) == (0, "")
    assert collector.requests == []
    assert names(home) == []


def test_preview_takes_the_first_of_commands(home, command):
    initialize(commands=["test", "a-b", "0"])

    done = command("preview")

    assert '"key":"command_name","value":{"stringValue":"a-b"}' in done.stdout


@cases(
    ("text", "reason"),
    {
        "off": (OFF, r"config.toml says enabled = false"),
        "back-off": (ON, r"back-off for \d+ s more: slow"),
    },
)
def test_preview_tells_why_nothing_would_be_sent(collector, config, state, command, text, reason):
    config(text)
    write_backoff(collector, state)

    done = command("preview")

    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(f"trix-cli: telemetry is off: {reason}\n", done.stdout)


def test_track_sends(collector, config, command):
    config()

    done = command("track", "build")

    assert done.returncode == 0
    url = re.escape(f"{collector.url}/v1/metrics")
    assert re.fullmatch(rf"Sent to {url} in \d+ ms: HTTP 200\n", done.stdout)
    assert collector.commands == ["build"]


def test_track_sends_to_another_endpoint(collector, config, command):
    config()

    command("track", "build", "--endpoint", f"{collector.url}/x")

    assert [path for path, _, _ in collector.requests] == ["/x/v1/metrics"]


def test_track_tells_why_nothing_is_sent(collector, config, command):
    config(OFF)

    done = command("track", "build")

    assert done.returncode == 0
    assert done.stdout == "Not sent. Telemetry is off: config.toml says enabled = false\n"
    assert collector.requests == []


def test_track_in_a_first_run_shows_the_notice(collector, state, command):
    done = command("track", "build")

    assert done.stderr.startswith("trix-cli sends anonymous usage telemetry")
    assert names(state) == ["config.toml", "fingerprint"]


def test_track_sends_during_a_back_off_and_ends_it(collector, config, state, command):
    config()
    write_backoff(collector, state)

    done = command("track", "build")

    assert done.returncode == 0
    assert collector.commands == ["build"]
    assert names(state) == ["config.toml", "fingerprint"]


@cases(
    ("status", "body"),
    {
        "empty": (200, b""),
        "no-content": (204, b""),
        "no-json": (202, b"\xff{"),
        "null": (200, b"null"),
        "4000-brackets": (200, b"[" * 4000),
        "partial-success-null": (200, b'{"partialSuccess":null}'),
        "rejected-null": (200, b'{"partialSuccess":{"rejectedDataPoints":null}}'),
        "rejected-a-word": (200, b'{"partialSuccess":{"rejectedDataPoints":"many"}}'),
        "rejected-infinite": (200, b'{"partialSuccess":{"rejectedDataPoints":Infinity}}'),
    },
)
def test_track_takes_any_success_for_one(collector, config, command, status, body):
    config()
    collector.answer = (status, {}, body)

    done = command("track", "build")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f" ms: HTTP {status}\n")


def test_track_shows_a_warning_of_the_collector(collector, config, command):
    config()
    collector.answer = (200, {}, b'{"partialSuccess":{"errorMessage":"a warning"}}')

    done = command("track", "build")

    assert done.returncode == 0
    assert done.stdout.endswith(" ms: HTTP 200: a warning\n")


PAGE = {"Content-Type": "text/html; charset=utf-8"}
ELSEWHERE = {"Location": "https://other.example/"}


@cases(
    ("answer", "says"),
    {
        "rejected": (
            (200, {}, b'{"partialSuccess":{"rejectedDataPoints":"1","errorMessage":"too\\nold"}}'),
            r"HTTP 200: 1 data point rejected: too\?old",
        ),
        "rejected-without-a-reason": (
            (200, {}, b'{"partialSuccess":{"rejectedDataPoints":1}}'),
            "HTTP 200: 1 data point rejected: no reason given",
        ),
        "not-found": ((404, {}, b"no path\x1b[2J"), r"HTTP 404: no path\?\[2J"),
        "a-long-text": ((500, {}, b"x" * 9000), "HTTP 500: x{200}"),
        "a-redirect": (
            (308, ELSEWHERE, b""),
            "HTTP 308: it redirects to https://other.example/, which is not followed",
        ),
        "a-web-page": (
            (200, PAGE, b"<html>Welcome</html>"),
            r"HTTP 200, but the answer is a web page: is this the URL of a collector\?",
        ),
    },
)
def test_track_tells_what_the_collector_refused(collector, config, command, answer, says):
    config()
    collector.answer = answer

    done = command("track", "build")

    assert_error(done, rf"{collector.url}/v1/metrics after \d+ ms: {says}")


def test_track_tells_a_refused_connection(config, command):
    config()

    done = command("track", "build", "--endpoint", "http://127.0.0.1:1")

    assert_error(done, r"http://127.0.0.1:1/v1/metrics after \d+ ms: .*refused.*")


@cases("code", {"silence": "", "a-look-up-that-never-ends": LOOK_UP_NEVER_ENDS})
def test_track_tells_that_time_is_up_and_begins_no_back_off(config, state, code):
    server = hostile(silence)
    config(otlp_endpoint=server.url, timeout_ms=300)

    done = run_tool(code, "sys.exit(trix_telemetry.main(['track', 'build']))", timeout=LONG / 2)

    assert_error(done, rf"{server.url}/v1/metrics after \d+ ms: timed out")
    assert "backoff" not in names(state)


# Where the tests run in the background, a shell has turned Ctrl-C off.
TRACK_WITH_CTRL_C = """
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(trix_telemetry.main(["track", "build"]))
"""


@posix
def test_ctrl_c_ends_a_track(config):
    server = hostile(silence)
    config(otlp_endpoint=server.url, timeout_ms=60_000)
    process = start_tool(TRACK_WITH_CTRL_C)
    while server.accepted == 0 and process.poll() is None:
        time.sleep(0.01)

    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=LONG / 2)

    assert (process.returncode, out, err) == (130, "", "")


@cases(
    ("arguments", "says"),
    {
        "a-path": (["../x"], "a command name is a letter and .*"),
        "outside-of-commands": (["other"], "other is not among the tool's commands"),
        "to-ftp": (["build", "--endpoint", "ftp://me:secret@h"], "--endpoint must be an http .*"),
        "to-nowhere": (["build", "--endpoint", ""], "--endpoint must be an http .*"),
    },
)
def test_track_refuses_what_cannot_be_counted(home, command, arguments, says):
    initialize(commands=["build"])

    done = command("track", *arguments)

    assert_error(done, says, "acme")
    assert "secret" not in done.stderr


def test_reset_deletes_the_fingerprint(collector, state, command):
    track()

    done = command("reset")

    assert done.returncode == 0
    assert "Fingerprint deleted; the next send makes a new one.\n" in done.stdout
    assert names(state) == ["config.toml"]


def test_after_reset_the_user_is_a_new_one(collector, command):
    track()
    command("reset")

    track()

    assert len(collector.users) == 2


def test_reset_where_there_is_no_fingerprint(home, command):
    done = command("reset")

    assert (done.returncode, done.stdout) == (0, "No fingerprint stored.\n")
    assert names(home) == []


AGAINST = {
    "CI": "true",
    "DO_NOT_TRACK": "1",
    "TRIX_TELEMETRY": "0",
    "TRIX_TELEMETRY_ENDPOINT": "",
    "http_proxy": "http://127.0.0.1:1",
}


def assert_selftest_passed(done):
    """The notice on standard error; the body and the answer on standard output."""
    assert done.returncode == 0, done.stderr
    assert "sends anonymous usage telemetry: the name of each command,\n" in done.stderr
    title, body, answer = done.stdout.strip().split("\n", 2)
    assert title == "The collector received:"
    assert Point(body).start < Point(body).end
    assert re.fullmatch(r"\nSent to http://127.0.0.1:\d+/v1/metrics in \d+ ms: HTTP 200", answer)


def test_selftest_passes_where_everything_speaks_against_it(home):
    home.chmod(0o555)

    done = run_command("selftest", env=AGAINST, cwd=home)

    home.chmod(0o755)
    assert_selftest_passed(done)
    assert names(home) == []


def test_selftest_passes_with_any_settings(acme):
    settings = {
        "prog": "acme telemetry",
        "commands": ["x"],
        "opt_in": True,
        "docs_url": "http://d",
        "headers": {"A": "secret"},
    }

    done = acme.run("sys.exit(usage.main(['selftest']))", settings)

    assert_selftest_passed(done)
    assert "secret" not in done.stdout
    assert "trix" not in done.stdout


@cases("failure", {"none": False, "no-standard-error": True})
def test_selftest_leaves_the_process_as_it_was(config, monkeypatch, collector, failure):
    config()
    for name, value in AGAINST.items():
        monkeypatch.setenv(name, value)
    if failure:
        monkeypatch.setattr(sys, "stderr", None)
    before = (dict(os.environ), threading.enumerate())

    code = trix_telemetry.main(["selftest"])

    assert code == int(failure)
    assert (dict(os.environ), threading.enumerate()) == before
    assert track() is None


def test_selftest_fails_where_something_is_broken(home):
    broken = SOURCE.replace('"asInt": "1"', '"asInt": 1 / 0').replace("_MS = 2000", "_MS = 200")
    (home / "broken.py").write_text(broken, encoding="utf-8")

    done = run([sys.executable, home / "broken.py", "selftest"])

    assert (done.returncode, done.stdout) == (1, "")
    assert re.search(r"\ntrix-cli: error: http.+: ZeroDivisionError\n$", done.stderr)


# The command line: errors, standard streams


@cases("arguments", {"an-unknown-command": ["nonsense"], "a-missing-argument": ["track"]})
def test_a_wrong_usage_is_told_by_argparse(command, arguments):
    done = command(*arguments)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: python -m trix_telemetry ")


@pytest.mark.parametrize("name", ["status", "preview", "disable", "reset"])
def test_no_command_is_ever_counted_itself(collector, config, command, name):
    config()

    command(name)

    assert collector.requests == []


@posix
@cases(
    "code",
    {
        "status": "sys.exit(trix_telemetry.main(['status']))",
        "help": "sys.exit(trix_telemetry.main(['--help']))",
        "after-output-of-the-tool": "print('of the tool')\nsys.exit(trix_telemetry.main([]))",
    },
)
def test_a_reader_that_is_gone_is_no_traceback(config, code):
    config()
    read, gone = os.pipe()
    os.close(read)

    done = run_tool(code, stdout=gone)

    os.close(gone)
    assert done.stderr == ""


@posix
def test_a_full_disk_below_stdout_is_told_in_one_line(collector):
    with open("/dev/full", "w") as full:
        done = run_command("status", stdout=full)

    assert done.returncode == 1
    assert re.fullmatch("trix-cli: error: .*No space left on device\n", done.stderr)


def test_what_nobody_foresaw_is_told_in_one_line(capsys, monkeypatch):
    class Stream:
        def write(self, text):
            raise ZeroDivisionError("odd")

    monkeypatch.setattr(sys, "stdout", Stream())

    code = trix_telemetry.main(["status"])

    assert code == 1
    assert capsys.readouterr().err == "trix-cli: error: ZeroDivisionError\n"


def test_a_stderr_of_a_hosts_own_class_is_no_traceback(collector):
    code = """
        import io

        sys.stderr = io.BytesIO()
        sys.exit(trix_telemetry.main(["track", "../x"]))
    """

    done = run_tool(code)

    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def test_a_stdout_that_the_host_closed_is_no_traceback(collector):
    done = run_tool("sys.stdout.close()\nsys.exit(trix_telemetry.main(['status']))")

    assert done.returncode == 1
    assert "Traceback" not in done.stderr


@posix
@cases(
    ("redirect", "arguments"),
    {
        "input": ("<&-", ["status"]),
        "output": (">&-", ["disable"]),
        "error": ("2>&-", ["track", "build"]),
        "all": ("<&- >&- 2>&-", ["--help"]),
    },
)
def test_closed_streams_are_no_traceback(config, redirect, arguments):
    config()

    done = run_with_closed(redirect, sys.executable, MODULE, *arguments)

    assert (done.returncode, done.stderr) == (0, "")


def test_what_the_encoding_of_stdout_lacks_is_escaped(home):
    code = """
        trix_telemetry.initialize_telemetry(
            service_name="\\u0416", service_version="1", endpoint="http://127.0.0.1:9"
        )
        trix_telemetry.main(["status"])
        print(sys.stdout.errors)
    """

    done = run_tool(code, flags=["-X", "utf8=0"], env={"PYTHONIOENCODING": "ascii"})

    assert first_line(done) == "Telemetry of \\u0416 is on"
    assert done.stdout.splitlines()[-1] == "strict"


# README.md

README = (HERE / "README.md").read_text(encoding="utf-8")


def blocks(language):
    """Return the blocks of the README in this language."""
    return re.findall(rf"(?m)^```{language}\n(.*?)^```", README, re.S)


USAGE, ARGPARSE, COUNT, CLICK, TYPER, CONFTEST = blocks("python")
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
    usage = USAGE.replace("https://otlp.example.com", collector.url)
    (home / "usage.py").write_text(f"{usage}\n\n{COUNT}")

    def run_program(program, *arguments, **options):
        for library in ("click", "typer"):
            if f"import {library}" in program:
                pytest.importorskip(library)
        (home / "acme.py").write_text(program)
        return run([sys.executable, home / "acme.py", *arguments], **options)

    return run_program


def test_the_readme_begins_with_the_two_commands_that_ci_runs():
    lines = blocks("sh")[0].splitlines()

    assert len(lines) == 2
    assert lines[0] == "python3 trix_telemetry.py selftest"
    assert lines[1].startswith("python3 -m venv .venv && ")
    assert lines[1].endswith(" && .venv/bin/python -m pytest")


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(#([^)]+)\)", README))))
def test_each_link_of_the_readme_leads_to_a_heading(link):
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
def test_a_program_of_the_readme_counts_nothing_that_does_not_run(
    readme, collector, program, arguments
):
    readme(program, *arguments)

    assert collector.requests == []


@programs
def test_a_program_of_the_readme_counts_a_command_and_shows_the_notice(readme, collector, program):
    notice = blocks("text")[0].replace("https://otlp.example.com", collector.url)

    done = readme(program, "build")

    assert (done.returncode, done.stdout, done.stderr) == (0, "", notice)
    assert collector.commands == ["build"]


@groups
def test_a_program_of_the_readme_counts_a_command_of_a_nested_group(readme, collector, program):
    done = readme(program, "remote", "add")

    assert (done.returncode, done.stdout) == (0, "")
    assert collector.commands == ["remote-add"]


@packages
@cases(
    ("arguments", "name"),
    {
        "a-group-that-runs-alone": (["alone"], "alone"),
        "below-it": (["alone", "late"], "alone-late"),
    },
)
def test_a_program_of_the_readme_counts_what_is_added_later(readme, collector, arguments, name):
    added = """
@click.group(invoke_without_command=True)
def alone(): ...


@click.command()
def late(): ...


alone.add_command(late)
acme.add_command(alone)
count_commands(acme)
"""

    done = readme(CLICK.replace("count_commands(acme)\n", added), *arguments)

    assert (done.returncode, done.stdout) == (0, "")
    assert collector.commands == [name]


@programs
def test_a_program_of_the_readme_shows_the_status(readme, collector, home, program):
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


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--help"], id="help"),
        pytest.param(["status", "--json"], id="status"),
        pytest.param(["preview"], id="preview"),
        pytest.param(["disable"], id="disable"),
    ],
)
def test_a_program_of_the_readme_says_nothing_of_trix(readme, home, arguments):
    done = readme(ARGPARSE, "telemetry", *arguments)

    assert (done.returncode, done.stderr) == (0, "")
    said = done.stdout.replace("User-Agent: trix-telemetry/4.0.0", "").replace(str(home), "")
    assert "trix" not in said.lower()
    assert not (home / ".tx3").exists()


def test_a_program_of_the_readme_whose_telemetry_is_disabled_is_silent(readme, collector):
    readme(ARGPARSE, "telemetry", "disable")

    done = readme(ARGPARSE, "build")

    assert_silent(done)
    assert collector.requests == []


def test_the_readme_names_the_keys_of_the_status():
    done = run_command("status", "--json")

    for key in json.loads(done.stdout):
        assert f"`{key}`" in README


FINGERPRINT_OF_README = "a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f90"


def test_the_readme_shows_the_request_to_the_byte(readme, home):
    head, _, lines = blocks("http")[0].partition("\n\n")
    body = "".join(line.strip() for line in lines.splitlines())
    directory = home / ".config" / "acme" / "telemetry"
    directory.mkdir(parents=True)
    (directory / "fingerprint").write_text(FINGERPRINT_OF_README)
    env = {"ACME_TELEMETRY_ENDPOINT": "https://otlp.example.com"}

    done = readme(ARGPARSE, "telemetry", "preview", env=env)

    shown_head, _, shown_body = done.stdout.partition("\n\n")
    assert shown_head == f"acme: telemetry would send\n{head}"
    assert f"Content-Length: {len(body)}" in head
    time_digits = r'(?<=Nano":")\d{19}'
    assert re.sub(time_digits, "", shown_body) == re.sub(time_digits, "", body) + "\n"


def test_the_config_of_the_readme_is_valid(home):
    directory = home / ".config" / "acme" / "telemetry"
    directory.mkdir(parents=True)
    (directory / "config.toml").write_text(blocks("toml")[0])

    settings = "service_name='acme', service_version='1', endpoint='https://otlp.example.com'"
    done = run_tool(f"""
        trix_telemetry.initialize_telemetry({settings})
        trix_telemetry.main(["status"])
    """)

    first, endpoint, *_ = done.stdout.splitlines()
    assert first == "Telemetry of acme is on"
    assert endpoint == "  Endpoint     https://collector.example.com/v1/metrics"


def test_the_conftest_of_the_readme_keeps_a_test_run_silent(readme, collector, home):
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
    code = """
        settings = {"service_name": "acme", "service_version": "1", "endpoint": sys.argv[1]}
        trix_telemetry.initialize_telemetry(**settings)
        for command in ("build", "test", "build", "test", "build"):
            trix_telemetry.track_command_execution(command).join()
    """
    for user in ("one", "two"):
        run_tool(code, arguments=[collector.url], env={"HOME": str(home / user)})
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
    assert rows == '"build",6,2\n"test",4,2\n'


@packages
def test_the_wheel_has_the_module(home):
    pytest.importorskip("setuptools.command.bdist_wheel")
    shutil.copy(MODULE, home)
    shutil.copy(HERE / "setup.cfg", home)
    (line,) = re.findall("(?m)^python -c .* bdist_wheel$", README)

    run([sys.executable, *shlex.split(line)[1:]], cwd=home)
    (wheel,) = (home / "dist").glob("*.whl")
    run([sys.executable, "-m", "pip", "install", "--no-index", "--target", home / "lib", wheel])
    done = run([sys.executable, "-m", "trix_telemetry", "--version"], cwd=home / "lib")

    assert done.stdout == "telemetry 4.0.0\n"


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
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdin=null, stdout=null, stderr=null
    )
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
        "off": (script(TRACK), http, off, "bare interpreter"),
        "floor": (BENCH_FLOOR, http, off, "floor"),
        "on": (script(TRACK), http, NEW_CONFIG, "floor"),
        "on, edited config": (script(TRACK), http, edited, "floor"),
        "on, first run": (script(TRACK), http, "", "floor"),
        "floor, TLS": (BENCH_FLOOR, tls, off, "floor, TLS"),
        "on, TLS": (script(TRACK), tls, NEW_CONFIG, "floor, TLS"),
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
