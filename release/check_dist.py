"""Does what `python -m build` left in dist/ work where the repository is not?

For each Python given, the wheel goes into a fresh environment in a temporary folder; there the
package answers a prompt and serves a chat request.  The sdist has to give the same wheel again.

    python release/check_dist.py dist --torch "torch==2.13.0" python3.11 python3.12
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import urllib.request
import zipfile
from pathlib import Path

MOST_BYTES = 10 * 1000**2
#: What cannot be missed from a wheel, beside what the source has.
NEEDED = (
    "pyramidinfer/assets/demo-model/model.safetensors",
    "pyramidinfer/assets/page/page.html",
    "pyramidinfer/native/kernels.cpp",
    "pyramidinfer/native/simd.h",
    "pyramidinfer/py.typed",
)
SOURCE = Path(__file__).resolve().parents[1] / "src"
QUESTION = "The harp of Ada Holt is in room 472 . Where is the harp of Ada Holt ?"
PROMPT = f"<user> {QUESTION} <end> <assistant>"
START_SECONDS = 300


def names(wheel: Path) -> set[str]:
    """Files of the package in a wheel; metadata is left out."""
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def check_files(wheel: Path, sdist: Path) -> None:
    for file in (wheel, sdist):
        print(f"{file.name}: {file.stat().st_size / 1000**2:.1f} MB", flush=True)
        assert file.stat().st_size < MOST_BYTES, f"{file.name} is above {MOST_BYTES} bytes"
    inside = names(wheel)
    source = {
        str(path.relative_to(SOURCE))
        for path in (SOURCE / "pyramidinfer").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert set(NEEDED) <= inside, sorted(set(NEEDED) - inside)
    assert inside == source, f"wheel and source differ: {sorted(inside ^ source)}"
    assert any(name.endswith("/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


class Place:
    """A fresh environment outside the repository, and commands in it."""

    def __init__(self, python: str, folder: Path) -> None:
        self.folder = folder
        own = ("PYTHON", "PYRAMIDINFER_", "VIRTUAL_ENV")
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(own)},
            "PYRAMIDINFER_CACHE": str(folder / "cache"),
        }
        subprocess.run([python, "-m", "venv", folder / "env"], check=True, env=self.environment)
        self.bin = folder / "env" / "bin"

    def command(self, *words: str | Path) -> list[str]:
        program, *rest = map(str, words)
        return [str(self.bin / program), *rest]

    def run(self, *words: str | Path) -> str:
        """Standard output; what is said on standard error is shown, and a failure ends it all."""
        done = subprocess.run(
            self.command(*words),
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{shlex.join(map(str, words))} failed:\n{done.stdout}")
        return done.stdout

    def install(self, wheel: Path, torch: str) -> None:
        """Torch first, so that nothing pulls in another build of it."""
        pip = ("python", "-m", "pip", "install", "-q", "--disable-pip-version-check")
        self.run(*pip, *shlex.split(torch))
        self.run(*pip, f"{wheel}[server]")


def check_sdist(place: Place, sdist: Path, wheel: Path) -> None:
    made = place.folder / "made"
    place.run("python", "-m", "pip", "wheel", "-q", "--no-deps", "-w", made, sdist)
    (again,) = made.glob("*.whl")
    assert again.name == wheel.name and names(again) == names(wheel)


def check_package(place: Place, wheel: Path) -> None:
    version = wheel.name.split("-")[1]
    code = "import pyramidinfer as p; print(p.__version__, p.__file__)"
    told, file = place.run("python", "-c", code).split()
    assert told == version and Path(file).is_relative_to(place.folder), (told, file)
    assert version in place.run("pyramidinfer", "--version")
    found = json.loads(place.run("pyramidinfer", "doctor", "--json"))
    print(f"  Python {found['versions']['python']}, kernels: {found['kernels']}", flush=True)
    asked = ("--prompt", PROMPT, "--max-tokens", "12", "--temperature", "0")
    answer = place.run("pyramidinfer", "generate", "--kv-memory", "64MiB", *asked)
    assert "room 472" in answer, answer


def check_server(place: Place) -> None:
    words = place.command("pyramidinfer", "serve", "--port", "0", "--kv-memory", "64MiB")
    with subprocess.Popen(
        words, cwd=place.folder, env=place.environment, stderr=subprocess.PIPE, text=True
    ) as server:
        slow = threading.Timer(START_SECONDS, server.kill)
        slow.start()
        try:
            assert server.stderr is not None
            told = []
            for line in server.stderr:
                told.append(line)
                if " serves " in line:
                    break
            else:
                raise SystemExit(f"the server ended:\n{''.join(told)}")
            body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 12}
            request = urllib.request.Request(
                f"{told[-1].split()[-1]}/v1/chat/completions",
                json.dumps({**body, "temperature": 0}).encode(),
                {"Content-Type": "application/json"},
            )
            direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with direct.open(request, timeout=START_SECONDS) as reply:
                answer = json.load(reply)["choices"][0]["message"]["content"]
        finally:
            slow.cancel()
            server.terminate()
        server.communicate(timeout=60)
    assert server.returncode == 0, server.returncode
    assert "room 472" in answer, answer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dist", type=Path, help="folder with one wheel and one sdist")
    parser.add_argument("pythons", nargs="*", default=[sys.executable], help="interpreters to try")
    parser.add_argument("--torch", default="torch", help="what pip installs first")
    options = parser.parse_args()
    (wheel,), (sdist,) = (
        [path.resolve() for path in options.dist.glob(pattern)] for pattern in ("*.whl", "*.tar.gz")
    )
    check_files(wheel, sdist)
    for number, python in enumerate(options.pythons):
        with tempfile.TemporaryDirectory(prefix="pyramidinfer-") as folder:
            print(f"{python}: installing", flush=True)
            place = Place(python, Path(folder).resolve())
            if number == 0:
                check_sdist(place, sdist, wheel)
            place.install(wheel, options.torch)
            check_package(place, wheel)
            check_server(place)
            print(f"{python}: installed, answered and served", flush=True)


if __name__ == "__main__":
    main()
