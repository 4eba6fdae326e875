"""What deploy/ says agrees with the command line, the routes and itself."""

from __future__ import annotations

import configparser
import fnmatch
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.routing import Route

import pyramidinfer
from pyramidinfer.server.app import build_app
from pyramidinfer.server.gate import OPEN
from pyramidinfer.server.settings import ServerSettings
from tests.serve_lines import code_lines, parsed
from tests.server.live import tiny_llm

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file())
VERSION = pyramidinfer.__version__
IMAGES = ["Dockerfile.cpu", "Dockerfile.cuda"]
#: Seconds a server takes beyond its drain timeout, at most (uvicorn closes connections for 5).
CLOSING = 6


class Image:
    """A Dockerfile's instructions, each with its text; the stage that is shipped is the last."""

    def __init__(self, name: str) -> None:
        text = re.sub(r"^#.*\n", "", (DEPLOY / name).read_text(), flags=re.MULTILINE)
        lines = text.replace("\\\n", " ").splitlines()
        self.steps = [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]
        starts = [at for at, (word, _) in enumerate(self.steps) if word == "FROM"]
        self.shipped = self.steps[starts[-1] :]

    def all(self, word: str) -> list[str]:
        return [text for each, text in self.steps if each == word]

    def last(self, word: str) -> str:
        return [text for each, text in self.shipped if each == word][-1]

    @property
    def entry(self) -> list[str]:
        """The server's words, without what runs it."""
        words: list[str] = json.loads(self.last("ENTRYPOINT"))
        assert words[:3] == ["tini", "--", "pyramidinfer"]
        return words[3:]

    @property
    def variables(self) -> dict[str, str]:
        return dict(word.split("=", 1) for word in shlex.split(self.last("ENV")))


@pytest.fixture(scope="module")
def routes() -> set[str]:
    """Paths that answer a GET."""
    app = build_app(tiny_llm(), ServerSettings())
    pages = [each for each in app.routes if isinstance(each, Route)]
    return {each.path for each in pages if "GET" in (each.methods or ())}


def all_paths(value: Any) -> set[str]:
    return set(re.findall(r"http://127\.0\.0\.1:8000(/\w+)", str(value)))


# --- images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IMAGES)
def test_images_copy_what_there_is(name: str) -> None:
    """And nothing of it is kept from them by .dockerignore."""
    image = Image(name)
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = [rule[1:] for rule in rules if rule.startswith("!")]
    assert "*" in rules
    copied = [text.split() for text in image.all("COPY") if "--from" not in text]
    assert copied
    for *sources, _ in copied:
        for source in sources:
            assert (ROOT / source).exists() and source in let_in
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for needed in (project["readme"], *project["license-files"]):
        assert any(needed in sources for *sources, _ in copied)
    kept_out = [rule for rule in rules if rule.startswith("**/")]
    assert any(fnmatch.fnmatch("src/pyramidinfer/__pycache__", rule[1:]) for rule in kept_out)
    for extras in re.findall(r"/source\[([\w,]+)\]", " ".join(image.all("RUN"))):
        assert set(extras.split(",")) <= project["optional-dependencies"].keys()


