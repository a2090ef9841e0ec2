"""Every promise of trix_telemetry, in the order of its sections, met by real files, processes and
sockets in a temporary home. `-m bench -s` measures."""

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
EDITED_CONFIG = "# edited\n" + NEW_CONFIG
ON = "[telemetry]\nenabled = true\n"
OFF = "[telemetry]\nenabled = false\n"
NOBODY_ID = 65534

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX has it, Windows has not")
root = pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="it is about root")
packages = pytest.mark.packages


def cases(arguments, table):
    """Run a test for each case of a table: its name, and its value or its tuple of values."""
    parameters = []
    for name, values in table.items():
        values = values if isinstance(values, tuple) else (values,)
        parameters.append(pytest.param(*values, id=name))
    return pytest.mark.parametrize(arguments, parameters)


# Helpers: a collector, a home, a tool


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
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args):
                pass

        self.server = serve(http.server.ThreadingHTTPServer, Handler, tls)
        self.port = self.server.server_address[1]
        scheme = "https" if tls else "http"
        self.url = f"{scheme}://127.0.0.1:{self.port}"

    @property
    def points(self):
        return [Point(body) for _, _, body in self.requests]

    @property
    def commands(self):
        return [point.command for point in self.points]

    @property
    def users(self):
        return {point.resource["user.fingerprint"] for point in self.points}

    @property
    def paths(self):
        return [line.split()[1] for line, _, _ in self.requests]

    def close(self):
        self.server.shutdown()
        self.server.server_close()


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
            if tls:
                connection = tls.wrap_socket(connection, server_side=True)
            return connection, address

        def handle_error(self, request, address):
            pass

    server = Server(("127.0.0.1", 0), handler)
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.005,), daemon=True).start()
    return server


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home, an environment and a session of its own for each test."""
    own = ("TRIX_", "ACME_", "SSL_CERT_", "OTEL_", "XDG_", "PYTHOND", "PYTHONU", "PYTHONW")
    for name in list(os.environ):
        if name.upper().endswith("_PROXY") or name.startswith((*own, "CI", "DO_NOT_TRACK")):
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
def new_collector():
    """Starts collectors."""
    collectors = []

    def start():
        collectors.append(Collector())
        return collectors[-1]

    yield start
    for collector in collectors:
        collector.close()


@pytest.fixture
def collector(new_collector, monkeypatch):
    """The collector that the environment names as the endpoint of Trix."""
    collector = new_collector()
    monkeypatch.setenv(ENDPOINT, collector.url)
    return collector


@pytest.fixture
def hostile():
    """Starts servers that speak with each connection by a function."""
    servers = []

    def start(speak):
        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                speak(self.request)

        servers.append(serve(socketserver.ThreadingTCPServer, Handler))
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
            lines = [f"{key} = {json.dumps(value)}\n" for key, value in settings.items()]
            text = "".join([ON, *lines])
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


TRACK = """
trix_telemetry.track_command_execution("build")
"""


def script(code=TRACK, module="trix_telemetry", path=HERE):
    """Return a program that has imported sys and the module."""
    return (
        f"import sys\nsys.path.insert(0, {str(path)!r})\nimport {module}\n{textwrap.dedent(code)}"
    )


def run(command, **options):
    """Run a process to its end. Of `env`, None removes a variable."""
    env = {**os.environ, **options.pop("env", {})}
    env = {name: value for name, value in env.items() if value is not None}
    options = {"timeout": LONG, "text": True, "stdin": subprocess.DEVNULL, **options}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run([str(part) for part in command], env=env, check=False, **options)


def start_tool(code=TRACK, **options):
    """Start a tool, and do not wait for its end."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen([sys.executable, "-c", script(code)], **options)


def run_tool(code=TRACK, *flags, arguments=(), **options):
    """Run a tool: a process that has imported the module and ends right after its code."""
    return run([sys.executable, *flags, "-c", script(code), *arguments], **options)


def run_command(*arguments, **options):
    """Run the command line as a person would."""
    return run([sys.executable, MODULE, *arguments], **options)


def assert_silent(done):
    """A tool ended as it would have without telemetry."""
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def assert_error(done, pattern):
    """A command failed, and said why in one line."""
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(f"trix-cli: error: {pattern}\n", done.stderr), done.stderr


def first_line(done):
    return done.stdout.splitlines()[0]


def names(path):
    return sorted(each.name for each in path.iterdir())


# Loading the file


IMPORT_AND_TRACK = """
import os
import sys
import time

before = set(sys.modules)
sys.path.insert(0, sys.argv[1])
import trix_telemetry

assert trix_telemetry.track_command_execution("build") is None
print(sorted(set(sys.modules) - before))
"""


def test_where_telemetry_is_off_no_other_module_is_imported(config, collector):
    config(OFF)

    done = run([sys.executable, "-I", "-S", "-c", IMPORT_AND_TRACK, HERE])

    assert (done.stdout, done.stderr) == ("['trix_telemetry']\n", "")
    assert collector.requests == []


LOADERS = {
    "exec-with-nothing": """
        space = {}
        exec(source, space)
        module = types.SimpleNamespace(**space)
    """,
    "a-new-module": """
        module = types.ModuleType("usage")
        exec(source, module.__dict__)
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
        import usage as module
    """,
}


def run_loaded(load, code):
    """Run code with the module loaded from memory."""
    program = f"""
import importlib.machinery
import sys
import types

source = open(sys.argv[1]).read()
{textwrap.dedent(load)}
{code}
"""
    return run([sys.executable, "-c", program, MODULE])


@cases("load", LOADERS)
def test_a_copy_in_memory_counts(collector, load):
    done = run_loaded(load, "module.track_command_execution('build')")

    assert (done.returncode, done.stdout) == (0, "")
    assert collector.commands == ["build"]


@cases("load", LOADERS)
@pytest.mark.parametrize("command", ["status", "preview", "disable"])
def test_a_copy_in_memory_has_its_commands(collector, load, command):
    done = run_loaded(load, f"sys.exit(module.main([{command!r}]))")

    assert (done.returncode, done.stderr) == (0, "")


# Settings: a tool is itself


VENDORED = """
import json

from acme._vendor import usage

settings = {"service_name": "acme", "service_version": "3", "endpoint": sys.argv[1]}
usage.initialize_telemetry(**settings, **json.loads(sys.argv[2]))
usage.track_command_execution("build")
"""


@pytest.fixture
def acme(home, new_collector):
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
    return Acme(home, new_collector())


class Acme:
    def __init__(self, home, collector):
        self.library = home / "lib"
        self.directory = home / ".config" / "acme" / "telemetry"
        self.collector = collector

    def run(self, code="", settings=None, url=None, **options):
        """Run the tool, which counts build, with more code and more settings."""
        program = script(VENDORED + textwrap.dedent(code), "acme", self.library)
        url = self.collector.url if url is None else url
        return run([sys.executable, "-c", program, url, json.dumps(settings or {})], **options)


def read_tree(directory):
    """Return each path below directory with its owner, mode and content."""
    tree = {}
    for path in (directory, *directory.rglob("*")):
        found = path.lstat()
        data = path.read_bytes() if path.is_file() else b""
        tree[str(path)] = (found.st_uid, found.st_mode, data)
    return tree


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


def test_the_version_is_that_of_the_telemetry(acme):
    done = acme.run("usage.main(['--version'])")

    assert done.stdout == "telemetry 4.0.0\n"


def test_metric_name_and_directory_can_be_given(acme, home):
    acme.run(settings={"metric_name": "runs", "directory": str(home / "own")})

    assert acme.collector.points[0].metric["name"] == "runs"
    assert names(home / "own") == ["config.toml", "fingerprint"]


def test_a_directory_can_be_a_path(collector, home):
    directory = home / "own"
    trix_telemetry.initialize_telemetry(
        service_name="acme", service_version="1", endpoint=collector.url, directory=directory
    )

    track()

    assert names(directory) == ["config.toml", "fingerprint"]


@cases(
    "variables",
    {
        "off": {"MY_USAGE": "0"},
        "endpoint": {"MY_USAGE_ENDPOINT": ""},
        "debug": {"MY_USAGE_DEBUG": "1"},
    },
)
def test_environment_can_be_given(acme, variables):
    acme.run(settings={"environment": "MY_USAGE"}, env=variables)

    assert acme.collector.requests == []


def test_a_name_outside_of_commands_is_not_counted(acme):
    code = "usage.track_command_execution('test')"

    acme.run(code, {"commands": ["test"]})

    assert acme.collector.commands == ["test"]


def test_track_names_a_command_outside_of_commands(acme):
    done = acme.run("sys.exit(usage.main(['track', 'other']))", {"commands": ["test"]})

    assert done.returncode == 1
    assert done.stderr == "acme: error: other is not among the tool's commands\n"


@cases(
    "commands",
    {
        "not-the-first": ["a name", "build"],
        "not-the-alphabetically-first": ["db:migrate", "serve"],
        "not-text": ["a", None],
    },
)
def test_status_takes_a_name_of_commands_that_can_be_counted(acme, commands):
    done = acme.run("usage.main(['status'])", {"commands": commands})

    assert first_line(done) == "Telemetry of acme is on"


def test_status_as_json_names_a_tool_whose_name_is_no_text(home, capsys):
    trix_telemetry.initialize_telemetry(service_name=b"x", service_version="1", endpoint="")

    code = trix_telemetry.main(["status", "--json"])

    facts = json.loads(capsys.readouterr().out)
    assert (code, facts["tool"]) == (1, "b'x'")
    assert facts["reason"] == "service_name of the tool must be one line of text"


@pytest.mark.parametrize("name", ["enable", "disable", "reset"])
def test_a_person_decides_whatever_else_the_vendor_got_wrong(home, capsys, name):
    trix_telemetry.initialize_telemetry(
        service_name="acme",
        service_version=None,
        endpoint=5,
        commands="build",
        directory=home / "own",
    )

    code = trix_telemetry.main([name])

    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert out.startswith(("Telemetry enabled", "Telemetry disabled", "No fingerprint"))


def test_opt_in_makes_and_says_nothing(acme):
    done = acme.run(settings={"opt_in": True})

    assert_silent(done)
    assert not acme.directory.exists()
    assert acme.collector.requests == []


def test_opt_in_is_on_after_enable(acme):
    code = """
        usage.main(["status"])
        usage.main(["enable"])
        usage.track_command_execution("test")
    """

    done = acme.run(code, {"opt_in": True})

    assert first_line(done).startswith("Telemetry of acme is off: it is opt-in, and ")
    assert acme.collector.commands == ["test"]


SECRET = {"headers": {"Authorization": "secret", "Host": "x"}}


def test_headers_go_to_the_endpoint_of_the_tool(acme):
    acme.run(settings=SECRET)

    ((_, headers, _),) = acme.collector.requests
    assert headers["Authorization"] == "secret"
    assert headers["Host"] == acme.collector.url.removeprefix("http://")


def test_headers_do_not_go_to_the_endpoint_of_the_environment(acme):
    env = {"ACME_TELEMETRY_ENDPOINT": acme.collector.url}

    acme.run(settings=SECRET, url="http://127.0.0.1:9", env=env)

    ((_, headers, _),) = acme.collector.requests
    assert "Authorization" not in headers


def test_headers_do_not_go_to_the_endpoint_of_the_config(acme):
    acme.directory.mkdir(parents=True)
    path = acme.directory / "config.toml"
    path.write_text(f'{ON}otlp_endpoint = "{acme.collector.url}"\n')

    acme.run(settings=SECRET, url="http://127.0.0.1:9")

    ((_, headers, _),) = acme.collector.requests
    assert "Authorization" not in headers


@pytest.mark.parametrize("command", [["preview"], ["status"], ["status", "--json"]])
def test_headers_are_not_shown(acme, command):
    done = acme.run(f"usage.main({command})", SECRET)

    assert "secret" not in done.stdout + done.stderr


def test_debug_hides_the_headers(acme):
    done = acme.run(settings=SECRET, env={"ACME_TELEMETRY_DEBUG": "1"})

    assert "Authorization: (hidden)\n" in done.stderr
    assert "secret" not in done.stderr


SLUGS = {
    "two-words": ("My Tool/2.0", "my_tool_2_0"),
    "umlauts": ("\u00fcml\u00e4ut", "_ml_ut"),
    "a-path": ("../../etc", "______etc"),
    "long": ("x" * 200, "x" * 200),
}


@cases(("service_name", "slug"), SLUGS)
def test_metric_directory_and_variable_follow_from_the_name(
    collector, home, monkeypatch, service_name, slug
):
    trix_telemetry.initialize_telemetry(
        service_name=service_name, service_version="1", endpoint=collector.url
    )

    track()
    monkeypatch.setenv(f"{slug.upper()}_TELEMETRY", "0")
    track()

    (point,) = collector.points
    assert point.metric["name"] == f"{slug}_command_invocation"
    assert names(home) == [".config"]
    assert names(home / ".config") == [slug]


