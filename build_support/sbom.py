"""The bill of materials of a wheel: CycloneDX, in .dist-info/sboms as PEP 770 has it.

What is compiled into the libraries from elsewhere is a component: headers of torch and pybind11,
and in CUDA builds NVIDIA's static runtime. What is loaded at run time (torch, libgomp, libstdc++)
is not in the wheel, and its metadata says what it depends on.
"""

from __future__ import annotations

import json
import re
import subprocess
import uuid
from pathlib import Path
from typing import Any

from build_support.cuda import CudaToolkit
from build_support.torches import Torch

FILE = "rnnkernels.cdx.json"


def describe(version: str, torches: tuple[Torch, ...], toolkit: CudaToolkit | None) -> str:
    """The document's text: the same for the same contents, so that wheels can be compared.

    Args:
        version: of rnnkernels.
        torches: those that the wheel has a binding for; none in a wheel without compiled part.
        toolkit: where it has CUDA kernels.
    """
    parts = []
    for torch in torches:
        purl = f"pkg:pypi/torch@{torch.version.replace('+', '%2B')}"
        parts.append(_component("torch", torch.version, "BSD-3-Clause", purl, "headers"))
    for pybind in sorted({pybind11(torch) for torch in torches}):
        purl = f"pkg:pypi/pybind11@{pybind}"
        parts.append(_component("pybind11", pybind, "BSD-3-Clause", purl, "headers"))
    if toolkit is not None:
        release = cuda_release(toolkit)
        part = _component("cuda-cudart-static", release, "", "", "libcudart_static.a")
        part["licenses"] = [{"license": {"name": "NVIDIA CUDA Toolkit EULA"}}]
        parts.append(part)
    purl = f"pkg:pypi/rnnkernels@{version}"
    root = _component("rnnkernels", version, "Apache-2.0", purl, "")
    content: dict[str, Any] = {
        "metadata": {"component": root},
        "components": parts,
        "dependencies": [{"ref": root["bom-ref"], "dependsOn": [p["bom-ref"] for p in parts]}],
    }
    name = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(content, sort_keys=True))
    head = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{name}",
        "version": 1,
    }
    return json.dumps({**head, **content}, indent=1) + "\n"


def _component(name: str, version: str, license: str, purl: str, how: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "type": "library",
        "bom-ref": f"{name}@{version}",
        "name": name,
        "version": version,
    }
    if how:
        found["description"] = f"compiled or linked into the wheel: {how}"
    if license:
        found["licenses"] = [{"license": {"id": license}}]
    if purl:
        found["purl"] = purl
    return found


def pybind11(torch: Torch) -> str:
    """The version of the headers that come with a torch."""
    header = torch.folder / "include/pybind11/detail/common.h"
    text = header.read_text(encoding="utf-8") if header.exists() else ""
    found = dict(re.findall(r"#define PYBIND11_VERSION_([A-Z]+) +(\w+)", text))
    last = "MICRO" if "MICRO" in found else "PATCH"  # the latter alone before version 3
    return ".".join(found[part] for part in ("MAJOR", "MINOR", last)) if found else "unknown"


def cuda_release(toolkit: CudaToolkit) -> str:
    """The version that nvcc gives, which its runtime shares."""
    done = subprocess.run([toolkit.nvcc, "--version"], capture_output=True, text=True)
    found = re.search(r"release [\d.]+, V([\d.]+)", done.stdout)
    return found[1] if found else "unknown"


def write(folder: Path, text: str) -> Path:
    """Puts it into a .dist-info folder."""
    path = folder / "sboms" / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
