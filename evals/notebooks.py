"""`make notebooks`: execute every notebook of a folder from the top, in its own kernel, and fail on the first error."""

import pathlib
import sys
import time

import nbformat
from nbclient import NotebookClient


def main(folder: str) -> int:
    paths = sorted(pathlib.Path(folder).glob("*.ipynb"))
    for path in paths:
        start = time.perf_counter()
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
        print(f"{path}: {time.perf_counter() - start:.1f} s", flush=True)
    print(f"{len(paths)} notebooks executed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