@cases(
    ("base", "made"),
    {
        "absolute": ("{home}/xdg", "xdg"),
        "a-wide-space": ("{home}/x\u3000", "x\u3000"),
        "relative": ("xdg", ".config"),
    },
)
def test_xdg_config_home_counts_where_it_is_absolute(collector, home, monkeypatch, base, made):
    monkeypatch.chdir(home)
    monkeypatch.setenv("XDG_CONFIG_HOME", base.format(home=home))
    trix_telemetry.initialize_telemetry(
        service_name="acme", service_version="1", endpoint=collector.url
    )

    track()

    assert names(home) == [made]


def test_a_tool_that_names_no_directory_has_the_one_of_the_system(collector, home, monkeypatch):
    monkeypatch.setenv("APPDATA", str(home / "Roaming"))
    trix_telemetry.initialize_telemetry(
        service_name="acme", service_version="1", endpoint=collector.url
    )

    track()

    base = "Roaming" if os.name == "nt" else ".config"
    assert names(home / base / "acme" / "telemetry") == ["config.toml", "fingerprint"]


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

    done = run([sys.executable, "-c", script(code, "acme", edited_copy.library)])

    (point,) = edited_copy.collector.points
    assert point.metric["name"] == "acme_runs"
    assert point.resource["service.name"] == "acme"
    assert names(home / ".acme") == ["config.toml", "fingerprint"]
    assert "python -m acme._vendor.usage disable" in done.stderr


@pytest.mark.parametrize("command", ["status", "disable"])
def test_a_copy_with_its_values_edited_has_its_commands(edited_copy, command):
    env = {"PYTHONPATH": str(edited_copy.library)}

    done = run([sys.executable, "-m", "acme._vendor.usage", command], env=env)

    assert (done.returncode, done.stderr) == (0, "")


WRONG_SETTINGS = {
    "endpoint-a-number": ("endpoint", 5),
    "endpoint-no-text": ("endpoint", "\ud800"),
    "endpoint-ftp": ("endpoint", "ftp://me:secret@h"),
    "service_name-bytes": ("service_name", b"x"),
    "service_name-empty": ("service_name", ""),
    "service_name-none": ("service_name", None),
    "service_name-a-zero": ("service_name", "a\0"),
    "service_version-a-number": ("service_version", 1.0),
    "service_version-none": ("service_version", None),
    "metric_name-a-list": ("metric_name", []),
    "directory-a-number": ("directory", 7),
    "directory-a-zero": ("directory", "/a\0"),
    "directory-bytes": ("directory", b"/a"),
    "directory-relative": ("directory", "relative"),
    "directory-empty": ("directory", ""),
    "directory-an-object": ("directory", object()),
    "environment-empty": ("environment", ""),
    "prog-a-number": ("prog", 5),
    "prog-two-lines": ("prog", "a\nb"),
    "commands-a-text": ("commands", "build"),
    "commands-a-number": ("commands", 5),
    "commands-without-a-name": ("commands", ["db:migrate", 1]),
    "commands-a-generator": ("commands", (name for name in ["build"])),
    "headers-a-list": ("headers", ["a"]),
    "headers-with-a-number": ("headers", {"a": 1}),
    "docs_url-a-number": ("docs_url", 3),
    "opt_in-a-text": ("opt_in", "no"),
}


def initialize_wrongly(name, value):
    settings = {"service_name": "acme", "service_version": "1", "endpoint": "http://127.0.0.1:9"}
    trix_telemetry.initialize_telemetry(**{**settings, name: value})


@cases(("name", "value"), WRONG_SETTINGS)
def test_a_setting_that_cannot_be_used_sends_makes_and_says_nothing(home, capfd, name, value):
    initialize_wrongly(name, value)

    thread = track()

    assert thread is None
    assert capfd.readouterr() == ("", "")
    assert names(home) == []


@cases(("name", "value"), WRONG_SETTINGS)
def test_status_names_a_setting_that_cannot_be_used(capfd, name, value):
    initialize_wrongly(name, value)

    code = trix_telemetry.main(["status"])

    out = capfd.readouterr().out
    assert code == 1
    assert re.match(f"Telemetry of .* is off: {name} of the tool must be ", out), out
    assert "secret" not in out


@cases(("name", "value"), WRONG_SETTINGS)
def test_no_command_fails_with_a_traceback_for_a_wrong_setting(capfd, name, value):
    initialize_wrongly(name, value)

    for command in (["enable"], ["preview"], ["track", "a"], ["reset"]):
        assert trix_telemetry.main(command) in (0, 1)

    assert "Traceback" not in capfd.readouterr().err


# Checks: command names, endpoints, headers, config.toml


ODD_NAMES = {
    "none": None,
    "a-number": 7,
    "bytes": b"build",
    "a-list": ["build"],
    "an-object": object(),
    "empty": "",
    "an-address": "me@example.com",
    "a-path": "/etc/passwd",
    "two-words": "a b",
    "a-line-break": "build\n",
    "a-zero": "a\0",
    "begins-with-a-digit": "1a",
    "begins-with-a-dash": "-a",
    "65-letters": "a" * 65,
    "a-cyrillic-letter": "b\u0443ild",
    "a-wide-letter": "\uff42uild",
}


@cases("name", ODD_NAMES)
def test_what_is_no_command_name_is_dropped_whole(collector, home, capfd, name):
    thread = track(name)

    assert thread is None
    assert capfd.readouterr() == ("", "")
    assert names(home) == []


@pytest.mark.parametrize("seed", range(20))
def test_a_generated_name_is_taken_where_the_pattern_of_the_contract_takes_it(seed):
    dice = random.Random(seed)
    pattern = re.compile("[A-Za-z][A-Za-z0-9_-]{0,63}")

    for _ in range(200):
        length = dice.choice([0, 1, 2, 5, 64, 65])
        name = "".join(dice.choices("aZ09_-. \u00e9\n/", k=length))
        is_taken = True
        try:
            trix_telemetry.check_command(name, None)
        except trix_telemetry.NotSent:
            is_taken = False
        assert is_taken == bool(pattern.fullmatch(name)), name


@cases(
    ("base", "url"),
    {
        "host": ("http://h", "http://h/v1/metrics"),
        "port-and-path": ("https://h:8443/otlp/", "https://h:8443/otlp/v1/metrics"),
        "two-slashes": ("http://h//", "http://h/v1/metrics"),
        "there-already": ("http://h/a/v1/metrics/", "http://h/a/v1/metrics"),
        "a-host-named-v1": ("http://v1/metrics", "http://v1/metrics/v1/metrics"),
        "ipv6": ("http://[::1]:4318", "http://[::1]:4318/v1/metrics"),
        "capitals": ("HTTP://H", "http://H/v1/metrics"),
    },
)
def test_the_path_is_appended_once(base, url):
    assert trix_telemetry.parse_endpoint(base, "x") == url


@pytest.mark.parametrize("seed", range(20))
def test_a_generated_endpoint_has_neither_user_info_nor_query_nor_fragment(seed):
    dice = random.Random(seed)
    parts = ["http", "https", "://", "h", "@", ":", "80", "/", "?", "#", "[", "::1", "]", ".", "\\"]

    for _ in range(250):
        start = dice.choice(["", "http://", "https://h"])
        base = start + "".join(dice.choices(parts, k=4))
        try:
            url = trix_telemetry.parse_endpoint(base, "x")
        except trix_telemetry.InvalidSetting:
            continue
        parsed = urllib.parse.urlsplit(url)
        assert (parsed.username, parsed.query, parsed.fragment) == (None, "", ""), base


BAD_ENDPOINTS = {
    "file": "file:///etc/passwd",
    "ftp": "ftp://example.com",
    "no-scheme": "example.com:4318",
    "no-host": "http://",
    "relative": "//example.com",
    "path-alone": "http:///v1/metrics",
    "user-info": "https://me:secret@example.com",
    "empty-user-info": "http://@example.com",
    "user-info-with-a-query": "https://u:SE?CRET@h",
    "user-info-with-slashes": "https://u:SECRET//x@h",
    "space-before": " http://h",
    "space-within": "http://exam ple.com",
    "line-break": "http://h\n",
    "line-break-in-the-path": "http://h/\n",
    "port-too-large": "http://h:99999",
    "port-a-word": "http://h:http",
    "port-zero": "http://h:0",
    "port-arabic": "http://h:\u0661",
    "open-bracket": "http://[::1",
    "query": "http://h/?token=1",
    "empty-query": "http://h?",
    "fragment": "http://h/#a",
    "umlaut-in-the-host": "http://\u00fcber.example",
    "umlaut-in-the-path": "http://h/\u00e4",
    "star": "http://*",
}


@cases("base", BAD_ENDPOINTS)
def test_a_bad_endpoint_in_the_config_is_off_and_named(config, capfd, base):
    config(otlp_endpoint=base)
    track()

    code = trix_telemetry.main(["status"])

    told = "".join(capfd.readouterr())
    assert code == 1
    assert "is off: telemetry.otlp_endpoint must be an http or https base URL with a host" in told
    assert base.strip() not in told


@cases("base", BAD_ENDPOINTS)
def test_a_bad_endpoint_in_the_variable_is_off_and_named(config, capfd, monkeypatch, base):
    config()
    monkeypatch.setenv(ENDPOINT, base)
    track()

    code = trix_telemetry.main(["status"])

    told = "".join(capfd.readouterr())
    assert code == 1
    assert "is off: TRIX_TELEMETRY_ENDPOINT must be an http or https base URL with a host" in told
    assert base.strip() not in told


HEADERS = """
[telemetry.otlp_headers]
Authorization = "Bearer abc"
content-TYPE = "1"
Content-Length = "1"
user-agent = "1"
host = "1"
connection = "1"
"""


def test_the_headers_of_the_request(collector, config):
    config(ON + HEADERS)

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


OFF_CONFIGS = {
    "false": OFF,
    "false-dotted": "telemetry.enabled = false\nx = true\n",
    "false-inline": "telemetry = { enabled = false, x = true }\n",
    "false-escaped": '["telemetry"]\n"\\u0065nabled" = false # true\n',
    "a-comment": "[telemetry]\n# enabled = true\n",
    "outside-of-the-table": "enabled = true\n",
    "empty": "",
    "within-a-text": '[telemetry]\nnote = "enabled = true"\n',
    "in-another-table": "[other]\nenabled = true\n",
    "in-a-table-below": "[telemetry.more]\nenabled = true\n",
    "a-typo": "[telemetry]\nenable = false\n",
    "no-key": "[telemetry]\ntimeout_ms = 2000 # true\n",
}


@cases("text", OFF_CONFIGS)
def test_a_config_that_does_not_say_true_is_off_and_left_alone(
    collector, config, state, capfd, text
):
    path = config(text)

    track()

    assert collector.requests == []
    assert capfd.readouterr() == ("", "")
    assert path.read_text() == text
    assert names(state) == ["config.toml"]


@cases("text", OFF_CONFIGS)
def test_status_of_a_config_that_does_not_say_true_is_off(collector, config, capfd, text):
    config(text)

    code = trix_telemetry.main(["status"])

    assert code == 0
    assert capfd.readouterr().out.startswith("Telemetry of trix-cli is off: config.toml ")


ON_CONFIGS = {
    "dotted": "telemetry.enabled = true\n",
    "inline": 'telemetry = { timeout_ms = 30000, "enabled" = true }\n',
    "escaped": '["telemetry"]\n"\\u0065nabled" = true\n',
    "after-60000-comments": "# x\n" * 60_000 + ON,
    "dos-lines": "[other]\nenabled = false\n[telemetry]\r\n\tenabled=true#\r\nx = 'blue'\r\n",
    "byte-order-mark": "\ufeff" + ON,
    "version-1": NEW_CONFIG.replace("\n\n", "\n").replace("# [", "# x"),
    "rust-tool": (
        "[telemetry]\nenabled = true\ntimeout_ms = 2000\n"
        'otlp_endpoint = "http://127.0.0.1:9"\n\n[telemetry.otlp_headers]\n'
    ),
}


@cases("text", ON_CONFIGS)
def test_a_config_that_says_true_is_on_and_left_alone(collector, config, text):
    path = config(text)

    track()

    assert collector.commands == ["build"]
    assert path.read_bytes() == text.encode()


def bad_timeout(value):
    return f"{ON}timeout_ms = {value}\n", "telemetry.timeout_ms must be an integer, 1 to 60000"


def bad_header(line):
    text = f"{ON}[telemetry.otlp_headers]\n{line}\n"
    return text, "telemetry.otlp_headers must be a table of names and values in printable ASCII"


