"""A hook of mkdocs (mkdocs.yml): each notebook of docs/ is also a page, with the outputs that it holds."""

from __future__ import annotations

import base64
import json
from pathlib import PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put a page and its pictures beside every notebook, which stays to be downloaded."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        place = PurePosixPath(notebook.src_uri)
        text, pictures = page(notebook.content_string, place.stem)
        files.append(File.generated(config, str(place.with_suffix(".md")), content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, str(place.with_name(name)), content=content))
    return files


def page(notebook: str, stem: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and the pictures in it by the name of their file."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(notebook)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            parts.append(_shown(output, f"{stem}-{len(pictures) + 1}.png", pictures))
    return "\n\n".join(parts) + "\n", pictures


def _shown(output: dict[str, Any], name: str, pictures: dict[str, bytes]) -> str:
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text']).rstrip()}\n```"
    pictures[name] = base64.b64decode(output["data"]["image/png"])
    return f"![The figure that the cell above draws]({name})"