@pytest.mark.parametrize("name", IMAGES)
def test_images_are_pinned_and_run_as_nobody_special(name: str) -> None:
    image = Image(name)
    for base in image.all("FROM"):
        tag = base.split()[0].partition(":")[2]
        assert tag and "latest" not in tag
    (torch,) = image.all("ARG")
    (pinned,) = re.findall(r"^TORCH := (torch==\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert pinned in torch
    user, _, group = image.last("USER").partition(":")
    assert user.isdecimal() and group.isdecimal() and int(user) > 0
    assert f"--uid {user} " in " ".join(text for _, text in image.shipped)
    made = " ".join(text for word, text in image.shipped if word == "RUN")
    assert "tini" in made
    assert image.last("STOPSIGNAL") == "SIGTERM"


def test_the_cpu_image_has_kernels_and_no_compiler() -> None:
    """They lie outside of the volume, which may begin empty, and are of the image's sources."""
    image = Image("Dockerfile.cpu")
    (made,) = [text for text in image.all("RUN") if "pyramidinfer.native.ship" in text]
    folder = image.variables["PYRAMIDINFER_KERNELS"]
    assert made.split()[-3:] == ["-m", "pyramidinfer.native.ship", folder]
    (copied,) = [text.split() for text in image.all("COPY") if "--from" in text]
    assert Path(folder).is_relative_to(copied[-1])
    assert not Path(folder).is_relative_to(image.last("VOLUME"))
    runs = {word: " ".join(text for each, text in image.steps if each == word) for word in ("RUN",)}
    shipped = " ".join(text for word, text in image.shipped if word == "RUN")
    assert "g++" in runs["RUN"] and "g++" not in shipped and "libgomp1" in shipped


def test_the_gpu_image_keeps_a_compiler() -> None:
    """Triton compiles a launcher for each kernel."""
    image = Image("Dockerfile.cuda")
    assert "g++" in " ".join(text for word, text in image.shipped if word == "RUN")


@pytest.mark.parametrize("name", IMAGES)
def test_images_write_to_one_volume(name: str) -> None:
    image = Image(name)
    (volume,) = image.all("VOLUME")
    variables = image.variables
    for each in ("HOME", "TMPDIR", "PYRAMIDINFER_CACHE", "HF_HOME"):
        assert Path(variables[each]).is_relative_to(volume)


@pytest.mark.parametrize("name", IMAGES)
def test_images_serve_and_are_probed_on_one_port(name: str, routes: set[str]) -> None:
    image = Image(name)
    options = parsed(image.entry)
    assert (options["host"], options["port"]) == ("0.0.0.0", int(image.last("EXPOSE")))
    probe = image.last("HEALTHCHECK")
    assert f"127.0.0.1:{options['port']}/" in probe
    assert all_paths(probe) and all_paths(probe) <= routes & OPEN


def test_only_the_cuda_image_asks_for_a_gpu() -> None:
    assert parsed(Image("Dockerfile.cpu").entry)["device"] == "auto"
    assert parsed(Image("Dockerfile.cuda").entry)["device"] == "cuda"
    assert "whl/cpu" in Image("Dockerfile.cpu").all("ARG")[0]
    assert "whl/cpu" not in Image("Dockerfile.cuda").all("ARG")[0]


# --- systemd --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unit() -> configparser.ConfigParser:
    made = configparser.ConfigParser(strict=False, interpolation=None)
    made.optionxform = str  # type: ignore[assignment, method-assign]
    text = (DEPLOY / "pyramidinfer.service").read_text().replace("\\\n", " ")
    made.read_string(text)
    return made


def test_the_unit_starts_the_server(unit: configparser.ConfigParser) -> None:
    program, *words = shlex.split(unit["Service"]["ExecStart"])
    assert Path(program).is_absolute() and Path(program).name == "pyramidinfer"
    options = parsed(words)
    assert words[0] == "serve" and options["host"] == "127.0.0.1"
    credential = unit["Service"]["LoadCredential"].partition(":")[0]
    assert str(options["api_key_file"]) == f"%d/{credential}"
    assert int(unit["Service"]["TimeoutStopSec"]) > options["drain_timeout"] + CLOSING


def test_the_unit_is_closed_off_as_far_as_it_can_be(unit: configparser.ConfigParser) -> None:
    service = unit["Service"]
    for name in ("DynamicUser", "NoNewPrivileges", "PrivateTmp", "ProtectKernelTunables"):
        assert service[name] == "yes"
    assert service["ProtectSystem"] == "strict"
    assert service["MemoryDenyWriteExecute"] == "no"  # torch writes machine code
    assert "ProcSubset" not in service  # the kernels' key is read off /proc/cpuinfo
    assert set(service["RestrictAddressFamilies"].split()) == {"AF_INET", "AF_INET6", "AF_UNIX"}
    assert service["Restart"] == "on-failure"


def test_the_unit_writes_to_its_cache_only(unit: configparser.ConfigParser) -> None:
    text = (DEPLOY / "pyramidinfer.service").read_text()
    assignments = " ".join(re.findall(r"^Environment=(.*)$", text, re.MULTILINE)).split()
    folder = f"%C/{unit['Service']['CacheDirectory']}"
    written = dict(each.split("=", 1) for each in assignments)
    for name in ("PYRAMIDINFER_CACHE", "HF_HOME", "HOME"):
        assert written[name].startswith(folder)


# --- Kubernetes -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    found = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    return {each["kind"]: each for each in found}


@pytest.fixture(scope="module")
def pod(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = manifest["Deployment"]["spec"]["template"]["spec"]
    return found


@pytest.fixture(scope="module")
def served(pod: dict[str, Any]) -> dict[str, Any]:
    """The options that the container's server gets: the image's and the manifest's."""
    (container,) = pod["containers"]
    assert "command" not in container  # that would replace the image's entry point
    return parsed([*Image("Dockerfile.cpu").entry, *container["args"]])


def test_labels_and_ports_agree(
    manifest: dict[str, Any], pod: dict[str, Any], served: dict[str, Any]
) -> None:
    labels = manifest["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert manifest["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert manifest["Service"]["spec"]["selector"] == labels
    (port,) = pod["containers"][0]["ports"]
    assert port["containerPort"] == served["port"]
    assert manifest["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]


def test_two_replicas_stand_behind_one_service(manifest: dict[str, Any]) -> None:
    """A client comes back to the pod that has its conversation, and one pod always stays."""
    labels = manifest["Service"]["spec"]["selector"]
    assert manifest["Deployment"]["spec"]["replicas"] == 2
    assert manifest["Service"]["spec"]["sessionAffinity"] == "ClientIP"
    budget = manifest["PodDisruptionBudget"]["spec"]
    assert budget["selector"]["matchLabels"] == labels
    assert 0 < budget["minAvailable"] < manifest["Deployment"]["spec"]["replicas"]
    rolling = manifest["Deployment"]["spec"]["strategy"]["rollingUpdate"]
    assert rolling["maxUnavailable"] == 0


def test_probes_ask_paths_that_need_no_key(pod: dict[str, Any], routes: set[str]) -> None:
    (container,) = pod["containers"]
    (port,) = container["ports"]
    expected = {"startupProbe": "/ready", "readinessProbe": "/ready", "livenessProbe": "/health"}
    for name, path in expected.items():
        asked = container[name]["httpGet"]
        assert asked == {"path": path, "port": port["name"]}
        assert path in routes and path in OPEN


def test_pods_get_time_to_drain(pod: dict[str, Any], served: dict[str, Any]) -> None:
    sleep, seconds = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep == "sleep"
    needed = served["drain_timeout"] + int(seconds) + CLOSING
    assert pod["terminationGracePeriodSeconds"] > needed


def test_the_pod_is_locked_down_and_can_write_its_cache(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    image = Image("Dockerfile.cpu")
    security = container["securityContext"]
    assert pod["securityContext"]["runAsNonRoot"] and security["readOnlyRootFilesystem"]
    assert f"{pod['securityContext']['runAsUser']}" == image.last("USER").partition(":")[0]
    assert not security["allowPrivilegeEscalation"]
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert not pod["automountServiceAccountToken"]
    mounts = {each["mountPath"]: each for each in container["volumeMounts"]}
    assert not mounts[image.last("VOLUME")].get("readOnly")
    assert {each["name"] for each in mounts.values()} == {each["name"] for each in pod["volumes"]}


def test_keys_come_from_a_secret(pod: dict[str, Any], served: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    (secret,) = [each for each in pod["volumes"] if "secret" in each]
    (mount,) = [each for each in container["volumeMounts"] if each["name"] == secret["name"]]
    file = served["api_key_file"]
    assert str(file.parent) == mount["mountPath"] and mount["readOnly"]
    text = (DEPLOY / "kubernetes.yaml").read_text()
    line = f"create secret generic {secret['secret']['secretName']} --from-file={file.name}"
    assert line in text
    assert "KEYS" not in str(container["env"])


def test_the_pods_memory_holds_the_cache_and_more(
    pod: dict[str, Any], served: dict[str, Any]
) -> None:
    resources = pod["containers"][0]["resources"]
    assert resources["requests"]["memory"] == resources["limits"]["memory"]
    units = {"Mi": 2**20, "Gi": 2**30}
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", resources["limits"]["memory"]).groups()  # type: ignore[union-attr]
    asked = re.fullmatch(r"(\d+)(Mi|Gi)B", served["kv_memory"])
    assert asked
    headroom = int(number) * units[unit] - int(asked[1]) * units[asked[2]]
    assert headroom >= 2**30


def test_the_image_is_this_version(pod: dict[str, Any]) -> None:
    assert pod["containers"][0]["image"].endswith(f"/pyramidinfer:{VERSION}")


# --- the page about it ----------------------------------------------------------------------------

README = (DEPLOY / "README.md").read_text()


def test_no_file_says_latest() -> None:
    for path in FILES:
        assert ":latest" not in path.read_text(), path.name


def test_the_pages_commands_parse() -> None:
    runs = re.findall(
        r"pyramidinfer:\d\S*((?: (?:-\S+|/models\S*)(?: \d\S*| /\S+)?)*)$",
        README,
        flags=re.MULTILINE,
    )
    assert any(runs)
    for words in runs:
        parsed([*Image("Dockerfile.cpu").entry, *shlex.split(words)])
    for words in code_lines(README):
        parsed(words)


def test_the_page_names_this_version_and_every_file() -> None:
    assert set(re.findall(r"pyramidinfer:(\d[\w.]*)", README)) == {VERSION}
    assert set(re.findall(r"pyramidinfer-(\d[\w.]*)-py3", README)) == {VERSION}
    for path in FILES:
        assert path.name == "README.md" or f"`{path.relative_to(DEPLOY)}`" in README
    for document in (README, *((DEPLOY / name).read_text() for name in IMAGES)):
        for file in re.findall(r"-f (deploy/\S+)", document):
            assert (ROOT / file).exists()
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert (DEPLOY / target).exists()