NOT_TOML = "config.toml must be TOML in UTF-8: "
BAD_CONFIGS = {
    "not-toml": ("not toml, true", NOT_TOML),
    "a-key-twice": (f"{ON}enabled = true\n", NOT_TOML),
    "a-zero": ("[telemetry]\nenabled = true \0\n", NOT_TOML),
    "not-utf-8": (b"[telemetry]\nenabled = true # \xff\n", NOT_TOML),
    "5000-brackets": ("x = true\ny = " + "[" * 5000, NOT_TOML),
    "too-large": ("# true" + " " * (1 << 20), "config.toml must not be larger than 1 MiB"),
    "telemetry-a-bool": ("telemetry = true\n", "telemetry must be a table"),
    "telemetry-a-list": ("[[telemetry]]\nenabled = true\n", "telemetry must be a table"),
    "enabled-a-text": ('[telemetry]\nenabled = "true"\n', "telemetry.enabled must be true or"),
    "enabled-a-number": ("[telemetry]\nenabled = 1 # true\n", "telemetry.enabled must be true or"),
    "timeout-zero": bad_timeout("0"),
    "timeout-negative": bad_timeout("-1"),
    "timeout-a-text": bad_timeout('"5"'),
    "timeout-a-bool": bad_timeout("true"),
    "timeout-a-float": bad_timeout("2.5"),
    "timeout-large": bad_timeout("60001"),
    "timeout-very-large": bad_timeout("1_000_000_000_000"),
    "timeout-9000-digits": bad_timeout("0x" + "f" * 9000),
    "timeout-a-list": bad_timeout("[]"),
    "endpoint-a-number": (f"{ON}otlp_endpoint = 7\n", "telemetry.otlp_endpoint must be"),
    "headers-a-list": (f"{ON}otlp_headers = []\n", "telemetry.otlp_headers must be"),
    "headers-a-text": (f"{ON}otlp_headers = 'A=SECRET'\n", "telemetry.otlp_headers must be"),
    "header-name-not-ascii": bad_header('"X-Caf\u00e9" = "1"'),
    "header-name-with-a-space": bad_header('"X Space" = "1"'),
    "header-name-with-a-colon": bad_header('"X:Colon" = "1"'),
    "header-name-empty": bad_header('"" = "1"'),
    "header-transfer-encoding": bad_header('transfer-Encoding = "chunked"'),
    "header-value-not-ascii": bad_header('X-Latin = "caf\u00e9"'),
    "header-value-with-a-line-break": bad_header('X-Break = "a\\r\\nX-Injected: SECRET"'),
    "header-a-number": (f"{ON}otlp_headers = {{ A = 1 }}\n", "telemetry.otlp_headers must be"),
    "header-a-list": (f"{ON}otlp_headers = {{ A = ['SECRET'] }}\n", "telemetry.otlp_headers must"),
}


@cases(("text", "says"), BAD_CONFIGS)
def test_a_damaged_config_is_off_and_left_alone(collector, config, state, capfd, text, says):
    path = config(text)
    before = path.read_bytes()

    track()

    assert capfd.readouterr() == ("", "")
    assert collector.requests == []
    assert path.read_bytes() == before
    assert names(state) == ["config.toml"]


@cases(("text", "says"), BAD_CONFIGS)
def test_a_damaged_config_is_logged_once(collector, config, caplog, text, says):
    config(text)

    track()
    track()

    ((name, level, message),) = caplog.record_tuples
    assert (name, level) == ("trix_telemetry", logging.WARNING)
    assert message.startswith(f"telemetry is off: {says}")
    assert "SECRET" not in message


@cases(("text", "says"), BAD_CONFIGS)
def test_status_names_what_is_damaged(collector, config, capfd, text, says):
    config(text)

    code = trix_telemetry.main(["status"])

    out = capfd.readouterr().out
    assert code == 1
    assert out.startswith(f"Telemetry of trix-cli is off: {says}")
    assert "SECRET" not in out


def test_a_logging_that_fails_is_silent(collector, config):
    config("[telemetry]\nenabled = true\ntimeout_ms = 0\n")

    done = run_tool(f"import types\nsys.modules['logging'] = types.ModuleType('logging')\n{TRACK}")

    assert_silent(done)


@posix
@cases(
    ("kind", "says"),
    {
        "a-named-pipe": ("pipe", "cannot be read: it is not a regular file"),
        "a-directory": ("directory", "cannot be read: it is not a regular file"),
        "a-device": ("device", "cannot be read: it is not a regular file"),
        "a-loop": ("loop", "(cannot be read: Too many levels of|is a link that leads nowhere).*"),
    },
)
def test_what_is_no_file_is_off_and_left_alone(collector, state, capfd, kind, says):
    state.mkdir(parents=True)
    path = state / "config.toml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to(path)

    track()
    code = trix_telemetry.main(["status"])

    out, err = capfd.readouterr()
    assert (code, err) == (0, "")
    first = out.splitlines()[0]
    assert re.fullmatch(f"Telemetry of trix-cli is off: {path} {says}", first)
    assert names(state) == ["config.toml"]
    assert collector.requests == []


@posix
def test_no_device_is_opened(collector, state):
    state.mkdir(parents=True)
    (state / "config.toml").symlink_to("/dev/null")
    code = f"""
def watch(event, arguments):
    if event == "open":
        print(arguments[0])


sys.addaudithook(watch)
{TRACK}
"""

    done = run_tool(code)

    assert_silent(done)


@posix
@cases("place", {"the-config": ".tx3/trix/config.toml", "the-directory": ".tx3"})
def test_a_link_that_leads_nowhere_is_off_and_nothing_is_made(collector, home, place):
    link = home / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(home / "away" / "nowhere")
    before = read_tree(home)

    track()

    assert collector.requests == []
    assert read_tree(home) == before


@posix
@cases("place", {"the-config": ".tx3/trix/config.toml", "the-directory": ".tx3"})
def test_a_link_that_leads_nowhere_is_named(collector, home, capsys, place):
    link = home / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(home / "away" / "nowhere")

    trix_telemetry.main(["status"])

    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"Telemetry of trix-cli is off: {link} is a link that leads nowhere"


# Opt-out: variables, standard streams, debug


@cases(
    ("variable", "value"),
    {
        "do-not-track-1": ("DO_NOT_TRACK", "1"),
        "do-not-track-true": ("DO_NOT_TRACK", "true"),
        "do-not-track-a-word": ("DO_NOT_TRACK", "anything"),
        "do-not-track-a-space": ("DO_NOT_TRACK", " "),
        "own-0": ("TRIX_TELEMETRY", "0"),
        "own-off": ("TRIX_TELEMETRY", "off"),
        "own-n": ("TRIX_TELEMETRY", "n"),
        "own-a-word": ("TRIX_TELEMETRY", "disabled"),
        "own-space-1": ("TRIX_TELEMETRY", " 1"),
    },
)
def test_a_variable_turns_off_what_the_config_turns_on(
    collector, config, monkeypatch, variable, value
):
    config()
    monkeypatch.setenv(variable, value)

    thread = track()

    assert thread is None
    assert collector.requests == []


@cases(
    ("variable", "value"),
    {
        "do-not-track-empty": ("DO_NOT_TRACK", ""),
        "do-not-track-0": ("DO_NOT_TRACK", "0"),
        "do-not-track-no": ("DO_NOT_TRACK", "No"),
        "do-not-track-off": ("DO_NOT_TRACK", "OFF"),
        "own-empty": ("TRIX_TELEMETRY", ""),
        "own-1": ("TRIX_TELEMETRY", "1"),
        "own-yes": ("TRIX_TELEMETRY", "Yes"),
        "own-on": ("TRIX_TELEMETRY", "ON"),
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
    config(OFF)
    monkeypatch.setenv("TRIX_TELEMETRY", "1")

    track()

    assert collector.requests == []


CLOSED = {"input": "<&-", "output": ">&-", "error": "2>&-", "all": "<&- >&- 2>&-"}


def run_with_closed(redirect, *command):
    """Run a command with standard streams that the shell has closed."""
    quoted = " ".join(["exec", '"$@"', redirect])
    return run(["sh", "-c", quoted, "sh", *command])


@posix
@cases("redirect", CLOSED)
@cases("text", {"first-run": None, "config": ON})
def test_with_a_closed_stream_nothing_is_made_or_sent(collector, config, state, redirect, text):
    if text:
        config(text)

    done = run_with_closed(redirect, sys.executable, "-c", script(f"{TRACK}sys.exit(5)"))

    assert (done.returncode, done.stdout, done.stderr) == (5, "", "")
    assert collector.requests == []
    assert not state.exists() or names(state) == ["config.toml"]


DEBUG = {"TRIX_TELEMETRY_DEBUG": "1"}


def test_debug_shows_the_request(collector, config):
    config(f'{ON}[telemetry.otlp_headers]\nX-Key = "secret"\n')

    done = run_tool(env=DEBUG)

    head, _, body = done.stderr.partition("\n\n")
    first, second, *_ = head.splitlines()
    assert first == "trix-cli: telemetry would send"
    assert second == "POST /v1/metrics HTTP/1.1"
    assert "X-Key: (hidden)" in head
    assert Point(body).command == "build"


def test_debug_sends_and_makes_nothing(collector, home):
    code = "assert trix_telemetry.track_command_execution('build') is None"

    done = run_tool(code, env=DEBUG)

    assert (done.returncode, done.stdout) == (0, "")
    assert collector.requests == []
    assert names(home) == []


REASONS = {
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
    "timeout": (
        {},
        "[telemetry]\ntimeout_ms = 0\n",
        "telemetry.timeout_ms must be an integer, 1 to 60000",
    ),
    "no-endpoint": (
        {ENDPOINT: ""},
        None,
        "there is no endpoint: TRIX_TELEMETRY_ENDPOINT is empty",
    ),
    "no-endpoint-of-the-tool": (
        {ENDPOINT: None},
        None,
        "there is no endpoint: endpoint of the tool is empty",
    ),
    "ci": ({"CI": "true", ENDPOINT: ""}, None, "CI is set, and {state}/config.toml does not exist"),
}


@pytest.fixture
def told(collector, config, state, monkeypatch):
    """Sets variables and a config, and returns the reason as it is told."""

    def prepare(env, text, reason):
        for name, value in env.items():
            if value is None:
                monkeypatch.delenv(name)
            else:
                monkeypatch.setenv(name, value)
        if text is not None:
            config(text)
        return reason.replace("{state}", str(state)).replace("/", os.sep)

    return prepare


@cases(("env", "text", "reason"), REASONS)
def test_the_first_reason_is_told_by_debug(told, monkeypatch, capsys, env, text, reason):
    reason = told(env, text, reason)
    monkeypatch.setenv("TRIX_TELEMETRY_DEBUG", "yes")

    track()

    assert f"trix-cli: telemetry is off: {reason}" in capsys.readouterr().err


@cases(("env", "text", "reason"), REASONS)
def test_the_first_reason_is_told_by_status(told, capsys, env, text, reason):
    reason = told(env, text, reason)

    trix_telemetry.main(["status"])

    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"Telemetry of trix-cli is off: {reason}"


@cases(("env", "text", "reason"), REASONS)
def test_the_first_reason_is_told_by_preview(told, home, capsys, env, text, reason):
    reason = told(env, text, reason)
    before = read_tree(home)

    code = trix_telemetry.main(["preview"])

    assert code == 0
    assert capsys.readouterr() == (f"trix-cli: telemetry is off: {reason}\n", "")
    assert read_tree(home) == before


@cases(("env", "text", "reason"), REASONS)
def test_the_first_reason_is_told_by_track(told, collector, capsys, env, text, reason):
    reason = told(env, text, reason)

    code = trix_telemetry.main(["track", "build"])

    assert code == 0
    assert capsys.readouterr().out == f"Not sent. Telemetry is off: {reason}\n"
    assert collector.requests == []


def test_the_command_line_does_not_heed_debug(collector, monkeypatch, capsys):
    monkeypatch.setenv("TRIX_TELEMETRY_DEBUG", "1")

    trix_telemetry.main(["status"])

    assert capsys.readouterr().out.startswith("Telemetry of trix-cli is on\n")


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


@pytest.fixture
def intervals(collector, config):
    """The start and the end of 24 points of this process, in the order of time."""
    config()
    for _ in range(6):
        threads = [trix_telemetry.track_command_execution("build") for _ in range(4)]
        for thread in filter(None, threads):
            thread.join(LONG)
    return sorted((point.start, point.end) for point in collector.points)


def test_an_interval_begins_at_the_call(collector, config):
    config()
    before = time.time_ns()
    thread = trix_telemetry.track_command_execution("build")
    after = time.time_ns()

    thread.join(LONG)

    (point,) = collector.points
    assert before <= point.start <= after


def test_an_interval_takes_a_millisecond_at_least(intervals):
    assert len(intervals) == 24
    assert all(end - start >= 1_000_000 for start, end in intervals)


def test_no_interval_overlaps_another_one(intervals):
    assert len(intervals) == 24
    assert all(one[1] <= two[0] for one, two in itertools.pairwise(intervals))


# Files: modes, the fingerprint, the back-off, disks


@posix
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000])
def test_what_is_made_is_for_the_user_alone_under_any_umask(collector, home, state, umask):
    run_tool(f"import os\nos.umask({umask})\n{TRACK}")

    paths = [home / ".tx3", state, *state.iterdir()]
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in paths}
    assert modes == {".tx3": 0o700, "trix": 0o700, "config.toml": 0o600, "fingerprint": 0o600}


WATCH_MODES = """
import os

os.umask(0o277)


def watch(event, arguments):
    if event in ("os.chmod", "os.chown") and not isinstance(arguments[0], int):
        print(event, arguments)


sys.addaudithook(watch)
"""


@posix
def test_a_first_run_sets_modes_on_open_files_alone(collector):
    code = """
        trix_telemetry.track_command_execution("build").join()
        print("done")
    """

    done = run_tool(WATCH_MODES + textwrap.dedent(code))

    assert done.stdout == "done\n"


@posix
def test_an_edit_sets_modes_on_open_files_alone(config):
    path = config()

    done = run_tool(f"{WATCH_MODES}trix_telemetry.main(['disable'])")

    assert done.stdout == f"Telemetry disabled (saved in {path})\n"


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


