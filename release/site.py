"""What mkdocs builds the site from beside docs/: pages that lie elsewhere, and executed notebooks.

Links are written for the repository.  Those to files outside docs/ become links to where the site
has them: other pages, the API reference for a policy's source, copies of the files in deploy/.
"""

from __future__ import annotations

import base64
import os
import posixpath
import re
import tempfile
from pathlib import Path
from typing import Any

import nbclient
import nbformat
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
#: Pages outside docs/: where they are, and where the site has them.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "deploy/README.md": "deploy/README.md",
}
#: Files that are linked to, and copied: where they are, and where the site has them.
COPIED = {
    "LICENSE": "LICENSE.txt",
    **{
        each: each
        for path in sorted((ROOT / "deploy").rglob("*"))
        if path.is_file() and path.suffix != ".md"
        for each in [path.relative_to(ROOT).as_posix()]
    },
}
CELL_SECONDS = 1800  # against a cell that hangs; they take seconds
LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    os.environ["PYTHONPATH"] = str(ROOT / "src")  # of the notebooks' kernels
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text()))
    for source, target in COPIED.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        page, images = executed(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page))
        for name, content in images.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    there = page.file.src_uri
    source = next((old for old, new in PAGES.items() if new == there), f"docs/{there}")

    def moved(found: re.Match[str]) -> str:
        before, target, anchor, after = found.groups(default="")
        if ":" in target:
            return found[0]
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        place = in_site(wanted)
        if place is None:
            return found[0]
        path, _, own = place.partition("#")
        relative = posixpath.relpath(path, posixpath.dirname(there) or ".")
        return f"{before}{relative}{f'#{own}' if own else anchor}{after}"

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(moved, part) for part in parts)


def in_site(path: str) -> str | None:
    """Where the site has what the repository has at ``path``; None where it has not."""
    if path in PAGES or path in COPIED:
        return PAGES.get(path) or COPIED[path]
    if path.startswith("docs/"):
        return re.sub(r"^docs/(notebooks/\w+)\.ipynb$", r"docs/\1.md", path)[len("docs/") :]
    if method := re.fullmatch(r"src/pyramidinfer/policies/(\w+)\.py", path):
        return f"reference/policies.md#pyramidinfer.policies.{method[1]}"
    return None


def executed(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook, run in an empty folder, as a page; and its pictures by name."""
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as folder:
        nbclient.NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
        ).execute()
    parts, images = [], {}
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}_{number}.png"
                images[name] = base64.b64decode(data["image/png"])
                parts.append(f"![What the cell above draws]({name})")
            elif text := data.get("text/plain") or (output.get("name") == "stdout" and output.text):
                parts.append(f'```text title="Output"\n{text.rstrip()}\n```')
    parts.insert(1, f"*[This page as a notebook]({path.name}){{ download }}*")
    return "\n\n".join(parts) + "\n", images
