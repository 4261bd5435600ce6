"""`make notebooks`: execute every notebook from the top, each in a kernel of this Python, and fail on the first error.

With `--write` the outputs are kept in the files, without times, versions or paths of the machine. With `--quick` the
cell tagged `parameters` becomes `QUICK = True`.
"""

import argparse
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

import attnlab

PARAMETERS = "QUICK = False"
ROOT = pathlib.Path(attnlab.__file__).resolve().parent.parent


class ThisPython(KernelSpecManager):
    """One kernel, this interpreter's: whatever kernels are installed for the user or the machine."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        command = [sys.executable, "-m", "ipykernel_launcher", "--log-level=ERROR", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")


def execute(path: pathlib.Path, *, quick: bool = False, timeout: int = 600) -> Any:
    """The notebook at `path` with new outputs; the file stays as it is. `timeout` is in seconds, per cell.

    Raises nbclient's CellExecutionError, with the cell and its traceback, and ValueError under `quick` for a notebook
    without a cell tagged `parameters`, which holds `QUICK = False` and no more.
    """
    notebook = nbformat.read(path, as_version=4)
    if quick:
        tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
        if [cell.source for cell in tagged] != [PARAMETERS]:
            raise ValueError(f"{path}: needs one cell tagged 'parameters' that is {PARAMETERS!r}")
        tagged[0].source = "QUICK = True"
    client = NotebookClient(
        notebook,
        timeout=timeout,
        startup_timeout=timeout,
        record_timing=False,
        km=AsyncKernelManager(kernel_spec_manager=ThisPython()),
        resources={"metadata": {"path": str(path.parent)}},
    )
    with tempfile.TemporaryDirectory() as settings:  # instead of the user's, whose startup files would run
        found = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        # tqdm's, which transformers imports, about widgets that nothing here shows.
        quiet = {"PYTHONWARNINGS": "ignore:IProgress not found"}
        client.execute(env=os.environ | quiet | {"IPYTHONDIR": settings, "PYTHONPATH": found})
    return notebook


def clean(notebook: Any) -> None:
    """Take out what changes between machines and reruns."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({key: x for key, x in cell.metadata.items() if key == "tags"})
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                output.data.pop("text/plain", None)  # the object's class and size


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="notebooks", description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--only", help="the beginning of the names of those to execute")
    parser.add_argument("--quick", action="store_true", help="small problems")
    parser.add_argument("--write", action="store_true", help="keep the outputs in the files")
    options = parser.parse_args(argv)
    if not options.folder.is_dir():
        parser.error(f"folder must be one of notebooks, {options.folder} is none")
    if options.quick and options.write:
        parser.error("--write keeps the outputs of full-size problems: not with --quick")
    paths = sorted(options.folder.glob(f"{options.only or ''}*.ipynb"))
    for path in paths:
        start = time.perf_counter()
        notebook = execute(path, quick=options.quick)
        if options.write:
            clean(notebook)
            nbformat.write(notebook, path)
        print(f"{path}: {time.perf_counter() - start:.1f} s", flush=True)
    print(f"{len(paths)} notebooks executed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