JUNK = {
    "empty": b"",
    "no-hex": b"xyz",
    "65-digits": b"0" * 65,
    "two-words": b"ab cd",
    "not-utf-8": b"\xff" * 16,
    "4-mib": b"0" * (4 << 20),
}


@cases("junk", JUNK)
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


@posix
def test_a_fingerprint_that_is_a_link_is_read(collector, home, config, state):
    config()
    (home / "elsewhere").write_text(FINGERPRINT)
    (state / "fingerprint").symlink_to(home / "elsewhere")

    track()

    assert collector.users == {FINGERPRINT}


@posix
def test_junk_that_a_link_leads_to_is_left_alone(collector, home, config, state):
    config()
    (home / "elsewhere").write_text("not hex")
    (state / "fingerprint").symlink_to(home / "elsewhere")

    track()

    assert (home / "elsewhere").read_text() == "not hex"
    assert collector.users == {(state / "fingerprint").read_text()}


def write_backoff(collector, state, age=0, reason="slow"):
    path = state / "backoff"
    path.write_bytes(f"{collector.url}/v1/metrics\n{reason}\n".encode())
    os.utime(path, (time.time() - age, time.time() - age))
    return path


@cases("age", {"new": 0, "590-seconds": 590})
def test_within_ten_minutes_of_a_back_off_nothing_is_sent(collector, config, state, age):
    config()
    write_backoff(collector, state, age)

    track()

    assert collector.requests == []


@cases("age", {"610-seconds": 610, "in-the-future": -60})
def test_a_back_off_of_another_time_does_not_count(collector, config, state, age):
    config()
    write_backoff(collector, state, age)

    track()

    assert collector.commands == ["build"]


DAMAGED_BACKOFFS = {
    "empty": b"",
    "junk": b"junk",
    "another-url": b"http://other/v1/metrics\nslow\n",
    "a-longer-url": b"{url}/\nslow",
    "an-escape-before": b"\x1b[31m\n{url}\n",
    "a-line-before": b"\n{url}",
    "not-utf-8": b"\xff\xfe\x00",
}


@cases("text", DAMAGED_BACKOFFS)
def test_a_damaged_back_off_does_not_count(collector, config, state, capsys, text):
    config()
    url = f"{collector.url}/v1/metrics".encode()
    (state / "backoff").write_bytes(text.replace(b"{url}", url))

    track()
    trix_telemetry.main(["status"])

    assert collector.commands == ["build"]
    assert "Back-off" not in capsys.readouterr().out


def test_status_shows_how_long_a_back_off_takes_and_why(collector, config, state, capsys):
    config()
    write_backoff(collector, state, age=100, reason="slow \x1b[31m")

    trix_telemetry.main(["status"])

    out = capsys.readouterr().out
    assert out.startswith("Telemetry of trix-cli is on\n")
    assert re.search(r"(?m)^  Back-off     (500|49\d) s more: slow \?\[31m$", out)


def test_debug_tells_a_back_off(collector, config, state, monkeypatch, capsys):
    config()
    write_backoff(collector, state)
    monkeypatch.setenv("TRIX_TELEMETRY_DEBUG", "1")

    track()

    err = capsys.readouterr().err
    assert re.match(r"trix-cli: telemetry is off: back-off for \d+ s more: slow\n", err)


def test_enable_ends_a_back_off(collector, config, state):
    config()
    write_backoff(collector, state)

    trix_telemetry.main(["enable"])

    assert names(state) == ["config.toml"]


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
    ("text", "mode", "runs"),
    {
        "nothing-can-be-made": (None, 0, 0),
        "the-config-can-be-read": (NEW_CONFIG, 0o444, 2),
        "the-config-cannot-be-read": (NEW_CONFIG, 0, 0),
    },
)
def test_a_home_that_cannot_be_written(collector, config, locked, text, mode, runs):
    if text:
        config(text)
    locked(mode)
    code = """
        for _ in range(2):
            thread = trix_telemetry.track_command_execution("build")
            if thread is not None:
                thread.join()
    """

    done = run_tool(BECOME_NOBODY + textwrap.dedent(code))

    assert_silent(done)
    assert collector.commands == ["build"] * runs
    assert len(collector.users) == min(runs, 1)


@posix
@cases(
    ("text", "mode", "says"),
    {
        "nothing-can-be-made": (None, 0, "off: .*config.toml cannot be created: .* not writable"),
        "the-config-can-be-read": (NEW_CONFIG, 0o444, "on"),
        "the-config-cannot-be-read": (NEW_CONFIG, 0, "off: .* cannot be read: Permission denied"),
    },
)
def test_status_of_a_home_that_cannot_be_written(collector, config, locked, text, mode, says):
    if text:
        config(text)
    locked(mode)

    done = run_tool(f"{BECOME_NOBODY}sys.exit(trix_telemetry.main(['status']))")

    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(f"Telemetry of trix-cli is {says}", first_line(done))


FULL_DISK = """
import resource

resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
trix_telemetry.track_command_execution("build")
"""


@posix
def test_a_first_run_on_a_full_disk_makes_and_sends_nothing(collector, state):
    done = run_tool(FULL_DISK)

    assert_silent(done)
    assert collector.requests == []
    assert not state.exists() or names(state) == []


@posix
def test_with_a_config_a_full_disk_keeps_nothing_from_being_sent(collector, config, state):
    config()

    done = run_tool(FULL_DISK)

    assert_silent(done)
    assert collector.commands == ["build"]
    assert names(state) == ["config.toml"]


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
@cases("value", {"relative": "relative", "a-device": "/dev/null"})
def test_without_a_home_nothing_is_sent(collector, home, value):
    code = "assert trix_telemetry.track_command_execution('build') is None"

    done = run_tool(code, env={"HOME": value}, cwd=home)

    assert_silent(done)
    assert names(home) == []


def test_without_a_home_no_file_of_the_working_directory_counts(
    collector, home, monkeypatch, capsys
):
    (home / "fingerprint").write_text("deadbeef")
    monkeypatch.chdir(home)
    for name in ("HOME", "USERPROFILE", "HOMEPATH", "HOMEDRIVE"):
        monkeypatch.delenv(name, raising=False)

    assert trix_telemetry.main(["status"]) == 0
    assert trix_telemetry.main(["preview"]) == 0

    assert "deadbeef" not in "".join(capsys.readouterr())
    assert trix_telemetry.get_user_fingerprint() != "deadbeef"


def test_status_of_a_home_that_is_not_there(collector, home):
    nowhere = "Q:\\nowhere" if os.name == "nt" else str(home / "nowhere" / "at" / "all")

    done = run_command("status", env={"HOME": nowhere, "USERPROFILE": nowhere})

    assert (done.returncode, done.stderr) == (0, "")


# The client: endpoints, proxies, redirects, TLS


@pytest.fixture
def tool_endpoint(collector, monkeypatch):
    """The collector as the endpoint of the tool; the environment names none."""
    monkeypatch.delenv(ENDPOINT)
    monkeypatch.setattr(trix_telemetry.Settings, "endpoint", f"{collector.url}/tool")
    return collector


def test_the_endpoint_of_the_tool_counts(tool_endpoint, config):
    config()

    track()

    assert tool_endpoint.paths == ["/tool/v1/metrics"]


def test_the_endpoint_of_the_config_goes_before_that_of_the_tool(tool_endpoint, config):
    config(otlp_endpoint=f"{tool_endpoint.url}/file")

    track()

    assert tool_endpoint.paths == ["/file/v1/metrics"]


def test_the_endpoint_of_the_environment_goes_before_that_of_the_config(
    tool_endpoint, config, monkeypatch
):
    config(otlp_endpoint=f"{tool_endpoint.url}/file")
    monkeypatch.setenv(ENDPOINT, f"{tool_endpoint.url}/environment/")

    track()

    assert tool_endpoint.paths == ["/environment/v1/metrics"]


def test_an_empty_endpoint_in_the_config_means_nowhere(tool_endpoint, config):
    config(otlp_endpoint="")

    track()

    assert tool_endpoint.requests == []


def test_an_empty_endpoint_in_the_environment_means_nowhere(tool_endpoint, config, monkeypatch):
    config()
    monkeypatch.setenv(ENDPOINT, "")

    track()

    assert tool_endpoint.requests == []


def test_the_variables_of_opentelemetry_are_not_read(new_collector, config, monkeypatch):
    collector = new_collector()
    config()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)

    track()

    assert collector.requests == []


def test_a_proxy_of_the_environment_is_used(collector, new_collector, monkeypatch):
    proxy = new_collector()
    monkeypatch.setenv("http_proxy", proxy.url)

    track()

    ((line, headers, _),) = proxy.requests
    assert line == f"POST {collector.url}/v1/metrics HTTP/1.1"
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
    assert collector.requests[0][0] == "POST http://collector.invalid/v1/metrics HTTP/1.1"


ODD_PROXIES = {
    "tls": "https://me:secret@{}",
    "socks": "socks5://{}",
    "refuses": "http://127.0.0.1:1/no",
    "one-slash": "http:/me:secret@{}",
    "no-port": "http://me:secret@h:x",
}


@cases("proxy", ODD_PROXIES)
def test_an_odd_proxy_is_silent_and_gets_nothing(collector, config, proxy):
    config()
    proxy = proxy.format(collector.url.removeprefix("http://"))

    done = run_tool(env={"http_proxy": proxy, ENDPOINT: "http://127.0.0.2:1"})

    assert_silent(done)
    assert collector.requests == []


@cases("proxy", ODD_PROXIES)
def test_track_tells_an_odd_proxy_without_its_password(collector, config, proxy):
    config()
    proxy = proxy.format(collector.url.removeprefix("http://"))
    env = {"http_proxy": proxy, ENDPOINT: "http://127.0.0.2:1"}

    done = run_command("track", "build", env=env)

    assert_error(done, r"http://127.0.0.2:1/v1/metrics after \d+ ms: .+")
    assert "secret" not in done.stderr


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@cases(
    "target",
    {
        "the-same-host": "{url}/elsewhere",
        "another-host": "//other.invalid/",
        "a-file": "file:///etc/passwd",
    },
)
def test_a_redirect_is_not_followed(collector, config, status, target):
    config()
    collector.answer = (status, {"Location": target.format(url=collector.url)}, b"")

    track()

    assert collector.paths == ["/v1/metrics"]


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
    yield collector
    collector.close()


# Tells what each context is made of, and puts the authority into the bundle of the system.
WATCH_CONTEXTS = """
import ssl

make = ssl.create_default_context


def watch(**options):
    print(*options)
    if options or "SSL_CERT_FILE" in os.environ:
        return make(**options)
    return make(cafile=os.path.join(os.environ["HOME"], "authority.pem"))


import os

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


def test_an_unknown_authority_gets_nothing(secure, config):
    config()

    done = run_tool()

    assert_silent(done)
    assert secure.requests == []


def test_track_tells_an_unknown_authority(secure, config):
    config()

    done = run_command("track", "build")

    assert_error(done, ".*CERTIFICATE_VERIFY_FAILED.*")


def test_a_certificate_of_another_host_gets_nothing(secure, home, config):
    config()
    code = """
        import socket

        find = socket.getaddrinfo


        def find_collector(host, *rest, **options):
            return find("127.0.0.1", *rest, **options)


        socket.getaddrinfo = find_collector
        trix_telemetry.track_command_execution("build")
    """
    env = {
        "SSL_CERT_FILE": str(home / "authority.pem"),
        ENDPOINT: f"https://127.0.0.2:{secure.port}",
    }

    done = run_tool(code, env=env)

    assert_silent(done)
    assert secure.requests == []


def test_a_key_log_that_cannot_be_written_is_told_by_track(secure, home, config):
    config()
    env = {
        "SSL_CERT_FILE": str(home / "authority.pem"),
        "SSLKEYLOGFILE": str(home / "nowhere" / "keys"),
    }

    done = run_command("track", "build", env=env)

    assert_error(done, ".*No such file or directory.*")


# Reads the bundle until the deadline is over.
READ_LATE = """
import ssl
import time

make = ssl.create_default_context
began = time.monotonic()


def make_late(**options):
    if not options:
        time.sleep(max(0, began + 1.2 - time.monotonic()))
        print("read")
    return make(**options)


ssl.create_default_context = make_late
trix_telemetry.MAX_IMPORT_SECONDS = 60
trix_telemetry.track_command_execution("build")
"""


@posix
def test_the_end_waits_while_a_bundle_of_authorities_is_read(secure, home, config):
    (home / "empty" / "authority.pem").write_text(AUTHORITY)
    config(timeout_ms=1000)

    done = run_tool(READ_LATE)

    assert (done.returncode, done.stdout, done.stderr) == (0, "read\n", "")


def test_http_to_a_collector_of_tls_is_silent(secure, config):
    config()

    done = run_tool(env={ENDPOINT: f"http://127.0.0.1:{secure.port}"})

    assert_silent(done)
    assert secure.requests == []


# The first run


def test_a_first_run_makes_the_config_of_the_contract(collector, state):
    track()

    assert (state / "config.toml").read_text() == NEW_CONFIG


def test_a_first_run_counts(collector):
    track()

    assert collector.commands == ["build"]


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


@pytest.mark.parametrize("value", ["true", "1", "anything"])
def test_a_first_run_in_ci_makes_and_sends_nothing(collector, home, monkeypatch, value):
    monkeypatch.setenv("CI", value)

    thread = track()

    assert thread is None
    assert names(home) == []


@pytest.mark.parametrize("value", ["", "0", "false", "no", "Off"])
def test_a_first_run_where_ci_is_denied_counts(collector, monkeypatch, value):
    monkeypatch.setenv("CI", value)

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

    done = run_tool(code, "-S")

    assert_silent(done)
    assert names(home) == []


# Ends before its exit hooks run, and before Python flushes what cannot be written.
TELL = """
import os

