# SPDX-License-Identifier: Apache-2.0
"""What a rank of cluster.py runs: `rank_main.py module:function FOLDER`."""

import importlib
import os
import pickle
import sys
from pathlib import Path


def main() -> None:
    import torch

    torch.set_num_threads(1)
    module, _, function = sys.argv[1].partition(":")
    folder = Path(sys.argv[2])
    arguments = pickle.loads((folder / "arguments").read_bytes())
    result = getattr(importlib.import_module(module), function)(**arguments)
    temporary = folder / "result.part"
    temporary.write_bytes(pickle.dumps(result))
    os.rename(temporary, folder / "result")


if __name__ == "__main__":
    main()