{code}
try:
    assert trix_telemetry.track_command_execution("build") is None
except KeyboardInterrupt:
    pass
os._exit(0)
"""
LOST_STDERR = {
    "none": "sys.stderr = None",
    "closed": "sys.stderr.close()",
    "a-closed-pipe": """
import os

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


def assert_nobody_was_told(done, collector, state):
    assert (done.returncode, done.stdout) == (0, "")
    assert collector.requests == []
    assert names(state) == []


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


def test_a_first_run_sends_nothing_where_a_disable_came_beside_the_notice(collector):
    code = """
        class Stream:
            def write(self, text):
                trix_telemetry.main(["disable"])


        sys.stderr = Stream()
        trix_telemetry.track_command_execution("build")
    """

    done = run_tool(code)

    assert done.stdout.startswith("Telemetry disabled (saved in ")
    assert collector.requests == []


def test_a_first_run_sends_nothing_where_a_disable_has_just_been_quicker(collector):
    code = """
        make = trix_telemetry.make_directory


        def make_late(path):
            trix_telemetry.make_directory = make
            trix_telemetry.main(["disable"])


        trix_telemetry.make_directory = make_late
        trix_telemetry.track_command_execution("build")
    """

    done = run_tool(code)

    assert done.stdout.startswith("Telemetry disabled (saved in ")
    assert done.stderr == ""
    assert collector.requests == []


STREAMS_OF_A_HOST = """
import os


class Output:
    def __init__(self, stream):
        self.write = stream.write
        self.flush = stream.flush


class Errors(Output):
    def fileno(self):
        return 2


sys.stdout = Output(sys.stdout)
sys.stderr = Errors(sys.stderr)
"""


def test_streams_of_a_hosts_own_class_are_told_and_counted(collector):
    done = run_tool(STREAMS_OF_A_HOST + TRACK)

    assert done.stderr.startswith("trix-cli sends anonymous usage telemetry")
    assert collector.commands == ["build"]


@posix
@cases("code", LOST_STDERR)
def test_a_notice_that_cannot_be_shown_takes_the_config_back(collector, state, code):
    done = run_tool(TELL.format(code=code))

    assert_nobody_was_told(done, collector, state)


def test_a_notice_that_was_not_shown_is_shown_by_the_next_run(collector):
    run_tool("sys.stderr = None\n" + TRACK)

    done = run_tool()

    assert done.stderr.startswith("trix-cli sends anonymous usage telemetry")
    assert collector.commands == ["build"]


def run_at_one_moment(count, code):
    """Run tools that wait for each other before their code. Return what each said on stderr."""
    moment = time.time() + 0.5 + count / 10
    wait = f"""
import time

trix_telemetry.DEFAULT_TIMEOUT_MS = 60_000
time.sleep(max(0, {moment} - time.time()))
"""
    processes = [start_tool(wait + code, stdout=None) for _ in range(count)]
    return [process.communicate(timeout=LONG)[1] for process in processes]


# A tool that ends by an exception: the interpreter imports while the thread does.
TRACK_AND_FAIL = f"{TRACK}raise ValueError('of the tool')\n"


def test_of_many_first_runs_one_tells_and_all_are_one_user(collector, state):
    said = run_at_one_moment(10, TRACK_AND_FAIL)

    assert {text.splitlines()[-1] for text in said} == {"ValueError: of the tool"}
    assert sum("trix-cli" in text for text in said) == 1
    assert len(collector.requests) == 10
    assert len(collector.users) == 1
    assert names(state) == ["config.toml", "fingerprint"]


# Root in somebody else's home


@pytest.fixture
def foreign(home, monkeypatch):
    """Makes a home of another user's: as it is first, with a config, or with links."""

    def make(kind):
        theirs = home / "theirs"
        theirs.mkdir()
        monkeypatch.setenv("HOME", str(theirs))
        directory = theirs / ".tx3" / "trix"
        if kind == "their-new-home":
            pass
        elif kind == "a-link-to-their-directory":
            directory.mkdir(parents=True)
            (directory / "config.toml").write_text(ON)
            (home / ".tx3").symlink_to(theirs / ".tx3")
            monkeypatch.setenv("HOME", str(home))
        elif kind == "a-config-that-is-a-link-to-their-file":
            (theirs / "config.toml").write_text(ON)
            (home / ".tx3" / "trix").mkdir(parents=True)
            (home / ".tx3" / "trix" / "config.toml").symlink_to(theirs / "config.toml")
            monkeypatch.setenv("HOME", str(home))
        elif kind == "a-link-of-theirs-to-a-directory-of-roots":
            (home / "own").mkdir()
            (home / "own" / "config.toml").write_text(ON)
            (theirs / ".tx3").mkdir()
            directory.symlink_to(home / "own")
        elif kind == "no-file-in-the-place-of-the-config":
            (directory / "config.toml").mkdir(parents=True)
        else:
            directory.mkdir(parents=True)
            (directory / "config.toml").write_text(ON)
        for path in (theirs, *theirs.rglob("*")):
            os.lchown(path, NOBODY_ID, NOBODY_ID)
        if kind == "a-directory-of-roots-in-their-home":
            os.chown(directory, 0, 0)
        return theirs

    return make


in_foreign_homes = pytest.mark.parametrize(
    "kind",
    [
        "their-new-home",
        "their-home",
        "a-directory-of-roots-in-their-home",
        "a-link-to-their-directory",
        "a-config-that-is-a-link-to-their-file",
        "a-link-of-theirs-to-a-directory-of-roots",
        "no-file-in-the-place-of-the-config",
    ],
)


@root
@in_foreign_homes
def test_root_makes_and_sends_nothing_in_a_directory_of_another_user(
    collector, home, foreign, capfd, kind
):
    foreign(kind)
    before = read_tree(home)

    thread = track()

    assert thread is None
    assert capfd.readouterr() == ("", "")
    assert read_tree(home) == before


@root
@cases(
    "code",
    {
        "a-call": TRACK,
        "status": "trix_telemetry.main(['status'])",
        "disable": "trix_telemetry.main(['disable'])",
        "get-user-fingerprint": "trix_telemetry.get_user_fingerprint()",
    },
)
def test_root_opens_no_file_in_a_directory_of_another_user(collector, foreign, code):
    theirs = foreign("their-home")
    watch = f"""
opened = []


def watch(event, arguments):
    if event == "open" and str(arguments[0]).startswith({str(theirs)!r}):
        opened.append(arguments[0])


sys.addaudithook(watch)
{code}
assert opened == [], opened
"""

    done = run_tool(watch)

    assert done.returncode == 0, done.stderr


@root
@in_foreign_homes
def test_status_tells_root_whose_directory_it_is(collector, home, foreign, capsys, kind):
    foreign(kind)
    before = read_tree(home)

    code = trix_telemetry.main(["status"])

    first = capsys.readouterr().out.splitlines()[0]
    wanted = "Telemetry of trix-cli is off: .* belongs to user 65534, and this is root"
    assert code == 0
    assert re.fullmatch(wanted, first)
    assert read_tree(home) == before


@root
@in_foreign_homes
@pytest.mark.parametrize("command", ["enable", "disable", "reset"])
def test_root_changes_nothing_in_a_directory_of_another_user(
    collector, home, foreign, capsys, command, kind
):
    foreign(kind)
    before = read_tree(home)

    code = trix_telemetry.main([command])

    out, err = capsys.readouterr()
    assert (code, out) == (1, "")
    assert re.fullmatch("trix-cli: error: .* belongs to user 65534, and this is root.*\n", err)
    assert read_tree(home) == before


@root
def test_a_link_to_itself_is_told_to_root(home):
    (home / ".tx3").symlink_to(home / ".tx3")

    done = run_command("reset")

    assert_error(done, f"{home}/.tx3 is a link that leads nowhere")


@root
@pytest.mark.parametrize("command", ["preview", "selftest"])
def test_preview_and_selftest_work_for_root_in_the_home_of_another_user(
    collector, home, foreign, command
):
    foreign("their-home")
    before = read_tree(home)

    done = run_command(command)

    assert done.returncode == 0
    assert read_tree(home) == before


@root
def test_root_in_a_home_of_its_own_sends(collector, config):
    config()

    track()

    assert collector.commands == ["build"]


COUNT_LOOKS = """
import os

looks = []
look = os.lstat


def count(path, **options):
    looks.append(path)
    return look(path, **options)


os.lstat = count
"""


@root
def test_the_owner_costs_no_system_call_where_the_user_is_not_root(config, collector):
    config()

    done = run_tool(f"{COUNT_LOOKS}os.geteuid = os.getpid\n{TRACK}print(len(looks))")

    assert done.stdout == "0\n"
    assert collector.commands == ["build"]


# Puts a link in the place of each temporary file, and a file in that of each link.
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


@root
def test_a_user_who_puts_links_in_the_way_of_root_gets_no_file_of_root(home, foreign):
    theirs = foreign("their-home")
    let_others_in(theirs)
    secret = home / "secret"
    secret.write_text("of root")
    secret.chmod(0o600)
    command = [sys.executable, "-c", ATTACKER, theirs / ".tx3" / "trix", secret]
    attacker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert attacker.stdout.readline() == "ready\n"

    for _ in range(10):
        run_command("disable")
        run_command("enable")

    is_running = attacker.poll() is None
    attacker.kill()
    attacker.communicate()
    assert is_running
    assert (secret.stat().st_uid, stat.S_IMODE(secret.stat().st_mode)) == (0, 0o600)
    assert secret.read_text() == "of root"


# Servers that are hostile: each speaks with one connection


def close(connection):
    """End a connection at once."""


def silence(connection):
    """Accept a connection, and never answer."""
    time.sleep(LONG)


def answer_late(connection):
    connection.recv(65536)
    time.sleep(1.4)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
    connection.recv(65536)


def reset(connection):
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def flood(connection):
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n")
    while True:
        connection.sendall(b"x" * 65536)


def drip(first, more, pause):
    """Return a function that sends `first`, and then `more` again and again."""

    def speak(connection):
        connection.recv(65536)
        connection.sendall(first)
        for _ in range(int(LONG / pause)):
            connection.sendall(more)
            time.sleep(pause)

    return speak


def say(*parts):
    """Return a function that sends these parts and closes the connection."""

    def speak(connection):
        connection.recv(65536)
        for part in parts:
            connection.sendall(part)

    return speak


# The thread: a host is unharmed, whatever the network does


HOSTS = {
    "ends-at-once": TRACK,
    "no-stdout": f"{TRACK}sys.stdout = None",
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
    "logging-without-a-handler": f"import logging\n{TRACK}",
    "a-destructor-that-tracks": """
        import builtins


        class Last:
            def __del__(self, track=trix_telemetry.track_command_execution):
                track("gone")


        last = builtins.last = sys.last = trix_telemetry.last = Last()
        trix_telemetry.track_command_execution("build")
    """,
    "a-destructor-that-imports": """
        import contextlib


        class Last:
            def __del__(self):
                with contextlib.suppress(ImportError):
                    import tomllib, json, urllib.request, ssl


        last = Last()
        trix_telemetry.track_command_execution("build")
    """,
    "a-stdout-of-its-own": f"""
class Stream:
    def flush(self):
        sys.stdout = sys.__stdout__
        raise ZeroDivisionError


{TRACK}
sys.stdout = Stream()
""",
    "an-exit-hook": f"""
import atexit

atexit.register(trix_telemetry.track_command_execution, "late")
{TRACK}
""",
}


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
    "where-the-module-is-cleared": """
class Last:
    def __init__(self, track):
        self.track = track

    def __del__(self):
        self.track("late")


sys.last = Last(trix_telemetry.track_command_execution)
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


@cases("code", HOSTS)
@cases("flags", {"plain": [], "warnings-are-errors": ["-X", "dev", "-W", "error"]})
def test_a_host_is_unharmed_and_its_point_arrives(collector, config, code, flags):
    config(EDITED_CONFIG)

    done = run_tool(code, *flags)

    assert_silent(done)
    assert collector.commands.count("build") == 1


def test_a_thread_that_outlives_the_main_one_counts(collector, config):
    config()
    # Python 3.12 starts no thread then.
    wanted = [] if sys.version_info[:2] == (3, 12) else ["build"]
    code = """
        import threading


        def work():
            threading.main_thread().join()
            trix_telemetry.track_command_execution("build")


        threading.Thread(target=work).start()
    """

    done = run_tool(code)

    assert_silent(done)
    assert collector.commands == wanted


@cases("flags", {"isolated": ["-I", "-S"], "optimized": ["-OO"]})
def test_any_way_to_run_python_counts(collector, config, flags):
    config(EDITED_CONFIG)

    done = run_tool(TRACK, *flags)

    assert_silent(done)
    assert collector.commands == ["build"]


def test_a_host_whose_threads_cannot_start_is_unharmed(collector, config):
    config()
    code = """
        import contextlib
        import threading

        with contextlib.suppress(ValueError):
            threading.stack_size(1 << 46)
        trix_telemetry.track_command_execution("build")
    """

    done = run_tool(code)

    assert_silent(done)


def test_the_output_of_a_host_is_its_own(collector, config):
    config()

    done = run_tool(f"{TRACK}print('out')\nprint('err', file=sys.stderr)\nsys.exit(5)")

    assert (done.returncode, done.stdout, done.stderr) == (5, "out\n", "err\n")


MODULES = ["threading", "json", "http.client", "hashlib", "socket", "urllib.request", "tomllib"]
MODULES += ["http", "atexit", "signal", "select", "re"]


@pytest.mark.parametrize("module", MODULES)
def test_a_python_without_a_module_is_silent(collector, config, module):
    config(EDITED_CONFIG)
    code = f"""
        sys.modules[{module!r}] = None
        thread = trix_telemetry.track_command_execution("build")
        if thread is not None:
            thread.join()
        del sys.modules[{module!r}]
    """

    done = run_tool(code)

    assert_silent(done)


@pytest.mark.parametrize("module", ["http", "tomllib"])
def test_status_names_a_module_that_is_missing(collector, config, module):
    config(EDITED_CONFIG)

    done = run_tool(f"sys.modules[{module!r}] = None\ntrix_telemetry.main(['status'])")

    first = first_line(done)
    assert first.startswith(f"Telemetry of trix-cli is off: this Python has no module {module}")


GREEN = """
import signal


def end(number, frame):
    raise SystemExit(7)


signal.signal(signal.SIGTERM, end)
trix_telemetry.track_command_execution("build").join()
assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
"""
PATCHES = {
    "gevent": ("gevent", "from gevent import monkey\nmonkey.patch_all()\n"),
    "eventlet": ("eventlet", "import eventlet\neventlet.monkey_patch()\n"),
}


@packages
@posix
@cases(("library", "patch"), PATCHES)
def test_a_host_with_green_threads_is_told_and_counted(collector, library, patch):
    pytest.importorskip(library)

    done = run_tool(patch + GREEN, "-W", "ignore")

    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.count("trix-cli") == 1
    assert collector.commands == ["build"]


@packages
@posix
@cases(("library", "patch"), PATCHES)
def test_a_host_with_green_threads_keeps_its_signals(collector, config, library, patch):
    pytest.importorskip(library)
    config()

    done = run_tool(patch + GREEN, "-W", "ignore")

    assert_silent(done)


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
    return {
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
for _ in range(1000):
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
def test_the_signals_of_a_host_are_left_to_the_host(hostile, config):
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


@posix
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_host_that_dies_of_a_broken_pipe_lives(hostile, config, scheme):
    url = hostile(close).url.replace("http", scheme)
    config(otlp_endpoint=url)

    done = run_tool(f"import signal\nsignal.signal(signal.SIGPIPE, signal.SIG_DFL)\n{TRACK}")

    assert_silent(done)


STATUS_LINE = b"HTTP/1.1 200 OK\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@cases(
    ("scheme", "speak"),
    {
        "silence": ("http", silence),
        "a-handshake-that-never-ends": ("https", silence),
        "a-header-every-300-ms": ("http", drip(STATUS_LINE, b"X-A: b\r\n", 0.3)),
        "endless-100-continue": ("http", drip(b"", CONTINUE, 0.05)),
        "a-flood-of-100-continue": ("http", drip(b"", CONTINUE * 40_000, 0.05)),
        "a-byte-of-the-status-every-100-ms": ("http", drip(b"", b"H", 0.1)),
        "a-body-that-never-comes": (
            "http",
            drip(STATUS_LINE + b"Content-Length: 5\r\n\r\n", b"", 1),
        ),
    },
)
def test_whatever_holds_the_line_the_process_ends_at_its_deadline(hostile, config, scheme, speak):
    config(otlp_endpoint=hostile(speak).url.replace("http", scheme), timeout_ms=500)

    done = run_tool(READY + TRACK, timeout=LONG / 4)

    assert_silent(done)


@cases(
    "speak",
    {
        "noise": say(random.Random(1).randbytes(4096)),
        "a-reset": reset,
        "a-close": close,
        "an-endless-header": drip(STATUS_LINE, b"x" * 65536, 0.001),
        "a-body-of-10-gb": flood,
        "a-body-that-drips": drip(STATUS_LINE + b"Content-Length: 1000\r\n\r\n", b"x", 0.2),
        "chunks-that-are-none": say(STATUS_LINE + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"),
    },
)
def test_what_fails_or_succeeds_at_once_costs_no_time(hostile, config, state, speak):
    config(otlp_endpoint=hostile(speak).url, timeout_ms=60_000)

    done = run_tool(timeout=LONG / 2)

    assert_silent(done)
    assert names(state) == ["config.toml", "fingerprint"]


LOOK_UP_NEVER_ENDS = f"""
import socket
import time


def wait(*arguments, **options):
    time.sleep({LONG})


socket.getaddrinfo = wait
"""


@cases(
    ("code", "speak", "timeout_ms"),
    {
        "silence": ("", silence, 1200),
        "a-late-answer": ("", answer_late, 2000),
        "a-look-up-that-never-ends": (LOOK_UP_NEVER_ENDS, silence, 1200),
    },
)
def test_a_wait_for_the_network_begins_a_back_off(hostile, config, state, code, speak, timeout_ms):
    server = hostile(speak)
    config(otlp_endpoint=server.url, timeout_ms=timeout_ms)

    done = run_tool(READY + code + TRACK)

    assert_silent(done)
    url, reason = (state / "backoff").read_text().splitlines()
    assert url == f"{server.url}/v1/metrics"
    assert re.fullmatch(r"a command waited [012]\.\d s for the network", reason)


@posix
def test_a_back_off_is_for_the_user_alone(hostile, config, state):
    config(otlp_endpoint=hostile(silence).url, timeout_ms=200)

    run_tool(READY + TRACK)

    assert stat.S_IMODE((state / "backoff").stat().st_mode) == 0o600


def test_a_command_that_outlasts_its_request_begins_no_back_off(hostile, config, state):
    config(otlp_endpoint=hostile(silence).url, timeout_ms=300)

    done = run_tool(f"{TRACK}import time\ntime.sleep(0.8)")

    assert_silent(done)
    assert "backoff" not in names(state)


@pytest.mark.parametrize("status", [400, 401, 404, 413, 500, 502])
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


def test_an_unknown_host_begins_no_back_off(config, state):
    config(otlp_endpoint="http://h", timeout_ms=60_000)

    done = run_tool(UNKNOWN_HOST + TRACK, timeout=LONG / 2)

    assert_silent(done)
    assert "backoff" not in names(state)


def test_a_refused_connection_begins_no_back_off(config, state):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    config(otlp_endpoint=f"http://127.0.0.1:{port}", timeout_ms=60_000)

    done = run_tool(timeout=LONG / 2)

    assert_silent(done)
    assert "backoff" not in names(state)


@cases("work", {"in-python": "pass", "without-the-lock": "pow(7, 10**5, 10**40000)"})
def test_a_delay_of_the_hosts_own_making_begins_no_back_off(collector, config, state, work):
    config(timeout_ms=1000)
    code = f"""
        import threading


        def load():
            while True:
                {work}


        threading.Thread(target=load, daemon=True).start()
        trix_telemetry.track_command_execution("build")
    """

    run_tool(code)

    assert "backoff" not in names(state)


# The session: the end of the process, forks, four at once


def test_each_process_that_ends_at_once_delivers(collector, config):
    config(timeout_ms=60_000)

    processes = []
    for _ in range(8):
        processes += [start_tool() for _ in range(4)]
        for process in processes[-4:]:
            process.communicate(timeout=LONG)

    assert [process.returncode for process in processes] == [0] * 32
    assert len(collector.requests) == 32
    assert len(collector.users) == 1


def test_output_arrives_before_the_wait(hostile, config):
    config(otlp_endpoint=hostile(silence).url, timeout_ms=60_000)
    code = f"{TRACK}print('done')\nprint('told', end='', file=sys.stderr)"

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
END_SOON = """
import contextlib
import signal


class Last:
    def __del__(self):
        with contextlib.suppress(ImportError):
            import tomllib, json, http.client, ssl, urllib.request


signal.signal(signal.SIGINT, signal.default_int_handler)
last = Last()
trix_telemetry.track_command_execution("build")
print("waiting")
sys.exit(7)
"""


@posix
@pytest.mark.parametrize("delay", [0, 0.01, 0.03, 0.3])
@cases(
    ("number", "code"),
    {"ctrl-c": (signal.SIGINT, 7), "terminate": (signal.SIGTERM, -signal.SIGTERM)},
)
def test_a_signal_ends_the_wait(hostile, config, number, code, delay):
    config(otlp_endpoint=hostile(silence).url, timeout_ms=60_000)

    process = start_tool(END_SOON)
    said = process.stdout.readline()
    time.sleep(delay)
    process.send_signal(number)
    out, err = process.communicate(timeout=LONG / 2)

    assert (said, out, err) == ("waiting\n", "", "")
    assert process.returncode == code


@posix
def test_a_long_wait_that_ctrl_c_has_ended_begins_a_back_off(hostile, config, state):
    config(otlp_endpoint=hostile(silence).url, timeout_ms=3000)
    code = f"""
import signal

signal.signal(signal.SIGALRM, signal.default_int_handler)
{TRACK}
signal.setitimer(signal.ITIMER_REAL, 2.6)
"""

    done = run_tool(code)

    assert_silent(done)
    assert (state / "backoff").exists()


# A tool with a signal handler whose exception is nobody else's.
STOP_SOON = """
import os
import signal


class Stopped(BaseException):
    pass


def stop(number, frame):
    raise Stopped


signal.signal(signal.SIGALRM, stop)
"""


@posix
def test_an_exception_of_a_signal_handler_ends_the_wait(hostile, config):
    config(otlp_endpoint=hostile(silence).url, timeout_ms=60_000)

    done = run_tool(f"{STOP_SOON}{TRACK}signal.setitimer(signal.ITIMER_REAL, 1)")

    assert_silent(done)


@posix
def test_an_exception_of_a_signal_handler_ends_the_wait_before_a_fork(collector, config):
    config(EDITED_CONFIG)
    code = """
import time


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "tomllib":
            signal.setitimer(signal.ITIMER_REAL, 0.15)
            time.sleep(0.35)


sys.meta_path.insert(0, Finder())
trix_telemetry.track_command_execution("build")
if os.fork() == 0:
    os._exit(0)
"""

    done = run_tool(STOP_SOON + code, "-W", "ignore")

    assert_silent(done)
    assert collector.commands == ["build"]


@posix
def test_a_reader_that_is_gone_changes_nothing(hostile, config):
    config(otlp_endpoint=hostile(silence).url, timeout_ms=300)
    read, write = os.pipe()
    os.close(read)

    without = run_tool("print('x' * 10)", stdout=write)
    done = run_tool(f"print('x' * 10)\n{TRACK}", stdout=write)

    os.close(write)
    assert without.returncode == 120
    assert (done.returncode, done.stderr) == (without.returncode, without.stderr)


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
@pytest.mark.parametrize("delay", [0, 0.009, 0.018, 0.027, 0.036, 0.054])
def test_a_fork_at_any_moment_leaves_a_child_that_can_import_and_track(collector, config, delay):
    config(EDITED_CONFIG.replace("2000", "60000"))
    code = f"""
import time


def work():
    import tomllib, json, urllib.request, ssl

    trix_telemetry.track_command_execution("child").join()


trix_telemetry.track_command_execution("parent")
time.sleep({delay})
fork(work)
"""

    done = run_tool(FORK + code, "-W", "ignore", timeout=LONG / 2)

    assert_silent(done)
    assert sorted(collector.commands) == ["child", "parent"]


@posix
def test_a_fork_waits_until_nothing_is_imported_any_more(hostile, config):
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

    done = run_tool(code, "-W", "ignore")

    assert done.stdout == "True\n"


@posix
def test_a_fork_beside_a_request_waits_for_nothing(hostile, config):
    config(otlp_endpoint=hostile(silence).url, timeout_ms=60_000)
    code = f"{FORK}{TRACK}fork(do_nothing)\nos._exit(3)"

    done = run_tool(code, "-W", "ignore", timeout=LONG / 2)

    assert (done.returncode, done.stderr) == (3, "")


@posix
def test_a_fork_in_an_exit_hook_holds_nothing_up(collector, config):
    config()
    code = """
        import atexit


        def fork_late():
            try:
                fork(do_nothing)
            except RuntimeError:
                # Python 3.12 and newer refuse it.
                pass


        atexit.register(fork_late)
        trix_telemetry.track_command_execution("build")
    """

    done = run_tool(FORK + textwrap.dedent(code), "-W", "ignore", timeout=LONG / 2)

    assert_silent(done)


@posix
def test_a_forked_child_has_a_session_of_its_own(hostile, config):
    config(otlp_endpoint=hostile(silence).url, timeout_ms=60_000)
    code = """
        def work():
            assert trix_telemetry.track_command_execution("child") is not None


        for _ in range(4):
            assert trix_telemetry.track_command_execution("parent") is not None
        fork(work)
        os._exit(0)
    """

    done = run_tool(FORK + textwrap.dedent(code), "-W", "ignore", timeout=LONG / 2)

    assert_silent(done)


BECOME_DAEMON = """
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


@posix
@pytest.mark.parametrize("delay", [0, 0.01, 0.03, 0.06, 0.3])
def test_a_daemon_holds_no_later_command_up(collector, config, home, delay):
    config(EDITED_CONFIG.replace("2000", "60000"))
    (home / "held").touch()

    done = run_tool(BECOME_DAEMON.format(delay=delay), "-W", "ignore", cwd=home)
    later = run_tool("trix_telemetry.track_command_execution('next')", timeout=LONG / 2)
    (home / "held").unlink()

    assert_silent(done)
    assert_silent(later)
    assert "next" in collector.commands


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


def test_a_module_that_python_breaks_in_two_threads_is_imported_before_the_thread(config):
    config()
    is_broken = sys.version_info[:3] == (3, 13, 0)
    code = f"""
{TRACK}
is_imported = "collections.abc" in sys.modules
assert is_imported or not {is_broken}
"""

    done = run_tool(code, env={ENDPOINT: "http://127.0.0.1:1"})

    assert_silent(done)


def test_a_start_that_is_interrupted_leaves_nothing_under_way(collector, config):
    config(timeout_ms=60_000)
    code = """
        import contextlib
        import threading


        def interrupt(thread):
            raise KeyboardInterrupt


        start = threading.Thread.start
        threading.Thread.start = interrupt
        for _ in range(4):
            with contextlib.suppress(KeyboardInterrupt):
                trix_telemetry.track_command_execution("interrupted")
        threading.Thread.start = start
        trix_telemetry.track_command_execution("build")
    """

    done = run_tool(code, timeout=LONG / 2)

    assert_silent(done)
    assert collector.commands == ["build"]


def test_four_deliveries_are_under_way_at_most(hostile, config):
    server = hostile(silence)
    config(otlp_endpoint=server.url, timeout_ms=1000)

    threads = [trix_telemetry.track_command_execution("build") for _ in range(10)]

    assert [thread is not None for thread in threads] == [True] * 4 + [False] * 6
    for thread in threads[:4]:
        thread.join(LONG)
    assert server.accepted == 4


# What a tool calls: copies beside each other, a zipapp


def test_two_copies_in_one_process_do_not_know_of_each_other(acme, home, new_collector):
    shutil.copytree(home / "lib" / "acme", home / "lib" / "other")
    other = new_collector()
    code = """
        from other._vendor import usage

        usage.initialize_telemetry(service_name="other", service_version="3", endpoint=sys.argv[3])
        usage.track_command_execution("test")
    """
    program = script(VENDORED + textwrap.dedent(code), "acme", acme.library)

    run([sys.executable, "-c", program, acme.collector.url, "{}", other.url])

    (of_acme,) = acme.collector.points
    (of_other,) = other.points
    assert (of_acme.command, of_acme.resource["service.name"]) == ("build", "acme")
    assert (of_other.command, of_other.resource["service.name"]) == ("test", "other")
    assert acme.collector.users.isdisjoint(other.users)


@pytest.fixture
def zipapp(acme, home):
    """An archive of acme, which counts build and has the command line behind its arguments."""
    main = f"""
import sys

sys.argv[1:1] = [{acme.collector.url!r}, "{{}}"]
{VENDORED}
if sys.argv[3:]:
    sys.exit(usage.main(sys.argv[3:]))
"""
    archive = home / "acme.pyz"
    with zipfile.ZipFile(archive, "w") as file:
        for path in acme.library.rglob("*.py"):
            file.write(path, path.relative_to(acme.library))
        file.writestr("__main__.py", main)
    return archive


def test_a_zipapp_counts(zipapp, acme):
    done = run([sys.executable, zipapp])

    assert (done.returncode, done.stdout) == (0, "")
    assert acme.collector.commands == ["build"]


def test_a_zipapp_has_its_selftest(zipapp, acme):
    done = run([sys.executable, zipapp, "selftest"])

    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(" ms: HTTP 200\n")


# The command line


@pytest.fixture
def command(capsys):
    """Runs the command line in this process."""

    def run_here(*arguments):
        code = trix_telemetry.main(list(arguments))
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, out, err)

    return run_here


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


def test_status_shows_a_fingerprint(collector, config, state, command):
    config()
    (state / "fingerprint").write_text(FINGERPRINT)

    done = command("status")

    assert f"  Fingerprint  {FINGERPRINT}\n" in done.stdout


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
    config(OFF)

    facts = json.loads(command("status", "--json").stdout)

    assert facts["enabled"] is False
    assert facts["reason"] == "config.toml says enabled = false"
    assert facts["encrypted"] is False


def test_status_as_json_exits_1_for_an_invalid_setting(collector, config, command):
    config("[telemetry]\nenabled = 1\n")

    done = command("status", "--json")

    assert done.returncode == 1
    assert json.loads(done.stdout)["reason"] == "telemetry.enabled must be true or false"


EDITS = {
    "dotted": "telemetry.enabled = true\n",
    "inline": "telemetry = { enabled = true }\n",
    "quoted-key": '[telemetry]\n"enabled" = true\n',
    "quoted-table": '["telemetry"]\nenabled = true\n',
    "escaped": '["telemetry"]\n"\\u0065nabled" = true\n',
    "also-within-a-text": '[telemetry]\nnote = """\nenabled = true\n"""\nenabled = true\n',
    "a-header-within-a-text": "s = '''\n[telemetry]\n'''\n[telemetry]\nenabled = true # so\n",
    "byte-order-mark": "\ufeff[telemetry]\nenabled = true\n",
    "plain": ON,
    "no-line-break-at-the-end": "[telemetry]\nenabled = true",
    "dos-lines": "[telemetry]\r\n  enabled=true# yes\r\ntimeout_ms = 5\r\n",
    "spaces-and-tabs": "[ telemetry ] # x\nenabled\t=\ttrue\n",
    "between-tables": f"[other]\nenabled = true\n{ON}[third]\nenabled = true\n",
    "after-a-table-below": "[telemetry.more]\na = 'b'\n" + ON,
    "after-a-comment": "[telemetry]\n# enabled = false\nenabled = true\n",
    "after-lists": "[[list]]\nenabled = true\n[[list]]\nenabled = true\n" + ON,
    "before-a-similar-key": f"{ON}not_enabled = true\n",
    "odd-values": "y = inf\nz = 1979-05-27\n" + ON,
    "3000-tables": "".join(f"[t{n}]\nenabled = true\n" for n in range(3000)) + ON,
}


@cases("text", EDITS)
def test_disable_changes_the_one_value(config, command, text):
    path = config(text)

    done = command("disable")

    edited = path.read_bytes().decode()
    assert done.returncode == 0
    assert len(edited) == len(text) + 1
    assert tomllib.loads(edited.lstrip("\ufeff"))["telemetry"]["enabled"] is False


@cases("text", EDITS)
def test_enable_gives_the_first_bytes_back(config, command, text):
    path = config(text)
    command("disable")

    done = command("enable")

    assert done.returncode == 0
    assert path.read_bytes().decode() == text


HEADERS_ALONE = "[telemetry.otlp_headers]\nA = 'b'\n"
ADDITIONS = {
    "empty": ("", "\n[telemetry]\nenabled = false\n"),
    "no-line-break-at-the-end": ("a = 1", "a = 1\n\n[telemetry]\nenabled = false\n"),
    "dos-lines": ("# x\r\n", "# x\r\n\r\n[telemetry]\r\nenabled = false\r\n"),
    "a-header-alone": ("[telemetry]", "[telemetry]\nenabled = false\n"),
    "a-typo": (
        "[telemetry] # x\nenable = 1\n",
        "[telemetry] # x\nenabled = false\nenable = 1\n",
    ),
    "a-table-below": (HEADERS_ALONE, f"{HEADERS_ALONE}\n[telemetry]\nenabled = false\n"),
}


@cases(("text", "after"), ADDITIONS)
def test_disable_adds_the_key_where_it_is_missing(config, command, text, after):
    path = config(text)

    done = command("disable")

    assert done.returncode == 0
    assert path.read_bytes().decode() == after


@cases(("text", "after"), ADDITIONS)
def test_enable_adds_the_key_where_it_is_missing(config, command, text, after):
    path = config(text)

    done = command("enable")

    assert done.returncode == 0
    assert path.read_bytes().decode() == after.replace("false", "true")


@cases(
    "text",
    {
        "an-inline-table-without-it": "telemetry = { timeout_ms = 5 }\n",
        "a-dotted-key-without-it": "telemetry.timeout_ms = 5\n",
    },
)
def test_what_is_too_unusual_is_refused_with_what_to_write(config, command, text):
    path = config(text)

    done = command("disable")

    assert_error(done, ".* write enabled = false for telemetry by hand; nothing was changed")
    assert path.read_text() == text


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


@pytest.mark.parametrize("seed", range(20))
def test_a_generated_document_is_edited_exactly_or_refused(config, command, seed):
    dice = random.Random(seed)

    for _ in range(25):
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


# With another key out of range, the value is there to be switched.
DAMAGED_ELSEWHERE = {
    name: case
    for name, case in BAD_CONFIGS.items()
    if name.startswith(("timeout", "endpoint", "header"))
}
DAMAGED = {name: case for name, case in BAD_CONFIGS.items() if name not in DAMAGED_ELSEWHERE}


@cases(("text", "says"), DAMAGED)
def test_disable_says_that_a_damaged_config_is_off_already(config, command, text, says):
    path = config(text)
    before = path.read_bytes()

    done = command("disable")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Telemetry is off already, but {path} needs mending: {says}")
    assert path.read_bytes() == before


@cases(("text", "says"), DAMAGED)
def test_enable_refuses_a_damaged_config(config, command, text, says):
    path = config(text)
    before = path.read_bytes()

    done = command("enable")

    assert_error(done, f"{re.escape(str(path))}: {says}.*; nothing was changed")
    assert path.read_bytes() == before
    assert names(path.parent) == ["config.toml"]


@cases(("text", "says"), DAMAGED_ELSEWHERE)
def test_disable_writes_false_where_another_key_is_damaged(config, command, text, says):
    path = config(text)

    done = command("disable")

    assert (done.returncode, done.stderr) == (0, "")
    assert path.read_text() == text.replace("enabled = true", "enabled = false")


@cases(("text", "says"), DAMAGED_ELSEWHERE)
def test_enable_says_what_keeps_it_off(config, command, text, says):
    path = config(text.replace("enabled = true", "enabled = false"))

    done = command("enable")

    assert done.returncode == 0
    assert f"It stays off: {says}" in done.stdout
    assert path.read_text() == text


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


def test_after_enable_there_is_no_notice(collector, command, capsys):
    command("enable")

    track()

    assert capsys.readouterr() == ("", "")
    assert collector.commands == ["build"]


@posix
@pytest.mark.parametrize("umask", [0o022, 0o777])
def test_an_edit_keeps_the_mode_under_any_umask(config, umask):
    path = config()
    path.chmod(0o644)

    run_tool(f"import os\nos.umask({umask})\ntrix_telemetry.main(['disable'])")

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
@pytest.mark.parametrize("name", ["enable", "disable"])
def test_a_link_that_leads_nowhere_is_not_edited(home, state, command, name):
    state.mkdir(parents=True)
    link = state / "config.toml"
    link.symlink_to(home / "nowhere")

    done = command(name)

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
    config()
    reader = start_tool(READ_OFTEN, cwd=state)

    codes = [command(name).returncode for name in ["disable", "enable"] * 10]
    (state / "stop").touch()
    out, err = reader.communicate(timeout=LONG)

    assert codes == [0] * 20
    assert (reader.returncode, out, err) == (0, "", "")


def test_preview_shows_what_is_sent(collector, config, state, command):
    config(f'{ON}[telemetry.otlp_headers]\nX-Key = "secret"\n')
    (state / "fingerprint").write_text(FINGERPRINT)

    text = command("preview", "test").stdout.removeprefix("trix-cli: telemetry would send\n")
    head, _, body = text.partition("\n\n")
    track("test")

    ((line, headers, sent),) = collector.requests
    headers["X-Key"] = "(hidden)"
    assert head.splitlines() == [line, *(f"{name}: {value}" for name, value in headers.items())]
    times = r'(?<=UnixNano":")\d{19}'
    assert re.sub(times, "", body) == re.sub(times, "", sent.decode()) + "\n"


def test_preview_sends_and_makes_nothing(collector, home, command):
    done = command("preview")

    assert (done.returncode, done.stderr) == (0, "")
    assert collector.requests == []
    assert names(home) == []


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

    assert collector.paths == ["/x/v1/metrics"]


def test_track_in_a_first_run_shows_the_notice(collector, state, command):
    done = command("track", "build")

    assert done.stderr.startswith("trix-cli sends anonymous usage telemetry")
    assert names(state) == ["config.toml", "fingerprint"]


def test_track_sends_nothing_where_a_disable_has_just_been_quicker(collector):
    code = """
        write = trix_telemetry.write_file


        def write_late(path, *rest):
            trix_telemetry.write_file = write
            trix_telemetry.main(["disable"])
            write(path, *rest)


        trix_telemetry.write_file = write_late
        trix_telemetry.main(["track", "build"])
    """

    done = run_tool(code)

    assert done.stdout.endswith("\nNot sent. Telemetry is off: config.toml says enabled = false\n")
    assert done.stderr == ""
    assert collector.requests == []


@posix
def test_track_without_a_home_is_off(collector):
    done = run_command("track", "build", env={"HOME": "here"})

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "Not sent. Telemetry is off: the home directory is not known\n"


def test_track_in_a_first_run_without_stderr_sends_nothing(collector, state):
    done = run_tool("sys.stderr = None\ntrix_telemetry.main(['track', 'build'])")

    assert done.returncode == 0
    assert done.stdout == "Not sent. Telemetry is off: there is no standard error\n"
    assert names(state) == []


def test_track_sends_during_a_back_off_and_ends_it(collector, config, state, command):
    config()
    write_backoff(collector, state)

    done = command("track", "build")

    assert done.returncode == 0
    assert names(state) == ["config.toml", "fingerprint"]


def test_a_track_that_fails_has_ended_a_back_off(collector, config, state, command):
    config()
    write_backoff(collector, state)
    collector.answer = (404, {}, b"")

    done = command("track", "build")

    assert done.returncode == 1
    assert not (state / "backoff").exists()


def test_a_track_that_is_refused_for_load_begins_a_back_off(collector, config, state, command):
    config()
    collector.answer = (503, {}, b"")

    command("track", "build")

    assert "HTTP 503" in (state / "backoff").read_text()


def test_track_tells_the_answer_where_a_back_off_cannot_be_written(
    collector, config, state, command
):
    config()
    (state / "backoff").mkdir()
    collector.answer = (503, {}, b"busy")

    done = command("track", "build")

    assert_error(done, r"http://.*/v1/metrics after \d+ ms: HTTP 503: busy")


@cases(
    ("status", "body"),
    {
        "empty": (200, b""),
        "an-object": (200, b"{}"),
        "accepted": (202, b"{"),
        "no-content": (204, b""),
        "not-utf-8": (200, b"\xff\0"),
        "4000-brackets": (200, b"[" * 4000),
        "null": (200, b"null"),
        "partial-success-null": (200, b'{"partialSuccess":null}'),
        "partial-success-a-list": (200, b'{"partialSuccess":[]}'),
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


@cases(
    ("partial", "says"),
    {
        "a-reason": (
            {"rejectedDataPoints": "1", "errorMessage": "too\nold"},
            r"HTTP 200: 1 data point rejected: too\?old",
        ),
        "a-number": (
            {"rejectedDataPoints": 1, "errorMessage": "too old"},
            "HTTP 200: 1 data point rejected: too old",
        ),
        "a-long-reason": (
            {"rejectedDataPoints": "1", "errorMessage": "x" * 3000},
            "HTTP 200: 1 data point rejected: x{200}",
        ),
        "no-reason": (
            {"rejectedDataPoints": "1"},
            "HTTP 200: 1 data point rejected: no reason given",
        ),
        "very-many": ({"rejectedDataPoints": 10**300}, "HTTP 200: 10+ data point rejected: .*"),
    },
)
def test_track_tells_a_point_that_was_rejected(collector, config, command, partial, says):
    config()
    collector.answer = (200, {}, json.dumps({"partialSuccess": partial}).encode())

    done = command("track", "build")

    assert_error(done, rf"http://.*/v1/metrics after \d+ ms: {says}")


@cases(
    ("partial", "says"),
    {
        "no-number": ({"rejectedDataPoints": None, "errorMessage": "a warning"}, ": a warning"),
        "no-words": ({"rejectedDataPoints": "0", "errorMessage": None}, ""),
    },
)
def test_track_takes_null_for_what_is_missing(collector, config, command, partial, says):
    config()
    collector.answer = (200, {}, json.dumps({"partialSuccess": partial}).encode())

    done = command("track", "build")

    assert done.returncode == 0
    assert done.stdout.endswith(f" ms: HTTP 200{says}\n")


@cases(
    "body",
    {
        "an-endless-number": b'{"partialSuccess": {"rejectedDataPoints": 1e999}}',
        "nested-without-end": b'{"partialSuccess": ' + b"[" * 4000,
    },
)
def test_track_takes_a_strange_answer_for_no_partial_success(collector, config, command, body):
    config()
    collector.answer = (200, {}, body)

    done = command("track", "build")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(" ms: HTTP 200\n")


def test_track_shows_a_warning_of_the_collector(collector, config, command):
    config()
    answer = {"partialSuccess": {"rejectedDataPoints": "0", "errorMessage": "a warning"}}
    collector.answer = (200, {}, json.dumps(answer).encode())

    done = command("track", "build")

    assert done.returncode == 0
    assert done.stdout.endswith(" ms: HTTP 200: a warning\n")


def test_track_tells_the_status_and_the_words_of_the_collector(collector, config, command):
    config()
    collector.answer = (404, {}, b"no such path\x1b[2J")

    done = command("track", "build")

    assert_error(done, r"http://.*/v1/metrics after \d+ ms: HTTP 404: no such path\?\[2J")


def test_track_tells_a_redirect(collector, config, command):
    config()
    collector.answer = (308, {"Location": "https://other.example/"}, b"")

    done = command("track", "build")

    says = "HTTP 308: it redirects to https://other.example/, which is not followed"
    assert_error(done, rf"http://.* after \d+ ms: {says}")


def test_track_tells_a_web_page(collector, config, command):
    config()
    headers = {"Content-Type": "text/html; charset=utf-8"}
    collector.answer = (200, headers, b"<html>Welcome</html>")

    done = command("track", "build")

    says = r"HTTP 200, but the answer is a web page: is this the URL of a collector\?"
    assert_error(done, rf"http://.* after \d+ ms: {says}")


def test_track_tells_a_refused_connection(collector, config, command):
    config()

    done = command("track", "build", "--endpoint", "http://127.0.0.1:1")

    assert_error(done, r"http://127.0.0.1:1/v1/metrics after \d+ ms: .*refused.*")


def test_track_tells_that_time_is_up(hostile, config):
    config(timeout_ms=300)

    done = run_command("track", "build", "--endpoint", hostile(silence).url, timeout=LONG / 2)

    assert_error(done, r"http://.* after \d+ ms: timed out")


def test_track_waits_no_longer_than_its_timeout_for_a_look_up(config):
    config(otlp_endpoint="http://collector.example", timeout_ms=300)
    code = "sys.exit(trix_telemetry.main(['track', 'build']))"

    done = run_tool(LOOK_UP_NEVER_ENDS + code, timeout=LONG / 2)

    assert_error(done, r"http://collector.example/v1/metrics after \d+ ms: timed out")


# Where the tests run in the background, a shell has turned Ctrl-C off.
TRACK_WITH_CTRL_C = """
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(trix_telemetry.main(["track", "build"]))
"""


@posix
def test_ctrl_c_ends_a_track_and_begins_no_back_off(hostile, config, state):
    server = hostile(silence)
    config(otlp_endpoint=server.url, timeout_ms=60_000)
    process = start_tool(TRACK_WITH_CTRL_C)
    while server.accepted == 0 and process.poll() is None:
        time.sleep(0.01)

    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=LONG / 2)

    assert (process.returncode, out, err) == (130, "", "")
    assert not (state / "backoff").exists()


@cases(
    "arguments",
    {
        "track-a-path": ["track", "../x"],
        "track-to-ftp": ["track", "a", "--endpoint", "ftp://me:secret@h"],
        "track-to-nowhere": ["track", "a", "--endpoint", ""],
    },
)
def test_a_wrong_value_is_told_in_one_line(collector, command, arguments):
    done = command(*arguments)

    assert_error(done, ".+")
    assert "secret" not in done.stderr


@cases(
    "arguments",
    {
        "an-unknown-command": ["nonsense"],
        "a-missing-argument": ["track"],
        "an-unknown-option": ["status", "--yaml"],
        "an-argument-too-many": ["status", "a"],
    },
)
def test_a_wrong_usage_is_told_by_argparse(collector, command, arguments):
    done = command(*arguments)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: python -m trix_telemetry ")


@pytest.mark.parametrize("name", ["status", "preview", "disable", "track build", "reset"])
def test_no_command_is_ever_counted_itself(new_collector, config, command, monkeypatch, name):
    collector = new_collector()
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:1")
    config()

    command(*name.split())

    assert collector.requests == []


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


@posix
@cases("code", {"as-it-is": "", "after-output-of-the-tool": "print('of the tool')\n"})
@pytest.mark.parametrize("arguments", [["status"], ["preview"], ["--help"], ["track", "build"]])
def test_a_reader_that_is_gone_is_no_traceback(config, code, arguments):
    config()
    read, gone = os.pipe()
    os.close(read)

    done = run_tool(f"{code}sys.exit(trix_telemetry.main({arguments}))", stdout=gone)

    os.close(gone)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert "error" not in done.stderr


@posix
def test_a_full_disk_below_stdout_is_told_in_one_line(collector):
    with open("/dev/full", "w") as full:
        done = run_command("status", stdout=full)

    assert done.returncode == 1
    assert re.fullmatch("trix-cli: error: .*No space left on device\n", done.stderr)


@posix
def test_the_stdout_of_a_host_is_kept(collector):
    code = """
        sys.stdout = open("/dev/full", "w")
        trix_telemetry.main([])
        sys.stdout = sys.__stdout__
        print("kept")
    """

    done = run_tool(code)

    assert done.stdout == "kept\n"


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
@cases("redirect", CLOSED)
@pytest.mark.parametrize("arguments", ["status", "disable", "--help", "track build", "nonsense"])
def test_closed_streams_are_no_traceback(config, redirect, arguments):
    config()

    done = run_with_closed(redirect, sys.executable, MODULE, *arguments.split())

    assert done.returncode == (2 if arguments == "nonsense" else 0)
    assert "Traceback" not in done.stderr
    assert "error:" not in done.stdout


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp437"])
def test_what_the_encoding_of_stdout_lacks_is_escaped(encoding):
    code = """
        trix_telemetry.initialize_telemetry(
            service_name="\\u0416", service_version="1", endpoint="http://127.0.0.1:9"
        )
        trix_telemetry.main(["status"])
        print(sys.stdout.errors)
    """

    done = run_tool(code, "-X", "utf8=0", env={"PYTHONIOENCODING": encoding})

    assert first_line(done) == "Telemetry of \\u0416 is on"
    assert done.stdout.splitlines()[-1] == "strict"


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


@cases("flags", {"plain": [], "isolated": ["-I", "-S"], "optimized": ["-OO"]})
def test_selftest_passes_where_everything_speaks_against_it(home, flags):
    home.chmod(0o555)

    done = run([sys.executable, *flags, MODULE, "selftest"], env=AGAINST, cwd=home)

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


@cases("load", LOADERS)
def test_a_copy_in_memory_has_its_selftest(home, load):
    assert_selftest_passed(run_loaded(load, "sys.exit(module.main(['selftest']))"))


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
    broken = SOURCE.replace('"asInt": "1"', '"asInt": 1 / 0')
    (home / "broken.py").write_text(broken, encoding="utf-8")

    done = run([sys.executable, home / "broken.py", "selftest"])

    assert (done.returncode, done.stdout) == (1, "")
    assert re.search(r"\ntrix-cli: error: http.+: ZeroDivisionError\n$", done.stderr)


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


@pytest.mark.parametrize(
    "language", ["sh", "yaml", "sql", "python", "promql", "toml", "http", "text"]
)
def test_no_line_of_a_block_is_longer_than_a_screen(language):
    shown = blocks(language)

    longest = max(len(line) for block in shown for line in block.splitlines())
    assert longest <= 100


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(#([^)]+)\)", README))))
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
        pytest.param(["disable"], id="disable"),
    ],
)
def test_a_program_says_nothing_of_trix(readme, home, program, arguments):
    done = readme(program, "telemetry", *arguments)

    assert (done.returncode, done.stderr) == (0, "")
    said = done.stdout.replace("User-Agent: trix-telemetry/4.0.0", "").replace(str(home), "")
    assert "trix" not in said.lower()
    assert not (home / ".tx3").exists()


@programs
def test_a_program_whose_telemetry_is_disabled_is_silent(readme, collector, program):
    readme(program, "telemetry", "disable")

    done = readme(program, "build")

    assert_silent(done)
    assert collector.requests == []


def test_the_keys_of_the_status_are_named():
    done = run_command("status", "--json")

    for key in json.loads(done.stdout):
        assert f"`{key}`" in README


FINGERPRINT_OF_README = "a1b2c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c6d7e8f90"


def test_the_request_is_shown_to_the_byte(readme, home):
    head, _, pretty = blocks("http")[0].partition("\n\n")
    body = json.dumps(json.loads(pretty), separators=(",", ":"))
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


def test_the_config_is_valid(home):
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
